"""What a release uploads: one version, a page for PyPI, and a wheel that needs nothing of the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
import torch

import distlora
from support.documents import ROOT, links

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} is a number."}]}
    for n in range(40)
]


def test_the_changelog_has_a_dated_section_for_the_only_version() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings[:2].index(released[0]) == ("Unreleased" in headings)
    assert re.fullmatch(re.escape(distlora.__version__) + r" \(\d{4}-\d\d-\d\d\)", released[0])
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "distlora.__version__"}


def test_the_page_for_pypi_links_to_no_file_of_the_repository() -> None:
    assert all(target.startswith("https://") for _, target in links(PROJECT["project"]["readme"]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the sdist alone, as `python -m build` does."""
    folder = tmp_path_factory.mktemp("dist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob(f"distlora-{distlora.__version__}.tar.gz")
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist], check=True, cwd=folder)
    (built,) = folder.glob(f"distlora-{distlora.__version__}-py3-none-any.whl")
    return built


@pytest.mark.ci
def test_the_wheel_of_the_sdist_has_each_file_of_the_packages_byte_for_byte(wheel: Path) -> None:
    places = PROJECT["tool"]["setuptools"]["package-dir"]
    expected = {}
    for package, folder in places.items():
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True).stdout.split()
        names = [name for name in tracked if not name.endswith((".md", ".png"))]
        prefix = package.replace(".", "/")
        expected |= {f"{prefix}/{Path(name).relative_to(folder)}": (ROOT / name).read_bytes() for name in names}
    if not expected:
        pytest.skip("not a clone: git cannot list the tracked files")
    with zipfile.ZipFile(wheel) as archive:
        metadata = f"distlora-{distlora.__version__}.dist-info"
        found = {name: archive.read(name) for name in archive.namelist() if not name.startswith(metadata)}
        head = BytesParser().parsebytes(archive.read(f"{metadata}/METADATA"))
        assert archive.read(f"{metadata}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert found.keys() == expected.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []
    suffixes = {Path(name).suffix for name in found}
    assert suffixes >= {".py", ".yaml", ".jinja", ".cpp", ".h", ".toml", ".css", ".jsonl", ".typed"}
    assert head.get_payload().strip() == (ROOT / PROJECT["project"]["readme"]).read_text().strip()
    assert (head["Requires-Python"], head["Description-Content-Type"]) == (">=3.11", "text/markdown")


@pytest.mark.ci
def test_the_wheel_trains_from_python_and_the_shell_in_an_empty_folder(
    wheel: Path, folders: Path, tmp_path: Path
) -> None:
    """In an environment of its own, with the dependencies of this one and nothing of the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean"], check=True)
    (site,) = (tmp_path / "clean").glob("lib/python*/site-packages")
    subprocess.run([*PIP, "--python", tmp_path / "clean", "install", "--no-deps", wheel], check=True, env=environment)
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # Runs none of its .pth files.
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    python = tmp_path / "clean" / "bin" / "python"
    settings = {"data.sequence_length": 64, "train.max_steps": 3, "tracker": "none"}
    code = (
        f"import distlora; assert distlora.__file__.startswith({str(site)!r}); run = distlora.train("
        f"model={str(folders / 'llama')!r}, data='chats.jsonl', recipe='qlora', run_dir='first', settings={settings}); "
        "print(repr(distlora.load(run).generate('What is 3?', max_new_tokens=5)))"
    )
    subprocess.run([python, "-c", code], check=True, cwd=empty, env=environment)
    words = ["recipe=qlora", f"model.path={folders / 'llama'}", "data.path=chats.jsonl", "run_dir=second"]
    words += [f"{name}={value}" for name, value in settings.items()]
    subprocess.run([python.with_name("distlora"), "train", *words], check=True, cwd=empty, env=environment)
    runs = [distlora.Run(empty / name) for name in ("first", "second")]
    assert [run.status.state for run in runs] == ["done", "done"]
    assert [run.metrics[-1]["step"] for run in runs] == [3, 3]
