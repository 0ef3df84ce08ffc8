"""`distlora report` of a run: what its page says in every state, whatever its records hold, and that it is one file."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from damage import Reader, any_json, any_lines, any_yaml, holds, holds_without
from distlora.config import UserError
from distlora.run_folder.layout import REPORT_NAME
from distlora_launcher.cli.main import main
from distlora_launcher.launch.final_report import write_final_report
from distlora_launcher.report.run_page import run_report
from distlora_launcher.report.run_records import Standing, read_run
from report_folders import PLAN, STATE, Page, make_folder, metrics, write, write_lines

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>"
DONE = Standing(state="done", said="is done")


def reported(run_dir: Path) -> Page:
    """The page that the command writes."""
    assert main(["report", str(run_dir)]) == 0
    return Page((run_dir / REPORT_NAME).read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = reported(make_folder(tmp_path / "run"))
    assert re.search(r"report \S+report.html \(\d+ kB\)", capsys.readouterr().out)
    assert "done" in page.text
    assert "went from 3.0000 before training to 2.1000 after step 40" in page.text
    titles = [chart["lines"][0]["name"] for chart in page.charts]
    assert len(titles) == 5
    assert page.charts[0]["lines"][0] == {
        "name": "training, each step",
        "colour": 0,
        "trial": None,
        "x": list(range(1, 41)),
        "y": [pytest.approx(3 - step / 40, rel=1e-4) for step in range(1, 41)],
    }
    assert page.charts[0]["lines"][2]["x"] == [0, 10, 20, 30, 40]
    # Planned 6.8 MB of logits, measured 7.0: the head's, which a measurement does not tell from other working memory.
    assert page.row("working: activations, logits, scratch")[1:4] == ["6.8 MB", "7 MB", "+2.9 %"]
    assert page.row("together")[1:4] == ["7 MB", "7.2 MB", "+2.9 %"]
    assert page.row("gradients summed a step, on a rank")[1:4] == ["300 kB", "330 kB", "+10.0 %"]
    assert page.row("the result")[1:4] == ["300 kB", "330 kB", "+10.0 %"]
    assert page.row("optim.lr") == ["optim.lr", "0.00123", "0.0002"]
    assert page.row("model.path") == ["model.path", "/models/base", "has none"]
    assert page.row("identity of the base")[1] == STATE["identity"]["base_fingerprint"]
    assert page.row("checkpoints/step_00000040")[1:4] == ["checkpoint", "40", "2.1000"]
    for said in ("Hello", "world", "AVX512", f"distlora generate {tmp_path / 'run'}", "4.127", "/d/chats.jsonl"):
        assert said in page.text, said


def test_a_run_of_a_pack_is_not_held_to_the_plan_of_all_its_trials(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    write(run / "plan.json", PLAN | {"trials": 4})
    page = reported(run)
    assert "with 4 trials on one base" in page.text
    assert page.row("gathered a step, on a rank")[3] == "+0.0 %"
    assert not any(row[:1] == ["the result"] for table in page.tables for row in table)


def test_what_differs_from_the_defaults_stands_first(tmp_path: Path) -> None:
    page = reported(make_folder(tmp_path / "run"))
    (changed,) = [table for table in page.tables if table[0] == ["setting", "value", "default"]]
    names = [row[0] for row in changed[1:]]
    assert names == [
        "model.path",
        "data.path",
        "optim.lr",
        "train.max_steps",
        "train.eval_every",
        "train.sample_every",
        "train.sample_prompts",
        "name",
    ]
    others = {row[0] for table in page.tables for row in table if row}
    assert {"adapter.r", "train.epochs", "quant.method", "sweep.method"} & others == {
        "adapter.r",
        "train.epochs",
        "quant.method",
    }


def test_it_is_one_file_that_reaches_nothing(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    page = reported(run)
    source = (run / REPORT_NAME).read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|<link|<iframe", source)
    assert all(not {"src", "srcset", "action"} & attributes.keys() for _, attributes in page.elements)
    links = [attributes["href"] or "" for name, attributes in page.elements if name == "a"]
    assert links
    assert all(link.removeprefix("#") in page.ids for link in links)
    assert len(page.ids) == len(set(page.ids))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = [text for attributes, text in page.scripts if not attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_a_hostile_text_is_shown_and_never_markup(tmp_path: Path) -> None:
    """Whatever holds it: a sample, a name, a setting, an error, a figure's name, a source, a version."""
    run = make_folder(tmp_path / "run", name=HOSTILE, done=False, model={"path": HOSTILE}, data={"path": HOSTILE})
    odd = "\0\u202e\ud800\x1b[31m"
    write_lines(run / "samples.jsonl", [{"step": 1, "prompt": HOSTILE + odd, "text": HOSTILE + odd}])
    lines = metrics(30) + [{"step": step, "time": 1.0, HOSTILE: step / 7} for step in range(31, 34)]
    write_lines(run / "metrics.jsonl", lines)
    write(run / "data.json", {"splits": {"train": {"sources": [{"path": HOSTILE}]}}})
    write(run / "checkpoints/step_00000040/state.json", {"environment": {HOSTILE: HOSTILE}})
    error = {"type": "E", "message": HOSTILE, "bad_input": False, "time": time.time(), "traceback": ""}
    write(run / "logs/rank_0.error.json", error)
    page = reported(run)
    assert page.text.count(HOSTILE) >= 8
    own = importlib.resources.files("distlora_launcher.report").joinpath("page.js").read_text(encoding="utf-8")
    assert [text for attributes, text in page.scripts if not attributes] == [own]
    assert all(name != "img" and not any(key.startswith("on") for key in keys) for name, keys in page.elements)
    assert r"\x00\u202e\ud800\x1b[31m" in page.text
    assert any(line["name"] == "each step" or HOSTILE in line["name"] for c in page.charts for line in c["lines"])


def test_a_run_with_nothing_yet(tmp_path: Path) -> None:
    page = reported(make_folder(tmp_path / "run", steps=0, done=False))
    assert "is prepared and was never started" in page.text
    assert "Nothing has been trained yet" in page.text
    assert page.charts == []
    assert "No step is measured yet" in page.text
    run = make_folder(tmp_path / "unmeasured")
    write(run / "summary.json", {"train_seconds": 1.0})
    assert "What a step of this run takes was not measured" in reported(run).text


def test_a_run_that_was_killed_in_the_middle(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run", steps=13, done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "loss"')  # A kill has cut it off, which is no damage.
    page = reported(run)
    assert "has ended without a word" in page.text
    assert f"distlora resume {run}" in page.text
    assert "left out" not in page.text
    assert "13 of 40" in re.sub(r"\s+", " ", page.text)


def test_a_run_that_diverged(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run", steps=13, done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 14, "time": 1.0, "loss": None, "lr": 1e-3, "grad_norm": None}) + "\n")
    message = "step 14: the loss of rows 1, 2 is not finite"
    error = {"type": "NonFiniteError", "message": message, "bad_input": False, "time": time.time(), "traceback": ""}
    write(run / "logs/rank_1.error.json", error)
    page = reported(run)
    assert message in page.text
    assert "Not finite, and so not drawn: loss of step 14, and 1 more" in page.text
    assert all(14 not in line["x"] for line in page.charts[0]["lines"])


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "plan.json", "data.json"])
def test_a_damaged_record_is_named_and_the_rest_is_shown(name: str, tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    (run / name).write_bytes(b'{"step": ')
    page = reported(run)
    assert f"{name} is damaged" in page.text
    assert "Traceback" not in page.text
    assert len(page.charts) == 5


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("nonsense\n" + text + '[1]\n{"step": "x"}\n')
    page = reported(run)
    assert "metrics.jsonl: 3 lines are no record of a step, and left out" in page.text


def test_a_long_run_makes_a_small_page_without_losing_a_spike(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run", steps=20_000, train={"max_steps": 20_000})
    lines = metrics(20_000, every=100)
    spike = next(line for line in lines if line["step"] == 7777 and "loss" in line)
    spike |= {"loss": 9.5, "grad_norm": 4000.0}
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "samples.jsonl", [{"step": s, "prompt": "p", "text": "x" * 5000} for s in range(1, 2000)])
    page = reported(run)
    assert (run / REPORT_NAME).stat().st_size < 1_000_000
    loss, norm = page.charts[0], page.charts[2]
    assert loss["lines"][0]["y"][loss["lines"][0]["x"].index(7777)] == 9.5
    assert norm["log"] is True, "a spike of 4,000 leaves norms of 1 their room"


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "required"),
    (["nowhere"], "does not exist"),
    (["empty"], "holds neither a run"),
    (["run", "--out", "empty"], "is a folder"),
    (["run", "--out", "none/x.html"], "cannot be written"),
    (["run", "--ot", "x"], "there is no option --ot"),
])  # fmt: skip
def test_what_is_no_run_or_no_place_is_refused(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / REPORT_NAME).exists()


def test_out_names_the_place(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / "x.html")]) == 0
    assert "small" in Page((tmp_path / "x.html").read_text()).text
    assert not (run / REPORT_NAME).exists()


def test_the_end_of_a_run_writes_it_and_cannot_fail_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_folder(tmp_path / "run")
    write_final_report(run)
    assert "report.html" in capsys.readouterr().out
    assert "is done" in Page((run / REPORT_NAME).read_text()).text
    (run / REPORT_NAME).unlink()
    (run / REPORT_NAME).mkdir()
    write_final_report(run)
    assert "no report was written (IsADirectoryError" in capsys.readouterr().err
    with (run / "metrics.jsonl").open("a") as file:
        file.write(" " * 5_000_000)
    write_final_report(run)
    assert f"distlora report {run}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    make_folder(folder / "run")
    return folder


def read_page(folder: Path) -> Page:
    try:
        return Page(run_report(read_run(folder / "run"), DONE))
    except UserError as error:
        raise AssertionError(f"a report says what is damaged, and is not stopped by it: {error}") from error


READERS: dict[str, Any] = {
    "run/config.yaml": any_yaml,
    "run/metrics.jsonl": any_lines,
    "run/samples.jsonl": any_lines,
    "run/summary.json": any_json,
    "run/plan.json": any_json,
    "run/data.json": any_json,
    "run/checkpoints/step_00000040/state.json": any_json,
}


@pytest.mark.parametrize("file", READERS)
def test_no_damage_stops_it(file: str, place: Path) -> None:
    """The page is whole HTML whatever one record holds (`Page` fails for what is not)."""
    reader = Reader(file=file, damages=READERS[file], read=read_page, examples=12)
    holds(reader, place)
    holds_without(reader, place)
