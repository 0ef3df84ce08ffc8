"""Check and record each launch of a Triton kernel, and run it in Triton's interpreter on the device's memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.runtime import interpreter

from pretend_cuda import device
from support import triton_interpreter  # noqa: F401  (it mends faults of the interpreter)

LIMITS = (2**31 - 1, 65535, 65535)
"""Most programs of a grid per dimension."""


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: str
    place: str
    """The function of the project that launched it."""
    is_empty: bool
    """True if the grid has no program."""
    variant: str
    """What selects the compiled code: constants, absent arguments, types of the pointers, warps and stages."""


recorded: list[Launch] = []
"""Launches while device.recording()."""
on_launch: Callable[..., None] | None = None
"""Called with what runs a launch, its arguments and options, while a graph is captured."""


def check_devices(arguments: dict[str, Any], where: str) -> None:
    """Assert that there are tensors, all on the current device."""
    devices = {value.device for value in arguments.values() if isinstance(value, torch.Tensor)}
    now = torch.device("cuda", torch.ops.pretend_cuda.get_device())
    assert devices == {now}, (
        f"{where}: launched on {now}, with tensors on {', '.join(map(str, devices)) or 'no device'}"
    )


def grid_of(grid: Any, arguments: dict[str, Any], where: str) -> tuple[int, ...]:
    """Return a launch's grid, and assert that it is within CUDA's limits."""
    sizes = tuple(grid(arguments) if callable(grid) else grid)
    for size, limit in zip(sizes, LIMITS, strict=False):
        assert 0 <= size <= limit, f"{where}: grid {sizes}"
    return sizes


def variant_of(executor: Any, arguments: dict[str, Any], options: dict[str, Any]) -> str:
    """Return what selects the compiled code of a launch, as text."""
    parts = []
    for name, value in arguments.items():
        if name in executor.constexprs or value is None:
            parts.append(f"{name}={value}")
        elif isinstance(value, torch.Tensor):
            parts.append(f"{name}:{str(value.dtype).removeprefix('torch.')}")
    parts += [f"{name}={options[name]}" for name in ("num_warps", "num_stages") if name in options]
    return " ".join(parts)


def install() -> None:
    """Check and record every launch from now on."""
    executor: Any = interpreter.GridExecutor
    run = executor.__call__

    def on_host(value: Any) -> Any:
        return torch.ops.pretend_cuda.host(value) if isinstance(value, torch.Tensor) else value

    def to_host(self: Any, arguments: Any, options: Any) -> Any:
        return [on_host(value) for value in arguments], {name: on_host(value) for name, value in options.items()}

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        place = device.caller()
        where = f"{self.fn.__name__} in {place}"
        known = inspect.signature(self.fn).parameters
        bound = inspect.getcallargs(self.fn, *arguments, **{n: v for n, v in options.items() if n in known})
        bound = {name: bound[name] for name in known}
        check_devices(bound, where)
        grid = grid_of(self.grid, bound, where)
        if device.is_recording:
            recorded.append(Launch(self.fn.__name__, place, not all(grid), variant_of(self, bound, options)))
        if on_launch is not None and device.MODE == "run":
            on_launch(run, (self, *arguments), options)
        if device.MODE == "run":
            run(self, *arguments, **options)

    executor._init_args_hst = to_host
    executor._restore_args_dev = lambda *arguments: None  # The interpreter wrote to the device's own memory.
    executor.__call__ = launch
