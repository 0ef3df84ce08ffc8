"""What the trainer and the loader may see of parallelism, whichever backend it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distlora.config import UserError
from distlora.model.build import CausalLM
from distlora.model.frozen import FrozenTensor
from distlora.parallel.adapter_sync import GradientReducer, Launches
from distlora.parallel.gradients import Gradients
from distlora.parallel.integrity import FrozenWeights, compare_trained
from distlora.parallel.ranks import Ranks
from distlora.parallel.residency import Residency
from distlora.parallel.shards import Shards, local_rows
from distlora.parallel.streams import HostRows, stream_rows
from distlora.parallel.traffic import Traffic
from distlora.parallel.trained_shards import ShardedGradients
from distlora.system import host_memory

Collected = TypeVar("Collected")

PIECE_BYTES = 64 * 2**20
"""Of a tensor that is saved: what a rank holds of it at once beside its own rows."""


@dataclass(slots=True)
class Backend:
    """What the trainer and the loader may know of parallelism."""

    ranks: Ranks
    shards: Shards
    """The ranks that cut one copy of the base between them."""
    traffic: Traffic = field(default_factory=Traffic)
    after_backward: Callable[[], None] | None = None
    """What lets go of what is gathered, where no hook does."""
    residency: Residency | None = None
    """Which blocks stay gathered; None where the backend keeps none, or nothing is cut."""
    gradients: list[Gradients] = field(default_factory=list)
    """Of each run that shares this base, in the order of `reduce_gradients_of`."""
    _root: nn.Module | None = None
    _launches: Launches | None = None
    _frozen: FrozenWeights | None = None

    @property
    def sharded(self) -> bool:
        """Whether the base is cut over ranks; one process keeps it whole."""
        return self.shards.count > 1

    @property
    def writes(self) -> bool:
        """Whether this rank writes what all ranks have alike: checkpoints and results."""
        return self.ranks.rank == 0

    @property
    def gives_rows(self) -> bool:
        """Whether what is saved is made of this rank's rows: those of the first copy, where the rank that writes is."""
        return self.shards.copy == 0

    def local_rows(self, tensor: Tensor) -> tuple[Tensor, int]:
        """The rows of dim 0 that this rank owns, as writable memory, and the index of the first of them."""
        return local_rows(tensor)

    def gather_rows(self, local: Tensor) -> Tensor:
        """The `local` (same shape on each) of the ranks that cut one copy of the base between them, one after the other
        along dim 0. On the ranks' device. For loading, not for a step."""
        local = local.to(self.ranks.device)
        if not self.sharded:
            return local
        gathered = [torch.empty_like(local) for _ in range(self.shards.count)]
        dist.all_gather(gathered, local, group=self.shards.group)
        return torch.cat(gathered)

    def gather_ranks(self, tensor: Tensor) -> Tensor:
        """(...) of the same shape on each rank -> (ranks, ...), of all copies of the base. For loading, not for a
        step."""
        if self.ranks.group is None:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.ranks.world)]
        dist.all_gather(gathered, tensor, group=self.ranks.group)
        return torch.stack(gathered)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Rank `owner`'s values into every rank's `tensor`, in place. For loading, not for a step."""
        if self.ranks.group is not None:
            dist.broadcast(tensor, group=self.ranks.group, group_src=owner)

    def spread(self, local: Tensor, parameter: nn.Parameter) -> Tensor:
        """What has a number for each element of `local_rows(parameter)`, as cut over the ranks like `parameter`.

        Both share their memory, so `local` must lie on the parameter's device: DTensor would copy it there.
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
        """Give `write` all of a tensor, cut over the ranks or not, on the rank that writes: flat pieces of at most
        PIECE_BYTES in host memory, front to back. On the others `write` is not called.

        Every rank must call it for the same tensors in the same order. For saving, not for a step; copies in host
        memory (`HostRows` of what was cut) are streamed while another thread trains, and keep their dtype.
        """
        if not self.gives_rows:
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
        own, columns = local.reshape(-1), math.prod(data.shape[1:])
        start, per_rank = first_row * columns, -(-data.shape[0] // self.shards.count) * columns
        for first in range(0, data.numel(), per_rank):
            owner, end = first // per_rank, min(first + per_rank, data.numel())
            for low in range(first, end, size):
                high = min(low + size, end)
                if owner == self.shards.index:
                    piece = own[low - start : high - start].to(dtype)
                else:
                    piece = torch.empty(high - low, dtype=dtype, device=own.device)
                # Front to back needs one rank's rows after the other's, and a broadcast needs no communicator for each
                # pair of ranks, as sending to the one that writes would.
                if owner != 0:
                    dist.broadcast(piece, group=self.shards.group, group_src=owner)
                if self.writes:
                    write(piece.cpu())
                elif piece.is_cuda:
                    # No further ahead of the files than a piece: NCCL's watchdog counts from when a call was queued.
                    torch.cuda.current_stream(piece.device).synchronize()

    def watch_weights(self, model: CausalLM) -> None:
        """After loading, the base and what then takes the place of its weights: remember what is frozen on every rank,
        and check it where the next forward gathers it. Does nothing where all of it is trained. Raises
        DamagedWeightsError (`integrity`)."""
        if self._frozen is not None:
            self._frozen.forget_next_forward()
        if any(not parameter.requires_grad for parameter in model.parameters()):
            self._frozen = FrozenWeights(model, self)
            self._frozen.check_next_forward()

    def compare_trained(self, model: CausalLM) -> None:
        """Before the first step, when all is loaded: that ranks begin with the same of what is trained. Raises
        DamagedWeightsError (`integrity`)."""
        compare_trained(model, self)

    def check_weights(self) -> None:
        """Whether the frozen base is still what was loaded: each rank's own rows now, and in the next forward what is
        gathered. Raises DamagedWeightsError on every rank."""
        if self._frozen is not None:
            self._frozen.check_own_rows()
            self._frozen.check_next_forward()

    def verified(self, collect: Callable[[], Collected]) -> Callable[[], Collected]:
        """`collect`, with `check_weights` before it: for what is saved."""

        def checked() -> Collected:
            self.check_weights()
            return collect()

        return checked

    def reduce_gradients_of(self, parameters: Iterable[nn.Parameter], bucket_mb: float) -> Gradients:
        """Own the gradients of these trained parameters (in forward order) from now on, beside those of the calls
        before."""
        trained = list(parameters)
        replicated = [parameter for parameter in trained if not isinstance(parameter.data, DTensor)]
        sharded = [parameter for parameter in trained if isinstance(parameter.data, DTensor)]
        group, traffic, copies = self.ranks.group, self.traffic, self.shards.copies
        parts: list[GradientReducer | ShardedGradients] = []
        if replicated:
            if self._launches is None:
                between = group is not None and self.shards.crosses(group)
                self._launches = Launches(group, traffic, between_copies=between)
            parts += [GradientReducer(replicated, bucket_bytes=int(bucket_mb * 2**20), launches=self._launches)]
        if sharded:
            assert self._root is not None
            assert group is not None
            parts += [ShardedGradients(self._root, sharded, group=group, traffic=traffic, copies=copies)]
        gradients = Gradients(parts)
        self.gradients.append(gradients)
        return gradients

    def release_gradients(self, gradients: Gradients) -> None:
        """Between steps: those of a trial that has ended are no longer owned."""
        self.gradients.remove(gradients)
        gradients.release()

    def updated(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """What the optimizer updates in the place of these: themselves, or the rows of them that this rank owns."""
        rows = {parameter: own for gradients in self.gradients for parameter, own in gradients.updated()}
        return {name: rows[parameter] for name, parameter in parameters.items()}

    def backward(self, *losses: Tensor, last: bool) -> None:
        """Accumulate gradients; with the step's `last` one, send each bucket over the ranks as it completes. `losses`:
        a scalar for each call of `reduce_gradients_of`, in their order.

        A loss that is not finite makes the sums of all ranks NaN, so that each of them sees it in the norm.
        """
        assert self.gradients, "reduce_gradients_of comes first"
        for gradients, loss in zip(self.gradients, losses, strict=True):
            gradients.expect(loss.detach(), last=last)
        (losses[0] if len(losses) == 1 else torch.stack(losses).sum()).backward()
        if self.after_backward is not None:
            self.after_backward()

    def finish_gradients(self) -> None:
        """Wait until every gradient is the sum over all ranks: identical bits on each that has it."""
        if self._launches is not None:
            self._launches.finish()
        for gradients in self.gradients:
            gradients.finish()

    def zero_gradients(self) -> None:
        for gradients in self.gradients:
            gradients.zero()

    def settle_residency(self) -> str | None:
        """After a whole step: where `parallel.resident_blocks` is auto, decide once how many blocks stay gathered, by
        the memory that the rank with the least of it has left. The host waits for the device. Returns what there is to
        say of it."""
        residency = self.residency
        if residency is None or not residency.waits:
            return None
        fitting, usable = residency.fitting()
        residency.keep(-int(self.max_over_ranks(-fitting)))
        said = residency.said() if residency.count > 0 else "no block stays gathered"
        return f"parallel.resident_blocks=auto: {said}; rank {self.ranks.rank} has {usable / 2**30:,.2f} GiB for them"

    def unpacked_extra_bytes(self, model: CausalLM, passes: int) -> int:
        """What `passes` gathers of every block that does not stay would move beyond what they do, were the packed
        weights bf16."""
        if not self.sharded:
            return 0
        count, extra = self.shards.count, 0
        moved = model.blocks[self.residency.count if self.residency is not None else 0 :]
        weights = (module for block in moved for module in block.modules() if isinstance(module, FrozenTensor))
        for weight in (weight for weight in weights if weight.quantized):
            groups = count * -(-weight.num_groups // count)
            extra += 2 * weight.numel - groups * weight.group_bytes
        return passes * extra

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The elementwise sum over all ranks, in place. For counters between steps."""
        if self.ranks.group is not None:
            dist.all_reduce(tensor, group=self.ranks.group)
        return tensor

    def max_over_ranks(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum over all ranks, in place."""
        if self.ranks.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.ranks.group)
        return tensor

    def lacks_host_memory(self, nbytes: int) -> bool:
        """Whether some machine has less than `nbytes` left for each of its ranks, as far as it can be told; the same on
        every rank, and every rank must ask. `nbytes` may be another number on each."""
        available, needed = host_memory.available_bytes(), nbytes * host_memory.processes_here()
        lacks = torch.tensor(available is not None and needed > available, device=self.ranks.device).int()
        return bool(self.max_over_ranks(lacks))

    def require_host_memory(self, nbytes: int, setting: str, purpose: str, instead: str) -> None:
        """Before `nbytes` of it are taken on this rank: raises UserError, on every rank, where a machine has less left
        for its ranks, as far as it can be told: "`setting` takes ... of host memory for `purpose`, ...; `instead`".

        Every rank must call it alike, and none takes memory before all have looked.
        """
        if self.lacks_host_memory(nbytes):
            available, processes = host_memory.available_bytes(), host_memory.processes_here()
            here = "an unknown amount" if available is None else f"{available / 2**30:,.2f} GiB"
            raise UserError(
                f"{setting} takes {nbytes / 2**30:,.2f} GiB of host memory for {purpose}, and a machine lacks it: this "
                f"one has {here} left for {processes}; {instead}"
            )

    def barrier(self) -> None:
        if self.ranks.group is not None:
            dist.barrier(self.ranks.group)
