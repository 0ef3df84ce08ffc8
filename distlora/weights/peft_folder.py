"""Adapters at adapter.init_from: read a PEFT LoRA or DoRA folder and check it against a model. Needs no torch.

The launcher turns adapter_config.json into settings of the run and checks the tensors' names and shapes by the file's
header. The worker checks again and loads (`peft_format.load_peft_adapter`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.architecture.families import ExpertLayout
from distlora.architecture.safetensors_headers import SOURCE_DTYPES, Segment, read_header, read_header_and_metadata
from distlora.architecture.targets import idle_keys, match_ending, select_among, written
from distlora.config import AdapterConfig, UserError, nearest
from distlora.config.errors import FILES
from distlora.config.json_files import read_object
from distlora.config.places import is_hub_name
from distlora.weights.peft_tokens import (
    PeftTokenRows,
    PeftWholeModule,
    is_of_modules,
    is_of_rows,
    modules_setting,
    read_initial_modules,
    read_initial_rows,
    settings_of,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

# PEFT leaves the adapter's name ".default" and the ".weight" of a magnitude out of the file.
_TENSOR = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_"
    r"(?:(?P<part>[AB])(?:\.default)?\.weight|(?P<magnitude>magnitude)_vector(?:\.default)?(?:\.weight)?)"
)

_TAKEN = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "rank_pattern", "alpha_pattern"),
    *("trainable_token_indices", "modules_to_save", "target_parameters"),
}
"""Fields that become settings of the run."""

_WITHOUT_MEANING = {
    # Origin and training.
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "runtime_config", "loftq_config", "eva_config"),
    # Details of fields that are refused if set.
    *("layers_pattern", "megatron_core", "qalora_group_size"),
}
"""Fields that do not affect what the tensors do to a base."""

NF4_MARK = {"distlora_base": "nf4"}
"""Metadata of an adapter whose A and B correct the quantization error of NF4 (LoftQ)."""

_KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights whose adapter belongs to the unchanged base."""

_REASONS = {
    "ensure_weight_tying": "distlora trains an embedding and an LM head separately",
    "bias": "distlora trains no biases",
    "lora_bias": "adapters have no bias in distlora",
    "fan_in_fan_out": "weights are (out, in) in distlora",
    "layers_to_transform": "target_modules alone selects the layers",
    "exclude_modules": "target_modules alone selects the adapted linears",
    "layer_replication": "distlora uses each layer of the base once",
    "megatron_config": "the base has no Megatron layers",
    "alora_invocation_tokens": "distlora uses the adapter in all positions",
}
_DEFAULTS: dict[str, Any] = {"bias": "none"}
"""Values without effect, for fields where that is not false, empty or null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftAdapter:
    """A LoRA or DoRA adapter in PEFT's format, by its config and its file's header."""

    folder: Path
    settings: dict[str, Any]
    """Fields of AdapterConfig that the adapter decides, with their values."""
    base: str | None
    """Base that it names as the one it was trained on."""
    tensors: dict[tuple[str, str], Segment]
    """Tensors by Hugging Face path and part ("A", "B", with DoRA "magnitude")."""
    names: dict[tuple[str, str], str]
    """Names in the file of the same tensors."""
    token_rows: dict[str, PeftTokenRows]
    """Trained rows by matrix."""
    modules: dict[str, PeftWholeModule]
    """Modules trained whole, by last name."""

    @property
    def adapter_config(self) -> AdapterConfig:
        """The adapter's rank, scale and targets."""
        known = {key: value for key, value in self.settings.items() if key in _FIELDS}
        return AdapterConfig(**known | {"init_from": str(self.folder)})

    @property
    def paths(self) -> list[str]:
        """Adapted linears and fused expert weights, sorted."""
        return sorted({path for path, _ in self.tensors})


_FIELDS = AdapterConfig.__dataclass_fields__


def read_peft_adapter(folder: str | Path) -> PeftAdapter:
    """Read an adapter. Raises UserError for a folder that is missing, damaged or holds an unsupported adapter."""
    folder = Path(folder)
    values = _read_config(folder)
    _refuse_fields(values, folder / CONFIG_NAME)
    parameters = parameters_of(values, folder / CONFIG_NAME)
    names = by_weight(_read_names(folder, values), parameters, folder / WEIGHTS_NAME)
    segments, metadata = read_header_and_metadata(folder / WEIGHTS_NAME)
    for name in names.values():
        if segments[name].dtype not in SOURCE_DTYPES:
            raise UserError(
                f"{folder / WEIGHTS_NAME}: {name} is stored as {segments[name].dtype}; an adapter must be "
                f"{', '.join(SOURCE_DTYPES)}, so convert it, or set another {{adapter.init_from}}"
            )
    base = values.get("base_model_name_or_path")
    token_rows = read_initial_rows(values, segments, folder)
    modules = read_initial_modules(values, segments, folder)
    for_nf4 = NF4_MARK.items() <= metadata.items()
    settings = _settings(values, folder / CONFIG_NAME, sorted({path for path, _ in names}), parameters)
    return PeftAdapter(
        folder=folder,
        settings=settings | {"init_from_loftq": for_nf4} | settings_of(token_rows) | modules_setting(modules),
        base=base if isinstance(base, str) and base else None,
        tensors={key: segments[name] for key, name in names.items()},
        names=names,
        token_rows=token_rows,
        modules=modules,
    )


def weights_digest(folder: str | Path) -> str:
    """Return the SHA-256 of the adapter's weights file. Raises UserError as `read_peft_adapter`."""
    with (read_peft_adapter(folder).folder / WEIGHTS_NAME).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_quantization(initial: PeftAdapter, method: str) -> None:
    """Raise UserError if a LoftQ adapter meets an unquantized base. `method`: quant.method."""
    if initial.settings["init_from_loftq"] and method == "none":
        raise UserError(
            f"{{adapter.init_from}}={initial.folder} started by LoftQ: A and B hold a correction of what NF4 loses of "
            f"the base, and quant={method} loses nothing; set quant=nf4, or another {{adapter.init_from}}"
        )


def check_fits(initial: PeftAdapter, adapter: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError if an adapter has other linears or other shapes than the run.

    `shapes`: (out, in) of the linears in the decoder layers, and (experts, out, in) of their fused weights, by Hugging
    Face path. `adapter`: the run's settings.
    """
    file, trained_on = initial.folder / WEIGHTS_NAME, f" (it was trained on {initial.base})" if initial.base else ""
    paths = {path for path, _ in initial.tensors}
    outside = sorted(paths - shapes.keys())
    if outside:
        raise UserError(
            f"{file} adapts {outside[0]}{_more(outside)}, which is not a linear in this model's decoder layers"
            f"{nearest(outside[0], shapes)}{trained_on}; set another {{adapter.init_from}} or model.path"
        )
    linears, experts = ([path for path, shape in shapes.items() if len(shape) == dims] for dims in (2, 3))
    targets = set(select_among(adapter, linears, experts))
    for strays, what in ((sorted(targets - paths), "holds no tensors for"), (sorted(paths - targets), "also adapts")):
        if strays:
            raise UserError(
                f"{file} {what} {strays[0]}{_more(strays)}; adapter.target_modules={written(adapter.target_modules)} "
                f"means {len(targets)} linears of this model{trained_on}; set another {{adapter.init_from}} or "
                f"model.path"
            )
    for (path, part), segment in sorted(initial.tensors.items()):
        *num_experts, out_features, in_features = shapes[path]
        rank = adapter.rank_of(path)
        rows = rank * math.prod(num_experts)
        expected = {"A": (rows, in_features), "B": (out_features, rows), "magnitude": (out_features,)}[part]
        if segment.shape != expected:
            raise UserError(
                f"{file}: {initial.names[path, part]} has shape {list(segment.shape)}, and {path} at rank {rank} needs "
                f"{list(expected)}{trained_on}; set another {{adapter.init_from}} or model.path"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    place = f"{{adapter.init_from}}={folder}"
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{place} is a file; point it at the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
        if is_hub_name(str(folder)):
            raise UserError(
                f"{place} is not a folder on this machine; if it is on the hub, download it first: "
                f"`hf download {folder} --local-dir FOLDER`, then {{adapter.init_from}}=FOLDER"
            )
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            f"{place} does not exist{nearest(folder.name, siblings, cutoff=FILES)}; set it to a PEFT LoRA's folder"
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        inside = [child.name for child in sorted(folder.iterdir()) if (child / CONFIG_NAME).is_file()]
        hint = f"set {{adapter.init_from}}={folder / inside[0]}" if inside else "set it to a folder that PEFT saved"
        raise UserError(f"{place} holds no {CONFIG_NAME}; {hint}")
    return read_object(path, "save the adapter again")


def _refuse_fields(values: dict[str, Any], path: Path) -> None:
    """Raise UserError for a field whose value gives the tensors another meaning than LoRA's or DoRA's."""
    if values.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type={values.get('peft_type')!r} is not supported, only LORA is; set another "
            "{adapter.init_from}"
        )
    init = values.get("init_lora_weights")
    if init not in _KEEPS_THE_BASE:
        raise UserError(
            f"{path}: init_lora_weights={init!r} changed the base that the adapter belongs to; use what the run "
            "published (RUN/adapter, a plain LoRA), or save it with PEFT for the unchanged one (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    for name in sorted(values.keys() - _TAKEN - _WITHOUT_MEANING - {"init_lora_weights"}):
        if values[name] and values[name] != _DEFAULTS.get(name):
            reason = _REASONS.get(name, "distlora does not know what that changes")
            raise UserError(
                f"{path}: {name}={values[name]!r} is not supported ({reason}); set another {{adapter.init_from}}"
            )


def _read_names(folder: Path, values: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the name in the file by (path, part): one A and one B for each path, and with DoRA a magnitude."""
    dora = values.get("use_dora") is True
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        pickled = [name for name in PICKLED_NAMES if (folder / name).is_file()]
        if pickled:
            raise UserError(
                f"{folder / pickled[0]} is a pickle, which can run any code when it is read; load it with PEFT where "
                f"you trust it and save it again (save_pretrained writes {WEIGHTS_NAME})"
            )
        raise UserError(f"{{adapter.init_from}}={folder} holds no {WEIGHTS_NAME}; save the adapter again")
    by_part: dict[tuple[str, str], str] = {}
    for name in sorted(read_header(file)):
        match = _TENSOR.fullmatch(name)
        if is_of_rows(name) or is_of_modules(name, values):
            continue
        if match is None:
            raise UserError(
                f"{file}: {name} is not a lora_A or lora_B of a linear{_kind(name)}; set another {{adapter.init_from}}"
            )
        key = (match["path"], match["part"] or match["magnitude"])
        if key in by_part:
            raise UserError(
                f"{file}: {by_part[key]} and {name} are the same tensor of two adapters; save one adapter only"
            )
        by_part[key] = name
    parts = {"A": "lora_A", "B": "lora_B", **({"magnitude": "lora_magnitude_vector"} if dora else {})}
    for path, part in by_part:
        if part not in parts:
            raise UserError(
                f"{file}: {path} has a lora_magnitude_vector, which is DoRA's, but {CONFIG_NAME} has no use_dora=true; "
                "save the adapter again"
            )
        for other, name in parts.items():
            if (path, other) not in by_part:
                raise UserError(f"{file}: {path} has a {parts[part]} and no {name}; save the adapter again")
    if not by_part:
        raise UserError(f"{file} holds no tensors; save the adapter again")
    return by_part


def _kind(name: str) -> str:
    """Describe a tensor that is neither A nor B, if its name tells."""
    kinds = {
        "lora_embedding_": "an adapter of the embedding, which is not supported",
        "lora_B.bias": "a bias of the adapter, which is not supported",
        "modules_to_save": "a module trained whole, which is not supported",
        "embed_tokens.weight": "the whole embedding, which PEFT saves when its size changed",
        "lm_head.weight": "the whole head, which PEFT saves when its size changed",
    }
    return next((f" but {kind}" for part, kind in kinds.items() if part in name), "")


def _settings(values: dict[str, Any], path: Path, paths: list[str], parameters: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields that become settings.

    Entries that match none of the adapted `paths` are left out, as in PEFT.
    """
    targets: Any = values.get("target_modules") or ([] if parameters else None)
    is_list = isinstance(targets, list) and all(isinstance(entry, str) for entry in targets)
    _require(is_list or isinstance(targets, str), path, values, "target_modules", "a list of names or a text")
    rank, alpha, rslora = values.get("r", 8), values.get("lora_alpha", 8), values.get("use_rslora", False)
    dora = values.get("use_dora", False)
    _require(_is_number(rank, int), path, values, "r", "a whole number")
    _require(_is_number(alpha), path, values, "lora_alpha", "a number")
    _require(isinstance(rslora, bool), path, values, "use_rslora", "true or false")
    _require(isinstance(dora, bool), path, values, "use_dora", "true or false")
    patterns: dict[str, dict[str, Any]] = {}
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        pattern = values.get(name) or {}
        is_pattern = isinstance(pattern, dict) and all(_is_number(value, kind) for value in pattern.values())
        _require(is_pattern, path, values, name, "a mapping to numbers")
        patterns[name] = {key: kind(value) for key, value in pattern.items()}
    try:
        AdapterConfig(r=rank, lora_alpha=float(alpha), **patterns)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name, pattern in patterns.items():
        idle = idle_keys(pattern, paths)
        patterns[name] = {key: value for key, value in pattern.items() if key not in idle}
    if is_list:
        linears = [name for name in paths if not match_ending(parameters, [name])]
        targets = tuple(sorted(entry for entry in targets if match_ending([entry], linears)))
        wanted = f"a list of what {WEIGHTS_NAME} adapts ({paths[0]})"
        _require(bool(targets or parameters), path, values, "target_modules", wanted)
    scale = {"r": rank, "lora_alpha": float(alpha), "use_rslora": rslora, "use_dora": dora}
    used = tuple(entry for entry in parameters if match_ending([entry], paths))
    return {**scale, "target_modules": targets, "target_parameters": used, **patterns}


def _is_number(value: Any, kind: type = float) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def _require(condition: bool, path: Path, values: dict[str, Any], name: str, wanted: str) -> None:
    if not condition:
        raise UserError(f"{path}: {name}={values.get(name)!r} is not {wanted}; save the adapter again")


def _more(names: list[str]) -> str:
    return f" ({len(names)} linears in all)" if len(names) > 1 else ""


_WRAPPED = ".base_layer"
"""Suffix that PEFT adds to a module's path for each further adapted weight of it."""


def parameters_of(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """Return target_parameters of an adapter_config.json. Raises UserError for other names than experts' weights."""
    entries = values.get("target_parameters") or []
    known = ExpertLayout().weights
    if not isinstance(entries, list) or not all(
        isinstance(entry, str) and entry.rpartition(".")[2] in known for entry in entries
    ):
        raise UserError(
            f"{path}: target_parameters={entries!r} are not all weights of experts ({', '.join(known)}), the only "
            "supported target_parameters; set another {adapter.init_from}"
        )
    return tuple(sorted(entries))


def by_weight(
    names: Mapping[tuple[str, str], str], parameters: tuple[str, ...], file: Path
) -> dict[tuple[str, str], str]:
    """Return names in the file by (path, part), with the path of a fused weight in place of its wrapper's.

    The first of a module's adapted weights has the most `base_layer` (expert_targets.peft_paths). Raises UserError if a
    module has other wrappers than target_parameters demands.
    """
    if not parameters:
        return dict(names)
    depths: dict[str, set[int]] = {}
    for path, _ in names:
        module = path.removesuffix(_WRAPPED)
        weights = [f"{module}.{weight}" for weight in ExpertLayout().weights]
        if match_ending(parameters, weights):
            depths.setdefault(module, set()).add(path.count(_WRAPPED))
    places = {}
    for module, wrapped in depths.items():
        adapted = match_ending(parameters, [f"{module}.{weight}" for weight in ExpertLayout().weights])
        if wrapped != set(range(len(adapted))):
            raise UserError(
                f"{file} holds {len(wrapped)} adapters of {module}, and target_parameters={list(parameters)} means "
                f"{len(adapted)} of its weights; save the adapter again"
            )
        for depth, weight in enumerate(reversed(adapted)):
            places[module + _WRAPPED * depth] = weight
    return {(places.get(path, path), part): name for (path, part), name in names.items()}
