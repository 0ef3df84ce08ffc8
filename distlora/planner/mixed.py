"""Choose a format for each weight by measured harm within a size: quant=mixed. Imports no torch.

The harm of weights adds up (it is a second-order estimate), so the choice is a knapsack problem in which each weight
takes one of a few sizes. Dynamic programming over the bytes above the smallest choice solves it exactly, up to
rounding those bytes up to 1 / STEPS of what there is to spend. The result depends on nothing but the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distlora.config import QuantConfig, UserError, require
from distlora.config.base import DENSE, MIXED_FORMATS
from distlora.config.json_files import read_object
from distlora_kernels.format_layouts import FORMAT_LAYOUTS

RESULT_NAME = "quantization.json"
"""File of an analysis in which the tensors are listed with the harm of each format."""
STEPS = 20_000
"""Parts of what there is to spend above the smallest choice; fewer if all sizes are multiples of a larger part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredWeight:
    """A weight with the harm of each format."""

    name: str
    shape: tuple[int, ...]
    harm: Mapping[str, float]
    """Divergence from the unquantized model in nats per token that each format causes, estimated."""

    def num_bytes(self, format: str, itemsize: int) -> int:
        """Return the stored bytes in a format; `itemsize` is that of dense weights."""
        if format == DENSE:
            return math.prod(self.shape) * itemsize
        return FORMAT_LAYOUTS[format].num_bytes(self.shape)


def with_formats(quant: QuantConfig, dtype: str) -> QuantConfig:
    """Return the section with the formats of quant=mixed, chosen by the measurement in quant.harm.

    Unchanged if they are chosen already, or if there is nothing to choose by.
    """
    if quant.method != "mixed" or quant.formats is not None or quant.harm is None:
        return quant
    require(
        quant.budget is not None,
        f"quant=mixed chooses formats by quant.harm={quant.harm} within a size; set quant.budget=4.5 (bits per weight)",
    )
    assert quant.budget is not None
    itemsize = 2 if dtype == "bf16" else 4
    chosen = choose_formats(read_harm(Path(quant.harm)), quant.budget, itemsize=itemsize)
    formats = {format: tuple(n for n, own in chosen.items() if own == format) for format in MIXED_FORMATS[1:]}
    return replace(quant, formats={format: names for format, names in formats.items() if names})


def read_harm(folder: Path) -> list[MeasuredWeight]:
    """Return the weights that `distlora analyze quantization --formats` measured, in the order of the forward."""
    file = folder / RESULT_NAME
    again = f"write it again with `distlora analyze quantization MODEL --formats {','.join(MIXED_FORMATS)}`"
    require(file.is_file(), f"quant.harm={folder} has no {RESULT_NAME}; {again}")
    weights = []
    try:
        for tensor in read_object(file, again)["tensors"]:
            harm = {name: float(figures["harm"]) for name, figures in tensor["formats"].items()}
            require("nf4" in harm, f"{file} has no harm of nf4; {again}")
            require(
                all(math.isfinite(value) and value >= 0 for value in harm.values()),
                f"{file}: the harm of {tensor['name']} is not a number; {again}",
            )
            harm = {name: value for name, value in harm.items() if name in MIXED_FORMATS}
            weights.append(MeasuredWeight(name=tensor["name"], shape=tuple(tensor["shape"]), harm=harm))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} has no harm by format, so --formats was not given; {again}") from error
    return weights


def choose_formats(weights: Sequence[MeasuredWeight], budget: float, *, itemsize: int = 2) -> dict[str, str]:
    """Return the format of each weight with the least harm in all, in `budget` bits per weight of all of them.

    Raises UserError if that is less than the smallest choice takes.
    """
    options = [[(name, weight.num_bytes(name, itemsize)) for name in weight.harm] for weight in weights]
    numel = sum(math.prod(weight.shape) for weight in weights)
    least = sum(min(size for _, size in formats) for formats in options)
    spare = math.floor(budget * numel / 8) - least
    require(
        spare >= 0,
        f"quant.budget={budget:g} is less than the {8 * least / max(numel, 1):.3f} bits per weight that this model has "
        "in the smallest formats; set a larger one",
    )
    sizes = [[size - min(size for _, size in formats) for _, size in formats] for formats in options]
    harms = [list(weight.harm.values()) for weight in weights]
    return {
        w.name: formats[index][0]
        for w, formats, index in zip(weights, options, least_harm(harms, sizes, spare), strict=True)
    }


def least_harm(harms: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], spare: int) -> list[int]:
    """Return the option of each weight with the least sum of harms among those whose sizes sum to at most `spare`.

    Each weight has an option of size 0. Exact if STEPS of the greatest common divisor of the sizes are `spare` or more.
    """
    import numpy as np

    unit = max(math.gcd(*(size for each in sizes for size in each)), math.ceil(spare / STEPS), 1)
    best = np.zeros(spare // unit + 1)
    """Least harm of the weights so far by the units spent."""
    chosen = np.zeros((len(harms), len(best)), dtype=np.int8)
    costs = [[math.ceil(size / unit) for size in each] for each in sizes]
    for weight, (of_weight, harm) in enumerate(zip(costs, harms, strict=True)):
        totals = np.full((len(harm), len(best)), np.inf)
        for option, (cost, value) in enumerate(zip(of_weight, harm, strict=True)):
            if cost < len(best):
                totals[option, cost:] = best[: len(best) - cost] + value
        chosen[weight] = totals.argmin(axis=0)
        best = totals.min(axis=0)
    at, options = len(best) - 1, []
    for weight in reversed(range(len(harms))):
        options.append(int(chosen[weight, at]))
        at -= costs[weight][options[-1]]
    return options[::-1]
