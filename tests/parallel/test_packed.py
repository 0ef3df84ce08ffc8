"""Trials that share one base are the trials that each would have been alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.config import Config, UserError
from distlora.parallel import Ranks
from distlora.run_folder.eval_documents import check_paired, read_documents
from distlora.run_folder.layout import COMPILED_NAME, steps
from distlora.system import stop_signals
from distlora.training import worker as training_worker
from distlora.training.loop import Trainer
from distlora.training.multi_trial import trainer
from distlora.training.multi_trial.protocol import check_pack, verdict_file
from distlora.training.objectives import Losses, NextToken
from distlora.training.open_run import OpenRun
from support.closeness import assert_adapters_close, assert_losses_close
from support.packs import make_pack, outcomes, run_pack, say_verdict
from support.small_models import config_with, make_run, read_metrics
from support.tiers import ci
from support.worlds import World

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
STEPS = {"max_steps": 6, "global_batch": 12, "micro_batch": 3, "dtype": "fp32", "eval_documents": True}
IN_TWO = STEPS | {"micro_batch": 6}
"""Micro-batches on one rank: of small rows each costs the same, however many they are."""
OPTIM = {"lr": 2e-3, "eps": 1e-4}
TRIALS: list[dict[str, dict[str, Any]]] = [
    {"optim": OPTIM, "train": IN_TWO},
    {
        "optim": OPTIM | {"lr": 5e-4, "schedule": "constant", "max_grad_norm": 0.1},
        "adapter": {"target_modules": "all-linear", "r": 3, "lora_dropout": 0.2},
        "train": IN_TWO | {"seed": 7, "eval_every": 3},
        "data": {"eval_fraction": 0.2},
    },
    {
        "optim": OPTIM,
        "adapter": {"target_modules": ["q_proj", "down_proj"], "r": 6, "use_rslora": True, "lora_dropout": 0.05},
        "train": IN_TWO | {"global_batch": 6, "max_steps": 4},
    },
]
"""Other rates, ranks, scales, dropout, targets, seeds, data, batches and lengths."""


def outcome(run_dir: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, training and held out, in order, and the adapter."""
    losses = [line["loss"] if "loss" in line else line["eval_loss"] for line in read_metrics(run_dir)]
    return losses, safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")


def assert_same_trial(run_dir: Path, alone: Path) -> None:
    losses, adapter = outcome(run_dir)
    expected_losses, expected_adapter = outcome(alone)
    assert_losses_close(losses, expected_losses)
    assert_adapters_close(adapter, expected_adapter)
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (run_dir, alone)]
    assert files[0] == files[1]
    of_documents, expected = read_documents(run_dir), read_documents(alone)
    check_paired(of_documents, expected, (str(run_dir), str(alone)))
    assert_losses_close(*([loss or 0.0 for loss in record.losses] for record in (of_documents, expected)))
    summary, of_alone = (json.loads((folder / "summary.json").read_text()) for folder in (run_dir, alone))
    assert of_alone.keys() <= summary.keys()
    for name in ("trainable_parameters", "adapter_bytes", "bits_per_parameter"):
        assert summary[name] == of_alone[name]
    configs = [json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (run_dir, alone)]
    assert configs[0] == configs[1]


@pytest.fixture(scope="module")
def alone(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the run folder of each trial, trained alone on one rank."""
    root = tmp_path_factory.mktemp("alone")
    for number, sections in enumerate(TRIALS):
        make_run(root / str(number), folders, **sections)
        training_worker.run(root / str(number), SINGLE)
    return [root / str(number) for number in range(len(TRIALS))]


CELLS = [
    # (ranks, slots, train settings, parallel settings); on two ranks others are beside one that is not finite, below.
    ci(1, 3, {"checkpointing": "none"}, {}),
    ci(3, 2, {"accumulate": "block", "micro_batch": 2, "checkpointing": "offload"}, {"bucket_mb": 0.01}),
    ci(4, 3, {"micro_batch": 1, "checkpointing": "selective"}, {"shard_degree": 2}),
]


@pytest.mark.parametrize(("size", "slots", "settings", "parallel"), CELLS, ids=str)
def test_trials_in_a_pack_are_the_trials_alone(
    world: World,
    folders: Path,
    tmp_path: Path,
    alone: list[Path],
    size: int,
    slots: int,
    settings: dict[str, Any],
    parallel: dict[str, Any],
) -> None:
    trials = [
        sections | {"train": sections["train"] | settings, "parallel": parallel, "cluster": {"gpus_per_node": size}}
        for sections in TRIALS
    ]
    runs = make_pack(tmp_path / "pack", folders, trials, slots=slots)
    first, *others = world.run(size, run_pack, pack=tmp_path / "pack")
    for number, (run_dir, expected) in enumerate(zip(runs, alone, strict=True)):
        assert outcomes(tmp_path / "pack", number)["state"] == "complete"
        assert_same_trial(run_dir, expected)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


def run_spoilt(ranks: Ranks, *, pack: Path, slot: int, step: int) -> None:
    """Run a pack in which the losses of a slot's rows on rank 0 are NaN in one step."""
    losses_of = NextToken.losses

    def spoil(self: NextToken, model: Any, batch: Any, device: Any, at: Any) -> Losses:
        losses = losses_of(self, model, batch, device, at)
        if at is None or ranks.rank > 0:
            return losses
        bad = (batch.slots == slot) & (at == step) & (batch.rows >= 0)
        return losses._replace(rows=losses.rows + torch.where(bad, float("nan"), 0.0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NextToken, "losses", spoil)
        trainer.run_group(pack, ranks)


@pytest.mark.parametrize(
    ("size", "settings"), [ci(1, {}), (2, {"accumulate": "block", "log_every": 3, "micro_batch": 2})], ids=str
)
def test_a_trial_that_is_not_finite_ends_alone(
    world: World, folders: Path, tmp_path: Path, alone: list[Path], size: int, settings: dict[str, Any]
) -> None:
    """The one with the smaller batch, beside which blocks have empty rows; it is seen one step later by log_every."""
    trials = [sections | {"train": sections["train"] | settings} for sections in TRIALS]
    runs = make_pack(tmp_path / "pack", folders, trials)
    world.run(size, run_spoilt, pack=tmp_path / "pack", slot=2, step=1)
    failed = outcomes(tmp_path / "pack", 2)
    assert failed["state"] == "failed"
    assert "step 2: the loss of rows" in failed["reason"]
    assert "the state after step 1 is saved" in failed["reason"]
    assert [folder.name for folder in steps(runs[2] / "checkpoints")] == ["step_00000001"]
    kept = safetensors.torch.load_file(runs[2] / "checkpoints" / "step_00000001" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (runs[2] / "adapter").exists()
    for number in (0, 1):
        assert_same_trial(runs[number], alone[number])


def run_with_a_reporter_that_fails(ranks: Ranks, *, pack: Path, run_dir: Path) -> None:
    """Run a pack in which rank 0 alone cannot read what it needs of one trial."""
    reporter = OpenRun.reporter

    def fails(self: OpenRun, *arguments: Any, **options: Any) -> Any:
        if self.folder == run_dir and ranks.rank == 0:
            raise UserError("summary.json is damaged")
        return reporter(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenRun, "reporter", fails)
        trainer.run_group(pack, ranks)


def test_ranks_give_a_trial_up_together(world: World, folders: Path, tmp_path: Path) -> None:
    short = {"train": STEPS | {"max_steps": 2}}
    runs = make_pack(tmp_path / "pack", folders, [short] * 3)
    (runs[2] / COMPILED_NAME).write_text('{"train.compile": true}')
    world.run(2, run_with_a_reporter_that_fails, pack=tmp_path / "pack", run_dir=runs[0])
    assert "train.compile=auto is false for this group of trials" in outcomes(tmp_path / "pack", 2)["reason"]
    assert outcomes(tmp_path / "pack", 0)["reason"] == "summary.json is damaged"
    assert outcomes(tmp_path / "pack", 1)["state"] == "complete"


def weights(runs: list[Path]) -> list[dict[str, bytes]]:
    names = ("adapter/adapter_model.safetensors", "checkpoints/step_00000004/trainer.safetensors")
    return [{name: (run_dir / name).read_bytes() for name in names} for run_dir in runs]


def test_a_pack_that_is_stopped_goes_on_bit_for_bit(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [{**sections, "train": sections["train"] | {"max_steps": 4, "global_batch": 6}} for sections in TRIALS]
    whole = make_pack(tmp_path / "whole" / "pack", folders, trials)
    trainer.run_group(tmp_path / "whole" / "pack", SINGLE)
    pack = tmp_path / "stopped" / "pack"
    runs = make_pack(pack, folders, trials)
    train_step = trainer.MultiTrialTrainer._train_step

    def ask(self: trainer.MultiTrialTrainer) -> None:
        train_step(self)
        if self._in_slots[0].trial.done == 2:
            stop_signals.request(15)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MultiTrialTrainer, "_train_step", ask)
        try:
            assert trainer.run_group(pack, SINGLE) == 75
        finally:
            stop_signals.forget()
    assert not (pack / "outcomes").exists()
    for run_dir in runs:
        assert json.loads((run_dir / "stopped.json").read_text())["checkpoint"] == "checkpoints/step_00000002"
    assert trainer.run_group(pack, SINGLE) == 0
    assert weights(runs) == weights(whole)
    for run_dir, other in zip(runs, whole, strict=True):
        assert outcome(run_dir)[0] == outcome(other)[0]


@pytest.mark.ci
def test_an_evaluation_that_fails_loses_no_step_of_the_trials_beside_it(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"train": STEPS | {"max_steps": 4, "eval_every": 2}, "optim": OPTIM}
    longer = short | {"train": short["train"] | {"eval_every": 4}}
    runs = make_pack(tmp_path / "pack", folders, [short, longer])

    evaluate = Trainer.evaluate

    def fails(self: Trainer) -> None:
        if self.trial.done:
            raise RuntimeError("no memory")
        evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", fails)
    with pytest.raises(RuntimeError, match="no memory") as raised:
        trainer.run_group(tmp_path / "pack", SINGLE)
    for run_dir in runs:
        assert [folder.name for folder in steps(run_dir / "checkpoints")] == ["step_00000002"]
    assert "(trial 1, trained beside it: the state after step 2 is saved)" in raised.value.__notes__


@pytest.mark.ci
def test_a_verdict_prunes_a_trial_and_the_next_takes_its_slot(folders: Path, tmp_path: Path) -> None:
    short = {"train": STEPS | {"max_steps": 4, "eval_every": 2}, "optim": OPTIM}
    pack = tmp_path / "pack"
    runs = make_pack(pack, folders, [short, short, short], slots=2, verdicts=True)
    for number, prune in ((0, True), (1, False), (2, False)):
        say_verdict(pack, number, 2, prune=prune)
    assert verdict_file(pack, 0, 2).exists()
    trainer.run_group(pack, SINGLE)
    assert outcomes(pack, 0) | {"seconds": 0} == {
        "state": "pruned",
        "reason": "pruned by its held-out loss after step 2",
        "step": 2,
        "seconds": 0,
    }
    assert [folder.name for folder in steps(runs[0] / "checkpoints")] == ["step_00000002"]
    assert [outcomes(pack, number)["state"] for number in (1, 2)] == ["complete", "complete"]
    assert_losses_close(outcome(runs[1])[0], outcome(runs[2])[0])
    # What was pruned can be gone on with by itself.
    training_worker.run(runs[0], SINGLE)
    assert_losses_close(outcome(runs[0])[0], outcome(runs[1])[0])


def config_of(sections: Mapping[str, Mapping[str, Any]]) -> Config:
    return config_with({"model": {"path": "m"}, "data": {"path": "d"}}, sections, run_dir="r")


REFUSED = [
    ({"adapter": {"method": "full"}, "quant": {"method": "none"}}, "adapter=full trains the base"),
    ({"adapter": {"init": "pissa"}}, "adapter.init=pissa"),
    ({"adapter": {"init_from": "folder"}}, "adapter.init_from=folder"),
    ({"adapter": {"modules_to_save": ["lm_head"]}}, "adapter.modules_to_save"),
    ({"adapter": {"trainable_token_indices": [1]}}, "adapter.trainable_token_indices"),
    ({"model": {"path": "m", "new_tokens": ["<a>"]}}, "model.new_tokens"),
    ({"train": {"objective": "dpo"}, "data": {"path": "d", "format": "preference"}}, "train.objective=dpo"),
    ({"data": {"path": "d", "images": True}}, "data.images=true"),
    ({"parallel": {"resident_blocks": "auto"}}, "parallel.resident_blocks=auto"),
    ({"train": {"neftune_alpha": 5.0}}, "train.neftune_alpha=5.0"),
    ({"train": {"sample_every": 2, "sample_prompts": ["a"]}}, "train.sample_every=2"),
]


@pytest.mark.parametrize(("sections", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_no_pack_can_train_is_refused_by_name(sections: dict, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("[", r"\[")) as caught:
        check_pack([config_of(sections)])
    assert "sweep.packed=1" in str(caught.value)


def test_settings_that_may_not_differ_are_refused_with_both_values() -> None:
    with pytest.raises(UserError, match=r"train\.micro_batch=4 beside train\.micro_batch=2"):
        check_pack([config_of({"train": {"micro_batch": 2}}), config_of({"train": {"micro_batch": 4}})])
