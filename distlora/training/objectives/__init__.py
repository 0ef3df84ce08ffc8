"""Objectives: what a run minimizes, a file each.

`config/objectives.py` says what each needs of the data, the model and the settings.
"""

from distlora.config import TrainConfig
from distlora.training.objectives.dpo import DPO
from distlora.training.objectives.next_token import NextToken
from distlora.training.objectives.objective import Losses, Objective

__all__ = ["DPO", "Losses", "NextToken", "Objective", "objective_of"]

OBJECTIVES: dict[str, type[Objective]] = {"sft": NextToken, "dpo": DPO}
"""Objectives by train.objective."""


def objective_of(train: TrainConfig) -> Objective:
    """Return the objective of train.objective."""
    return OBJECTIVES[train.objective](train)
