"""The cells of a run, in turns: those of a group are alive together and train a step each, one after the other, again
and again, so that what disturbs the machine meets all of them. Imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.bench.network import loopback_bytes
from distlora.bench.step.cells import KEPT_PAGES, LEARNING_RATE, OURS, RANK, Cell
from distlora.bench.step.running import CellFailedError, Processes, Turn
from distlora.system import host_memory

PREPARE = "distlora.bench.step.rows"
TOLD_STEPS = 25
"""Of a curve, between words of how far it is."""
Environment = Callable[[Cell], Mapping[str, str]]
Say = Callable[[str], None]

JOBS: dict[str, dict[str, Any]] = {
    OURS: {"runs": "ours", "base": "nf4", "compile": False},
    "ours-compiled": {"runs": "ours", "base": "nf4", "compile": True},
    "ours-bf16": {"runs": "ours", "base": "none", "compile": False},
    "peft-documented": {"runs": "loop", "recipe": "documented"},
    "peft-bf16": {"runs": "loop", "recipe": "bf16"},
    KEPT_PAGES: {"runs": "loop", "recipe": "bf16"},
    "trainer": {"runs": "trainer"},
    "fsdp2": {"runs": "fsdp2", "recipe": "plain"},
    "fsdp2-forced": {"runs": "fsdp2", "recipe": "forced"},
}
"""What a way's process is told beside its problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What all cells of a group begin with, on disk: `rows.py` makes it."""

    made_here: str
    """What it was made with: the day, the machine, versions."""
    model: Path
    rows: Path
    adapters: Path
    """adapter_<seed> lie in it."""


@dataclass(slots=True)
class Measured:
    """What became of a cell."""

    cell: Cell
    failed: str | None = None
    ran: str = ""
    imported: int = 0
    """Anonymous memory of a process after its imports; 0 where memory is a GPU's."""
    turns: list[Turn] = field(default_factory=list)
    """Those that count, one a round."""
    losses: list[float] = field(default_factory=list)
    """Of every step from the first on."""
    peak: int = 0
    """Of all its turns, the first among them."""
    device_left: int | None = None
    """Bytes that its GPU had left when it waited for its next turn; None on a CPU."""
    moved: dict[str, int] | None = None
    loopback: int | None = None
    """Bytes that came in over the processes' own network in one step, for each of them."""

    def add(self, turn: Turn) -> None:
        self.losses += turn.losses
        self.peak = max(self.peak, turn.peak)
        if turn.device_left is not None:
            self.imported, self.device_left = 0, turn.device_left

    @property
    def over_imports(self) -> int:
        return max(0, self.peak - self.imported)

    def seconds(self) -> list[float]:
        """Of every step that counts."""
        return [second for turn in self.turns for second in turn.seconds]


def job_of(cell: Cell, problem: Problem, *, lr: float = LEARNING_RATE) -> dict[str, Any]:
    """What the processes of a cell are told."""
    return {
        "model": str(problem.model),
        "data": str(problem.rows),
        "adapter": str(problem.adapters / f"adapter_{cell.seed}"),
        "length": cell.length,
        "rows": cell.rows,
        "checkpointing": cell.checkpointing,
        "lr": lr,
        **JOBS[cell.way],
    }


def prepare(
    folder: Path,
    *,
    environment: Mapping[str, str],
    model: Path,
    settings: Mapping[str, Any] | None = None,
    length: int,
    rows: int,
    steps: int,
    seeds: Sequence[int] = (0,),
    data: tuple[Path, Path] | None = None,
) -> Problem:
    """A problem in `folder`: rows for so many steps, an adapter of each seed, and the model where it is not there yet.

    `settings`: of a random model; None where `model` is one. `data`: (a file of documents, the cache of what is
    tokenized); None for random tokens. Raises CellFailedError.
    """
    job = {
        "folder": str(folder),
        "model": str(model),
        "settings": None if settings is None or model.exists() else dict(settings),
        "vocabulary": None if settings is None else settings["vocab_size"],
        "length": length,
        "rows": rows,
        "steps": steps,
        "seeds": list(seeds),
        "r": RANK,
        "data": None if data is None else str(data[0]),
        "cache_dir": None if data is None else str(data[1]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", PREPARE, json.dumps(job)]
    finished = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    if finished.returncode != 0:
        raise CellFailedError(f"the model and its rows could not be made:\n{finished.stderr}")
    made_here = json.loads(finished.stdout)
    return Problem(made_here=made_here, model=model, rows=folder / f"rows_{length}.safetensors", adapters=folder)


def compare(
    cells: Sequence[Cell],
    problem_of: Callable[[Cell], Problem],
    *,
    rounds: int,
    steps: int,
    environment: Environment,
    log: Path,
    own_network: bool,
    say: Say,
) -> Iterator[list[Measured]]:
    """The cells of each group: `rounds` turns of `steps` steps each, after one step that does not count, and one whose
    bytes are counted where there are several processes. `own_network`: nobody else uses this process' loopback
    interface."""
    groups = [list(members) for _, members in itertools.groupby(cells, key=lambda cell: cell.group)]
    for number, group in enumerate(groups, 1):
        say(f"{group[0].problem} ({number} of {len(groups)})")
        yield _group(
            group,
            problem_of(group[0]),
            rounds=rounds,
            steps=steps,
            environment=environment,
            log=log,
            own_network=own_network,
            say=say,
        )


def _group(
    cells: Sequence[Cell],
    problem: Problem,
    *,
    rounds: int,
    steps: int,
    environment: Environment,
    log: Path,
    own_network: bool,
    say: Say,
) -> list[Measured]:
    found = [Measured(cell) for cell in cells]
    with contextlib.ExitStack() as alive:
        running: dict[int, Processes] = {}
        for number, measured in enumerate(found):
            cell = measured.cell
            with _noting(measured, say):
                _require_room(found[:number], cell)
                own = alive.enter_context(
                    Processes(job_of(cell, problem), count=cell.processes, environment=environment(cell), log=log)
                )
                measured.imported, measured.ran = own.start()
                measured.add(own.turn(1))
                if cell.processes > 1:
                    _count(own, measured, own_network=own_network)
                running[number] = own
                say(f"  {cell.title}: ready ({measured.ran}), loss {measured.losses[0]:.4f}")
        for turn in range(rounds):
            for number, own in list(running.items()):
                measured = found[number]
                with _noting(measured, say):
                    measured.turns.append(own.turn(steps))
                    measured.add(measured.turns[-1])
                if measured.failed is not None:
                    del running[number]
            if running:
                say(f"  round {turn + 1} of {rounds}: {_in_words([found[number] for number in running])}")
    return found


def _require_room(before: Sequence[Measured], cell: Cell) -> None:
    """Raises CellFailedError where this machine, or its GPU, cannot hold one more beside those that wait for turns."""
    most = max((each.peak for each in before), default=0)
    on_device = [each.device_left for each in before if each.device_left is not None]
    left, needed = (on_device[-1], most) if on_device else (host_memory.available_bytes(), cell.processes * most)
    if left is not None and left < needed:
        raise CellFailedError(
            f"this {'GPU' if on_device else 'machine'} has {left / 1e9:.1f} GB left, and a process of the cells "
            f"before it took {most / 1e9:.1f} GB (--ways compares fewer at once)"
        )


def _count(own: Processes, measured: Measured, *, own_network: bool) -> None:
    """One step whose bytes are counted."""
    before = loopback_bytes()
    turn = own.turn(1, counts=True)
    received = loopback_bytes() - before
    measured.add(turn)
    measured.moved = turn.moved
    measured.loopback = received // measured.cell.processes if own_network else None


@contextlib.contextmanager
def _noting(measured: Measured, say: Say) -> Iterator[None]:
    """A cell that fails is out, by name and with the reason; the others go on."""
    try:
        yield
    except CellFailedError as error:
        measured.failed = str(error)
        say(f"  {measured.cell.title}: {error}")


def _in_words(found: Sequence[Measured]) -> str:
    """tokens/s of their newest turns."""
    rates = (f"{m.cell.way} {m.cell.tokens * len(s) / sum(s):.0f}" for m in found if (s := m.turns[-1].seconds))
    return ", ".join(rates) + " tokens/s"


def train_alone(
    cells: Sequence[Cell], problem: Problem, *, steps: int, environment: Environment, log: Path, lr: float, say: Say
) -> list[Measured]:
    """Each cell for itself, over the same steps."""
    found = []
    for cell in cells:
        measured = Measured(cell)
        found.append(measured)
        with _noting(measured, say):
            job = job_of(cell, problem, lr=lr)
            with Processes(job, count=cell.processes, environment=environment(cell), log=log) as own:
                measured.imported, measured.ran = own.start()
                while (left := steps - len(measured.losses)) > 0:
                    measured.turns.append(own.turn(min(TOLD_STEPS, left)))
                    measured.add(measured.turns[-1])
                    done, loss = len(measured.losses), measured.losses[-1]
                    say(f"  {cell.title}, seed {cell.seed}: step {done} of {steps}, loss {loss:.4f}")
    return found
