"""The terminal of rank 0 while a run goes on: a live bar, or a line every few seconds, and lines that stay between.

Shown of a step's figures, where present: `loss`, the last `eval_loss`, `lr`, `tokens_per_second`, `mfu`,
`peak_memory_bytes`, and the time left. Colour is rich's business, which respects NO_COLOR and terminals without any.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from distlora.system.numbers import size

PROGRESS_SECONDS = 3.0
STILL_LOADING_SECONDS = 10.0


class Progress:
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
def still_loading() -> Iterator[None]:
    """Print a line every STILL_LOADING_SECONDS while the block runs."""
    done = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        while not done.wait(STILL_LOADING_SECONDS):
            say(f"still loading ({time.monotonic() - began:.0f} s)")

    thread = threading.Thread(target=tell, daemon=True)
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


class Display(Protocol):
    """The terminal: a progress line that follows the steps, and lines that stay."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""

    def say(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Restore the terminal."""


def display(total_steps: int, start_step: int, label: str = "") -> Display:
    """Return a live bar if stdout is a terminal and rich is installed, else lines that begin with `label`."""
    if sys.stdout.isatty() and not label:
        try:
            return Bar(total_steps, start_step)
        except ImportError:  # rich is optional: a line every few seconds says the same.
            return Lines(total_steps, start_step, label)
    return Lines(total_steps, start_step, label)


class Pace:
    """Time left, from the steps since the first one that was logged (the first step itself pays for warm-up)."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._first: tuple[int, float] | None = None

    def left(self, step: int) -> str:
        """`  h:mm:ss left` to the last step; nothing while only one step is known."""
        now = time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = self._first or (step, now)
            return "  0:00 left" if step == self._total else ""
        seconds = (now - self._first[1]) / (step - self._first[0]) * (self._total - step)
        minutes, rest = divmod(round(seconds), 60)
        time_left = f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
        return f"  {time_left} left"


DISPENSABLE = ("lr", "peak_memory_bytes", "eval_loss", "mfu")
"""Metrics that a narrow terminal leaves out, in this order."""


def figures(metrics: Mapping[str, float], width: int | None = None) -> str:
    """`loss 3.2140  held-out 3.3012  lr 1.9e-04  12,345 tok/s  MFU 41%  memory 1.23 GB`, of what there is."""
    formats: dict[str, Callable[[float], str]] = {
        "loss": lambda value: f"loss {value:.4f}",
        "eval_loss": lambda value: f"held-out {value:.4f}",
        "lr": lambda value: f"lr {value:.1e}",
        "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
        "mfu": lambda value: f"MFU {value:.0%}",
        "peak_memory_bytes": lambda value: f"memory {size(value)}",
    }
    parts = {name: shown(metrics[name]) for name, shown in formats.items() if name in metrics}
    for name in DISPENSABLE:
        if width is not None and len("  ".join(parts.values())) > width:
            parts.pop(name, None)
    return "  ".join(parts.values())


class Lines:
    """A line for the first and the last step, and every few seconds between, for logs and pipes."""

    SECONDS = 3.0

    def __init__(self, total_steps: int, start_step: int, label: str = "") -> None:
        self._total, self._label = total_steps, label
        self._pace = Pace(total_steps)
        self._shown = -math.inf

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        left, now = self._pace.left(step), time.monotonic()
        if now - self._shown >= self.SECONDS or step == self._total:
            self._shown = now
            width = len(str(self._total))
            self.say(f"step {step:{width}}/{self._total}  {figures(metrics)}{left}")

    def say(self, text: str) -> None:
        """Print a line."""
        print(f"{self._label}{text}", flush=True)

    def close(self) -> None:
        """Restore the terminal."""


BAR_WIDTH = 8


class Bar:
    """A bar at the foot of a terminal, redrawn at most ten times a second. Raises ImportError without rich."""

    SECONDS = 0.1

    def __init__(self, total_steps: int, start_step: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._total = total_steps
        self._pace = Pace(total_steps)
        self._drawn = -math.inf
        figures = TextColumn("{task.description}", markup=False)
        bar = BarColumn(BAR_WIDTH)
        self._progress = Progress(MofNCompleteColumn(), bar, figures, auto_refresh=False)
        self._task = self._progress.add_task("", total=total_steps, completed=start_step)
        self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        left = self._pace.left(step)
        beside = 2 * len(str(self._total)) + 1 + BAR_WIDTH + 2  # The count and the bar, each with a space.
        width = self._progress.console.width - beside - len(left)
        description = f"{figures(metrics, width)}{left}"
        self._progress.update(self._task, completed=step, description=description)
        if time.monotonic() - self._drawn >= self.SECONDS or step == self._total:
            self._drawn = time.monotonic()
            self._progress.refresh()

    def say(self, text: str) -> None:
        """Print a line."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Restore the terminal."""
        self._progress.stop()
