"""What is refused of a run's settings, said by a command that has none: by its own arguments. Imports no torch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from distlora.config import UserError

_WORDS = (
    (r"data\.path \(or data\.eval_path\)", "{data}"),
    (r"data\.eval_path=", "{held_out} "),
    (r"data\.eval_path", "{held_out}"),
    (r"data\.path=", "{data} "),
    (r"data\.path", "{data}"),
    (r"data\.sequence_length=", "--sequence-length "),
    (r"data\.sequence_length", "--sequence-length"),
    (r"(?<=set )model\.path to", "MODEL to"),
    (r"(?<=point )model\.path at", "MODEL at"),
    (r"model\.path=(?=\S)", "MODEL "),
    (r"model\.path", "MODEL"),
)
"""Settings of a run, and what this command calls them."""


@contextlib.contextmanager
def named_by_argument(*, data: str = "--text", held_out: str = "--text") -> Iterator[None]:
    """UserErrors that the block raises name this command's arguments in place of a run's settings: `data` and
    `held_out` are those for documents."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for setting, argument in _WORDS:
            text = re.sub(setting, argument.format(data=data, held_out=held_out), text)
        raise UserError(text) from error
