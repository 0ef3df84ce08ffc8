"""Compile the C++ files for the path of this process (processor.py) and load them. Imports no torch.

The library is kept in the folder `kept_in`, by what it was made from and the path it was made for; other processes that
need it wait for the one that compiles (3 to 5 CPU seconds). Where there is no such folder that only this user can
write to, each process compiles into a temporary one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distlora_kernels import processor

SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in ("elementwise", "attention", "products", "decode"))
HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("numbers", "products", "vectors"))
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)

kept_in: Path | None = None
"""Folder of compiled libraries; None to compile in every process."""


class NotCompiledError(Exception):
    """The library could not be compiled or loaded; the message has the compiler's error and a cure."""


def compiler() -> list[str] | None:
    """Return the C++ compiler command: CXX, else c++ or g++; None if there is none."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # A quote that is not closed.
        return None
    if named:
        return named if shutil.which(named[0]) else None
    return next(([compiler] for name in ("c++", "g++") if (compiler := shutil.which(name))), None)


def unavailable_reason() -> str | None:
    """Return why this node cannot compile; None if it can."""
    if sys.platform != "linux":
        return f"compiled CPU kernels need Linux; this is {sys.platform}"
    if compiler() is not None:
        return None
    if named := os.environ.get("CXX"):
        return f"CXX={named} is not a program; set CXX to a C++ compiler"
    return "there is no C++ compiler (c++ or g++); install one (apt-get install g++, `module load gcc`)"


def compiler_version() -> str | None:
    """Return the first line of the compiler's --version, on which results depend besides the processor; or None."""
    words = compiler()
    if words is None:
        return None
    with contextlib.suppress(OSError):
        output = subprocess.run([*words, "--version"], stdin=subprocess.DEVNULL, capture_output=True, errors="replace")
        return next(iter(output.stdout.splitlines()), None)
    return None


def library() -> ctypes.CDLL:
    """Return the library of this process' path, compiled at its first call.

    Raises NotCompiledError, or MemoryError if memory ran out.
    """
    return _library(processor.path())


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    words = compiler() if sys.platform == "linux" else None
    if words is None:
        raise NotCompiledError(str(unavailable_reason()))
    if (kept := _kept(words)) is not None:
        return kept
    with _folder() as folder:
        linked = _linked(words, folder)
        try:
            return ctypes.CDLL(linked)
        except OSError as error:
            raise NotCompiledError(
                f"the library made by {shlex.join(words)} cannot be loaded: {error}; set TMPDIR to a "
                "folder whose files may be executed, or CXX=g++"
            ) from None


def _kept(words: Sequence[str]) -> ctypes.CDLL | None:
    """Return the library of `kept_in`, made if it is missing; None if it cannot be there, or not be compiled."""
    if kept_in is None:
        return None
    try:
        kept_in.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = kept_in.stat()
        # Others could have left a library there, or it could not be loaded, and each process would compile it again.
        if status.st_uid != os.getuid() or status.st_mode & 0o022 or os.statvfs(kept_in).f_flag & os.ST_NOEXEC:
            return None
        file = kept_in / f"{_key(words)}.so"
        with (kept_in / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):  # It is missing, or was damaged by a crash, and is made again.
                return ctypes.CDLL(str(file))
            with tempfile.TemporaryDirectory(prefix=".compiling-", dir=kept_in) as folder:
                linked = _linked(words, folder)
                os.chmod(linked, 0o700)
                os.replace(linked, file)
            return ctypes.CDLL(str(file))
    except (OSError, NotCompiledError):  # It is compiled again elsewhere, where an error is reported.
        return None


def _key(words: Sequence[str]) -> str:
    """Return a digest of the sources, the compiler with its flags and version, and the processor with its features."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in (*SOURCES, *HEADERS)))
    # `-march=native` depends on the processor, the flags of the other paths do not.
    native = [processor.name(), sorted(processor.features())] if processor.path() == "generic" else []
    digest.update(
        repr([words, FLAGS, processor.compiler_flags(), compiler_version(), platform.machine(), native]).encode()
    )
    return digest.hexdigest()[:32]


def _linked(words: Sequence[str], folder: str) -> str:
    """Compile the library into a folder. Return its path."""
    objects, linked = [str(Path(folder, f"{source.stem}.o")) for source in SOURCES], str(Path(folder, "compiled.so"))
    for source, to in zip(SOURCES, objects, strict=True):
        _run([*words, *FLAGS, *processor.compiler_flags(), "-c", str(source), "-o", to])
    # Without -fopenmp, which would load a second OpenMP runtime beside torch's.
    _run([*words, "-shared", *objects, "-o", linked])
    return linked


def _folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="distlora-compiled-", ignore_cleanup_errors=True)
    except OSError as error:
        raise NotCompiledError(
            f"cannot create a folder to compile in: {error}; set TMPDIR to a folder with free space"
        ) from None


def _run(words: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},  # Its messages are parsed here.
        )
    except OSError as error:
        raise NotCompiledError(f"{words[0]} cannot be run: {error}; set CXX to a C++ compiler") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else f"exit code {done.returncode}")
        if done.returncode < 0 or "Killed" in first:
            raise MemoryError(f"`{words[0]}` was killed, probably because memory ran out: {first}")
        full = "No space left" in done.stderr
        cure = "set TMPDIR to a folder with free space" if full else "set CXX to another compiler"
        raise NotCompiledError(f"`{words[0]}` failed: {first}; {cure}")
