"""Users who train on one base at once have, each, the run that they would have alone."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.config import ModelConfig, ModelSpec, QuantConfig, TrainConfig, UserError
from distlora.data.loader import step_loader
from distlora.data.rows import open_split
from distlora.parallel import Ranks
from distlora.serving.engine import Engine, EngineLimits
from distlora.serving.operations import (
    Adapter,
    CreateModel,
    ForwardBackward,
    ForwardBackwardResult,
    Load,
    Operation,
    OptimStep,
    Row,
    Sample,
    SampleResult,
    Save,
    Unload,
)
from distlora.serving.passes import cut
from distlora.training import worker as training_worker
from distlora.training.setup import StartOptions, start_model
from support.closeness import adapter_of, assert_adapters_close, assert_losses_close
from support.small_models import VOCABULARY, make_run, read_metrics
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
USERS = {
    "a": Adapter(rank=8, seed=1),
    "b": Adapter(rank=3, seed=2, mlp=False, unembed=False),
    "c": Adapter(rank=6, seed=3, attention=False),
    "d": Adapter(rank=16, seed=4, unembed=False),
}
LOSSES = {"a": "cross_entropy", "b": "importance_sampling", "c": "ppo", "d": "dro"}
STEPS = 4


def started(ranks: Ranks, folder: Path, **options: Any) -> Engine:
    """Return an engine on the tiny model."""
    spec = ModelSpec(model=ModelConfig(path=str(folder)), quant=QuantConfig(cache=False), dtype="fp32")
    train = TrainConfig(router_aux_loss=0.0, dtype="fp32")
    model, backend, _ = start_model(spec, ranks, StartOptions(for_slots=True), train=train)
    return Engine(model, backend, spec, end_tokens=[1], **options)


def rows_of(user: str, step: int) -> list[Row]:
    """Return rows of uneven lengths, with the inputs of the user's loss."""
    generator = np.random.default_rng([ord(user), step])
    rows = []
    for length in generator.integers(5, 40, size=3).tolist():
        tokens = generator.integers(5, VOCABULARY, size=length + 1)
        values = {
            "weights": generator.random(length),
            "logprobs": -5 - 3 * generator.random(length),
            "advantages": generator.normal(size=length),
        }
        names = ["weights"] if LOSSES[user] == "cross_entropy" else ["logprobs", "advantages"]
        inputs = {name: (values[name] / (3 * length)).astype(np.float32) if name != "logprobs" else
                  values[name].astype(np.float32) for name in names}  # fmt: skip
        rows.append(Row(tokens[:-1], {"target_tokens": tokens[1:], **inputs}))
    return rows


def calls_of(user: str, steps: Sequence[int] = range(STEPS)) -> list[Operation]:
    """Return a user's steps, each of two calls whose gradients accumulate."""
    rows = {step: rows_of(user, step) for step in steps}
    return [
        operation
        for step in steps
        for operation in (
            ForwardBackward(user, rows[step][:1], LOSSES[user]),
            ForwardBackward(user, rows[step][1:], LOSSES[user]),
            OptimStep(user, learning_rate=2e-3, eps=1e-4, beta2=0.9 + ord(user) / 2000, grad_clip_norm=0.5),
        )
    ]


def losses_of(results: Sequence[Any]) -> list[float]:
    return [each.metrics["loss:sum"] for each in results if isinstance(each, ForwardBackwardResult)]


Trained = Mapping[str, tuple[list[Any], dict[str, Tensor]]]
"""Results and adapter of each user."""


def run_users(ranks: Ranks, *, folder: Path, users: Sequence[str]) -> Trained:
    """Train users at once; return each one's results, and its adapter on this rank."""
    engine = started(ranks, folder, limits=EngineLimits(micro_batch_tokens=64))
    futures: dict[str, list[Any]] = {user: [] for user in users}
    if ranks.rank == 0:
        last = Sample([7, 8, 9, 10], num_samples=2, max_tokens=5, seed=3, stop_tokens=[], prompt_logprobs=True)
        calls = {
            user: [CreateModel(user, USERS[user]), *calls_of(user), replace(last, model_id=user)] for user in users
        }
        for at in range(max(map(len, calls.values()))):
            for user in users:
                futures[user] += [engine.submit(each) for each in calls[user][at : at + 1]]
    engine.close()
    engine.run()
    kept = {user: {n: p.detach().clone() for n, p in engine.adapter(user).parameters.items()} for user in users}
    return {user: ([each.result(0) for each in futures[user]], kept[user]) for user in users}


@pytest.fixture(scope="module")
def alone(folders: Path) -> Trained:
    """Return what each user has alone on one rank."""
    return {user: run_users(SINGLE, folder=folders / "llama", users=[user])[user] for user in USERS}


def assert_same_users(actual: Trained, expected: Trained) -> None:
    for user, (results, adapter) in expected.items():
        for ours, other in zip(actual[user][0], results, strict=True):
            if isinstance(other, ForwardBackwardResult):
                # Relative to the sum of magnitudes: the losses of a policy gradient have both signs and may cancel.
                size = sum(np.abs(losses).sum() for losses in other.losses)
                assert abs(ours.metrics["loss:sum"] - other.metrics["loss:sum"]) <= 1e-6 * size
            elif isinstance(other, SampleResult):
                np.testing.assert_allclose(ours.prompt_logprobs[1:], other.prompt_logprobs[1:], atol=1e-5)
                for sequence, expected in zip(ours.sequences, other.sequences, strict=True):
                    assert sequence.tokens == expected.tokens
                    np.testing.assert_allclose(sequence.logprobs, expected.logprobs, atol=1e-5)
        assert_adapters_close(actual[user][1], adapter)


def test_users_at_once_are_the_users_alone(folders: Path, alone: Any) -> None:
    together = run_users(SINGLE, folder=folders / "llama", users=list(USERS))
    assert_same_users(together, alone)


def test_two_ranks_serve_as_one(world: World, folders: Path, alone: Any) -> None:
    first, second = world.run(2, run_users, folder=folders / "llama", users=list(USERS))
    assert_same_users(first, alone)
    for user in USERS:
        assert all(torch.equal(first[user][1][name], tensor) for name, tensor in second[user][1].items())


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[Callable[[Operation], Any]]:
    """Run an engine on one rank in a thread; yield what does an operation and returns its result."""
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        yield lambda operation: engine.submit(operation).result(120)
    finally:
        engine.close()
        thread.join()


def documents_of(run_dir: Path, config: Any, step: int) -> list[Row]:
    """Return the documents in a step's sequences, with the weights by which the step divides its loss."""
    batch = step_loader(open_split(run_dir, "train"), config.train, SINGLE, shuffle=True).batch(step)
    rows = []
    for part in batch.micro_batches:
        for ids, labels, positions in zip(part.input_ids, part.labels, part.position_ids, strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for first, last in itertools.pairwise(starts):
                targets = labels[first:last].numpy()
                if (targets >= 0).any():
                    weights = ((targets >= 0) / batch.global_targets).astype(np.float32)
                    inputs = {"target_tokens": np.maximum(targets, 0), "weights": weights}
                    rows.append(Row(ids[first:last].numpy(), inputs))
    return rows


def test_an_adapter_is_the_one_that_a_run_trains(folders: Path, tmp_path: Path) -> None:
    config = make_run(
        tmp_path / "run",
        folders,
        adapter={"r": 8, "lora_alpha": 32.0, "use_rslora": False},
        optim={"schedule": "constant", "warmup_steps": 0},
        train={"max_steps": STEPS, "global_batch": 6, "seed": 7},
    )
    training_worker.run(tmp_path / "run", SINGLE)
    losses = []
    with running(started(SINGLE, folders / "llama")) as do:
        do(CreateModel("m", Adapter(rank=8, seed=7, unembed=False)))
        for step in range(STEPS):
            call = ForwardBackward("m", documents_of(tmp_path / "run", config, step), "cross_entropy")
            losses.append(do(call).metrics["loss:sum"])
            optim = config.optim
            do(OptimStep("m", optim.lr, *optim.betas, eps=optim.eps, grad_clip_norm=optim.max_grad_norm))
        do(Save("m", tmp_path / "saved", optimizer=False))
    assert_losses_close(losses, [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line])
    saved = safetensors.torch.load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert_adapters_close(saved, adapter_of(tmp_path / "run"))


def test_samples_are_of_the_weights_after_the_last_step(folders: Path, tmp_path: Path) -> None:
    with running(started(SINGLE, folders / "llama-tied")) as do:
        for user in "ab":
            do(CreateModel(user, USERS[user]))
        prompt = rows_of("a", 0)[0].tokens.tolist()
        ask = Sample(prompt, "a", num_samples=3, max_tokens=6, seed=5, stop_tokens=[], prompt_logprobs=True)
        before = do(ask)
        assert before == replace(do(replace(ask, model_id=None)), sequences=before.sequences)  # B is zero.
        for operation in calls_of("a", range(2)):
            do(operation)
        do(Save("a", tmp_path / "a", optimizer=False))
        after = do(ask)
        assert after != before
        assert do(replace(ask, model_id=None, weights_folder=tmp_path / "a")) == after
        for sequence in after.sequences:
            assert sequence.stop_reason == "length"
            whole = np.array(prompt + sequence.tokens)
            inputs = {"target_tokens": whole[1:], "weights": np.ones(len(whole) - 1, np.float32)}
            call = ForwardBackward("a", [Row(whole[:-1], inputs)], "cross_entropy", backward=False)
            expected = do(call).logprobs[0]
            np.testing.assert_allclose(sequence.logprobs, expected[len(prompt) - 1 :], atol=1e-5)
            np.testing.assert_allclose(after.prompt_logprobs[1:], expected[: len(prompt) - 1], atol=1e-5)
        stopped = do(replace(ask, stop_tokens=[after.sequences[0].tokens[2]])).sequences[0]
        assert (stopped.tokens, stopped.stop_reason) == (after.sequences[0].tokens[:3], "stop")


def test_a_model_continues_bit_for_bit(folders: Path, tmp_path: Path) -> None:
    """After a save, an unload and a load; and after idle times on the disk."""
    (tmp_path / "idle").mkdir()
    engine = started(SINGLE, folders / "llama", limits=EngineLimits(disk_seconds=0.0), spill_folder=tmp_path / "idle")
    calls = calls_of("a")
    results: dict[str, list[Any]] = {"whole": [], "loaded": [], "parked": []}
    with running(engine) as do:
        for name in results:
            do(CreateModel(name, USERS["a"]))
            for at, call in enumerate(calls):
                results[name].append(do(replace(call, model_id=name)))
                if at == 5 and name == "loaded":
                    do(Save(name, tmp_path / "saved", optimizer=True))
                    do(Unload(name))
                    do(CreateModel(name, replace(USERS["a"], seed=9)))
                    do(Load(name, tmp_path / "saved", optimizer=True))
                if at % 3 == 2 and name == "parked":
                    with pytest.raises(UserError, match="does not exist"):
                        do(Unload("another"))  # A round without this model, after which it leaves.
                    with pytest.raises(UserError, match="does not exist"):
                        do(Unload("another"))
                    assert engine.snapshot()["models_on_disk"] >= 1
                    assert list((tmp_path / "idle").iterdir())
            do(Save(name, tmp_path / name, optimizer=True))
        expected = losses_of(results["whole"])
        assert losses_of(results["loaded"]) == losses_of(results["parked"]) == expected
    for file in ("adapter_model.safetensors", "trainer.safetensors"):
        for name in ("loaded", "parked"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_faults_of_a_caller_change_nothing(folders: Path, tmp_path: Path) -> None:
    with running(started(SINGLE, folders / "llama")) as do:
        do(CreateModel("a", USERS["a"]))
        do(CreateModel("b", USERS["b"]))
        (row,) = rows_of("a", 0)[:1]
        do(Save("a", tmp_path / "first", optimizer=False))
        refused = {
            "did you mean 'cross_entropy'": ForwardBackward("a", [row], "crossentropy"),
            "lacks advantages": ForwardBackward("a", [row], "ppo"),
            "holds token 5000": ForwardBackward("a", [replace(row, tokens=row.tokens * 0 + 5000)], "cross_entropy"),
            "model c does not exist": ForwardBackward("c", [row], "cross_entropy"),
            "exists already": CreateModel("a", USERS["a"]),
            "needs train_attn": CreateModel("c", Adapter(1, attention=False, mlp=False, unembed=False)),
            "learning_rate=nan": OptimStep("a", learning_rate=float("nan")),
            "without optimizer states": Load("a", tmp_path / "first", optimizer=True),
            "rank=8.*rank=3": Load("b", tmp_path / "first", optimizer=False),
            "damaged": Load("a", tmp_path / "nothing", optimizer=False),
            "temperature=-1": Sample([5], "a", temperature=-1),
        }
        for message, operation in refused.items():
            with pytest.raises(UserError, match=message):
                do(operation)
        huge = replace(row, inputs=row.inputs | {"weights": np.full(len(row.tokens), 3e38, np.float32)})
        do(ForwardBackward("a", [huge], "cross_entropy"))
        with pytest.raises(UserError, match="Nothing was updated"):
            do(OptimStep("a"))
        do(Save("a", tmp_path / "second", optimizer=False))
        contents = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
        assert contents[0] == contents[1]


def test_rounds_are_fair_and_keep_the_order_of_a_model(folders: Path) -> None:
    assert cut([3, 9, 4, 2], world=2, most_tokens=8) == [[[1], [2]], [[0], [3]]]
    engine = started(SINGLE, folders / "llama", limits=EngineLimits(round_tokens=50))
    row = Row(np.full(30, 5), {"target_tokens": np.full(30, 6), "weights": np.ones(30, np.float32)})
    call, step = ForwardBackward("a", [row], "cross_entropy"), OptimStep("a")
    for user in "ab":
        engine.submit(CreateModel(user, USERS[user]))
    for operation in (call, step, call, call):
        engine.submit(operation)
    engine.submit(replace(call, model_id="b"))
    engine.submit(replace(step, model_id="b")).cancel()
    rounds = [[(type(each).__name__, each.model_id) for each, _ in engine._take() or []] for _ in range(4)]
    forward = "ForwardBackward"
    assert rounds == [
        [("CreateModel", "a"), ("CreateModel", "b"), (forward, "a")],
        [("OptimStep", "a"), (forward, "b")],  # 30 tokens of b, which had none, leave too few for those of a.
        [(forward, "a")],
        [(forward, "a")],
    ]
