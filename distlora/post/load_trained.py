"""A model as it was trained, on these ranks: its base as in training, and what belongs on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import INDEX_NAME, SINGLE_NAME
from distlora.checkpoint.state import OR_WHAT_PISSA_TOOK, load_state
from distlora.config import Config, UserError
from distlora.loading.decomposed_adapters import load_initial_factors
from distlora.loading.peft_format import WEIGHTS_NAME, load_peft_adapter, whole_modules
from distlora.model.build import CausalLM, build_model
from distlora.parallel import Backend, Ranks
from distlora.post.trained import (
    BASE_ALONE,
    Trained,
    named_by_flag,
    with_adapter,
)
from distlora.run_folder.checkpoints import STATE_NAME, newest, steps
from distlora.run_folder.layout import CHECKPOINTS
from distlora.training.publish import load_weights
from distlora.training.setup import start_run_model
from distlora.weights.initial_adapter_file import base_identity


def load_trained(trained: Trained, ranks: Ranks) -> tuple[CausalLM, Backend]:
    """The model that `trained` names; every rank calls it. Raises UserError as `load_model`."""
    return load_model(trained.config, trained.weights, ranks, foreign=trained.foreign)


def load_model(
    config: Config, weights: str | Path | None, ranks: Ranks, *, foreign: bool = False
) -> tuple[CausalLM, Backend]:
    """The base of a run and what it trained: a folder of weights, a folder of checkpoints, or None for the base alone,
    exactly. A `foreign` adapter brings its own rank, scale and targets.

    Raises UserError for damaged checkpoints, and for weights that are another model's.
    """
    place = None if weights is None else Path(weights)
    if foreign or place is None:
        with named_by_flag():
            config = with_adapter(config, place)
    # Nothing is recomputed here, all processes, however many these are, share one copy of the base, and the machine may
    # be one that compiles nothing.
    config = replace(
        config,
        train=replace(config.train, keep_dequantized=False, compile=False),
        parallel=replace(config.parallel, shard_degree=None),
    )
    # Without weights B is zero.
    model, backend, _ = start_run_model(config, ranks, training=False, restores=place is not None)
    if foreign:
        with named_by_flag():
            load_peft_adapter(model, config.adapter, config.quant.method, backend)
            backend.watch_weights(model)  # What was trained whole is frozen here, and has come since.
    elif place is not None:
        folder = weights_in(place)
        check_base(folder, config)
        load_weights(folder, model, backend, load_initial_factors(config.run_dir) if config.adapter.pissa else None)
        backend.watch_weights(model)
    return model, backend


@torch.no_grad()
def load_in_fp32(trained: Trained, ranks: Ranks) -> tuple[CausalLM, Backend]:
    """`load_trained`, computing in fp32 with the very weights of training: what that rounds to train.dtype is rounded,
    and what was trained is not. Raises UserError as `load_model`."""
    config = trained.config
    held = {name: weight.dtype for name, weight in build_model(config.spec, training=False).named_parameters()}
    exact = replace(config, train=replace(config.train, dtype="fp32"))
    model, backend = load_trained(replace(trained, config=exact), ranks)
    whole = set(map(id, whole_modules(model).values()))
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and id(weight) not in whole and held[name] is not weight.dtype:
            local, _ = backend.local_rows(weight)
            local.copy_(local.to(held[name]))
    backend.watch_weights(model)
    return model, backend


def check_base(weights: Path, config: Config) -> None:
    """Raises UserError where the base is another than the one that a run's weights were trained on.

    A checkpoint names its base; what a run published has the run's checkpoints beside it.
    """
    states = [weights] if (weights / STATE_NAME).is_file() else steps(weights.parent / CHECKPOINTS)
    base = CheckpointFiles(config.model.path)
    identity = base_identity(base, config.adapter, config.run_dir) if states else ""
    if states and load_state(states[-1]).identity.base_fingerprint != identity:
        taken = OR_WHAT_PISSA_TOOK if config.adapter.pissa else ""
        raise UserError(
            f"{weights} was trained on another base: the weights at {config.model.path}{taken} have changed since; "
            "restore them"
        )


def weights_in(folder: Path) -> Path:
    """The folder itself if it holds weights, else the newest whole checkpoint in it."""
    if any((folder / name).is_file() for name in (WEIGHTS_NAME, SINGLE_NAME, INDEX_NAME)):
        return folder
    whole, damaged = newest(folder)
    if whole is None:
        raise UserError(
            f"{folder} holds no whole checkpoint ({'; '.join(damaged)}); write --adapter {BASE_ALONE} for the base"
        )
    return whole
