"""How an adapter may start: the names of adapter.init, which are PEFT's. Imports no torch."""

from __future__ import annotations

import re

from distlora.config.errors import nearest, require

PLAIN = ("kaiming", "gaussian")
"""A is random and B zero, whatever the base is."""

_NITER = re.compile(r"pissa_niter_([1-9]\d*)")
_EXAMPLES = (*PLAIN, "pissa", "pissa_niter_4", "loftq")


def check_init(init: str) -> None:
    """Raises UserError for a name that is none of PEFT's that are built here."""
    if init in (*PLAIN, "pissa", "loftq") or _NITER.fullmatch(init):
        return
    require(
        not init.startswith("pissa_niter"),
        f"adapter.init={init!r} names no number of subspace iterations above 0, without which the sketch of a "
        "weight misses its principal part; set adapter.init=pissa_niter_4, or pissa for the exact decomposition",
    )
    require(
        False,
        f"adapter.init={init!r} is not one of {', '.join(PLAIN)}, pissa, pissa_niter_<n>, loftq"
        f"{nearest(init, _EXAMPLES)}",
    )


def is_pissa(init: str) -> bool:
    """Whether the start of the adapter is taken out of the base's weights."""
    return init.startswith("pissa")


def subspace_iterations(init: str) -> int | None:
    """Of a randomized decomposition; None for the exact one."""
    match = _NITER.fullmatch(init)
    return int(match[1]) if match else None
