"""Adapters that start from the base's weights (PiSSA, LoftQ): computed once, kept in the run, read again later.

The exception to the memory bound of loading: a weight is decomposed by one rank, which reads it whole. The weights go
round the ranks, as many at a time as there are ranks, so that all of them compute; what one has computed is broadcast.
Adapters are replicated, so nothing of a weight but A and B goes over the wire.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from distlora.architecture.safetensors_headers import fingerprint, read_headers
from distlora.config import Config, UserError
from distlora.config.initialization import subspace_iterations
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

SAY_SECONDS = 5.0
"""Between two lines about a decomposition that goes on."""


def initialize_from_base(
    model: CausalLM,
    config: Config,
    backend: Backend,
    say: Callable[[str], None],
    *,
    restores: bool,
    boundary: watch.Marker = watch.at,
) -> None:
    """Fill every adapter with the start that the run keeps, or compute it and keep it. Every rank must call it.

    `restores`: the run must have it. `boundary` marks what is decomposed, on every rank alike. Raises UserError for a
    start that is gone, damaged or another base's, for ranks that a weight does not have, and for NaN or Inf weights.
    """
    record = require_initial_adapter(config) if restores else read_initial_adapter_record(config)
    if record is not None:
        say(f"the adapters' start ({record.method}) is that in {INITIAL_ADAPTER_NAME}")
        _fill(model, config)
        return
    check_ranks(config.adapter, {path: _shape(linear) for path, linear in model.adapted_linears()})
    began = time.monotonic()
    _decompose(model, config, backend, say, boundary)
    watch.at(None, f"keeping {INITIAL_ADAPTER_NAME}", long=True)
    if backend.writes:
        save_initial_adapter(model, config)
    backend.barrier()
    say(f"decomposed in {time.monotonic() - began:.1f} s; A and B at their start are kept in {INITIAL_ADAPTER_NAME}")


def load_initial_factors(config: Config) -> dict[str, Tensor]:
    """A0 (r, in) and B0 (out, r) by PEFT's names, fp32."""
    return safetensors.torch.load_file(initial_adapter_path(config))


@torch.no_grad()
def _fill(model: CausalLM, config: Config) -> None:
    own, start = _pairs(model), load_initial_factors(config)
    odd = sorted(own.keys() ^ start.keys()) or [name for name, part in start.items() if part.shape != own[name].shape]
    if odd:
        raise UserError(
            f"{initial_adapter_path(config)} does not fit the adapter in config.yaml: {odd[0]} has another shape or "
            "no place "
            f"({len(odd)} such tensors); put back the file, or config.yaml, that the run began with"
        )
    for name, parameter in own.items():
        parameter.copy_(start[name])


def _pairs(model: CausalLM) -> dict[str, nn.Parameter]:
    """A and B by PEFT's names, without the token rows that are trained beside them."""
    return {name: parameter for name, parameter in adapter_tensors(model).items() if ".lora_" in name}


def save_initial_adapter(model: CausalLM, config: Config) -> None:
    """Write the run's start file: whole and on the disk, or not at all."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in sorted(_pairs(model).items())}
    contents = ((name, tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors.items())
    base = fingerprint(Path(config.model.path))
    record = InitialAdapterRecord(method=config.adapter.init, base=base, digest=digest_of(contents))
    metadata = {"format": "pt", **record.metadata()}

    def write(path: Path) -> None:
        safetensors.torch.save_file(tensors, path, metadata=metadata)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read.

    atomic_io.replace_file(initial_adapter_path(config), write)


def _decompose(
    model: CausalLM, config: Config, backend: Backend, say: Callable[[str], None], boundary: watch.Marker
) -> None:
    linears = sorted(model.adapted_linears(), key=lambda item: (-item[1].in_features * item[1].out_features, item[0]))
    sources = find_base(model, read_headers(Path(config.model.path)))
    world, said = backend.ranks.world, time.monotonic()
    most = " x ".join(map(str, _shape(linears[0][1])))
    say(
        f"decomposing {len(linears):,} weights for adapter.init={config.adapter.init}, the largest of {most}, "
        + ("whole, on this process" if world == 1 else f"each whole on one of {world} ranks")
    )
    with Reader() as reader:
        for done in range(0, len(linears), world):
            together = linears[done : done + world]  # Of like size, so that no rank waits long for another.
            own = together[backend.ranks.rank] if backend.ranks.rank < len(together) else None
            boundary(None, f"decomposing {own[0]}" if own else "waiting for the last decompositions", long=True)
            if own:
                path, linear = own
                segments = segments_of(sources, f"{path}.weight", _shape(linear))
                weight = reader.read(segments, 0, linear.in_features * linear.out_features).view(_shape(linear))
                _start(linear, path, weight.to(backend.ranks.device), config)
            for owner, (_, linear) in enumerate(together):
                for parameter in linear.pairs[0].parameters():
                    backend.broadcast(parameter.data, owner)
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                say(f"decomposed {done + len(together):,} of {len(linears):,} weights")


@torch.no_grad()
def _start(linear: AdaptedLinear, path: str, weight: Tensor, config: Config) -> None:
    """Decompose one whole weight (out, in) into its linear's adapter."""
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{path}.weight holds NaN or Inf weights; the checkpoint is damaged, download it again")
    (pair,) = linear.pairs
    if not config.adapter.pissa:
        weight = quantization_error(weight, chunk_groups=CHUNK_GROUPS)
    iterations = subspace_iterations(config.adapter.init)
    sketch = None if iterations is None else Sketch(config.train.seed, f"{path}.sketch", iterations)
    start = principal_part(weight, pair.A.shape[0], scaling=pair.scaling, sketch=sketch)
    pair.A.copy_(start.A)
    pair.B.copy_(start.B)


def _shape(linear: AdaptedLinear) -> tuple[int, int]:
    return linear.out_features, linear.in_features
