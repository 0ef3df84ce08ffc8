"""quant=keep trains on the codes and scales that a checkpoint ships: loaded, sharded, trained, exported or refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.kept_weights import is_transposed
from distlora.architecture.low_bit_headers import LowBitSegment
from distlora.config import Config, UserError
from distlora.config.plan import CHOSEN
from distlora.loading.load_base import find_base
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Ranks
from distlora.planner import plan_of
from distlora.planner import traffic as wire
from distlora.planner.choose import Search, choose, resolve_auto
from distlora.planner.memory.base import base_of
from distlora.planner.model import model_in
from distlora.planner.report import lines
from distlora.planner.workload import Workload
from distlora.training.setup import start_run_model
from distlora.weights.reader import Reader
from distlora_kernels.format_layouts import labels
from distlora_launcher.compose.checks import check_model
from distlora_launcher.compose.planning import check_planned
from support.closeness import assert_adapters_close, assert_losses_close, assert_same_run
from support.counted_step import our_traffic
from support.exports import (
    exported,
    in_process,  # noqa: F401  (a fixture)
)
from support.family_models import config_for
from support.low_bit_models import MODELS, write_kept_model
from support.packs import make_pack, run_pack
from support.plan_inputs import cpu_machine, machine_of
from support.preference_data import prepare
from support.runs import adapters_after, outcome, result_of, run_until
from support.small_models import make_run, write_model_folder, write_text_file
from support.tiers import ci
from support.worlds import Alone, World


def edited(folder: Path, to: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """Copy a model with its tensors and quantization_config changed."""
    shutil.copytree(folder, to)
    tensors = safetensors.torch.load_file(to / "model.safetensors")
    config = json.loads((to / "config.json").read_text())
    change(tensors, config["quantization_config"])
    safetensors.torch.save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(config))
    return to


SINGLE = Ranks(0, 1, torch.device("cpu"), None)
KEEP, NONE = {"method": "keep"}, {"method": "none"}
FIRST = ("mxfp4", "nvfp4-experts")
"""Models of the default tier: transposed experts, merged ones with a number per tensor."""
EACH = [name if name in FIRST else ci(name) for name in MODELS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder that holds a model of MODELS, written at the first use, and text.jsonl."""
    root = tmp_path_factory.mktemp("kept")
    write_text_file(root / "text.jsonl")

    @functools.cache
    def with_model(name: str) -> Path:
        write_kept_model(root / name, name)
        return root

    return with_model


def frozen(model: CausalLM) -> dict[str, FrozenTensor]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FrozenTensor)}


def held(ranks: Ranks, *, config: Config) -> dict[str, tuple[int, list[Tensor]]]:
    """Load the base; return (first group, parts) of each quantized weight on this rank."""
    model, backend, loaded = start_run_model(config, ranks)
    weights = {path: module for path, module in frozen(model).items() if module.quantized}
    assert loaded.prequantized
    assert loaded.quantized_weights == sum(weight.numel for weight in weights.values())
    groups = {path: backend.local_groups(weight) for path, weight in weights.items()}
    return {path: (first, [part.clone() for part in parts]) for path, (parts, first) in groups.items()}


@pytest.mark.parametrize("name", EACH)
def test_each_rank_holds_its_groups_of_the_shipped_values(world: World, place: Any, name: str) -> None:
    """The whole decodes to what the checkpoint's reader gives; two and three ranks hold slices of it."""
    folder = place(name) / name
    config = config_for(folder, quant=KEEP)
    model, _, _ = start_run_model(config, SINGLE)
    files = CheckpointFiles(folder)
    sources = find_base(model, files.headers)
    formats = set[str]()
    with Reader() as reader:
        for path, weight in frozen(model).items():
            source = sources[model.hf_name(f"{path}.weight")]
            expected = reader.read(source.segments, 0, weight.numel).float().view(source.shape)
            first = source.segments[0]
            is_low = isinstance(first, LowBitSegment)
            assert (weight.format.name if weight.format else None) == (first.tensor.format if is_low else None)
            formats |= {weight.format.name} if weight.format else set()
            decoded = weight.frozen_weight.dense(torch.float32)
            decoded = decoded.mT if is_transposed(source.segments) else decoded
            # ModelOpt's scale multiplies, the format's divides: the last bits differ (Fp4Codec).
            torch.testing.assert_close(decoded, expected, rtol=5 * 2**-24 * (name == "nvfp4-experts"), atol=0)
    assert ", ".join(sorted(formats)) == MODELS[name][3]
    whole = held(SINGLE, config=config)
    for size in (2, 3):
        for by_path in world.run(size, held, config=config):
            for path, (first, parts) in by_path.items():
                for part, all_groups in zip(parts, whole[path][1], strict=True):
                    assert torch.equal(part, all_groups[first : first + len(part)])


@pytest.fixture(scope="module")
def dense_run(place: Any, world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return losses and adapter of a run on the dequantized base, one rank; made at the first use."""
    made: dict[str, Any] = {}

    def result(name: str, sections: dict[str, Any]) -> Any:
        if (key := f"{name} {sections}") not in made:
            run_dir = tmp_path_factory.mktemp("dense") / "run"
            make_run(run_dir, place(name), name, **sections, quant=NONE)
            made[key] = outcome(world, 1, run_dir)
        return made[key]

    return result


CELLS = [
    # (model, ranks, settings of both runs, settings of quant=keep's)
    ("fp8", 2, {}, {"train": {"micro_batch": 2, "accumulate": "block"}}),
    ci("mxfp4", 3, {}, {"train": {"checkpointing": "none", "micro_batch": 4}}),
    *(ci(name, 2, {}, {"train": {"micro_batch": 6}}) for name in MODELS if name not in ("fp8", "mxfp4")),
    ci("fp8", 4, {}, {"parallel": {"shard_degree": 2}, "cluster": {"gpus_per_node": 4}, "train": {"micro_batch": 1}}),
    ci("int4", 2, {"adapter": {"use_dora": True}}, {"train": {"verify": True, "save_every": 4}}),
    ci("fp8", 1, {"adapter": {"use_dora": True, "lora_dropout": 0.1}}, {}),
    ci("nvfp4", 2, {}, {"quant": KEEP | {"dense_layers": 2}}),
    ci("awq", 3, {}, {"parallel": {"resident_blocks": 1}, "train": {"verify": True, "checkpointing": "selective"}}),
]


@pytest.mark.parametrize(("name", "size", "both", "own"), CELLS, ids=str)
def test_a_run_is_that_of_the_dequantized_base_on_any_ranks(
    world: World, place: Any, tmp_path: Path, dense_run: Any, name: str, size: int, both: Any, own: Any
) -> None:
    make_run(tmp_path / "run", place(name), name, **{"quant": KEEP} | both | own)
    first, *others = world.run(size, adapters_after, run_dir=tmp_path / "run")
    losses, adapter = result_of(tmp_path / "run")
    expected_losses, expected = dense_run(name, both)
    assert losses[-1] < losses[0]
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected)
    for other in others:
        assert all(torch.equal(first[path], other[path]) for path in first)


@pytest.mark.ci
def test_a_run_in_bf16_is_that_of_the_dequantized_base_bit_for_bit(
    place: Any, world: World, tmp_path: Path, dense_run: Any
) -> None:
    """Each value is rounded once, so the products see the same weights."""
    make_run(tmp_path / "run", place("fp8"), "fp8", quant=KEEP, train={"dtype": "bf16"})
    losses, adapter = outcome(world, 1, tmp_path / "run")
    expected = dense_run("fp8", {"train": {"dtype": "bf16"}})
    assert losses == expected[0]
    assert all(torch.equal(adapter[name], tensor) for name, tensor in expected[1].items())


@pytest.mark.ci
@pytest.mark.parametrize("name", ["fp8", "nvfp4-experts"])
def test_zero3_trains_the_same(alone: Alone, place: Any, tmp_path: Path, dense_run: Any, name: str) -> None:
    parallel = {"backend": "zero3", "offload_base": name == "fp8"}
    make_run(tmp_path / "run", place(name), name, quant=KEEP, parallel=parallel, train={"micro_batch": 2})
    losses, adapter = outcome(alone, 3, tmp_path / "run")  # type: ignore[arg-type]
    expected_losses, expected = dense_run(name, {})
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected)


@pytest.mark.parametrize("size", [1, ci(2)])
def test_a_run_that_was_killed_goes_on_bit_for_bit(world: World, place: Any, tmp_path: Path, size: int) -> None:
    train = {"max_steps": 5, "save_every": 2, "log_every": 1, "global_batch": 6}
    for folder, stops in (("whole", [None]), ("stopped", [3, None])):
        make_run(tmp_path / folder, place("mxfp4"), "mxfp4", quant=KEEP, train=train)
        for stop_before in stops:
            world.run(size, run_until, run_dir=tmp_path / folder, stop_before=stop_before)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.ci
def test_dpo_is_that_of_the_dequantized_base(world: World, place: Any, preferences: Path, tmp_path: Path) -> None:
    for method in ("keep", "none"):
        prepare(tmp_path / method, place("int4"), preferences, "int4", quant={"method": method})
    losses, adapter = outcome(world, 2, tmp_path / "keep")
    expected_losses, expected = outcome(world, 1, tmp_path / "none")
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected)


@pytest.mark.ci
def test_trials_trained_together_are_the_trials_alone(world: World, place: Any, tmp_path: Path, dense_run: Any) -> None:
    sections: list[dict[str, Any]] = [{}, {"adapter": {"r": 3, "target_modules": "qv"}}]
    trials = [{"quant": KEEP} | each for each in sections]
    runs = make_pack(tmp_path / "pack", place("nvfp4"), trials, "nvfp4")
    world.run(2, run_pack, pack=tmp_path / "pack")
    for run_dir, each in zip(runs, sections, strict=True):
        losses, adapter = result_of(run_dir)
        expected_losses, expected = dense_run("nvfp4", each)
        assert_losses_close(losses, expected_losses)
        assert_adapters_close(adapter, expected)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("name", "form"), [("mxfp4", "peft"), ci("int4", "peft"), ci("mxfp4", "hf"), ci("awq", "hf")])
def test_what_transformers_and_peft_compute_is_what_was_trained(
    world: World, place: Any, tmp_path: Path, name: str, form: str
) -> None:
    """The exported adapter, or the merged model, gives our logits to 1e-4; the card says for which base it is."""
    make_run(
        tmp_path / "run", place(name), name, quant=KEEP, optim={"lr": 2e-2}, train={"max_steps": 3, "global_batch": 3}
    )
    world.run(1, adapters_after, run_dir=tmp_path / "run")
    record = exported(tmp_path, "run", form, tmp_path / "out", "fp32" if form == "hf" else None)
    (logits,) = [reading for reading in record["check"]["readings"] if reading["bound"] == 1e-4]
    assert logits["difference"] <= 1e-4
    if form == "peft":
        card = (tmp_path / "out" / "README.md").read_text()
        assert (
            f"trained on the base in the checkpoint's format, {', '.join(labels(MODELS[name][3].split(', ')))}" in card
        )
        assert "changed none of them" in card
        assert ("quantization_config=Mxfp4Config(dequantize=True)" in card) == (name == "mxfp4")


@pytest.mark.parametrize("name", EACH)
def test_bytes_on_the_network_and_in_memory_are_those_of_the_plan(world: World, place: Any, name: str) -> None:
    config = config_for(place(name) / name, quant=KEEP)
    work, planned = Workload.of(config), model_in(place(name) / name)
    assert planned.why_not_kept is None
    assert planned.shapes.kept_formats == ", ".join(labels(MODELS[name][3].split(", ")))
    step = wire.step_traffic(work, planned.shapes, world=2, accumulation=1)
    for counts, _ in world.run(2, our_traffic, config=config, accumulation=1):
        assert (counts.gathered, counts.reduced) == (step.gathered, step.reduced)
    kept = base_of(work, planned.shapes).kept(1)
    parts = [part for _, parts in held(SINGLE, config=config).values() for part in parts]
    in_own_type = kept["embeddings"] if name == "gguf" else 0
    assert kept["codes"] + kept["scales"] + in_own_type == sum(part.nbytes for part in parts)


def config_in(folder: Path, **sections: dict[str, Any]) -> Config:
    return config_for(folder, **{"quant": KEEP} | sections)


def scale_of(name: str, value: float) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], _: Any) -> None:
        tensors[name] = tensors[name].fill_(value) if tensors[name].is_floating_point() else tensors[name].fill_(255)

    return change


def in_activation_order(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["desc_act"] = True


def per_channel(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["weight_block_size"] = None
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = torch.ones(tensors[name.removesuffix("_scale_inv")].shape[0], 1)


CANNOT = [
    ("gptq", in_activation_order, r"layers\.0\.\S+: no format stores columns in activation order .*; set quant=nf4"),
    ci("fp8", per_channel, r"layers\.0\.\S+: FP8 with a scale per 1 x \d+ weights .* not in tiles .*; set quant=nf4"),
]


@pytest.mark.parametrize(("name", "change", "message"), CANNOT)
def test_a_weight_that_cannot_be_kept_is_refused_by_its_name(
    place: Any, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    """Before any worker starts, by the run's check and by the plan; quant=nf4 reads the same checkpoint."""
    folder = edited(place(name) / name, tmp_path / "model", change)
    config = config_in(folder)
    with pytest.raises(UserError, match=message):
        check_model(config)
    with pytest.raises(UserError, match=message):
        check_planned(config, model_in(folder))
    assert resolve_auto(
        Search(config=config_in(folder, quant={"method": "auto"}), model=model_in(folder), machine=cpu_machine(1))
    ).config.quant.method in ("nf4", "none")
    check_model(config_in(folder, quant={"method": "nf4"}))


def test_a_plan_counts_kept_weights_and_says_that_nf4_rounds_them_again(place: Any) -> None:
    folder = place("fp8") / "fp8"
    model = model_in(folder)
    by_method = {
        method: plan_of(config_in(folder, quant={"method": method}), model, cpu_machine(1))
        for method in ("keep", "nf4", "none")
    }
    quantized = {method: plan.as_json()["model"]["parameters_quantized"] for method, plan in by_method.items()}
    linears = sum(weight.numel for weight in model.shapes.block if weight.packs) * model.shapes.num_layers
    assert quantized == {"keep": linears, "nf4": linears, "none": 0}
    again = "  stored in FP8 in 128 x 128 blocks; quant=nf4 rounds it again (quant=keep trains on the stored values)"
    assert [again in lines(plan) for plan in by_method.values()] == [False, True, False]


def test_experts_of_parts_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    write_kept_model(tmp_path / "model", "nvfp4-experts", num_hidden_layers=1, moe_intermediate_size=96)
    with pytest.raises(UserError, match=r"experts\.gate_up_proj: .* not whole blocks of NVFP4; set quant=nf4"):
        check_model(config_in(tmp_path / "model"))


def test_a_base_in_16_bits_is_refused_in_a_second_without_torch(place: Any, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", "llama")
    with pytest.raises(UserError, match=r"quant=keep keeps .*; set quant=nf4"):
        check_planned(config_in(tmp_path / "model"), model_in(tmp_path / "model"))
    code = (
        "import sys, distlora_launcher.cli.main as m; code = m.main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    words = ["train", f"model.path={tmp_path / 'model'}", f"data.path={place('fp8') / 'text.jsonl'}", "quant=keep"]
    words.append("data.sequence_length=64")
    done = subprocess.run([sys.executable, "-c", code, *words, f"run_dir={tmp_path / 'run'}"], capture_output=True)
    assert done.returncode == 2, done.stderr
    assert b"set quant=nf4" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("find", [choose, resolve_auto])
@pytest.mark.parametrize("dense_layers", [0, "auto"])
def test_auto_takes_nf4_where_what_is_shipped_does_not_fit(place: Any, find: Any, dense_layers: Any) -> None:
    folder = place("fp8") / "fp8"
    search = Search(
        config=config_in(folder, quant={"method": "auto", "dense_layers": dense_layers}),
        model=model_in(folder),
        machine=machine_of(),
        fixed=tuple(name for name in CHOSEN if name != "quant.dense_layers"),
        reserve=0.0,
    )
    need = {
        method: search.plan({"quant.method": method, "quant.dense_layers": 0}).device.total
        for method in ("keep", "nf4")
    }
    assert need["nf4"] < need["keep"]
    for usable, method, why in (
        (need["keep"], "keep", "kept as it is shipped"),
        (need["keep"] - 1, "nf4", "as it is shipped, it would take"),
        (need["nf4"], "nf4", "as it is shipped, it would take"),
        (need["nf4"] - 1, "keep", ""),
    ):
        machine = dataclasses.replace(search.machine, usable_bytes=usable)
        choice = find(dataclasses.replace(search, machine=machine))
        assert choice.config.quant.method == method
        assert choice.plan.lacks() is None or usable < need["nf4"]
        assert why in str(choice.changes[0])


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("fp8", "model.layers.1.mlp.up_proj.weight_scale_inv", torch.inf),
        ci("mxfp4", "model.layers.1.mlp.experts.down_proj_scales", 255),
        ci("int4", "model.layers.1.mlp.up_proj.weight_scale", torch.nan),
    ],
)
def test_scales_that_are_not_finite_are_refused_by_name(
    place: Any, tmp_path: Path, name: str, part: str, value: float
) -> None:
    folder = edited(place(name) / name, tmp_path / "model", scale_of(part, value))
    weight = part.removesuffix("_scale_inv").removesuffix("_scales").removesuffix("_scale")
    with pytest.raises(UserError, match=f"{weight} holds NaN or Inf"):
        start_run_model(config_for(folder, quant=KEEP), SINGLE)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", *map(ci, ("fp8-experts", "fp8-compressed", "int4", "int4-experts"))])
def test_a_plan_without_weights_has_the_formats_of_their_headers(place: Any, tmp_path: Path, name: str) -> None:
    folder = place(name) / name
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with_weights, without = model_in(folder), model_in(tmp_path)
    assert with_weights.shapes.kept
    assert without.shapes.kept == with_weights.shapes.kept
    assert (without.why_not_kept, without.stored_bytes) == (None, None)


def test_a_plan_without_weights_says_which_formats_it_cannot_tell(place: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((place("nvfp4-experts") / "nvfp4-experts" / "config.json").read_text())
    assert re.search(r"the formats of modelopt are read from the weights", model_in(tmp_path).why_not_kept or "")
