"""Run code that nobody has read: within resource limits, and without network, files and processes of others.

docs/rl.md says what holds with each isolation, and what does not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

MEMORY_BYTES = 1 << 30
"""Address space of the program, which is one process."""
DISK_BYTES = 64 << 20
"""Bytes of a file; within namespaces, of all files of the program."""
THREADS = 64
OPEN_FILES = 256
SAFE_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1"),
}
"""All variables that the program gets, beside HOME and TMPDIR. A thread per core of a large node would not fit, nor
64 MiB of addresses for each thread's heap."""
_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib64", "/nix/store", "/etc/alternatives", "/etc/ld.so.cache"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)
_ANSWER_NAMES = "import answer as _a; globals().update({k: v for k, v in vars(_a).items() if k[:2] != '__'}); del _a\n"


def passes(code: str, tests: str, *, isolation: str, seconds: float) -> bool:
    """Return whether `tests` pass for `code` within `seconds`. Raises OSError if this node cannot isolate them."""
    word = secrets.token_hex(16)
    harness = Path(__file__).with_name("run_tests.py").read_text(encoding="utf-8")
    files = {"answer.py": code, "tests.py": _ANSWER_NAMES + tests, "word": word}
    return run([sys.executable, "-I", "-B", "-c", harness], files, isolation=isolation, seconds=seconds) == word


def run(command: list[str], files: Mapping[str, str], *, isolation: str, seconds: float) -> str:
    """Return the first 4,096 characters that a program prints within `seconds`, started in a folder with `files`.

    It is killed then. Raises OSError with the reason if this node cannot isolate it.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="distlora_code_", ignore_cleanup_errors=True))
        request = {
            "isolation": isolation,
            "folder": os.path.realpath(folder),
            "files": files,
            "command": command,
            "environment": SAFE_ENVIRONMENT,
            "visible": visible_paths(),
            "disk_bytes": DISK_BYTES,
            "limits": {
                "RLIMIT_AS": MEMORY_BYTES,
                "RLIMIT_CPU": math.ceil(seconds),
                "RLIMIT_FSIZE": DISK_BYTES,
                "RLIMIT_NPROC": THREADS,
                "RLIMIT_NOFILE": OPEN_FILES,
                "RLIMIT_CORE": 0,
            },
        }
        source, output, faults = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        source.write(json.dumps(request).encode())
        source.seek(0)
        entry = str(Path(__file__).with_name("sandbox_entry.py"))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", entry, str(os.getpid())],
            stdin=source,
            stdout=output,
            stderr=faults,
            env=SAFE_ENVIRONMENT,
            process_group=0,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        faults.seek(0)
        if reason := faults.read().decode(errors="replace"):
            raise OSError(f"cannot isolate a process ({reason})")
        output.seek(0)
        return output.read(4096).decode(errors="replace")


def visible_paths() -> list[str]:
    """Return what the program sees of this node's files: the system's libraries and this Python, each path once."""
    python = {sys.prefix, sys.base_prefix}
    python |= {*map(os.path.realpath, python)}
    visible: list[str] = []
    for path in sorted([*_SYSTEM, *python], key=lambda path: (not os.path.islink(path), path.count("/"))):
        above = any(path != root and path.startswith(f"{root}/") for root in visible if not os.path.islink(root))
        if path != "/" and os.path.exists(path) and path not in visible and not above:
            visible.append(path)
    return visible


def reason_against(isolation: str) -> str | None:
    """Return why this node cannot run code with this isolation, and what to do, or None."""
    try:
        works, reason = passes("x = 1", "assert x == 1", isolation=isolation, seconds=60), "fails a test that must pass"
    except OSError as error:
        works, reason = False, str(error)
    cure = "in a container that isolates by itself, set data.rewards_isolation=limits (docs/rl.md)"
    return None if works else f"unit_tests with data.rewards_isolation={isolation}: this node {reason}; {cure}"
