"""Read overrides: what options and recipes of conf/ set, which of them wins, and what is wrong with a word.

Hydra raises a dozen kinds of exceptions for wrong overrides; `explain` returns one UserError that names the override
and what to type. Most functions need Hydra initialized.
"""

import difflib
import functools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distlora.config import Config, PlanConfig, UserError, nearest
from distlora.config.base import is_hub_name
from distlora.config.cluster import OWN_OPTION
from distlora.config.file import parse_yaml
from distlora.config.peer_names import ACCUMULATION, OPTIMIZERS, nearest_peer, peer_hint
from distlora.config.plan import CHOSEN

CONF_MODULE = "distlora_launcher.conf"
_RECIPE = "recipe"
_SECTIONS = {name.partition(".")[0] for name in CHOSEN}
"""Groups whose options can fix a setting; the files of other groups are not read."""
_RIVALS = (
    ("optim.warmup_steps", "optim.warmup_ratio"),
    ("train.save_every", "train.saves_per_epoch"),
    ("train.eval_every", "train.evals_per_epoch"),
    ("data.path", "data.sources"),
)
"""Settings that exclude each other."""


def options_of(group: str) -> list[str]:
    """Return the options of a group sorted by name, with numbers in numeric order: llama3_8b before llama3_70b."""
    names = [entry.name.removesuffix(".yaml") for entry in _folder(group).iterdir() if entry.name.endswith(".yaml")]
    return sorted(names, key=lambda name: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", name)])


@functools.cache
def known_models() -> dict[str, str]:
    """Return the names for model=, each with its name on the hub."""
    folder = _folder("model")
    return {
        name: yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))["path"]
        for name in options_of("model")
        if name != "local"
    }


def _folder(group: str) -> Traversable:
    return resources.files(CONF_MODULE) / group


def parsed(overrides: Sequence[str]) -> list[Override]:
    """Return overrides as Hydra parses them."""
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)) if overrides else []


def user_settings(plan: PlanConfig, overrides: Sequence[str]) -> frozenset[str]:
    """Return the dotted names, of the settings that a plan may choose, that the command line fixes.

    All of them unless plan=auto.
    """
    if plan.mode != "auto":
        return frozenset(CHOSEN)
    chosen = _chosen(overrides)
    settings = {override.key_or_group for override in parsed(overrides)} - {group for group, _ in chosen}
    settings.update(*(_set_by_options(group, option) for group, option in chosen))
    return frozenset(settings & set(CHOSEN))


def over_recipes(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of options in `overrides` that a recipe in them sets too, to be composed as overrides.

    `recipe=tool_calls model=qwen25_14b` names two models, and the user typed the second.
    """
    chosen, typed = _chosen(overrides), {override.key_or_group for override in parsed(overrides)}
    by_recipe = {name for group, option in chosen if group == _RECIPE for name in _set_by_recipe(option)} - typed
    settings: dict[str, Any] = {}
    for group, option in chosen:
        if group != _RECIPE and any(name.startswith(f"{group}.") for name in by_recipe):
            names = by_recipe.intersection(_distinct(group, option))
            settings |= {name: _values(group, option)[name.partition(".")[2]] for name in names}
    return settings


def without_replaced(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a file without those that the command line's `overrides` replace.

    Those have the same name, exclude a typed setting, belong to another model than the typed one, are set by a typed
    option or recipe, or have no effect with a typed option.
    """
    replaced = {override.key_or_group for override in parsed(overrides)}
    known: dict[str, set[str]] = {}  # Settings that the typed options of a group have.
    for group, option in _chosen(overrides):
        replaced.update(_set_by_recipe(option) if group == _RECIPE else _distinct(group, option))
        known[group] = {*known.get(group, ()), *_values(group, option)} if group != _RECIPE else set()
    unset = {override.key_or_group for override in parsed(overrides) if override.value() is None}
    replaced.update(name for rivals in _RIVALS if (replaced - unset).intersection(rivals) for name in rivals)
    if "model.path" in replaced:
        replaced |= {"model.revision", "model.name", "model.gguf_file"}
    kept = []
    for word, override in zip(words, parsed(words), strict=True):
        group, *names = override.key_or_group.split(".")
        if override.key_or_group not in replaced and (not names or names[0] in known.get(group, names)):
            kept.append(word)
    return kept


def _chosen(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return (group, option) of each existing option in overrides, in a sweep of each of its options."""
    chosen = []
    for override in parsed(overrides):
        group, value = override.key_or_group, typing.cast("Any", override.value())
        is_option = "." not in group and override.package is None and not override.is_delete()
        options = _group_options(group) if is_option else []
        if options and override.is_sweep_override():
            value = list(override.sweep_string_iterator())
        chosen += [(group, option) for option in (value if isinstance(value, list) else [value]) if option in options]
    return chosen


def _set_by_options(group: str, chosen: Any) -> Iterator[str]:
    """Yield what the selected options of a group fix, among the settings that a plan may choose."""
    for option in chosen if isinstance(chosen, list) else [chosen]:
        if group == _RECIPE and option is not None:
            yield from _set_by_recipe(option)
        elif option is not None and group in _SECTIONS:
            yield from _distinct(group, option)


def _set_by_recipe(name: str) -> Iterator[str]:
    """Yield what a recipe's file sets, its options and the recipes that it builds on."""
    file = _load(f"{_RECIPE}/{name}")
    values: Any = OmegaConf.to_container(file.config)
    yield from (setting for setting, _ in leaves(values))
    for group, option in _defaults(file):
        yield from _set_by_options(group or _RECIPE, option)


def _distinct(group: str, option: str) -> Iterator[str]:
    """Yield settings of an option for which another option of its group has another value."""
    others = [_values(group, other) for other in _group_options(group)]
    for name, value in _values(group, option).items():
        if any(other.get(name, value) != value for other in others):
            yield f"{group}.{name}"


def _values(group: str, option: str) -> dict[str, Any]:
    """Return the values that an option sets, with those that it builds on."""
    file = _load(f"{group}/{option}")
    values: dict[str, Any] = {}
    own_values: Any = OmegaConf.to_container(file.config)
    for _, other in _defaults(file):
        values |= _values(group, other)
    return values | own_values


def _defaults(file: Any) -> Iterator[tuple[str, Any]]:
    """Yield (group, option) of each entry of a file's defaults list but itself; the group is empty for its own."""
    for default in file.defaults_list or ():
        if isinstance(default, GroupDefault):
            assert default.group is not None
            yield default.group.lstrip("/"), default.value
        elif not default.is_self():
            yield "", default.path


def _repository() -> Any:
    """Return Hydra's reader of conf/ and of --config-dir. The loader's own methods copy it at each call, in 7 ms."""
    loader: Any = GlobalHydra.instance().config_loader()
    return loader.repository


def _group_options(group: str) -> list[str]:
    options: list[str] = _repository().get_group_options(group, ObjectType.CONFIG)
    return options


def _load(path: str) -> Any:
    return _repository().load_config(path)


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested settings; an empty mapping is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


REQUIRED = {
    "model.path": "a local folder in Hugging Face format (config.json, safetensors, tokenizer), a GGUF file, or a name "
    "on the hub",
    "data.path": "a file (jsonl, json, parquet, csv, txt), a folder of them, or a data set on the hub",
}
EXAMPLE = "for example: distlora train model.path=./Llama-3.2-1B data.path=documents.jsonl"


EXPLAINED = (HydraException, OmegaConfBaseException, ValueError, TypeError)
"""Exceptions of composing wrong overrides: Hydra leaks ValueError and TypeError for odd group values (adapter=1)."""


def explain(error: Exception, overrides: Sequence[str]) -> UserError:
    """Return the UserError for what Hydra raised while it composed `overrides`."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    if first_line.startswith("Ambiguous value for argument"):
        word = first_line.split("'", 1)[1].rstrip("'")
        key, _, value = word.partition("=")
        advice = f"to compare them write distlora sweep ... {word}; `distlora train -m` runs one job per value"
        if _takes_list(key):
            advice = f"write {key}=[{value}] for a list; {advice}"
        return UserError(f"{word} holds several values; {advice}")
    compose = functools.cache(lambda *words: _composed(list(words)))
    for override in parsed(overrides):
        message = _bad_option(override, compose) or _unknown_key(override, overrides, compose)
        if message:
            return UserError(message)
    missing = (
        f" (options: {', '.join(error.options)})" if isinstance(error, MissingConfigException) and error.options else ""
    )
    return UserError(f"{first_line}{missing}")


def refuse_unusable(overrides: Sequence[str]) -> None:
    """Refuse names of old settings, and overrides without a name (`=value`, `+@package=value`), where Hydra fails."""
    for word in overrides:
        if re.match(r"[+~]*\s*[@:=]", word):
            raise UserError(f"{word!r} names no setting; write setting=value")
        if re.match(r"[+~]*card[.@=]", word):
            raise UserError(f"{word}: the setting `card` is now `gpu`; write {word.replace('card', 'gpu', 1)}")
        if re.match(r"[+~]*hydra([./](launcher|sweeper|sweep)\b|\.mode=)", word):
            raise UserError(
                f"{word} has no effect: distlora runs the jobs of -m itself, in run_dir; leave it out, or search by "
                "results with `distlora sweep`"
            )


def _unreadable(error: OverrideParseException) -> UserError:
    word = str(error.override)
    key, _, value = word.partition("=")
    if "=" not in word or not re.fullmatch(r"[+~]*[A-Za-z_][\w./@:-]*", key):
        named = [f"{group}={word}" for group in ("model", "recipe") if word in options_of(group)]
        named += [f"{name}={word}" for name in REQUIRED] if Path(word).exists() else []
        meant = f"write {' or '.join(named)}" if named else "write it as setting=value"
        return UserError(f"{word!r} is not a setting; {meant}")
    return UserError(
        f"cannot read {word!r}: a value with any of = , : ~ # [ ] {{ }} ( ) or quotes in it must be quoted, twice for "
        f"the shell: '{key}=\"{value}\"'"
    )


def _groups() -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options("", ObjectType.GROUP)


def _options(group: str) -> list[str]:
    if "." in group:  # A setting, for which Hydra would look through all folders.
        return []
    return GlobalHydra.instance().config_loader().get_group_options(group)


def _bad_option(override: Override, compose: Callable[..., Any]) -> str | None:
    """Return the message for `group=option` if the group exists and the option does not."""
    group, value = override.key_or_group, override.value()
    options = _options(group) if override.package is None else []
    chosen = value if isinstance(value, list) else [value]
    absent = [item for item in chosen if item not in options]
    if not options or override.is_delete() or not absent:
        return None
    written = override.get_value_element_as_str()
    if group == "model" and is_hub_name(str(value)):
        return f"model={written}: names for model= have no '/'; for a model of the hub write model.path={written}"
    if group == "recipe" and written.endswith((".yaml", ".yml")):
        return (
            f"recipe={written}: a recipe is named without a folder and .yaml; for a file write distlora train {written}"
        )
    for names, hint in OPTION_HINTS.get(group, {}).items():
        if str(absent[0]).lower() in names.split():
            return f"{group}={written} is not an option of {group}; {hint}"
    meant = _family(str(absent[0]), options_of(group) if group == "model" else options)
    message = f"{group}={written} is not an option of {group} (did you mean {meant}?)"
    if not meant:
        message = (
            f"{group}={written}: the options of {group} are {', '.join(options)}{nearest(str(absent[0]), options)}"
        )
    defaults = compose()
    if value is None and group not in defaults:
        message += f"; ~{group} chooses none"
    elif f"{group}.path" in dict(leaves(defaults)):
        message += f"; to name a file or folder write {group}.path={written}"
    return message


OPTION_HINTS = {
    "adapter": {
        "qlora": "QLoRA is a LoRA adapter on a 4-bit base: write recipe=qlora",
        "none null": "write adapter=full to train every parameter, or adapter=lora",
    },
    "quant": {
        "4bit 4 int4 bnb bitsandbytes 4-bit fp4 nf4_double": "4 bits are NF4: write quant=nf4 (or recipe=qlora)",
        "8bit 8 int8 8-bit fp8": "write quant=nf4 (4 bits) or quant=none (16 bits)",
        "bf16 fp16 16bit 16 false": "write quant=none (16 bits)",
        "gptq awq": "write quant=nf4, which quantizes a 16-bit checkpoint as it is loaded",
    },
    "parallel": {
        "deepspeed ds zero": "write parallel=zero3 for DeepSpeed",
        "ddp dp": "write parallel.shard_degree=1 for a whole base on every GPU",
        "tp pp": "write parallel=fsdp2, which shards the base over all GPUs",
    },
    "optim": {" ".join(names): f"write optim={ours}" for ours, names in OPTIMIZERS.items()},
    "tracker": {"null false off disabled": "write tracker=none"},
    "gpu": {
        "t4 v100 p100 p40 rtx2060 rtx2070 rtx2080 rtx2080ti": "it is older than Ampere (compute capability 8.0), "
        "without bf16, which the GPU kernels need; write for example gpu=rtx4060ti or gpu=l4"
    },
    "recipe": {"lora": "write recipe=qlora, with quant=none for an unquantized base", "sft": "write recipe=qlora"},
}
"""Names of other tools by group, and what to write."""


def _family(word: str, options: Sequence[str]) -> str:
    """Return the options that `word` is another spelling of, or else those that begin with it: llama3, Llama-3.1-8B."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = {plain(word), plain(re.sub(r"(\d)\.\d", r"\1", word))} - {""}
    same = [option for option in options if plain(option) in names]
    kin = [o for o in options if o.partition("_")[0] in names or (len(word) > 2 and o.startswith(word.lower()))]
    return " or ".join(", ".join(map(repr, same or kin)).rsplit(", ", 1))


def _takes_list(key: str) -> bool:
    section, _, name = key.partition(".")
    hints = typing.get_type_hints(typing.get_type_hints(Config).get(section, object))
    return "tuple" in str(hints.get(name))


def _unknown_key(override: Override, overrides: Sequence[str], compose: Callable[..., Any]) -> str | None:
    """Return the message for a key that is neither a setting nor a group, with the nearest one."""
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or (override.package is None and _options(key)):
        return None
    defaults = compose()
    pairs = zip(overrides, parsed(overrides), strict=True)
    chosen = [word for word, item in pairs if item.package is None and _options(item.key_or_group)]
    try:
        composed = compose(*chosen)
    except EXPLAINED:  # A chosen group is wrong too, and gets its own complaint once this one is corrected.
        composed = defaults
    if key in set(_nodes(composed)):
        return None
    if key in set(_nodes(defaults)):
        reasons = [word for word in chosen if word.lstrip("~").partition("=")[0] == key.partition(".")[0]]
        return f"{key} has no effect with {' '.join(reasons or chosen)}; remove it"
    section, _, name = key.partition(".")
    if section == "cluster" and name.partition(".")[0] in OWN_OPTION:
        return f"{key} is a setting of cluster={OWN_OPTION[name.partition('.')[0]]}; add that, or leave it out"
    is_hydras = section == "hydra"
    settings = [name for name, _ in leaves(composed) if name.startswith("hydra.") == is_hydras]
    peer = "" if is_hydras else _accumulation(override, overrides) or peer_hint(key)
    return f"there is no setting {key}{peer or _axolotl_reason(key) or nearest_setting(key, settings, _groups())}"


def _accumulation(override: Override, overrides: Sequence[str]) -> str:
    """Return what to write for a number of accumulation steps, by the other sizes on the command line."""
    steps: Any = override.value()
    if override.key_or_group.rpartition(".")[2] not in ACCUMULATION or not isinstance(steps, int):
        return ""
    typed: dict[str, Any] = {override.key_or_group: override.value() for override in parsed(overrides)}
    names = ("train.micro_batch", "per_device_train_batch_size"), ("cluster.gpus_per_node",), ("cluster.nodes",)
    micro, gpus, nodes = (next((typed[n] for n in each if isinstance(typed.get(n), int)), 1) for each in names)
    ranks = gpus * nodes
    return (
        f"; write train.global_batch={micro * ranks * steps} (micro-batch {micro} x {ranks} GPU{'s' * (ranks > 1)} x "
        f"{steps} steps of accumulation)"
    )


def _axolotl_reason(key: str) -> str:
    """Return why a key of Axolotl has no setting, from the importer's table."""
    table = Path(__file__).parents[1] / "importing" / "axolotl_keys.yaml"
    rows = parse_yaml(table.read_bytes())["config"]
    reason = next((row["reason"] for row in rows if key in row["keys"]), None)
    return f", which is a key of Axolotl: {reason}" if reason else ""


def _composed(overrides: list[str]) -> Any:
    composed = hydra_compose("config", overrides=overrides, return_hydra_config=True)
    return OmegaConf.to_container(composed, resolve=False)


def nearest_setting(key: str, settings: list[str], groups: list[str]) -> str:
    """Return the closest dotted name; a last part in the wrong place (lr=...), or half of one, counts as close."""
    last = key.rpartition(".")[2]
    same_last = [name for name in settings if name.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, [*settings, *groups], n=1, cutoff=0.7) or same_last
    close = close or [name for name in settings if last in name.rpartition(".")[2].split("_")]
    if close:
        return f" (did you mean {close[0]!r}?)"
    return (
        nearest_peer(last) or nearest(key, [*settings, *groups]) or "; `distlora train --help` lists all that there are"
    )


def _nodes(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _nodes(value, f"{prefix}{key}.")
