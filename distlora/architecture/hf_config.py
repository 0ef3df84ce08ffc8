"""A model's config.json as transformers reads it, and how what transformers refuses is said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distlora.config import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """Read a model's config.json through transformers. Raises UserError for values that transformers refuses."""
    from transformers import AutoConfig

    with refused_by_transformers(Path(folder)):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextlib.contextmanager
def refused_by_transformers(folder: Path) -> Iterator[None]:
    """Report any exception of transformers and torch as a UserError that names config.json.

    They check a value where they first compute with it, so the exception may be of any type.
    """
    from huggingface_hub.errors import StrictDataclassError

    kinds = (StrictDataclassError, ValueError, TypeError, ArithmeticError, RuntimeError, AttributeError, LookupError)
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"transformers refuses {folder / 'config.json'}: {reason}; download it again") from error
