"""Write RUN/rollouts: the sampled answers and their rewards, for a person to read; a parquet file per rollout.

Letters: N answers, G answers of a group (of one prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distlora.data.files import write_parquet
from distlora.run_folder.layout import rollout_file, rollout_files
from distlora.system import atomic_io
from distlora.system.exit_codes import require_package

if TYPE_CHECKING:
    from distlora.training.rollouts import Rollout


class RolloutFiles:
    """The newest `keep` rollouts of a run. Every rank makes one, and the rank that writes calls `write`."""

    def __init__(self, run_dir: Path, keep: int, *, done: int, writes: bool) -> None:
        """Remove the files of rollouts that a run which continues after `done` steps samples again.

        Raises UserError if pyarrow is missing.
        """
        if keep > 0:
            require_package("pyarrow", f"rollout.keep={keep}", otherwise=", or set rollout.keep=0")
        self._run_dir, self._keep, self.writes = run_dir, keep, writes and keep > 0
        if not writes:
            return
        for first, path in rollout_files(run_dir).items():
            if first > done:
                path.unlink()

    def write(self, first: int, columns: dict[str, Any]) -> None:
        """Write the answers whose first step is `first` (counted from 1), and remove the oldest files.

        Raises OSError if the disk refuses it.
        """
        path = rollout_file(self._run_dir, first)
        path.parent.mkdir(exist_ok=True)
        atomic_io.replace_file(path, lambda temporary: write_parquet(temporary, columns))
        for old in [*rollout_files(self._run_dir).values()][: -self._keep]:
            old.unlink()


def columns_of(
    rollout: Rollout,
    totals: np.ndarray,
    advantages: np.ndarray,
    names: Sequence[str],
    group: int,
    tokenizer: Any,
) -> dict[str, Any]:
    """Return the columns of N answers; NaN where an answer is left out or a reward does not apply.

    `totals` and `advantages` (N,), `names` of the rewards. Prompts are decoded with special tokens, as the model reads
    them, and answers without, as rewards do.
    """
    wholes = np.split(rollout.tokens, np.cumsum(rollout.prompt_lengths + rollout.lengths)[:-1])
    parts = [np.split(whole, [size]) for whole, size in zip(wholes, rollout.prompt_lengths.tolist(), strict=True)]
    prompts = [tokenizer.decode(prompt) for prompt, _ in parts[::group]]
    columns: dict[str, Any] = {
        "step": np.full(len(rollout), int(rollout.step) + 1),
        "group": np.arange(len(rollout)) // group,
        "prompt": [prompts[index // group] for index in range(len(rollout))],
        "completion": [tokenizer.decode(answer, skip_special_tokens=True) for _, answer in parts],
        "tokens": rollout.lengths,
        "ended": rollout.ended == 1,
    }
    if names:
        columns |= {"reward": totals, "advantage": np.where(np.isnan(totals), np.nan, advantages)}
        columns |= {f"rewards/{name}": rollout.rewards[:, number] for number, name in enumerate(names)}
        columns["failed"] = rollout.failed == 1
    return columns
