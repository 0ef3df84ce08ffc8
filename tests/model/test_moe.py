"""Check mixtures of experts: adapted weights, bits per parameter, rows that choose, the router loss.

Their forward, gradients and files are columns of tests/model/test_families.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import read_header
from distlora.checkpoint.verify import verify
from distlora.config import AdapterConfig, Config, UserError
from distlora.loading.load_base import load_base
from distlora.loading.peft_format import (
    adapter_config,
    adapter_tensors,
    load_peft_adapter,
    shared_factors,
    stored_tensors,
    transposed_factors,
)
from distlora.loading.tensor_files import DeferredTensor
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertPair
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Ranks
from distlora.planner.model import model_in
from distlora.planner.storage import trained_tensors
from distlora.planner.workload import Workload
from distlora.post.export import worker as export_worker
from distlora.post.export.formats import ExportRequest
from distlora.post.trained import Name, of_run
from distlora.post.weights import read_factors
from distlora.training import worker
from distlora.training.expert_load import ExpertLoad, expert_modules
from distlora.training.metrics import describe_experts
from distlora.training.publish import publish_result
from distlora.training.setup import start_run_model
from distlora.weights.peft_folder import check_fits, read_peft_adapter, with_layout
from distlora.weights.reader import Reader
from distlora_launcher.compose.checks import check_initial_adapter, check_model
from distlora_launcher.compose.compose import compose_config
from support.bitsandbytes_weights import quantize
from support.closeness import assert_adapters_close, assert_close, assert_losses_close, relative_error
from support.family_models import (
    SINGLE,
    FolderOf,
    config_for,
    dequantized,
    edit_config,
    load_ours,
    our_logits,
    positions_of,
    save_adapter,
    shifted,
    three_steps,
    tokens,
    write_family_folder,
)
from support.peft_models import write_adapter
from support.report_folders import reported
from support.runs import build_run_model, parallelize_run
from support.small_models import make_run, read_metrics, write_model_folder, write_text_file
from support.tiers import ci
from support.worlds import World

MODELS = ("mixtral", "qwen3-moe", "gpt-oss")


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FUSED = {"gate_up_proj", "down_proj"}
SELECTED: list[tuple[dict[str, Any], set[str]]] = [
    ({"target_modules": "attention"}, ATTENTION),
    ({"target_modules": "mlp"}, FUSED),
    ({"target_modules": "all-linear"}, ATTENTION | FUSED),
    ({"target_modules": "all-linear", "target_parameters": ["mlp.experts.down_proj"]}, ATTENTION | {"down_proj"}),
    ({"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}, {"q_proj", "gate_up_proj"}),
    ({"target_modules": [], "target_parameters": ["gate_up_proj"]}, {"gate_up_proj"}),
]


@pytest.mark.parametrize("name", MODELS)
def test_presets_and_target_parameters_choose_experts_and_never_a_router(family_folder: FolderOf, name: str) -> None:
    for adapter, expected in SELECTED:
        model = build_run_model(config_for(family_folder(name), adapter={"r": 4, **adapter}))
        assert {path.rpartition(".")[2] for path, _ in model.adapted_weights()} == expected
        assert "routers have none and are frozen" in next(describe_experts(model))


def test_experts_start_as_pefts_do(family_folder: FolderOf) -> None:
    """A uniform on +-1/sqrt(in) or normal with std 1/r of one expert, B zero, the scale of one expert's rank."""
    adapter = {"target_modules": "mlp", "r": 8, "rank_pattern": {"down_proj": 2}}
    model, _, _ = start_run_model(config_for(family_folder("mixtral"), adapter=adapter), SINGLE)
    pairs = dict(model.adapted_experts())
    up, down = (pairs[f"model.layers.0.mlp.experts.{name}"].pairs[0] for name in ("gate_up_proj", "down_proj"))
    assert (up.rank, down.rank) == (8, 2)
    assert up.A.shape == (4 * 8, 96)
    assert down.B.shape == (96, 4 * 2)
    assert up.scaling == 16 / 8**0.5
    assert 0.98 / 96**0.5 < up.A.abs().max() <= 1 / 96**0.5
    gaussian = ExpertPair(4000, 8, num_experts=4, rank=4, scaling=1.0).to_empty(device="cpu")
    gaussian.reset(AdapterConfig(init="gaussian"), seed=0, name="x")
    assert abs(gaussian.A.std() * 4 - 1) < 0.02
    assert not any(pair.B.any() for pair in (up, down, gaussian))


@pytest.mark.parametrize("name", MODELS)
def test_the_routers_loss_is_transformers_own_and_so_are_its_gradients(
    family_folder: FolderOf, tmp_path: Path, name: str
) -> None:
    """Compare two rows in one micro-batch with the mean of transformers' and PEFT's results for each alone.

    The router loss has a large weight, and counts in the gradients of every adapter before a router.
    """
    rows, weight = tokens(2, 32), 0.5
    ours, _ = load_ours(family_folder(name), train={"dtype": "fp32", "router_aux_loss": weight})
    assert f"include {weight:g} x the routers" in list(describe_experts(ours))[-1]
    save_adapter(tmp_path / "adapter", ours, family_folder(name))
    base = dequantized(family_folder(name), ours)
    base.router_aux_loss_coef = weight
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    theirs = [tuned(input_ids=row[None], labels=row[None], output_router_logits=True) for row in rows]
    expected = sum(output.loss for output in theirs) / 2
    parameters = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if ".lora_" in n}
    own = adapter_tensors(ours)

    ours.set_num_micro(2)
    losses = ours(rows, positions_of(rows), shifted(rows)) / 31
    for loss, output in zip(losses, theirs, strict=True):
        assert abs(loss / output.loss - 1) <= 1e-6
        assert output.aux_loss * weight > 0.2, "the routers' loss is not felt"
    references = torch.autograd.grad(expected, [parameters[n] for n in own], retain_graph=True)
    for n, a, b in zip(own, torch.autograd.grad(losses.mean(), list(own.values())), references, strict=True):
        assert relative_error(a, b) <= 1e-5, n
    with torch.no_grad():
        plain = ours(rows, positions_of(rows), shifted(rows)) / 31
    assert (plain < losses - 0.2).all(), "a held-out loss includes the routers'"
    assert all(block.balance is None for block in ours.blocks), "a graph is kept alive"
    assert all(block.context.take_balance() is None for block in ours.blocks), "recomputation's graph is kept alive"


@pytest.mark.ci
def test_the_routers_loss_does_not_depend_on_ranks_or_slices(world: World, family_folder: FolderOf) -> None:
    """FSDP2 gathers a block before the first of its two gradients, that of its output and that of its router's loss."""
    settings: dict[str, Any] = {"folder": family_folder("mixtral"), "router_aux_loss": 0.5}
    expected_losses, expected = three_steps(SINGLE, **settings)
    for losses, adapter in world.run(2, three_steps, **settings):
        assert_losses_close(losses, expected_losses)
        assert_adapters_close(adapter, expected)


def test_padding_and_empty_rows_do_not_count_in_the_routers_loss(family_folder: FolderOf) -> None:
    """A row of 20 tokens is what it is alone when 12 of padding follow and an empty row is in the batch."""
    ours, _ = load_ours(family_folder("mixtral"), train={"dtype": "fp32", "router_aux_loss": 0.5})
    short = tokens(1, 20)
    alone = ours(short, positions_of(short), shifted(short))
    padded = torch.cat([short, torch.zeros(1, 12, dtype=torch.int64)], dim=1)
    positions = torch.cat([torch.arange(20), torch.arange(12)])[None]
    labels = torch.cat([shifted(short), torch.full((1, 12), -100)], dim=1)
    batch = (torch.cat([padded, torch.zeros_like(padded)]), torch.cat([positions, torch.arange(32)[None]]))
    together = ours(*batch, torch.cat([labels, torch.full_like(labels, -100)]))
    assert_close(together[:1], alone, ulps=8)
    assert together[1] == 0
    without = ours(padded, positions, labels)
    assert_close(without, alone, ulps=8)


@pytest.mark.parametrize(("config", "weight"), [({}, 0.0), ({"output_router_logits": True}, 0.001)])
def test_the_default_router_loss_is_that_of_config_json(
    family_folder: FolderOf, tmp_path: Path, config: dict[str, Any], weight: float
) -> None:
    shutil.copytree(family_folder("qwen3-moe"), tmp_path / "model")
    edit_config(tmp_path / "model", **config)
    assert build_run_model(config_for(tmp_path / "model")).router_aux_loss == weight
    off = config_for(tmp_path / "model", train={"router_aux_loss": 0.0})
    assert build_run_model(off).router_aux_loss == 0.0


def test_experts_that_bitsandbytes_left_in_16_bits_are_packed(folders: Path, tmp_path: Path) -> None:
    """It keeps fused experts dense in a checkpoint that it has quantized; here nothing but the router is."""
    quantize(folders / "mixtral", tmp_path / "packed", bnb_4bit_use_double_quant=True)
    config = config_for(tmp_path / "packed")
    model = build_run_model(config)
    loaded = load_base(model, CheckpointFiles(config.model.path), parallelize_run(model, SINGLE, config))
    assert loaded.prequantized
    weights = [module for module in model.modules() if isinstance(module, FrozenTensor)]
    assert all(weight.quantized for weight in weights)
    assert loaded.quantized_weights == sum(weight.numel for weight in weights)


TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def from_adapter(folders: Path, adapter: Path) -> Config:
    paths = [f"model.path={folders / 'mixtral'}", f"data.path={folders / 'text.jsonl'}", "data.sequence_length=64"]
    config = compose_config([*paths, f"adapter.init_from={adapter}", "train.dtype=fp32", "quant=none"])
    check_model(config)
    return config


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "target_parameters": TARGETS, "rank_pattern": {"down_proj": 3}},
        {"target_modules": [], "target_parameters": TARGETS[:1], "use_rslora": True},
    ],
    ids=str,
)
def test_experts_start_from_an_adapter_of_pefts(folders: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """Its settings are the run's, and its logits ours; what would be saved again is what was read."""
    write_adapter(tmp_path / "lora", folders / "mixtral", r=4, lora_alpha=12, **fields)
    config = from_adapter(folders, tmp_path / "lora")
    assert set(config.adapter.target_parameters) == set(fields["target_parameters"])
    model, backend, _ = start_run_model(config, SINGLE)
    load_peft_adapter(model, config.adapter, config.quant.method, backend)
    stored = safetensors.torch.load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert adapter_tensors(model).keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapter_tensors(model).items())
    rows = tokens(2, 24)
    tuned = peft.PeftModel.from_pretrained(dequantized(folders / "mixtral", model), tmp_path / "lora")
    with torch.no_grad():
        theirs, ours = tuned(input_ids=rows).logits[:, -1], model(rows, positions_of(rows), None)[:, 0]
    assert (theirs - ours).abs().max() <= 1e-4


def test_linears_named_like_experts_are_parameters_in_peft(tmp_path: Path) -> None:
    """Dense MLPs and shared experts of GLM-4 MoE: logits and gradients are PEFT's, and what PEFT saves starts a run."""
    base, saved, rows = tmp_path / "base", tmp_path / "saved", tokens(2, 24)
    write_family_folder(base, "glm4_moe")
    patterns: dict[str, Any] = {"rank_pattern": {"mlp.down_proj|o_proj": 3}, "alpha_pattern": {"up_proj": 9.0}}
    adapter: dict[str, Any] = {"target_modules": "all-linear", "r": 4, **patterns}
    sections: dict[str, Any] = {"adapter": adapter, "quant": {"method": "none"}}
    ours, backend = load_ours(base, **sections)
    publish_result(tmp_path / "adapter", ours, config_for(base, **sections).spec, None, backend)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    names = ("down_proj", "gate_proj", "up_proj")
    linears = [f"{module}.{name}.weight" for module in ("mlp", "mlp.shared_experts") for name in names]
    assert written["target_parameters"] == sorted([*linears, *TARGETS])
    tuned = peft.PeftModel.from_pretrained(dequantized(base, ours), tmp_path / "adapter", is_trainable=True)
    logits = tuned(input_ids=rows).logits
    assert (logits - our_logits(ours, rows)).abs().max() <= 1e-5
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()
    ours(rows, positions_of(rows), shifted(rows)).sum().backward()
    theirs = {name.replace(".default", ""): value.grad for name, value in tuned.named_parameters() if ".lora_" in name}
    own = adapter_tensors(ours)
    assert theirs.keys() == own.keys() >= {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"}
    assert max(relative_error(value.grad, theirs[name]) for name, value in own.items()) <= 1e-4

    with torch.no_grad():  # PEFT's own patterns name the weight.
        tuned.peft_config["default"].alpha_pattern = {r".*up_proj\.weight": 9.0}
        tuned.save_pretrained(saved)
    read = read_peft_adapter(saved)
    assert set(read.parameters) == {path for path in read.paths if re.search(r"mlp\.(shared_experts\.)?\w+$", path)}
    scaled = {path for path in read.paths if read.adapter_config.alpha_of(path) == 9.0}
    assert scaled == {path for path in read.paths if path.endswith(".up_proj")}
    check_fits(read, read.adapter_config, ours.architecture)
    with pytest.raises(UserError, match=r"use_dora=true is not supported for adapters of model.layers.0.mlp.down_proj"):
        load_ours(base, adapter={"target_modules": ["down_proj"], "use_dora": True}, quant={"method": "none"})


def test_experts_start_from_an_adapter_of_peft_before_its_change(folders: Path, tmp_path: Path) -> None:
    """Its factors are those of the transposed weights, which the shapes tell; a square weight alone is refused."""
    lora = write_adapter(tmp_path / "lora", folders / "mixtral", r=4, target_modules=[], target_parameters=TARGETS)
    file, settings = lora / "adapter_model.safetensors", lora / "adapter_config.json"
    stored = safetensors.torch.load_file(file)
    stems = {name.partition(".lora_")[0] for name in stored}
    early = {}
    for stem in stems:
        pair = (stored[f"{stem}.lora_{part}.weight"] for part in "AB")
        early |= {f"{stem}.lora_{part}.weight": t for part, t in zip("AB", transposed_factors(*pair, 4), strict=True)}
    assert all(early[name].shape != stored[name].shape for name in stored)
    safetensors.torch.save_file(early, file)
    model, backend, _ = start_run_model(from_adapter(folders, lora), SINGLE)
    load_peft_adapter(model, (config := from_adapter(folders, lora)).adapter, config.quant.method, backend)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapter_tensors(model).items())
    read = with_layout(read_peft_adapter(lora), model.architecture)
    assert read.transposed == set(read.paths)
    with Reader() as reader:
        early_factors = {path: read_factors(read, path, reader, experts=4) for path in read.paths}
    safetensors.torch.save_file(stored, file)
    later = with_layout(read_peft_adapter(lora), model.architecture)
    with Reader() as reader:
        for path, factors in early_factors.items():
            assert torch.equal(factors.delta(), read_factors(later, path, reader, experts=4).delta()), path
    safetensors.torch.save_file({name: (early if "base_layer" in name else stored)[name] for name in stored}, file)
    with pytest.raises(UserError, match=r"has the layout of PEFT before 0.19, and .* the later one"):
        from_adapter(folders, lora)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"peft_version": "0.18.1"}))
    kinds = [
        dataclasses.replace(kind, weights=[dataclasses.replace(w, shape=(4, 72, 72)) for w in kind.weights])
        for kind in model.architecture.kinds
    ]
    with pytest.raises(UserError, match=r"as this weight is square \(72 x 72\), its shape does not tell which layout"):
        with_layout(read_peft_adapter(lora), dataclasses.replace(model.architecture, kinds=tuple(kinds)))


def test_an_adapter_of_experts_that_is_not_the_models_is_refused(folders: Path, tmp_path: Path) -> None:
    targets = {"target_modules": ["q_proj"], "target_parameters": TARGETS}
    lora = write_adapter(tmp_path / "lora", folders / "mixtral", r=4, **targets)
    path, layer = lora / "adapter_model.safetensors", "base_model.model.model.layers.1.mlp.experts"
    tensors = safetensors.torch.load_file(path)
    few = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{layer}.base_layer")}
    safetensors.torch.save_file(few, path)
    with pytest.raises(UserError, match=r"holds 1 adapters of model.layers.1.mlp.experts.* means 2 of its weights"):
        from_adapter(folders, lora)
    safetensors.torch.save_file(tensors | {f"{layer}.lora_A.weight": torch.zeros(3 * 4, 72)}, path)
    with pytest.raises(UserError, match=r"has shape \[12, 72\], and .*experts.down_proj at rank 4 needs \[16, 72\]"):
        from_adapter(folders, lora)
    settings = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(settings | {"target_parameters": ["lm_head.weight"]}))
    with pytest.raises(UserError, match=r"target_parameters=\['lm_head.weight'\] are not all weights of experts"):
        from_adapter(folders, lora)


def test_the_load_of_experts_is_the_routers_choice_without_padding_and_recomputation(
    family_folder: FolderOf,
) -> None:
    """Two slices with activation checkpointing; 12 of 32 tokens are padding in one row, all of them in another."""
    ours, backend = load_ours(family_folder("mixtral"), train={"dtype": "fp32", "checkpointing": "block"})
    rows, positions = tokens(4, 32), torch.arange(32).expand(4, 32)
    labels = shifted(rows)
    labels[1, 20:], labels[3] = -100, -100
    load, ends = ExpertLoad(ours, torch.device("cpu"), {0: [5, 0, 0, 0]}), (32, 21, 32, 0)
    expected = []
    for module in expert_modules(ours).values():

        def note(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            chosen = inputs[1].view(4, 32, 2)
            kept = torch.cat([chosen[row, :end].flatten() for row, end in enumerate(ends)])
            expected.append(torch.bincount(kept, minlength=4).tolist())

        module.register_forward_pre_hook(note)
    with torch.no_grad():
        ours(rows, positions, labels)
    load.note_step()
    assert load.read(backend)["experts/unused"] == 11 / 12, "an evaluation counts"
    ours.set_num_micro(2)
    for module in expert_modules(ours).values():
        module._forward_pre_hooks.clear()
    ours(rows, positions, labels).sum().backward()
    assert load.read(backend)["experts/unused"] == 11 / 12, "a step that is not done counts"
    load.note_step()
    figures = load.read(backend)
    expected[0][0] += 5
    assert load.tokens == dict(enumerate(expected))
    expected[0][0] -= 5
    assert says_unchanged(ours)
    assert not says_unchanged(ours, decays=True)
    assert not says_unchanged(ours, step=2)
    lines = ExpertLoad(ours, torch.device("cpu"), None, step=2).describe()
    assert next(lines) == "the load of the experts is counted since step 2: the state that was resumed had none"
    over = [max(counts) * 4 / sum(counts) for counts in expected]
    assert figures["experts/imbalance_max"] == max(over)
    assert figures["experts/imbalance"] == pytest.approx(sum(over) / 3)


def says_unchanged(model: CausalLM, **start: Any) -> bool:
    """Return whether adapters of experts without tokens are said to be as they started."""
    return any("as they started" in line for line in ExpertLoad(model, torch.device("cpu"), None, **start).describe())


def load_of_rank(ranks: Ranks, *, folder: Path) -> dict[int, list[int]]:
    """Count one step on six rows, divided over the ranks."""
    ours, backend = load_ours(folder, ranks)
    load, share = ExpertLoad(ours, ranks.device, None), 6 // ranks.world
    rows = tokens(6, 48)[ranks.rank * share : (ranks.rank + 1) * share]
    ours(rows, positions_of(rows), shifted(rows))
    load.note_step()
    load.read(backend)
    return load.tokens


def test_the_load_is_summed_over_ranks(world: World, family_folder: FolderOf) -> None:
    expected = load_of_rank(SINGLE, folder=family_folder("qwen3-moe"))
    assert {sum(counts) for counts in expected.values()} == {6 * 48 * 2}
    assert world.run(2, load_of_rank, folder=family_folder("qwen3-moe")) == [expected] * 2


def test_a_run_records_the_load_of_its_experts_and_a_resume_continues_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layer 1 has no adapters on its experts; an expert of layer 2 is chosen by no token."""
    write_model_folder(tmp_path / "model", "gpt_oss")
    write_text_file(tmp_path / "text.jsonl")
    tensors = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.2.mlp.router.bias"][3] = -1e4
    safetensors.torch.save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    targets = [f"layers.{layer}.mlp.experts.down_proj" for layer in (0, 2)]
    sections: dict[str, Any] = {
        "adapter": {"target_modules": ["q_proj"], "target_parameters": targets},
        "train": {"max_steps": 4, "save_every": 2},
    }
    make_run(tmp_path / "run", tmp_path, "model", **sections)
    worker.run(tmp_path / "run", SINGLE)
    log = capsys.readouterr().out
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert all(line["experts/imbalance_max"] >= line["experts/imbalance"] >= 1 for line in lines)
    assert [list(line["expert_tokens"]) for line in lines] == [["0", "1", "2"]] * 4
    totals = [{sum(counts) for counts in line["expert_tokens"].values()} for line in lines]
    assert all(len(total) == 1 for total in totals)
    adapted = "the experts' down_proj have adapters in layers 0, 2 (4 experts each); the experts of layer 1 are frozen"
    assert f"{adapted}; routers have none and are frozen" in log
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["expert_layers_without_adapter"] == ["1"]
    assert "the experts of layer 1 are frozen: they have no adapters" in log
    assert summary["experts_without_tokens"] == ["layer 2: 3"]
    assert "no token chose 1 of 12 experts, whose adapters are as they started: layer 2: 3" in log
    assert lines[-1]["experts/unused"] == 1 / 12
    page = reported(tmp_path / "run")
    assert "No token chose 1 of 12 experts" in page.text
    assert page.row("1")[3] == "no adapters"
    assert page.row("2")[3] == "3"
    assert page.row("2")[4][3] == "."
    assert len(page.row("0")[4]) == 4
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    worker.run(tmp_path / "run", SINGLE)
    again = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["expert_tokens"] for line in again] == [line["expert_tokens"] for line in lines]


SHARINGS = [("mixtral", "shared_a"), ("gpt-oss", "shared_outer"), ci("qwen3-moe", "shared_b")]


@pytest.mark.parametrize(("name", "sharing"), SHARINGS)
def test_experts_that_share_a_factor_train_as_pefts_whose_copies_stay_equal(
    family_folder: FolderOf, tmp_path: Path, name: str, sharing: str
) -> None:
    """PEFT reads a copy per expert: our logits, and the sum of its gradients over the copies is ours."""
    ours, _ = load_ours(family_folder(name), adapter={"target_modules": "mlp", "r": 3, "expert_sharing": sharing})
    spec = config_for(family_folder(name), adapter={"target_modules": "mlp", "r": 3, "expert_sharing": sharing}).spec
    shared, own = shared_factors(ours), adapter_tensors(ours)
    assert len(shared) == 2 * 3
    factors = {"shared_a": "A of down_proj and A of gate_up_proj", "shared_b": "B of down_proj and B of gate_up_proj"}
    expected = factors.get(sharing, "A of gate_up_proj and B of down_proj")
    assert f"; all experts of a layer share {expected}; " in next(describe_experts(ours))
    assert not says_unchanged(ours), "experts with tokens train what an expert without them uses"
    stored = stored_tensors(ours)
    whole = {n: t.make() if isinstance(t, DeferredTensor) else t.detach() for n, t in stored.items()}
    assert all(whole[n].shape == t.shape for n, t in stored.items())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter_config(spec, ours)))
    safetensors.torch.save_file(
        {n: t.contiguous() for n, t in whole.items()}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    tuned = peft.PeftModel.from_pretrained(
        dequantized(family_folder(name), ours), tmp_path / "adapter", is_trainable=True
    )
    rows = tokens(2, 32)
    loss = ours(rows, positions_of(rows), shifted(rows)).sum() / (2 * 31)
    expected = tuned(input_ids=rows, labels=rows).loss
    assert abs(loss / expected - 1) <= 1e-6
    parameters = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if ".lora_" in n}
    references = dict(zip(own, torch.autograd.grad(expected, [parameters[n] for n in own]), strict=True))
    for n, gradient in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
        reference = references[n]
        if n in shared:
            pair = shared[n]
            split = (pair.num_experts, pair.rank) if pair.shared == "A" else (pair.rank, pair.num_experts)
            dim = 0 if pair.shared == "A" else -1
            reference = reference.unflatten(dim, split).sum(0 if pair.shared == "A" else -1)
        assert reference.shape == gradient.shape
        assert relative_error(gradient, reference) <= 1e-5, n


def test_a_run_with_shared_factors_is_planned_saved_as_peft_reads_it_and_resumed(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exports for servers hold a shared factor once; those of the adapter alone hold it per expert."""
    sections: dict[str, Any] = {
        "adapter": {"target_modules": "mlp", "expert_sharing": "shared_outer"},
        "train": {"max_steps": 4, "save_every": 2},
    }
    config = make_run(tmp_path / "run", folders, "mixtral", **sections)
    worker.run(tmp_path / "run", SINGLE)
    result = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    stored = safetensors.torch.load_file(result)
    place = "base_model.model.model.layers.1.mlp.experts"
    a, b = stored[f"{place}.base_layer.lora_A.weight"], stored[f"{place}.lora_B.weight"]
    assert a.shape == (4 * 8, 96)
    assert torch.equal(a, a[:8].repeat(4, 1)), "A of gate_up_proj"
    assert b.shape == (96, 4 * 8)
    assert torch.equal(b, b[:, ::4].repeat_interleave(4, dim=1)), "B of down_proj"
    each = stored[f"{place}.base_layer.lora_B.weight"]
    assert not torch.equal(each[:, 0], each[:, 1])
    assert {item.state for item in verify(tmp_path / "run")} == {"ok"}
    foreign = of_run(config, result.parent, foreign=True).spec.adapter
    assert (foreign.init_from, foreign.expert_sharing) == (str(result.parent), "none")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    shutil.rmtree(checkpoint)
    shutil.rmtree(result.parent)
    worker.run(tmp_path / "run", SINGLE)
    again = safetensors.torch.load_file(result)
    assert all(torch.equal(again[n], tensor) for n, tensor in stored.items())
    capsys.readouterr()
    for adapter, count in ((None, 3 * 6), (str(result.parent), 3 * 4 * 6)):
        name, out = Name(place=str(tmp_path / "run"), adapter=adapter), tmp_path / f"{count}"
        assert export_worker.run(ExportRequest(run="", name=name, format="vllm", out=str(out), dtype=None)) == 0
        assert sum(".experts." in key for key in read_header(out / "adapter_model.safetensors")) == count
    printed = capsys.readouterr().out
    assert printed.count("--enable-moe-shared-loras") == 1
    assert f"distlora export {tmp_path / 'run'} --adapter {result.parent} --for vllm" in printed

    model = build_run_model(config)
    shapes = model_in(folders / "mixtral").shapes
    work = Workload.of(config)
    planned = {tensor.name: tensor.shape for tensor in trained_tensors(work, shapes)}
    assert planned == {name: tuple(p.shape) for name, p in adapter_tensors(model).items()}
    on_disk = {tensor.name: tensor.shape for tensor in trained_tensors(work, shapes, stored=True)}
    assert on_disk == {name: tuple(tensor.shape) for name, tensor in stored.items()}
    per_layer = 8 * (96 + 4 * 2 * 72) + 8 * (4 * 72 + 96)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["trainable_parameters"] == 3 * per_layer

    init = {"adapter.init_from": f"{tmp_path / 'run' / 'adapter'}", "adapter.expert_sharing": "shared_outer"}
    paths = [f"model.path={folders / 'mixtral'}", f"data.path={folders / 'text.jsonl'}", "data.sequence_length=64"]
    started = compose_config([*paths, *(f"{k}={v}" for k, v in init.items()), "train.dtype=fp32", "quant=none"])
    ours, backend, _ = start_run_model(started, SINGLE)
    load_peft_adapter(ours, started.adapter, started.quant.method, backend)
    loaded = {n: t.make() if isinstance(t, DeferredTensor) else t for n, t in stored_tensors(ours).items()}
    assert all(torch.equal(loaded[n], tensor) for n, tensor in stored.items())
    check_initial_adapter(started.spec, ours.architecture)
    for name in ("base_layer.lora_A.weight", "lora_B.weight"):
        spoiled = stored[f"{place}.{name}"].clone()
        spoiled[-1, -1] += 1
        safetensors.torch.save_file(stored | {f"{place}.{name}": spoiled}, result)
        for check in (
            lambda: load_peft_adapter(ours, started.adapter, started.quant.method, backend),
            lambda: check_initial_adapter(started.spec, ours.architecture),
        ):
            with pytest.raises(UserError, match=rf"{name} differs between the experts, .*adapter.expert_sharing=none"):
                check()
