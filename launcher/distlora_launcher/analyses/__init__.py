"""`distlora analyze WHAT ...`: what can be learned of a base and of an adapter by looking at them."""

from __future__ import annotations

import importlib

from distlora.command_line import BAD_INPUT, DONE
from distlora.config import UserError, nearest

ANALYSES = {
    "quantization": "MODEL: what NF4 and int4 cost a model: errors by layer, bits, perplexity, with plots",
    "spectrum": "RUN: singular values of dW, its rank by layer, intruder dimensions; against full fine-tuning",
    "intrinsic": "MODEL ...: how many dimensions fine-tuning needs, pretrained and random, by training in subspaces",
}
"""A module of this package each: its main(arguments) -> exit code does the work, --help included."""

USAGE = """usage: distlora analyze WHAT ...

{analyses}

`distlora analyze WHAT --help` says more."""


def main(arguments: list[str]) -> int:
    """Hand over to the analysis that is named."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(analyses="\n".join(f"  {name} {summary}" for name, summary in ANALYSES.items())))
        return DONE if arguments else BAD_INPUT
    name = arguments[0]
    if name not in ANALYSES:
        raise UserError(
            f"distlora analyze: there is nothing named {name!r} to analyse{nearest(name, ANALYSES)}; write one of "
            f"{', '.join(ANALYSES)}"
        )
    code: int = importlib.import_module(f"{__name__}.{name}").main(arguments[1:])
    return code
