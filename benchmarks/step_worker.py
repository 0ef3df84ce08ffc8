"""Train one rank of one way of step.py, a step at a time: distlora's trainer, PEFT's loops, accelerate's FSDP2.

All peers train PEFT adapters on bitsandbytes' NF4, on the same sequences and initial adapter as ours.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.config import Config
from distlora.config.file import build
from distlora.data.loader import IGNORED, StepLoader
from distlora.data.rows import PackedRows
from distlora.parallel import Ranks, join_ranks
from distlora.weights.peft_folder import read_peft_adapter
from distlora_kernels.nf4_cpu import has_bitsandbytes
from measuring import Storage, describe, fsdp2_accelerator, libraries_print_to_stderr, load_base, trained
from support.measured import Started, anonymous_bytes, random_rows, set_rank

Inputs = dict[str, Tensor]
LEARNING_RATE, MAX_GRAD_NORM = 2e-4, 1.0
STEPS = 10**6
"""Steps of the run at a constant learning rate: more than any measurement takes."""
RECOMPUTES = {"use_reentrant": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The work of one process."""

    model: str
    adapter: str
    """Folder of the initial adapter, in PEFT's format."""
    length: int
    """Tokens per sequence."""
    rows: int
    """Sequences per step, over all processes."""
    steps: int
    """Steps that the sequences last for."""
    checkpointing: str
    """none or block."""
    runs: Literal["ours", "loop", "fsdp2"]
    """The training loop that runs."""
    base: str = "nf4"
    """quant.method of ours."""
    compile: bool | Literal["auto"] = "auto"
    """train.compile of ours."""
    recipe: Literal["documented", "plain", "compiled"] = "documented"
    """Variant of a peer's loop."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of a peer's model and adapters in recipes without autocast."""


def turns(device: torch.device, parent: Connection, losses: list[float | Tensor]) -> Iterator[None]:
    """Yield for each step of the parent's turns, and answer with a turn's figures. The caller adds the losses."""
    on_gpu = device.type == "cuda"

    def now() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    while True:
        try:
            steps = parent.recv()
        except EOFError:
            return
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            yield  # It allocates the memory again that was freed after the last turn.
        times = []
        for _ in range(steps):
            began = now()
            yield
            times.append([after - before for before, after in zip(began, now(), strict=True)])
        seconds, cpu_seconds = zip(*times, strict=True)
        answer: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": [*map(float, losses)]}
        if on_gpu:
            answer["peak"] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()  # For the other ways.
        losses.clear()
        parent.send(answer)


def ours(job: Job, rows: PackedRows, ranks: Ranks, parent: Connection) -> None:
    """Train with our trainer until there are no more turns."""
    sections: dict[str, Any] = {
        "model": {"path": job.model},
        "data": {"path": "none", "sequence_length": job.length},
        "adapter": read_peft_adapter(Path(job.adapter)).settings | {"init_from": job.adapter},
        "quant": {"method": job.base, "cache": False},
        "train": {
            "checkpointing": job.checkpointing,
            "global_batch": job.rows,
            "micro_batch": job.rows // ranks.world,
            "max_steps": STEPS,
            "save_minutes": None,
            "compile": job.compile,
        },
        "optim": {"lr": LEARNING_RATE, "schedule": "constant", "warmup_ratio": 0.0},
        "tracker": {},
        "run_dir": "none",
    }
    losses: list[float | Tensor] = []
    trainer, reporter = Started.of(build(Config, sections), ranks).trainer(rows)
    trainer.begin()
    parent.send({"ran": describe(trainer.model)})
    for _ in turns(ranks.device, parent, losses):
        trainer.advance()
        losses.append(reporter.loss)


def batches(job: Job, rows: PackedRows, ranks: Ranks) -> Iterator[Inputs]:
    """Yield this rank's sequences of each step, in the format of transformers, which shifts labels itself."""
    micro, world = job.rows // ranks.world, ranks.world
    loader = StepLoader(
        rows, global_batch=job.rows, micro_batch=micro, rank=ranks.rank, world=world, seed=0, shuffle=False
    )
    for step in itertools.count():
        (batch,) = loader.batch(step).micro_batches
        labels = torch.full_like(batch.labels, IGNORED)
        labels[:, 1:] = batch.labels[:, :-1]
        yield {"input_ids": batch.input_ids.to(ranks.device), "labels": labels.to(ranks.device)}


def start(job: Job, device: torch.device, *, documented: bool = True, storage: Storage = "uint8") -> Any:
    """Return PEFT's model as its users build it, with the given adapter."""
    from peft import PeftModel, prepare_model_for_kbit_training

    auto_class = architecture_of(read_config(Path(job.model)), job.model).auto_class
    dtype = getattr(torch, job.dtype)
    model = load_base(job.model, storage, device=device, auto_class=auto_class, dtype=dtype)
    recomputes = job.checkpointing == "block"
    if documented:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=recomputes, gradient_checkpointing_kwargs=RECOMPUTES
        )
    elif recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTES)
        model.enable_input_require_grads()
        if job.recipe == "compiled":  # use_reentrant=False does not need it, and it breaks torch.compile's graph.
            model.disable_input_require_grads()
    model.config.use_cache = False
    model = PeftModel.from_pretrained(model, job.adapter, is_trainable=True)
    if not documented:
        for parameter in trained(model):
            parameter.data = parameter.data.to(dtype)
    model.train()
    return model


def adamw(model: Any, *, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, without weight decay."""
    return torch.optim.AdamW(trained(model), lr=LEARNING_RATE, weight_decay=0.0, fused=fused)


def loop(job: Job, rows: PackedRows, ranks: Ranks, parent: Connection) -> None:
    """Train in a plain loop with fused AdamW, as ours; DistributedDataParallel on several ranks."""
    documented = job.recipe == "documented"
    model = start(job, ranks.device, documented=documented)
    ran = type(model).__name__
    if job.recipe == "compiled":
        model = torch.compile(model)
    if ranks.group is not None:
        model = DistributedDataParallel(model)  # Around the compiled model: the other way round breaks its graph.
        ran = type(model).__name__
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def backward(inputs: Inputs) -> Tensor:
        with torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=documented):
            loss: Tensor = model(**inputs).loss
        loss.backward()
        return loss.detach()

    if job.recipe == "compiled":  # Before the turns, so that they do not measure the compiler.
        began = time.perf_counter()
        backward(next(batches(job, rows, ranks)))
        optimizer.zero_grad()
        seconds, counted = time.perf_counter() - began, torch._dynamo.utils.counters
        graphs, breaks = counted["stats"]["unique_graphs"], sum(counted["graph_break"].values())
        ran += f", torch.compile(model): graphs {graphs}, graph breaks {breaks}, {seconds:.0f} s with the first pass"
    parent.send({"ran": ran})
    losses: list[float | Tensor] = []
    for _, inputs in zip(turns(ranks.device, parent, losses), batches(job, rows, ranks), strict=False):
        losses.append(backward(inputs))
        torch.nn.utils.clip_grad_norm_(trained(model), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def fsdp2(job: Job, rows: PackedRows, ranks: Ranks, parent: Connection) -> None:
    """Train in accelerate's loop with its FSDP2 plugin; it shards 4-bit weights only if they are stored as bf16."""
    accelerator = fsdp2_accelerator()
    model = start(job, ranks.device, storage="bf16")
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    parent.send({"ran": describe(model)})
    losses: list[float | Tensor] = []
    for _, inputs in zip(turns(ranks.device, parent, losses), batches(job, rows, ranks), strict=False):
        loss = model(**inputs).loss
        accelerator.backward(loss)
        losses.append(loss.detach())
        accelerator.clip_grad_norm_(trained(model), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


WAYS: dict[str, Callable[[Job, PackedRows, Ranks, Connection], None]]
WAYS = {"ours": ours, "loop": loop, "fsdp2": fsdp2}


def main(job: Job, rank: int, world: int, port: int, parent: Connection) -> None:
    """Run one rank until there are no more turns.

    Answers: the anonymous bytes after the imports, the model's class that runs, the figures of each turn; or a failure.
    """
    warnings.simplefilter("ignore")
    if world > 1:
        set_rank(rank, world, port)
    with libraries_print_to_stderr():
        ranks = join_ranks()
        # Libraries import these when they build the model; they are not part of a step's memory.
        architecture = architecture_of(read_config(Path(job.model)), job.model)
        getattr(transformers, architecture.model_class)
        has_bitsandbytes()
        on_host = ranks.device.type == "cpu" and Path("/proc/self/status").exists()
        parent.send({"imported": anonymous_bytes() if on_host else 0})
        try:
            rows = random_rows(job.rows * job.steps, job.length, architecture.vocabulary)
            WAYS[job.runs](job, rows, ranks, parent)
        except Exception as error:  # The other ways go on.
            traceback.print_exc()
            parent.send({"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"})
        sys.stderr.flush()
        os._exit(0)  # Ranks that leave one after the other would wait for each other, or complain.
