"""The `distlora` command: quick to start, a real Hydra application, one run folder a job, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from distlora.config.field_docs import sections
from distlora.config.file import load_config
from distlora_launcher.cli.analyze import ANALYSES
from distlora_launcher.cli.cache import ACTIONS as CACHE_ACTIONS
from distlora_launcher.cli.data import ACTIONS as DATA_ACTIONS
from distlora_launcher.cli.main import COMMANDS, EXAMPLES, GROUPS, main
from distlora_launcher.launch import local
from support.launcher_fakes import write_data, write_model, write_tokenizer

DISTLORA = str(Path(sys.executable).parent / "distlora")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    return tmp_path


class Steps:
    """Stands in for the processes of a run: notes which would run, answers with the exit codes it is told."""

    def __init__(self) -> None:
        self.prepared: list[Path] = []
        self.trained: list[Path] = []
        self.prepare_code = 0
        self.train_codes: list[int] = []

    def prepare(self, run_dir: Path, **_: object) -> int:
        self.prepared.append(run_dir)
        (run_dir / "data.json").write_text(json.dumps({"cache": str(run_dir)}))
        return self.prepare_code

    def run_workers(self, run_dir: Path, *, processes: int, max_restarts: int, **_: object) -> int:
        assert (processes, max_restarts) == (1, 3)
        self.trained.append(run_dir)
        return self.train_codes.pop(0) if self.train_codes else 0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    stand_in = Steps()
    monkeypatch.setattr(local, "prepare", stand_in.prepare)
    monkeypatch.setattr(local, "run_workers", stand_in.run_workers)
    return stand_in


def train(*overrides: str) -> int:
    return main(["train", "model.path=model", "data.path=data.jsonl", "data.sequence_length=64", *overrides])


def test_help_lists_every_command_and_imports_neither_torch_nor_hydra():
    heavy = "{'torch', 'hydra', 'omegaconf', 'transformers', 'numpy', 'yaml'}"
    code = f"import sys, distlora_launcher.cli.main as cli; cli.main(['--help']); print({heavy} & set(sys.modules))"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert text.endswith("set()\n")
    assert all(f"\n  {name} " in text for name in COMMANDS)
    for title, commands in GROUPS.items():  # Each group with an example of its own.
        block = text.partition(f"\n{title}\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in block.splitlines()] == [*commands, "example:"]
        assert EXAMPLES[title].split()[1] in commands


def test_help_of_train_has_the_meaning_of_every_setting(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name, _, settings in sections():
        for setting in settings if name != "sweep" else []:  # `distlora sweep` takes those.
            assert f"\n  {setting.name}" in text
            assert " ".join(setting.summary.split()[:3]) in text
    assert "usage: distlora train [FILE.yaml]" in text
    assert "[adamw, adamw_8bit" in text  # Choices.
    assert main(["help", "train"]) == 0
    assert capsys.readouterr().out == text
    assert main(["train", "--cfg", "job", "--help"]) == 0
    assert capsys.readouterr().out == text
    assert main(["train", "--help", "optim.lr"]) == 0
    assert capsys.readouterr().out.startswith("optim.lr=")
    assert main(["train", "--help", "optim"]) == 0
    section = capsys.readouterr().out
    assert "optim.betas=" in section
    assert "train.epochs" not in section
    assert main(["train", "--help", "optin"]) == 2
    assert "did you mean 'optim'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("chat", "write distlora generate RUN;"),
        ("inference", "write distlora generate RUN;"),
        ("finetune", "write distlora train;"),
        ("mine.yaml", "write distlora train mine.yaml;"),
        ("trian", "did you mean 'train'?"),
        ("generate RUN --temp 1", "did you mean '--temperature'?"),
        ("generate RUN --prompt Hi", "write echo 'Hello' | distlora generate RUN, or --prompts FILE"),
        ("train lora.yml", "there is no file lora.yml; `distlora init lora.yml` writes one to start from"),
        ("train a.yaml b.yaml", "two settings files"),
        ("train --config mine.yaml", "a settings file needs none: distlora train mine.yaml"),
        ("train --config_file=mine.yaml", "a settings file needs none: distlora train mine.yaml"),
        ("train -c mine.yaml", "`distlora train mine.yaml` reads a settings file"),
        ("train --config-name mine.yaml", "write distlora train FILE.yaml"),
        ("train --learning_rate 1e-4", "did you mean 'optim.lr'?); settings have no dashes"),
        ("train --hydra-help", "there is no option --hydra-help any more; `distlora train --help` lists the settings"),
        ("train -m hydra/sweeper=optuna", "leave it out, or search by results with `distlora sweep`"),
        ("train -m optim.lr=interval(0,1)", "write a list of values, or search it with `distlora sweep ... optim.lr="),
    ],
)
def test_a_wrong_command_or_option_is_answered_with_the_right_one(
    line: str, expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err
    assert "usage:" not in captured.err


def test_version_is_ours_behind_every_command(capsys: pytest.CaptureFixture[str]):
    for line in ("--version", "-V", "train --version", "plan --version"):
        assert main(line.split()) == 0
        assert capsys.readouterr().out == f"distlora {version('distlora')}\n"


def test_a_reader_that_leaves_ends_no_command_with_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    for line in ("--help", "train --help", "train --cfg job", "plan model=llama3_8b gpu=h100", "sweep --help"):
        reader, writer = os.pipe()
        os.close(reader)
        with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
            patch.setattr(sys, "stdout", stream)
            assert main(line.split()) == 1
    assert capfd.readouterr().err == ""


SUBJECTS = {"analyze": ANALYSES, "cache": CACHE_ACTIONS, "data": DATA_ACTIONS, "sweep": ["agent"]}
COMMAND_LINES = [*COMMANDS, *(f"{name} {subject}" for name, subjects in SUBJECTS.items() for subject in subjects)]


def test_each_command_shows_an_example_and_names_the_nearest_option(capsys: pytest.CaptureFixture[str]):
    for line in COMMAND_LINES:
        assert main([*line.split(), "--help"]) == 0
        assert re.search(rf"(?i)examples?:\s+distlora {line}\b", capsys.readouterr().out), line
        assert main([*line.split(), "--hepl"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.match(r"error: .*--hepl.* \(did you mean '--help'\?\)", captured.err), line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("distlora tr", "train"),
        ("distlora train adapter=", "adapter=dora adapter=full adapter=lora"),
        ("distlora train -m train.se", "train.seed="),
        ("distlora plan gpu=rtx409", "gpu=rtx4090"),
        ("distlora resume ", ""),
    ],
)
def test_tab_completion(line: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COMP_LINE", line)
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.strip() == expected


def test_a_run_has_its_settings_in_its_folder(place: Path, steps: Steps, capsys: pytest.CaptureFixture[str]):
    assert train("run_dir=runs/one", "adapter.r=8") == 0
    run_dir = place / "runs" / "one"
    assert steps.prepared == steps.trained == [run_dir]
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert settings["adapter"]["r"] == 8
    assert settings["model"]["path"] == str(place / "model")
    assert settings["run_dir"] == str(run_dir)
    assert sorted(path.name for path in place.iterdir()) == ["data.jsonl", "model", "runs"]
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "data.json", "logs", "plan.json"]
    said = capsys.readouterr().out
    assert "run folder runs/one\nplan: " in said
    assert "try it with: distlora generate runs/one\n" in said
    pair = {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Rome."}
    (place / "data.jsonl").write_text(f"{json.dumps(pair)}\n" * 20)
    assert train("run_dir=runs/scores", "train.objective=reward", "data.format=preference") == 0
    assert "see how it learned with: distlora report runs/scores\n" in capsys.readouterr().out
    assert json.loads((run_dir / "plan.json").read_text())["settings"]["adapter"]["r"] == 8
    assert train("run_dir=runs/one") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_jobs_of_a_sweep_run_in_turn_until_a_signal_and_a_failure_ends_none(place: Path, steps: Steps):
    steps.train_codes = [1, 143, 0]
    assert train("-m", "train.seed=0,1,2", "run_dir=runs/sweep") == 143
    assert steps.trained == [place / "runs" / "sweep" / "0", place / "runs" / "sweep" / "1"]
    seeds = [yaml.safe_load((run / "config.yaml").read_text())["train"]["seed"] for run in steps.trained]
    assert seeds == [0, 1]
    assert not (place / "multirun").exists()


def test_jobs_beyond_those_checked_before_the_first_are_composed_as_they_start(
    place: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("distlora_launcher.cli.train.MOST_JOBS_CHECKED", 1)
    assert train("-m", "adapter.r=8,0,4", "run_dir=runs/sweep") == 2
    assert "adapter.r=0" in capsys.readouterr().err
    assert steps.trained == [place / "runs" / "sweep" / number for number in "02"]


@pytest.mark.ci
def test_the_preparation_process_explains_and_its_code_is_ours(place: Path):
    write_tokenizer(place / "model")
    with (place / "data.jsonl").open("w") as file:
        file.write('{"text": "good"}\n' * 1500 + "broken\n")  # Beyond the head that the launcher reads itself.
    words = ["model.path=model", "data.path=data.jsonl", "data.sequence_length=64", f"data.cache_dir={place}/cache"]
    ended = subprocess.run([DISTLORA, "train", *words, "run_dir=run"], cwd=place, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert not (place / "run").exists()


def test_a_request_to_stop_while_data_is_prepared_is_75_and_the_run_can_be_resumed(place: Path):
    write_tokenizer(place / "model")
    words = ["model.path=model", "data.path=data.jsonl", "data.sequence_length=64", f"data.cache_dir={place}/cache"]
    command = [DISTLORA, "train", *words, "run_dir=run"]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    # Which imports transformers first: nothing is tokenized yet.
    assert any(line == "preparing the data\n" for line in process.stdout)
    process.send_signal(signal.SIGUSR1)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert rest == "stopped by SIGUSR1 while the data was prepared\ncontinue with: distlora resume run\n"
    assert (place / "run" / "config.yaml").is_file()


@pytest.fixture
def stopped_run(place: Path, steps: Steps) -> Path:
    """Make a run that has settings and prepared data."""
    assert train("run_dir=run") == 0
    cache = place / "cache"
    cache.mkdir()
    (place / "run" / "data.json").write_text(json.dumps({"cache": str(cache)}))
    return place / "run"


def test_resume_prepares_lost_data_and_checks_the_model_again(
    place: Path, steps: Steps, stopped_run: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["resume", "run"]) == 0
    assert (steps.prepared, steps.trained) == ([stopped_run], [stopped_run] * 2)
    (place / "cache").rmdir()
    assert main(["resume", "run/"]) == 0
    assert steps.prepared == [stopped_run] * 2
    (place / "cache").mkdir()
    config = stopped_run / "config.yaml"
    made_of = {"cache": str(place / "cache"), "preparation": load_config(stopped_run).preparation}
    (stopped_run / "data.json").write_text(json.dumps(made_of))
    config.write_text(config.read_text().replace("log_every: 1", "log_every: 2"))
    assert main(["resume", "run"]) == 0
    assert steps.prepared == [stopped_run] * 2
    config.write_text(config.read_text().replace("train_on: assistant", "train_on: all"))
    assert main(["resume", "run"]) == 0
    assert steps.prepared == [stopped_run] * 3, "without a checkpoint, the data follow the settings"
    (place / "model" / "model.safetensors").unlink()
    assert main(["resume", "run"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    (stopped_run / "adapter").mkdir()
    assert main(["resume", str(stopped_run)]) == 0
    assert capsys.readouterr().out == "run is complete: run/adapter\n"
    assert len(steps.trained) == 5


CHANGED = [
    # (a setting in RUN/config.yaml, its wrong value, what the message says)
    ("cluster.launcher", "slrum", "='slrum' is not one of local, torchrun, slurm (did you mean 'slurm'?)"),
    ("cluster.gpus_per_node", 0, "=0 "),
    ("cluster.rdzv_endpoint", "n1:29500", "=n1:29500 has no effect with cluster=local"),
    ("train.log_every", 0, "=0 must be positive"),
    ("train.keep", 0, "=0 must be positive"),
    ("train.dtype", "bf61", "='bf61' is not one of bf16, fp32"),
    ("train.save_every", False, "=false must be of type int"),
    ("parallel.backend", "fsdp", "='fsdp' is not one of fsdp2, zero3"),
    ("parallel.shard_degree", 3, "=3 does not divide"),
    ("tracker.project", "other", "=other has no effect with tracker=none"),
    ("plan.mode", "atuo", "='atuo' is not one of given, auto"),
    ("data.train_on", "al", "='al' is not one of assistant, last, all"),
]


def test_a_resume_checks_what_was_changed_by_hand(steps: Steps, stopped_run: Path, capsys: pytest.CaptureFixture[str]):
    config = stopped_run / "config.yaml"
    made = yaml.safe_load(config.read_text())
    made["tracker"]["wandb"] = False
    for setting, value, expected in CHANGED:
        section, name = setting.split(".")
        assert name in made[section]
        config.write_text(yaml.safe_dump(made | {section: made[section] | {name: value}}, sort_keys=False))
        assert main(["resume", "run"]) == 2, setting
        assert f"run/config.yaml: {setting}{expected}" in capsys.readouterr().err
    assert steps.trained == [stopped_run]


def test_commands_and_a_resume_read_a_run_whose_settings_are_refused_today(steps: Steps, stopped_run: Path):
    config = stopped_run / "config.yaml"
    text = config.read_text().replace("schedule: cosine", "schedule: constant")
    config.write_text(text.replace("min_lr_ratio: 0.0", "min_lr_ratio: 0.5"))
    assert load_config(stopped_run).optim.min_lr_ratio == 0.5
    assert train("optim.schedule=constant", "optim.min_lr_ratio=0.5", "run_dir=other") == 2
    assert main(["status", "run"]) == 0
    assert main(["resume", "run"]) == 0
    assert steps.trained == [stopped_run] * 2
