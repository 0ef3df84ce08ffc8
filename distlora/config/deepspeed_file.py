"""Read the user's DeepSpeed JSON (parallel.deepspeed_config), without torch or DeepSpeed.

DeepSpeed only stores and gathers the frozen base. Keys about gathering are applied. Keys about gradients, optimizer
states and DeepSpeed's checkpoints have no effect, which the run reports. Keys that contradict how distlora trains, and
keys that DeepSpeed does not know, are refused. "auto" and disabled values count as not set, as in Hugging Face.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distlora.config import ParallelConfig, UserError, nearest
from distlora.config.errors import short
from distlora.config.json_files import read_object

FIRST_DEEPSPEED = (0, 19, 8)
"""First supported version: parallel/zero3.py uses private parts of DeepSpeed."""

_ZERO = "zero_optimization"
_OFFLOAD = "offload_param"
_STAGE = "stage3_"
_AS_THEY_ARE: Mapping[str, str] = {}


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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COUNTS = (
    "prefetch_bucket_size",
    "max_live_parameters",
    "max_reuse_distance",
    "param_persistence_threshold",
    "model_persistence_threshold",
)
_SWITCHES = ("overlap_comm", "allgather_sequential")

_WITHOUT_EFFECT = _words(
    """checkpoint dataloader_drop_last disable_allgather disable_python_gc dump_state gradient_allreduce_op
    gradient_predivide_factor graph_harvesting log_level memory_breakdown prescale_gradients sparse_gradients
    steps_per_print use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer check_grad_overflow aio timers managed_gradient_accumulation
    load_universal_checkpoint"""
)
_ZERO_WITHOUT_EFFECT = _words(
    """allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients elastic_checkpoint
    enable_sanity_checks gather_16bit_weights_on_model_save gather_fp16_weights_on_model_save ignore_unused_parameters
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear override_module_apply
    parameter_alignment pipeline_loading_checkpoint reduce_bucket_size reduce_scatter round_robin_gradients
    save_muon_momentum_buffer_in_memory sub_group_size use_multi_rank_bucket_allreduce"""
)
_OFFLOAD_WITHOUT_EFFECT = frozenset({"buffer_count", "buffer_size", "max_in_cpu", "nvme_path"})

_OURS = "distlora has its own setting for it"
_NO_ENGINE = "DeepSpeed's engine does not run"


def _by_key(table: Mapping[tuple[str, str], str]) -> dict[str, tuple[str, str]]:
    """Return (reason, replacement) by key of the file."""
    return {key: why for why, keys in table.items() for key in keys.split()}


_REFUSED = _by_key(
    {
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
    }
)
"""Key: (reason of the refusal, replacement on the command line)."""
_ZERO_REFUSED = _by_key(
    {
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
)
_DONE = ("stage", _OFFLOAD, *_COUNTS, *_SWITCHES)


def check_deepspeed() -> None:
    """Raise UserError if DeepSpeed is not installed or older than FIRST_DEEPSPEED."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "parallel.backend=zero3 needs DeepSpeed, which is not installed; `pip install deepspeed`, or set "
            "parallel=fsdp2"
        ) from None
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    if match is None or tuple(map(int, match.groups())) < FIRST_DEEPSPEED:
        first = ".".join(map(str, FIRST_DEEPSPEED))
        raise UserError(
            f"parallel.backend=zero3 needs DeepSpeed {first} or later, and {found} is installed; "
            "`pip install -U deepspeed`, or set parallel=fsdp2"
        )


def read_gathering(parallel: ParallelConfig) -> Gathering:
    """Return the gathering options of `parallel` and of its DeepSpeed file.

    Raises UserError for keys that distlora does not support, DeepSpeed does not know or `parallel` contradicts, and for
    a file that is not JSON.
    """
    gathering = Gathering(
        offload=parallel.offload_base,
        prefetch_bucket_size=None if parallel.prefetch else 0,
        experts_on_demand=parallel.experts == "on_demand",
    )
    if parallel.deepspeed_config is None:
        return gathering
    file = Path(parallel.deepspeed_config)
    values = read_object(file, "name a JSON file of DeepSpeed's settings, or leave parallel.deepspeed_config out")
    reader = _Reader(file)
    reader.judge("", values, (_ZERO,), _REFUSED, _WITHOUT_EFFECT)
    zero = reader.section("", values, _ZERO)
    if zero:
        gathering = _with_zero(gathering, zero, reader, parallel)
    return replace(gathering, without_effect=tuple(reader.without_effect))


def offloads_base(parallel: ParallelConfig, shards: int) -> bool:
    """Return True if ranks keep their shards in CPU memory, by setting or DeepSpeed file. Raises UserError."""
    return shards > 1 and parallel.backend == "zero3" and read_gathering(parallel).offload


def _with_zero(
    gathering: Gathering, section: Mapping[str, Any], reader: _Reader, parallel: ParallelConfig
) -> Gathering:
    """Return `gathering` with the changes of the section zero_optimization."""
    # DeepSpeed accepts names with and without the prefix "stage3_".
    written: dict[str, str] = {}
    for key, value in section.items():
        if (other := written.setdefault(key.removeprefix(_STAGE), key)) != key:
            raise reader.refusal(f"{_ZERO}.{key}", value, f"{other} sets it too; remove one of them")
    zero = {name: section[key] for name, key in written.items()}
    reader.judge(f"{_ZERO}.", zero, _DONE, _ZERO_REFUSED, _ZERO_WITHOUT_EFFECT, written)
    if zero.get("stage", 0) != 3:
        raise reader.refusal(f"{_ZERO}.stage", zero.get("stage", 0), "only stage 3 shards the base; set it to 3")
    changes: dict[str, Any] = {}
    for name in _COUNTS:
        size: Any = zero.get(name)
        if not _is_off(size) or type(size) in (int, float):
            if type(size) not in (int, float) or not 0 <= size < math.inf or size != int(size):
                raise reader.refusal(f"{_ZERO}.{written[name]}", size, "it must be a whole number, 0 or more")
            changes[name] = int(size)
    if not parallel.prefetch and changes.get("prefetch_bucket_size", 0) > 0:
        key = f"{_ZERO}.{written['prefetch_bucket_size']}"
        raise reader.contradiction("parallel.prefetch=false", key, changes["prefetch_bucket_size"])
    changes |= reader.switches(f"{_ZERO}.", zero, _SWITCHES, written)
    return replace(gathering, **changes, **_offloading(zero, reader, parallel))


def _offloading(zero: Mapping[str, Any], reader: _Reader, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of Gathering that the section offload_param sets."""
    prefix, raw = f"{_ZERO}.{_OFFLOAD}.", zero.get(_OFFLOAD)
    if parallel.offload_base and isinstance(raw, dict) and raw.get("device") == "none":
        raise reader.contradiction("parallel.offload_base=true", f"{prefix}device", "none")
    offload = reader.section(f"{_ZERO}.", zero, _OFFLOAD)
    reader.judge(prefix, offload, ("device", "pin_memory"), {}, _OFFLOAD_WITHOUT_EFFECT)
    device = offload.get("device", "none")
    if device not in ("none", "cpu", "auto", None):
        raise reader.refusal(f"{prefix}device", device, "the base can be kept on the GPUs (none) or on cpu")
    changes: dict[str, Any] = reader.switches(prefix, offload, ("pin_memory",))
    if device == "cpu":
        changes["offload"] = True
    elif not parallel.offload_base and isinstance(raw, dict) and not _is_off(raw.get("pin_memory")):
        reader.without_effect.append(f"{prefix}pin_memory")
    return changes


class _Reader:
    """Check the sections of one file, and collect the keys without effect."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.without_effect: list[str] = []

    def refusal(self, key: str, value: object, reason: str) -> UserError:
        return UserError(f"parallel.deepspeed_config={self._file}: {key}={short(value)}: {reason}")

    def contradiction(self, setting: str, key: str, value: object) -> UserError:
        """Return the error for a key of the file that contradicts `setting` of the command line."""
        return UserError(
            f"{setting} and {key}={short(value)} in {self._file} contradict each other; leave one of them out"
        )

    def section(self, prefix: str, values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """Return the mapping under a key of the file; empty if it is not set."""
        value = values.get(key)
        if _is_off(value):
            return {}
        if not isinstance(value, dict):
            raise self.refusal(prefix + key, value, "it must be a JSON object, {...}")
        return value

    def switches(
        self, prefix: str, values: Mapping[str, Any], names: Sequence[str], written: Mapping[str, str] = _AS_THEY_ARE
    ) -> dict[str, bool]:
        """Return the values of the names that are set."""
        found = {name: value for name in names if (value := values.get(name)) not in ("auto", None)}
        for name, value in found.items():
            if not isinstance(value, bool):
                raise self.refusal(prefix + written.get(name, name), value, "it must be true or false")
        return found

    def judge(
        self,
        prefix: str,
        values: Mapping[str, Any],
        done: tuple[str, ...],
        refused: Mapping[str, tuple[str, str]],
        without_effect: frozenset[str],
        written: Mapping[str, str] = _AS_THEY_ARE,
    ) -> None:
        """Refuse keys that are unknown or contradict the settings; note keys without effect.

        `written`: the keys as in the file, where they differ.
        """
        for name, value in values.items():
            key = written.get(name, name)
            if name in refused:
                reason, instead = refused[name]
                if not _is_off(value) and not (name == "zero_hpz_partition_size" and value == 1):
                    advice = f" and write {instead}" if instead else ""
                    raise self.refusal(prefix + key, value, f"{reason}; remove it from the file{advice}")
            elif name in without_effect:
                if not _is_off(value):
                    self.without_effect.append(prefix + key)
            elif name not in done:
                stage = key.removesuffix(name)
                known = [stage + other for other in (*done, *refused, *without_effect)]
                raise self.refusal(prefix + key, value, f"DeepSpeed has no such setting{nearest(key, known)}")


def _is_off(value: object) -> bool:
    """Return True for a value without effect: "auto", null, false, 0, an empty section, one that is not enabled."""
    if isinstance(value, dict) and "enabled" in value:
        return _is_off(value["enabled"])
    if isinstance(value, dict) and set(value) & {"device"}:
        return value["device"] in ("none", None)
    return value == "auto" or not value
