"""elementwise.cpp and attention.cpp, compiled for the machine that they run on and loaded into this process. Imports no
torch.

Each process compiles for itself (2.3 CPU seconds) into a folder that is gone once the library is loaded: no file that
is executed lies where another user, or a machine with another processor, could have left it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in ("elementwise", "attention"))
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
WIDE = ("x86_64", "AMD64")
"""Machines on which gcc takes half of a vector unless it is told."""


class NotCompiledError(Exception):
    """The compiler did not make a library of the source, or it cannot be loaded; the message says what it said and
    what to set."""


def compiler() -> list[str] | None:
    """The words of a C++ compiler: those of CXX, else c++ or g++; None where there is none."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # A quote that is not closed.
        return None
    if named:
        return named if shutil.which(named[0]) else None
    return next(([found] for name in ("c++", "g++") if (found := shutil.which(name))), None)


def why_not() -> str | None:
    """Why this machine cannot compile; None where it can."""
    if sys.platform != "linux":
        return f"that is for Linux alone and this is {sys.platform}"
    if compiler() is not None:
        return None
    if named := os.environ.get("CXX"):
        return f"CXX={named} is no program here; name a C++ compiler"
    return "there is no C++ compiler (c++ or g++); install one (apt-get install g++, `module load gcc`)"


def says() -> str | None:
    """The first line of the compiler's --version, which the bits of a library depend on beside the processor; None
    where there is none."""
    words = compiler()
    if words is None:
        return None
    with contextlib.suppress(OSError):
        said = subprocess.run([*words, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        return next(iter(said.stdout.splitlines()), None)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled at the first call. Raises NotCompiledError, and MemoryError where the compiler had too little."""
    words = compiler()
    if words is None:
        raise NotCompiledError(str(why_not()))
    wide = ["-mprefer-vector-width=512"] if platform.machine() in WIDE else []
    with _folder() as folder:
        made, linked = [str(Path(folder, f"{source.stem}.o")) for source in SOURCES], Path(folder, "compiled.so")
        for source, to in zip(SOURCES, made, strict=True):
            _run([*words, *FLAGS, *wide, "-c", str(source), "-o", to])
        # Without -fopenmp, which would bring a second OpenMP beside torch's, with threads of its own.
        _run([*words, "-shared", *made, "-o", str(linked)])
        try:
            return ctypes.CDLL(str(linked))
        except OSError as error:
            raise NotCompiledError(
                f"what {shlex.join(words)} made cannot be loaded: {error}; set TMPDIR to a folder whose files may be "
                "executed, CXX=g++"
            ) from None


def _folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="distlora-compiled-", ignore_cleanup_errors=True)
    except OSError as error:
        raise NotCompiledError(
            f"no file can be made to compile into: {error}; set TMPDIR to a folder with room"
        ) from None


def _run(words: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},  # Its messages are read here.
        )
    except OSError as error:
        raise NotCompiledError(f"{words[0]} cannot be run: {error}; name a C++ compiler by CXX=") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        first = next((line for line in said if "error" in line), said[0] if said else f"exit code {done.returncode}")
        if done.returncode < 0 or "Killed" in first:
            raise MemoryError(f"`{words[0]}` was killed, as the machine does where memory ends: {first}")
        full = "No space left" in done.stderr
        cure = "set TMPDIR to a folder with room" if full else "name another compiler by CXX="
        raise NotCompiledError(f"`{words[0]}` failed: {first}; {cure}")
