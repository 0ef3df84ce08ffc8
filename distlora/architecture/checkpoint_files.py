"""The folder of a base model: its config.json, its safetensors headers and its fingerprint, each read once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.architecture.families import read_config
from distlora.architecture.safetensors_headers import Segment, read_headers

_SAMPLE_BYTES = 4096


class CheckpointFiles:
    """Metadata of a checkpoint, without its weights. Make one per start and hand it on.

    Nothing is read before it is needed. `config` raises UserError without a valid config.json, `headers` and
    `fingerprint` for missing or damaged safetensors files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_config(self.folder)

    @functools.cached_property
    def headers(self) -> Mapping[str, Segment]:
        """Every tensor by its name on disk."""
        return read_headers(self.folder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of each tensor's name, dtype, shape and 4 KiB from its middle.

        It tells two bases apart within a second, because training changes bytes everywhere. Checkpoints that differ
        only outside of the sampled bytes have the same fingerprint.
        """
        digest = hashlib.sha256()
        for name, segment in sorted(self.headers.items()):
            digest.update(f"{name} {segment.dtype} {segment.shape}\n".encode())
            with segment.file.open("rb") as stream:
                stream.seek(segment.offset + max(segment.num_bytes // 2 - _SAMPLE_BYTES // 2, 0))
                digest.update(stream.read(min(_SAMPLE_BYTES, segment.num_bytes)))
        return digest.hexdigest()
