"""llama.cpp's converter to GGUF, of a checkout or of a source archive that is downloaded once and checked each time.

It runs in a process of its own with the gguf package that lies beside it. Imports no torch.
"""

import contextlib
import errno
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distlora.config import UserError, require
from distlora.config.base import cache_root
from distlora.config.json_files import read_object
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
    """Return the place of the converter: a checkout of llama.cpp, else the archive in the cache, which may be new.

    Raises UserError for a folder without it, where it cannot be downloaded, and for another archive.
    """
    if checkout is not None:
        folder = Path(checkout).expanduser().absolute()
        require(
            all((folder / part).exists() for part in _PARTS[:-1]),
            f"--llama-cpp={checkout} is no checkout of llama.cpp with {', '.join(_PARTS[:-1])}; name another folder, "
            "or leave it out to download one",
        )
        return folder
    place = cache_root() / "llama.cpp" / SOURCE.file
    if place.is_file():
        SOURCE.read(place)
        return place
    try:
        atomic_io.private_folder(place.parent)
        with tempfile.TemporaryDirectory(prefix=".downloading-", dir=place.parent) as scratch:
            otherwise = "name a checkout of llama.cpp with --llama-cpp FOLDER"
            return SOURCE.fetch(place.parent, Path(scratch), say, otherwise).replace(place)
    except OSError as error:
        raise UserError(f"cannot write to {place.parent}: {error.strerror}; set DISTLORA_CACHE=FOLDER") from error


@contextlib.contextmanager
def unpacked(place: Path) -> Iterator[Path]:
    """Yield the folder of the converter at `place`: a checkout itself, the archive's in a temporary folder.

    Others may write to a shared cache: what runs is unpacked from the very bytes whose digest is right.
    """
    if place.is_dir():
        yield place
        return
    inside = f"{SOURCE.file.removesuffix('.tar.gz')}/vendor/llama.cpp/"
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(SOURCE.read(place))) as archive:
            members = [member for member in archive if member.name.removeprefix(inside).startswith(_PARTS)]
            archive.extractall(scratch, members, filter="data")
        yield Path(scratch) / inside


def _link_without_code(source: Path, folder: Path) -> None:
    """Fill `folder` with links to the files of a model, whose configs name no code of theirs to run.

    The converter loads some tokenizers with trust_remote_code=True, which runs what auto_map names.
    """
    folder.mkdir()
    for path in source.iterdir():
        if path.name in ("config.json", "tokenizer_config.json"):
            values = read_object(path, "mend the base's file")
            values.pop("auto_map", None)
            atomic_io.write_json(folder / path.name, values)
        else:
            (folder / path.name).symlink_to(path.absolute())


def convert(script: Path, source: Path, out: Path, *options: str) -> None:
    """Run a script of the converter on a folder, and print its warnings.

    Raises UserError, with the last line it printed, where it fails, and OSError if the disk is full.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as scratch, still("converting"):
        folder = Path(scratch) / "model"
        _link_without_code(source, folder)
        command = [sys.executable, str(script), str(folder), "--outfile", str(out), *options]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    words = [line.strip() for line in (ended.stdout + ended.stderr).splitlines() if line.strip(" ^~")]
    if ended.returncode != 0 or not out.is_file():
        reason = words[-1] if words else f"exit code {ended.returncode}"
        if re.search(r"No space left on device|requested and \d+ written", reason):  # The latter is NumPy's.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))
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
    for line in words:
        if "WARNING" in line and "Unknown RoPE type: default" not in line:  # The plain one is no rope type to it.
            say(f"llama.cpp's converter: {line}")
