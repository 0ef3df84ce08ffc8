"""The modules of the source, in the order of their packages."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "distlora_kernels": ROOT / "kernels" / "distlora_kernels",
    "distlora": ROOT / "distlora",
    "distlora_launcher": ROOT / "launcher" / "distlora_launcher",
}

MODULES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in FOLDERS.items()
    for path in folder.rglob("*.py")
}
