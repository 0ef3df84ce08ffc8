"""The Python API: settings, runs in processes of their own, callbacks, and a model in the calling process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import distlora
from distlora.config import UserError
from distlora.data.prompts import GenerateRequest
from distlora.post import generate as generate_worker
from distlora.post.export.client_check import our_logits
from distlora.post.trained import Name
from distlora_launcher import api
from distlora_launcher.api import as_overrides
from distlora_launcher.cli.plan import main as plan_command
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.follow import RunFollower
from support.family_models import SINGLE

ROOT = Path(__file__).parents[2]
CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"{n} is a number."}]}
    for n in range(40)
]
SETTINGS = {
    "data": {"sequence_length": 64, "eval_fraction": 0.1},
    "train": {"global_batch": 4, "max_steps": 4, "save_every": 2, "dtype": "fp32"},
    "optim.lr": 2e-2,
    "tracker": "none",
    "plan.measure": False,
}


def settings(**train: int) -> dict[str, Any]:
    """Return SETTINGS with other values in train."""
    return SETTINGS | {"train": {**SETTINGS["train"], **train}}  # type: ignore[dict-item]


def test_importing_is_light_and_planning_imports_no_torch() -> None:
    code = (
        "import sys, distlora; assert not {'torch', 'hydra', 'distlora_launcher'} & set(sys.modules); "
        "assert {'train', 'plan', 'load', 'Run'} <= set(dir(distlora)) and distlora.__version__; "
        "result = distlora.plan(model='llama3_8b', gpu='rtx4090', recipe='qlora', settings={'adapter': {'r': 64}}); "
        "assert result.fits and result.as_json()['fits']; assert 'torch' not in sys.modules"
    )
    # A model's first plan on a machine may say on stderr that it was checked; a later one says nothing.
    first, later = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/") for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert (later.returncode, later.stderr) == (0, "")


def test_a_plan_prints_as_the_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    result = distlora.plan(model="llama3_8b", gpu="h100", settings={"cluster.gpus_per_node": 2})
    plan_command(["model=llama3_8b", "gpu=h100", "cluster.gpus_per_node=2"])
    assert capsys.readouterr().out == f"{result}\n"


def test_a_settings_file_is_read_and_the_arguments_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: qlora\nmodel: llama3_70b\nadapter: {r: 32}\n")
    from_file = distlora.plan(file, model="llama3_8b", gpu="h100")
    assert str(from_file) == str(
        distlora.plan(model="llama3_8b", gpu="h100", recipe="qlora", settings={"adapter.r": 32})
    )


def test_settings_of_python_are_those_of_the_command_line(tmp_path: Path) -> None:
    place = tmp_path / "it's a [folder], 100%"
    words = as_overrides(
        model=place,
        data="~/chats=1.jsonl",
        recipe="qlora",
        run_dir=tmp_path / "run",
        settings={
            "optim.lr": 1e-5,
            "adapter": {"r": 32, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0": 8, "q_proj": 4}},
            "train": {
                "max_steps": None,
                "sample_every": 5,
                "sample_prompts": ["What, then? {x: 'y'}", "", 'a "b" \\', "null", "7"],
            },
            "data.columns": {"messages": "conversation"},
            "tracker": "none",
            "quant.cache": False,
        },
    )
    config = compose_config(words)
    assert (config.model.path, config.data.path) == (str(place), str(Path.home() / "chats=1.jsonl"))
    assert (config.optim.lr, config.adapter.r, config.quant.cache, config.tracker.names) == (1e-5, 32, False, ())
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.adapter.rank_pattern == {"layers.0": 8, "q_proj": 4}
    assert config.train.sample_prompts == ("What, then? {x: 'y'}", "", 'a "b" \\', "null", "7")
    assert config.data.columns == {"messages": "conversation"}
    assert config.train.max_steps is None
    assert as_overrides(model="llama3_8b") == ["model=llama3_8b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"optim": {"lrr": 1}}}, r"there is no setting optim.lrr \(did you mean 'optim.lr'\?\)"),
        ({"settings": {"train.max_steps": "ten"}}, "train.max_steps='ten' must be of type int"),
        ({"settings": {"optim.lr": object()}}, "optim.lr=<object .* is of type object; give a text, a number"),
        ({"run_dir": "a", "settings": {"run_dir": "b"}}, "run_dir is set twice"),
        ({"data": [{"text": "a"}, "b"]}, r"data\[1\] is not a dictionary"),
        ({"data": [{"text": {1, 2}}]}, r"data\[0\] is not JSON"),
        ({"callbacks": [print]}, r"callbacks: <built-in function print> has none of on_step, on_eval, on_save"),
        (
            {"callbacks": [distlora.Callback()], "settings": {"cluster": "slurm"}},
            "cluster=local only, not with cluster=slurm",
        ),
        ({"model": "nowhere", "data": CHATS[:1], "run_dir": "run"}, "model.path=.*nowhere.* does not exist"),
    ],
)
def test_wrong_arguments_are_user_errors(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is refused by the launcher's process, whose explanation is the exception's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        distlora.train(**{"model": "model", "data": "data.jsonl", **arguments})
    assert not list(tmp_path.iterdir()), "no run folder is left"


def test_it_composes_within_another_hydra_application(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_module
    from hydra.core.hydra_config import HydraConfig

    with initialize_config_module("distlora_launcher.conf", version_base="1.3"):
        settings = HydraConfig.instance().cfg
        with pytest.raises(UserError, match=r"there is no setting optim\.x"):
            distlora.train(model="m", data="d", settings={"optim.x": 1})
        assert HydraConfig.instance().cfg is settings
        assert compose("config", overrides=["name=mine"]).name == "mine"


class Recorder(distlora.Callback):
    """Notes every call."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.stop_after = stop_after

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> api.Answer:
        assert metrics["step"] == step
        self.calls.append(("step", step))
        return "stop" if step == self.stop_after else None

    def on_eval(self, step: int, metrics: Mapping[str, Any]) -> api.Answer:
        assert metrics["eval_loss"] > 0
        self.calls.append(("eval", step))
        return None

    def on_save(self, step: int, folder: Path) -> api.Answer:
        assert (folder / "manifest.json").is_file()
        self.calls.append(("save", step))
        return None


def write_metrics(run_dir: Path, *steps: int, evaluated: int | None = None, at: float | None = None) -> None:
    when = time.time() if at is None else at
    lines = [{"step": step, "time": when, "loss": 1.0} for step in steps]
    lines += [{"step": evaluated, "time": when, "eval_loss": 1.0}] if evaluated is not None else []
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def test_a_callback_that_raises_is_reported_once_and_no_longer_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(step: int, metrics: Mapping[str, Any]) -> None:
        raise ValueError(f"no {metrics['loss']}")

    recorder = Recorder()
    follower = RunFollower(tmp_path, [distlora.Callback(on_step=fail), recorder])
    write_metrics(tmp_path, 1, 2)
    assert not follower.look()
    assert recorder.calls == [("step", 1), ("step", 2)]
    shown = capsys.readouterr().err
    assert shown.count("WARNING: Callback.on_step failed after step 1; the callback is not called again") == 1
    assert shown.count('raise ValueError(f"no {metrics') == shown.count("ValueError: no 1.0") == 1


@pytest.fixture(scope="module")
def stopped(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[distlora.Run, Recorder]:
    """Return a run that a callback has stopped after its second step, and the callback."""
    recorder = Recorder(stop_after=2)
    run = distlora.train(
        model=folders / "llama",
        data=CHATS,
        recipe="qlora",
        run_dir=tmp_path_factory.mktemp("api") / "run",
        settings=settings(max_steps=400, save_every=200),
        callbacks=[recorder],
    )
    return run, recorder


@pytest.fixture(scope="module")
def done(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[distlora.Run, Recorder]:
    """Return a whole run, and its callback."""
    recorder = Recorder()
    run_dir = tmp_path_factory.mktemp("api") / "run"
    run = distlora.train(
        model=folders / "llama", data=CHATS, run_dir=run_dir, settings=SETTINGS, callbacks=[recorder], recipe="qlora"
    )
    return run, recorder


def test_a_run_has_its_records(done: tuple[distlora.Run, Recorder]) -> None:
    run, recorder = done
    steps = [("step", 1), ("step", 2), ("save", 2), ("step", 3), ("step", 4), ("eval", 4), ("save", 4)]
    assert recorder.calls == [("eval", 0), *steps]
    assert run.status.state == "done"
    assert (run.config.adapter.target_modules, run.config.optim.lr) == ("all-linear", 2e-2)
    assert [record["step"] for record in run.metrics] == [0, 1, 2, 3, 4, 4]
    assert run.summary["eval_loss"] == run.metrics[-1]["eval_loss"]
    assert run.plan["fits"] is True
    assert run.adapter == run.folder / "adapter"
    assert run.report(run.folder / "mine.html").read_text().startswith("<!doctype html>")
    assert "done" in repr(distlora.Run(str(run.folder)))
    assert len((run.folder / "documents.jsonl").read_text().splitlines()) == len(CHATS)
    with pytest.raises(UserError, match="already holds a run"):
        distlora.train(model="m", data=CHATS[:1], run_dir=run.folder)
    assert len((run.folder / "documents.jsonl").read_text().splitlines()) == len(CHATS)


def test_a_loaded_model_answers_as_the_command_and_has_the_logits_of_training(
    done: tuple[distlora.Run, Recorder], tmp_path: Path
) -> None:
    run, _ = done
    prompts: list[Any] = ["What is 3?", [{"role": "user", "content": "What is 4?"}], "5"]
    model = distlora.load(run, device="cpu")
    state = torch.get_rng_state()
    for number, options in enumerate(({"temperature": 1.5, "seed": 3}, {}, {})):
        key = "prompt" if isinstance(prompts[number], str) else "messages"
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({key: prompts[number]}) + "\n")
        files = {"prompts": str(tmp_path / f"{number}.jsonl"), "out": str(tmp_path / f"out_{number}.jsonl")}
        weights, words = str(run.folder / "adapter"), {**files, **options, "max_new_tokens": 9}
        generate_worker.run(GenerateRequest(run=str(run.folder), weights=weights, **words), SINGLE)  # type: ignore[arg-type]
        expected_text = json.loads((tmp_path / f"out_{number}.jsonl").read_text())["completion"]
        torch.set_rng_state(state)
        assert model.generate(prompts[number], max_new_tokens=9, **options) == expected_text
        assert torch.equal(torch.get_rng_state(), state)
    expected = our_logits(Name(place=str(run.folder)).read())
    assert torch.equal(model.logits(expected.tokens[0].tolist()), expected.logits[0])
    assert model.logits("5").shape == (1, len(model.tokenizer))
    assert not torch.equal(distlora.load(run.folder, adapter="base").logits("5"), model.logits("5"))
    for wrong, message in {"temperature": r"temperature=-1", "max_new_tokens": r"max_new_tokens=-1"}.items():
        with pytest.raises(UserError, match=f"^{message}"):
            model.generate("a", **{wrong: -1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"the last message is the assistant's own"):
        model.generate([{"role": "assistant", "content": "a"}])
    with pytest.raises(UserError, match=r"^checkpoint step_7: .* has no such checkpoint"):
        distlora.load(run, checkpoint="step_7")


@pytest.mark.slow
def test_a_callback_stops_a_run_which_resumes(stopped: tuple[distlora.Run, Recorder]) -> None:
    run, recorder = stopped
    assert run.status.state == "stopped"
    step = run.metrics[-1]["step"]
    assert recorder.calls[-1] == ("save", step)
    assert recorder.calls[:3] == [("eval", 0), ("step", 1), ("step", 2)]
    assert run.adapter is None

    def interrupt(step: int, metrics: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.resume(callbacks=[distlora.Callback(on_step=interrupt)])
    assert run.status.state == "stopped"
    later = run.metrics[-1]["step"]
    assert later > step
    again = Recorder(stop_after=later + 1)
    run.resume(callbacks=[again])
    assert again.calls[0] == ("step", later + 1)


@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a process of its parent's end only on Linux")
def test_a_run_saves_and_stops_when_the_calling_process_is_killed(folders: Path, tmp_path: Path) -> None:
    code = (
        "import distlora, os; callback = distlora.Callback(on_step=lambda step, metrics: os.kill(os.getpid(), 9)); "
        f"distlora.train(model={str(folders / 'llama')!r}, data={CHATS!r}, run_dir='run', callbacks=[callback], "
        f"settings={settings(max_steps=4000, save_every=1000)!r})"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = distlora.Run(tmp_path / "run")
    deadline = time.monotonic() + 120
    while run.status.holders:
        assert time.monotonic() < deadline, "the launcher runs on"
        time.sleep(0.1)
    assert run.status.state == "stopped"
    assert run.status.ending.stopped is not None


@pytest.mark.slow
def test_type_checkers_see_the_names(tmp_path: Path) -> None:
    code = "import distlora; reveal_type(distlora.load(distlora.train(model='m')).generate('Hi', seed=1))"
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]
    path = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "launcher"))
    finished = subprocess.run(
        [*command, "-c", code], cwd=tmp_path, env=os.environ | {"MYPYPATH": path}, capture_output=True, text=True
    )
    assert 'Revealed type is "str"' in finished.stdout.replace("builtins.", ""), finished.stdout + finished.stderr


@pytest.mark.slow
def test_the_notebook_runs(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the demo's model where `distlora demo` has left it, else on a small random one."""
    import nbformat
    from nbclient import NotebookClient

    demo = Path.home() / ".cache" / "distlora" / "demo" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("DISTLORA_NOTEBOOK_MODEL", str(demo if demo.is_dir() else folders / "llama"))
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is committed without outputs"
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "fits        yes" in text
    assert "image/png" in text
    assert "trained: Who are you? -> " in text
    run = distlora.Run(tmp_path / "runs" / "notebook")
    losses = [record["loss"] for record in run.metrics if "loss" in record]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
