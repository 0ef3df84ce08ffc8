"""Apply adapter.init_from: the adapter's rank, scale and targets become the run's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distlora.config import TARGET_PRESETS, Config, ModelSpec, UserError
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME, check_fits, check_quantization, read_peft_adapter
from distlora.weights.peft_tokens import check_modules, check_rows


def with_initial_adapter(config: Config, overrides: Iterable[str]) -> Config:
    """Return the settings with those of the adapter at init_from; unchanged if there is none.

    overrides: the command line. Raises UserError for an override that the adapter contradicts.
    """
    if config.adapter.init_from is None:
        return config
    try:
        initial = read_peft_adapter(config.adapter.init_from)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    check_quantization(initial, config.quant.method)
    keys = {word.lstrip("+").partition("=")[0]: word for word in overrides}
    typed = {key.split(".")[1]: word for key, word in keys.items() if key.startswith("adapter.")}
    if keys.get("adapter") == "adapter=dora":
        typed.setdefault("use_dora", keys["adapter"])
    for name, value in initial.settings.items():
        chosen = getattr(config.adapter, name)
        if name in typed and _comparable(chosen) != _comparable(value):
            raise UserError(
                f"{typed[name]} contradicts adapter.init_from={config.adapter.init_from}, whose {name} is "
                f"{_shown(value)} ({CONFIG_NAME}); leave adapter.{name} out, or start without init_from"
            )
    if "init" in typed:
        raise UserError(
            f"{typed['init']} has no effect with adapter.init_from={config.adapter.init_from}, which holds A and B; "
            "leave one of them out"
        )
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **initial.settings))


def check_initial_adapter(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], embedding: tuple[int, ...]) -> None:
    """Refuse an adapter at init_from that does not fit the model's linears and embedding.

    shapes: (out, in) by path. embedding: shape of the embedding's weight.
    """
    if spec.adapter.init_from is None:
        return
    initial = read_peft_adapter(spec.adapter.init_from)
    check_fits(initial, spec.adapter, shapes)
    file, (stored, hidden) = initial.folder / WEIGHTS_NAME, embedding
    check_rows(initial.token_rows, file, stored=stored, hidden=hidden)
    rows = range(stored, stored + len(spec.model.new_tokens) + 1)  # The worker knows how many fit into spare rows.
    check_modules(initial.modules, file, rows=rows, hidden=hidden)
    names = {spec.model.path, spec.model.name}
    if initial.base is not None and Path(initial.base).name not in {Path(name).name for name in names if name}:
        base = spec.model.name or spec.model.path
        print(f"note: the adapter at init_from says that its base is {initial.base}; this run's is {base}", flush=True)


def _comparable(value: Any) -> Any:
    """Return target modules as a set of names."""
    if isinstance(value, str):
        value = TARGET_PRESETS.get(value, value)
    return frozenset(value) if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
