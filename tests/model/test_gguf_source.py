"""GGUF files as the base: values equal transformers', rows in the model's order, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from distlora.architecture import gguf_folder
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.gguf_folder import gguf_file, stored_parts
from distlora.architecture.kept_weights import KeptTokens, kept_tokens
from distlora.config import ModelConfig, UserError
from distlora.derive.gguf import describe, read_gguf_header
from distlora.model.adapters import adapter_parameters
from distlora.model.frozen_linear import TokenEmbedding
from distlora.parallel import Ranks
from distlora.planner.model import model_in
from distlora.planner.traffic import step_traffic
from distlora.planner.workload import Workload
from distlora.post.export.client_check import our_logits
from distlora.post.trained import Name
from distlora.run_folder.layout import Result
from distlora.training import worker
from distlora.training.model_card import model_card
from distlora.weights.reader import Reader
from distlora_launcher.compose.hub import localize, restore
from distlora_launcher.demo import model as demo_model
from support import gguf_files
from support.closeness import assert_adapters_close, assert_close, assert_losses_close, assert_same_run
from support.counted_step import our_traffic
from support.family_models import SINGLE, architecture, config_for, load_ours
from support.gguf_files import MODELS, dense_by_transformers, described_here, write_random
from support.planned import both, check
from support.runs import build_run_model, outcome, run_until
from support.small_models import make_run, write_text_file
from support.tiers import ci, slow
from support.worlds import World, start_world

KEEP, NONE = {"method": "keep"}, {"method": "none"}
MATRICES = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    write_random(file, "llama")
    return file


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_equals_transformers(name: str, tmp_path: Path) -> None:
    write_random(tmp_path / "m.gguf", name)
    headers = CheckpointFiles(described_here(tmp_path / "m.gguf", tmp_path / "described")).headers
    model = dense_by_transformers(tmp_path / "m.gguf", tmp_path / "described")
    expected = {n: v for n, v in model.state_dict().items() if n in headers}
    assert model.state_dict().keys() - expected.keys() <= set(model.all_tied_weights_keys)
    with Reader() as reader:
        for parameter, value in expected.items():
            assert headers[parameter].shape == value.shape, parameter
            whole = reader.read([headers[parameter]], 0, value.numel())
            assert torch.equal(whole.float(), value.flatten()), parameter
            start, stop = value.numel() // 3, value.numel() // 3 + min(999, value.numel() // 2)
            parts = [part for _, part in reader.chunks([headers[parameter]], start, stop, 100)]
            assert torch.equal(torch.cat(parts).float(), value.flatten()[start:stop]), parameter


def test_two_files_and_safetensors_beside_one(tmp_path: Path) -> None:
    assert gguf_file(tmp_path / "absent") is None
    (tmp_path / "a.gguf").touch()
    assert gguf_file(tmp_path) == gguf_file(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"2 GGUF files \(a.gguf, b.gguf\); set model.path to one of them"):
        gguf_file(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert gguf_file(tmp_path) is None


def test_a_file_that_changes_is_not_read(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(llama.read_bytes())
    folder = described_here(file, tmp_path / "described")
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"m.gguf changed after .*gguf.json was written"):
        _ = CheckpointFiles(folder).headers
    file.unlink()
    with pytest.raises(UserError, match=r"m.gguf is missing; .*gguf.json refers to its weights"):
        _ = CheckpointFiles(folder).headers


def rewritten(source: Path, target: Path, *, drop: str = "", add: str = "", **metadata: Any) -> Path:
    """Copy a file without a tensor, with one more, or with more metadata of llama."""
    read = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, metadata.pop("general.architecture", "llama"))
    for name, field in read.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in metadata:
            kinds = [*field.types, None]
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[1])
    for name, value in metadata.items():
        kind = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        writer.add_key_value(name, value, kind[type(value)])
    for tensor in read.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    if add:
        writer.add_tensor(add, np.full(32, 3.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": "clima"}, r"does not read general.architecture='clima'"),
        ({"drop": "blk.1.attn_k.weight"}, "no tensor of it is .*model.layers.1.self_attn.k_proj.weight"),
        ({"add": "blk.0.attn_rot.weight"}, "no parameter for the tensor blk.0.attn_rot.weight"),
        ({"add": "rope_freqs.weight"}, "rope_freqs.weight is not what Llama 3.1 and later have"),
        ({"llama.rope.scaling.type": "yarn"}, "ignores llama.rope.scaling.type='yarn'"),
        ({"llama.expert_count": 8}, "ignores llama.expert_count=8"),
        ({"llama.attention.value_length": 32}, "value_length=32, but transformers' .* has head_dim=64"),
        ({"tokenizer.ggml.pre": "poro-chat"}, "tokenizer.ggml.pre='poro-chat' is not one that transformers splits"),
        ({"llama.block_count": 2**31}, r"llama.block_count=2147483648 is more than its \d+ tensors; download it again"),
        ({"split.count": 3}, "is one of 3 parts; merge them with `llama-gguf-split --merge FIRST_PART OUT.gguf`"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(
    changes: dict[str, Any], reason: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        described_here(rewritten(llama, tmp_path / "m.gguf", **changes), tmp_path / "described")


@pytest.mark.parametrize("seed", [0, ci(1)])
def test_damaged_headers_are_refused_by_name(seed: int, llama: Path, tmp_path: Path) -> None:
    """A changed byte of the table of tensors is refused or seen; one of the metadata leaves the table as it is.

    A cut file is refused by its tensor.
    """
    whole, content, file = read_gguf_header(llama), llama.read_bytes(), tmp_path / "m.gguf"
    generator, names = np.random.default_rng(seed), list(whole.tensors)
    table = content.rindex(names[0].encode(), 0, whole.size) - 8
    for first, stop in ((24, table), (table, content.rindex(names[-1].encode(), 0, whole.size))):
        refused = accepted = 0
        for _ in range(100):
            damaged = bytearray(content)
            damaged[generator.integers(first, stop)] ^= generator.integers(1, 256)
            file.write_bytes(damaged)
            try:
                tensors = read_gguf_header(file).tensors
            except UserError as error:
                refused += str(file) in str(error)
            else:
                accepted += 1
                assert (tensors == whole.tensors) == (first == 24)
        assert refused + accepted == 100, "the file is named"
        assert min(refused, accepted) >= 5, "both happen"
    for cut in generator.integers(0, len(content), 50).tolist():
        file.write_bytes(content[:cut])
        ends = {name: tensor.offset + tensor.num_bytes for name, tensor in whole.tensors.items()}
        missing = next(name for name, end in ends.items() if end > cut)
        reason = f"truncated: {missing} ends at byte" if cut >= whole.size else "truncated|damaged"
        with pytest.raises(UserError, match=reason):
            read_gguf_header(file)
    for value, place in itertools.product((2**63, 2**31, 10**6), (8, 16, 24)):  # Counts and lengths that fill no file.
        file.write_bytes(content[:place] + struct.pack("<Q", value) + content[place + 8 :])
        with pytest.raises(UserError, match="damaged"):
            read_gguf_header(file)


def losses(ranks: Ranks, *, folder: Path, keep: bool, backend: str = "fsdp2") -> dict[str, Tensor]:
    """Return the losses of two sequences, and the gradients of the adapters."""
    model, _ = load_ours(folder, ranks, quant=KEEP if keep else NONE, parallel={"backend": backend})
    assert (model.head.kept is not None) == isinstance(model.embedding, TokenEmbedding) == keep
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    sums = model(ids, torch.arange(40).expand_as(ids), ids.roll(-1, 1))
    if ranks.world == 1:
        sums.sum().backward()
    gradients = {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}
    return {"losses": sums.detach(), **gradients}


@pytest.fixture(scope="module")
def in_low_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folders of a model whose head is the embedding, and of one that has both."""
    root = tmp_path_factory.mktemp("tokens")
    for name, types in (("llama", ("Q8_0",)), ("llama-untied", ("Q4_1", "Q8_0", "Q6_K"))):
        write_random(root / f"{name}.gguf", name, types)
        described_here(root / f"{name}.gguf", root / name)
    return root


@pytest.mark.parametrize("name", [ci("llama"), "llama-untied"])
def test_embedding_and_head_in_their_own_type_compute_what_their_dense_copies_do(
    world: World, in_low_bits: Path, name: str
) -> None:
    kept, dense = (losses(SINGLE, folder=in_low_bits / name, keep=keep) for keep in (True, False))
    assert len(kept) == len(dense) > 20
    for parameter, value in dense.items():
        assert_close(kept[parameter], value, ulps=32)
    for by_rank in world.run(2, losses, folder=in_low_bits / name, keep=True):
        assert torch.equal(by_rank["losses"], kept["losses"])


@pytest.mark.ci
@pytest.mark.parametrize("name", ["llama", slow("llama-untied")])
def test_zero3_gathers_an_embedding_and_a_head_in_low_bits(in_low_bits: Path, name: str) -> None:
    alone = losses(SINGLE, folder=in_low_bits / name, keep=True)["losses"]
    with start_world(2, regroups=True) as two:
        for by_rank in two.run(2, losses, folder=in_low_bits / name, keep=True, backend="zero3"):
            assert torch.equal(by_rank["losses"], alone)


TRAINING_TOKENS: list[dict[str, dict[str, Any]]] = [
    {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    {"adapter": {"trainable_token_indices": [3]}},
    {"model": {"new_tokens": ["<|more|>"]}},
]


@pytest.mark.parametrize("settings", TRAINING_TOKENS, ids=str)
def test_a_matrix_whose_rows_are_trained_is_dense(settings: dict[str, dict[str, Any]], in_low_bits: Path) -> None:
    (section, values), folder = next(iter(settings.items())), in_low_bits / "llama-untied"
    sections = {section: ({"path": str(folder)} if section == "model" else {}) | values}
    config, (setting,) = config_for(folder, quant=KEEP, **sections), values
    model = build_run_model(config)
    assert model.head.kept is None
    notes = [f"quant=keep dequantizes {name}.weight: {section}.{setting} trains it, or rows of it" for name in MATRICES]
    assert model.notes[-2:] == notes
    work, shapes = Workload.of(config), model_in(folder).shapes
    assert shapes.kept_tokens == ("q6_K", "q4_1")
    assert work.token_formats(shapes) == (None, None)


def test_which_embeddings_and_heads_are_kept(in_low_bits: Path, tmp_path: Path) -> None:
    """Where one is not, the log says why; nothing is said of one that is dense on disk."""
    llama, gemma = architecture("llama"), architecture("gemma3")
    assert (llama.looks_up, gemma.looks_up) == (True, False)
    headers = dict(CheckpointFiles(in_low_bits / "llama-untied").headers)
    assert kept_tokens(llama, headers) == KeptTokens(("q6_K", "q4_1"), ())
    assert kept_tokens(dataclasses.replace(llama, tied=True), headers) == KeptTokens(("q6_K", "q6_K"), ())
    scaled = dataclasses.replace(llama, looks_up=False)
    note = "quant=keep dequantizes model.embed_tokens.weight: the embedding of llama does more than look rows up"
    assert kept_tokens(scaled, headers) == KeptTokens((None, "q4_1"), (note,))
    assert kept_tokens(dataclasses.replace(scaled, tied=True), headers) == KeptTokens((None, None), (note,))

    def as_it_is(**changes: Any) -> KeptTokens:
        head = headers["lm_head.weight"]
        return kept_tokens(llama, headers | {"lm_head.weight": dataclasses.replace(head.tensor, **changes).segment})

    for changes, reason in (
        ({"format": None, "reason": "lm_head.weight is stored as IQ4_NL"}, "lm_head.weight is stored as IQ4_NL"),
        ({"format": "fp8_block"}, "no rows of FP8 in 128 x 128 blocks are decoded alone"),
        ({"format": "nf4_absmax"}, "no rows of NF4 are decoded alone"),
        ({"transposed": True}, "it is stored in several tensors, or transposed"),
    ):
        kept = as_it_is(**changes)
        assert kept == KeptTokens(("q6_K", None), (f"quant=keep dequantizes lm_head.weight: {reason}",))
    write_random(tmp_path / "m.gguf", "llama-untied", ("F16",))
    dense = CheckpointFiles(described_here(tmp_path / "m.gguf", tmp_path / "dense")).headers
    assert kept_tokens(llama, dense) == KeptTokens((None, None), ())


@pytest.mark.ci
@pytest.mark.parametrize(("name", "size"), [("llama", 1), ("llama", 2), ("llama-untied", 2), ("llama-untied", 3)])
def test_a_plan_counts_an_embedding_and_a_head_in_low_bits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    """Bytes held, gathered and at the peak; a vocabulary that makes the LM head's moment the largest."""
    monkeypatch.setitem(gguf_files._SIZES, "vocab_size", 20001)
    write_random(tmp_path / "m.gguf", name, ("Q8_0",) if name == "llama" else ("Q4_1", "Q8_0", "Q6_K"))
    folder = described_here(tmp_path / "m.gguf", tmp_path / name)
    plan, found = both(world, folder, size, {"quant": KEEP}, 1)
    check(plan, found)
    assert found.part == "head"
    if size > 1:
        config = config_for(folder, quant=KEEP, train={"micro_batch": 2})
        step = step_traffic(Workload.of(config), model_in(folder).shapes, world=size, accumulation=1)
        for counts, _ in world.run(size, our_traffic, config=config, accumulation=1):
            assert counts.gathered == step.gathered


@pytest.mark.ci
@pytest.mark.parametrize("name", ["llama", slow("llama-untied")])
def test_a_run_with_all_weights_in_low_bits_is_that_of_the_dequantized_base(
    world: World, in_low_bits: Path, tmp_path: Path, name: str
) -> None:
    """On 1, 2 and 3 ranks; one that was killed goes on bit for bit."""
    write_text_file(in_low_bits / "text.jsonl")
    train = {"max_steps": 5, "save_every": 2, "log_every": 1, "global_batch": 6, "verify": True}
    make_run(tmp_path / "dense", in_low_bits, name, quant=NONE, train=train)
    expected_losses, expected = outcome(world, 1, tmp_path / "dense")
    for size in (1, 2, 3):
        make_run(tmp_path / f"{size}", in_low_bits, name, quant=KEEP, train=train)
        losses, adapter = outcome(world, size, tmp_path / f"{size}")
        assert_losses_close(losses, expected_losses)
        assert_adapters_close(adapter, expected)
    make_run(tmp_path / "stopped", in_low_bits, name, quant=KEEP, train=train)
    for stop_before in (3, None):
        world.run(2, run_until, run_dir=tmp_path / "stopped", stop_before=stop_before)
    assert_same_run(tmp_path / "stopped", tmp_path / "2")


def texts_are_those_of_the_file(file: Path, folder: Path) -> None:
    """Assert that a described tokenizer has the file's tokens, merges, special tokens and template."""
    fields, tokenizer = gguf.GGUFReader(file).fields, transformers.AutoTokenizer.from_pretrained(folder)
    values = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}
    tokens = values["ggml.tokens"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert len(tokenizer) == len(tokens)
    assert max(tokenizer("<|endoftext|>").input_ids) < len(tokens)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    assert [" ".join(pair) for pair in spec["model"]["merges"]] == values["ggml.merges"]
    for name in ("bos", "eos"):
        assert getattr(tokenizer, f"{name}_token_id") == values[f"ggml.{name}_token_id"]
    special = {tokens[number] for number, kind in enumerate(values["ggml.token_type"]) if kind == 3}
    assert special <= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert tokenizer.chat_template == values.get("chat_template")
    assert tokenizer.tokenize("in 1984") == [*tokenizer.tokenize("in"), *tokenizer.tokenize(" "), "1", "9", "8", "4"]


def test_the_tokenizer_is_the_file_s_own(llama: Path, tmp_path: Path) -> None:
    texts_are_those_of_the_file(llama, described_here(llama, tmp_path / "described"))


@pytest.mark.slow
def test_the_demo_s_file_is_read_and_trained_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT gives our logits with an adapter of quant=keep on transformers' model of the file."""
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))
    try:
        file = gguf_file(demo_model.smollm2(print))
    except UserError as error:
        pytest.skip(str(error))
    folder = described_here(file, tmp_path / "described")
    texts_are_those_of_the_file(file, folder)
    headers, model = CheckpointFiles(folder).headers, dense_by_transformers(file, folder)
    with Reader() as reader:
        for name, value in model.state_dict().items():
            if name in headers:
                assert torch.equal(reader.read([headers[name]], 0, value.numel()).float(), value.flatten()), name
    chats = {"path": str(tmp_path / "demo" / demo_model.DATA), "eval_fraction": 0.0, "sequence_length": 128}
    train = {"max_steps": 2, "global_batch": 2, "micro_batch": 1}
    make_run(tmp_path / "run", tmp_path, folder.name, quant={"method": "keep"}, data=chats, train=train)
    worker.run(tmp_path / "run", SINGLE)
    ours = our_logits(Name(place=str(tmp_path / "run")).read())
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "run" / "adapter").eval()
    assert (adapted(ours.tokens).logits - ours.logits).abs().max() < 1e-4 < ours.moved


@pytest.fixture
def kept_run(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """Return model.path of a run on a GGUF file of its own, as RUN/config.yaml holds it."""
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_folder, "derived", described_by_name)
    file = tmp_path / "m.gguf"
    file.write_bytes(llama.read_bytes())
    return localize(ModelConfig(path=str(file)))


def described_by_name(_doing: str, _flag: str, file: str, folder: str) -> str:
    return describe(Path(file), Path(folder))


def test_the_folder_of_a_gguf_file_is_made_again(kept_run: ModelConfig, tmp_path: Path) -> None:
    folder, names = Path(kept_run.path), sorted(CheckpointFiles(kept_run.path).headers)
    assert kept_run.gguf_file == str(tmp_path / "m.gguf")
    shutil.rmtree(tmp_path / "cache")
    restore(kept_run)
    assert {"config.json", "tokenizer.json", "gguf.json"} <= {path.name for path in folder.iterdir()}
    (folder / "gguf.json").write_text("{")
    restore(kept_run)
    moved = (tmp_path / "m.gguf").rename(tmp_path / "moved.gguf")
    with pytest.raises(UserError, match=r"m.gguf is missing, the GGUF file that the run trained on"):
        restore(kept_run)
    kept_run = dataclasses.replace(kept_run, gguf_file=str(moved))
    restore(kept_run)
    headers = CheckpointFiles(folder).headers
    assert sorted(headers) == names
    assert {part.file for part in stored_parts(headers).values()} == {moved}
    content = bytearray(moved.read_bytes())
    content[200] ^= 1
    moved.write_bytes(content)
    with pytest.raises(UserError, match=r"moved.gguf is not the GGUF file that the run trained on, but another"):
        restore(kept_run)


def test_a_cache_that_cannot_be_written_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cache/gguf/.*llama, which is to describe .*cannot be written .Not a dir"):
        gguf_folder.described(llama)


@pytest.mark.parametrize("method", ["keep", "nf4"])
def test_a_model_card_names_the_gguf_file(kept_run: ModelConfig, tmp_path: Path, method: str) -> None:
    config = config_for(Path(kept_run.path), quant={"method": method})
    result = Result(
        config=dataclasses.replace(config, model=kept_run),
        folder=tmp_path,
        step=None,
        adapter={},
        evaluations={},
        data={},
        summary={},
        environment={},
    )
    (tmp_path / "adapter_model.safetensors").touch()
    card = model_card(result, repository="me/it", base=None, license_of_base={})
    assert "The base is the GGUF file `m.gguf`" in card
    assert card.count('("FOLDER_OF_THE_GGUF_FILE", gguf_file="m.gguf"') == 2
    assert "BitsAndBytesConfig" not in card
    assert ("training had its values in NF4" in card) == (method == "nf4")
