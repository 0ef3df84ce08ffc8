"""`distlora verify RUN`: whether everything in a run folder is whole and belongs together. Imports no torch.

`verify` gives one Item after the other as it has looked at them, in the order in which a run makes them. It changes
nothing, and reads every byte of what the run has saved and of its packed rows.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from distlora.checkpoint.verify.items import (
    Item,
    damaged,
    note,
    ok,
)
from distlora.checkpoint.verify.records import (
    check_data,
    check_lines,
    check_summary,
    left_over,
)
from distlora.checkpoint.verify.saved import check_checkpoints, check_results
from distlora.config import Config, UserError, require
from distlora.config.file import load_config
from distlora.run_folder.layout import DATA_NAME, METRICS_NAME, SUMMARY_NAME
from distlora.weights.start_file import START_NAME, read_start_record, start_path

__all__ = ["Item", "verify"]


def verify(run_dir: Path) -> Iterator[Item]:
    """What a run folder holds, and what is wrong with it. Raises UserError for a folder without a run."""
    require((run_dir / "config.yaml").is_file(), f"{run_dir} holds no run (no config.yaml); name a run folder")
    config = None
    try:
        config = load_config(run_dir)
        yield ok("config.yaml", f"{config.adapter.method} of {config.model.name or config.model.path}")
    except UserError as error:
        yield damaged("config.yaml", str(error))
    if _is_running(run_dir):
        yield note(run_dir.name, "the run is going on: what it is writing now may look unfinished")
    yield from _guarded(DATA_NAME, lambda: check_data(run_dir))
    if config is not None:
        yield from _guarded(START_NAME, lambda: _check_start(config))
    yield from _guarded("checkpoints", lambda: check_checkpoints(run_dir, config))
    yield from _guarded("results", lambda: check_results(run_dir, config))
    yield from _guarded(METRICS_NAME, lambda: check_lines(run_dir))
    yield from _guarded(SUMMARY_NAME, lambda: check_summary(run_dir))
    yield from left_over(run_dir)


def _guarded(name: str, check: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """A check's items; what cannot be read at all is damaged, and does not end the others."""
    try:
        yield from check()
    except (UserError, OSError) as error:
        yield damaged(name, str(error))


def _is_running(run_dir: Path) -> bool:
    """Whether launchers hold the run: one exclusively, or several machines together
    (distlora_launcher/running/holding.py)."""
    try:
        with (run_dir / "config.yaml").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # Not ours to write, or a file system without locks.
        return False
    return False


def _check_start(config: Config) -> Iterator[Item]:
    """RUN/initial_adapter.safetensors by its digest, where adapters start from the base's weights."""
    if not start_path(config).is_file():
        if config.adapter.decomposes:
            yield note(START_NAME, "is not there: the first start makes it")
        return
    with_base = Path(config.model.path).is_dir()
    record = read_start_record(config, with_base=with_base)
    assert record is not None
    yield ok(START_NAME, f"{record.method}{'' if with_base else ', its base is not here'}")
