"""Stands in for `distlora.training.worker` in tests of the launcher: does what RUN/behaviour says, without torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from distlora.config import UserError
from distlora.system import stop_signals
from distlora.system.exit_codes import STOPPED
from support.small_disks import fill


class SaveError(Exception):
    """Named as that of a last save that could not be made."""


def main() -> None:
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    behaviour = (run_dir / "behaviour").read_text()
    (run_dir / f"pid_{rank}").write_text(str(os.getpid()))
    print(f"hello from rank {rank} of {os.environ['WORLD_SIZE']}")
    print(f"warning from rank {rank}", file=sys.stderr)
    match behaviour:
        case "environment":
            for name in (
                "OMP_NUM_THREADS",
                "MALLOC_TRIM_THRESHOLD_",
                "OMP_WAIT_POLICY",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
            ):
                print(f"{name}={os.environ.get(name)}")
            threading.Thread(target=time.sleep, args=(3600,)).start()  # As a library may leave one at the end.
        case "terminal":
            print(f"is a terminal: {sys.stdout.isatty()}")
        case "success":
            (run_dir / "adapter").mkdir(exist_ok=True)
        case "rank 1 raises":
            if rank == 1:
                raise RuntimeError("no more memory in rank one")
            while not (run_dir / "logs" / "rank_1.error.json").exists():  # The others then see its connection close.
                time.sleep(0.01)
            raise ConnectionError("peer closed")
        case "rank 1 is killed once" if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            dying = run_dir / "dying"
            if rank == 1:
                dying.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while not dying.exists():  # On a busy machine it may start seconds after this rank.
                time.sleep(0.01)
            time.sleep(0.5)
            raise ConnectionError("peer closed")
        case "rank 1 exits with 3":
            if rank == 1:
                time.sleep(1)  # A real worker imports torch first: the launcher sees each attempt.
                sys.exit(3)
            time.sleep(60)
        case "bad input":
            raise UserError("the adapter has no such thing; write another")
        case "the disk is full":
            fill(run_dir)
            raise SaveError("no space left for step 3")
        case "waits":
            time.sleep(120)
        case "saves when asked to stop" | "rank 1 is killed once":
            (run_dir / f"ready_{rank}").touch()
            while stop_signals.requested() is None:
                time.sleep(0.01)
            (run_dir / stop_signals.STOPPED_NAME).write_text("{}")
            sys.exit(STOPPED)


if __name__ == "__main__":
    main()
