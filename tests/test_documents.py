"""What the documents show is true: commands run, links lead somewhere, files that are named exist.

Every command of every document runs here as far as its workers (`document_stage.py`); one that needs a GPU, the hub,
SLURM or wandb says so behind it (`documents.py`), and goes as far as it does without. The README's first hour runs
whole, in a process each, with `make test-documents`: its output is the promised one.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from contextlib import closing
from pathlib import Path

import pytest

from distlora.config import Config, DataConfig
from distlora.config.sweep import SweepConfig
from distlora.data.sources import check_sources
from distlora_launcher.cli.main import COMMANDS
from document_stage import Shell, make_stage, make_sweep, no_process_starts
from documents import ROOT, anchors, blocks, commands, documents, links, named, strangers

FOLDERS = ("distlora", "kernels", "launcher", "conf", "tests", "slurm", "docs")
NAMES = {str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
DOCUMENTS = documents()
PAGES = [name for name in DOCUMENTS if name == "README.md" or name.startswith("docs/")]
SHOWING = [document for document in DOCUMENTS if commands(document)]
THEIRS = frozenset({"utils.py", "convert_hf_to_gguf.py"})
"""Files of others that documents speak of, and one that there must not be."""


HINTS = {**typing.get_type_hints(Config), "sweep": SweepConfig}
SECTIONS = {name: hint for name, hint in HINTS.items() if dataclasses.is_dataclass(hint)}
SETTINGS = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}
SUFFIXES = (".py", ".json", ".jsonl", ".yaml", ".md", ".txt", ".png", ".safetensors")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_stage(tmp_path_factory.mktemp("documents"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        make_sweep(patch)
    return folder


@pytest.mark.parametrize("document", SHOWING)
def test_every_command_that_is_shown_runs(
    document: str, stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stage)
    wrong = []
    with no_process_starts(), closing(Shell()) as shell:
        for command in commands(document):
            reason = shell.run(command)
            output = capsys.readouterr()
            if reason is not None:
                wrong.append(f"{command.place}\n    {reason}: {output.err.strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", PAGES)
def test_a_page_for_users_shows_commands_as_commands_and_output_as_text(document: str) -> None:
    """So that no command of theirs is overlooked here."""
    odd = [line for block in blocks(document) for line in strangers(block)]
    assert not odd, "\n".join(odd)


def test_every_page_is_reached_from_readme() -> None:
    seen, due = set(), ["README.md"]
    while due:
        page = due.pop()
        seen.add(page)
        targets = {target.partition("#")[0] for _, target in links(page) if target.partition("#")[0].endswith(".md")}
        found = {str(((ROOT / page).parent / target).resolve().relative_to(ROOT)) for target in targets}
        due += found & set(PAGES) - seen
    assert set(PAGES) == seen


def test_the_records_that_the_page_on_data_shows_are_read_as_it_says(tmp_path: Path) -> None:
    shown = [text for _, text in named("docs/data.md") if text.startswith("{")]
    found = []
    for number, record in enumerate(shown):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f"{record}\n" * 3)
        found += check_sources(DataConfig(path=str(path)), limit=3)
    assert found == ["chat", "sharegpt", "alpaca", "prompt_completion", "text", "preference"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_that_are_named_exist(document: str) -> None:
    for line, text in named(document):
        for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.[a-z]\w*(?![\w.(])", text):
            if not name.endswith(SUFFIXES):
                assert name in SETTINGS, f"{document}:{line} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for line, target in links(document):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / document).parent / path if path else ROOT / document
        assert place.exists(), f"{document}:{line} links to {target}"
        if anchor:
            assert anchor in anchors(str(place.resolve().relative_to(ROOT))), f"{document}:{line} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    """A path from the root or from the document, and a Python file by its name alone."""
    below = (ROOT / document).parent
    for line, text in named(document):
        path = text.partition("::")[0]
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", path):
            assert (ROOT / path).exists() or (below / path).exists(), f"{document}:{line} names {path}"
        elif path.startswith("../"):
            assert (below / path).exists(), f"{document}:{line} names {path}"
        elif re.fullmatch(r"[\w/]+\.py", path) and path not in THEIRS:
            found = any(name.endswith(f"/{path}") for name in NAMES)
            assert found, f"{document}:{line} names {path}"


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.endswith("README.md")])
def test_files_in_a_tree_exist(document: str) -> None:
    """The files in the blocks of a folder's README."""
    below = {path.name for path in (ROOT / document).parent.rglob("*.py")}
    for block in blocks(document):
        if block.info not in ("", "text"):
            continue
        for number, text in enumerate(block.lines, start=block.line):
            first = re.match(r"^ *((?:[\w/]+\.py(?:, )?)+)  ", text)
            for path in re.findall(r"[\w/]+\.py", first[1]) if first else []:
                assert Path(path).name in below, f"{document}:{number} names {path}"


def test_files_in_a_picture_exist() -> None:
    for document in PAGES:
        for block in blocks(document):
            for path in re.findall(r"[\w/]+\.py", "\n".join(block.lines)) if block.info == "mermaid" else []:
                assert (ROOT / path).exists(), f"{document}: the picture names {path}"


def test_commands_in_the_prose_are_commands() -> None:
    for document in DOCUMENTS:
        for line, text in named(document):
            word = re.match(r"^distlora ([a-z|]+)(?: |$)", text)
            names = word[1].split("|") if word else []
            assert set(names) <= {*COMMANDS, "help"}, f"{document}:{line} shows `{text}`"
