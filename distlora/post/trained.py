"""What a command works on: something that was trained, and the base that it belongs to. Imports no torch.

A run's folder names both, and how the base was quantized. An adapter of another program is a folder in PEFT's format,
and its base is named beside it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from distlora.architecture.safetensors_headers import read_headers
from distlora.config import AdapterConfig, Config, DataConfig, ModelConfig, QuantConfig, UserError, require
from distlora.config.file import load_config
from distlora.run_folder.layout import (
    CHECKPOINTS,
    checkpoint_folders,
    find_result,
    read_result,
)
from distlora.weights.peft_folder import CONFIG_NAME, check_quantization, read_peft_adapter

BASE_ALONE = "base"
"""As --adapter: the base without anything trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A base and what belongs on it."""

    place: str
    """The folder as it was named."""
    config: Config
    """Of the run; its `adapter` is that of `weights`, also where these are no run's own."""
    weights: Path | None
    """An adapter in PEFT's format, a whole model, or a folder of checkpoints, whose newest whole one is meant; None:
    the base alone."""
    foreign: bool = False
    """Whether `weights` is an adapter of another run or program."""
    run_dir: Path | None = None
    """None for an adapter that is no run's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """How something trained is named on a command line, and in the request to a worker."""

    place: str
    """A run's folder, or one in PEFT's format."""
    adapter: str | None = None
    """Of a run: another adapter of its base, or BASE_ALONE."""
    checkpoint: str | None = None
    """Of a run: a saved step, or "best"."""
    base: str | None = None
    """Of an adapter without a run: its base."""
    quant: Literal["nf4", "none"] = "nf4"
    """And how that is held."""

    def read(self) -> Trained:
        """What is meant.

        Raises UserError for a folder that is neither, for a run that has nothing trained yet, and for an adapter that
        cannot belong to the base.
        """
        folder = Path(self.place).expanduser().absolute()
        if (folder / CONFIG_NAME).is_file():
            if (folder.parent / "config.yaml").is_file():
                raise UserError(f"{folder} is the adapter of a run, which names its base; write {folder.parent}")
            return _alone(folder, self.place, base=self.base, quant=self.quant)
        require(self.base is None, f"--model={self.base}: {self.place} names its base itself; leave --model out")
        config = load_config(folder)
        weights = find_weights(folder, config, self.adapter, self.checkpoint)
        foreign = self.adapter not in (None, BASE_ALONE)
        if foreign or weights is None:
            config = with_adapter(config, weights)
        return Trained(place=self.place, config=config, weights=weights, foreign=foreign, run_dir=folder)


def _alone(folder: Path, place: str, *, base: str | None, quant: Literal["nf4", "none"]) -> Trained:
    """An adapter that is no run's: as a run that would have started from it."""
    with named_by_place(place):
        says = read_peft_adapter(folder).base
    if base is None:
        raise UserError(
            f"{place} is an adapter without its run, so its base must be named: add --model "
            f"{says or 'FOLDER'} (a folder in Hugging Face format{', or a name on the hub' if says is None else ''})"
        )
    config = base_alone(base, quant, run_dir=str(folder))
    config = replace(config, train=replace(config.train, dtype=_held(Path(base))))
    with named_by_place(place):
        check_quantization(read_peft_adapter(folder), quant)
        config = with_adapter(config, folder)
    return Trained(place=place, config=config, weights=folder, foreign=True)


def _held(base: Path) -> Literal["bf16", "fp32"]:
    """What a base is held in that no run says it of: in what loses nothing of most of its numbers."""
    numbers: Counter[str] = Counter()
    with contextlib.suppress(UserError):  # Not on this machine yet, or broken, which is refused where it is read.
        for segment in read_headers(base.expanduser()).values():
            numbers[segment.dtype] += segment.numel
    return "fp32" if numbers["F32"] + numbers["F16"] > numbers["BF16"] else "bf16"


def base_alone(base: str, quant: Literal["nf4", "none"], *, run_dir: str) -> Config:
    """The settings of a run on a base that there is no run of: what our own model path is built from."""
    return Config(
        model=ModelConfig(path=base),
        data=DataConfig(path=base, sequence_length=2),  # A config without data is none; nothing reads this.
        adapter=AdapterConfig(r=1),
        quant=QuantConfig(method=quant),
        run_dir=run_dir,
    )


def with_adapter(config: Config, weights: Path | None) -> Config:
    """The run's settings with those of an adapter that is not its own, or of none: on the base as its checkpoint has
    it, whatever the run took out of it."""
    own: dict[str, Any] = {"init": "kaiming"}
    if weights is not None:
        own |= {"init_from": str(weights), "trainable_token_indices": None, "modules_to_save": ()}
        own |= read_peft_adapter(weights).settings
    return replace(config, adapter=replace(config.adapter, **own))


def find_weights(run_dir: Path, config: Config, adapter: str | None, checkpoint: str | None) -> Path | None:
    """The folder of the weights that are meant; the run's checkpoints where it is unfinished; None for the base.

    Raises UserError as `Name.read`.
    """
    if adapter == BASE_ALONE:
        return None
    if adapter is not None:
        folder = Path(adapter).expanduser().absolute()
        require(
            config.adapter.method == "lora",
            f"--adapter={adapter}: the run trained the whole model (adapter=full), which takes no adapter; leave "
            "--adapter out",
        )
        with named_by_flag():
            check_quantization(read_peft_adapter(folder), config.quant.method)
        return folder
    if checkpoint is not None:
        return read_result(run_dir, checkpoint).folder
    result = find_result(run_dir)
    if result is not None:
        return result
    require(
        bool(checkpoint_folders(run_dir)),
        f"{run_dir} has nothing trained yet: neither a result nor a checkpoint (train.save_every); wait for it, or "
        f"write --adapter {BASE_ALONE} for the base alone",
    )
    return run_dir / CHECKPOINTS


@contextlib.contextmanager
def named_by_flag() -> Iterator[None]:
    """What is refused of an adapter is refused of --adapter here, and not of the setting that a run starts from."""
    with named_by_place("--adapter"):
        yield


@contextlib.contextmanager
def named_by_place(place: str) -> Iterator[None]:
    """What is refused of an adapter is refused of `place`."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"(adapter\.)?init_from", lambda _: place, str(error))) from error
