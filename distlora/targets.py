"""Which linears get an adapter: a preset, a list of module names, or a regular expression, against a model's paths.

Pure Python: the launcher asks about names read off safetensors headers, model surgery about the modules themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from distlora.config import TARGET_PRESETS, UserError, nearest


def select_targets(target_modules: str | tuple[str, ...], names: Iterable[str]) -> list[str]:
    """The paths among `names` that `adapter.target_modules` means, in their order.

    A list's entry means every path that equals it or ends in "." + it (as in PEFT); a string is a preset or a regular
    expression for whole paths. Raises UserError, with what there is, when nothing matches or a list's entry is idle.
    """
    paths = list(names)
    available = sorted({path.rpartition(".")[2] for path in paths})
    if not isinstance(target_modules, str):
        _refuse_idle(target_modules, paths, available)
        return _ending_in(target_modules, paths)
    if target_modules in TARGET_PRESETS:
        selected = _ending_in(TARGET_PRESETS[target_modules], paths)
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


def _ending_in(endings: Iterable[str], paths: list[str]) -> list[str]:
    wanted = tuple(endings)
    dotted = tuple("." + ending for ending in wanted)
    return [path for path in paths if path in wanted or path.endswith(dotted)]


def _refuse_idle(entries: tuple[str, ...], paths: list[str], available: list[str]) -> None:
    for entry in entries:
        if not _ending_in([entry], paths):
            listed = ",".join(entries)
            raise UserError(
                f"adapter.target_modules=[{listed}]: no module is named {entry!r}{nearest(entry, available)}; "
                f"{_there_is(available)}"
            )


def _there_is(available: list[str]) -> str:
    return f"the model has {', '.join(available)}" if available else "the model has no linear in its blocks"


def _no_match(text: str, paths: list[str], available: list[str]) -> str:
    if _ending_in([text], paths):
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
