"""conf/ and the command line become a Config: every file composes, defaults agree, wrong words are explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distlora.config import Config, DataConfig, ModelConfig, UserError, file
from distlora.config.cluster import ParallelConfig
from distlora.config.file import as_mapping
from distlora.config.plan import CHOSEN
from distlora_launcher.cli.main import main
from distlora_launcher.compose.compose import compose_config, compose_run, compose_sweep, expand_home
from launcher_fakes import every_nth

PATHS = ["model.path=/model", "data.path=/data.jsonl"]
CONF = Path(__file__).parent.parent / "conf"
# Files that say one name alone are held to their tables by tests/test_cards.py and tests/test_architectures.py.
NAMES_ALONE = [path for path in CONF.glob("*/*.yaml") if path.parent.name in ("model",)]
NAMES_ALONE = [path for path in NAMES_ALONE if path.stem not in ("auto", "h100", "local", "llama3_70b")]
OPTIONS = sorted(str(p.relative_to(CONF).with_suffix("")) for p in {*CONF.glob("*/*.yaml")} - {*NAMES_ALONE})
# Options that Config accepts only in company.
TOGETHER = {"adapter/full": ["quant=none"]}


def test_composed_defaults_equal_those_of_the_dataclasses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISTLORA_CACHE", raising=False)
    with initialize_config_module("distlora_launcher.conf", version_base="1.3"):
        composed = compose("config", overrides=PATHS)
        composed.data = OmegaConf.to_container(composed.data, resolve=True)
        composed.quant = OmegaConf.to_container(composed.quant, resolve=True)
        values = OmegaConf.to_container(composed)
    expected = as_mapping(Config(model=ModelConfig(path="/model"), data=DataConfig(path="/data.jsonl"), run_dir="-"))
    # What other launchers read is in their files of the group alone.
    expected["cluster"] = {name: expected["cluster"][name] for name in values["cluster"]}
    assert values == expected | {"run_dir": "runs/${now:%Y-%m-%d_%H-%M-%S}-${name}"}


@pytest.mark.parametrize("option", every_nth(OPTIONS, 2))
def test_every_file_of_conf_composes(option: str):
    group, name = option.split("/")
    config = compose_config([*PATHS, f"{group}={name}", *TOGETHER.get(option, [])])
    assert isinstance(config, Config)


@pytest.mark.parametrize("name", ["fsdp2", "hsdp", "zero3"])
def test_every_option_of_parallel_has_all_of_its_settings(name: str):
    """So that what an option cannot do is refused by what the setting means, not as a word that nobody knows."""
    with initialize_config_module("distlora_launcher.conf", version_base="1.3"):
        parallel = compose("config", overrides=[*PATHS, f"parallel={name}"]).parallel
    assert set(parallel) == {field.name for field in dataclasses.fields(ParallelConfig)}
    if name == "hsdp":
        with pytest.raises(UserError, match=r"parallel.offload_base=true is DeepSpeed's: .* add parallel=zero3"):
            compose_config([*PATHS, "parallel=hsdp", "parallel.offload_base=true"])


def test_overrides_reach_the_config():
    overrides = ["adapter.r=8", "optim.lr=1", "optim.betas=[0.8,0.95]", "train.max_steps=3", "name=trial"]
    config = compose_config([*PATHS, *overrides, "run_dir=x-${name}"])
    assert (config.adapter.r, config.optim.lr, config.optim.betas, config.train.max_steps) == (8, 1.0, (0.8, 0.95), 3)
    assert config.run_dir == str(Path("x-trial").absolute())


def test_recipe_sets_several_groups_and_overrides_win():
    config = compose_config([*PATHS, "recipe=qlora", "adapter.r=4"])
    assert (config.adapter.target_modules, config.adapter.r, config.quant.method) == ("all-linear", 4, "nf4")


def test_paths_become_absolute():
    config = compose_config(["model.path=model", "data.path='~/data.jsonl'"])
    assert config.model.path == str(Path("model").absolute())
    assert config.data.path == str(Path.home() / "data.jsonl")


def test_home_is_expanded_as_a_shell_would():
    assert expand_home("data.path=~/data.jsonl") == f"data.path={Path.home()}/data.jsonl"
    assert expand_home("data.path=~user/x") == "data.path=~user/x"
    assert expand_home("~adapter.r") == "~adapter.r"


def test_hydras_run_dir_is_the_run_folder():
    assert compose_config([*PATHS, "hydra.run.dir=elsewhere"]).run_dir == str(Path("elsewhere").absolute())


@pytest.mark.parametrize(
    ("words", "fixed"),
    [
        (["train.micro_batch=2", "optim.lr=1e-4"], {"train.micro_batch"}),
        (["parallel=hsdp"], {"parallel.backend", "parallel.shard_degree"}),
        (["quant=auto", "train=default", "plan=auto"], {"quant.method"}),
        (["recipe=guanaco_70b"], {"quant.method", "train.micro_batch"}),
        ([], set()),
    ],
    ids=["words", "an option", "options", "a recipe on another", "none"],
)
def test_what_the_command_line_and_recipes_say_is_fixed_and_nothing_else(words: list[str], fixed: set[str]):
    assert compose_run([*PATHS, "plan=auto", *words]).fixed == fixed
    assert compose_run([*PATHS, *words, "plan=given"]).fixed == set(CHOSEN)


def test_sweep_has_one_config_for_each_combination():
    configs = [run.config for run in compose_sweep([*PATHS, "train.seed=0,1", "adapter.r=4,8"])]
    assert [(config.train.seed, config.adapter.r) for config in configs] == [(0, 4), (0, 8), (1, 4), (1, 8)]


def test_own_groups_come_from_config_dir(tmp_path: Path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nadapter:\n  r: 3\n")
    assert compose_config([*PATHS, "recipe=mine"], config_dir=str(tmp_path)).adapter.r == 3


MISTYPED = [
    ("adapter.rr=8", "did you mean 'adapter.r'?"),
    ("trian.seed=1", "did you mean 'train.seed'?"),
    ("adapter=fulll", "did you mean 'full'?"),
    ("adaptr=lora", "did you mean 'adapter'?"),
    ("lr=1e-4", "did you mean 'optim.lr'?"),
    ("alpha=3", "did you mean 'adapter.lora_alpha'?"),
    ("++adapter.rr=8", "did you mean 'r'?"),
    ("+seed=8", "there is no setting seed"),
    ("~adapter.rr", "did you mean 'adapter.r'?"),
    ("hydra.run.dirr=x", "did you mean 'hydra.run.dir'?"),
    ("model=/models/Llama", "write model.path=/models/Llama"),
    ("train.seed=0,1", "add -m"),
    ("train.seed", "setting=value"),
    ("=3", "names no setting"),
    ("+@A=", "names no setting"),
    ("data.path=a=b", "must be quoted"),
    ("data.path=", "data.path is empty"),
    ("name=${nothing}", "'nothing' not found"),
    ("adapter.r=0", "set adapter.r=1 or more"),
    ("adapter.r=-3", "set adapter.r=1 or more"),
    ("adapter.r=eight", "must be of type int"),
    ("adapter=full", "add quant=none"),
    ("recipe=null", "~recipe"),
    ("train.dtype=bf61", "did you mean 'bf16'?"),
    ("train.learning_rate=1e-4", "did you mean 'optim.lr'?"),
    ("+train.learning_rate=1e-4", "did you mean 'optim.lr'?"),
    ("learning_rate=1e-4", "did you mean 'optim.lr'?"),
    ("lora_r=8", "did you mean 'adapter.r'?"),
    ("lora_alpha=8", "did you mean 'adapter.lora_alpha'?"),
    (
        "train.batch_size=8",
        "write train.micro_batch (rows a rank runs at once) or train.global_batch (rows a step)",
    ),
    ("gradient_accumulation_steps=8", "did you mean 'train.global_batch'?"),
    ("train.save_steps=8", "did you mean 'train.save_every'?"),
    ("train.num_train_epochs=8", "did you mean 'train.epochs'?"),
    ("data.val_size=0.1", "did you mean 'data.eval_fraction'?"),
    ("train.resume=true", "write `distlora resume RUN`"),
    ("data.packing=true", "documents are always packed"),
    ("quant.bits=4", "write quant=nf4 (4 bits) or quant=none"),
    ("use_dora=true", "did you mean 'adapter.use_dora'?"),
    ("cutoff_len=2048", "did you mean 'data.sequence_length'?"),
    ("train.epochs=0.5", "write a whole number, such as 1, or set train.max_steps for part of an epoch"),
    ("optim.lr=high", "must be of type float; write a number, such as 0.1"),
    ("data.sources=[chats.jsonl]", "write data.sources=[{path: chats.jsonl}]"),
    ("name=5", "must be of type str; write name='\"5\"'"),
    ("train.load_best_at_end=3", "must be of type bool; write true or false"),
    ("data.sources=chats.jsonl", "write data.sources=[{path: chats.jsonl}]"),
]


@pytest.mark.parametrize(("override", "expected"), every_nth(MISTYPED, 4))
def test_a_wrong_word_is_named_with_what_to_type(override: str, expected: str):
    with pytest.raises(UserError) as raised:
        compose_config([*PATHS, override])
    assert expected in str(raised.value)


def test_what_stands_for_a_setting_of_another_trainer_exists():
    values = as_mapping(Config(model=ModelConfig(path="/model"), data=DataConfig(path="/data.jsonl"), run_dir="-"))
    for setting in file._SETTINGS:
        section, name = setting.split(".")
        assert name in values[section]


def test_a_setting_without_effect_is_refused():
    with pytest.raises(UserError, match=r"adapter\.r has no effect with adapter=full"):
        compose_config([*PATHS, "adapter=full", "quant=none", "adapter.r=8"])


_KEYS = st.sampled_from(
    [
        "adapter",
        "adapter.r",
        "train.seed",
        "quant",
        "name",
        "run_dir",
        "recipe",
        "hydra",
        "hydra.run.dir",
        "optim.lr",
        "x/y",
    ]
)
_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
_OVERRIDES = st.one_of(
    _TEXT,
    st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["", "+", "++", "~"]),
        st.one_of(_KEYS, _TEXT),
        st.sampled_from(["=", ""]),
        _TEXT,
    ),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(_OVERRIDES, max_size=2))
def test_random_overrides_compose_or_are_explained(overrides: list[str]):
    assert main(["train", "--cfg", "job", "--", *overrides]) in (0, 2)


def test_one_variable_moves_all_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISTLORA_CACHE", "/fast")
    assert compose_config(PATHS).data.cache_dir == "/fast/data"


def test_settings_that_a_recipe_completes_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "recipe").mkdir()
    recipe = "# @package _global_\nmodel:\n  path: org/model\ndata:\n  sources: [{path: a.json}, {path: b.txt}]\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(recipe)
    assert main(["train", "--config-dir", str(tmp_path), "recipe=mine", "--cfg", "job"]) == 0
    assert "path: a.json" in capsys.readouterr().out
