"""ZeRO-3 is the same run as FSDP2: the same shards, the same bytes on the wire, the same numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.shapes import shapes_of
from distlora.data.loader import open_data
from distlora.parallel import Ranks, zero3
from distlora.parallel.integrity import DamagedWeightsError
from distlora.planner import traffic
from distlora.planner.workload import Workload
from distlora.training import setup
from distlora.training import worker as train
from distlora_kernels.format_layouts import FORMAT_LAYOUTS
from support.closeness import assert_adapters_close, assert_losses_close
from support.collectives import Collectives
from support.loaded_shards import check_slices, own_rows
from support.planned import block_bytes, traffic_of
from support.runs import adapters_after, outcome, result_of, run_until
from support.small_models import NEW_TOKENS, make_run, read_metrics, write_model_folder
from support.tiers import ci
from support.worlds import Alone

ZERO3 = {"backend": "zero3"}
STEPS = {"max_steps": 4}


@pytest.mark.parametrize(
    ("model", "parallel"),
    [("llama", {}), pytest.param("llama-tied", {"offload_base": True}, marks=pytest.mark.slow)],
    ids=str,
)
def test_rank_holds_its_slice_of_the_quantization(
    alone: Alone, folders: Path, model: str, parallel: dict[str, Any]
) -> None:
    check_slices(alone.run(3, own_rows, folder=folders / model, parallel=ZERO3 | parallel), folders / model)


def gathered_in_steps(ranks: Ranks, *, run_dir: Path, steps: int) -> tuple[list[int], list[int], int, bool]:
    """Run some steps.

    Returns (bytes that a step gathered by our count; as torch issues them; bytes of the base that are gathered after
    the last; True if torch's F.linear is still torch's).
    """
    config = train.load_config(run_dir)
    loader, _ = open_data(run_dir, config.train, ranks)
    model, backend, _ = setup.start_run_model(config, ranks)
    backend.reduce_gradients_of(train.trained_parameters(model).values(), config.parallel.bucket_mb)
    ours, theirs = [], []
    for number in range(steps):
        backend.traffic.take()
        batches = loader.batch(number).micro_batches
        with Collectives() as issued:
            for index, micro in enumerate(batches):
                loss = model(micro.input_ids, micro.position_ids, micro.labels).sum()
                backend.backward(loss, last=index == len(batches) - 1)
            backend.finish_gradients()
        ours.append(backend.traffic.gathered_bytes)
        # The first forward's check of the base tells its findings by an all-reduce.
        theirs.append(issued.of("gathered"))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    left = sum(parameter.data.nbytes for parameter in frozen)
    return ours, theirs, left, torch.nn.functional.linear.__module__ == "torch._C._nn"


@pytest.mark.parametrize("model", [ci("llama"), "llama-tied"])
def test_bytes_on_the_wire_are_the_packed_base_once_a_pass(
    alone: Alone, folders: Path, tmp_path: Path, model: str
) -> None:
    shapes = shapes_of(read_config(folders / model), folders / model)
    block = block_bytes(shapes.block, 3, format="nf4", itemsize=4)
    # From the second forward on the last block stays from forward to backward: the head is smaller than a block, so
    # that gathering a block ahead comes upon it while it is there.
    settings = {"micro_batch": 2, "global_batch": 12}
    for prefetch, stays in ((False, [0]), (True, [1, 2])):
        run_dir = tmp_path / f"{prefetch}"
        config = make_run(run_dir, folders, model, train=settings, parallel=ZERO3 | {"prefetch": prefetch})
        whole = traffic.step_traffic(Workload.of(config), shapes, world=3, accumulation=2).gathered
        expected = [whole - count * block for count in stays]
        for ours, theirs, left, intact in alone.run(3, gathered_in_steps, run_dir=run_dir, steps=len(stays)):
            assert ours == theirs == expected
            assert left == 0, f"{left} bytes of the base stay gathered after backward"
            assert intact, "F.linear was exchanged for the whole process"


SOME, SMALL = "gpt_oss-some", "qwen3_moe-small"


@pytest.fixture(scope="module")
def some(folders: Path) -> Path:
    """Write a model of 4 experts of which all tokens choose 0 and 2, with biases and transposed weights.

    The other one has 8 experts of less than a group of 16,384 weights.
    """
    write_model_folder(folders / SMALL, SMALL)
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}
    write_model_folder(folders / SOME, SOME, **sizes)
    file = folders / SOME / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor.copy_(torch.tensor([100.0, 0.0, 99.0, 0.0]))
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return folders


def poisoned(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a weight full of NaN and of the highest codes."""
    return (
        torch.full(shape, 255, dtype=torch.uint8, device=device)
        if dtype == torch.uint8
        else (torch.full(shape, math.nan, dtype=dtype, device=device))
    )


def adapters_of_poisoned(ranks: Ranks, *, run_dir: Path) -> dict[str, Tensor]:
    """Train with experts that hold NaN where no token chose them, and return this rank's own adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero3, "undefined", poisoned)
        return adapters_after(ranks, run_dir=run_dir)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("model", "size", "sections"),
    [
        (SOME, 2, {"train": {"micro_batch": 2, "checkpointing": "none", "accumulate": "block", "verify": True}}),
        # Three micro-batches of few tokens.
        (
            SMALL,
            3,
            {
                "train": {"micro_batch": 1, "global_batch": 9},
                "parallel": {"offload_base": True},
                "data": {"sequence_length": 3},
            },
        ),
        (SOME, 2, {"train": {"micro_batch": 3}, "quant": {"method": "none"}, "parallel": {"offload_base": True}}),
    ],
    ids=str,
)
def test_experts_on_demand_are_the_same_run(
    alone: Alone, some: Path, tmp_path: Path, model: str, size: int, sections: dict[str, Any]
) -> None:
    """Bit for bit, with fewer bytes."""
    results, gathered = [], []
    for experts in ("gathered", "on_demand"):
        parallel = ZERO3 | {"experts": experts} | sections.get("parallel", {})
        data = {"eval_fraction": 0.0} | sections.get("data", {})
        settings = {"max_steps": 2, "save_every": 2} | sections["train"]
        given = sections | {"parallel": parallel, "train": settings, "data": data}
        make_run(tmp_path / experts, some, model, **given)
        ranks = alone.run(size, adapters_of_poisoned, run_dir=tmp_path / experts)
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:] for name in ranks[0])
        results.append(result_of(tmp_path / experts))
        gathered.append([line["gathered_bytes"] for line in read_metrics(tmp_path / experts) if "loss" in line])
    (expected, theirs), (losses, adapter) = results
    assert losses == expected
    assert adapter.keys() == theirs.keys()
    assert all(torch.equal(adapter[name], theirs[name]) for name in adapter)
    assert gathered[1][-1] < gathered[0][-1] or model != SOME


def test_experts_on_demand_take_the_bytes_of_those_that_are_chosen(alone: Alone, some: Path, tmp_path: Path) -> None:
    """In NF4 an expert has 2 and 1 groups: a rank has 4 and 2, and sends 2 and 1 of those of all ranks' choice."""
    settings = {"micro_batch": 2, "global_batch": 12}
    parallel = ZERO3 | {"prefetch": False}
    config = make_run(tmp_path / "all", some, SOME, train=settings, parallel=parallel)
    whole = traffic_of(config, world=2).gathered
    make_run(tmp_path / "run", some, SOME, train=settings, parallel=parallel | {"experts": "on_demand"})
    layers, passes, forwards, ranks, group = 3, 3, 2, 2, FORMAT_LAYOUTS["nf4"].group_bytes
    expected = whole - layers * passes * 2 * ranks * 3 * group + layers * passes * forwards * ranks * 4
    for ours, theirs, left, _ in alone.run(2, gathered_in_steps, run_dir=tmp_path / "run", steps=1):
        # Our count leaves out the check in the first forward, which gathers all experts.
        assert (ours, theirs) == ([expected], [expected + layers * 12 * group])
        assert left == 0


def test_the_planned_bytes_are_those_of_random_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    for experts, chosen, tokens, ranks in ((128, 8, 16, 8), (60, 4, 7, 8), (8, 2, 1, 2), (4, 2, 99, 3)):
        scores = torch.rand(4000, tokens, experts, generator=generator)
        used = torch.zeros(4000, experts).scatter_(1, scores.topk(chosen).indices.flatten(1), 1.0)
        each = -(-experts // ranks)
        padded = torch.nn.functional.pad(used, (0, ranks * each - experts))
        measured = padded.view(4000, ranks, each).sum(dim=2).amax(dim=1).mean() / each
        assert traffic.chosen_share(experts, chosen, tokens, ranks) == pytest.approx(float(measured), rel=0.05)


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_backend(alone: Alone, folders: Path, tmp_path: Path) -> None:
    """Half of it with FSDP2 on two ranks and half with ZeRO-3 on three, and the other way round."""
    for name in ("whole", "run"):
        make_run(tmp_path / name, folders, train=STEPS | {"micro_batch": 2}, parallel={"backend": "fsdp2"})
    expected_losses, expected = outcome(alone, 1, tmp_path / "whole")
    place = tmp_path / "run" / "config.yaml"
    alone.run(2, run_until, run_dir=tmp_path / "run", stop_before=1)
    place.write_text(place.read_text().replace("backend: fsdp2", "backend: zero3"))
    alone.run(3, run_until, run_dir=tmp_path / "run", stop_before=3)
    place.write_text(place.read_text().replace("backend: zero3", "backend: fsdp2"))
    losses, adapter = outcome(alone, 3, tmp_path / "run")
    assert_adapters_close(adapter, expected)
    assert len(losses) == len(expected_losses)


METHODS = {
    "dora": {"adapter": {"use_dora": True}},
    "pissa": {"adapter": {"init": "pissa_niter_4"}},
    "loftq": {"adapter": {"init": "loftq"}},
    "dropout": {"adapter": {"lora_dropout": 0.1}},
    "unquantized": {"quant": {"method": "none"}},
    "new tokens": {"new_tokens": NEW_TOKENS},
    "experts": {"model": "mixtral"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_that_of_one_rank(alone: Alone, folders: Path, tmp_path: Path, name: str) -> None:
    sections = {"train": {"micro_batch": 2, "verify": True, "save_every": 4}} | METHODS[name]
    make_run(tmp_path / "alone", folders, **sections)
    make_run(tmp_path / "zero3", folders, **sections, parallel=ZERO3 | {"offload_base": True})
    expected, found = outcome(alone, 1, tmp_path / "alone"), outcome(alone, 3, tmp_path / "zero3")
    assert_losses_close(found[0], expected[0])
    assert_adapters_close(found[1], expected[1])


def test_rows_in_host_memory_are_sent_while_the_host_goes_on_and_stay_where_they_are() -> None:
    rows: Any = torch.arange(6)
    rows.ds_numel, rows.status, rows.final_location = 6, "available", None
    parameter = SimpleNamespace(ds_tensor=rows)
    with zero3.sent_to(torch.device("cpu"), [parameter]):
        assert parameter.ds_tensor is rows, "nothing is copied where it lies already"
    with zero3.sent_to(torch.device("meta"), [parameter]):
        sent: Any = parameter.ds_tensor
        assert sent.device.type == "meta"
        assert (sent.ds_numel, sent.status, sent.final_location) == (6, "available", None)
    assert parameter.ds_tensor is rows


@pytest.mark.parametrize(
    ("model", "experts", "name"),
    [("llama", "gathered", "mlp.up_proj.codes"), ci(SOME, "on_demand", "mlp.experts.down_proj.codes")],
)
def test_damaged_weights_are_found_where_they_are_gathered(
    alone: Alone, some: Path, tmp_path: Path, model: str, experts: str, name: str
) -> None:
    """Of experts on demand in those too that no token chose."""
    make_run(tmp_path / "run", some, model, parallel=ZERO3 | {"experts": experts})
    for message in alone.run(3, damage_one_row, run_dir=tmp_path / "run", name=name):
        assert name in message, message
        assert "the memory of rank 1 has changed" in message, message


def damage_one_row(ranks: Ranks, *, run_dir: Path, name: str) -> str:
    """Return the first forward's message after a bit of rank 1's rows has changed since loading."""
    config = train.load_config(run_dir)
    model, backend, _ = setup.start_run_model(config, ranks)
    if ranks.rank == 1:
        rows, _ = backend.local_rows(model.blocks[1].get_parameter(f"inner.{name}"))
        rows[0, 7] ^= 4
    tokens = torch.arange(40)[None]
    with pytest.raises(DamagedWeightsError) as raised, torch.no_grad():
        model(tokens, tokens, tokens)
    return str(raised.value)


@pytest.mark.slow
def test_the_command_trains_without_a_compiler_and_says_what_gathers(folders: Path, tmp_path: Path) -> None:
    """On a machine that has neither ninja nor g++, which DeepSpeed asks for at its start."""
    zero = {"stage": 3, "contiguous_gradients": True, "stage3_param_persistence_threshold": 1000}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero, "train_batch_size": "auto"}))
    settings = {
        "model.path": folders / "llama",
        "data.path": folders / "text.jsonl",
        "data.sequence_length": 64,
        "data.cache_dir": tmp_path / "cache",
        "cluster.gpus_per_node": 2,
        "parallel": "zero3",
        "parallel.offload_base": "true",
        "parallel.deepspeed_config": tmp_path / "ds.json",
        "train.max_steps": 3,
        "train.sample_every": 3,
        "train.sample_prompts": '["The import statement"]',
        "tracker": "none",
        "run_dir": tmp_path / "run",
    }
    command = [str(Path(sys.executable).with_name("distlora")), "train", *(f"{k}={v}" for k, v in settings.items())]
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    said = finished.stdout + finished.stderr
    assert finished.returncode == 0, said
    assert "Traceback" not in said
    assert "Warning" not in said
    assert "WARNING" not in said
    assert "(ZeRO-3) gathers the base, which is offloaded to host memory" in said
    assert "have no effect: zero_optimization.contiguous_gradients" in said
    assert 'after step 3: "The import statement"' in said
    assert not (tmp_path / "extensions").exists(), "DeepSpeed compiled something"
    assert read_metrics(tmp_path / "run")[-1]["eval_loss"] < 10
