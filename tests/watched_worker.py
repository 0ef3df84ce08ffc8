"""A worker of the launcher that marks its steps, and hangs on one rank as RUN/behaviour says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from distlora.parallel import join_ranks, leave_ranks, watch

TIMEOUT_SECONDS = 2.0


def main() -> None:
    behaviour = (Path(sys.argv[1]) / "behaviour").read_text()
    ranks = join_ranks(TIMEOUT_SECONDS)
    for step in range(1, 6):
        watch.at(step, "forward")
        if step == 4 and ranks.rank == 1:
            hang(behaviour)
        torch.distributed.all_reduce(torch.ones(1))
        watch.at(step, "update")
    leave_ranks(ranks)


def hang(behaviour: str) -> None:
    if behaviour == "asleep once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(600)


if __name__ == "__main__":
    main()
