"""A folder in which the commands of the documents can be typed, and how far each goes there.

A command runs in this process as a user's would, up to the first process that it starts for its work: a worker, the
preparation of data, torchrun. What a machine for tests has not is put in: GPUs by number, a model by name by its sizes
(`distlora/architecture/known_models.json`), SLURM by --dry-run.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers

from distlora.config import Config
from distlora.config.base import is_hub_name
from distlora.generation.remote import RemoteEngine
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Name
from distlora.training import worker
from distlora_launcher.cli import cancel as cancelling
from distlora_launcher.cli import main, serve, train
from distlora_launcher.cli import sweep as sweeps
from distlora_launcher.cli.status import run_folders
from distlora_launcher.compose import checks
from distlora_launcher.launch import local
from support.documents import ROOT, Command, assigned, documents, expanded, named_files
from support.family_models import SINGLE
from support.image_models import write_trainable
from support.small_models import make_run, write_model_folder, write_text_file

MODELS = ("Llama-3.2-1B", "demo/model", "hidden-64", "hidden-256")
BASE = "demo/model"
MADE_BASE = "$(distlora demo --base)"
MODEL = "model.path=./Llama-3.2-1B"
DATA = "data.path=chats.jsonl"
CARDS = 8
"""Number of GPUs that a command sees without a number in its mark."""
IN_OWN_SHELL = ("source", "cd", "git", "export", "pip", "sbatch")
"""Commands that change a shell, or other programs."""
STARTERS = ("train", "sweep", "plan")
"""Commands that take a run's settings."""


class StartsError(BaseException):
    """Stands in for the process that a command would start, or become. No command catches it."""


def make_stage(folder: Path) -> Path:
    """Models, data of each kind, a finished run, what was merged of it, and a PATH without SLURM and drivers."""
    write_model_folder(folder / MODELS[0], "llama", max_position_embeddings=131072, vocab_size=1024)
    for name in MODELS[1:]:
        shutil.copytree(folder / MODELS[0], folder / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / BASE)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)  # The demo's model has them.
    tokenizer.save_pretrained(folder / BASE)
    write_trainable(folder / "Qwen3-VL-2B-Instruct", "qwen3_vl")
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}] for n in range(30)]
    write_lines(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    for name in ("demo/pairs.jsonl", "demo/persona.jsonl", "demo/held_out.jsonl", "pairs.jsonl", "held_out.jsonl"):
        shutil.copy(folder / "chats.jsonl", folder / name)
    records = [{"instruction": "Say it.", "input": str(n), "output": "It."} for n in range(30)]
    (folder / "alpaca.json").write_text(json.dumps(records))
    asked = {"prompt": [{"role": "user", "content": "2 + 3?"}], "answer": "5"}
    write_lines(folder / "questions.jsonl", [asked] * 20)
    write_lines(folder / "preferences.jsonl", [{"prompt": "A?", "chosen": "Yes.", "rejected": "No."}] * 20)
    write_lines(folder / "judged.jsonl", [{"prompt": "A?", "completion": "Yes.", "label": True}] * 20)
    for document in documents():
        for name, text in named_files(document).items():
            (folder / name).write_text(text)
    copy_examples(folder)
    (folder / "wikipedia.txt").write_text("An article.\n" * 40)
    (folder / "prompts.txt").write_text("What is a list?\nWhat is a tuple?\n")
    write_text_file(folder / "text.jsonl")
    shutil.copy(folder / "text.jsonl", folder / "demo/pretraining.jsonl")
    shutil.copy(ROOT / "tests/golden/axolotl/mistral_7b_qlora.yml", folder / "axolotl.yaml")
    theirs = "model_name_or_path: a/b\nstage: sft\ndo_train: true\ndataset: org/data\ndataset_dir: ONLINE\n"
    (folder / "llamafactory.yaml").write_text(theirs)
    short = {"max_steps": 1, "global_batch": 6, "dtype": "fp32"}
    make_run(folder / "RUN", folder, BASE, adapter={"r": 16}, train=short)
    worker.run(folder / "RUN", SINGLE)
    trained = Name(place=str(folder / "RUN")).read()
    merge_to(trained, folder / "MERGED", onto="trained", dtype=torch.bfloat16, say=lambda *_: None)
    (folder / "bin").mkdir()
    for program in ("bash", "env", "c++"):
        (folder / "bin" / program).symlink_to(shutil.which(program) or "/bin/bash")
    return folder


def copy_examples(folder: Path) -> None:
    """Copy the examples without what their commands have made, and link docs/, which one of them reads."""
    made = shutil.ignore_patterns("runs", "model", "data", "*.jsonl")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=made)
    (folder / "docs").symlink_to(ROOT / "docs")


def write_lines(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a grid of two trials that no worker has begun, in the working folder."""
    monkeypatch.setattr(sweeps, "start_workers", lambda sweep, config: 0)
    assert main.main(["sweep", MODEL, DATA, "optim.lr=1e-4,2e-4", "run_dir=SWEEP"]) == 0


@contextmanager
def no_process_starts() -> Iterator[None]:
    """Raise StartsError for a distlora process that would start or replace this one."""

    def starts(command: Any) -> bool:
        words = [command] if isinstance(command, str) else list(command)
        return str(words[0]) in (sys.executable, "torchrun")

    class Popen(subprocess.Popen[Any]):
        def __init__(self, command: Any, *more: Any, **options: Any) -> None:
            if starts(command):
                raise StartsError(command)
            super().__init__(command, *more, **options)

    def become(executable: str, command: Sequence[str], environment: dict[str, str]) -> NoReturn:
        raise StartsError(command)

    def begun(*_: Any, **__: Any) -> NoReturn:
        raise StartsError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Popen)
        patch.setattr(os, "execve", become)
        patch.setattr(train, "run_each", begun)
        patch.setattr(local, "make_run", begun)
        patch.setattr(local, "run_node", begun)
        patch.setattr(sweeps, "make_sweep", begun)
        patch.setattr(serve, "run_workers", begun)
        patch.setattr(sweeps, "pinned", lambda sweep, config: sweep)  # It asks the hub for the model's commit.
        patch.setattr(cancelling, "cancel", lambda folder, **_: begun(run_folders(folder)))
        patch.setattr(cancelling, "cancel_sweep", begun)
        patch.setenv("PATH", f"{Path.cwd() / 'bin'}:{Path(sys.executable).parent}")
        for name in [name for name in os.environ if name.startswith(("WANDB", "SLURM"))]:
            patch.delenv(name)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        check_model = checks.check_model

        def check_known(config: Config, **options: Any) -> None:
            """Skip the check of a model that is known by its sizes."""
            if not is_hub_name(config.model.path):
                check_model(config, **options)

        patch.setattr(checks, "check_model", check_known)
        yield


class Shell:
    """The shell of one document: its variables, and what its commands have made so far, which later ones name."""

    def __init__(self) -> None:
        self._stage = Path.cwd()
        self._variables: dict[str, str] = {}
        self._made: list[Path] = []

    def close(self) -> None:
        for path in self._made:
            shutil.rmtree(path, ignore_errors=True)

    def run(self, command: Command) -> str | None:
        """Type a command in the working folder; what is wrong with it, None where nothing is."""
        text = expanded(command.text.replace(MADE_BASE, str(self._stage / BASE)), self._variables)
        assignment = assigned(text)
        if assignment is not None:
            self._variables[assignment[0]] = " ".join(shlex.split(assignment[1]))
            return None
        words = shlex.split(text.rpartition(" | ")[2].replace("/shared/", "shared/"))
        while "=" in words[0]:  # NAME=value before a command.
            words = words[1:]
        program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
        if program == "cd" and rest[0].startswith("examples/"):
            os.chdir(self._stage / rest[0])
            return None
        if program == "python" and Path.cwd() != self._stage:  # An example makes its data.
            return failure(text)
        if program in IN_OWN_SHELL:
            return unknown_extra(rest) if program == "pip" else None
        if program == "make":
            return unknown_target(rest)
        if program == "python":
            return unknown_program(rest)
        assert program == "distlora", f"{command.place}: nothing says how to test {program}"
        if rest[:2] == ["sweep", "agent"]:  # It asks wandb for its sweep first of all.
            return None if command.mark == "wandb" else "needs wandb, and does not say so"
        code = typed(command, completed(command, rest))
        if code != 0:
            return f"ends with code {code}"
        self._note(rest)
        return None

    def _note(self, words: Sequence[str]) -> None:
        """Create the outputs of the command that later commands name."""
        command, settings = words[0], dict(word.partition("=")[::2] for word in words)
        if command in ("train", "sweep") and "run_dir" in settings and "--dry-run" not in words:
            self._copy("SWEEP" if command == "sweep" else "RUN", settings["run_dir"])
        outs = {"merge": "MERGED", "combine": "RUN/adapter", "export": "RUN/adapter"}
        if command in outs and "--out" in words:
            self._copy(outs[command], words[words.index("--out") + 1])
        elif command == "merge":
            self._copy("MERGED", f"{words[1]}/merged")

    def _copy(self, source: str, to: str) -> None:
        path = Path(to).absolute()
        if not path.exists():
            shutil.copytree(self._stage / source, path)
            self._made.append(path)


def completed(command: Command, words: Sequence[str]) -> list[str]:
    """Fill in what the document leaves to the reader (`...`), and the GPU that its mark names."""
    words = [{"model.path=...": MODEL, "data.path=...": DATA}.get(word, word) for word in words]
    words = [file for word in words for file in (sorted(glob.glob(word)) or [word])]
    if words[0] not in STARTERS and words[:2] != ["data", "preview"]:
        return [*words, "--dry-run"] if words[0] == "push" and "--dry-run" not in words else words
    if "..." in words:
        given = " ".join(words)
        words = [word for word in words if word != "..."]
        words += [] if "model" in given or "recipe=" in given else [MODEL]
        words += [] if "data.path=" in given or "data.sources=" in given or words[0] == "plan" else [DATA]
    if command.mark == "SLURM" and words[0] == "train" and "--dry-run" not in words:
        words = [*words, "--dry-run"]
    if command.mark == "machines":
        words = [re.sub(r"^(cluster.rdzv_endpoint=)[^:]+", r"\g<1>127.0.0.1", word) for word in words]
    if command.cards is not None and not any(word.startswith("gpu=") for word in words):
        words = [*words, f"gpu={command.cards[1]}"]
    return words


def typed(command: Command, words: Sequence[str]) -> int:
    """Return the exit code of a distlora command, 0 where it reaches its workers."""
    if words[0] == "resume" and len(words) > 2:  # A new stage takes the result away that later commands read.
        shutil.rmtree("STAGED", ignore_errors=True)
        words = ["resume", shutil.copytree(words[1], "STAGED"), *words[2:]]
    with pytest.MonkeyPatch.context() as patch:
        if command.mark == "GPU":
            number = command.cards[0] if command.cards else CARDS
            patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number))))
        if command.mark == "hub":
            patch.setattr(checks, "check_data", lambda *_: None)
        if command.mark == "vLLM":
            patch.setattr(RemoteEngine, "connect", lambda _: [])
        try:
            return main.main(words)
        except StartsError:
            return 0
        except SystemExit as ended:
            return int(ended.code or 0)


def failure(text: str) -> str | None:
    """Run a command in bash. Return what it says if it fails."""
    finished = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    return finished.stderr if finished.returncode else None


def unknown_target(words: Sequence[str]) -> str | None:
    """Return the problem if the Makefile lacks a target."""
    known = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
    return next((f"the Makefile has no {word}" for word in words if "=" not in word and word not in known), None)


def unknown_program(words: Sequence[str]) -> str | None:
    """Return the problem if `python -m MODULE` or `python FILE` does not exist."""
    if words[:1] == ["-m"]:
        return None if importlib.util.find_spec(words[1]) is not None else f"there is no module {words[1]}"
    return None if words[0] == "-c" or (ROOT / words[0]).is_file() else f"there is no file {words[0]}"


def unknown_extra(words: Sequence[str]) -> str | None:
    """Return the problem if `pip install -e '.[extra]'` names an unknown extra."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [word.partition("[")[2].rstrip("]") for word in words if "[" in word]
    names = [name for group in asked for name in group.split(",")]
    return next((f"there is no extra {name}" for name in names if name not in known), None)
