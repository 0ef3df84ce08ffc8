"""Checkpoints: what training has made so far and nothing of the base, whole or not there at all.

    RUN/checkpoints/step_00000100/  adapter_config.json, adapter_model.safetensors (PEFT's format; model.safetensors for
                                    adapter=full), trainer.safetensors (optimizer), state.json, manifest.json (SHA-256)

Tensors are whole in the files, whatever number of ranks has cut them, so any number can go on from them.
A checkpoint is written to a temporary folder, synced and renamed, so a name `step_*` always stands for a complete one;
the manifest tells of later damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distlora import durable
from distlora.config import UserError
from distlora.parallel import Backend
from distlora.tensor_files import Unmade, write_tensors

Files = Mapping[str, Mapping[str, Tensor | Unmade] | dict[str, Any]]
"""Tensors (*.safetensors) or JSON (*.json) by the name of their file."""

MANIFEST_NAME, STATE_NAME, TRAINER_NAME = "manifest.json", "state.json", "trainer.safetensors"

OR_WHAT_PISSA_TOOK = (
    ", or what PiSSA took out of them (its start, scaled by adapter.lora_alpha, use_rslora, alpha_pattern and "
    "rank_pattern in config.yaml),"
)
"""What else than its weights makes a base another one, for a message."""


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done; the data position follows from it."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """Held-out loss, nats a target token, by the number of steps done."""
    seconds: float = 0.0
    """Wall time of the steps, evaluation and saving left out."""
    tokens: int = 0
    """Tokens in the rows of the steps, over all ranks; empty rows do not count."""

    @property
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss of what was trained (not of the base); None before there is one.

        A loss that is not finite is never the lowest.
        """
        trained = {step: loss for step, loss in self.evaluations.items() if step > 0 and math.isfinite(loss)}
        return min(trained, key=trained.__getitem__) if trained else None

    def evaluations_since_best(self, threshold: float) -> int:
        """Evaluations since one was more than `threshold` below all before it; the base's is the first."""
        best, since = math.inf, -1  # The first is none "since".
        for _, loss in sorted(self.evaluations.items()):
            since = 0 if loss < best - threshold else since + 1
            best = min(best, loss) if math.isfinite(loss) else best
        return max(since, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a checkpoint belongs to: resuming on anything else would be another run."""

    base_fingerprint: str
    """`loading.start_file.base_identity` of the run."""
    data_digest: str
    """`content` in data.json: the hash of the packed rows."""
    reference_digest: str | None = None
    """SHA-256 of the weights at adapter.init_from, where they are DPO's reference and so are read by every resume."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """state.json."""

    progress: Progress
    identity: Identity
    environment: dict[str, Any]
    """`environment()` of the saving run: bit-exact continuation is claimed where it is equal."""


def environment(world: int, device: torch.device) -> dict[str, Any]:
    """What the bits of a step depend on beside the data and the settings."""
    is_cuda = device.type == "cuda"
    return {
        "ranks": world,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "distlora": importlib.metadata.version("distlora"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
    }


def save(
    folder: Path, files: Files, state: TrainState, backend: Backend, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a checkpoint folder, `metadata` in the headers of its tensors. Every rank must call it alike: those that do
    not write give their rows of tensors.
    """
    with whole_folder(folder, backend) as temporary:
        sums = write_files(temporary, {**files, STATE_NAME: asdict(state)}, backend, metadata=metadata)
        if backend.writes:
            manifest = {"files": dict(sorted(sums.items())), "base_fingerprint": state.identity.base_fingerprint}
            durable.write_json(temporary / MANIFEST_NAME, manifest)


@contextlib.contextmanager
def whole_folder(folder: Path, backend: Backend) -> Iterator[Path]:
    """A place to write what then appears as `folder`, complete or not at all.

    An older one of the same name is set aside first, then removed. On ranks that do not write there is no such place.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if not backend.writes:
        yield temporary
        return
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # Of a failed save: half a checkpoint may be what fills the disk.


def publish(temporary: Path, folder: Path) -> None:
    """Give a finished temporary folder its name; the name stands for a whole folder, on the disk, from then on."""
    for path in temporary.rglob("*"):
        durable.sync(path)
    durable.sync(temporary)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    durable.sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_files(
    folder: Path, files: Files, backend: Backend, *, metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Tensors to safetensors, with `metadata` in their headers, the rest to JSON, by the file's ending; `publish` syncs
    them to disk. On every rank.

    Returns their SHA-256 on the rank that writes, nothing on the others.
    """
    sums: dict[str, str] = {}
    for name, content in files.items():
        if name.endswith(".safetensors"):
            if (digest := write_tensors(folder / name, content, backend, metadata=metadata)) is not None:
                sums[name] = digest
        elif backend.writes:
            durable.write_json(folder / name, content)
            sums[name] = _sha256(folder / name)
    return sums


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and one line for each newer one that is damaged."""
    damaged: list[str] = []
    for folder in reversed(steps(checkpoints)):
        fault = _fault(folder)
        if fault is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder.name} is damaged ({fault}) and was not used")
    return None, damaged


def steps(checkpoints: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted(checkpoints.glob("step_*")) if checkpoints.is_dir() else []


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for folder in steps(checkpoints)[:-keep]:
        shutil.rmtree(folder)


def load_state(folder: Path) -> TrainState:
    values = json.loads((folder / STATE_NAME).read_text())
    progress = Progress(**values["progress"])
    progress.evaluations = {int(step): loss for step, loss in progress.evaluations.items()}  # JSON's keys are text.
    return TrainState(progress=progress, identity=Identity(**values["identity"]), environment=values["environment"])


def check_matches(state: TrainState, folder: Path, identity: Identity, *, init_from: str | None) -> None:
    """Raises UserError when the checkpoint was made from another base, other data or against another reference.

    `init_from`: the run's adapter.init_from, where the reference is.
    """
    if state.identity.base_fingerprint != identity.base_fingerprint:
        raise UserError(
            f"{folder} belongs to another base model: the weights at model.path{OR_WHAT_PISSA_TOOK} have changed "
            "since; restore them"
        )
    if state.identity.data_digest != identity.data_digest:
        raise UserError(f"{folder} was trained on other data: the files at data.path have changed since; restore them")
    if state.identity.reference_digest != identity.reference_digest:
        raise UserError(
            f"{folder} was trained against another reference: the adapter at adapter.init_from={init_from} has changed "
            "since; restore it"
        )


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, or None."""
    try:
        sums = dict(json.loads((folder / MANIFEST_NAME).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_NAME}: {error}"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != expected:
            return f"{name} is not what was saved"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
