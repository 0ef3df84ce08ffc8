"""Shard the base with FSDP2: each decoder layer is a unit, gathered as quantized bytes; adapters stay replicated.

Units: every Block; the embedding and the LM head, one unit if they are tied; the final norm in the root. A frozen unit
has no mixed-precision policy, which would round its fp32 scales. A trained unit is gathered in the compute dtype of its
fp32 masters, and its gradients are summed in fp32. This folder's README.md has the facts behind each line.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distlora.config.cluster import RESIDENCY_RESERVE, check_torch
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.experts import divided_parameters
from distlora.model.layer_wrapper import Block
from distlora.parallel.ranks import Shards, Traffic, all_gather
from distlora.planner.workload import padded
from distlora.system import host_memory, process_memory

_all_gather = all_gather
_gather_places = _all_gather
# TODO: call dist.reduce_scatter_single once torch >= 2.13, which gave it this name, is required.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


_MARKS: list[Tensor] = []
"""Marks of the units gathered here: 1 while the rows are there, then 0. Never freed, so that others may read them."""


@dataclass(frozen=True, slots=True)
class _RowPlaces:
    """The places of a rank's rows of a unit in its memory."""

    process: int
    mark: tuple[int, int]
    """(address, bytes) of what is 0 as soon as the rows are freed."""
    rows: list[tuple[int, int]]

    def read(self, to: Tensor) -> bool:
        """Copy the rows. Returns False if the process ended, or freed them before they were copied."""
        mark = torch.zeros(1, dtype=torch.int64)
        copied = process_memory.read(self.process, self.rows, to.data_ptr())
        return copied and process_memory.read(self.process, [self.mark], mark.data_ptr()) and bool(mark)


class _Counted:
    """Collective of FSDP2 that counts its bytes."""

    def __init__(self, traffic: Traffic, shards: Shards) -> None:
        self.traffic = traffic
        self.crosses = functools.cache(shards.crosses)  # One of a few groups, looked up in every gather.

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _CountedAllGather(_Counted):
    """All-gather of a unit that counts the bytes of its result (the protocol of FSDPModule.set_custom_all_gather).

    On a CPU the ranks of one node read the rows of a frozen unit in each other's memory from its second gather on: no
    rank waits for another, and no bytes go through gloo's sockets and threads. Rows must stay where they are until the
    last rank has read them: after its last forward a rank waits for the others before it frees a model.
    """

    def __init__(
        self, traffic: Traffic, shards: Shards, frozen: Callable[[], Iterable[nn.Parameter]] | None = None
    ) -> None:
        """`frozen`: returns the unit's parameters, in FSDP2's order; None: never read the other ranks' memory."""
        super().__init__(traffic, shards)
        self._frozen = frozen
        """None after the first gather."""
        self._places: list[_RowPlaces] | None = None
        """Of each rank, if all ranks can read them."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.traffic.gathered_bytes += output_tensor.nbytes
        self.traffic.between_replicas_bytes += self.crosses(group) * output_tensor.nbytes
        if self._places is not None:
            for places, rows in zip(self._places, output_tensor.chunk(group.size()), strict=True):
                if places.process != os.getpid() and not places.read(rows):
                    raise RuntimeError(f"process {places.process}, another rank here, ended, or freed its shards")
            return None
        work = _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        if self._frozen is not None and work is None:
            self._find_places(output_tensor, group, list(self._frozen()))
            self._frozen = None
        return work

    def _find_places(self, gathered: Tensor, group: dist.ProcessGroup, parameters: Sequence[nn.Parameter]) -> None:
        """Exchange the places of all ranks' rows; keep them if every rank reads there what it has just gathered."""
        shards = [parameter.data for parameter in parameters if isinstance(parameter.data, DTensor)]
        storages = [shard.to_local().untyped_storage() for shard in shards]
        sizes = [storage.nbytes() for storage in storages]  # With the rows that FSDP2 adds.
        mark = torch.ones(1, dtype=torch.int64)
        _MARKS.append(mark)
        for storage in storages:
            weakref.finalize(storage, mark.zero_)
        ours = torch.tensor([os.getpid(), mark.data_ptr(), *(storage.data_ptr() for storage in storages)])
        everyone = ours.new_empty(group.size(), len(ours))
        _gather_places(everyone, ours[None], group=group)
        all_places = [
            _RowPlaces(process, (mark_place, mark.nbytes), list(zip(places, sizes, strict=True)))
            for process, mark_place, *places in everyone.tolist()
        ]
        agree = torch.tensor(process_memory.allow_reads() and gathered.nbytes == group.size() * sum(sizes)).int()
        dist.barrier(group)  # All allow it.
        for places, rows in zip(all_places, gathered.chunk(group.size()), strict=True):
            if agree and places.process != os.getpid():
                read = torch.empty_like(rows)
                agree &= places.read(read) and torch.equal(read, rows)
        dist.all_reduce(agree, dist.ReduceOp.MIN, group=group)
        self._places = all_places if agree else None


class _CountedReduceScatter(_Counted):
    """Reduce-scatter that counts the bytes of its input per rank (FSDPModule.set_custom_reduce_scatter)."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.traffic.scattered_bytes += input_tensor.nbytes
        self.traffic.between_replicas_bytes += self.crosses(group) * input_tensor.nbytes
        return _reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def shard(model: CausalLM, shards: Shards, device: torch.device, *, prefetch: bool, traffic: Traffic) -> None:
    """Shard every parameter of `model` (on meta) except the adapters' over the ranks of a replica, in place.

    Divided experts are sharded already (`expert_parallel`), and never gathered.
    """
    if any(parameter.dtype == torch.uint8 for parameter in model.parameters()):
        check_torch(torch.__version__)
    mesh = shards.mesh(device.type)
    # Each rank holds the tower whole: a rank without an image must not wait in a gather for one that has some.
    ignored = {*adapter_parameters(model).values(), *divided_parameters(model), *model.tower()}

    def is_trained(module: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in module.parameters() if parameter not in ignored)

    def unit(modules: nn.Module | list[nn.Module], *, trained: bool, reshard: bool = True) -> None:
        policy = MixedPrecisionPolicy()
        if trained and model.compute_dtype is not None:
            policy = MixedPrecisionPolicy(
                param_dtype=model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        fully_shard(modules, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored, mp_policy=policy)

    for block in model.blocks:
        unit(block, trained=is_trained(block))
    if model.tied:
        unit([model.embedding, model.head], trained=is_trained(model.head))
    else:
        unit(model.embedding, trained=is_trained(model.embedding))
        if not ignored.issuperset(model.head.parameters()):  # A reward model's score is replicated.
            unit(model.head, trained=is_trained(model.head))
    # A frozen root stays gathered from forward to backward, and after a forward without one. A trained root must not:
    # its copy in the compute dtype would be saved.
    rest_is_trained = any(parameter.requires_grad for parameter in model.rest())
    unit(model, trained=rest_is_trained, reshard=rest_is_trained)

    def count_replicas(reduced: Tensor) -> None:
        """Count FSDP2's all-reduce of trained rows between replicas of the base by the bytes of its result."""
        traffic.reduced_bytes += reduced.nbytes
        traffic.between_replicas_bytes += reduced.nbytes

    def parameters(module: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a module's unit, in FSDP2's order."""
        ends = (model.embedding, model.head) if model.tied and module in (model.embedding, model.head) else (module,)
        candidates = model.rest() if module is model else (p for end in ends for p in end.parameters())
        divided = divided_parameters(module)
        return [parameter for parameter in dict.fromkeys(candidates) if parameter not in divided]

    scatter = _CountedReduceScatter(traffic, shards)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            trained = any(parameter.requires_grad for parameter in parameters(module) if parameter not in ignored)
            frozen = functools.partial(parameters, module) if device.type == "cpu" and not trained else None
            module.set_custom_all_gather(_CountedAllGather(traffic, shards, frozen))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
            if shards.num_replicas > 1:
                module.set_all_reduce_hook(count_replicas)
            # The loss is already divided by the target tokens of all ranks, so FSDP2 must sum, not average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # An embedding's gradient needs no weight, and a frozen head computed its gradient in forward. A trained head
    # recomputes its logits in backward.
    for module in (model.embedding, model.head):
        if isinstance(module, FSDPModule):
            is_head = module is model.head or model.tied
            module.set_unshard_in_backward(is_head and model.head.weight.requires_grad)
    if prefetch:
        for block, following in zip(model.blocks, model.blocks[1:], strict=False):
            assert isinstance(block, FSDPModule)
            assert isinstance(following, FSDPModule)
            block.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([block])


def gather_head_in_backward(model: CausalLM, wanted: bool) -> None:
    """Gather the LM head's weight in backward too, for a frozen head with adapters, or no more."""
    for module in (model.head, *([model.embedding] if model.tied else [])):
        if isinstance(module, FSDPModule):
            module.set_unshard_in_backward(wanted or model.head.weight.requires_grad)


@dataclass(slots=True)
class Residency:
    """Decoder layers that stay gathered (`parallel.resident_blocks`): free memory is traded for network traffic.

    The first layers stay. A step begins with the first layer's all-gather, which nothing hides, and backward ends with
    the first layers, whose gradient reductions nothing hides. Without those gathers the network is free for the
    reductions. Gathers run one layer ahead, and the last resident layer starts that of the first non-resident one.
    """

    blocks: Sequence[Block]
    shards: Shards
    device: torch.device
    count: int = 0
    """Number of layers that stay, counted from the first, from their next gather on."""
    waits: bool = False
    """True until the number has been chosen from the memory that the first step leaves."""

    def keep(self, count: int) -> None:
        """Keep the first `count` layers gathered after their next all-gather."""
        for block in self.blocks[:count]:
            assert isinstance(block, FSDPModule)
            block.set_reshard_after_forward(False, recurse=False)
            block.set_reshard_after_backward(False, recurse=False)
        self.count, self.waits = count, False

    def fitting(self) -> tuple[Tensor, float]:
        """Return (layers that this rank has memory for, () int64 on the device; bytes available for them)."""
        usable, fitting, total = free_bytes(self.device), self.count, 0
        for block in self.blocks[self.count :]:
            total += _gathered_bytes(block, self.shards)
            fitting += total <= usable
        return torch.tensor(fitting, device=self.device), usable

    def _gathered_units(self, model: CausalLM) -> list[FSDPModule]:
        """Return the units that are sharded again after each forward."""
        root = [model] if any(parameter.requires_grad for parameter in model.rest()) else []
        return [
            unit
            for unit in (*self.blocks[self.count :], model.embedding, model.head, *root)
            if isinstance(unit, FSDPModule)
        ]

    def lacks_memory_for(self, model: CausalLM) -> Tensor:
        """Return () bool: this rank cannot hold the whole base, for lack of memory or because experts are divided."""
        width = None if model.compute_dtype is None else model.compute_dtype.itemsize
        units = [unit for unit in self._gathered_units(model) if isinstance(unit, nn.Module) and unit is not model]
        parameters = {parameter for unit in units for parameter in unit.parameters()}
        nbytes = sum(p.numel() * ((p.requires_grad and width) or p.element_size()) for p in parameters)
        lacks = bool(divided_parameters(model)) or nbytes > free_bytes(self.device, with_cached=True)
        return torch.tensor(lacks, device=self.device)

    @contextlib.contextmanager
    def all_gathered(self, model: CausalLM) -> Iterator[None]:
        """Keep all parameters gathered from the next forward to the end of this context."""
        units = self._gathered_units(model)
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(True, recurse=False)
                unit.reshard()

    def describe(self) -> str:
        """Describe the resident layers in a line, for a count above 0."""
        memory = sum(_gathered_bytes(block, self.shards) for block in self.blocks[: self.count])
        return (
            f"{self.count:,} of {len(self.blocks):,} layers stay gathered, which needs {memory / 2**30:,.2f} GiB on "
            "each rank"
        )


def _gathered_bytes(module: nn.Module, shards: Shards) -> int:
    """Return the bytes that a gathered layer adds: its frozen parameters, padded to a multiple of the ranks."""
    divided = divided_parameters(module)
    whole = (parameter for parameter in module.parameters() if not parameter.requires_grad and parameter not in divided)
    return sum(padded(parameter.shape, shards.count) * parameter.element_size() for parameter in whole)


def free_bytes(device: torch.device, *, with_cached: bool = False) -> float:
    """Return the bytes that this rank can still allocate beyond its peak so far, less the reserve; 0: unknown.

    Memory that torch's allocator has once held counts as used, because a step needs it again. `with_cached`: it counts
    as free, for what ends before the next step.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if with_cached else 0
        return free + cached - RESIDENCY_RESERVE["cuda"] * total
    available = host_memory.available_bytes()
    if available is None:
        return 0.0
    return (1 - RESIDENCY_RESERVE["cpu"]) * available / host_memory.processes_here()


class ComputeCopies:
    """Copies in `dtype` that replace a module's trained parameters while its forward runs, in one process.

    The forward equals FSDP2's mixed precision bit for bit. Gradients differ: FSDP2 accumulates in 16 bits what is
    accumulated in fp32 here (a tied weight's two gradients, recomputed slices). Autocast would keep the residual stream
    and the norms in fp32, which is another model than the frozen base of LoRA.

    Each forward makes them anew, a recomputation included, so with activation checkpointing one layer's copies exist at
    a time. Without it backward keeps the copies of every forward: give it a module that runs all slices of a batch at
    once.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, *, ignored: Collection[nn.Parameter] = ()) -> None:
        self._dtype = dtype
        self._places = [
            (owner, name)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter.requires_grad and parameter not in ignored
        ]
        self._masters: list[nn.Parameter] = []
        if not self._places:
            return
        module.register_forward_pre_hook(self._put)
        # Recomputation ends a forward by an exception when it has all that backward needs.
        module.register_forward_hook(self._take_away, always_call=True)

    def _put(self, module: nn.Module, arguments: Any) -> None:
        assert not self._masters, "a module with copies in place was called within its own forward"
        for owner, name in self._places:
            master = owner._parameters.pop(name)
            assert master is not None
            self._masters.append(master)
            setattr(owner, name, master.to(self._dtype))

    def _take_away(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        for (owner, name), master in zip(self._places, self._masters, strict=True):
            delattr(owner, name)
            setattr(owner, name, master)
        self._masters.clear()
