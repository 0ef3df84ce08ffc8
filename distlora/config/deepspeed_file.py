"""Read the user's DeepSpeed JSON (parallel.deepspeed_config), without torch or DeepSpeed.

DeepSpeed only stores and gathers the frozen base. Keys about gathering are applied. Keys that contradict how distlora
trains are refused; all others have no effect, which the run reports. "auto" and disabled values count as not set, as in
Hugging Face. Names and types of the section zero_optimization are checked by DeepSpeed's own schema
(distlora/parallel/deepspeed_schema.py), which the launcher runs.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distlora.config import ParallelConfig, UserError, nearest
from distlora.config.errors import short
from distlora.config.json_files import check_shape, read_object

FIRST_DEEPSPEED = (0, 19, 8)
"""First supported version: parallel/zero3.py uses private parts of DeepSpeed."""

ZERO = "zero_optimization"
_OFFLOAD = "offload_param"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathering:
    """ZeRO-3's storage and gathering of the base. Sizes are in elements, as in DeepSpeed."""

    offload: bool = False
    """True if each rank's shard is in host memory and copied to the GPU for each gather."""
    pin_memory: bool = True
    """True if that host memory is pinned."""
    overlap_comm: bool = True
    """True to gather on a separate CUDA stream."""
    prefetch_bucket_size: int | None = None
    """Elements to gather ahead of the running unit; None: a decoder layer, 0: none."""
    max_live_parameters: int | None = None
    """Most elements that gathering ahead may hold at once; None: no limit."""
    max_reuse_distance: int = 0
    """Number of elements: a unit stays gathered if it is needed again before that many others."""
    param_persistence_threshold: int = 0
    """Largest number of elements of a tensor that always stays gathered."""
    model_persistence_threshold: int | None = None
    """Most elements of all such tensors; None: no limit."""
    allgather_sequential: bool = False
    """True to gather one tensor at a time."""
    experts_on_demand: bool = False
    """True if experts are gathered when tokens choose them, apart from their layers."""
    without_effect: tuple[str, ...] = ()
    """Keys of the file without effect."""


_APPLIED = """prefetch_bucket_size max_live_parameters max_reuse_distance param_persistence_threshold
    model_persistence_threshold overlap_comm allgather_sequential""".split()  # noqa: SIM905
"""Keys of zero_optimization that are fields of Gathering, without the prefix "stage3_"."""
_WITHOUT_EFFECT = """checkpoint dataloader_drop_last disable_allgather disable_python_gc dump_state
    gradient_allreduce_op gradient_predivide_factor graph_harvesting log_level memory_breakdown prescale_gradients
    sparse_gradients steps_per_print use_data_before_expert_parallelism wall_clock_breakdown
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer check_grad_overflow aio timers
    managed_gradient_accumulation load_universal_checkpoint""".split()  # noqa: SIM905
"""Keys beside zero_optimization, for which DeepSpeed has no schema."""

_OURS = "distlora has its own setting for it"
_NO_ENGINE = "DeepSpeed's engine does not run"

_REFUSED_BY_REASON = {
    ("distlora has its own optimizer", "optim=adamw and optim.lr"): "optimizer",
    (_OURS, "optim.schedule and optim.warmup_ratio"): "scheduler",
    (
        "train.dtype sets the compute dtype, and DeepSpeed would round the fp32 scales of quantized weights",
        "train.dtype=bf16",
    ): "fp16 bf16 bfloat16 amp torch_autocast data_types communication_data_type keep_in_fp32_modules",
    (_OURS, "train.global_batch and train.micro_batch"): """train_batch_size train_micro_batch_size_per_gpu
        gradient_accumulation_steps""",
    (_OURS, "optim.max_grad_norm"): "gradient_clipping",
    (_OURS, "train.checkpointing"): "activation_checkpointing",
    (_OURS, "train.seed"): "curriculum_learning data_efficiency",
    (_OURS, "train.save_every"): "nebula datastates_ckpt",
    (_NO_ENGINE, "tracker=wandb"): "tensorboard wandb comet",
    (_NO_ENGINE, ""): """flops_profiler comms_logger csv_monitor compile pipeline tensor_parallel eigenvalue
        elasticity autotuning hybrid_engine sequence_parallel_size seq_parallel_communication_data_type
        progressive_layer_drop sparse_attention vocabulary_size""",
    ("the base is frozen", "quant=nf4"): "compression_training quantize_training weight_quantization",
    ("distlora has its own optimizer, for adapters only", "optim=paged_adamw"): """offload_optimizer zenflow
        cpu_offload""",
    ("DeepSpeed has deprecated it", "parallel.offload_base=true"): "cpu_offload_param cpu_offload_use_pin_memory",
    ("what is gathered together is a decoder layer", ""): """module_granularity_threshold leaf_module
        use_all_reduce_for_fetch_params""",
    ("it keeps a second copy of the base", "parallel=fsdp2"): "zero_hpz_partition_size",
    ("the base is in 4 bits already, and its bytes would be rounded as numbers", "quant=nf4"): """
        zero_quantized_weights zero_quantized_nontrainable_weights""",
    ("there are only gradients of adapters, and they are summed exactly", ""): "zero_quantized_gradients",
}
"""Keys of the file, by the reason of the refusal and the replacement on the command line."""
_REFUSED = {key: why for why, keys in _REFUSED_BY_REASON.items() for key in keys.split()}


def check_deepspeed() -> None:
    """Raise UserError if DeepSpeed is not installed or older than FIRST_DEEPSPEED."""
    try:
        installed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "parallel.backend=zero3 needs DeepSpeed, which is not installed; `pip install deepspeed`, or set "
            "parallel=fsdp2"
        ) from None
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", installed)
    if match is None or tuple(map(int, match.groups())) < FIRST_DEEPSPEED:
        first = ".".join(map(str, FIRST_DEEPSPEED))
        raise UserError(
            f"parallel.backend=zero3 needs DeepSpeed {first} or later, and {installed} is installed; "
            "`pip install -U deepspeed`, or set parallel=fsdp2"
        )


def read_sections(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a file's zero_optimization and its other settings. Raises UserError if it is not JSON.

    Settings that are null or "auto" are left out. Whole numbers are int: 5e8 is a float in JSON.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item not in ("auto", None)}
        return int(value) if isinstance(value, float) and value.is_integer() else value

    remedy = "name a JSON file of DeepSpeed's settings, or leave parallel.deepspeed_config out"
    values = plain(read_object(Path(file), remedy))
    check_shape(values, {f"{ZERO}?": {f"{_OFFLOAD}?": dict}}, file, remedy)
    return values.pop(ZERO, {}), values


def read_gathering(parallel: ParallelConfig) -> Gathering:
    """Return the gathering options of `parallel` and of its DeepSpeed file.

    Raises UserError for keys that distlora does not support or `parallel` contradicts, and for a file that is not JSON.
    The types of values are left to DeepSpeed's schema.
    """
    gathering = Gathering(
        offload=parallel.offload_base,
        prefetch_bucket_size=None if parallel.prefetch else 0,
        experts_on_demand=parallel.experts == "on_demand",
    )
    if parallel.deepspeed_config is None:
        return gathering
    file = parallel.deepspeed_config
    zero, others = read_sections(file)
    known = [ZERO, *_REFUSED, *_WITHOUT_EFFECT]
    for key in others.keys() - known:
        raise refusal(file, key, others[key], f"DeepSpeed has no such setting{nearest(key, known)}")
    without_effect = _judge(file, "", others, ())
    if not zero:
        return replace(gathering, without_effect=tuple(without_effect))
    written: dict[str, str] = {}  # DeepSpeed knows names with and without the prefix.
    for key, value in zero.items():
        if (other := written.setdefault(key.removeprefix("stage3_"), key)) != key:
            raise refusal(file, f"{ZERO}.{key}", value, f"{other} sets it too; remove one of them")
    without_effect += _judge(file, f"{ZERO}.", zero, ("stage", _OFFLOAD, *_APPLIED))
    if zero.get("stage") != 3:
        raise refusal(file, f"{ZERO}.stage", zero.get("stage", 0), "only stage 3 shards the base; set it to 3")
    changes = {name: value for key, value in zero.items() if (name := key.removeprefix("stage3_")) in _APPLIED}
    if not parallel.prefetch and (size := changes.get("prefetch_bucket_size")):
        raise _contradiction(file, "parallel.prefetch=false", "stage3_prefetch_bucket_size", size)
    offload = zero.get(_OFFLOAD, {})
    device = offload.get("device")
    if device not in ("none", "cpu", None):
        raise refusal(file, f"{ZERO}.{_OFFLOAD}.device", device, "the base can be kept on the GPUs (none) or on cpu")
    if parallel.offload_base and device == "none":
        raise _contradiction(file, "parallel.offload_base=true", f"{_OFFLOAD}.device", device)
    applied = ["device"]
    if parallel.offload_base or device == "cpu":
        changes |= {"offload": True, "pin_memory": offload.get("pin_memory", True)}
        applied += ["pin_memory"]
    without_effect += _judge(file, f"{ZERO}.{_OFFLOAD}.", offload, applied)
    return replace(gathering, **changes, without_effect=tuple(without_effect))


def _judge(file: str, prefix: str, values: Mapping[str, Any], applied: Collection[str]) -> list[str]:
    """Return the keys without effect. Raises UserError for one that contradicts how distlora trains."""
    without_effect = []
    for key, value in values.items():
        name = key.removeprefix("stage3_")
        if name in applied:
            if isinstance(value, str) and name != "device":  # DeepSpeed reads numbers and switches in quotes too.
                raise refusal(file, prefix + key, value, "write it without quotes")
        elif _is_off(value) or (name, value) == ("zero_hpz_partition_size", 1):
            continue
        elif name in _REFUSED:
            reason, instead = _REFUSED[name]
            advice = f" and write {instead}" if instead else ""
            raise refusal(file, prefix + key, value, f"{reason}; remove it from the file{advice}")
        else:
            without_effect.append(prefix + key)
    return without_effect


def refusal(file: str, key: str, value: object, reason: str) -> UserError:
    """Return the error for a key of the file."""
    return UserError(f"parallel.deepspeed_config={file}: {key}={short(value)}: {reason}")


def _contradiction(file: str, setting: str, key: str, value: object) -> UserError:
    """Return the error for a key of zero_optimization that contradicts `setting` of the command line."""
    return UserError(
        f"{setting} and {ZERO}.{key}={short(value)} in {file} contradict each other; leave one of them out"
    )


def offloads_base(parallel: ParallelConfig, shards: int) -> bool:
    """Return True if ranks keep their shards in CPU memory, by setting or DeepSpeed file. Raises UserError."""
    return shards > 1 and parallel.backend == "zero3" and read_gathering(parallel).offload


def _is_off(value: object) -> bool:
    """Return True for a value without effect: false, 0, an empty section, one that is not enabled."""
    if isinstance(value, dict):
        return not value.get("enabled", value) or value.get("device") == "none"
    return not value
