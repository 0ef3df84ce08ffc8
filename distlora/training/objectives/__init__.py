"""Objectives: what a run minimizes, a file each but for the next-token loss (objective.py) and those of pairs.

`config/objectives.py` says what each needs of the data, the model and the settings.
"""

from distlora.config import RolloutConfig, TrainConfig
from distlora.training.objectives.distill import Distill
from distlora.training.objectives.grpo import GRPO, MismatchError
from distlora.training.objectives.kto import KTO
from distlora.training.objectives.objective import Losses, NextToken, Objective
from distlora.training.objectives.pairs import DPO, IPO, ORPO, SimPO
from distlora.training.objectives.process_reward import ProcessReward
from distlora.training.objectives.reward import RewardModel

__all__ = ["CLASSES", "DPO", "GRPO", "Losses", "MismatchError", "NextToken", "Objective", "RewardModel", "objective_of"]

CLASSES: dict[str, type[Objective]] = {
    "sft": NextToken,
    "dpo": DPO,
    "ipo": IPO,
    "orpo": ORPO,
    "simpo": SimPO,
    "kto": KTO,
    "distill": Distill,
    "on_policy_distill": Distill,
    "grpo": GRPO,
    "reward": RewardModel,
    "process_reward": ProcessReward,
}
"""Class of each value of train.objective."""


def objective_of(train: TrainConfig, rollout: RolloutConfig | None = None) -> Objective:
    """Return the objective of train.objective. `rollout`: None where no answer is sampled."""
    return CLASSES[train.objective](train, rollout or RolloutConfig())
