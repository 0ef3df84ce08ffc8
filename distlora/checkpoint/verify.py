"""`distlora verify RUN`: whether everything in a run folder is whole and belongs together. Imports no torch.

`verify` gives one Item after the other as it has looked at them, in the order in which a run makes them. It changes
nothing, and reads every byte of what the run has saved and of its packed rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distlora.architecture.safetensors_headers import (
    SINGLE_NAME,
    Segment,
    read_header,
    read_headers,
)
from distlora.checkpoint.state import check_matches, identity_of, load_state
from distlora.config import AdapterConfig, Config, UserError, require
from distlora.config.file import load_config
from distlora.config.json_files import (
    Shape,
    check_shape,
    parse_object,
    read_object,
)
from distlora.data.cache import content_digest
from distlora.data.rows import PackedRows
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
    METRICS_NAME,
    PLAN_NAME,
    PUBLISHED,
    SUMMARY_NAME,
    read_record,
)
from distlora.weights.initial_adapter_file import (
    INITIAL_ADAPTER_NAME,
    base_identity,
    initial_adapter_path,
    read_initial_adapter_record,
)
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["Item", "verify"]


def verify(run_dir: Path) -> Iterator[Item]:
    """What a run folder holds, and what is wrong with it. Raises UserError for a folder without a run."""
    require((run_dir / "config.yaml").is_file(), f"{run_dir} holds no run (no config.yaml); name a run folder")
    config = None
    try:
        config = load_config(run_dir)
        yield ok("config.yaml", f"{config.adapter.method} of {config.model.name or config.model.path}")
    except UserError as error:
        yield damaged("config.yaml", str(error))
    if _is_running(run_dir):
        yield note(run_dir.name, "the run is going on: what it is writing now may look unfinished")
    yield from _guarded(DATA_NAME, lambda: check_data(run_dir))
    if config is not None:
        yield from _guarded(INITIAL_ADAPTER_NAME, lambda: _check_start(config))
    yield from _guarded("checkpoints", lambda: check_checkpoints(run_dir, config))
    yield from _guarded("results", lambda: check_results(run_dir, config))
    yield from _guarded(METRICS_NAME, lambda: check_lines(run_dir))
    yield from _guarded(SUMMARY_NAME, lambda: check_summary(run_dir))
    yield from left_over(run_dir)


def _guarded(name: str, check: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """A check's items; what cannot be read at all is damaged, and does not end the others."""
    try:
        yield from check()
    except (UserError, OSError) as error:
        yield damaged(name, str(error))


def _is_running(run_dir: Path) -> bool:
    """Whether launchers hold the run: one exclusively, or several machines together
    (distlora_launcher/running/holding.py)."""
    try:
        with (run_dir / "config.yaml").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # Not ours to write, or a file system without locks.
        return False
    return False


def _check_start(config: Config) -> Iterator[Item]:
    """RUN/initial_adapter.safetensors by its digest, where adapters start from the base's weights."""
    if not initial_adapter_path(config).is_file():
        if config.adapter.decomposes:
            yield note(INITIAL_ADAPTER_NAME, "is not there: the first start makes it")
        return
    with_base = Path(config.model.path).is_dir()
    record = read_initial_adapter_record(config, with_base=with_base)
    assert record is not None
    yield ok(INITIAL_ADAPTER_NAME, f"{record.method}{'' if with_base else ', its base is not here'}")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in a run folder."""

    name: str
    """Its path in the run folder."""
    state: Literal["ok", "note", "damaged"]
    """`note`: worth knowing and no damage."""
    said: str
    """What was found; of damage the reason and what to do."""


def ok(name: str, said: str = "") -> Item:
    return Item(name, "ok", said)


def note(name: str, said: str) -> Item:
    return Item(name, "note", said)


def damaged(name: str, said: str) -> Item:
    return Item(name, "damaged", said)


_DATA: Shape = {"cache": str, "content": str, "splits": {"*": dict}}
_SPLITS = ("train", "eval")
_LINE: Shape = {"step": int}
_SAMPLES_NAME = "samples.jsonl"
_OTHER_RECORDS = (PLAN_NAME, "stopped.json", "slurm.json")
_LEFT_OVER = re.compile(r"\..+\.(tmp|old)|\..+-[0-9a-f]{16}|\.config\.yaml\.\d+")
"""What durable.py, checkpoints/files.py and the launcher write before it gets its name."""


def check_data(run_dir: Path) -> Iterator[Item]:
    """data.json, and the rows that it names, by their digest."""
    path, remedy = run_dir / DATA_NAME, f"make it again with `python -m distlora.data {run_dir}`"
    if not path.is_file():
        yield note(DATA_NAME, f"is not there: the data is not prepared; {remedy}, or resume the run")
        return
    record = read_record(path)
    check_shape(record, _DATA, path, remedy)
    splits = sorted(record["splits"])
    if not set(splits) <= set(_SPLITS):
        raise UserError(f"{path} is damaged: it names the splits {', '.join(splits)}; {remedy}")
    cache = Path(record["cache"])
    if not cache.is_dir():
        yield note(DATA_NAME, f"its packed rows are gone from {cache}; the next start makes them again")
        return
    rows = {split: len(PackedRows.open(cache, split)) for split in splits}
    if content_digest(cache, splits) != record["content"]:
        yield damaged(
            DATA_NAME,
            f"the packed rows in {cache} are not those that the run was prepared with (SHA-256); delete that folder "
            f"and {remedy}",
        )
        return
    counted = ", ".join(f"{number:,} rows to {split}" for split, number in rows.items())
    yield ok(DATA_NAME, counted.replace("to train", "of training").replace("to eval", "held out"))


def check_lines(run_dir: Path) -> Iterator[Item]:
    """metrics.jsonl and samples.jsonl: whole lines, the steps of training and of evaluations each rising."""
    for name in (METRICS_NAME, _SAMPLES_NAME):
        path = run_dir / name
        if path.is_file():
            yield _lines(path, rising=name == METRICS_NAME)


def _lines(path: Path, *, rising: bool) -> Item:
    remedy = "move it out of the run folder: a resume writes on without it"
    content = path.read_bytes()
    lines = content.split(b"\n")
    cut_off = lines.pop()
    last: dict[bool, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_object(line, f"line {number}", remedy)
            check_shape(entry, _LINE, f"line {number}", remedy)
        except UserError as error:
            return damaged(path.name, str(error))
        is_evaluation, step = "eval_loss" in entry, entry["step"]
        before = last.get(is_evaluation)
        if rising and before is not None and step <= before:
            kind = "evaluation of" if is_evaluation else "line of"
            return damaged(
                path.name, f"line {number} is the {kind} step {step}, behind that of step {before}; {remedy}"
            )
        last[is_evaluation] = step
    if cut_off:
        return note(path.name, f"a kill cut off its last line, {len(lines):,} are whole; a resume removes it")
    steps = f" to step {max(last.values()):,}" if last else ""
    return ok(path.name, f"{len(lines):,} lines{steps}")


def check_summary(run_dir: Path) -> Iterator[Item]:
    """summary.json, and the launcher's own records."""
    for name in (SUMMARY_NAME, *_OTHER_RECORDS):
        path = run_dir / name
        if path.is_file():
            try:
                read_object(path, "move it out of the run folder")
                yield ok(name)
            except UserError as error:
                yield damaged(name, str(error))


def left_over(run_dir: Path) -> Iterator[Item]:
    """What a killed process did not finish."""
    for folder in (run_dir, run_dir / CHECKPOINTS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _LEFT_OVER.fullmatch(path.name):
                yield note(
                    str(path.relative_to(run_dir)),
                    "was left by a process that was killed while it wrote; delete it, or let a resume do it",
                )


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
