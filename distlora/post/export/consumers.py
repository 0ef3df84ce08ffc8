"""Bind the tensors of a LoRA adapter as vLLM and SGLang do: names, the weights they change, the layout. No torch.

consumers.toml holds a table per consumer: by model type, the modules of a decoder layer that its model wraps with LoRA,
written from its source at the release named there. `targets` turns a row into the places that a file can fill; `bind`
finds the place of each tensor of a file, or raises UserError for what the consumer would refuse, drop or misread.
Letters: O out features, I in features, R rank, E experts.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from distlora.architecture.spec import Architecture
from distlora.config import AdapterConfig, UserError, nearest, require
from distlora.config.base import matches

PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A row of a consumer's table: what it wraps in a decoder layer of one model type."""

    linears: tuple[str, ...]
    """Paths in a layer of linears that bind under their Hugging Face names."""
    experts: str = ""
    """Path in a layer of the experts in the consumer's names; "" if it has no LoRA for them."""
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
    """The modules of one expert: gate, up, down. Empty: all experts in one tensor, as in PEFT."""
    interleaved: bool = False
    """True if the rows of gate_up_proj alternate between gate and up."""
    split: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Linears that the consumer names apart: the names of their parts, in the order of their rows."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Reasons by path in a layer, where the consumer loads an adapter and does not apply it."""
    flags: str = ""
    """Arguments that the server needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Consumer:
    """A server of LoRA adapters and what its loader does with a file."""

    name: str
    version: str
    """Release that the tables were written from; earlier ones are refused, but those of `run`."""
    source: str
    """Its repository and what identifies the source there."""
    types: Mapping[str, Served]
    """Rows by model_type of config.json."""
    together: Sequence[Sequence[str]]
    """Last names of modules that it needs all of, where a file has one of them."""
    ranks: Sequence[int] = ()
    """Choices of its largest rank, ascending; empty for any."""
    plain: bool = False
    """True if it reads alpha / r of the config alone: no rsLoRA, one rank and one alpha for all weights."""
    wraps: Mapping[str, str] = field(default_factory=dict)
    """Names in target_modules that make it wrap a module, by the module's last name, where they differ."""
    reads_targets: bool = False
    """True if it drops the tensors of modules that target_modules lacks."""
    stacks: Sequence[str] = ()
    """Modules that hold gate, up, down of all experts in 3-D tensors, A of gate and up and B of down once for all."""
    stacks_flags: str = ""
    """Arguments that make the server read `stacks`. It then reads no other layout of experts."""
    command: str = ""
    """Command that starts it; {base}, {adapter} and {rank} are filled in."""
    run: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Releases that `make test-servers` ran, with the model types whose adapters computed what was trained."""

    def limit(self, rank: int) -> int:
        """Return the setting of the largest rank that an adapter of `rank` needs. Raises UserError if none does."""
        if not self.ranks:
            return rank
        require(
            rank <= self.ranks[-1],
            f"the adapter has rank {rank}, and {self.name} serves at most {self.ranks[-1]} (--max-lora-rank); cut it "
            f"with `distlora combine ADAPTER=1 --method svd --rank {self.ranks[-1]}`, or merge it",
        )
        return next(limit for limit in self.ranks if rank <= limit)


def _consumer(values: dict[str, Any], sets: Mapping[str, list[str]]) -> Consumer:
    rows: dict[str, Served] = {}
    for row in values.pop("rows"):
        linears = tuple(path for entry in row.pop("linears") for path in sets.get(entry, [entry]))
        rows |= dict.fromkeys(row.pop("types"), Served(linears=linears, **row))
    return Consumer(types=rows, **values)


_TABLES = tomllib.loads(resources.files("distlora.post.export").joinpath("consumers.toml").read_text(encoding="utf-8"))
CONSUMERS = {name: _consumer(values, _TABLES["sets"]) for name, values in _TABLES.items() if name != "sets"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A place in a consumer's model that one pair of A and B fills."""

    path: str
    """Hugging Face path of the weight that it changes."""
    rows: slice
    """Its rows of that weight."""
    shape: tuple[int, int]
    """(O, I) of those rows."""
    expert: int | None = None
    """The expert of a fused weight; None for a linear, or for all experts."""
    stack: int = 0
    """Number of experts in one pair in PEFT's layout: A (E R, I), B (O, R E); 0 for a pair of one matrix."""
    matrices: tuple[int, int] | None = None
    """Number of matrices in A (., R, I) and in B (., O, R) of `Consumer.stacks`; None: both are one matrix."""
    group: str = ""
    """Targets of one group are all filled or none."""


def served(consumer: Consumer, model: Mapping[str, Any]) -> Served:
    """Return the row of a base. `model`: its config.json. Raises UserError for a type that is not in the table."""
    model_type = str(model.get("model_type"))
    require(
        model_type in consumer.types,
        f"model_type={model_type!r} is not among those whose adapters are known to load in {consumer.name} "
        f"{consumer.version}: {', '.join(sorted(consumer.types))}; merge the adapter (`distlora merge`) and serve that",
    )
    return consumer.types[model_type]


def targets(
    consumer: Consumer, row: Served, architecture: Architecture, *, shared_outer: bool = False
) -> dict[str, Target]:
    """Return the places that a file can fill, by the name of the module in the file less PREFIX.

    `shared_outer`: experts are in the layout of `Consumer.stacks`.
    """
    by_name: dict[str, Target] = {}
    shapes = {path: weight.shape for path, weight in architecture.adaptable()}
    for path, weight in architecture.adaptable():
        index = path.removeprefix(architecture.layer_prefix).partition(".")[0]
        layer = f"{architecture.layer_prefix}{index}."
        inside = path.removeprefix(layer)
        if weight.kind == "experts":
            if row.experts:
                stacks = consumer.stacks if shared_outer else ()
                by_name |= _expert_targets(row, layer, path, weight.shape, stacks)
        elif inside in row.split:
            sizes = _sizes(inside, weight.shape[0], shapes, layer)
            for name, size, end in zip(row.split[inside], sizes, itertools.accumulate(sizes), strict=True):
                rows = slice(end - size, end)
                by_name[layer + name] = Target(path=path, rows=rows, shape=(size, weight.shape[1]))
        elif inside in row.linears:
            by_name[path] = Target(path=path, rows=slice(None), shape=(weight.shape[0], weight.shape[1]))
    grouped = {name: _grouped(consumer, name, target, by_name) for name, target in by_name.items()}
    return {name: target for name, target in grouped.items() if target is not None}


def _expert_targets(
    row: Served, layer: str, path: str, shape: tuple[int, ...], stacks: Sequence[str]
) -> dict[str, Target]:
    """Return the targets of one fused weight (E, O, I), with names in `stacks` of those of all experts."""
    module, (experts, out, width) = layer + row.experts, shape
    is_down = path.endswith(".down_proj")
    if not (is_down or path.endswith(".gate_up_proj")):
        return {}
    if not row.names:
        place = module if is_down else f"{module}.base_layer"
        return {place: Target(path=path, rows=slice(None), shape=(out, width), stack=experts, group=module)}
    gate, up, down = stacks or row.names
    half = out // 2
    halves = (slice(0, None, 2), slice(1, None, 2)) if row.interleaved else (slice(0, half), slice(half, None))
    parts = {down: (slice(None), out)} if is_down else {gate: (halves[0], half), up: (halves[1], half)}
    if stacks:
        counts = (experts, 1) if is_down else (1, experts)
        return {
            f"{module}.{name}": Target(path=path, rows=rows, shape=(size, width), matrices=counts, group=module)
            for name, (rows, size) in parts.items()
        }
    return {
        f"{module}.{expert}.{name}": Target(path=path, rows=rows, shape=(size, width), expert=expert, group=module)
        for expert in range(experts)
        for name, (rows, size) in parts.items()
    }


def _sizes(linear: str, rows: int, shapes: Mapping[str, tuple[int, ...]], layer: str) -> list[int]:
    """Return the rows of each part of a split linear: two halves, or q, k and v of linear attention."""
    if linear != "linear_attn.in_proj_qkv":
        return [rows // 2, rows - rows // 2]
    values = shapes[f"{layer}linear_attn.in_proj_z"][0]
    return [(rows - values) // 2, (rows - values) // 2, values]


def _grouped(consumer: Consumer, name: str, target: Target, by_name: Mapping[str, Target]) -> Target | None:
    """Return the target with its group, named after the first of its modules; None if the model lacks one of them."""
    module, _, last = name.rpartition(".")
    if target.group or target.expert is not None:
        return target
    for names in consumer.together:
        if last in names:
            whole = all(f"{module}.{other}" in by_name for other in names)
            return replace(target, group=f"{module}.{names[0]}") if whole else None
    return target


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedPair:
    """A pair of tensors of a file and the place that it fills."""

    target: Target
    a: str
    """Name of A in the file."""
    b: str
    scale: float
    """Factor of B A by the consumer's formula."""


def bind(
    consumer: Consumer, row: Served, places: Mapping[str, Target], config: Mapping[str, Any], shapes: Mapping[str, Any]
) -> dict[str, ServedPair]:
    """Return the pairs of a file by the module's name in it, as the consumer's loader finds them.

    `config`: adapter_config.json; `shapes`: the shapes of the file's tensors by name. Raises UserError, with the key,
    for whatever the consumer refuses, drops, or reads as something else.
    """
    _check_config(consumer, config)
    modules = config.get("target_modules") or []
    require(
        isinstance(modules, list) or not consumer.reads_targets,
        f"target_modules={modules!r} in adapter_config.json: {consumer.name} reads a list of names",
    )
    named = {name.rpartition(".")[2] for name in modules}
    halves: dict[str, dict[str, str]] = {}
    for key in sorted(shapes):
        module, side = _parse(consumer, key)
        if module not in places:
            raise UserError(f"{key}: {_why_unbound(consumer, row, module, places)}")
        (wrapped,) = target_modules(consumer, [module])
        require(
            not consumer.reads_targets or wrapped in named,
            f"{key}: {consumer.name} drops it, as target_modules in adapter_config.json lacks {wrapped}",
        )
        halves.setdefault(module, {})[side] = key
    pairs = {}
    for module, keys in halves.items():
        target = places[module]
        for side, other in (("A", "B"), ("B", "A")):
            require(side in keys, f"{keys.get(other)}: {consumer.name} finds no lora_{side} beside it")
        rank, scale = _rank_and_scale(consumer, config, module)
        columns, (out, width) = rank * max(target.stack, 1), target.shape
        expected = {"A": (columns, width), "B": (out, columns)}
        transposed = {"A": (columns, out), "B": (width, columns)}
        counts: list[tuple[int, ...]] = [(count,) for count in target.matrices or ()] or [(), ()]
        for (side, key), count in zip(sorted(keys.items()), counts, strict=True):
            shape, matrix = tuple(shapes[key]), expected[side]
            if shape != (*count, *matrix):
                turned = "; it is transposed" if shape[-2:] in (transposed[side], matrix[::-1]) else ""
                raise UserError(
                    f"{key}: it has shape {list(shape)}, and {consumer.name} reads {[*count, *matrix]}{turned}"
                )
        pairs[module] = ServedPair(target=target, a=keys["A"], b=keys["B"], scale=scale)
    filled = {pair.target.group for pair in pairs.values() if pair.target.group}
    for module, target in places.items():
        require(
            target.group not in filled or module in pairs,
            f"{PREFIX}{module}.lora_A.weight is missing: {consumer.name} needs all modules of {target.group} or none",
        )
    return pairs


def unserved(consumer: Consumer, row: Served, places: Mapping[str, Target], paths: Iterable[str]) -> str:
    """Return why the first of `paths` that has no place has none; "" if all have."""
    known = {target.path for target in places.values()}
    absent = [path for path in paths if path not in known]
    return f"{absent[0]}: {_why_unbound(consumer, row, absent[0], places)}" if absent else ""


def target_modules(consumer: Consumer, modules: Iterable[str]) -> list[str]:
    """Return the target_modules that make the consumer wrap these modules."""
    last = {module.rpartition(".")[2] for module in modules}
    return sorted({consumer.wraps.get(name, name) for name in last})


def _parse(consumer: Consumer, key: str) -> tuple[str, str]:
    """Return (module, A or B) of a tensor's name."""
    for side in "AB":
        ending = f".lora_{side}.weight"
        if key.startswith(PREFIX) and key.endswith(ending):
            return key.removeprefix(PREFIX).removesuffix(ending), side
    raise UserError(f"{key}: {consumer.name} reads {PREFIX}*.lora_A.weight and lora_B.weight, nothing else")


def check_read_as_written(
    consumer: Consumer,
    model: Mapping[str, Any],
    architecture: Architecture,
    adapter: AdapterConfig,
    paths: Iterable[str],
) -> None:
    """Refuse an adapter of these linears that a server does not read as PEFT writes it.

    `model`: config.json. Raises UserError, with the key, for what the server refuses, drops, or reads otherwise.
    """
    row, weights = served(consumer, model), dict(architecture.adaptable())
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        *experts, out, features = weights[path].shape
        rank = adapter.rank_of(path)
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (*experts, rank, features)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (*experts, out, rank)
    config = {
        "r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
    }
    bind(consumer, row, targets(consumer, row, architecture), config, shapes)


def _why_unbound(consumer: Consumer, row: Served, module: str, places: Mapping[str, Target]) -> str:
    """Return the reason why a module of a file, or a weight of the base, has no place."""
    for path, reason in row.refused.items():
        if module.endswith(f".{path}"):
            return f"{consumer.name} loads an adapter here and does not apply it as trained: {reason}"
    if ".experts" in module:
        example = next((name for name in places if ".experts" in name), "")
        if not example:
            return f"{consumer.name} has no LoRA for the experts of this model type"
        is_of_one_expert, reads_one = (re.search(r"\.experts\.\d+\.", f"{name}.") for name in (module, example))
        if reads_one and not is_of_one_expert:
            return (
                f"it holds all experts of a layer in one tensor, and {consumer.name} reads one pair per expert here, "
                f"as {PREFIX}{example}.lora_A.weight; write it with `distlora export --for`"
            )
        if is_of_one_expert and not reads_one:
            return (
                f"it is one expert's, and {consumer.name} reads all experts of a layer in one tensor here, as "
                f"{PREFIX}{example}.lora_A.weight; write it with `distlora export --for`"
            )
    layer = re.match(r".*?\.\d+\.", module)
    beside = [name for name in places if layer is not None and name.startswith(layer[0])]
    return f"{consumer.name} wraps no module of this name with LoRA{nearest(module, beside)}"


_TRAINED_ELSEWHERE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights (or their beginnings) whose A and B belong to a changed base."""


def _check_config(consumer: Consumer, config: Mapping[str, Any]) -> None:
    """Raise UserError for settings that the consumer refuses or ignores."""
    ignored = {
        "use_dora": bool(config.get("use_dora")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "trainable_token_indices": bool(config.get("trainable_token_indices")),
        "bias": config.get("bias", "none") != "none",
        "init_lora_weights": str(config.get("init_lora_weights", True)).startswith(_TRAINED_ELSEWHERE),
    }
    if consumer.plain:
        ignored |= {name: bool(config.get(name)) for name in ("use_rslora", "rank_pattern", "alpha_pattern")}
    for name, is_set in ignored.items():
        require(
            not is_set, f"adapter_config.json has {name}={config.get(name)!r}, which {consumer.name} does not support"
        )
    consumer.limit(max([config["r"], *(config.get("rank_pattern") or {}).values()]))


def _rank_and_scale(consumer: Consumer, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return the rank and the factor of B A that the consumer reads from the config for a module."""
    rank, alpha = config["r"], config["lora_alpha"]
    if consumer.plain:
        return rank, alpha / rank
    name = module
    if module.endswith(".experts.base_layer"):
        name = f"{module.removesuffix('.base_layer')}.gate_up_proj"
    elif module.endswith(".experts"):
        name = f"{module}.down_proj"
    rank = next((value for key, value in (config.get("rank_pattern") or {}).items() if matches(key, name)), rank)
    alpha = next((value for key, value in (config.get("alpha_pattern") or {}).items() if matches(key, name)), alpha)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
