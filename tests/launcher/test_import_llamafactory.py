"""`distlora train llamafactory.yaml`: what the file and dataset_info.json meant is written out, the rest is named."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.config import UserError
from distlora_launcher.compose.checks import check_parallel
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.importing import import_settings, main, tool_of
from distlora_launcher.importing.recipe import Imported
from distlora_launcher.importing.settings_file import with_file
from support.imports import composed, lost, reported

LEAST: dict[str, Any] = {
    "model_name_or_path": "/model",
    "stage": "sft",
    "do_train": True,
    "dataset": "chats",
    "neat_packing": True,
    "learning_rate": "2e-4",
}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
CHAT: dict[str, Any] = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
SETS: dict[str, dict[str, Any]] = {
    "chats": CHAT | {"file_name": "chats.jsonl", "tags": TAGS},
    "gpt": {"hf_hub_url": "org/gpt", "formatting": "sharegpt", "subset": "en", "split": "test"},
    "alpaca": {"file_name": "alpaca.jsonl", "columns": {"prompt": "q", "response": "a", "system": "s"}},
    "text": {"file_name": "text.txt", "columns": {"prompt": "text"}},
    "pairs": {
        "file_name": "p.jsonl",
        "ranking": True,
        "columns": {"prompt": "question", "chosen": "b", "rejected": "c"},
    },
    "judged": CHAT | {"file_name": "j.jsonl", "tags": TAGS, "columns": {"messages": "messages", "kto_tag": "good"}},
    "seen": CHAT | {"file_name": "i.jsonl", "tags": TAGS, "columns": {"messages": "messages", "images": "images"}},
    "heard": CHAT | {"file_name": "a.jsonl", "tags": TAGS, "columns": {"messages": "messages", "audios": "audios"}},
    "odd": CHAT | {"file_name": "o.jsonl", "tags": TAGS | {"user_tag": "asker"}, "formating": "x"},
    "plain": {"file_name": "."},
    "script": {"script_url": "org/script"},
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(SETS))
    Path("data/chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    return tmp_path


def imported_from(given: dict[str, Any]) -> Imported:
    return import_settings(LEAST | given, tool="llamafactory")


CARRIED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # (keys beside LEAST, settings of the run)
    ({}, {"adapter.r": 8, "adapter.lora_alpha": 16, "adapter.target_modules": "linears", "optim.schedule": "linear"}),
    ({}, {"train.global_batch": 8, "train.epochs": 3, "train.save_every": 500, "quant.method": "none"}),
    ({"quantization_bit": 4, "lora_target": "q_proj, v_proj"}, {"quant.method": "nf4", "adapter.target_modules": "qv"}),
    ({"lora_rank": 4, "pissa_init": True, "additional_target": "lm_head"}, {"adapter.init": "pissa_niter_16"}),
    ({"finetuning_type": "full", "adam_beta2": 0.95}, {"adapter.method": "full", "optim.betas": (0.9, 0.95)}),
    ({"max_steps": 100, "warmup_steps": 10, "lr_scheduler_type": "cosine"}, {"optim.warmup_steps": 10}),
    (
        {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 50},
        {"train.eval_every": 50, "data.eval_fraction": 0.1},
    ),
    ({"report_to": "wandb,swanlab"}, {"tracker.names": ("wandb", "swanlab")}),
    ({"train_on_prompt": True, "add_tokens": "<a>,<b>"}, {"data.train_on": "all", "model.new_tokens": ("<a>", "<b>")}),
    ({"template": "qwen3_nothink", "mask_history": True}, {"data.template": "qwen3_nothink", "data.train_on": "last"}),
    ({"dataset": "gpt"}, {"data.path": "org/gpt", "data.format": "sharegpt", "data.name": "en", "data.split": "test"}),
    ({"dataset": "gpt", "max_samples": 5}, {"data.split": "test[:5]"}),
    ({"dataset": "a/b", "dataset_dir": "ONLINE"}, {"data.path": "a/b", "data.format": "alpaca"}),
    ({"dataset": "alpaca"}, {"data.columns": {"instruction": "q", "output": "a", "system": "s"}}),
    ({"eval_steps": 10, "val_size": 0.1, "evaluation_strategy": "steps"}, {"train.eval_every": 10}),
    ({"pissa_init": "false", "fp16": "false", "disable_gradient_checkpointing": "false"}, {"adapter.init": "kaiming"}),
    ({"disable_gradient_checkpointing": "false"}, {"train.checkpointing": "block"}),
    ({"dataset": "text", "stage": "pt", "packing": False, "neat_packing": False}, {"data.too_long": "truncate"}),
    ({"dataset": "alpaca", "stage": "pt"}, {"data.format": "text", "data.too_long": "split"}),
    ({"dataset": "text", "stage": "pt"}, {"data.sample_by": "line", "data.columns": {}}),
    ({"dataset": "pairs", "stage": "dpo", "cutoff_len": 700}, {"train.objective": "dpo", "data.sequence_length": 1400}),
    ({"dataset": "pairs", "stage": "dpo", "pref_loss": "simpo"}, {"train.target_margin": 0.5, "train.beta": 0.1}),
    ({"dataset": "pairs", "stage": "dpo", "pref_ftx": 0.5}, {"data.columns": {"chosen": "b", "rejected": "c"}}),
    ({"dataset": "pairs", "stage": "rm"}, {"train.objective": "reward", "data.too_long": "drop"}),
    ({"dataset": "judged", "stage": "kto", "kto_rejected_weight": 2}, {"data.columns": {"label": "good"}}),
    ({"dataset": "seen", "image_max_pixels": 9999}, {"data.image_max_pixels": 9999, "data.image_min_pixels": 1024}),
    ({"dataset": "seen", "freeze_vision_tower": True}, {"data.images": True, "data.image_max_pixels": 589_824}),
]


@pytest.mark.parametrize(("given", "expected"), CARRIED, ids=str)
def test_what_a_key_means_is_carried_into_the_run(given: dict[str, Any], expected: dict[str, Any], place: Path) -> None:
    imported = imported_from(given)
    assert not lost(imported)
    assert not reported(imported, "unknown")
    config = composed(imported, place)
    assert {name: config.value_of(name) for name in expected} == expected


def test_several_data_sets_become_a_mixture(place: Path) -> None:
    mixture = {"dataset": "chats,alpaca", "mix_strategy": "interleave_under", "interleave_probs": "0.7,0.3"}
    data = composed(imported_from(mixture), place).data
    assert [(Path(source.path).name, source.weight) for source in data.sources] == [
        ("chats.jsonl", 0.7),
        ("alpaca.jsonl", 0.3),
    ]
    assert data.stopping_strategy == "first_exhausted"


NAMED: list[tuple[dict[str, Any], str, str]] = [
    # (keys beside LEAST, the group of the report, the key that it names)
    ({"lora_rnak": 3}, "unknown", "lora_rnak"),
    ({"lora_r": 3}, "unknown", "lora_r"),
    ({"use_galore": True}, "unsupported", "use_galore"),
    ({"freeze_vision_tower": False}, "refused", "freeze_vision_tower=false"),
    ({"dataset": "seen", "finetuning_type": "full"}, "refused", "finetuning_type=full"),
    ({"dataset": "seen", "additional_target": "lm_head"}, "refused", "additional_target=[lm_head]"),
    ({"dataset": "heard"}, "refused", "dataset heard: audios"),
    ({"dataset": "odd"}, "refused", "dataset odd: formating"),
    ({"dataset": "odd"}, "refused", "dataset odd: tags"),
    ({"quantization_bit": 4, "double_quantization": False}, "unsupported", "double_quantization=False"),
    ({"quantization_bit": 3}, "unsupported", "quantization_bit=3"),
    ({"template": "moss_vl"}, "unsupported", "template=moss_vl"),
    ({"template": "qwen3"}, "changed", "template=qwen3"),
    ({"packing": True, "neat_packing": False}, "changed", "packing=true"),
    ({"packing": False, "neat_packing": False, "stage": "pt"}, "changed", "packing=false"),
    ({"neat_packing": False}, "changed", "packing (not set)"),
    ({"dataset": "text", "stage": "pt", "neat_packing": False}, "changed", "stage=pt"),
    ({"dataset": "plain", "stage": "pt"}, "refused", "dataset plain: columns"),
    ({"quantization_bit": 8}, "changed", "quantization_bit=8"),
    ({"adapter_name_or_path": "/a,/b"}, "unsupported", "adapter_name_or_path=/a, /b"),
    ({"max_samples": 1}, "idle", "max_samples=1"),
    ({"dataset": "plain", "max_samples": 1}, "unsupported", "max_samples=1"),
    ({"eval_dataset": "alpaca"}, "unsupported", "eval_dataset=alpaca"),
    ({"dataset": "pairs", "stage": "dpo", "pref_loss": "hinge"}, "unsupported", "pref_loss=hinge"),
]


@pytest.mark.parametrize(("given", "group", "key"), NAMED, ids=str)
def test_what_ours_cannot_do_is_named(given: dict[str, Any], group: str, key: str) -> None:
    assert key in reported(imported_from(given), group)


def test_a_new_adapter_does_not_start_from_the_others() -> None:
    imported = imported_from({"adapter_name_or_path": "/a", "create_new_adapter": True})
    assert "init_from" not in imported.settings["adapter"]
    assert [note.reason for note in imported.notes if note.key == "adapter_name_or_path=/a"] == [
        "merge /a into the base (`distlora merge`) and set model.path to the result"
    ]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"finetuning_type": "oft"}, "finetuning_type=oft: only lora and full"),
    ({"stage": "ppo"}, "stage=ppo: distlora imports pt, sft, rm, dpo and kto"),
    ({"do_train": False}, "do_train is not true"),
    ({"dataset": None}, "dataset is not set"),
    ({"dataset": "chat"}, "dataset=chat: data/dataset_info.json does not describe it (did you mean 'chats'?)"),
    ({"dataset": "script"}, "dataset_info.json names neither hf_hub_url nor file_name"),
    ({"dataset_dir": "REMOTE:org/sets"}, "download it, and set dataset_dir to the folder"),
    ({"lora_rank": "big"}, "lora_rank='big' is not a number"),
    ({"save_steps": float("inf")}, "save_steps=inf is not a number"),
    ({"dataset": "pairs", "stage": "dpo", "finetuning_type": "full"}, "stage=dpo with finetuning_type: full"),
]


@pytest.mark.parametrize(("given", "expected"), REFUSED, ids=str)
def test_what_cannot_be_imported_is_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        imported_from(given)


def test_a_file_trains_and_imports_by_the_command_line(capsys: pytest.CaptureFixture) -> None:
    Path("mine.yaml").write_text(yaml.safe_dump(LEAST))
    config = compose_config(with_file(["mine.yaml", "cluster.gpus_per_node=2"], "distlora train"))
    assert (config.train.global_batch, config.data.format, config.optim.lr) == (16, "chat", 2e-4)
    assert "mine.yaml (LLaMA-Factory), for 2 GPUs: " in capsys.readouterr().err
    assert main(["llamafactory", "mine.yaml"]) == 0
    assert "# Imported from mine.yaml (LLaMA-Factory), for 1 GPU." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif("LLAMAFACTORY" not in os.environ, reason="LLAMAFACTORY is not set to a checkout of ff6d4d1")
def test_most_examples_of_llamafactory_import_and_compose(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 55 examples that train, 46 import and compose, and 32 lose nothing."""
    monkeypatch.chdir(os.environ["LLAMAFACTORY"])
    counts = {"trains": 0, "composes": 0, "complete": 0}
    for path in sorted(Path("examples").rglob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        if tool_of(values) != "llamafactory" or not values.get("do_train"):
            continue
        counts["trains"] += 1
        try:
            imported = import_settings(path, tool="llamafactory")
        except UserError:
            continue
        config = composed(imported, place)
        check_parallel(config.parallel, config.cluster.ranks)
        assert not reported(imported, "unknown"), path
        counts["composes"] += 1
        counts["complete"] += not lost(imported)
    assert counts == {"trains": 55, "composes": 46, "complete": 32}
