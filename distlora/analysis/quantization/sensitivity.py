"""Estimate how much errors of each weight change a model's predictions, from one backward per sequence.

To second order, weights that are off by d diverge from the model by KL = d^T F d / 2 with the Fisher information F, the
covariance of the gradients of log p(y) for tokens y that the model itself draws. Rounding errors are as good as
independent, so F's diagonal is enough: the mean squares of the gradients. Of those of a weight (O, I) the sums of rows
and of columns are kept, as Adafactor does (arXiv 1804.04235): F_ij = rows_i columns_j / sum.

The gradient of one weight at a time exists, in fp32, beside the model and the activations of one sequence. The model
may be in any format: F is about the same at its NF4 weights.

Letters: E experts (1 of a linear), O out features, I in features, T tokens, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.data.loader import MicroBatch, StepLoader
from distlora.data.rows import PackedRows
from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertWeight
from distlora.model.frozen_linear import FrozenLinear
from distlora.model.lm_head import IGNORED_LABEL, LossHead
from distlora.parallel import Ranks
from distlora_kernels.operands import Routing

LOGITS_AT_ONCE = 2**24
"""Logits of a chunk of tokens."""


@dataclass(slots=True)
class Sensitivity:
    """The diagonal of a weight's Fisher information in nats per token, factored. (E, n, m): each matrix as stored."""

    rows: Tensor
    """(E, n) fp32: sums over columns."""
    columns: Tensor
    """(E, m) fp32: sums over rows."""

    def of(self, start: int, count: int) -> Tensor:
        """Return the diagonal for `count` weights of the flat weight from `start` on."""
        (num_rows, width), stop = (self.rows.shape[1], self.columns.shape[1]), start + count
        first = start // width
        numbers = torch.arange(first, -(-stop // width), device=self.rows.device)
        experts = numbers // num_rows
        totals = self.rows.sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        values = (self.rows.view(-1)[numbers] / totals[experts])[:, None] * self.columns[experts]
        return values.view(-1)[start - first * width :][:count]


class _Collector:
    """Sums of squared gradients of the weights of a model, while it runs forward and backward."""

    def __init__(self, model: CausalLM) -> None:
        self.found: dict[str, Sensitivity] = {}
        self._handles = []
        for path, module in model.named_modules():
            if isinstance(module, (FrozenLinear, ExpertWeight)):
                hook = functools.partial(self._watch, model.hf_name(f"{path}.weight"))
                self._handles.append(module.register_forward_hook(hook))

    def _watch(self, name: str, module: FrozenLinear | ExpertWeight, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:  # False in the forward before a recomputation.
            routing = inputs[1] if isinstance(module, ExpertWeight) else None
            output.register_hook(functools.partial(self._add, name, module, inputs[0].detach(), routing))

    @torch.no_grad()
    def _add(
        self, name: str, module: FrozenLinear | ExpertWeight, x: Tensor, routing: Routing | None, gradient: Tensor
    ) -> None:
        x, gradient = x.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        if name not in self.found:
            shape = module.shape if len(module.shape) == 3 else (1, *module.shape)
            rows, columns = (torch.zeros(shape[0], size, device=x.device) for size in shape[1:])
            self.found[name] = Sensitivity(rows, columns)
        sums, transposed = self.found[name], isinstance(module, ExpertWeight) and module.transposed
        ends = [len(x)] if routing is None else routing.ends.tolist()
        for expert, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            left, right = (x, gradient) if transposed else (gradient, x)
            squares = (left[start:stop].T @ right[start:stop]).square_()
            sums.rows[expert] += squares.sum(1)
            sums.columns[expert] += squares.sum(0)

    def remove(self) -> None:
        """Take the hooks from the model."""
        for handle in self._handles:
            handle.remove()


def measure_sensitivity(
    model: CausalLM, rows: PackedRows, ranks: Ranks, say: Callable[[str], None]
) -> dict[str, Sensitivity]:
    """Return the sensitivities of the weights of the decoder layers by Hugging Face name, on one process.

    Equal on every run of one machine: tokens are drawn from a generator with seed 0.
    """
    collector, generator = _Collector(model), torch.Generator(ranks.device).manual_seed(0)
    loader = StepLoader(rows, global_batch=1, micro_batch=1, rank=0, world=1, seed=0, shuffle=False)
    targets = 0
    for step in range(len(rows)):
        (batch,) = loader.batch(step).micro_batches
        inputs = (each.to(ranks.device) for each in (batch.input_ids, batch.position_ids, batch.labels))
        documents = Documents.of(batch.position_ids).to(ranks.device) if model.attends_by_documents else None
        last: list[Tensor] = []
        with model.head.read_by(last.append):
            model(*inputs, documents=documents)
        gradient, count = _gradient_of_drawn(model.head, last[0], batch, generator)
        last[0].backward(gradient)
        targets += count
        say(f"harm: {step + 1:,}/{len(rows):,} sequences")
    collector.remove()
    for parameter in model.parameters():
        parameter.grad = None
    for sums in collector.found.values():
        sums.rows /= targets
        sums.columns /= targets
    return collector.found


def _gradient_of_drawn(
    head: LossHead, hidden: Tensor, batch: MicroBatch, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return the gradient at the last hidden states (1, T, H) of -log p of tokens drawn from p, and their number."""
    places = (batch.labels[0] != IGNORED_LABEL).to(hidden.device).nonzero()[:, 0]
    gradient = torch.zeros_like(hidden)
    for part in places.split(max(16, LOGITS_AT_ONCE // head.num_rows)):
        with torch.enable_grad():
            states = hidden.detach()[0, part].requires_grad_()
            logits = head.logits(states).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            (gradient[0, part],) = torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), states)
    return gradient, len(places)
