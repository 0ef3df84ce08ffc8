"""`distlora plan`: what it prints for models and GPUs that are not here, and what it refuses."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distlora.architecture.shapes import ARCHITECTURES
from distlora.config import Config
from distlora.planner import plan_of, report
from distlora.planner.machine import machine_of
from distlora.planner.model import built_in
from distlora_launcher.cli import main
from distlora_launcher.compose.compose import compose_config
from support.launcher_fakes import write_model
from support.plan_inputs import by_type

SEVENTY_ON_TWO = ["model=llama3_70b", "cluster.gpus_per_node=2", "gpu=rtx4090"]
GOLDEN = Path(__file__).parents[1] / "golden" / "plan"
PROMISED = {
    "llama3_70b_2_rtx4090": SEVENTY_ON_TWO,
    "llama3_405b_8_h100": ["model=llama3_405b", "cluster.gpus_per_node=8", "gpu=h100"],
}
"""The commands that were asked for, and the pages that they print."""
_FIGURE = re.compile(r"(\d[\d,]*\.?\d*)(%?)")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty working folder on a machine without GPUs, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.main(["plan", *words]) == 0
    return capsys.readouterr().out


def calculated(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(printed(capsys, *words, "--json"))
    return plan


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.main(["plan", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    return output.err


@pytest.mark.parametrize("name", PROMISED)
def test_the_pages_that_were_promised(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Compare pages word for word, and every figure within 1 % (or a point of a share).

    After an intended change: distlora plan ... > tests/golden/plan/NAME.txt, and docs/planning.md with it.
    """
    expected, found = (GOLDEN / f"{name}.txt").read_text(), printed(capsys, *PROMISED[name])
    assert words_of(found) == words_of(expected), f"distlora plan {' '.join(PROMISED[name])}"
    for (figure, unit), (other, _) in zip(figures_of(found), figures_of(expected), strict=True):
        assert figure == pytest.approx(other, rel=0.01, abs=1 if unit else 0.02), f"{figure}{unit}, not {other}{unit}"


def test_the_page_on_planning_shows_what_the_command_prints() -> None:
    page = (GOLDEN / "llama3_70b_2_rtx4090.txt").read_text()
    assert f"```text\n{page}```\n" in (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


def words_of(page: str) -> list[str]:
    """Return a page's words, without its figures, bars and line ends."""
    return _FIGURE.sub("0", re.sub(r"\|[ #.]*\|", "", page)).split()


def figures_of(page: str) -> list[tuple[float, str]]:
    """(figure, `%` or nothing) in order."""
    return [(float(figure.replace(",", "")), unit) for figure, unit in _FIGURE.findall(page)]


@functools.cache
def eight_h200() -> Config:
    return compose_config(["gpu=h200", "cluster.gpus_per_node=8"], may_lack_paths=True)


@pytest.mark.parametrize("name", by_type({id(own): name for name, own in reversed(ARCHITECTURES.items())}.values()))
def test_a_page_of_any_model_is_one_screen(name: str) -> None:
    config = eight_h200()
    plan = plan_of(config, built_in(name, ARCHITECTURES[name]), machine_of(config.gpu, config.cluster))
    lines = report.page(plan).splitlines()
    fits = "NO" if "/DeepSeek-V3" in name else "yes"
    assert any(line.startswith(f"fits        {fits}: ") for line in lines)
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_what_a_program_reads_is_what_a_person_does(capsys: pytest.CaptureFixture[str]) -> None:
    plan = calculated(capsys, *SEVENTY_ON_TWO)
    assert plan["model"]["parameters"] == 70_553_706_496
    assert plan["machine"]["gpu"] == "rtx4090"
    assert plan["device"]["total"] == sum(plan["device"]["by_kind"].values())
    assert plan["fits"] is (plan["device"]["total"] <= plan["machine"]["usable_bytes"])
    assert plan["settings"]["cluster"]["gpus_per_node"] == 2
    for part in ("host", "disk", "wire"):
        assert all(type(value) is int for value in plan[part].values()), part
    assert f"{plan['device']['total'] / 1e9:.2f}" in printed(capsys, *SEVENTY_ON_TWO)


def test_where_it_does_not_fit_the_page_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    plan = calculated(capsys, *SEVENTY_ON_TWO)
    assert plan["fits"] is False
    near = plan["nearest"]["same_result"]
    words = [f"{name}={str(value).lower()}" for name, value in near["settings"].items()]
    fitting = calculated(capsys, *SEVENTY_ON_TWO, *words)
    assert fitting["fits"] is True
    assert fitting["device"]["total"] == near["total"]
    assert f"would fit   set {words[0]}" in (page := printed(capsys, *SEVENTY_ON_TWO))
    assert page.count(words[-1]) == 1, "said once"
    whole = ("model=llama3_70b", "adapter=full", "quant=none", "cluster.gpus_per_node=8", "gpu=h100")
    assert "use 16 of these GPUs" in printed(capsys, *whole)


def test_what_is_chosen_is_said_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_8b", "gpu=rtx4090"]
    given, chosen = calculated(capsys, *words), calculated(capsys, *words, "plan=auto", "quant=auto")
    assert [each["optim.lr"] for each in given["chosen"]] == [1.5e-4], "the learning rate, by the model"
    assert chosen["settings"]["quant"]["method"] == "none", "16 bits fit"
    assert chosen["time"]["seconds"] < given["time"]["seconds"]
    page = " ".join(printed(capsys, *words, "plan=auto", "quant=auto").split())
    for change in chosen["chosen"]:
        why = change.pop("why")
        assert all(f"{name.removesuffix('.method')}=" in page for name in change)
        assert why.split(",")[0] in page
    larger = [each["what"].partition("=")[0] for each in chosen["larger"]]
    assert larger == ["train.micro_batch", "data.sequence_length", "adapter.r"], "another model would be derived"


def test_a_table_has_a_row_for_each_model_and_a_column_for_each_machine(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    words = ["--table", "--models", "llama3_8b,llama3_70b", "--gpus", "rtx4090,h100x16"]
    assert main.main(["plan", *words, "--plot", "memory.png"]) == 0
    output = capsys.readouterr()
    assert "tok/s: bf16" in output.out
    assert "no: " in output.out
    assert output.err == "drawn in memory.png\n"
    assert (place / "memory.png").read_bytes().startswith(b"\x89PNG")
    (plan,) = json.loads(printed(capsys, "--table", "--models", "llama3_8b", "--gpus", "h100x16", "--json"))
    assert (plan["model"]["name"], plan["gpus"]) == ("NousResearch/Meta-Llama-3.1-8B-Instruct", "h100x16")
    assert plan["machine"]["ranks"] == 16
    assert plan["settings"]["quant"]["method"] == "none", "chosen"


def test_a_run_scales_by_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3_70b", "gpu=h100", "cluster.gpus_per_node=8", "--scaling"]
    rows = [line.split("|")[1:-1] for line in printed(capsys, *words).splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1,024"]
    weak, strong = (json.loads(printed(capsys, *words, *more, "--json")) for more in ([], ["--strong", "--fabrics"]))
    assert {row["rows"] for row in strong} == {8}
    own = calculated(capsys, *words[:-1])["time"]
    of_eight = next(row for row in weak if row["ranks"] == 8)
    assert of_eight["seconds"] == own["seconds"]
    page = printed(capsys, *words[:-1], "--assumptions")
    assert all(sentence[:60] in page for sentence in own["assumptions"])


def test_a_plan_of_a_folder_is_of_what_lies_there(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    write_model(place / "model", shards=2)
    plan = calculated(capsys, "model.path=model", "adapter.r=2", "data.sequence_length=64")
    assert (plan["model"]["name"], plan["model"]["source"]) == ("model", "folder")
    assert plan["disk"]["base"] == sum(file.stat().st_size for file in (place / "model").glob("*.safetensors"))
    assert not (place / "runs").exists()


EIGHT = ("gpu=h100", "cluster.gpus_per_node=8")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ["no model is named", "model=llama3_8b", "qwen3_235b_a22b"]),
        (["llama3_8b"], ["'llama3_8b' is not a setting", "model=llama3_8b"]),
        (["model=llama3_8"], ["did you mean 'llama3_8b'?"]),
        (["model=llama3_8b", "gpu=rtx4900"], ["did you mean 'rtx4090'?"]),
        (["model=llama3_8b", *EIGHT, "parallel.resident_blocks=40"], ["more than the 32 blocks of this model"]),
        (["model=mixtral_8x7b", "train.mlp_tile=512"], ["train.mlp_tile=512", "leave it out"]),
        (["model=llama3_8b", "train.router_aux_loss=0.1"], ["balances routers, and llama has none"]),
        (["model=llama3_8b", "adapter.init=pissa", "adapter.r=5000"], ["q_proj, which has 4096", "adapter.r=4096"]),
        (["--table", "--gpus", "a10", "parallel=zero3", "parallel.offload_base=true"], ["no effect with one process"]),
        (["--table", "--models", "llama3_8b,"], ["--models: 'llama3_8b,' names nothing"]),
        (["--table", "--gpus", "h100x12"], ["12 GPUs do not fill whole nodes of 8; write h100x8 or h100x16"]),
        (["--table", "model=llama3_8b"], ["model=llama3_8b cannot be used with --table; write --models"]),
        (["--table", "cluster.nodes=2"], ["cluster.nodes=2 cannot be used with --table; write --gpus"]),
        (["model=llama3_8b", "--strong"], ["--strong belongs to --scaling"]),
        (["model=llama3_8b", "--scaling"], ["the scaling of CPU is unknown", "gpu=h100"]),
        (["--scaling", "--table"], ["--table and --scaling cannot be combined"]),
        (["model=openai/gpt-oss-20b"], ["for a model of the hub write model.path=openai/gpt-oss-20b"]),
        (["model=llama3_8b", "--plot", "nowhere/plan.png"], ["there is no folder nowhere; make it"]),
        (["model=llama3_8b", "--plot", "gpt2.png"], ["gpt2.png is a folder"]),
        (["model=llama3_8b", "--jsno"], ["--jsno", "did you mean '--json'?"]),
        (["model.path=gpt2"], ["the model has no nn.Linear that can have an adapter"]),
    ],
)
def test_what_cannot_be_planned_is_refused(
    capsys: pytest.CaptureFixture[str], place: Path, words: list[str], named: list[str]
) -> None:
    (place / "gpt2").mkdir()
    (place / "gpt2.png").mkdir()
    (place / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    message = refused(capsys, *words)
    for name in named:
        assert name in message, message


def test_a_plan_is_made_without_torch_and_in_a_moment(place: Path) -> None:
    code = (
        "import sys; from distlora_launcher.cli.main import main; "
        f"code = main(['plan', *{SEVENTY_ON_TWO}]); "
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'huggingface_hub', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(code)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
