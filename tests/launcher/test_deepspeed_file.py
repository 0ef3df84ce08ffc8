"""A user's DeepSpeed JSON: keys that are used, refused or without effect; and the installed DeepSpeed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from distlora.config import UserError, deepspeed_file
from distlora.config.cluster import ParallelConfig
from distlora.config.deepspeed_file import Gathering, read_gathering
from distlora.parallel.deepspeed_schema import schema_error
from distlora_launcher.compose.checks import check_parallel


def written(tmp_path: Path, **settings: Any) -> ParallelConfig:
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    return ParallelConfig(backend="zero3", deepspeed_config=str(tmp_path / "ds.json"))


def test_a_file_for_transformers_says_how_to_gather_and_what_has_no_effect_is_named(tmp_path: Path) -> None:
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 5e6,
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 1000,
        "offload_param": {"device": "cpu", "pin_memory": False},
        "offload_optimizer": {"device": "none"},
    }
    auto = dict.fromkeys(("gradient_clipping", "train_batch_size", "gradient_accumulation_steps"), "auto")
    parallel = written(tmp_path, zero_optimization=zero, bf16={"enabled": "auto"}, fp16={"enabled": False}, **auto)
    assert read_gathering(parallel) == Gathering(
        offload=True,
        pin_memory=False,
        overlap_comm=False,
        prefetch_bucket_size=5_000_000,
        max_live_parameters=0,
        max_reuse_distance=1000,
        without_effect=("zero_optimization.contiguous_gradients",),
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": {"type": "AdamW"}}, r"ds\.json: optimizer=.*distlora has its own optimizer.*optim=adamw"),
        ({"bf16": {"enabled": True}}, r"bf16=.*fp32 scales.*train\.dtype=bf16"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps=4: .*train\.micro_batch"),
        ({"zero_optimisation": {}}, r"no such setting \(did you mean 'zero_optimization'\?\)"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage=2: only stage 3"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "in 4 bits already"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "second copy"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, r"offload_param\.device='nvme'"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "paged_adamw"),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1, "prefetch_bucket_size": 2}},
            r"\.prefetch_bucket_size=2: stage3_prefetch_bucket_size sets it too; remove one of them",
        ),
        ({"zero_optimization": 3}, r"zero_optimization is 3, not an object"),
        ({"zero_optimization": {"stage": 3, "overlap_comm": "false"}}, r"\.overlap_comm='false': write it without"),
    ],
    ids=str,
)
def test_what_contradicts_in_a_file_is_refused_by_key(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_gathering(written(tmp_path, **settings))


@pytest.mark.parametrize(
    ("setting", "zero", "said"),
    [
        (
            {"prefetch": False},
            {"stage3_prefetch_bucket_size": 5e7},
            r"^parallel\.prefetch=false and zero_optimization\.stage3_prefetch_bucket_size=50000000 in .*ds\.json "
            "contradict each other; leave one of them out",
        ),
        (
            {"offload_base": True},
            {"offload_param": {"device": "none", "pin_memory": True}},
            r"^parallel\.offload_base=true and zero_optimization\.offload_param\.device='none' in .* contradict",
        ),
    ],
    ids=str,
)
def test_a_file_that_contradicts_a_setting_is_refused(
    tmp_path: Path, setting: dict[str, Any], zero: dict[str, Any], said: str
) -> None:
    parallel = written(tmp_path, zero_optimization={"stage": 3} | zero)
    read_gathering(parallel)
    with pytest.raises(UserError, match=said):
        read_gathering(dataclasses.replace(parallel, **setting))


def test_pinning_what_is_not_offloaded_is_named_as_without_effect(tmp_path: Path) -> None:
    parallel = written(
        tmp_path, zero_optimization={"stage": 3, "offload_param": {"device": "none", "pin_memory": True}}
    )
    assert read_gathering(parallel).without_effect == ("zero_optimization.offload_param.pin_memory",)


@pytest.mark.parametrize(
    ("found", "said"),
    [(None, "which is not installed"), ("0.19.7", r"DeepSpeed 0\.19\.8 or later.* 0\.19\.7 is installed; ")],
)
def test_a_machine_without_deepspeed_or_with_an_old_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str | None, said: str
) -> None:
    def version(name: str) -> str:
        assert name == "deepspeed"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    deepspeed_file.check_deepspeed()
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=said + r".*`pip install.* deepspeed`, or set parallel=fsdp2"):
        deepspeed_file.check_deepspeed()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0+cu129")
    deepspeed_file.check_deepspeed()


def test_a_file_that_is_absent_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing or not a file; name a JSON file"):
        read_gathering(ParallelConfig(backend="zero3", deepspeed_config=str(tmp_path / "none.json")))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: it is not JSON"):
        read_gathering(ParallelConfig(backend="zero3", deepspeed_config=str(tmp_path / "bad.json")))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"stage3_prefetch_bucket": 1},
            r"stage3_prefetch_bucket=1: .*\(did you mean 'stage3_prefetch_bucket_size'\?\)",
        ),
        ({"prefetch_bucket": 1}, r"did you mean 'stage3_prefetch_bucket_size'"),
        ({"stage3_max_live_parameters": -1}, r"stage3_max_live_parameters=-1: .* greater than or equal to 0"),
        ({"stage3_max_live_parameters": 0.5}, r"stage3_max_live_parameters=0\.5: .*integer"),
        ({"stage3_max_live_parameters": 1, "max_live_parameters": 2}, r"\.max_live_parameters=2: Extra inputs"),
        ({"overlap_comm": 3}, r"overlap_comm=3: .*boolean"),
        ({"offload_param": {"pin_memory": []}}, r"offload_param\.pin_memory=\[\]: .*boolean"),
    ],
    ids=str,
)
def test_deepspeeds_schema_refuses_names_and_values(section: dict[str, Any], said: str) -> None:
    assert not schema_error({"stage": 3, "stage3_prefetch_bucket_size": 5_000_000})
    assert re.search(said, schema_error({"stage": 3, **section}))


@pytest.mark.ci
def test_the_launcher_refuses_what_the_schema_does(tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 5e8, "reduce_bucket_size": "auto", "sub_group_size": None}
    check_parallel(written(tmp_path, zero_optimization=zero), 2)
    with pytest.raises(UserError, match=r"ds\.json: DeepSpeed refuses zero_optimization\.stage3_prefetch_bucket=1: "):
        check_parallel(written(tmp_path, zero_optimization=zero | {"stage3_prefetch_bucket": 1}), 2)


@pytest.mark.parametrize(
    ("code", "said"), [("import nowhere", "No module named 'nowhere'"), ("raise SystemExit(3)", "ended with code 3")]
)
def test_a_deepspeed_that_cannot_be_imported_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    (tmp_path / "deepspeed.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match=f"DeepSpeed, which could not be imported: .*{said}; install it again"):
        check_parallel(written(tmp_path, zero_optimization={"stage": 3, "reduce_bucket_size": len(code)}), 2)
