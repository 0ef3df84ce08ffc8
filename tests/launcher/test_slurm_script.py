"""Runs as jobs of SLURM: the script that is written, what is checked before, and what is refused with which advice.

SLURM's commands are stand-ins here (`fake_slurm.py`); `test_slurm_cluster.py` submits to a real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.config import Config, UserError
from distlora.config.file import build
from distlora_launcher.cli.main import main
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.importing.settings_file import with_file
from distlora_launcher.jobs import submit
from distlora_launcher.jobs.script import mounts, render, render_workers
from distlora_launcher.launch import local
from support.fake_slurm import FakeSlurm, job_record
from support.launcher_fakes import write_data, write_model

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm"
EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder with a model and data, whose preparation takes no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(local, "prepare", lambda run_dir, **_: 0)
    monkeypatch.setattr(submit, "prepare", lambda run_dir: 0)
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    return tmp_path


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def train(*words: str) -> int:
    settings = ["model.path=model", "data.path=data.jsonl", "data.sequence_length=64", "cluster=slurm"]
    return main(["train", *settings, *words])


def run_config(run_dir: str, **cluster: Any) -> Config:
    values = {
        "model": {"path": "/models/Llama-3.2-1B"},
        "data": {"path": "/data/chats.jsonl", "cache_dir": "/cache/data"},
        "quant": {"cache_dir": "/cache/quantized"},
        "cluster": {"launcher": "slurm", **cluster},
        "run_dir": run_dir,
    }
    return build(Config, values)


def golden_scripts() -> dict[Path, str]:
    """Return the scripts that tests/golden/slurm/ and examples/slurm/ hold, by file."""
    everything = run_config(
        "/runs/70b at 2e-4, 100%",
        nodes=4,
        gpus_per_node=8,
        partition="gpu,preempt",
        account="llm",
        qos="high",
        time_limit="1-12:00:00",
        signal_seconds=300,
        cpus_per_task=64,
        memory="0",
        sbatch=["--exclusive", "--constraint=h100"],
        setup=["module load cuda", "ulimit -l unlimited"],
        container="nvcr.io#nvidia/pytorch:26.07-py3",
        container_mounts=["/scratch:/scratch"],
        environment={"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's two words"},
        port=29500,
    )
    of_all: dict[str, Any] = {
        "gpus_per_node": 2,
        "max_parallel": 2,
        "setup": ["source .venv/bin/activate"],
        "port": 29500,
    }
    tasks = [run_config(f"/runs/sweep/{number}", **of_all) for number in (0, 1, 2, 3, 7)]
    whole = run_config("/runs/sweep", **of_all)

    def workers_of(config: Config, workers: int) -> str:
        worker = ["distlora_launcher.studies.worker", "/runs/sweep"]
        options: dict[str, Any] = {"gpus": True, "trials": "trials/*", "mounts": mounts([config])}
        folder, cluster = Path(config.run_dir), config.cluster
        return render_workers(folder, config.name, cluster, workers=workers, worker=worker, **options)

    scripts = {
        "sweep": workers_of(whole, 4),
        "sweep_container": workers_of(everything, 2),
        "simple": render(run_config("/runs/one", requeue=False), gpus=False),
        "container": render(everything, gpus=True),
        "array": render(whole, gpus=True, tasks=tasks),
    }
    example = compose_config(with_file([str(EXAMPLE / "run.yaml")], "distlora train"))
    files = {GOLDEN / f"{name}.sbatch": script for name, script in scripts.items()}
    return {**files, EXAMPLE / "job.sbatch": render(example, gpus=True)}


def test_scripts_are_the_golden_ones_and_shells_take_them(monkeypatch: pytest.MonkeyPatch):
    """`PYTHONPATH=tests python tests/launcher/test_slurm_script.py` writes them again, for a change that is meant."""
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "executable", "/opt/distlora/bin/python")
    for path, script in golden_scripts().items():
        assert script == path.read_text(), path
        assert all(len(line) <= 120 for line in script.splitlines() if line.startswith("#")), path
        subprocess.run(["bash", "-n", path], check=True)
        if SHELLCHECK.exists():
            # The function goes to the machines as text, and what it sources is the user's.
            checked = subprocess.run([SHELLCHECK, "--exclude=SC2329,SC1091", path], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout


def test_a_run_is_made_and_prepared_then_its_script_submitted(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    """More GPUs than this machine has are nothing to refuse: the run is not to be here."""
    assert train("cluster.nodes=2", "cluster.gpus_per_node=8", "run_dir=runs/one") == 0
    run_dir = place / "runs" / "one"
    script = (run_dir / "job.sbatch").read_text()
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["cluster"]["nodes"] == 2
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert slurm.judged == script
    assert slurm.asked[-1] == f"sbatch --parsable {run_dir / 'job.sbatch'}"
    record = json.loads((run_dir / "slurm.json").read_text())
    assert (record["job_id"], record["command"][0]) == ("41", "sbatch")
    assert (run_dir / "logs").is_dir()  # SLURM writes a job's output there, and makes no folder for it.
    said = capsys.readouterr().out
    assert "submitted runs/one as SLURM job 41" in said
    assert "distlora status runs/one" in said
    assert "distlora cancel runs/one" in said


def test_a_dry_run_prints_the_script_and_makes_nothing(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    before = sorted(place.rglob("*"))
    slurm.answers("sinfo", "cpu* (null)")
    assert train("--dry-run", "run_dir=runs/one", "cluster.environment={NCCL_DEBUG: INFO}") == 0
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash\n")
    assert "gpus-per-node" not in script, "the partition has none"
    assert "    export NCCL_DEBUG=INFO\n" in script
    made = {path for path in place.rglob("*") if path not in before and not path.is_relative_to(slurm.folder)}
    assert made == set()
    slurm.refuses("sbatch", "sbatch: fatal: Could not establish a configuration source")
    assert train("--dry-run", "run_dir=runs/one", "cluster.environment={NCCL_DEBUG: INFO}") == 2
    printed = capsys.readouterr()
    assert printed.out == script, "whatever SLURM says of it"
    assert "this node's sbatch has no cluster" in printed.err
    assert main(["train", "model.path=model", "data.path=data.jsonl", "data.sequence_length=64", "--dry-run"]) == 2
    assert "cluster=local submits nothing; add cluster=slurm" in capsys.readouterr().err


def test_without_slurm_the_script_is_written_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", str(place / "nothing"))
    assert train("run_dir=runs/one") == 2
    message = capsys.readouterr().err
    assert "sbatch is not installed on this node" in message
    assert "`sbatch runs/one/job.sbatch`" in message
    assert (place / "runs/one/job.sbatch").read_text().startswith("#!/bin/bash\n")
    assert not (place / "runs/one/slurm.json").exists()


def test_a_sweep_is_one_array_of_runs_that_are_all_prepared(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    assert train("-m", "train.seed=0,1", "cluster.max_parallel=2", "run_dir=runs/sweep") == 0
    sweep = place / "runs" / "sweep"
    script = (sweep / "job.sbatch").read_text()
    assert "#SBATCH --array=0-1%2\n" in script
    assert f"#SBATCH --output={sweep}/%a/logs/slurm_%A_%a.log\n" in script
    assert f"export RUN={sweep}/$SLURM_ARRAY_TASK_ID\n" in script
    assert [line for line in slurm.asked if line.startswith("sbatch")] == [
        "sbatch --test-only",
        f"sbatch --parsable {sweep / 'job.sbatch'}",
    ]
    for number in range(2):
        run = sweep / str(number)
        assert yaml.safe_load((run / "config.yaml").read_text())["train"]["seed"] == number
        assert json.loads((run / "slurm.json").read_text())["job_id"] == f"41_{number}"
        assert (run / "logs").is_dir()
    assert json.loads((sweep / "slurm.json").read_text())["job_id"] == "41"
    assert "submitted 2 runs in runs/sweep as SLURM job array 41" in capsys.readouterr().out


@pytest.mark.parametrize("fails_at", [0, 1])
def test_an_array_that_is_interrupted_leaves_no_run(
    place: Path,
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails_at: int,
):
    prepare = local.prepare

    def fail(run_dir: Path, **options: Any) -> int:
        if run_dir.name == str(fails_at):
            raise OSError("No space left on device")
        return prepare(run_dir, **options)

    monkeypatch.setattr(local, "prepare", fail)
    with pytest.raises(OSError, match="No space left"):
        train("-m", "train.seed=0,1", "run_dir=runs/sweep")
    assert not (place / "runs" / "sweep").exists()
    assert ("not every run could be prepared" in capsys.readouterr().err) == (fails_at > 0)
    monkeypatch.setattr(local, "prepare", prepare)
    assert train("-m", "train.seed=0,1", "run_dir=runs/sweep") == 0


REFUSED: list[tuple[str | None, list[str], str]] = [
    # (what SLURM says of the job, words behind `distlora train`, what the message says)
    ("sbatch: error: invalid partition specified: gpus", [], "the partitions are gpu, cpu; set cluster.partition"),
    ("sbatch: error: Batch job submission failed: Invalid qos specification", [], "set cluster.qos"),
    ("allocation failure: Requested node configuration is not available", [], "cluster.gpus_per_node"),
    ("allocation failure: Something new", [], "SLURM refuses the job: Something new; change the settings"),
    (None, ["-m", "cluster.nodes=1,2"], "cluster.nodes is 1 and 2 in this sweep"),
    (None, ["cluster.max_parallel=2"], "for the jobs of a sweep; add -m"),
    (None, ["cluster.time_limit=0:03:00"], "set a longer cluster.time_limit"),
    (None, ["cluster.time_limit=43200"], "must be of type str; write it in quotes, '12:00:00', since YAML reads"),
    (None, ['cluster.sbatch=["--nodes=4"]'], "written from cluster.nodes"),
    (None, ['cluster.setup=["source it\'s/activate"]'], "is not valid bash (line"),
    (None, ['cluster.sbatch=["--output=here"]'], "the script must set itself"),
    (None, ["cluster.environment={a-b: c}"], "not a valid name of an environment variable"),
    (None, ["cluster=local", "cluster.partition=gpu"], "cluster.partition is a setting of cluster=slurm; add that"),
    (None, ["cluster.environment={WANDB_API_KEY: s3cret}"], "run `export WANDB_API_KEY=...` before the command"),
    (None, ["cluster.environment={DATABASE_PASSWD: s3cret}"], "DATABASE_PASSWD is a credential by its name or value"),
    (None, ['cluster.environment={https_proxy: "http://me:s3cret@proxy:80"}'], "https_proxy is a credential by its"),
]


@pytest.mark.parametrize(("said", "words", "reason"), REFUSED)
def test_what_slurm_cannot_have_or_refuses_is_said_before_anything_is_made(
    said: str | None, words: list[str], reason: str, place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    slurm.answers("sinfo", "gpu\ncpu\ncpu")
    if said is not None:
        slurm.refuses("sbatch", said)
    assert train(*words, "run_dir=runs/one") == 2
    shown = "".join(capsys.readouterr())
    assert reason in shown
    assert "s3cret" not in shown
    assert not (place / "runs").exists()


def test_variables_that_only_sound_like_credentials_are_taken():
    variables = {"NCCL_IB_PKEY": "1", "TOKENIZERS_PARALLELISM": "false", "HF_TOKEN_PATH": "/home/me/token"}
    assert run_config("/runs/one", environment=variables).cluster.environment == variables


def test_a_line_break_in_a_name_cannot_add_an_option():
    config = run_config("/runs/one", partition="gpu\n#SBATCH --uid=0")
    with pytest.raises(UserError, match="line break"):
        render(config, gpus=True)


def test_resume_submits_again_unless_the_job_waits_or_runs(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    assert train("run_dir=runs/one") == 0
    run_dir = place / "runs" / "one"
    slurm.has_job("41", "PENDING", reason="Priority")
    capsys.readouterr()
    assert main(["resume", "runs/one"]) == 2
    assert "is SLURM job 41, which is pending" in capsys.readouterr().err
    slurm.has_job("41", "FAILED", exit_code="75:0")
    slurm.answers("sbatch", "42")
    assert main(["resume", "runs/one"]) == 0
    assert json.loads((run_dir / "slurm.json").read_text())["job_id"] == "42"
    slurm.forgets()
    with (run_dir / "job.sbatch").open("a") as file:
        file.write("# by hand\n")
    assert main(["resume", "runs/one"]) == 0
    assert "was changed by hand and is submitted as it is" in capsys.readouterr().out
    assert (run_dir / "job.sbatch").read_text().endswith("# by hand\n")


def test_a_job_of_the_same_number_on_another_cluster_is_not_the_runs(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    assert train("run_dir=runs/one") == 0
    slurm.has_job("41", "RUNNING", script="/home/another/a b/job.sbatch")
    assert main(["cancel", "runs/one"]) == 2
    capsys.readouterr()
    assert main(["status", "runs/one", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["job"] is None
    slurm.has_job("41", "RUNNING", script=str(place / "runs" / "one" / "job.sbatch"))
    assert main(["resume", "runs/one"]) == 2
    assert "is SLURM job 41, which is running" in capsys.readouterr().err
    slurm.has_job("41", "RUNNING", script="/home/another/a b/job.sbatch")
    assert main(["resume", "runs/one"]) == 0


def test_defaults_of_sbatch_in_the_environment_do_not_win_over_the_settings(
    place: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    for name in ("TIMELIMIT", "NO_REQUEUE", "OUTPUT", "GPUS", "PARTITION", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "mine")
    slurm.does("sbatch", "env | grep -o '^SBATCH_[A-Z]*' | sort | xargs >> variables; echo 41")
    assert train("run_dir=runs/one", "cluster.time_limit=1:00:00", "cluster.partition=gpu") == 0
    # Asked, and then submitted; what the settings say nothing of remains the person's.
    assert (slurm.folder / "variables").read_text() == "SBATCH_ACCOUNT\nSBATCH_ACCOUNT\n"


@pytest.mark.parametrize(
    ("option", "asks"),
    [
        ("--gres=nvme:1", True),
        ("--tres-per-task=license/x:1", True),
        ("--gres=gpu:h100:8", False),
        ("--tres-per-node=gres/gpu:8", False),
        ("-G8", False),
    ],
)
def test_gpus_are_asked_for_unless_the_user_does(option: str, asks: bool):
    script = render(run_config("/runs/one", gpus_per_node=8, sbatch=[option]), gpus=True)
    assert ("#SBATCH --gpus-per-node=8\n" in script) is asks


def test_resume_submits_one_run_of_a_sweep_or_all_that_are_not_done(
    place: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    sweep = place / "runs" / "sweep"
    assert train("-m", "train.seed=0,1,2,3", "cluster.max_parallel=2", f"run_dir={sweep}") == 0
    slurm.has_jobs(job_record("41_0", "RUNNING"), job_record("41_1-3%2", "PENDING"))
    capsys.readouterr()
    assert main(["resume", "runs/sweep/1"]) == 2
    assert "is SLURM job 41_1, which is pending" in capsys.readouterr().err
    (sweep / "1" / "adapter").mkdir()
    slurm.has_jobs(job_record("41_0", "RUNNING"), *(job_record(f"41_{task}", "TIMEOUT") for task in (1, 2, 3)))
    slurm.answers("sbatch", "57")
    assert main(["resume", "runs/sweep"]) == 0
    assert "#SBATCH --array=2-3%2\n" in (sweep / "job.sbatch").read_text()
    ids = [json.loads((sweep / str(number) / "slurm.json").read_text())["job_id"] for number in range(4)]
    assert ids == ["41_0", "41_1", "57_2", "57_3"]
    slurm.has_jobs(job_record("57_2-3", "PENDING"), job_record("41_0", "RUNNING"))
    capsys.readouterr()
    assert main(["resume", "runs/sweep"]) == 0
    assert capsys.readouterr().out == "runs/sweep waits or runs; `distlora status` shows its runs\n"

    slurm.has_jobs(*(job_record(f"57_{task}", "TIMEOUT") for task in (2, 3)), job_record("41_0", "TIMEOUT"))
    script = (sweep / "job.sbatch").read_text().replace("--array=2-3%2", "--array=2-3%1")
    (sweep / "job.sbatch").write_text(script)
    assert main(["resume", "runs/sweep"]) == 0
    assert (sweep / "job.sbatch").read_text() == script, "changed by hand, and submitted as it is"
    assert slurm.asked[-1] == f"sbatch --parsable --array=0,2-3%1 {sweep / 'job.sbatch'}"
    slurm.has_jobs(*(job_record(f"57_{task}", "TIMEOUT") for task in (0, 2, 3)))
    assert main(["resume", "runs/sweep/2"]) == 0
    assert "--array" not in (sweep / "2" / "job.sbatch").read_text()


if __name__ == "__main__":
    import os

    os.chdir("/")
    sys.executable = "/opt/distlora/bin/python"
    GOLDEN.mkdir(exist_ok=True)
    for path, script in golden_scripts().items():
        path.write_text(script)
