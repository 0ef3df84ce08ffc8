"""Treat files as data: nothing in them is unpickled or run, and no name leads out of its folder."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import kept_text
from distlora.architecture.tokens import load_tokenizer
from distlora.config import Config, DataConfig, ModelConfig, SourceConfig, UserError
from distlora.data.chat_template import ChatTemplate
from distlora.data.rows import new_entry
from distlora.data.sources import find_source
from distlora.post.export.repository import own_files
from distlora.system.atomic_io import private_folder
from distlora.system.exit_codes import BAD_INPUT
from distlora.weights.peft_folder import read_peft_adapter
from distlora_launcher.cli.main import main
from distlora_launcher.launch.local import create_run
from support.modules import MODULES
from support.small_models import tokenizer

# What runs code that lies in a file, by the last parts of the name that is called.
RUNS_CODE = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "imports by text",
    "torch.load": "unpickles",
    "torch.hub.load": "downloads and runs code",
    "np.load": "unpickles what claims to be a pickle",
    "np.fromfile": "has no header that could be checked",
    "yaml.load": "makes any object",
    "yaml.load_all": "makes any object",
    "yaml.full_load": "makes any object",
    "yaml.unsafe_load": "makes any object",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "runpy.run_path": "runs a file",
    "dist.broadcast_object_list": "unpickles",
    "dist.all_gather_object": "unpickles",
    "dist.gather_object": "unpickles",
    "dist.scatter_object_list": "unpickles",
    "dist.recv_object_list": "unpickles",
}
MODULES_THAT_UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

ALLOWED: set[tuple[str, str]] = set()
"""(module, what it calls), each with its reason. None today."""

FROM_A_FOLDER = {"from_pretrained", "from_config"}
"""Methods of transformers' Auto classes that can run code which comes with a model."""
NO_CODE = {"GenerationConfig", "PeftModel"}
"""Classes that have such methods and know no code: settings, and adapters."""


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` of an expression, or as much of its end as has names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def faults(module: str, text: str) -> Iterator[str]:
    """Yield the code in a module's text that could run or unpickle the content of a file."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.partition(".")[0] in MODULES_THAT_UNPICKLE and (module, name) not in ALLOWED:
                yield f"{module} imports {name}, which unpickles"
    for name, call in calls(tree):
        arguments = {keyword.arg: keyword.value for keyword in call.keywords}
        known = name.replace("numpy.", "np.").replace("torch.distributed.", "dist.")
        if known in RUNS_CODE and (module, name) not in ALLOWED:
            yield f"{module}, line {call.lineno}: {name} {RUNS_CODE[known]}"
        if (shell := arguments.get("shell")) is not None and not _is(shell, False):
            yield f"{module}, line {call.lineno}: {name} runs a shell"
        word = arguments.get("trust_remote_code")
        if word is not None and not _is(word, False):
            yield f"{module}, line {call.lineno}: {name} trusts code that comes with a model"
        owner, _, method = name.rpartition(".")
        # Without the word transformers asks on the terminal.
        if method in FROM_A_FOLDER and owner.rpartition(".")[2] not in NO_CODE and word is None:
            yield f"{module}, line {call.lineno}: {name} lacks trust_remote_code=False"


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_unpickles_or_runs_file_content() -> None:
    assert [fault for module, path in MODULES.items() for fault in faults(module, path.read_text())] == []


# --- readers ---


def test_tokenizer_code_is_not_run(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "llama", tmp_path / "llama")
    place = folder / "tokenizer_config.json"
    values = json.loads(place.read_text())
    (folder / "tokenization_odd.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass OddTokenizer: ..."
    )
    for entry in (["tokenization_odd.OddTokenizer", None], "org/code--tokenization_odd.OddTokenizer"):
        place.write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": entry}}))
        with pytest.raises(UserError, match=r"tokenizer_config.json: auto_map requires code .*OddTokenizer\), which"):
            load_tokenizer(folder)
    # transformers has this one itself.
    place.write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": ["odd.PreTrainedTokenizerFast", None]}}))
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass PreTrainedTokenizerFast: ...")
    assert type(load_tokenizer(folder)).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
        "{% include 'tokenizer.json' %}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_chat_template_is_sandboxed(tmp_path: Path, text: str) -> None:
    (tmp_path / "odd.jinja").write_text(text)
    with pytest.raises(UserError, match=r"odd\.jinja (refuses|fails|is not valid)"):
        ChatTemplate(tokenizer(), "here", str(tmp_path / "odd.jinja")).render(
            "row 1", [{"role": "user", "content": "a"}]
        )


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "..", "inner/../../outside.arrow"])
def test_saved_data_set_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"state.json names .*, which does not lie in its folder; save it again"):
        next(find_source(SourceConfig(path=str(folder))).records())
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
    with pytest.raises(UserError, match=r"dataset_dict.json names"):
        next(find_source(SourceConfig(path=str(folder))).records())


def test_runs_and_caches_are_closed_to_other_users(tmp_path: Path) -> None:
    team, closed, opened = (tmp_path / name for name in ("team", "closed", "opened"))
    closed.mkdir()
    closed.chmod(0o755)
    team.mkdir()
    team.chmod(0o2775)
    opened.mkdir()
    opened.chmod(0o750)
    before = os.umask(0o022)
    try:
        for parent in (closed, team):
            config = Config(model=ModelConfig(path="m"), data=DataConfig(path="d"), run_dir="r")
            create_run(parent / "runs" / "first", config)
            with new_entry(parent / "data", "key"):
                pass
            kept_text(parent / "architectures" / "a.json", lambda: "text")
        private_folder(opened)
    finally:
        os.umask(before)
    made = ("runs/first", "data", "architectures")
    assert {(closed / name).stat().st_mode & 0o777 for name in made} == {0o700}
    assert {(team / name).stat().st_mode & 0o777 for name in made} == {0o750}, "the group that a team's folder names"
    assert opened.stat().st_mode & 0o777 == 0o750, "the user's own choice"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Return a file of the user, with content that passes for any side file of a model."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text('{"token": "s3cr3t"}')
    return tmp_path / "home" / "secret"


@pytest.mark.parametrize("name", ["config.json", "notes.json", "additional_chat_templates/tool.jinja", "outside"])
def test_a_link_out_of_a_base_starts_nothing(
    folders: Path, tmp_path: Path, secret: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base = shutil.copytree(folders / "llama", tmp_path / "base")
    place = base / name
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(secret.parent if name == "outside" else os.path.relpath(secret, place.parent))
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 99)
    words = [
        f"model.path={base}",
        f"data.path={tmp_path / 'text.jsonl'}",
        f"run_dir={tmp_path / 'run'}",
        "tracker=none",
    ]
    assert main(["train", *words, "adapter=full", "quant=none", "train.max_steps=1"]) == BAD_INPUT
    assert re.search(rf"base/{name} is a link to .*/home\S*, outside of its folder", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_link_out_of_an_adapter_is_refused(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter" / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(UserError, match=r"chat_template.jinja is a link to .*secret, outside of its folder"):
        read_peft_adapter(tmp_path / "adapter")


def test_a_snapshot_may_link_to_the_blobs_of_its_repository(tmp_path: Path, secret: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "hub/models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "same.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    assert read_config(tmp_path / "link" / "models--a--b" / "snapshots" / "c0ffee") == {"a": 1}
    blobs.rename(tmp_path / "blobs")
    blobs.symlink_to(secret.parent)  # An archive that imitates a cache.
    (snapshot / "notes.json").symlink_to("../../blobs/secret")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"notes.json is a link to .*home/secret, outside of its folder"):
        read_config(snapshot)


def test_symlink_in_a_result_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("token")
    link = tmp_path / "tokenizer.json"
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"tokenizer.json is a link to .*secret, and a run writes no links"):
        own_files({"README.md": b"", "tokenizer.json": link})
