"""Each setting is read, and those that decide results change them: none is accepted without effect."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.config import Config, UserError
from distlora.config.sweep import SweepConfig
from distlora.training import worker
from support.closeness import adapter_of
from support.family_models import SINGLE
from support.small_models import make_run, read_metrics

HINTS = {**typing.get_type_hints(Config), "sweep": SweepConfig}
SECTIONS = {name: hint for name, hint in HINTS.items() if dataclasses.is_dataclass(hint)}
SETTINGS = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in dataclasses.fields(section)}


BASES: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load("""
text: {}
moe: {}
epochs: {train: {max_steps: null}}
decay: {optim: {schedule: warmup_stable_decay}}
started: {adapter: {r: 2}}
full: {quant: {method: none}}
twice: {data: {path: twice.jsonl}}
both: {data: {path: both.jsonl, format: prompt_completion}}
prose: {data: {path: prose.txt}}
mixture: {data: {path: null, sources: [{path: twice.jsonl, weight: 0.5}, {path: prose.txt, weight: 0.5}]}}
chats: {data: {path: chats.jsonl, template: zephyr}}
labelled: {data: {path: labelled.jsonl, template: zephyr}}
turns: {data: {path: chats.jsonl, template: turns.jinja}}
thoughts: {data: {path: chats.jsonl, template: turns.jinja, eot_tokens: ["!"]}}
steps: {data: {path: steps.jsonl}, train: {objective: process_reward}}
dpo: {data: {path: pairs.jsonl, sequence_length: 128}, train: {objective: dpo}}
simpo: {data: {path: pairs.jsonl, sequence_length: 128}, train: {objective: simpo}}
reward: {data: {path: pairs.jsonl, sequence_length: 128}, train: {objective: reward}}
kto: {data: {path: judged.jsonl}, train: {objective: kto}}
distill: {train: {objective: distill, teacher: teacher}}
grpo:
  data: {path: questions.jsonl, rewards: [regex, mine.length], reward_folder: functions, reward_processes: 1,
    reward_constants: {pattern: "[aeiou]{2}", other: "^[a-m]"}}
  train: {objective: grpo, global_batch: 8, beta: 0.1}
  rollout: {num_generations: 4, max_new_tokens: 12, num_iterations: 2}
""")
"""Settings of the runs beside which those with a changed one are held. Their model is llama, of `moe` mixtral."""

CHANGES: dict[str, dict[str, Any]] = yaml.safe_load("""
text: {data.path: prose.txt, data.sequence_length: 48, data.eval_fraction: 0.3, data.eval_path: prose.txt,
  adapter.r: 4, adapter.lora_alpha: 8.0, adapter.use_rslora: false, adapter.use_dora: true, adapter.target_modules: qv,
  adapter.rank_pattern: {q_proj: 4}, adapter.alpha_pattern: {q_proj: 4.0}, adapter.lora_dropout: 0.5,
  adapter.init: gaussian, adapter.trainable_token_indices: [5, 6, 7, 8, 9, 10], adapter.modules_to_save: [lm_head],
  optim.name: muon, optim.lr: 0.001, optim.loraplus_lr_ratio: 4.0, optim.betas: [0.8, 0.9], optim.eps: 0.001,
  optim.weight_decay: 0.5, optim.max_grad_norm: 0.001, optim.schedule: linear, optim.warmup_steps: 2,
  optim.warmup_ratio: 0.7, optim.min_lr_ratio: 0.5,
  train.max_steps: 2, train.global_batch: 4, train.dtype: bf16, train.seed: 1, train.neftune_alpha: 5.0}
moe: {adapter.target_parameters: [mlp.experts.down_proj], adapter.expert_sharing: shared_a, train.router_aux_loss: 0.5}
epochs: {train.epochs: 0.5}
decay: {optim.decay_ratio: 0.7}
started: {adapter.init_from: teacher}
full: {adapter.method: full}
twice: {data.deduplicate: true, data.columns: {text: other}}
both: {data.format: text}
prose: {data.sample_by: line, data.too_long: drop}
mixture: {data.sources: [{path: twice.jsonl}, {path: prose.txt}], data.stopping_strategy: all_exhausted}
chats: {data.template: vicuna, data.train_on: all}
labelled: {data.ignore_columns: [label]}
turns: {data.eot_tokens: ["!"]}
thoughts: {data.reasoning_key: thoughts}
steps: {data.step_separator: " "}
dpo: {train.objective: ipo, train.beta: 0.5, train.label_smoothing: 0.2, train.sft_weight: 0.5}
simpo: {train.target_margin: 1.0}
reward: {train.center_rewards: 0.1}
kto: {train.desirable_weight: 2.0, train.undesirable_weight: 2.0}
distill: {train.teacher: null, train.kd_ratio: 0.1, train.kd_temperature: 2.0}
grpo: {data.rewards: [mine.length], data.reward_weights: [1.0, 3.0], data.reward_columns: {pattern: other},
  data.reward_constants: {pattern: e}, rollout.num_generations: 8, rollout.max_new_tokens: 10, rollout.temperature: 0.7,
  rollout.stop: [e], rollout.steps_per_generation: 2, rollout.num_iterations: 1, rollout.loss_type: dr_grpo,
  rollout.scale_rewards: none, rollout.importance_sampling_level: sequence, rollout.epsilon: 0.001,
  rollout.epsilon_high: 0.001, rollout.use_bias_correction_kl: false, rollout.mask_truncated_completions: true,
  rollout.max_resamples: 2,
  rollout.eval_temperature: 1.0, rollout.batch_invariant: true}
""")
"""Settings by the base whose results they must change, with their changed values."""

REFUSED_WITHOUT = ("data.ignore_columns", "data.eot_tokens")
"""Settings without which the run beside is refused."""

NO_CHANGE: dict[str, str] = yaml.safe_load("""
the launcher sets it from the file of adapter.init_from: adapter.init_from_loftq
of images, test_data_images.py: data.images data.image_max_pixels data.image_min_pixels
of a hub data set, test_data_hub.py: data.name data.split data.revision data.eval_split data.streaming
places and numbers of processes, on which no result depends: data.cache_dir data.reward_processes
where functions are, and that a resume has the same, test_rewards.py: data.reward_folder data.reward_digests
reward models, test_reward_models.py: data.reward_models
limits, test_rewards.py: data.reward_timeout data.reward_memory_gb
permissions, test_rewards.py: data.rewards_execute_code data.rewards_isolation
when a run fails, test_grpo.py: rollout.max_failed_steps rollout.max_logprob_difference
another sampler, test_grpo.py: rollout.url
what is kept, test_grpo.py: rollout.keep
of dialogues, test_dialogues.py: data.environment data.tools data.tool_schemas rollout.max_turns
""")
"""Why settings of the sections below change no result of such a run."""


def test_every_setting_that_decides_results_is_changed_here() -> None:
    changed = [setting for changes in CHANGES.values() for setting in changes]
    excepted = " ".join(NO_CHANGE.values()).split()
    decide = {name for name in SETTINGS if name.partition(".")[0] in ("optim", "adapter", "data", "rollout")}
    assert sorted({*changed} & decide) == sorted(decide - {*excepted})
    assert len(changed) == len({*changed})
    assert {*changed, *excepted} <= SETTINGS


def write_data(folder: Path) -> None:
    lines: dict[str, list[dict[str, Any]]] = {
        "chats.jsonl": [
            {
                "messages": [
                    {"role": "user", "content": f"Is {n} a number?"},
                    {"role": "assistant", "content": "Yes, and even." if n % 2 else "Yes", "thoughts": f"{n}?"},
                ]
            }
            for n in range(24)
        ],
        "twice.jsonl": [{"text": f"A text, number {n // 2}.", "other": f"Another one, {n}."} for n in range(40)],
        "steps.jsonl": [
            {"prompt": f"{n} + 1?", "completions": [f"It is {n}", "plus one"], "labels": [n % 2 == 0, True]}
            for n in range(24)
        ],
        "pairs.jsonl": [{"prompt": f"{n}?", "chosen": f"Yes, {n}.", "rejected": "No" * (n % 3 + 1)} for n in range(24)],
        "judged.jsonl": [{"prompt": f"{n}?", "completion": f"Yes, {n}.", "label": n % 3 > 0} for n in range(24)],
        "questions.jsonl": [{"prompt": f"alpha {n}:"} for n in range(12)],
        "both.jsonl": [{"text": f"Text {n}.", "prompt": f"{n}?", "completion": "Yes."} for n in range(24)],
    }
    (folder / "mine.py").write_text("def length(completions, **columns): return [len(completions[0]) / 100]\n")
    turn = "{{ turn.role + ': ' }}{{ turn.reasoning_content or '' }}{{ turn.content + ' !' }}"
    (folder / "turns.jinja").write_text("{% for turn in messages %}" + turn + "{% endfor %}")
    lines["labelled.jsonl"] = [{**line, "label": True} for line in lines["chats.jsonl"]]
    for name, records in lines.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "prose.txt").write_text(
        "\n\n".join(f"Line one of {n}.\nLine two of {n}." + " More." * (n * 9) for n in range(9))
    )


class Runs:
    """The results of small runs, one per settings."""

    def __init__(self, folders: Path, scratch: Path) -> None:
        self._folders, self._scratch = folders, scratch
        self._results: dict[str, Any] = {}
        write_data(scratch)
        make_run(scratch / "teacher_run", folders, adapter={"r": 2}, train={"max_steps": 2, "global_batch": 2})
        worker.run(scratch / "teacher_run", SINGLE)

    def _placed(self, value: Any) -> Any:
        """Return a value with the names of files as their paths."""
        if isinstance(value, list):
            return [self._placed(item) for item in value]
        if isinstance(value, dict):
            return {key: self._placed(item) for key, item in value.items()}
        places = {"teacher": self._scratch / "teacher_run" / "adapter", "text.jsonl": self._folders / "text.jsonl"}
        places["functions"] = self._scratch
        if isinstance(value, str) and value.endswith((".jsonl", ".txt", ".jinja")):
            places.setdefault(value, self._scratch / value)
        return str(places.get(value, value)) if isinstance(value, str) else value

    def result(self, base: str, changes: Mapping[str, Any]) -> Any:
        """Return what a run computes: the digest of its rows, its figures without times, its adapter."""
        key = json.dumps([base, changes])
        if key not in self._results:
            settings, model = BASES[base], "mixtral" if base == "moe" else "llama"
            # All steps have a rate and gradients; the last one is on the schedule's way down.
            small = {"data": {"eval_fraction": 0.2}, "train": {"max_steps": 3, "global_batch": 2, "micro_batch": 2}}
            small |= {"optim": {"lr": 1e-2}}
            sections = {
                name: {**small.get(name, {}), **settings.get(name, {})} for name in small.keys() | settings.keys()
            }
            for setting, value in changes.items():
                section, _, name = setting.partition(".")
                sections.setdefault(section, {})[name] = value
            run_dir = self._scratch / hashlib.sha256(key.encode()).hexdigest()[:16]
            make_run(run_dir, self._folders, model, **self._placed(sections))
            worker.run(run_dir, SINGLE)
            record = json.loads((run_dir / "data.json").read_text())
            times = {"time", "tokens_per_second", "rollout/seconds", "peak_memory_bytes"}
            figures = [{k: v for k, v in line.items() if k not in times} for line in read_metrics(run_dir)]
            folder = run_dir / "adapter"
            weights = {name: value.tolist() for name, value in adapter_of(run_dir).items()} if folder.exists() else None
            digest = hashlib.sha256(json.dumps([figures, weights]).encode()).hexdigest()
            self._results[key] = (record["content"], digest)
        return self._results[key]


@pytest.fixture(scope="module")
def runs(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(folders, tmp_path_factory.mktemp("runs"))


@pytest.mark.ci
@pytest.mark.parametrize(("base", "setting"), [(base, name) for base, changes in CHANGES.items() for name in changes])
def test_a_setting_changes_the_results_of_a_run_that_uses_it(base: str, setting: str, runs: Runs) -> None:
    after = runs.result(base, {setting: CHANGES[base][setting]})
    with pytest.raises(UserError) if setting in REFUSED_WITHOUT else contextlib.nullcontext():
        assert after != runs.result(base, {})


@pytest.mark.ci
@pytest.mark.parametrize(
    ("base", "setting", "value"), [("text", "train.keep", 3), ("grpo", "data.reward_processes", 2)]
)
def test_a_setting_that_decides_no_result_changes_none(base: str, setting: str, value: Any, runs: Runs) -> None:
    assert runs.result(base, {setting: value}) == runs.result(base, {})
