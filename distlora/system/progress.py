"""The terminal of rank 0 while a run goes on: a live bar, or a line every few seconds, and lines that stay between.

Shown of a step's figures, where present: `loss`, what the objective adds (its reward, margin or accuracy), the last
`eval_loss`, `lr`, `tokens_per_second`, `mfu`, `peak_memory_bytes`, and the time left. Colour is rich's business, which
respects NO_COLOR and terminals without any.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from distlora.system.numbers import clock, size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

PROGRESS_SECONDS = 3.0
STILL_SECONDS = 8.0


class ProgressLines:
    """Lines on stderr: called often, it writes every few seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        """Print the text if PROGRESS_SECONDS have passed since the last line."""
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self.line(text)

    def line(self, text: str) -> None:
        """Print the text now."""
        self._last = time.monotonic()
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a line."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def still(what: str, log: Callable[[str], None] = say) -> Iterator[None]:
    """Log a line every STILL_SECONDS while the block runs, as in `still loading (16 s)`."""
    done = threading.Event()
    began = time.monotonic()

    def repeat() -> None:
        while not done.wait(STILL_SECONDS):
            log(f"still {what} ({time.monotonic() - began:.0f} s)")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def quieten() -> None:
    """No word of libraries between the answers, that the user could do nothing about."""
    # bitsandbytes asks for a package with a matrix product that we do not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    # transformers remarks on settings of generation_config.json that have no effect.
    transformers_logging.set_verbosity_error()


LINE_SECONDS, BAR_SECONDS = 3.0, 0.1
"""Seconds between two lines in a log or pipe, and between two states of a terminal's bar."""


class Display:
    """Progress of a run: a live bar at the foot of a terminal if rich is installed, else a line every few seconds."""

    def __init__(self, total_steps: int, start_step: int, label: str = "") -> None:
        """Begin; lines begin with `label`, which also means that there is no bar."""
        self._total, self._label = total_steps, label
        self._first: tuple[int, float] | None = None
        """First step that was logged, which itself pays for warm-up, and its time."""
        self._shown = -math.inf
        self._bar: Bar | None = None
        if sys.stdout.isatty() and not label:
            with contextlib.suppress(ImportError):  # Without rich, lines say the same.
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
                from rich.progress import Progress as Bar

                description = TextColumn("{task.description}", markup=False)
                self._bar = Bar(MofNCompleteColumn(), BarColumn(bar_width=8), description, auto_refresh=False)
                self._task = self._bar.add_task("", total=total_steps, completed=start_step)
                self._bar.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        if now - self._shown < (LINE_SECONDS if self._bar is None else BAR_SECONDS) and step != self._total:
            return
        self._shown = now
        # Lines of evaluations stay in a log; a bar has no other place for the last one.
        text = figures({name: value for name, value in metrics.items() if self._bar or name != "eval_loss"})
        if self._first[0] < step < self._total:
            text += f" ETA {clock((now - self._first[1]) / (step - self._first[0]) * (self._total - step))}"
        if self._bar is None:
            self.say(f"{self._place(step)} {text}")
        else:
            self._bar.update(self._task, completed=step, description=text, refresh=True)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show held-out metrics after a step, in a line that stays."""
        self.say(" ".join([self._place(step), *(f"{name} {value:.4f}" for name, value in metrics.items())]))

    def _place(self, step: int) -> str:
        return f"step {step:{len(str(self._total))}}/{self._total}"

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is None:
            print(f"{self._label}{text}", flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Restore the terminal."""
        if self._bar is not None:
            self._bar.stop()


OBJECTIVE_FORMATS: dict[str, Callable[[float], str]] = {
    "divergence": lambda value: f"divergence {value:.3f}",
    "reward": lambda value: f"reward {value:.3f}",
    "frac_reward_zero_std": lambda value: f"equal groups {value:.0%}",
    "rewards/failed": lambda value: f"failed {value:,.0f}" if value else "",
    "rewards/margins": lambda value: f"margin {value:.3f}",
    "rewards/accuracies": lambda value: f"accuracy {value:.0%}",
    "labels/accuracies": lambda value: f"accuracy {value:.0%}",
}
"""How the figures that an objective adds to the loss are shown, by name."""


def figures(metrics: Mapping[str, float]) -> str:
    """Return `loss 3.214 eval_loss 3.301 lr 1.9e-04 12,345 tok/s MFU 41% mem 1.23 GB`, without absent ones.

    Behind the loss: `reward 0.412 equal groups 25% failed 2` of sampled answers, `margin 0.310 accuracy 71%` of pairs.
    """
    formats: dict[str, Callable[[float], str]] = {
        "loss": lambda value: f"loss {value:.3f}",
        **OBJECTIVE_FORMATS,
        "eval_loss": lambda value: f"eval_loss {value:.3f}",
        "lr": lambda value: f"lr {value:.1e}",
        "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
        "mfu": lambda value: f"MFU {value:.0%}",
        "peak_memory_bytes": lambda value: f"mem {size(value)}",
    }
    return " ".join(filter(None, (shown(metrics[name]) for name, shown in formats.items() if name in metrics)))
