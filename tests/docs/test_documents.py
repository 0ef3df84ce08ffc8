"""The commands, links, settings and files in the documents exist, and the commands run as far as their workers.

A command that needs a GPU, the Hub, SLURM or wandb says so in its comment (`documents.py`). `document_stage.py` makes
the folder in which the commands are typed. `make test-documents` runs the tutorial in real processes, `make
test-examples` the examples.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
import re
import shlex
import subprocess
import tomllib
import typing
from contextlib import closing
from pathlib import Path

import pytest
import yaml

import distlora
from distlora.config import Config
from distlora.config.objectives import OBJECTIVES
from distlora.config.serve import ServeConfig
from distlora.config.sweep import SweepConfig
from distlora.system.exit_codes import BAD_INPUT
from distlora.training.objectives import CLASSES
from distlora_launcher.cli.main import COMMANDS
from distlora_launcher.compose.checks import split_endpoint
from distlora_launcher.compose.compose import compose_config
from support.document_stage import Shell, make_stage, make_sweep, no_process_starts
from support.documents import ROOT, anchors, blocks, commands, documents, links, named, named_files
from support.small_models import read_metrics
from tools import settings_page
from tools.chaos import DISTLORA

FOLDERS = ("benchmarks", "distlora", "kernels", "launcher", "conf", "tests", "slurm", "docs", "examples")
PYTHON_FILES = {str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
DOCUMENTS = documents()
WITH_COMMANDS = [
    pytest.param(name, marks=() if name == "README.md" else pytest.mark.ci) for name in DOCUMENTS if commands(name)
]
OTHER_PROJECTS_FILES = frozenset({"utils.py", "convert_hf_to_gguf.py"})

HINTS = {**typing.get_type_hints(Config), "serve": ServeConfig, "sweep": SweepConfig}
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


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_every_command_of_a_document_runs(
    document: str, stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stage)
    (stage / "mine.yaml").unlink(missing_ok=True)  # Of another document; `distlora init` never overwrites.
    wrong = []
    with no_process_starts(), closing(Shell()) as shell:
        for command in commands(document):
            reason = shell.run(command)
            output = capsys.readouterr()
            if reason is not None:
                wrong.append(f"{command.place}\n    {reason}: {output.err.strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.ci
@pytest.mark.parametrize("document", [name for name in DOCUMENTS if "mine.py" in named_files(name)])
def test_a_function_of_the_user_trains_as_its_document_shows(
    document: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = named_files(document)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "Llama-3.2-1B").symlink_to(folders / "llama")
    lines = [json.dumps({"prompt": f"What is 6 x {n}?", "answer": str(6 * n)}) for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (command,) = [item.text for item in commands(document) if any(name in item.text.split() for name in files)]
    small = "data.sequence_length=64 rollout.max_new_tokens=8 train.global_batch=8 train.max_steps=2 tracker=none"
    words = [str(DISTLORA), *shlex.split(command)[1:], *small.split(), "run_dir=run"]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    steps = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [(line["rewards/mine.short/mean"], line["rewards/failed"]) for line in steps] == [(1.0, 0)] * 2
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.ci
def test_the_callbacks_of_the_python_page_are_called(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = [block for block in blocks("docs/python.md") if any("Callback):" in line for line in block.lines)]
    monkeypatch.chdir(tmp_path)
    text, old = "import distlora\n" + "\n".join(block.lines), 'model="Qwen/Qwen3-0.6B", data="chats.jsonl", '
    assert old in text
    small = {"data.sequence_length": 64, "train.max_steps": 2, "train.global_batch": 4, "tracker": "none"}
    places = {"model": str(folders / "llama"), "data": str(folders / "text.jsonl"), "settings": small, "run_dir": "run"}
    exec(text.replace(old, f"**{places!r}, "), found := {"__name__": "__main__"})
    assert len(found["losses"]) == 2
    assert found["run"].status.state == "done"


def test_the_jobset_has_the_names_and_numbers_of_its_command() -> None:
    jobset, policy = yaml.safe_load_all((ROOT / "examples/kubernetes/jobset.yaml").read_text())
    (node,), name = jobset["spec"]["replicatedJobs"], jobset["metadata"]["name"]
    job, pods = node["template"]["spec"], node["template"]["spec"]["template"]
    (container,) = pods["spec"]["containers"]
    waits, resumes, trains = container["command"][-1].splitlines()
    config = compose_config(shlex.split(trains.removeprefix("exec distlora train ")))
    host, port = split_endpoint(config.cluster.rdzv_endpoint)
    assert host == f"{name}-{node['name']}-0-0.{name}" == waits.split("hosts ")[1].partition(";")[0]
    assert [port] == [item["containerPort"] for item in container["ports"]]
    assert config.cluster.nodes == job["parallelism"] == job["completions"]
    assert config.cluster.gpus_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert resumes == f"if [ -d {config.run_dir}/logs ]; then exec distlora resume {config.run_dir}; fi"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pods["spec"]["volumes"]}
    shared = (config.run_dir, config.data.path, config.data.cache_dir, *(item["value"] for item in container["env"]))
    assert all(path.startswith(f"{mounts['shared']}/") for path in shared)
    rule = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (rule["containerName"], rule["values"]) == (container["name"], [BAD_INPUT])
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_files_and_commands_named_in_a_document_exist(document: str) -> None:
    folder = (ROOT / document).parent
    for line, text in named(document):
        place = f"{document}:{line} names {text}"
        for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(SECTIONS)})\.[a-z]\w*(?![\w.(])", text):
            assert name in SETTINGS or name.endswith(SUFFIXES), place
        path = text.partition("::")[0]
        if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", path):
            assert (ROOT / path).exists() or (folder / path).exists(), place
        elif path.startswith("../"):
            assert (folder / path).exists(), place
        elif re.fullmatch(r"[\w/]+\.py", path) and path not in OTHER_PROJECTS_FILES:
            assert any(name.endswith(f"/{path}") for name in PYTHON_FILES), place
        command = re.match(r"^distlora ([a-z|]+)(?: |$)", text)
        assert command is None or set(command[1].split("|")) <= {*COMMANDS, "help"}, place


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_a_document_lead_to_files_and_headings(document: str) -> None:
    for line, target in links(document):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / document).parent / path if path else ROOT / document
        assert place.exists(), f"{document}:{line} links to {target}"
        if anchor:
            assert anchor in anchors(str(place.resolve().relative_to(ROOT))), f"{document}:{line} links to {target}"


def test_the_lists_of_objectives_name_the_same_ones() -> None:
    names = set(typing.get_args(typing.get_type_hints(SECTIONS["train"])["objective"]))
    assert names == set(OBJECTIVES) == set(CLASSES)
    comment = (ROOT / "conf" / "train" / "default.yaml").read_text().splitlines()[0].partition("#")[2]
    row = next(line for line in (ROOT / "docs" / "settings.md").read_text().splitlines() if "`train.objective`" in line)
    for listed in (comment, row.split("|")[2]):
        assert set(re.findall(r"\w+", listed)) == names


def test_the_python_page_names_attributes_that_a_run_has(stage: Path) -> None:
    named = re.findall(r"\brun\.((?:[a-z]\w*\.)*[a-z]\w*)", (ROOT / "docs/python.md").read_text())
    assert {"status.figures", "metrics", "resume"} <= set(named)
    run = distlora.Run(stage / "RUN")
    for path in named:
        operator.attrgetter(path)(run)


def test_the_page_of_the_installation_has_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    trackers = {"mlflow", "swanlab", "tensorboard", "trackio"}  # One row has them all.
    page = (ROOT / "docs/install.md").read_text()
    rows = set(re.findall(r"^\| `([\w-]+)` \|", page.partition("## Extras")[2].partition("\n## ")[0], re.MULTILINE))
    assert rows == set(extras) - trackers - {"dev"}


def test_the_settings_reference_is_of_the_dataclasses() -> None:
    assert (ROOT / "docs/settings_reference.md").read_text() == settings_page.page(), settings_page.__doc__


def test_messages_quoted_in_troubleshooting_exist_in_the_source() -> None:
    source = source_strings()
    text = (ROOT / "docs/troubleshooting.md").read_text()
    quotes = re.findall(r"\*\*`([^`]+)`\*\*(?! \((?:torch|SLURM|the system)\))", text)
    fragments = {fragment.strip(): quote for quote in quotes for fragment in quote.split("...")}
    missing = [f"{quote}\n    {text}" for text, quote in fragments.items() if len(text) >= 12 and text not in source]
    assert quotes
    assert not missing, "\n".join(missing)


def source_strings() -> str:
    """Return the constant strings of the source and SLURM's templates, one per line."""
    strings = [file.read_text() for file in (ROOT / "slurm").glob("*.jinja")]
    for file in PYTHON_FILES:
        if not file.startswith(f"{ROOT}/tests/"):
            for node in ast.walk(ast.parse(Path(file).read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    strings.append(node.value)
    return "\n".join(strings)
