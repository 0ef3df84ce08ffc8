"""Check the settings of a run by their values alone: each section, and what sections decide together.

This is the first of the four stages of checks; `distlora_launcher/compose/checks.py` has the others. It runs once, when
the settings are composed (and for what a plan considers). RUN/config.yaml is read without it; a resume checks what a
user may have changed there (`check_changeable`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from distlora.config.base import (
    AdapterConfig,
    ModelConfig,
    QuantConfig,
    refused_in_adapter,
    refused_in_model,
    refused_in_quant,
)
from distlora.config.cluster import ClusterConfig, ParallelConfig, refused_in_cluster, refused_in_parallel
from distlora.config.documents import DataConfig, refused_in_data
from distlora.config.errors import Refusals, UserError, as_typed, refusal, require_choices
from distlora.config.objectives import objectives_of, takes_format
from distlora.config.plan import GpuConfig, PlanConfig, refused_in_gpu, refused_in_plan
from distlora.config.rollout import OF_REWARDS, RolloutConfig, refused_in_rollout
from distlora.config.serve import ServeConfig, refused_in_serve
from distlora.config.sweep import SweepConfig, refused_in_sweep
from distlora.config.training import (
    OptimConfig,
    TrackerConfig,
    TrainConfig,
    refused_in_optim,
    refused_in_tracker,
    refused_in_train,
)

if TYPE_CHECKING:
    from distlora.config import Config


CHECKS: dict[type, Callable[[Any], Refusals]] = {
    ModelConfig: refused_in_model,
    DataConfig: refused_in_data,
    AdapterConfig: refused_in_adapter,
    QuantConfig: refused_in_quant,
    ParallelConfig: refused_in_parallel,
    OptimConfig: refused_in_optim,
    TrainConfig: refused_in_train,
    RolloutConfig: refused_in_rollout,
    TrackerConfig: refused_in_tracker,
    ClusterConfig: refused_in_cluster,
    GpuConfig: refused_in_gpu,
    PlanConfig: refused_in_plan,
    ServeConfig: refused_in_serve,
    SweepConfig: refused_in_sweep,
}
"""The checks of each section."""


def check_section(name: str, section: Any) -> None:
    """Raise UserError for the first setting of the section `name` that is refused."""
    require_choices(name, section)
    for sentence in CHECKS[type(section)](section):
        raise refusal(name, section, sentence)


def check_settings(config: Config, sections: Collection[str] | None = None) -> None:
    """Raise UserError for the first setting that is refused. sections: check these alone (None: all) by themselves."""
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        if dataclasses.is_dataclass(section) and (sections is None or item.name in sections):
            check_section(item.name, section)
    adapter, train, data, rollout = config.adapter, config.train, config.data, config.rollout
    together = [
        *(_full(adapter, config.quant, config.parallel, config.optim, train) if adapter.method == "full" else ()),
        *_base(adapter, config.quant, config.parallel),
        *_objective(adapter, config.model, data, train),
        *(_with_images(adapter, config.model, train) if data.images else _without_images(train)),
        *(_sampling(adapter, config.model, data, train, rollout) if train.needs.data == "prompts" else ()),
        *(_not_sampling(train, rollout) if train.needs.data != "prompts" else ()),
        *_length(data, config.optim, train, rollout, config.plan.tokens),
    ]
    for sentence in together:
        raise UserError(sentence)
    check_ranks(config, config.cluster.ranks)


CHANGEABLE = ("parallel", "train", "tracker", "cluster", "plan")
"""Sections with settings that may be changed in RUN/config.yaml before a resume (docs/troubleshooting.md)."""


def check_changeable(config: Config) -> None:
    """Raise UserError for a setting that a resume cannot use: a word that is no choice, or one of `CHANGEABLE`.

    The other sections stay as the run was started, also where a newer version would refuse them.
    """
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        if item.name in CHANGEABLE:
            check_section(item.name, section)
        elif dataclasses.is_dataclass(section):
            require_choices(item.name, section)
    for source in config.data.sources:
        require_choices("data", source)
    check_ranks(config, config.cluster.ranks)


_OF_ANY_METHOD = {"method", "r", "lora_alpha", "use_rslora", "target_modules", "init_from_loftq"}
"""Fields of `adapter` that recipes set and adapter=full ignores, or that others refuse."""


def _full(
    adapter: AdapterConfig, quant: QuantConfig, parallel: ParallelConfig, optim: OptimConfig, train: TrainConfig
) -> Refusals:
    """Check settings that adapter=full cannot use."""
    if quant.method in ("nf4", "keep", "mixed"):
        yield f"adapter=full trains every parameter, which quant={quant.method} cannot store; add quant=none"
    # One process copies the weights of a layer while all of it runs.
    partial = ["train.checkpointing=selective"] * (train.checkpointing == "selective")
    partial += [] if train.mlp_tile is None else [f"train.mlp_tile={train.mlp_tile}"]
    for setting in partial:
        yield (
            f"{setting} recomputes part of a layer, and adapter=full gathers the weights of whole layers; set "
            "train.checkpointing=block without train.mlp_tile, or adapter=lora"
        )
    default, settings = AdapterConfig(), sorted({*AdapterConfig.__dataclass_fields__} - _OF_ANY_METHOD)
    values = {name: getattr(adapter, name) for name in settings}
    idle = [f"adapter.{name}" for name, value in values.items() if value and value != getattr(default, name)]
    idle += ["optim.loraplus_lr_ratio"] * (optim.loraplus_lr_ratio != 1) + ["train.verify"] * train.verify
    for setting in idle:
        yield f"{setting} has no effect with adapter=full; leave it out, or set adapter=lora"
    if parallel.resident_blocks != 0:
        yield (
            f"parallel.resident_blocks={parallel.resident_blocks} keeps blocks as they were gathered once, and "
            "adapter=full changes them in every step; leave it out, or set adapter=lora"
        )
    if train.compile is True:
        yield (
            "train.compile=true leaves out the gradients of the norms' scales, which adapter=full trains; leave it "
            "out, or set adapter=lora"
        )


def _base(adapter: AdapterConfig, quant: QuantConfig, parallel: ParallelConfig) -> Refusals:
    """Check how the base is stored beside what trains or decomposes it."""
    if parallel.backend == "zero3" and (trained := adapter.trains_base) is not None:
        yield f"parallel=zero3 gathers what is frozen, and {trained} trains parameters of the base; set parallel=fsdp2"
    if adapter.decomposes and quant.method == "keep":
        yield (
            f"adapter.init={adapter.init} changes the base's weights or corrects their rounding, and quant=keep keeps "
            "them as they are shipped; set adapter.init=kaiming, or quant=nf4"
        )
    if adapter.init == "loftq" and quant.method not in ("nf4", "auto"):
        has = "none" if quant.method == "none" else "those of other formats too"
        yield (
            f"adapter.init=loftq corrects errors of NF4, and quant={quant.method} has {has}; set quant=nf4, or "
            "adapter.init=pissa"
        )


def _length(
    data: DataConfig, optim: OptimConfig, train: TrainConfig, rollout: RolloutConfig, tokens: int | None
) -> Refusals:
    """Check the length of a run, of its sequences and its evaluations. tokens: plan.tokens."""
    tile, length, steps = train.mlp_tile, data.sequence_length, train.max_steps
    if tile is not None and tile >= length:
        what = f"train.mlp_tile={tile} cuts no row of data.sequence_length={length:,} tokens"
        yield f"{what}; leave it out, or set train.mlp_tile={max(1, length // 4)}"
    if data.streaming and steps is None:
        yield (
            "data.streaming=true reads as many documents as the steps need, so their number must be known; set "
            "train.max_steps"
        )
    if tokens is not None and steps is not None:
        why = f"has no effect with train.max_steps={steps}, which sets the length of the run"
        yield f"plan.tokens={tokens} {why}; leave one of them out"
    if tokens is not None and train.needs.data == "prompts":
        why = f"is not the length of a run that samples its answers (train.objective={train.objective})"
        yield f"plan.tokens={tokens} {why}; set train.max_steps instead"
    if (optim.warmup_steps or 0) > (steps or math.inf):
        what = f"optim.warmup_steps={optim.warmup_steps} is more than train.max_steps={steps}"
        yield f"{what}; set fewer warm-up steps"
    if data.eval_fraction > 0 or data.held_out_source is not None:
        return
    for name in ("eval_every", "evals_per_epoch", "eval_documents", "early_stopping_patience", "load_best_at_end"):
        if (value := getattr(train, name)) not in (None, False, "auto"):
            yield f"train.{name}={value} needs held-out documents; set data.eval_fraction or data.eval_path"
    if rollout.eval_temperature != 0:
        what = f"rollout.eval_temperature={rollout.eval_temperature:g} needs held-out prompts"
        yield f"{what}; set data.eval_fraction or data.eval_path"


def _objective(adapter: AdapterConfig, model: ModelConfig, data: DataConfig, train: TrainConfig) -> Refusals:
    """Check data that the objective does not train on, and what changes its reference or its score."""
    name, needs, rows = f"train.objective={train.objective}", train.needs, adapter.token_settings(model.new_tokens)
    if data.rewards and needs.data != "prompts":
        yield f"data.rewards scores answers that the model samples, and {name} samples none; leave it out"
    if data.has_dialogues and needs.data != "prompts":
        setting = "data.tools" if data.tools else "data.environment"
        yield f"{setting} answers what the model samples, and {name} samples nothing; leave it out"
    for format in data.formats:
        if not takes_format(train.objective, format):
            others = " or ".join(objectives_of(format))
            yield (
                f"{name} {needs.summary}, and data.format={format} is data for train.objective={others}; set one of "
                "these, or name the format of what else the data holds"
            )
    if needs.reference and adapter.method == "full":
        what = f"{name} compares the adapter with the base under it, and adapter=full trains the base itself"
        yield f"{what}; set adapter=lora"
    changing = ["adapter.use_dora=true"] * adapter.use_dora + ["adapter.init=pissa"] * adapter.pissa
    for setting in changing if needs.reference and train.teacher is not None else ():
        yield (
            f"{setting} changes the base's weights, on which the adapter at train.teacher={train.teacher} was trained; "
            "leave one of them out"
        )
    for setting in rows if needs.reference else ():
        yield (
            f"{setting} trains rows of the embedding or the head, which {name} would change in its reference too; "
            "leave it out"
        )
    if needs.labels and train.sample_every is not None:
        what = f"train.sample_every={train.sample_every} writes answers, and {name} trains a model without an LM head"
        yield f"{what}; leave it out"
    for setting in [*rows, *["adapter=full"] * (adapter.method == "full")] if needs.labels else ():
        yield (
            f"{setting}: {name} trains adapters and the score that replaces the LM head, and nothing else; leave it out"
        )
    if needs.data != "steps" and data.step_separator != "\n":
        yield f"data.step_separator={data.step_separator!r} has no effect with {name}; leave it out"
    if needs.data == "documents":
        return
    if data.train_on not in (("assistant", "last") if needs.data == "steps" else ("assistant",)):
        why = f"has no effect with {name}, which trains the answers behind a prompt"
        yield f"data.train_on={data.train_on} {why}; leave it out"
    if data.too_long == "split":
        yield (
            "data.too_long=split makes documents of the parts of a longer one, and parts of an answer cannot be "
            "compared or judged; set data.too_long=truncate or drop"
        )


def _with_images(adapter: AdapterConfig, model: ModelConfig, train: TrainConfig) -> Refusals:
    """Check settings that runs on images (data.images=true) cannot use."""
    name, needs = "data.images=true", train.needs
    if needs.data not in ("documents", "pairs") or needs.labels:
        what = "answers are sampled" if needs.data == "prompts" else "answers are judged"
        yield (
            f"{name} with train.objective={train.objective}: {what} from text alone; set train.objective=sft, "
            "distill, dpo, ipo, orpo or simpo, or leave data.images out"
        )
    if adapter.method == "full":
        yield f"{name} with adapter=full: the vision tower stays as it is, and so must the rest; set adapter=lora"
    changing = [f"train.neftune_alpha={train.neftune_alpha:g}"] if train.neftune_alpha is not None else []
    for setting in [*changing, *adapter.token_settings(model.new_tokens)]:
        yield (
            f"{name} with {setting}: embeddings of images are put in the places of tokens, which are found by the "
            "embedding as it is stored, so embedding and LM head stay as they are; leave one of them out"
        )


def _without_images(train: TrainConfig) -> Refusals:
    if train.sample_images:
        yield "train.sample_images needs a run that takes images; set data.images=true, or leave it out"


def _not_sampling(train: TrainConfig, rollout: RolloutConfig) -> Refusals:
    for field in rollout.changed:
        why = f"has no effect with train.objective={train.objective}, which samples nothing"
        yield f"rollout.{field} {why}; leave it out, or set train.objective=grpo"


def _sampling(
    adapter: AdapterConfig, model: ModelConfig, data: DataConfig, train: TrainConfig, rollout: RolloutConfig
) -> Refusals:
    """Check settings of runs on sampled answers."""
    name, needs = f"train.objective={train.objective}", train.needs
    samples, group = train.global_batch * rollout.steps_per_generation, rollout.num_generations
    if samples % group != 0:
        yield (
            f"rollout.num_generations={group} does not divide the {samples:,} answers of a rollout (train.global_batch "
            f"x rollout.steps_per_generation); set train.global_batch={-(-train.global_batch // group) * group}"
        )
    if rollout.batch_invariant and train.compile is True:
        yield (
            "rollout.batch_invariant=true computes each token alike with torch's operations, and train.compile=true "
            "with others; leave one of them out"
        )
    if rollout.max_new_tokens + 2 > data.sequence_length:
        yield (
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in data.sequence_length="
            f"{data.sequence_length}; set data.sequence_length={rollout.max_new_tokens + 512}"
        )
    if not data.has_dialogues and "max_turns" in rollout.changed:
        needed = "data.environment or data.tools"
        yield f"rollout.max_turns={rollout.max_turns} has no effect without {needed}; leave it out"
    if data.has_dialogues and rollout.url is not None:
        setting = "data.tools" if data.tools else "data.environment"
        yield f"{setting} with rollout.url: only the run itself samples dialogues; leave one of them out"
    if needs.rewards and not data.rewards:
        yield f"{name} needs rewards; set data.rewards (docs/rl.md)"
    if needs.rewards and group == 1:
        yield "rollout.num_generations=1 leaves no answers to compare; set it to 2 or more (8 is usual)"
    for field in rollout.changed:
        if field in OF_REWARDS and not needs.rewards:
            why = f"has no effect with {name}, which does not train on rewards"
            yield f"rollout.{field}={as_typed(getattr(rollout, field))} {why}; leave it out"
    if not rollout.use_bias_correction_kl and train.of_objective("beta") == 0:
        yield "rollout.use_bias_correction_kl=false has no effect without a KL term; leave it out, or set train.beta"
    if adapter.method == "full":
        yield f"{name} with adapter=full: the base must stay as it is; set adapter=lora"
    if adapter.lora_dropout > 0:
        why = "the sampler has no dropout, so its probabilities would not be training's"
        yield f"{name} with adapter.lora_dropout={adapter.lora_dropout}: {why}; set it to 0"
    if data.streaming:
        yield f"{name} with data.streaming=true: prompts are drawn from all of the data; leave it out"
    if train.eval_documents:
        yield f"{name} with train.eval_documents=true: held-out prompts have rewards, no loss; leave it out"
    if rows := ", ".join(adapter.token_settings(model.new_tokens)):
        yield f"{name} with {rows}: the sampler reads the embedding as it is stored; leave it out"
    if train.sample_every is not None:
        why = "answers to held-out prompts are written at each evaluation"
        yield f"{name} with train.sample_every: {why}; leave it out"
    if data.too_long not in ("auto", "drop"):
        why = "a prompt without its end asks something else"
        yield f"{name} with data.too_long={data.too_long}: {why}; set data.too_long=drop"


def check_ranks(config: Config, ranks: int) -> None:
    """Raise UserError for what so many processes cannot share; a resume may be on others than the config has."""
    degree, divisors = config.shard_degree(ranks), [n for n in range(1, ranks + 1) if ranks % n == 0]
    parallel, quant, adapter, optim = config.parallel, config.quant, config.adapter, config.optim.name
    processes = f"{ranks:,} process{'es' if ranks > 1 else ''}"
    given = f"parallel.shard_degree={parallel.shard_degree}"
    given += f" (cluster.gpus_per_node={degree})" if parallel.shard_degree == "node" else ""
    if degree not in divisors:
        raise UserError(
            f"{given} does not divide the {processes} of this run, so not every replica of the base would have "
            f"{degree:,}; set parallel.shard_degree={max(n for n in divisors if n <= degree)} (of "
            f"{', '.join(map(str, divisors))}), or null for one replica over all"
        )
    experts = config.expert_degree(ranks)
    if experts not in (1, degree):
        cure = "replica, or 1 (every rank gathers all experts)" if degree > 1 else "1"
        raise UserError(
            f"parallel.expert_degree={experts} is not the number of ranks that shard a replica of the base, which is "
            f"{degree:,} ({given}, {processes}); set parallel.expert_degree={cure}"
        )
    gathers = ["parallel=zero3"] * (parallel.backend == "zero3")
    gathers += [f"parallel.resident_blocks={parallel.resident_blocks}"] * (parallel.resident_blocks != 0)
    if degree > 1 and parallel.backend != "fsdp2" and quant.num_dense > 0:
        raise UserError(
            f"quant.dense_layers={quant.dense_layers} keeps layers as FSDP2 gathered them once, and parallel=zero3 "
            "gathers them in every pass; leave it out, or set parallel=fsdp2"
        )
    for setting in gathers if degree <= 1 and parallel.shard_degree is not None else ():
        raise UserError(
            f"{setting} has no effect with {given}, where every rank holds the full base and gathers nothing; leave it "
            "out, or set another parallel.shard_degree"
        )
    alone = "parallel.shard_degree=1 if each process has memory for all of it"
    if degree > 1 and adapter.method == "full" and optim == "muon":
        raise UserError(
            f"optim.name=muon orthogonalizes whole matrices, which {degree} shards split (adapter=full is sharded); "
            f"set optim.name=adamw, or {alone}"
        )
    if degree > 1 and adapter.trains_base is not None and optim.endswith("_8bit"):
        raise UserError(
            f"optim.name={optim} stores optimizer states in blocks of 256, which {degree} shards would split "
            f"({adapter.trains_base} is sharded); set optim.name={optim.removesuffix('_8bit')}, or {alone}"
        )
