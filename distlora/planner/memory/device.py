"""Calculate the memory of a rank on its device by category, libraries and allocator included. Imports no torch.

torch.cuda.max_memory_allocated counts cuBLAS' workspaces, and no other memory of libraries. CUDA's context is not here:
a GPU's usable bytes are without it. Constants of libraries are their own, not yet measured on a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distlora.architecture.shapes import ModelShapes, Weight
from distlora.config.base import subspace_iterations
from distlora.config.cluster import RESIDENCY_RESERVE
from distlora.config.deepspeed_file import offloads_base, read_gathering
from distlora.planner.decoder_sizes import copied_adapters
from distlora.planner.machine import Machine
from distlora.planner.memory import KINDS, Kind, Phase
from distlora.planner.memory.base import BaseSizes, TrainedSizes, base_of, unit_bytes
from distlora.planner.memory.gathered import staying_bytes
from distlora.planner.memory.step import StepMemory
from distlora.planner.model import PlannedModel
from distlora.planner.workload import Workload
from distlora_kernels import processor
from distlora_kernels.extension import scratch_numel


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceBytes:
    """Bytes of one rank, the one that has most."""

    held: Mapping[Kind, int]
    """Bytes held from the first update to the end."""
    moments: Mapping[Phase, Mapping[Kind, int]]
    """Most bytes beside held ones, by moment."""
    beside: Mapping[Kind, int]
    """Bytes of libraries and the allocator beside tensors."""

    @property
    def worst(self) -> Phase:
        """The moment of the peak."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def by_kind(self) -> dict[Kind, int]:
        """Bytes by category at the peak, without empty categories."""
        totals = {kind: self.held.get(kind, 0) + self.moments[self.worst].get(kind, 0) for kind in KINDS}
        return {kind: n for kind, nbytes in totals.items() if (n := nbytes + self.beside.get(kind, 0))}

    @property
    def persistent(self) -> int:
        """Bytes from the first update to the end."""
        return sum(self.held.values())

    @property
    def peak(self) -> int:
        """Peak bytes of tensors. torch also counts cuBLAS workspaces, which are in `beside`."""
        return self.persistent + sum(self.moments[self.worst].values())

    @property
    def total(self) -> int:
        """Bytes at the peak, with those beside tensors."""
        return self.peak + sum(self.beside.values())

    def as_json(self) -> dict[str, Any]:
        """Every kind at every moment, in bytes."""
        return {
            "total": self.total,
            "peak": self.peak,
            "persistent": self.persistent,
            "beside": dict(self.beside),
            "worst": self.worst,
            "by_kind": self.by_kind,
            "held": dict(self.held),
            "moments": {moment: dict(kinds) for moment, kinds in self.moments.items()},
        }


def device_bytes(work: Workload, model: PlannedModel, machine: Machine) -> DeviceBytes:
    """Return the device memory of a training run.

    With parallel.resident_blocks=auto the count is what the first step leaves room for (distlora.parallel.fsdp2).
    """
    least, usable, shards = work.resident_layers, machine.usable_bytes, work.shard_degree(machine.ranks)
    device = _with_resident(work, model, machine, least)
    if work.parallel.resident_blocks != "auto":
        return device
    if shards == 1 or usable is None:
        return device
    free = usable - device.total
    reserve = RESIDENCY_RESERVE["cuda"] * usable if machine.is_gpu else RESIDENCY_RESERVE["cpu"] * free
    block = unit_bytes(base_of(work, model.shapes).block, shards)
    count = min(least + max(int((free - reserve) // block), 0), model.shapes.num_layers)
    return _with_resident(work, model, machine, count) if count > least else device


def _with_resident(work: Workload, model: PlannedModel, machine: Machine, resident: int) -> DeviceBytes:
    shapes, shards = model.shapes, work.shard_degree(machine.ranks)
    base = base_of(work, model.shapes)
    trained = TrainedSizes.of(work, shapes, base, shards)
    held: Counter[Kind] = Counter()
    if not (machine.is_gpu and offloads_base(work.parallel, shards)):
        held.update(base.kept(shards))
    held["norms"] += buffer_bytes(model, work)
    held["images"] += 0 if model.images is None else model.images.numel * work.itemsize
    held["dense"] += dense_bytes(work, model)
    held["resident"] += base.total(lambda unit: unit_bytes(unit, shards), 0, resident) if shards > 1 else 0
    if shards > 1 and work.parallel.backend == "zero3":
        held["resident"] += staying_bytes(base, shards, read_gathering(work.parallel))
    held["adapters"] += trained.adapter_bytes + copied_adapters(work, shapes, machine)[1]
    held["rewards"] += work.itemsize * work.reward_weights
    # What the trained adapter has and the reward model's lacks is filled with zeros.
    held["rewards"] += work.reward_adapters * sum(4 * numel * count for numel, count in trained.adapters.items())
    held["gradients"] += trained.flat_gradient_bytes
    held["optimizer"] += trained.optimizer_bytes(work.optim.name, is_gpu=machine.is_gpu)
    held["scratch"] += scratch_bytes(work, model) if machine.is_gpu else widened_bytes(work)
    step = StepMemory.of(work, model, machine, base, trained, resident)
    moments = image_moments(work, model, machine, step.moments())
    later = held["gradients"] + held["optimizer"]
    if machine.is_gpu:  # Of a CPU, HostBytes.loading has it.
        moments["loading"] = {"working": max(0, decomposing_bytes(work, shapes) - later)}
    return DeviceBytes(
        held={kind: n for kind, n in held.items() if n},
        moments=moments,
        beside=beside_tensors(work, base, trained, machine, largest=step.largest),
    )


def decomposing_bytes(work: Workload, shapes: ModelShapes) -> int:
    """Return the bytes of one whole weight (fp32 once corrected) and its decomposition, for PiSSA and LoftQ."""
    if not work.adapter.decomposes:
        return 0
    weights = [adapter for adapter, _ in shapes.alike(work.adapter)]
    stored = 2 if work.adapter.pissa else 6
    sizes = ((adapter.up[0], adapter.down[1]) for adapter in weights)
    return max(stored * out * inner + decomposition_bytes(work, (out, inner)) for out, inner in sizes)


def decomposition_bytes(work: Workload, shape: tuple[int, ...]) -> int:
    """Return the most bytes of the decomposition of one weight (distlora.weights.decompose).

    An exact one takes five fp64 matrices of the smaller side; subspace iterations take two bases of either side and
    three parts of the weight widened, 32 MiB each.
    """
    small, large = sorted(shape)
    if subspace_iterations(work.adapter.init) is None:
        return 5 * 8 * small**2
    return 8 * work.adapter.r * 2 * (small + large) + 3 * 2**25


def buffer_bytes(model: PlannedModel, work: Workload) -> int:
    """Return the bytes of the decoder's buffers: rotary frequencies and the like; those that training makes fp32."""
    masters = work.adapter.method == "full"
    sizes = {"fp32": 4, "dtype": 4 if masters else work.itemsize}
    return sum(count * sizes[dtype] for dtype, count in model.shapes.architecture.buffers)


def image_moments(
    work: Workload, model: PlannedModel, machine: Machine, moments: Mapping[Phase, Mapping[Kind, int]]
) -> dict[Phase, dict[Kind, int]]:
    """Return the moments of a step with images: that of the tower, and features until the end of the forward.

    The features are counted as if each token of a pass were an image's; they are added to the embeddings, and after
    `deepstack` layers too. The tower runs one image at a time, and its own memory is that of the largest one.
    """
    with_images = {moment: dict(kinds) for moment, kinds in moments.items()}
    if model.images is None:
        return with_images
    tokens = work.train.slices(machine.ranks) * work.tokens_at_once
    features = tokens * model.shapes.hidden * (1 + model.images.deepstack) * work.itemsize
    with_images["images"] = {}
    for moment in ("images", "embedding", "forward"):
        with_images[moment]["working"] = with_images[moment].get("working", 0) + features
    if (largest := model.images.largest_image(work.image_max_pixels, work.sequence_length)) is not None:
        is_copied = machine.is_gpu or work.itemsize == 2  # The image processor makes fp32 in host memory.
        pixels = is_copied * largest.pixel_numel * work.itemsize
        with_images["images"]["working"] += largest.activation_bytes(work.itemsize) + pixels
    return with_images


def _packed_shapes(work: Workload, model: PlannedModel) -> list[tuple[tuple[int, ...], ...]]:
    """Return the shapes of each decoder layer's quantized weights on a rank, which has a part of divided experts."""
    kinds, degree = model.shapes.architecture.kinds, work.expert_degree

    def local(weight: Weight) -> tuple[int, ...]:
        first, *more = weight.shape
        return (first // degree if weight.kind == "experts" else first, *more)

    return [
        tuple(local(weight) for weight, format in zip(kinds[kind].weights, formats, strict=True) if format is not None)
        for kind, formats in model.shapes.layer_formats(work.format)
    ]


def dense_bytes(work: Workload, model: PlannedModel) -> int:
    """Return the bytes of a rank's dense copies of quant.dense_layers: whole weights, its part of divided experts."""
    layers = _packed_shapes(work, model)[: work.dense_layers] if work.dense_layers else []
    return work.itemsize * sum(math.prod(shape) for shapes in layers for shape in shapes)


def scratch_bytes(work: Workload, model: PlannedModel) -> int:
    """Return the bytes of the scratch buffer on a GPU (distlora.training.setup.reserve_scratch).

    It holds the largest weight of layers that are not dense.
    """
    layers = dict.fromkeys(_packed_shapes(work, model)[work.dense_layers :])
    largest = max((scratch_numel(shape) for shapes in layers for shape in shapes), default=0)
    return work.itemsize * largest


def widened_bytes(work: Workload) -> int:
    """Return the bytes of the blocks that products of bf16 widen on this node's CPU (distlora_kernels.products)."""
    return processor.WIDENED_BYTES if work.train.dtype == "bf16" and processor.widens() else 0


_MIB = 2**20
_ROUNDED = 512
"""Bytes that every tensor's memory is a multiple of (CUDACachingAllocator.cpp: kMinBlockSize)."""
_SMALL, _LARGE = 2 * _MIB, 20 * _MIB
"""Segments that tensors of up to 1 MiB, and of up to 10 MiB, share (kSmallBuffer, kLargeBuffer); larger ones have
segments of their own, of multiples of 2 MiB (kRoundLarge), whose rest is used if it is above 1 MiB (should_split)."""
_CALLING_THREADS = 2
"""Forward's and autograd's: each has a workspace of cuBLAS."""
_WORKSPACE, _WORKSPACE_OF_HOPPER = 2 * 4096 * 1024 + 8 * 16 * 1024, 32 * _MIB
"""One of them, by the GPU's capability (CUDAContext's CublasHandlePool.cpp: parseChosenWorkspaceSize)."""
_CONNECTION = 12 * _MIB
"""NCCL's buffers of one connection of a channel: three protocols' at the receiving end, a page at the sending one, as
counted in github.com/NVIDIA/nccl/issues/1685."""
_CHANNELS = {True: 32, False: 4}
"""Over NVLink, as that issue's log has them on 8 H100; over PCIe, where a few are as fast as the bus."""


def beside_tensors(
    work: Workload, base: BaseSizes, trained: TrainedSizes, machine: Machine, *, largest: int
) -> dict[Kind, int]:
    """Return the most bytes by category; empty on a CPU. `largest`: bytes of the largest tensor of a step.

    Freed memory serves only the stream that took it, so each stream has a partly filled segment of each kind. A hole as
    large as the largest tensor may lie between smaller ones. On the stream of gathers, a layer's output may lie in the
    memory of the embedding's when the head is gathered.
    """
    if not machine.is_gpu:
        return {}
    shards = work.shard_degree(machine.ranks)
    has_small_workspace = machine.gpu is not None and machine.gpu.capability[0] not in (9, 10)
    # Lost at the ends of tensors that stay.
    rounding = sum(3 * count * _lost(4 * numel) for numel, count in trained.adapters.items())
    if not offloads_base(work.parallel, shards):
        rounding += sum(count * _lost(tensor.kept(shards)) for tensor, count in base.counted())
    streams, hole, late = 1, 0, 0
    if shards > 1:
        streams += 1 if work.adapter.trains_base is None else 2
        hole = unit_bytes(base.head, shards)
        if work.parallel.backend == "zero3":
            # What DeepSpeed freed while the device is still a unit behind: torch counts it as free and gives it to
            # nobody (CUDACachingAllocator.cpp: free, insert_events).
            late = unit_bytes(base.block, shards)
    return {
        "communication": _nccl(work, machine, shards),
        "working": _CALLING_THREADS * (_WORKSPACE if has_small_workspace else _WORKSPACE_OF_HOPPER),
        "slack": rounding + streams * (_SMALL + _LARGE) + largest + hole + late,
    }


def _nccl(work: Workload, machine: Machine, shards: int) -> int:
    """Return the bytes of NCCL's buffers.

    The group that sums gradients has rings and trees: one ring connection and two tree connections, both ways. With
    several replicas there is a group that gathers, by rings, and one between replicas if the base is trained.
    github.com/NVIDIA/nccl/issues/864 shows 1.6 GB after a first all-reduce, CUDA's context included; 32 channels are
    1.2 GB of it.
    """
    if machine.ranks == 1:
        return 0
    connections = 3
    if 1 < shards < machine.ranks:
        connections += 1 if work.adapter.trains_base is None else 2
    channels = _CHANNELS[machine.has_nvlink is not False]
    return channels * connections * _CONNECTION


def _lost(nbytes: int) -> int:
    rest = -nbytes % _SMALL
    return rest if nbytes >= _LARGE // 2 and rest <= _MIB else -nbytes % _ROUNDED
