"""The one place that imports PEFT."""

from typing import Any


def import_peft() -> Any:
    """Return the package peft, which imports bitsandbytes; that comes first, as `has_bitsandbytes` imports it."""
    from distlora_kernels.nf4_cpu import has_bitsandbytes

    has_bitsandbytes()
    import peft

    return peft
