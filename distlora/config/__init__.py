"""Every setting of a run: frozen dataclasses whose field docstrings say what grows or breaks.

A run is described once, by the launcher, as RUN/config.yaml; every rank and every resume builds the same `Config` from
that file. This package imports neither torch nor hydra, so the launcher can refuse a wrong value in a second. What a
single section can tell (ranges, names) is checked here, in `__post_init__`; what needs the model's folder or the data
is checked by the launcher (`distlora_launcher/compose/checks.py`), before any worker starts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from distlora.config.base import SAVED_MODULES, TARGET_PRESETS, AdapterConfig, ModelConfig, QuantConfig
from distlora.config.cluster import ClusterConfig, ParallelConfig
from distlora.config.documents import DATA_FORMATS, DataConfig, SourceConfig
from distlora.config.errors import UserError, nearest, require
from distlora.config.objectives import objectives_of, takes_format
from distlora.config.plan import GpuConfig, PlanConfig
from distlora.config.rollout import OF_REWARDS, RolloutConfig
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

    @property
    def path(self) -> Path:
        """Folder of the base's checkpoint."""
        return Path(self.model.path)


_OF_ANY_METHOD = {"method", "r", "lora_alpha", "use_rslora", "target_modules", "init_from_loftq"}
"""Fields of `adapter` that recipes set and adapter=full ignores, or that others refuse."""


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

    def __post_init__(self) -> None:
        if self.adapter.method == "full":
            self._check_full()
        check_ranks(self, self.cluster.ranks)
        tile, length = self.train.mlp_tile, self.data.sequence_length
        require(
            tile is None or tile < length,
            f"train.mlp_tile={tile} cuts no row of data.sequence_length={length:,} tokens; leave it out, or set "
            f"train.mlp_tile={max(1, length // 4)}",
        )
        trained = self.adapter.trains_base
        require(
            self.parallel.backend != "zero3" or trained is None,
            f"parallel=zero3 gathers what is frozen, and {trained} trains parameters of the base; set parallel=fsdp2",
        )
        self._check_objective()
        require(
            not self.adapter.decomposes or self.quant.method != "keep",
            f"adapter.init={self.adapter.init} changes the base's weights or corrects their rounding, and quant=keep "
            "keeps them as they are shipped; set adapter.init=kaiming, or quant=nf4",
        )
        require(
            self.adapter.init != "loftq" or self.quant.method in ("nf4", "auto"),
            f"adapter.init=loftq corrects errors of NF4, and quant={self.quant.method} has "
            f"{'none' if self.quant.method == 'none' else 'those of other formats too'}; set "
            "quant=nf4, or adapter.init=pissa",
        )
        require(
            self.train.compile is not True or self.adapter.method != "full",
            "train.compile=true leaves out the gradients of the norms' scales, which adapter=full trains; leave it "
            "out, or set adapter=lora",
        )
        self._check_length()

    def _check_length(self) -> None:
        """Refuse lengths of a run, and evaluations, that exclude each other."""
        require(
            not self.data.streaming or self.train.max_steps is not None,
            "data.streaming=true reads as many documents as the steps need, so their number must be known; "
            "set train.max_steps",
        )
        require(
            self.plan.tokens is None or self.train.max_steps is None,
            f"plan.tokens={self.plan.tokens} has no effect with train.max_steps={self.train.max_steps}, which sets the "
            "length of the run; leave one of them out",
        )
        require(
            self.plan.tokens is None or self.train.needs.data != "prompts",
            f"plan.tokens={self.plan.tokens} is not the length of a run that samples its answers (train.objective="
            f"{self.train.objective}); set train.max_steps instead",
        )
        require(
            (self.optim.warmup_steps or 0) <= (self.train.max_steps or math.inf),
            f"optim.warmup_steps={self.optim.warmup_steps} is more than train.max_steps={self.train.max_steps}; set "
            "fewer warm-up steps",
        )
        holds_out = self.data.eval_fraction > 0 or self.data.held_out_source is not None
        for name in ("eval_every", "evals_per_epoch", "eval_documents", "early_stopping_patience", "load_best_at_end"):
            require(
                holds_out or getattr(self.train, name) in (None, False, "auto"),
                f"train.{name}={getattr(self.train, name)} needs held-out documents; set data.eval_fraction or "
                "data.eval_path",
            )
        require(
            holds_out or self.rollout.eval_temperature == 0,
            f"rollout.eval_temperature={self.rollout.eval_temperature:g} needs held-out prompts; set "
            "data.eval_fraction or data.eval_path",
        )

    def _check_full(self) -> None:
        """Refuse settings that adapter=full cannot use."""
        require(
            self.quant.method not in ("nf4", "keep", "mixed"),
            f"adapter=full trains every parameter, which quant={self.quant.method} cannot store; add quant=none",
        )
        partial = {
            "train.checkpointing=selective": self.train.checkpointing == "selective",
            f"train.mlp_tile={self.train.mlp_tile}": self.train.mlp_tile is not None,
        }
        for setting, is_set in partial.items():  # One process copies the weights of a layer while all of it runs.
            require(
                not is_set,
                f"{setting} recomputes part of a layer, and adapter=full gathers the weights of whole layers; set"
                " train.checkpointing=block without train.mlp_tile, or adapter=lora",
            )
        default, lora_only = AdapterConfig(), {*AdapterConfig.__dataclass_fields__} - _OF_ANY_METHOD
        without_effect = {
            f"adapter.{name}": bool(value) and value != getattr(default, name)
            for name in sorted(lora_only)
            if (value := getattr(self.adapter, name)) is not None
        }
        without_effect["optim.loraplus_lr_ratio"] = self.optim.loraplus_lr_ratio != 1
        without_effect["train.verify"] = self.train.verify
        for setting, is_set in without_effect.items():
            require(not is_set, f"{setting} has no effect with adapter=full; leave it out, or set adapter=lora")
        require(
            self.parallel.resident_blocks == 0,
            f"parallel.resident_blocks={self.parallel.resident_blocks} keeps blocks as they were gathered once, "
            "and adapter=full changes them in every step; leave it out, or set adapter=lora",
        )

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
        """Return the settings with other values by dotted name. Raises UserError for values that exclude each other."""
        sections: dict[str, dict[str, Any]] = {}
        for setting, value in settings.items():
            section, _, name = setting.partition(".")
            sections.setdefault(section, {})[name] = value
        # One after the other would meet states that are refused, such as offload_base before backend.
        changed = {name: replace(getattr(self, name), **values) for name, values in sections.items()}
        return replace(self, **changed)

    @property
    def reference_setting(self) -> str:
        """Return the setting that names the adapter of the objective's reference, with its value."""
        name = "adapter.init_from" if self.train.teacher is None else "train.teacher"
        return f"{name}={self.value_of(name)}"

    def if_valid(self, settings: Mapping[str, Any]) -> Config | None:
        """Return the settings with other values, or None for values that exclude each other."""
        try:
            return self.with_settings(settings)
        except UserError:
            return None

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

    def _check_objective(self) -> None:
        """Refuse data that the objective does not train on, and settings that mean nothing to it."""
        objective, needs = self.train.objective, self.train.needs
        require(
            not self.data.rewards or needs.data == "prompts",
            f"data.rewards scores answers that the model samples, and train.objective={objective} samples none; leave "
            "it out",
        )
        for format in self.data.formats:
            require(
                takes_format(objective, format),
                f"train.objective={objective} {needs.summary}, and data.format={format} is data for train.objective="
                f"{' or '.join(objectives_of(format))}; set one of these, or name the format of what else the data "
                "holds",
            )
        if needs.reference:
            self._check_reference()
        if needs.labels:
            self._check_score()
        for name in self.rollout.changed:
            require(
                needs.data == "prompts",
                f"rollout.{name} has no effect with train.objective={objective}, which samples nothing; leave it out, "
                "or set train.objective=grpo",
            )
        if needs.data == "prompts":
            self._check_rollout()
        require(
            needs.data == "steps" or self.data.step_separator == "\n",
            f"data.step_separator={self.data.step_separator!r} has no effect with train.objective={objective}; leave "
            "it out",
        )
        if needs.data == "documents":
            return
        require(
            self.data.train_on in ("assistant", "last") if needs.data == "steps" else self.data.train_on == "assistant",
            f"data.train_on={self.data.train_on} has no effect with train.objective={objective}, which trains the "
            "answers behind a prompt; leave it out",
        )
        require(
            self.data.too_long != "split",
            "data.too_long=split makes documents of the parts of a longer one, and parts of an answer cannot be "
            "compared or judged; set data.too_long=truncate or drop",
        )

    def _check_score(self) -> None:
        """Refuse what trains beside the adapters and the score of a model without an LM head."""
        every = self.train.sample_every
        require(
            every is None,
            f"train.sample_every={every} writes answers, and train.objective={self.train.objective} trains a model "
            "without an LM head; leave it out",
        )
        others = self.adapter.token_settings(self.model.new_tokens)
        others += ["adapter=full"] if self.adapter.method == "full" else []
        if others:
            raise UserError(
                f"{others[0]}: train.objective={self.train.objective} trains adapters and the score that replaces the "
                "LM head, and nothing else; leave it out"
            )

    def _check_rollout(self) -> None:
        """Refuse settings that a run on sampled answers cannot use."""
        objective, rollout, train = self.train.objective, self.rollout, self.train
        samples = train.global_batch * rollout.steps_per_generation
        require(
            samples % rollout.num_generations == 0,
            f"rollout.num_generations={rollout.num_generations} does not divide the {samples:,} answers of a rollout "
            "(train.global_batch x rollout.steps_per_generation); set train.global_batch="
            f"{-(-train.global_batch // rollout.num_generations) * rollout.num_generations}",
        )
        require(
            not rollout.batch_invariant or train.compile is not True,
            "rollout.batch_invariant=true computes each token alike with torch's operations, and train.compile=true "
            "with others; leave one of them out",
        )
        require(
            rollout.max_new_tokens + 2 <= self.data.sequence_length,
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in data.sequence_length="
            f"{self.data.sequence_length}; set data.sequence_length={rollout.max_new_tokens + 512}",
        )
        if train.needs.rewards:
            require(
                bool(self.data.rewards), f"train.objective={objective} needs rewards; set data.rewards (docs/rl.md)"
            )
            require(
                rollout.num_generations > 1,
                "rollout.num_generations=1 leaves no answers to compare; set it to 2 or more (8 is usual)",
            )
        for name in rollout.changed:
            require(
                train.needs.rewards or name not in OF_REWARDS,
                f"rollout.{name}={getattr(rollout, name)} has no effect with train.objective={objective}, which does "
                "not train on rewards; leave it out",
            )
        correction = (
            "rollout.use_bias_correction_kl=false has no effect without a KL term; leave it out, or set train.beta"
        )
        require(rollout.use_bias_correction_kl or train.of_objective("beta") > 0, correction)
        refused = {
            "adapter=full": (self.adapter.method == "full", "the base must stay as it is; set adapter=lora"),
            f"adapter.lora_dropout={self.adapter.lora_dropout}": (
                self.adapter.lora_dropout > 0,
                "the sampler has no dropout, so its probabilities would not be training's; set it to 0",
            ),
            "data.streaming=true": (self.data.streaming, "prompts are drawn from all of the data; leave it out"),
            "train.eval_documents=true": (train.eval_documents, "held-out prompts have rewards, no loss; leave it out"),
            f"{', '.join(self.adapter.token_settings(self.model.new_tokens))}": (
                bool(self.adapter.token_settings(self.model.new_tokens)),
                "the sampler reads the embedding as it is stored; leave it out",
            ),
            "parallel=zero3": (
                self.parallel.backend == "zero3" and self.cluster.ranks > 1,
                "it gathers no base for answers of different lengths; set parallel=fsdp2",
            ),
            "train.sample_every": (
                train.sample_every is not None,
                "answers to held-out prompts are written at each evaluation; leave it out",
            ),
            f"data.too_long={self.data.too_long}": (
                self.data.too_long not in ("auto", "drop"),
                "a prompt without its end asks something else; set data.too_long=drop",
            ),
        }
        for setting, (is_set, reason) in refused.items():
            require(not is_set, f"train.objective={objective} with {setting}: {reason}")

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts of a rollout; train.global_batch counts the answers of a step."""
        return self.train.global_batch * self.rollout.steps_per_generation // self.rollout.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.rollout.steps_per_generation * self.rollout.num_iterations

    def rows_per_epoch(self, rows: int) -> int:
        """Return the sequences of an epoch's steps, train.global_batch each, of `rows` packed sequences or prompts."""
        if self.train.needs.data != "prompts":
            return rows
        return -(-rows // self.prompts_per_rollout) * self.steps_per_rollout * self.train.global_batch

    @property
    def prepared_data(self) -> DataConfig:
        """The data as it is tokenized: prompts leave room for an answer in a sequence."""
        if self.train.needs.data != "prompts":
            return self.data
        return replace(self.data, sequence_length=self.data.sequence_length - self.rollout.max_new_tokens)

    @property
    def preparation(self) -> str:
        """SHA-256 of the settings that decide the packed sequences. RUN/data.json keeps that of its own."""
        data = {name: value for name, value in asdict(self.prepared_data).items() if not name.startswith("reward")}
        del data["cache_dir"]
        tokens = [self.model.new_tokens, dict(self.model.special_tokens)]
        needed = self.train.max_steps if data["streaming"] else None
        values = [data, tokens, self.train.objective, self.train.seed, needed]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def _check_reference(self) -> None:
        """Refuse what would change the reference of the objective as it trains."""
        objective = self.train.objective
        require(
            self.adapter.method != "full",
            f"train.objective={objective} compares the adapter with the base under it, and adapter=full trains the "
            "base itself; set adapter=lora",
        )
        changing = {"adapter.use_dora=true": self.adapter.use_dora, "adapter.init=pissa": self.adapter.pissa}
        for setting, is_set in changing.items():
            require(
                self.train.teacher is None or not is_set,
                f"{setting} changes the base's weights, on which the adapter at train.teacher={self.train.teacher} was "
                "trained; leave one of them out",
            )
        trained_rows = {
            "model.new_tokens": len(self.model.new_tokens) > 0,
            "adapter.trainable_token_indices": bool(self.adapter.trainable_token_indices),
            "adapter.modules_to_save": len(self.adapter.modules_to_save) > 0,
        }
        for setting, is_set in trained_rows.items():
            require(
                not is_set,
                f"{setting} trains rows of the embedding or the head, which train.objective={objective} would change "
                "in its reference too; leave it out",
            )


def check_ranks(config: Config, ranks: int) -> None:
    """Refuse what so many processes cannot share; a resume may be on another number than the config has."""
    degree, divisors = config.shard_degree(ranks), [n for n in range(1, ranks + 1) if ranks % n == 0]
    given = f"parallel.shard_degree={config.parallel.shard_degree}"
    given += f" (cluster.gpus_per_node={degree})" if config.parallel.shard_degree == "node" else ""
    require(
        degree in divisors,
        f"{given} does not divide the {ranks:,} process{'es' if ranks > 1 else ''} of this run, so not every replica "
        f"of the base would have {degree:,}; set parallel.shard_degree={max(n for n in divisors if n <= degree)} (of "
        f"{', '.join(map(str, divisors))}), or null for one replica over all",
    )
    experts = config.expert_degree(ranks)
    require(
        experts in (1, degree),
        f"parallel.expert_degree={experts} is not the number of ranks that shard a replica of the base, which is "
        f"{degree:,} ({given}, {ranks:,} process{'es' if ranks > 1 else ''}); set parallel.expert_degree="
        f"{'replica, or 1 (every rank gathers all experts)' if degree > 1 else '1'}",
    )
    gathers = {
        "parallel=zero3": config.parallel.backend == "zero3",
        f"parallel.resident_blocks={config.parallel.resident_blocks}": config.parallel.resident_blocks != 0,
    }
    require(
        degree == 1 or config.parallel.backend == "fsdp2" or config.quant.num_dense == 0,
        f"quant.dense_layers={config.quant.dense_layers} keeps layers as FSDP2 gathered them once, and parallel=zero3 "
        "gathers them in every pass; leave it out, or set parallel=fsdp2",
    )
    for setting, is_set in gathers.items():
        require(
            degree > 1 or config.parallel.shard_degree is None or not is_set,
            f"{setting} has no effect with {given}, where every rank holds the full base and gathers nothing; leave it "
            "out, or set another parallel.shard_degree",
        )
    sharded = config.adapter.trains_base
    require(
        degree == 1 or config.adapter.method != "full" or config.optim.name != "muon",
        f"optim.name=muon orthogonalizes whole matrices, which {degree} shards split (adapter=full is sharded); set "
        "optim.name=adamw, or parallel.shard_degree=1 if each process has memory for all of it",
    )
    require(
        degree == 1 or sharded is None or not config.optim.name.endswith("_8bit"),
        f"optim.name={config.optim.name} stores optimizer states in blocks of 256, which {degree} shards would split "
        f"({sharded} is sharded); set optim.name={config.optim.name.removesuffix('_8bit')}, or "
        "parallel.shard_degree=1 if each process has memory for all of it",
    )
