"""Measure our saves: a run of the real trainer that saves after every step, and a start from its last checkpoint.

Rounds of steps take turns: no save, a save in the background, a save on the training thread. The cost of a save on that
thread is given in wall-clock and in CPU seconds of the thread, which other work on the machine changes little.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distlora.bench.checkpoint.saved import Clock, Saved, folder_bytes, median
from distlora.bench.random_inputs import random_rows
from distlora.bench.trial import Started, ignore
from distlora.checkpoint.resume import choose, environment
from distlora.checkpoint.saver import Saver
from distlora.checkpoint.state import Identity, Progress, TrainState
from distlora.config import Config
from distlora.config.file import build
from distlora.data.rows import PackedRows
from distlora.parallel import Ranks
from distlora.run_folder.checkpoint_manifest import TRAINER_NAME
from distlora.training.publish import restore, trainer_tensors, weight_files
from distlora.training.reporter import Reporter
from distlora.training.trial import Hooks

MODES = ("none", "background", "thread")
STEPS = 3
"""Steps of each mode per round. The first does not count: the previous mode's save may still be running."""


@dataclass(slots=True)
class Turn:
    """Time of one step and of the save after it, on the training thread."""

    mode: str
    step: Clock
    save: Clock


@dataclass(slots=True)
class Turns:
    """A save hook that saves as the current mode requires and records the times."""

    savers: dict[str, Saver]
    turns: list[Turn] = field(default_factory=list)
    on_disk: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Seconds from the start of a save until it is on disk, by mode."""
    _last: Clock = field(default_factory=Clock.now)

    def __call__(self, progress: Progress) -> None:
        """Save as the current mode requires and record the times."""
        now = Clock.now()
        mode = mode_of(progress.step)
        if mode in self.savers:
            self.savers[mode].save(progress)
        end = Clock.now()
        if (progress.step - 1) % STEPS > 0:
            self.turns.append(Turn(mode, now - self._last, end - now))
        if mode in self.savers and progress.step % STEPS == 0:
            self.savers[mode].wait()
            self.on_disk[mode].append((Clock.now() - now).seconds)
        self._last = Clock.now()

    def of(self, mode: str, name: str) -> Clock:
        """Return the median `step` or `save` of a mode."""
        return median([getattr(turn, name) for turn in self.turns if turn.mode == mode])


def mode_of(step: int) -> str:
    """Return the mode of a step."""
    return MODES[(step - 1) // STEPS % len(MODES)]


def measure(folder: Path, run_dir: Path, ranks: Ranks, *, r: int, tokens: int, rounds: int) -> list[Saved]:
    """Train adapters of rank r on every linear of the model in `folder` and measure saves in both modes and a resume.

    Checks that the resumed tensors equal the saved ones bit for bit.
    """
    steps = rounds * len(MODES) * STEPS
    sections: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"path": "none", "sequence_length": tokens},
        "adapter": {"r": r, "target_modules": "all-linear"},
        "quant": {"cache": False},
        "train": {"max_steps": steps, "global_batch": ranks.world, "save_every": 1},
        "tracker": {"name": "none"},
        "cluster": {"gpus_per_node": ranks.world},
        "run_dir": str(run_dir),
    }
    run = Run.of(build(Config, sections), ranks)
    run.fit(random_rows(steps * ranks.world, tokens, run.model.head.weight.shape[0]))
    newest, _ = choose(run_dir, ranks)
    assert newest is not None
    again, resume = Run.of(run.config, ranks), Clock.now()
    chosen, _ = choose(run_dir, ranks)  # Reads and hashes every byte.
    assert chosen == newest
    restore(newest, again.model, again.optimizer, again.trained, again.backend)
    resume = Clock.now() - resume
    kept = again.tensors()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in run.tensors().items()), (
        "the resumed state differs from the saved one"
    )
    return [
        Saved(
            way=name,
            ranks=ranks.world,
            r=r,
            trained=sum(parameter.numel() for parameter in run.trained.values()),
            nbytes=folder_bytes(newest),
            save=run.turns.of(mode, "save"),
            on_disk=statistics.median(run.turns.on_disk[mode]),
            resume=resume,
            step=run.turns.of("none", "step"),
            slower=run.turns.of(mode, "step").cpu_seconds / run.turns.of("none", "step").cpu_seconds - 1,
        )
        for mode, name in {"background": "ours", "thread": "ours, train.save_in_background=false"}.items()
    ]


class Run(Started):
    """A run that saves after every step."""

    __slots__ = ("turns",)

    turns: Turns

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.config.run_dir)

    def files(self) -> dict[str, Any]:
        """Return the contents of a checkpoint."""
        return {
            **weight_files(self.model, self.config.spec),
            TRAINER_NAME: trainer_tensors(self.optimizer, self.trained, self.backend),
        }

    def tensors(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return copies of all tensors of a checkpoint, by (file, name)."""
        return {
            (file, name): tensor.clone()
            for file, content in self.files().items()
            for name, tensor in content.items()
            if isinstance(tensor, torch.Tensor)
        }

    def saver(self, *, in_background: bool) -> Saver:
        """Return a saver of this run."""
        return Saver(
            self.run_dir,
            self.files,
            backend=self.backend,
            state_of=lambda progress: TrainState(
                progress=progress,
                identity=Identity(base_fingerprint="", data_digest="", settings={}),
                environment=environment(self.ranks.world, self.ranks.device),
            ),
            keep=2,
            in_background=in_background,
            say=ignore,  # The `wait` after a round raises the error of a failed save.
        )

    def fit(self, rows: PackedRows) -> None:
        """Train to the end; `turns` then has the times."""
        self.turns = Turns({"background": self.saver(in_background=True), "thread": self.saver(in_background=False)})
        steps = self.config.train.max_steps
        assert steps is not None
        # Only rank 0 writes, so this reporter is silent.
        quiet = Reporter(self.run_dir, self.config, rank=1, world=2, total_steps=steps, start_step=0)
        hooks = Hooks(save=self.turns, save_last=self.turns, publish_best=ignore)
        trainer, _ = self.trainer(rows, reporter=quiet, hooks=hooks)
        trainer.fit()
