"""What saving at every step costs the thread that trains, by the bytes that are saved.

    python -m distlora.bench.save [--ranks 16,64,128] [--tokens 256] [--threads 1] [--rounds 4]        (make bench-save)

One process trains a random Llama on the CPU with the run's own trainer. Rounds of steps take turns: none is saved, each
is saved in the background, each is saved on the training thread. The cost is what `save` takes of that thread, by the
wall clock and by the thread's CPU seconds, which other work on the machine hardly changes; medians over all steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distlora import train
from distlora.bench.checkpoints import write_random_checkpoint
from distlora.checkpoints.environment import environment
from distlora.checkpoints.folder import TRAINER_NAME
from distlora.checkpoints.saver import Saver
from distlora.checkpoints.state import Identity, Progress, TrainState
from distlora.config import Config
from distlora.config.file import build
from distlora.data.loader import PackedRows, StepLoader
from distlora.data.rows import STARTS, TRAINED
from distlora.parallel import Ranks
from distlora.parallel.control import Control
from distlora.reporting.reporter import Reporter
from distlora.results import trainer_tensors, weight_files
from distlora.startup import start_model
from distlora.training.optim import build_optimizer
from distlora.training.trainer import Trainer
from distlora.training.trial import Hooks, Trial

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
MODES = ("none", "background", "thread")
STEPS = 3
"""Of each mode in a round. The first of them does not count: a save of the mode before may still be under way."""


@dataclass(slots=True)
class Turn:
    """One step and the save after it, as the training thread saw them, in seconds."""

    mode: str
    step: float
    step_cpu: float
    save: float
    save_cpu: float


@dataclass(slots=True)
class Turns:
    """What is called after each step: saves it as the step's turn says, and notes the times."""

    savers: dict[str, Saver]
    found: list[Turn] = field(default_factory=list)
    _last: tuple[float, float] = (0.0, 0.0)

    def __call__(self, progress: Progress) -> None:
        now = _now()
        mode = mode_of(progress.step)
        if mode in self.savers:
            self.savers[mode].save(progress)
        end = _now()
        if (progress.step - 1) % STEPS > 0:
            of_step, of_save = ([b - a for a, b in zip(*pair, strict=True)] for pair in ((self._last, now), (now, end)))
            self.found.append(Turn(mode, *of_step, *of_save))
        if mode in self.savers and progress.step % STEPS == 0:
            self.savers[mode].wait()
        self._last = _now()

    def median(self, mode: str, name: str) -> float:
        return statistics.median(getattr(turn, name) for turn in self.found if turn.mode == mode)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def mode_of(step: int) -> str:
    return MODES[(step - 1) // STEPS % len(MODES)]


def random_rows(count: int, length: int) -> PackedRows:
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (count, length), dtype=np.int32)
    flags = np.full((count, length), TRAINED, np.uint8)
    flags[:, 0] |= STARTS
    flags[:, -1] &= ~np.uint8(TRAINED)
    targets = np.full(count, length - 1, np.int32)
    return PackedRows(tokens, flags, targets, np.zeros(count, np.int32), 0, {})


def measure(model_dir: Path, run_dir: Path, rank: int, tokens: int, rounds: int) -> tuple[int, int, Turns]:
    """(bytes of the tensors saved, their number, the turns) of a run with adapters of this rank on every linear."""
    steps = rounds * len(MODES) * STEPS
    sections = {
        "model": {"path": str(model_dir)},
        "data": {"path": "none", "sequence_length": tokens},
        "adapter": {"r": rank, "target_modules": "all-linear"},
        "quant": {"cache": False},
        "train": {"max_steps": steps, "global_batch": 1, "save_every": 1},
        "tracker": {"name": "none"},
        "run_dir": str(run_dir),
    }
    config = build(Config, sections)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    model, backend, _ = start_model(config, ranks)
    trained = train.trained_parameters(model)
    gradients = backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    optimizer = build_optimizer(backend.updated(trained), config.optim)

    def files() -> dict[str, Any]:
        return {**weight_files(model, config), TRAINER_NAME: trainer_tensors(optimizer, trained, backend)}

    def saver(*, in_background: bool) -> Saver:
        return Saver(
            run_dir,
            files,
            backend=backend,
            state_of=lambda progress: TrainState(
                progress=progress,
                identity=Identity(base_fingerprint="", data_digest="", settings={}),
                environment=environment(ranks.world, ranks.device),
            ),
            keep=2,
            in_background=in_background,
            say=lambda line: None,  # A save that failed is raised by the `wait` after a round.
        )

    turns = Turns({"background": saver(in_background=True), "thread": saver(in_background=False)})
    rows = random_rows(steps, tokens)
    quiet = Reporter(run_dir, config, rank=1, world=2, total_steps=steps, start_step=0)  # Only rank 0 writes.
    trial = Trial(
        model,
        backend,
        optimizer,
        gradients,
        loader=StepLoader(rows, global_batch=1, micro_batch=1, rank=0, world=1, seed=0, shuffle=False),
        eval_loader=None,
        progress=Progress(),
        total_steps=steps,
        reporter=quiet,
        config=config,
        hooks=Hooks(save=turns, save_last=turns, publish_best=lambda progress: None),
    )
    Trainer(model, backend, Control(ranks, save_minutes=None), [trial]).fit()
    saved = [tensor for content in files().values() for tensor in content.values() if isinstance(tensor, torch.Tensor)]
    return sum(tensor.nbytes for tensor in saved), len(saved), turns


def report(options: argparse.Namespace, say: Callable[[str], None]) -> Iterator[str]:
    yield (
        "| adapter | saved, tensors | a step, s | save in background: ms, CPU ms | of a step | the step meanwhile, "
        "CPU | on the training thread: ms, CPU ms | of a step |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as temporary:
        parameters = write_random_checkpoint(Path(temporary) / "model", MODEL, num_shards=1)
        say(f"{parameters / 1e6:.0f}M parameters, {options.tokens} tokens a step, {options.threads} threads")
        for rank in options.ranks:
            run_dir = Path(temporary) / f"r{rank}"
            run_dir.mkdir()
            size, count, turns = measure(Path(temporary) / "model", run_dir, rank, options.tokens, options.rounds)
            step, step_cpu = turns.median("none", "step"), turns.median("none", "step_cpu")
            cells = [f"r={rank}", f"{size / 1e6:.1f} MB, {count}", f"{step:.2f}"]
            for mode in ("background", "thread"):
                save, cpu = turns.median(mode, "save"), turns.median(mode, "save_cpu")
                cells += [f"{save * 1e3:.1f}, {cpu * 1e3:.1f}", f"{save / step:.1%}"]
                if mode == "background":
                    cells.append(f"{turns.median(mode, 'step_cpu') / step_cpu - 1:+.1%}")
            yield f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=lambda text: [int(rank) for rank in text.split(",")], default=[16, 64, 128])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for line in report(options, lambda text: print(text + "\n", flush=True)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
