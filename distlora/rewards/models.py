"""Reward models that `data.reward_models` names: what each is, and whether a run can use it. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.spec import Architecture
from distlora.config import DataConfig, ModelConfig, ModelSpec, UserError, require
from distlora.config.base import is_hub_name
from distlora.config.file import load_config
from distlora.run_folder.layout import find_result
from distlora.system.atomic_io import sha256
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME, PeftAdapter, read_adapter_beside

_CLASS = "ForSequenceClassification"


def reward_adapter(folder: Path) -> Path | None:
    """Return the adapter of a reward model on this run's base; None for a model with a base of its own.

    Raises UserError for a folder that holds neither.
    """
    if not folder.is_dir():
        cure = "set data.reward_models to the folder of a run, of its adapter, or of a sequence classifier"
        if is_hub_name(str(folder)):
            cure = (
                f"if it is on the hub, download it first: `hf download {folder} --local-dir FOLDER`, then name FOLDER"
            )
        raise UserError(f"data.reward_models: {folder} is not a folder on this node; {cure}")
    if (folder / CONFIG_NAME).is_file():
        return folder
    if not (folder / "config.yaml").is_file():
        require(
            (folder / "config.json").is_file(),
            f"data.reward_models: {folder} holds no run, no adapter ({CONFIG_NAME}) and no model; name one",
        )
        return None
    objective = load_config(folder).train.objective
    require(
        objective == "reward",
        f"data.reward_models: {folder} was trained with train.objective={objective}, which makes no reward model; name "
        "a run with train.objective=reward",
    )
    result = find_result(folder)
    require(result is not None, f"data.reward_models: {folder} has no result yet; wait for its end")
    return result


def weights_digests(models: Mapping[str, str]) -> dict[str, str]:
    """Return a digest of each reward model's weights: SHA-256 of an adapter's file, else the checkpoint's fingerprint.

    Raises UserError as `reward_adapter`.
    """
    folders = {name: (Path(place), reward_adapter(Path(place))) for name, place in models.items()}
    return {
        name: CheckpointFiles(place).fingerprint if adapter is None else sha256(adapter / WEIGHTS_NAME)
        for name, (place, adapter) in folders.items()
    }


def classifier_weights(folder: str | Path) -> int:
    """Return the number of weights of a classifier. Raises UserError for weights that cannot be read."""
    return sum(segment.numel for segment in CheckpointFiles(folder).stored.values())


def read_reward_adapter(folder: Path, spec: ModelSpec, architecture: Architecture) -> PeftAdapter:
    """Read a reward model's adapter. Raises UserError for one that cannot run on this run's base."""
    adapter = read_adapter_beside("data.reward_models", folder, spec.adapter, spec.quant.method, architecture, 1)
    require(
        adapter.score is not None,
        f"data.reward_models: {folder} has no score, so it is the adapter of a language model; name a run with "
        "train.objective=reward",
    )
    return adapter


def check_reward_models(data: DataConfig, spec: ModelSpec, architecture: Architecture) -> None:
    """Refuse reward models that the run cannot use: of another base, another kind, too large, or changed meanwhile."""
    for name, place in data.reward_models.items():
        setting, folder = f"data.reward_models={{{name}: {place}}}", reward_adapter(Path(place))
        if folder is not None:
            changing = ["adapter.use_dora=true"] * spec.adapter.use_dora + ["adapter.init=pissa"] * spec.adapter.pissa
            why = f"{' and '.join(changing)} changes the base's weights"
            require(not changing, f"{why}, on which {setting} was trained; leave one of them out")
            read_reward_adapter(folder, spec, architecture)
            _check_base(setting, Path(place), spec.model)
            continue
        settings = CheckpointFiles(place).config
        made = (settings.get("architectures") or ["no class"])[0]
        outputs = len(settings.get("id2label") or ("default of transformers", 2))
        require(
            made.endswith(_CLASS) and outputs == 1,
            f"{setting}: its config.json is of {made} with {outputs} outputs; name a model whose class ends with "
            f"{_CLASS} with one output (num_labels=1)",
        )
        needed = (4 if spec.dtype == "fp32" else 2) * classifier_weights(place) / 1e9
        require(
            needed <= data.reward_memory_gb,
            f"{setting} has a base of its own, which each rank would hold whole: {needed:,.2f} GB in {spec.dtype}, "
            f"and data.reward_memory_gb={data.reward_memory_gb:g}; set data.reward_memory_gb={math.ceil(needed)} if "
            "each rank has room for it, or train a reward model on this run's base (train.objective=reward)",
        )
    for name, now in weights_digests(data.reward_models).items():
        began = data.reward_digests.get(name, now)
        require(
            now == began,
            f"data.reward_models={{{name}: {data.reward_models[name]}}} has other weights than when the run began "
            f"({began[:12]} then, {now[:12]} now); restore them, or start a new run",
        )


def _check_base(setting: str, folder: Path, model: ModelConfig) -> None:
    """Refuse the reward model of a run on another base. An adapter without its run does not tell."""
    run_dir = next((place for place in (folder, folder.parent) if (place / "config.yaml").is_file()), None)
    if run_dir is None or (theirs := load_config(run_dir).model.path) == model.path:
        return
    if not (Path(theirs).is_dir() and Path(model.path).is_dir()):  # One of them is on the hub, or on another node.
        return
    require(
        CheckpointFiles(theirs).fingerprint == CheckpointFiles(model.path).fingerprint,
        f"{setting} was trained on another base, {theirs}, and this run's is {model.path}; train a reward model on "
        "this base",
    )
