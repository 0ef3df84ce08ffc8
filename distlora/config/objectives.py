"""List the needs of each value of train.objective: its data, a reference, its own settings. No torch.

The losses themselves are in `distlora/training/objectives/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

PAIRS = ("preference",)
"""Values of data.format that hold pairs of answers."""

PROMPTS = ("prompt_only",)
"""Values of data.format that hold prompts alone."""

STEPS = ("steps",)
"""Values of data.format that hold answers in steps, each with a label."""

DataForm = Literal["documents", "pairs", "judged", "prompts", "steps"]
"""What a record of the data is to an objective: a document with trained tokens; a chosen and a rejected answer; an
answer that is judged good or bad (a pair is two of these); a prompt whose answers the model samples and
`data.rewards` score; or an answer in steps that are labelled."""


PAIR_FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics of pairs of answers, by TRL's names. accuracies: fraction of the pairs whose chosen answer has the higher
reward."""
JUDGED_FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "answers/chosen",
    "answers/rejected",
    "kl",
)
"""Metrics of judged answers, most by TRL's names, in which chosen answers are the good ones. answers/chosen: their
fraction."""
_JUDGED_FRACTIONS = {
    f"{name}/{side}": f"answers/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveNeeds:
    """Needs of a run with this objective."""

    summary: str
    """The objective in a few words, as in "train.objective=dpo compares ..."."""
    data: DataForm = "documents"
    """Form of the data."""
    labels: int = 0
    """Outputs of a trained head that replaces the LM head (1: a reward; 2: a step is wrong or right); 0: the model has
    its LM head."""
    margins: bool = False
    """True if a pair's record may have a margin."""
    reference: bool = False
    """True if every row runs a second time, without gradient, through the initial model."""
    rewards: bool = False
    """True if it needs data.rewards."""
    distributions: bool = False
    """True if the loss compares next-token distributions with the reference's, not losses of the labels alone."""
    unit: str = "target_tokens"
    """Metric that counts the units of a step, over which the loss is a mean."""
    figures: tuple[str, ...] = ()
    """Metrics besides the loss; each is a mean over the units."""
    reference_weight: str | None = None
    """Setting whose value 0 stands for no reference."""
    maxima: tuple[str, ...] = ()
    """Metrics that are the largest value of all ranks."""
    figures_of: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Metrics that are means over some of the units only, and the metric that is the fraction of these units."""
    mismatched: bool = False
    """True if each step also runs, without gradient, its prompts with answers to other prompts (KTO's estimate of KL).
    """
    settings: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Fields of `train` that it reads and no other part of a run does, with the value that null stands for."""
    lr: float | None = None
    """Default of optim.lr for adapters; null: by the model. Full fine-tuning takes a tenth.

    Sources: DPO, TRL's script with LoRA; IPO, as DPO; ORPO, TRL's script with LoRA, ten times the paper's 8e-6 for full
    fine-tuning; SimPO, ten times the paper's 5e-7 for full fine-tuning; KTO, LLaMA-Factory's example with LoRA, the
    upper end of what TRL's page recommends."""

    @property
    def task_type(self) -> str:
        """Return PEFT's name for the class of transformers that the result belongs to."""
        return ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")[self.labels]

    def score_shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the head's parameters by name; classes have a bias, as in transformers."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.labels, hidden)} if self.labels else {}
        return shapes | ({"bias": (self.labels,)} if self.labels > 1 else {})


OBJECTIVES: Mapping[str, ObjectiveNeeds] = MappingProxyType(
    {
        "sft": ObjectiveNeeds(summary="trains on tokens"),
        "dpo": ObjectiveNeeds(
            summary="compares a chosen with a rejected answer",
            data="pairs",
            reference=True,
            unit="pairs",
            figures=PAIR_FIGURES,
            settings={"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0},
            lr=5e-6,
        ),
        "ipo": ObjectiveNeeds(
            summary="compares a chosen with a rejected answer",
            data="pairs",
            reference=True,
            unit="pairs",
            figures=PAIR_FIGURES,
            settings={"beta": 0.1, "sft_weight": 0.0},
            lr=5e-6,
        ),
        "orpo": ObjectiveNeeds(
            summary="trains on the chosen answer and compares it with the rejected one",
            data="pairs",
            unit="pairs",
            figures=PAIR_FIGURES,
            settings={"beta": 0.1},
            lr=8e-5,
        ),
        "simpo": ObjectiveNeeds(
            summary="compares a chosen with a rejected answer",
            data="pairs",
            unit="pairs",
            figures=PAIR_FIGURES,
            settings={"beta": 2.0, "label_smoothing": 0.0, "target_margin": 0.5, "sft_weight": 0.0},
            lr=5e-6,
        ),
        "distill": ObjectiveNeeds(
            summary="trains on tokens and on a teacher's distribution of them",
            reference=True,
            distributions=True,
            figures=("divergence",),
            settings={"beta": 0.0, "kd_ratio": 0.5, "kd_temperature": 1.0},
        ),
        "on_policy_distill": ObjectiveNeeds(
            summary="samples answers to prompts and trains on a teacher's distribution of their tokens",
            data="prompts",
            reference=True,
            distributions=True,
            figures=("divergence",),
            settings={"beta": 1.0, "kd_temperature": 1.0},
        ),
        "grpo": ObjectiveNeeds(
            summary="samples answers to prompts and trains on their rewards",
            data="prompts",
            reference=True,
            reference_weight="beta",
            rewards=True,
            figures=("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "rollout/logprob_difference_mean"),
            maxima=("rollout/logprob_difference_max",),
            settings={"beta": 0.0},
            lr=1e-5,
        ),
        "reward": ObjectiveNeeds(
            summary="trains a reward of a chosen above that of a rejected answer",
            data="pairs",
            labels=1,
            margins=True,
            unit="pairs",
            figures=PAIR_FIGURES[:4],
            settings={"center_rewards": 0.0},
            lr=1e-4,
        ),
        "kto": ObjectiveNeeds(
            summary="learns from single answers that are judged good or bad",
            data="judged",
            reference=True,
            unit="answers",
            figures=JUDGED_FIGURES,
            figures_of=_JUDGED_FRACTIONS,
            mismatched=True,
            settings={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
            lr=5e-6,
        ),
        "process_reward": ObjectiveNeeds(
            summary="learns which steps of an answer are right",
            data="steps",
            labels=2,
            unit="labels",
            figures=("labels/accuracies",),
            lr=1e-4,
        ),
    }
)
"""Objectives by their name in train.objective."""


def means_of(needs: ObjectiveNeeds, sums: Sequence[float], units: int) -> dict[str, float]:
    """Return the means of the loss and the metrics from their sums over so many units; of no unit there is none."""
    means = {name: total / units for name, total in zip(("loss", *needs.figures), sums, strict=True)}
    for name, among in needs.figures_of.items():
        mean = means.pop(name)
        if means[among] > 0:
            means[name] = mean / means[among]
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
    return means


def takes_format(objective: str, format: str) -> bool:
    """Return whether an objective trains on data of this data.format; `auto` is decided by the records."""
    forms: dict[str, DataForm] = {
        **dict.fromkeys(PAIRS, "pairs"),
        **dict.fromkeys(PROMPTS, "prompts"),
        **dict.fromkeys(STEPS, "steps"),
    }
    form = forms.get(format, "documents")
    needed = OBJECTIVES[objective].data
    if needed == "judged":
        return form not in ("prompts", "steps") and format != "text"
    return format == "auto" or form == needed


def objectives_of(format: str) -> list[str]:
    """Return the objectives that train on data of this data.format, the most usual first."""
    return [objective for objective in OBJECTIVES if takes_format(objective, format)]
