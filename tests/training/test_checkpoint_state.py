"""Check what a checkpoint belongs to, and what a resume refuses or reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distlora.checkpoint.state import (
    Identity,
    RunProgress,
    TrainState,
    check_matches,
    check_newest_settings,
    environment_line,
    fixed_settings,
    load_state,
)
from distlora.config import Config, UserError
from distlora.config.file import build
from distlora.run_folder.layout import STATE_NAME

SECTIONS: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d"}, "run_dir": "r"}


def settings(**sections: dict[str, Any]) -> dict[str, Any]:
    return fixed_settings(build(Config, SECTIONS | sections))


def refusal(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    identities = [Identity(base_fingerprint="b", data_digest="d", settings=of) for of in (then, now)]
    state = TrainState(progress=RunProgress(), identity=identities[0], environment={})
    try:
        check_matches(state, Path("step"), identities[1], reference="adapter.init_from")
    except UserError as error:
        return str(error)
    return None


def whole_state() -> dict[str, Any]:
    """Return state.json as a run writes it."""
    return {
        "progress": {"step": 2, "evaluations": {"0": 5.0, "2": 4}, "seconds": 1.5, "tokens": 3, "published_step": 2},
        "identity": {"base_fingerprint": "b", "data_digest": "d", "settings": settings(), "reference_digest": None},
        "environment": {},
    }


GRPO: dict[str, Any] = {"train": {"objective": "grpo"}, "data": {"path": "d", "rewards": ["exact_match"]}}
CHANGED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # (settings of the run, what changes, what the message says)
    ({}, {"adapter": {"r": 8}}, "adapter.r=16, and config.yaml now has adapter.r=8"),
    ({}, {"adapter": {"target_modules": "qv"}}, "adapter.target_modules=all-linear"),
    ({}, {"adapter": {"use_dora": True}}, "adapter.use_dora=false, and config.yaml now has adapter.use_dora=true"),
    ({}, {"adapter": {"rank_pattern": {"q_proj": 4}}}, "now has adapter.rank_pattern={'q_proj': 4}"),
    ({}, {"adapter": {"modules_to_save": ["lm_head"]}}, "adapter.modules_to_save=[lm_head]"),
    ({}, {"adapter": {"lora_alpha": 8.0}}, "adapter.lora_alpha=16.0"),
    ({}, {"model": {"path": "m", "special_tokens": {"eos_token": "x"}}}, "model.special_tokens={}"),
    ({}, {"quant": {"method": "none"}}, "quant.method=nf4"),
    ({}, {"optim": {"name": "adamw_8bit"}}, "optim.name=adamw,"),
    ({}, {"train": {"global_batch": 4}}, "train.global_batch=8"),
    ({}, {"train": {"max_steps": 40}}, "train.max_steps=null, and config.yaml now has train.max_steps=40"),
    ({}, {"train": {"epochs": 3.0}}, "train.epochs=1.0"),
    ({}, {"train": {"load_best_at_end": True}}, "train.load_best_at_end=false"),
    ({}, {"optim": {"lr": 1e-3}}, "optim.lr=null, and config.yaml now has optim.lr=0.001"),
    ({}, {"optim": {"weight_decay": 0.1}}, "optim.weight_decay=0.0"),
    ({}, {"optim": {"betas": [0.9, 0.95]}}, "optim.betas=[0.9,0.999]"),
    ({}, {"data": {"path": "d", "sequence_length": 512}}, "data.sequence_length=1024"),
    ({}, {"adapter": {"lora_dropout": 0.1}}, "adapter.lora_dropout=0.0"),
    (
        GRPO,
        {"rollout": {"temperature": 0.5}},
        "rollout.temperature=1.0, and config.yaml now has rollout.temperature=0.5",
    ),
    (GRPO, {"rollout": {"max_new_tokens": 32}}, "now has rollout.max_new_tokens=32"),
    (GRPO, {"rollout": {"stop": ["x"]}}, "now has rollout.stop=[x]"),
    (GRPO, {"data": {"rewards": ["exact_match", "math"]}}, "now has data.rewards=[exact_match,math]"),
    (GRPO, {"rollout": {"epsilon": 0.3}}, "now has rollout.epsilon=0.3"),
    (GRPO, {"data": {"reward_weights": [0.5]}}, "now has data.reward_weights=[0.5]"),
]


@pytest.mark.parametrize(("given", "change", "said"), CHANGED, ids=str)
def test_changed_fixed_setting_is_refused_with_both_values(
    given: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    """Answers in a checkpoint of GRPO are not trained on by other settings."""
    changed = {name: {**given.get(name, {}), **change.get(name, {})} for name in given.keys() | change.keys()}
    refused = refusal(json.loads(json.dumps(settings(**given))), settings(**changed))
    assert refused is not None
    assert said in refused
    assert "set it back" in refused


def test_free_settings_may_change(tmp_path: Path) -> None:
    changed = settings(
        data={"path": "moved", "cache_dir": "elsewhere"},
        train={"save_every": 3, "micro_batch": 2, "log_every": 5},
        tracker={"tensorboard": True},
        cluster={"timeout_seconds": 60.0},
    )
    assert refusal(settings(), changed) is None
    # As it comes back from JSON: tuples are lists there, and keys texts.
    mixed = settings(adapter={"target_modules": ["a", "b"], "rank_pattern": {"a": 3}})
    assert refusal(json.loads(json.dumps(mixed)), mixed) is None


def test_settings_of_later_versions_are_ignored() -> None:
    then = settings()
    del then["adapter.modules_to_save"]
    assert refusal(then, settings(adapter={"modules_to_save": ["lm_head"]})) is None


def test_launcher_checks_the_newest_readable_state(tmp_path: Path) -> None:
    for name, text in (("step_00000002", json.dumps(whole_state())), ("step_00000004", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_NAME).write_text(text)
    check_newest_settings(tmp_path, settings())
    with pytest.raises(UserError, match=r"step_00000002 was made with adapter\.r=16, .* now has adapter\.r=4"):
        check_newest_settings(tmp_path, settings(adapter={"r": 4}))


def test_different_environment_is_reported() -> None:
    then = {"ranks": 3, "threads": 1, "torch": "2.13.0"}
    assert environment_line(then, dict(then)) is None
    line = environment_line(then, then | {"ranks": 2, "threads": 8})
    assert line is not None
    assert "ranks 3 (now 2), threads 1 (now 8): the order of the data is the same" in line
    compiled = then | {"compiler": "g++ 13", "train.compile": True}
    assert environment_line(then, then | {"train.compile": False}) is None, "made before there was such a setting"
    line = environment_line(then, then | {"fused_kernels": "own"})
    assert line is not None
    assert "with fused_kernels None (now own):" in line
    line = environment_line(compiled, compiled | {"compiler": "g++ 14", "train.compile": False})
    assert line is not None
    assert "with compiler g++ 13 (now g++ 14), train.compile True (now False):" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"progress": None}, "progress is null"),
        ({"identity": {}}, "it has no identity."),
        ({"environment": []}, "environment is"),
        ({"progress": {"step": -1, "evaluations": {}, "seconds": 0, "tokens": 0}}, "step is -1"),
        ({"progress": {"step": True, "evaluations": {}, "seconds": 0, "tokens": 0}}, "step is true"),
        ({"progress": {"step": 1, "evaluations": {}, "seconds": 0, "tokens": 0, "sampling": [3]}}, "sampling is [3]"),
        ({"progress": {"step": 1, "evaluations": {"x": 1}, "seconds": 0, "tokens": 0}}, "evaluations has 'x': 1"),
        ({"progress": {"step": 1, "evaluations": {"1": 10**400}, "seconds": 0, "tokens": 0}}, "evaluations has '1': 1"),
    ],
)
def test_invalid_state_json_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    whole = whole_state()
    (tmp_path / STATE_NAME).write_text(json.dumps(whole))
    expected = RunProgress(step=2, evaluations={0: 5.0, 2: 4.0}, seconds=1.5, tokens=3, published_step=2)
    assert load_state(tmp_path).progress == expected
    (tmp_path / STATE_NAME).write_text(json.dumps(whole | change))
    with pytest.raises(UserError, match="is damaged") as refused:
        load_state(tmp_path)
    assert said in str(refused.value)
