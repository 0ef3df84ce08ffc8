"""llama.cpp's converter to GGUF, of a checkout or of a source archive that is downloaded once and checked.

It runs in a process of its own with the gguf package that lies beside it. Imports no torch.
"""

import contextlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.base import cache_root
from distlora.system import atomic_io
from distlora.system.progress import say, still
from distlora.system.published import Archive

SOURCE = Archive(
    package="llama-cpp-python==0.3.36",
    file="llama_cpp_python-0.3.36.tar.gz",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    size="77 MB",
)
"""It holds all of llama.cpp."""
MODELS, ADAPTERS = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_PARTS = (MODELS, ADAPTERS, "conversion/", "gguf-py/gguf/", "LICENSE")
OUT_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "q8_0": "q8_0"}
"""The converter's name of each dtype."""


def converter(checkout: str | None) -> Path:
    """Return the folder of the converter: a checkout of llama.cpp, else one in the cache, made the first time.

    Raises UserError for a folder without it, and where it cannot be downloaded.
    """
    if checkout is not None:
        folder = Path(checkout).expanduser().absolute()
        require(
            all((folder / part).exists() for part in _PARTS[:-1]),
            f"--llama-cpp={checkout} is no checkout of llama.cpp with {', '.join(_PARTS[:-1])}; name another folder, "
            "or leave it out to download one",
        )
        return folder
    folder = cache_root() / "llama.cpp" / SOURCE.file.removesuffix(".tar.gz")
    if folder.is_dir():
        return folder
    try:
        atomic_io.private_folder(folder.parent)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as scratch:
            source = SOURCE.fetch(
                folder.parent, Path(scratch), say, "name a checkout of llama.cpp with --llama-cpp FOLDER"
            )
            inside = f"{folder.name}/vendor/llama.cpp/"
            with tarfile.open(source) as archive:
                members = [each for each in archive if each.name.removeprefix(inside).startswith(_PARTS)]
                archive.extractall(scratch, members, filter="data")
            with contextlib.suppress(OSError):  # Another export was faster.
                os.rename(Path(scratch) / inside, folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {error.strerror}; set DISTLORA_CACHE=FOLDER") from error
    return folder


def convert(script: Path, source: Path, out: Path, *options: str) -> None:
    """Run a script of the converter on a folder. Raises UserError, with its last words, where it fails."""
    command = [sys.executable, str(script), str(source), "--outfile", str(out), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with still("converting"):
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if ended.returncode != 0 or not out.is_file():
        words = [line.strip() for line in (ended.stdout + ended.stderr).splitlines() if line.strip(" ^~")]
        reason = words[-1] if words else f"exit code {ended.returncode}"
        if reason == "AssertionError":  # What was asserted stands before it.
            reason = f"{words[-2]}: {reason}"
        if package := re.search(r"No module named '(\w+)'", reason):
            raise UserError(
                f"llama.cpp's {script.name} needs {package[1]}, which is not installed; "
                f"`pip install 'distlora[gguf]'`, or {package[1]} itself"
            )
        raise UserError(
            f"llama.cpp's {script.name} does not convert this model ({reason}); write --format hf, or name a newer "
            "llama.cpp with --llama-cpp FOLDER"
        )
