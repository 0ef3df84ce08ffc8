"""Peak anonymous memory of this process over a stretch of work: what counts against a job's limit and cannot be
dropped.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

_PERIOD_SECONDS = 0.002


def anonymous_bytes(process: int | str = "self") -> int:
    """RssAnon of this process, or of the one with that id (Linux)."""
    with open(f"/proc/{process}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no RssAnon; this measurement needs Linux 4.5 or newer")


class PeakMemory:
    """`with PeakMemory() as memory: ...`; then `memory.peak` is the most bytes over those at its start."""

    def __enter__(self) -> PeakMemory:
        self.start = anonymous_bytes()
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes() - self.start)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, anonymous_bytes() - self.start)
            time.sleep(_PERIOD_SECONDS)
