"""`distlora import axolotl`: what the file meant is written out, what has no equal is named, and the recipe runs."""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.config import Config, UserError
from distlora_launcher.compose.checks import check_parallel
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.importing import import_settings, main
from distlora_launcher.importing.axolotl import convert
from distlora_launcher.importing.recipe import report
from support.imports import composed, lost, reported

GOLDEN = Path(__file__).parents[1] / "golden" / "axolotl"
FILES = sorted(path.stem for path in GOLDEN.glob("*.yml"))
LEAST: dict[str, Any] = {
    "base_model": "/model",
    "datasets": [{"path": "/chats.jsonl", "type": "chat_template"}],
    "adapter": "qlora",
    "load_in_4bit": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "learning_rate": "2e-4",
    "sample_packing": True,
}

CHATS: dict[str, Any] = {
    "path": "/chats.jsonl",
    "type": "chat_template",
    "name": "en",
    "revision": "abc",
    "split": "train",
    "field_messages": "turns",
    "message_property_mappings": {"role": "role", "content": "content"},
    "roles_to_train": ["assistant"],
    "chat_template": "llama3",
    "train_on_eos": "turn",
    "message_field_training": "train",
    "roles": {"assistant": ["gpt"]},
}
FULL: dict[str, Any] = LEAST | {
    "datasets": [CHATS],
    "test_datasets": [CHATS | {"split": "test"}],
    "max_steps": 100,
    "lr_scheduler": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 20, "decay_type": "linear", "num_stable_steps": 70},
}
"""Keys in keys, each with a value that another would change."""
MLP = ("up_proj", "gate_proj", "down_proj")


@pytest.mark.parametrize("name", FILES)
def test_golden_recipe_and_report(name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)  # The report names the file as it was given.
    assert main(["axolotl", f"{name}.yml", "--processes", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == Path(f"{name}.recipe.yaml").read_text()
    assert captured.err == Path(f"{name}.report.txt").read_text()


@pytest.mark.parametrize("name", [*FILES, "every nested key"])
def test_no_key_is_dropped_silently(name: str) -> None:
    """Whatever the value of any key becomes, the recipe, the report or a refusal shows it."""

    def other(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value * 2 + 1
        return {str: "odd", list: ["odd"], dict: {"odd": "other"}}[type(value)]

    values = FULL if name == "every nested key" else yaml.safe_load((GOLDEN / f"{name}.yml").read_text())
    before = convert(values, processes=2)
    for path in paths(values):
        value = at(values, path)
        if not value and value != 0:
            continue  # Off in the file: that it stays unmentioned is the claim of other tests.
        changed = copy.deepcopy(values)
        at(changed, path[:-1])[path[-1]] = other(value)
        try:
            shown = convert(changed, processes=2) != before
        except UserError as error:
            shown = str(path[-1]) in str(error)
        known = [note.key for note in before.notes]
        assert shown or any(str(path[-1]) in key for key in known if key not in reported(before, "changed")), path


def paths(values: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of the file, and those in its data sets and its mappings of lr_scheduler_kwargs."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*place, key)
        if key in ("datasets", "test_datasets", "lr_scheduler_kwargs") or (place and isinstance(value, dict)):
            yield from paths(value, (*place, key))


def at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


@pytest.mark.parametrize("value", [None, False, ""])
def test_what_is_off_is_not_mentioned(value: Any) -> None:
    off = dict.fromkeys(("neftune_noise_alpha", "tf32", "relora", "lora_modules_to_save", "hub_model_id"), value)
    assert convert(LEAST | off, processes=1).notes == convert(LEAST, processes=1).notes


def test_the_recipe_written_to_out_runs_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = FILES[0]
    out = tmp_path / "mine" / "recipe" / f"{name}.yaml"
    assert main(["axolotl", str(GOLDEN / f"{name}.yml"), "--processes", "2", "--out", str(out)]) == 0
    assert f"--config-dir {tmp_path / 'mine'} recipe={name}" in capsys.readouterr().err
    config = compose_config([f"recipe={name}"], config_dir=str(tmp_path / "mine"))
    assert config.model.path == yaml.safe_load((GOLDEN / f"{name}.yml").read_text())["base_model"]


def test_strict_ends_with_2_unless_everything_was_carried(capsys: pytest.CaptureFixture) -> None:
    arguments = ["--processes", "2", "--strict"]
    codes = {name: main(["axolotl", str(GOLDEN / f"{name}.yml"), *arguments]) for name in FILES}
    assert codes == {name: 0 if name == "mistral_7b_qlora" else 2 for name in FILES}
    assert "4 no effect here, all other keys exactly" in capsys.readouterr().err


SAVES = ("save_every", "saves_per_epoch", "eval_every", "evals_per_epoch")
PLACE = {"name": "v2", "split": "test", "revision": "abc"}
SHAREGPT = {"message_property_mappings": {"role": "from", "content": "value"}}
ORCA = {"system": "system_prompt", "instruction": "question", "output": "response"}
DECAY = {"lr_scheduler_kwargs": {"num_decay_steps": 20, "decay_type": "linear"}, "max_steps": 100}
PAIR_SETTINGS = ("beta", "label_smoothing", "target_margin", "sft_weight")
IMAGES = {"processor_type": "AutoProcessor"}
ARGILLA = {"path": "/pairs.jsonl", "type": "chat_template.argilla"}
LABELS = {"prompt": "q", "label": "x"}
CARRIED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # (keys of Axolotl beside LEAST, settings of the run)
    ({}, {"adapter.use_rslora": False, "train.seed": 42, "train.keep": 4, "train.checkpointing": "none"}),
    ({}, {"data.sequence_length": 512, "data.too_long": "drop", "data.eval_fraction": 0.0, "tracker.names": ()}),
    ({}, {"optim.lr": 2e-4, "optim.max_grad_norm": 1.0, "train.global_batch": 1, "quant.method": "nf4"}),
    ({"max_steps": 1000, "warmup_steps": 10}, {"optim.warmup_steps": 10}),
    ({"max_steps": 8, "warmup_steps": 10}, {"optim.warmup_steps": 8}),
    ({"warmup_steps": 0.1}, {"optim.warmup_ratio": 0.1}),
    ({"max_steps": 10_000}, {"optim.warmup_ratio": 0.01}),  # Axolotl's 3 %, at most 100 steps.
    ({"lr_scheduler": "constant", "warmup_ratio": 0.1}, {"optim.schedule": "constant", "optim.warmup_ratio": 0.0}),
    ({"lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.1}, {"optim.warmup_ratio": 0.1}),
    ({"cosine_min_lr_ratio": 0.1}, {"optim.min_lr_ratio": 0.1}),
    ({"lr_scheduler": "warmup_stable_decay", **DECAY}, {"optim.decay_ratio": 0.2}),
    ({"optimizer": "paged_adamw_32bit", "adam_beta2": 0.95}, {"optim.betas": (0.9, 0.95)}),
    ({"save_steps": 50, "eval_steps": 25}, {"train.save_every": 50, "train.eval_every": 25}),
    ({"saves_per_epoch": 1, "num_epochs": 1}, {f"train.{name}": None for name in SAVES}),  # The end is always saved.
    ({"saves_per_epoch": 4, "evals_per_epoch": 2, "max_steps": 90, "num_epochs": 1}, {"train.save_every": 23}),
    ({"saves_per_epoch": 1, "evals_per_epoch": 4, "num_epochs": 1.5}, {"train.evals_per_epoch": 4}),
    ({"save_steps": 0.25, "max_steps": 100}, {"train.save_every": 25}),
    ({"save_steps": 0.25, "num_epochs": 2}, {"train.saves_per_epoch": 2}),
    ({"save_strategy": False, "num_epochs": 3}, {f"train.{name}": None for name in SAVES}),  # YAML reads a bare no so.
    ({"num_epochs": 3}, {"train.saves_per_epoch": 1}),  # Axolotl saves after every epoch.
    (
        {"tokens": ["<a>"], "special_tokens": {"additional_special_tokens": ["<b>"]}},
        {"model.new_tokens": ("<a>", "<b>")},
    ),
    ({"special_tokens": {"eos_token": "<e>", "pad_token": "<p>"}}, {"model.special_tokens": {"eos_token": "<e>"}}),
    ({"peft_trainable_token_indices": {"lm_head": [7]}}, {"adapter.trainable_token_indices": {"lm_head": (7,)}}),
    (
        {"eot_tokens": ["<|eot|>"], "neftune_noise_alpha": 5},
        {"data.eot_tokens": ("<|eot|>",), "train.neftune_alpha": 5},
    ),
    ({"dataset_exact_deduplication": True, "num_epochs": 0.5}, {"data.deduplicate": True, "train.epochs": 0.5}),
    ({"loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 4}, {"train.loss_watchdog_patience": 4}),
    ({"wandb_name": "a-${b}: c"}, {"name": "a-${b}: c"}),
    ({"use_tensorboard": True}, {"tracker.names": ("tensorboard",)}),
    ({"use_swanlab": True, "swanlab_project": "a", "swanlab_workspace": "b"}, {"tracker.entity": "b"}),
    ({"wandb_project": "a", "use_mlflow": True}, {"tracker.names": ("wandb", "mlflow"), "tracker.project": "a"}),
    ({"wandb_project": "a", "wandb_mode": "disabled"}, {"tracker.names": ()}),
    ({"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}, {"adapter.target_modules": "qv"}),
    ({"lora_target_linear": None, "lora_target_modules": "layers.*q"}, {"adapter.target_modules": "layers.*q"}),
    ({"lora_target_modules": ["q_proj", "lm_head"]}, {"adapter.target_modules": "linears"}),
    ({"lora_target_linear": None, "lora_target_modules": [*MLP]}, {"adapter.target_modules": MLP}),
    ({"train_on_inputs": True}, {"data.train_on": "all"}),
    *[
        ({"datasets": [{"path": "/d.jsonl", **entry}]}, {f"data.{name}": value for name, value in data.items()})
        for entry, data in (
            ({"type": "chat_template", "field_messages": "m"}, {"format": "chat", "columns": {"messages": "m"}}),
            ({"type": "chat_template", "field_messages": "conversations", **SHAREGPT}, {"format": "sharegpt"}),
            ({"type": "chat_template", "field_tools": "f"}, {"format": "chat", "columns": {"tools": "f"}}),
            ({"type": "chat_template", "roles_to_train": ["user", "assistant"]}, {"train_on": "all"}),
            ({"type": "chat_template", **PLACE}, PLACE),
            ({"type": "chat_template", "field_thinking": "why"}, {"reasoning_key": "why"}),
            ({"type": "completion", "field": "body"}, {"format": "text", "columns": {"text": "body"}}),
            ({"type": "alpaca_w_system.load_open_orca"}, {"format": "alpaca", "columns": ORCA}),
            ({"type": "input_output"}, {"format": "auto"}),
        )
    ],
    (
        {"datasets": None, "pretraining_dataset": [{"path": "org/text", "text_column": "body"}], "max_steps": 100},
        {"data.streaming": True, "data.format": "text", "data.columns": {"text": "body"}, "data.too_long": "split"},
    ),
    *[
        (
            {"rl": "dpo", "rl_beta": 0.3, "sequence_len": 700, "datasets": [{"path": "/pairs.jsonl", **entry}]},
            {"train.beta": 0.3, "data.sequence_length": 1400, "data.columns": columns, "data.template": template},
        )
        for entry, columns, template in (
            ({"type": "chat_template.default", "chat_template": "llama3"}, {"prompt": "messages"}, "llama3"),
            ({"type": "chat_template.default", "field_messages": "prompt", "field_chosen": "b"}, {"chosen": "b"}, None),
            ({"type": "chat_template.argilla_chat"}, {}, None),
            ({"type": "passthrough"}, {}, None),
        )
    ],
    *[
        (
            {"datasets": [{"path": "/pairs.jsonl", "type": "passthrough"}]} | keys,
            {"train.objective": keys["rl"], "data.format": "preference"}
            | {f"train.{name}": settings.get(name) for name in PAIR_SETTINGS},
        )
        for keys, settings in (
            ({"rl": "dpo", "dpo_label_smoothing": 0.1}, {"beta": 0.1, "label_smoothing": 0.1}),
            ({"rl": "dpo", "rpo_alpha": 0.5}, {"beta": 0.1, "sft_weight": 0.5}),
            ({"rl": "ipo", "rl_beta": 0.2}, {"beta": 0.2}),
            ({"rl": "orpo", "orpo_alpha": 0.2, "datasets": [ARGILLA]}, {"beta": 0.2}),
            ({"rl": "orpo", "adapter": None, "load_in_4bit": False, "datasets": [ARGILLA]}, {"beta": 0.1}),
            ({"rl": "simpo", "cpo_alpha": 0}, {"beta": 0.1, "target_margin": 0.5, "sft_weight": 0.0}),
            ({"rl": "simpo", "rl_beta": 2.5, "simpo_gamma": 1}, {"beta": 2.5, "target_margin": 1, "sft_weight": 1}),
        )
    ],
    *[
        (
            {"rl": "kto", "kto_undesirable_weight": 0.5, "datasets": [{"path": "/judged.jsonl", **entry}]},
            {"train.objective": "kto", "train.desirable_weight": None, "train.undesirable_weight": 0.5}
            | {"data.format": format, "data.columns": columns, "data.template": template},
        )
        for entry, format, columns, template in (
            ({"type": "chatml.intel"}, "alpaca", {"instruction": "question", "output": "completion"}, "chatml"),
            ({"type": "llama3.ultra"}, "alpaca", {"instruction": "prompt", "output": "completion"}, "llama3"),
            ({"type": "chatml.argilla_chat"}, "chat", {"messages": "completion"}, "chatml"),
            ({}, "prompt_completion", {}, None),
            ({"type": {"field_prompt": "q", "field_label": "x"}}, "prompt_completion", LABELS, None),
        )
    ],
]


PAIRS_OF_TEXTS = {"path": "/pairs.jsonl", "type": "bradley_terry.chat_template"}
SCORED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"reward_model": True, "num_labels": 1, "center_rewards_coefficient": 0.01, "datasets": [PAIRS_OF_TEXTS]},
        {"train.objective": "reward", "train.center_rewards": 0.01, "data.format": "preference", "data.columns": {}},
    ),
    (
        {"process_reward_model": True, "datasets": [{"path": "/steps.jsonl", "type": "stepwise_supervised"}]},
        {"train.objective": "process_reward", "data.format": "steps", "data.template": None},
    ),
    (
        {"rl": "grpo", "micro_batch_size": 8, "sequence_len": 200, "datasets": [{"path": "/asked.jsonl"}]}
        | {"trl": {"reward_funcs": ["mine.short"], "reward_weights": [2], "scale_rewards": "false", "beta": "1e-3"}},
        {"train.objective": "grpo", "train.beta": 1e-3, "data.format": "prompt_only", "data.rewards": ("mine.short",)}
        | {"data.reward_weights": (2.0,), "rollout.scale_rewards": "none", "rollout.max_new_tokens": 256}
        | {"data.sequence_length": 456},
    ),
]


def test_rewards_and_sampled_answers_are_carried_into_the_run(tmp_path: Path) -> None:
    for given, expected in SCORED:
        imported = convert(LEAST | given, processes=1)
        assert not lost(imported)
        config = composed(imported, tmp_path)
        assert {name: value_at(config, name) for name in expected} == expected


@pytest.mark.parametrize(("given", "expected"), CARRIED, ids=str)
def test_what_a_key_means_is_carried_into_the_run(
    given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    imported = convert(LEAST | {"val_set_size": 0.1 if "eval" in str(given) else 0} | given, processes=1)
    assert "rl" not in given or not reported(imported, "refused")
    config = composed(imported, tmp_path)
    assert {name: value_at(config, name) for name in expected} == expected


def value_at(config: Config, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def test_the_batch_grows_with_the_processes_that_hold_other_rows() -> None:
    values = LEAST | {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    batches = [(1, {}, 8), (8, {}, 64), (8, {"context_parallel_size": 4}, 16)]
    for processes, more, expected in batches:
        assert convert(values | more, processes=processes).settings["train"]["global_batch"] == expected


def test_a_test_set_like_the_training_set_needs_no_note() -> None:
    assert not [note for note in convert(FULL, processes=1).notes if "test_datasets" in note.key]


def test_several_files_and_data_sets_become_sources(tmp_path: Path) -> None:
    files = {"path": "json", "data_files": ["/a.json", "/b.json"], "type": "chat_template"}
    values = LEAST | {"datasets": [files, {"path": "org/more", "type": "sharegpt", "split": "train[:5%]"}]}
    config = composed(convert(values, processes=1), tmp_path)
    assert [source.path for source in config.data.sources] == ["/a.json", "/b.json", "org/more"]
    assert [source.format for source in config.data.sources] == ["chat", "chat", "sharegpt"]
    assert config.data.sources[2].split == "train[:5%]"


def test_an_adapter_to_start_from_brings_its_own_settings(tmp_path: Path) -> None:
    values = LEAST | {"lora_model_dir": "/absent", "lora_dropout": 0.1}
    imported = convert(values, processes=1)
    assert imported.settings["adapter"] == {"init_from": "/absent", "lora_dropout": 0.1}
    assert "lora_r" in reported(imported, "idle")
    file = tmp_path / "axolotl.yml"
    file.write_text(yaml.safe_dump(values))
    assert main(["axolotl", str(file)]) == 0  # The adapter need not be on the machine that imports.


REFUSED: list[tuple[dict[str, Any] | str, list[str], str]] = [
    # (the file: keys beside LEAST, or its text, words behind it, what the message says)
    ({"rl": "bco"}, [], "rl=bco: distlora imports rl: dpo, ipo, orpo, simpo, kto, grpo, gdpo; set"),
    ({"rl": "ipo", "adapter": None, "load_in_4bit": False}, [], "rl=ipo without an adapter"),
    ({"reward_model": True, "adapter": None, "load_in_4bit": False}, [], "reward_model=true without an adapter"),
    ({"rl": "gdpo", "adapter": None, "load_in_4bit": False}, [], "rl=gdpo without an adapter"),
    ({"rl": "dpo", "reward_model": True}, [], "rl=dpo and reward_model=true: a run has one objective; leave 1 of"),
    ({"reward_model": True, "process_reward_model": True}, [], "reward_model=true and process_reward_model=true"),
    ({"rl": "grpo", "trl": {"scale_rewards": [1]}}, [], "trl.scale_rewards=[1] is not a word"),
    ({"diffusion": {"eps": 1}}, [], "Axolotl trains another objective than the next token"),
    ({"adapter": "llama-adapter"}, [], "adapter=llama-adapter"),
    ({"base_model": None}, [], "base_model is not set"),
    ({"learning_rate": None}, [], "learning_rate is not set"),
    ({"lora_r": None}, [], "lora_r"),
    ({"lora_target_linear": False}, [], "add lora_target_linear: true"),
    ({"learning_rate": "fast"}, [], "learning_rate='fast' is not a number"),
    ({"micro_batch_size": 1.5}, [], "micro_batch_size=1.5 is not a whole number"),
    ({"sample_packing": "perhaps"}, [], "is not true or false"),
    ({"special_tokens": ["a"]}, [], "is not a mapping"),
    ({"streaming": True}, [], "x.yml has settings that distlora refuses: "),
    ({"context_parallel_size": 2}, ["--processes", "3"], "3 GPUs: the file shares each sequence among 2"),
    ({}, ["--processes", "0"], "--processes 0"),
    ({}, ["--out", "x.yaml"], "a folder named recipe"),
    ({}, ["--out", "recipe/x y.yaml"], "cannot follow recipe="),
    ({}, ["--out", "recipe/qlora.yaml"], "distlora's own recipe"),
    ({}, ["--out", "recipe/mine.yaml"], "exists"),
    ({}, ["--outt", "x"], "there is no option --outt (did you mean '--out'?)"),
    ({}, ["--out", "/proc/recipe/x.yaml"], "--out=/proc/recipe: cannot write in /proc"),
    ("a: [", [], "is not YAML"),
    ("a: 2024-13-45", [], "is not YAML"),
    ("- a", [], "holds no settings"),
    ("", [], "holds no settings"),
]


@pytest.mark.parametrize(("file", "words", "expected"), REFUSED, ids=str)
def test_what_cannot_be_imported_is_refused(
    file: dict[str, Any] | str, words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yml").write_text(file if isinstance(file, str) else yaml.safe_dump(LEAST | file))
    Path("recipe").mkdir()
    Path("recipe/mine.yaml").touch()
    with pytest.raises(UserError, match=re.escape(expected)):
        main(["axolotl", "x.yml", *words])


def test_a_wrong_command_line_says_what_to_type() -> None:
    for words, expected in {(): "arguments are required: axolotl", ("axolotl", "absent.yml"): "No such file"}.items():
        with pytest.raises(UserError, match=expected):
            main([*words])


@pytest.mark.parametrize(
    ("given", "processes", "changed", "expected"),
    [
        ({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, 1, "load_in_8bit=true", {"quant": "auto"}),
        ({"optimizer": "adamw_torch_4bit"}, 1, "optimizer=adamw_torch_4bit", {"optim": "adamw_8bit"}),
        ({"fsdp_config": {"offload_params": True}}, 2, "fsdp_config (CPU offload)", {"parallel": "zero3"}),
        ({"fsdp_config": {"offload_params": True}}, 1, "fsdp_config (CPU offload)", {}),
        ({"dp_shard_size": 2, "dp_replicate_size": 2}, None, None, {"parallel.shard_degree": 2}),
        ({"dp_shard_size": -1, "dp_replicate_size": 2}, 8, None, {"parallel.shard_degree": 4}),
        ({"dp_replicate_size": 2, "tensor_parallel_size": 2}, 8, None, {"parallel.shard_degree": 4}),
        ({"dp_replicate_size": 3}, 8, "dp_replicate_size=3", {"parallel.shard_degree": None}),
        ({"tiled_mlp": True, "tiled_mlp_num_shards": 4, "sequence_len": 4096}, 1, None, {"train.mlp_tile": 1024}),
        ({"tiled_mlp": True, "sequence_len": 16384}, 1, "tiled_mlp", {"train.mlp_tile": 4096}),
        ({"peft": {"loftq_config": {"loftq_bits": 4}}}, 1, "peft.loftq_config", {"adapter.init": "loftq"}),
        ({"context_parallel_size": 2, "dp_shard_size": 4}, None, "context_parallel_size=2", {"train.global_batch": 4}),
        ({"use_ray": True, "ray_num_workers": 4}, None, "use_ray", {"train.global_batch": 4}),
        ({"model_config": {"output_router_logits": True}}, 1, None, {"train.router_aux_loss": 0.001}),
        ({"fsdp_config": {"fsdp_activation_checkpointing": True}}, 1, None, {"train.checkpointing": "block"}),
        ({"ddp_timeout": 7200}, 1, None, {"cluster.timeout_seconds": 7200}),
        ({"rl": "dpo", "rpo_alpha": 0.5}, 1, "rpo_alpha=0.5", {}),
        ({"rl": "orpo", "datasets": [ARGILLA]}, 1, "rl=orpo", {}),
        ({"rl": "simpo"}, 1, "cpo_alpha=1", {}),
        ({"mean_resizing_embeddings": False}, 1, "mean_resizing_embeddings=false", {}),
    ],
)
def test_what_is_close_is_changed_and_composes(
    given: dict[str, Any], processes: int | None, changed: str | None, expected: dict[str, Any], tmp_path: Path
) -> None:
    imported = import_settings(LEAST | given, processes=processes)
    assert not lost(imported)
    assert changed is None or changed in reported(imported, "changed")
    config = composed(imported, tmp_path)
    check_parallel(config.parallel, config.cluster.ranks)
    for name, value in expected.items():
        section, _, field = name.partition(".")
        assert (getattr(getattr(config, section), field) if field else imported.options[section]) == value, name


SAMPLED = {"reward_funcs": ["mine.short", "math"], "num_generations": 4, "max_completion_length": 64, "beta": 0.01}
SAMPLING: dict[str, Any] = {"rl": "grpo", "sequence_len": 200, "datasets": [{"path": "/asked.jsonl"}], "trl": SAMPLED}
DPO = {"path": "/a.jsonl", "type": "chat_template.default", "message_property_mappings": {"role": "who"}}
NAMED: list[tuple[dict[str, Any], str, str]] = [
    # (keys beside LEAST, the group of the report, the key that it names)
    *[
        ({"datasets": [{"path": "org/data"} | entry]}, group, key)
        for entry, group, key in (
            ({"type": "input_output"}, "refused", "datasets[0].type=input_output"),
            ({"type": "gpteacher"}, "refused", "datasets[0].type=gpteacher"),
            ({"type": {"format": "Q: {instruction}"}}, "refused", "datasets[0].type (a custom format)"),
            ({"type": "chat_template", "train_on_eos": "all"}, "unsupported", "datasets[0].train_on_eos"),
            ({"type": "chat_template", "roles": {"assistant": ["bot"]}}, "refused", "datasets[0].roles.assistant"),
            ({"type": "chat_template", "rolse": 1}, "unknown", "datasets[0].rolse"),
            ({"type": "chat_template", "shards": 4}, "unsupported", "datasets[0].shards"),
            ({"type": "chat_template", "data_files": ["a.json"]}, "unsupported", "datasets[0].data_files"),
            (
                {"type": "chat_template", "template_thinking_key": "t"},
                "unsupported",
                "datasets[0].template_thinking_key=t",
            ),
            ({"type": "completion", "roles_to_train": ["user"]}, "idle", "datasets[0].roles_to_train"),
            ({"type": "chat_template", "roles_to_train": ["user"]}, "unsupported", "datasets[0].roles_to_train"),
            ({"path": "s3://bucket/x", "type": "chat_template"}, "unsupported", "datasets[0].path=s3://bucket/x"),
        )
    ],
    *[
        (FULL | {"test_datasets": [CHATS | {"split": "test"} | given]}, "unsupported", key)
        for given, key in (
            ({"name": "de"}, "test_datasets: name=de"),
            ({"name": None}, "test_datasets: name=(not set)"),
            ({"revision": "def"}, "test_datasets: revision=def"),
            ({"path": "/other.jsonl"}, "test_datasets: name=en"),
            ({"chat_template": "gemma"}, "test_datasets: template=gemma"),
            ({"roles_to_train": ["user", "assistant"]}, "test_datasets: train_on=all"),
            ({"field_messages": "messages"}, "test_datasets: columns=(not set)"),
            ({"shards": 3}, "test_datasets[0].shards"),
            ({"path": None}, "test_datasets"),
        )
    ],
    *[
        (given, group, key)
        for group, given, key in (
            ("unknown", {"freeze_vision_tower": True}, "freeze_vision_tower"),
            ("changed", {"processor_type": "AutoProcessor", "image_size": 512}, "image_size=512"),
            ("refused", {"image_size": 512}, "image_size=512"),
            ("refused", {"processor_type": "VoxtralProcessor"}, "processor_type=VoxtralProcessor"),
            ("refused", IMAGES | {"adapter": None, "load_in_4bit": False}, "processor_type=AutoProcessor"),
            ("refused", IMAGES | {"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save=[lm_head]"),
            (
                "refused",
                IMAGES | {"lora_target_linear": None, "lora_target_modules": r".*visual.*fc1|.*q_proj"},
                r"lora_target_modules=.*visual.*fc1|.*q_proj",
            ),
            ("unsupported", {"qat": {"weight_dtype": "int4"}}, "qat"),
            ("unsupported", {"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]}, "plugins: SpectrumPlugin"),
            ("unsupported", {"plugins": ["my.own.Plugin"]}, "plugins: Plugin"),
            ("unsupported", {"nvfp4_merge_aware": True}, "nvfp4_merge_aware"),
            ("unsupported", {"use_eaft": True}, "use_eaft"),
            ("unsupported", {"relora": True}, "relora"),
            ("unsupported", {"lisa_n_layers": 4}, "lisa_n_layers=4"),
            ("unsupported", {"diffusion_steps": 128}, "diffusion_steps=128"),
            (
                "unsupported",
                {"unfrozen_parameters": ["model.layers.4[0-9]"]},
                "unfrozen_parameters=[model.layers.4[0-9]]",
            ),
            ("refused", {"model_config": {"rope_theta": 1}}, "model_config.rope_theta=1"),
        )
    ],
    *[
        (SAMPLING | {"trl": SAMPLED | given}, group, key)
        for given, group, key in (
            ({"top_p": 0.95}, "unsupported", "trl.top_p=0.95"),
            (
                {"multi_objective_aggregation": "normalize_then_sum"},
                "unsupported",
                "trl.multi_objective_aggregation=normalize_then_sum",
            ),
            ({"async_prefetch": True}, "unsupported", "trl.async_prefetch"),
            ({"loss_type": "bnpo"}, "unsupported", "trl.loss_type=bnpo"),
            ({"use_vllm": True}, "changed", "trl.use_vllm"),
            ({"vllm_server_port": 8000}, "idle", "trl.vllm_server_port"),
        )
    ],
    (SAMPLING | {"rl": "gdpo"}, "unsupported", "trl.multi_objective_aggregation=normalize_then_sum"),
    (SAMPLING | {"datasets": [{"path": "/a.jsonl", "type": "mine.transform"}]}, "refused", "datasets[0].type"),
    ({"process_reward_model": True}, "refused", "datasets[0].type=chat_template"),
    ({"rl": "dpo", "datasets": [{"path": "/a.jsonl", "type": "chatml.intel"}]}, "refused", "datasets[0].type"),
    ({"rl": "dpo", "datasets": [DPO]}, "refused", "datasets[0].message_property_mappings"),
    ({"rl": "dpo", "dpo_use_weighting": True}, "unsupported", "dpo_use_weighting"),
    ({"rl": "dpo", "rl_adapter_ref_model": True}, "idle", "rl_adapter_ref_model"),
    ({"rl": "kto", "datasets": [{"path": "/a.jsonl", "type": {"prompt_format": "Q"}}]}, "refused", "datasets[0].type"),
]


@pytest.mark.parametrize(("given", "group", "key"), NAMED, ids=str)
def test_what_ours_cannot_do_is_named(given: dict[str, Any], group: str, key: str) -> None:
    assert key in reported(import_settings(LEAST | given), group)


def test_a_secret_is_not_printed() -> None:
    imported = import_settings(LEAST | {"use_swanlab": True, "swanlab_project": "a", "swanlab_api_key": "s3cret"})
    assert "swanlab_api_key" in reported(imported, "changed")
    assert "s3cret" not in report(imported, source=Path("x.yml"), out=None)


@pytest.mark.slow
@pytest.mark.skipif("AXOLOTL" not in os.environ, reason="AXOLOTL is not set to a checkout of Axolotl 067b021")
def test_most_examples_of_axolotl_import_and_compose(tmp_path: Path) -> None:
    """Of 213 examples, 193 compose and 157 lose nothing; the others are other objectives, QAT and the like."""
    examples = Path(os.environ["AXOLOTL"]) / "examples"
    complete, composes = 0, 0
    for path in sorted(path for path in examples.rglob("*.y*ml") if "archived" not in path.parts):
        try:
            imported = import_settings(path)
        except UserError:
            continue
        complete += not lost(imported)
        config = composed(imported, tmp_path)
        check_parallel(config.parallel, config.cluster.ranks)
        composes += 1
        text = path.read_text()
        other = re.search(r"^(qat|use_eaft|relora|reinit_weights|nvfp4_merge_aware): *\S*", text, re.M)
        assert other is None or lost(imported), path
    assert (composes, complete) == (193, 157)
