"""`distlora import axolotl`: what the file meant is written out, what has no equal is named, and the recipe runs."""

from __future__ import annotations

import copy
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
from distlora_launcher.importing.recipe import Imported, recipe_text, report

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


def composed(imported: Imported, tmp_path: Path) -> Config:
    """Return the Config that `distlora train --config-dir tmp_path recipe=imported` runs."""
    place = tmp_path / "recipe" / "imported.yaml"
    place.parent.mkdir(exist_ok=True)
    place.write_text(recipe_text(imported, source=Path("axolotl.yml")))
    return compose_config(["recipe=imported"], config_dir=str(tmp_path))


def reported(imported: Imported, group: str) -> list[str]:
    return [note.key for note in imported.notes if note.group == group]


def lost(imported: Imported) -> list[str]:
    return reported(imported, "unsupported") + reported(imported, "refused")


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


def test_defaults_of_axolotl_are_written_where_ours_differ(tmp_path: Path) -> None:
    config = composed(convert(LEAST, processes=1), tmp_path)
    assert (config.adapter.use_rslora, config.adapter.scaling_of("q_proj")) == (False, 0.5)
    assert (config.train.seed, config.train.keep, config.train.checkpointing) == (42, 4, "none")
    assert (config.data.sequence_length, config.data.too_long, config.data.eval_fraction) == (512, "drop", 0.0)
    assert (config.tracker.names, config.optim.lr, config.optim.max_grad_norm) == ((), 2e-4, 1.0)
    assert (config.train.global_batch, config.optim.schedule, config.quant.method) == (1, "cosine", "nf4")


def test_the_batch_grows_with_the_processes_that_hold_other_rows() -> None:
    values = LEAST | {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    assert convert(values, processes=1).settings["train"]["global_batch"] == 8
    assert convert(values, processes=8).settings["train"]["global_batch"] == 64
    assert convert(values | {"context_parallel_size": 4}, processes=8).settings["train"]["global_batch"] == 16
    by_total = LEAST | {"micro_batch_size": 2, "batch_size": 10}
    assert convert(by_total, processes=2).settings["train"]["global_batch"] == 20


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_steps": 1000, "warmup_steps": 10}, {"warmup_steps": 10}),
        ({"max_steps": 8, "warmup_steps": 10}, {"warmup_steps": 8}),
        ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
        ({"max_steps": 10_000}, {"warmup_ratio": 0.01}),  # Axolotl's 3 %, at most 100 steps.
        ({"warmup_ratio": 0.1}, {"warmup_ratio": 0.1}),
        ({"warmup_steps": 0}, {"warmup_steps": 0}),
        ({"warmup_steps": 10}, {"warmup_steps": 10}),
        ({"lr_scheduler": "constant", "warmup_ratio": 0.1}, {"schedule": "constant", "warmup_ratio": 0.0}),
        ({"lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.1}, {"schedule": "constant", "warmup_ratio": 0.1}),
        ({"cosine_min_lr_ratio": 0.1}, {"min_lr_ratio": 0.1}),
        (
            {
                "lr_scheduler": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 20, "decay_type": "linear"},
                "max_steps": 100,
            },
            {"schedule": "warmup_stable_decay", "decay_ratio": 0.2},
        ),
        ({"optimizer": "paged_adamw_32bit", "adam_beta2": 0.95}, {"betas": [0.9, 0.95]}),
    ],
)
def test_optimizer_and_schedule(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    imported = convert(LEAST | given, processes=1)
    optim = imported.settings["optim"]
    assert {name: optim[name] for name in expected} == expected
    composed(imported, tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"save_steps": 50, "eval_steps": 25}, {"save_every": 50, "eval_every": 25}),
        ({"saves_per_epoch": 1, "num_epochs": 1}, {}),  # At the end, which is always saved.
        (
            {"saves_per_epoch": 4, "evals_per_epoch": 2, "max_steps": 90, "num_epochs": 1},
            {"save_every": 23, "eval_every": 45},
        ),
        ({"saves_per_epoch": 1, "evals_per_epoch": 4, "num_epochs": 1.5}, {"saves_per_epoch": 1, "evals_per_epoch": 4}),
        ({"save_steps": 0.25, "max_steps": 100}, {"save_every": 25}),
        ({"save_steps": 0.25, "eval_steps": 0.125, "num_epochs": 2}, {"saves_per_epoch": 2, "evals_per_epoch": 4}),
        ({"save_strategy": "no", "num_epochs": 3}, {}),
        ({"save_strategy": False, "num_epochs": 3}, {}),  # How YAML reads a bare no.
        ({"saves_per_epoch": 1, "num_epochs": 0.5, "max_steps": 9}, {}),
        ({"num_epochs": 3}, {"saves_per_epoch": 1}),  # Axolotl saves after every epoch.
    ],
)
def test_saves_and_evaluations(given: dict[str, Any], expected: dict[str, int], tmp_path: Path) -> None:
    imported = convert(LEAST | {"val_set_size": 0.1} | given, processes=1)
    names = ("save_every", "saves_per_epoch", "eval_every", "evals_per_epoch")
    config = composed(imported, tmp_path)
    assert {name: value for name in names if (value := getattr(config.train, name)) is not None} == expected
    assert not lost(imported)


def test_a_number_of_saves_that_does_not_fit_epochs_is_rounded_up() -> None:
    imported = convert(LEAST | {"saves_per_epoch": 1.5, "num_epochs": 2}, processes=1)
    assert imported.settings["train"]["saves_per_epoch"] == 2
    assert "saves_per_epoch=1.5" in reported(imported, "changed")


def test_new_tokens_and_trained_rows_are_carried(tmp_path: Path) -> None:
    special = {"pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>", "<b>"]}
    given = {"tokens": ["<a>", "<b>"], "special_tokens": special, "peft_trainable_token_indices": {"lm_head": [7]}}
    imported = convert(LEAST | given, processes=1)
    config = composed(imported, tmp_path)
    assert config.model.new_tokens == ("<a>", "<b>", "<|im_end|>")
    assert config.adapter.trainable_token_indices == {"lm_head": (7,)}
    assert not lost(imported)
    special = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "mask_token": "<m>"}
    imported = convert(LEAST | {"special_tokens": special}, processes=1)
    assert reported(imported, "idle")[:2] == ["special_tokens.pad_token", "special_tokens.mask_token=<m>"]
    assert composed(imported, tmp_path).model.special_tokens == {"eos_token": "<|im_end|>"}
    assert "new_tokens" not in imported.settings["model"]


PLACE = {"name": "v2", "split": "test", "revision": "abc"}
SHAREGPT = {"message_property_mappings": {"role": "from", "content": "value"}}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"type": "chat_template"}, {"format": "chat"}),
        ({"type": "chat_template", "field_messages": "m"}, {"format": "chat", "columns": {"messages": "m"}}),
        ({"type": "chat_template", "field_messages": "conversations"} | SHAREGPT, {"format": "sharegpt"}),
        ({"type": "chat_template", "field_tools": "f"}, {"format": "chat", "columns": {"tools": "f"}}),
        ({"type": "sharegpt"}, {"format": "sharegpt"}),
        ({"type": "completion"}, {"format": "text"}),
        ({"type": "completion", "field": "body"}, {"format": "text", "columns": {"text": "body"}}),
        ({"type": "alpaca"}, {"format": "alpaca"}),
        (
            {"type": "alpaca_w_system.load_open_orca"},
            {
                "format": "alpaca",
                "columns": {"system": "system_prompt", "instruction": "question", "output": "response"},
            },
        ),
        ({"type": "input_output"}, {"format": "auto"}),
        ({"type": "chat_template"} | PLACE, PLACE),
        ({"type": "chat_template", "field_thinking": "why"}, {"reasoning_key": "why"}),
        ({"type": "chat_template", "field_thinking": "thinking", "template_thinking_key": "thinking"}, {}),
    ],
)
def test_a_data_set(entry: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    imported = convert(LEAST | {"datasets": [{"path": "/d.jsonl"} | entry]}, processes=1)
    data = imported.settings["data"]
    assert {name: data[name] for name in expected} == expected
    assert ("columns" in data) == ("columns" in expected)
    assert composed(imported, tmp_path).data.path == "/d.jsonl"


@pytest.mark.parametrize(
    ("entry", "group", "key"),
    [
        ({"type": "input_output"}, "refused", "datasets[0].type=input_output"),
        ({"type": "gpteacher"}, "refused", "datasets[0].type=gpteacher"),
        ({"type": {"format": "Q: {instruction}"}}, "refused", "datasets[0].type (a custom format)"),
        ({"type": "chat_template", "train_on_eos": "all"}, "unsupported", "datasets[0].train_on_eos"),
        ({"type": "chat_template", "roles": {"assistant": ["bot"]}}, "refused", "datasets[0].roles.assistant"),
        ({"type": "chat_template", "rolse": 1}, "unknown", "datasets[0].rolse"),
        ({"type": "chat_template", "shards": 4}, "unsupported", "datasets[0].shards"),
        ({"type": "chat_template", "data_files": ["a.json"]}, "unsupported", "datasets[0].data_files"),
        ({"type": "chat_template", "template_thinking_key": "t"}, "unsupported", "datasets[0].template_thinking_key=t"),
        ({"type": "completion", "roles_to_train": ["user"]}, "idle", "datasets[0].roles_to_train"),
        ({"type": "chat_template", "roles_to_train": ["user"]}, "unsupported", "datasets[0].roles_to_train"),
        ({"path": "s3://bucket/x", "type": "chat_template"}, "unsupported", "datasets[0].path=s3://bucket/x"),
    ],
)
def test_what_a_data_set_cannot_be_here_is_named(entry: dict[str, Any], group: str, key: str) -> None:
    imported = convert(LEAST | {"datasets": [{"path": "org/data"} | entry]}, processes=1)
    assert key in reported(imported, group)


@pytest.mark.parametrize("given", [{"train_on_inputs": True}, {"roles": ["user", "assistant"]}])
def test_other_turns_than_the_assistants(given: dict[str, Any], tmp_path: Path) -> None:
    entry = {"path": "/d.jsonl", "type": "chat_template", "roles_to_train": given.get("roles", ["assistant"])}
    inputs = {"train_on_inputs": given.get("train_on_inputs", False)}
    imported = convert(LEAST | {"datasets": [entry]} | inputs, processes=1)
    assert composed(imported, tmp_path).data.train_on == "all"
    assert {"train_on_inputs", "datasets[0].roles_to_train"} & set(reported(imported, "changed"))


def test_several_files_and_data_sets_become_sources(tmp_path: Path) -> None:
    files = {"path": "json", "data_files": ["/a.json", "/b.json"], "type": "chat_template"}
    values = LEAST | {"datasets": [files, {"path": "org/more", "type": "sharegpt", "split": "train[:5%]"}]}
    config = composed(convert(values, processes=1), tmp_path)
    assert [source.path for source in config.data.sources] == ["/a.json", "/b.json", "org/more"]
    assert [source.format for source in config.data.sources] == ["chat", "chat", "sharegpt"]
    assert config.data.sources[2].split == "train[:5%]"


def test_pretraining_data_streams_as_plain_text(tmp_path: Path) -> None:
    values = {key: value for key, value in LEAST.items() if key != "datasets"}
    values |= {"pretraining_dataset": [{"path": "org/text", "text_column": "body"}], "max_steps": 100}
    config = composed(convert(values, processes=1), tmp_path)
    assert (config.data.streaming, config.data.format, config.data.columns) == (True, "text", {"text": "body"})
    assert config.data.too_long == "split"


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"name": "de"}, "test_datasets: name=de"),
        ({"name": None}, "test_datasets: name=(not set)"),
        ({"revision": "def"}, "test_datasets: revision=def"),
        ({"path": "/other.jsonl"}, "test_datasets: name=en"),
        ({"chat_template": "gemma"}, "test_datasets: template=gemma"),
        ({"roles_to_train": ["user", "assistant"]}, "test_datasets: train_on=all"),
        ({"field_messages": "messages"}, "test_datasets: columns=(not set)"),
        ({"shards": 3}, "test_datasets[0].shards"),
        ({"path": None}, "test_datasets"),
    ],
)
def test_what_is_otherwise_in_the_test_set_is_named(given: dict[str, Any], key: str) -> None:
    assert convert(FULL, processes=1).notes == [
        note for note in convert(FULL, processes=1).notes if "test_datasets" not in note.key
    ], "equal sets need no note"
    imported = convert(FULL | {"test_datasets": [CHATS | {"split": "test"} | given]}, processes=1)
    assert key in reported(imported, "unsupported")
    assert not [note for note in imported.notes if "test_datasets" in note.key and note.group == "changed"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}, "qv"),
        ({"lora_target_linear": None, "lora_target_modules": ["q_proj", "down_proj"]}, ("q_proj", "down_proj")),
        ({"lora_target_linear": None, "lora_target_modules": r"model\.layers.*q_proj"}, r"model\.layers.*q_proj"),
        ({"lora_target_modules": ["q_proj", "lm_head"]}, "linears"),
        ({"lora_target_linear": None, "lora_target_modules": "all-linear"}, "linears"),
        ({"lora_target_linear": None, "lora_target_modules": ["up_proj", "gate_proj", "down_proj"]}, MLP),
    ],
)
def test_target_modules(given: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    assert composed(convert(LEAST | given, processes=1), tmp_path).adapter.target_modules == expected


def test_an_adapter_to_start_from_brings_its_own_settings(tmp_path: Path) -> None:
    values = LEAST | {"lora_model_dir": "/absent", "lora_dropout": 0.1}
    imported = convert(values, processes=1)
    assert imported.settings["adapter"] == {"init_from": "/absent", "lora_dropout": 0.1}
    assert "lora_r" in reported(imported, "idle")
    file = tmp_path / "axolotl.yml"
    file.write_text(yaml.safe_dump(values))
    assert main(["axolotl", str(file)]) == 0  # The adapter need not be on the machine that imports.


PREFERENCES: list[tuple[dict[str, Any], dict[str, str], str | None]] = [
    ({"type": "chat_template.default", "chat_template": "llama3"}, {"prompt": "messages"}, "llama3"),
    ({"type": "chat_template.default", "field_messages": "prompt", "field_chosen": "good"}, {"chosen": "good"}, None),
    ({"type": "chat_template.argilla_chat"}, {}, None),
    ({"type": "passthrough"}, {}, None),
]


@pytest.mark.parametrize(("entry", "columns", "template"), PREFERENCES, ids=str)
def test_dpo_is_carried_with_the_data_sets_that_ours_reads(
    tmp_path: Path, entry: dict[str, Any], columns: dict[str, str], template: str | None
) -> None:
    values = LEAST | {"rl": "dpo", "rl_beta": 0.3, "sequence_len": 700, "datasets": [{"path": "/pairs.jsonl", **entry}]}
    imported = convert(values, processes=1)
    config = composed(imported, tmp_path)
    assert (config.train.objective, config.train.beta) == ("dpo", 0.3)
    assert (config.data.format, dict(config.data.columns), config.data.template) == ("preference", columns, template)
    assert (config.data.sequence_length, config.data.train_on) == (1400, "assistant")
    assert "sequence_len" in reported(imported, "changed")
    assert not reported(imported, "refused")


@pytest.mark.parametrize(
    ("keys", "settings", "changed"),
    [
        ({"rl": "dpo", "dpo_label_smoothing": 0.1}, {"beta": 0.1, "label_smoothing": 0.1}, set()),
        ({"rl": "dpo", "rpo_alpha": 0.5}, {"beta": 0.1, "sft_weight": 0.5}, {"rpo_alpha"}),
        ({"rl": "ipo", "rl_beta": 0.2}, {"beta": 0.2}, set()),
        ({"rl": "orpo", "orpo_alpha": 0.2}, {"beta": 0.2}, {"rl"}),
        ({"rl": "orpo", "adapter": None, "load_in_4bit": False}, {"beta": 0.1}, {"rl"}),
        ({"rl": "simpo", "cpo_alpha": 0}, {"beta": 0.1, "target_margin": 0.5, "sft_weight": 0.0}, set()),
        (
            {"rl": "simpo", "rl_beta": 2.5, "simpo_gamma": 1},
            {"beta": 2.5, "target_margin": 1, "sft_weight": 1},
            {"cpo_alpha"},
        ),
    ],
    ids=str,
)
def test_objectives_of_pairs_have_the_settings_that_trl_would_have(
    tmp_path: Path, keys: dict[str, Any], settings: dict[str, float], changed: set[str]
) -> None:
    entry = {"path": "/pairs.jsonl", "type": "chat_template.argilla" if keys["rl"] == "orpo" else "passthrough"}
    imported = convert(LEAST | keys | {"datasets": [entry]}, processes=1)
    train = composed(imported, tmp_path).train
    assert train.objective == keys["rl"]
    names = ("beta", "label_smoothing", "target_margin", "sft_weight")
    assert {name: value for name in names if (value := getattr(train, name)) is not None} == settings
    assert {key.partition("=")[0] for key in reported(imported, "changed")} - {"sequence_len"} >= changed
    assert not reported(imported, "refused")


@pytest.mark.parametrize(
    ("entry", "format", "columns", "template"),
    [
        ({"type": "chatml.intel"}, "alpaca", {"instruction": "question", "output": "completion"}, "chatml"),
        ({"type": "llama3.ultra"}, "alpaca", {"instruction": "prompt", "output": "completion"}, "llama3"),
        ({"type": "chatml.argilla_chat"}, "chat", {"messages": "completion"}, "chatml"),
        ({}, "prompt_completion", {}, None),
        (
            {"type": {"field_prompt": "q", "field_label": "good"}},
            "prompt_completion",
            {"prompt": "q", "label": "good"},
            None,
        ),
    ],
    ids=str,
)
def test_kto_is_carried_with_the_data_sets_that_ours_reads(
    tmp_path: Path, entry: dict[str, Any], format: str, columns: dict[str, str], template: str | None
) -> None:
    values = LEAST | {"rl": "kto", "rl_beta": 0.2, "kto_undesirable_weight": 0.5, "micro_batch_size": 4}
    imported = convert(values | {"datasets": [{"path": "/judged.jsonl", **entry}]}, processes=1)
    config = composed(imported, tmp_path)
    train = config.train
    assert (train.objective, train.beta, train.desirable_weight, train.undesirable_weight) == ("kto", 0.2, None, 0.5)
    assert (config.data.format, dict(config.data.columns), config.data.template) == (format, columns, template)
    assert not reported(imported, "refused")
    odd = {"path": "/judged.jsonl", "type": {"prompt_format": "Q: {prompt}"}}
    assert "datasets[0].type" in reported(convert(values | {"datasets": [odd]}, processes=1), "refused")


def test_dpo_data_sets_and_losses_that_ours_has_not_are_named(tmp_path: Path) -> None:
    entries = [
        {"path": "/a.jsonl", "type": "chatml.intel"},
        {"path": "/c.jsonl", "type": "chat_template.default", "message_property_mappings": {"role": "who"}},
    ]
    values = LEAST | {"rl": "dpo", "datasets": entries, "dpo_use_weighting": True, "rl_adapter_ref_model": True}
    imported = convert(values, processes=1)
    refused = reported(imported, "refused")
    assert {"datasets[0].type", "datasets[1].message_property_mappings"} <= set(refused)
    assert any(key.startswith("dpo_use_weighting") for key in reported(imported, "unsupported"))
    assert any(key.startswith("rl_adapter_ref_model") for key in reported(imported, "idle"))
    assert composed(imported, tmp_path).train.beta == 0.1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rl": "bco"}, "rl=bco: distlora imports rl: dpo, ipo, orpo, simpo"),
        ({"rl": "ipo", "adapter": None, "load_in_4bit": False}, "rl=ipo without an adapter"),
        ({"reward_model": True}, "reward_model=True"),
        ({"adapter": "llama-adapter"}, "adapter=llama-adapter"),
        ({"base_model": None}, "base_model is not set"),
        ({"learning_rate": None}, "learning_rate is not set"),
        ({"lora_r": None}, "lora_r"),
        ({"lora_target_linear": False}, "add lora_target_linear: true"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not a number"),
        ({"micro_batch_size": 1.5}, "micro_batch_size=1.5 is not a whole number"),
        ({"sample_packing": "perhaps"}, "is not true or false"),
        ({"special_tokens": ["a"]}, "is not a mapping"),
    ],
)
def test_what_cannot_be_imported_is_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as raised:
        convert(LEAST | given, processes=1)
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "arguments are required: axolotl, FILE.yaml; `distlora import --help` shows the usage"),
        (["axolotl", "absent.yml"], "No such file"),
        (["unsloth", "x.yml"], "cannot import 'unsloth'"),
        (["axolotl", "{file}", "--processes", "0"], "--processes 0"),
        (["axolotl", "{tools}", "--processes", "3"], "3 GPUs: the file shares each sequence among 2"),
        (["axolotl", "{file}", "--out", "x.yaml"], "a folder named recipe"),
        (["axolotl", "{file}", "--out", "recipe/x y.yaml"], "cannot follow recipe="),
        (["axolotl", "{file}", "--out", "recipe/qlora.yaml"], "distlora's own recipe"),
        (["axolotl", "{file}", "--outt", "x"], "there is no option --outt (did you mean '--out'?)"),
        (["axolotl", "{file}", "--out", "/proc/recipe/x.yaml"], "--out=/proc/recipe: cannot write in /proc"),
    ],
)
def test_a_wrong_command_line_says_what_to_type(arguments: list[str], expected: str) -> None:
    file = str(GOLDEN / "mistral_7b_qlora.yml")
    tools = str(GOLDEN / "tool_use_chat.yml")
    with pytest.raises(UserError) as raised:
        main([word.format(file=file, tools=tools) for word in arguments])
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "is not YAML"),
        ("a: 2024-13-45", "is not YAML"),
        ("- a", "holds no settings"),
        ("", "holds no settings"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        main(["axolotl", str(file)])


def test_settings_that_do_not_go_together_are_refused_by_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text(yaml.safe_dump(LEAST | {"streaming": True}))
    with pytest.raises(UserError, match=r"x\.yml has settings that distlora refuses: .*train\.max_steps"):
        main(["axolotl", str(file)])


def test_an_existing_recipe_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "recipe" / "mine.yaml"
    out.parent.mkdir()
    out.write_text("")
    with pytest.raises(UserError, match="exists"):
        main(["axolotl", str(GOLDEN / "mistral_7b_qlora.yml"), "--out", str(out)])


def test_text_that_looks_like_a_reference_stays_text(tmp_path: Path) -> None:
    config = composed(convert(LEAST | {"wandb_name": "a-${b}: c"}, processes=1), tmp_path)
    assert config.name == "a-${b}: c"


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


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"processor_type": "AutoProcessor"}, "processor_type=AutoProcessor"),
        ({"image_size": 512}, "image_size=512"),
        ({"qat": {"weight_dtype": "int4"}}, "qat"),
        ({"plugins": ["axolotl.integrations.spectrum.SpectrumPlugin"]}, "plugins: SpectrumPlugin"),
        ({"plugins": ["my.own.Plugin"]}, "plugins: Plugin"),
        ({"nvfp4_merge_aware": True}, "nvfp4_merge_aware"),
        ({"use_eaft": True}, "use_eaft"),
        ({"relora": True}, "relora"),
        ({"lisa_n_layers": 4}, "lisa_n_layers=4"),
        ({"diffusion_steps": 128}, "diffusion_steps=128"),
        ({"unfrozen_parameters": ["model.layers.4[0-9]"]}, "unfrozen_parameters=[model.layers.4[0-9]]"),
        ({"model_config": {"rope_theta": 1}}, "model_config.rope_theta=1"),
    ],
)
def test_other_training_is_never_without_effect(given: dict[str, Any], key: str) -> None:
    """Vision, quantization-aware training and plugins that train are lost by name; `train` refuses such a file."""
    assert lost(import_settings(LEAST | given)) == [key]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"use_tensorboard": True}, {"names": ("tensorboard",)}),
        ({"use_swanlab": True, "swanlab_project": "a", "swanlab_workspace": "b"}, {"project": "a", "entity": "b"}),
        ({"wandb_project": "a", "use_mlflow": True}, {"names": ("wandb", "mlflow"), "project": "a"}),
        ({"wandb_project": "a", "wandb_mode": "disabled"}, {"names": ()}),
    ],
)
def test_trackers(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    tracker = composed(import_settings(LEAST | given), tmp_path).tracker
    assert {name: getattr(tracker, name) for name in expected} == expected


def test_a_secret_is_not_printed() -> None:
    imported = import_settings(LEAST | {"use_swanlab": True, "swanlab_project": "a", "swanlab_api_key": "s3cret"})
    assert "swanlab_api_key" in reported(imported, "changed")
    assert "s3cret" not in report(imported, source=Path("x.yml"), out=None)


def test_what_trains_in_axolotl_too_is_imported(tmp_path: Path) -> None:
    given = {
        "eot_tokens": ["<|eot|>"],
        "neftune_noise_alpha": 5,
        "dataset_exact_deduplication": True,
        "num_epochs": 0.5,
    }
    watchdog = {"loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 4}
    imported = import_settings(LEAST | given | watchdog)
    config = composed(imported, tmp_path)
    assert (config.data.eot_tokens, config.data.deduplicate) == (("<|eot|>",), True)
    assert (config.train.neftune_alpha, config.train.epochs, config.train.loss_watchdog_patience) == (5.0, 0.5, 4)
    assert not lost(imported)


@pytest.mark.slow
@pytest.mark.skipif("AXOLOTL" not in os.environ, reason="AXOLOTL is not set to a checkout of Axolotl 067b021")
def test_most_examples_of_axolotl_import_and_compose(tmp_path: Path) -> None:
    """Of 213 examples, 191 compose and 133 lose nothing; the others are vision, other objectives, QAT and the like."""
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
        other = re.search(r"^(processor_type|qat|use_eaft|relora|reinit_weights|nvfp4_merge_aware): *\S*", text, re.M)
        assert other is None or lost(imported), path
    assert (composes, complete) == (191, 133)
