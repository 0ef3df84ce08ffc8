"""What the checkpoints of a run belong to, from its folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlora.checkpoint.state import Identity, fixed_settings
from distlora.config import Config
from distlora.weights.peft.folder import weights_digest
from distlora.weights.start_file import base_identity, needs_start


def identity_of(config: Config, data: Mapping[str, Any], *, base: str | None = None) -> Identity:
    """Of a run with this data.json (`data`). `base`: its `base_identity`, where that is known already.

    Raises UserError for an adapter that is gone and that the run needs as its reference.
    """
    init_from, digest = config.adapter.init_from, None
    if init_from is not None and needs_start(config, training=True, restores=True):
        digest = weights_digest(init_from)
    return Identity(
        base_fingerprint=base_identity(config) if base is None else base,
        data_digest=data["content"],
        settings=fixed_settings(config),
        reference_digest=digest,
    )
