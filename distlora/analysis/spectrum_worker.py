"""The worker of `distlora analyze spectrum`: each decoder weight before and after training, and its singular values.

Before is the initial weight: the base as training stores it (through NF4), for PiSSA with the initial adapter added.
After includes the adapter, or is the fully fine-tuned weight. Letters: O out features, I in features, R rank, E
experts. With p_i = s_i / sum s: effective rank exp(-sum p_i ln p_i) (Roy and Vetterli 2007), stable rank
||dW||_F^2 / s_1^2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora.analysis import in_a_block, layer_of, linear_of
from distlora.analysis.singular import Singular, largest, of_factors, similarity, whole
from distlora.analysis.spectrum import SpectrumRequest, record
from distlora.architecture.safetensors_headers import read_headers
from distlora.config import UserError
from distlora.config.errors import named_settings
from distlora.loading.load_base import find_base
from distlora.post.load_trained import check_base_unchanged, made_on, weights_in
from distlora.post.merged_parameters import open_adapter
from distlora.post.trained import BY_PLACE, Trained
from distlora.post.weights import BaseWeight, Factors, OpenBase, adapted_rows, open_base, read_factors
from distlora.run_folder.layout import CHECKPOINTS, STATE_NAME, newest, read_result, step_of
from distlora.system.progress import ProgressLines
from distlora.weights.conversion import ParameterSource
from distlora.weights.decompose import times, transposed_times
from distlora.weights.peft_folder import PeftAdapter
from distlora.weights.reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixChange:
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

    def to(self, device: torch.device) -> MatrixChange:
        """Return the change with its tensors on `device`."""
        moved = None
        if self.factors is not None:
            moved = dataclasses.replace(self.factors, A=self.factors.A.to(device), B=self.factors.B.to(device))
        return dataclasses.replace(self, before=self.before.to(device), after=self.after.to(device), factors=moved)


class Changes:
    """The changes of one run or adapter, read on demand."""

    def __init__(
        self,
        method: str,
        folder: Path,
        base: OpenBase,
        *,
        adapter: PeftAdapter | None,
        saved: Mapping[str, ParameterSource],
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

    def of(self, name: str, reader: Reader) -> Iterator[MatrixChange]:
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
            yield MatrixChange(
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
        check_base_unchanged(folder, trained)
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
    checkpoint, _ = newest(trained.run_dir / CHECKPOINTS)
    step = None if checkpoint is None else step_of(checkpoint)
    return published if checkpoint is None or step != read_result(trained.run_dir).step else checkpoint


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


MOST_VALUES = 512
"""Singular values of one dW in the JSON."""
NO_RANK = 1e-6
"""Share of the largest singular value of s B A below which others are fp32 rounding."""


def analyse(request: SpectrumRequest) -> dict[str, Any]:
    """Everything that the request asks for; tables on stdout, progress on stderr."""
    say = ProgressLines()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(open_changes(request.first.read()))
        against = None if request.second is None else stack.enter_context(open_changes(request.second.read()))
        figures = analysed(request, first, against, device, say)
    record(figures).write(Path(request.out), "spectrum")
    return figures


def analysed(
    request: SpectrumRequest, first: Changes, against: Changes | None, device: torch.device, say: ProgressLines
) -> dict[str, Any]:
    """spectrum.json."""
    names = [name for name in first.names if against is None or name in against.names]
    if not names:
        raise UserError(
            f"{request.first_name} and {request.second_name} changed no weight in common, so there is nothing to "
            "compare; leave out --against, or name another run"
        )
    say.line(f"{len(names):,} weights of {first.folder}" + (f" and {against.folder}" if against else ""))
    figures = describe(request, first, against, device) | {"left_out": len(first.names) - len(names)}
    figures["weights"] = list(measured(names, first, against, request, device, say))
    figures["first"] = together(figures["weights"])
    if against is not None:
        figures["against"] = together([weight["against"] for weight in figures["weights"]])
    return figures


def measured(
    names: list[str],
    first: Changes,
    against: Changes | None,
    request: SpectrumRequest,
    device: torch.device,
    say: ProgressLines,
) -> Iterator[dict[str, Any]]:
    """Yield an entry for each matrix."""
    began, total, done = time.monotonic(), sum(map(first.numel, names)), 0
    with Reader() as reader, Reader() as other_reader:
        for number, name in enumerate(names, start=1):
            others = iter(()) if against is None else against.of(name, other_reader)
            for change in first.of(name, reader):
                moved = change.to(device)
                entry, delta = measure(moved, request)
                other = next(others, None)
                if other is not None:
                    entry["against"], theirs = measure(other.to(device), request)
                    entry["angles"] = compared(entry, moved, delta, other.to(device), theirs, request)
                yield entry
            done += first.numel(name)
            left = (time.monotonic() - began) * (total - done) / done
            say(f"{number:,}/{len(names):,} weights, {name}; {left / 60:,.0f} min left")


def compared(
    entry: dict[str, Any], change: MatrixChange, delta: Any, other: MatrixChange, theirs: Any, request: SpectrumRequest
) -> dict[str, Any] | None:
    """Principal angles between the two dW: over the smaller of their ranks, or `top` where neither has a low one."""
    ranks = [e["delta"]["rank"] for e in (entry, entry["against"]) if e["delta"]["rank"] is not None]
    rank = min([r for r in ranks if r < min(change.before.shape)] or [request.top])
    if rank == 0 or not len(delta.values) or not len(theirs.values):
        return None
    # Of a large dense dW only the first few were found so far.
    if len(delta.values) < rank:
        delta = largest(change.delta(), rank)
    if len(theirs.values) < rank:
        theirs = largest(other.delta(), rank)
    other_delta = entry["against"]["delta"]
    dense = other.delta() if other_delta["rank"] is None else None
    return angles(delta, theirs, rank, other_delta["norm"], dense)


@torch.no_grad()
def measure(change: MatrixChange, request: SpectrumRequest) -> tuple[dict[str, Any], Singular]:
    """Return the figures of one matrix and dW's singular triples (of a large dense dW the first `top`)."""
    delta, is_whole, norm = _delta_of(change, request)
    overlap, before, after = similarity(
        change.before, change.after, request.top, request.thresholds, exact_up_to=request.exact_up_to
    )
    counts = {f"{threshold:g}": overlap.counts(threshold) for threshold in request.thresholds}
    norm_before = float(torch.linalg.vector_norm(change.before, dtype=torch.float64))
    largest_value = float(delta.values[0]) if len(delta.values) else 0.0
    figures = {
        "name": change.name,
        "layer": change.layer,
        "linear": change.linear,
        "shape": list(change.before.shape),
        "whole": min(change.before.shape) <= request.exact_up_to,
        "before": {"norm": norm_before, "values": _listed(before.values[: request.top])},
        "after": {"values": _listed(after.values)},
        "delta": {
            "rank": int((delta.values > NO_RANK * largest_value).sum()) if is_whole else None,
            "norm": norm,
            "relative_norm": norm / norm_before if norm_before else None,
            "relative_spectral_norm": largest_value / float(before.values[0]) if len(before.values) else None,
            "stable_rank": (norm / largest_value) ** 2 if largest_value else None,
            "effective_rank": effective_rank(delta.values) if is_whole and largest_value else None,
            "values": _listed(delta.values[:MOST_VALUES]),
        },
        "intruders": {
            "cosines": [[float(low), float(high)] for low, high in zip(overlap.lower, overlap.upper, strict=True)],
            "nearest": overlap.own.tolist(),
            "counts": {key: {"intruders": certain, "undecided": open_} for key, (certain, open_) in counts.items()},
        },
    }
    return figures, delta


def _delta_of(change: MatrixChange, request: SpectrumRequest) -> tuple[Singular, bool, float]:
    """(dW's triples, whether these are all, ||dW||_F)."""
    if change.factors is not None:
        triples = of_factors(change.factors.A, change.factors.B, change.factors.scaling)
        return triples, True, float(torch.linalg.vector_norm(triples.values))
    dense = change.delta()
    norm = float(torch.linalg.vector_norm(dense, dtype=torch.float64))
    if norm == 0:
        nothing = torch.zeros(0, dtype=torch.float64, device=dense.device)
        return Singular(dense[:, :0].double(), nothing, dense.T[:, :0].double(), nothing), True, 0.0
    if min(dense.shape) <= request.exact_up_to:
        return whole(dense), True, norm
    return largest(dense, request.top).first(request.top), False, norm


def effective_rank(values: Tensor) -> float:
    """Return the exponential of the entropy of the normalized singular values."""
    shares = values[values > 0] / values.sum()
    return math.exp(-float((shares * shares.log()).sum()))


def angles(first: Singular, second: Singular, rank: int, norm: float, dense_OI: Tensor | None) -> dict[str, Any]:
    """Return the cosines of the principal angles between two dW (Bjorck and Golub 1973).

    The spaces are those of the first `rank` singular vectors. Also returns what two random spaces of these sizes
    share, and how much of the second's energy lies in the first's spaces. `norm` is that of the whole second dW, which
    is `dense_OI` where `second` holds the first of its triples alone.
    """
    sides = {}
    for side in ("left", "right"):
        mine, theirs = getattr(first, side)[:, :rank], getattr(second, side)
        cosines = torch.linalg.svdvals(mine.T @ theirs[:, :rank])
        if dense_OI is None:
            inside = (mine.T @ theirs) * second.values
        else:
            inside = times(dense_OI, mine) if side == "right" else transposed_times(dense_OI, mine)
        sides[side] = {
            "cosines": _listed(cosines.clamp_max(1)),
            "shared": float(cosines.square().mean()),
            "by_chance": min(1.0, cosines.shape[0] / len(mine)),
            "energy": float(inside.square().sum()) / norm**2,
        }
    return {"rank": rank, **sides}


def grouped(weights: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """Return sums over the weights of each group."""
    total = sum(weight["delta"]["norm"] ** 2 for weight in weights)
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for weight in weights:
        groups.setdefault(key(weight), []).append(weight)
    return {str(name): summed(members, total) for name, members in groups.items()}


def summed(weights: Sequence[Mapping[str, Any]], total: float | None = None) -> dict[str, Any]:
    """One line of a table. `total`: the energy that a share is of."""
    energy = sum(weight["delta"]["norm"] ** 2 for weight in weights)
    before = sum(weight["before"]["norm"] ** 2 for weight in weights)
    keys = weights[0]["intruders"]["counts"].keys()
    return {
        "weights": len(weights),
        "energy_share": None if not total else energy / total,
        "relative_norm": math.sqrt(energy / before) if before else None,
        "effective_rank": _mean([weight["delta"]["effective_rank"] for weight in weights]),
        "stable_rank": _mean([weight["delta"]["stable_rank"] for weight in weights]),
        "vectors": sum(len(weight["intruders"]["cosines"]) for weight in weights),
        "counts": {
            key: {
                what: sum(weight["intruders"]["counts"][key][what] for weight in weights)
                for what in ("intruders", "undecided")
            }
            for key in keys
        },
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _listed(values: Tensor) -> list[float]:
    return [float(value) for value in values]


def together(weights: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of one run."""
    return {
        "overall": summed(weights),
        "layers": grouped(weights, lambda weight: weight["layer"]),
        "linears": grouped(weights, lambda weight: weight["linear"]),
    }


def describe(request: SpectrumRequest, first: Changes, against: Changes | None, device: torch.device) -> dict[str, Any]:
    """Return the environment of the figures."""
    runs = {"first": (request.first_name, first), "against": (request.second_name, against)}
    command = f"distlora analyze spectrum {request.first_name}"
    if against is not None:
        command += f" --against {request.second_name}"
    return made_on(device, "torch") | {
        "command": command,
        "top": request.top,
        "thresholds": list(request.thresholds),
        "exact_up_to": request.exact_up_to,
        "runs": {
            key: {"name": name, "method": changes.method, "weights": changes.folder.name, "rounded": changes.rounded_to}
            for key, (name, changes) in runs.items()
            if changes is not None
        },
    }


def run(request: SpectrumRequest) -> None:
    """Analyze."""
    analyse(request)
