"""What is refused of a run's settings, said by a command that has none: by its own arguments. Imports no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from distlora.config import UserError

_WORDS = (
    (r"data\.path \(or data\.eval_path\)", "--text"),
    (r"data\.path=", "--text "),
    (r"data\.path", "--text"),
    (r"data\.sequence_length=", "--sequence-length "),
    (r"data\.sequence_length", "--sequence-length"),
    (r"(?<=set )model\.path to", "MODEL to"),
    (r"(?<=point )model\.path at", "MODEL at"),
    (r"model\.path=(?=\S)", "MODEL "),
    (r"model\.path", "MODEL"),
)
"""Settings of a run, and what this command calls them."""


@contextlib.contextmanager
def named_by_argument() -> Iterator[None]:
    """UserErrors that the block raises name this command's arguments in place of a run's settings."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for setting, argument in _WORDS:
            text = re.sub(setting, argument, text)
        raise UserError(text) from error
