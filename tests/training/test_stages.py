"""`distlora resume RUN setting=value`: a run goes on with other settings, which its folder, report and card record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distlora.checkpoint.verify import verify
from distlora.config import UserError
from distlora.config.file import load_config
from distlora.run_folder.layout import find_result, read_result
from distlora.run_folder.stages import earlier_stages, stage_rows
from distlora.training.model_card import model_card
from distlora_launcher.cli.main import main
from distlora_launcher.launch.stage import begin_stage
from distlora_launcher.report.run_page import write_final_report
from support.closeness import adapter_of, assert_same_run
from support.runs import SINGLE, run_until
from support.small_models import make_run, read_metrics

TRAIN = {"save_every": 2, "eval_every": 3, "log_every": 1, "keep": 9, "global_batch": 6, "micro_batch": 6}
OPTIM = {"lr": 2e-3, "schedule": "constant", "warmup_steps": 2}


@pytest.fixture(scope="module")
def ended(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has done its 6 steps."""
    run_dir = tmp_path_factory.mktemp("ended") / "run"
    make_run(run_dir, folders, train=TRAIN | {"max_steps": 6}, optim=OPTIM)
    run_until(SINGLE, run_dir=run_dir, stop_before=None)
    return run_dir


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """Return a copy of that run."""
    return Path(shutil.copytree(ended, tmp_path / "run"))


def test_an_extended_run_is_the_longer_one_bit_for_bit(folders: Path, tmp_path: Path, run: Path, ended: Path) -> None:
    make_run(tmp_path / "whole", folders, train=TRAIN | {"max_steps": 9}, optim=OPTIM)
    run_until(SINGLE, run_dir=tmp_path / "whole", stop_before=None)
    for _ in range(2):  # Of the same command, as it is typed on each node, the second changes nothing.
        begin_stage(run, ["train.max_steps=9"])
    run_until(SINGLE, run_dir=run, stop_before=None)
    assert_same_run(run, tmp_path / "whole")
    kept = run / "stages" / "step_00000006"
    assert {path.name for path in kept.iterdir()} == {"config.yaml", "adapter", "summary.json"}
    first, result = adapter_of(kept), adapter_of(ended)
    assert all(first[name].equal(result[name]) for name in result), "the result of the first stage"


def test_each_stage_is_recorded_in_the_run_the_card_and_the_report(run: Path) -> None:
    begin_stage(run, ["train.max_steps=8", "optim.lr=1e-3"])
    begin_stage(run, ["optim.lr=5e-4"])  # No step was saved in between.
    run_until(SINGLE, run_dir=run, stop_before=None)
    begin_stage(run, ["train.max_steps=10", "train.save_every=1"])
    run_until(SINGLE, run_dir=run, stop_before=9)
    rates = {line["step"]: line["lr"] for line in read_metrics(run) if "lr" in line}
    assert [rates[step] for step in (6, 7, 8, 9)] == [2e-3, 5e-4, 5e-4, 5e-4]
    rows = [
        ("stage 1, from step 1", "optim.lr=0.002, train.max_steps=6, train.save_every=2"),
        ("stage 2, from step 7", "optim.lr=0.0005, train.max_steps=8, train.save_every=2"),
        ("stage 3, from step 9", "optim.lr=0.0005, train.max_steps=10, train.save_every=1"),
    ]
    assert stage_rows(load_config(run)) == rows
    assert [*earlier_stages(run)] == [6, 8]
    run_until(SINGLE, run_dir=run, stop_before=None)
    assert not [item for item in verify(run) if item.state not in ("ok", "note")], "checkpoints of every stage"
    card = model_card(read_result(run), repository="me/model", base=None, license_of_base={})
    write_final_report(run)
    page = (run / "report.html").read_text()
    for name, settings in rows:
        of_the_result = settings.partition(", train.save_every")[0]
        assert f"| {name} | {of_the_result} |" in card, "the card is published, and saves are a matter of the machine"
        assert name in page
        assert settings in page


def test_a_stage_ends_where_the_run_fell_back_to_an_older_checkpoint(run: Path) -> None:
    begin_stage(run, ["train.max_steps=8", "optim.lr=1e-3"])
    (run / "checkpoints" / "step_00000006" / "trainer.safetensors").unlink()
    run_until(SINGLE, run_dir=run, stop_before=None)
    rates = {line["step"]: line["lr"] for line in read_metrics(run) if "lr" in line}
    assert [rates[step] for step in (4, 5, 8)] == [2e-3, 1e-3, 1e-3]
    assert [name for name, _ in stage_rows(load_config(run))] == ["stage 1, from step 1", "stage 2, from step 5"]
    assert (run / "stages" / "unused_step_00000006" / "adapter").is_dir(), "the result of the first stage"


REFUSED = [
    (["adapter.r=4"], r"adapter\.r=4 cannot change in a run that has begun; what can: train\.max_steps"),
    (["train.global_batch=3"], "train.global_batch=3 cannot change"),
    (["optim.name=muon"], "optim.name=muon cannot change"),
    (["optim=adamw_8bit"], "optim=adamw_8bit is no setting of a run with one value; write for example"),
    (["train.max_steps=7,8"], "train.max_steps=7,8 is no setting of a run with one value"),
    (["train.max_stepz=7"], r"there is no setting train\.max_stepz .*max_steps"),
    (["train.max_steps=many"], "train.max_steps=.many. must be of type int"),
    (["optim.lr=1e-3"], r"has done 6 steps, and these settings end it at 6; set train\.max_steps"),
    (["train.max_steps=9", "optim.lr=null"], "optim.lr=null: the usual rate is found when a run begins"),
    (["train.max_steps=9", "train.fused_kernels=liger"], "fused_kernels=liger"),
    (["train.max_steps=9", "parallel.backend=zero3", "parallel.deepspeed_config=missing.json"], "/missing.json"),
    (["train.max_steps=4"], "has done 6 steps, and these settings end it at 4"),
    (["train.max_steps=9", "optim.warmup_steps=20"], "warmup_steps=20 is more than"),
    (
        ["train.max_steps=9", "train.early_stopping_patience=1", "train.early_stopping_threshold=99"],
        "was stopped early",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=str)
def test_what_may_not_change_is_refused_and_changes_nothing(ended: Path, words: list[str], message: str) -> None:
    before = (ended / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=message):
        begin_stage(ended, words)
    assert (ended / "config.yaml").read_bytes() == before
    assert find_result(ended) is not None
    assert not (ended / "stages").exists()


def test_a_sweep_and_a_second_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.yaml").write_text(json.dumps({}))
    for words in ([str(tmp_path), "train.max_steps=9"], ["one", "two"]):
        assert main(["resume", *words]) == 2
    errors = capsys.readouterr().err
    assert "holds several runs" in errors
    (tmp_path / "trials" / "0003").mkdir(parents=True)
    assert main(["resume", str(tmp_path / "trials" / "0003"), "train.max_steps=9"]) == 2
    assert "0003 is a trial of the sweep" in capsys.readouterr().err
    assert "takes exactly one run folder" in errors
