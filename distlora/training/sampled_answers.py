"""The answers of a rollout with their rewards: their file in a checkpoint, and their metrics.

Letters: N answers, G answers of a group (of one prompt), R rewards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import read_header
from distlora.config import UserError
from distlora.training.objectives.grpo import deviations_of_rows, means_of_rows
from distlora.weights.reader import TORCH_DTYPES, Reader

_STORED = {np.dtype(np.float64): np.dtype(np.int64)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Answers to the prompts of one rollout, in the order of the prompts, G of each. The same on every rank."""

    step: np.ndarray
    """() int64: optimizer steps that were done when they were sampled."""
    prompt_lengths: np.ndarray
    """(N,) int64."""
    lengths: np.ndarray
    """(N,) int64: tokens of each answer; of a dialogue all behind its prompt."""
    written: np.ndarray
    """Flat int64: for each token of the answers 1 if the model wrote it, 0 if the environment of a dialogue did."""
    tokens: np.ndarray
    """Flat int64: prompt and answer, one after the other."""
    logps: np.ndarray
    """Flat fp32: log-probability of each token of the answers, as the sampler reported it; 0 for the environment's."""
    ended: np.ndarray
    """(N,) int64: 1 if the model ended the answer, or model and environment the dialogue, 0 if a limit did."""
    rewards: np.ndarray
    """(N, R) float64: NaN where a reward does not apply or failed."""
    failed: np.ndarray
    """(N,) int64: 1 if a reward of the answer failed, or the environment."""

    def tensors(self) -> dict[str, Tensor]:
        """Return it as the tensors of a checkpoint."""
        arrays = {item.name: np.atleast_1d(getattr(self, item.name)) for item in fields(self)}
        # No weight is fp64, so the files of checkpoints have no such dtype: its bits.
        return {
            name: torch.from_numpy(array.view(_STORED.get(array.dtype, array.dtype))) for name, array in arrays.items()
        }

    @classmethod
    def read(cls, path: Path) -> Rollout:
        """Read the file of a checkpoint. Raises UserError for a file that is none."""
        remedy = "move its folder out of the run folder, then the checkpoint before it is used"
        stored, names = read_header(path, remedy=remedy), {item.name for item in fields(cls)}
        if stored.keys() | {"written"} != names or any(
            segment.dtype not in TORCH_DTYPES for segment in stored.values()
        ):
            raise UserError(
                f"{path} is damaged: it holds {', '.join(stored)}, not {', '.join(sorted(names))}; {remedy}"
            )
        with Reader() as reader:
            arrays = {
                name: reader.read([segment], 0, segment.numel).view(segment.shape).numpy()
                if segment.numel
                else np.zeros(segment.shape, np.int64)  # Rewards, where there are none.
                for name, segment in stored.items()
            }
        arrays.setdefault("written", np.ones(len(arrays["logps"]), np.int64))  # Of a run before there were dialogues.
        return cls(**arrays | {"step": arrays["step"].reshape(()), "rewards": arrays["rewards"].view(np.float64)})

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def written_lengths(self) -> np.ndarray:
        """(N,) int64: tokens of each answer that the model wrote."""
        answers = np.repeat(np.arange(len(self)), self.lengths)
        return np.bincount(answers, self.written, len(self)).astype(np.int64)

    def with_answers(self, places: np.ndarray, others: Rollout, chosen: np.ndarray) -> Rollout:
        """Return it with the answers at `places` (n,) replaced by those at `chosen` (n,) of another rollout."""
        source = np.arange(len(self))
        source[places] = len(self) + chosen
        arrays = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "step"}
        joined = {name: np.concatenate([array, getattr(others, name)]) for name, array in arrays.items()}
        lengths = joined["lengths"]
        sizes = {"tokens": joined["prompt_lengths"] + lengths, "logps": lengths, "written": lengths}
        for name, array in joined.items():
            if name in sizes:
                answers = np.split(array, np.cumsum(sizes[name])[:-1])
                joined[name] = np.concatenate([answers[index] for index in source])
            else:
                joined[name] = array[source]
        return Rollout(step=self.step, **joined)

    def totals(self, weights: Sequence[float]) -> np.ndarray:
        """Return (N,) float64 sums of the rewards that apply, weighted (1 each without weights).

        NaN if none applies, or one failed: the answer is left out of its group, as its sum would lack a term that the
        others have.
        """
        if self.rewards.shape[1] == 0:  # They are trained on without rewards.
            return np.where(self.failed == 0, 0.0, math.nan)
        applies = (~np.isnan(self.rewards)).any(axis=1)
        return np.where(applies & (self.failed == 0), sums_of_rewards(self.rewards, weights), math.nan)


def sums_of_rewards(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return (N,) float64 weighted sums of the rewards (N, R) that apply; inf where one is no finite number of fp32."""
    with np.errstate(over="ignore", invalid="ignore"):
        # Summed from the first reward to the last, whatever their number is.
        sums = (np.nan_to_num(rewards, nan=0.0) * (weights or 1.0)).cumsum(axis=1)[:, -1]
        return np.where(np.isfinite(sums.astype(np.float32)), sums, np.inf)


def has_equal_rewards(totals: np.ndarray, group: int) -> np.ndarray:
    """Return (N / G,) float64: 1 for a group whose total rewards are equal, 0 for others, NaN for one without any."""
    groups = totals.reshape(-1, group)
    is_equal = np.nan_to_num(deviations_of_rows(groups)) < 1e-8
    return np.where(np.isnan(groups).all(axis=1), np.nan, is_equal)


def figures_of(rollout: Rollout, totals: np.ndarray, names: Sequence[str], group: int) -> dict[str, float]:
    """Return the metrics of a rollout, by TRL's names, without means of no reward.

    entropy: its estimate from the sampled tokens.
    """
    deviations = deviations_of_rows(totals.reshape(-1, group))
    figures = {
        "reward": float(means_of_rows(totals[None])[0]),
        "reward_std": float(means_of_rows(deviations[None])[0]),
        "frac_reward_zero_std": float(means_of_rows(has_equal_rewards(totals, group)[None])[0]),
        "completions/mean_length": float(rollout.written_lengths.mean()),
        "completions/clipped_ratio": float(np.mean(rollout.ended == 0)),
        "entropy": float(-rollout.logps[rollout.written == 1].mean(dtype=np.float64)),
        "rewards/failed": int(rollout.failed.sum()),
    }
    if not names:
        figures = {name: value for name, value in figures.items() if "reward" not in name}
    for number, name in enumerate(names):
        figures[f"rewards/{name}/mean"] = float(means_of_rows(rollout.rewards[None, :, number])[0])
    return {name: value for name, value in figures.items() if not math.isnan(value)}
