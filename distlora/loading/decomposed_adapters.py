"""Adapters decomposed from the base (PiSSA, LoftQ): computed once, kept in the run folder; PiSSA's as a plain LoRA.

This is the exception to the memory bound of loading: one rank reads and decomposes a whole weight. The weights are
distributed over the ranks, as many at a time as there are ranks, and each result is broadcast. Only A and B are sent.

PiSSA trains on W_res = W - s B0 A0 and gives W_res + s B A = W + s (B A - B0 A0) = W + s B' A' with A' = [A; A0] (2r,
in) and B' = [B, -B0] (out, 2r) (Meng et al. 2024, arXiv 2404.02948). The rank doubles, and lora_alpha grows so that s
stays the same, for every entry of rank_pattern and alpha_pattern too.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import AdapterConfig, ModelSpec, UserError
from distlora.config.base import is_pissa, subspace_iterations
from distlora.config.json_files import read_object
from distlora.loading.load_base import find_base, segments_of
from distlora.loading.peft_format import adapter_tensors
from distlora.loading.tensor_files import DeferredTensor
from distlora.model.adapters import AdaptedLinear
from distlora.model.build import CausalLM
from distlora.parallel import Backend, watch
from distlora.system import atomic_io
from distlora.weights.decompose import Sketch, principal_part, quantization_error
from distlora.weights.initial_adapter_file import (
    INITIAL_ADAPTER_NAME,
    InitialAdapterRecord,
    digest_of,
    initial_adapter_path,
    read_initial_adapter_record,
    require_initial_adapter,
)
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import Reader, check_finite

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
    file is missing, damaged or made from another base, and for NaN or Inf weights.
    """
    read = require_initial_adapter if restores else read_initial_adapter_record
    record = read(run_dir, spec.adapter, base)
    if record is not None:
        say(f"reading the initial adapter ({record.method}) from {INITIAL_ADAPTER_NAME}")
        _fill(model, run_dir)
        return
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
    check_finite(f"{path}.weight", weight)
    (pair,) = linear.pairs
    if not adapter.pissa:
        weight = quantization_error(weight)
    iterations = subspace_iterations(adapter.init)
    sketch = None if iterations is None else Sketch(seed, f"{path}.sketch", iterations)
    factors = principal_part(weight, pair.A.shape[0], scaling=pair.scaling, sketch=sketch)
    pair.A.copy_(factors.A)
    pair.B.copy_(factors.B)


def _shape(linear: AdaptedLinear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def plain_config(trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json of the plain LoRA from that of the trained adapter."""
    growth = 2**0.5 if trained["use_rslora"] else 2.0
    return {
        **trained,
        "r": 2 * trained["r"],
        "lora_alpha": growth * trained["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in trained["rank_pattern"].items()},
        "alpha_pattern": {key: growth * alpha for key, alpha in trained["alpha_pattern"].items()},
        "init_lora_weights": True,
    }


def trained_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json of the trained adapter from that of the plain LoRA."""
    growth = 2**0.5 if plain["use_rslora"] else 2.0
    return {
        **plain,
        "r": plain["r"] // 2,
        "lora_alpha": plain["lora_alpha"] / growth,
        "rank_pattern": {key: rank // 2 for key, rank in plain["rank_pattern"].items()},
        "alpha_pattern": {key: alpha / growth for key, alpha in plain["alpha_pattern"].items()},
    }


def plain_tensors(trained: Mapping[str, Tensor], start_file: Path) -> dict[str, Tensor | DeferredTensor]:
    """Return A' and B' by PEFT's names; A0 and B0 are read from `start_file` when each tensor is made.

    Tensors trained beside A and B stay the same. Nothing is read here: every rank calls this, and a rank that alone
    failed to read the file would leave the others waiting in a collective.
    """

    def unmade(name: str, tensor: Tensor) -> DeferredTensor:
        shape = list(tensor.shape)
        shape[_dim(name)] *= 2

        def make() -> Tensor:
            with safe_open(start_file, framework="pt") as file:
                return _joined(name, tensor.detach().cpu(), file.get_tensor(name))

        return DeferredTensor(shape=torch.Size(shape), dtype=tensor.dtype, make=make)

    return {name: unmade(name, tensor) if is_pair(name) else tensor for name, tensor in trained.items()}


def is_pair(name: str) -> bool:
    """Return whether PEFT's name is that of an A or B."""
    return ".lora_" in name


@contextlib.contextmanager
def plain_form(folder: Path, adapter: AdapterConfig, run_dir: str | Path) -> Iterator[Path]:
    """Yield the folder of an adapter for the unchanged base.

    That is `folder` itself; for a saved PiSSA step it is a temporary folder with the plain LoRA.
    """
    says = read_object(folder / CONFIG_NAME, "save the adapter again") if adapter.pissa else {}
    if not is_pissa(str(says.get("init_lora_weights"))):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="distlora-plain-") as place:
        plain = plain_tensors(load_file(folder / WEIGHTS_NAME), initial_adapter_path(run_dir))
        tensors = {name: one.make() if isinstance(one, DeferredTensor) else one for name, one in plain.items()}
        save_file(tensors, Path(place) / WEIGHTS_NAME, metadata={"format": "pt"})
        atomic_io.write_json(Path(place) / CONFIG_NAME, plain_config(says))
        yield Path(place)


def trained_part(name: str, plain: Tensor, start: Tensor, folder: Path) -> Tensor:
    """Return A or B from A' or B' in `folder`. Raises UserError if the adapter had other initial values."""
    dim = _dim(name)
    trained = plain.narrow(dim, 0, plain.shape[dim] // 2)
    if plain.shape[dim] != 2 * start.shape[dim] or not torch.equal(plain, _joined(name, trained, start)):
        raise UserError(
            f"{folder} was trained from another start: {name} does not end with that of this run; put back the folder "
            "that this run made"
        )
    return trained


def _dim(name: str) -> int:
    """Return the dimension of A or B that is as wide as the rank."""
    return 0 if ".lora_A." in name else 1


def _joined(name: str, trained: Tensor, start: Tensor) -> Tensor:
    return torch.cat([trained, start if _dim(name) == 0 else -start], dim=_dim(name))
