"""Every setting of a run: frozen dataclasses whose field docstrings say what grows or breaks.

A run is described once, by the launcher, as RUN/config.yaml; every rank and every resume builds the same `Config` from
that file. This package imports neither torch nor hydra, so the launcher can refuse a wrong value in a second. A Config
is not checked where it is made: the launcher checks it once, in four stages. `check_settings` is the first, which needs
the values alone; `distlora_launcher/compose/checks.py` has the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distlora.config.base import SAVED_MODULES, TARGET_PRESETS, AdapterConfig, ModelConfig, QuantConfig
from distlora.config.checks import check_ranks, check_settings
from distlora.config.cluster import ClusterConfig, ParallelConfig
from distlora.config.documents import DATA_FORMATS, DataConfig, SourceConfig
from distlora.config.errors import UserError, nearest, require
from distlora.config.plan import GpuConfig, PlanConfig
from distlora.config.rollout import RolloutConfig
from distlora.config.sweep import SweepConfig
from distlora.config.training import OptimConfig, TrackerConfig, TrainConfig

__all__ = [
    "DATA_FORMATS",
    "SAVED_MODULES",
    "TARGET_PRESETS",
    "AdapterConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "GpuConfig",
    "ModelConfig",
    "ModelSpec",
    "OptimConfig",
    "ParallelConfig",
    "PlanConfig",
    "QuantConfig",
    "RolloutConfig",
    "SourceConfig",
    "SweepConfig",
    "TrackerConfig",
    "TrainConfig",
    "UserError",
    "check_ranks",
    "check_settings",
    "nearest",
    "require",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Describe a model to build: a base, how it is stored, and the adapter on it. Commands without a run use it too."""

    model: ModelConfig
    """The base: its folder, its name and its new tokens."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype, and storage dtype of weights that are not quantized."""
    seed: int = 0
    """Seed of the adapter's initial values."""
    images: bool = False
    """Also build what takes images (tower, projector): frozen, in `dtype`, and whole on each rank."""

    @property
    def path(self) -> Path:
        """Folder of the base's checkpoint."""
        return Path(self.model.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The settings of a run. The sections are Hydra's config groups (conf/)."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    tracker: TrackerConfig = field(default_factory=lambda: TrackerConfig(wandb=True))
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    name: str = "distlora"
    """Name in the default run_dir, and of the SLURM job."""
    run_dir: str
    """The run folder: config.yaml, metrics.jsonl, logs/, checkpoints/, adapter/."""

    @property
    def spec(self) -> ModelSpec:
        """The model of this run."""
        return ModelSpec(
            model=self.model, quant=self.quant, adapter=self.adapter, dtype=self.train.dtype, seed=self.train.seed
        )

    def value_of(self, setting: str) -> Any:
        """Return the value of a setting by its dotted name, such as `train.micro_batch`."""
        section, _, name = setting.partition(".")
        return getattr(getattr(self, section), name)

    def with_settings(self, settings: Mapping[str, Any]) -> Config:
        """Return the settings with other values by dotted name, unchecked."""
        sections: dict[str, dict[str, Any]] = {}
        for setting, value in settings.items():
            section, _, name = setting.partition(".")
            sections.setdefault(section, {})[name] = value
        changed = {name: replace(getattr(self, name), **values) for name, values in sections.items()}
        return replace(self, **changed)

    @property
    def reference_setting(self) -> str:
        """Return the setting that names the adapter of the objective's reference, with its value."""
        name = "adapter.init_from" if self.train.teacher is None else "train.teacher"
        return f"{name}={self.value_of(name)}"

    def if_valid(self, settings: Mapping[str, Any]) -> Config | None:
        """Return the settings with other values, or None for values that exclude each other."""
        changed = self.with_settings(settings)
        try:
            check_settings(changed, {setting.partition(".")[0] for setting in settings})
        except UserError:
            return None
        return changed

    def shard_degree(self, ranks: int) -> int:
        """Ranks that shard one replica of the base, where there are `ranks` in all."""
        degree = self.parallel.shard_degree
        if degree is None:
            return ranks
        return self.cluster.gpus_per_node if degree == "node" else degree

    def expert_degree(self, ranks: int) -> int:
        """Ranks that divide the experts of each layer, where there are `ranks` in all."""
        degree = self.parallel.expert_degree
        return self.shard_degree(ranks) if degree == "replica" else degree

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts of a rollout; train.global_batch counts the answers of a step."""
        return self.train.global_batch * self.rollout.steps_per_generation // self.rollout.num_generations

    def rows_per_epoch(self, rows: int) -> int:
        """Return the sequences of an epoch's steps, train.global_batch each, of `rows` packed sequences or prompts."""
        if self.train.needs.data != "prompts":
            return rows
        return -(-rows // self.prompts_per_rollout) * self.rollout.steps * self.train.global_batch

    def total_steps(self, rows: int) -> int:
        """Return the optimizer steps of the whole run over `rows` packed sequences or prompts."""
        return self.train.total_steps(self.rows_per_epoch(rows))

    @property
    def prepared_data(self) -> DataConfig:
        """The data as it is tokenized: prompts leave room for an answer in a sequence."""
        if self.train.needs.data != "prompts":
            return self.data
        return replace(self.data, sequence_length=self.data.sequence_length - self.rollout.max_new_tokens)

    @property
    def preparation(self) -> str:
        """SHA-256 of the settings that decide the packed sequences. RUN/data.json keeps that of its own."""
        data = {
            name: value
            for name, value in asdict(self.prepared_data).items()
            if not name.startswith(("reward", "environment"))
        }
        del data["cache_dir"]
        tokens = [self.model.new_tokens, dict(self.model.special_tokens)]
        needed = self.train.max_steps if data["streaming"] else None
        values = [data, tokens, self.train.objective, self.train.seed, needed]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
