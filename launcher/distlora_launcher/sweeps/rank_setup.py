"""What a rank search decides once, when it is made: which ranks there are, and whether full fine-tuning is run beside.

It is kept in SWEEP/rank_search.json: memory that can be had now, or on another machine, decides nothing later, and
whoever reads a sweep (report, status, resume) needs neither the model nor its machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError, require
from distlora.config.json_files import Shape, check_shape, read_object
from distlora.planner import plan_of
from distlora.planner.model import PlannedModel
from distlora.planner.pages.report import needs
from distlora.system import atomic_io
from distlora_launcher.compose import this_machine
from distlora_launcher.compose.planning import check_planned, machine_here
from distlora_launcher.sweeps.folder import Sweep

RANK_SEARCH_NAME = "rank_search.json"
WORDS = ("train.eval_documents=true",)
"""Settings of every trial."""
FULL_LR_SHARE = 0.1
"""Of optim.lr, for full fine-tuning: adapters are trained at about ten times its learning rate."""

_SHAPE: Shape = {"widest": int, "full_lr": float, "why_not_full": (str, type(None)), "use_rslora": bool}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """Decided for all trials."""

    widest: int
    """Of all adapted linears the largest rank that a matrix of its shape can have."""
    full_lr: float
    """The learning rate of full fine-tuning."""
    why_not_full: str | None
    """Why it is not run beside, in a sentence; None: it is."""
    use_rslora: bool

    @property
    def values_of_full(self) -> dict[str, Any]:
        """What full fine-tuning has otherwise than the words of the sweep say."""
        return {"adapter": "full", "quant": "none", "optim.lr": self.full_lr}


def read_setup(folder: Path) -> Setup | None:
    """What SWEEP/rank_search.json says; None where it is not there yet. Raises UserError for a damaged one."""
    path = folder / RANK_SEARCH_NAME
    if not path.is_file():
        return None
    remedy = "delete it, and it is decided again"
    values = read_object(path, remedy)
    check_shape(values, _SHAPE, path, remedy)
    return Setup(**{name: values[name] for name in _SHAPE})


def write_setup(folder: Path, setup: Setup) -> None:
    atomic_io.write_json(folder / RANK_SEARCH_NAME, dataclasses.asdict(setup))


def decide(sweep: Sweep) -> Setup:
    """By the model, and what this machine has now. Raises UserError for settings that leave nothing to search."""
    config = sweep.compose(0, {"adapter.r": sweep.settings.rank_start}, WORDS).config
    model = this_machine.planned_model(config)
    check(config, model)
    adapters = [each for block in model.shapes.adapters(config.adapter) for each in block]
    full_lr = sweep.settings.full_lr
    setup = Setup(
        widest=max(min(each.up[0], each.down[1]) for each in adapters),
        full_lr=config.optim.lr * FULL_LR_SHARE if full_lr is None else full_lr,
        why_not_full=None,
        use_rslora=config.adapter.use_rslora,
    )
    why_not = _why_not_full(sweep, setup)
    if why_not is not None:
        why_not = f"Full fine-tuning was not run beside: {why_not.removesuffix('.')}."
    return dataclasses.replace(setup, why_not_full=why_not)


def check(config: Config, model: PlannedModel) -> None:
    """Refuse settings whose runs cannot be compared by their last evaluations, or do not differ by rank."""
    train, adapter = config.train, config.adapter
    require(
        train.eval_documents,
        "train.eval_documents=false keeps no losses of documents, which sweep=rank_search compares; leave it out",
    )
    for name in ("load_best_at_end", "early_stopping_patience"):
        value = getattr(train, name)
        require(
            not value,
            f"train.{name}={value} makes something else of a run than its last evaluation, which sweep=rank_search "
            "compares; leave it out",
        )
    paths = [each.path for block in model.shapes.adapters(adapter) for each in block]
    other = dataclasses.replace(adapter, r=2 * adapter.r)
    require(
        any(adapter.rank_of(path) != other.rank_of(path) for path in paths),
        "adapter.rank_pattern gives every adapted linear its rank, so sweep=rank_search has none to search for; leave "
        "some of them out",
    )


def _why_not_full(sweep: Sweep, setup: Setup) -> str | None:
    """The reason alone."""
    full = sweep.settings.full
    if full == "always":
        return None
    if full == "never":
        return "sweep.full=never"
    if sweep.settings.packed != 1:
        return "the trials of a pack share one base, which it trains"
    try:
        config = sweep.compose(0, setup.values_of_full, WORDS).config
        model = this_machine.planned_model(config)
        check_planned(config, model)
        plan = plan_of(config, model, machine_here(config))
    except UserError as error:
        return str(error)
    if plan.fits is None:
        return "nothing says how much memory these machines have; name the card (card=h100), or set sweep.full=always"
    return None if plan.fits else f"it does not fit {plan.machine.name} by calculation ({needs(plan)})"
