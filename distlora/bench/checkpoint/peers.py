"""Measure saves of other libraries: PEFT's save_pretrained, transformers' Trainer, accelerate's save_state.

All train PEFT's adapters on bitsandbytes' NF4 with AdamW, in fp32 as PEFT keeps them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainingArguments

from distlora.bench.checkpoint.saved import Clock, Saved, folder_bytes, median
from distlora.bench.peer_models import describe, fsdp2_accelerator, load_base, trained
from distlora.bench.random_inputs import random_tokens
from distlora.parallel import Ranks
from distlora.planner.traffic import Storage


def adapted(folder: Path, r: int, storage: Storage = "nf4 in uint8") -> Any:
    """Return PEFT's model with an adapter on every linear."""
    model: Any = get_peft_model(
        load_base(folder, storage), LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    return model


def numel(model: Any) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in trained(model))


def save_pretrained(folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, saves: int) -> list[Saved]:
    """Measure save_pretrained: the adapter alone, from which no run resumes."""
    model = adapted(folder, r)
    saved = [_timed(partial(model.save_pretrained, place)) for place in _places(out, saves)]
    resume = _timed(lambda: set_peft_model_state_dict(model, load_peft_weights(str(out / "0"))))
    return [
        Saved(
            way="PEFT save_pretrained",
            ranks=1,
            r=r,
            trained=numel(model),
            nbytes=folder_bytes(out / "0"),
            save=median(saved[1:]),
            on_disk=median(saved[1:]).seconds,
            resume=resume,
            fault="no optimizer",
        )
    ]


def trainer(folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, saves: int) -> list[Saved]:
    """Measure the time between Trainer's callbacks around a save.

    The time of a resume is that of train() up to its first step, less that of a new start.
    """
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(saves + 1, tokens, 1000, 0)]
    model, times = adapted(folder, r), Times()

    def train(steps: int, *, resume: str | None = None) -> Clock:
        arguments = TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            use_cpu=True,
        )
        began = Clock.now()
        Trainer(model, arguments, train_dataset=rows, callbacks=[times]).train(resume_from_checkpoint=resume)
        return times.began - began

    train(1)  # Imports of the first start are not part of a resume.
    shutil.rmtree(out / "checkpoint-1")
    times.saves.clear()
    new_start = train(saves)
    newest = out / f"checkpoint-{saves}"
    resumed = train(saves + 1, resume=str(newest))
    return [
        Saved(
            way="transformers Trainer",
            ranks=1,
            r=r,
            trained=numel(model),
            nbytes=folder_bytes(newest),
            save=median(times.saves[1:saves]),
            on_disk=median(times.saves[1:saves]).seconds,
            resume=resumed - new_start,
        )
    ]


class Times(TrainerCallback):
    """Records when Trainer's first step begins, and the time from the end of a step to the end of its save."""

    def __init__(self) -> None:
        self.saves: list[Clock] = []
        self.began = self.stepped = Clock.now()
        self._starts = False

    def on_train_begin(self, *arguments: Any, **state: Any) -> None:
        """Expect the first step."""
        self._starts = True

    def on_step_begin(self, *arguments: Any, **state: Any) -> None:
        """Record the start of the first step."""
        if self._starts:  # After restoring generators and skipping sequences.
            self.began, self._starts = Clock.now(), False

    def on_step_end(self, *arguments: Any, **state: Any) -> None:
        """Record the end of a step."""
        self.stepped = Clock.now()

    def on_save(self, *arguments: Any, **state: Any) -> None:
        """Record the time of a save."""
        self.saves.append(Clock.now() - self.stepped)


def accelerate(folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, saves: int, forced: bool) -> list[Saved]:
    """Measure accelerator.save_state with DistributedDataParallel, which its FSDP2 plugin becomes on a CPU.

    With `forced`, the model is sharded by FSDP2 and each rank writes its part of the state.
    """
    accelerator = fsdp2_accelerator(forced=forced)
    model = adapted(folder, r, "nf4 in bf16")
    count = numel(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-4))
    row = random_tokens(1, tokens, 1000, ranks.rank)
    accelerator.backward(model(input_ids=row, labels=row).loss)
    optimizer.step()
    saved = []
    for place in _places(out, saves):
        accelerator.wait_for_everyone()
        saved.append(_timed(partial(accelerator.save_state, str(place))))
    accelerator.wait_for_everyone()
    resume, fault = None, None
    try:
        resume = _timed(lambda: accelerator.load_state(str(out / str(saves - 1))))
    except RuntimeError as error:  # accelerate 1.15: the model does not accept its keys of 4-bit weights.
        fault = f"load_state raises {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    accelerator.wait_for_everyone()
    return [
        Saved(
            way=f"accelerate save_state ({describe(model).partition(',')[0]})",
            ranks=ranks.world,
            r=r,
            trained=count,
            nbytes=folder_bytes(out / str(saves - 1)),
            save=median(saved[1:]),
            on_disk=median(saved[1:]).seconds,
            resume=resume,
            fault=fault,
        )
    ]


def _places(out: Path, saves: int) -> Sequence[Path]:
    return [out / str(number) for number in range(saves)]


def _timed(call: Callable[[], object]) -> Clock:
    began = Clock.now()
    call()
    return Clock.now() - began
