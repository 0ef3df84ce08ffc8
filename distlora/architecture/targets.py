"""Which linears get an adapter: a preset, a list of module names, or a regular expression, against a model's paths.

Pure Python: the launcher asks about names read off safetensors headers, model surgery about the modules themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from distlora.architecture.families import FUSED_LINEARS
from distlora.config import TARGET_PRESETS, AdapterConfig, UserError, nearest
from distlora.config.base import matches


def select_targets(target_modules: str | tuple[str, ...], names: Iterable[str]) -> list[str]:
    """Return the paths among `names` that `adapter.target_modules` selects, in their order.

    A list's entry means every path that equals it or ends in "." + it (as in PEFT); a string is a preset or a regular
    expression for whole paths. A preset means a fused linear (qkv_proj) where it names all that is in it. Raises
    UserError, with what there is, when nothing matches, a list's entry is idle, or a preset names a part of a fused
    linear.
    """
    paths = list(names)
    available = sorted({path.rpartition(".")[2] for path in paths})
    if not isinstance(target_modules, str):
        _refuse_idle(target_modules, paths, available)
        return match_ending(target_modules, paths)
    if target_modules in TARGET_PRESETS:
        selected = match_ending(_with_fused(target_modules, available), paths)
        if not selected:
            wanted = ", ".join(TARGET_PRESETS[target_modules])
            raise UserError(
                f"adapter.target_modules={target_modules} ({wanted}) matches nothing; {_there_is(available)}"
            )
        return selected
    try:
        pattern = re.compile(target_modules)
    except re.error as error:
        raise UserError(
            f"adapter.target_modules={target_modules} is neither a preset ({', '.join(TARGET_PRESETS)}) nor a regular "
            f"expression ({error}); write a list, adapter.target_modules=[{','.join(available[:2])}]"
        ) from error
    selected = [path for path in paths if pattern.fullmatch(path)]
    if not selected:
        raise UserError(_no_match(target_modules, paths, available))
    return selected


def written(targets: str | Iterable[str]) -> str:
    """Return a list of names as one types it; a preset or a regular expression is returned unchanged."""
    return targets if isinstance(targets, str) else f"[{','.join(targets)}]"


def check_patterns(adapter: AdapterConfig, targets: Iterable[str], names: Iterable[str]) -> None:
    """Refuse a key of rank_pattern or alpha_pattern that changes no linear: a setting without effect is a mistake.

    `targets` are the paths that get an adapter, `names` those of all linears.
    """
    adapted = list(targets)
    for setting, pattern in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for key in idle_keys(pattern, adapted):
            raise UserError(f"adapter.{setting}.{key}={pattern[key]} {_why_idle(key, adapted, list(names))}")


def idle_keys(pattern: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Return the keys of a rank_pattern or alpha_pattern that change nothing; the first match counts."""
    rest, idle = list(paths), []
    for key in pattern:
        taken = [path for path in rest if matches(key, path)]
        if not taken:
            idle.append(key)
        rest = [path for path in rest if path not in taken]
    return idle


def _why_idle(key: str, adapted: list[str], names: list[str]) -> str:
    if any(matches(key, path) for path in adapted):
        return "comes after other keys that match all of its linears; put it before them"
    short = sorted({path.rpartition(".")[2] for path in adapted})
    listed = ", ".join(short)
    if any(matches(key, path) for path in names):
        return f"means linears without an adapter; add them to adapter.target_modules, which now means {listed}"
    return f"matches no linear{nearest(key, short)}; adapter.target_modules means {listed}"


def _with_fused(preset: str, available: list[str]) -> list[str]:
    """Return the preset's names and the model's fused linears that hold nothing else."""
    wanted = TARGET_PRESETS[preset]
    fused = {name: parts for name, parts in FUSED_LINEARS.items() if name in available and set(parts) & set(wanted)}
    for name, parts in fused.items():
        if not set(parts) <= set(wanted):
            raise UserError(
                f"adapter.target_modules={preset} ({', '.join(wanted)}) names a part of this model's {name}, which is "
                f"one weight for {', '.join(parts)} and has one adapter or none; "
                f"set adapter.target_modules=[{name}] or attention"
            )
    return [*wanted, *fused]


def match_ending(endings: Iterable[str], paths: list[str]) -> list[str]:
    """Return the paths that equal one of `endings` or end in "." + it, PEFT's rule for a list of target_modules."""
    wanted = tuple(endings)
    dotted = tuple("." + ending for ending in wanted)
    return [path for path in paths if path in wanted or path.endswith(dotted)]


def _refuse_idle(entries: tuple[str, ...], paths: list[str], available: list[str]) -> None:
    for entry in entries:
        if not match_ending([entry], paths):
            listed = ",".join(entries)
            inside = [name for name, parts in FUSED_LINEARS.items() if entry in parts and name in available]
            hint = f" (it is a part of {inside[0]})" if inside else nearest(entry, available)
            raise UserError(
                f"adapter.target_modules=[{listed}]: no module is named {entry!r}{hint}; {_there_is(available)}"
            )


def _there_is(available: list[str]) -> str:
    return f"the model has {', '.join(available)}" if available else "the model has no linear in its blocks"


def _no_match(text: str, paths: list[str], available: list[str]) -> str:
    if match_ending([text], paths):
        return (
            f"adapter.target_modules={text} is a regular expression for whole paths and matches none; "
            f"for all modules of that name write adapter.target_modules=[{text}]"
        )
    example = f", such as {paths[0]}" if paths else ""
    hint = nearest(text, [*TARGET_PRESETS, *(f"[{name}]" for name in available)])
    return (
        f"adapter.target_modules={text} is no preset ({', '.join(TARGET_PRESETS)}){hint} "
        f"and matches nothing as a regular expression for whole paths{example}; {_there_is(available)}"
    )
