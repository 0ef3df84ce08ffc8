"""A GPU that is not there: device "cuda" on a CPU build of torch, with host memory and torch's CPU operators.

Importing this module loads the device (device.cpp), so it comes before torch. `install` then replaces the parts of
torch.cuda that a CPU build lacks. Afterwards torch.cuda.is_available() is true, tensors have is_cuda, an operation on
several devices raises, and memory is counted per device as CUDA's caching allocator counts it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pretend_cuda import library

MODE = os.environ.get("PRETEND_CUDA", "run")
"""run: Triton kernels are interpreted, and fresh memory is NaN. skip: they do not run, and fresh memory is zero.
shapes: as skip, and operators on large tensors give shapes only."""
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # It looks for libraries of CUDA.
library.load()

import torch  # noqa: E402

NAME, CAPABILITY, TOTAL_BYTES, DEVICES = "NVIDIA H100 80GB HBM3", (9, 0), 85_520_809_984, 8
PROPERTIES = types.SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=TOTAL_BYTES,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=52428800,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    uuid="0",
)

host_waits: Counter[str] = Counter()
"""How often the host waited for the device, by `caller`, while `recording`."""
python_operators: Counter[str] = Counter()
"""How often an operator ran that is written in Python here, while `recording`."""
is_recording = False
is_capturing = False
"""True while a CUDA graph is captured (graphs.py)."""


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Record host waits, and count operators (torch.ops.pretend_cuda.take_counts)."""
    global is_recording
    is_recording = True
    torch.ops.pretend_cuda.count(True)
    try:
        yield
    finally:
        is_recording = False
        torch.ops.pretend_cuda.count(False)


@contextlib.contextmanager
def one_operator(name: str) -> Iterator[None]:
    """Count what runs in the scope as one operator that does not wait: it stands for one of CUDA's."""
    torch.ops.pretend_cuda.count(False)
    try:
        yield
    finally:
        torch.ops.pretend_cuda.count(is_recording)
        if is_recording:
            python_operators[name] += 1


def caller() -> str:
    """Return the innermost function of the project that is running, as `package/module.py function`."""
    frame = sys._getframe(1)
    while frame is not None:
        for package in ("/distlora/", "/distlora_kernels/"):
            before, found, path = frame.f_code.co_filename.rpartition(package)
            if found and "site-packages" not in before:
                return f"{package[1:]}{path} {frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


def note_wait(operation: str) -> None:
    """Record that an operation made the host wait."""
    assert not is_capturing, f"{caller()} waits for the device in a capture: {operation}"
    if is_recording:
        host_waits[f"{caller()}: {operation}"] += 1


class Stream:
    """Stream of a device. Work on it is done at once, so it only has an identity."""

    made = 0

    def __init__(self, device: Any = None, priority: int = 0, *, is_default: bool = False, **_: Any) -> None:
        Stream.made += not is_default
        self.device, self.stream_id = device_of(device), 0 if is_default else Stream.made
        self.device_index, self.device_type, self.cuda_stream = self.device.index, 1, self.stream_id

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream), f"waits for {other!r}, which is not a stream"

    def wait_event(self, event: Event) -> None:
        event.require_recorded()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        note_wait("Stream.synchronize")

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (other.device, other.stream_id) == (self.device, self.stream_id)

    def __hash__(self) -> int:
        return hash((self.device, self.stream_id))

    def __enter__(self) -> Stream:
        self._scope = use_stream(self)
        self._scope.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._scope.__exit__(*error)


class Event:
    """Event that knows whether it was recorded."""

    def __init__(self, **_: Any) -> None:
        self.is_recorded = False

    def require_recorded(self) -> None:
        assert self.is_recorded, "waits for an event that was never recorded"

    def record(self, on: Stream | None = None) -> None:
        self.is_recorded = True

    def wait(self, on: Stream | None = None) -> None:
        self.require_recorded()

    def synchronize(self) -> None:
        self.require_recorded()
        note_wait("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1.0


def device_of(device: Any) -> torch.device:
    """Return a device with an index; None and "cuda" are the current one."""
    current = torch.device("cuda", torch.ops.pretend_cuda.get_device())
    if device is None:
        return current
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    assert found.type == "cuda", f"Expected a cuda device, but got: {found}"
    return current if found.index is None else found


@functools.cache
def default_stream(index: int) -> Stream:
    return Stream(index, is_default=True)


_current_streams: dict[int, Stream] = {}


def current_stream(device: Any = None) -> Stream:
    index = device_of(device).index
    return _current_streams.get(index) or default_stream(index)


def set_stream(stream: Stream) -> None:
    _current_streams[stream.device_index] = stream
    torch.ops.pretend_cuda.set_stream(stream.device_index, stream.stream_id)


@contextlib.contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """Make a stream and its device current, as torch.cuda.stream does."""
    if stream is None:
        yield
        return
    before = current_stream(stream.device)
    with DeviceContext(stream.device):
        set_stream(stream)
        try:
            yield
        finally:
            set_stream(before)


class DeviceContext:
    """Make a device current within a scope, as torch.cuda.device does."""

    def __init__(self, device: Any) -> None:
        is_none = device is None or (isinstance(device, int) and device < 0)
        self.index = None if is_none else device_of(device).index

    def __enter__(self) -> None:
        self.before = torch.ops.pretend_cuda.get_device()
        if self.index is not None:
            torch.ops.pretend_cuda.set_device(self.index)

    def __exit__(self, *error: Any) -> None:
        torch.ops.pretend_cuda.set_device(self.before)


class DeviceOf(DeviceContext):
    """Make a tensor's device current within a scope, as torch.cuda.device_of does."""

    def __init__(self, tensor: Any) -> None:
        super().__init__(tensor.device if tensor.is_cuda else None)


def set_device(device: Any) -> None:
    if not isinstance(device, int) and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
    torch.ops.pretend_cuda.set_device(device_of(device).index)


def exchange_device(index: int) -> int:
    before: int = torch.ops.pretend_cuda.get_device()
    torch.ops.pretend_cuda.set_device(index)
    return before


def live_bytes(device: Any = None) -> int:
    live: int = torch.ops.pretend_cuda.memory(device_of(device).index)[0]
    return live


def peak_bytes(device: Any = None) -> int:
    peak: int = torch.ops.pretend_cuda.memory(device_of(device).index)[1]
    return peak


def _replacements() -> dict[str, Any]:
    """Return functions and classes of torch.cuda by name."""
    generator = torch.default_generator
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: torch.ops.pretend_cuda.get_device(),
        "set_device": set_device,
        "device": DeviceContext,
        "device_of": DeviceOf,
        "_DeviceGuard": DeviceContext,
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": exchange_device,
        "Stream": Stream,
        "Event": Event,
        "StreamContext": use_stream,
        "stream": use_stream,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": lambda device=None: default_stream(device_of(device).index),
        "synchronize": lambda device=None: note_wait("torch.cuda.synchronize"),
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: PROPERTIES,
        "mem_get_info": lambda device=None: (TOTAL_BYTES - live_bytes(device), TOTAL_BYTES),
        "memory_allocated": live_bytes,
        "max_memory_allocated": peak_bytes,
        "memory_reserved": peak_bytes,
        "max_memory_reserved": peak_bytes,
        "reset_peak_memory_stats": lambda device=None: torch.ops.pretend_cuda.reset_peak(device_of(device).index),
        "empty_cache": lambda: None,
        "memory_stats": lambda device=None: {"num_alloc_retries": 0, "allocated_bytes.all.peak": peak_bytes(device)},
        "host_memory_stats": lambda: {"num_host_alloc": 0},
        "is_bf16_supported": lambda including_emulation=True: True,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": generator.set_state(state),
        "_sleep": lambda cycles: None,
        "ipc_collect": lambda: None,
    }


def install() -> None:
    """Put the device in place, with its attention and the checks of Triton launches. Call it once."""
    from pretend_cuda import flash_attention, graphs, launches

    for name, value in _replacements().items():
        for module in (torch.cuda, torch.cuda.streams, torch.cuda.random, torch.cuda.memory):
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    torch.version.cuda = torch.version.cuda or "13.0"
    torch._C._cuda_getDeviceCount = lambda: DEVICES
    torch._C._cuda_getCurrentRawStream = lambda device: current_stream(device).stream_id
    torch.backends.cuda.is_flash_attention_available = lambda: True
    torch.backends.cuda.is_built = lambda: True
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0
    torch.library.impl("pretend_cuda::host_waits", "CompositeExplicitAutograd", note_wait)
    _replace_methods()
    flash_attention.install()
    launches.install()
    graphs.install()


def _replace_methods() -> None:
    """Replace methods whose code for CUDA a CPU build lacks."""
    resize_of_torch = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return resize_of_torch(storage, size)
        holder = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        torch.ops.pretend_cuda.resize_storage(holder, int(size))
        return storage

    def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
        assert stream.device == tensor.device, f"{tensor.device}, on a stream of {stream.device}"

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
    torch.Tensor.record_stream = record_stream  # type: ignore[assignment,method-assign]
