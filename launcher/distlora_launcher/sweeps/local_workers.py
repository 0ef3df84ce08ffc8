"""Run the workers of a sweep on this node: an equal number of GPUs each, stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distlora.config import require
from distlora.run_folder.sweep import COMPLETE, TrialRecord, at_rest
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED, INTERRUPTED, STOPPED
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.signals import forwarding
from distlora_launcher.launch.worker_entry import PARENT
from distlora_launcher.sweeps.folder import Sweep
from distlora_launcher.sweeps.results import format_table, summary_lines
from distlora_launcher.sweeps.search import Search, make_search
from distlora_launcher.terminal.output import say, shown

POLL_SECONDS = 0.1


def visible_devices(workers: int, processes: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker; None if the node has no GPU. Raises UserError for too few."""
    available = gpu_count()
    if available == 0:
        return [None] * workers
    share = available // workers
    require(
        share >= processes,
        f"sweep.workers={workers} with cluster.gpus_per_node={processes} need {workers * processes} GPUs, and this "
        f"node has {available}; set sweep.workers={max(1, available // processes)}",
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        [str(number) for number in range(available)]
        if visible is None
        else [entry.strip() for entry in visible.split(",") if entry.strip() not in ("", "-1")]
    )
    return [",".join(gpus[worker * share : (worker + 1) * share]) for worker in range(workers)]


def run_workers_here(sweep: Sweep, processes: int) -> int:
    """Run the workers to their end and print the results. Returns the exit code.

    `processes`: ranks per trial. With too few GPUs for sweep.workers it starts as many workers as there are GPUs for.
    """
    wanted, available = sweep.settings.workers, gpu_count()
    workers_here = wanted if available == 0 else max(1, min(wanted, available // processes))
    if workers_here < wanted:
        say(f"{workers_here} of {wanted} workers (sweep.workers), as this node has {available} GPUs")
    gpus = visible_devices(workers_here, processes)
    with forwarding() as forwarder:
        workers = [_start(sweep.folder, index, share) for index, share in enumerate(gpus)]
        heard = None
        while alive := [worker for worker in workers if worker.poll() is None]:
            if alive[0] is not heard:  # Any live worker can stand for all of them.
                heard = alive[0]
                forwarder.attach(heard, lambda _: _ask_to_stop(workers))
            if forwarder.killed:
                for worker in alive:
                    worker.kill()
            time.sleep(POLL_SECONDS)
        forwarder.detach()
    codes = [worker.returncode for worker in workers]
    return _report(sweep, codes, killed=forwarder.killed)


def _report(sweep: Sweep, codes: Sequence[int], *, killed: bool) -> int:
    """Print the results. Returns the exit code."""
    if set(codes) == {BAD_INPUT}:
        return BAD_INPUT
    from distlora_launcher.sweeps.study import Study

    search = make_search(sweep)
    study = Study(sweep, search)
    code = show_results(sweep, study.records(), search)
    if study.is_over():
        return code
    say(f"continue with: distlora resume {shown(sweep.folder)}")
    return INTERRUPTED if killed else STOPPED if STOPPED in codes else FAILED


def show_results(sweep: Sweep, trials: Sequence[TrialRecord], search: Search) -> int:
    """Print the table. Returns 1 if no trial is complete, else 0."""
    trials = at_rest(trials)  # The workers have ended.
    say(f"\n{format_table(sweep, trials)}\n")
    for line in [*summary_lines(sweep, trials), *search.conclusion(trials)]:
        say(line)
    return DONE if any(trial.state == COMPLETE for trial in trials) else FAILED


def _start(folder: Path, index: int, gpus: str | None) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONSAFEPATH": "1", PARENT: str(os.getpid())}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    module = "distlora_launcher.sweeps.worker"
    command = [sys.executable, "-m", "distlora_launcher.launch.bound", module, str(folder), "--index", str(index)]
    sys.stdout.flush()
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def _ask_to_stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGTERM)
