"""Load checkpoints quantized by bitsandbytes byte for byte on any number of ranks, or refuse them by field."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import UserError
from distlora.loading.load_base import Loaded
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenLinear
from distlora.parallel import Backend, Ranks
from distlora.planner import plan_of
from distlora.planner.choose import Search, resolve_auto
from distlora.planner.machine import machine_of
from distlora.planner.model import find_model
from distlora.planner.report import lines
from distlora.training import worker
from distlora.training.setup import start_run_model
from distlora_kernels.formats import nf4
from distlora_launcher.compose.checks import check_model
from support.bitsandbytes_weights import DTYPES, ODD, bitsandbytes_dequantize, quantize
from support.closeness import assert_adapters_close
from support.family_models import config_for, our_logits
from support.peft_models import our_trained_model
from support.runs import FULL, build_run_model
from support.small_models import make_run, write_model_folder, write_text_file
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
SKIPPED = ["lm_head", "model.layers.1.mlp", "k_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "nested": {"bnb_4bit_use_double_quant": True},
    "plain": {"bnb_4bit_use_double_quant": False},
    "storage-bf16": {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "skipping": {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": SKIPPED},
    "odd-nested": {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.float16},
    "odd-plain": {"bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": torch.float32},
    "packed-head": {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": []},
}
LOADABLE = [name for name in VARIANTS if name != "packed-head"]
ONE_AND_CI = [name if name == "nested" else pytest.param(name, marks=pytest.mark.ci) for name in LOADABLE]
# Rows are whole blocks: for rows of 96 bitsandbytes' own CPU kernel is wrong (tests/kernels/test_nf4.py).
EVEN = {"hidden_size": 128, "intermediate_size": 320, "head_dim": 32}
WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with text.jsonl and a checkpoint for each of VARIANTS."""
    root = tmp_path_factory.mktemp("prequantized")
    write_model_folder(root / "even", "llama", **EVEN)
    write_model_folder(root / "odd", "llama", **ODD)
    for name, settings in VARIANTS.items():
        quantize(root / ("odd" if name.startswith("odd") else "even"), root / name, **settings)
    write_text_file(root / "text.jsonl")
    return root


def loaded(folder: Path, ranks: Ranks = SINGLE, **sections: dict[str, Any]) -> tuple[CausalLM, Backend, Loaded]:
    return start_run_model(config_for(folder, **sections), ranks)


def frozen_linears(model: CausalLM) -> dict[str, FrozenLinear]:
    return {
        model.hf_name(f"{path}.weight"): module
        for path, module in model.named_modules()
        if isinstance(module, FrozenLinear)
    }


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def packed_names(tensors: dict[str, Tensor]) -> list[str]:
    suffix = ".quant_state.bitsandbytes__nf4"
    return sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))


def copy_with(source: Path, target: Path, changes: dict[str, Tensor | None]) -> Path:
    """Copy the checkpoint into one file with some tensors replaced or removed (None)."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model*"))
    tensors = stored_tensors(source) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
    safetensors.torch.save_file(tensors, target / "model.safetensors")
    return target


def with_state(source: Path, **fields: Any) -> dict[str, Tensor | None]:
    """Set some fields of WEIGHT's quant_state."""
    name = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored_tensors(source)[name].tolist())) | fields
    return {name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("name", ONE_AND_CI)
def test_plan_counts_prequantized_bytes(quantized: Path, name: str) -> None:
    """Check exact bytes, with fp32 absmax without double quantization and linears left dense."""
    config = config_for(quantized / name)
    plan = plan_of(config, find_model(config), machine_of(config.gpu, config.cluster))
    model, _, _ = loaded(quantized / name)
    kept = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
    kinds = ("codes", "scales", "weights", "embeddings", "norms")
    assert sum(plan.device.held.get(kind, 0) for kind in kinds) == sum(tensor.nbytes for tensor in kept)
    keys, mlp = {"self_attn.k_proj.weight"}, {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    dense = [keys, keys | mlp, keys] if name == "skipping" else [set(), set(), set()]
    for index, formats in plan.model.shapes.formats.items():
        assert {path for path, format in formats.items() if format is None} == dense[index]
        assert {*formats.values()} - {None} == {"nf4_absmax" if name.endswith("plain") else "nf4"}


def own_rows(ranks: Ranks, *, folder: Path) -> tuple[dict[str, Tensor], int]:
    """Return this rank's rows of every quantized part and dense linear by name, and the bytes that it read."""
    model, backend, figures = loaded(folder, ranks)
    rows: dict[str, Tensor] = {}
    for name, linear in frozen_linears(model).items():
        for part, parameter in linear.named_parameters(recurse=False):
            rows[f"{name}.{part}"] = backend.local_rows(parameter)[0].clone()
        if linear.format is nf4.NF4:
            rows[f"{name}.offset"] = linear.offset.clone()  # type: ignore[operator]
    return rows, figures.bytes_read


@pytest.mark.parametrize("size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2)), 3])
@pytest.mark.parametrize("variant", ONE_AND_CI)
def test_ranks_hold_and_read_slices_of_the_stored_bytes(world: World, quantized: Path, variant: str, size: int) -> None:
    tensors = stored_tensors(quantized / variant)
    by_rank = world.run(size, own_rows, folder=quantized / variant)
    expected_reads = 0
    for name in packed_names(tensors):
        nested = f"{name}.nested_absmax" in tensors
        parts = {"codes": (name, 0x77), "scales" if nested else "absmax": (f"{name}.absmax", 127 if nested else 0)}
        parts |= {"group_scale": (f"{name}.nested_absmax", 0)} if nested else {}
        for part, (on_disk, padding) in parts.items():
            whole = torch.cat([rows[f"{name}.{part}"] for rows, _ in by_rank]).view(-1)
            expected = tensors[on_disk].view(-1).view(torch.uint8 if part == "codes" else tensors[on_disk].dtype)
            assert torch.equal(whole[: len(expected)], expected), f"{name}.{part}"
            assert (whole[len(expected) :] == padding).all(), f"the padding of {name}.{part}"
            expected_reads += expected.nbytes
        if nested:
            state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
            assert all(float(rows[f"{name}.offset"]) == state["nested_offset"] for rows, _ in by_rank)
        expected_reads += size * 4 * (16 + 256 * nested)  # Each rank checks the maps.
    dense = [name for name, tensor in tensors.items() if name.endswith("weight") and name not in packed_names(tensors)]
    expected_reads += sum(tensors[name].nbytes for name in dense)
    assert sum(read for _, read in by_rank) == expected_reads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ONE_AND_CI)
def test_weights_equal_bitsandbytes_bit_for_bit(quantized: Path, variant: str, dtype: torch.dtype) -> None:
    tensors = stored_tensors(quantized / variant)
    linears = frozen_linears(loaded(quantized / variant)[0])
    assert set(packed_names(tensors)) == {name for name, linear in linears.items() if linear.quantized}
    for name in packed_names(tensors):
        parts = {key.removeprefix("weight."): t for key, t in own_parts(tensors, name).items()}
        state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
        state.dtype = dtype
        expected = bitsandbytes_dequantize(tensors[name].view(torch.uint8), state, tuple(state.shape))
        assert torch.equal(linears[name].frozen_weight.dense(dtype), expected), name


def own_parts(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors that accompany a quantized weight, as bitsandbytes' QuantState takes them."""
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def dequantized_by_transformers(folder: Path) -> transformers.PreTrainedModel:
    """Return transformers' bitsandbytes model of the folder, dequantized by bitsandbytes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    return model.dequantize()


@pytest.mark.parametrize(
    ("variant", "sizes"), [("skipping", (1, 2)), pytest.param("plain", (1, 3), marks=pytest.mark.slow)]
)
def test_run_trains_on_any_world_size_and_peft_gives_its_logits(
    world: World,
    quantized: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    variant: str,
    sizes: tuple[int, ...],
) -> None:
    tokens = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(3))
    adapters = {}
    for size in sizes:
        run_dir = tmp_path / f"run{size}"
        make_run(run_dir, quantized, variant, train={"max_steps": 5})
        if size == 1:
            worker.run(run_dir, SINGLE)
            assert "MiB on rank 0 as stored in" in capsys.readouterr().out
        else:
            world.run(size, run_worker, run_dir=run_dir)
        adapters[size] = safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")
        assert_adapters_close(adapters[size], adapters[1])
    assert {name.split(".")[6] for name in adapters[1]} >= {"q_proj", "k_proj", "up_proj"}
    assert all(bool(tensor.any()) for tensor in adapters[1].values()), "an adapter was not trained"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval_loss"] < summary["base_eval_loss"]
    assert summary["gathered_bytes_per_step"] < summary["gathered_bytes_per_step_bf16"]

    ours = our_trained_model(run_dir)
    tuned = peft.PeftModel.from_pretrained(dequantized_by_transformers(quantized / variant), run_dir / "adapter")
    with torch.no_grad():
        difference = (tuned(tokens).logits - our_logits(ours, tokens)).abs().max()
    assert difference <= 1e-4, f"logits are {difference:.1e} apart"


def run_worker(ranks: Ranks, *, run_dir: Path) -> None:
    worker.run(run_dir, ranks)


STATES = [
    ({"blocksize": 128}, r"q_proj\.weight\.quant_state\.blocksize=128.*only 64"),
    ({"nested_blocksize": 128}, "nested_blocksize=128.*only 256"),
    ({"nested_dtype": "float16"}, "nested_dtype='float16'"),
    ({"nested_offset": float("nan")}, "nested_offset=nan"),
    ({"quant_type": "fp4"}, "quant_type='fp4'"),
    ({"shape": [128]}, r"shape=\[128\]"),
    ({"shape": [128, 64]}, r"has 8,192 bytes of codes; a weight of shape \[128, 64\] has 4,096"),
]


def test_missing_or_unsupported_parts_are_refused(quantized: Path, tmp_path: Path) -> None:
    changes: list[tuple[dict[str, Tensor | None], str]] = [
        *((with_state(quantized / "nested", **fields), says) for fields, says in STATES),
        ({f"{WEIGHT}.absmax": None}, r"no tensor model\.layers\.1.*absmax"),
        ({f"{WEIGHT}.nested_quant_map": None}, "no tensor .*nested_quant_map"),
        ({f"{WEIGHT}.absmax": torch.zeros(256)}, "absmax is stored as F32, not U8"),
        ({f"{WEIGHT}.nested_absmax": torch.zeros(3)}, r"nested_absmax has shape \[3\]; .* needs \[1\]"),
        ({"model.norm.weight.absmax": torch.zeros(3)}, r"norm\.weight\.absmax belongs to no quantized weight"),
        ({f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.tensor(list(b"{"), dtype=torch.uint8)}, "is not JSON"),
        ({f"{WEIGHT}.quant_state.bitsandbytes__nf4": torch.tensor(list(b"[]"), dtype=torch.uint8)}, "not a JSON obj"),
    ]
    for number, (change, says) in enumerate(changes):
        folder = copy_with(quantized / "nested", tmp_path / str(number), change)
        with pytest.raises(UserError, match=says):
            _ = CheckpointFiles(folder).headers


def test_other_maps_and_non_finite_numbers_are_refused(quantized: Path, tmp_path: Path) -> None:
    nested, plain = quantized / "nested", quantized / "plain"
    linear_map = torch.linspace(-1, 1, 256)
    with_nan = stored_tensors(nested)[f"{WEIGHT}.nested_quant_map"].clone()
    with_nan[7] = torch.nan
    absmax = stored_tensors(plain)[f"{WEIGHT}.absmax"].clone()
    absmax[200] = torch.inf
    changes: list[tuple[Path, dict[str, Tensor | None], str]] = [
        (nested, {f"{WEIGHT}.quant_map": bnb.get_4bit_type("fp4", device="cpu")}, r"quant_map holds .* NF4's levels"),
        (nested, {f"{WEIGHT}.nested_quant_map": linear_map}, r"nested_quant_map is not .* dynamic map \(entry"),
        (nested, {f"{WEIGHT}.nested_quant_map": with_nan}, r"nested_quant_map is not .* \(entry 7 is nan"),
        (nested, {f"{WEIGHT}.nested_absmax": torch.tensor([torch.nan])}, r"q_proj\.weight holds NaN or Inf"),
        (plain, {f"{WEIGHT}.absmax": absmax}, r"q_proj\.weight holds NaN or Inf"),
    ]
    for number, (source, change, says) in enumerate(changes):
        folder = copy_with(source, tmp_path / str(number), change)
        with pytest.raises(UserError, match=says):
            loaded(folder)


def test_map_with_other_last_bits_is_accepted(quantized: Path, tmp_path: Path) -> None:
    """Check the map of a CPU without fused multiply-add: up to 2 ulps from distlora's."""
    entries = stored_tensors(quantized / "nested")[f"{WEIGHT}.nested_quant_map"]
    other = torch.where(entries == 0, entries, entries * (1 + 2 * torch.finfo(torch.float32).eps))
    assert not torch.equal(other, entries)
    folder = copy_with(quantized / "nested", tmp_path / "model", {f"{WEIGHT}.nested_quant_map": other})
    assert loaded(folder)[2].prequantized


@pytest.mark.parametrize("variant", ["skipping", "odd-plain"])
def test_keep_is_nf4_and_auto_is_keep(quantized: Path, variant: str) -> None:
    folder = quantized / variant
    kept, _, figures = loaded(folder, quant={"method": "keep"})
    assert figures.prequantized
    in_nf4, (config, auto) = (
        loaded(folder)[0],
        (config_for(folder, quant={"method": each}) for each in ("keep", "auto")),
    )
    expected = in_nf4.state_dict()
    assert kept.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.state_dict().items())
    check_model(config)
    plans = [
        plan_of(each, find_model(each), machine_of(each.gpu, each.cluster)) for each in (config_for(folder), config)
    ]
    assert plans[0].device == plans[1].device
    assert not any("rounds it again" in line for line in lines(plans[0]))
    found = resolve_auto(Search(config=auto, model=find_model(auto), machine=machine_of(auto.gpu, auto.cluster)))
    assert found.config.quant.method == "keep"


REFUSED: list[tuple[dict[str, Any], dict[str, dict[str, Any]], str]] = [
    # (other quantization_config, settings of the run, what is said)
    ({"quant_method": "hqq"}, {}, r"quant_method='hqq'.*16-bit checkpoint"),
    ({"quant_method": None}, {}, "quant_method=null"),
    ({"load_in_8bit": True}, {}, "load_in_4bit=true is not supported, only false"),
    ({"load_in_4bit": False}, {}, "load_in_4bit=false"),
    ({"bnb_4bit_quant_type": "fp4"}, {}, "bnb_4bit_quant_type='fp4'"),
    ({}, {"quant": {"method": "none"}}, r"quant=none keeps weights in 16 bits, but model\.path=.* set quant=nf4"),
    ({}, FULL, "adapter=full trains every weight, but"),
    ({}, {"adapter": {"init": "pissa_niter_4"}}, r"init=pissa_niter_4 decomposes 16-bit .* set adapter.init"),
    ({}, {"adapter": {"init": "loftq"}}, "init=loftq decomposes 16-bit weights, but .* is quantized already"),
]


@pytest.mark.parametrize(("changed", "sections", "says"), REFUSED, ids=[says[:40] for *_, says in REFUSED])
def test_what_such_a_base_does_not_support_is_refused_by_field(
    quantized: Path, tmp_path: Path, changed: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    folder = Path(shutil.copytree(quantized / "nested", tmp_path / "model"))
    model = json.loads((folder / "config.json").read_text())
    model["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(model))
    for refuse in (check_model, build_run_model):
        with pytest.raises(UserError, match=says):
            refuse(config_for(folder, **sections))


@pytest.mark.parametrize(
    ("weights", "config", "says"),
    [
        ("packed-head", "packed-head", "lm_head.weight is stored in NF4.*lm_head in llm_int8_skip_modules"),
        # Dense weights with a quantization_config would silently train in 16 bits.
        ("even", "nested", "no weight in"),
        ("nested", "even", "no quantization_config"),
    ],
)
def test_weights_that_contradict_the_config_are_refused(
    quantized: Path, tmp_path: Path, weights: str, config: str, says: str
) -> None:
    folder = Path(shutil.copytree(quantized / weights, tmp_path / "model"))
    shutil.copy(quantized / config / "config.json", folder)
    for refuse in (lambda: check_model(config_for(folder)), lambda: loaded(folder)):
        with pytest.raises(UserError, match=says):
            refuse()
