"""RUN/initial_adapter.safetensors: where an adapter started that comes from the base's weights. Imports no torch.

It holds A0 and B0 by PEFT's names, and says in its header by which method they were made, from which base, and what
their digest is. A run of PiSSA trains on the base less s B0 A0, which every later start builds again from this file:
so the file belongs to the base's identity.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distlora.architecture.safetensors_headers import (
    Segment,
    fingerprint,
    read_header,
    read_header_and_metadata,
)
from distlora.config import AdapterConfig, Config, UserError, require

INITIAL_ADAPTER_NAME = "initial_adapter.safetensors"
METHOD_KEY, BASE_KEY, DIGEST_KEY = "distlora_init", "distlora_base", "distlora_digest"
"""Of the header's metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialAdapterRecord:
    """What the header says."""

    method: str
    """adapter.init."""
    base: str
    """`fingerprint` of the base that was decomposed."""
    digest: str
    """`digest_of` the tensors."""

    def metadata(self) -> dict[str, str]:
        return {METHOD_KEY: self.method, BASE_KEY: self.base, DIGEST_KEY: self.digest}


def initial_adapter_path(config: Config) -> Path:
    return Path(config.run_dir) / INITIAL_ADAPTER_NAME


def base_identity(config: Config) -> str:
    """The name of the base that a run trains on: `fingerprint` of its checkpoint, and for PiSSA a hash of it, the
    method, A0, B0 and what their scale follows from.

    What is kept of a base's quantized weights (a checkpoint's identity, a cache's key) must be kept under this name.
    Raises UserError for a start that is gone, damaged or not of this base.
    """
    base = fingerprint(Path(config.model.path))
    if not config.adapter.pissa:
        return base
    record, adapter = require_initial_adapter(config), config.adapter
    # In order: the first key of a pattern that matches counts.
    scale = [adapter.lora_alpha, adapter.use_rslora, [*adapter.alpha_pattern.items()], [*adapter.rank_pattern.items()]]
    return hashlib.sha256(json.dumps([base, record.method, record.digest, scale]).encode()).hexdigest()


def needs_initial_adapter(config: Config, *, training: bool, restores: bool) -> bool:
    """Whether a model begins with the start of its run, where that is not the base: what was decomposed, or the adapter
    at adapter.init_from. PiSSA's base lacks it, DPO in `training` has it as its reference, and adapters that nothing
    else fills (`restores`: a checkpoint or a result does) start there.
    """
    adapter = config.adapter
    is_reference = training and config.train.objective == "dpo"
    return not adapter.starts_as_base and (adapter.pissa or is_reference or not restores)


def require_initial_adapter(config: Config, *, with_base: bool = True) -> InitialAdapterRecord:
    """`read_initial_adapter_record` of a run that needs it. UserError where it is gone."""
    record = read_initial_adapter_record(config, with_base=with_base)
    if record is None:
        use = (
            f"adapter.init={config.adapter.init} trains on the base without the start that it held"
            if config.adapter.pissa
            else f"train.objective={config.train.objective} compares with the model as it started, which it held"
        )
        raise UserError(
            f"{initial_adapter_path(config)} is gone: {use}, so this run means nothing without it; put it "
            "back, or start a new run"
        )
    return record


def read_initial_adapter_record(config: Config, *, with_base: bool = True) -> InitialAdapterRecord | None:
    """What a run's start file says, after every byte of it was checked; None where there is no such file.

    `with_base`: also that it is of the base at model.path, whose weights must be there then. Raises UserError for a
    damaged file, and for the start of another method or base.
    """
    path = initial_adapter_path(config)
    if not path.is_file():
        return None
    _, metadata = read_header_and_metadata(path, remedy=_remedy(config))
    record = InitialAdapterRecord(
        method=metadata.get(METHOD_KEY, ""), base=metadata.get(BASE_KEY, ""), digest=metadata.get(DIGEST_KEY, "")
    )
    if record.digest != _digest_of_file(path, _state_of(path)):
        raise UserError(f"{path} is damaged: its tensors are not those that were saved; {_remedy(config)}")
    if record.method != config.adapter.init:
        raise UserError(
            f"{path} was made by adapter.init={record.method}, this run's is {config.adapter.init}; {_remedy(config)}"
        )
    if with_base and record.base != fingerprint(Path(config.model.path)):
        raise UserError(
            f"{path} was computed from another base: the weights at model.path={config.model.path} have changed since; "
            "restore them, or start a new run"
        )
    return record


def digest_of(tensors: Iterable[tuple[str, tuple[int, ...], bytes]]) -> str:
    """SHA-256 over (name, shape, fp32 bytes), in the order of the names."""
    digest = hashlib.sha256()
    for name, shape, content in tensors:
        digest.update(f"{name} {list(shape)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def _digest_of_file(path: Path, state: tuple[int, ...]) -> str:
    """`digest_of` a file's tensors, once a process while the file stays as it is: a start needs it several times, and
    that of a 70B model at rank 64 is 3 GB."""
    return digest_of(_contents(read_header(path)))


def _state_of(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _contents(segments: Mapping[str, Segment]) -> Iterable[tuple[str, tuple[int, ...], bytes]]:
    for name, segment in sorted(segments.items()):
        with segment.file.open("rb") as stream:
            stream.seek(segment.offset)
            yield name, segment.shape, stream.read(segment.num_bytes)


def _remedy(config: Config) -> str:
    trained = any((Path(config.run_dir) / "checkpoints").glob("step_*"))
    return "put a whole copy back, or start a new run" if trained else "remove it: it is computed again"


def check_ranks(adapter: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse ranks that a weight does not have. `shapes`: (out, in) of the adapted linears by path."""
    for path, shape in shapes.items():
        rank, most = adapter.rank_of(path), min(shape)
        require(
            rank <= most or not adapter.decomposes,
            f"adapter.init={adapter.init} takes {rank} singular values of {path}, which has {most} (its weight is "
            f"{' x '.join(map(str, shape))}); set adapter.r={most} or less"
            f"{', or its entry in adapter.rank_pattern' if adapter.rank_pattern else ''}",
        )
