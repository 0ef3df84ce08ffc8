"""The records of a run: its data and their packed rows, its figures line by line, and what a kill left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from distlora.checkpoint.verify.items import (
    Item,
    damaged,
    note,
    ok,
)
from distlora.config import UserError
from distlora.config.json_files import (
    Shape,
    check_shape,
    parse_object,
    read_object,
)
from distlora.data.cache import content_digest
from distlora.data.rows import PackedRows
from distlora.run_folder.layout import (
    CHECKPOINTS,
    DATA_NAME,
    METRICS_NAME,
    PLAN_NAME,
    SUMMARY_NAME,
    read_record,
)

_DATA: Shape = {"cache": str, "content": str, "splits": {"*": dict}}
_SPLITS = ("train", "eval")
_LINE: Shape = {"step": int}
_SAMPLES_NAME = "samples.jsonl"
_OTHER_RECORDS = (PLAN_NAME, "stopped.json", "slurm.json")
_LEFT_OVER = re.compile(r"\..+\.(tmp|old)|\..+-[0-9a-f]{16}|\.config\.yaml\.\d+")
"""What durable.py, checkpoints/files.py and the launcher write before it gets its name."""


def check_data(run_dir: Path) -> Iterator[Item]:
    """data.json, and the rows that it names, by their digest."""
    path, remedy = run_dir / DATA_NAME, f"make it again with `python -m distlora.data {run_dir}`"
    if not path.is_file():
        yield note(DATA_NAME, f"is not there: the data is not prepared; {remedy}, or resume the run")
        return
    record = read_record(path)
    check_shape(record, _DATA, path, remedy)
    splits = sorted(record["splits"])
    if not set(splits) <= set(_SPLITS):
        raise UserError(f"{path} is damaged: it names the splits {', '.join(splits)}; {remedy}")
    cache = Path(record["cache"])
    if not cache.is_dir():
        yield note(DATA_NAME, f"its packed rows are gone from {cache}; the next start makes them again")
        return
    rows = {split: len(PackedRows.open(cache, split)) for split in splits}
    if content_digest(cache, splits) != record["content"]:
        yield damaged(
            DATA_NAME,
            f"the packed rows in {cache} are not those that the run was prepared with (SHA-256); delete that folder "
            f"and {remedy}",
        )
        return
    counted = ", ".join(f"{number:,} rows to {split}" for split, number in rows.items())
    yield ok(DATA_NAME, counted.replace("to train", "of training").replace("to eval", "held out"))


def check_lines(run_dir: Path) -> Iterator[Item]:
    """metrics.jsonl and samples.jsonl: whole lines, the steps of training and of evaluations each rising."""
    for name in (METRICS_NAME, _SAMPLES_NAME):
        path = run_dir / name
        if path.is_file():
            yield _lines(path, rising=name == METRICS_NAME)


def _lines(path: Path, *, rising: bool) -> Item:
    remedy = "move it out of the run folder: a resume writes on without it"
    content = path.read_bytes()
    lines = content.split(b"\n")
    cut_off = lines.pop()
    last: dict[bool, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_object(line, f"line {number}", remedy)
            check_shape(entry, _LINE, f"line {number}", remedy)
        except UserError as error:
            return damaged(path.name, str(error))
        is_evaluation, step = "eval_loss" in entry, entry["step"]
        before = last.get(is_evaluation)
        if rising and before is not None and step <= before:
            kind = "evaluation of" if is_evaluation else "line of"
            return damaged(
                path.name, f"line {number} is the {kind} step {step}, behind that of step {before}; {remedy}"
            )
        last[is_evaluation] = step
    if cut_off:
        return note(path.name, f"a kill cut off its last line, {len(lines):,} are whole; a resume removes it")
    steps = f" to step {max(last.values()):,}" if last else ""
    return ok(path.name, f"{len(lines):,} lines{steps}")


def check_summary(run_dir: Path) -> Iterator[Item]:
    """summary.json, and the launcher's own records."""
    for name in (SUMMARY_NAME, *_OTHER_RECORDS):
        path = run_dir / name
        if path.is_file():
            try:
                read_object(path, "move it out of the run folder")
                yield ok(name)
            except UserError as error:
                yield damaged(name, str(error))


def left_over(run_dir: Path) -> Iterator[Item]:
    """What a killed process did not finish."""
    for folder in (run_dir, run_dir / CHECKPOINTS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _LEFT_OVER.fullmatch(path.name):
                yield note(
                    str(path.relative_to(run_dir)),
                    "was left by a process that was killed while it wrote; delete it, or let a resume do it",
                )
