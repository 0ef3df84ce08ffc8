"""The workers of a run on this node: started, watched and restarted by the agent of torch.distributed.elastic.

torch's agent knows processes. `Agent` adds what a run needs: rank 0's output is shown, requests to stop reach the
workers, a failure is printed with its reason, and one that a restart would meet again ends the run. This module imports
torch, so the launcher imports it only when workers start (`workers.py`).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, HashStore, Store, TCPStore
from torch.distributed.elastic.agent.server import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, MultiprocessContext
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from distlora.system.exit_codes import DONE, STOPPED
from distlora.system.listening import listen
from distlora.system.progress import STILL_SECONDS
from distlora.system.stop_signals import HANDLED_BY_TORCH, SIGNALS, TO_WORKERS, Forwarder
from distlora_launcher.compose.checks import split_endpoint
from distlora_launcher.launch import bound
from distlora_launcher.launch.failures import (
    GAVE_UP,
    Failure,
    end,
    first_failure,
    killed,
    read_error,
    read_errors,
    read_gave_up,
    resume_point,
    set_aside_attempt,
    stopped_without_workers,
    write_killed,
)
from distlora_launcher.launch.lock import file_identity, host_name
from distlora_launcher.launch.rendezvous import Rendezvous
from distlora_launcher.terminal.output import Output, warn

LOOK_SECONDS = 0.2
"""Interval between looks at the workers. Rank 0's output is shown at once."""
FILES_SECONDS = 0.5
"""Interval between looks at the files of workers and other nodes, which may lie on a network file system."""
READ_SECONDS = 60
"""Longest wait for the node that serves the store: one that lost power or its cable does not answer."""
LOST_SECONDS = 10
"""Time in which workers may end by themselves after the store's node is gone."""
KILL_SECONDS = 30
"""Time after which torch's agent kills workers that do not end when another has failed."""


class Ended(Exception):
    """Ends the workers of this node for good."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def run_agent(
    run_dir: Path,
    scratch: Path,
    requests: Forwarder,
    *,
    processes: int,
    module: str,
    max_restarts: int,
    rendezvous: Rendezvous | None,
    forks: bool,
    saves: bool,
) -> int:
    """Run this node's workers to the end in the main thread; print why they failed; return the exit code.

    scratch: an empty folder of this node. requests: receives the requests to stop. forks: whether workers are forks of
    this process, which share what it has imported. The others: see `run_workers`.
    """
    log_dir = run_dir / "logs"
    output = Output(log_dir / "rank_0.log", scratch)
    messages = log_dir / ("torchrun.log" if rendezvous is None else f"torchrun_{host_name()}.log")
    arguments = (str(log_dir), output.path, module, str(run_dir))
    agent: Agent | None = None
    failure: Failure | None = None
    try:
        with logged(messages):
            spec = WorkerSpec(
                role="default",
                local_world_size=processes,
                rdzv_handler=make_meeting(rendezvous),
                entrypoint=bound.run_rank if forks else sys.executable,
                args=arguments if forks else ("-m", bound.__name__, bound.RANK, *arguments),
                max_restarts=max_restarts,
                monitor_interval=1e-3,  # `look` waits.
            )
            agent = Agent(spec, scratch, run_dir, requests, output, rendezvous, saves=saves)
            requests.attach(agent)
            result = agent.run()
            if result is None or result.is_failed():
                raise Ended(Failure("torch's agent has given up", f"its messages are in {messages}"))
            agent.leave()
    except Ended as ended:
        assert agent is not None, "only the agent ends a run"
        failure = agent.outcome(ended.failure)
    except (RendezvousError, DistError, OSError) as error:
        failure = start_failure(error, run_dir, messages, rendezvous)
    finally:
        gc.unfreeze()  # Else nanobind (triton) reports every frozen object as a leak when Python ends.
        requests.detach()
        output.drain()
        output.close()
    return DONE if failure is None else end(failure, log_dir, several_nodes=rendezvous is not None)


class Agent(LocalElasticAgent):
    """torch's agent with our looks: `_monitor_workers` is called every LOOK_SECONDS while workers run."""

    def __init__(
        self,
        spec: WorkerSpec,
        scratch: Path,
        run_dir: Path,
        requests: Forwarder,
        output: Output,
        rendezvous: Rendezvous | None,
        *,
        saves: bool,
    ) -> None:
        forks = callable(spec.entrypoint)
        super().__init__(spec, DefaultLogsSpecs(str(scratch)), start_method="fork" if forks else "spawn")
        self._run_dir, self._logs, self._nodes = run_dir, run_dir / "logs", rendezvous
        assert isinstance(spec.rdzv_handler, Meeting)
        self._meeting: Meeting = spec.rdzv_handler
        self._meeting.store_state.look = self.look
        self._requests, self._output, self._forks, self._saves = requests, output, forks, saves
        self._runs = False
        """True while workers run that signals can be sent to."""
        self._kills = False
        """True if torch waited for workers, and then killed them."""
        self._told = self._began = time.monotonic()
        """Time of the newest line about a slow start; infinite once rank 0 has written something."""
        self._read = -math.inf
        """Time of the newest look at files."""
        self._restarts, self._restarting = 0, False
        """Number of restarts; True while the failure is printed and the next workers have not started yet."""
        self._hangs: set[float] = set()
        """Times of the errors of hangs after which the workers were killed."""
        self._printed_ranks: list[int] = []
        # Files of an earlier start, which a node that joins late finds.
        self._stale_gave_up = file_identity(self._logs / GAVE_UP)
        self._stale = {path: file_identity(path) for path, _ in read_errors(self._logs)}

    # What a `Forwarder` needs of the process that it sends requests to.

    def poll(self) -> None:
        """Return None: the agent runs as long as requests are forwarded to it."""

    def send_signal(self, signum: int) -> None:
        """Pass a request to stop on to the workers that run; without them, `look` ends the run."""
        self._signal_workers(TO_WORKERS.get(signum, signum) if self._saves else signal.SIGKILL)

    def kill(self) -> None:
        """Kill the workers that run."""
        self._signal_workers(signal.SIGKILL)

    def _signal_workers(self, signum: int) -> None:
        if not self._runs or self._pcontext is None:
            return
        for pid in self._pcontext.pids().values():
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                if hasattr(os, "waitid"):  # Raises for a pid that is no child any more, and may be another process's.
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.kill(pid, signum)

    def leave(self) -> None:
        """Leave the other nodes at a good end. After a failure they would end before they are told the reason."""
        self._meeting.store_state.look = None
        self._meeting.shutdown()

    def outcome(self, failure: Failure) -> Failure:
        """Return why the run ends: a request that killed it, or its last failure and how often it was restarted."""
        signum = self._requests.received
        if failure.code == STOPPED:
            return failure
        if signum is not None and (self._requests.killed or not self._saves):
            return killed(signal.SIGINT if self._requests.killed else signum, self._logs)
        if self._restarts == 0:
            return failure
        times = "once" if self._restarts == 1 else f"{self._restarts} times"
        line = f"the workers were restarted {times} (cluster.max_restarts={self._worker_group.spec.max_restarts})"
        return replace(failure, see=f"{failure.see}\n{line}".strip())

    def look(self, seconds: float) -> None:
        """Show rank 0's output, waiting at most `seconds` for it. Raises Ended if the run has to end.

        That is on a failure of any node that a restart would meet again, and on a request to stop while no workers run.
        """
        if self._output.pump(seconds):
            self._told = math.inf
        elif time.monotonic() - self._told > STILL_SECONDS:
            self._told = time.monotonic()
            warn(f"still starting the workers ({self._told - self._began:.0f} s)")
        if time.monotonic() - self._read >= FILES_SECONDS:
            self._read = time.monotonic()
            with contextlib.suppress(OSError):  # Of a network file system; the next look reads again.
                self._look_at_files()
        if time.monotonic() - self._meeting.lost > LOST_SECONDS:
            raise RendezvousConnectionError("The node of the endpoint does not answer")
        if not self._runs:
            self._end_if_requested()

    def _look_at_files(self) -> None:
        """Read what workers and other nodes have left. Raises Ended (see `look`) and OSError."""
        errors = self._errors()
        hangs = {error["time"] for error in errors if error["type"] == "HungError"}
        if hangs - self._hangs:
            self._hangs |= hangs
            self.kill()  # torch waits 30 s for one that is stopped.
        failure = first_failure(self._logs, {}, errors)
        if failure is not None and failure.repeats:
            raise Ended(failure)
        gave_up = file_identity(self._logs / GAVE_UP) if self._nodes is not None else None
        if gave_up not in (None, self._stale_gave_up) and (failure := read_gave_up(self._logs)) is not None:
            raise Ended(failure)

    def _end_if_requested(self) -> None:
        """Raise Ended on a request to stop, which no worker is left to answer."""
        signum = self._requests.received
        if signum is not None and self._saves and not self._requests.killed:
            raise Ended(stopped_without_workers(self._run_dir, signum))
        if signum is not None:
            raise Ended(killed(signum, self._logs))

    def _errors(self) -> list[dict[str, Any]]:
        errors = read_errors(self._logs)
        return [error for path, error in errors if self._stale.get(path) != file_identity(path)]

    # Methods of torch's agent, in the order in which it calls them.

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ranks = [worker.global_rank for worker in worker_group.workers]
        self._output.drain()
        set_aside_attempt(self._logs, ranks, at_least=self._worker_group.spec.max_restarts - self._remaining_restarts)
        self._restarting = False
        if self._nodes is not None:
            self._print_ranks(ranks)
        if self._forks:
            gc.freeze()  # A garbage collection writes to every object, which would copy the pages that forks share.
        with blocked():
            self._end_if_requested()
            try:
                pids = super()._start_workers(worker_group)
            except BaseException:
                for fork in multiprocessing.active_children():  # torch ends only workers that have all started.
                    fork.kill()
                raise
            self._runs = True
        if self._requests.killed:  # Requests that arrived while no worker could hear them.
            self.kill()
        elif self._requests.received is not None:
            self.send_signal(self._requests.received)
        return pids

    def _print_ranks(self, ranks: list[int]) -> None:
        """Print this node's ranks once they change: the node with rank 0 shows the progress."""
        if ranks == self._printed_ranks:
            return
        self._printed_ranks = ranks
        here = f"rank {ranks[0]} runs" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]} run"
        log = self._logs / "rank_0.log"
        elsewhere = "" if 0 in ranks else f"; progress is shown on rank 0's node and in {log}"
        warn(f"{here} on {host_name()}{elsewhere}")

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self.look(LOOK_SECONDS)
        began = time.monotonic()
        result = super()._monitor_workers(worker_group)
        self._kills = time.monotonic() - began >= KILL_SECONDS
        if result.state != WorkerState.HEALTHY:
            self._runs = False
        if result.state == WorkerState.FAILED:
            self._report(result)
        return result

    def _report(self, result: RunResult) -> None:
        """Print the failure that a restart may cure. Raises Ended for another, and once all ranks have stopped."""
        codes = {rank: failed.exitcode for rank, failed in result.failures.items()}
        if isinstance(self._pcontext, MultiprocessContext) and self._pcontext._pc is not None:
            # The result has one failed fork, which may have died of the end of another.
            forks = zip(self._worker_group.workers, self._pcontext._pc.processes, strict=True)
            codes |= {worker.global_rank: fork.exitcode for worker, fork in forks if fork.exitcode}
        if STOPPED in codes.values():  # The ranks leave together, so torch may have ended others that had saved, too.
            raise Ended(Failure("", "", STOPPED))
        # If the disk of the logs is full, a worker left its error in torch's file.
        spare = [read_error(Path(failed.error_file), rank) for rank, failed in result.failures.items()]
        errors = [*self._errors(), *(error for error in spare if error is not None)]
        if errors and self._kills:  # Then the ranks that were killed are not the first that failed.
            codes = {rank: code for rank, code in codes.items() if code != -signal.SIGKILL}
        failure = first_failure(self._logs, codes, errors)
        assert failure is not None, "a failed worker has an exit code"
        if failure.killed_rank is not None:
            write_killed(self._logs, failure, time.time())
        if failure.repeats or self._remaining_restarts == 0 or self._requests.killed or not self._saves:
            raise Ended(failure)
        if self._requests.received is not None:
            warn(failure.short)
            self._end_if_requested()
        self._restarts += 1
        self._restarting = True
        point = resume_point(self._run_dir)
        warn(f"{failure.short}; restart {self._restarts} of {self._worker_group.spec.max_restarts}, {point}")

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if not self._restarting:
            warn(f"the nodes of the run have changed; restarting {resume_point(self._run_dir)}")
        super()._restart_workers(worker_group)

    def _shutdown(self, *_: Any, **options: Any) -> None:
        self._runs = False
        # Nobody is left to save with, and a worker that is stopped or hangs would hear no SIGTERM. The options are
        # torch's own: 2.11 has no timeout.
        super()._shutdown(signal.SIGKILL, **options)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Keep requests to stop pending in workers that start meanwhile; keep this process's handler of torch's signal.

    Here a request may still be handled, by another thread of torch or BLAS: `_start_workers` passes it on.
    """
    handler = signal.getsignal(HANDLED_BY_TORCH)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, *TO_WORKERS.values()})
    try:
        yield
    finally:
        signal.signal(HANDLED_BY_TORCH, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StoreState(C10dRendezvousBackend):
    """The state of the meeting in the store, with looks at the run while this node waits for others."""

    look: Callable[[float], None] | None = None

    def get_state(self) -> tuple[bytes, Any] | None:
        """Return the state of the meeting, which every node reads each second."""
        if self.look is not None and threading.current_thread() is threading.main_thread():
            self.look(0.0)
        return super().get_state()


class Meeting(DynamicRendezvousHandler):
    """torch's rendezvous of this node with the others. If the store's node is gone, workers may end by themselves."""

    store_state: StoreState
    lost = math.inf
    """Time at which the node of the store did not answer."""

    def num_nodes_waiting(self) -> int:
        """Return the number of nodes that wait to join; 0 once the store's node does not answer."""
        if self.lost == math.inf:
            try:
                return int(super().num_nodes_waiting())
            except RendezvousConnectionError:
                self.lost = time.monotonic()
        return 0


def make_meeting(rendezvous: Rendezvous | None) -> Meeting:
    """Return torch's rendezvous of this node with the others, or with itself if it is alone."""
    store: Store = HashStore() if rendezvous is None else open_store(rendezvous)
    nodes, run_id = (1, "one-node") if rendezvous is None else (rendezvous.nodes, rendezvous.run_id)
    # By default torch takes the host's name, which laptops often cannot resolve.
    address = "127.0.0.1" if rendezvous is None else rendezvous.address
    state = StoreState(store, run_id)
    timeout = RendezvousTimeout(
        join=timedelta(seconds=60 if rendezvous is None else rendezvous.join_seconds),
        last_call=timedelta(seconds=1),  # There are no more nodes than are needed.
    )
    meeting = Meeting.from_backend(run_id, store, state, nodes, nodes, address, timeout)
    meeting.store_state = state
    return meeting


def open_store(rendezvous: Rendezvous) -> TCPStore:
    """Return the store of a run's nodes, which listens on the endpoint's address alone, on the node of the endpoint."""
    host, port = split_endpoint(rendezvous.endpoint)
    timeout = timedelta(seconds=READ_SECONDS)
    if rendezvous.is_host is not False:
        try:
            listening = listen(host, port).detach()
            return TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening, timeout=timeout
            )
        except OSError as error:
            if rendezvous.is_host or error.errno != errno.EADDRINUSE:
                raise
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def start_failure(error: Exception, run_dir: Path, log: Path, rendezvous: Rendezvous | None) -> Failure:
    """Return why the agent of this node ended although no worker failed."""
    see = f"the messages of torch.distributed.elastic are in {log}"
    if rendezvous is None:
        return Failure(f"the workers could not be started: {error}", see)
    endpoint = rendezvous.endpoint
    where = f"the {rendezvous.nodes} nodes of this run (rendezvous {endpoint})"
    if isinstance(error, RendezvousTimeoutError):
        reason = (
            f"not all of {where} joined within {rendezvous.join_seconds} s (cluster.timeout_seconds); continue with "
            f"`distlora resume {run_dir}` on each"
        )
    elif isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        reason = f"the port of {endpoint} is in use on this node; stop what listens there, or use another port"
    elif isinstance(error, OSError):
        reason = f"the workers could not be run: {error}"
    elif isinstance(error, RendezvousClosedError):
        reason = f"one of {where} has given up; see its messages and RUN/logs"
    else:
        reason = f"the connection to {endpoint} was lost: that node has ended or is down"
    return Failure(reason, see)


LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing")


class MessageFile(logging.Handler):
    """Appends messages to a file; what a full disk does not take is lost."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write(f"{self.format(record)}\n")


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Write the messages of torch's agent, and why it could not run, into its log instead of on the terminal."""
    handler = MessageFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    except (RendezvousError, DistError, OSError):
        loggers[0].exception("The workers could not be run")
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
