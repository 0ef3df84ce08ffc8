"""What makes a folder of weights a model that others load: config, tokenizer, generation config, chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from distlora.architecture.families import read_config
from distlora.architecture.tokens import tokenizer_files
from distlora.post.deltas.base import Base
from distlora.post.trained import Trained
from distlora.run_folder.layout import DATA_NAME, TEMPLATE_NAME, read_record
from distlora.system import atomic_io
from distlora.training.publish import companions_of

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""The newer name and the older one, of which transformers reads both."""


def write_companions(folder: Path, trained: Trained, base: Base, dtype: str) -> None:
    """Beside the weights; `dtype` as config.json has it."""
    copy_companions(folder, trained)
    source = Path(trained.config.model.path)
    atomic_io.write_json(folder / "config.json", merged_config(read_config(source), base, dtype))


def copy_companions(folder: Path, trained: Trained) -> None:
    """All of them but config.json."""
    for path in companions_of(Path(trained.config.model.path)):
        if path.name != "config.json":
            shutil.copy2(path, folder / path.name)
    for name, content in tokenizer_files(trained.config.spec).items():
        (folder / name).write_bytes(content)
    if (template := chat_template(trained)) is not None:
        atomic_io.write_text(folder / TEMPLATE_NAME, template)


def chat_template(trained: Trained) -> str | None:
    """What chats were rendered with in training, where that is not the base's own."""
    if trained.foreign and trained.weights is not None:
        beside = trained.weights / TEMPLATE_NAME
        return beside.read_text(encoding="utf-8") if beside.is_file() else None
    if trained.run_dir is None or trained.weights is None:
        return None
    template: str | None = read_record(trained.run_dir / DATA_NAME).get("chat_template")
    return template


def merged_config(config: dict[str, Any], base: Base, dtype: str) -> dict[str, Any]:
    """config.json: another type, no quantization, a vocabulary that may have grown, a head that may stand apart."""
    model = base.model
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    text = config
    if model.family.text_config is not None:
        text = config[model.family.text_config] = dict(config[model.family.text_config])
    for settings in (config, text):
        for key in [key for key in _DTYPE_KEYS if key in settings] or ([_DTYPE_KEYS[0]] if settings is config else []):
            settings[key] = dtype
    if model.vocabulary.has_grown:
        text["vocab_size"] = model.vocabulary.rows
    if model.tied_in_base and not model.tied:
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
    return config
