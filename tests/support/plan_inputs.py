"""Machines, models and configs that the tests of the planner make plans of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from distlora.architecture.shapes import ARCHITECTURES
from distlora.config import Config
from distlora.config.plan import GPUS
from distlora.planner import Machine
from distlora.planner.model import PlannedModel, built_in
from support.family_models import config_for
from support.small_models import config_with
from support.tiers import ci

MODELS = {
    "8b": "NousResearch/Meta-Llama-3.1-8B",
    "70b": "unsloth/Llama-3.3-70B-Instruct",
    "405b": "meta-llama/Llama-3.1-405B",
    "llama2-7b": "NousResearch/Llama-2-7b-hf",
    "llama2-70b": "NousResearch/Llama-2-70b-hf",
    "32b": "Qwen/Qwen2.5-32B",
    "moe": "Qwen/Qwen3-30B-A3B",
    "tied": "Qwen/Qwen2.5-1.5B",
}


IN_RECIPES = (
    "NousResearch/Meta-Llama-3.1-8B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3.5-9B",
    "allenai/Olmo-3.1-32B-Instruct",
    "google/gemma-4-E4B-it",
    "ibm-granite/granite-4.0-h-small",
    "mistralai/Ministral-3-14B-Instruct-2512-BF16",
    "unsloth/gemma-3-27b-pt",
    "unsloth/mistral-7b-v0.3",
)
OF_EACH_TYPE = {settings["model_type"]: name for name, settings in reversed(ARCHITECTURES.items())} | {
    ARCHITECTURES[name]["model_type"]: name for name in IN_RECIPES
}
"""One built-in model of each type, for `make test`: a new one takes a second to check, and recipes need some."""


def by_type(names: Iterable[str]) -> list[Any]:
    """Return names of models as cases; those with other sizes than OF_EACH_TYPE's run in `make test-ci`."""
    each = [ARCHITECTURES[name] for name in OF_EACH_TYPE.values()]
    sizes = {name: {k: v for k, v in ARCHITECTURES[name].items() if k != "quantization_config"} for name in names}
    return [name if own in each else ci(name) for name, own in sizes.items()]


def model_of(name: str, **settings: Any) -> PlannedModel:
    """One of MODELS by its short name, with other `settings` than its config.json has."""
    return built_in(name, {**ARCHITECTURES[MODELS[name]], **settings})


def machine_of(gpu: str = "h100", *, ranks: int = 1, per_machine: int = 8, **values: Any) -> Machine:
    """Machines of up to `per_machine` GPUs, as the table has them but for `values`."""
    known = GPUS[gpu]
    machine = Machine(
        name=known.title,
        is_gpu=True,
        gpu=known,
        usable_bytes=known.usable_bytes,
        host_bytes=None,
        ranks=ranks,
        ranks_per_machine=min(ranks, per_machine),
        flops=known.flops,
        bandwidth=known.bandwidth,
        link=known.link,
        host_link=known.host_link,
        network=known.network,
        has_nvlink=known.has_nvlink,
    )
    return dataclasses.replace(machine, **values)


def cpu_machine(ranks: int) -> Machine:
    """Return this machine, with `ranks` processes."""
    return Machine(
        name="CPU",
        is_gpu=False,
        gpu=None,
        usable_bytes=None,
        host_bytes=None,
        ranks=ranks,
        ranks_per_machine=ranks,
        flops=None,
        bandwidth=None,
        link=None,
        host_link=None,
        network=None,
    )


def composed(*words: str, **base: dict[str, Any]) -> Config:
    """`section.field=value` of each over `base`, without Hydra, which takes a tenth of a second."""
    sections: dict[str, dict[str, Any]] = {}
    for word in words:
        name, _, value = word.partition("=")
        section, field = name.split(".")
        sections.setdefault(section, {})[field] = yaml.safe_load(value)
    return config_with(base, sections, run_dir="/run")


def timed_config(ranks: int, **sections: dict[str, Any]) -> Config:
    """Return a run whose step the planner times."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "unset"},
        "data": {"path": "none.jsonl", "sequence_length": 2048},
        "adapter": {"target_modules": "all-linear"},
        "train": {"global_batch": 64},
        "cluster": {"gpus_per_node": ranks},
    }
    return config_with(base, sections)


LENGTH, GLOBAL_BATCH = 40, 6


def run_of(folder: Path, **sections: dict[str, Any]) -> Config:
    """Return a run of the model in a folder, whose operations the planner counts."""
    data = {"path": "none.jsonl", "sequence_length": LENGTH}
    return config_for(folder, data=data, **sections)


LORA: dict[str, Any] = {"adapter": {"target_modules": "all-linear", "r": 4, "rank_pattern": {"o_proj": 3}}}
