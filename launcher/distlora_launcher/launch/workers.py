"""Workers on this node, from their start to the exit code, and workers of commands without a run.

Imports no torch until workers start.
"""

import contextlib
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from distlora.config import ModelConfig, QuantConfig, TrackerConfig, require
from distlora.config.json_files import object_or_empty
from distlora.system.command_worker import REQUEST_NAME, encode_call
from distlora.system.exit_codes import DONE
from distlora.system.stop_signals import HANDLED_BY_TORCH, Forwarder, forwarding
from distlora_launcher.compose.checks import gpu_count
from distlora_launcher.launch.bound import PARENT, start_command
from distlora_launcher.launch.failures import (
    Failure,
    end,
    killed,
    set_aside_logs,
    stopped_without_workers,
)
from distlora_launcher.launch.rendezvous import Rendezvous

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP threads sleep while they wait. By default they spin, which slows down CPU runs on shared cores threefold."""

KEEP_PAGES = {
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": str(256 * 2**20),
}
"""glibc keeps freed pages: page faults of fresh tensors cost 3-6 % of a CPU step. If memory is short, the user sets
MALLOC_MMAP_THRESHOLD_=262144, which takes less memory and 8-13 % more CPU time."""
_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": (-1, -1), "MALLOC_MMAP_THRESHOLD_": (-4, 0), "MALLOC_TOP_PAD_": (-2, 256 * 2**20)}
"""The same for mallopt(3), which forks of this process need: M_TRIM_THRESHOLD, M_MMAP_MAX and M_TOP_PAD."""

ON_CPU = KEEP_PAGES | PASSIVE
"""Environment of workers that compute on the CPU. A variable that the user set is kept."""

IMPORTS = (
    "torch",
    "distlora_launcher.launch.agent",
    "distlora.training.setup",
    "distlora.training.open_run",
    "transformers.models.auto.modeling_auto",
    "transformers.masking_utils",
    "transformers.modeling_layers",
)
"""Modules that the launcher imports before it forks workers; new processes import all but the first two themselves."""

WORKER = "distlora.training.worker"
"""Module of the workers that train."""


def run_workers(
    run_dir: Path,
    *,
    processes: int,
    worker_module: str = WORKER,
    max_restarts: int = 0,
    rendezvous: Rendezvous | None = None,
    forwarder: Forwarder | None = None,
    saves: bool = True,
) -> int:
    """Run `python -m worker_module run_dir` in `processes` ranks to the end; print why it failed; return the exit code.

    max_restarts: how often failed workers are restarted, unless they would fail in the same way.
    rendezvous: of a run of several nodes.
    forwarder: handles signals already; None: signals are handled for the duration.
    saves: whether the workers save on a request to stop; else it kills them.

    Exit codes: 0 if every rank ended well; 2 if the first failure is a UserError; 75 if the workers saved and stopped,
    or no worker was running that could; 128 + n if signal n killed them; else 1.
    """
    log_dir = run_dir / "logs"
    if rendezvous is None:
        set_aside_logs(log_dir)
    with (
        contextlib.nullcontext(forwarder) if forwarder is not None else forwarding() as requests,
        environment(worker_environment(processes, rendezvous) | {PARENT: str(os.getpid())}),
        tempfile.TemporaryDirectory(prefix="distlora-workers-") as scratch,
    ):
        forks = import_for_workers(worker_module, lambda: requests.received is not None)
        if requests.received is not None:
            signum = requests.received
            failure = stopped_without_workers(run_dir, signum) if saves else killed(signum, log_dir)
            return end(failure, log_dir, several_nodes=rendezvous is not None)
        try:
            from distlora_launcher.launch.agent import run_agent
        except (ImportError, OSError) as error:
            failure = Failure(f"torch cannot be imported: {error}", "")
            return end(failure, log_dir, several_nodes=rendezvous is not None)
        return run_agent(
            run_dir,
            Path(scratch),
            requests,
            processes=processes,
            module=worker_module,
            max_restarts=max_restarts,
            rendezvous=rendezvous,
            forks=forks,
            saves=saves,
        )


_forks: bool | None = None
"""Whether workers are forks of this process; None until the first of them start."""


def import_for_workers(
    module: str = WORKER, ends: Callable[[], bool] = lambda: False, *, more: Sequence[str] = ()
) -> bool:
    """Import what workers of `module` need, until `ends()`; return whether they are to be forks of this process.

    Without GPUs they are, and share the imports. With GPUs they are new processes, since a fork cannot use CUDA once
    its parent has touched it; on macOS too, whose libraries refuse to work in a fork; and if somebody else has imported
    torch here, since its threads do not survive a fork.
    """
    global _forks
    if _forks is None:
        _forks = sys.platform == "linux" and gpu_count() == 0 and "torch" not in sys.modules
        if _forks:
            keep_pages()
            if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
                del sys.path[0]  # A folder ./datasets in the working folder must not shadow a package.
    trains = module.partition(".")[0] == "distlora"
    for name in (*IMPORTS, *more) if _forks and trains else IMPORTS[:2]:
        if ends():
            break
        try:
            with quiet():
                importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except BaseException:  # The worker meets it again and reports it.
            continue
    return _forks


def import_while(
    process: "subprocess.Popen[bytes]", model: ModelConfig, quant: QuantConfig, tracker: TrackerConfig, *, workers: int
) -> None:
    """Import what the `workers` of a run need while a process prepares it; stop when that process has failed."""
    family = object_or_empty(Path(model.path) / "config.json").get("model_type")
    more = [
        *(["wandb"] if tracker.wandb else []),
        *([f"transformers.models.{family}.modeling_{family}"] if isinstance(family, str) else []),
    ]

    def has_failed() -> bool:
        return process.poll() not in (None, DONE)

    with environment(worker_environment(workers)):
        if import_for_workers(ends=has_failed, more=more) and quant.default_format and not has_failed():
            from distlora_kernels.nf4_cpu import has_bitsandbytes

            with quiet():
                has_bitsandbytes()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries print on stderr as they are imported: a worker prints it again, into its log."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def keep_pages() -> None:
    """Do for this process and its forks what KEEP_PAGES does for new processes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for name, (parameter, value) in _MALLOPT.items():
            if os.environ.get(name) == KEEP_PAGES[name]:
                libc.mallopt(parameter, value)


def worker_environment(processes: int, rendezvous: Rendezvous | None = None) -> dict[str, str]:
    """Return the launcher's environment plus what workers need. A variable that the user set is kept."""
    # Settings of another job's torchrun, if this one runs inside of it.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONSAFEPATH": "1",  # A folder ./datasets in the working folder must not shadow a package.
    }
    if gpu_count() == 0:
        defaults |= ON_CPU
    if rendezvous is not None:
        defaults |= rendezvous.environment()
    # torch's store outlives a rank, and would give out the address of a dead rank. It also listens everywhere.
    fixed = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": HANDLED_BY_TORCH.name}
    return defaults | own | fixed


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Have `values` as this process's environment for the duration: libraries and workers read it."""
    before = dict(os.environ)
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


ENTRY = "distlora.system.command_worker"
"""The module that every worker process of a command runs."""


def become(worker: str, request: Any) -> NoReturn:
    """Replace this process by `worker` ("module:function"), which then owns the terminal and its signals."""
    sys.stdout.flush()
    command = [sys.executable, "-m", ENTRY, encode_call(worker, request)]
    os.execve(command[0], command, worker_environment(processes=1))


def run_alone(worker: str, request: Any) -> int:
    """Run `worker` in a process of its own; return its exit code."""
    sys.stdout.flush()
    call, environment = encode_call(worker, request), worker_environment(processes=1)
    code = start_command(ENTRY, call, environment=environment, stdin=None, in_session=True).wait()
    return code if code >= 0 else 128 - code


def run_several(worker: str, request: Any, processes: int) -> int:
    """Run `worker` in `processes` ranks; return the exit code. Keep their logs if they fail."""
    folder = Path(tempfile.mkdtemp(prefix=f"{worker.partition(':')[0].replace('.', '-')}-"))
    (folder / REQUEST_NAME).write_text(encode_call(worker, request), encoding="utf-8")
    code = run_workers(folder, processes=processes, worker_module=ENTRY, saves=False)
    if code == DONE:
        shutil.rmtree(folder)
    return code


def check_processes(processes: int) -> None:
    """Refuse a number of processes that this node has no GPUs for."""
    require(processes > 0, f"--processes={processes} is not a valid number of processes; write 1 or more")
    available = gpu_count()
    require(
        available == 0 or processes <= available,
        f"--processes={processes}, but this node has {available} GPU{'s' if available > 1 else ''}; "
        f"write --processes {available}",
    )
