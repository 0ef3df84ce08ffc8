"""Calculate the disk space of a run: quantized shards, checkpoints, results and the base. Imports no torch.

Headers are made here by what makes them for the code that writes the files: distlora/loading/tensor_files.py
(checkpoints, results) and distlora/loading/quantized_cache_io.py (shards).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distlora.architecture.expert_targets import peft_paths
from distlora.architecture.safetensors_headers import DTYPE_BYTES, header_bytes, lay_out
from distlora.architecture.shapes import ModelShapes, expert_paths
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.planner import traffic
from distlora.planner.machine import Machine
from distlora.planner.memory.trained import absmaxes, is_in_8_bits
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload
from distlora.weights.quantized_cache_format import GROUP_BYTES, Extent, cut, header_of

JSON_BYTES = 2300
"""adapter_config.json, state.json and manifest.json of a checkpoint together, one or two evaluations in (measured,
2026-11-25)."""
CONFIG_BYTES = 560
"""Of it adapter_config.json, which a result has too."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"
    """As safetensors has it."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskBytes:
    """Bytes on disks, all ranks together."""

    base: int
    """The model as it is downloaded, or lies in its folder."""
    cache: int
    """Its quantized shards, for the next start (quant.cache_dir); 0: none are kept."""
    checkpoint: int
    """One of them: what is trained, and the optimizer's state. Of a pack, like the result, all trials' together."""
    checkpoints_kept: int
    """At the most: the newest, the best, and the one that is being written."""
    result: int
    """RUN/adapter or RUN/model."""
    results_kept: int
    """2 where RUN/best is kept too."""

    @property
    def checkpoints(self) -> int:
        """Bytes of all kept checkpoints."""
        return self.checkpoints_kept * self.checkpoint

    @property
    def results(self) -> int:
        """Bytes of all kept results."""
        return self.results_kept * self.result

    @property
    def run(self) -> int:
        """RUN, beside a few MB of logs and figures."""
        return self.checkpoints + self.results

    def as_json(self) -> dict[str, int]:
        """Return every figure in bytes, for programs."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"checkpoints": self.checkpoints, "results": self.results, "run": self.run}


def disk_bytes(work: Workload, model: PlannedModel, machine: Machine) -> DiskBytes:
    """Return the disk space of a training run."""
    trained = [list(trained_tensors(trial, model.shapes)) for trial in work.alone()]
    return DiskBytes(
        base=base_bytes(model),
        cache=cache_bytes(work, model, machine),
        checkpoint=sum(
            file_bytes(own) + file_bytes(list(optimizer_tensors(work, own))) + JSON_BYTES for own in trained
        ),
        checkpoints_kept=work.checkpoints_kept,
        result=sum(_result_bytes(work, model, own) for own in trained),
        results_kept=work.results_kept,
    )


def base_bytes(model: PlannedModel) -> int:
    """Return the bytes of the model's files; 16 bits per parameter if unknown."""
    return 2 * model.shapes.numel if model.stored_bytes is None else model.stored_bytes


def trained_tensors(work: Workload, shapes: ModelShapes) -> Iterator[Tensor]:
    """Yield the trained tensors as fp32 masters, of all trials, by PEFT's names (distlora/loading/peft_format.py).

    With adapter=full the names are those of transformers.
    """
    decoder, matrix = shapes.family.decoder, (shapes.vocabulary, shapes.hidden)
    matrices = {EMBEDDING: f"{decoder}.{EMBEDDING}", HEAD: HEAD}
    if work.adapter.method == "full":
        for name, path in matrices.items():
            if name == EMBEDDING or not shapes.tied:
                yield Tensor(f"{path}.weight", matrix)
        yield Tensor(f"{decoder}.norm.weight", (shapes.hidden,))
        for layer in range(shapes.num_layers):
            yield from (Tensor(f"{decoder}.layers.{layer}.{w.path}", w.shape) for w in shapes.block)
        return
    prefix, fused = "base_model.model.", expert_paths(shapes.family)
    blocks = (block for adapter in work.adapters for block in shapes.adapters(adapter))
    adapters = [each for block in blocks for each in block]
    of_experts = [each.path for each in adapters if each.path.endswith(fused)] if fused else []
    places = peft_paths(of_experts)
    for each in adapters:
        path = prefix + places.get(each.path, each.path)
        yield Tensor(f"{path}.lora_A.weight", each.down)
        yield Tensor(f"{path}.lora_B.weight", each.up)
        if each.magnitude:
            yield Tensor(f"{path}.lora_magnitude_vector", (each.magnitude,))
    for name, ids in traffic.trained_rows(work, shapes).items():
        path = prefix + matrices[name]
        yield Tensor(f"{path}.token_adapter.trainable_tokens_delta", (len(ids), shapes.hidden))
    for name in work.adapter.modules_to_save:
        yield Tensor(f"{prefix}{matrices[name]}.weight", matrix)


def optimizer_tensors(work: Workload, trained: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the optimizer states by their names in a checkpoint (`exp_avg/decoder...`)."""
    pages_or_8bit = work.optimizer != "adamw"
    for tensor in trained:
        name = _parameter_name(tensor.name)
        if not pages_or_8bit:
            yield Tensor(f"step/{name}", ())
            yield Tensor(f"exp_avg/{name}", tensor.shape)
            yield Tensor(f"exp_avg_sq/{name}", tensor.shape)
            continue
        yield Tensor(f"step/{name}", (), "I64")
        small = not is_in_8_bits(work.optimizer, tensor.numel)
        for number in (1, 2):
            yield Tensor(f"state{number}/{name}", tensor.shape, "F32" if small else "U8")
            if not small:
                yield Tensor(f"absmax{number}/{name}", (absmaxes(tensor.numel),))


def _parameter_name(name: str) -> str:
    """Ours, of a tensor that PEFT's format names: what stands before the block is shorter, and the wrapper is in it."""
    name = name.removeprefix("base_model.model.")
    _, layers, in_block = name.partition(".layers.")
    if not layers:
        return name
    layer, _, path = in_block.partition(".")
    for theirs, our in ((".lora_A.weight", "A"), (".lora_B.weight", "B"), (".lora_magnitude_vector", "magnitude")):
        if path.endswith(theirs):
            path = f"{path.removesuffix(theirs)}.adapters.default.{our}"
    return f"decoder.layers.{layer}.inner.{path}"


def file_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of a safetensors file with its header, as `tensor_files.write_tensors` writes it."""
    table = lay_out({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    return len(header_bytes(table, {"format": "pt"})) + sum(tensor.nbytes for tensor in tensors)


def _result_bytes(work: Workload, model: PlannedModel, trained: Sequence[Tensor]) -> int:
    if work.adapter.method == "full":  # In the base's own dtype.
        return base_bytes(model) if model.stored_bytes is not None else 2 * sum(each.numel for each in trained)
    if work.adapter.pissa:  # A plain LoRA of rank 2r (distlora/loading/plain_adapter.py).
        trained = [_doubled(each) for each in trained]
    return file_bytes(trained) + CONFIG_BYTES


def _doubled(tensor: Tensor) -> Tensor:
    if tensor.name.endswith(".lora_A.weight"):
        return Tensor(tensor.name, (2 * tensor.shape[0], *tensor.shape[1:]))
    if tensor.name.endswith(".lora_B.weight"):
        return Tensor(tensor.name, (tensor.shape[0], 2 * tensor.shape[1]))
    return tensor


def cache_bytes(work: Workload, model: PlannedModel, machine: Machine) -> int:
    """Return the bytes of cached quantized shards: every group, and a header per decoder layer and rank of a copy.

    A checkpoint that is quantized already needs none.
    """
    if not work.keeps_shards or _is_packed(model.settings):
        return 0
    shapes = model.shapes
    packs = {weight.path: -(-weight.numel // traffic.GROUP_WEIGHTS) for weight in shapes.block if weight.packs}
    shards = work.shard_degree(machine.ranks)
    headers = sum(_header_bytes(shapes, packs, index, shards) for index in {0, shards - 1}) / len({0, shards - 1})
    pieces = sum(any(cut(groups, index, shards) for groups in packs.values()) for index in range(shards))
    return shapes.num_layers * (GROUP_BYTES * sum(packs.values()) + round(pieces * headers))


def _header_bytes(shapes: ModelShapes, packs: Mapping[str, int], index: int, shards: int) -> int:
    """Return the bytes of the header of one rank's piece of the last layer."""
    extents = {}
    for path, groups in packs.items():
        if own := cut(groups, index, shards):
            name = f"{shapes.family.decoder}.layers.{shapes.num_layers - 1}.{path}"
            extents[name] = Extent(own.start, own.stop, 1 / 3, {})
    return len(header_of("0" * 64, extents)) if extents else 0


def _is_packed(settings: Mapping[str, object]) -> bool:
    return settings.get("quantization_config") is not None
