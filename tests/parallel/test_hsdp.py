"""Check several replicas of the base, each sharded over some of the ranks.

They give the run of one replica over all ranks, and nothing of the base crosses between replicas.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from distlora.config import Config
from distlora.config.file import load_config
from distlora.data.loader import open_data
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks
from distlora.parallel.integrity import DamagedWeightsError
from distlora.parallel.ranks import Traffic
from distlora.parallel.watch import Control
from distlora.run_folder.layout import step_of, steps
from distlora.training import setup, worker
from support.closeness import assert_adapters_close, assert_losses_close
from support.collectives import Collectives
from support.counted_step import only_collectives, our_step
from support.family_models import config_for
from support.planned import traffic_of
from support.runs import adapters_after, losses_of, run_once, run_until
from support.small_models import make_run, read_metrics
from support.worlds import World

RANKS, DEGREE = 4, 2
FULL: dict[str, Any] = {"adapter": {"method": "full"}, "quant": {"method": "none"}}
SAVED: dict[str, Any] = {"adapter": {"target_modules": "qv", "r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}


def prepare(run_dir: Path, folders: Path, model: str = "llama", *, degree: int | None = DEGREE, **sections: Any) -> Any:
    """Prepare a run of four ranks with that parallel.shard_degree."""
    parallel = {"shard_degree": degree} | sections.pop("parallel", {})
    return make_run(run_dir, folders, model, parallel=parallel, cluster={"gpus_per_node": RANKS}, **sections)


def saved(run_dir: Path) -> dict[str, Tensor]:
    (file,) = [*run_dir.glob("adapter/*.safetensors"), *run_dir.glob("model/*.safetensors")]
    return safetensors.torch.load_file(file)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


# --- the frozen base: what a rank owns, and what travels ---


def owned(ranks: Ranks, *, run_dir: Path) -> dict[str, tuple[Tensor, int, bool]]:
    """Return (this rank's rows, the first one's index, is frozen base) of every parameter and buffer."""
    model, backend, _ = setup.start_run_model(load_config(run_dir), ranks)
    return rows_of(model, backend)


def rows_of(model: CausalLM, backend: Backend) -> dict[str, tuple[Tensor, int, bool]]:
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    rows = {name: backend.local_rows(tensor.detach()) for name, tensor in tensors.items()}
    return {name: (own.clone(), first, name in frozen) for name, (own, first) in rows.items()}


CUTS = [(1, None, 1), (4, 2, 2), (4, 1, 1)]
"""(ranks, parallel.shard_degree, ranks of a replica)."""


def load(
    world: World, folders: Path, run_dir: Path, size: int, degree: int | None, **adapter: Any
) -> list[dict[str, Any]]:
    """Return what each rank owns of a loaded model."""
    make_run(
        run_dir,
        folders,
        new_tokens=["statement", "of the"],
        adapter={"target_modules": "all-linear", "r": 4} | adapter,
        parallel={"shard_degree": degree},
        cluster={"gpus_per_node": size},
    )
    return world.run(size, owned, run_dir=run_dir)


@pytest.fixture(scope="module")
def cuts(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[dict[str, Any]]]:
    """With DoRA's row norms and new tokens, which need sums over ranks."""
    root = tmp_path_factory.mktemp("cuts")
    return {
        (size, degree): load(world, folders, root / f"{size}_{degree}", size, degree, use_dora=True)
        for size, degree, _ in CUTS
    }


@pytest.mark.parametrize(("size", "degree", "of_a_copy"), CUTS[1:])
def test_each_copy_is_the_whole_quantization_bit_for_bit(
    cuts: dict[Any, list[dict[str, Any]]], size: int, degree: int | None, of_a_copy: int
) -> None:
    (whole,) = cuts[1, None]
    by_rank = cuts[size, degree]
    cut = 0
    for name, (expected, *_) in whole.items():
        for start in range(0, size, of_a_copy):
            parts = [by_rank[rank][name] for rank in range(start, start + of_a_copy)]
            if all(part[0].shape == expected.shape for part in parts):  # Replicated: adapters, offsets, row norms.
                assert all(torch.equal(rows, expected) for rows, *_ in parts), name
                continue
            cut += 1
            assert torch.equal(torch.cat([rows for rows, *_ in parts]), expected), name
            rows = -(-len(expected) // of_a_copy)
            assert [first for _, first, _ in parts] == [min(rows * part, len(expected)) for part in range(of_a_copy)]
    assert (cut > 50) == (of_a_copy > 1)


def step_by_group(ranks: Ranks, *, config: Config) -> tuple[dict[tuple[str, tuple[int, ...]], int], Traffic]:
    """Return a step's bytes by (kind, participating ranks), and what the backend counts.

    The first are counted where torch issues its collectives.
    """
    model, backend, _ = setup.start_run_model(config, ranks)
    backend.reduce_gradients_of(worker.trained_parameters(model).values(), config.parallel.bucket_mb)
    with only_collectives():
        our_step(model, backend, config, 3)  # Its first forward checks what was gathered, and sums that over all ranks.
    backend.zero_gradients()
    backend.traffic.take()
    with Collectives() as collectives:
        our_step(model, backend, config, 3)
    return dict(collectives.nbytes), backend.traffic.take()


@pytest.mark.parametrize(
    ("sections", "degree"),
    [(SAVED, 2), pytest.param(FULL, 2, marks=pytest.mark.slow)],
    ids=str,
)
def test_only_gradients_travel_between_replicas(
    world: World, folders: Path, sections: dict[str, Any], degree: int
) -> None:
    sections = sections | {"parallel": sections.get("parallel", {}) | {"shard_degree": degree}}
    config = config_for(folders / "llama-tied", cluster={"gpus_per_node": RANKS}, **sections)
    step = traffic_of(replace(config, train=replace(config.train, global_batch=3 * RANKS)), world=RANKS)
    everyone = tuple(range(RANKS))
    for rank, (issued, traffic) in enumerate(world.run(RANKS, step_by_group, config=config)):
        copy = tuple(range(rank // degree * degree, rank // degree * degree + degree))
        replicas = tuple(range(rank % degree, RANKS, degree))
        expected = {
            ("gathered", copy): step.gathered,
            ("scattered", copy): step.scattered,
            ("reduced", everyone): step.reduced,
            ("reduced", replicas): step.reduced_rows or step.reduced * (replicas == everyone),
        }
        assert issued == {key: nbytes for key, nbytes in expected.items() if nbytes}, "what leaves a copy is more"
        reduced = step.reduced + step.reduced_rows
        assert traffic == Traffic(step.gathered, reduced, step.scattered, between_replicas_bytes=reduced)
    assert (step.gathered > 0) == (degree > 1)
    assert (step.reduced_rows > 0) == (degree > 1 and "adapter" in sections)


# --- runs ---


@pytest.fixture(scope="module")
def one_copy(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of four ranks that shard one replica."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    prepare(run_dir, folders, degree=None, train=SETTINGS)
    world.run(RANKS, run_once, run_dir=run_dir)
    return run_dir


SETTINGS: dict[str, Any] = {"max_steps": 3, "save_every": 1, "keep": 9, "micro_batch": 3}


def set_degree(run_dir: Path, degree: int | None) -> None:
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    values["parallel"]["shard_degree"] = degree
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.ci
def test_a_run_that_goes_on_with_replicas_is_that_of_one_replica_bit_for_bit(
    world: World, folders: Path, tmp_path: Path, one_copy: Path
) -> None:
    run_dir = tmp_path / "run"
    prepare(run_dir, folders, degree=None, train=SETTINGS)
    world.run(RANKS, run_until, run_dir=run_dir, stop_before=1)
    set_degree(run_dir, DEGREE)
    first, *others = world.run(RANKS, adapters_after, run_dir=run_dir)
    assert all(equal(other, first) for other in others)
    assert equal(saved(run_dir), saved(one_copy))
    lines, expected = ([line for line in read_metrics(run) if "loss" in line] for run in (run_dir, one_copy))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert [line["grad_norm"] for line in lines] == [line["grad_norm"] for line in expected]

    step = traffic_of(load_config(run_dir), world=RANKS)
    assert lines[-1]["gathered_bytes"] == step.gathered
    assert lines[-1]["between_replicas_bytes"] == lines[-1]["reduced_bytes"] == step.reduced
    assert step.reduced == sum(tensor.nbytes for tensor in first.values())
    assert json.loads((run_dir / "summary.json").read_text())["between_replicas_bytes_per_step"] == step.reduced
    assert "between_replicas_bytes" not in expected[-1]


# --- units that are trained ---


def test_full_fine_tuning_in_replicas_is_the_single_run_and_resumes_bit_for_bit(
    world: World, folders: Path, tmp_path: Path
) -> None:
    settings = SETTINGS | {"max_steps": 2}
    make_run(tmp_path / "single", folders, train=settings | {"micro_batch": 12}, **FULL)
    expected = world.run(1, run_once, run_dir=tmp_path / "single")[0]
    prepare(tmp_path / "whole", folders, train=settings, **FULL)
    metrics = world.run(RANKS, run_once, run_dir=tmp_path / "whole")[0]
    assert_losses_close(losses_of(metrics), losses_of(expected))
    assert_adapters_close(saved(tmp_path / "whole"), saved(tmp_path / "single"))
    norms = [[line["grad_norm"] for line in lines if "grad_norm" in line] for lines in (metrics, expected)]
    assert_losses_close(*norms, relative=1e-5)

    # From the checkpoint after one step.
    shutil.copytree(tmp_path / "whole", tmp_path / "same")
    for folder in steps(tmp_path / "same" / "checkpoints"):
        if step_of(folder) > 1:
            shutil.rmtree(folder)
    world.run(RANKS, run_once, run_dir=tmp_path / "same")
    assert equal(saved(tmp_path / "same"), saved(tmp_path / "whole"))


# --- integrity ---


def damaged(ranks: Ranks, *, run_dir: Path) -> list[str]:
    """Return the messages for damage after loading, and for ranks that read or compute something else.

    A byte of rank 3 changes after loading, as a forward and a save see it; rank 3 reads one byte otherwise; rank 2
    computes an offset otherwise.
    """
    config = load_config(run_dir)
    loader, _ = open_data(run_dir, config.train, ranks)
    micro = loader.batch(0).micro_batches[0]
    model, backend, _ = setup.start_run_model(config, ranks)
    block = model.blocks[1].inner.mlp.up_proj
    codes, _ = backend.local_rows(block.codes)
    said = []

    def expect(call: Any) -> None:
        with pytest.raises(DamagedWeightsError) as caught:
            call()
        said.append(str(caught.value))

    if ranks.rank == 3:
        codes[0, 5] ^= 16
    expect(lambda: model(micro.input_ids, micro.position_ids, micro.labels))
    model.reshard()
    expect(backend.check_weights)
    expect(lambda: backend.watch_weights(model))
    if ranks.rank == 3:
        codes[0, 5] ^= 16
    if ranks.rank == 2:
        block.offset.add_(1)
    expect(lambda: backend.watch_weights(model))
    return said


def test_a_byte_that_changed_in_one_copy_is_named_with_its_rank_on_all(
    world: World, folders: Path, tmp_path: Path
) -> None:
    prepare(tmp_path / "run", folders)
    by_rank = world.run(RANKS, damaged, run_dir=tmp_path / "run")
    assert all(said == by_rank[0] for said in by_rank)
    in_forward, at_save, loaded, offset = by_rank[0]
    name = "model.layers.1.mlp.up_proj"
    for said in (in_forward, at_save):
        assert f"{name}.codes, rows 1 to 1, those of rank 3, are not what rank 3 loaded; the memory of rank 3" in said
    assert f"{name}.codes, rows 1 to 1, differs between rank 1 and rank 3 after loading" in loaded
    assert "are the files in model.path the same on every node?" in loaded
    assert f"{name}.offset differs between rank 0 and rank 2" in offset


def begun_from_other_files(ranks: Ranks, *, run_dir: Path, section: str, files: dict[str, str]) -> str:
    """Return the end of a run in which half of the ranks have other files where a setting points."""
    config = load_config(run_dir)
    if ranks.rank >= ranks.world // 2:
        config = replace(config, **{section: replace(getattr(config, section), **files)})
    with pytest.raises(DamagedWeightsError) as caught:
        worker.train(run_dir, config, ranks, Control(ranks.control, save_minutes=None))
    return str(caught.value)


def scaled_copy(folder: Path, to: Path, *parts: str) -> Path:
    """Copy a folder of safetensors, the tensors with these parts of names 1.5 times as large."""
    shutil.copytree(folder, to)
    for file in to.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        changed = {name: 1.5 * t if any(part in name for part in parts) else t for name, t in tensors.items()}
        safetensors.torch.save_file(changed, file, metadata={"format": "pt"})
    return to


def test_ranks_that_start_from_different_adapters_do_not_begin(
    world: World, folders: Path, tmp_path: Path, one_copy: Path
) -> None:
    here = one_copy / "adapter"
    files = {"init_from": str(scaled_copy(here, tmp_path / "other", "2.self_attn.o_proj.lora_B"))}
    make_run(tmp_path / "run", folders, adapter={"init_from": str(here)}, cluster={"gpus_per_node": 2})
    messages = world.run(2, begun_from_other_files, run_dir=tmp_path / "run", section="adapter", files=files)
    assert len(set(messages)) == 1
    name = "model.layers.2.self_attn.o_proj.adapters.default.B"
    assert f"{name}, which is trained, differs between rank 0 and rank 1 before the first step" in messages[0]
    assert "in adapter.init_from where it is set, and in the run's folder the same on every node?" in messages[0]
    assert read_metrics(tmp_path / "run") == []
