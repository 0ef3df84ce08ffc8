"""Reward models as rewards of GRPO: their scores are PEFT's and transformers', on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from distlora.config import DataConfig, UserError
from distlora.config.documents import refused_in_data
from distlora.rewards.models import check_reward_models, weights_digests
from distlora.run_folder.layout import ROLLOUTS_NAME, answers_files
from distlora.training import worker
from support import preference_data
from support.closeness import adapter_of, assert_adapters_close
from support.family_models import SINGLE
from support.planned import plan_of_run
from support.runs import run_once
from support.small_models import make_run, read_metrics, tokenizer
from support.worlds import World, start_world

PROMPTS = [f"{word} is" for word in ("alpha", "beta", "gamma", "delta")]
TOLERANCE = 1e-5
"""Largest difference of two scores of one answer in fp32: rows of other lengths sum in another order."""


@pytest.fixture(scope="module")
def models(folders: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a run that trained a reward model on `llama`, and a classifier of its own."""
    folder = tmp_path_factory.mktemp("rewards")
    train = {"objective": "reward", "max_steps": 2, "micro_batch": 6}
    preference_data.prepare(folder / "run", folders, preferences, train=train, quant={"method": "none"})
    worker.run(folder / "run", SINGLE)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        folders / "llama", num_labels=1, dtype=torch.float32
    )
    classifier.save_pretrained(folder / "classifier")
    tokenizer().save_pretrained(folder / "classifier")
    return {"quality": str(folder / "run"), "other": str(folder / "classifier")}


def grpo_run(run_dir: Path, folders: Path, models: dict[str, str], **sections: Any) -> Any:
    data = run_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    rewards = {"rewards": ["quality", "regex", "other"], "reward_constants": {"pattern": "[aeiou]"}}
    more = {"reward_models": models, "reward_digests": weights_digests(models), "reward_processes": 1}
    return make_run(
        run_dir,
        folders,
        data={"path": str(data), "sequence_length": 64, "eval_fraction": 0.0, **rewards, **more},
        quant=sections.pop("quant", {"method": "none"}),
        rollout={"num_generations": 3, "max_new_tokens": 12},
        train={"objective": "grpo", "max_steps": 2, "global_batch": 9, "micro_batch": 2, "dtype": "fp32"},
        **sections,
    )


def answers_of(run_dir: Path) -> list[dict[str, Any]]:
    files = answers_files(run_dir / ROLLOUTS_NAME)
    return [row for path in files.values() for row in pyarrow.parquet.read_table(path).to_pylist()]


def test_scores_are_pefts_and_transformers_on_one_rank_and_on_two(
    world: World, folders: Path, models: dict[str, str], tmp_path: Path
) -> None:
    """The first steps have the sampler's probabilities."""
    runs = {ranks: tmp_path / f"ranks{ranks}" for ranks in (1, 2)}
    for ranks, run_dir in runs.items():
        grpo_run(run_dir, folders, models)
        world.run(ranks, run_once, run_dir=run_dir)
    alone, shared = map(answers_of, runs.values())
    settings = {"num_labels": 1, "dtype": torch.float32}
    base = AutoModelForSequenceClassification.from_pretrained(folders / "llama", **settings)
    theirs = {
        "quality": peft.PeftModel.from_pretrained(base, Path(models["quality"]) / "adapter").eval(),
        "other": AutoModelForSequenceClassification.from_pretrained(models["other"], dtype=torch.float32),
    }
    words, spread = tokenizer(), dict[str, list[float]]()
    assert len(alone) == len(shared) == 12
    for ours, again in zip(alone, shared, strict=True):
        prompt = next(text for text in PROMPTS if text in ours["prompt"])
        ids = {
            "quality": words(prompt).input_ids + words(ours["completion"]).input_ids + [words.eos_token_id],
            "other": words(prompt + ours["completion"]).input_ids,
        }
        assert ours["completion"] == again["completion"]
        for name, model in theirs.items():
            with torch.no_grad():
                expected = float(model(torch.tensor([ids[name]])).logits[0, 0])
            spread.setdefault(name, []).append(expected)
            assert abs(ours[f"rewards/{name}"] - expected) < TOLERANCE
            assert abs(ours[f"rewards/{name}"] - again[f"rewards/{name}"]) < TOLERANCE
        total = sum(ours[f"rewards/{name}"] for name in ("quality", "regex", "other"))
        assert ours["reward"] == pytest.approx(total, abs=1e-6)
    planned = plan_of_run(runs[1], 1).device.held["rewards"]
    weights = sum(parameter.nbytes for parameter in theirs["other"].parameters())
    adapter = (Path(models["quality"]) / "adapter/adapter_model.safetensors").stat().st_size
    assert planned == pytest.approx(weights + adapter, rel=0.02)
    assert all(max(scores) - min(scores) > 1e3 * TOLERANCE for scores in spread.values())
    for run_dir in runs.values():
        assert all(line["rollout/logprob_difference_max"] < 1e-4 for line in read_metrics(run_dir) if "loss" in line)


def test_zero3_samples_scores_and_learns_what_fsdp2_does(
    world: World, folders: Path, models: dict[str, str], tmp_path: Path
) -> None:
    runs = {backend: tmp_path / backend for backend in ("fsdp2", "zero3")}
    with start_world(2, regroups=True) as alone:  # DeepSpeed broadcasts within the default group.
        for backend, run_dir in runs.items():
            grpo_run(run_dir, folders, models, quant={"cache": False}, parallel={"backend": backend})
            (world if backend == "fsdp2" else alone).run(2, run_once, run_dir=run_dir)
    ours, theirs = map(answers_of, runs.values())
    texts = [[row["completion"] for row in rows] for rows in (ours, theirs)]
    assert texts[0] == texts[1]
    assert [row["reward"] for row in ours] == pytest.approx([row["reward"] for row in theirs], abs=TOLERANCE)
    assert_adapters_close(adapter_of(runs["fsdp2"]), adapter_of(runs["zero3"]))


def test_reward_models_that_a_run_cannot_use_are_refused(folders: Path, models: dict[str, str], tmp_path: Path) -> None:
    from distlora.architecture.config_checks import check_config, read_config

    config = grpo_run(tmp_path / "run", folders, models)
    architecture = check_config(read_config(folders / "llama"), folders / "llama", sequence_length=64)

    def refusal(**settings: Any) -> str:
        changed = config.with_settings({f"data.{name}": value for name, value in settings.items()})
        with pytest.raises(UserError) as error:
            check_reward_models(changed.data, changed.spec, architecture)
        return str(error.value)

    check_reward_models(config.data, config.spec, architecture)
    assert "data.reward_memory_gb=1" in refusal(reward_memory_gb=1e-9)
    assert "has other weights than when the run began" in refusal(reward_digests={"quality": "0" * 64})
    assert "hf download org/name" in refusal(reward_models={"quality": "org/name"})
    assert "LlamaForCausalLM with 2 outputs" in refusal(reward_models={"quality": str(folders / "llama")})
    assert "which makes no reward model" in refusal(reward_models={"quality": str(tmp_path / "run")})
    assert "holds no run, no adapter" in refusal(reward_models={"quality": str(tmp_path)})
    copied = tmp_path / "adapter"
    shutil.copytree(Path(models["quality"]) / "adapter", copied)
    narrow = config.with_settings({"adapter.target_modules": "qv", "data.reward_models": {"quality": str(copied)}})
    dora = config.with_settings({"adapter.use_dora": True})
    with pytest.raises(UserError, match=r"adapter.use_dora=true changes the base"):
        check_reward_models(dora.data, dora.spec, architecture)
    with pytest.raises(UserError, match=r"set adapter.target_modules=all-linear"):
        check_reward_models(narrow.data, narrow.spec, architecture)


@pytest.mark.parametrize(
    ("rewards", "models", "words"),
    [
        (["regex"], {"quality": "/x"}, "has no effect without quality in data.rewards"),
        (["regex"], {"regex": "/x"}, "regex is a built-in reward"),
        (["quality"], {}, "set data.reward_models={quality: FOLDER}"),
    ],
)
def test_names_of_reward_models_are_checked(rewards: list[str], models: dict[str, str], words: str) -> None:
    data = DataConfig(path="-", rewards=tuple(rewards), reward_models=models)
    assert any(words in sentence for sentence in refused_in_data(data))
