"""The one process that tokenizes: a run's data files to a cache entry, before any worker starts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distlora.config import Config, DataConfig, UserError
from distlora.config_file import load_config
from distlora.data.cache import cache_key, new_entry
from distlora.data.corpus import Corpus
from distlora.data.formats import Document, read_documents, resolve_format
from distlora.data.hashing import HELD_OUT, hash64
from distlora.data.packing import build_rows, pack
from distlora.data.rows import FORMAT_VERSION, TRAINED, PackedRows, read_meta, split_file
from distlora.data.templates import Encoder
from distlora.durable import write_json

_BATCH_DOCUMENTS, _BATCH_BYTES = 1024, 2_000_000
"""Where a batch for the tokenizer ends: enough for all its threads, little enough to bound memory."""
_PROGRESS_SECONDS = 3.0


def prepare(config: Config) -> Path:
    """The cache entry of a run's data, made if it is not there yet: returns its folder.

    Progress goes to stderr. Raises UserError for a broken line, for a tokenizer that cannot do the format, and for
    a split in which no token is trained.
    """
    data = config.data
    model_dir = Path(config.model.path).expanduser()
    if not model_dir.is_dir():
        raise UserError(f"model.path={config.model.path} is not a folder; set model.path to a local Hugging Face model")
    paths = {"train": Path(data.path).expanduser()}
    if data.eval_path is not None:
        paths["eval"] = Path(data.eval_path).expanduser()
    formats = {split: resolve_format(path, data.format) for split, path in paths.items()}
    settings: dict[str, Any] = {"sequence_length": data.sequence_length, "formats": formats}
    if data.eval_path is None and data.eval_fraction > 0:  # Otherwise neither has any effect on the rows.
        settings |= {"eval_fraction": data.eval_fraction, "seed": config.train.seed}
    stamps = [_stamp(path) for path in paths.values()]
    cache_dir = Path(data.cache_dir).expanduser().absolute()
    entry = cache_dir / cache_key(list(paths.values()), model_dir, settings)
    if not entry.is_dir():
        with new_entry(cache_dir, entry.name) as folder:
            _build(folder, data, paths, model_dir, settings)
            if stamps != [_stamp(path) for path in paths.values()]:
                raise UserError(f"{' or '.join(map(str, paths.values()))} changed while it was read; start again")
    for split in read_meta(entry)["splits"]:
        PackedRows.open(entry, split)  # A damaged entry is named here, not by every worker.
    return entry


def prepare_run(run_dir: str | Path) -> dict[str, Any]:
    """Prepare the data of RUN/config.yaml and write RUN/data.json: {"cache": folder, "reused": bool, ...meta.json}.

    Returns what it wrote. Raises UserError as `prepare` does, and for a folder without a run.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir)
    started = time.time()
    entry = prepare(config)
    meta = read_meta(entry)
    record = {"cache": str(entry), "reused": meta["created"] < started, **meta}
    write_json(run_dir / "data.json", record)
    return record


def open_split(run_dir: str | Path, split: str) -> PackedRows | None:
    """The rows of `train` or `eval` that RUN/data.json names; None for `eval` where nothing is held out."""
    path = Path(run_dir) / "data.json"
    if not path.is_file():
        raise UserError(f"{run_dir} has no prepared data (no data.json); run `python -m distlora.data {run_dir}`")
    record = json.loads(path.read_text())
    return PackedRows.open(Path(record["cache"]), split) if split in record["splits"] else None


def held_out(usable: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which documents are held out: those whose hash of (seed, index) is among the lowest `fraction` of all hashes.

    `usable` and the result are (D,) bool over the documents of a file; a usable one has a trained token. With few
    documents the fraction may hit none of these: then the one with the lowest hash is held out, if another remains.
    """
    hashes = hash64((HELD_OUT, seed), len(usable))
    chosen = hashes < np.uint64(int(fraction * 2**53) << 11)
    if fraction > 0 and not (chosen & usable).any() and np.count_nonzero(usable) > 1:
        candidates = np.flatnonzero(usable)
        chosen[candidates[np.argmin(hashes[candidates])]] = True
    return chosen


def _build(folder: Path, data: DataConfig, paths: dict[str, Path], model_dir: Path, settings: dict[str, Any]) -> None:
    """Write a whole cache entry into `folder`."""
    tokenizer = _load_tokenizer(model_dir)
    corpora: dict[str, Corpus] = {}
    for split, path in paths.items():
        format = settings["formats"][split]
        corpora[split] = Corpus(folder / f"{split}_documents", data.sequence_length, splits_long=format == "text")
        encoder = Encoder(tokenizer, format, str(path), str(model_dir))
        for batch in _batches(path, format):
            corpora[split].append(encoder.encode(batch))
    pad = next(
        (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
    )  # Any valid token does: nothing attends to padding from a document, and no label is on it.
    train = corpora["train"]
    usable = train.pieces_of > 0
    if not usable.any():
        raise _untrainable("train", data, train)
    selected = {split: np.ones(corpus.num_documents, bool) for split, corpus in corpora.items()}
    if data.eval_path is None and data.eval_fraction > 0:
        corpora["eval"] = train
        selected["eval"] = held_out(usable, data.eval_fraction, settings["seed"])
        selected["train"] = ~selected["eval"]
    splits = {}
    for split, corpus in corpora.items():
        if not (selected[split] & (corpus.pieces_of > 0)).any():
            raise _untrainable(split, data, corpus)
        splits[split] = _write_split(folder, split, corpus, selected[split], pad)
    _check_vocabulary(model_dir, max(counts["largest_token"] for counts in splits.values()))
    for split in paths:
        corpora[split].delete()
    meta = {
        "version": FORMAT_VERSION,
        "created": time.time(),
        "sequence_length": data.sequence_length,
        "pad_token_id": pad,
        "settings": settings,
        "data": {split: str(path.absolute()) for split, path in paths.items()},
        "model": str(model_dir.absolute()),
        "splits": splits,
    }
    write_json(folder / "meta.json", meta)


def _load_tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer  # Seconds of imports, which a reused cache does not pay.

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    # A damaged file shows as whatever its reader trips over, and tokenizers raises plain Exceptions.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise UserError(f"model.path={model_dir} holds no tokenizer that can be loaded: {reason}") from error


def _batches(path: Path, format: str) -> Iterator[list[Document]]:
    """The documents of a file in batches for the tokenizer; a line on stderr every few seconds says how far it is."""
    total = path.stat().st_size
    started = reported = time.monotonic()
    num_documents = done = 0
    batch: list[Document] = []
    batch_bytes = 0
    for document in read_documents(path, format):
        batch.append(document)
        batch_bytes += document.num_bytes
        if len(batch) < _BATCH_DOCUMENTS and batch_bytes < _BATCH_BYTES:
            continue
        yield batch
        num_documents, done = num_documents + len(batch), done + batch_bytes
        batch, batch_bytes = [], 0
        now = time.monotonic()
        if now - reported >= _PROGRESS_SECONDS:
            reported = now
            print(
                f"tokenizing {path.name}: {num_documents:,} documents, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB "
                f"({done / total:.0%}), {done / 1e6 / (now - started):.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )
    if batch:
        yield batch


def _write_split(folder: Path, split: str, corpus: Corpus, selected: np.ndarray, pad: int) -> dict[str, int]:
    """Pack the selected documents ((D,) bool) of a corpus into the three files of a split; return its counts."""
    lengths = corpus.lengths
    of_split = selected[corpus.documents]
    packing = pack((np.cumsum(lengths) - lengths)[of_split], lengths[of_split], corpus.sequence_length)
    shape = (packing.num_rows, corpus.sequence_length)

    def new_file(name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        return np.lib.format.open_memmap(split_file(folder, split, name), mode="w+", dtype=dtype, shape=shape)

    tokens = new_file("tokens", np.int32, shape)
    flags = new_file("flags", np.uint8, shape)
    targets = new_file("targets", np.int32, shape[:1])
    largest = 0
    for rows, row_tokens, row_flags in build_rows(packing, *corpus.read(), pad):
        tokens[rows], flags[rows] = row_tokens, row_flags
        targets[rows] = np.count_nonzero(row_flags & TRAINED, axis=1)
        largest = max(largest, int(row_tokens.max()))
    pieces_of = corpus.pieces_of[selected]
    num_tokens = int(packing.lengths.sum())
    return {
        "documents": int(np.count_nonzero(pieces_of)),
        "rows": packing.num_rows,
        "tokens": num_tokens,
        "targets": int(targets.sum(dtype=np.int64)),
        "padding": packing.num_rows * corpus.sequence_length - num_tokens,
        "truncated": int(np.count_nonzero(corpus.truncated[selected] & (pieces_of > 0))),
        "dropped": int(np.count_nonzero(pieces_of == 0)),
        "split": int(np.count_nonzero(pieces_of > 1)),
        "pieces": int(pieces_of.sum()),
        "largest_token": largest,
    }


def _check_vocabulary(model_dir: Path, largest_token: int) -> None:
    """Refuse a tokenizer of another model, whose tokens the embedding lacks: on a GPU that is a device assertion."""
    path = model_dir / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text())
    vocab_size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if vocab_size is not None and largest_token >= vocab_size:
        raise UserError(
            f"the tokenizer in {model_dir} writes the token {largest_token}, beyond vocab_size={vocab_size} in "
            f"{path}; put the tokenizer of this model into the folder"
        )


def _untrainable(split: str, data: DataConfig, corpus: Corpus) -> UserError:
    """Why a split has nothing to train on or to evaluate, and what to change."""
    num_dropped = int(np.count_nonzero(corpus.pieces_of == 0))
    cut = int(np.count_nonzero(corpus.truncated))
    if num_dropped == corpus.num_documents:
        path = data.eval_path if split == "eval" and data.eval_path is not None else data.path
        advice = "every chat needs an assistant turn, every completion and text some content"
        if cut:
            advice = f"{cut:,} were truncated before it: raise data.sequence_length={data.sequence_length}"
        return UserError(f"{path}: none of its {corpus.num_documents:,} documents has a token to train; {advice}")
    usable = corpus.num_documents - num_dropped
    kept = "none was left to train on" if split == "train" else "none could be held out for evaluation"
    return UserError(
        f"{data.path}: with data.eval_fraction={data.eval_fraction} and {usable:,} documents that have a token to "
        f"train, {kept}; set data.eval_fraction={'0.05' if split == 'train' else '0'}, add documents, or name "
        "held-out ones with data.eval_path"
    )


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
