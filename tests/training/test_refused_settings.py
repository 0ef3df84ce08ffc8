"""Settings of a run's training that exclude each other are refused with a reason, whatever the objective."""

from __future__ import annotations

from typing import Any

import pytest

from distlora.config import UserError
from support.small_models import config_with

BASES: dict[str, dict[str, dict[str, Any]]] = {
    "grpo": {
        "data": {"sequence_length": 64, "eval_fraction": 0.2, "rewards": ["exact_match"]},
        "rollout": {"num_generations": 4, "max_new_tokens": 12},
        "train": {"global_batch": 12},
    },
    "on_policy_distill": {"train": {"teacher": "folder"}},
}
"""Settings of an objective beside which the others are given."""

SAMPLES = {"train.sample_every": 2, "train.sample_prompts": ["Hi"]}
IMAGES = {"data.images": True}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # (objective, settings, what the message says)
    ("sft", {"adapter.r": 0}, r"adapter.r=0 is not a valid rank"),
    ("sft", {"train.beta": 0.2}, "train.beta=0.2 has no effect"),
    ("sft", {"train.teacher": "folder"}, "train.teacher=folder has no effect with train.objective=sft"),
    ("sft", {"data.format": "preference"}, "is data for train.objective=dpo"),
    ("rlhf", {}, "train.objective"),
    # Compared answers.
    ("dpo", {"adapter.method": "full", "quant.method": "none"}, "adapter=full trains the base itself"),
    ("dpo", {"model.new_tokens": ["<x>"]}, "model.new_tokens trains rows of the embedding or the head"),
    ("dpo", {"adapter.trainable_token_indices": [3]}, "indices trains rows of the embedding or the head"),
    ("dpo", {"train.router_aux_loss": 0.1}, "belongs to a per-token loss, not to train.objective=dpo"),
    ("dpo", {"data.format": "chat"}, "data.format=chat is data for train.objective=sft"),
    ("dpo", {"data.train_on": "all"}, "data.train_on=all has no effect"),
    ("dpo", {"data.too_long": "split"}, "set data.too_long=truncate or drop"),
    ("dpo", {"train.beta": 0.0}, "train.beta=0"),
    ("dpo", {"train.label_smoothing": 0.5}, "label_smoothing=0.5 must be from 0 to below 0.5"),
    ("dpo", {"train.center_rewards": 0.1}, "train.center_rewards=0.1 has no effect"),
    ("orpo", {"train.label_smoothing": 0.1}, "label_smoothing=0.1 has no effect with train.obj"),
    ("ipo", {"train.target_margin": 1.0}, "train.target_margin=1.0 has no effect"),
    ("simpo", {"train.sft_weight": -1.0}, "train.sft_weight=-1.0 must be 0 or more"),
    # Distillation and reward models.
    ("distill", {"train.beta": 1.5}, "train.beta=1.5 is not a fraction"),
    ("distill", {"train.kd_ratio": 2.0}, "train.kd_ratio=2.0 is not a fraction"),
    ("distill", {"adapter.modules_to_save": ["lm_head"]}, "trains rows of the emb"),
    ("distill", {"train.teacher": "t", "adapter.use_dora": True}, "use_dora=true changes the base's weights"),
    ("reward", {"adapter.method": "full", "quant.method": "none"}, "adapter=full: train.objective=reward trains"),
    ("reward", {"model.new_tokens": ["<x>"]}, "model.new_tokens: train.objective=reward trains adapters and the score"),
    ("reward", {"adapter.modules_to_save": ["lm_head"]}, "modules_to_save: train.objective=reward"),
    ("reward", {"train.sample_every": 2, "train.sample_prompts": ["Hi"]}, "train.sample_every=2 writes answers"),
    ("reward", {"train.beta": 0.1}, "train.beta=0.1 has no effect with train.objective=reward"),
    ("reward", {"data.format": "chat"}, "data.format=chat is data for train.objective=sft"),
    ("reward", {"data.format": "steps"}, "data.format=steps is data for train.objective=process_reward"),
    ("reward", {"data.step_separator": "|"}, r"data.step_separator='|' has no effect"),
    ("process_reward", {"data.train_on": "all"}, "data.train_on=all has no effect"),
    # Images.
    ("sft", {**IMAGES, "train.neftune_alpha": 5.0}, r"images=true with train\.neftune_alpha=5: embeddings of images"),
    ("sft", {**IMAGES, "model.new_tokens": ["<x>"]}, r"images=true with model\.new_tokens: embeddings of images"),
    ("sft", {**IMAGES, "adapter.trainable_token_indices": [7]}, r"images=true with adapter\.trainable_token_indices"),
    ("dpo", {**IMAGES, "adapter.modules_to_save": ["lm_head"]}, "trains rows of the embedding or the head"),
    ("sft", {**IMAGES, "adapter.method": "full", "quant.method": "none"}, r"images=true with adapter=full"),
    ("reward", IMAGES, r"images=true with train\.objective=reward: answers are judged from text alone; set"),
    ("process_reward", IMAGES, r"images=true with train\.objective=process_reward"),
    ("kto", IMAGES, r"images=true with train\.objective=kto"),
    ("sft", {**SAMPLES, "train.sample_images": ["a.png"]}, r"needs a run that takes images; set data.images=true"),
    ("sft", {**SAMPLES, "train.sample_images": ["", "a.png"]}, r"names 2 images for 1 prompts; name one for each"),
    ("grpo", IMAGES, r"images=true with train\.objective=grpo: answers are sampled from text alone"),
    # Sampled answers.
    ("grpo", {"rollout.batch_invariant": True, "rollout.temperature": 0.5}, r"set rollout.temperature=1"),
    ("grpo", {"rollout.batch_invariant": True, "train.compile": True}, r"train.compile=true with others"),
    ("grpo", {"rollout.url": "localhost:8000"}, r"rollout.url=localhost:8000 is not an address"),
    ("grpo", {"rollout.url": "http://me:hunter2@here:8000"}, r"^((?!hunter2).)*the server's key as VLLM_API_KEY$"),
    ("grpo", {"rollout.url": "http://here:8000?key=hunter2"}, r"^((?!hunter2).)*the server's key as VLLM_API_KEY$"),
    ("grpo", {"rollout.eval_temperature": 0.5, "data.eval_fraction": 0.0}, r"=0.5 needs held-out prompts; set data"),
    ("grpo", {"rollout.num_generations": 5}, r"num_generations=5 does not divide the 12 answers"),
    ("grpo", {"rollout.max_new_tokens": 63}, r"max_new_tokens=63 leaves no room for a prompt"),
    ("grpo", {"rollout.use_bias_correction_kl": False}, r"has no effect without a KL term"),
    ("grpo", {"adapter.lora_dropout": 0.1}, r"lora_dropout=0.1: the sampler has no dropout"),
    ("grpo", {"adapter.modules_to_save": ["lm_head"]}, r"modules_to_save: the sampler reads the embedding as it"),
    ("grpo", {"adapter.trainable_token_indices": [7]}, r"grpo with adapter.trainable_token_indices: the sampler"),
    ("grpo", {"adapter.method": "full", "quant.method": "none"}, r"adapter=full: the base must stay as it is"),
    ("grpo", {"data.too_long": "truncate"}, r"a prompt without its end asks something else"),
    ("grpo", {"data.format": "text"}, r"data.format=text is data for train.objective=sft"),
    ("on_policy_distill", {"rollout.epsilon": 0.3}, r"epsilon=0.3 has no effect with train.objective"),
    ("sft", {"rollout.num_generations": 4}, r"rollout.num_generations has no effect"),
    # Rewards.
    ("grpo", {"data.environment": "Game"}, "is not the name of a class of yours"),
    ("grpo", {"data.tools": ["price"]}, r"data.tools=\[price\] is not the name of a function"),
    ("grpo", {"data.tools": ["a.f", "b.f"]}, "has two functions named f"),
    ("grpo", {"data.tools": ["a.f"], "data.environment": "a.Game"}, "exclude each other"),
    ("grpo", {"data.tools": ["a.f"], "rollout.url": "http://localhost:8000"}, "only the run itself samples dialogues"),
    ("grpo", {"rollout.max_turns": 3}, "no effect without data.environment or data.tools"),
    ("dpo", {"data.environment": "a.Game"}, "and train.objective=dpo samples nothing"),
    ("grpo", {"data.rewards": []}, r"needs rewards; set data.rewards"),
    ("grpo", {"data.rewards": ["exact_mach"]}, r"is neither a built-in .* \(did you mean 'exact_match'\?\)"),
    ("grpo", {"data.rewards": ["a.b", "a.b"]}, "names a.b twice"),
    ("grpo", {"data.reward_weights": [1.0, 2.0]}, "has 2 numbers, and data.rewards 1 names"),
    ("grpo", {"data.reward_weights": [float("inf")]}, "inf is not a valid weight"),
    ("grpo", {"data.reward_weights": [0.0]}, r"weights=\[0.0\] gives each answer a total of 0"),
    ("grpo", {"data.reward_timeout": 0.0}, "reward_timeout=0.0 must be positive"),
    ("grpo", {"data.reward_memory_gb": 0.0}, "reward_memory_gb=0.0 must be positive"),
    ("grpo", {"data.reward_columns": {"anwser": "x"}}, r"\(did you mean 'answer'\?\)"),
    ("grpo", {"data.rewards": ["unit_tests"]}, "then add data.rewards_execute_code=true"),
    ("grpo", {"data.rewards_execute_code": True}, r"no effect without data.rewards=\[unit_tests\]"),
    ("grpo", {"data.rewards_isolation": "limits"}, r"no effect without data.rewards=\[unit_tests\]"),
    ("grpo", {"data.reward_folder": "/x"}, "reward_folder=/x has no effect without a function of yours"),
    ("sft", {"data.rewards": ["math"]}, "data.rewards scores answers .*train.objective=sft samples none"),
    ("sft", {"data.reward_weights": [1.0]}, "no effect without data.rewards"),
    ("sft", {"data.reward_timeout": 3.0}, "data.reward_timeout=3.0 has no effect without data.rewards"),
    # Lengths, evaluations, saves and optimizers.
    ("sft", {"train.eval_every": 5, "train.evals_per_epoch": 2}, "eval_every=5 both set .*recipe.*eval_every=null"),
    ("sft", {"train.save_every": 5, "train.saves_per_epoch": 2}, "saves_per_epoch=2 and train.save_every=5 both set"),
    ("sft", {"train.eval_every": "atuo"}, "train.eval_every='atuo' is not one of auto, .*did you mean 'auto'"),
    ("sft", {"train.eval_every": None, "train.load_best_at_end": True}, "needs evaluations during training"),
    ("sft", {"train.evals_per_epoch": 2, "data.eval_fraction": 0.0}, "evals_per_epoch=2 needs held-out documents"),
    ("sft", {"train.eval_every": 5, "data.eval_fraction": 0.0}, "train.eval_every=5 needs held-out documents"),
    ("sft", {"train.eval_documents": True, "data.eval_fraction": 0.0}, "eval_documents=True needs held-out documents"),
    ("sft", {"train.epochs": 0}, "train.epochs=0.0 must be positive"),
    ("sft", {"train.micro_batch": 9}, "train.micro_batch=9 is more than the sequences of a step, train.global_batch=8"),
    ("sft", {"train.loss_watchdog_patience": 2}, "has no effect without train.loss_watchdog_threshold"),
    ("sft", {"optim.warmup_steps": 9, "train.max_steps": 8}, r"warmup_steps=9 is more than train\.max_steps=8"),
    ("sft", {"optim.warmup_steps": 4, "optim.warmup_ratio": 0.03}, "warmup_ratio=0.03 both set the length"),
    ("sft", {"optim.schedule": "constant", "optim.min_lr_ratio": 0.5}, r"no effect with optim\.schedule=constant"),
    ("sft", {"optim.decay_ratio": 0.5}, "optim.decay_ratio=0.5 has no effect with optim.schedule=cosine"),
    (
        "sft",
        {"optim.schedule": "warmup_stable_decay", "optim.warmup_ratio": 0.6, "optim.decay_ratio": 0.5},
        "together are more than all steps",
    ),
]


@pytest.mark.parametrize(("objective", "settings", "message"), REFUSED, ids=str)
def test_settings_that_mean_nothing_are_refused(objective: str, settings: dict[str, Any], message: str) -> None:
    base = BASES.get(objective, {})
    sections = {name: dict(base.get(name, {})) for name in {*base, "model", "data", "train"}}
    sections["model"]["path"], sections["train"]["objective"] = "m", objective
    sections["data"]["path"] = "d"
    for setting, value in settings.items():
        section, _, name = setting.partition(".")
        sections.setdefault(section, {})[name] = value
    with pytest.raises(UserError, match=message):
        config_with(sections, {})
