"""Time a save and a resume of a run on the CPU, beside PEFT's save_pretrained.

    python benchmarks/checkpoint.py [--r 16,64] [--rounds 4]        three minutes on two idle cores

Ours is a run of the real trainer on a random Llama of 76M parameters that saves in the background, on the training
thread and not at all, in turns of three steps, and a start from its last checkpoint, which must equal the saved state
bit for bit. It hashes, syncs and reads back its files; PEFT does not: for it *on the disk* is the page cache.
Sizes are compared with the 12 bytes per trained parameter that a resume needs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distlora.checkpoint.saver import Saver, checkpoint_files, choose, environment
from distlora.checkpoint.state import Identity, RunProgress, TrainState
from distlora.config import Config
from distlora.config.file import build
from distlora.parallel import Ranks, join_ranks, leave_ranks
from distlora.results.record import Table
from distlora.system.progress import say
from distlora.training.publish import restore
from measuring import (
    libraries_print_to_stderr,
    load_base,
    measurement_notes,
    number,
    numbers,
    parser_of,
    show,
    trained,
)
from support.measured import (
    Started,
    free_port,
    ignore,
    llama,
    random_rows,
    run_each,
    set_rank,
    write_random_checkpoint,
)

WAYS = (("ours", 1), ("save_pretrained", 1), ("ours", 2))
"""(way, ranks)."""
THREADS, FLOOR = 2, 12
"""Threads of all processes of a way; bytes per trained parameter that a resume needs."""
MODES, STEPS = ("none", "background", "thread"), 3
"""Steps of each mode per round. The first does not count: the previous mode's save may still be running."""
HEAD = ["", "ranks", "r", "MB", "of 12 B a parameter", "training thread, ms", "CPU ms", "on the disk, ms"]
HEAD += ["resume, ms", "goes on", "of a step", "step, CPU"]
Clock = tuple[float, float]
"""Wall-clock and CPU seconds of the training thread."""


def now() -> Clock:
    """Read both clocks."""
    return time.perf_counter(), time.thread_time()


def since(began: Clock) -> Clock:
    """Return the seconds on both clocks since a reading."""
    return tuple(after - before for after, before in zip(now(), began, strict=True))  # type: ignore[return-value]


def timed(call: Callable[[], object]) -> Clock:
    """Return the seconds of a call."""
    began = now()
    call()
    return since(began)


def median(clocks: Sequence[Clock]) -> Clock:
    """Return the median of wall-clock and of CPU seconds, each for itself."""
    wall, cpu = zip(*clocks, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def row(
    way: str, ranks: int, r: int, count: int, files: Path, save: Clock, on_disk: float, resume: Clock | None, fault: str
) -> list[str]:
    """Return a row of the table; `count`: trained parameters."""
    nbytes = sum(file.stat().st_size for file in files.rglob("*") if file.is_file())
    seconds = [*save, on_disk, *([] if resume is None else resume[:1])]
    cells = [f"{1e3 * each:,.1f}" for each in seconds] + [""] * (4 - len(seconds))
    head = [way, str(ranks), str(r), f"{nbytes / 1e6:.1f}", f"{nbytes / FLOOR / count:.3f}"]
    return [*head, *cells, f"no: {fault}" if fault else "yes"]


@dataclass(slots=True)
class Turns:
    """A save hook that saves as the current mode requires and records the times."""

    savers: dict[str, Saver]
    steps: dict[str, list[Clock]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    saves: dict[str, list[Clock]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    on_disk: dict[str, list[float]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    """Seconds from the start of a save until it is on disk."""
    _last: Clock = field(default_factory=now)

    def __call__(self, progress: RunProgress) -> None:
        """Save and record the times."""
        step, began = since(self._last), now()
        mode = MODES[(progress.step - 1) // STEPS % len(MODES)]
        if mode in self.savers:
            self.savers[mode].save(progress)
        if (progress.step - 1) % STEPS > 0:
            self.steps[mode].append(step)
            self.saves[mode].append(since(began))
        if mode in self.savers and progress.step % STEPS == 0:
            self.savers[mode].wait()
            self.on_disk[mode].append(since(began)[0])
        self._last = now()


def files_of(run: Started) -> dict[str, Any]:
    """Return the contents of a checkpoint."""
    return checkpoint_files(run.model, run.config.spec, run.optimizer, run.trained, run.backend)


def saver_of(run: Started, *, in_background: bool) -> Saver:
    """Return a saver of a run."""
    identity = Identity(base_fingerprint="", data_digest="", settings={})
    found = environment(run.ranks.world, run.ranks.device)
    return Saver(
        Path(run.config.run_dir),
        lambda: files_of(run),
        backend=run.backend,
        state_of=lambda progress: TrainState(progress=progress, identity=identity, environment=found),
        keep=2,
        in_background=in_background,
        say=ignore,  # The `wait` after a round raises the error of a failed save.
    )


def ours(folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, rounds: int) -> list[list[str]]:
    """Measure saves in both modes and a resume, whose tensors must equal the saved ones bit for bit."""
    steps = rounds * len(MODES) * STEPS
    sections: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"path": "none", "sequence_length": tokens},
        "adapter": {"r": r, "target_modules": "all-linear"},
        "quant": {"cache": False},
        "train": {"max_steps": steps, "global_batch": ranks.world, "save_every": 1},
        "tracker": {},
        "cluster": {"gpus_per_node": ranks.world},
        "run_dir": str(out),
    }
    run = Started.of(build(Config, sections), ranks)
    turns = Turns({mode: saver_of(run, in_background=mode == "background") for mode in MODES[1:]})
    rows = random_rows(steps * ranks.world, tokens, run.model.vocabulary.rows)
    run.trainer(rows, save=turns)[0].fit()
    again, began = Started.of(run.config, ranks), now()
    newest, _ = choose(out, ranks)  # Reads and hashes every byte.
    assert newest is not None
    restore(newest, again.model, again.optimizer, again.trained, again.backend)
    resume, kept = since(began), files_of(again)
    for file, content in files_of(run).items():
        for name, tensor in content.items():
            same = not isinstance(tensor, torch.Tensor) or torch.equal(tensor, kept[file][name])
            assert same, f"the resumed state differs from the saved one in {file}, {name}"
    count, without = sum(parameter.numel() for parameter in run.trained.values()), median(turns.steps["none"])
    lines = []
    for mode, way in {"background": "ours", "thread": "ours, train.save_in_background=false"}.items():
        save, on_disk = median(turns.saves[mode]), statistics.median(turns.on_disk[mode])
        slower = median(turns.steps[mode])[1] / without[1] - 1
        line = row(way, ranks.world, r, count, newest, save, on_disk, resume, "")
        lines.append([*line, f"{save[0] / without[0]:.1%}", f"{slower:+.1%}"])
    return lines


def save_pretrained(folder: Path, out: Path, *, r: int, tokens: int, rounds: int) -> list[list[str]]:
    """Measure PEFT's saves: the adapter alone, from which no run resumes."""
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    config = LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_base(folder), config)
    count = sum(each.numel() for each in trained(model))
    save = median([timed(partial(model.save_pretrained, out / str(number))) for number in range(rounds + 1)][1:])
    resume = timed(lambda: set_peft_model_state_dict(model, load_peft_weights(str(out / "0"))))
    return [[*row("PEFT save_pretrained", 1, r, count, out / "0", save, save[0], resume, "no optimizer"), "", ""]]


def rank_main(
    rank: int, world: int, port: int, way: str, folder: Path, out: Path, options: dict[str, int], results: Any
):
    """Measure one way on one rank."""
    if world > 1:
        set_rank(rank, world, port)
    torch.set_num_threads(max(1, THREADS // world))
    ranks = join_ranks()
    measured = ours(folder, out, ranks, **options) if way == "ours" else save_pretrained(folder, out, **options)
    results.put((rank, measured))
    leave_ranks(ranks)


def main() -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--r", type=numbers, default=(16,), help="adapter ranks, on every linear (16)")
    parser.add_argument("--rounds", type=number, default=4, help="rounds of three steps of each mode (%(default)s)")
    parser.add_argument("--tokens", type=number, default=64, help="tokens per sequence and step (%(default)s)")
    parser.add_argument("--layers", type=number, default=6, help="decoder layers of the model (%(default)s)")
    options = parser.parse_args()
    rows: list[list[str]] = []
    with libraries_print_to_stderr(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        settings = llama(vocabulary=4096, hidden=1024, inner=2816, layers=options.layers, heads=16, kv_heads=4)
        parameters = write_random_checkpoint(folder, settings, num_shards=1)
        for r in options.r:
            for way, world in WAYS:
                say(f"r={r}: {way}, {world} ranks")
                out, port = Path(temporary) / f"{r}-{way}-{world}", free_port()
                out.mkdir()
                kept = {"r": r, "tokens": options.tokens, "rounds": options.rounds}
                rows += run_each(rank_main, [(rank, world, port, way, folder, out, kept) for rank in range(world)])[0]
    heading = f"Adapters on every linear of a random Llama of {parameters / 1e6:.0f}M parameters; medians, on rank 0"
    notes = measurement_notes("transformers", "peft", "bitsandbytes", threads=THREADS)
    show("A save and a resume of a run", [Table(heading, HEAD, rows)], notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
