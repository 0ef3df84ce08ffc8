"""What a worker of a command says on stderr while it works: lines now and then, signs of life."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

PROGRESS_SECONDS = 3.0
STILL_LOADING_SECONDS = 10.0


class Progress:
    """Lines on stderr: called often, it writes every few seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self.line(text)

    def line(self, text: str) -> None:
        self._last = time.monotonic()
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def still_loading() -> Iterator[None]:
    """A sign of life every few seconds."""
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
