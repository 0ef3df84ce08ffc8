"""`distlora analyze intrinsic`: its arguments, which trainings to do and what they say, and the record. No torch.

The search for the least dimension is pure arithmetic over a function that trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distlora.config import AdapterConfig, DataConfig, ModelConfig, ModelSpec, QuantConfig, TrainConfig, require
from distlora.results.figures import Curve, Figure, Style
from distlora.results.record import Record, Table

REQUEST_NAME, TRAININGS_NAME = "request.json", "trainings.jsonl"
"""Files of an unfinished analysis: its request, and one line per finished training."""
NAMES = {
    "data.path": "--data",
    "data.eval_path": "--eval-data",
    "data.sequence_length": "--sequence-length",
    "model.path": "MODEL",
}
"""Arguments of the command, by the settings that its errors name."""
SCALINGS = ("none", "layers")
"""DID and SAID."""
MOST_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class IntrinsicRequest:
    """Measure how many dimensions fine-tuning needs (arXiv 1804.08838, 2012.13255).

    All parameters are trained in one random subspace of d dimensions; d90 is the smallest d that reaches 90 % of full
    fine-tuning's gain on held-out text. It takes dozens of short fp32 training runs in one process, whose memory must
    fit full fine-tuning. FOLDER gets a report with plots. The same command continues a stopped analysis.

    example: distlora analyze intrinsic HuggingFaceTB/SmolLM2-135M --data pairs.jsonl
    """

    models: list[str]
    """MODEL: folder in Hugging Face format with 16- or 32-bit weights, or a model on the hub; several are compared."""
    data: str = ""
    """FILE: documents to train on, in any format of data.path (required)."""
    eval_data: str | None = None
    """FILE: held-out documents (default: a tenth of the data)."""
    random: bool = False
    """Measure each model from randomly initialized weights too."""
    scaling: tuple[str, ...] = SCALINGS
    """WHICH: method or methods: none (DID), layers (SAID: one trained factor per layer), or both."""
    share: float = 0.9
    """S: fraction of full fine-tuning's gain to reach."""
    steps: int = 100
    """N: optimizer steps per training run."""
    batch: int = 8
    """N: sequences per step."""
    sequence_length: int = 128
    """N: tokens per sequence."""
    lr: float = 1e-3
    """X: first learning rate to try; the others differ by powers of 3."""
    seeds: int = 2
    """N: seeds of full fine-tuning and of the dimensions around d90."""
    start: int = 1024
    """D: first dimension to try."""
    most: int = 100_000
    """D: largest dimension to try, at most half of the parameters."""
    resolution: float = 2.0
    """X: end the search when d90 is known up to this factor."""
    also: tuple[int, ...] = ()
    """D,D: additional dimensions to try, for the curves."""
    out: str = ""
    """FOLDER: folder for the results (default: analysis/MODEL-intrinsic)."""

    # Found by the launcher, which resolves those above; a field with a docstring would be an argument.
    # What the report calls each model.
    names: tuple[str, ...] = ()
    # Cache of tokenized rows.
    cache_dir: str = ""

    def __post_init__(self) -> None:
        require(0 < self.share < 1, f"--share={self.share} is not a valid fraction; write a number between 0 and 1")
        require(
            1.05 <= self.resolution <= 100,
            f"--resolution={self.resolution} is not a valid factor; write 1.05 to 100",
        )
        for name in ("start", "most", "steps", "batch", "seeds"):
            require(
                getattr(self, name) > 0, f"--{name}={getattr(self, name)} is not a positive number; write 1 or more"
            )
        require(
            self.start <= self.most,
            f"--start={self.start:,} is beyond --most={self.most:,}, the largest dimension to try; lower --start",
        )
        for dimension in self.also:
            require(
                0 < dimension <= self.most,
                f"--also={dimension:,} is beyond --most={self.most:,}, the largest dimension to try; leave it out",
            )
        require(0 < self.lr < 1, f"--lr={self.lr} is not a valid learning rate; write a number between 0 and 1")
        require(
            self.sequence_length >= 2,
            f"--sequence-length={self.sequence_length} leaves no token to predict; write 2 or more",
        )
        require(
            bool(self.scaling) and set(self.scaling) <= set(SCALINGS) and len(set(self.scaling)) == len(self.scaling),
            f"--scaling={','.join(self.scaling)} is not known; write none, layers or none,layers",
        )

    def spec(self, model: str) -> ModelSpec:
        """Return a model whose parameters are all trained."""
        return ModelSpec(
            model=ModelConfig(path=model),
            quant=QuantConfig(method="none"),
            adapter=AdapterConfig(method="full"),
            dtype="fp32",
        )

    def data_settings(self) -> DataConfig:
        """Return the data settings of the documents."""
        return DataConfig(
            path=self.data,
            eval_path=self.eval_data,
            eval_fraction=0.1 if self.eval_data is None else 0.0,
            sequence_length=self.sequence_length,
            cache_dir=self.cache_dir,
        )

    def train_settings(self, seed: int = 0) -> TrainConfig:
        """Return the settings of one training."""
        return TrainConfig(
            dtype="fp32",
            max_steps=self.steps,
            global_batch=self.batch,
            micro_batch=max(1, min(self.batch, MOST_TOKENS_AT_ONCE // self.sequence_length)),
            checkpointing="none",
            seed=seed,
        )


RATE_STEP = 3.0
"""Learning rates are the first one times powers of this."""
FARTHEST_RATE = 6
"""Powers that are tried at most."""
FACTOR = 4
"""Between dimensions, until one reaches the share and one does not."""


@dataclass(slots=True)
class Rates:
    """The best learning rate of each dimension, as a power of RATE_STEP.

    The first dimension is tried both ways until the loss rises. Others begin with the power of the nearest one and are
    tried one way, since fewer dimensions need larger steps: a rate that is worse than its neighbour may be missed.
    """

    loss_at: Callable[[int, int], float]
    """(dimension, power) -> held-out loss, inf where it is not finite."""
    best: dict[int, int] = field(default_factory=dict)

    def loss(self, dimension: int) -> float:
        """At the best power, which is then in `best`."""
        power, ways = 0, [1, -1]
        if self.best:
            nearest = min(self.best, key=lambda known: abs(math.log(known / dimension)))
            power, ways = self.best[nearest], [1] if dimension < nearest else [-1]
        lowest = self.loss_at(dimension, power)
        for way in ways:
            first = power
            while abs(power + way) <= FARTHEST_RATE and (loss := self.loss_at(dimension, power + way)) < lowest:
                power, lowest = power + way, loss
            if power != first:
                break
        self.best[dimension] = power
        return lowest


@dataclass(frozen=True, slots=True)
class Bracket:
    """The neighbouring dimensions between which the share is reached."""

    low: int | None
    """Does not reach the share; None: the least dimension does."""
    high: int | None
    """Reaches it; None: the largest one does not."""


def bracket(reaches: Callable[[int], bool], *, start: int, least: int, most: int, resolution: float) -> Bracket:
    """Two dimensions, less than a factor of `resolution` apart, between which the share is reached.

    Takes it that more dimensions reach more; where noise says otherwise, one of the crossings is found.
    """
    low = high = None
    dimension = min(max(start, least), most)
    while low is None or high is None:
        if reaches(dimension):
            high = dimension
            if dimension == least:
                return Bracket(None, high)
            dimension = max(least, dimension // FACTOR)
        else:
            low = dimension
            if dimension == most:
                return Bracket(low, None)
            dimension = min(most, dimension * FACTOR)
    while high / low > resolution and (middle := round(math.sqrt(low * high))) not in (low, high):
        if reaches(middle):
            high = middle
        else:
            low = middle
    return Bracket(low, high)


def settle(
    ends: Bracket, mean_share: Callable[[int], float], share: float, *, least: int, most: int, factor: float
) -> list[int]:
    """Move the ends out until their mean shares are on both sides of `share`, or the limits are reached.

    Returns every dimension whose mean was requested.
    """
    candidates = []
    high, low = ends.high, ends.low
    for outwards, limit, dimension in ((factor, most, high), (1 / factor, least, low)):
        while dimension is not None:
            candidates.append(dimension)
            if (mean_share(dimension) >= share) == (outwards > 1) or dimension == limit:
                break
            moved = max(round(dimension * outwards), dimension + 1) if outwards > 1 else int(dimension * outwards)
            dimension = min(max(moved, least), most)
    return candidates


def side(shares: Mapping[int, Sequence[float]], share: float) -> str:
    """Return `above` (the largest tried dimension) or `at most` (the least) if nothing crosses."""
    means = _pooled(shares)
    return "at most" if means[0] >= share else "above"


def crossing(shares: Mapping[int, Sequence[float]], share: float, *, shift: float = 0.0) -> float | None:
    """Return the dimension at which the mean shares, with `shift` added, cross `share`; None without a crossing.

    Shares are made rising by isotonic regression weighted by the number of trainings, and interpolated linearly in log
    d.
    """
    dimensions, means = sorted(shares), _pooled(shares, shift)
    for (low, below), (high, above) in zip(
        zip(dimensions, means, strict=True), zip(dimensions[1:], means[1:], strict=True), strict=False
    ):
        if below < share <= above:
            fraction = (share - below) / (above - below)
            return math.exp(math.log(low) + fraction * math.log(high / low))
    return None


def _pooled(shares: Mapping[int, Sequence[float]], shift: float = 0.0) -> list[float]:
    """Return the mean shares plus `shift` in the order of the dimensions, made rising."""
    groups = [shares[dimension] for dimension in sorted(shares)]
    return isotonic([sum(group) / len(group) + shift for group in groups], [len(group) for group in groups])


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the rising sequence nearest in weighted squares, by pooling neighbours that fall."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, of_a, in_a), (b, of_b, in_b) = pools[-2:]
            pools[-2:] = [((a * of_a + b * of_b) / (of_a + of_b), of_a + of_b, in_a + in_b)]
    return [value for value, _, count in pools for _ in range(count)]


def deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation between seeds, pooled over dimensions that have several; None without one."""
    several = [group for group in groups if len(group) > 1]
    if not several:
        return None
    means = [sum(group) / len(group) for group in several]
    squares = sum((value - mean) ** 2 for group, mean in zip(several, means, strict=True) for value in group)
    return math.sqrt(squares / sum(len(group) - 1 for group in several))


SCALING_WORDS = {"none": "no scaling (DID)", "layers": "layers scaled (SAID)"}
NOTES = """**What is measured.** theta = theta_0 + P u over all parameters, u of d numbers and P a random subspace with
orthonormal columns; SAID multiplies each layer's part by a factor that is trained too, and counts it. Loss after the
last step; the gain is the untrained model's loss less that of full fine-tuning at its own best learning rate. Learning
rates are powers of 3 apart, the best of those that were tried at each dimension. "moved" is
||theta - theta_0|| / ||theta_0||."""


def record(figures: Mapping[str, Any]) -> Record:
    """Return the figures of intrinsic.json as a record."""
    settings, held_out = figures["settings"], figures["eval_data"] or f"a tenth of {figures['data']}"
    if figures["arms"]:
        held_out += f" ({figures['arms'][0]['held_out_rows']} rows, {figures['arms'][0]['held_out_targets']:,} tokens)"
    return Record(
        title="How many dimensions fine-tuning needs",
        made_by=f"`distlora analyze intrinsic` on {figures['data']}, held out {held_out}; {settings['steps']} steps of "
        f"{settings['batch']} rows of {settings['sequence_length']} tokens; {figures['date']}, torch "
        f"{figures['versions']['torch']}, {figures['device']}.",
        findings=list(_findings(figures)),
        tables=list(_tables(figures)),
        figures=list(_figures(figures)),
        notes=NOTES,
        data=figures,
    )


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def _tables(figures: Mapping[str, Any]) -> Iterator[Table]:
    yield _dimensions(figures)
    for arm in figures["arms"]:
        for scaling, subspace in arm["subspaces"].items():
            yield _points(f"{arm['model']}, {arm['start']}, {SCALING_WORDS[scaling]}", subspace)


def _dimensions(figures: Mapping[str, Any]) -> Table:
    columns = {"model": "", "start": "", "parameters": ",", "untrained": ".3f", "full": "", "gain": ".3f"}
    columns |= {"subspace": "", f"d{100 * figures['settings']['share']:.0f}": "", "range": "", "of all": ".3%"}
    rows: list[list[Any]] = []
    for arm in figures["arms"]:
        full = f"{arm['full']:.3f}" + ("" if arm["full_noise"] is None else f" ± {arm['full_noise']:.3f}")
        cells = [arm["model"], arm["start"], arm["parameters"], arm["untrained"], full, arm["untrained"] - arm["full"]]
        for scaling, subspace in arm["subspaces"].items():
            value = subspace["dimension"]
            share = "" if value is None else value / arm["parameters"]
            rows.append([*cells, SCALING_WORDS[scaling], _dimension(subspace), _range(subspace), share])
        if not arm["subspaces"]:
            rows.append([*cells, None, None, None, None])
    heading = "Held-out loss in nats per token, and the dimension that reaches the fraction of full fine-tuning's gain"
    return Table(heading, columns, rows)


def _dimension(subspace: Mapping[str, Any]) -> str:
    """Return `1,234`; `at most 5`, `above 16,384`: the least and the largest that were tried."""
    if subspace["dimension"] is not None:
        return f"{subspace['dimension']:,.0f}"
    tried = [point["dimension"] for point in subspace["points"]]
    return f"{subspace['side']} {(min if subspace['side'] == 'at most' else max)(tried):,}"


def _range(subspace: Mapping[str, Any]) -> str | None:
    if subspace["range"] is None:
        return None
    low, high = (None if value is None else f"{value:,.0f}" for value in subspace["range"])
    tried = [point["dimension"] for point in subspace["points"]]
    return f"{low or f'below {min(tried):,}'} to {high or f'above {max(tried):,}'}"


def _points(heading: str, subspace: Mapping[str, Any]) -> Table:
    columns = {"dimensions": ",", "lr": "g", "held-out loss": ".4f", "share of the gain": ".1%"}
    columns |= {"seeds": "", "moved": ".1%"}
    rows: list[list[Any]] = []
    for point in subspace["points"]:
        loss = "not finite" if None in point["losses"] else mean(point["losses"])
        cells = [point["dimension"], point["lr"], loss, mean(point["shares"])]
        rows.append([*cells, len(point["losses"]), point["distance"]])
    return Table(heading, columns, rows)


def _findings(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a range means, where trainings have several seeds."""
    noises = [s["noise"] for arm in figures["arms"] for s in arm["subspaces"].values() if s["noise"] is not None]
    if noises:
        yield (
            "Between seeds (of the subspace, the order of the rows, and random weights) the share differs by a "
            f"standard deviation of {min(noises):.1%} to {max(noises):.1%}; a range is where the share crosses with "
            "one of it, that of a single training, added or taken away."
        )


_STYLES: dict[str, Style] = {"none": "dashed", "layers": "line"}


def _figures(figures: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the share of full fine-tuning's gain and the held-out loss itself, over the dimension."""
    share = figures["settings"]["share"]
    full = [(f"full, {arm['model']}, {arm['start']}", arm["full"]) for arm in figures["arms"]]
    for title, unit, key, levels in (
        ("Fraction of full fine-tuning's gain", "", "shares", [("asked", share)]),
        ("Held-out loss", "nats per token", "losses", full),
    ):
        curves = []
        for colour, arm in enumerate(figures["arms"]):
            for scaling, subspace in arm["subspaces"].items():
                name = f"{arm['model']}, {arm['start']}, {SCALING_WORDS[scaling]}"
                points = [point for point in subspace["points"] if None not in point["losses"]]
                x, y = [point["dimension"] for point in points], [mean(point[key]) for point in points]
                curves.append(Curve(name=name, x=x, y=y, colour=colour, style=_STYLES[scaling]))
                seeds = [(point["dimension"], value) for point in points for value in point[key]]
                x, y = [dimension for dimension, _ in seeds], [value for _, value in seeds]
                curves.append(Curve(x=x, y=y, colour=colour, style="dots", is_named=False))
                if key == "shares" and (found_at := subspace["dimension"]) is not None:
                    curves.append(Curve(x=[found_at], y=[share], colour=colour, style="points", is_named=False))
        x_name = "dimensions trained"
        yield Figure(
            title=title, unit=unit, curves=curves, levels=levels, x_name=x_name, x_scale="log", y_scale="linear"
        )
