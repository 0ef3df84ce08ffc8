"""Full fine-tuning, cut over the ranks: the run of one process, saved without any rank holding the model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.checkpoint.saver import checkpoint_files
from distlora.config.file import load_config
from distlora.loading.tensor_files import atomic_folder, write_files, write_model
from distlora.parallel import Ranks
from distlora.run_folder.layout import COMPILED_NAME, steps
from distlora.training import setup, worker
from support.closeness import assert_adapters_close, assert_losses_close, relative_error
from support.planned import assert_disk_as_planned, traffic_of
from support.runs import losses_of, make_full_run, run_once, run_until
from support.small_models import VOCABULARY, make_run, read_metrics
from support.tiers import ci
from support.worlds import World


def keep_torch_products(run_dir: Path) -> None:
    """Record the path on which trained linears and LoRA's base are both torch's products."""
    (run_dir / COMPILED_NAME).write_text('{"path": "generic"}')


def published(run_dir: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run_dir / "model" / "model.safetensors")


CELLS = [
    ("llama-tied", 3, {"micro_batch": 2, "accumulate": "block"}),
    ci("llama", 2, {"micro_batch": 2, "checkpointing": "none"}),
    ci("lfm2", 3, {"micro_batch": 2}),
]


@pytest.mark.parametrize(("model", "size", "settings"), CELLS, ids=str)
def test_the_sharded_run_is_the_single_one_and_each_gradient_is_sent_once_a_step(
    world: World, folders: Path, tmp_path: Path, model: str, size: int, settings: dict
) -> None:
    config = make_full_run(tmp_path / "run", folders, model, **settings)
    metrics = world.run(size, run_once, run_dir=tmp_path / "run")[0]
    make_full_run(tmp_path / "one", folders, model, micro_batch=12, checkpointing="none")
    expected = world.run(1, run_once, run_dir=tmp_path / "one")[0]
    assert_losses_close(losses_of(metrics), losses_of(expected))
    assert_adapters_close(published(tmp_path / "run"), published(tmp_path / "one"))
    assert losses_of(metrics)[-1] < losses_of(metrics)[0] - 0.1, "the run learned nothing"
    steps = [[line for line in lines if "loss" in line] for lines in (metrics, expected)]
    assert_losses_close(*([line["grad_norm"] for line in lines] for lines in steps), relative=1e-5)

    step, line = traffic_of(config, world=size), steps[0][-1]
    # The norm is one number.
    assert (line["gathered_bytes"], line["scattered_bytes"]) == (step.gathered, step.scattered)
    assert line["reduced_bytes"] == step.reduced == (4 if size > 1 else 0)


@pytest.mark.ci
def test_in_bf16_masters_stay_fp32_and_ranks_compute_what_one_does(world: World, folders: Path, tmp_path: Path) -> None:
    make_run(
        tmp_path / "lora", folders, train={"dtype": "bf16", "max_steps": 1, "micro_batch": 3}, quant={"method": "none"}
    )
    keep_torch_products(tmp_path / "lora")
    metrics = {"lora": world.run(1, run_once, run_dir=tmp_path / "lora")[0]}
    for size in (1, 2):
        config = make_full_run(tmp_path / str(size), folders, dtype="bf16", micro_batch=3, max_steps=4)
        keep_torch_products(tmp_path / str(size))
        metrics[str(size)] = world.run(size, run_once, run_dir=tmp_path / str(size))[0]
    losses = {name: losses_of(lines) for name, lines in metrics.items()}
    # Two ranks add the same micro-batch gradients in another order; rounding of activations to bf16 is the same.
    assert_losses_close(losses["2"], losses["1"], relative=1e-4)
    assert losses["1"][0] == losses["2"][0] == losses["lora"][0], "at step 0 it is not the base that LoRA trains on"
    step = [line for line in metrics["2"] if "loss" in line][-1]
    calculated = traffic_of(config, world=2)
    assert (step["gathered_bytes"], step["scattered_bytes"]) == (calculated.gathered, calculated.scattered)
    (newest,) = steps(tmp_path / "2" / "checkpoints")
    tensors = safetensors.torch.load_file(newest / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


SETTINGS = {"max_steps": 4, "save_every": 2, "keep": 9, "global_batch": 6, "micro_batch": 2}


@pytest.mark.ci
def test_a_sharded_run_resumes_bit_for_bit_and_on_another_number_of_ranks(
    world: World, folders: Path, tmp_path: Path
) -> None:
    for name in ("whole", "same", "moved"):
        make_full_run(tmp_path / name, folders, "llama-tied", **SETTINGS)
    world.run(2, run_until, run_dir=tmp_path / "whole", stop_before=None)
    for run, sizes in (("same", (2, 2)), ("moved", (3, 1))):
        for size, stop in zip(sizes, (2, None), strict=True):
            world.run(size, run_until, run_dir=tmp_path / run, stop_before=stop)
    whole, same, moved = (published(tmp_path / run) for run in ("whole", "same", "moved"))
    assert all(torch.equal(same[name], tensor) for name, tensor in whole.items())
    assert_adapters_close(moved, whole)
    assert_losses_close(*(losses_of(read_metrics(tmp_path / run)) for run in ("moved", "whole")))


def saved_again(ranks: Ranks, *, run_dir: Path, target: Path, shard_bytes: int, piece_bytes: int) -> None:
    """Write a checkpoint's contents as a bf16 model folder and as another checkpoint's files."""
    config = load_config(run_dir)
    model, backend, _ = setup.start_run_model(config, ranks)
    trained = worker.trained_parameters(model)
    backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    optimizer = worker.build_optimizer(backend.updated(trained), config.optim)
    worker.restore(steps(run_dir / "checkpoints")[-1], model, optimizer, trained, backend)
    with pytest.MonkeyPatch.context() as patch, atomic_folder(target, backend) as folder:
        patch.setattr("distlora.parallel.backend.PIECE_BYTES", piece_bytes)
        write_model(folder, model.hf_state_dict(), backend, torch.bfloat16, shard_bytes=shard_bytes)
        files = checkpoint_files(model, config.spec, optimizer, trained, backend)
        files = {name: files[name] for name in ("trainer.safetensors",)}
        sums = write_files(folder, files, backend)
        read = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files if backend.writes}
        assert sums == read
    backend.barrier()


def test_what_is_saved_has_the_same_bytes_from_any_number_of_ranks_and_loads_in_transformers(
    world: World, folders: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    make_full_run(tmp_path / "run", folders, max_steps=1)
    world.run(2, run_once, run_dir=tmp_path / "run")
    saved = {}
    for size, piece_bytes in ((1, 2**26), (2, 2**26), (3, 10_000)):
        target = tmp_path / str(size)
        settings = {"shard_bytes": 250_000, "piece_bytes": piece_bytes}
        world.run(size, saved_again, run_dir=tmp_path / "run", target=target, **settings)
        saved[size] = {path.name: path.read_bytes() for path in target.iterdir()}
    assert saved[1] == saved[2] == saved[3]
    assert_disk_as_planned(tmp_path / "run", ranks=2)
    assert (
        saved[1]["trainer.safetensors"]
        == (steps(tmp_path / "run" / "checkpoints")[-1] / "trainer.safetensors").read_bytes()
    )
    shards = [name for name in saved[1] if name.startswith("model-")]
    assert len(shards) > 3
    assert "model.safetensors.index.json" in saved[1]
    (tmp_path / "3" / "config.json").write_bytes((tmp_path / "run" / "model" / "config.json").read_bytes())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "3", dtype=torch.bfloat16).state_dict()
    whole = published(tmp_path / "run")
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in loaded.items())


ROWS, LENGTH = 12, 64


def batch(ranks: Ranks, *, start: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Return (inputs, positions, labels): this rank's part of `rows` rows from `start`, mostly of few tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand(ROWS, LENGTH + 1, generator=generator) ** 4 * VOCABULARY).long()[start : start + rows]
    own = tokens.chunk(ranks.world)[ranks.rank]
    return own[:, :-1], torch.arange(LENGTH).expand(len(own), LENGTH), own[:, 1:]


def step_gradients(ranks: Ranks, *, run_dir: Path, passes: int, num_micro: int) -> dict[str, Tensor]:
    """Every gradient of a step of ROWS rows in `passes` backwards; flat, on the rank that writes."""
    config = load_config(run_dir)
    model, backend, _ = setup.start_run_model(config, ranks)
    model.set_num_micro(num_micro)
    trained = worker.trained_parameters(model)
    backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    rows = backend.updated(trained)
    backend.zero_gradients()
    for number in range(passes):
        part = batch(ranks, start=number * ROWS // passes, rows=ROWS // passes)
        backend.backward(model(*part).sum() / (ROWS * LENGTH), last=number == passes - 1)
    backend.finish_gradients()
    whole: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        gradient = rows[name].grad
        pieces: list[Tensor] = []
        backend.stream(backend.spread(gradient, parameter), pieces.append)
        if backend.writes:
            whole[name] = torch.cat(pieces)
    return whole


def test_gradients_in_bf16_are_those_of_one_process_but_for_sums_in_bf16(
    world: World, folders: Path, tmp_path: Path
) -> None:
    """A tied weight's two gradients on several ranks, and slices: parallel/README.md, Limits."""
    for dtype in ("fp32", "bf16"):
        make_full_run(tmp_path / dtype, folders, "llama-tied", dtype=dtype)

    def gradients(size: int, dtype: str = "bf16", passes: int = 1, num_micro: int = 1) -> dict[str, Tensor]:
        arguments = {"run_dir": tmp_path / dtype, "passes": passes, "num_micro": num_micro}
        return world.run(size, step_gradients, **arguments)[0]

    exact, one = gradients(1, "fp32"), gradients(1)
    eps = torch.finfo(torch.bfloat16).eps
    # Each gradient is rounded to nearest: eps / 2 at most for an element, less for a tensor. Sums of slices are, too.
    for actual, ulps in (
        (gradients(2, passes=3), 0.5),
        (gradients(3), 0.5),
        (gradients(2, num_micro=6), 1.0),
    ):
        for name, gradient in one.items():
            assert relative_error(actual[name], gradient) <= ulps * eps, name
            # 10 %: a CPU's products in bf16 sum in another order for another number of rows.
            assert relative_error(actual[name], exact[name]) <= 1.1 * relative_error(gradient, exact[name]), name
