"""Describe what a command works on: a trained model and its base. Imports no torch.

A run's folder names its base and quantization. An adapter without a run is a folder in PEFT's format; its base is named
beside it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distlora import __version__
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import LOW_BIT, in_nf4
from distlora.config import (
    AdapterConfig,
    Config,
    DataConfig,
    ModelConfig,
    ModelSpec,
    ParallelConfig,
    QuantConfig,
    TrainConfig,
    UserError,
    require,
)
from distlora.config.errors import named_settings
from distlora.config.file import load_config
from distlora.config.json_files import check_shape, read_object
from distlora.run_folder.layout import CHECKPOINTS, checkpoint_folders, find_result, read_result
from distlora.weights.peft_folder import CONFIG_NAME, check_quantization, read_peft_adapter

BASE_ALONE = "base"
"""Value of --adapter for the base without an adapter."""
BY_FLAG = {"adapter.init_from": "--adapter"}
BY_PLACE = {"adapter.init_from": "ADAPTER"}
"""Names of an adapter in errors: given by --adapter, or as the folder that a command works on."""

Quant = Literal["nf4", "keep", "none"]

COMBINED = "combine.json"
"""The record of `distlora combine` beside its sum: its members and what truncation lost."""
_COMBINED_SHAPE = {
    "base_fingerprint": (str, type(None)),
    "quant?": (str, type(None)),
    "members": [{"quant": (str, type(None)), "pissa?": bool}],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A base and the weights trained on it."""

    place: str
    """The folder as it was typed."""
    spec: ModelSpec
    """The model; its adapter settings are those of `weights`."""
    weights: Path | None
    """An adapter in PEFT's format, a whole model, or a folder of checkpoints whose newest complete one is used; None
    for the base alone."""
    foreign: bool = False
    """True if `weights` is an adapter of another run or program."""
    run_dir: Path | None = None
    """Folder of the run; None for an adapter without one."""
    data: DataConfig | None = None
    """Data settings of the run; None without one."""
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def base(self) -> Path:
        """Folder of the base."""
        return self.spec.path

    @property
    def initial_adapter_dir(self) -> Path | str:
        """Folder that holds the initial adapter of PiSSA and LoftQ: the run's."""
        return self.run_dir or ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Name:
    """The arguments of a command that name a trained model, also in the request to its worker."""

    place: str
    """A run's folder, or an adapter in PEFT's format."""
    adapter: str | None = None
    """Another adapter of the run's base, or BASE_ALONE."""
    checkpoint: str | None = None
    """A saved step of the run, or "best"."""
    base: str | None = None
    """Base of an adapter without a run."""
    quant: Quant | None = None
    """Quantization of that base; None: as combine.json has it, else nf4."""

    def read(self) -> Trained:
        """Return the model that is named.

        Raises UserError for a folder that is neither a run nor an adapter, for a run without anything trained yet, and
        for an adapter that cannot belong to the base.
        """
        folder = Path(self.place).expanduser().absolute()
        if (folder / CONFIG_NAME).is_file():
            if (folder.parent / "config.yaml").is_file():
                raise UserError(f"{folder} is the adapter of a run, which names its base; write {folder.parent}")
            return _without_run(folder, self.place, base=self.base, quant=self.quant)
        require(self.base is None, f"--model={self.base}: {self.place} names its base itself; leave --model out")
        config = load_config(folder)
        require_language_model(config.train, self.place)
        weights = find_weights(folder, config.spec, self.adapter, self.checkpoint)
        foreign = self.adapter not in (None, BASE_ALONE)
        return replace(of_run(config, weights, foreign=foreign), place=self.place, run_dir=folder)


UNNAMED = Name(place="")
"""Stands in a request until the launcher has found the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    """The arguments that name a trained model."""

    run: str
    """RUN: folder of a run, or an adapter in PEFT format with --model."""
    checkpoint: str | None = None
    """NAME: checkpoint of the run: step_100, or best (lowest held-out loss). Default: the result."""
    adapter: str | None = None
    """PATH|base: another LoRA adapter for the run's base, or the base alone (base)."""
    model: str | None = None
    """BASE: base model of an adapter without a run: a folder or a name on the hub."""
    quant: Quant | None = None
    """Base precision during training, for an adapter without a run (default: that of a sum's runs, else nf4)."""


def require_language_model(train: TrainConfig, place: str | Path) -> None:
    """Refuse the run at `place` if it trained a reward model."""
    if train.needs.labels == 0:
        return
    raise UserError(
        f"{place} trained a reward model (train.objective={train.objective}): a score replaces its LM head, so it "
        "predicts no tokens to sample, to evaluate, to merge or to export. RUN/metrics.jsonl has its held-out accuracy "
        f"(eval_{train.needs.figures[-1]}); load RUN/adapter by PEFT, as docs/objectives.md shows",
    )


def of_run(config: Config, weights: str | Path | None, *, foreign: bool = False) -> Trained:
    """Return the model of a run with these weights: None for the base alone, `foreign` for another adapter."""
    place = None if weights is None else Path(weights)
    trained = Trained(
        place=config.run_dir,
        spec=config.spec,
        weights=place,
        foreign=foreign,
        run_dir=Path(config.run_dir),
        data=config.data,
        train=config.train,
        parallel=config.parallel,
    )
    if foreign or place is None:
        with named_settings(BY_FLAG):
            trained = replace(trained, spec=with_adapter(config.spec, place))
    return trained


class CombinedRuns(NamedTuple):
    """The runs that a sum is of, as combine.json describes them; empty for any other adapter."""

    quants: frozenset[str] = frozenset()
    """quant.method of the base that the sum belongs to, or else of each run; empty if unknown."""
    pissa: bool = False
    """True if one of them trained with PiSSA."""
    base: str | None = None
    """Fingerprint of their base."""


def read_combined(folder: Path) -> CombinedRuns:
    """Read combine.json in an adapter's folder. Raises UserError if it is damaged."""
    record = folder / COMBINED
    if not record.is_file():
        return CombinedRuns()
    values = read_object(record, "combine again")
    check_shape(values, _COMBINED_SHAPE, record, "combine again")
    members = values["members"]
    quants = [values["quant"]] if values.get("quant") else [member["quant"] for member in members]
    pissa = any(member.get("pissa", False) for member in members)
    return CombinedRuns(frozenset(filter(None, quants)), pissa, values["base_fingerprint"])


def quant_of(trained: Iterable[str], requested: Quant | None) -> Quant:
    """Return the quantization of a base, as in the runs that trained with these quant.method."""
    methods = sorted(set(trained))
    if requested is None and (len(methods) > 1 or methods == ["mixed"]):
        raise UserError(
            f"the runs held their base as {' and as '.join(methods)}, and what these adapters add depends on that; "
            "write --quant nf4, keep or none for the base of the result"
        )
    known: dict[str, Quant] = {"none": "none", "keep": "keep"}
    return requested or (known.get(methods[0], "nf4") if methods else "nf4")


def _without_run(folder: Path, place: str, *, base: str | None, quant: Quant | None) -> Trained:
    """Return an adapter without a run."""
    quant = quant_of(read_combined(folder).quants, quant)
    with named_settings(BY_PLACE):
        initial = read_peft_adapter(folder)
        if base is None:
            raise UserError(
                f"{place} is an adapter without its run, so its base is not known: add --model "
                f"{initial.base or 'FOLDER'} (a folder in Hugging Face format"
                f"{', or a name on the hub' if initial.base is None else ''})"
            )
        check_quantization(initial, quant)
        numbers: Counter[str] = Counter()
        with contextlib.suppress(UserError):  # Not downloaded yet, or damaged, which is refused where it is read.
            for segment in CheckpointFiles(Path(base).expanduser()).headers.values():
                numbers[segment.dtype] += 0 if in_nf4(segment) else segment.numel
        # The dtype that keeps most of the dense weights exact; those in low bits are dequantized to bf16.
        is_fp32 = numbers["F32"] + numbers["F16"] > numbers["BF16"] + numbers[LOW_BIT]
        spec = with_adapter(base_spec(base, quant, dtype="fp32" if is_fp32 else "bf16"), folder)
    return Trained(place=place, spec=spec, weights=folder, foreign=True)


def base_spec(base: str, quant: Quant, *, dtype: Literal["bf16", "fp32"] = "bf16") -> ModelSpec:
    """Return a base without a run, with an adapter of rank 1 that adds zero."""
    return ModelSpec(
        model=ModelConfig(path=base), quant=QuantConfig(method=quant), adapter=AdapterConfig(r=1), dtype=dtype
    )


def with_adapter(spec: ModelSpec, weights: Path | None) -> ModelSpec:
    """Return the model with the adapter in `weights`, or none, on the base as its checkpoint has it."""
    settings: dict[str, Any] = {"init": "kaiming"}
    if weights is not None:
        settings |= {"init_from": str(weights), "trainable_token_indices": None, "modules_to_save": ()}
        settings |= {"expert_sharing": "none"}  # A file holds a factor per expert, and may differ between them.
        settings |= read_peft_adapter(weights).settings
    return replace(spec, adapter=replace(spec.adapter, **settings))


def find_weights(run_dir: Path, spec: ModelSpec, adapter: str | None, checkpoint: str | None) -> Path | None:
    """Return the folder of the weights; the checkpoints of an unfinished run; None for the base alone.

    Raises UserError as `Name.read`.
    """
    if adapter == BASE_ALONE:
        return None
    if adapter is not None:
        folder = Path(adapter).expanduser().absolute()
        require(
            spec.adapter.method == "lora",
            f"--adapter={adapter}: the run trained the whole model (adapter=full), which takes no adapter; leave "
            "--adapter out",
        )
        with named_settings(BY_FLAG):
            check_quantization(read_peft_adapter(folder), spec.quant.method)
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


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of packages, to report with a result. distlora's is known where it is not installed."""
    return {name: __version__ if name == "distlora" else importlib.metadata.version(name) for name in packages}
