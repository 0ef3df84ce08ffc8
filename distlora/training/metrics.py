"""Describe a run in its log, and write RUN/summary.json."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator

import torch

from distlora.architecture.config_checks import read_config
from distlora.architecture.tokens import HEAD
from distlora.config import AdapterConfig, ClusterConfig, ModelSpec
from distlora.loading.load_base import Loaded
from distlora.model.adapters import AdaptedLinear, adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenLinear, FrozenTensor
from distlora.parallel import Backend, whole_shape
from distlora.run_folder.expert_load import layers_text
from distlora.training.expert_load import expert_modules
from distlora.training.open_run import OpenRun
from distlora.training.reporter import Reporter
from distlora.training.trial import Trial
from distlora_kernels.format_layouts import labels


def count_parameters(model: CausalLM) -> tuple[int, int]:
    """Return (weights of the model without adapters, trained parameters).

    Weights in low bits count as their unquantized number.
    """
    quantized = [m for m in model.modules() if isinstance(m, FrozenTensor) and m.quantized]
    others = set(adapter_parameters(model).values())
    others |= {module.get_parameter(name) for module in quantized for name in module.part_names}
    dense = sum(whole_shape(p).numel() for p in model.parameters() if p not in others)
    return dense + sum(module.numel for module in quantized), sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def formats_of(model: CausalLM) -> list[str]:
    """Return the names of the formats of the base's weights in low bits."""
    modules = (module for module in model.modules() if isinstance(module, FrozenTensor))
    return sorted({module.format.name for module in modules if module.format is not None})


def describe(
    reporter: Reporter, model: CausalLM, loaded: Loaded, spec: ModelSpec, cluster: ClusterConfig, backend: Backend
) -> None:
    """Log what was built, on which ranks, and which kernels it runs."""
    total, trainable = count_parameters(model)
    active = f" ({active_parameters(model):,} active per token)" if model.architecture.has_experts else ""
    reporter.event(
        f"{model.hf_config.model_type}, {total:,} parameters in the base{active}, {trainable:,} trained "
        f"({trainable / total:.2%}), {spec.dtype}"
    )
    if loaded.bits_per_weight is not None:
        formats = ", ".join(labels(formats_of(model)))
        reporter.event(
            f"{loaded.quantized_weights:,} parameters in {formats} at {loaded.bits_per_weight:.3f} bits each; "
            f"read {loaded.bytes_read / 2**20:,.0f} MiB on rank 0 "
            f"{loaded.how} in {loaded.seconds:.1f} s"
        )
    if backend.shards.num_replicas > 1:
        reporter.event(
            f"{backend.shards.num_replicas:,} replicas of the base, each sharded over {backend.shards.count:,} ranks; "
            "only gradients travel between replicas"
        )
        split = backend.shards.split_replicas(cluster.gpus_per_node)
        if cluster.nodes > 1 and split:
            reporter.event(
                f"{len(split):,} of {backend.shards.num_replicas:,} span several nodes, which have "
                f"{cluster.gpus_per_node:,} processes each, so the base is gathered between nodes too; "
                "parallel.shard_degree=node keeps it within each"
            )
    if "auto_map" in read_config(spec.path):
        reporter.event(
            f"code that comes with the weights is not run; the model is transformers' {model.architecture.model_class}"
        )
    for line in (*_vocabulary(model), *describe_experts(model)):
        reporter.event(line)
    for note in model.notes:
        reporter.event(note)


def _vocabulary(model: CausalLM) -> Iterator[str]:
    vocabulary = model.vocabulary
    if vocabulary.new:
        named = [f"{text} = {id}" for text, id in vocabulary.new.items()]
        grown = "spare rows of the embedding and the LM head hold them"
        if vocabulary.has_grown:
            grown = f"the embedding and the LM head have grown from {vocabulary.stored:,} to {vocabulary.rows:,} rows"
        yield f"{len(named)} new tokens: {', '.join(named[:8])}{', ...' if len(named) > 8 else ''}; {grown}"
    for matrix, ids in vocabulary.trained.items():
        name = "the head" if matrix == HEAD else "the embedding" + (" and the head tied to it" if model.tied else "")
        yield f"{len(ids):,} rows of {name} are trained"
    if model.modules_to_save:
        yield (
            f"{' and '.join(model.modules_to_save)} are trained fully"
            + (", separately: config.json ties them, the adapter does not" if model.tied_in_base else "")
        )


_SHARED = re.compile(r"\.shared_(experts?|mlp)\.")
"""Paths of linears in the experts that each token uses."""


def describe_experts(model: CausalLM) -> Iterator[str]:
    """Describe which parts of a mixture of experts are trained, and its router loss."""
    weights = (weight for kind in model.architecture.kinds for weight in kind.weights)
    own = sorted({w.path for w in weights if w.kind == "fused" and ("expert" in w.path or len(w.shape) > 2)})
    if own:
        yield (
            f"experts in the model's own code ({', '.join(own)}) have no adapters and are frozen, and so are their "
            "routers; their load is not counted"
        )
    layers = expert_modules(model)
    if not layers:
        return
    adapted = {index: [w for w in module.weights if w.pairs] for index, module in layers.items()}
    fused = sorted({name.rpartition(".")[2] for name, _ in model.adapted_experts()})
    parts = ["experts have no adapters and are frozen"]
    if fused:
        count = max(module.weights[0].num_experts for module in layers.values())
        those = layers_text(index for index, with_pairs in adapted.items() if with_pairs)
        parts = [f"the experts' {' and '.join(fused)} have adapters in {those} ({count:,} experts each)"]
        if frozen := [index for index, with_pairs in adapted.items() if not with_pairs]:
            parts.append(f"the experts of {layers_text(frozen)} are frozen")
        factors = {(name.rpartition(".")[2], pair.shared) for name, w in model.adapted_experts() for pair in w.pairs}
        if shares := sorted(f"{factor} of {name}" for name, factor in factors if factor is not None):
            parts.append(f"all experts of a layer share {' and '.join(shares)}")
    shared = [m for name, m in model.named_modules() if _SHARED.search(name) and isinstance(m, FrozenLinear)]
    if shared:
        count = sum(isinstance(m, AdaptedLinear) and bool(m.pairs) for m in shared)
        parts.append(f"{count:,} of {len(shared):,} linears of shared experts have adapters")
    adaptable, names = model.architecture.adaptable(), {name for name, _ in model.adapted_weights()}
    gates = {w.path.removesuffix(".weight"): None for name, w in adaptable if w.is_gate and name not in names}
    yield "; ".join([*parts, f"{' and '.join(['routers', *gates])} have none and are frozen"])
    if model.router_aux_loss > 0:
        yield (
            f"training losses include {model.router_aux_loss:g} x the routers' load-balancing loss of each row; "
            "held-out losses do not"
        )


def active_parameters(model: CausalLM) -> int:
    """Return the base weights that a token uses; of experts, those that it chooses."""
    architecture, idle = model.architecture, 0
    for index in range(architecture.num_layers):
        kind = architecture.layer(index)
        if kind.experts is not None:
            experts = sum(weight.numel for weight in kind.weights if weight.kind == "experts")
            idle += experts // kind.experts.num_experts * (kind.experts.num_experts - kind.experts.chosen)
    return count_parameters(model)[0] - idle


def describe_steps(reporter: Reporter, run: OpenRun) -> None:
    """Log the number of steps and rows, the empty rows that ranks will compute, the warm-up and the evaluations."""
    loader, total_steps, train = run.loader, run.total_steps, run.config.train
    if train.needs.data == "prompts":
        config = run.config
        reporter.event(
            f"{total_steps:,} steps of {train.global_batch:,} answers; every {config.rollout.steps:,} steps a "
            f"rollout of {config.prompts_per_rollout:,} prompts, {config.rollout.num_generations:,} answers each"
        )
        return
    slots = loader.world * loader.micro_batch * loader.accumulation
    rows = min(loader.global_batch, len(loader.rows))
    line = f"{total_steps:,} step{'s' if total_steps > 1 else ''} of {rows:,} sequence{'s' if rows > 1 else ''}"
    if rows < slots:
        line += f"; each also computes {slots - rows:,} empty ones (global_batch {loader.global_batch:,}, "
        line += f"{loader.world} ranks x micro_batch {loader.micro_batch} x {loader.accumulation}"
        line += f", {len(loader.rows):,} sequences in all)" if len(loader.rows) < loader.global_batch else ")"
    if train.max_steps is None and train.epochs != 1:
        line += f"; {train.epochs:g} epochs of {loader.steps_per_epoch:,} steps"
    if (warmup := run.config.optim.warmup(total_steps)) >= total_steps > 1:
        line += f"; all of them are within the {warmup:,} warm-up steps"
    reporter.event(line)
    if (chosen := run.evaluations) is not None and train.eval_every == "auto" and train.evals_per_epoch is None:
        steps = [-(-number * chosen.steps // chosen.times) for number in range(1, chosen.times + 1)]
        reporter.event(f"held-out evaluations after steps {', '.join(f'{step:,}' for step in steps)}")


def summarize(trial: Trial, model: CausalLM, loaded: Loaded, adapter: AdapterConfig) -> None:
    """Write RUN/summary.json, the metrics for comparing runs. Every rank must call it."""
    backend, progress, reporter = trial.backend, trial.progress, trial.reporter
    # The kernel counts in KiB, macOS in bytes.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peaks = torch.tensor([trial.peak_bytes() or 0, resident], dtype=torch.float64, device=backend.ranks.device)
    peak, resident = map(int, backend.max_over_ranks(peaks).tolist())
    figures: dict[str, float | list[str]] = {
        "resident_memory_bytes": resident,
        "trainable_parameters": sum(parameter.numel() for parameter in trial.trained.parameters.values()),
        "train_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds,
    }
    if peak:
        figures["peak_memory_bytes"] = peak
    if trial.memory is not None:
        figures |= trial.memory.figures
    if model.architecture.has_experts:
        figures["active_parameters"] = active_parameters(model)
    if trial.expert_load is not None:
        figures |= trial.expert_load.figures()
        for line in trial.expert_load.describe():
            reporter.event(line)
    if adapter.method == "lora":
        figures["adapter_bytes"] = sum(parameter.nbytes for parameter in trial.trained.parameters.values())
    if trial.without_gradient is not None:
        figures["parameters_without_gradient"] = trial.without_gradient
    if loaded.bits_per_weight is not None:
        figures["bits_per_parameter"] = loaded.bits_per_weight
        figures["formats"] = formats_of(model)
    if trial.step_traffic is not None:  # None: the resumed checkpoint is the last step's.
        gathered = trial.step_traffic.gathered_bytes
        extra = backend.unpacked_extra_bytes(model, trial.step_passes)
        figures["gathered_bytes_per_step"] = gathered
        figures["gathered_bytes_per_step_bf16"] = gathered + extra
        figures["reduced_bytes_per_step"] = trial.step_traffic.reduced_bytes
        figures["scattered_bytes_per_step"] = trial.step_traffic.scattered_bytes
        if trial.step_traffic.exchanged_bytes:
            figures["exchanged_bytes_per_step"] = trial.step_traffic.exchanged_bytes
        if backend.shards.num_replicas > 1:
            between = trial.step_traffic.between_replicas_bytes
            figures["between_replicas_bytes_per_step"] = between
            reporter.event(
                f"in each step a rank gathered {gathered / 2**20:,.1f} MiB within its replica of the base; between the "
                f"{backend.shards.num_replicas:,} replicas {between / 2**20:,.1f} MiB of gradients were all-reduced"
            )
    if progress.evaluations:
        first = "base_eval_loss" if adapter.starts_as_base else "initial_eval_loss"
        if 0 in progress.evaluations:
            figures[first] = progress.evaluations[0]
        figures["eval_loss"] = progress.evaluations[max(progress.evaluations)]
        figures |= trial.held_out  # From the last evaluation, at that step.
        if progress.best_step is not None:
            figures["best_eval_loss"] = progress.evaluations[progress.best_step]
            figures["best_step"] = progress.best_step
    reporter.summary(figures)
