"""RUN/initial_adapter.safetensors: the initial A and B of PiSSA and LoftQ. Needs no torch.

The file holds A0 and B0 by PEFT's names. Its header records the method, the fingerprint of the base and the digest of
the tensors. A PiSSA run trains on W - s B0 A0, which every later start rebuilds from this file, so the file is part of
the base's identity.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import read_header, read_header_and_metadata
from distlora.config import AdapterConfig, UserError

INITIAL_ADAPTER_NAME = "initial_adapter.safetensors"
METHOD_KEY, BASE_KEY, DIGEST_KEY = "distlora_init", "distlora_base", "distlora_digest"
"""Keys of the header's metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialAdapterRecord:
    """The metadata in the file's header."""

    method: str
    """adapter.init."""
    base: str
    """`CheckpointFiles.fingerprint` of the base that was decomposed."""
    digest: str
    """`digest_of` the tensors."""

    def metadata(self) -> dict[str, str]:
        """Return the record as metadata of the header."""
        return {METHOD_KEY: self.method, BASE_KEY: self.base, DIGEST_KEY: self.digest}


def initial_adapter_path(run_dir: str | Path) -> Path:
    """Return the path of the file in a run folder."""
    return Path(run_dir) / INITIAL_ADAPTER_NAME


def base_identity(base: CheckpointFiles, adapter: AdapterConfig, run_dir: str | Path) -> str:
    """Return the name of the weights that a run trains on, for checkpoints and for the quantized-weights cache.

    It is the base's fingerprint; for PiSSA a SHA-256 of it, the method, A0, B0 and the settings of their scale.
    Raises UserError if the initial adapter is missing, damaged or made from another base.
    """
    if not adapter.pissa:
        return base.fingerprint
    record = require_initial_adapter(run_dir, adapter, base)
    # Patterns keep their order: the first key that matches counts.
    scale = [adapter.lora_alpha, adapter.use_rslora, [*adapter.alpha_pattern.items()], [*adapter.rank_pattern.items()]]
    return hashlib.sha256(json.dumps([base.fingerprint, record.method, record.digest, scale]).encode()).hexdigest()


def needs_initial_adapter(adapter: AdapterConfig, *, is_reference: bool, restores: bool) -> bool:
    """Return whether a start needs the initial adapter: decomposed from the base, or read from adapter.init_from.

    PiSSA always does, because its base lacks B0 A0. DPO does if the initial adapter is its reference (`is_reference`).
    Other runs do unless a checkpoint or a result fills the adapters (`restores`).
    """
    return not adapter.starts_as_base and (adapter.pissa or is_reference or not restores)


def require_initial_adapter(
    run_dir: str | Path, adapter: AdapterConfig, base: CheckpointFiles | None
) -> InitialAdapterRecord:
    """Return `read_initial_adapter_record`. Raises UserError if there is no file."""
    record = read_initial_adapter_record(run_dir, adapter, base)
    if record is None:
        use = (
            f"adapter.init={adapter.init} trains on the base without the initial adapter"
            if adapter.pissa
            else "train.objective compares with the initial adapter"
        )
        raise UserError(
            f"{initial_adapter_path(run_dir)} is missing: {use}, so this run cannot continue without it; restore the "
            "file, or start a new run"
        )
    return record


def read_initial_adapter_record(
    run_dir: str | Path, adapter: AdapterConfig, base: CheckpointFiles | None
) -> InitialAdapterRecord | None:
    """Return the header's record after checking every byte of the file; None if there is no file.

    With `base`, check also that the file was made from it. Raises UserError for a damaged file, another method or
    another base.
    """
    path = initial_adapter_path(run_dir)
    if not path.is_file():
        return None
    has_trained = any((Path(run_dir) / "checkpoints").glob("step_*"))
    remedy = "restore a complete copy, or start a new run" if has_trained else "remove it: it is computed again"
    _, metadata = read_header_and_metadata(path, remedy=remedy)
    record = InitialAdapterRecord(
        method=metadata.get(METHOD_KEY, ""), base=metadata.get(BASE_KEY, ""), digest=metadata.get(DIGEST_KEY, "")
    )
    status = path.stat()
    state = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    if record.digest != _digest_of_file(path, state):
        raise UserError(f"{path} is damaged: its tensors are not those that were saved; {remedy}")
    if record.method != adapter.init:
        raise UserError(f"{path} was made by adapter.init={record.method}, this run's is {adapter.init}; {remedy}")
    if base is not None and record.base != base.fingerprint:
        raise UserError(
            f"{path} was computed from another base: the weights at model.path={base.folder} have changed since; "
            "restore them, or start a new run"
        )
    return record


def digest_of(tensors: Iterable[tuple[str, tuple[int, ...], bytes]]) -> str:
    """Return the SHA-256 of (name, shape, fp32 bytes) of each tensor. The caller sorts them by name."""
    digest = hashlib.sha256()
    for name, shape, content in tensors:
        digest.update(f"{name} {list(shape)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _digest_of_file(path: Path, state: tuple[int, ...]) -> str:
    """Return `digest_of` a file's tensors, once per process while the file's `state` stays the same.

    A start needs it several times; the file of a 70B model at rank 64 has 3 GB.
    """
    with path.open("rb") as stream:
        return digest_of(
            (name, segment.shape, os.pread(stream.fileno(), segment.num_bytes, segment.offset))
            for name, segment in sorted(read_header(path).items())
        )
