"""Read the memory of another process of the same user on this node, without its help (Linux)."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

_PR_SET_PTRACER = 0x59616D61
"""prctl's option: which process, with its descendants, may read this one where Yama restricts it (Ubuntu does)."""


class _Place(ctypes.Structure):
    """C's `struct iovec`."""

    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


@functools.cache
def _read_function() -> Callable[..., int] | None:
    """Return C's process_vm_readv, after allowing this process' siblings to read it too; None where there is none."""
    library = ctypes.CDLL(None)
    function: Any = getattr(library, "process_vm_readv", None)
    if function is not None:
        function.restype, count = ctypes.c_ssize_t, ctypes.c_ulong
        function.argtypes = (ctypes.c_int, ctypes.c_void_p, count, ctypes.c_void_p, count, count)
        library.prctl(_PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), *[ctypes.c_ulong(0)] * 3)
    return function


def allow_reads() -> bool:
    """Let the other children of this process' parent read its memory. Returns False where the system has no reads."""
    return _read_function() is not None


def read(process: int, places: Sequence[tuple[int, int]], to: int) -> bool:
    """Copy `places` (address, bytes) of a process' memory to the address `to`, one after the other.

    Returns False if the system does not allow it, or not all of it could be read. What has been copied by then stays.
    """
    function = _read_function()
    if function is None:
        return False
    remote = (_Place * len(places))(*(_Place(*place) for place in places))
    total = sum(nbytes for _, nbytes in places)
    here = _Place(to, total)
    return function(process, ctypes.byref(here), 1, remote, len(places), 0) == total
