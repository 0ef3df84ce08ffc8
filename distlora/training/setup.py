"""The order of a start, which decides what is ever in memory: build on meta, shard, start adapters that are
computed from the base, fill the shards, start the others.

Where adapters begin, and what fills them in turn; a new run has no checkpoint, and what DPO compares with is kept where
it is not the base (`weights.initial_adapter_file.needs_initial_adapter` decides):

    start              a new run                a resumed one        a resumed one of DPO
    adds nothing       reset                    checkpoint           checkpoint
    LoftQ              decomposed, or RUN's     checkpoint           RUN's, kept; checkpoint
    PiSSA              decomposed, or RUN's     RUN's; checkpoint    RUN's, kept; checkpoint
    adapter.init_from  init_from                checkpoint           init_from, kept; checkpoint
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import Config, UserError
from distlora.loading import decomposed_adapters
from distlora.loading.load_base import Loaded, load_base
from distlora.loading.peft_format import load_peft_adapter
from distlora.loading.quantized_cache import QuantizedCacheSettings
from distlora.model import attention, compiled, fused_modules, liger
from distlora.model.adapters import reset_adapters
from distlora.model.buffers import materialize_buffers
from distlora.model.build import DTYPES, CausalLM, build_model
from distlora.model.frozen import FrozenTensor
from distlora.model.mlp import place_mlps
from distlora.model.offload import HostInputs
from distlora.parallel import Backend, Ranks, parallelize, watch
from distlora.system import host_memory
from distlora.weights.initial_adapter_file import base_identity, needs_initial_adapter
from distlora_kernels import scratch


def start_model(
    config: Config,
    ranks: Ranks,
    *,
    training: bool = True,
    say: Callable[[str], None] | None = None,
    restores: bool = False,
    for_slots: bool = False,
    boundary: watch.Marker = watch.at,
    base: CheckpointFiles | None = None,
) -> tuple[CausalLM, Backend, Loaded]:
    """The model on this rank with the base's weights and adapters at their start: adding nothing, or what they were
    decomposed to, which `say` is told of; `start_adapters` does the rest. `training` and `for_slots` as in build_model.

    `restores`: the caller fills the adapters. A run of PiSSA then has its start already, and its base is built again
    from that; one that trains by DPO has it too, and needs it as its reference. `boundary` marks each weight, on every
    rank alike, and may end the start by what it raises. `base`: the files at model.path, if already read.
    Raises UserError for a base that cannot be read or does not fit
    its config.json, for a start that is gone, and where host memory that the config asks for is not there.
    """
    base = base or CheckpointFiles(config.model.path)
    model = build_model(config, base=base, training=training, for_slots=for_slots)
    use_device_kernels(model, config, ranks.device)
    recompute_mlps(model, config)
    backend = parallelize(model, ranks, config)
    offloads = training and config.train.checkpointing == "offload"
    if offloads:
        require_room_for_inputs(model, config, backend)
    adapter = config.adapter
    say = say or (lambda text: None)
    is_reference = training and config.train.objective == "dpo"
    if adapter.decomposes and needs_initial_adapter(adapter, is_reference=is_reference, restores=restores):
        decomposed_adapters.initialize_from_base(
            model, config.spec, config.run_dir, base, backend, say, restores=restores, boundary=boundary
        )
    cache = cache_settings(config, base, backend, say)
    loaded = load_base(model, base, backend, subtract_initial_adapter=adapter.pissa, cache=cache, boundary=boundary)
    backend.watch_weights(model)
    materialize_buffers(model, ranks.device)
    reserve_scratch(model, config, ranks.device)
    if offloads:
        keep_inputs_on_host(model, config, ranks)
    if not adapter.decomposes:
        reset_adapters(model.adapted_weights(), adapter, seed=config.train.seed)
    return model, backend, loaded


def cache_settings(
    config: Config, base: CheckpointFiles, backend: Backend, say: Callable[[str], None]
) -> QuantizedCacheSettings | None:
    """Where the base's quantized shards are kept; None where they are not. Ranks that `say` nothing to people tell
    their own log."""
    quant, device = config.quant, backend.ranks.device
    if not quant.keeps_shards:
        return None
    made_on = device.type  # That both give the same bits is not shown on every GPU.
    if config.adapter.pissa:
        made_on = f"{torch.__version__} {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    return QuantizedCacheSettings(
        folder=Path(quant.cache_dir).expanduser().absolute(),
        limit=None if quant.cache_gb is None else int(quant.cache_gb * 1e9),
        base=config.model.name or config.model.path,
        identity=base_identity(base, config.adapter, config.run_dir),
        made_on=made_on,
        say=say if backend.writes else print,
    )


def start_adapters(
    model: CausalLM, config: Config, backend: Backend, *, restores: bool, say: Callable[[str], None]
) -> None:
    """For training, after `start_model`: begin with the adapter at adapter.init_from where the run does, and keep what
    DPO compares with. `restores`: a checkpoint fills the adapters after this.

    Raises UserError for an adapter that is gone or not exactly the model's.
    """
    watch.at(None, "preparing to train", long=True)
    adapter = config.adapter
    is_reference = config.train.objective == "dpo"
    if adapter.init_from is not None and needs_initial_adapter(adapter, is_reference=is_reference, restores=restores):
        load_peft_adapter(model, adapter, config.quant.method, backend)
        say(f"starting from the adapter in {adapter.init_from}; lora_dropout is this run's own, {adapter.lora_dropout}")
    if config.train.objective == "dpo" and not adapter.starts_as_base:
        model.keep_start()


def reserve_scratch(model: CausalLM, config: Config, device: torch.device) -> None:
    """Take the memory for dequantized weights before the first step needs it; said in `model.notes`."""
    if device.type != "cuda":  # There a dequantized weight is an ordinary tensor.
        return
    dtype = DTYPES[config.train.dtype]
    blocks = [
        [m.shape for m in block.modules() if isinstance(m, FrozenTensor) and m.quantized] for block in model.blocks
    ]
    largest = max((scratch.block_bytes([shape], dtype) for shapes in blocks for shape in shapes), default=0)
    if largest == 0:
        return
    keep = config.train.keep_dequantized
    block = max(scratch.block_bytes(shapes, dtype) for shapes in blocks) if keep else 0
    taken = scratch.reserve(device, largest=largest, block=block)
    model.notes.append(
        f"{taken / 2**20:,.0f} MiB of scratch for dequantized weights: one at a time"
        + (", and a block's from recomputation to backward" if keep else "")
    )


def recompute_mlps(model: CausalLM, config: Config) -> None:
    """Where the config asks for it, have backward recompute each block's MLP, after the device's kernels have taken the
    places of norms and MLPs and before the blocks are sharded."""
    train = config.train
    if train.checkpointing == "selective" or train.mlp_tile is not None:
        place_mlps(model.blocks, model.family, tile=train.mlp_tile)


@dataclass(frozen=True, slots=True)
class _HostInputs:
    """What train.checkpointing=offload keeps in host memory on each rank."""

    count: int
    nbytes: int
    """Of each."""
    said: str

    @classmethod
    def of(cls, model: CausalLM, config: Config, ranks: int) -> _HostInputs:
        slices = config.slices(ranks)
        nbytes = config.tokens_at_once * model.hf_config.hidden_size * DTYPES[config.train.dtype].itemsize
        said = f"{len(model.blocks)} blocks x {slices} x {nbytes / 2**20:,.1f} MiB"
        return cls(len(model.blocks) * slices, nbytes, said)


def require_room_for_inputs(model: CausalLM, config: Config, backend: Backend) -> None:
    """Before the base is loaded, which may take minutes: raises UserError, on every rank, where a machine has too
    little host memory for all inputs that a forward keeps."""
    inputs = _HostInputs.of(model, config, backend.ranks.world)
    slices = config.slices(backend.ranks.world)
    instead = "set train.checkpointing=block, or a smaller train.micro_batch"
    if slices > 1:
        instead = f"set train.accumulate=step, which takes 1/{slices} of it, or train.checkpointing=block"
    backend.require_host_memory(
        host_memory.bytes_of([inputs.nbytes] * inputs.count),
        "train.checkpointing=offload",
        f"the inputs of the blocks on each process ({inputs.said})",
        instead,
    )


def keep_inputs_on_host(model: CausalLM, config: Config, ranks: Ranks) -> None:
    """Take host memory for all inputs that a forward keeps, before the first step needs it; said in `model.notes`."""
    kept = _HostInputs.of(model, config, ranks.world)
    inputs = HostInputs(ranks.device)
    inputs.reserve(kept.count, kept.nbytes)
    for block in model.blocks:
        block.host_inputs = inputs
    model.notes.append(
        f"{inputs.taken_bytes / 2**30:,.2f} GiB of host memory on each rank for the inputs of the blocks ({kept.said})"
        + ("" if ranks.device.type == "cuda" else "; on the CPU that saves nothing")
    )


def use_device_kernels(model: CausalLM, config: Config, device: torch.device) -> None:
    """Exchange what the device has better kernels for, and have split GEMMs sum in fp32; what was exchanged, and on a
    GPU what was not and why, in `model.notes`.

    On the CPU, where transformers' own modules are the reference, that is attention in bf16, and what is asked for.
    """
    settings = config.train
    is_gpu = device.type == "cuda"
    fused_modules.give_back(model.decoder)
    if is_gpu:
        # Sums of split GEMMs in fp32, as everything else here; torch's default lets the library round them to bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if settings.compile:
            raise UserError("train.compile=true is for the CPU, and this rank has a GPU; set train.compile=false")
    if settings.compile:
        compiled.require()
    choice = attention.choose(
        model.family,
        model.decoder.config,
        wanted=settings.attention,
        device=device,
        dtype=DTYPES[settings.dtype],
        deterministic=settings.deterministic_attention,
        compiled=settings.compile,
    )
    if choice.op is not None:
        model.attend_by_documents(choice.op)
    if is_gpu or choice.op is not None:
        model.notes.append(choice.said)
    kept = config.adapter.use_dora
    if settings.compile:
        model.notes.append(compiled.apply(model.decoder, model.family, model.head, outputs_are_kept=kept))
        for block in model.blocks:
            block.remakes = settings.checkpointing == "none" and not kept
    if is_gpu and settings.liger:
        experts = model.family.experts is not None
        reason = liger.why_not(device=device, full=config.adapter.method == "full", experts=experts)
        model.notes.append(
            liger.apply(model.decoder, model.family, outputs_are_kept=kept)
            if reason is None
            else f"liger-kernel is not used: {reason}"
        )
