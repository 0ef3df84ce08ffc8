"""Train several trials on one model: `python -m distlora.training.multi_trial.worker GROUP`, one process per rank."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import UserError, check_ranks
from distlora.config.file import load_config, settings_by_name
from distlora.parallel import Ranks, join_ranks, leave_ranks, watch
from distlora.parallel.stop_and_save import Control
from distlora.system import atomic_io
from distlora.system.stop_signals import STOPPED_NAME, Stopped, name_of
from distlora.training.multi_trial.inbox import Inbox, read_settings
from distlora.training.multi_trial.protocol import check_trial
from distlora.training.multi_trial.trainer import MultiTrialTrainer
from distlora.training.setup import start_run_model


def run(folder: Path, ranks: Ranks) -> None:
    """Train the trials of GROUP on this rank, until the inbox is closed and empty or all ranks agreed to stop."""
    config = load_config(folder)
    check_ranks(config, ranks.world)
    check_trial(config)
    control = Control(ranks, save_minutes=config.train.save_minutes)
    stopped = folder / STOPPED_NAME
    if ranks.rank == 0:
        stopped.unlink(missing_ok=True)
    try:
        settings = read_settings(folder)
        control.boundary(None, "reading the multi-trial settings", long=True)
        say(f"training up to {settings.slots:,} trials together; reading {config.model.path}")
        base, slots = CheckpointFiles(config.model.path), settings.slots
        # Memory that depends on the rows of a micro-batch is reserved for all slots.
        rows = {name: slots * getattr(config.train, name) for name in ("micro_batch", "global_batch")}
        model, backend, loaded = start_run_model(
            replace(config, train=replace(config.train, **rows)),
            ranks,
            log=say,
            boundary=control.boundary,
            for_slots=True,
            base=base,
        )
        for note in model.notes:
            say(note)
        MultiTrialTrainer(
            model,
            backend,
            control,
            inbox=Inbox(folder, ranks),
            settings=settings,
            shared=settings_by_name(config),
            loaded=loaded,
            base=base,
        ).run()
        backend.barrier()
    except Stopped as stop:
        if ranks.rank == 0:  # The launcher checks for it.
            atomic_io.write_json(stopped, {"signal": name_of(stop.signum), "time": round(time.time(), 3)})
    control.end()


def say(text: str) -> None:
    """Print a line about the multi-trial run. Rank 0's lines are shown; the others' go to their logs."""
    print(text, flush=True)


def main() -> None:
    """Run a worker process. The caller (`worker_entry`) records its exceptions."""
    if len(sys.argv) != 2:
        raise UserError(
            "usage: python -m distlora.training.multi_trial.worker GROUP (the launcher does this: `distlora sweep`)"
        )
    folder = Path(sys.argv[1])
    ranks = join_ranks(load_config(folder).cluster.timeout_seconds)
    watch.at(None, "reading the multi-trial settings", long=True)
    run(folder, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    main()
