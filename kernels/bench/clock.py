"""Times and peak memory on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from distlora_kernels import scratch

_FLUSH_BYTES = 2**28
"""More than any L2 holds."""
_FLUSHES = 3
"""They also give the host a head start of about 0.3 ms: the launches of short sequences are queued when the first one
begins, so that the GPU's time is seen. Sequences of many small operations show the host's time, as training does."""
_WARM_UPS = 3
_SECONDS_EACH = 0.3
_FEWEST, _MOST = 5, 50


def median_seconds(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median time of each on the GPU, by CUDA events, with a cold L2; no CUDA graphs.

    The candidates take turns, so that a clock that falls as the card warms up falls for all of them.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    for run in runs.values():
        for _ in range(_WARM_UPS):
            run()
    slowest = max(_timed(run, flush) for run in runs.values())
    rounds = min(max(int(_SECONDS_EACH / slowest), _FEWEST), _MOST)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_timed(run, flush))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(run: Callable[[], object], flush: torch.Tensor) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(_FLUSHES):
        flush.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that one run takes beyond what is held before it: its outputs, all temporaries, and our scratch,
    which is given back first so that it counts.
    """
    scratch.reserve(device, largest=0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del outputs
    return peak
