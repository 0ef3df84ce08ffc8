"""Count the tokens that choose each expert of each layer in training.

The counts stay on the device and are read with the metrics. Padding, recomputation, evaluations and a step that was
begun but not done do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import numpy as np
import torch

from distlora.model.build import CausalLM
from distlora.model.experts import Experts
from distlora.parallel import Backend
from distlora.run_folder.expert_load import ExpertTokens, idle_experts, imbalance, layers_text


class ExpertLoad:
    """Load of the experts of one run, over all ranks and earlier starts."""

    def __init__(
        self, model: CausalLM, device: torch.device, before: ExpertTokens | None, *, step: int = 0, decays: bool = False
    ) -> None:
        """Let the model's layers count from now on.

        `before`: the load of the steps before this start, which is at `step`. `decays`: the optimizer decays weights.
        """
        experts = expert_modules(model)
        self.adapted = [layer for layer, module in experts.items() if any(weight.pairs for weight in module.weights)]
        """Layers whose experts have adapters."""
        self.since = step if before is None else 0
        """Step after which all tokens are counted: above 0 where a checkpoint has no load."""
        pairs = (pair for module in experts.values() for weight in module.weights for pair in weight.pairs)
        self._moves_idle = decays or any(pair.shared is not None for pair in pairs)
        sizes = {layer: module.weights[0].num_experts for layer, module in experts.items()}
        known = {layer: (before or {}).get(layer, []) for layer in sizes}
        self._before = {n: np.array(known[n] if len(known[n]) == size else [0] * size) for n, size in sizes.items()}
        self.tokens: ExpertTokens = {layer: counts.tolist() for layer, counts in self._before.items()}
        """Load of all steps up to the last one that was read."""
        self._sizes = list(sizes.values())
        self._counts = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._done = torch.zeros_like(self._counts)
        for layer, counts in zip(sizes, self._counts.split(self._sizes), strict=True):
            model.blocks[layer].context.expert_tokens = counts
        model.counts_expert_tokens = True

    def note_step(self) -> None:
        """Mark the tokens so far as those of complete steps."""
        self._done.copy_(self._counts)

    def read(self, backend: Backend) -> dict[str, float]:
        """Read the load up to the last complete step. Return the metrics of the steps since the last read.

        Every rank must call it.
        """
        counts = backend.sum_over_ranks(self._done.clone()).cpu().split(self._sizes)
        read = {n: before + part.numpy() for (n, before), part in zip(self._before.items(), counts, strict=True)}
        new = [imbalance((now - np.array(self.tokens[layer])).tolist()) for layer, now in read.items()]
        self.tokens = {layer: now.tolist() for layer, now in read.items()}
        idle = sum(not count for counts in self.tokens.values() for count in counts)
        return {
            "experts/imbalance": fmean(new),
            "experts/imbalance_max": max(new),
            "experts/unused": idle / sum(self._sizes),
        }

    def figures(self) -> dict[str, float | list[str]]:
        """Return the run's figures for summary.json."""
        return {
            **({"expert_load_since_step": self.since} if self.since else {}),
            "expert_imbalance": fmean(map(imbalance, self.tokens.values())),
            "experts_without_tokens": [f"layer {layer}: {experts}" for layer, experts in self._idle.items()],
            "expert_layers_without_adapter": [str(layer) for layer in self.tokens if layer not in self.adapted],
        }

    @property
    def _idle(self) -> dict[int, str]:
        return idle_experts(self.tokens)

    def describe(self) -> Iterator[str]:
        """Yield lines for the end of the log: how the load was spread, experts without tokens or adapters."""
        if self.since:
            yield f"the load of the experts is counted since step {self.since:,}: the state that was resumed had none"
        layer = max(self.tokens, key=lambda layer: imbalance(self.tokens[layer]))
        yield (
            f"the busiest expert of a layer got {fmean(map(imbalance, self.tokens.values())):.2f} x the mean load on "
            f"average, {imbalance(self.tokens[layer]):.2f} x in layer {layer}"
        )
        if self._idle:
            count = sum(not number for tokens in self.tokens.values() for number in tokens)
            shown = [f"layer {layer}: {experts}" for layer, experts in self._idle.items()]
            more = f"; {len(shown) - 8} more layers in summary.json" if len(shown) > 8 else ""
            unchanged = self.adapted and not (self.since or self._moves_idle)
            start = ", whose adapters are as they started" if unchanged else ""
            yield f"no token chose {count:,} of {sum(self._sizes):,} experts{start}: {'; '.join(shown[:8])}{more}"
        if self.adapted and (frozen := [layer for layer in self.tokens if layer not in self.adapted]):
            yield f"the experts of {layers_text(frozen)} are frozen: they have no adapters"


def expert_modules(model: CausalLM) -> dict[int, Experts]:
    """Return the mixtures of experts by the index of their layer."""
    return {
        index: module
        for index, block in enumerate(model.blocks)
        for module in block.modules()
        if isinstance(module, Experts)
    }
