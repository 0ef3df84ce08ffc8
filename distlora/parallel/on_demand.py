"""Gather only the experts that tokens chose, of one layer at a time (parallel.experts=on_demand).

The fused weights leave ZeRO-3's units. A rank keeps the same rows of them, on its device or in host memory. When the
experts of a layer run, the ranks of a replica exchange which experts their tokens chose, the host reads that (once per
layer and forward), and each rank sends its rows of those that some token of some rank chose. They are written where
they lie in the whole weight, so nothing else knows about it; the other rows are undefined, and no product reads them.
Every rank must run the same layers in the same order.

Letters: T tokens, K experts per token, E experts, N ranks of a replica.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.profiler import record_function

from distlora.config import UserError
from distlora.model.build import CausalLM
from distlora.model.experts import Experts, ExpertWeight
from distlora.parallel.expert_parallel import experts_of_batches
from distlora.parallel.ranks import Traffic
from distlora.parallel.shards import Cut, Shards, all_gather


class OnDemand:
    """The experts of all layers, of which one layer's are gathered at most."""

    def __init__(self, model: CausalLM, rows: Mapping[nn.Parameter, Tensor], shards: Shards, traffic: Traffic) -> None:
        """Replace the fused weights of `model` (on meta) by parameters that are empty until tokens choose experts.

        `rows`: memory of this rank's rows of each. Raises UserError if there are none that can be gathered so.
        """
        self.shards, self.traffic = shards, traffic
        self.gathered: _Layer | None = None
        layers = experts_of_batches(model, "parallel.experts=on_demand", "gathered")
        if not layers:
            raise UserError("parallel.experts=on_demand: this model runs its experts by code of its own; leave it out")
        for experts in layers:
            experts.gather = _Layer(self, experts, rows).begin
        model.notes.append(f"of the experts of {len(layers):,} layers those are gathered that tokens chose")

    def release(self) -> None:
        """Free the experts that are gathered."""
        if self.gathered is not None:
            self.gathered.free()
            self.gathered = None


class _Layer:
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
        shards, cuts, device = self._owner.shards, [each.cut for each in parameters], parameters[0].device
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
    def forward(ctx: Any, output: Tensor, layer: _Layer, chosen: Sequence[int]) -> Tensor:
        ctx.layer, ctx.chosen = layer, chosen
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.layer.gather(ctx.chosen, gradient.device)
        return gradient, None, None
