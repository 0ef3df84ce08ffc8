"""conf/ and the command line become a Config: every file composes, defaults agree, wrong words are explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from distlora.config import Config, DataConfig, ModelConfig, QuantConfig, UserError
from distlora.config.base import cache_root
from distlora.config.cluster import ParallelConfig
from distlora.config.field_docs import sections
from distlora.config.file import as_mapping
from distlora.config.plan import CHOSEN
from distlora.post.evaluate import Text
from distlora_launcher.cli.main import main
from distlora_launcher.compose.compose import compose_config, compose_run
from support.launcher_fakes import every_nth

PATHS = ["model.path=/model", "data.path=/data.jsonl"]
CONF = Path(__file__).parents[2] / "conf"
# Files that say one name alone are held to their table by tests/model/test_architectures.py.
NAMES_ALONE = [path for path in CONF.glob("*/*.yaml") if path.parent.name in ("model",)]
NAMES_ALONE = [path for path in NAMES_ALONE if path.stem not in ("auto", "h100", "local", "llama3_70b")]
OPTIONS = sorted(str(p.relative_to(CONF).with_suffix("")) for p in {*CONF.glob("*/*.yaml")} - {*NAMES_ALONE})
# Options that Config accepts only in company.
TOGETHER = {"adapter/full": ["quant=none"], "recipe/grpo": ["data.rewards=[exact_match]"]}


def test_composed_defaults_equal_those_of_the_dataclasses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISTLORA_CACHE", raising=False)
    with initialize_config_module("distlora_launcher.conf", version_base="1.3"):
        composed = compose("config", overrides=PATHS)
        composed.data = OmegaConf.to_container(composed.data, resolve=True)
        composed.quant = OmegaConf.to_container(composed.quant, resolve=True)
        values = OmegaConf.to_container(composed)
    expected = as_mapping(Config(model=ModelConfig(path="/model"), data=DataConfig(path="/data.jsonl"), run_dir="-"))
    # What other launchers and trackers read is in their files of the group alone.
    for group in ("cluster", "tracker"):
        expected[group] = {name: expected[group][name] for name in values[group]}
    assert values == expected | {"run_dir": "runs/${now:%Y-%m-%d_%H-%M-%S}-${name}"}


@pytest.mark.parametrize("option", every_nth(OPTIONS, 4))
def test_every_file_of_conf_composes(option: str):
    group, name = option.split("/")
    config = compose_config([*PATHS, f"{group}={name}", *TOGETHER.get(option, [])])
    assert isinstance(config, Config)


def test_every_option_of_parallel_has_all_settings_of_its_group():
    """An option refuses a setting by its meaning then, not as an unknown name."""
    with initialize_config_module("distlora_launcher.conf", version_base="1.3"):
        for name in ("hsdp", "zero3"):
            parallel = compose("config", overrides=[*PATHS, f"parallel={name}"]).parallel
            assert set(parallel) == {field.name for field in dataclasses.fields(ParallelConfig)}
    with pytest.raises(UserError, match=r"parallel.offload_base=true is DeepSpeed's: .* add parallel=zero3"):
        compose_config([*PATHS, "parallel=hsdp", "parallel.offload_base=true"])


@pytest.mark.parametrize(
    ("own", "xdg", "root"),
    [("/fast", "/xdg", "/fast"), ("", "/xdg", "/xdg/distlora"), ("", "", str(Path.home() / ".cache" / "distlora"))],
)
def test_every_cache_follows_the_environment(own: str, xdg: str, root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISTLORA_CACHE", own)  # An empty variable counts as unset.
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    expected = (f"{root}/data", f"{root}/quantized")
    config = compose_config([*PATHS, "quant=nf4"])
    assert (config.data.cache_dir, config.quant.cache_dir) == expected
    assert (Text(name="text").cache_dir, QuantConfig().cache_dir) == expected
    assert str(cache_root()) == root
    named = compose_config([*PATHS, "quant=nf4", "data.cache_dir=/rows", "quant.cache_dir=/shards"])
    assert (named.data.cache_dir, named.quant.cache_dir) == ("/rows", "/shards")


def test_overrides_win_over_a_recipe_and_paths_become_absolute():
    config = compose_config(["model.path=model", "data.path='~/data.jsonl'", "recipe=qlora", "adapter.r=4"])
    assert (config.adapter.target_modules, config.adapter.r, config.quant.method) == ("all-linear", 4, "nf4")
    assert config.model.path == str(Path("model").absolute())
    assert config.data.path == str(Path.home() / "data.jsonl")


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


MISTYPED = [
    ("adaptr=lora", "did you mean 'adapter'?"),
    ("alpha=3", "did you mean 'adapter.lora_alpha'?"),
    ("+seed=8", "there is no setting seed"),
    ("~adapter.rr", "did you mean 'adapter.r'?"),
    ("hydra.run.dirr=x", "did you mean 'hydra.run.dir'?"),
    ("model=/models/Llama", "write model.path=/models/Llama"),
    ("train.seed=0,1", "write distlora sweep ... train.seed=0,1; `distlora train -m` runs one job per value"),
    ("adapter.target_modules=q_proj,v_proj", "write adapter.target_modules=[q_proj,v_proj] for a list"),
    ("model=llama3", "did you mean 'llama3_1b', 'llama3_3b', 'llama3_8b', 'llama3_70b' or 'llama3_405b'?"),
    ("model=Llama-3.1-8B", "did you mean 'llama3_8b'?"),
    ("model=qwen2.5-7b", "did you mean 'qwen25_7b'?"),
    ("adapter=qlora", "write recipe=qlora"),
    ("quant=4bit", "write quant=nf4"),
    ("quant=int4", "write quant=nf4"),
    ("quant=bnb", "write quant=nf4"),
    ("quant=8bit", "write quant=nf4 (4 bits) or quant=none (16 bits)"),
    ("optim=adamw_bnb_8bit", "write optim=adamw_8bit"),
    ("recipe=./mine.yaml", "write distlora train ./mine.yaml"),
    ("llama3_8b", "write model=llama3_8b"),
    ("gradient_accumulation_steps=4", "write train.global_batch=4 (micro-batch 1 x 1 GPU x 4 steps of accumulation)"),
    ("learning_rate=1e-4", "did you mean 'optim.lr'?"),
    ("per_device_train_batch_size=2", "write train.micro_batch"),
    ("lora_r=8", "did you mean 'adapter.r'?"),
    ("num_train_epochs=3", "did you mean 'train.epochs'?"),
    ("max_seq_length=2048", "did you mean 'data.sequence_length'?"),
    ("lora_target_modules=all-linear", "did you mean 'adapter.target_modules'?"),
    ("report_to=wandb", "did you mean 'tracker'?"),
    ("learning_rat=1e-4", "did you mean 'optim.lr'?"),
    ("tf32=true", "tf32, which is a key of Axolotl: bf16 matrix products do not use TF32"),
    ("train.seed", "setting=value"),
    ("=3", "names no setting"),
    ("data.path=a=b", "must be quoted"),
    ("data.path=", "data.path is empty"),
    ("name=${nothing}", "'nothing' not found"),
    ("adapter.r=eight", "must be of type int"),
    ("recipe=null", "~recipe"),
    ("train.dtype=bf61", "did you mean 'bf16'?"),
    ("train.learning_rate=1e-4", "did you mean 'optim.lr'?"),
    ("lora_alpha=8", "did you mean 'adapter.lora_alpha'?"),
    (
        "train.batch_size=8",
        "write train.micro_batch (sequences per rank and forward) or train.global_batch (sequences per step)",
    ),
    ("rollout.top_p=0.9", "the loss is of the distribution that was sampled"),
    ("top_k=20", "Leave it out, or lower rollout.temperature"),
    ("train.resume=true", "write `distlora resume RUN`"),
    ("data.packing=true", "documents are always packed"),
    ("quant.bits=4", "write quant=nf4 (4 bits) or quant=none"),
    ("train.epochs=two", "write a number, such as 0.1"),
    ("optim.lr=high", "must be of type float; write a number, such as 0.1"),
    ("name=5", "must be of type str; write name='\"5\"'"),
    ("quant.dense_layers=true", "set it to 0 or more, or to auto"),
    ("train.liger=true", "write train.fused_kernels=liger for true (the default is own), and none for false"),
    ("train.load_best_at_end=3", "must be of type bool; write true or false"),
    ("+train.log_every=null", "train.log_every=null must be of type int"),
    ("adapter.init_from_loftq=true", "adapter.init_from_loftq=true "),
    ("data.rewards_execute_code=true", "data.rewards_execute_code=true "),
    ("data.sources=chats.jsonl", "write data.sources=[{path: chats.jsonl}]"),
]


@pytest.mark.parametrize(("override", "expected"), every_nth(MISTYPED, 5))
def test_a_wrong_word_is_named_with_what_to_type(override: str, expected: str):
    with pytest.raises(UserError) as raised:
        compose_config([*PATHS, override])
    assert expected in str(raised.value)


def test_accumulation_is_a_global_batch_by_the_other_sizes():
    words = ["gradient_accumulation_steps=4", "per_device_train_batch_size=2", "cluster.gpus_per_node=8"]
    with pytest.raises(UserError, match=r"train.global_batch=64 \(micro-batch 2 x 8 GPUs x 4 steps"):
        compose_config([*PATHS, *words])


def test_a_recipe_without_its_first_line_is_named(tmp_path: Path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("model:\n  path: org/model\n")
    with pytest.raises(UserError, match=r"lacks its first line, `# @package _global_`"):
        compose_config(["recipe=mine", "data.path=x.jsonl"], config_dir=str(tmp_path))


def test_every_setting_documents_itself():
    found = {item.name: item for _, _, settings in sections() for item in settings}
    assert all(item.doc for item in found.values())
    assert (found["run_dir"].default, found["optim.betas"].default) == ("", "[0.9,0.999]")
    optimizer = found["optim.name"]
    assert optimizer.values.startswith("adamw | ")
    assert optimizer.default == optimizer.choices[0] == "adamw"
    assert found["train.objective"].summary.endswith("a chosen and a rejected answer.")
    assert found["train.save_minutes"].summary.endswith("null: only by save_every and at the end.")


_KEYS = st.sampled_from(["adapter", "adapter.r", "quant", "name", "run_dir", "recipe", "hydra", "hydra.run.dir", "x/y"])
_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
_SIGNS, _EQUALS = st.sampled_from(["", "+", "++", "~"]), st.sampled_from(["=", ""])
_OVERRIDES = _TEXT | st.builds("{}{}{}{}".format, _SIGNS, _KEYS | _TEXT, _EQUALS, _TEXT)


@settings(max_examples=40, deadline=None)
@given(st.lists(_OVERRIDES, max_size=2))
def test_random_overrides_compose_or_are_explained(overrides: list[str]):
    assert main(["train", "--cfg", "job", "--", *overrides]) in (0, 2)
