"""Initial adapters that are decomposed from the base (PiSSA, LoftQ): computed once, kept in the run folder.

This is the exception to the memory bound of loading: one rank reads and decomposes a whole weight. The weights are
distributed over the ranks, as many at a time as there are ranks, and each result is broadcast. Only A and B are sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import AdapterConfig, ModelSpec, UserError
from distlora.config.base import subspace_iterations
from distlora.loading.load_base import find_base, segments_of
from distlora.loading.peft_format import adapter_tensors
from distlora.loading.quantize import CHUNK_GROUPS
from distlora.model.adapters import AdaptedLinear
from distlora.model.build import CausalLM
from distlora.parallel import Backend, watch
from distlora.system import atomic_io
from distlora.weights.decompose import Sketch, principal_part, quantization_error
from distlora.weights.initial_adapter_file import (
    INITIAL_ADAPTER_NAME,
    InitialAdapterRecord,
    check_ranks,
    digest_of,
    initial_adapter_path,
    read_initial_adapter_record,
    require_initial_adapter,
)
from distlora.weights.reader import Reader

PROGRESS_SECONDS = 5.0
"""Seconds between two progress lines."""


def initialize_from_base(
    model: CausalLM,
    spec: ModelSpec,
    run_dir: str | Path,
    base: CheckpointFiles,
    backend: Backend,
    say: Callable[[str], None],
    *,
    restores: bool,
    boundary: watch.Marker = watch.at,
) -> None:
    """Fill every adapter from the run's initial adapter, or compute and save it. Every rank must call it.

    `restores`: the file must exist. `boundary` marks each decomposition, on every rank alike. Raises UserError if the
    file is missing, damaged or made from another base, if a rank is too large, and for NaN or Inf weights.
    """
    read = require_initial_adapter if restores else read_initial_adapter_record
    record = read(run_dir, spec.adapter, base)
    if record is not None:
        say(f"reading the initial adapter ({record.method}) from {INITIAL_ADAPTER_NAME}")
        _fill(model, run_dir)
        return
    check_ranks(spec.adapter, {path: _shape(linear) for path, linear in model.adapted_linears()})
    began = time.monotonic()
    _decompose(model, spec, base, backend, say, boundary)
    watch.at(None, f"saving {INITIAL_ADAPTER_NAME}", long=True)
    if backend.writes:
        save_initial_adapter(model, run_dir, method=spec.adapter.init, base=base)
    backend.barrier()
    say(f"decomposed in {time.monotonic() - began:.1f} s; initial A and B saved in {INITIAL_ADAPTER_NAME}")


def load_initial_factors(run_dir: str | Path) -> dict[str, Tensor]:
    """Return A0 (r, in) and B0 (out, r) by PEFT's names, fp32."""
    return safetensors.torch.load_file(initial_adapter_path(run_dir))


@torch.no_grad()
def _fill(model: CausalLM, run_dir: str | Path) -> None:
    parameters, factors = _factors(model), load_initial_factors(run_dir)
    wrong = sorted(parameters.keys() ^ factors.keys())
    wrong = wrong or [name for name, factor in factors.items() if factor.shape != parameters[name].shape]
    if wrong:
        raise UserError(
            f"{initial_adapter_path(run_dir)} does not fit the adapter in config.yaml: {wrong[0]} has another shape or "
            f"no place ({len(wrong)} such tensors); restore the file, or config.yaml, that the run began with"
        )
    for name, parameter in parameters.items():
        parameter.copy_(factors[name])


def _factors(model: CausalLM) -> dict[str, nn.Parameter]:
    """Return A and B by PEFT's names, without the token rows that are trained beside them."""
    return {name: parameter for name, parameter in adapter_tensors(model).items() if ".lora_" in name}


def save_initial_adapter(model: CausalLM, run_dir: str | Path, *, method: str, base: CheckpointFiles) -> None:
    """Write the run's initial adapter file atomically."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in sorted(_factors(model).items())}
    contents = ((name, tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors.items())
    record = InitialAdapterRecord(method=method, base=base.fingerprint, digest=digest_of(contents))
    metadata = {"format": "pt", **record.metadata()}

    def write(path: Path) -> None:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read.

    atomic_io.replace_file(initial_adapter_path(run_dir), write)


def _decompose(
    model: CausalLM,
    spec: ModelSpec,
    base: CheckpointFiles,
    backend: Backend,
    say: Callable[[str], None],
    boundary: watch.Marker,
) -> None:
    linears = sorted(model.adapted_linears(), key=lambda item: (-item[1].in_features * item[1].out_features, item[0]))
    sources = find_base(model, base.headers)
    world, last_line = backend.ranks.world, time.monotonic()
    largest = " x ".join(map(str, _shape(linears[0][1])))
    say(
        f"decomposing {len(linears):,} weights (largest {largest}) for adapter.init={spec.adapter.init} on "
        + ("this process" if world == 1 else f"{world} ranks, each weight whole on one of them")
    )
    with Reader() as reader:
        for done in range(0, len(linears), world):
            together = linears[done : done + world]  # Similar sizes, so that no rank waits long for another.
            mine = together[backend.ranks.rank] if backend.ranks.rank < len(together) else None
            boundary(None, f"decomposing {mine[0]}" if mine else "waiting for the last decompositions", long=True)
            if mine:
                path, linear = mine
                segments = segments_of(sources, f"{path}.weight", _shape(linear))
                weight = reader.read(segments, 0, linear.in_features * linear.out_features).view(_shape(linear))
                _initialize(linear, path, weight.to(backend.ranks.device), spec.adapter, spec.seed)
            for owner, (_, linear) in enumerate(together):
                for parameter in linear.pairs[0].parameters():
                    backend.broadcast(parameter.data, owner)
            if time.monotonic() - last_line >= PROGRESS_SECONDS:
                last_line = time.monotonic()
                say(f"decomposed {done + len(together):,} of {len(linears):,} weights")


@torch.no_grad()
def _initialize(linear: AdaptedLinear, path: str, weight: Tensor, adapter: AdapterConfig, seed: int) -> None:
    """Decompose one whole weight (out, in) into its linear's adapter."""
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{path}.weight holds NaN or Inf weights; the checkpoint is damaged, download it again")
    (pair,) = linear.pairs
    if not adapter.pissa:
        weight = quantization_error(weight, chunk_groups=CHUNK_GROUPS)
    iterations = subspace_iterations(adapter.init)
    sketch = None if iterations is None else Sketch(seed, f"{path}.sketch", iterations)
    factors = principal_part(weight, pair.A.shape[0], scaling=pair.scaling, sketch=sketch)
    pair.A.copy_(factors.A)
    pair.B.copy_(factors.B)


def _shape(linear: AdaptedLinear) -> tuple[int, int]:
    return linear.out_features, linear.in_features
