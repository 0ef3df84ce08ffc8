"""GRPO: losses and gradients equal TRL 1.16.0's trainer; rollouts, their receipt, and what a resume continues from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distlora.checkpoint.state import load_state
from distlora.checkpoint.verify import verify
from distlora.config import UserError
from distlora.config.file import load_config
from distlora.data.files import read_file, write_parquet
from distlora.data.rows import open_split
from distlora.generation.remote import ServerError
from distlora.loading.peft_format import adapter_tensors
from distlora.parallel import Ranks
from distlora.run_folder.layout import (
    EVAL_ANSWERS_NAME,
    ROLLOUT_NAME,
    ROLLOUTS_NAME,
    answers_file,
    answers_files,
    path_before,
    steps,
)
from distlora.training.objectives import GRPO, MismatchError
from distlora.training.rollout_files import AnswerFiles, notable_answers
from distlora.training.rollouts import RewardsFailedError, advantages_of, pack_answers
from distlora.training.sampled_answers import Rollout
from distlora.training.setup import start_adapters, start_run_model
from distlora.training.worker import trained_parameters
from distlora_launcher.compose.checks import check_model
from distlora_launcher.launch import failures
from support import cpu_paths, runs
from support.closeness import adapter_of, assert_adapters_close, assert_close, assert_losses_close, assert_same_run
from support.family_models import SINGLE
from support.low_bit_checkpoints import CHECKPOINTS, convert_folder
from support.peft_models import write_adapter
from support.small_models import make_run, read_metrics, tokenizer, write_model_folder
from support.tiers import ci
from support.trl_models import Theirs, move_adapters, their_model
from support.vllm_server import serving
from support.worlds import World

GROUP, MOST = 4, 12


def questions(count: int = 12) -> list[dict[str, Any]]:
    """Return prompts whose answers are one letter, with columns for rewards."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    prompts = [f"{words[number % 6]} {'very ' * (number // 6)}:" for number in range(count)]
    return [{"prompt": prompt, "answer": "abgdez"[n % 6], "n": n} for n, prompt in enumerate(prompts)]


def grpo_run(run_dir: Path, folders: Path, model: str = "llama", **sections: Any) -> Any:
    """Prepare a run on these prompts."""
    data = run_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(record) + "\n" for record in questions()))
    given = {
        "data": {"path": str(data), "sequence_length": 64, "eval_fraction": 0.2, "rewards": ["exact_match"]},
        "rollout": {"num_generations": GROUP, "max_new_tokens": MOST},
        "train": {"objective": "grpo", "max_steps": 4, "global_batch": 12, "micro_batch": 2, "dtype": "fp32"},
    }
    merged = {name: {**given.get(name, {}), **sections.get(name, {})} for name in given.keys() | sections.keys()}
    return make_run(run_dir, folders, model, **merged)


VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "dapo": ({"epsilon_high": 0.28}, 0.0),
    "dapo-kl": ({"mask_truncated_completions": True}, 0.3),
    "grpo-kl": ({"loss_type": "grpo", "use_bias_correction_kl": False}, 0.04),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, 0.0),
    "gspo-kl": ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05}, 0.1),
    "temperature-kl": ({"temperature": 0.7}, 0.1),
}


def made_rollout(
    prompts: list[list[int]], vocabulary: int, written: Callable[[np.ndarray], np.ndarray] | None = None
) -> Rollout:
    """Return answers of random tokens and lengths; a third of them was cut off. `written`: of lengths (N,)."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, MOST + 1, len(prompts) * GROUP)
    answers = [draw.integers(0, vocabulary, length).tolist() for length in lengths]
    return Rollout(
        step=np.array(0),
        prompt_lengths=np.array([len(prompts[index // GROUP]) for index in range(len(answers))]),
        lengths=lengths,
        written=np.ones(lengths.sum(), np.int64) if written is None else written(lengths),
        tokens=np.concatenate([[*prompts[index // GROUP], *answer] for index, answer in enumerate(answers)]),
        logps=np.zeros(lengths.sum(), np.float32),
        ended=(draw.random(len(answers)) > 0.3).astype(np.int64),
        rewards=draw.integers(0, 4, (len(answers), 1)).astype(np.float64),
        failed=np.zeros(len(answers), np.int64),
    )


def test_answers_take_the_places_of_others() -> None:
    made = made_rollout([[1, 2], [3]], 50), made_rollout([[4], [5, 6, 7]], 50)
    draw = np.random.default_rng(1)
    first, others = (dataclasses.replace(each, logps=draw.random(len(each.logps))) for each in made)
    places, chosen = np.arange(4), np.arange(4, 8)
    joined = first.with_answers(places, others, chosen)
    for rollout, numbers, now in ((others, chosen, places), (first, np.arange(4, 8), np.arange(4, 8))):
        ends, logp_ends = np.cumsum(rollout.prompt_lengths + rollout.lengths), np.cumsum(rollout.lengths)
        found_ends, found_logp_ends = np.cumsum(joined.prompt_lengths + joined.lengths), np.cumsum(joined.lengths)
        for number, place in zip(numbers, now, strict=True):
            size, length = rollout.prompt_lengths[number] + rollout.lengths[number], rollout.lengths[number]
            assert joined.lengths[place] == length
            assert joined.rewards[place] == rollout.rewards[number]
            assert joined.ended[place] == rollout.ended[number]
            found = joined.tokens[found_ends[place] - size : found_ends[place]]
            assert found.tolist() == rollout.tokens[ends[number] - size : ends[number]].tolist()
            found = joined.logps[found_logp_ends[place] - length : found_logp_ends[place]]
            assert found.tolist() == rollout.logps[logp_ends[number] - length : logp_ends[number]].tolist()


def padded(rows: list[np.ndarray], *, left: bool = False) -> torch.Tensor:
    most = max(map(len, rows))
    gaps = [(most - len(row), 0) if left else (0, most - len(row)) for row in rows]
    return torch.from_numpy(np.stack([np.pad(row, gap) for row, gap in zip(rows, gaps, strict=True)]))


def of_dialogues(lengths: np.ndarray) -> np.ndarray:
    """Return 1 for each token of answers (N,) that the model wrote, its first ones; a quarter is the environment's."""
    written = (np.random.default_rng(2).random(lengths.sum()) > 0.25).astype(np.int64)
    written[np.cumsum(lengths) - lengths] = 1
    return written


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_losses_and_gradients_equal_trls_without_an_environments_tokens(
    folders: Path, tmp_path: Path, quant: str
) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    grpo_run(tmp_path / "run", folders, quant={"method": quant}, train={"beta": 0.1})
    config = load_config(tmp_path / "run")
    model, backend, _ = start_run_model(config, SINGLE)
    trained = trained_parameters(model)
    start_adapters(model, config.spec, backend, config.train, restores=False)
    move_adapters(model)
    tuned, parameters = their_model(folders / "llama", model, config.spec)
    rows = open_split(tmp_path / "run", "train")
    assert rows is not None
    prompts = [rows.tokens[row, : rows.targets[row] + 1].tolist() for row in range(3)]
    rollout = made_rollout(prompts, model.vocabulary.rows, of_dialogues)
    own = np.split(rollout.written, np.cumsum(rollout.lengths)[:-1])
    assert rollout.written_lengths.tolist() == [row.sum() for row in own]
    assert rollout.written.mean() < 0.9, "an environment wrote some of the tokens"
    wholes = np.split(rollout.tokens, np.cumsum(rollout.prompt_lengths + rollout.lengths)[:-1])
    asked = [whole[:size] for whole, size in zip(wholes, rollout.prompt_lengths, strict=True)]
    answered = [whole[size:] for whole, size in zip(wholes, rollout.prompt_lengths, strict=True)]
    inputs = {
        "prompt_ids": padded(asked, left=True),
        "prompt_mask": padded([np.ones_like(row) for row in asked], left=True),
        "completion_ids": padded(answered),
        "completion_mask": padded([np.ones_like(row) for row in answered]),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    theirs = Theirs(tuned, [{"prompt": record["prompt"]} for record in questions()], tmp_path / "trl", [])
    totals = rollout.totals(())
    for name, (settings, beta) in VARIANTS.items():
        chosen = dataclasses.replace(config.rollout, **settings)
        train = dataclasses.replace(config.train, beta=beta)
        size = {"per_device_train_batch_size": len(rollout), "num_generations": GROUP, "max_completion_length": MOST}
        trl = {**settings, "beta": beta, **size}
        arguments = GRPOConfig(**theirs.arguments(**{"loss_type": "dapo"} | trl))
        trainer = GRPOTrainer(
            model=tuned,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_list(theirs.records),
            processing_class=tokenizer(),
        )
        trainer.current_gradient_accumulation_steps = 1
        if "ref" in tuned.peft_config:  # A copy of the adapter as it is now; the reference is the base without one.
            tuned.delete_adapter("ref")
        size_of = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            logps = trainer._get_per_token_logps_and_entropies(tuned, ids, mask, size_of)[0]
            with tuned.disable_adapter():
                reference = trainer._get_per_token_logps_and_entropies(tuned, ids, mask, size_of)[0]
        # Far enough from the present ones that a third of the ratios is clipped.
        old = logps + 0.25 * torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
        kept = padded(own)
        if chosen.mask_truncated_completions:
            kept = kept * torch.from_numpy(rollout.ended)[:, None]
        advantages = advantages_of(totals, GROUP, chosen.scale_rewards)
        expected = trainer._compute_loss(
            tuned,
            {
                **inputs,
                "completion_mask": inputs["completion_mask"],
                "tool_mask": kept,
                "advantages": torch.from_numpy(advantages),
                "old_per_token_logps": old,
                "ref_per_token_logps": reference,
                "num_items_in_batch": kept.sum(),
            },
        )
        for parameter in parameters.values():
            parameter.grad = None
        expected.backward()

        flat = np.concatenate([old[index, :length].numpy() for index, length in enumerate(rollout.lengths)])
        ours = dataclasses.replace(rollout, logps=flat.astype(np.float32))
        packed = pack_answers(
            ours, np.arange(len(ours)), totals, chosen, sequence_length=64, pad=0, with_kl=train.needs.reference
        )
        assert len(packed) > 1, "several answers in several rows"
        batch = packed.micro_batch(np.array([*range(len(packed)), -1]), 0)
        objective = GRPO(train, chosen)
        for parameter in trained.values():
            parameter.grad = None
        losses = objective.losses(model, batch, SINGLE.device, 0)
        loss = losses.rows.sum() / packed.num_labels
        loss.backward()
        # The advantages of a group cancel, so the rounding is that of terms of about 1.
        assert_losses_close([1 + loss.item()], [1 + expected.item()], relative=1e-6)
        for parameter, tensor in adapter_tensors(model).items():
            assert_close(tensor.grad, parameters[parameter].grad, ulps=84)  # 1e-5
        clipped = losses.figures[1:3].sum().item() / packed.num_labels
        assert 0.05 < clipped < 0.9, f"{name} clips {clipped:.0%}, which says little"


def test_advantages_are_of_groups_and_leave_out_what_has_no_reward() -> None:
    totals = np.array([1.0, 0.0, np.nan, 2.0, 5.0, 5.0, 5.0, 5.0])
    plain = advantages_of(totals, 4, "none")
    assert plain.tolist() == [0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert np.allclose(advantages_of(totals, 4, "group")[:4], [0, -1 / 1.0001, 0, 1 / 1.0001])
    spread = np.nanstd(totals, ddof=1)
    assert np.allclose(advantages_of(totals, 4, "batch")[:4], np.array([0, -1, 0, 1]) / (spread + 1e-4))


RUN: dict[str, Any] = {
    "data": {"rewards": ["regex"], "reward_constants": {"pattern": "[aeiou]{2}"}, "reward_processes": 1},
    "rollout": {"steps_per_generation": 2, "num_iterations": 2, "max_logprob_difference": 1e-5},
    "train": {"max_steps": 6, "save_every": 1, "keep": 9, "eval_every": 3, "beta": 0.05},
}
"""Two rollouts, the second used by half; random weights write two vowels in a few of their answers."""


FREE = 8e4
"""Bytes of free memory of the runs: room for six answers at once."""


run_until = functools.partial(runs.run_until, free=FREE)


@pytest.fixture(scope="module")
def whole(world: World, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on one rank that was never stopped."""
    run_dir = tmp_path_factory.mktemp("grpo") / "run"
    grpo_run(run_dir, folders, **RUN)
    world.run(1, run_until, run_dir=run_dir)
    return run_dir


def of_steps(run_dir: Path) -> list[dict[str, Any]]:
    """Return the metrics of the training steps, without those of time."""
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    times = {"time", "tokens_per_second", "rollout/seconds", "peak_memory_bytes"}
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def test_sampled_answers_are_kept_with_their_rewards(whole: Path) -> None:
    import pyarrow.parquet

    assert list(answers_files(whole / ROLLOUTS_NAME)) == [1, 5]
    logged = {line["step"]: line for line in of_steps(whole)}
    for first, path in answers_files(whole / ROLLOUTS_NAME).items():
        columns = pyarrow.parquet.read_table(path).to_pydict()
        count, rewards = len(columns["step"]), columns["reward"]
        assert {*columns["step"]} == {first}
        assert columns["group"] == [number // GROUP for number in range(count)]
        assert count == {1: 24, 5: 16}[first], "the epoch ends in the second"
        known = {record["prompt"] for record in questions()}
        assert all(any(text in prompt for text in known) for prompt in columns["prompt"])
        assert rewards == columns["rewards/regex"]
        assert rewards == [float(re.search("[aeiou]{2}", text) is not None) for text in columns["completion"]]
        assert np.mean(rewards) == pytest.approx(logged[first]["reward"])
        assert np.mean(columns["tokens"]) == pytest.approx(logged[first]["completions/mean_length"])
        assert np.mean(columns["ended"]) == pytest.approx(1 - logged[first]["completions/clipped_ratio"])
        assert columns["advantage"] == pytest.approx(advantages_of(np.array(rewards), GROUP, "group").tolist())
        assert not any(columns["failed"])


def test_only_the_newest_files_of_answers_are_kept_and_a_resume_removes_later_ones(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    files = AnswerFiles(folder, 2, done=0, writes=True)
    for first in (1, 5, 9):
        files.write(first, {"step": [first], "group": [0], "completion": ["a"], "reward": np.array([np.nan])})
    assert list(answers_files(folder)) == [5, 9]
    assert files.before(9) == [{"step": 5, "group": 0, "completion": "a"}]
    write_parquet(answers_file(folder, 7), {"step": [7]})
    with pytest.raises(UserError, match="has rows without 'group' or 'completion'"):
        files.before(9)
    answers_file(folder, 7).unlink()
    assert files.before(5) == []
    assert AnswerFiles(folder, 0, done=9, writes=True).before(9) == []
    AnswerFiles(folder, 2, done=8, writes=False)
    assert list(answers_files(folder)) == [5, 9]
    AnswerFiles(folder, 0, done=8, writes=True)
    assert list(answers_files(folder)) == [5]


def test_the_best_worst_and_most_changed_answers_are_found() -> None:
    rewards = np.array([0.5, 0.0, 1.0, np.nan, 0.25, 0.5])
    columns = {"group": np.arange(6), "reward": rewards, "completion": list("abcdef")}
    before = [{"group": 0, "reward": 0.0, "completion": "x"}, {"group": 1, "reward": 0.75, "completion": "y"}]
    before += [{"group": 2, "reward": 0.9, "completion": "c"}, {"group": 4, "completion": "no reward"}]
    rows = notable_answers(columns, before, list("ABCDEF"))
    found = [(row["category"], row["prompt"], row["text"], row["reward"]) for row in rows]
    assert found == [
        *(("best", "C", "c", 1.0), ("best", "F", "f", 0.5), ("worst", "B", "b", 0.0), ("worst", "E", "e", 0.25)),
        *(("changed", "B", "b", 0.0), ("changed", "A", "a", 0.5)),
    ]
    assert [(row["before"], row["reward_before"]) for row in rows[4:]] == [("y", 0.75), ("x", 0.0)]
    equal = columns | {"reward": np.full(6, 0.5)}
    assert [row["category"] for row in notable_answers(equal, before[:1], list("ABCDEF"))] == ["changed"]


def test_a_run_counts_staleness_and_its_first_steps_have_the_samplers_probabilities(whole: Path) -> None:
    steps = of_steps(whole)
    assert [line["rollout/staleness"] for line in steps] == [0, 1, 2, 3, 0, 1]
    for line in steps:
        if line["rollout/staleness"] == 0:
            assert 0 < line["rollout/logprob_difference_mean"] <= line["rollout/logprob_difference_max"] < 1e-5
            assert line["clip_ratio/low_mean"] == line["clip_ratio/high_mean"] == 0
        else:
            assert line["rollout/logprob_difference_max"] > 1e-5, "the weights have not moved"
        assert line["reward"] == line["rewards/regex/mean"]
        assert 0 < line["reward"] < 1
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl"] > 0
    evaluations = [line for line in read_metrics(whole) if "eval_reward" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert all(line["eval_loss"] == -line["eval_reward"] for line in evaluations)
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    firsts = [sample["step"] for sample in samples if "category" not in sample]
    assert firsts == sorted([0, 3, 6] * (len(firsts) // 3))
    assert list(answers_files(whole / EVAL_ANSWERS_NAME)) == [0, 3, 6]
    best = [sample for sample in samples if sample.get("category") == "best"]
    assert best
    assert all(re.search("[aeiou]{2}", sample["text"]) and sample["reward"] == 1 for sample in best)
    assert {sample["step"] for sample in samples if sample.get("category") == "changed"} == {3, 6}


@pytest.mark.parametrize("stop_before", [ci(1), ci(4), 5])
def test_a_killed_run_goes_on_with_the_same_answers_and_bits(
    world: World, folders: Path, tmp_path: Path, whole: Path, stop_before: int
) -> None:
    grpo_run(tmp_path / "run", folders, **RUN)
    world.run(1, run_until, run_dir=tmp_path / "run", stop_before=stop_before)
    saved = tmp_path / "run" / "checkpoints" / f"step_{stop_before:08d}" / ROLLOUT_NAME
    assert saved.is_file() == (stop_before % 4 > 0), "a rollout is saved while steps need it"
    # Other rows at once would round otherwise.
    world.run(1, run_until, run_dir=tmp_path / "run", free=10 * FREE)
    assert_same_run(tmp_path / "run", whole)
    states = [load_state(steps(run_dir / "checkpoints")[-1]) for run_dir in (tmp_path / "run", whole)]
    assert states[0].progress.sampling == states[1].progress.sampling is not None
    assert 0 < states[0].progress.sampling.blocks < 10
    assert of_steps(tmp_path / "run") == of_steps(whole)
    for name, count in ((ROLLOUTS_NAME, 2), (EVAL_ANSWERS_NAME, 3)):
        files = [answers_files(run_dir / name).values() for run_dir in (tmp_path / "run", whole)]
        written = [[path.read_bytes() for path in paths] for paths in files]
        assert written[0] == written[1]
        assert len(written[0]) == count
    assert (tmp_path / "run/samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def sampled_groups(run_dir: Path, first: int) -> list[list[tuple[str, str, float]]]:
    """Return (prompt, answer, reward) of each group of a rollout."""
    rows = [record.value for record in read_file(answers_file(run_dir / ROLLOUTS_NAME, first), "", "auto")]
    answers = [(row["prompt"], row["completion"], row["reward"]) for row in rows]
    return [answers[index : index + GROUP] for index in range(0, len(answers), GROUP)]


def test_groups_with_equal_rewards_make_room_for_other_prompts(world: World, folders: Path, tmp_path: Path) -> None:
    def run(name: str, ranks: int = 1, *, tries: int = 2, stop_before: int | None = None, **train: Any) -> Path:
        sections = RUN | {"rollout": RUN["rollout"] | {"max_resamples": tries}, "train": RUN["train"] | train}
        sections["data"] = RUN["data"] | {"reward_constants": {"pattern": "w"}}
        grpo_run(tmp_path / name, folders, **sections)
        world.run(ranks, run_until, run_dir=tmp_path / name, stop_before=stop_before)
        return tmp_path / name

    plain, whole = run("plain", tries=0, max_steps=1), run("whole")
    before, after = sampled_groups(plain, 1), sampled_groups(whole, 1)
    replaced = [number for number, group in enumerate(after) if group != before[number]]
    assert replaced
    assert len(replaced) == of_steps(whole)[0]["rollout/replaced_groups"]
    asked = {group[0][0] for group in before}
    for number in replaced:
        assert len({reward for *_, reward in before[number]}) == 1
        assert len({reward for *_, reward in after[number]}) == 2
        assert len({prompt for prompt, *_ in after[number]} - asked) == 1
    equal = [of_steps(run_dir)[0]["frac_reward_zero_std"] for run_dir in (plain, whole)]
    assert equal[1] == pytest.approx(equal[0] - len(replaced) / len(before))
    assert "rollout/replaced_groups" not in of_steps(plain)[0]
    assert sampled_groups(run("ranks", 2, max_steps=1), 1) == after
    killed = run("killed", stop_before=5)
    world.run(1, run_until, run_dir=killed)
    assert_same_run(killed, whole)
    assert of_steps(killed) == of_steps(whole)


def test_verify_finds_no_fault_in_a_run_and_answers_that_are_cut_off(whole: Path, tmp_path: Path) -> None:
    assert [(item.name, item.message) for item in verify(whole) if item.state == "damaged"] == []
    assert any(item.name.startswith("checkpoints/") and item.state == "ok" for item in verify(whole))
    assert "40 answers in 2 files" in [item.message for item in verify(whole)]
    shutil.copytree(whole, tmp_path / "run")
    path = answers_file(tmp_path / "run" / ROLLOUTS_NAME, 5)
    path.write_bytes(path.read_bytes()[:-100])
    assert [item.name for item in verify(tmp_path / "run") if item.state == "damaged"] == [f"rollouts/{path.name}"]


UNEVEN: dict[str, Any] = {
    "data": RUN["data"] | {"eval_fraction": 0.45},
    "rollout": {"max_logprob_difference": 1e-5},
    "train": {"max_steps": 3, "global_batch": 8, "eval_every": 3, "beta": 0.05},
}
"""Rollouts of 2 prompts and 8 answers, which three ranks do not divide."""


@pytest.mark.parametrize("sections", [RUN, ci(UNEVEN)], ids=["even", "uneven"])
def test_three_ranks_sample_and_learn_what_one_does(
    world: World, folders: Path, tmp_path: Path, whole: Path, sections: dict[str, Any]
) -> None:
    grpo_run(tmp_path / "run", folders, **sections)
    world.run(3, run_until, run_dir=tmp_path / "run")
    alone = whole if sections is RUN else tmp_path / "alone"
    if sections is UNEVEN:
        held_out = open_split(tmp_path / "run", "eval")
        assert held_out is not None
        assert len(held_out) % 3, "three ranks divide the held-out prompts"
        grpo_run(alone, folders, **sections)
        world.run(1, run_until, run_dir=alone)

    ours, expected = of_steps(tmp_path / "run"), of_steps(alone)
    for name in ("reward", "completions/mean_length", "rewards/failed", "target_tokens"):
        assert [line[name] for line in ours] == [line[name] for line in expected]
    rewards = [[line.get("eval_reward") for line in read_metrics(run)] for run in (tmp_path / "run", alone)]
    assert rewards[0] == rewards[1]
    assert_adapters_close(adapter_of(tmp_path / "run"), adapter_of(alone))


KEPT = {"gptq": "gptq-v2-32", "awq": "awq-32", "nvfp4": "ct-nvfp4", "int4": "ct-int4", "bnb-nf4": "bnb-nf4"}
"""Bases that ship low bits, by their entry in low_bit_checkpoints.py."""
BASES = ("fp32", "bf16", "nf4", "mixed", *KEPT)
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": False, "lora_alpha": 8.0},
    "rslora": {},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "pissa_niter_4": {"init": "pissa_niter_4"},
    "loftq": {"init": "loftq"},
    "gaussian": {"init": "gaussian"},
    "ranks": {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {"q_proj": 20}, "target_modules": "attention"},
    "init_from": {},
}
REFUSED = {
    **{("pissa", base): "pissa" for base in KEPT},
    **{("pissa_niter_4", base): "pissa_niter_4" for base in KEPT},
    **{("loftq", base): "loftq" for base in BASES if base != "nf4"},
}
"""Combinations that the settings or the model refuse, and the value that the message names."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a base, made at the first use."""
    root = tmp_path_factory.mktemp("bases")

    @functools.cache
    def make(base: str) -> Path:
        if base not in KEPT:
            dense = root / "dense"
            write_model_folder(dense, "llama", intermediate_size=192)
            return dense
        convert_folder(make("dense"), root / base, CHECKPOINTS[KEPT[base]][1])
        return root / base

    return make


@pytest.mark.parametrize(
    ("adapter", "base"),
    [
        pair if place % 27 == 0 else pytest.param(*pair, marks=pytest.mark.slow if place % 5 else pytest.mark.ci)
        for place, pair in enumerate(itertools.product(ADAPTERS, BASES))
    ],
)
def test_each_adapter_and_base_samples_as_it_trains(
    folders: Path, tmp_path: Path, bases: Callable[[str], Path], adapter: str, base: str
) -> None:
    """The second rollout is of an adapter that has changed: its sampler must have it as training does."""
    folder = bases("dense" if base not in KEPT else base)
    quant: dict[str, Any] = {"method": {"nf4": "nf4", "mixed": "mixed"}.get(base, "keep" if base in KEPT else "none")}
    if base == "mixed":
        names = safetensors.torch.load_file(folder / "model.safetensors")
        projections = [name for name in names if "_proj" in name]
        quant["formats"] = {"int8": projections[::3], "fp8_block": projections[1::3]}  # And NF4.
    given = {"r": 4} | ADAPTERS[adapter]
    if adapter == "init_from":
        start = write_adapter(tmp_path / "start", bases("dense"), std=1.0, target_modules="all-linear")
        of_start = json.loads((start / "adapter_config.json").read_text())
        given |= {"init_from": str(start), "r": of_start["r"], "lora_alpha": float(of_start["lora_alpha"])}
        given |= {"use_rslora": of_start["use_rslora"], "target_modules": sorted(of_start["target_modules"])}
    sections: dict[str, Any] = {
        "quant": quant,
        "adapter": given,
        "data": RUN["data"] | {"eval_fraction": 0.0},
        "rollout": {"max_logprob_difference": 0.2 if base == "bf16" else 1e-5},
        "train": {"max_steps": 2, "beta": 0.05, "dtype": "bf16" if base == "bf16" else "fp32"},
        "optim": {"schedule": "constant", "warmup_ratio": 0.0},
    }
    if (adapter, base) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[adapter, base]):
            check_model(grpo_run(tmp_path / "run", folders, str(folder), **sections))
        return
    grpo_run(tmp_path / "run", folders, str(folder), **sections)
    check_model(load_config(tmp_path / "run"))
    run_until(SINGLE, run_dir=tmp_path / "run")
    steps = of_steps(tmp_path / "run")
    assert [line["rollout/staleness"] for line in steps] == [0, 0]
    assert all(line["grad_norm"] > 1e-3 for line in steps)
    assert steps[1]["kl"] > 0


def test_a_run_whose_training_differs_from_its_sampler_fails(folders: Path, tmp_path: Path) -> None:
    grpo_run(tmp_path / "run", folders, **{**RUN, "rollout": {"max_logprob_difference": 1e-9}})
    with pytest.raises(MismatchError, match=r"step 1: training computes log-probabilities that differ from the"):
        run_until(SINGLE, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("max_steps", "max_failed", "data", "message"),
    [
        (6, 2, {"rewards": ["mine.raises"]}, r"(?s)last 2 steps, up to step 2, .*Traceback .*ValueError: no such file"),
        ci(1, 3, {"rewards": ["mine.raises"]}, r"(?s)last step, up to step 1, .*line 2, in raises"),
        ci(3, 3, {"rewards": ["mine.none"]}, r"last 3 steps, .*\n.*each reward returned None"),
        (
            3,
            3,
            {"rewards": ["mine.one"], "reward_weights": [1e39]},
            r"step 3, .*\n.*weighted by .*\[1e\+39\], have a sum",
        ),
    ],
)
def test_a_run_without_rewards_fails(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_steps: int,
    max_failed: int,
    data: dict[str, Any],
    message: str,
) -> None:
    functions = ["def raises(**columns):\n    raise ValueError('no such file')", "def none(**columns): return [None]"]
    (tmp_path / "mine.py").write_text("\n".join([*functions, "def one(**columns): return [1.0]"]))
    monkeypatch.chdir(tmp_path)
    rollout = {"max_failed_steps": max_failed}
    grpo_run(
        tmp_path / "run", folders, data={**data, "reward_processes": 1}, rollout=rollout, train={"max_steps": max_steps}
    )
    with pytest.raises(RewardsFailedError, match=message):
        run_until(SINGLE, run_dir=tmp_path / "run")
    assert not any(
        name in line for line in read_metrics(tmp_path / "run") for name in ("reward", "frac_reward_zero_std")
    )
    assert not (tmp_path / "run" / "adapter").exists()
    assert "RewardsFailedError" in failures.REPEATING


BOUNDS = {("fp32", True): 0, ("bf16", True): 0, ("bf16", False): 0.2}
"""Most nats of a receipt in random weights, by dtype and `rollout.batch_invariant`."""


@pytest.mark.parametrize("path", cpu_paths.limited_to_each())
def test_each_cpu_path_samples_as_it_trains_and_batch_invariant_to_the_last_bit(
    folders: Path, tmp_path: Path, path: str
) -> None:
    """With what each compiles, in a process whose libraries are limited to it."""
    runs = {(dtype, exact): tmp_path / f"{dtype}-{exact}" for dtype, exact in BOUNDS}
    for (dtype, exact), run_dir in runs.items():
        train = RUN["train"] | {"dtype": dtype, "max_steps": 3, "global_batch": 8, "checkpointing": "none"}
        train["eval_every"] = None
        rollout = RUN["rollout"] | {"num_iterations": 1, "max_new_tokens": 6, "batch_invariant": exact}
        rollout["max_logprob_difference"] = None  # The bound is checked below.
        data = RUN["data"] | {"eval_fraction": 0.0}
        grpo_run(run_dir, folders, **{**RUN, "data": data, "train": train, "rollout": rollout})
    cpu_paths.run_limited(path, "runs", [(str(run_dir), FREE) for run_dir in runs.values()])
    for kind, run_dir in runs.items():
        assert path_before(run_dir) == path
        fresh = [line for line in of_steps(run_dir) if line["rollout/staleness"] == 0]
        receipts = [line["rollout/logprob_difference_max"] for line in fresh]
        assert len(receipts) == 2
        assert max(receipts) <= BOUNDS[kind]
        assert min(receipts) > 0 or BOUNDS[kind] == 0, "rounding differs where batches do"


@pytest.mark.ci
def test_on_policy_distillation_nears_its_teacher_and_resumes_within_a_rollout(
    world: World, folders: Path, tmp_path: Path
) -> None:
    teacher = write_adapter(tmp_path / "teacher", folders / "llama", std=1.0, target_modules="all-linear")
    sections: dict[str, Any] = {
        "data": {"rewards": []},
        "rollout": {"num_generations": 1, "steps_per_generation": 2},
        "train": {
            "objective": "on_policy_distill",
            "max_steps": 8,
            "save_every": 1,
            "keep": 9,
            "eval_every": 4,
            "teacher": str(teacher),
        },
        "optim": {"lr": 1e-2},
    }
    for name, stop in (("whole", None), ("killed", 3)):
        grpo_run(tmp_path / name, folders, **sections)
        world.run(1, run_until, run_dir=tmp_path / name, stop_before=stop)
    assert (tmp_path / "killed" / "checkpoints" / "step_00000003" / ROLLOUT_NAME).is_file()
    world.run(1, run_until, run_dir=tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    steps = of_steps(tmp_path / "whole")
    assert [line["loss"] for line in steps] == pytest.approx([line["divergence"] for line in steps])
    assert [line["rollout/staleness"] for line in steps] == [0, 1] * 4
    assert steps[-1]["divergence"] < 0.7 * steps[0]["divergence"]
    assert not any("reward" in name for line in steps for name in line)
    held_out = [line["eval_divergence"] for line in read_metrics(tmp_path / "whole") if "eval_loss" in line]
    assert len(held_out) == 3
    assert held_out[-1] < 0.7 * held_out[0]


@pytest.mark.parametrize("ranks", [1, ci(2)])
def test_a_vllm_server_samples_with_the_adapter_of_each_rollout(
    world: World, folders: Path, tmp_path: Path, ranks: int
) -> None:
    with serving(folders / "llama") as (url, server):
        settings = {"quant": {"method": "none"}, "rollout": RUN["rollout"] | {"url": url}}
        grpo_run(tmp_path / "run", folders, **{**RUN, **settings})
        world.run(ranks, run_until, run_dir=tmp_path / "run")
    name = "run-" + (tmp_path / "run" / "rollout_id.txt").read_text()
    assert len(name) == len("run-") + 16
    assert server.loaded == [f"{name}-{version}" for version in range(len(server.loaded))]
    assert len(server.loaded) == 5, "two rollouts and three evaluations"
    assert server.adapters == [], "the last version stays on the server"
    fresh = [line for line in of_steps(tmp_path / "run") if line["rollout/staleness"] == 0]
    # Products of another order, by transformers and PEFT; an adapter of an older version would be far off.
    assert all(line["rollout/logprob_difference_max"] < 1e-4 for line in fresh)
    assert fresh[1]["kl"] > 0


def fails_alike(ranks: Ranks, *, run_dir: Path) -> str:
    """Return the error of a run on this rank."""
    with pytest.raises(ServerError) as raised:
        run_until(ranks, run_dir=run_dir)
    return str(raised.value)


def test_a_server_that_fails_ends_the_run_on_every_rank(world: World, folders: Path, tmp_path: Path) -> None:
    with serving(folders / "llama") as (url, server):
        server.refuses = "/v1/load_lora_adapter"
        grpo_run(tmp_path / "run", folders, **{**RUN, "rollout": RUN["rollout"] | {"url": url}})
        first, second = world.run(2, fails_alike, run_dir=tmp_path / "run")
    assert "answers /v1/load_lora_adapter with 404" in first
    assert "the log of rank 0 says how" in second


def test_an_adapter_that_vllm_reads_otherwise_is_refused(folders: Path, tmp_path: Path) -> None:
    config = grpo_run(tmp_path / "run", folders, adapter={"use_dora": True})
    with serving(folders / "llama") as (url, _):
        served = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, url=url))
        with pytest.raises(UserError, match=r"vLLM would not sample with the adapter as trained: .*use_dora"):
            check_model(served)


def test_equal_prompts_with_other_columns_are_no_duplicates(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"prompt": "alpha:", "answer": answer} for answer in "abcaa"]
    monkeypatch.setitem(globals(), "questions", lambda: records)
    grpo_run(tmp_path / "run", folders, data={"eval_fraction": 0.0, "deduplicate": True})
    rows = open_split(tmp_path / "run", "train")
    assert rows is not None
    assert rows.records is not None
    assert [rows.records[row]["columns"]["answer"] for row in range(len(rows))] == ["a", "b", "c"]


def test_prompts_keep_their_columns_and_are_dropped_where_no_answer_fits(folders: Path, tmp_path: Path) -> None:
    grpo_run(tmp_path / "run", folders, data={"eval_fraction": 0.0}, rollout={"max_new_tokens": 57})
    rows = open_split(tmp_path / "run", "train")
    assert rows is not None
    assert rows.records is not None
    encode = tokenizer()
    lengths = [len(encode(record["prompt"], add_special_tokens=False).input_ids) for record in questions()]
    kept = [record for record, length in zip(questions(), lengths, strict=True) if length <= 7]
    assert 0 < rows.counts["dropped_long"] == len(lengths) - len(kept) < 12
    for row, record in enumerate(kept):
        assert rows.records[row] == {"prompt": record["prompt"], "columns": {k: record[k] for k in ("answer", "n")}}
        tokens = rows.tokens[row, : rows.targets[row] + 1].tolist()
        assert encode.decode(tokens, skip_special_tokens=True) == record["prompt"]
