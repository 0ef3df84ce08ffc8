"""Detect trained parameters and token rows that get no gradient in the first steps: they would stay as they started."""

from __future__ import annotations

import torch
from torch import nn

from distlora.model.build import CausalLM
from distlora.parallel import Backend

WATCHED = 5
"""Number of steps that are checked. In the first one A has no gradient, because B is zero."""


class GradientWatch:
    """Record, on the device, of which `parameters` (as the optimizer has them) had a nonzero gradient."""

    def __init__(self, model: CausalLM, parameters: dict[str, nn.Parameter]) -> None:
        self._rows = {f"token_rows.{matrix}.rows": matrix for matrix in model.token_rows}
        """Parameters that are checked row by row, and the matrix that they belong to."""
        self._model, self._parameters = model, parameters
        self._seen: dict[str, torch.Tensor] = {}
        self.steps = 0

    def note(self) -> None:
        """Record the gradients of one step, after they have been summed over the ranks."""
        self.steps += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                hit = parameter.grad != 0  # NaN counts as a gradient.
                hit = hit.any(dim=1) if name in self._rows else hit.any()
                if name in self._seen:
                    self._seen[name] |= hit
                else:
                    self._seen[name] = hit

    def missing(self, backend: Backend) -> list[str]:
        """Return the names of parameters without gradient on any rank. Every rank must call it; reads the device."""
        names = list(self._parameters)
        sizes = [len(p) if name in self._rows else 1 for name, p in self._parameters.items()]
        flags = torch.zeros(sum(sizes), device=backend.ranks.device)
        for name, part in zip(names, flags.split(sizes), strict=True):
            if name in self._seen:
                part.copy_(self._seen[name].expand(len(part)))
        reached = backend.max_over_ranks(flags).tolist()
        labels = [label for name in names for label in self._labels(name)]
        return [label for label, is_reached in zip(labels, reached, strict=True) if not is_reached]

    def _labels(self, name: str) -> list[str]:
        """Return the name of a parameter, or of each of its rows."""
        if name not in self._rows:
            return [self._model.hf_name(name)]
        rows = self._model.rows_of(self._rows[name])
        texts = {id: f" ({text})" for text, id in self._model.vocabulary.new.items()}
        assert rows is not None
        return [f"row {id}{texts.get(id, '')} of {self._rows[name]}" for id in rows.ids]


def describe_unused(missing: list[str], steps: int) -> str:
    """Return the log line about unused parameters."""
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return (
        f"no gradient has reached {', '.join(missing[:8])}{more} in the first {steps} steps: as long as none "
        "does, they stay as they started"
    )
