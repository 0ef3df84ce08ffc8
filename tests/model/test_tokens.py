"""New tokens: one tokenizer everywhere, rows that start as the mean, and trained rows with autograd's gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from distlora.architecture.config_checks import check_train, read_config
from distlora.architecture.spec import Architecture, architecture_of
from distlora.architecture.tokens import check_rows_of_tokens, load_tokenizer, tokenizer_files, vocabulary_of
from distlora.config import UserError
from distlora.config.file import load_config
from distlora.generation.prompts import PromptEncoder
from distlora.loading.peft_format import adapter_tensors, load_peft_adapter
from distlora.parallel import Ranks
from distlora.planner.model import find_model
from distlora.post.merged_folder import write_stops
from distlora.post.trained import of_run
from distlora.run_folder.layout import read_record, read_result
from distlora.training import worker
from distlora.training.publish import load_weights
from distlora.training.setup import start_run_model
from distlora_launcher.cli.push import collect
from distlora_launcher.compose.checks import check_model
from distlora_launcher.compose.compose import compose_config
from support.chat_tokenizers import chat_tokenizer
from support.closeness import assert_adapters_close
from support.family_models import SINGLE, architecture, config_for, edit_config, our_logits, tokens
from support.runs import run_once
from support.small_models import NEW_TOKENS, VOCABULARY, make_run, tokenizer, write_model_folder
from support.worlds import World

NEW_IDS = tuple(range(VOCABULARY, VOCABULARY + len(NEW_TOKENS)))


def architecture_in(folder: Path) -> Architecture:
    return architecture_of(read_config(folder), folder / "config.json")


def with_new(folder: Path, *new: str, **sections: Any) -> Any:
    return config_for(folder, model={"path": str(folder), "new_tokens": list(new)}, **sections)


def test_new_tokens_are_one_token_each_and_control_tokens_are_special(folders: Path) -> None:
    extended = load_tokenizer(folders / "llama", ["<|im_start|>", "<think>"])
    assert extended("a<|im_start|>b<think>").input_ids.count(1001) == 1
    assert extended("a<|im_start|>b<think>").input_ids[-1] == 1002
    assert extended.decode([1001, 1002], skip_special_tokens=True) == "<think>"
    plain = load_tokenizer(folders / "llama")
    text = "an expression of <|im_end|>"
    assert extended(text).input_ids == plain(text).input_ids, "other text is tokenized as it was"


def test_a_token_that_exists_is_refused_with_its_id(folders: Path) -> None:
    with pytest.raises(UserError, match=r"<\|user\|> is token 3 .*trainable_token_indices=\[3\]"):
        load_tokenizer(folders / "llama", ["<new>", "<|user|>"])


def test_the_template_of_a_processor_is_the_tokenizers(folders: Path, tmp_path: Path) -> None:
    """A folder of a model of images and text may keep it in chat_template.json alone."""
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").rename(tmp_path / "template")
    assert load_tokenizer(tmp_path).chat_template is None
    template = (tmp_path / "template").read_text()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(tmp_path).chat_template == template == tokenizer().chat_template


SECOND = "a second table"
ROWS: list[tuple[str, dict[str, Any], str | None]] = [
    ("gpt_neox", {"adapter": {"modules_to_save": ["lm_head"]}}, r"modules_to_save .* names them embed_in and"),
    ("gpt_neox", {"adapter": {"trainable_token_indices": [3]}}, r"token_indices trains embed_tokens and lm_head"),
    (SECOND, {"model": {"path": "m", "new_tokens": ["a"]}}, r"model\.new_tokens .* second table that reads"),
    (SECOND, {"train": {"neftune_alpha": 5.0}}, r"train\.neftune_alpha=5\.0 .* second table that reads"),
    ("qwen3_5", {"model": {"path": "m", "new_tokens": ["a"]}, "train": {"neftune_alpha": 5.0}}, None),
]


@pytest.mark.parametrize(("name", "sections", "reason"), ROWS)
def test_rows_of_matrices_with_other_names_or_beside_a_second_table_are_refused(
    name: str, sections: dict[str, Any], reason: str | None
) -> None:
    config = config_for(Path("m"), **sections)
    found = dataclasses.replace(architecture("llama" if name == SECOND else name), takes_embeddings=name != SECOND)
    with contextlib.nullcontext() if reason is None else pytest.raises(UserError, match=reason):
        check_rows_of_tokens(config.spec, found)
        check_train(config.train, found)


def test_special_tokens_are_set_saved_and_never_added(folders: Path, tmp_path: Path) -> None:
    folder, special = folders / "llama", {"eos_token": "<end>", "pad_token": "<|user|>"}
    ours = load_tokenizer(folder, ["<end>"], special)
    assert (ours.eos_token_id, ours.pad_token_id, len(ours)) == (1001, 3, 1002)
    assert ours.decode([3, 1001], skip_special_tokens=True) == ""
    assert ours("an expression").input_ids == load_tokenizer(folder)("an expression").input_ids
    words = [f"model.path={folder}", f"data.path={folders / 'text.jsonl'}", 'model.new_tokens=["<end>"]']
    words += ['model.special_tokens={eos_token: "<end>"}', 'model.special_tokens.pad_token="<|user|>"']
    config = compose_config(words)
    assert config.model.special_tokens == special
    for name, content in tokenizer_files(config.spec).items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).special_tokens_map == ours.special_tokens_map
    for before, after in ((None, [1, 1001]), ([7], [7, 1001])):  # transformers' generate stops at the run's own token.
        if before:
            (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": before}))
        write_stops(tmp_path, of_run(config, None))
        assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == after
    with pytest.raises(
        UserError, match=r"special_tokens\.eos_token=<\|usr\|> is not in the .*did you mean '<\|user\|>'"
    ):
        load_tokenizer(folder, (), {"eos_token": "<|usr|>"})
    with pytest.raises(UserError, match=r"special_tokens has no 'end_token'.*model\.new_tokens"):
        config_for(folder, model={"path": str(folder), "special_tokens": {"end_token": "<|user|>"}})
    with pytest.raises(UserError, match=r"puts <s> before every text"):
        load_tokenizer(Path(starts_with_bos(tmp_path)), (), {"bos_token": "<|user|>"})


def starts_with_bos(folder: Path) -> Path:
    """Save a tokenizer that puts its beginning-of-text token in front of every text."""
    chat_tokenizer("llama3").save_pretrained(folder / "bos")
    return folder / "bos"


def test_the_vocabulary_grows_by_what_spare_rows_lack(folders: Path, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "spare", "llama", vocab_size=VOCABULARY + 2)
    for folder, stored, rows in ((folders / "llama", 1001, 1004), (tmp_path / "spare", 1003, 1004)):
        config = with_new(folder, "<a>", "<b>", "<c>")
        vocabulary = vocabulary_of(config.spec, architecture_in(folder))
        assert (vocabulary.stored, vocabulary.rows) == (stored, rows)
        assert find_model(config).shapes.vocabulary == rows, "planned for without the tokenizer"
        assert vocabulary.new == {"<a>": 1001, "<b>": 1002, "<c>": 1003}
        assert vocabulary.trained == {"embed_tokens": (1001, 1002, 1003), "lm_head": (1001, 1002, 1003)}
    assert not vocabulary_of(with_new(tmp_path / "spare", "<a>").spec, architecture_in(tmp_path / "spare")).has_grown


def test_a_config_of_another_vocabulary_is_refused(folders: Path, tmp_path: Path) -> None:
    """One without the size has transformers' default, as Gemma 3's on the hub."""
    folder = Path(shutil.copytree(folders / "llama", tmp_path / "model"))
    edit_config(folder, vocab_size=None)
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \[1001, 96\] on disk and \[32000, 96\] by"):
        check_model(with_new(folder))
    edit_config(folder, vocab_size="many")
    with pytest.raises(UserError, match=r"vocab_size.*many"):
        check_model(with_new(folder))


def test_a_list_means_the_embedding_and_a_mapping_each_matrix(folders: Path) -> None:
    def trained(model: str, indices: Any) -> Any:
        config = with_new(folders / model, "<a>", adapter={"trainable_token_indices": indices})
        return vocabulary_of(config.spec, architecture_in(folders / model)).trained

    assert trained("llama", [9, 4]) == {"embed_tokens": (4, 9, 1001), "lm_head": (1001,)}
    assert trained("llama", {"lm_head": [9]}) == {"embed_tokens": (1001,), "lm_head": (9, 1001)}
    assert trained("llama-tied", [9]) == {"embed_tokens": (9, 1001)}
    assert trained("llama-tied", {"embed_tokens": [9, 4], "lm_head": [9, 4]}) == {"embed_tokens": (4, 9, 1001)}
    with pytest.raises(UserError, match="write one list for both"):
        trained("llama-tied", {"embed_tokens": [9, 4], "lm_head": [4, 9]})
    with pytest.raises(UserError, match="ids from 0 to 1001"):
        trained("llama", [1002])


def own_rows(ranks: Ranks, *, folder: Path, adapter: dict[str, Any]) -> dict[str, tuple[Tensor, int]]:
    """Return this rank's rows of embedding and head and the first one's index; trained rows whole."""
    sections: dict[str, Any] = {"adapter": adapter, "quant": {"method": "none"}, "train": {"dtype": "bf16"}}
    model, backend, _ = start_run_model(with_new(folder, "<a>", "<b>", "<c>", **sections), ranks)
    matrices = {"embed_tokens": model.embedding.get_parameter("weight"), "lm_head": model.head.weight}
    rows = {name: backend.local_rows(parameter) for name, parameter in matrices.items()}
    trained = {f"trained {name}": (model.get_parameter(f"token_rows.{name}.rows"), 0) for name in model.token_rows}
    return {name: (rows.detach().clone(), first) for name, (rows, first) in {**rows, **trained}.items()}


@pytest.mark.parametrize("spare", [0, 50])
def test_new_rows_are_the_mean_on_any_number_of_ranks(world: World, tmp_path: Path, spare: int) -> None:
    """The mean of the rows that the tokenizer had; the rest is what was on disk, and trained rows are the matrix's."""
    folder = tmp_path / "model"
    write_model_folder(folder, "llama", vocab_size=VOCABULARY + spare)
    rows = max(VOCABULARY + spare, VOCABULARY + 3)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    adapter = {"target_modules": "qv", "r": 2, "trainable_token_indices": {"embed_tokens": [7], "lm_head": [1000]}}
    for size in (1, 3):
        parts = world.run(size, own_rows, folder=folder, adapter=adapter)
        for name, disk in (("embed_tokens", "model.embed_tokens.weight"), ("lm_head", "lm_head.weight")):
            expected = torch.zeros(rows, stored[disk].shape[1])
            expected[: len(stored[disk])] = stored[disk]
            expected[list(NEW_IDS)] = stored[disk][:VOCABULARY].double().mean(dim=0).float()
            expected = expected.bfloat16()
            for part in parts:
                local, first = part[name]
                assert torch.equal(local, expected[first : first + len(local)]), (name, size)
            assert sum(len(part[name][0]) for part in parts) == rows
            ids = [7 if name == "embed_tokens" else 1000, *NEW_IDS]
            assert all(torch.equal(part[f"trained {name}"][0], expected[ids].float()) for part in parts)


@pytest.fixture(scope="module")
def run(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of six steps with new tokens."""
    run_dir = tmp_path_factory.mktemp("tokens") / "run"
    adapter = {"target_modules": "qv", "r": 2}
    make_run(run_dir, folders, "llama", NEW_TOKENS, adapter=adapter, train={"max_steps": 6, "save_every": 2, "keep": 3})
    worker.run(run_dir, SINGLE)
    return run_dir


def test_preparation_generation_and_the_published_adapter_have_one_tokenizer(run: Path, folders: Path) -> None:
    record = read_record(run / "data.json")
    assert record["splits"]["train"]["largest_token"] in NEW_IDS
    assert record["settings"]["new_tokens"] == list(NEW_TOKENS)
    published = transformers.AutoTokenizer.from_pretrained(run / "adapter")
    text = "the statement of the method"
    config = load_config(run)
    model, _, _ = start_run_model(config, SINGLE)
    encoder = PromptEncoder(model, config.model, record)
    assert published(text).input_ids == encoder.tokenizer(text).input_ids
    assert set(NEW_IDS) <= set(published(text).input_ids)
    assert published.chat_template == tokenizer().chat_template


def test_every_trained_row_moves_and_a_resume_has_them(run: Path) -> None:
    config = load_config(run)
    model, backend, _ = start_run_model(config, SINGLE)
    before = {name: tensor.detach().clone() for name, tensor in adapter_tensors(model).items()}
    load_weights(run / "checkpoints" / "step_00000002", model, backend)
    for name, tensor in adapter_tensors(model).items():
        if "token_adapter" in name:
            assert (tensor != before[name]).any(dim=1).all(), f"a row of {name} was not trained"
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert saved["trainable_token_indices"] == {"embed_tokens": list(NEW_IDS), "lm_head": list(NEW_IDS)}


def test_the_pushed_repository_has_the_tokenizer_and_says_how_to_load_it(run: Path) -> None:
    for checkpoint in (None, "step_2"):
        files = collect(read_result(run, checkpoint), repository="me/it", base="org/base")
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files.keys()
        card = files["README.md"]
        new = b"| model.new_tokens | statement, of the, method |"
        for words in (new, b"resize_token_embeddings(rows", b'AutoTokenizer.from_pretrained("me/it")'):
            assert words in card


def test_a_run_says_which_rows_no_gradient_has_reached(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A token that the data never has: its row of the head is trained (as an answer that is wrong), the other not."""
    settings: dict[str, Any] = {"adapter": {"target_modules": "qv", "r": 2}, "train": {"max_steps": 3}}
    make_run(tmp_path / "run", folders, "llama", ("method", "<unseen>"), **settings)
    worker.run(tmp_path / "run", SINGLE)
    said = [line for line in capsys.readouterr().out.splitlines() if "no gradient" in line]
    assert [line.partition(" in the first")[0] for line in said] == [
        "no gradient has reached row 1002 (<unseen>) of embed_tokens"
    ]
    assert "in the first 3 steps" in said[0]


@pytest.mark.ci
def test_full_fine_tuning_on_ranks_publishes_the_grown_model_and_its_tokenizer(
    world: World, folders: Path, tmp_path: Path
) -> None:
    full = {"adapter": {"method": "full", "target_modules": "qv"}, "quant": {"method": "none"}}
    published = {}
    for size in (1, 3):
        run_dir = tmp_path / f"{size}"
        make_run(run_dir, folders, "llama-tied", NEW_TOKENS, **full, train={"max_steps": 2, "global_batch": 4})
        world.run(size, run_once, run_dir=run_dir)
        model = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "model")
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == NEW_IDS[-1] + 1
        assert len(transformers.AutoTokenizer.from_pretrained(run_dir / "model")) == NEW_IDS[-1] + 1
        published[size] = dict(model.state_dict())
    assert_adapters_close(published[3], published[1])


def of_peft(folder: Path, base: Path, indices: Any, rows: int | None = None) -> Any:
    """Return a PEFT model whose trained rows (and B) have moved, saved as PEFT saves it by default."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    tuned = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    tuned.save_pretrained(folder)
    return tuned


@pytest.mark.parametrize(
    ("model", "indices", "new"),
    [
        ("llama", {"lm_head": [8]}, ()),
        ("llama", {"embed_tokens": [1002, 9, 1001], "lm_head": [1001, 1002]}, ("<a>", "<b>")),
        ("llama-tied", [1001, 4], ("<a>",)),
    ],
    ids=str,
)
def test_a_run_starts_from_the_trained_rows_of_peft(
    folders: Path, tmp_path: Path, model: str, indices: Any, new: tuple[str, ...]
) -> None:
    tuned = of_peft(tmp_path / "peft", folders / model, indices, VOCABULARY + len(new) if new else None)
    quoted = ",".join(f'"{text}"' for text in new)
    words = [f"model.path={folders / model}", f"data.path={folders / 'text.jsonl'}", "quant=none", "train.dtype=fp32"]
    words += [f"model.new_tokens=[{quoted}]", f"adapter.init_from={tmp_path / 'peft'}", "data.sequence_length=64"]
    config = compose_config(words)
    check_model(config)
    ours, backend, _ = start_run_model(config, SINGLE)
    load_peft_adapter(ours, config.adapter, config.quant.method, backend)
    ids = tokens(2, 30)
    ids[:, ::3] = torch.tensor([4, 9, 8, *(range(1001, 1001 + len(new)) or (4, 8))] * 4)[:10]
    with torch.no_grad():
        difference = (tuned(input_ids=ids).logits - our_logits(ours, ids)).abs().max()
    assert difference <= 1e-4, f"logits are {difference:.1e} apart"


def test_an_adapter_with_new_tokens_asks_for_them_by_name(folders: Path, tmp_path: Path) -> None:
    of_peft(tmp_path / "peft", folders / "llama-tied", [1001, 1002], VOCABULARY + 2)
    load_tokenizer(folders / "llama", ["<a>", "<b>"]).save_pretrained(tmp_path / "peft")
    words = [f"model.path={folders / 'llama-tied'}", f"data.path={folders / 'text.jsonl'}", "data.sequence_length=64"]
    with pytest.raises(UserError, match=r"""1,001 tokens .*'model.new_tokens=\["<a>","<b>"\]'"""):
        check_model(compose_config([*words, f"adapter.init_from={tmp_path / 'peft'}"]))
    # A row that PEFT's user added and did not train is in no file that we read.
    of_peft(tmp_path / "half", folders / "llama-tied", [1001], VOCABULARY + 2)
    with pytest.raises(UserError, match="row 1002 is not among trainable_token_indices"):
        check_model(compose_config([*words, f"adapter.init_from={tmp_path / 'half'}", 'model.new_tokens=["<a>"]']))
