"""One file to run: distlora's settings, an Axolotl file, files of other tools; and the command line over them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from distlora.config import AdapterConfig, Config, DataConfig, ModelConfig, QuantConfig, TrackerConfig, UserError
from distlora.config.file import as_mapping
from distlora_launcher.cli.init import FIRST, PLACES, starter_text
from distlora_launcher.cli.main import main
from distlora_launcher.cli.plan import plan_run
from distlora_launcher.compose.compose import compose_config, compose_sweep, expand_sweep
from distlora_launcher.compose.overrides import known_models
from distlora_launcher.importing.settings_file import with_file
from distlora_launcher.studies.start import parse_sweep
from support.damage import YAML_TRICKS
from support.launcher_fakes import write_model

OWN = """
recipe: tool_calls
model: qwen25_14b
data: {path: chats.jsonl}
optim: {lr: 3e-4}
adapter:
  r: 8
  rank_pattern: {down_proj: 32, "layers.(0|1).*q_proj": 4}
train: {sample_every: 5, sample_prompts: ["it's, a: test", 'x\\']}
quant.cache: false
cluster: {launcher: slurm, partition: gpu, environment: {NCCL_SOCKET_IFNAME: ib0}}
run_dir: runs/${name}
"""
AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
datasets: [{path: data/chats.jsonl, type: chat_template}]
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
sequence_len: 2048
sample_packing: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
learning_rate: 0.0002
warmup_ratio: 0.1
val_set_size: 0.1
eval_steps: 20
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(text: str, *overrides: str) -> Config:
    Path("mine.yaml").write_text(text)
    return compose_config(with_file(["mine.yaml", *overrides], "distlora train"))


def test_a_file_of_settings_composes_with_its_recipe_and_options(place: Path):
    config = composed(OWN)
    assert (config.model.path, config.data.path) == ("Qwen/Qwen2.5-14B-Instruct", str(place / "chats.jsonl"))
    assert (config.optim.lr, config.data.sequence_length, config.quant.cache) == (3e-4, 8192, False)
    assert (config.adapter.r, config.adapter.target_modules) == (8, "all-linear")
    assert config.adapter.rank_pattern == {"down_proj": 32, "layers.(0|1).*q_proj": 4}
    assert config.train.sample_prompts == ("it's, a: test", "x\\")
    assert (config.cluster.launcher, config.cluster.partition) == ("slurm", "gpu")
    assert config.run_dir == str(place / "runs" / "distlora")


@pytest.mark.usefixtures("place")
def test_the_command_line_wins_over_the_file():
    config = composed(OWN, "optim.lr=1e-5", "model=llama3_8b", "cluster=local", "name=other")
    assert (config.optim.lr, config.model.path) == (1e-5, known_models()["llama3_8b"])
    assert (config.cluster.launcher, config.run_dir) == ("local", str(Path("runs/other").absolute()))
    assert composed("model: {path: a/b}\ndata: {path: c.jsonl}\n", "model=llama3_8b").model.path != "a/b"
    # A recipe on the command line, over what the file has for the same settings; the rest of the file stays.
    config = composed("model: {path: a/b}\ndata: {path: c.jsonl}\nadapter: {r: 8, lora_dropout: 0.1}\n", "recipe=qlora")
    assert (config.adapter.r, config.adapter.lora_dropout) == (16, 0.1)
    # A revision belongs to its model.
    text = "model: {path: a/b, revision: abc, special_tokens.eos_token: x}\ndata: {path: c.jsonl, columns.prompt: q}\n"
    model = composed(text, "model.path=org/name").model
    assert (model.path, model.revision, model.special_tokens) == ("org/name", None, {"eos_token": "x"})
    assert composed(text, "data.split=test").data.columns == {"prompt": "q"}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ("optim: {warmup_ratio: 0.1}", "optim.warmup_steps=10"),
        ("optim: {warmup_steps: 5}", "recipe=dpo"),
        ("train: {saves_per_epoch: 1}", "train.save_every=100"),
        ("train: {evals_per_epoch: 1}", "train.eval_every=100"),
        ("data.sources: [{path: a.jsonl}]", "data.path=b.jsonl"),
    ],
)
def test_a_typed_setting_replaces_what_excludes_it_in_the_file(ours: str, word: str):
    name, _, value = word.partition("=")
    config = composed(f"model: {{path: a/b}}\ndata: {{eval_fraction: 0.1}}\n{ours}\n", word, "data.path=b.jsonl")
    assert name == "recipe" or str(config.value_of(name)).endswith(value)


def test_a_typed_option_wins_over_the_recipe(capsys: pytest.CaptureFixture[str]):
    words = ["recipe=tool_calls", "model=qwen25_14b", "data.path=x.jsonl"]
    assert compose_config(words).model.path == "Qwen/Qwen2.5-14B-Instruct"
    assert compose_config([*words, "model.path=org/name"]).model.path == "org/name"
    assert compose_config([words[0], words[2]]).model.path == "Qwen/Qwen2.5-7B-Instruct"
    jobs = expand_sweep([words[0], "model=qwen25_14b,qwen25_3b", words[2]])
    models = {run.config.model.path for run in compose_sweep(jobs, range(len(jobs)))}
    assert models == {"Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-3B-Instruct"}
    assert main(["train", *words, "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] == "Qwen/Qwen2.5-14B-Instruct"
    assert plan_run([*words, "gpu=h100"]).plan.config.model.path == "Qwen/Qwen2.5-14B-Instruct"


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_settings_of_a_run_are_a_file_to_run(method: str):
    tracker = TrackerConfig(tensorboard=method == "lora", mlflow=method == "full")
    adapter, quant = AdapterConfig(method=method), QuantConfig(method="nf4" if method == "lora" else "none")
    paths = {"model": ModelConfig(path="/model"), "data": DataConfig(path="/data.jsonl"), "run_dir": "/run"}
    config = Config(adapter=adapter, quant=quant, tracker=tracker, **paths)
    assert composed(yaml.safe_dump(as_mapping(config))) == config
    assert composed(yaml.safe_dump(as_mapping(config)), "tracker=none").tracker.names == ()


@pytest.mark.usefixtures("place")
def test_a_recipe_file_runs_by_its_path():
    text = "defaults:\n  - override /quant: none\n  - _self_\nmodel: {path: a/b}\ndata: {path: c.jsonl}\n"
    assert composed(text).quant.method == "none"


def test_an_axolotl_file_is_imported_for_the_gpus_of_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]):
    config = composed(AXOLOTL, "cluster.gpus_per_node=4")
    assert (config.model.path, config.data.path) == ("NousResearch/Llama-3.2-1B", str(place / "data/chats.jsonl"))
    assert (config.train.global_batch, config.train.micro_batch, config.cluster.gpus_per_node) == (16, 2, 4)
    assert (config.quant.method, config.adapter.lora_alpha, config.optim.lr) == ("nf4", 32.0, 2e-4)
    assert "mine.yaml (Axolotl), for 4 GPUs: " in capsys.readouterr().err
    assert composed(AXOLOTL, "optim.lr=1").optim.lr == 1
    own = AXOLOTL + "dp_shard_size: 8\n"
    config = composed(own, "cluster=slurm", "cluster.nodes=2", "run_dir=run", "optim.warmup_steps=9")
    assert (config.cluster.gpus_per_node, config.train.global_batch, config.optim.warmup_ratio) == (4, 32, None)
    with pytest.raises(
        UserError, match=r"cluster.nodes=3: mine.yaml is for 8 GPUs in all; add cluster.gpus_per_node=N"
    ):
        composed(own, "cluster=slurm", "cluster.nodes=3")


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {learning_rate: 1}", "mine.yaml: there is no setting optim.learning_rate (did you mean 'optim.lr'?)"),
        ("learning_rat: 1", "mine.yaml: there is no setting learning_rat (did you mean 'optim.lr'?)"),
        ("data: {pth: x}", "mine.yaml: there is no setting data.pth (did you mean 'data.path'?)"),
        ("optim: {lr: high}", "mine.yaml: optim.lr='high' must be of type float"),
        ("optim: {lr: '1e-4,2e-4'}", "distlora sweep FILE optim.lr=A,B"),
        ("optim: {lr: 1, lr: 2}", "found duplicate key lr"),
        ("optim: {lr: 1}\noptim.lr: 2", "mine.yaml: optim.lr is set twice"),
        ("- a", "mine.yaml holds no settings; `distlora init FILE`"),
        ("a: [", "mine.yaml is not YAML"),
        (YAML_TRICKS[0].decode(), "mine.yaml is not YAML (it holds more than 100,000 values, or one that holds itself"),
        ("data: &a {path: *a}", "or one that holds itself by an alias); correct it"),
        ("quant: 4bit", "is not an option of quant; 4 bits are NF4: write quant=nf4"),
        ("model: {_component_: torchtune.x}", "is a file of torchtune"),
        ("compute_environment: LOCAL_MACHINE", "is a file of Accelerate, which distlora does not read; it starts"),
        ("zero_optimization: {stage: 3}", "write parallel=zero3 parallel.deepspeed_config=mine.yaml"),
        ("model_name_or_path: a/b\ndataset_name: c\nlearning_rate: 1e-4", "is a file of TRL"),
        (
            "model: a/b\ntrain_dataset: data.yaml\ncutoff_len: 2048\nlora_rank: 8",
            "LLaMA-Factory V1, which distlora does not read; write its settings into a file of distlora's, which "
            "`distlora init FILE` starts. These of its keys have the same meaning here: "
            "data.sequence_length=2048 adapter.r=8",
        ),
        (AXOLOTL + "lora_rr: 3", "lora_rr: not a known key of Axolotl"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_with_what_to_write(text: str, expected: str):
    with pytest.raises(UserError) as raised:
        composed(text, "data.path=x.jsonl")
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("tracker.project", "in settings that are paths only"),
        ("name", "in settings that are paths only"),
        ("model.revision", "in settings that are paths only"),
        ("data.sources[0].label", "in settings that are paths only"),
        ("model.path", "not an absolute path"),
        ("run_dir", "not an absolute path"),
    ],
)
def test_a_credential_of_the_environment_gets_into_no_setting(
    place: Path, monkeypatch: pytest.MonkeyPatch, setting: str, reason: str
):
    monkeypatch.setenv("SECRET", "s3cr3t")
    section, _, name = setting.partition(".")
    value = "org/${oc.env:SECRET}"
    entry = {section: {name: value} if name else value}
    if "sources" in setting:
        entry = {"data": {"sources": [{"path": "documents.jsonl", "label": value}]}}
    with pytest.raises(UserError, match=rf"{re.escape(setting)} has \$\{{oc.env:SECRET\}}, and .* {reason}") as refused:
        composed(yaml.safe_dump({"model": {"path": "/base"}, "data": {"path": "documents.jsonl"}} | entry))
    assert "s3cr3t" not in str(refused.value)


def test_paths_may_name_folders_of_the_environment(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    text = "{model: {path: '${oc.env:SCRATCH}/base'}, data: {sources: [{path: '${oc.env:SCRATCH}/a.jsonl'}]}, "
    config = composed(text + "run_dir: '${oc.env:SCRATCH}/run', quant: {cache_dir: '${oc.env:ABSENT,/cache}'}}")
    assert (config.model.path, config.data.sources[0].path) == ("/scratch/me/base", "/scratch/me/a.jsonl")
    assert (config.run_dir, config.quant.cache_dir) == ("/scratch/me/run", "/cache")


def test_every_command_with_settings_reads_a_file(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "mine.yaml").write_text("model: {path: Qwen/Qwen3-0.6B}\ndata: {path: chats.jsonl}\nadapter: {r: 5}\n")
    assert main(["train", "mine.yaml", "--cfg", "job", "adapter.lora_alpha=7"]) == 0
    adapter = yaml.safe_load(capsys.readouterr().out)["adapter"]
    assert (adapter["r"], adapter["lora_alpha"]) == (5, 7)
    assert main(["plan", "mine.yaml", "gpu=h100"]) == 0
    assert "LoRA of rank 5" in capsys.readouterr().out
    sweep, first = parse_sweep(["mine.yaml", "optim.lr=1e-4,2e-4"])
    assert (first.config.adapter.r, first.config.optim.lr) == (5, 1e-4)
    assert "adapter.r=5" in sweep.overrides  # A trial does not need the file any more.
    assert main(["train", "mine.yaml", "sweep.trials=3"]) == 2
    assert "error: sweep.trials=3 is a setting of `distlora sweep`" in capsys.readouterr().err
    assert main(["train", "mine.yaml", "adapter.r=["]) == 2
    assert "mine.yaml" not in capsys.readouterr().err  # The file is not at fault.
    (place / "space.yaml").write_text((place / "mine.yaml").read_text() + "sweep: {space: {optim.lr: [1e-4, 2e-4]}}\n")
    assert parse_sweep(["space.yaml"])[0].space == sweep.space
    assert main(["train", "space.yaml"]) == 2
    assert " in the settings file is a setting of `distlora sweep`" in capsys.readouterr().err
    assert main(["data", "preview", "mine.yaml", "model.path=missing"]) == 2
    assert "missing" in capsys.readouterr().err


def test_a_file_of_init_starts_a_rank_search(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["init", "mine.yaml"]) == 0
    write_model(place / "model")
    paths = ["model.path=model", "data.path=data.jsonl", "data.eval_fraction=0.1", "run_dir=search"]
    search, _ = parse_sweep(["mine.yaml", "sweep=rank_search", *paths])
    assert not [word for word in search.overrides if "adapter.r=" in word], "the search tries ranks"
    typed, _ = parse_sweep(["mine.yaml", "sweep=rank_search", "adapter.r=8", *paths])
    assert "adapter.r=8" in typed.overrides, "refused by RankSearch"
    assert "adapter.r=16 of the settings file is not used" in capsys.readouterr().out


def test_init_writes_a_file_that_runs_and_overwrites_none(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["init", "mine.yaml"]) == 0
    text = (place / "mine.yaml").read_text()
    assert text == starter_text(Path("mine.yaml"))
    words = [f"{name}={value}" for name, value in PLACES.items()]
    own = compose_config(with_file(["mine.yaml", "run_dir=run"], "distlora train"))
    assert own == compose_config(["recipe=qlora", "run_dir=run", *words])
    lines = text.splitlines()
    for name in FIRST:
        row = next(row for row, line in enumerate(lines) if line.startswith(f"  {name.partition('.')[2]}: "))
        assert lines[row - 1].startswith("  # "), name  # Its meaning.
    capsys.readouterr()
    (place / "mine.yaml").write_text("mine")
    assert main(["init", "mine.yaml"]) == 2
    assert "mine.yaml exists, and is not changed" in capsys.readouterr().err
    assert (place / "mine.yaml").read_text() == "mine"
    assert main(["init"]) == 0
    assert sorted(os.listdir(place)) == ["distlora.yaml", "mine.yaml"]
