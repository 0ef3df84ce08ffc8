"""Prepare a GPU machine without a network. `python gpu_packages.py FOLDER` builds the folder to copy there."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hydra-core", "omegaconf", "antlr4-python3-runtime", "liger-kernel")
"""Packages to copy beside bitsandbytes; all others of NEEDED are on the machine."""
NEEDED = (
    *("torch", "triton", "transformers", "safetensors", "numpy", "peft", "accelerate", "psutil", "rich", "yaml"),
    *("jinja2", "matplotlib", "pytest", "xdist", "hypothesis", "hydra", "omegaconf", "antlr4"),
)
"""Modules without which first_gpu.py cannot run."""
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


def install(packages: Path, site: Path) -> str | None:
    """Unpack into `site`. Returns what to do about modules that are still missing; None if there are none."""
    unpack(packages, site)
    missing = [name for name in NEEDED if PathFinder.find_spec(name, [str(site), *sys.path]) is None]
    if not missing:
        return None
    fault = f"this machine lacks {', '.join(missing)}"
    if not any(packages.glob("*.whl")):
        fault += (
            f", and {packages} holds no wheels; run `make gpu-wheels` on a machine with a network and copy .gpu here"
        )
    return fault


def work_folder(name: str, least: float) -> Path:
    """Return the folder `name` in memory if `least` bytes are free there, else on a disk, and say so."""
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    free = shutil.disk_usage(memory).free if memory.is_dir() else 0
    if (memory / name).is_dir() or free >= least:  # An earlier call has taken its space.
        return memory / name
    left = shutil.disk_usage(disk).free
    print(
        f"{memory} has {free / 1e9:.1f} of {least / 1e9:.0f} GB; {disk / name} is used, with {left / 1e9:.1f} GB free"
    )
    return disk / name


def make_packages(folder: Path) -> None:
    """Build the folder to carry: wheels of PACKAGES, and bitsandbytes with the libraries it needs there."""
    folder.mkdir(exist_ok=True)
    for wheel in folder.glob("*.whl"):  # Not COMMAND.json, with the parts that are done.
        wheel.unlink()
    command = "-m pip --quiet --disable-pip-version-check wheel --no-deps"
    pip = [sys.executable, *command.split(), "-w", str(folder)]
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
    print(f"{sum(sizes.values()) / 1e6:6.2f} MB  in {folder}; copy it into the checkout on the GPU machine")


if __name__ == "__main__":
    make_packages(Path(sys.argv[1]))
