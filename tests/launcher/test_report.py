"""`distlora report` of a run: the page shows what the records hold, in every state, in one file that loads nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from distlora.config import UserError
from distlora.run_folder.layout import REPORT_NAME
from distlora_launcher.cli.main import main
from distlora_launcher.report.records import PageStatus, read_run
from distlora_launcher.report.run_page import run_report, write_final_report
from support.damage import Reader, any_json, any_lines, any_yaml, holds, holds_without
from support.report_folders import STATE, SUMMARY, Page, make_folder, metrics, reported, write, write_lines

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)> $x^2$"
DONE = PageStatus(state="done", headline="is done")


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = reported(make_folder(tmp_path / "run"))
    assert re.search(r"report \S+report.html \(\d+ kB\)", capsys.readouterr().out)
    assert "went from 3.0000 before training to 2.1000 after step 40" in page.text
    assert len(page.charts) == 4
    assert "training, each step: 2.975 at step 1, 2 at step 40, lowest 2 at step 40" in page.charts[0]
    assert "held out: 3 at step 0, 2.1 at step 40" in page.charts[0]
    # The plan has 6.8 MB of logits; the measurement has 7.0 MB of logits and other working memory together.
    assert page.row("working memory: activations, logits, scratch")[1:4] == ["6.8 MB", "7 MB", "+2.9 %"]
    assert page.row("total")[1:4] == ["7 MB", "7.2 MB", "+2.9 %"]
    assert page.row("gradients all-reduced per step and rank")[1:4] == ["300 kB", "330 kB", "+10.0 %"]
    assert page.row("the result")[1:4] == ["300 kB", "330 kB", "+10.0 %"]
    assert page.row("optim.lr") == ["optim.lr", "0.00123", "null"]
    assert page.row("model.path") == ["model.path", "/models/base", "no default"]
    assert page.row("fingerprint of the base")[1] == STATE["identity"]["base_fingerprint"]
    assert page.row("checkpoints/step_00000040")[1:4] == ["checkpoint", "40", "2.1000"]
    for words in ("Hello", "world", "AVX512", f"distlora generate {tmp_path / 'run'}", "4.127", "/d/chats.jsonl"):
        assert words in page.text, words
    (changed,) = [table for table in page.tables if table[0] == ["setting", "value", "default"]]
    assert [row[0] for row in changed[1:4]] == ["model.path", "data.path", "optim.lr"]
    first_cells = {row[0] for table in page.tables for row in table if row}
    assert {"adapter.r", "quant.method", "sweep.method"} & first_cells == {"adapter.r", "quant.method"}


def test_the_page_of_a_run_has_its_folder_as_title_and_all_that_can_be_typed(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "first", name="distlora")
    page = reported(run)
    assert "first - Training run" in page.text
    for command in ("generate", "merge", "verify"):
        assert f"distlora {command} {run}" in page.text, command
    assert f"distlora eval {run} --text FILE" in page.text, "this run holds nothing out"
    assert f"distlora export {run} --format gguf" in page.text
    assert f"distlora push {run} ORG/NAME" in page.text
    assert f"adapter.init_from={run}/adapter" in page.text
    write(run / "data.json", {"splits": {"train": {}, "eval": {}}})
    page = reported(run)
    assert f"distlora eval {run} " in page.text
    assert "--text" not in page.text
    stopped = reported(make_folder(tmp_path / "second", steps=13, done=False)).text
    assert f"distlora resume {tmp_path / 'second'}" in stopped
    assert "chat with the newest checkpoint" in stopped
    assert "distlora merge" not in stopped


def test_planned_and_measured_memory_count_the_same(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    lines = [line | {"peak_memory_bytes": 7_200_000} if "loss" in line else line for line in metrics(40)]
    write_lines(run / "metrics.jsonl", lines)
    write(run / "summary.json", SUMMARY | {"peak_memory_bytes": 7_200_000, "resident_memory_bytes": 573_000_000})
    page = reported(run)
    assert "peak memory 7.2 MB per rank, planned 7 MB" in re.sub(r"\s+", " ", page.text)
    assert page.row("total")[1:4] == ["7 MB", "7.2 MB", "+2.9 %"]
    resident = "resident host memory per process, with Python, torch and its compiled kernels"
    assert page.row(resident)[1:] == ["not planned", "573 MB", ""]
    assert not any("Peak memory" in chart for chart in page.charts), "one value is no curve"
    lines[-2] |= {"peak_memory_bytes": 7_300_000}
    write_lines(run / "metrics.jsonl", lines)
    (chart,) = (chart for chart in reported(run).charts if "Peak memory" in chart)
    assert "7.2 MB at step 1" in chart


def test_the_first_chart_of_a_run_with_rewards_is_the_reward_with_its_spread(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    lines = metrics(40)
    for line in lines:
        share = line["step"] / 40
        if "eval_loss" in line:
            line |= {"eval_reward": share, "eval_completions/mean_length": 9.0}
        else:
            line |= {"reward": share, "reward_std": 0.25, "frac_reward_zero_std": share}
            line |= {"completions/mean_length": 20 - 10 * share, "rewards/failed": 3 if line["step"] == 7 else 0}
    write_lines(run / "metrics.jsonl", lines)
    charts = reported(run).charts
    assert "Reward" in charts[0]
    assert "Length of the answers" in charts[1]
    assert "one standard deviation of a group, on average: -0.225 at step 1, 0.75 at step 40" in charts[0]
    [loss] = (chart for chart in charts if chart.startswith("Loss"))
    assert "held out" not in loss, "eval_loss is the negative reward"
    assert "held out: 0 at step 0, 1 at step 40" in charts[0]
    assert "held out: 9 at step 0, 9 at step 40" in charts[1]
    for place, title in enumerate(("Share of groups with equal rewards", "Answers left out", "Loss"), 2):
        assert title in charts[place]
    assert not any("reward_std" in chart for chart in charts)


def test_the_best_worst_and_changed_answers_of_each_evaluation_are_shown(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    changed = {"category": "changed", "reward": 0.75, "reward_before": 0.125, "before": "I think 41"}
    rows = [
        {"step": 10, "prompt": "6 x 7?", "text": "I think 41", "category": "worst", "reward": 0.125},
        {"step": 20, "prompt": "6 x 7?", "text": "42 " * 400, **changed},
    ]
    damaged = rows[0] | {"reward": "x"}
    write_lines(run / "samples.jsonl", [{"step": 20, "prompt": "Hello", "text": "world"}, damaged, *rows])
    page = reported(run)
    text = " ".join(page.text.split())
    assert "1 line is not a sample, and skipped" in text
    newest, older = text.index("after step 20 reward before"), text.index("after step 10 reward before")
    shown = text[newest:older]
    assert "changed 0.75 0.125 6 x 7? 42 42" in shown
    assert "... (1,200 characters) I think 41" in shown
    assert "worst 0.125 6 x 7? I think 41" in text[older:]
    assert text.count("6 x 7?") == 2, "no samples of train.sample_prompts"


def test_the_page_is_one_file_that_loads_and_runs_nothing(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    page = reported(run)
    source = (run / REPORT_NAME).read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\((?!#)|<link|<iframe|<script", source)
    assert all(not {"src", "srcset", "action"} & attributes.keys() for _, attributes in page.elements)
    assert len(page.ids) == len(set(page.ids))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_a_sample_about_an_image_is_shown_with_it(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures need pillow: pip install 'distlora[vision]'")
    run = make_folder(tmp_path / "run")
    image.new("RGB", (1000, 500), "red").save(tmp_path / "red.png")
    (tmp_path / "secret.png").write_text("no image")
    rows = [
        {"step": 20, "prompt": "Which colour?", "text": "red", "image": str(tmp_path / name)}
        for name in ("red.png", "secret.png", "gone.png")
    ]
    write_lines(run / "samples.jsonl", rows)
    page = reported(run)
    (source,) = [attributes["src"] for name, attributes in page.elements if name == "img"]
    shown = image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    assert (shown.size, shown.getpixel((5, 5))) == ((256, 128), (255, 0, 0))
    assert page.text.count("Which colour?") == 3


def test_a_hostile_text_is_shown_and_never_markup(tmp_path: Path) -> None:
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
    names = {name for name, _ in page.elements}
    assert not names & {"img", "script"}
    assert not any(key.startswith("on") for _, keys in page.elements for key in keys)
    assert r"\x00\u202e\ud800\x1b[31m" in page.text


def test_a_run_that_diverged_shows_its_error(tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run", steps=13, done=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 14, "time": 1.0, "loss": None, "lr": 1e-3, "grad_norm": None}) + "\n")
    message = "step 14: the loss of rows 1, 2 is not finite"
    error = {"type": "NonFiniteError", "message": message, "bad_input": False, "time": time.time(), "traceback": ""}
    write(run / "logs/rank_1.error.json", error)
    page = reported(run)
    assert message in page.text
    assert "Not drawn because not finite: loss of step 14, and 1 more" in page.text
    assert "at step 13" in page.charts[0]


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "plan.json", "data.json"])
def test_a_damaged_record_is_named_and_the_rest_is_shown(name: str, tmp_path: Path) -> None:
    run = make_folder(tmp_path / "run")
    (run / name).write_bytes(b'{"step": ')
    (run / "metrics.jsonl").write_text("nonsense\n" + (run / "metrics.jsonl").read_text() + '[1]\n{"step": "x"}\n')
    page = reported(run)
    assert f"{name} is damaged" in page.text
    assert "metrics.jsonl: 3 lines are not a record of a step, and skipped" in page.text
    assert len(page.charts) == 4


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "required"),
    (["nowhere"], "does not exist"),
    (["empty"], "holds neither a run"),
    (["run", "--out", "empty"], "is a folder"),
    (["run", "--out", "none/x.html"], "cannot be written"),
    (["run", "--ot", "x"], "there is no option --ot"),
])  # fmt: skip
def test_a_folder_without_a_run_or_a_bad_place_is_refused(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    assert main(["report", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / REPORT_NAME).exists()


def test_the_end_of_a_run_writes_its_report_and_a_failure_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_folder(tmp_path / "run")
    write_final_report(run)
    assert "report.html" in capsys.readouterr().out
    assert "chat with the result" in Page((run / REPORT_NAME).read_text()).text
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
        raise AssertionError(f"damage stopped the report: {error}") from error


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
def test_damage_does_not_stop_the_report(file: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distlora.results.figures._svg", lambda *_: Markup(""))  # 0.1 to 2 s for each page.
    reader = Reader(file=file, damages=READERS[file], read=read_page, examples=6)
    holds(reader, place)
    holds_without(reader, place)
