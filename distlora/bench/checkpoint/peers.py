"""The peers' ways to save a run: PEFT's save_pretrained, transformers' Trainer, accelerate's save_state.

All train PEFT's adapters on bitsandbytes' NF4, in fp32 as PEFT keeps them, by AdamW.
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
from distlora.bench.rows import random_tokens
from distlora.parallel import Ranks
from distlora.planner.traffic import Storage


def adapted(folder: Path, r: int, storage: Storage = "nf4 in uint8") -> Any:
    model: Any = get_peft_model(
        load_base(folder, storage), LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    return model


def numel(model: Any) -> int:
    return sum(parameter.numel() for parameter in trained(model))


def save_pretrained(folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, saves: int) -> list[Saved]:
    """What a user of PEFT keeps at the end: the adapter, from which no run goes on."""
    model = adapted(folder, r)
    found = [_timed(partial(model.save_pretrained, place)) for place in _places(out, saves)]
    resume = _timed(lambda: set_peft_model_state_dict(model, load_peft_weights(str(out / "0"))))
    return [
        Saved(
            way="PEFT save_pretrained",
            ranks=1,
            r=r,
            trained=numel(model),
            nbytes=folder_bytes(out / "0"),
            save=median(found[1:]),
            on_disk=median(found[1:]).seconds,
            resume=resume,
            fault="no optimizer",
        )
    ]


def trainer(folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, saves: int) -> list[Saved]:
    """Between Trainer's callbacks around a save; a resume is what train() takes longer until it has its first step's
    rows than a start anew does."""
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

    train(1)  # What is imported and built at the first start is no part of a resume.
    shutil.rmtree(out / "checkpoint-1")
    times.saves.clear()
    anew = train(saves)
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
            resume=resumed - anew,
        )
    ]


class Times(TrainerCallback):
    """When Trainer's first step begins, and what lies between the end of a step and that of its save."""

    def __init__(self) -> None:
        self.saves: list[Clock] = []
        self.began = self.stepped = Clock.now()
        self._starts = False

    def on_train_begin(self, *arguments: Any, **state: Any) -> None:
        self._starts = True

    def on_step_begin(self, *arguments: Any, **state: Any) -> None:
        if self._starts:  # After the generators' states, the rows that are skipped, and the first that is not.
            self.began, self._starts = Clock.now(), False

    def on_step_end(self, *arguments: Any, **state: Any) -> None:
        self.stepped = Clock.now()

    def on_save(self, *arguments: Any, **state: Any) -> None:
        self.saves.append(Clock.now() - self.stepped)


def accelerate(folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, saves: int, forced: bool) -> list[Saved]:
    """accelerator.save_state: with DistributedDataParallel, which its FSDP2 plugin is on a CPU; or, forced, with FSDP2,
    whose state each rank writes its part of."""
    accelerator = fsdp2_accelerator(forced=forced)
    model = adapted(folder, r, "nf4 in bf16")
    count = numel(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-4))
    row = random_tokens(1, tokens, 1000, ranks.rank)
    accelerator.backward(model(input_ids=row, labels=row).loss)
    optimizer.step()
    found = []
    for place in _places(out, saves):
        accelerator.wait_for_everyone()
        found.append(_timed(partial(accelerator.save_state, str(place))))
    accelerator.wait_for_everyone()
    resume, fault = None, None
    try:
        resume = _timed(lambda: accelerator.load_state(str(out / str(saves - 1))))
    except RuntimeError as error:  # accelerate 1.15: its keys of 4-bit weights are none that the model takes.
        fault = f"load_state raises {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    accelerator.wait_for_everyone()
    return [
        Saved(
            way=f"accelerate save_state ({describe(model).partition(',')[0]})",
            ranks=ranks.world,
            r=r,
            trained=count,
            nbytes=folder_bytes(out / str(saves - 1)),
            save=median(found[1:]),
            on_disk=median(found[1:]).seconds,
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
