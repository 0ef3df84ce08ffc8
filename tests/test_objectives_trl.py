"""Objectives equal TRL 1.16.0's trainers: losses and adapter gradients on the same model, data and seed.

A case of CASES is an objective's settings and the loss of TRL's trainer for it. Each is compared on NF4 (TRL gets the
dequantized base) and on the base itself, and on one rank with three.
"""

from __future__ import annotations

import json
import math
import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor

from closeness import assert_close, assert_losses_close
from distlora.config.file import load_config
from distlora.data.loader import Share, stacks
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.training.loop import mean_losses
from distlora.training.objectives import objective_of
from distlora.training.open_run import open_data
from distlora.training.setup import start_adapters, start_run_model
from distlora.training.worker import trained_parameters
from family_models import SINGLE, dequantized
from small_models import make_run, tokenizer
from tiers import ci
from worlds import World


@dataclass
class Theirs:
    """What a case makes TRL's trainer of."""

    model: Any
    """The model in PEFT, with the values of our adapter."""
    records: list[dict[str, Any]]
    """Lines of the data."""
    folder: Path

    def arguments(self, **settings: Any) -> dict[str, Any]:
        """Return arguments of TRL's configs: fp32 on the CPU, nothing recomputed, nothing logged."""
        quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "output_dir": str(self.folder)}
        return quiet | {"use_cpu": True, "bf16": False, "activation_checkpointing": False, **settings}

    def trainer(self, trainer: Any, config: Any, **settings: Any) -> Any:
        """Return TRL's trainer of the records, with its own tokens of them."""
        from datasets import Dataset

        return trainer(
            model=self.model,
            args=config(**self.arguments(**settings)),
            train_dataset=Dataset.from_list(self.records),
            processing_class=tokenizer(),
        )


def loss_of(trainer: Any, *, batch: int | None = None) -> Tensor:
    """Return the mean of TRL's loss over the batches of `batch` records; None: of all records."""
    examples = list(trainer.train_dataset)
    parts = [examples[first : first + (batch or len(examples))] for first in range(0, len(examples), batch or 10**6)]
    losses = [trainer.compute_loss(trainer.model, trainer.data_collator(part)) for part in parts]
    return torch.stack(losses).mean()


def dpo(theirs: Theirs, **settings: Any) -> Tensor:
    from trl import DPOConfig, DPOTrainer

    # The start's adapter adds nothing: without it, the base is the reference, as with peft_config=.
    trainer = theirs.trainer(DPOTrainer, DPOConfig, **settings)
    trainer.model.delete_adapter("ref")
    return loss_of(trainer)


class Case(NamedTuple):
    """An objective, and TRL's loss for it."""

    train: dict[str, Any]
    """Our settings."""
    trl: Callable[[Theirs], Tensor]
    """TRL's loss of all records."""
    first: float | None = None
    """Loss of a step whose adapter adds nothing, if it does not depend on the model."""
    write: Callable[[], list[dict[str, Any]]] = lambda: pairs()
    """Records of the data."""


def pairs(*, prompt_words: int = 5) -> list[dict[str, Any]]:
    """Return 12 pairs of uneven length: a text as it continues, and in capitals."""
    records = []
    for number, topic in enumerate(sorted(pydoc_data.topics.topics.values(), key=len)[20:32]):
        words = topic.split()
        answer = " " + " ".join(words[prompt_words : prompt_words + 3 + number % 6])
        prompt = " ".join(words[:prompt_words])
        records.append({"prompt": prompt, "chosen": answer.lower(), "rejected": answer.upper()})
    return records


CASES = {
    "dpo": Case({"objective": "dpo", "beta": 0.3}, lambda theirs: dpo(theirs, beta=0.3), math.log(2)),
}


class Ours(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    """By PEFT's names."""
    first: float
    """Loss before the adapter was moved."""


def prepare(folders: Path, run_dir: Path, case: Case, quant: str) -> None:
    """Prepare a run whose one step has all records."""
    data = run_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(record) + "\n" for record in case.write()))
    make_run(
        run_dir,
        folders,
        data={"path": str(data), "sequence_length": 160, "eval_fraction": 0.0},
        quant={"method": quant},
        train={**case.train, "max_steps": 1, "global_batch": 12, "micro_batch": 1, "accumulate": "block"},
    )


def our_step(ranks: Ranks, *, run_dir: Path) -> Ours:
    """Compute the step's loss and gradients, of adapters that were moved from their start."""
    return _step(ranks, run_dir)[0]


def _step(ranks: Ranks, run_dir: Path) -> tuple[Ours, CausalLM]:
    config = load_config(run_dir)
    model, backend, _ = start_run_model(config, ranks)
    backend.reduce_gradients_of(trained_parameters(model).values(), config.parallel.bucket_mb)
    start_adapters(model, config.spec, backend, is_reference=config.train.needs.reference, restores=False)
    objective, batch = objective_of(config.train), open_data(run_dir, config.train, ranks)[0].batch(0)
    (part,) = stacks([Share(batch, None, 0)], whole=True)
    model.set_num_micro(len(batch.micro_batches))
    losses = []
    for moves in (False, True):
        if moves:
            move_adapters(model)
        backend.zero_gradients()
        rows = objective.losses(model, part.batch, ranks.device, 0).rows
        backend.backward(*mean_losses(part, rows, [objective.units(batch)]), last=True)
        backend.finish_gradients()
        losses.append(float(backend.sum_over_ranks(rows.detach().sum())) / objective.units(batch))
    gradients = {name: parameter.grad.clone() for name, parameter in adapter_tensors(model).items()}  # type: ignore[union-attr]
    return Ours(losses[1], gradients, losses[0]), model


@torch.no_grad()
def move_adapters(model: CausalLM) -> None:
    """Move the adapters from where they start, as training would."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter_tensors(model).items():
        parameter += (0.05 if "lora_B" in name else 0.02) * torch.randn(parameter.shape, generator=generator)


def their_model(folder: Path, ours: CausalLM, spec: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return our model in PEFT, and its adapter's parameters by PEFT's names."""
    targets = adapter_config(spec, ours)["target_modules"]
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, use_rslora=True, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(dequantized(folder, ours), lora)
    parameters = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if ".lora_" in n}
    with torch.no_grad():
        for name, parameter in adapter_tensors(ours).items():
            parameters[name].copy_(parameter)
    return tuned, parameters


@pytest.mark.parametrize(
    ("name", "quant"),
    [case for name in CASES for case in ((name, "nf4"), ci(name, "none"))],
    ids=str,
)
def test_losses_and_gradients_equal_trls(folders: Path, tmp_path: Path, name: str, quant: str) -> None:
    case = CASES[name]
    prepare(folders, tmp_path / "run", case, quant)
    ours, model = _step(SINGLE, tmp_path / "run")
    config = load_config(tmp_path / "run")
    tuned, parameters = their_model(folders / "llama", model, config.spec)
    expected = case.trl(Theirs(tuned, case.write(), tmp_path / "trl"))
    expected.backward()
    if case.first is not None:
        assert math.isclose(ours.first, case.first, rel_tol=1e-6)
    assert abs(ours.loss - ours.first) > 1e-2 * ours.first, "the adapter hardly moved, so this says little"
    assert_losses_close([ours.loss], [expected.item()], relative=1e-5)
    for parameter, gradient in ours.gradients.items():
        assert_close(gradient, parameters[parameter].grad, ulps=84)  # type: ignore[arg-type]  # 1e-5


def all_steps(ranks: Ranks, *, run_dirs: Sequence[Path]) -> list[Ours]:
    return [our_step(ranks, run_dir=run_dir) for run_dir in run_dirs]


def test_three_ranks_have_the_losses_and_gradients_of_one(world: World, folders: Path, tmp_path: Path) -> None:
    for name, case in CASES.items():
        prepare(folders, tmp_path / name, case, "nf4")
    run_dirs = [tmp_path / name for name in CASES]
    alone, spread = (world.run(size, all_steps, run_dirs=run_dirs)[0] for size in (1, 3))
    for one, three in zip(alone, spread, strict=True):
        assert_losses_close([three.loss], [one.loss])
        for name, gradient in one.gradients.items():
            assert_close(three.gradients[name], gradient, ulps=84)
