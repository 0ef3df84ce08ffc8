"""Set up a run: build on meta, shard, compute adapters that start from the base, fill the shards, start the rest.

This order decides what is in memory at once. Adapters are filled in turn from the sources below; a DPO run also keeps
its initial adapter as the reference (`weights.initial_adapter_file.needs_initial_adapter` decides):

    initial adapter    new run                  resumed run          resumed DPO run
    zero (B = 0)       reset                    checkpoint           checkpoint
    LoftQ              decomposed, or RUN's     checkpoint           RUN's, kept; checkpoint
    PiSSA              decomposed, or RUN's     RUN's; checkpoint    RUN's, kept; checkpoint
    adapter.init_from  init_from                checkpoint           init_from, kept; checkpoint
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import Config, ModelSpec, ParallelConfig, TrainConfig, UserError
from distlora.loading import decomposed_adapters
from distlora.loading.load_base import Loaded, QuantizedCacheSettings, load_base
from distlora.loading.peft_format import load_peft_adapter, values_beside
from distlora.model import attention, fused_modules
from distlora.model.adapters import reset_adapters
from distlora.model.build import DTYPES, CausalLM, build_model
from distlora.model.by_document import slow_scan_note
from distlora.model.embedding_noise import EmbeddingNoise
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.hf_model import materialize_buffers
from distlora.model.layer_wrapper import HostInputs
from distlora.model.lm_head import RewardHead
from distlora.model.mlp import place_mlps
from distlora.parallel import Backend, Ranks, parallelize, watch
from distlora.system import host_memory
from distlora.system.progress import still
from distlora.weights.initial_adapter_file import base_identity, needs_initial_adapter
from distlora.weights.peft_folder import read_adapter_beside
from distlora_kernels import operands, processor, products
from distlora_kernels.extension import scratch_numel

Log = Callable[[str], None]
"""Function that writes one line for the user."""


def _no_log(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class StartOptions:
    """Circumstances in which a model is started."""

    training: bool = True
    for_slots: bool = False
    """This and the one before as in build_model."""
    restores: bool = False
    """True if the caller fills the adapters afterwards."""
    run_dir: str | Path = ""
    """Folder of the initial adapter of PiSSA and LoftQ; no other run needs it."""
    log: Log = _no_log
    boundary: watch.Marker = watch.at
    """Marks each weight, on every rank alike, and may end the start by raising."""


def start_run_model(
    config: Config, ranks: Ranks, start: StartOptions | None = None, *, base: CheckpointFiles | None = None
) -> tuple[CausalLM, Backend, Loaded]:
    """Return `start_model` with the settings of a run."""
    start = replace(start or StartOptions(), run_dir=config.run_dir)
    with still("loading the base", start.log):
        return start_model(
            replace(config.spec, images=config.data.images),
            ranks,
            start,
            train=config.train,
            parallel=config.parallel,
            shard_degree=config.shard_degree(ranks.world),
            sequence_length=config.data.sequence_length,
            base=base,
        )


def start_model(
    spec: ModelSpec,
    ranks: Ranks,
    start: StartOptions | None = None,
    *,
    train: TrainConfig | None = None,
    parallel: ParallelConfig | None = None,
    shard_degree: int | None = None,
    sequence_length: int | None = None,
    base: CheckpointFiles | None = None,
) -> tuple[CausalLM, Backend, Loaded]:
    """Build, shard and load the model on this rank, with its adapters at their start. `start_adapters` does the rest.

    `train`, `base` and `sequence_length` as in build_model, `parallel` and `shard_degree` as in parallelize.

    Raises UserError for a base that cannot be read or does not fit its config.json, for a missing initial adapter, and
    if the node lacks the host memory that the settings need.
    """
    train, adapter, start = train or TrainConfig(), spec.adapter, start or StartOptions()
    base, training, restores = base or CheckpointFiles(spec.path), start.training, start.restores
    model = build_model(
        spec, train, base=base, sequence_length=sequence_length, training=training, for_slots=start.for_slots
    )
    use_device_kernels(model, spec, train, ranks.device)
    if training and train.neftune_alpha is not None:
        model.noise = EmbeddingNoise.of(train.neftune_alpha, spec.seed)
    if train.checkpointing == "selective" or train.mlp_tile is not None:  # Of norms and MLPs that were replaced.
        place_mlps(model.blocks, model.architecture, tile=train.mlp_tile)
    backend = parallelize(model, ranks, parallel, shard_degree=shard_degree)
    offloaded = None
    if training and train.checkpointing == "offload":
        assert sequence_length is not None, "activations of an unknown size"
        offloaded = require_offload_memory(model, spec, train, sequence_length, backend)
    is_reference = training and train.refers_to_start
    if adapter.decomposes and needs_initial_adapter(adapter, is_reference=is_reference, restores=restores):
        decomposed_adapters.initialize_from_base(
            model, spec, start.run_dir, base, backend, start.log, restores=restores, boundary=start.boundary
        )
    cache = cache_settings(spec, base, backend, start.log, run_dir=start.run_dir)
    loaded = load_base(
        model, base, backend, subtract_initial_adapter=adapter.pissa, cache=cache, boundary=start.boundary
    )
    backend.watch_weights(model)
    materialize_buffers(model, ranks.device)
    reserve_scratch(model, DTYPES[spec.dtype], ranks.device)
    if isinstance(model.head, RewardHead):
        model.head.reset(getattr(model.hf_config, "initializer_range", None) or 0.02, seed=spec.seed)
    if offloaded is not None:
        reserve_offload_memory(model, *offloaded, ranks.device)
    if not adapter.decomposes:
        reset_adapters(model.adapted_weights(), adapter, seed=spec.seed)
    return model, backend, loaded


def cache_settings(
    spec: ModelSpec, base: CheckpointFiles, backend: Backend, log: Log, *, run_dir: str | Path = ""
) -> QuantizedCacheSettings | None:
    """Return the place of the base's quantized shards in the cache; None if nothing is cached.

    Ranks other than 0 print to their log file.
    """
    quant, device = spec.quant, backend.ranks.device
    if not quant.keeps_shards:
        return None
    made_on = device.type  # No test shows that every GPU computes the same bits of a decomposition.
    if spec.adapter.pissa:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        # Products on a CPU have other bits with other instructions: torch's, and those of our path.
        made_on = f"{torch.__version__} {gpu or f'cpu {torch.backends.cpu.get_cpu_capability()} {processor.path()}'}"
    return QuantizedCacheSettings(
        folder=Path(quant.cache_dir).expanduser().absolute(),
        limit=None if quant.cache_gb is None else int(quant.cache_gb * 1e9),
        base=spec.model.name or spec.model.path,
        identity=base_identity(base, spec.adapter, run_dir),
        made_on=made_on,
        say=log if backend.writes else print,
    )


def start_adapters(
    model: CausalLM,
    spec: ModelSpec,
    backend: Backend,
    train: TrainConfig,
    *,
    restores: bool,
    log: Log = _no_log,
) -> None:
    """Load the adapter at adapter.init_from if the run starts from it, and keep the reference. Follows `start_model`.

    The reference is the initial model, or the adapter at train.teacher. `restores`: a checkpoint fills the adapters
    after this. Raises UserError for an adapter that is missing or not exactly the model's.
    """
    watch.at(None, "preparing to train", long=True)
    adapter, teacher, is_reference = spec.adapter, train.teacher, train.refers_to_start
    if adapter.init_from is not None and needs_initial_adapter(adapter, is_reference=is_reference, restores=restores):
        load_peft_adapter(model, adapter, spec.quant.method, backend)
        log(f"starting from the adapter in {adapter.init_from} with lora_dropout={adapter.lora_dropout}")
    if teacher is not None:
        read = read_adapter_beside("train.teacher", teacher, adapter, spec.quant.method, model.architecture)
        model.keep_start(values_beside(model, read))
        log(f"the teacher is the base with the adapter in {teacher}")
    elif is_reference and not adapter.starts_as_base:
        model.keep_start()


def reserve_scratch(model: CausalLM, dtype: torch.dtype, device: torch.device) -> None:
    """Reserve GPU memory for a dequantized weight before the first step needs it, and note the size in `model.notes`.

    On the CPU nothing is reserved.
    """
    if device.type != "cuda":
        return
    blocks = (block for block in model.blocks if block.dense_dtype is None)
    weights = (m for block in blocks for m in block.modules() if isinstance(m, FrozenTensor) and m.quantized)
    largest = max((dtype.itemsize * scratch_numel(weight.stored.shape) for weight in weights), default=0)
    if largest > 0:
        operands.reserve_scratch(device, largest)
        model.notes.append(f"{largest / 2**20:,.0f} MiB of scratch memory for dequantized weights: one at a time")


def require_offload_memory(
    model: CausalLM, spec: ModelSpec, train: TrainConfig, sequence_length: int, backend: Backend
) -> tuple[int, int]:
    """Return (number, bytes of one) of the decoder layers' inputs that each rank keeps in host memory.

    Raises UserError, on every rank, if the node lacks memory for all of them. Call it before the base is read.
    """
    slices = train.slices(backend.ranks.world)
    count = len(model.blocks) * slices
    nbytes = train.micro_batch * sequence_length * model.hf_config.hidden_size * DTYPES[spec.dtype].itemsize
    instead = "set train.checkpointing=block, or a smaller train.micro_batch"
    if slices > 1:
        instead = f"set train.accumulate=step, which takes 1/{slices} of it, or train.checkpointing=block"
    backend.require_host_memory(
        host_memory.bytes_of([nbytes] * count),
        f"train.checkpointing={train.checkpointing}",
        "the inputs of the decoder layers on each process "
        f"({len(model.blocks)} layers x {slices} x {nbytes / 2**20:,.1f} MiB)",
        instead,
    )
    return count, nbytes


def reserve_offload_memory(model: CausalLM, count: int, nbytes: int, device: torch.device) -> None:
    """Reserve the host memory before the first step needs it, and note its size in `model.notes`."""
    inputs = HostInputs(device)
    inputs.reserve(count, nbytes)
    for block in model.blocks:
        block.host_inputs = inputs
    model.notes.append(
        f"{inputs.taken_bytes / 2**30:,.2f} GiB of host memory per rank for the inputs of the decoder layers "
        f"({count} x {nbytes / 2**20:,.1f} MiB)" + ("" if device.type == "cuda" else "; on the CPU that saves nothing")
    )


def use_device_kernels(model: CausalLM, spec: ModelSpec, train: TrainConfig, device: torch.device) -> None:
    """Replace modules of the decoder by the device's faster kernels, and let split GEMMs accumulate in fp32.

    On the CPU that is attention in bf16, and the compiled functions with train.compile=true (`auto`, which a run
    decides before, is false here). `model.notes` lists what was replaced, and on a GPU what was not and why. Raises
    UserError for train.compile=true on a GPU.
    """
    compiles = train.compile is True
    is_gpu = device.type == "cuda"
    products.use(False)
    products.reserve(not is_gpu and spec.dtype == "bf16")  # Before the first step needs it.
    if is_gpu:
        # By default torch lets the library round the partial sums of split GEMMs to bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if compiles:
            raise UserError("train.compile=true is for CPUs, and this rank has a GPU; set train.compile=false")
    if is_gpu and (note := slow_scan_note(model.decoder)):
        model.notes.append(note)
    if compiles:
        fused_modules.require_compiled()
    choice = attention.choose(
        model.architecture,
        wanted=train.attention,
        device=device,
        dtype=DTYPES[spec.dtype],
        deterministic=train.deterministic_attention,
        compiled=compiles,
    )
    if choice.op is not None:
        model.attend_by_documents(choice.op)
    if is_gpu or choice.op is not None:
        model.notes.append(choice.note)
    outputs_are_kept = spec.adapter.use_dora
    parts = (model.decoder, model.architecture, model.head)
    if compiles:
        model.notes.append(fused_modules.use_own(*parts, is_gpu=False, outputs_are_kept=outputs_are_kept))
        for block in model.blocks:
            block.remakes = train.checkpointing == "none" and not outputs_are_kept
    if is_gpu and train.fused_kernels != "none":
        if spec.adapter.method == "full":
            reason = "adapter=full trains the norms, and the kernels compute no gradient of their weights"
            model.notes.append(f"fused kernels are not used: {reason}")
        elif train.fused_kernels == "own":
            model.notes.append(fused_modules.use_own(*parts, is_gpu=True, outputs_are_kept=outputs_are_kept))
        else:
            fused_modules.require_liger()
            model.notes.append(fused_modules.use_liger(*parts, outputs_are_kept=outputs_are_kept))
