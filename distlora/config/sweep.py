"""Settings of a sweep: the search, the number of parallel trials, the metric."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distlora.config.errors import Refusals, count_from, positive

METHODS = ("grid", "random", "optuna", "rank_search")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """The section `sweep` of conf/, for `distlora sweep` only: SWEEP/sweep.yaml."""

    method: Literal["grid", "random", "optuna", "rank_search"] = "grid"
    """`grid`: every combination; `random`: random draws; `optuna`: proposed from earlier trials; `rank_search`: double
    adapter.r while that gains more than noise."""
    space: Mapping[str, str] = field(default_factory=dict)
    """Search space: a setting, and its values in Hydra's grammar for sweeps, as on the command line: `8,16`,
    `range(1,9)`, `interval(1e-5,1e-3)`, `tag(log,interval(1e-5,1e-3))`. Command-line sweeps are added to it."""
    metric: str = "eval_loss"
    """Metric to compare: a key of RUN/metrics.jsonl; its last value counts."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Direction in which the metric improves."""
    trials: int | None = None
    """Number of runs; null: the whole grid."""
    seed: int = 0
    """Seed of the search; train.seed is the seed of the trials."""
    workers: int = 1
    """Trials, or groups of trials trained together, that run at once: on one node each with an equal number of its
    GPUs, with cluster=slurm each as a task of an array."""
    packed: int | Literal["auto"] = 1
    """Trials trained together on one base, where each sequence uses the adapter of its own trial; `auto`: as many as
    fit by the plan."""
    sampler: Literal["tpe", "gp", "cmaes"] = "tpe"
    """Optuna sampler, with method=optuna."""
    pruner: Literal["median", "hyperband", "none"] = "none"
    """Optuna pruner that ends trials early, by the held-out loss of train.eval_every."""
    pruner_warmup: int = 0
    """Evaluations of a trial before it may be pruned."""
    rank_start: int = 16
    """First rank that rank_search tries."""
    rank_most: int = 256
    """Largest rank that rank_search tries."""
    confidence: float = 0.95
    """Confidence of the bootstrap interval of a doubling's gain, which must exclude 0."""
    bootstrap: int = 10_000
    """Bootstrap resamples of the held-out documents."""
    full: Literal["auto", "always", "never"] = "auto"
    """Full fine-tuning beside rank_search, for comparison; `auto`: if it fits by the plan."""
    full_lr: float | None = None
    """Learning rate of the full fine-tuning; null: a tenth of optim.lr."""


def refused_in_sweep(sweep: SweepConfig) -> Refusals:
    """Check the numbers of a sweep."""
    yield from positive(sweep, "trials workers rank_start rank_most bootstrap full_lr")
    if sweep.packed != "auto" and not count_from(sweep.packed, least=1):
        yield "packed= is not a valid number of trials; set {field}=4, or auto"
    if not 0 < sweep.confidence < 1:
        yield "confidence= is not a valid probability; set {field}=0.95"
