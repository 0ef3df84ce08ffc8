"""Objectives: what a run minimizes, a file each.

`config/objectives.py` says what each needs of the data, the model and the settings.
"""

from distlora.config import RolloutConfig, TrainConfig
from distlora.training.objectives.distill import Distill
from distlora.training.objectives.dpo import DPO
from distlora.training.objectives.grpo import GRPO, MismatchError
from distlora.training.objectives.ipo import IPO
from distlora.training.objectives.kto import KTO
from distlora.training.objectives.next_token import NextToken
from distlora.training.objectives.objective import Losses, Objective
from distlora.training.objectives.orpo import ORPO
from distlora.training.objectives.process_reward import ProcessReward
from distlora.training.objectives.reward import RewardModel
from distlora.training.objectives.simpo import SimPO

__all__ = [
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "ORPO",
    "Distill",
    "Losses",
    "MismatchError",
    "NextToken",
    "Objective",
    "ProcessReward",
    "RewardModel",
    "SimPO",
    "objective_of",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": NextToken,
    "dpo": DPO,
    "ipo": IPO,
    "orpo": ORPO,
    "simpo": SimPO,
    "kto": KTO,
    "distill": Distill,
    "reward": RewardModel,
    "process_reward": ProcessReward,
}
"""Objectives by train.objective."""


def objective_of(train: TrainConfig, rollout: RolloutConfig | None = None) -> Objective:
    """Return the objective of train.objective. `rollout`: where answers are sampled."""
    if train.needs.data == "prompts":
        assert rollout is not None, "an objective of sampled answers"
        return GRPO(train, rollout)
    return OBJECTIVES[train.objective](train)
