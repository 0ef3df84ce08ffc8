"""Write RUN/rollouts and RUN/eval_answers: answers and their rewards, for a person to read, as parquet files.

Letters: N answers, G answers of a group (of one prompt).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distlora.config import UserError
from distlora.data.files import read_file, write_parquet
from distlora.run_folder.layout import answers_file, answers_files
from distlora.system import atomic_io
from distlora.system.exit_codes import require_package
from distlora.training.sampled_answers import Rollout

NOTABLE = 3
"""Answers of each category that are shown of an evaluation."""


class AnswerFiles:
    """The newest `keep` files of answers in a folder. Every rank makes one, and the rank that writes calls `write`."""

    def __init__(self, folder: Path, keep: int, *, done: int, writes: bool) -> None:
        """Remove the files of steps that a run which continues after `done` steps does again.

        Raises UserError if pyarrow is missing.
        """
        if keep > 0:
            require_package("pyarrow", f"rollout.keep={keep}", otherwise=", or set rollout.keep=0")
        self.folder, self._keep, self.writes = folder, keep, writes and keep > 0
        for step, path in answers_files(folder).items() if writes else ():
            if step > done:
                path.unlink()

    def write(self, step: int, columns: Mapping[str, Any]) -> None:
        """Write the answers of a step, and remove the oldest files. Raises OSError if the disk refuses it."""
        self.folder.mkdir(exist_ok=True)
        path = answers_file(self.folder, step)
        atomic_io.replace_file(path, lambda temporary: write_parquet(temporary, columns))
        for old in [*answers_files(self.folder).values()][: -self._keep]:
            old.unlink()

    def before(self, step: int) -> list[dict[str, Any]]:
        """Return the answers of the newest file before a step; none without one, or if no files are kept.

        Raises UserError if it is damaged, or was rewritten without what is compared.
        """
        older = [path for number, path in answers_files(self.folder).items() if number < step and self._keep > 0]
        rows = [record.value for record in read_file(older[-1], "", "auto")] if older else []
        for row in rows:
            if not isinstance(row.get("group"), int) or not isinstance(row.get("completion"), str):
                raise UserError(f"{older[-1]} has rows without 'group' or 'completion'; restore it, or remove it")
        return rows


def notable_answers(
    columns: Mapping[str, Any], before: Sequence[Mapping[str, Any]], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the best and worst answers of an evaluation, and those whose reward has changed most, NOTABLE of each.

    `columns` are those of `columns_of`, `before` the rows of the evaluation before, `prompts` (N,) texts to show. A row
    has category, reward, prompt and text; a changed one also reward_before and before. Answers that all have one reward
    are neither best nor worst.
    """
    now = zip(columns["group"], columns["reward"].tolist(), columns["completion"], strict=True)
    scored = [
        {"reward": reward, "prompt": prompts[group], "text": text, "group": group}
        for group, reward, text in now
        if not np.isnan(reward)
    ]
    ranked = sorted(scored, key=lambda answer: answer["reward"])
    count = min(NOTABLE, len(ranked) // 2) if ranked and ranked[0]["reward"] < ranked[-1]["reward"] else 0
    rows = [{"category": "best", **answer} for answer in ranked[::-1][:count]]
    rows += [{"category": "worst", **answer} for answer in ranked[:count]]
    old = {answer["group"]: answer for answer in before if "reward" in answer}
    changed = [
        {"category": "changed", **answer, "reward_before": earlier["reward"], "before": earlier["completion"]}
        for answer in scored
        if (earlier := old.get(answer["group"])) is not None and earlier["completion"] != answer["text"]
    ]
    rows += sorted(changed, key=lambda row: -abs(row["reward"] - row["reward_before"]))[:NOTABLE]
    return [{name: value for name, value in row.items() if name != "group"} for row in rows]


def columns_of(
    step: int,
    rollout: Rollout,
    totals: np.ndarray,
    advantages: np.ndarray | None,
    names: Sequence[str],
    group: int,
    tokenizer: Any,
) -> dict[str, Any]:
    """Return the columns of the N answers of a step; NaN where an answer is left out or a reward does not apply.

    `totals` and `advantages` (N,), None for answers that are not trained on; `names` of the rewards. Prompts are
    decoded with special tokens, as the model reads them, and answers without, as rewards do. Dialogues have them too:
    they show who speaks.
    """
    wholes = np.split(rollout.tokens, np.cumsum(rollout.prompt_lengths + rollout.lengths)[:-1])
    parts = [np.split(whole, [size]) for whole, size in zip(wholes, rollout.prompt_lengths.tolist(), strict=True)]
    prompts = [tokenizer.decode(prompt) for prompt, _ in parts[::group]]
    own = rollout.written_lengths
    alone = (own == rollout.lengths).tolist()
    columns: dict[str, Any] = {
        "step": np.full(len(rollout), step),
        "group": np.arange(len(rollout)) // group,
        "prompt": [prompts[index // group] for index in range(len(rollout))],
        "completion": [
            tokenizer.decode(answer, skip_special_tokens=is_alone)
            for (_, answer), is_alone in zip(parts, alone, strict=True)
        ],
        "tokens": own,
        "ended": rollout.ended == 1,
    }
    if names:
        columns["reward"] = totals
        if advantages is not None:
            columns["advantage"] = np.where(np.isnan(totals), np.nan, advantages)
        columns |= {f"rewards/{name}": rollout.rewards[:, number] for number, name in enumerate(names)}
        columns["failed"] = rollout.failed == 1
    return columns
