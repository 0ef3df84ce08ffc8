"""Plan how a run samples answers (train.objective=grpo): rows at once, keys and values, seconds of a rollout.

It follows `distlora/generation/engine.py`: the ranks divide the answers, a row that ends makes room for the next, and
keys and values take at most a part of the memory that training leaves free. As in the engine the base is kept whole on
each rank where that fits. The figures are for answers of rollout.max_new_tokens; shorter ones take less.

A GPU reads keys and values where they lie. Its host launches each kernel of a token and then waits for the tokens, so
a token takes the longer of the two.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from distlora.architecture.shapes import CACHE_SHARE, DENSE_ROWS, DENSE_SHARE, MOST_ROWS
from distlora.config import RolloutConfig
from distlora.planner import traffic
from distlora.planner.decoder_sizes import KernelOptions, copied_adapters
from distlora.planner.machine import Machine
from distlora.planner.memory.base import base_of
from distlora.planner.memory.device import DeviceBytes
from distlora.planner.memory.gathered import unit_bytes
from distlora.planner.model import PlannedModel
from distlora.planner.speed.launches import KernelLaunch, gemm
from distlora.planner.speed.rates import rates_of, total
from distlora.planner.speed.timing import blocks_of, seconds_of_launches
from distlora.planner.workload import Workload
from distlora_kernels.format_layouts import is_nf4

HOST_LAYER, HOST_CHOICE = 5.5e-4, 3e-4
"""Seconds of the host per decoder layer of a token, and per token beside them: estimates, not measured.

A layer has 25 launches of Triton kernels at 15 us and 10 of torch at 5 us, as traced for Llama's (docs/benchmarks.md),
and 0.15 ms of Python."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """A rollout: the answers that the next steps train on."""

    answers: int
    """Answers of all ranks."""
    steps: int
    """Optimizer steps that train on them."""
    rows: int
    """Answers that a rank decodes at once."""
    cache_bytes: int
    """Keys and values of these rows, of data.sequence_length tokens each."""
    base_bytes: int
    """Bytes beside a rank's shard to keep the base whole; 0 if it is, or if there is no room."""
    is_whole: bool
    """True if each rank has the whole base meanwhile; False: it is gathered for each token."""
    dense_bytes: int
    """Bytes of the dequantized weights beside it, if a GPU keeps them meanwhile; otherwise 0."""
    adapter_bytes: int
    """Bytes of the engine's own copies of the adapters in 16 bits, on a GPU; training's copies stay beside them."""
    seconds: float | None
    """Seconds of a rollout; None without rates of the node."""
    tokens: int
    """Tokens that all ranks generate."""

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens per second of all ranks."""
        return None if self.seconds is None else self.tokens / self.seconds

    def as_json(self) -> dict[str, float | None]:
        """Every figure."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def sampling_of(
    rollout: RolloutConfig, work: Workload, model: PlannedModel, machine: Machine, device: DeviceBytes
) -> Sampling | None:
    """Return how a run samples; None if it does not, or if a server does (rollout.url)."""
    if work.train.needs.data != "prompts" or rollout.url is not None:
        return None
    shapes, shards = model.shapes, work.shard_degree(machine.ranks)
    itemsize = work.itemsize
    answers = work.train.global_batch * rollout.steps_per_generation
    own = -(-answers // machine.ranks)
    per_token = sum(
        count * 2 * itemsize * kind.heads[1] * kind.heads[2]
        for kind, count in shapes.architecture.counted()
        if kind.heads is not None
    )
    base = base_of(work, shapes)
    wanted = base.total(lambda unit: unit_bytes(unit, shards), 0, shapes.num_layers) if shards > 1 else 0
    copies = copied_adapters(work, shapes, machine)[1]
    free = math.inf if machine.usable_bytes is None else machine.usable_bytes - device.persistent - copies
    # DeepSpeed keeps no layers gathered between forwards.
    whole = wanted <= free and (shards == 1 or work.parallel.backend == "fsdp2")
    left = free - (wanted if whole else 0)
    of_row = work.sequence_length * per_token
    rows = min(own, MOST_ROWS["cuda" if machine.is_gpu else "cpu"])
    numel = shapes.quantized_numel(work.format) if machine.is_gpu and whole and work.dense_layers == 0 else 0
    gains = rows > DENSE_ROWS or not is_nf4(work.format)
    dense = itemsize * numel if gains and itemsize * numel <= DENSE_SHARE * left else 0
    left -= dense
    if left < math.inf and of_row:
        rows = max(1, min(rows, int(CACHE_SHARE * left / of_row)))
    turns = -(-own // rows)
    token = replace(work, dense_layers=shapes.num_layers) if dense else work
    seconds = _token_seconds(token, model, machine, rows, per_token * work.sequence_length, whole=whole)
    return Sampling(
        answers=answers,
        steps=rollout.steps,
        rows=rows,
        cache_bytes=rows * of_row,
        base_bytes=wanted if whole else 0,
        is_whole=whole,
        dense_bytes=dense,
        adapter_bytes=copies,
        seconds=None if seconds is None else seconds * turns * rollout.max_new_tokens,
        tokens=answers * rollout.max_new_tokens,
    )


def _token_seconds(
    work: Workload, model: PlannedModel, machine: Machine, rows: int, cached: int, *, whole: bool
) -> float | None:
    """Return the seconds of one token of each row, whose keys and values take `cached` bytes; None without rates.

    Prompts are left out: they run many tokens at a time.
    """
    rates = rates_of(work, machine)
    if rates is None:
        return None
    token = replace(
        work, sequence_length=1, train=replace(work.train, micro_batch=rows, mlp_tile=None, checkpointing="none")
    )
    shapes, shards = model.shapes, work.shard_degree(machine.ranks)
    how = KernelOptions.planned(token, shapes, machine)
    launches = [launch for block in blocks_of(token, model, how) for launch in block.forward]
    launches.append(gemm("head", rows, shapes.vocabulary, shapes.hidden, how))
    launches.append(KernelLaunch("attention", rows * cached))
    seconds = total(seconds_of_launches(launches, rates))
    if machine.is_gpu:
        seconds = max(seconds, HOST_LAYER * shapes.num_layers + HOST_CHOICE)
    if not whole and machine.link:
        seconds += traffic.moved_bytes(work, shapes, shards) / machine.link
    return seconds
