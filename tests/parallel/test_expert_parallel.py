"""Experts divided over ranks, whose tokens are exchanged: the run of FSDP2, with the bytes that the formula has."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distlora.config import Config
from distlora.config.file import load_config
from distlora.config.plan import CHOSEN
from distlora.model.experts import ExpertWeight
from distlora.parallel import Ranks, Shards
from distlora.parallel.expert_parallel import divide_experts
from distlora.parallel.ranks import Traffic
from distlora.planner.choose import Search, choose
from distlora.training import setup, worker
from distlora_launcher.compose.planning import planned
from support.closeness import assert_adapters_close, assert_losses_close
from support.collectives import Collectives
from support.counted_step import only_collectives, our_step
from support.family_models import config_for
from support.plan_inputs import composed, machine_of, model_of
from support.planned import both, traffic_of
from support.runs import adapters_after, build_run_model, result_of, run_until
from support.small_models import make_run, read_metrics, write_model_folder
from support.tiers import ci
from support.worlds import World

QWEN, BIASED = "qwen3_moe-wide", "gpt_oss-wide"
SETTINGS: dict[str, Any] = {"max_steps": 4, "save_every": 2, "keep": 9, "micro_batch": 2, "accumulate": "block"}


@pytest.fixture(scope="module")
def models(folders: Path) -> Path:
    """Write models whose experts are whole groups of 16,384 weights, two by two.

    The tokens of the second, which has biases and transposed weights, all choose the experts 0 and 1 of 4.
    """
    sizes = {"hidden_size": 128, "head_dim": 32}
    write_model_folder(folders / QWEN, QWEN, **sizes, moe_intermediate_size=64)
    write_model_folder(folders / BIASED, BIASED, **sizes, intermediate_size=128)
    file = folders / BIASED / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("router.bias"):
            tensor.copy_(torch.tensor([100.0, 99.0, 0.0, 0.0]))
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return folders


def prepare(run_dir: Path, folders: Path, model: str, ranks: int, *, parallel: dict[str, Any], **train: Any) -> Config:
    settings = SETTINGS | train
    return make_run(run_dir, folders, model, train=settings, parallel=parallel, cluster={"gpus_per_node": ranks})


@pytest.fixture(scope="module")
def gathered(world: World, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Return a run in which every rank gathers all experts, made at the first use."""

    @functools.cache
    def run(model: str, ranks: int) -> Path:
        run_dir = tmp_path_factory.mktemp("gathered") / "run"
        prepare(run_dir, models, model, ranks, parallel={})
        world.run(ranks, adapters_after, run_dir=run_dir)
        return run_dir

    return run


CELLS = [
    ci(QWEN, 2, {"expert_degree": 2}, {}),
    # Two replicas; a rank of each receives no token. Activations are kept.
    ci(
        BIASED,
        4,
        {"expert_degree": 2, "shard_degree": 2},
        {"accumulate": "step", "micro_batch": 3, "checkpointing": "none"},
    ),
    ci(QWEN, 4, {"expert_degree": 4, "resident_blocks": 1}, {"checkpointing": "selective", "micro_batch": 1}),
]


@pytest.mark.parametrize(("model", "ranks", "parallel", "train"), CELLS, ids=str)
def test_a_run_with_divided_experts_is_that_of_gathered_experts(
    world: World,
    models: Path,
    tmp_path: Path,
    gathered: Callable[[str, int], Path],
    model: str,
    ranks: int,
    parallel: dict[str, Any],
    train: dict[str, Any],
) -> None:
    prepare(tmp_path / "run", models, model, ranks, parallel=parallel, **train)
    first, *others = world.run(ranks, adapters_after, run_dir=tmp_path / "run")
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first), "adapters differ between ranks"
    (losses, adapter), (expected, theirs) = result_of(tmp_path / "run"), result_of(gathered(model, ranks))
    assert_losses_close(losses, expected)
    assert_adapters_close(adapter, theirs)
    assert losses[-1] < losses[0] - 0.02

    step = traffic_of(load_config(tmp_path / "run"), world=ranks)
    line = [line for line in read_metrics(tmp_path / "run") if "loss" in line][-1]
    assert (line["gathered_bytes"], line["exchanged_bytes"]) == (step.gathered, step.exchanged)
    whole = traffic_of(load_config(gathered(model, ranks)), world=ranks)
    assert step.gathered < whole.gathered
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exchanged_bytes_per_step"] == step.exchanged


@pytest.mark.parametrize("objective", [ci("sft"), "dpo"])
def test_dpo_and_shared_factors_are_those_of_gathered_experts(
    world: World, models: Path, tmp_path: Path, objective: str
) -> None:
    """With dpo each expert has its own factors, with sft all share one of both."""
    data: dict[str, Any] = {}
    if objective == "dpo":
        words = [f"{number} plus {number} makes" for number in range(10, 50)]
        pairs = [{"prompt": text, "chosen": f" {text} one", "rejected": f" THE {text}"} for text in words]
        (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
        data = {"path": str(tmp_path / "pairs.jsonl"), "sequence_length": 128}
    sections: dict[str, Any] = {
        "adapter": {} if data else {"expert_sharing": "shared_outer"},
        "train": {"objective": objective, "max_steps": 2, "global_batch": 4, "micro_batch": 2},
        "data": data,
    }
    found = []
    for degree in (1, 2):
        run_dir = tmp_path / str(degree)
        make_run(run_dir, models, QWEN, **sections, parallel={"expert_degree": degree}, cluster={"gpus_per_node": 2})
        first, other = world.run(2, adapters_after, run_dir=run_dir)
        assert all(torch.equal(first[name], other[name]) for name in first), "adapters differ between ranks"
        found.append(result_of(run_dir))
    (expected, theirs), (losses, adapter) = found
    assert_losses_close(losses, expected)
    assert_adapters_close(adapter, theirs)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("ranks", [3, ci(1)])
def test_a_run_resumes_on_other_ranks_and_writes_the_same_files(
    world: World,
    models: Path,
    tmp_path: Path,
    gathered: Callable[[str, int], Path],
    ranks: int,
) -> None:
    """Three ranks cannot divide eight experts, and gather them."""
    run_dir = tmp_path / "run"
    config = prepare(run_dir, models, QWEN, 2, parallel={"expert_degree": "replica"})
    world.run(2, run_until, run_dir=run_dir, stop_before=3)
    world.run(ranks, adapters_after, run_dir=run_dir)
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    assert [bool(line.get("exchanged_bytes")) for line in lines] == [True, True, False, False]
    model = build_run_model(config)
    divide_experts(model, Shards(0, 3, None), "cpu", Traffic(), required=False)
    assert "3 ranks cannot divide the experts (parallel.expert_degree=replica)" in model.notes[-1]
    cluster = dataclasses.replace(config.cluster, gpus_per_node=ranks)
    assert planned(dataclasses.replace(config, cluster=cluster), run_dir=run_dir).work.expert_degree == 1
    (losses, adapter), (expected, theirs) = result_of(run_dir), result_of(gathered(QWEN, 2))
    assert_losses_close(losses, expected)
    assert_adapters_close(adapter, theirs)
    runs = (run_dir, gathered(QWEN, 2))
    files = [sorted(str(path.relative_to(run)) for path in run.rglob("*.safetensors")) for run in runs]
    assert files[0] == files[1]


def step_of(ranks: Ranks, *, config: Config) -> tuple[int, int, dict[str, tuple[int, ...]]]:
    """Return the exchanged bytes of a step as torch issues them and as the backend counts them, and what a rank has."""
    model, backend, _ = setup.start_run_model(config, ranks)
    backend.reduce_gradients_of(worker.trained_parameters(model).values(), config.parallel.bucket_mb)
    with only_collectives():
        our_step(model, backend, config, 3)
        backend.zero_gradients()
        backend.traffic.take()
        with Collectives() as collectives:
            our_step(model, backend, config, 3)
    weights = {path: module for path, module in model.named_modules() if isinstance(module, ExpertWeight)}
    shapes = {path: weight.frozen_weight.shape for path, weight in weights.items()}
    assert all(weight.frozen_weight.parts[0].shape[0] * 2 == weight.num_groups for weight in weights.values())
    return collectives.of("exchanged"), backend.traffic.exchanged_bytes, shapes


def test_a_step_exchanges_the_bytes_that_are_calculated(world: World, models: Path) -> None:
    config = config_for(
        models / QWEN,
        parallel={"expert_degree": 2},
        cluster={"gpus_per_node": 2},
        train={"dtype": "bf16", "micro_batch": 2, "global_batch": 12},
    )
    expected = traffic_of(config, world=2).exchanged
    tokens, chosen, hidden, layers, experts = 12 // 2 * 64, 2, 128, 3, 8
    rows = tokens * chosen * hidden * 2  # bf16
    assert expected == layers * (3 * 2 * rows + 3 * 2 * 8 * experts)
    results = world.run(2, step_of, config=config)
    assert sum(issued for issued, *_ in results) == 2 * expected, "what one rank sends more, another one sends less"
    for _, counted, shapes in results:
        assert counted == expected
        assert set(shapes.values()) == {(4, 128, 128), (4, 128, 64)}


@pytest.mark.ci
def test_the_memory_of_a_step_is_planned(world: World, models: Path) -> None:
    """With an even load within a tenth; experts of all ranks are in no rank's memory."""
    settings = {"parallel": {"expert_degree": 2}, "adapter": {"target_modules": "all-linear", "r": 8}}
    plan, found = both(world, models / QWEN, 2, settings, 1)
    assert {kind: nbytes for kind, nbytes in found.held.items() if nbytes} == plan.held
    assert plan.peak == pytest.approx(found.peak, rel=0.1), (plan.by_kind, found.by_kind)


def test_plan_auto_divides_experts_where_that_moves_fewer_bytes() -> None:
    """A rank's 2,048 tokens take 0.40 GB per layer and pass; all experts in 4 bits 0.62 GB."""
    model, machine, chosen = model_of("moe"), machine_of("h100", ranks=8), {}
    for length in (2048, 32_768):
        words = ["cluster.gpus_per_node=8", "model.path=moe", f"data.sequence_length={length}", "train.global_batch=8"]
        config = composed(*words, "train.micro_batch=1", data={"path": "none.jsonl"})
        fixed = set(CHOSEN) - {"parallel.expert_degree"}
        choice = choose(Search(config=config, model=model, machine=machine, fixed=fixed))
        divided = choice.plan.replan({"parallel.expert_degree": 8})
        gathers = choice.plan.replan({"parallel.expert_degree": 1})
        assert divided.traffic == choice.plan.replan({"parallel.expert_degree": "replica"}).traffic
        fewer = divided.traffic.received < gathers.traffic.received
        chosen[length] = (choice.config.parallel.expert_degree, fewer)
        assert divided.device.moments["forward"]["gathered"] < gathers.device.moments["forward"]["gathered"]
        assert divided.device.held["scratch"] * 8 == gathers.device.held["scratch"]
        assert divided.device.held["codes"] == gathers.device.held["codes"]
    assert chosen == {2048: ("replica", True), 32_768: (1, False)}
