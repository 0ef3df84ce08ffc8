"""Train PEFT adapters on bitsandbytes' NF4: in a plain loop, in transformers' Trainer, and with accelerate's FSDP2.

All use the same sequences and initial adapter as ours.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.bench.peer_models import Storage, describe, fsdp2_accelerator, load_base, trained
from distlora.bench.step.compare import StepJob
from distlora.bench.step.worker import EndedError, Turns
from distlora.data.loader import IGNORED, MicroBatch, StepLoader
from distlora.data.rows import PackedRows
from distlora.parallel import Ranks

Inputs = dict[str, Tensor]
MAX_GRAD_NORM = 1.0
RECOMPUTES = {"use_reentrant": False}


def batches(rows: PackedRows, count: int, ranks: Ranks) -> Iterator[Inputs]:
    """Yield this rank's sequences of each step of `count` sequences over all ranks, in transformers' format."""
    loader = StepLoader(
        rows,
        global_batch=count,
        micro_batch=count // ranks.world,
        rank=ranks.rank,
        world=ranks.world,
        seed=0,
        shuffle=False,
    )
    for step in itertools.count():
        (batch,) = loader.batch(step).micro_batches
        yield as_inputs(batch)


class Sequences(torch.utils.data.Dataset[Inputs]):
    """The sequences as a map-style dataset, which Trainer needs."""

    def __init__(self, rows: PackedRows) -> None:
        self._count = len(rows)
        self._loader = StepLoader(rows, global_batch=1, micro_batch=1, rank=0, world=1, seed=0, shuffle=False)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Inputs:
        (batch,) = self._loader.batch(index).micro_batches
        return {name: tensor[0] for name, tensor in as_inputs(batch).items()}


def as_inputs(batch: MicroBatch) -> Inputs:
    """Return a batch for transformers, which shifts labels itself and finds packed documents by position_ids."""
    labels = torch.full_like(batch.labels, IGNORED)
    labels[:, 1:] = batch.labels[:, :-1]
    inputs = {"input_ids": batch.input_ids, "labels": labels}
    if bool((batch.position_ids[:, 1:] == 0).any()):
        inputs["position_ids"] = batch.position_ids
    return inputs


def start(job: StepJob, device: torch.device, *, documented: bool, storage: Storage = "nf4 in uint8") -> Any:
    """Return PEFT's model as its users build it, with the given adapter."""
    auto_class = architecture_of(read_config(Path(job.model)), job.model).auto_class
    dtype = getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[job.dtype])
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


def adamw(model: Any, job: StepJob, *, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, without weight decay."""
    return torch.optim.AdamW(trained(model), lr=job.lr, weight_decay=0.0, fused=fused)


def loop(job: StepJob, rows: PackedRows, ranks: Ranks, turns: Turns) -> None:
    """Train in a plain loop with fused AdamW, as ours and Trainer use; DistributedDataParallel on several ranks."""
    documented = job.recipe == "documented"
    model = start(job, ranks.device, documented=documented)
    ran = type(model).__name__
    if job.recipe == "compiled":
        model = torch.compile(model)
    if ranks.group is not None:
        model = DistributedDataParallel(model)  # Around the compiled model: the other way round breaks its graph.
        ran = type(model).__name__
    optimizer = adamw(model, job, fused=True)

    def backward(inputs: Inputs) -> Tensor:
        with torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=documented):
            loss: Tensor = model(**inputs).loss
        loss.backward()
        return loss

    def step(inputs: Inputs) -> Tensor:
        loss = backward(inputs)
        torch.nn.utils.clip_grad_norm_(trained(model), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    if job.recipe == "compiled":  # Before the turns, so that they do not measure the compiler.
        began = time.perf_counter()
        backward(next(batches(rows, job.rows, ranks)))
        optimizer.zero_grad()
        seconds, counted = time.perf_counter() - began, torch._dynamo.utils.counters
        graphs, breaks = counted["stats"]["unique_graphs"], sum(counted["graph_break"].values())
        ran += f", torch.compile(model): graphs {graphs}, graph breaks {breaks}, {seconds:.0f} s with the first pass"
    turns.answer(ran=ran)
    run(step, rows, job, ranks, turns)


def fsdp2(job: StepJob, rows: PackedRows, ranks: Ranks, turns: Turns) -> None:
    """Train in accelerate's loop with its FSDP2 plugin; it shards 4-bit weights only if they are stored as bf16."""
    accelerator = fsdp2_accelerator(forced=job.recipe == "forced")
    model = start(job, ranks.device, documented=True, storage="nf4 in bf16")
    model, optimizer = accelerator.prepare(model, adamw(model, job, fused=False))

    def step(inputs: Inputs) -> Tensor:
        loss: Tensor = model(**inputs).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained(model), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    turns.answer(ran=describe(model))
    run(step, rows, job, ranks, turns)


def run(step: Callable[[Inputs], Tensor], rows: PackedRows, job: StepJob, ranks: Ranks, turns: Turns) -> None:
    """Run `step` on the next batch in each turn."""
    for _, inputs in zip(turns, batches(rows, job.rows, ranks), strict=False):
        turns.note(step({name: tensor.to(ranks.device) for name, tensor in inputs.items()}))


class TakesTurns(TrainerCallback):
    """A callback that waits for a turn before each of Trainer's steps."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_begin(self, *arguments: Any, **rest: Any) -> None:
        """Wait for a turn."""
        self.turns.begin()

    def on_step_end(self, *arguments: Any, **rest: Any) -> None:
        """Stop the clock."""
        self.turns.end()


class NotingTrainer(Trainer):
    """A Trainer that records each step's loss."""

    turns: Turns

    def training_step(self, *arguments: Any, **rest: Any) -> Tensor:
        """Run a step and record its loss."""
        loss: Tensor = super().training_step(*arguments, **rest)
        self.turns.note(loss)
        return loss


def trainer(job: StepJob, rows: PackedRows, ranks: Ranks, turns: Turns) -> None:
    """Train in transformers' Trainer with the documented recipe."""
    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=job.rows // ranks.world,
            max_steps=10**6,
            learning_rate=job.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=True,
            use_cpu=ranks.device.type == "cpu",
            gradient_checkpointing=job.checkpointing == "block",
            gradient_checkpointing_kwargs=RECOMPUTES,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        model = start(job, ranks.device, documented=True)
        training = NotingTrainer(model, settings, train_dataset=Sequences(rows), callbacks=[TakesTurns(turns)])
        training.turns = turns
        turns.answer(ran=type(training).__mro__[1].__name__)
        try:
            training.train()
        except EndedError:
            return
