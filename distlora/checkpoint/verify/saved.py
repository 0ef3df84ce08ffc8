"""What a run has saved: checkpoints by their manifests, and what it has published by headers and values."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distlora.checkpoint.identity import identity_of
from distlora.checkpoint.state import check_matches, load_state
from distlora.checkpoint.verify.items import (
    Item,
    damaged,
    note,
    ok,
)
from distlora.config import AdapterConfig, Config, UserError
from distlora.config.json_files import check_shape, read_object
from distlora.run_folder.checkpoints import (
    STATE_NAME,
    TRAINER_NAME,
    fault,
    step_of,
    steps,
)
from distlora.run_folder.layout import (
    BEST_NAME,
    CHECKPOINTS,
    DATA_NAME,
    PUBLISHED,
    read_record,
)
from distlora.weights.peft.folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.segments import (
    SINGLE_NAME,
    Segment,
    read_header,
    read_headers,
)
from distlora.weights.start_file import base_identity

READ_BYTES = 16 * 2**20
"""Of a file, at once."""

_EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
"""(unsigned type, the bits that are all set in NaN and infinities) of safetensors' dtypes."""
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_OF_ADAPTERS = re.compile(r"\.lora_([AB]\.weight|magnitude_vector)$")
_MOMENTS = ("exp_avg/", "state1/")
"""Of the optimizers: has a number for each element of a parameter."""


def check_checkpoints(run_dir: Path, config: Config | None) -> Iterator[Item]:
    """Each saved step: every byte by the manifest, its step, and whether it is this run's."""
    folders = steps(run_dir / CHECKPOINTS)
    if not folders:
        yield note(CHECKPOINTS, "nothing is saved yet")
        return
    base = None
    if config is not None and not Path(config.model.path).is_dir():
        yield note("base", f"model.path={config.model.path} is not here: whether it is still the same cannot be seen")
    elif config is not None:
        try:
            base = base_identity(config)
        except UserError as error:
            yield damaged("base", str(error))
    data: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # It has an item of its own.
        data = read_record(run_dir / DATA_NAME)
    for folder in folders:
        name = f"{CHECKPOINTS}/{folder.name}"
        found = fault(folder)
        if found is None:
            try:
                _check_state(folder, config, data, base)
            except UserError as error:
                found = str(error)
        if found is None:
            size = sum(path.stat().st_size for path in folder.iterdir())
            yield ok(name, f"{size / 2**20:,.1f} MiB as saved")
        else:
            yield damaged(
                name, f"{found}; a resume uses the newest whole one, so delete this folder or put a copy back"
            )


def _check_state(folder: Path, config: Config | None, data: Mapping[str, Any], base: str | None) -> None:
    """UserError where a checkpoint is whole and not what its name, the config, data.json (`data`) or the base say.
    `base`: None where it is not here.
    """
    state = load_state(folder)
    if state.progress.step != step_of(folder):
        raise UserError(f"{STATE_NAME} says step {state.progress.step}")
    manifest = read_object(folder / "manifest.json", "put a whole copy back")
    if manifest.get("base_fingerprint") != state.identity.base_fingerprint:
        raise UserError(f"manifest.json and {STATE_NAME} name different bases")
    if config is None:
        return
    if isinstance(data.get("content"), str):
        identity = identity_of(config, data, base=base or state.identity.base_fingerprint)
        check_matches(state, folder, identity, init_from=config.adapter.init_from)
    if config.adapter.method == "full":
        trained = read_header(folder / SINGLE_NAME)
    else:
        trained = read_header(folder / WEIGHTS_NAME)
        _check_adapter(folder, trained, config.adapter, times=1)
        trained = {name: segment for name, segment in trained.items() if _OF_ADAPTERS.search(name)}
    moments = read_header(folder / TRAINER_NAME)
    first = {name: segment for name, segment in moments.items() if name.startswith(_MOMENTS)}
    if config.adapter.method == "lora":
        first = {name: segment for name, segment in first.items() if ".adapters." in name}
    if _numel(first) != _numel(trained):
        raise UserError(
            f"{TRAINER_NAME} has moments of {_numel(first):,} parameters, and {_numel(trained):,} are trained"
        )


def _numel(tensors: Mapping[str, Segment]) -> int:
    return sum(segment.numel for segment in tensors.values())


def check_results(run_dir: Path, config: Config | None) -> Iterator[Item]:
    """RUN/best, RUN/adapter, RUN/model: headers, values that are numbers, and adapter_config.json against them."""
    for name in (BEST_NAME, *PUBLISHED.values()):
        folder = run_dir / name
        if not folder.is_dir():
            continue
        try:
            tensors = read_headers(folder) if (folder / "config.json").is_file() else read_header(_weights(folder))
            if (folder / CONFIG_NAME).is_file():
                adapter = None if config is None else config.adapter
                _check_adapter(folder, tensors, adapter, times=2 if adapter is not None and adapter.pissa else 1)
            odd = next((tensor for tensor, segment in tensors.items() if not is_finite(segment)), None)
            if odd is not None:
                raise UserError(f"{odd} holds NaN or infinities")
            yield ok(name, f"{len(tensors):,} tensors, {_numel(tensors):,} numbers")
        except (UserError, OSError) as error:
            yield damaged(name, f"{error}; publish it again: remove the folder and `distlora resume {run_dir}`")


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"it holds no {WEIGHTS_NAME}")
    return path


def _check_adapter(folder: Path, tensors: Mapping[str, Segment], adapter: AdapterConfig | None, *, times: int) -> None:
    """UserError where adapter_config.json, the tensors' shapes and the run's settings do not fit each other. `times`:
    how often the run's rank the published one is (PiSSA's plain LoRA: twice)."""
    path, remedy = folder / CONFIG_NAME, "put a whole copy back"
    values = read_object(path, remedy)
    check_shape(values, {"peft_type": str, "r": int, "use_rslora": bool, "use_dora": bool}, path, remedy)
    if adapter is not None:
        wanted = {"r": adapter.r * times, "use_rslora": adapter.use_rslora, "use_dora": adapter.use_dora}
        for name, value in wanted.items():
            if values[name] != value:
                raise UserError(f"{CONFIG_NAME} has {name}={values[name]}, and config.yaml means {value}")
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, segment in tensors.items():
        if match := _TENSOR.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = segment.shape
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != 2 or len(pair["B"]) != 2 or pair["A"][0] != pair["B"][1]:
            raise UserError(f"lora_A and lora_B of {module} do not fit each other")
        rank = pair["A"][0]
        # Of experts it is that of all of them together.
        if adapter is not None and ".experts" not in module and rank != adapter.rank_of(module) * times:
            raise UserError(f"{module} has rank {rank}, and config.yaml means {adapter.rank_of(module) * times}")


def is_finite(segment: Segment) -> bool:
    """Whether a tensor in a file holds no NaN and no infinity; whole numbers never do."""
    kind = _EXPONENTS.get(segment.dtype)
    if kind is None:
        return True
    dtype, exponent = np.dtype(kind[0]), kind[1]
    with segment.file.open("rb") as stream:
        stream.seek(segment.offset)
        left = segment.num_bytes
        while left:
            words = np.frombuffer(stream.read(min(left, READ_BYTES)), dtype)
            if not len(words):
                raise UserError(f"{segment.file} ended while it was read")
            if bool(((words & dtype.type(exponent)) == dtype.type(exponent)).any()):
                return False
            left -= words.nbytes
    return True
