"""Train several trials on one model: `python -m distlora.training.multi_trial.worker PACK`, one process per rank."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import Config, UserError, check_ranks
from distlora.config.file import load_config
from distlora.parallel import Ranks, join_ranks, leave_ranks, watch
from distlora.parallel.control import Control
from distlora.system import atomic_io
from distlora.system.stop_signals import STOPPED_NAME, Stopped, name_of
from distlora.training.multi_trial.inbox import Inbox, read_settings
from distlora.training.multi_trial.pack import Pack
from distlora.training.multi_trial.protocol import check_trial
from distlora.training.setup import start_run_model


def run(pack_dir: Path, ranks: Ranks) -> None:
    """Train the trials of PACK on this rank, until the inbox is closed and empty or all ranks agreed to stop."""
    config = load_config(pack_dir)
    check_ranks(config, ranks.world)
    check_trial(config)
    control = Control(ranks, save_minutes=config.train.save_minutes)
    stopped = pack_dir / STOPPED_NAME
    if ranks.rank == 0:
        stopped.unlink(missing_ok=True)
    try:
        _train(pack_dir, config, ranks, control)
    except Stopped as stop:
        if ranks.rank == 0:  # The launcher checks for it.
            atomic_io.write_json(stopped, {"signal": name_of(stop.signum), "time": round(time.time(), 3)})
    control.end()


def _train(pack_dir: Path, config: Config, ranks: Ranks, control: Control) -> None:
    """Train. Raises Stopped, on every rank, after everything is saved."""
    settings = read_settings(pack_dir)
    control.boundary(None, "reading the pack", long=True)
    say(f"a pack of up to {settings.slots:,} trials; reading {config.model.path}")
    # Memory that depends on the rows of a micro-batch is reserved for all slots.
    slots, train = settings.slots, config.train
    train = replace(train, micro_batch=slots * train.micro_batch, global_batch=slots * train.global_batch)
    full = replace(config, train=train)
    base = CheckpointFiles(config.model.path)
    model, backend, loaded = start_run_model(full, ranks, log=say, boundary=control.boundary, for_slots=True, base=base)
    for note in model.notes:
        say(note)
    inbox = Inbox(pack_dir, ranks)
    Pack(model, backend, control, inbox=inbox, settings=settings, config=config, loaded=loaded, base=base).run()
    backend.barrier()


def say(text: str) -> None:
    """Print a line about the multi-trial run. Rank 0's lines are shown; the others' go to their logs."""
    print(text, flush=True)


def main() -> None:
    """Run a worker process. The caller (`worker_entry`) records its exceptions."""
    if len(sys.argv) != 2:
        raise UserError(
            "usage: python -m distlora.training.multi_trial.worker PACK (the launcher does this: `distlora sweep`)"
        )
    pack_dir = Path(sys.argv[1])
    ranks = join_ranks(load_config(pack_dir).cluster.timeout_seconds)
    watch.at(None, "reading the pack", long=True)
    run(pack_dir, ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    main()
