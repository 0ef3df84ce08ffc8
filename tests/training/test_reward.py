"""Reward models: a score in place of the LM head. Losses, ranks and resumes are in test_objective_runs.py."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from distlora.checkpoint.verify import verify
from distlora.config import Config, UserError
from distlora.config.file import load_config
from distlora.data.loader import open_data
from distlora.data.rows import PackedRows, open_split
from distlora.loading.peft_format import adapter_tensors
from distlora.model.lm_head import LossForm
from distlora.post.combine import find_member
from distlora.post.trained import Name
from distlora.run_folder.layout import read_result
from distlora.training import worker as training_worker
from distlora.training.model_card import model_card
from distlora.training.objectives import RewardModel
from distlora.training.setup import StartOptions, start_adapters, start_run_model
from distlora_launcher.cli import generate
from distlora_launcher.compose.checks import check_model
from distlora_launcher.compose.compose import with_initial_adapter
from support import preference_data
from support.closeness import assert_losses_close
from support.family_models import SINGLE, edit_config
from support.planned import assert_disk_as_planned, traffic_of
from support.preference_data import documents_of
from support.runs import run_once
from support.small_models import make_run
from support.tiers import ci
from support.worlds import World


def prepare(
    run_dir: Path, folders: Path, preferences: Path, model: str = "llama", **sections: dict[str, Any]
) -> Config:
    train = {"objective": "reward"} | sections.pop("train", {})
    return preference_data.prepare(run_dir, folders, preferences, model, train=train, **sections)


@pytest.fixture(scope="module")
def alone(folders: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one rank."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    prepare(run_dir, folders, preferences, train={"micro_batch": 6, "checkpointing": "none", "save_every": 6})
    run_once(SINGLE, run_dir=run_dir)
    return run_dir


def test_the_folder_of_a_run_is_whole_and_its_card_says_how_to_load_it(alone: Path) -> None:
    assert [item for item in verify(alone) if item.state == "damaged"] == []
    assert_disk_as_planned(alone)
    card = model_card(read_result(alone), repository="me/it", base=None, license_of_base={})
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    assert "num_labels=1" in card
    assert "pipeline_tag: text-classification" in card


def in_peft(run_dir: Path, base: Path) -> Any:
    """Return the run's reward model as a user loads it."""
    settings = {"num_labels": 1, "dtype": torch.float32, "experts_implementation": "eager"}
    model = AutoModelForSequenceClassification.from_pretrained(base, **settings)
    return peft.PeftModel.from_pretrained(model, run_dir / "adapter").eval()


def our_scores(model: Any, ids: Tensor) -> Tensor:
    """Return the score of each token of one document (T,)."""
    return model(
        ids[None], torch.arange(len(ids))[None], torch.full_like(ids, -100)[None], losses=LossForm(by_token=True)
    )[0]


@pytest.mark.parametrize("base", ["llama", ci("gemma2"), ci("qwen3-moe")])
def test_peft_and_transformers_load_the_result_with_equal_rewards(
    folders: Path, preferences: Path, tmp_path: Path, base: str
) -> None:
    """Also with padding, which transformers leaves out of its rewards by config.pad_token_id."""
    from support.family_models import write_family_folder
    from support.small_models import tokenizer

    if not (folders / base).exists():
        write_family_folder(folders / base, base)
        tokenizer().save_pretrained(folders / base)
    run_dir = tmp_path / "run"
    prepare(run_dir, folders, preferences, base, train={"max_steps": 2, "micro_batch": 6}, quant={"method": "none"})
    training_worker.run(run_dir, SINGLE)
    config = load_config(run_dir)
    ours, backend, _ = start_run_model(config, SINGLE, StartOptions(training=False))
    start = config.with_settings({"adapter.init_from": str(run_dir / "adapter")})
    start_adapters(ours, start.spec, backend, start.train, restores=False)
    theirs = in_peft(run_dir, folders / base)
    theirs.config.get_text_config().pad_token_id = 0
    ids = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[1, 30:] = 0
    with torch.no_grad():
        rewards = theirs(ids, attention_mask=(ids != 0).long()).logits[:, 0]
        expected = torch.stack([our_scores(ours, ids[0])[39], our_scores(ours, ids[1, :30])[29]])
    assert rewards.abs().min() > 1e-3
    assert (rewards - expected).abs().max() < 1e-4


@pytest.mark.parametrize("pad", ["eos", None])
def test_the_reward_is_read_where_transformers_reads_it(
    folders: Path, preferences: Path, tmp_path: Path, pad: str | None
) -> None:
    """Where the end-of-text token is the padding too, that is before it."""
    from support.small_models import tokenizer

    shutil.copytree(folders / "llama", tmp_path / "llama")
    eos = tokenizer().eos_token_id
    edit_config(tmp_path / "llama", pad_token_id=eos if pad else None)
    config = prepare(tmp_path / "run", tmp_path, preferences, quant={"method": "none"})
    ours, _, _ = start_run_model(config, SINGLE)
    batch = open_data(tmp_path / "run", config.train, SINGLE)[0].batch(0)
    losses = sum(
        RewardModel(config.train, config.rollout).losses(ours, part, SINGLE.device, 0).rows.sum()
        for part in batch.micro_batches
    )
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "llama", num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        theirs.score.weight.copy_(ours.head.weight)
        documents = [ids for part in batch.micro_batches for ids, _ in documents_of(part)]
        assert all(ids[-1] == eos for ids in documents)
        rewards = torch.stack([theirs(ids[None]).logits[0, 0] for ids in documents])
        expected = -torch.nn.functional.logsigmoid(rewards[::2] - rewards[1::2]).sum()
    assert_losses_close([float(losses)], [float(expected)], relative=1e-5)


def test_a_run_starts_from_an_adapter_of_a_language_model_and_from_peft_s_reward_model(
    folders: Path, preferences: Path, tmp_path: Path
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folders / "llama", num_labels=1, dtype=torch.float32)
    lora = {"r": 8, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 16}
    peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", **lora)).save_pretrained(tmp_path / "reward")
    score = safetensors.torch.load_file(tmp_path / "reward" / "adapter_model.safetensors")[
        "base_model.model.score.weight"
    ]
    causal = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    causal |= {"task_type": "CAUSAL_LM", "modules_to_save": None}
    tensors = safetensors.torch.load_file(tmp_path / "reward" / "adapter_model.safetensors")
    del tensors["base_model.model.score.weight"]
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(causal))
    safetensors.torch.save_file(tensors, tmp_path / "sft" / "adapter_model.safetensors")
    starts = {}
    for name in ("reward", "sft"):
        config = prepare(tmp_path / f"run_{name}", folders, preferences)
        adapter = dataclasses.replace(config.adapter, init_from=str(tmp_path / name))
        config = dataclasses.replace(
            config, adapter=with_initial_adapter(adapter, [], quant=config.quant.method, labels=1)
        )
        check_model(config)
        model, backend, _ = start_run_model(config, SINGLE)
        start_adapters(model, config.spec, backend, config.train, restores=False)
        starts[name] = model.head.weight.detach()
        values = adapter_tensors(model)
        assert all(torch.equal(values[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(starts["reward"], score)
    assert not torch.equal(starts["sft"], score)
    assert 0.8 < starts["sft"].std() / model.hf_config.initializer_range < 1.2
    sft = config.with_settings({"train.objective": "sft", "adapter.init_from": str(tmp_path / "reward")})
    with pytest.raises(UserError, match=r"is a model of rewards: .* replaces its LM head, .*train.objective=reward"):
        with_initial_adapter(sft.adapter, [], quant=sft.quant.method)
    with pytest.raises(UserError, match="it predicts no tokens"):
        Name(place=str(tmp_path / "reward"), base=str(folders / "llama")).read()


def test_commands_for_language_models_name_the_reward_model(alone: Path) -> None:
    with pytest.raises(UserError, match=r"trained a reward model \(train.objective=reward\).*eval_rewards/accuracies"):
        Name(place=str(alone)).read()
    with pytest.raises(UserError, match=r"trained a reward model"):
        generate.main([str(alone)])
    with pytest.raises(UserError, match=r"is a model of rewards"):
        find_member(str(alone), 1.0)


def margins_of(rows: PackedRows) -> list[float]:
    assert rows.margins is not None
    return sorted(rows.margins[np.arange(rows.margins.shape[1])[None] < rows.pairs[:, None]].tolist())


def test_margins_go_with_their_pairs(folders: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": f"Question {number}:", "chosen": " yes", "rejected": " no" * (1 + number % 5), "margin": number / 4}
        for number in range(20)
    ]
    lines[7]["margin"] = None
    del lines[8]["margin"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"path": str(tmp_path / "pairs.jsonl"), "sequence_length": 64, "eval_fraction": 0.0}
    for objective in ("reward", "dpo"):
        make_run(tmp_path / objective, folders, data=data, train={"objective": objective})
    rows, without = (open_split(tmp_path / objective, "train") for objective in ("reward", "dpo"))
    assert rows is not None
    assert without is not None
    assert without.margins is None
    assert margins_of(rows) == sorted(number / 4 if number not in (7, 8) else 0.0 for number in range(20))
    order = np.arange(len(rows))[::-1]
    assert np.array_equal(rows.take(order).margins, rows.margins[order])  # type: ignore[index]
    for bad in ("0.5", True, math.nan, [1]):
        lines[3]["margin"] = bad
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(UserError, match=r"pairs.jsonl:4: 'margin' is"):
            make_run(tmp_path / f"bad {bad}", folders, data=data, train={"objective": "reward"})


def write_steps(path: Path, **changes: Any) -> dict[str, Any]:
    """Write 60 answers of one to three steps, of which those in capitals are wrong. Return settings of the data."""
    lines = []
    for number in range(60):
        labels = [(number + place) % 2 == 0 for place in range(1 + number % 3)]
        steps = [f"step {place} is fine" if right else f"STEP {place} IS NOT" for place, right in enumerate(labels)]
        lines.append({"prompt": f"Question {number}:", "completions": steps, "labels": labels})
    lines[1] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(path), "sequence_length": 96, "eval_fraction": 0.2}


def test_steps_are_labelled_at_the_last_token_of_their_separator(folders: Path, tmp_path: Path) -> None:
    data = write_steps(tmp_path / "steps.jsonl") | {"eval_fraction": 0.0}
    found = {}
    for train_on in ("assistant", "last"):
        settings = {"objective": "process_reward", "global_batch": 60}
        config = make_run(tmp_path / train_on, folders, data=data | {"train_on": train_on}, train=settings)
        batch = open_data(tmp_path / train_on, config.train, SINGLE)[0].batch(0)
        labels = torch.cat([part.labels for part in batch.micro_batches])
        before = torch.cat([part.input_ids for part in batch.micro_batches])[labels >= 0]
        assert len(set(before.tolist())) == 1, "each is the line break behind a step"
        assert batch.global_targets == int((labels >= 0).sum())
        found[train_on] = (int((labels == 1).sum()), int((labels == 0).sum()))
    every = [[(number + place) % 2 == 0 for place in range(1 + number % 3)] for number in range(60)]
    assert found["assistant"] == (sum(map(sum, every)), sum(map(len, every)) - sum(map(sum, every)))
    assert found["last"] == (sum(labels[-1] for labels in every), 60 - sum(labels[-1] for labels in every))
    for change in ({"labels": [True]}, {"labels": [True, 2]}, {"completions": ["a", ""]}, {"completions": "a"}):
        write_steps(tmp_path / "bad.jsonl", **change)
        with pytest.raises(UserError, match=r"bad.jsonl:2: .*a good line: "):
            make_run(
                tmp_path / f"bad{change}", folders, data=data | {"path": str(tmp_path / "bad.jsonl")}, train=settings
            )


def test_a_process_reward_model_on_two_ranks_learns_and_loads_in_peft(
    world: World, folders: Path, tmp_path: Path
) -> None:
    run_dir, settings = tmp_path / "run", {"objective": "process_reward", "micro_batch": 3, "accumulate": "block"}
    data, none = write_steps(tmp_path / "steps.jsonl"), {"method": "none"}
    config = make_run(run_dir, folders, data=data, train=settings, quant=none)
    metrics = world.run(2, run_once, run_dir=run_dir)[0]
    first, last = (line for line in metrics if "eval_loss" in line)
    assert last["eval_loss"] < first["eval_loss"] - 0.1
    assert last["eval_labels/accuracies"] > 0.8
    assert metrics[-2]["reduced_bytes"] == traffic_of(config, world=2).reduced
    assert_disk_as_planned(run_dir, 2)
    start = config.with_settings({"adapter.init_from": str(run_dir / "adapter")})
    ours, backend, _ = start_run_model(start, SINGLE, StartOptions(training=False))
    start_adapters(ours, start.spec, backend, start.train, restores=False)
    base = AutoModelForTokenClassification.from_pretrained(folders / "llama", num_labels=2, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, run_dir / "adapter").eval()
    ids = torch.randint(5, 1000, (30,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids[None]).logits[0] - our_scores(ours, ids)).abs().max() < 1e-4
    assert ours.head.bias is not None
    assert ours.head.bias.abs().max() > 0
