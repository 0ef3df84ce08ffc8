"""DeepSpeed ZeRO-3 over the frozen base: DeepSpeed cuts, gathers, prefetches and offloads it; adapters, their gradients
and the optimizer are ours, as with FSDP2.

Units are FSDP2's: every Block; the embedding; the head; what else the decoder has (its last norm). DeepSpeed's own way
in, hooks on the modules of the model, takes every parameter below a module for its own, so each unit is a module that
has the unit's frozen parameters and nothing else, and our hooks say when it is needed. Why not `deepspeed.initialize`:
README.md.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from distlora.config.deepspeed_file import Gathering, check_deepspeed
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.parallel.shards import Shards, whole_shape
from distlora.parallel.traffic import Traffic
from distlora.system import host_memory


@dataclass(frozen=True, slots=True)
class Cut:
    """How a parameter is cut over ranks: what `shards.local_rows` reads of it."""

    rows: Tensor
    """(rows of a rank, ...): this rank's, in the memory that DeepSpeed gathers from; zeros behind the last of all."""
    first_row: int
    shape: torch.Size
    """Of the whole."""


class _Unit(nn.Module):
    """The frozen parameters that are gathered together."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        for index, parameter in enumerate(parameters):
            self.register_parameter(str(index), parameter)


def host_bytes(model: CausalLM, shards: Shards) -> int:
    """Host memory that a rank takes where the base of `model` is kept there."""
    sizes = [own_shape(parameter, shards).numel() * parameter.itemsize for parameter in _gathered(model)]
    return host_memory.bytes_of(sizes)


def _gathered(model: CausalLM) -> list[nn.Parameter]:
    """All but the adapters', a tied one once; the largest first, so that little is lost at the ends of chunks."""
    adapters = set(adapter_parameters(model).values())
    found = [parameter for parameter in model.parameters() if parameter not in adapters]
    return sorted(found, key=lambda parameter: -parameter.nbytes)


def own_shape(parameter: Tensor, shards: Shards) -> torch.Size:
    """Of the rows that each rank has memory for."""
    return torch.Size((-(-parameter.shape[0] // shards.count), *parameter.shape[1:]))


def shard(model: CausalLM, shards: Shards, gathering: Gathering, *, device: torch.device, traffic: Traffic) -> Units:
    """Cut every parameter of `model` (on meta) but the adapters' over the ranks, give this rank's rows their memory,
    and gather units around their forward and backward from now on.

    Every rank must call it alike. Raises UserError where DeepSpeed is not installed.
    """
    check_deepspeed()
    start_deepspeed(device)
    partition = _Partition(shards, gathering, device=device, traffic=traffic)
    gathered = _gathered(model)
    rows = dict(zip(gathered, partition.memory(gathered), strict=True))
    taken: dict[nn.Parameter, nn.Parameter] = {}

    def take(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """The parameters of `modules`, cut; a tied one is cut once. Those of a unit before are left out."""
        found = []
        for module in modules:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in rows:  # An adapter's, or cut already.
                    continue
                assert not parameter.requires_grad, "ZeRO-3 gathers what is frozen"
                if parameter not in taken:
                    taken[parameter] = partition.cut(parameter, rows[parameter])
                setattr(module, name, taken[parameter])
                found.append(taken[parameter])
        return found

    embedding, head = _Unit(take(model.embedding.modules())), _Unit(take([model.head]))
    blocks = [_Unit(take(block.modules())) for block in model.blocks]
    rest = _Unit(take(model.modules()))
    units = Units(rest, embedding, blocks, head, gathering, device)
    units.hook(model)
    model.notes.append(
        f"DeepSpeed {version('deepspeed')} (ZeRO-3) gathers the base, "
        + ("which lies in host memory" if gathering.offload else "a share of which each rank keeps")
    )
    if gathering.without_effect:
        model.notes.append(
            "of parallel.deepspeed_config, what is not about gathering has no effect: "
            + ", ".join(gathering.without_effect)
        )
    return units


class Units:
    """When each unit is gathered and let go. What gathers it is DeepSpeed's coordinator: it learns the order of units
    in one step and has the next ones on their way from then on.
    """

    def __init__(
        self,
        rest: _Unit,
        embedding: _Unit,
        blocks: Sequence[_Unit],
        head: _Unit,
        gathering: Gathering,
        device: torch.device,
    ) -> None:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        self._rest, self._embedding, self._blocks, self._head = rest, embedding, blocks, head
        root = nn.ModuleList([rest, embedding, *blocks, head])
        block = max(map(_numel, blocks))
        # By each unit that is fetched a block more is gathered ahead, unless that is more than two units then.
        two = block + max(block, _numel(embedding), _numel(head))
        self._offload = DeepSpeedZeRoOffload(
            root,
            timers=None,
            ds_config=None,
            overlap_comm=gathering.overlap_comm,
            prefetch_bucket_size=_or_else(gathering.prefetch_bucket_size, block),
            max_reuse_distance=gathering.max_reuse_distance,
            max_live_parameters=_or_else(gathering.max_live_parameters, two),
            param_persistence_threshold=gathering.param_persistence_threshold,
            model_persistence_threshold=_or_else(gathering.model_persistence_threshold, sys.maxsize),
        )
        self._coordinator = self._offload.get_param_coordinator()
        self._in_backward: _Unit | None = None
        """The unit whose backward runs."""
        self._device = device
        self._passed: collections.deque[torch.cuda.Event] = collections.deque()
        """When the device has done with each unit that was let go."""

    def hook(self, model: CausalLM) -> None:
        """Gather from now on what a forward of `model` and the backward after it need, when they need it."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)
        for module, unit in ((model.embedding, self._embedding), (model.head, self._head)):
            module.register_forward_pre_hook(functools.partial(self._before, unit))
            module.register_forward_hook(functools.partial(self._after, unit))
        for block, unit in zip(model.blocks, self._blocks, strict=True):
            block.register_forward_pre_hook(functools.partial(self._before, unit))
            block.register_forward_hook(functools.partial(self._after_block, unit))

    def _begin(self, model: nn.Module, arguments: Any) -> None:
        self.end_backward()  # Of a forward that no backward followed.
        self._coordinator.reset_step()
        self._before(self._rest, model, arguments)

    def _end(self, model: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            # What was fetched ahead for a backward, too.
            self._offload.partition_all_parameters()

    def _before(self, unit: _Unit, module: nn.Module, arguments: Any) -> None:
        self._fetch(unit, forward=True)

    def _after(self, unit: _Unit, module: nn.Module, arguments: Any, output: Any) -> None:
        self._release(unit, forward=True)

    def _after_block(self, unit: _Unit, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self._after(unit, module, arguments, output)
        if output.requires_grad:
            output.register_hook(functools.partial(self._before_backward, unit))

    def _before_backward(self, unit: _Unit, gradient: Tensor) -> None:
        """Of a block, when the gradient of its output is complete: the block behind it is done with."""
        self._end_unit()
        self._fetch(unit, forward=False)
        self._in_backward = unit

    def _end_unit(self) -> None:
        if self._in_backward is not None:
            self._release(self._in_backward, forward=False)
            self._in_backward = None

    def end_backward(self) -> None:
        """After a backward: let go what is still gathered, the first block and the last norm."""
        self._end_unit()
        self._coordinator.release_sub_module(self._rest, forward=True)

    def _release(self, unit: _Unit, *, forward: bool) -> None:
        self._coordinator.release_sub_module(unit, forward=forward)
        if (passed := passed_event(self._device)) is not None:
            self._passed.append(passed)

    def _fetch(self, unit: _Unit, *, forward: bool) -> None:
        # What was let go is free for the next gather when the device has passed it, which DeepSpeed does not wait for:
        # a host that runs ahead takes new memory for each unit. So the device has the unit before this one to do at
        # the most.
        while len(self._passed) > 1:
            self._passed.popleft().synchronize()
        coordinator = self._coordinator
        coordinator.trace_prologue(unit)
        if coordinator.is_record_trace():
            coordinator.record_module(unit)
        with record_function("DeepSpeed::fetch"):  # What memory_meter.py tells gathering by, as FSDP2 names its own.
            coordinator.fetch_sub_module(unit, forward=forward)
        for parameter in unit.parameters():
            # Without the rows that fill the last rank's share.
            parameter.data = parameter.data[: whole_shape(parameter)[0]]


class _Partition:
    """Turns parameters into DeepSpeed's, which hold nothing until they are gathered."""

    def __init__(self, shards: Shards, gathering: Gathering, *, device: torch.device, traffic: Traffic) -> None:
        import deepspeed

        self._shards, self._device, self._traffic = shards, device, traffic
        self._offload, self._pin = gathering.offload, gathering.pin_memory and device.type == "cuda"
        self._init = deepspeed.zero.Init(
            data_parallel_group=shards.group,
            mem_efficient_linear=False,  # It exchanges torch's F.linear for the whole process.
            remote_device="cpu" if gathering.offload else None,
            dtype=torch.float32,  # Of what is made within its context, which is not entered here.
        )
        self._init.allgather_sequential = gathering.allgather_sequential

    def memory(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """For this rank's rows of each, zeros."""
        shapes = [own_shape(parameter, self._shards) for parameter in parameters]
        if not self._offload:
            kinds = zip(shapes, parameters, strict=True)
            return [torch.zeros(shape, dtype=parameter.dtype, device=self._device) for shape, parameter in kinds]
        sizes = [shape.numel() * parameter.itemsize for shape, parameter in zip(shapes, parameters, strict=True)]
        places = host_memory.take_places(sizes, pinned=self._pin)
        return [
            place.zero_().view(parameter.dtype).view(shape)
            for place, parameter, shape in zip(places, parameters, shapes, strict=True)
        ]

    def cut(self, parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
        """What takes the place of `parameter`: this rank's `rows` of it.

        DeepSpeed cuts the flat tensor in equal parts; with dim 0 padded to a multiple of the ranks those are our rows.
        Its own way to cut a tensor needs it whole, on every rank, and broadcasts it.
        """
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

        shape, own = parameter.shape, rows.shape
        padded = torch.Size((self._shards.count * own[0], *shape[1:]))
        # The shape without its memory.
        empty = torch.empty((), dtype=parameter.dtype, device=self._device).expand(padded)
        cut: Any = nn.Parameter(empty, requires_grad=False)
        self._init._convert_to_deepspeed_param(cut)
        cut.ds_tensor = rows.view(-1)
        cut.ds_tensor.ds_numel = rows.numel()
        cut.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        cut.ds_tensor.final_location = None
        cut.ds_numel_aligned = padded.numel()
        cut.partition()  # It has its part already, so this lets go of the rest.
        cut.all_gather_coalesced = functools.partial(self._count, cut.all_gather_coalesced)
        first = min(self._shards.index * own[0], shape[0])
        cut.cut = Cut(rows[: max(min(own[0], shape[0] - first), 0)], first, shape)
        return cut

    def _count(self, gather: Callable[..., Any], parameters: Sequence[Any], **options: Any) -> Any:
        """Gather `parameters` by DeepSpeed's function, which each of them carries; count the bytes of the result."""
        parts = [parameter.ds_tensor for parameter in parameters]
        self._traffic.gathered_bytes += self._shards.count * sum(part.nbytes for part in parts)
        with sent_to(self._device, parameters):
            return gather(parameters, **options)


@contextlib.contextmanager
def sent_to(device: torch.device, parameters: Sequence[Any]) -> Iterator[None]:
    """While this lasts, `parameters` have their parts on `device`: those of host memory as copies that the current
    stream (DeepSpeed's, of gathers) makes. DeepSpeed would copy by itself, and have the host wait for it.
    """
    parts = [parameter.ds_tensor for parameter in parameters]
    try:
        for parameter, part in zip(parameters, parts, strict=True):
            if part.device != device:
                sent: Any = part.to(device, non_blocking=True)
                sent.ds_numel, sent.status, sent.final_location = part.ds_numel, part.status, part.final_location
                parameter.ds_tensor = sent
        yield
    finally:
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.ds_tensor = part


def passed_event(device: torch.device) -> torch.cuda.Event | None:
    """What tells when `device` has done all that it was given so far; None of a CPU, which has."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed and have it work over the process group that is there; nothing is compiled or printed."""
    os.environ["DS_ACCELERATOR"] = device.type  # Or it tries what is installed, and warns that it found no GPU.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Else it tries out what it could compile, and compiles half a minute for a sum in shared memory that nothing
        # here calls.
        deepspeed.ops.__compatible_ops__ = {}
    # Its gathers are called by the name that torch 2.13 warns of.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _or_else(size: int | None, default: int) -> int:
    return default if size is None else size


def _numel(unit: _Unit) -> int:
    parameters: list[Any] = list(unit.parameters())
    return sum(math.prod(parameter.ds_shape) for parameter in parameters)
