"""Shard the frozen base with DeepSpeed ZeRO-3, which shards, gathers, prefetches and offloads it.

Adapters, their gradients and the optimizer are ours, as with FSDP2. The units are the same: every Block; the embedding;
the LM head; the rest of the decoder (its last norm). DeepSpeed's hooks take every parameter below a module, so each
unit is a module that holds the unit's frozen parameters only, and our hooks tell DeepSpeed when it is needed. README.md
explains why `deepspeed.initialize` is not used.

With parallel.experts=on_demand the fused weights of experts leave these units, and only the experts that tokens chose
are gathered. A rank keeps the same rows of them, on its device or in host memory. When the experts of a layer run, the
ranks of a replica exchange which experts their tokens chose, the host reads that (once per layer and forward), and each
rank sends its rows of those that some token of some rank chose. They are written where they lie in the whole weight, so
nothing else knows about it; the other rows are undefined, and no product reads them. Every rank must run the same
layers in the same order.

Letters of that part: T tokens, K experts per token, E experts, N ranks of a replica.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.profiler import record_function

from distlora.config import UserError
from distlora.config.deepspeed_file import Gathering, check_deepspeed
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.experts import Experts, ExpertWeight
from distlora.parallel.expert_parallel import experts_of_batches
from distlora.parallel.ranks import Cut, Shards, Traffic, all_gather, whole_shape
from distlora.system import host_memory

_Unit = nn.ParameterList
"""Frozen parameters that are gathered together."""


def host_bytes(model: CausalLM, shards: Shards) -> int:
    """Return the host memory in bytes that a rank needs to offload the base of `model`."""
    sizes = [own_shape(parameter, shards).numel() * parameter.itemsize for parameter in _gathered(model)]
    return host_memory.bytes_of(sizes)


def _gathered(model: CausalLM) -> list[nn.Parameter]:
    """Return all parameters but adapters' and the tower's, a tied one once, largest first to waste little at ends."""
    whole = {*adapter_parameters(model).values(), *model.tower()}
    parameters = [parameter for parameter in model.parameters() if parameter not in whole]
    return sorted(parameters, key=lambda parameter: -parameter.nbytes)


def own_shape(parameter: Tensor, shards: Shards) -> torch.Size:
    """Return the shape of the rows that each rank allocates."""
    return torch.Size((-(-parameter.shape[0] // shards.count), *parameter.shape[1:]))


def shard(model: CausalLM, shards: Shards, gathering: Gathering, *, device: torch.device, traffic: Traffic) -> Units:
    """Shard every parameter of `model` (on meta) except the adapters', and gather units around forward and backward.

    Every rank must call it alike. Raises UserError if DeepSpeed is not installed.
    """
    check_deepspeed()
    start_deepspeed(device)
    partition = _Partition(shards, gathering, device=device, traffic=traffic)
    gathered = _gathered(model)
    rows = dict(zip(gathered, partition.memory(gathered), strict=True))
    experts = OnDemand(model, rows, shards, traffic) if gathering.experts_on_demand else None
    taken: dict[nn.Parameter, nn.Parameter] = {}

    def take(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
        """Shard and return the parameters of `modules`, a tied one once, without those of earlier units."""
        tensors = []
        for module in modules:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in rows:  # An adapter's parameter, or sharded already.
                    continue
                assert not parameter.requires_grad, "ZeRO-3 gathers what is frozen"
                if parameter not in taken:
                    taken[parameter] = partition.cut(parameter, rows[parameter])
                setattr(module, name, taken[parameter])
                tensors.append(taken[parameter])
        return tensors

    embedding = take(model.embedding.modules())
    head = take(model.head.modules()) if model.head.kept is not model.embedding else embedding
    blocks = [_Unit(take(block.modules())) for block in model.blocks]
    rest = _Unit(take(model.modules()))
    units = Units(rest, _Unit(embedding), blocks, _Unit(head), gathering, device, experts)
    units.hook(model)
    model.notes.append(
        f"DeepSpeed {version('deepspeed')} (ZeRO-3) gathers the base, "
        + ("which is offloaded to host memory" if gathering.offload else "which is sharded over the ranks")
    )
    if gathering.without_effect:
        model.notes.append(
            "settings of parallel.deepspeed_config that do not control gathering have no effect: "
            + ", ".join(gathering.without_effect)
        )
    return units


class Units:
    """Gathering and release of each unit, by DeepSpeed's coordinator.

    The coordinator learns the order of units in the first step and prefetches the next ones from then on.
    """

    def __init__(
        self,
        rest: _Unit,
        embedding: _Unit,
        blocks: Sequence[_Unit],
        head: _Unit,
        gathering: Gathering,
        device: torch.device,
        experts: OnDemand | None,
    ) -> None:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        self._rest, self._embedding, self._blocks, self._head = rest, embedding, blocks, head
        root = nn.ModuleList([rest, embedding, *blocks, head])
        block = max(map(_numel, blocks))
        # Each fetch prefetches one layer more, unless that exceeds two units.
        two = block + max(block, _numel(embedding), _numel(head))
        bucket, live, kept = (
            gathering.prefetch_bucket_size,
            gathering.max_live_parameters,
            gathering.model_persistence_threshold,
        )
        self._offload = DeepSpeedZeRoOffload(
            root,
            timers=None,
            ds_config=None,
            overlap_comm=gathering.overlap_comm,
            prefetch_bucket_size=block if bucket is None else bucket,
            max_reuse_distance=gathering.max_reuse_distance,
            max_live_parameters=two if live is None else live,
            param_persistence_threshold=gathering.param_persistence_threshold,
            model_persistence_threshold=sys.maxsize if kept is None else kept,
        )
        self._coordinator = self._offload.get_param_coordinator()
        self._experts = experts
        self._in_backward: _Unit | None = None
        """Unit whose backward runs."""
        self._device = device
        self._passed: collections.deque[torch.cuda.Event] = collections.deque()
        """Events that mark when the device has finished with each released unit."""

    def hook(self, model: CausalLM) -> None:
        """Register hooks that gather each unit when a forward of `model` or the following backward needs it."""
        model.register_forward_pre_hook(lambda *_: self._begin())
        model.register_forward_hook(lambda *_: self._end())
        pairs = zip(model.blocks, self._blocks, strict=True)
        ends = ((model.embedding, self._embedding), (model.head, self._head))
        for module, unit in (*(each for each in ends if _numel(each[1])), *pairs):  # A score is replicated.
            module.register_forward_pre_hook(functools.partial(self._before, unit))
            module.register_forward_hook(functools.partial(self._after, unit))

    def _begin(self) -> None:
        self.end_backward()  # If no backward followed the last forward.
        self._coordinator.reset_step()
        self._fetch(self._rest, forward=True)

    def _end(self) -> None:
        if not torch.is_grad_enabled():
            # Includes what was prefetched for a backward.
            self._offload.partition_all_parameters()

    def _before(self, unit: _Unit, module: nn.Module, arguments: Any) -> None:
        self._fetch(unit, forward=True)

    def _after(self, unit: _Unit, module: nn.Module, arguments: Any, output: Any) -> None:
        self._release(unit, forward=True)
        output = output[0] if isinstance(output, tuple) else output
        if unit in self._blocks and output.requires_grad:
            output.register_hook(functools.partial(self._before_backward, unit))

    def _before_backward(self, unit: _Unit, gradient: Tensor) -> None:
        """Gather a layer when its output's gradient is complete, and release the layer after it."""
        self._end_unit()
        self._fetch(unit, forward=False)
        self._in_backward = unit

    def _end_unit(self) -> None:
        if self._in_backward is not None:
            self._release(self._in_backward, forward=False)
            self._in_backward = None

    def end_backward(self) -> None:
        """Release the first layer and the last norm, which are still gathered after a backward."""
        self._end_unit()
        self._coordinator.release_sub_module(self._rest, forward=True)

    def _release(self, unit: _Unit, *, forward: bool) -> None:
        if self._experts is not None:
            self._experts.release()
        self._coordinator.release_sub_module(unit, forward=forward)
        if (passed := passed_event(self._device)) is not None:
            self._passed.append(passed)

    def _fetch(self, unit: _Unit, *, forward: bool) -> None:
        # Released memory can be reused once the device has passed it. DeepSpeed does not wait for that, so a host that
        # runs ahead allocates new memory for each unit. Wait until the device has at most the previous unit left.
        while len(self._passed) > 1:
            self._passed.popleft().synchronize()
        coordinator = self._coordinator
        coordinator.trace_prologue(unit)
        if coordinator.is_record_trace():
            coordinator.record_module(unit)
        # The label by which memory_meter.py recognizes gathering, as for FSDP2.
        with record_function("DeepSpeed::fetch"):
            coordinator.fetch_sub_module(unit, forward=forward)
        for parameter in unit.parameters():
            # Drop the padding rows of the last rank's shard.
            parameter.data = parameter.data[: whole_shape(parameter)[0]]


class _Partition:
    """Conversion of parameters to DeepSpeed's, which hold nothing until they are gathered."""

    def __init__(self, shards: Shards, gathering: Gathering, *, device: torch.device, traffic: Traffic) -> None:
        import deepspeed

        self._shards, self._device, self._traffic = shards, device, traffic
        self._offload, self._pin = gathering.offload, gathering.pin_memory and device.type == "cuda"
        self._init = deepspeed.zero.Init(
            data_parallel_group=shards.group,
            mem_efficient_linear=False,  # It would replace torch's F.linear for the whole process.
            remote_device="cpu" if gathering.offload else None,
            dtype=torch.float32,  # Dtype of parameters made within its context, which is not entered here.
        )
        self._init.allgather_sequential = gathering.allgather_sequential

    def memory(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Allocate zeros for this rank's rows of each parameter."""
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
        """Return the parameter that replaces `parameter`, with this rank's `rows` of it.

        DeepSpeed splits the flat tensor into equal parts; with dim 0 padded to a multiple of the ranks those are our
        rows. DeepSpeed's own partitioning needs the whole tensor on every rank and broadcasts it.
        """
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

        shape, local = parameter.shape, rows.shape
        padded = torch.Size((self._shards.count * local[0], *shape[1:]))
        # A shape without memory.
        empty = torch.empty((), dtype=parameter.dtype, device=self._device).expand(padded)
        cut: Any = nn.Parameter(empty, requires_grad=False)
        self._init._convert_to_deepspeed_param(cut)
        cut.ds_tensor = rows.view(-1)
        cut.ds_tensor.ds_numel = rows.numel()
        cut.ds_tensor.status = PartitionedParamStatus.AVAILABLE
        cut.ds_tensor.final_location = None
        cut.ds_numel_aligned = padded.numel()
        cut.partition()  # Frees everything but the part that it has.
        cut.all_gather_coalesced = functools.partial(self._count, cut.all_gather_coalesced)
        cut.cut = Cut.of(rows, shape, self._shards)
        return cut

    def _count(self, gather: Callable[..., Any], parameters: Sequence[Any], **options: Any) -> Any:
        """Gather `parameters` with DeepSpeed's function `gather`, and count the bytes of the result."""
        parts = [parameter.ds_tensor for parameter in parameters]
        self._traffic.gathered_bytes += self._shards.count * sum(part.nbytes for part in parts)
        with sent_to(self._device, parameters):
            return gather(parameters, **options)


@contextlib.contextmanager
def sent_to(device: torch.device, parameters: Sequence[Any]) -> Iterator[None]:
    """Move the parts of `parameters` to `device` within this context, in the current (DeepSpeed's gather) stream.

    DeepSpeed would copy parts from host memory itself, and make the host wait for it.
    """
    parts = [parameter.ds_tensor for parameter in parameters]
    try:
        for parameter, values in zip(parameters, parts, strict=True):
            if values.device != device:
                sent: Any = values.to(device, non_blocking=True)
                sent.ds_numel, sent.status, sent.final_location = values.ds_numel, values.status, values.final_location
                parameter.ds_tensor = sent
        yield
    finally:
        for parameter, values in zip(parameters, parts, strict=True):
            parameter.ds_tensor = values


def passed_event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event after everything queued on `device` so far; None on a CPU, which has finished."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed and attach it to the existing process group, without compiling or printing."""
    # Otherwise it probes for installed devices, and warns about a missing GPU.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # Otherwise it probes which ops it can compile, and compiles for half a minute an op that nothing here calls.
        deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed calls an all-gather by the name that torch 2.13 warns about.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _numel(unit: _Unit) -> int:
    parameters: list[Any] = list(unit.parameters())
    return sum(math.prod(parameter.ds_shape) for parameter in parameters)


class OnDemand:
    """The experts of all layers, of which one layer's are gathered at most."""

    def __init__(self, model: CausalLM, rows: Mapping[nn.Parameter, Tensor], shards: Shards, traffic: Traffic) -> None:
        """Replace the fused weights of `model` (on meta) by parameters that are empty until tokens choose experts.

        `rows`: memory of this rank's rows of each. Raises UserError if there are none that can be gathered so.
        """
        self.shards, self.traffic = shards, traffic
        self.gathered: _FusedLayer | None = None
        layers = experts_of_batches(model, "parallel.experts=on_demand", "gathered")
        if not layers:
            raise UserError("parallel.experts=on_demand: this model runs its experts by code of its own; leave it out")
        for experts in layers:
            experts.gather = _FusedLayer(self, experts, rows).begin
        model.notes.append(f"of the experts of {len(layers):,} layers those are gathered that tokens chose")

    def release(self) -> None:
        """Free the experts that are gathered."""
        if self.gathered is not None:
            self.gathered.free()
            self.gathered = None


class _FusedLayer:
    """The fused weights of one layer."""

    def __init__(self, owner: OnDemand, experts: Experts, rows: Mapping[nn.Parameter, Tensor]) -> None:
        self._owner = owner
        self._weights: list[tuple[ExpertWeight, list[Any]]] = []
        """Each weight with its parameters."""
        self._present: set[int] = set()
        """Experts that are gathered."""
        for weight in experts.weights:
            weight.on_demand = True
            parameters = []
            for name, whole in list(weight.named_parameters(recurse=False)):
                parameter: Any = nn.Parameter(rows[whole].new_empty(0), requires_grad=False)
                parameter.cut = Cut.of(rows[whole], whole.shape, owner.shards)
                setattr(weight, name, parameter)
                parameters.append(parameter)
            self._weights.append((weight, parameters))

    def begin(self, choices: Tensor) -> Callable[[Tensor], Tensor]:
        """Gather the experts that (T, K) int64 `choices` of any rank name.

        Returns the identity whose backward gathers them again.
        """
        mask = choices.new_zeros(self._weights[0][0].num_experts, dtype=torch.uint8)
        masks = self._gather_bytes(mask.scatter_(0, choices.flatten(), 1))
        # The only read of the host.
        chosen = [expert for expert, is_chosen in enumerate(masks.amax(dim=0).tolist()) if is_chosen]
        self.gather(chosen, choices.device)
        return lambda output: _GatherAgain.apply(output, self, chosen)

    def gather(self, chosen: Collection[int], device: torch.device) -> None:
        """Gather those of the experts that are not there yet. Ranks agree on which these are."""
        with record_function("OnDemand::gather"):  # memory_meter.py recognizes it.
            if self._owner.gathered is not self:
                self._owner.release()
                self._owner.gathered = self
                for parameter in (each for _, parameters in self._weights for each in parameters):
                    parameter.data = undefined(parameter.cut.shape, parameter.dtype, device)
            missing = sorted(set(chosen) - self._present)
            for weight, parameters in self._weights if missing else ():
                self._fill(parameters, _runs(weight, missing))
            self._present.update(missing)

    def free(self) -> None:
        """Free the weights."""
        self._present.clear()
        for parameter in (each for _, parameters in self._weights for each in parameters):
            parameter.data = parameter.data.new_empty(0)

    def _fill(self, parameters: Sequence[Any], runs: Sequence[tuple[int, int]]) -> None:
        """Gather rows of dim 0, in runs of (first, end), of parameters that share it: one all-gather of bytes."""
        shards, cuts, device = self._owner.shards, [parameter.cut for parameter in parameters], parameters[0].device
        per_rank = len(cuts[0].padded)
        pieces = [_within(runs, low, low + per_rank) for low in range(0, shards.count * per_rank, per_rank)]
        # Ranks send equally many rows: those behind a rank's own are undefined.
        most = max(place.stop for piece in pieces for _, place in piece)
        sizes = [most * cut.padded[0].nbytes for cut in cuts]

        def by_parameter(sent: Tensor) -> list[Tensor]:
            """View what a rank sends as rows of each parameter."""
            sections = zip(cuts, sent.split(sizes), strict=True)
            return [section.view(cut.padded.dtype).view(most, *cut.shape[1:]) for cut, section in sections]

        sent = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        for cut, section in zip(cuts, by_parameter(sent), strict=True):
            for rows, place in pieces[shards.index]:
                section[place].copy_(
                    cut.rows[rows.start - cut.first_row : rows.stop - cut.first_row], non_blocking=True
                )
        for received, piece in zip(self._gather_bytes(sent), pieces, strict=True):
            for parameter, section in zip(parameters, by_parameter(received), strict=True):
                for rows, place in piece:
                    parameter.data[rows] = section[place]

    def _gather_bytes(self, sent: Tensor) -> Tensor:
        """Return (N, n) of all ranks' (n,) uint8."""
        received = sent.new_empty(self._owner.shards.count, len(sent))
        all_gather(received, sent[None], group=self._owner.shards.group)
        self._owner.traffic.gathered_bytes += received.nbytes
        return received


def undefined(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for a weight. Pages of a CPU that no expert is written to take none."""
    return torch.empty(shape, dtype=dtype, device=device)


def _runs(weight: ExpertWeight, experts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, end) of the runs of dim 0 that hold the sorted experts; neighbours may share a group."""
    runs: list[tuple[int, int]] = []
    for expert in experts:
        first, end = expert, expert + 1
        if weight.format is not None:
            first, end = weight.format.groups_of_expert(weight.shape, expert)
        if runs and first <= runs[-1][1]:
            first, _ = runs.pop()
        runs.append((first, end))
    return runs


def _within(runs: Sequence[tuple[int, int]], low: int, high: int) -> list[tuple[slice, slice]]:
    """Return the rows of the runs from `low` to before `high`, each with its place among all of these."""
    pieces, at = [], 0
    for first, end in runs:
        first, end = max(first, low), min(end, high)
        if first < end:
            pieces.append((slice(first, end), slice(at, at := at + end - first)))
    return pieces


class _GatherAgain(torch.autograd.Function):
    """Identity of the experts' output, whose backward gathers the experts of its forward."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer: _FusedLayer, chosen: Sequence[int]) -> Tensor:
        ctx.layer, ctx.chosen = layer, chosen
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.layer.gather(ctx.chosen, gradient.device)
        return gradient, None, None
