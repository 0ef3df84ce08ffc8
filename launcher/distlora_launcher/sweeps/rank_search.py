"""Find the smallest adapter rank beyond which doubling it gains only noise (`sweep=rank_search`).

Ranks r, 2r, 4r, ... are real runs that keep their held-out losses by document (train.eval_documents); rank_gains.py
compares them. Full fine-tuning runs beside if it fits. The first two ranks are due at once; each further rank waits for
the one before, and a worker that would wait takes full fine-tuning.

SWEEP/rank_search.json keeps what is decided once, when the search is made: memory that is available later, or on
another machine, changes nothing, and reading a sweep needs no model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import AdapterConfig, TrainConfig, UserError, require
from distlora.config.json_files import Shape, check_shape, object_or_empty, read_object
from distlora.planner import plan_of
from distlora.planner.model import PlannedModel
from distlora.planner.report import needs
from distlora.run_folder.eval_documents import EVAL_DOCUMENTS_NAME, DocumentRecord, check_paired, read_documents
from distlora.run_folder.layout import PLAN_NAME, SUMMARY_NAME
from distlora.run_folder.sweep import COMPLETE, FAILED, PRUNED, TrialRecord
from distlora.system import atomic_io
from distlora_launcher.compose import planning
from distlora_launcher.compose.planning import check_planned, machine_here
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.rank_gains import (
    FULL,
    Gains,
    Size,
    Tried,
    ladder,
    ranks_due,
    recommended,
    rows_as_json,
    sentences,
    table,
)
from distlora_launcher.sweeps.search import Due, Search

RANK_SEARCH_NAME = "rank_search.json"
TRIAL_OVERRIDES = ("train.eval_documents=true",)
"""Settings of every trial."""
FULL_LR_RATIO = 0.1
"""Learning rate of full fine-tuning, as a fraction of optim.lr: adapters train at about ten times its rate."""

_SHAPE: Shape = {"widest": int, "full_lr": float, "why_not_full": (str, type(None)), "use_rslora": bool}


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
    remedy = "delete it, and it is made again"
    values = read_object(path, remedy)
    check_shape(values, _SHAPE, path, remedy)
    return Setup(**{name: values[name] for name in _SHAPE})


def write_setup(folder: Path, setup: Setup) -> None:
    """Write SWEEP/rank_search.json."""
    atomic_io.write_json(folder / RANK_SEARCH_NAME, dataclasses.asdict(setup))


def decide(sweep: Sweep) -> Setup:
    """Decide by the model and this node's memory. Raises UserError for settings that leave nothing to search."""
    config = sweep.compose(0, {"adapter.r": sweep.settings.rank_start}, TRIAL_OVERRIDES).config
    model = planning.planned_model(config)
    check(config.train, config.adapter, model)
    adapters = [each for block in model.shapes.adapters(config.adapter) for each in block]
    full_lr = sweep.settings.full_lr
    setup = Setup(
        widest=max(min(each.up[0], each.down[1]) for each in adapters),
        full_lr=config.optim.lr * FULL_LR_RATIO if full_lr is None else full_lr,
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
        check_planned(config.spec, config.train, config.parallel, model)
        plan = plan_of(config, model, machine_here(config))
    except UserError as error:
        return str(error)
    if plan.fits is None:
        return "the memory of these nodes is unknown; name the GPU (gpu=h100), or set sweep.full=always"
    return None if plan.fits else f"it is predicted not to fit {plan.machine.name} ({needs(plan)})"


class RankSearch(Search):
    """The search of `sweep=rank_search` (search.py)."""

    overrides = TRIAL_OVERRIDES

    def __init__(self, sweep: Sweep) -> None:
        """Raise UserError for settings that leave nothing to search, or that set the rank themselves."""
        self._sweep, self._settings = sweep, sweep.settings
        self._gains = Gains(sweep.settings)
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

    def next(self, trials: Sequence[TrialRecord]) -> Sequence[Mapping[str, Any]] | Due:
        """Return a rank that the ended runs call for, then full fine-tuning (Search.next).

        The first call, before there is any trial, writes the setup.
        """
        if not trials and read_setup(self._sweep.folder) is None:
            write_setup(self._sweep.folder, self._setup)
        started, tried = {trial_size(trial) for trial in trials}, self._tried(trials)
        due: list[Size] = [rank for rank in ranks_due(self._ranks, tried, self._gains) if rank not in started]
        if not due and FULL not in started and self._setup.why_not_full is None:
            due = [FULL]
        if due:
            return [self._values(size) for size in due]
        return Due.END if started == tried.keys() else Due.WAIT

    def _values(self, size: Size) -> dict[str, Any]:
        if size != FULL:
            return {"adapter.r": size}
        return self._setup.values_of_full

    def _tried(self, trials: Sequence[TrialRecord]) -> dict[Size, Tried]:
        """Return the ended runs; one without comparable losses by document counts as failed."""
        found: dict[Size, Tried] = {}
        first: tuple[DocumentRecord, str] | None = None
        for trial in sorted(trials, key=lambda trial: trial.number):
            if trial.state in (FAILED, PRUNED):
                found[trial_size(trial)] = Tried(reason=trial.reason or trial.state)
            elif trial.state == COMPLETE:
                tried = read(trial, self._sweep.folder)
                name = str(trial.folder(self._sweep.folder))
                if tried.documents is not None and first is None:
                    first = tried.documents, name
                elif tried.documents is not None and first is not None:
                    try:
                        check_paired(first[0], tried.documents, (first[1], name))
                    except UserError as error:
                        tried = Tried(reason=str(error))
                found[trial_size(trial)] = tried
        return found

    def conclusion(self, trials: Sequence[TrialRecord]) -> list[str]:
        """Return the table of ranks, the recommendation and its reason."""
        tried = self._tried(trials)
        if not tried:
            return []
        shown = table(self._ranks, tried, self._gains, confidence=self._settings.confidence).markdown().splitlines()
        return [*shown, "", *(f"- {sentence}" for sentence in self._sentences(trials, tried))]

    def figures(self, trials: Sequence[TrialRecord]) -> Mapping[str, Any]:
        """Return `rows` of the table, `recommended` (null until the end), `confidence` and `sentences`."""
        tried = self._tried(trials)
        return {
            "rows": rows_as_json(self._ranks, tried, self._gains),
            "recommended": recommended(self._ranks, tried, self._gains) if self._is_over(trials) else None,
            "confidence": self._settings.confidence,
            "sentences": list(self._sentences(trials, tried)),
        }

    def _is_over(self, trials: Sequence[TrialRecord]) -> bool:
        return self.next(trials) is Due.END

    def _sentences(self, trials: Sequence[TrialRecord], tried: Mapping[Size, Tried]) -> Iterator[str]:
        if self._is_over(trials):
            yield from sentences(self._ranks, tried, self._gains)
        else:
            yield "The search has not ended yet."
        if FULL not in tried and self._setup.why_not_full is not None:
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


def read(trial: TrialRecord, sweep: Path) -> Tried:
    """Return the losses by document of a complete run, and its figures for the table."""
    folder = trial.folder(sweep)
    try:
        documents = read_documents(folder)
    except UserError as error:
        return Tried(reason=str(error))
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
        "lr": trial.values.get("optim.lr"),
    }
    return Tried(documents=documents, figures=figures)
