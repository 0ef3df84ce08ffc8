"""Carry packages to a GPU machine without a network. `python gpu_packages.py FOLDER` builds the folder."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hydra-core", "omegaconf", "antlr4-python3-runtime", "liger-kernel")
"""Packages to carry beside bitsandbytes; all others that first_gpu.py needs are on the machine."""
BITSANDBYTES_LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so")


def unpack(packages: Path, site: Path) -> None:
    """Lay out the packages of `packages`, and this checkout as its installation would, in the folder `site`."""
    shutil.rmtree(site, ignore_errors=True)
    for wheel in sorted(packages.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
    places = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    # A package before those within it.
    for name, source in sorted(places.items(), key=lambda item: item[0].count(".")):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, site / name.replace(".", "/"), ignore=ignored, dirs_exist_ok=True)


def make_packages(folder: Path) -> None:
    """Build the folder to carry: wheels of PACKAGES, and bitsandbytes with the libraries it needs there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "wheel",
        "--no-deps",
        "-w",
        str(folder),
    )
    names = [f"{name}=={importlib.metadata.version(name)}" for name in (*PACKAGES, "bitsandbytes")]
    subprocess.run([*pip, *names], check=True)
    whole = next(folder.glob("bitsandbytes-*.whl"))
    reduced = whole.with_suffix(".reduced")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(reduced, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if not re.search(r"\.so$", name) or Path(name).name in BITSANDBYTES_LIBRARIES:
                target.writestr(name, source.read(name))
    reduced.replace(whole)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 1e6:6.2f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:6.2f} MB  in {folder}; name it in `carry`")


if __name__ == "__main__":
    make_packages(Path(sys.argv[1]))
