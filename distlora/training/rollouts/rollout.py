"""A rollout: sampled answers with their log-probabilities and rewards, and how they become packed sequences.

Letters: N answers, G answers of a group (of one prompt), R rewards, L tokens per row, B rows of a micro-batch.
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
from distlora.config import RolloutConfig, UserError
from distlora.data.loader import EMPTY, IGNORED, MicroBatch
from distlora.data.packing import assign_rows
from distlora.weights.reader import TORCH_DTYPES, Reader

STD_FLOOR = 1e-4
"""Constant that is added to a standard deviation before it divides, as in TRL."""
LENGTH_MULTIPLE = 64
"""The rows of a step are as long as the fullest, rounded up to this, and at most data.sequence_length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Answers to the prompts of one rollout, in the order of the prompts, G of each. The same on every rank."""

    step: np.ndarray
    """() int64: optimizer steps that were done when they were sampled."""
    prompt_lengths: np.ndarray
    """(N,) int64."""
    lengths: np.ndarray
    """(N,) int64: tokens of each answer."""
    tokens: np.ndarray
    """Flat int64: prompt and answer, one after the other."""
    logps: np.ndarray
    """Flat fp32: log-probability of each token of the answers, as the sampler reported it."""
    ended: np.ndarray
    """(N,) int64: 1 if the model ended the answer, 0 if max_new_tokens did."""
    rewards: np.ndarray
    """(N, R) float64: NaN where a reward does not apply or failed."""
    failed: np.ndarray
    """(N,) int64: 1 if a reward of the answer failed."""

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
        if stored.keys() != names or any(segment.dtype not in TORCH_DTYPES for segment in stored.values()):
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
        return cls(**arrays | {"step": arrays["step"].reshape(()), "rewards": arrays["rewards"].view(np.float64)})

    def __len__(self) -> int:
        return len(self.lengths)

    def totals(self, weights: Sequence[float]) -> np.ndarray:
        """Return (N,) float64 sums of the rewards that apply, weighted (1 each without weights).

        NaN if none applies, or one failed: the answer is left out of its group, as its sum would lack a term that the
        others have.
        """
        if self.rewards.shape[1] == 0:  # They are trained on without rewards.
            return np.zeros(len(self), np.float64)
        applies = (~np.isnan(self.rewards)).any(axis=1)
        return np.where(applies & (self.failed == 0), sums_of_rewards(self.rewards, weights), math.nan)


_STORED = {np.dtype(np.float64): np.dtype(np.int64)}


def sums_of_rewards(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Return (N,) float64 weighted sums of the rewards (N, R) that apply; inf where one is no finite number of fp32."""
    with np.errstate(over="ignore", invalid="ignore"):
        # Summed from the first reward to the last, whatever their number is.
        sums = (np.nan_to_num(rewards, nan=0.0) * (weights or 1.0)).cumsum(axis=1)[:, -1]
        return np.where(np.isfinite(sums.astype(np.float32)), sums, np.inf)


def advantages_of(totals: np.ndarray, group: int, scale: str) -> np.ndarray:
    """Return (N,) fp32 advantages from the total rewards (N,), NaN for answers that are left out.

    Reward less the mean of the group's, divided as `scale` (rollout.scale_rewards) says. 0 for what is left out.
    """
    groups = totals.reshape(-1, group)
    values = groups - _means(groups)[:, None]
    if scale == "group":
        values = values / (_deviations(groups)[:, None] + STD_FLOOR)
    elif scale == "batch":
        values = values / (_deviations(totals[None]) + STD_FLOOR)
    return np.nan_to_num(values.reshape(-1), nan=0.0).astype(np.float32)


def _means(rows: np.ndarray) -> np.ndarray:
    """Return the mean of each row's numbers; NaN without any."""
    counts = np.count_nonzero(~np.isnan(rows), axis=1)
    return np.nansum(rows, axis=1) / np.where(counts, counts, np.nan)


def _deviations(rows: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each row with Bessel's correction; NaN with fewer than two values."""
    counts = np.count_nonzero(~np.isnan(rows), axis=1)
    squares = np.nansum((rows - _means(rows)[:, None]) ** 2, axis=1)
    return np.sqrt(squares / np.where(counts > 1, counts - 1, np.nan))


def figures_of(rollout: Rollout, totals: np.ndarray, names: Sequence[str], group: int) -> dict[str, float]:
    """Return the metrics of a rollout, by TRL's names, without means of no reward.

    entropy: its estimate from the sampled tokens.
    """
    groups = totals.reshape(-1, group)
    deviations = _deviations(groups)
    is_equal = np.where(np.isnan(groups).all(axis=1), np.nan, np.nan_to_num(deviations) < 1e-8)
    figures = {
        "reward": float(_means(totals[None])[0]),
        "reward_std": float(_means(deviations[None])[0]),
        "frac_reward_zero_std": float(_means(is_equal[None])[0]),
        "completions/mean_length": float(rollout.lengths.mean()),
        "completions/clipped_ratio": float(np.mean(rollout.ended == 0)),
        "entropy": float(-rollout.logps.mean(dtype=np.float64)),
        "rewards/failed": int(rollout.failed.sum()),
    }
    if not names:
        figures = {name: value for name, value in figures.items() if "reward" not in name}
    for number, name in enumerate(names):
        figures[f"rewards/{name}/mean"] = float(_means(rollout.rewards[None, :, number])[0])
    return {name: value for name, value in figures.items() if not math.isnan(value)}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedAnswers:
    """The answers of a step as rows: prompt and answer are a document, whose labels are the answer's tokens."""

    rows: MicroBatch
    """All rows."""
    num_labels: int

    def __len__(self) -> int:
        return len(self.rows.input_ids)

    def micro_batch(self, rows: np.ndarray, pad: int) -> MicroBatch:
        """Return the rows of these numbers (B,), EMPTY for one without labels."""
        numbers = torch.from_numpy(rows.astype(np.int64))
        is_empty, chosen = numbers == EMPTY, numbers.clamp(min=0)
        batch = MicroBatch._make(None if tensor is None else tensor[chosen] for tensor in self.rows)
        batch.input_ids[is_empty], batch.labels[is_empty] = pad, IGNORED
        batch.position_ids[is_empty] = torch.arange(batch.labels.shape[1])
        return batch._replace(rows=numbers)


def pack_answers(
    rollout: Rollout,
    answers: np.ndarray,
    totals: np.ndarray,
    settings: RolloutConfig,
    *,
    sequence_length: int,
    pad: int,
    with_kl: bool,
) -> PackedAnswers:
    """Pack the answers of these numbers, (n,) integers, for one optimizer step, with weights of rollout.loss_type.

    Answers whose loss has no gradient whatever the model is do not run: those of a group with equal rewards, without a
    KL term, and truncated ones that are masked. They count in the means all the same. `totals` (N,) of all answers.
    """
    advantages = advantages_of(totals, settings.num_generations, settings.scale_rewards)
    counts = ~np.isnan(totals)
    trains = counts & ((rollout.ended == 1) | (not settings.mask_truncated_completions))
    runs = [answer for answer in answers.tolist() if trains[answer] and (with_kl or advantages[answer] != 0)]
    lengths = rollout.lengths
    num_labels = int(lengths[runs].sum())
    # The sum of the weighted losses is divided by num_labels.
    if settings.loss_type == "dapo":
        weights = np.full(len(rollout), num_labels / max(int(lengths[answers][trains[answers]].sum()), 1))
    else:
        divisor = lengths if settings.loss_type == "grpo" else np.full(len(rollout), settings.max_new_tokens)
        weights = num_labels / (max(int(np.count_nonzero(counts[answers])), 1) * divisor)
    sizes = rollout.prompt_lengths + lengths
    row_of = assign_rows(sizes[runs], sequence_length)
    num_rows = max(int(row_of.max(initial=0)) + 1, 1)
    fullest = int(np.bincount(row_of, weights=sizes[runs], minlength=1).max(initial=1))
    length = min(-(-fullest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, sequence_length)
    input_ids = np.full((num_rows, length), pad, np.int64)
    labels = np.full((num_rows, length), IGNORED, np.int64)
    position_ids = np.tile(np.arange(length), (num_rows, 1))
    of_labels = np.zeros((3, num_rows, length), np.float32)
    ends, logp_ends = np.cumsum(sizes), np.cumsum(lengths)
    filled = np.zeros(num_rows, np.int64)
    for row, answer in zip(row_of.tolist(), runs, strict=True):
        start, size = int(filled[row]), int(sizes[answer])
        filled[row] += size
        tokens = rollout.tokens[ends[answer] - size : ends[answer]]
        input_ids[row, start : start + size] = tokens
        # Behind it another answer begins, or the padding.
        position_ids[row, start:] = np.arange(length - start)
        position_ids[row, start + size :] = np.arange(length - start - size)
        # The label at a position is the next token.
        places = slice(start + int(rollout.prompt_lengths[answer]) - 1, start + size - 1)
        labels[row, places] = tokens[rollout.prompt_lengths[answer] :]
        of_labels[0, row, places] = rollout.logps[logp_ends[answer] - lengths[answer] : logp_ends[answer]]
        of_labels[1:, row, places] = np.array([[advantages[answer]], [weights[answer]]])
    sampled = torch.from_numpy(of_labels)
    whole = MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        rows=torch.arange(num_rows),
        logps=sampled[0],
        advantages=sampled[1],
        weights=sampled[2],
    )
    return PackedAnswers(rows=whole, num_labels=num_labels)
