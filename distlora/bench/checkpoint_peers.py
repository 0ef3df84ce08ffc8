"""Measure saves of other libraries: PEFT's save_pretrained, transformers' Trainer, accelerate's save_state.

All train PEFT's adapters on bitsandbytes' NF4 with AdamW, in fp32 as PEFT keeps them.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainingArguments

from distlora.bench.checkpoint import Clock, Saved, folder_bytes, median
from distlora.bench.peer_models import describe, fsdp2_accelerator, load_base, trained
from distlora.bench.random_inputs import random_tokens
from distlora.parallel import Ranks


def measure(way: str, folder: Path, out: Path, ranks: Ranks, *, r: int, tokens: int, saves: int) -> list[Saved]:
    """Return the figures of a way, with adapters of rank r on every linear of the model in `folder`."""
    # accelerate's state must exist before the model is loaded.
    accelerator = fsdp2_accelerator(forced=way == "fsdp2") if way in ("accelerate", "fsdp2") else None
    model: Any = get_peft_model(
        load_base(folder, "nf4 in uint8" if accelerator is None else "nf4 in bf16"),
        LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    count = sum(parameter.numel() for parameter in trained(model))
    if accelerator is not None:
        saved = _accelerate(accelerator, model, out, ranks, tokens=tokens, saves=saves)
    else:
        saved = (_trainer if way == "trainer" else _save_pretrained)(model, out, tokens=tokens, saves=saves)
    files, times = saved.pop("files"), saved.pop("times")
    save = median(times[1:])
    nbytes = folder_bytes(files)
    return [Saved(ranks=ranks.world, r=r, trained=count, nbytes=nbytes, save=save, on_disk=save.seconds, **saved)]


def _save_pretrained(model: Any, out: Path, *, tokens: int, saves: int) -> dict[str, Any]:
    """Measure save_pretrained: the adapter alone, from which no run resumes."""
    times = [_timed(partial(model.save_pretrained, out / str(number))) for number in range(saves)]
    resume = _timed(lambda: set_peft_model_state_dict(model, load_peft_weights(str(out / "0"))))
    found = {"way": "PEFT save_pretrained", "resume": resume, "fault": "no optimizer"}
    return found | {"files": out / "0", "times": times}


def _trainer(model: Any, out: Path, *, tokens: int, saves: int) -> dict[str, Any]:
    """Measure the time between Trainer's callbacks around a save.

    The time of a resume is that of train() up to its first step, less that of a new start.
    """
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(saves + 1, tokens, 1000, 0)]
    times = Times()

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
    found = {"way": "transformers Trainer", "resume": resumed - new_start}
    return found | {"files": newest, "times": times.saves[:saves]}


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


def _accelerate(accelerator: Any, model: Any, out: Path, ranks: Ranks, *, tokens: int, saves: int) -> dict[str, Any]:
    """Measure accelerator.save_state with DistributedDataParallel, which its FSDP2 plugin becomes on a CPU.

    Where it is forced, FSDP2 shards the model and each rank writes its part of the state.
    """
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=1e-4))
    row = random_tokens(1, tokens, 1000, ranks.rank)
    accelerator.backward(model(input_ids=row, labels=row).loss)
    optimizer.step()
    times = []
    for number in range(saves):
        accelerator.wait_for_everyone()
        times.append(_timed(partial(accelerator.save_state, str(out / str(number)))))
    accelerator.wait_for_everyone()
    resume, fault, last = None, None, out / str(saves - 1)
    try:
        resume = _timed(lambda: accelerator.load_state(str(last)))
    except RuntimeError as error:  # accelerate 1.15: the model does not accept its keys of 4-bit weights.
        fault = f"load_state raises {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    accelerator.wait_for_everyone()
    way = f"accelerate save_state ({describe(model).partition(',')[0]})"
    return {"way": way, "resume": resume, "fault": fault, "files": last, "times": times}


def _timed(call: Callable[[], object]) -> Clock:
    began = Clock.now()
    call()
    return Clock.now() - began
