"""Adapters at adapter.init_from: read a PEFT LoRA or DoRA folder and check it against a model. Needs no torch.

The launcher turns adapter_config.json into settings of the run and checks the tensors' names and shapes by the file's
header. The worker checks again and loads (`peft_format.load_peft_adapter`).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distlora.architecture.config_checks import refuse_links
from distlora.architecture.safetensors_headers import SOURCE_DTYPES, Segment, read_header, read_header_and_metadata
from distlora.architecture.spec import Architecture
from distlora.architecture.targets import EXPERT_NAMES, EXPERT_WEIGHTS, idle_keys, match_ending, select_adapted, written
from distlora.architecture.tokens import EMBEDDING
from distlora.config import AdapterConfig, UserError, nearest, require
from distlora.config.base import is_hub_name, matches
from distlora.config.checks import check_section
from distlora.config.errors import named_settings
from distlora.config.json_files import Shape, check_shape, read_object
from distlora.system.atomic_io import sha256
from distlora.weights.peft_modules import (
    MODULE,
    ROWS,
    SCORE,
    SCORE_BIAS,
    SCORE_NAMES,
    PeftTokenRows,
    PeftWholeModule,
    check_score,
    read_initial_modules,
    read_initial_rows,
    read_score,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

# PEFT leaves the adapter's name ".default" and the ".weight" of a magnitude out of the file.
_TENSOR = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_"
    r"(?:(?P<part>[AB])(?:\.default)?\.weight|(?P<magnitude>magnitude)_vector(?:\.default)?(?:\.weight)?)"
)

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

_SHAPE: Shape = {
    "r?": int,
    "lora_alpha?": float,
    "use_rslora?": bool,
    "use_dora?": bool,
    "target_modules?": (str, [str], type(None)),
    "rank_pattern?": ({"*": int}, type(None)),
    "alpha_pattern?": ({"*": float}, type(None)),
    "trainable_token_indices?": ({"*": [int]}, [int], type(None)),
    "modules_to_save?": ([str], type(None)),
    "target_parameters?": ([str], type(None)),
}
"""Fields that become settings of the run."""


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
    score: PeftWholeModule | None = None
    """Head of a reward model; None of a language model."""
    parameters: tuple[str, ...] = ()
    """Paths of linears that PEFT adapts as parameters, by entries of target_parameters that end in ".weight"."""
    is_early: bool = False
    """True if PEFT before EXPERTS_CHANGED wrote it, by its config."""
    transposed: frozenset[str] = frozenset()
    """Fused weights whose A and B are in the layout before EXPERTS_CHANGED (`with_layout`)."""

    @property
    def adapter_config(self) -> AdapterConfig:
        """The adapter's rank, scale and targets."""
        known = {key: value for key, value in self.settings.items() if key in AdapterConfig.__dataclass_fields__}
        return AdapterConfig(**known | {"init_from": str(self.folder)})

    @property
    def paths(self) -> list[str]:
        """Adapted linears and fused expert weights, sorted."""
        return sorted({path for path, _ in self.tensors})


def read_peft_adapter(folder: str | Path, *, labels: int | None = 0) -> PeftAdapter:
    """Read an adapter of a language model, or also of a reward model whose score has `labels` outputs (None: any).

    Raises UserError for a folder that is missing, damaged or holds another adapter.
    """
    folder = Path(folder)
    values = _read_config(folder)
    _refuse_fields(values, folder / CONFIG_NAME)
    entries = sorted(values.get("target_parameters") or ())
    parameters = tuple(entry for entry in entries if not entry.endswith(_WEIGHT))
    names = _by_weight(_read_names(folder, values), parameters, folder / WEIGHTS_NAME)
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
    score = read_score(values, segments, folder)
    check_score(score, folder, labels)
    paths = sorted({path for path, _ in names})
    linears = {entry.removesuffix(_WEIGHT) for entry in entries if entry.endswith(_WEIGHT)}
    as_parameters = tuple(match_ending(linears, paths))
    settings = _settings(values, folder / CONFIG_NAME, paths, parameters, linears)
    settings["init_from_loftq"] = NF4_MARK.items() <= metadata.items()
    # Without trained rows or modules these stay unset, so that the run may train some.
    indices = {matrix: rows.ids for matrix, rows in token_rows.items()}
    if indices:
        settings["trainable_token_indices"] = indices[EMBEDDING] if indices.keys() == {EMBEDDING} else indices
    if modules:
        settings["modules_to_save"] = tuple(sorted(modules))
    return PeftAdapter(
        folder=folder,
        settings=settings,
        base=base if isinstance(base, str) and base else None,
        tensors={key: segments[name] for key, name in names.items()},
        names=names,
        token_rows=token_rows,
        modules=modules,
        score=score,
        parameters=as_parameters,
        is_early=_is_early(values),
    )


EXPERTS_CHANGED = (0, 19)
"""Release of PEFT that changed the layout of fused weights (huggingface/peft e84dd8f40, #3165). Before it, a weight
(E, O, I) has the factors of its transpose: A (E R, O) and B (I, R E), where PEFT now has (E R, I) and (O, R E). A
weight that its module holds as (E, I, O), as gpt-oss does, has always had the latter."""


def _is_early(values: Mapping[str, Any]) -> bool:
    """Return True if PEFT before EXPERTS_CHANGED wrote the config. It writes peft_version since 0.18, ours has none."""
    version = re.match(r"(\d+)\.(\d+)", str(values.get("peft_version") or ""))
    if version is None:
        return "auto_mapping" in values
    return (int(version[1]), int(version[2])) < EXPERTS_CHANGED


def with_layout(adapter: PeftAdapter, architecture: Architecture) -> PeftAdapter:
    """Return the adapter with the layout of its fused weights, which is told by the shapes of one that is not square.

    Raises UserError if weights contradict each other, or all are square and PEFT before EXPERTS_CHANGED wrote them.
    """
    shapes = {path: weight.shape for path, weight in architecture.adaptable() if weight.kind == "experts"}
    fused = [path for path in adapter.paths if path in shapes]
    layouts: dict[bool, str] = {}
    for path in fused:
        _, out, width = shapes[path]
        columns, rows = adapter.tensors[path, "A"].shape[-1], adapter.tensors[path, "B"].shape[0]
        if out != width and (columns, rows) in ((width, out), (out, width)):
            layouts[columns == out] = adapter.names[path, "A"]
    file = adapter.folder / WEIGHTS_NAME
    if len(layouts) > 1:
        raise UserError(
            f"{file}: {layouts[True]} has the layout of PEFT before 0.19, and {layouts[False]} the later one; save the "
            "adapter again"
        )
    if fused and not layouts and adapter.is_early:
        _, out, width = shapes[fused[0]]
        if out == width:
            raise UserError(
                f"{file}: PEFT before 0.19 wrote {adapter.names[fused[0], 'A']}, and as this weight is square "
                f"({out} x {width}), its shape does not tell which layout it has; save the adapter again with PEFT "
                "0.19 or later"
            )
    return replace(adapter, transposed=frozenset(fused if True in layouts else ()))


def weights_digest(folder: str | Path) -> str:
    """Return the SHA-256 of the adapter's weights file. Raises UserError as `read_peft_adapter`."""
    return sha256(read_peft_adapter(folder, labels=None).folder / WEIGHTS_NAME)


def check_quantization(initial: PeftAdapter, method: str) -> None:
    """Raise UserError if a LoftQ adapter meets a base that is not quantized to NF4. `method`: quant.method."""
    if initial.settings["init_from_loftq"] and method in ("none", "keep", "mixed"):
        loses = "less" if method == "mixed" else "nothing"
        raise UserError(
            f"{{adapter.init_from}}={initial.folder} started by LoftQ: A and B hold a correction of what NF4 loses of "
            f"the base, and quant={method} loses {loses}; set quant=nf4, or another {{adapter.init_from}}"
        )


def check_fits(initial: PeftAdapter, adapter: AdapterConfig, architecture: Architecture) -> PeftAdapter:
    """Return an adapter with the layout of its fused weights (`with_layout`).

    `adapter`: the run's settings. Raises UserError if the adapter has other linears or other shapes than the run.
    """
    shapes = {path: weight.shape for path, weight in architecture.adaptable()}
    file, trained_on = initial.folder / WEIGHTS_NAME, f" (it was trained on {initial.base})" if initial.base else ""
    paths = set(initial.paths)
    outside = sorted(paths - shapes.keys())
    if outside:
        raise UserError(
            f"{file} adapts {outside[0]}{_more(outside)}, which is not a linear in this model's decoder layers"
            f"{nearest(outside[0], shapes)}{trained_on}; set another {{adapter.init_from}} or model.path"
        )
    targets = set(select_adapted(adapter, architecture))
    for strays, what in ((sorted(targets - paths), "holds no tensors for"), (sorted(paths - targets), "also adapts")):
        if strays:
            raise UserError(
                f"{file} {what} {strays[0]}{_more(strays)}; adapter.target_modules={written(adapter.target_modules)} "
                f"means {len(targets)} linears of this model{trained_on}; set another {{adapter.init_from}} or "
                f"model.path"
            )
    initial = with_layout(initial, architecture)
    for (path, part), segment in sorted(initial.tensors.items()):
        *num_experts, out_features, in_features = shapes[path]
        if path in initial.transposed:
            out_features, in_features = in_features, out_features
        rank = adapter.rank_of(path)
        rows = rank * math.prod(num_experts)
        expected = {"A": (rows, in_features), "B": (out_features, rows), "magnitude": (out_features,)}[part]
        if segment.shape != expected:
            raise UserError(
                f"{file}: {initial.names[path, part]} has shape {list(segment.shape)}, and {path} at rank {rank} needs "
                f"{list(expected)}{trained_on}; set another {{adapter.init_from}} or model.path"
            )
    return initial


def read_adapter_beside(
    setting: str,
    folder: str | Path,
    adapter: AdapterConfig,
    quant_method: str,
    architecture: Architecture,
    labels: int = 0,
) -> PeftAdapter:
    """Read a teacher or a reward model. Raises UserError for one that cannot run in the place of the run's adapter.

    It may have another rank and scale, and adapts some or all of the linears that the run's adapter does. `setting`
    names the folder; `labels` as in `read_peft_adapter`.
    """
    with named_settings({"adapter.init_from": setting}):
        beside = read_peft_adapter(folder, labels=labels)
        check_quantization(beside, quant_method)
        check_fits(beside, beside.adapter_config, architecture)
    fused = {path for path, weight in architecture.adaptable() if weight.kind == "experts"}
    unsupported = {
        "is DoRA": bool(beside.settings.get("use_dora")),
        "trains rows of the embedding or the head": bool(beside.token_rows or beside.modules),
        "adapts the fused weights of experts": not fused.isdisjoint(beside.paths),
    }
    for what, is_so in unsupported.items():
        why = "an adapter beside the run's cannot"
        require(not is_so, f"{setting}={folder} {what}, which {why}; set another {setting}")
    beyond = sorted({*beside.paths} - {*select_adapted(adapter, architecture)})
    require(
        not beyond,
        f"{setting}={folder} adapts {beyond[0] if beyond else ''}{_more(beyond)}, which adapter.target_modules="
        f"{written(adapter.target_modules)} does not; set adapter.target_modules=all-linear",
    )
    return beside


def check_shared(initial: PeftAdapter, adapter: AdapterConfig) -> None:
    """Raise UserError if experts differ in a factor that they share in the run. `initial`: of `check_fits`."""
    for path in initial.paths:
        part, experts = adapter.shared_factor(path), initial.tensors[path, "A"].shape[0] // adapter.rank_of(path)
        if part is None or experts == 1:  # 1: a linear.
            continue
        if path in initial.transposed:
            part = "B" if part == "A" else "A"
        stored = initial.tensors[path, part]
        bits = array({2: "H", 4: "I"}[stored.num_bytes // stored.numel], stored.content())
        size = len(bits) // experts
        first, *others = (
            slice(n * size, (n + 1) * size) if part == "A" else slice(n, None, experts) for n in range(experts)
        )
        if (value := bits[first]) and any(bits[each] != value for each in others):
            raise copies_differ(f"{stored.file}: {initial.names[path, part]}")


def copies_differ(place: str) -> UserError:
    """Return the error for a factor that the experts of a file do not share."""
    return UserError(
        f"{place} differs between the experts, and adapter.expert_sharing means one for all of them; set "
        "adapter.expert_sharing=none"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    place = f"{{adapter.init_from}}={folder}"
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{place} is a file; point it at the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
        if is_hub_name(str(folder)):
            raise UserError(
                f"{place} is not a folder on this node; if it is on the hub, download it first: "
                f"`hf download {folder} --local-dir FOLDER`, then {{adapter.init_from}}=FOLDER"
            )
        raise UserError(f"{place} does not exist; set it to a PEFT LoRA's folder")
    path = folder / CONFIG_NAME
    if not path.is_file():
        inside = [child.name for child in sorted(folder.iterdir()) if (child / CONFIG_NAME).is_file()]
        hint = f"set {{adapter.init_from}}={folder / inside[0]}" if inside else "set it to a folder that PEFT saved"
        raise UserError(f"{place} holds no {CONFIG_NAME}; {hint}")
    refuse_links(folder)
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
    known_fields = {key.removesuffix("?") for key in _SHAPE} | _WITHOUT_MEANING | {"init_lora_weights"}
    for name in sorted(values.keys() - known_fields):
        if values[name] and (name, values[name]) != ("bias", "none"):
            raise UserError(f"{path}: {name}={values[name]!r} is not supported; set another {{adapter.init_from}}")
    check_shape(values, _SHAPE, path, "save the adapter again")
    entries = values.get("target_parameters") or ()
    linears = {f"{name}{_WEIGHT}" for names in EXPERT_NAMES.values() for name in names}
    if not all(match_ending({*EXPERT_WEIGHTS, *linears}, [entry]) for entry in entries):
        raise UserError(
            f"{path}: target_parameters={entries!r} are not all weights of experts ({', '.join(EXPERT_WEIGHTS)}) or of "
            f"linears named like them (down_proj{_WEIGHT}), the only supported target_parameters; set another "
            "{adapter.init_from}"
        )


def _read_names(folder: Path, values: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the name in the file by (path, part): one A and one B for each path, and with DoRA a magnitude."""
    file, dora = folder / WEIGHTS_NAME, values.get("use_dora")
    saved = {path.rpartition(".")[2] for path in values.get("modules_to_save") or ()}
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
        match, module = _TENSOR.fullmatch(name), MODULE.fullmatch(name)
        is_score = name in (SCORE, SCORE_BIAS) and not saved.isdisjoint(SCORE_NAMES)
        if ROWS.fullmatch(name) or is_score or (module is not None and module["module"] in saved):
            continue
        if match is None:
            raise UserError(f"{file}: {name} is not a lora_A or lora_B of a linear; set another {{adapter.init_from}}")
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


def _settings(
    values: dict[str, Any], path: Path, paths: list[str], parameters: tuple[str, ...], linears: Collection[str]
) -> dict[str, Any]:
    """Return the fields that become settings.

    `parameters`: entries of target_parameters that mean experts; `linears`: those that mean linears. Entries that match
    none of the adapted `paths` are left out, as in PEFT.
    """
    rank, alpha = values.get("r", 8), float(values.get("lora_alpha", 8))
    patterns: dict[str, dict[str, Any]] = {
        "rank_pattern": values.get("rank_pattern") or {},
        "alpha_pattern": {key: float(value) for key, value in (values.get("alpha_pattern") or {}).items()},
    }
    try:
        check_section("adapter", AdapterConfig(r=rank, lora_alpha=alpha, **patterns))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name, pattern in patterns.items():
        pattern = _for_paths(pattern, match_ending(linears, paths)) | pattern
        idle = idle_keys(pattern, paths)
        patterns[name] = {key: value for key, value in pattern.items() if key not in idle}
    targets = values.get("target_modules") or ()
    adapted = [name for name in paths if not match_ending(parameters, [name])]
    if isinstance(targets, str) and match_ending(linears, paths):  # A pattern and names are no one setting.
        targets = tuple(adapted)
    elif not isinstance(targets, str):
        targets = tuple(sorted(entry for entry in {*targets, *linears} if match_ending([entry], adapted)))
    if not (targets or parameters):
        raise UserError(
            f"{path}: target_modules={values.get('target_modules')!r} names nothing that {WEIGHTS_NAME} adapts "
            f"({paths[0]}); save the adapter again"
        )
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": values.get("use_rslora", False),
        "use_dora": values.get("use_dora", False),
        "target_modules": targets,
        "target_parameters": tuple(entry for entry in parameters if match_ending([entry], paths)),
        **patterns,
    }


_WEIGHT = ".weight"


def _for_paths(pattern: Mapping[str, Any], parameters: Iterable[str]) -> dict[str, Any]:
    """Return the keys that give linears, which PEFT adapts as parameters, what `pattern` gives their weights there."""
    chosen = {}
    for path in parameters:
        theirs = next((value for key, value in pattern.items() if matches(key, path + _WEIGHT)), None)
        if theirs is not None and theirs != next((v for key, v in pattern.items() if matches(key, path)), None):
            chosen[re.escape(path)] = theirs
    return chosen


def _more(names: list[str]) -> str:
    return f" ({len(names)} linears in all)" if len(names) > 1 else ""


_WRAPPED = ".base_layer"
"""Suffix that PEFT adds to a module's path for each further adapted weight of it."""


def _by_weight(
    names: Mapping[tuple[str, str], str], parameters: tuple[str, ...], file: Path
) -> dict[tuple[str, str], str]:
    """Return names in the file by (path, part), with the path of a fused weight in place of its wrapper's.

    The first of a module's adapted weights has the most `base_layer` (targets.peft_paths). Raises UserError if a
    module has other wrappers than target_parameters demands.
    """
    if not parameters:
        return dict(names)
    depths: dict[str, set[int]] = {}
    for path, _ in names:
        module = path.removesuffix(_WRAPPED)
        weights = [f"{module}.{weight}" for weight in EXPERT_WEIGHTS]
        # PEFT's own target_parameters may be last names alone, which any path ends in with one of these.
        if module.endswith(".experts") and match_ending(parameters, weights):
            depths.setdefault(module, set()).add(path.count(_WRAPPED))
    places = {}
    for module, wrapped in depths.items():
        adapted = match_ending(parameters, [f"{module}.{weight}" for weight in EXPERT_WEIGHTS])
        if wrapped != set(range(len(adapted))):
            raise UserError(
                f"{file} holds {len(wrapped)} adapters of {module}, and target_parameters={list(parameters)} means "
                f"{len(adapted)} of its weights; save the adapter again"
            )
        for depth, weight in enumerate(reversed(adapted)):
            places[module + _WRAPPED * depth] = weight
    return {(places.get(path, path), part): name for (path, part), name in names.items()}
