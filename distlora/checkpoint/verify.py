"""`distlora verify RUN`: check that everything in a run folder is whole and belongs together. Needs no torch.

`verify` yields one Item after another, in the order in which a run makes them. It changes nothing, and reads every byte
of the checkpoints, results and packed sequences.
"""

import contextlib
import fcntl
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.safetensors_headers import SINGLE_NAME, Segment, read_header, read_headers
from distlora.checkpoint.state import check_matches, identity_of, load_state
from distlora.config import AdapterConfig, Config, ModelSpec, UserError, require
from distlora.config.file import load_config
from distlora.config.json_files import Shape, check_shape, parse_object, read_object
from distlora.data.files import read_file
from distlora.data.rows import PackedRows, content_digest
from distlora.run_folder.layout import (
    BEST_NAME,
    CHECKPOINTS,
    COMPILED_NAME,
    DATA_NAME,
    EVAL_ANSWERS_NAME,
    MACHINES,
    METRICS_NAME,
    PLAN_NAME,
    PUBLISHED,
    ROLLOUTS_NAME,
    STATE_NAME,
    SUMMARY_NAME,
    TRAINER_NAME,
    answers_files,
    fault,
    read_record,
    step_of,
    steps,
)
from distlora.weights.initial_adapter_file import (
    INITIAL_ADAPTER_NAME,
    base_identity,
    initial_adapter_path,
    read_initial_adapter_record,
)
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME, read_peft_adapter

READ_BYTES = 16 * 2**20
"""Bytes read at a time."""

_DATA: Shape = {"cache": str, "content": str, "splits": {"*": dict}}
_LINE: Shape = {"step": int}
_RECORDS = (SUMMARY_NAME, PLAN_NAME, COMPILED_NAME, "stopped.json", "slurm.json")
_LEFT_OVER = re.compile(r"\..+\.(tmp|old)|\..+-[0-9a-f]{16}|\.config\.yaml\.\d+")
"""Temporary names of atomic_io.py, loading/tensor_files.py and the launcher."""
_EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}
"""(unsigned type, the bits that are all set in NaN and infinities) by safetensors dtype."""
_LORA_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_ADAPTER_TENSOR = re.compile(r"\.lora_([AB]\.weight|magnitude_vector)$")
_FIRST_STATES = ("exp_avg/", "state1/")
"""Prefixes of the optimizer states that have one number per element of a parameter."""


@dataclass(frozen=True, slots=True)
class Item:
    """The result of one check."""

    name: str
    """Path in the run folder."""
    state: Literal["ok", "note", "damaged"]
    """`note`: worth knowing, but no damage."""
    message: str = ""
    """Result of the check; for damage the reason and what to do."""


def verify(run_dir: Path) -> Iterator[Item]:
    """Yield what a run folder holds and what is damaged. Raises UserError for a folder without a run."""
    require((run_dir / "config.yaml").is_file(), f"{run_dir} holds no run (no config.yaml); name a run folder")
    config = None
    try:
        config = load_config(run_dir)
        yield Item("config.yaml", "ok", f"{config.adapter.method} of {config.model.name or config.model.path}")
    except UserError as error:
        yield Item("config.yaml", "damaged", str(error))
    if _is_locked(run_dir):
        yield Item(run_dir.name, "note", "the run is in progress: files being written may look unfinished")
    for name, items in (
        (DATA_NAME, _data(run_dir)),
        (INITIAL_ADAPTER_NAME, _initial_adapter(run_dir, None if config is None else config.spec)),
        (CHECKPOINTS, _checkpoints(run_dir, config)),
        ("results", _results(run_dir, None if config is None else config.adapter)),
        (METRICS_NAME, _files(run_dir)),
        (ROLLOUTS_NAME, _answers(run_dir / ROLLOUTS_NAME)),
        (EVAL_ANSWERS_NAME, _answers(run_dir / EVAL_ANSWERS_NAME)),
    ):
        try:
            yield from items
        except (UserError, OSError) as error:  # The other checks go on.
            yield Item(name, "damaged", str(error))
    for folder in (run_dir, *(run_dir / name for name in (CHECKPOINTS, ROLLOUTS_NAME, EVAL_ANSWERS_NAME))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _LEFT_OVER.fullmatch(path.name):
                message = "left by a process that was killed while writing; delete it, or resume the run"
                yield Item(str(path.relative_to(run_dir)), "note", message)


def _data(run_dir: Path) -> Iterator[Item]:
    """Check data.json and the digest of the packed sequences."""
    path, remedy = run_dir / DATA_NAME, f"make it again with `distlora data prepare {run_dir}`"
    if not path.is_file():
        yield Item(DATA_NAME, "note", f"missing: the data is not prepared; {remedy}, or resume the run")
        return
    record = read_record(path)
    check_shape(record, _DATA, path, remedy)
    splits = sorted(record["splits"])
    if not set(splits) <= {"train", "eval"}:
        raise UserError(f"{path} is damaged: it names the splits {', '.join(splits)}; {remedy}")
    cache = Path(record["cache"])
    if not cache.is_dir():
        message = f"its packed sequences are missing in {cache}; the next start prepares them again"
        yield Item(DATA_NAME, "note", message)
        return
    counts = {split: len(PackedRows.open(cache, split)) for split in splits}
    if content_digest(cache, splits) != record["content"]:
        yield Item(
            DATA_NAME,
            "damaged",
            f"the packed sequences in {cache} have another SHA-256 than those of this run; delete that folder and "
            f"{remedy}",
        )
        return
    yield Item(DATA_NAME, "ok", ", ".join(f"{count:,} {split} sequences" for split, count in counts.items()))


def _initial_adapter(run_dir: Path, spec: ModelSpec | None) -> Iterator[Item]:
    """Check the digest of RUN/initial_adapter.safetensors."""
    if spec is None:
        return
    model, adapter = spec.model, spec.adapter
    if not initial_adapter_path(run_dir).is_file():
        if adapter.decomposes:
            yield Item(INITIAL_ADAPTER_NAME, "note", "missing: the first start creates it")
        return
    base = CheckpointFiles(model.path) if Path(model.path).is_dir() else None
    record = read_initial_adapter_record(run_dir, adapter, base)
    assert record is not None
    yield Item(INITIAL_ADAPTER_NAME, "ok", f"{record.method}{'' if base else ', its base is not on this node'}")


def _checkpoints(run_dir: Path, config: Config | None) -> Iterator[Item]:
    """Check each saved step: every byte against the manifest, its step number, and that it is this run's."""
    folders = steps(run_dir / CHECKPOINTS)
    if not folders:
        yield Item(CHECKPOINTS, "note", "nothing is saved yet")
        return
    base = None
    if config is not None and not Path(config.model.path).is_dir():
        message = f"model.path={config.model.path} is not on this node: the base's weights are not checked"
        yield Item("base", "note", message)
    elif config is not None:
        try:
            base = base_identity(CheckpointFiles(config.model.path), config.adapter, run_dir)
        except UserError as error:
            yield Item("base", "damaged", str(error))
    data: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # Reported by `_data`.
        data = read_record(run_dir / DATA_NAME)
    for folder in folders:
        name, reason = f"{CHECKPOINTS}/{folder.name}", fault(folder)
        if reason is None:
            try:
                _check_state(folder, config, data, base)
            except UserError as error:
                reason = str(error)
        if reason is None:
            size = sum(path.stat().st_size for path in folder.iterdir())
            yield Item(name, "ok", f"{size / 2**20:,.1f} MiB as saved")
        else:
            remedy = "a resume uses the newest complete checkpoint, so delete this folder or restore a copy"
            yield Item(name, "damaged", f"{reason}; {remedy}")


def _check_state(folder: Path, config: Config | None, data: Mapping[str, Any], base: str | None) -> None:
    """Raise UserError if a whole checkpoint contradicts its name, the config, data.json (`data`) or the base.

    `base`: the base's identity; None if it is not on this node.
    """
    state = load_state(folder)
    if state.progress.step != step_of(folder):
        raise UserError(f"{STATE_NAME} records step {state.progress.step}")
    manifest = read_object(folder / "manifest.json", "restore a complete copy")
    if manifest.get("base_fingerprint") != state.identity.base_fingerprint:
        raise UserError(f"manifest.json and {STATE_NAME} name different bases")
    if config is None:
        return
    if isinstance(data.get("content"), str):
        identity = identity_of(
            config,
            data_digest=data["content"],
            base_identity=base or state.identity.base_fingerprint,
        )
        check_matches(state, folder, identity, reference=config.reference_setting)
    is_adapter = config.adapter.method == "lora"
    trained = read_header(folder / (WEIGHTS_NAME if is_adapter else SINGLE_NAME))
    states = read_header(folder / TRAINER_NAME)
    first = {name: segment for name, segment in states.items() if name.startswith(_FIRST_STATES)}
    if is_adapter:
        _check_adapter(folder, trained, config.adapter, times=1)
        trained = {name: segment for name, segment in trained.items() if _ADAPTER_TENSOR.search(name)}
        first = {name: segment for name, segment in first.items() if ".adapters." in name}
    numbers = _numel(trained) - (_num_copied(folder, config.adapter) if is_adapter else 0)
    if _numel(first) != numbers:
        raise UserError(
            f"{TRAINER_NAME} has optimizer states of {_numel(first):,} parameters, and {numbers:,} are trained"
        )


def _results(run_dir: Path, adapter: AdapterConfig | None) -> Iterator[Item]:
    """Check RUN/best, RUN/adapter and RUN/model: headers, finite values, and adapter_config.json."""
    for name in (BEST_NAME, *PUBLISHED.values()):
        folder = run_dir / name
        if not folder.is_dir():
            continue
        try:
            is_model = (folder / "config.json").is_file()
            require(is_model or (folder / WEIGHTS_NAME).is_file(), f"it holds no {WEIGHTS_NAME}")
            tensors = read_headers(folder) if is_model else read_header(folder / WEIGHTS_NAME)
            if (folder / CONFIG_NAME).is_file():
                _check_adapter(folder, tensors, adapter, times=2 if adapter is not None and adapter.pissa else 1)
            bad = next((tensor for tensor, segment in tensors.items() if not is_finite(segment)), None)
            require(bad is None, f"{bad} holds NaN or infinities")
            yield Item(name, "ok", f"{len(tensors):,} tensors, {_numel(tensors):,} numbers")
        except (UserError, OSError) as error:
            remedy = f"publish it again: remove the folder and `distlora resume {run_dir}`"
            yield Item(name, "damaged", f"{error}; {remedy}")


def _files(run_dir: Path) -> Iterator[Item]:
    """Check the lines of metrics.jsonl and samples.jsonl, and that the other records are JSON objects."""
    for name in (METRICS_NAME, "samples.jsonl"):
        if (run_dir / name).is_file():
            yield _check_lines(run_dir / name, rising=name == METRICS_NAME)
    for name in _RECORDS:
        if (run_dir / name).is_file():
            try:
                read_object(run_dir / name, "move it out of the run folder")
                yield Item(name, "ok")
            except UserError as error:
                yield Item(name, "damaged", str(error))


def _answers(folder: Path) -> Iterator[Item]:
    """Read the files of sampled answers, which a resume does not need."""
    counts = []
    for path in answers_files(folder).values():
        try:
            counts.append(sum(1 for _ in read_file(path, "", "auto")))
        except UserError as error:
            yield Item(f"{folder.name}/{path.name}", "damaged", f"{error}; or delete it: no step needs it")
    if counts:
        yield Item(folder.name, "ok", f"{sum(counts):,} answers in {len(counts):,} files")


def _is_locked(run_dir: Path) -> bool:
    """Return whether a launcher holds the run: it locks its record (distlora_launcher/launch/lock.py)."""
    for path in (run_dir / MACHINES).glob("*.json"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # The launcher has just removed it, or a file system without locks.
            continue
    return False


def _check_lines(path: Path, *, rising: bool) -> Item:
    remedy = "move it out of the run folder: a resume writes on without it"
    lines = path.read_bytes().split(b"\n")
    cut_off = lines.pop()
    last: dict[bool, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_object(line, f"line {number}", remedy)
            check_shape(entry, _LINE, f"line {number}", remedy)
        except UserError as error:
            return Item(path.name, "damaged", str(error))
        is_evaluation, step = "eval_loss" in entry, entry["step"]
        before = last.get(is_evaluation)
        if rising and before is not None and step <= before:
            category = "evaluation of step" if is_evaluation else "line of step"
            message = f"line {number} is the {category} {step}, but follows that of step {before}; {remedy}"
            return Item(path.name, "damaged", message)
        last[is_evaluation] = step
    if cut_off:
        message = f"its last line is truncated by a kill, {len(lines):,} lines are complete; a resume removes it"
        return Item(path.name, "note", message)
    return Item(path.name, "ok", f"{len(lines):,} lines" + (f" to step {max(last.values()):,}" if last else ""))


def _numel(tensors: Mapping[str, Segment]) -> int:
    return sum(segment.numel for segment in tensors.values())


def _check_adapter(folder: Path, tensors: Mapping[str, Segment], adapter: AdapterConfig | None, *, times: int) -> None:
    """Raise UserError if adapter_config.json, the tensors' shapes and the run's settings contradict each other.

    `times`: the published rank divided by the run's rank (2 for PiSSA's plain LoRA).
    """
    path, shape = folder / CONFIG_NAME, {"peft_type": str, "r": int, "use_rslora": bool, "use_dora": bool}
    values = read_object(path, "restore a complete copy", shape)
    if adapter is not None:
        wanted = {"r": adapter.r * times, "use_rslora": adapter.use_rslora, "use_dora": adapter.use_dora}
        for name, value in wanted.items():
            if values[name] != value:
                raise UserError(f"{CONFIG_NAME} has {name}={values[name]}, and config.yaml means {value}")
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, segment in tensors.items():
        if match := _LORA_FACTOR.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = segment.shape
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or len(pair["A"]) != 2 or len(pair["B"]) != 2 or pair["A"][0] != pair["B"][1]:
            raise UserError(f"lora_A and lora_B of {module} do not fit each other")
        rank = pair["A"][0]
        # The rank of experts is the sum over all of them.
        if adapter is not None and ".experts" not in module and rank != adapter.rank_of(module) * times:
            raise UserError(f"{module} has rank {rank}, and config.yaml means {adapter.rank_of(module) * times}")


def _num_copied(folder: Path, adapter: AdapterConfig) -> int:
    """Return how many numbers of the file repeat a factor that all experts of a weight share."""
    tensors = read_peft_adapter(folder, labels=None).tensors if adapter.expert_sharing != "none" else {}
    shared = ((path, segment.numel) for (path, part), segment in tensors.items() if part == adapter.shared_factor(path))
    # Rows of A are those of all experts; a linear's are its rank.
    return sum(numel - numel * adapter.rank_of(path) // tensors[path, "A"].shape[0] for path, numel in shared)


def is_finite(segment: Segment) -> bool:
    """Return whether a tensor in a file holds no NaN and no infinity; integers never do."""
    floats = _EXPONENTS.get(segment.dtype)
    if floats is None:
        return True
    dtype, exponent = np.dtype(floats[0]), floats[1]
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
