"""Calculate the files of a run and the host memory of its processes. Imports no torch.

File headers are made by the code that writes the files (distlora/loading/tensor_files.py, weights/writer.py). Host
memory is anonymous memory, which a job's limit counts; file pages come and go.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from distlora.architecture.low_bit_headers import nf4_tensors
from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.architecture.safetensors_headers import DTYPE_BYTES, header_bytes, lay_out
from distlora.architecture.shapes import Asked, ModelShapes
from distlora.architecture.targets import peft_paths
from distlora.architecture.tokens import EMBEDDING, HEAD
from distlora.config import AdapterConfig, ParallelConfig
from distlora.config.base import PLAIN
from distlora.config.deepspeed_file import offloads_base
from distlora.planner.machine import Machine
from distlora.planner.memory.base import TrainedSizes, absmaxes, base_of, is_in_8_bits
from distlora.planner.memory.device import DeviceBytes, decomposition_bytes
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload
from distlora.system import host_memory

JSON_BYTES = 2300
"""adapter_config.json, state.json and manifest.json of a checkpoint together, one or two evaluations in (measured,
2026-11-25)."""
CONFIG_BYTES = 560
"""Of it adapter_config.json, which a result has too."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"
    """Dtype by its name in safetensors."""

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
    """Files of the model."""
    cache: int
    """Cached quantized shards (quant.cache_dir); 0 if none are kept."""
    checkpoint: int
    """One checkpoint: trained parameters and optimizer states, of all trials."""
    checkpoints_kept: int
    """Most checkpoints at once: the newest, the best, and the one being written."""
    result: int
    """RUN/adapter or RUN/model, of all trials."""
    results_kept: int
    """2 if RUN/best is kept too."""

    @property
    def run(self) -> int:
        """Bytes of RUN, besides a few MB of logs and figures."""
        return self.checkpoints_kept * self.checkpoint + self.results_kept * self.result

    def as_json(self) -> dict[str, int]:
        """Return every figure in bytes, for programs."""
        kept = {
            "checkpoints": self.checkpoints_kept * self.checkpoint,
            "results": self.results_kept * self.result,
            "run": self.run,
        }
        return dataclasses.asdict(self) | kept


def disk_bytes(work: Workload, model: PlannedModel) -> DiskBytes:
    """Return the disk space of a training run."""
    trained = [list(trained_tensors(trial, model.shapes)) for trial in work.alone()]
    stored = [list(trained_tensors(trial, model.shapes, stored=True)) for trial in work.alone()]
    return DiskBytes(
        base=base_bytes(model),
        cache=cache_bytes(work, model),
        checkpoint=sum(
            file_bytes(files) + file_bytes(list(optimizer_tensors(work, own))) + JSON_BYTES
            for files, own in zip(stored, trained, strict=True)
        ),
        checkpoints_kept=work.checkpoints_kept,
        result=sum(_result_bytes(work, model, own) for own in stored),
        results_kept=work.results_kept,
    )


def base_bytes(model: PlannedModel) -> int:
    """Return the bytes of the model's files; 16 bits per parameter if unknown."""
    return 2 * model.shapes.numel if model.stored_bytes is None else model.stored_bytes


def trained_tensors(work: Workload, shapes: ModelShapes, *, stored: bool = False) -> Iterator[Tensor]:
    """Yield the trained tensors of all trials as fp32 masters, by PEFT's names; adapter=full: by transformers'.

    `stored`: in their shapes in files.
    """
    architecture, matrix = shapes.architecture, (shapes.vocabulary, shapes.hidden)
    matrices = {EMBEDDING: architecture.embedding_path, HEAD: architecture.head}
    if work.adapter.method == "full":
        for name, path in matrices.items():
            if name == EMBEDDING or not shapes.tied:
                yield Tensor(f"{path}.weight", matrix)
        yield from (Tensor(weight.path, weight.shape) for weight in architecture.outside)
        for index in range(architecture.num_layers):
            layer = f"{architecture.layer_prefix}{index}"
            yield from (Tensor(f"{layer}.{w.path}", w.shape) for w in architecture.layer(index).weights)
        return
    prefix = "base_model.model."
    blocks = (block for adapter in work.adapters for block in shapes.adapters(adapter))
    adapters = [adapted for block in blocks for adapted in block]
    of_experts = [adapted.path for adapted in adapters if adapted.experts > 1]
    places = peft_paths(of_experts)
    for adapted in adapters:
        path = prefix + places.get(adapted.path, adapted.path)
        down, up = adapted.stored if stored else (adapted.down, adapted.up)
        yield Tensor(f"{path}.lora_A.weight", down)
        yield Tensor(f"{path}.lora_B.weight", up)
        if adapted.magnitude:
            yield Tensor(f"{path}.lora_magnitude_vector", (adapted.magnitude,))
    for name, ids in work.trained_rows(shapes).items():
        path = prefix + matrices[name]
        yield Tensor(f"{path}.token_adapter.trainable_tokens_delta", (len(ids), shapes.hidden))
    for name in work.adapter.modules_to_save:
        yield Tensor(f"{prefix}{matrices[name]}.weight", matrix)
    for name, shape in work.train.needs.score_shapes(shapes.hidden).items():
        yield Tensor(f"{prefix}score.{name}", shape)


def optimizer_tensors(work: Workload, trained: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the optimizer states by their names in a checkpoint (`exp_avg/decoder...`)."""
    for tensor in trained:
        name = _parameter_name(tensor.name)
        if work.optim.name == "muon" and is_matrix(tensor.name, len(tensor.shape)):
            yield Tensor(f"momentum_buffer/{name}", tensor.shape)
            continue
        if work.optim.name in ("adamw", "muon"):
            yield Tensor(f"step/{name}", ())
            yield Tensor(f"exp_avg/{name}", tensor.shape)
            yield Tensor(f"exp_avg_sq/{name}", tensor.shape)
            continue
        yield Tensor(f"step/{name}", (), "I64")
        small = not is_in_8_bits(work.optim.name, tensor.numel)
        for number in (1, 2):
            yield Tensor(f"state{number}/{name}", tensor.shape, "F32" if small else "U8")
            if not small:
                yield Tensor(f"absmax{number}/{name}", (absmaxes(tensor.numel),))


def is_matrix(name: str, ndim: int) -> bool:
    """Return whether Muon updates a tensor: a matrix in a decoder layer. Adapters of experts are several in one."""
    return ndim == 2 and ".layers." in name and ".experts." not in name


def _parameter_name(name: str) -> str:
    """Ours, of a tensor that PEFT's format names: what stands before the block is shorter, and the wrapper is in it."""
    name = name.removeprefix("base_model.model.")
    _, layers, in_block = name.partition(".layers.")
    if not layers:
        return f"head.{name.removeprefix('score.')}" if name.startswith("score.") else name
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
        return base_bytes(model) if model.stored_bytes is not None else 2 * sum(tensor.numel for tensor in trained)
    if work.adapter.pissa:  # A plain LoRA of rank 2r (distlora/loading/decomposed_adapters.py).
        rank_dims = {"A.weight": 0, "B.weight": 1}
        kept = []
        for name, shape in ((tensor.name, list(tensor.shape)) for tensor in trained):
            _, is_adapter, part = name.rpartition(".lora_")
            if is_adapter and part in rank_dims:
                shape[rank_dims[part]] *= 2
            kept.append(Tensor(name, tuple(shape)))
        trained = kept
    return file_bytes(trained) + CONFIG_BYTES


def cache_bytes(work: Workload, model: PlannedModel) -> int:
    """Return the bytes of the cached quantized weights, in a file per layer; 0 for an NF4 checkpoint."""
    if not work.keeps_shards or quantization_method(model.settings, model.name) == BNB_NF4:
        return 0
    shapes, total = model.shapes, 0
    prefix = f"{shapes.architecture.layer_prefix}{shapes.num_layers - 1}"
    for (kind, formats), count in Counter(shapes.layer_formats(work.format)).items():
        weights = zip(shapes.architecture.kinds[kind].weights, formats, strict=True)
        names = {f"{prefix}.{weight.path}": weight.shape for weight, format in weights if format == "nf4"}
        parts = [Tensor(n, s, d) for path, shape in names.items() for n, (d, s) in nf4_tensors(path, shape).items()]
        total += count * file_bytes(parts) if parts else 0
    return total


PROCESS_BYTES = 390_000_000
"""A worker's Python, torch, transformers and gloo: RssAnon in a run of 0.4 million parameters (365 to 390 MB on 1 and 2
ranks, torch 2.13 for the CPU, 2026-11-25). What CUDA's libraries take beside it was not measured. Without GPUs ranks
are forks of the launcher and share two thirds of it: two took 745 MB with a launcher and the torchrun that was then a
process beside it, where 960 are planned (2026-11-26)."""
LAUNCHER_BYTES = 180_000_000
"""The launcher on each machine: measured in the same runs with torchrun, then a process of its own (179 MB in all)."""
LOADING_BYTES = 64_000_000
"""The bound of what loading takes beside the slice of a tensor: chunks that are read ahead, fp32 work, absmax
(tests/model/test_loading_memory.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBytes:
    """Bytes of one process, the one that has most, and of its machine."""

    process: int
    """Python and its libraries."""
    base: int
    """This rank's shard of an offloaded base."""
    inputs: int
    """Inputs of decoder layers, with train.checkpointing=offload."""
    moments: int
    """Paged optimizer states, at the most."""
    copies: int
    """Copies for a background save, on rank 0."""
    copies_of_others: int
    """Copies on another rank, of its rows of sharded tensors."""
    loading: int
    """Bytes while it loads, beside what is held then."""
    device_held: int
    """Device memory from the first step on, if the CPU is the device."""
    device_most: int
    """Device memory at a step's peak, if the CPU is the device."""
    launcher: int
    """Bytes of the launcher on each node."""
    ranks: int
    """Ranks per node."""

    @property
    def while_loading(self) -> int:
        """Bytes of a process while it loads; activations and copies come later."""
        return self.process + self.base + self.device_held + self.loading

    @property
    def while_training(self) -> int:
        """Bytes of the process that saves."""
        return self._without_copies + self.copies

    @property
    def _without_copies(self) -> int:
        return self.process + self.base + self.inputs + self.moments + self.device_most

    @property
    def workers(self) -> int:
        """All processes of a machine but the launcher, of the one where rank 0 is, at the most."""
        training = self.ranks * (self._without_copies + self.copies_of_others) + self.copies - self.copies_of_others
        return max(self.ranks * self.while_loading, training)

    @property
    def machine(self) -> int:
        """Bytes of a node with the launcher, which already has its memory when it plans."""
        return self.launcher + self.workers

    def as_json(self) -> dict[str, int]:
        """Return every figure in bytes, for programs."""
        totals = {name: getattr(self, name) for name in ("while_loading", "while_training", "machine")}
        return dataclasses.asdict(self) | totals


def keeps_on_host(parallel: ParallelConfig, checkpointing: str, shards: int) -> bool:
    """Return True if the base or activations are offloaded to host memory, with the base sharded over `shards`."""
    return offloads_base(parallel, shards) or checkpointing == "offload"


def host_bytes(work: Workload, model: PlannedModel, machine: Machine, device: DeviceBytes) -> HostBytes:
    """Return the host memory of a training run in which a rank takes `device` on its device."""
    shards = work.shard_degree(machine.ranks)
    copies, of_others = _copies(SaveKey.of(work, model, shards))
    base, is_gpu, shapes = base_of(work, model.shapes), machine.is_gpu, model.shapes
    trained = TrainedSizes.of(work, shapes, base, shards)
    # Rows of the base are counted in chunks, as `zero3.host_bytes` counts them.
    offloaded: list[int] = []
    if is_gpu and offloads_base(work.parallel, shards):
        offloaded = sorted((tensor.kept(shards) for tensor, n in base.counted() for _ in range(n)), reverse=True)
    inputs: list[int] = []
    if work.train.checkpointing == "offload":  # As `distlora.training.setup` reserves.
        nbytes = work.tokens_at_once * shapes.hidden * work.itemsize
        inputs = [nbytes] * shapes.num_layers * work.train.slices(machine.ranks)
    on_host, on_gpu = (trained.optimizer_bytes(work.optim.name, is_gpu=on_gpu) for on_gpu in (False, True))
    return HostBytes(
        process=PROCESS_BYTES,
        base=host_memory.bytes_of(offloaded),
        inputs=host_memory.bytes_of(inputs),
        moments=on_host - on_gpu if is_gpu else 0,
        copies=copies,
        copies_of_others=of_others,
        loading=_loading(work, model, shards, on_host=not is_gpu),
        device_held=0 if is_gpu else device.persistent,
        device_most=0 if is_gpu else device.total,
        launcher=LAUNCHER_BYTES,
        ranks=machine.ranks_per_machine,
    )


@dataclass(frozen=True, slots=True)
class SaveKey:
    """All that what a save copies depends on, as a key of what is remembered; `config` has it too."""

    adapters: Asked
    beside: tuple[AdapterConfig, ...] = field(hash=False)
    """Adapters of all trials trained together."""
    work: Workload = field(compare=False)

    @classmethod
    def of(cls, work: Workload, model: PlannedModel, shards: int) -> SaveKey:
        """Build the key of a workload's background save."""
        return cls(
            Asked(
                model.shapes,
                work.adapter,
                (work.optim.name, work.new_tokens, work.train.save_in_background, shards),
            ),
            work.adapters,
            work,
        )


@functools.lru_cache(maxsize=16)
def _copies(saved: SaveKey) -> tuple[int, int]:
    """Return the bytes of a background save's copies (on rank 0, on another rank), as `Snapshot` takes them.

    Rank 0 copies everything that is saved; each rank copies its rows of sharded tensors. Cached, since a planner tries
    many settings for which the result is the same.
    """
    work, shards = saved.work, saved.adapters.more[-1]
    if not work.train.save_in_background:
        return 0, 0
    trained = list(trained_tensors(work, saved.adapters.shapes))
    tensors = [*trained, *optimizer_tensors(work, trained)]
    if work.adapter.method == "full":
        nbytes = host_memory.bytes_of([-(-tensor.nbytes // shards) for tensor in tensors])
        return nbytes, nbytes
    whole = tuple(work.adapter.modules_to_save)
    cut = [tensor for tensor in tensors if tensor.name.endswith(tuple(f"{name}.weight" for name in whole))]
    rows = [-(-tensor.nbytes // shards) for tensor in cut]
    rest = [tensor.nbytes for tensor in tensors if tensor not in cut]
    return host_memory.bytes_of(rest + rows), host_memory.bytes_of(rows)


def _loading(work: Workload, model: PlannedModel, shards: int, *, on_host: bool) -> int:
    """Return the bound of loading: a slice of the largest tensor in the source's dtype, and 64 MB.

    Adapters made from the base's weights need one whole weight and its decomposition, on a GPU in its memory.
    """
    shapes, stored = model.shapes, model.stored_bytes
    itemsize = 4 if stored is not None and stored > 3 * shapes.numel else 2
    architecture = shapes.architecture
    packed = [weight for kind in architecture.kinds for weight in kind.weights if weight.packs]
    slices = [math.prod(weight.shape[-2:]) for weight in (*packed, *architecture.outside)]
    largest = max(shapes.vocabulary * shapes.hidden, *slices)
    slice_bytes = -(-itemsize * largest // shards) + LOADING_BYTES
    if work.adapter.init in PLAIN:
        return slice_bytes
    whole = max((weight.shape[-2:] for weight in packed), key=math.prod)
    return max(slice_bytes, itemsize * math.prod(whole) + (decomposition_bytes(work, whole) if on_host else 0))
