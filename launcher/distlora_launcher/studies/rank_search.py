"""Find the smallest adapter rank beyond which doubling it gains only noise (`sweep=rank_search`).

Ranks r, 2r, 4r, ... are real runs that keep their held-out losses by document (train.eval_documents). The first two are
due at once; each further rank waits for the one before, and a worker that would wait takes full fine-tuning, which runs
beside if it fits. The last doubling run is one too many, since only that run can tell.

A gain is tested by a paired bootstrap over the held-out documents. Both runs were evaluated on the same documents.
Document i has n_i target tokens, and the second run's loss sum over them is lower by d_i; the gain is sum(d) / sum(n).
Its spread is estimated by drawing as many documents as there are, with replacement, B times, and computing the gain of
each draw (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, 13.3: the percentile interval). Documents are
drawn, not tokens, since a document's tokens are not independent; both runs' losses of a document are drawn together,
since a hard document is hard for both. The bootstrap does not show how runs differ by seed.

SWEEP/rank_search.json keeps what is decided once, when the search is made: memory that is available later, or on
another node, changes nothing, and reading a sweep needs no model.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distlora.config import AdapterConfig, TrainConfig, UserError, require
from distlora.config.json_files import Shape, object_or_empty, read_object
from distlora.config.sweep import SweepConfig
from distlora.data.rows import hash64
from distlora.planner import plan_of
from distlora.planner.learning_rate import FULL_RATIO
from distlora.planner.model import PlannedModel
from distlora.planner.report import needs
from distlora.results.record import Table
from distlora.run_folder.eval_documents import EVAL_DOCUMENTS_NAME, DocumentRecord, check_paired, read_documents
from distlora.run_folder.layout import PLAN_NAME, SUMMARY_NAME
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED, TrialRecord
from distlora.system import atomic_io
from distlora_launcher.compose import planning
from distlora_launcher.studies.sources import NextAction, Source
from distlora_launcher.studies.sweep import Sweep

RANK_SEARCH_NAME = "rank_search.json"
TRIAL_OVERRIDES = ("train.eval_documents=true",)
"""Settings of every trial."""

FULL = "full"
"""Stands for full fine-tuning in place of a rank."""
Size = int | str
"""A rank, or FULL."""
FEW_DOCUMENTS = 50
"""Documents below which the percentile interval is too narrow: a nominal 95 % covers 89 to 92 % (README.md)."""

BOOTSTRAP = 4
"""Domain of the hash, beside those in distlora/data/packing.py."""
_DRAWN_AT_ONCE = 2**20
"""Numbers drawn at once: limits memory to about 10 MB for any number of documents and resamples."""

_SHAPE: Shape = {"widest": int, "full_lr": float, "why_not_full": (str, type(None)), "use_rslora": bool}


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Decrease of held-out loss from a first run to a second, in nats per token (or pair)."""

    gain: float
    low: float
    high: float
    """Ends of the percentile interval."""

    @property
    def is_more_than_noise(self) -> bool:
        """Return whether the whole interval is above 0."""
        return self.low > 0

    @property
    def is_loss(self) -> bool:
        """Return whether the whole interval is below 0."""
        return self.high < 0


def gain(
    first: Sequence[float],
    second: Sequence[float],
    units: Sequence[int],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> Gain:
    """Return the gain between two runs, given their loss sums and units by document, each of length D.

    The same arguments draw the same documents on any machine and with any version of numpy. The interval of a single
    document is infinite.
    """
    counts = np.array(units, np.float64)
    lower = np.array(first, np.float64) - np.array(second, np.float64)
    if len(counts) < 2:
        return Gain(gain=float(lower.sum() / counts.sum()), low=-math.inf, high=math.inf)
    gains = resampled(lower, counts, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(gains, [tail, 1 - tail]).tolist()
    return Gain(gain=float(lower.sum() / counts.sum()), low=low, high=high)


def resampled(sums: np.ndarray, units: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return (B,) float64: sum(sums) / sum(units) of B draws of D documents with replacement.

    sums, units: (D,).
    """
    documents = len(sums)
    result = np.empty(resamples, np.float64)
    step = max(1, _DRAWN_AT_ONCE // documents)
    for first in range(0, resamples, step):
        last = min(first + step, resamples)
        random = hash64((BOOTSTRAP, seed), (last - first) * documents, start=first * documents)
        # The upper 32 bits times D, over 2^32: every document as likely as another up to D / 2^32.
        drawn = ((random >> np.uint64(32)) * np.uint64(documents) >> np.uint64(32)).astype(np.int64)
        drawn = drawn.reshape(last - first, documents)
        result[first:last] = sums[drawn].sum(axis=1) / units[drawn].sum(axis=1)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A run that has ended."""

    documents: DocumentRecord | None = None
    """Held-out losses by document; None if the run failed."""
    reason: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the table: trial (its number), trainable_parameters, state_bytes, peak_bytes, planned_bytes,
    seconds, lr."""


def ladder(start: int, most: int, widest: int) -> tuple[int, ...]:
    """Return `start` and its doublings up to `most`, up to the first that is at least `widest`."""
    ranks = [start]
    while ranks[-1] * 2 <= most and ranks[-1] < widest:
        ranks.append(ranks[-1] * 2)
    return tuple(ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The ended runs of a search, and what follows from them."""

    settings: SweepConfig
    ranks: tuple[int, ...]
    """Ranks that may be tried (`ladder`)."""
    widest: int
    """Largest possible rank of any adapted linear."""
    tried: Mapping[Size, Tried]
    known: dict[tuple[Size, Size], Gain] = field(default_factory=dict)
    """Gains computed before: a large bootstrap takes a second."""

    def gain(self, first: Size, second: Size) -> Gain | None:
        """Return the gain of `second` over `first`; None if one failed or has not ended."""
        before, after = (self.tried.get(size, Tried()).documents for size in (first, second))
        if before is None or after is None:
            return None
        if (first, second) not in self.known:
            self.known[first, second] = gain(
                _finite_losses(before),
                _finite_losses(after),
                before.units,
                resamples=self.settings.bootstrap,
                confidence=self.settings.confidence,
                seed=self.settings.seed,
            )
        return self.known[first, second]

    def ranks_due(self) -> list[int]:
        """Return all ranks due so far: the first two, and one more for each doubling that gained more than noise."""
        due = list(self.ranks[:2])
        for smaller, larger, next_one in zip(self.ranks, self.ranks[1:], self.ranks[2:], strict=False):
            gained = self.gain(smaller, larger)
            if gained is None or not gained.is_more_than_noise:
                break
            due.append(next_one)
        return due

    def recommended(self) -> int | None:
        """Return the largest rank whose doublings gained more than noise; None if no rank's run is complete."""
        best = next((rank for rank in self.ranks if self.tried.get(rank, Tried()).documents is not None), None)
        for smaller, larger in itertools.pairwise(self.ranks):
            gained = self.gain(smaller, larger)
            if smaller == best and gained is not None and gained.is_more_than_noise:
                best = larger
        return best

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per ended run, for programs. Numbers that JSON cannot hold are None.

        A rank's gain is over half of it, full fine-tuning's over the recommended rank.
        """
        pairs: list[tuple[Size, Size | None]] = []
        pairs += [(rank, rank // 2 if rank != self.ranks[0] else None) for rank in self.ranks if rank in self.tried]
        pairs += [(FULL, self.recommended())] if FULL in self.tried else []
        rows = []
        for size, against in pairs:
            run, gained = self.tried[size], None if against is None else self.gain(against, size)
            is_bounded = gained is not None and math.isfinite(gained.low)
            rows.append(
                {
                    "size": size,
                    "against": against,
                    "loss": None if run.documents is None else run.documents.loss,
                    "gain": None if gained is None else gained.gain,
                    "low": gained.low if gained is not None and is_bounded else None,
                    "high": gained.high if gained is not None and is_bounded else None,
                    "verdict": _verdict(run, against, gained),
                    **run.figures,
                }
            )
        return rows

    def table(self) -> Table:
        """Return the rows for people."""
        head = ["rank", "trained", "state, MiB", "peak, MiB", "planned, MiB", "seconds", "held-out loss", "gain"]
        lines = [[*head, f"{self.settings.confidence * 100:.4g} % interval", "verdict"]]
        for row in self.rows():
            interval = "-" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
            lines.append(
                [
                    str(row["size"]),
                    _cell(row, "trainable_parameters", ","),
                    *(_cell(row, name, ",.1f", 2**20) for name in ("state_bytes", "peak_bytes", "planned_bytes")),
                    _cell(row, "seconds", ".1f"),
                    _cell(row, "loss", ".4f"),
                    _cell(row, "gain", "+.4f"),
                    interval,
                    row["verdict"],
                ]
            )
        return Table("Ranks", lines[0], lines[1:])

    def sentences(self) -> Iterator[str]:
        """Yield the recommendation and its reason, the gain of full fine-tuning, failures and warnings."""
        best = self.recommended()
        if best is None:
            yield "No rank can be recommended: no rank's run is complete."
        else:
            number = self.tried[best].figures.get("trial")
            which = "" if number is None else f" (trial {number})"
            yield f"Recommended: adapter.r={best}{which}. {self._reason(best)}"
        for size, run in self.tried.items():
            if run.documents is None:
                name = "Full fine-tuning" if size == FULL else f"The run with r={size}"
                yield f"{name} failed: {run.reason}"
        if best is None:
            return
        gained = self.gain(best, FULL)
        if gained is not None:
            lr = self.tried[FULL].figures.get("lr")
            given = "" if lr is None else f" (lr {lr:g}, not tuned: sweep.full_lr)"
            how = f"as r={best} within noise: lower by {_interval(gained)}"
            if gained.is_more_than_noise:
                how = f"lower than r={best} by {_interval(gained)}"
            elif gained.is_loss:
                how = f"higher than r={best} by {_interval(gained, -1)}"
            yield f"Full fine-tuning{given} ends {how}."
        documents = self.tried[best].documents
        count = 0 if documents is None else len(documents.units)
        if count < FEW_DOCUMENTS:
            yield (
                f"Only {count} document{'s are' if count != 1 else ' is'} held out, so the interval is too narrow, or "
                "infinite. Hold out more (data.eval_fraction, data.eval_path)."
            )

    def _reason(self, best: int) -> str:
        """Return why this rank is recommended, and not half or twice of it."""
        reasons = []
        before, after = self.gain(best // 2, best), self.gain(best, best * 2)
        if best != self.ranks[0] and before is not None:
            fall = f"the held-out loss falls by {_interval(before)}"
            reasons.append(f"From {best // 2} to {best} {fall}, more than its noise")
        if after is not None and after.is_loss:
            reasons.append(
                f"from {best} to {best * 2} it rises by {_interval(after, -1)}: the larger rank is worse at this "
                "learning rate"
            )
        elif after is not None:
            reasons.append(f"from {best} to {best * 2} it falls by {_interval(after)}, no more than noise")
        elif best * 2 in self.tried:
            reasons.append(f"the gain of {best * 2} is unknown: its run failed")
        elif best == self.ranks[-1] and best >= self.widest:
            reasons.append(f"no adapted linear can use more: their largest possible rank is {self.widest}")
        elif best == self.ranks[-1]:
            reasons.append(f"a higher rank may gain more: sweep.rank_most ended the search; set it to {best * 2}")
        if best == self.ranks[0] and after is not None:
            reasons.append(f"a lower rank was not tried: set sweep.rank_start={max(1, best // 2)}")
        text = "; ".join(reasons)
        return text[:1].upper() + text[1:] + "." if text else ""


def _finite_losses(record: DocumentRecord) -> list[float]:
    losses = [loss for loss in record.losses if loss is not None]
    assert len(losses) == len(record.losses), "a run with a loss that is not finite has failed"
    return losses


def _verdict(run: Tried, against: Size | None, gained: Gain | None) -> str:
    if run.documents is None:
        return "failed"
    if gained is None:
        return "first rank" if against is None else f"{against} failed"
    if gained.is_more_than_noise:
        return f"lower than {against}"
    return f"higher than {against}" if gained.is_loss else f"no difference to {against}"


def _interval(gained: Gain, sign: int = 1) -> str:
    """Return a gain, or with sign=-1 a loss, as `0.0120 nats (0.0040 to 0.0201)`."""
    low, high = sorted((sign * gained.low, sign * gained.high))
    return f"{sign * gained.gain:.4f} nats ({low:.4f} to {high:.4f})"


def _cell(row: Mapping[str, Any], name: str, style: str, unit: int = 1) -> str:
    value = row.get(name)
    return "-" if value is None else format(value if unit == 1 else value / unit, style)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Decisions for all trials."""

    widest: int
    """Largest possible rank of any adapted linear: the maximum over linears of min(in, out)."""
    full_lr: float
    """Learning rate of full fine-tuning."""
    why_not_full: str | None
    """Why full fine-tuning is not run, in a sentence; None if it is."""
    use_rslora: bool

    @property
    def values_of_full(self) -> dict[str, Any]:
        """Return the settings in which full fine-tuning differs from the ranks' runs."""
        return {"adapter": "full", "quant": "none", "optim.lr": self.full_lr}


def read_setup(folder: Path) -> Setup | None:
    """Return SWEEP/rank_search.json; None if it does not exist. Raises UserError if it is damaged."""
    path = folder / RANK_SEARCH_NAME
    if not path.is_file():
        return None
    values = read_object(path, "delete it, and it is made again", _SHAPE)
    return Setup(**{name: values[name] for name in _SHAPE})


def decide(sweep: Sweep) -> Setup:
    """Decide by the model and this node's memory. Raises UserError for settings that leave nothing to search."""
    config = sweep.compose(0, {"adapter.r": sweep.settings.rank_start}, TRIAL_OVERRIDES).config
    model = planning.planned_model(config)
    check(config.train, config.adapter, model)
    adapters = [adapter for block in model.shapes.adapters(config.adapter) for adapter in block]
    full_lr = sweep.settings.full_lr
    setup = Setup(
        widest=max(min(adapter.up[0], adapter.down[1]) for adapter in adapters),
        full_lr=config.optim.peak_lr * FULL_RATIO if full_lr is None else full_lr,
        why_not_full=None,
        use_rslora=config.adapter.use_rslora,
    )
    why_not = _why_not_full(sweep, setup)
    if why_not is not None:
        why_not = f"Full fine-tuning was not run: {why_not.removesuffix('.')}."
    return dataclasses.replace(setup, why_not_full=why_not)


def check(train: TrainConfig, adapter: AdapterConfig, model: PlannedModel) -> None:
    """Refuse settings whose runs cannot be compared by their last evaluations, or do not differ by rank."""
    require(
        train.eval_documents,
        "train.eval_documents=false writes no losses by document, which sweep=rank_search compares; leave it out",
    )
    for name in ("load_best_at_end", "early_stopping_patience"):
        value = getattr(train, name)
        require(
            not value,
            f"train.{name}={value} makes a run's result differ from its last evaluation, which sweep=rank_search "
            "compares; leave it out",
        )
    paths = [each.path for block in model.shapes.adapters(adapter) for each in block]
    other = dataclasses.replace(adapter, r=2 * adapter.r)
    require(
        any(adapter.rank_of(path) != other.rank_of(path) for path in paths),
        "adapter.rank_pattern sets the rank of every adapted linear, so sweep=rank_search has none to search; leave "
        "some of them out",
    )


def _why_not_full(sweep: Sweep, setup: Setup) -> str | None:
    full = sweep.settings.full
    if full == "always":
        return None
    if full == "never":
        return "sweep.full=never"
    if sweep.settings.packed != 1:
        return "trials trained together share one base, which it would train (sweep.packed)"
    try:
        config = sweep.compose(0, setup.values_of_full, TRIAL_OVERRIDES).config
        model = planning.planned_model(config)
        planning.check_planned(config, model)
        plan = plan_of(config, model, planning.machine_here(config))
    except UserError as error:
        return str(error)
    if plan.fits is None:
        return "the memory of these nodes is unknown; name the GPU (gpu=h100), or set sweep.full=always"
    return None if plan.fits else f"it is predicted not to fit {plan.machine.name} ({needs(plan)})"


class RankSearch(Source):
    """The source of `sweep=rank_search` (sources.py)."""

    overrides = TRIAL_OVERRIDES

    def __init__(self, sweep: Sweep) -> None:
        """Raise UserError for settings that leave nothing to search, or that set the rank themselves."""
        self._sweep, self._settings = sweep, sweep.settings
        self._known: dict[tuple[Size, Size], Gain] = {}
        self._check()
        self._setup = read_setup(sweep.folder) or decide(sweep)
        self._ranks = ladder(self._settings.rank_start, self._settings.rank_most, self._setup.widest)

    def _check(self) -> None:
        settings, named = self._settings, [dimension.setting for dimension in self._sweep.space]
        require(
            not named,
            f"sweep=rank_search searches adapter.r only, and {', '.join(named)} has several values; choose one first, "
            "with sweep=grid",
        )
        require(
            (settings.metric, settings.direction) == ("eval_loss", "minimize"),
            f"sweep=rank_search compares held-out losses document by document, not sweep.metric={settings.metric} with "
            f"sweep.direction={settings.direction}; leave both out",
        )
        require(
            settings.trials is None,
            f"sweep.trials={settings.trials} has no effect with sweep=rank_search, which ends by itself; set "
            "sweep.rank_most to limit it",
        )
        require(
            settings.pruner == "none",
            f"sweep.pruner={settings.pruner} would end runs before the step at which they are compared; leave it out",
        )
        require(
            settings.rank_start * 2 <= settings.rank_most,
            f"sweep.rank_most={settings.rank_most} leaves no doubling of sweep.rank_start={settings.rank_start}; set "
            f"sweep.rank_most={settings.rank_start * 2} or more",
        )
        require(
            settings.packed == 1 or settings.full != "always",
            f"sweep.full=always trains the base, which trials trained together share (sweep.packed="
            f"{settings.packed}); set sweep.packed=1, or sweep.full=never",
        )
        require(
            "adapter=full" not in self._sweep.overrides,
            "adapter=full has no rank to search for; leave it out, and set sweep.full=always to train it beside",
        )
        fixed = next((word for word in self._sweep.overrides if re.match(r"\+*adapter\.r=", word)), None)
        require(
            fixed is None,
            f"{fixed} is what sweep=rank_search searches; leave it out, or set sweep.rank_start",
        )

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | NextAction:
        """Return a rank that the ended runs call for, then full fine-tuning (Source.next).

        The first call, before there is any trial, writes the setup.
        """
        if not trials and read_setup(self._sweep.folder) is None:
            path = self._sweep.folder / RANK_SEARCH_NAME
            atomic_io.write_json(path, dataclasses.asdict(self._setup))
        started, comparison = {trial_size(trial) for trial in trials}, self._compare(trials)
        due: list[Size] = [rank for rank in comparison.ranks_due() if rank not in started]
        if not due and FULL not in started and self._setup.why_not_full is None:
            due = [FULL]
        if due:
            return [self._setup.values_of_full if size == FULL else {"adapter.r": size} for size in due]
        return NextAction.END if started == comparison.tried.keys() else NextAction.WAIT

    def _compare(self, trials: Sequence[TrialRecord]) -> Comparison:
        """Compare the ended runs; one without comparable losses by document counts as failed."""
        tried: dict[Size, Tried] = {}
        first: tuple[DocumentRecord, str] | None = None
        for trial in sorted(trials, key=lambda trial: trial.number):
            if trial.state in (FAILED, PRUNED):
                tried[trial_size(trial)] = Tried(reason=trial.reason or trial.state)
            elif trial.state == COMPLETE:
                folder = trial.folder(self._sweep.folder)
                try:
                    run = read(trial, folder)
                    if first is not None and run.documents is not None:
                        check_paired(first[0], run.documents, (first[1], str(folder)))
                    elif run.documents is not None:
                        first = run.documents, str(folder)
                except UserError as error:
                    run = Tried(reason=str(error))
                tried[trial_size(trial)] = run
        widest = self._setup.widest
        return Comparison(settings=self._settings, ranks=self._ranks, widest=widest, tried=tried, known=self._known)

    def conclusion(self, trials: Sequence[TrialRecord]) -> list[str]:
        """Return the table of ranks, the recommendation and its reason."""
        comparison = self._compare(trials)
        if not comparison.tried:
            return []
        return [
            *comparison.table().markdown().splitlines(),
            "",
            *(f"- {text}" for text in self._sentences(trials, comparison)),
        ]

    def figures(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        """Return `rows` of the table, `recommended` (null until the end), `confidence` and `sentences`."""
        comparison = self._compare(trials)
        return {
            "rows": comparison.rows(),
            "recommended": comparison.recommended() if self.next(trials) is NextAction.END else None,
            "confidence": self._settings.confidence,
            "sentences": list(self._sentences(trials, comparison)),
        }

    def _sentences(self, trials: Sequence[TrialRecord], comparison: Comparison) -> Iterator[str]:
        if self.next(trials) is NextAction.END:
            yield from comparison.sentences()
        else:
            yield "The search has not ended yet."
        if FULL not in comparison.tried and self._setup.why_not_full is not None:
            yield self._setup.why_not_full
        if not self._setup.use_rslora:
            yield (
                "adapter.use_rslora=false scales updates by alpha/r, so each doubling of r also halves them, which may "
                "hide its gain. Leave it out."
            )
        if self._settings.packed != 1:
            yield "A run's memory is that of all trials trained with it (sweep.packed)."


def trial_size(trial: TrialRecord) -> Size:
    """Return the rank of a trial, or FULL."""
    return FULL if trial.values.get("adapter") == "full" else int(trial.values["adapter.r"])


def read(trial: TrialRecord, folder: Path) -> Tried:
    """Return the losses by document of a complete run, and its figures for the table. Raises UserError if damaged."""
    documents = read_documents(folder)
    if documents.loss is None:
        return Tried(reason="its held-out loss is not finite")
    if trial.step is not None and documents.step != trial.step:
        return Tried(reason=f"it ended after step {trial.step}, and {EVAL_DOCUMENTS_NAME} is of step {documents.step}")
    summary, plan = object_or_empty(folder / SUMMARY_NAME), object_or_empty(folder / PLAN_NAME)
    device = plan.get("device", {})
    figures = {
        "trial": trial.number,
        "trainable_parameters": summary.get("trainable_parameters", trial.trainable_parameters),
        "state_bytes": device.get("persistent"),
        "peak_bytes": summary.get("memory/peak", trial.peak_memory_bytes),
        "planned_bytes": summary.get("memory/planned"),
        "seconds": summary.get("train_seconds"),
        "lr": plan.get("settings", {}).get("optim", {}).get("lr"),
    }
    return Tried(documents=documents, figures=figures)
