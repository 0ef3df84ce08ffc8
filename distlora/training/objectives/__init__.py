"""Objectives: what a run minimizes, a file each.

`config/objectives.py` says what each needs of the data, the model and the settings.
"""

from distlora.config import TrainConfig
from distlora.training.objectives.distill import Distill
from distlora.training.objectives.dpo import DPO
from distlora.training.objectives.ipo import IPO
from distlora.training.objectives.next_token import NextToken
from distlora.training.objectives.objective import Losses, Objective
from distlora.training.objectives.orpo import ORPO
from distlora.training.objectives.simpo import SimPO

__all__ = ["DPO", "IPO", "ORPO", "Distill", "Losses", "NextToken", "Objective", "SimPO", "objective_of"]

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": NextToken,
    "dpo": DPO,
    "ipo": IPO,
    "orpo": ORPO,
    "simpo": SimPO,
    "distill": Distill,
}
"""Objectives by train.objective."""


def objective_of(train: TrainConfig) -> Objective:
    """Return the objective of train.objective."""
    return OBJECTIVES[train.objective](train)
