"""torchrun, killed when the launcher ends, and ignoring requests to stop.

    python -m distlora_launcher.launch.torchrun_entry [--import MODULE ...] [--log FILE] [--serve HOST PORT \
        [--shared]] -- TORCHRUN_ARGUMENTS

torchrun kills workers 30 s after a signal that it handles, and a step with its save may take longer. So the launcher
signals the workers itself, and the signals stay blocked here: in every thread, and in the workers until they handle
them, so that none is lost while they start.

With --import it imports the modules that its forked workers need (torchrun's --start-method=fork), once for all. With
--log it is started early: it waits for a line on stdin, returns if stdin ends without one, and then writes to FILE.
With --serve it holds the store of a run's nodes, which listens on the address of HOST alone. With --shared the run's
other nodes are processes of this host, of which the first one holds it.
"""

import argparse
import errno
import gc
import importlib
import os
import signal
import sys

from distlora.system.listening import listen
from distlora_launcher.launch.processes import FORWARDED
from distlora_launcher.launch.worker_entry import PARENT, end_with_parent


def main() -> None:
    """Run torchrun with the arguments after --."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    end_with_parent()
    os.environ[PARENT] = str(os.getpid())
    ours, torchrun_arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--import", dest="modules", action="append", default=[])
    parser.add_argument("--log")
    parser.add_argument("--serve", nargs=2)
    parser.add_argument("--shared", action="store_true")
    options = parser.parse_args(ours)
    from torch.distributed import TCPStore
    from torch.distributed import run as torchrun

    for name in options.modules:
        try:
            importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException:  # The worker meets it again and reports it.
            continue
    if options.log is not None:
        if not sys.stdin.buffer.readline():
            return
        redirect(0, os.devnull, os.O_RDONLY)
        redirect(2, options.log, os.O_WRONLY | os.O_APPEND)
    gc.freeze()  # A garbage collection writes to every object, which would copy the pages that forks share.
    if options.serve is not None:
        host, port = options.serve[0], int(options.serve[1])
        try:
            listening = listen(host, port).detach()
            _store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening)
        except OSError as error:
            if not options.shared or error.errno != errno.EADDRINUSE:
                raise
    sys.argv = ["torchrun", *torchrun_arguments]
    torchrun.main()


def redirect(descriptor: int, path: str, flags: int) -> None:
    """Open a file as the given descriptor."""
    file = os.open(path, flags)
    os.dup2(file, descriptor)
    os.close(file)


if __name__ == "__main__":
    main()
