"""Load a trained model on these ranks: its base as in training, and the trained weights."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.images import ImageLayout
from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME
from distlora.checkpoint.state import OR_WHAT_PISSA_TOOK, load_state
from distlora.config import UserError, require
from distlora.config.errors import named_settings
from distlora.loading.decomposed_adapters import load_initial_factors
from distlora.loading.peft_format import load_peft_adapter, whole_modules
from distlora.model.build import CausalLM, build_model
from distlora.parallel import Backend, Ranks, join_ranks, leave_ranks
from distlora.post.trained import BASE_ALONE, BY_FLAG, Trained, versions
from distlora.run_folder.layout import CHECKPOINTS, STATE_NAME, Result, newest, read_result, steps
from distlora.system.exit_codes import DONE, FAILED
from distlora.system.progress import say
from distlora.training.publish import load_weights
from distlora.training.setup import StartOptions, start_model
from distlora.weights.initial_adapter_file import base_identity
from distlora.weights.peft_folder import WEIGHTS_NAME


def load_trained(trained: Trained, ranks: Ranks) -> tuple[CausalLM, Backend]:
    """Load a trained model; every rank must call it.

    Raises UserError for damaged checkpoints, and for weights of another model.
    """
    spec, place = trained.spec, trained.weights
    # There is no backward, all ranks share one copy of the base, and the node may have no compiler.
    model, backend, _ = start_model(
        replace(spec, quant=replace(spec.quant, dense_layers=0)),
        ranks,
        # Without weights B is zero.
        StartOptions(training=False, restores=place is not None, run_dir=trained.initial_adapter_dir),
        train=replace(trained.train, compile=False, dtype=spec.dtype),
        parallel=replace(trained.parallel, shard_degree=None, expert_degree=1),
        shard_degree=ranks.world,
        sequence_length=None if trained.data is None else trained.data.sequence_length,
    )
    if trained.foreign:
        with named_settings(BY_FLAG):
            load_peft_adapter(model, spec.adapter, spec.quant.method, backend)
            backend.watch_weights(model)  # Frozen modules were replaced by trained ones.
    elif place is not None:
        folder = weights_in(place)
        check_base_unchanged(folder, trained)
        initial = load_initial_factors(trained.initial_adapter_dir) if spec.adapter.pissa else None
        load_weights(folder, model, backend, initial)
        backend.watch_weights(model)
    return model, backend


@torch.no_grad()
def load_in_fp32(trained: Trained, ranks: Ranks) -> tuple[CausalLM, Backend]:
    """Load a trained model that computes in fp32 with the weights of training, rounded as training rounds them.

    Its vision tower is not rounded, since a merged model has it as the base stores it. Raises UserError as
    `load_trained`.
    """
    held = {name: weight.dtype for name, weight in build_model(trained.spec, training=False).named_parameters()}
    model, backend = load_trained(replace(trained, spec=replace(trained.spec, dtype="fp32")), ranks)
    whole = set(map(id, whole_modules(model).values()))
    for name, weight in model.named_parameters():
        is_kept = id(weight) in whole or name.startswith("merger.")
        if weight.is_floating_point() and not is_kept and held[name] is not weight.dtype:
            local, _ = backend.local_rows(weight)
            local.copy_(local.to(held[name]))
    backend.watch_weights(model)
    return model, backend


def require_whole_embedding(layout: ImageLayout, base: Path, world: int) -> None:
    """Raise UserError if transformers would read a sharded embedding of a model of images."""
    require(
        world == 1 or not layout.reads_embedding,
        f"--processes={world}: transformers reads the embedding of {base} outside of its forward, so its images need "
        "it whole on each rank; leave --processes out",
    )


def check_base_unchanged(weights: Path, trained: Trained) -> None:
    """Raise UserError if a run's base changed since its weights were trained.

    A checkpoint names its base; a published result has the run's checkpoints beside it.
    """
    spec = trained.spec
    states = [weights] if (weights / STATE_NAME).is_file() else steps(weights.parent / CHECKPOINTS)
    identity = base_identity(CheckpointFiles(spec.path), spec.adapter, trained.initial_adapter_dir) if states else ""
    if states and load_state(states[-1]).identity.base_fingerprint != identity:
        taken = OR_WHAT_PISSA_TOOK if spec.adapter.pissa else ""
        raise UserError(
            f"{weights} was trained on another base: the weights at {spec.model.path}{taken} have changed since; "
            "restore them"
        )


def weights_in(folder: Path) -> Path:
    """Return the folder if it holds weights, else the newest complete checkpoint in it. Raises UserError for none."""
    if any((folder / name).is_file() for name in (WEIGHTS_NAME, SINGLE_NAME, INDEX_NAME)):
        return folder
    whole, damaged = newest(folder)
    if whole is None:
        raise UserError(
            f"{folder} holds no complete checkpoint ({'; '.join(damaged)}); write --adapter {BASE_ALONE} for the base"
        )
    return whole


def result_of(trained: Trained, checkpoint: str | None) -> Result:
    """Return the result of a run at a checkpoint; without one what it published, or its newest complete checkpoint."""
    assert trained.run_dir is not None
    assert trained.weights is not None
    folder = weights_in(trained.weights)
    if checkpoint is None and folder.name.startswith("step_"):
        checkpoint = folder.name
    return replace(read_result(trained.run_dir, checkpoint), folder=folder)


def run_on_ranks(work: Callable[[Ranks], None], *, when_memory_is_out: str) -> int:
    """Do `work` on this rank and return the exit code: 1 if the GPU of a single rank runs out of memory, else 0."""
    ranks = join_ranks()
    try:
        work(ranks)
    except torch.OutOfMemoryError as error:
        if ranks.world > 1:
            raise
        say(f"error: {str(error).partition('. ')[0]}; {when_memory_is_out}")
        return FAILED
    if ranks.world > 1:
        leave_ranks(ranks)
    return DONE


def made_on(device: torch.device, *packages: str) -> dict[str, Any]:
    """Return the date, device and versions to report with figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "device": f"{device.type} ({name})",
        "versions": versions(*packages),
    }
