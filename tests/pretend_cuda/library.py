"""Compile and load device.cpp, before torch is imported: torch asks for the hooks of CUDA once."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "pretend_cuda"


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise ImportError("torch is not installed")
    return Path(found.origin).parent


def library_path() -> Path:
    """Return where the library for this source and this torch is, or will be."""
    key = hashlib.sha256(SOURCE.read_bytes() + (_torch_folder() / "version.py").read_bytes()).hexdigest()[:16]
    return CACHE / f"pretend_cuda_{key}.so"


def build(compiler: str) -> Path | None:
    """Compile the library unless it is there, which takes half a minute; return None if there is no such compiler.

    Raises CalledProcessError with the compiler's output if the source does not compile.
    """
    if shutil.which(compiler) is None:
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    built, torch = library_path(), _torch_folder()
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            part = built.with_suffix(".part")
            include = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
            libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
            command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-w", str(SOURCE), "-o", str(part)]
            subprocess.run([*command, *include, *libraries], check=True)
            part.rename(built)
    return built


def load() -> None:
    """Load the library that `build` made. RuntimeError if torch is imported already."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: import pretend_cuda.device before it")
    ctypes.CDLL(str(library_path()), mode=ctypes.RTLD_GLOBAL)
