"""Define what the trainer and the loader see of parallelism, with any backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distlora.config import UserError
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertWeight
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel.fsdp2 import Residency, free_bytes
from distlora.parallel.gradients import GradientReducer, Gradients, Launches, ShardedGradients
from distlora.parallel.integrity import FrozenWeights, compare_trained
from distlora.parallel.ranks import HostRows, Ranks, Shards, Traffic, local_rows, pieces, stream_rows
from distlora.system import host_memory

Collected = TypeVar("Collected")

PIECE_BYTES = 64 * 2**20
"""Bytes of a saved tensor that a rank holds at once, beside its rows."""


@dataclass(slots=True)
class Backend:
    """Shards, gradients, traffic and collectives of one model on this rank."""

    ranks: Ranks
    shards: Shards
    """Ranks that shard one replica of the base."""
    traffic: Traffic = field(default_factory=Traffic)
    after_backward: Callable[[], None] | None = None
    """Frees gathered parameters after a backward, if no hook does."""
    residency: Residency | None = None
    """Layers that stay gathered; None if the backend supports none, or nothing is sharded."""
    gradients: list[Gradients] = field(default_factory=list)
    """Gradients of each run that shares this base, in the order of `reduce_gradients_of`."""
    _root: nn.Module | None = None
    _launches: Launches | None = None
    _frozen: FrozenWeights | None = None

    @property
    def sharded(self) -> bool:
        """True if the base is sharded over ranks. One process keeps it whole."""
        return self.shards.count > 1

    @property
    def writes(self) -> bool:
        """True on the rank that writes checkpoints and results."""
        return self.ranks.rank == 0

    def local_rows(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Return this rank's rows of dim 0, as writable memory, and the index of the first of them."""
        return local_rows(tensor)

    def local_groups(self, weight: FrozenTensor) -> tuple[list[Tensor], int]:
        """Return this rank's rows of each part of a quantized weight, and the index of the first group."""
        rows = [self.local_rows(weight.get_parameter(name)) for name in weight.part_names]
        return [part for part, _ in rows], rows[0][1]

    def gather_rows(self, local: Tensor) -> Tensor:
        """Concatenate `local` (same shape on each rank) over the ranks of a replica along dim 0, on the ranks' device.

        For loading, not for a step.
        """
        local = local.to(self.ranks.device)
        if not self.sharded:
            return local
        gathered = [torch.empty_like(local) for _ in range(self.shards.count)]
        dist.all_gather(gathered, local, group=self.shards.group)
        return torch.cat(gathered)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return all rows of a frozen parameter, gathered now if it is one of experts on demand. For checks."""
        cut = getattr(parameter, "cut", None)
        if cut is None or parameter.shape == cut.shape:
            return parameter.data
        return self.gather_rows(cut.padded)[: cut.shape[0]]

    def gather_ranks(self, tensor: Tensor) -> Tensor:
        """Stack (...) of all ranks, of the same shape on each, to (ranks, ...). For loading, not for a step."""
        if self.ranks.group is None:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.ranks.world)]
        dist.all_gather(gathered, tensor, group=self.ranks.group)
        return torch.stack(gathered)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Copy rank `owner`'s values into every rank's `tensor`, in place. For loading, not for a step."""
        if self.ranks.group is not None:
            dist.broadcast(tensor, group=self.ranks.group, group_src=owner)

    def spread(self, local: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return `local`, one number per element of `local_rows(parameter)`, sharded like `parameter`.

        The result shares memory with `local`, which must lie on the parameter's device: DTensor would copy it
        otherwise.
        """
        data = parameter.data
        if not isinstance(data, DTensor):
            return local
        rows = data.to_local()
        assert (local.shape, local.device) == (rows.shape, rows.device), "this state is not of the parameter's rows"
        return DTensor.from_local(
            local, data.device_mesh, data.placements, run_check=False, shape=data.shape, stride=data.stride()
        )

    def stream(
        self, tensor: Tensor | HostRows, write: Callable[[Tensor], object], dtype: torch.dtype | None = None
    ) -> None:
        """Pass a whole tensor, sharded or not, to `write` on the rank that writes, in flat host pieces, in order.

        Pieces have at most PIECE_BYTES. Other ranks do not call `write`. Every rank must call this for the same tensors
        in the same order. For saving, not for a step. Host copies (`HostRows` of a sharded tensor) are streamed while
        another thread trains, and keep their dtype.
        """
        if self.shards.replica > 0:  # The first replica's rows are saved.
            return
        if isinstance(tensor, HostRows):
            assert dtype in (None, tensor.dtype), "copies are written as they are"
            assert self.ranks.control is not None
            stream_rows(tensor, write, group=self.ranks.control, rank=self.ranks.rank, world=self.shards.count)
            return
        data = tensor.detach()
        dtype = dtype or data.dtype
        size = PIECE_BYTES // max(dtype.itemsize, data.dtype.itemsize)
        if not isinstance(data, DTensor):
            if self.writes:
                for piece in data.reshape(-1).split(size):
                    write(piece.to("cpu", dtype))
            return
        local, first_row = self.local_rows(data)
        flat, start = local.reshape(-1), first_row * math.prod(data.shape[1:])
        for owner, low, high in pieces(data.shape, self.shards.count, size):
            if owner == self.shards.index:
                piece = flat[low - start : high - start].to(dtype)
            else:
                piece = torch.empty(high - low, dtype=dtype, device=flat.device)
            # One rank's rows follow the other's. Broadcast needs no communicator per pair of ranks, which send and
            # receive would.
            if owner != 0:
                dist.broadcast(piece, group=self.shards.group, group_src=owner)
            if self.writes:
                write(piece.cpu())
            elif piece.is_cuda:
                # Stay at most one piece ahead of the files: NCCL's watchdog counts from when a call was queued.
                torch.cuda.current_stream(piece.device).synchronize()

    def watch_weights(self, model: CausalLM) -> None:
        """Record checksums of the frozen base on every rank, and check the rows that the next forward gathers.

        Call it after loading. It does nothing if all parameters are trained. Raises DamagedWeightsError (`integrity`).
        """
        if self._frozen is not None:
            self._frozen.forget_next_forward()
        if any(not parameter.requires_grad for parameter in model.parameters()):
            self._frozen = FrozenWeights(model, self)
            self._frozen.check_next_forward()

    def compare_trained(self, model: CausalLM) -> None:
        """Check before the first step that all ranks start with the same trained parameters.

        Raises DamagedWeightsError.
        """
        compare_trained(model, self)

    def check_weights(self) -> None:
        """Check that the frozen base is unchanged: each rank's rows now, gathered rows in the next forward.

        Raises DamagedWeightsError on every rank.
        """
        if self._frozen is not None:
            self._frozen.check_local_rows()
            self._frozen.check_next_forward()

    def verified(self, collect: Callable[[], Collected]) -> Callable[[], Collected]:
        """Return `collect` preceded by `check_weights`, for what is saved."""

        def checked() -> Collected:
            self.check_weights()
            return collect()

        return checked

    def reduce_gradients_of(self, parameters: Iterable[nn.Parameter], bucket_mb: float) -> Gradients:
        """Take over the gradients of these trained parameters (in forward order), beside those of earlier calls."""
        trained = list(parameters)
        replicated = [parameter for parameter in trained if not isinstance(parameter.data, DTensor)]
        sharded = [parameter for parameter in trained if isinstance(parameter.data, DTensor)]
        group, traffic, replicas = self.ranks.group, self.traffic, self.shards.num_replicas
        parts: list[GradientReducer | ShardedGradients] = []
        if replicated:
            if self._launches is None:
                between = group is not None and self.shards.crosses(group)
                self._launches = Launches(group, traffic, between_replicas=between)
            parts += [GradientReducer(replicated, bucket_bytes=int(bucket_mb * 2**20), launches=self._launches)]
        if sharded:
            assert self._root is not None
            assert group is not None
            parts += [ShardedGradients(self._root, sharded, group=group, traffic=traffic, num_replicas=replicas)]
        gradients = Gradients(parts)
        self.gradients.append(gradients)
        return gradients

    def release_gradients(self, gradients: Gradients) -> None:
        """Free the gradients of a trial that has ended, between steps."""
        self.gradients.remove(gradients)
        gradients.release()

    def updated(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return the tensors that the optimizer updates: the parameters, or this rank's rows of them."""
        rows = {parameter: rows for gradients in self.gradients for parameter, rows in gradients.updated()}
        return {name: rows[parameter] for name, parameter in parameters.items()}

    def backward(self, *losses: Tensor, last: bool) -> None:
        """Accumulate gradients. In the step's `last` backward, send each bucket as it completes.

        `losses`: one scalar per call of `reduce_gradients_of`, in their order. A loss that is not finite makes the sums
        of all ranks NaN, so that each of them sees it in the norm.
        """
        assert self.gradients, "reduce_gradients_of comes first"
        for gradients, loss in zip(self.gradients, losses, strict=True):
            gradients.expect(loss.detach(), last=last)
        (losses[0] if len(losses) == 1 else torch.stack(losses).sum()).backward()
        if self.after_backward is not None:
            self.after_backward()

    def finish_gradients(self) -> None:
        """Wait until every gradient is the sum over all ranks, with identical bits on each rank that has it."""
        if self._launches is not None:
            self._launches.finish()
        for gradients in self.gradients:
            gradients.finish()

    def zero_gradients(self) -> None:
        """Zero the gradients for the next step."""
        for gradients in self.gradients:
            gradients.zero()

    def settle_residency(self, run_largest: Callable[[], object] = lambda: None) -> str | None:
        """Choose the number of resident layers once, after a whole step, if parallel.resident_blocks=auto.

        `run_largest` is called before, to take the memory that a later step may need beyond that of the first.
        The rank with the least free memory decides. The host waits for the device. Returns a line for the log, or None.
        """
        residency = self.residency
        if residency is None or not residency.waits:
            return None
        run_largest()
        fitting, usable = residency.fitting()
        residency.keep(-int(self.max_over_ranks(-fitting)))
        described = residency.describe() if residency.count > 0 else "no layer stays gathered"
        return (
            f"parallel.resident_blocks=auto: {described}; rank {self.ranks.rank} has {usable / 2**30:,.2f} GiB for them"
        )

    def unpacked_extra_bytes(self, model: CausalLM, passes: int) -> int:
        """Return the bytes that `passes` gathers of each non-resident layer would add with bf16 weights."""
        if not self.sharded:
            return 0
        count, extra = self.shards.count, 0
        moved = model.blocks[self.residency.count if self.residency is not None else 0 :]
        weights = (module for block in moved for module in block.modules() if isinstance(module, FrozenTensor))
        for weight in (weight for weight in weights if weight.quantized):
            if isinstance(weight, ExpertWeight) and (weight.is_divided or weight.on_demand):
                continue
            assert weight.format is not None
            groups = count * -(-weight.num_groups // count)
            extra += 2 * weight.numel - groups * weight.format.group_bytes
        return passes * extra

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum elementwise over all ranks, in place. For counters between steps."""
        if self.ranks.group is not None:
            dist.all_reduce(tensor, group=self.ranks.group)
        return tensor

    def max_over_ranks(self, tensor: Tensor) -> Tensor:
        """Take the elementwise maximum over all ranks, in place."""
        if self.ranks.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.ranks.group)
        return tensor

    def lacks_host_memory(self, nbytes: int) -> bool:
        """Return whether some node has less than `nbytes` available per rank, as far as it can be measured.

        The answer is the same on every rank, and every rank must call it. `nbytes` may differ between ranks.
        """
        available, needed = host_memory.available_bytes(), nbytes * host_memory.processes_here()
        lacks = torch.tensor(available is not None and needed > available, device=self.ranks.device).int()
        return bool(self.max_over_ranks(lacks))

    def require_host_memory(self, nbytes: int, setting: str, purpose: str, instead: str) -> None:
        """Raise UserError, on every rank, if some node is known to lack `nbytes` of host memory per rank.

        The message is "`setting` takes ... of host memory for `purpose`, ...; `instead`". Every rank must call it
        alike, and no rank allocates before all have checked.
        """
        if self.lacks_host_memory(nbytes):
            available, processes = host_memory.available_bytes(), host_memory.processes_here()
            here = "an unknown amount" if available is None else f"{available / 2**30:,.2f} GiB"
            raise UserError(
                f"{setting} takes {nbytes / 2**30:,.2f} GiB of host memory for {purpose}, and a node lacks it: this "
                f"one has {here} left for {processes}; {instead}"
            )

    @contextlib.contextmanager
    def whole_base(self, model: CausalLM, forward: Callable[[], object], *, wanted: bool) -> Iterator[bool]:
        """Keep the whole base on each rank within this context, if it is `wanted` and every rank has the memory.

        Every rank must call it. `forward` runs the model once. Yields True if a rank's forwards need no other rank.
        """
        if not self.sharded:
            yield True
            return
        residency = self.residency
        if not wanted or residency is None or bool(self.max_over_ranks(residency.lacks_memory_for(model).int())):
            yield False
            return
        with residency.all_gathered(model):
            forward()
            yield True

    def free_bytes(self) -> float:
        """Return the bytes that generation may allocate on this rank's device, less the reserve.

        0 if that is unknown; below 0 where even the reserve is in use.
        """
        return free_bytes(self.ranks.device, with_cached=True)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.ranks.group is not None:
            dist.barrier(self.ranks.group)
