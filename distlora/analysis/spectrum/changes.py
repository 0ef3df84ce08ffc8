"""Read each decoder weight before and after training, one matrix at a time.

Before is the initial weight: the base as training stores it (through NF4), for PiSSA with the initial adapter added.
After includes the adapter, or is the fully fine-tuned weight. Letters: O out features, I in features, R rank, E
experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distlora.analysis.naming import in_a_block, layer_of, linear_of
from distlora.architecture.safetensors_headers import read_headers
from distlora.config.errors import named_settings
from distlora.loading.load_base import find_base
from distlora.post.load_trained import check_base, weights_in
from distlora.post.merge.parameters import open_adapter
from distlora.post.trained import BY_PLACE, Trained
from distlora.post.weights import Base, BaseWeight, Factors, adapted_rows, open_base, read_factors
from distlora.run_folder.layout import CHECKPOINTS, STATE_NAME, newest, read_result, step_of
from distlora.weights.conversion import Source
from distlora.weights.peft_folder import PeftAdapter
from distlora.weights.reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One matrix, fp32."""

    name: str
    """Weight name; an expert's has its number: model.layers.0.mlp.experts.down_proj[3]."""
    layer: int
    linear: str
    before: Tensor
    """(O, I)."""
    after: Tensor
    """(O, I)."""
    factors: Factors | None
    """Factors if after - before is exactly scaling * B A."""

    def delta(self) -> Tensor:
        """After - before, (O, I) fp32."""
        return self.after - self.before if self.factors is None else self.factors.delta()

    def to(self, device: torch.device) -> Change:
        """Return the change with its tensors on `device`."""
        moved = None
        if self.factors is not None:
            moved = dataclasses.replace(self.factors, A=self.factors.A.to(device), B=self.factors.B.to(device))
        return dataclasses.replace(self, before=self.before.to(device), after=self.after.to(device), factors=moved)


class Changes:
    """The changes of one run or adapter, read on demand."""

    def __init__(
        self, method: str, folder: Path, base: Base, *, adapter: PeftAdapter | None, saved: Mapping[str, Source]
    ) -> None:
        """`adapter` is one for the unchanged base; without one, `saved` says where each weight lies."""
        self.method = method
        self.folder = folder
        """Folder of the trained weights."""
        self._adapter, self._saved = adapter, saved
        self._before = base.weights
        if adapter is None:
            weights = {name for name, weight in base.weights.items() if in_a_block(name) and len(weight.shape) > 1}
            paths = {name: name for name in weights & saved.keys()}
        else:
            paths = {path if path in base.weights else f"{path}.weight": path for path in adapter.paths}
        self._paths = {name: paths[name] for name in base.weights if name in paths}

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the changed weights in the model's order."""
        return tuple(self._paths)

    @property
    def rounded_to(self) -> str | None:
        """The 16-bit type that full fine-tuning's weights are read in, which dW then has the rounding of."""
        kinds = {segment.dtype for source in self._saved.values() for segment in source.segments} - {"F32"}
        return min(kinds) if kinds else None

    def numel(self, name: str) -> int:
        """Return the number of elements of a changed weight."""
        return self._before[name].numel

    def of(self, name: str, reader: Reader) -> Iterator[Change]:
        """Yield the change of a weight's matrix, or of each of its experts."""
        weight = self._before[name]
        factors = None
        if self._adapter is not None:
            experts = weight.shape[0] if len(weight.shape) == 3 else None
            factors = read_factors(self._adapter, self._paths[name], reader, experts=experts)
        others: Iterable[Tensor | None] = itertools.repeat(None)
        if self._adapter is None:
            saved = BaseWeight(name=name, shape=weight.shape, source=self._saved[name])
            others = _matrices(saved, reader)
        both = zip(_matrices(weight, reader), others, strict=False)
        for number, (before, after) in enumerate(both):
            label = name if len(weight.shape) == 2 else f"{name}[{number}]"
            if weight.transposed:
                before, after = before.T.contiguous(), None if after is None else after.T.contiguous()
            kept = None
            if factors is not None:
                own = factors if len(weight.shape) == 2 else _of_expert(factors, number)
                before = _with_start(weight, before)
                after = adapted_rows(before, 0, own)
                kept = own if own.magnitude is None else None
            assert after is not None
            yield Change(
                name=label, layer=layer_of(name), linear=linear_of(name), before=before, after=after, factors=kept
            )


@contextlib.contextmanager
def open_changes(trained: Trained) -> Iterator[Changes]:
    """Open the changes of a trained model. Raises UserError for weights of another base and damaged ones."""
    spec = trained.spec
    assert trained.weights is not None, f"{trained.place}: a base alone has not changed"
    base = open_base(spec, trained.initial_adapter_dir)
    if spec.adapter.method == "full":
        folder = weights_in(trained.weights)
        check_base(folder, trained)
        folder = masters(trained, folder)
        yield Changes("full", folder, base, adapter=None, saved=find_base(base.model, read_headers(folder)))
        return
    # Onto the original: as a plain LoRA for the unchanged base, whatever it began as.
    with named_settings(BY_PLACE), open_adapter(trained, base, "original") as adapter:
        assert adapter is not None
        method = "DoRA" if spec.adapter.use_dora else "LoRA"
        yield Changes(method, adapter.folder, base, adapter=adapter.file, saved={})


def _with_start(weight: BaseWeight, before: Tensor) -> Tensor:
    """Return the initial weight of a PiSSA run: the base with the initial adapter added back."""
    if weight.residual is None:
        return before
    (a, b), scaling = weight.residual.start, weight.residual.scaling
    return torch.addmm(before, b, a, alpha=scaling)


def masters(trained: Trained, published: Path) -> Path:
    """Return the last checkpoint of full fine-tuning, which holds the fp32 masters, if it is what was published.

    The published weights are rounded to the base's dtype, which a small dW does not survive unchanged.
    """
    if trained.run_dir is None or (published / STATE_NAME).is_file():
        return published
    found, _ = newest(trained.run_dir / CHECKPOINTS)
    step = None if found is None else step_of(found)
    return published if found is None or step != read_result(trained.run_dir).step else found


def _matrices(weight: BaseWeight, reader: Reader) -> Iterator[Tensor]:
    """(rows, columns) fp32: the weight, or each of its experts."""
    matrix, filled = torch.empty(weight.shape[-2:]), 0
    for _, rows in weight.rows(reader):
        while len(rows):
            taken = rows[: len(matrix) - filled]
            matrix[filled : filled + len(taken)] = taken
            filled, rows = filled + len(taken), rows[len(taken) :]
            if filled == len(matrix):
                yield matrix
                matrix, filled = torch.empty(weight.shape[-2:]), 0


def _of_expert(factors: Factors, number: int) -> Factors:
    return dataclasses.replace(factors, A=factors.A[number], B=factors.B[number])
