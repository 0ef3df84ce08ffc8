"""Measure a save and a resume of a run, ours beside PEFT's, Trainer's and accelerate's, each in its own processes.

Ours is a run of the real trainer that saves after every step, and a start from its last checkpoint. Rounds of steps
take turns: no save, a save in the background, a save on the training thread. The cost of a save on that thread is given
in wall-clock and in CPU seconds of the thread, which other work on the machine changes little.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distlora.bench.host import free_port, libraries_print_to_stderr, measurement_notes, run_each, set_rank
from distlora.bench.random_inputs import random_rows, write_random_checkpoint
from distlora.bench.requests import CheckpointBench
from distlora.bench.trial import Started, ignore
from distlora.checkpoint.saver import Saver, choose, environment
from distlora.checkpoint.state import Identity, Progress, TrainState
from distlora.config import Config
from distlora.config.file import build
from distlora.data.rows import PackedRows
from distlora.output.results import Results, Table, draw_bars
from distlora.parallel import Ranks, join_ranks, leave_ranks
from distlora.run_folder.layout import TRAINER_NAME
from distlora.system.exit_codes import DONE
from distlora.system.progress import say
from distlora.training.publish import restore, trainer_tensors, weight_files
from distlora.training.reporter import Reporter
from distlora.training.trial import Hooks

MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
"""config.json of the random Llama."""
WAYS = {
    ("ours", 1): "ours",
    ("save_pretrained", 1): "PEFT save_pretrained",
    ("trainer", 1): "transformers Trainer",
    ("ours", 2): "ours on 2 ranks",
    ("accelerate", 2): "accelerate on 2 ranks, as it runs on a CPU",
    ("fsdp2", 2): "accelerate on 2 ranks, FSDP2 forced",
}
"""(way, ranks) and its title."""
THREADS = 2
"""Threads of all processes of a way."""
FLOOR = 12
"""Bytes per trained parameter that a resume needs: the parameter and two optimizer states in fp32."""
MODES = ("none", "background", "thread")
STEPS = 3
"""Steps of each mode per round. The first does not count: the previous mode's save may still be running."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall-clock and CPU seconds of the training thread."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Clock:
        """Read both clocks."""
        return cls(time.perf_counter(), time.thread_time())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Medians over the saves of one way, on rank 0."""

    way: str
    ranks: int
    r: int
    trained: int
    """Number of trained parameters."""
    nbytes: int
    """Bytes of its files."""
    save: Clock
    """Time of a save on the training thread."""
    on_disk: float
    """Seconds until the save is on disk; for peers, until it is in the page cache."""
    resume: Clock | None
    """Time from the files into an existing model; None if they cannot be read."""
    step: Clock | None = None
    """Time of a step without a save; ours only."""
    slower: float | None = None
    """Fraction of a step's CPU seconds that saves add; ours only."""
    fault: str | None = None
    """Reason why no run can resume from it."""

    @property
    def over_floor(self) -> float:
        """Bytes over those that a resume needs."""
        return self.nbytes / (FLOOR * self.trained)

    def flat(self) -> dict[str, Any]:
        """Return the figures in bytes and seconds."""
        return {
            "way": self.way,
            "ranks": self.ranks,
            "r": self.r,
            "trained_parameters": self.trained,
            "bytes": self.nbytes,
            "save_seconds": self.save.seconds,
            "save_cpu_seconds": self.save.cpu_seconds,
            "on_disk_seconds": self.on_disk,
            "resume_seconds": None if self.resume is None else self.resume.seconds,
            "resume_cpu_seconds": None if self.resume is None else self.resume.cpu_seconds,
            "step_seconds": None if self.step is None else self.step.seconds,
            "fault": self.fault,
        }


def median(clocks: Sequence[Clock]) -> Clock:
    """Return the median of wall-clock and of CPU seconds, each for itself."""
    wall, cpu = (statistics.median(getattr(clock, name) for clock in clocks) for name in ("seconds", "cpu_seconds"))
    return Clock(wall, cpu)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@dataclass(slots=True)
class Turns:
    """A save hook that saves as the current mode requires and records the times."""

    savers: dict[str, Saver]
    steps: dict[str, list[Clock]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Times of the steps of each mode."""
    saves: dict[str, list[Clock]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Times of the saves after them, on the training thread."""
    on_disk: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Seconds from the start of a save until it is on disk, by mode."""
    _last: Clock = field(default_factory=Clock.now)

    def __call__(self, progress: Progress) -> None:
        """Save as the current mode requires and record the times."""
        now = Clock.now()
        mode = MODES[(progress.step - 1) // STEPS % len(MODES)]
        if mode in self.savers:
            self.savers[mode].save(progress)
        end = Clock.now()
        if (progress.step - 1) % STEPS > 0:
            self.steps[mode].append(now - self._last)
            self.saves[mode].append(end - now)
        if mode in self.savers and progress.step % STEPS == 0:
            self.savers[mode].wait()
            self.on_disk[mode].append((Clock.now() - now).seconds)
        self._last = Clock.now()


class Run(Started):
    """A run that saves after every step."""

    __slots__ = ("turns",)

    turns: Turns

    def files(self) -> dict[str, Any]:
        """Return the contents of a checkpoint."""
        trainer = trainer_tensors(self.optimizer, self.trained, self.backend)
        return {**weight_files(self.model, self.config.spec), TRAINER_NAME: trainer}

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
            Path(self.config.run_dir),
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
        quiet = Reporter(
            Path(self.config.run_dir), self.config, rank=1, world=2, total_steps=steps, progress=Progress()
        )
        hooks = Hooks(save=self.turns, save_last=self.turns, publish_best=ignore)
        trainer, _ = self.trainer(rows, reporter=quiet, hooks=hooks)
        trainer.fit()


def measure_ours(folder: Path, run_dir: Path, ranks: Ranks, *, r: int, tokens: int, rounds: int) -> list[Saved]:
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
        "tracker": {},
        "cluster": {"gpus_per_node": ranks.world},
        "run_dir": str(run_dir),
    }
    run = Run.of(build(Config, sections), ranks)
    run.fit(random_rows(steps * ranks.world, tokens, run.model.vocabulary.rows))
    again, resume = Run.of(run.config, ranks), Clock.now()
    newest, _ = choose(run_dir, ranks)  # Reads and hashes every byte.
    assert newest is not None
    restore(newest, again.model, again.optimizer, again.trained, again.backend)
    resume = Clock.now() - resume
    kept, turns = again.tensors(), run.turns
    assert all(torch.equal(tensor, kept[name]) for name, tensor in run.tensors().items()), (
        "the resumed state differs from the saved one"
    )
    without = median(turns.steps["none"])
    return [
        Saved(
            way=name,
            ranks=ranks.world,
            r=r,
            trained=sum(parameter.numel() for parameter in run.trained.values()),
            nbytes=folder_bytes(newest),
            save=median(turns.saves[mode]),
            on_disk=statistics.median(turns.on_disk[mode]),
            resume=resume,
            step=without,
            slower=median(turns.steps[mode]).cpu_seconds / without.cpu_seconds - 1,
        )
        for mode, name in {"background": "ours", "thread": "ours, train.save_in_background=false"}.items()
    ]


def rank_main(
    rank: int, world: int, port: int, way: str, folder: Path, out: Path, r: int, request: CheckpointBench, results: Any
) -> None:
    """Measure one way on one rank."""
    if world > 1:
        set_rank(rank, world, port)
    torch.set_num_threads(max(1, THREADS // world))
    ranks = join_ranks()
    if way == "ours":
        rows = measure_ours(folder, out, ranks, r=r, tokens=request.tokens, rounds=request.rounds)
    else:
        from distlora.bench import checkpoint_peers

        rows = checkpoint_peers.measure(way, folder, out, ranks, r=r, tokens=request.tokens, saves=request.rounds + 1)
    results.put((rank, rows))
    leave_ranks(ranks)


def measure(request: CheckpointBench) -> tuple[list[Saved], int]:
    """Return the figures of every way for each adapter rank, and the model's number of parameters."""
    rows: list[Saved] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = write_random_checkpoint(folder, MODEL | {"num_hidden_layers": request.layers}, num_shards=1)
        for r in request.r:
            for number, ((way, world), name) in enumerate(WAYS.items()):
                say(f"r={r}: {name}")
                out = Path(temporary) / f"r{r}-{number}"
                out.mkdir()
                port = free_port()
                arguments = [(rank, world, port, way, folder, out, r, request) for rank in range(world)]
                rows += run_each(rank_main, arguments)[0]
    return rows, parameters


def results(rows: Sequence[Saved], parameters: int) -> Results:
    """Return the table; `parameters` counts the model's."""
    head = ["", "ranks", "r", "MB", f"of {FLOOR} B a parameter", "training thread, ms", "CPU ms", "on the disk, ms"]
    lines = [[*head, "resume, ms", "CPU ms", "goes on"]]
    for row in rows:
        seconds = [row.save.seconds, row.save.cpu_seconds, row.on_disk]
        seconds += [] if row.resume is None else [row.resume.seconds, row.resume.cpu_seconds]
        cells = [row.way, str(row.ranks), str(row.r), f"{row.nbytes / 1e6:.1f}", f"{row.over_floor:.2f}"]
        cells += [f"{1e3 * each:,.1f}" for each in seconds] + [""] * (5 - len(seconds))
        lines.append([*cells, "yes" if row.fault is None else f"no: {row.fault.partition(':')[0]}"])
    names = {f"{row.way}, {row.ranks}, r={row.r}": row for row in rows}
    panels = [
        ("MB", {name: row.nbytes / 1e6 for name, row in names.items()}),
        ("ms of the training thread a save", {name: 1e3 * row.save.seconds for name, row in names.items()}),
        ("ms of a resume", {name: 1e3 * row.resume.seconds for name, row in names.items() if row.resume is not None}),
    ]
    heading = f"Adapters on every linear of a random Llama of {parameters / 1e6:.0f}M parameters; medians, on rank 0"
    return Results(
        name="checkpoint",
        heading="A save and a resume of a run",
        notes=measurement_notes("transformers", "peft", "accelerate", "bitsandbytes", threads=THREADS),
        tables=[Table(heading, lines)],
        rows=[row.flat() for row in rows],
        reading=list(reading(rows)),
        draw=lambda path: draw_bars("A save and a resume", panels, path),
    )


def reading(rows: Sequence[Saved]) -> Iterator[str]:
    """Yield a sentence for each of ours and each peer beside it."""
    for saved in (row for row in rows if row.way == "ours"):
        assert saved.step is not None
        share = saved.save.seconds / saved.step.seconds
        yield (
            f"Ours on {saved.ranks} rank{'s' if saved.ranks > 1 else ''}, r={saved.r}: a save takes {share:.1%} of a "
            f"step of {saved.step.seconds:.2f} s on the training thread and {saved.over_floor:.3f} of the bytes that a "
            f"resume needs; saving in the background adds {saved.slower:+.1%} to the CPU seconds of a step."
        )
        for peer in rows:
            if peer.r == saved.r and peer.ranks == saved.ranks and not peer.way.startswith("ours"):
                times = (getattr(peer.save, name) / getattr(saved.save, name) for name in ("seconds", "cpu_seconds"))
                yield (
                    f"{peer.way}, {peer.ranks}, r={peer.r}: {' and '.join(f'{each:.1f}' for each in times)} times ours "
                    f"on the training thread (wall-clock, CPU); {peer.nbytes / saved.nbytes:.2f} times the bytes."
                )
    yield from (f"{row.way}, {row.ranks}, r={row.r}: {row.fault}" for row in rows if row.fault is not None)
    yield (
        "Ours hashes every file, syncs it to disk and reads it back before older checkpoints are removed, off the "
        "training thread; a resume hashes it again. The peers do neither. The resumed state of ours equals the saved "
        "one bit for bit."
    )


def main(request: CheckpointBench) -> int:
    """Run the worker: measure as the request says, and print."""
    with libraries_print_to_stderr():
        report = results(*measure(request))
    report.show(out=None if request.out is None else Path(request.out), as_json=request.json)
    return DONE
