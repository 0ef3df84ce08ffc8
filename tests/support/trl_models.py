"""TRL's trainers and models, with our adapters in them."""

from __future__ import annotations

import pydoc_data.topics
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from distlora.data.loader import StepBatch
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.build import CausalLM
from distlora.model.lm_head import RewardHead
from support.family_models import dequantized
from support.small_models import tokenizer


@dataclass
class Theirs:
    """What a case makes TRL's trainer of."""

    model: Any
    """The model in PEFT, with the values of our adapter."""
    records: list[dict[str, Any]]
    """Lines of the data."""
    folder: Path
    documents: list[list[int]]
    """Token ids of the documents of our step, in their order."""

    def arguments(self, **settings: Any) -> dict[str, Any]:
        """Return arguments of TRL's configs: fp32 on the CPU, nothing recomputed, nothing logged."""
        quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "output_dir": str(self.folder)}
        return quiet | {"use_cpu": True, "bf16": False, "activation_checkpointing": False, **settings}

    def trainer(self, trainer: Any, config: Any, *, teacher_model: Any = None, **settings: Any) -> Any:
        """Return TRL's trainer of the records, with its own tokens of them."""
        from datasets import Dataset

        return trainer(
            **({} if teacher_model is None else {"teacher_model": teacher_model}),
            model=self.model,
            args=config(**self.arguments(**settings)),
            train_dataset=Dataset.from_list(self.records),
            processing_class=tokenizer(),
        )


def pairs(prompt: str | None = None) -> list[dict[str, Any]]:
    """Return 12 pairs of uneven length: a text as it continues, and in capitals. `prompt`: of all; None: its own."""
    records = []
    for number, topic in enumerate(sorted(pydoc_data.topics.topics.values(), key=len)[20:32]):
        words = topic.split()
        answer = " " + " ".join(words[5 : 8 + number % 6])
        own = prompt or " ".join(words[:5])
        records.append({"prompt": own, "chosen": answer.lower(), "rejected": answer.upper()})
    return records


@torch.no_grad()
def move_adapters(model: CausalLM, *, seed: int = 0) -> None:
    """Move the adapters from where they start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_tensors(model).items():
        parameter += (0.05 if "lora_B" in name else 0.02) * torch.randn(parameter.shape, generator=generator)


def their_model(folder: Path, ours: CausalLM, spec: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """Return our model in PEFT, or in transformers with adapter=full, and its trained parameters by name."""
    base = dequantized(folder, ours)
    if spec.adapter.method == "full":
        return base, dict(base.named_parameters())
    if isinstance(ours.head, RewardHead):
        base.config.num_labels, base.config.classifier_dropout = len(ours.head.weight), 0.0
        classes = (transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification)
        scoring: Any = classes[len(ours.head.weight) - 1].from_config(base.config)
        scoring.model, base = base.model, scoring
    config = adapter_config(spec, ours)
    names = ("r", "lora_alpha", "use_rslora", "target_modules", "trainable_token_indices", "task_type")
    tuned = peft.get_peft_model(base, peft.LoraConfig(**{name: config[name] for name in names}))
    named = {re.sub(r"(\.modules_to_save)?\.default", "", n): p for n, p in tuned.named_parameters()}
    parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in adapter_tensors(ours).items():
            parameters[name].copy_(parameter)
    return tuned, parameters


def documents_of(batch: StepBatch) -> list[list[int]]:
    """Return the tokens of each document of a step, padding too."""
    found: list[list[int]] = []
    for part in batch.micro_batches:
        columns = (column.flatten().tolist() for column in (part.input_ids, part.position_ids))
        for token, position in zip(*columns, strict=True):
            found += [[]] if position == 0 else []
            found[-1].append(token)
    return found
