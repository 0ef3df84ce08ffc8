"""What a run makes, in the forms that others load: an adapter in PEFT's format, or a whole Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from distlora import checkpoint, durable
from distlora.checkpoint import Progress
from distlora.config import Config, UserError
from distlora.model import CausalLM
from distlora.optim import Optimizer
from distlora.peft_format import CONFIG_NAME, WEIGHTS_NAME, adapter_config, adapter_tensors
from distlora.run_folder import BEST_NAME, PUBLISHED, TEMPLATE_NAME
from distlora.tokens import tokenizer_files

MODEL_NAME = "model.safetensors"
COMPANIONS = (".json", ".jinja", ".txt", ".model")
"""What of a base's folder goes into RUN/model beside the weights, by suffix."""


def weight_files(model: CausalLM, config: Config) -> dict[str, dict]:
    """The files of a checkpoint that hold what was trained: an adapter in PEFT's format, or the whole model."""
    if config.adapter.method == "full":
        return {MODEL_NAME: model.hf_state_dict()}
    tensors = adapter_tensors(model)
    return {CONFIG_NAME: adapter_config(config, model), WEIGHTS_NAME: dict(tensors)}


@torch.no_grad()
def load_weights(folder: Path, model: CausalLM) -> None:
    """Take an adapter, or a whole model, from a folder. UserError where its tensors are not this model's."""
    has_adapter = (folder / WEIGHTS_NAME).is_file()
    own = dict(adapter_tensors(model)) if has_adapter else model.hf_state_dict()
    tensors = checkpoint.load_tensors(folder, WEIGHTS_NAME if has_adapter else MODEL_NAME)
    odd = sorted(own.keys() ^ tensors.keys()) or [
        name for name, tensor in tensors.items() if tensor.shape != own[name].shape
    ]
    if odd:
        raise UserError(
            f"{folder} does not fit {model.hf_config.name_or_path}: {odd[0]} has another shape or no place "
            f"({len(odd)} such tensors); was it trained on another model?"
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def restore(folder: Path, model: CausalLM, optimizer: Optimizer) -> None:
    """Take the trained parameters and the optimizer's state from a checkpoint."""
    load_weights(folder, model)
    optimizer.load_state_tensors(checkpoint.load_tensors(folder, checkpoint.TRAINER_NAME))


def finish(run_dir: Path, model: CausalLM, config: Config, progress: Progress, chat_template: str | None) -> str:
    """Publish RUN/adapter (PEFT format) or RUN/model (a Hugging Face folder): the last state, or the best if asked for.

    Returns what was saved, in words.
    """
    target = run_dir / PUBLISHED[config.adapter.method]
    best = run_dir / BEST_NAME
    if not (config.train.load_best_at_end and progress.best_step not in (None, progress.step)):
        publish_result(target, model, config, chat_template)
        return str(target)
    temporary = checkpoint.temporary_of(target)
    shutil.copytree(best, temporary)
    checkpoint.publish(temporary, target)
    return f"{target} (the best, of step {progress.best_step})"


def publish_result(target: Path, model: CausalLM, config: Config, chat_template: str | None) -> None:
    """What is trained, as a folder that others load: an adapter in PEFT's format, or a whole Hugging Face model.

    `chat_template` is the one that the chats were rendered with, where that is not the base's own: whoever serves the
    result needs it, and the tokenizer where it has new tokens. The folder appears whole or not at all.
    """
    temporary = checkpoint.temporary_of(target)
    temporary.mkdir()
    if config.adapter.method == "full":
        for path in Path(config.model.path).iterdir():  # The tokenizer and the generation config come along.
            if path.suffix in COMPANIONS and not path.name.endswith(".index.json"):
                shutil.copy2(path, temporary / path.name)
        # In the base's own dtype, which the fp32 masters are rounded to once, here.
        dtype = model.hf_config.dtype or torch.float32
        model.hf_config.save_pretrained(temporary)
        tensors = {name: tensor.to(dtype) for name, tensor in model.hf_state_dict().items()}
        checkpoint.write_files(temporary, {MODEL_NAME: tensors})
    else:
        checkpoint.write_files(temporary, weight_files(model, config))
    for name, content in tokenizer_files(config).items():
        (temporary / name).write_bytes(content)
    if chat_template is not None:
        durable.write_text(temporary / TEMPLATE_NAME, chat_template)
    checkpoint.publish(temporary, target)
