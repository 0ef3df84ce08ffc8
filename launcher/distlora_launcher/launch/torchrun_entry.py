"""torchrun itself, bound to the launcher's life and deaf to requests to stop.

    python -m distlora_launcher.launch.torchrun_entry [--import MODULE ...] [--log FILE] -- TORCHRUN'S ARGUMENTS

torchrun kills workers 30 s after a signal that it handles, and a step with its save may take longer. So the launcher
signals the workers itself, and here the signals stay blocked: in every thread, and in the workers until they listen, so
that none is lost while they start.

Of workers that are forks of it (torchrun's --start-method=fork) it imports what they need, once for all. With --log it
is there before its time, while the launcher still prepares the run: it waits for a line on stdin, which ends without
one where nothing is to be started, and writes to FILE from then on.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys

from distlora_launcher.launch.signals import FORWARDED
from distlora_launcher.launch.worker_entry import PARENT, end_with_parent


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    end_with_parent()
    os.environ[PARENT] = str(os.getpid())
    own, torchruns = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--import", dest="modules", action="append", default=[])
    parser.add_argument("--log")
    options = parser.parse_args(own)
    from torch.distributed import run as torchrun

    for name in options.modules:
        try:
            importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException:  # A worker meets it again, and tells of it.
            continue
    if options.log is not None:
        if not sys.stdin.buffer.readline():
            return
        replace(0, os.devnull, os.O_RDONLY)
        replace(2, options.log, os.O_WRONLY | os.O_APPEND)
    gc.freeze()  # A collection writes to every object that it looks at, and what forks share would be shared no more.
    sys.argv = ["torchrun", *torchruns]
    torchrun.main()


def replace(descriptor: int, path: str, flags: int) -> None:
    file = os.open(path, flags)
    os.dup2(file, descriptor)
    os.close(file)


if __name__ == "__main__":
    main()
