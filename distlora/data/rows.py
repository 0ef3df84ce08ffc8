"""Packed rows on disk: content-addressed cache entries, published whole, their arrays, and the order of rows in a run.

An entry is a folder that is complete from the moment it has its name: it is written beside it, fsynced and renamed. The
byte layout is in README.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import secrets
import shutil
import time
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distlora.config import UserError
from distlora.config.json_files import Shape, check_shape, read_object
from distlora.config.objectives import OBJECTIVES
from distlora.run_folder.layout import DATA_NAME, read_record
from distlora.system.atomic_io import private_folder, sha256, sync

HELD_OUT, ROW_ORDER, MIXTURE, SAMPLES, PARTS = 1, 2, 3, 4, 5
"""Uses of hashes: the first word, so that no two uses share a stream."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _scramble(state: np.ndarray) -> np.ndarray:
    """Return the output function of splitmix64: a bijection of uint64 that mixes every bit into every other."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash64(words: tuple[int, ...], count: int, start: int = 0) -> np.ndarray:
    """Return uint64 numbers `start` to `start + count`; the i-th depends on `words` (each below 2**64) and i alone."""
    state = np.zeros(1, np.uint64)  # An array, since numpy warns when a uint64 scalar wraps around.
    for word in words:
        state = _scramble((state ^ np.uint64(word)) + _GOLDEN)
    return _scramble(state + np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN)


def below(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Return a mask of the uint64 hashes among the lowest `fraction` of all values."""
    return hashes < np.uint64(int(fraction * 2**53) << 11)


FORMAT_VERSION = 6
"""Grows when the layout or the meaning of a row changes; part of the cache key."""
ARRAYS = ("tokens", "flags", "targets", "pairs")
"""Arrays of a split, a file each."""
DOCUMENTS = "documents"
"""The file with the document of each piece."""
RECORDS = "records"
"""Files of prompts: their JSON lines, and where each ends (int64), in the order of the rows."""
MARGINS = "margins"
"""The file with the margins of a split's pairs, if a record has one."""
TRAINED, STARTS, REJECTED, JUDGED, BAD = 1, 2, 4, 8, 16
"""Bits of a flag: the label at this position is the next token; a document (or the padding) starts here; what starts
here is the rejected answer of a pair, whose chosen one lies right before it; is judged; and is judged bad."""
RIGHT = 32
"""Bit of a flag, beside TRAINED: the label at this position is that of a right step, and not the next token."""
IMAGE = 64
"""Bit of a flag: an embedding of an image replaces the token at this position."""
IMAGES = "images"
"""Files of a split's images: their encoded bytes (.bin), and the table of StoredImages (.npy)."""
IMAGE_COLUMNS = 5
"""Columns of the table of StoredImages."""


EMPTY = -1
"""The index of a row that is not there: pad tokens, no label, the positions of one document."""
_COUNTED = (
    *("documents", "rows", "pairs", "tokens", "targets", "padding", "truncated", "split", "dropped", "dropped_long"),
    *("unused", "pieces", "largest_token"),
)
_SOURCE: Shape = {
    **dict.fromkeys(("documents", "tokens", "targets", "most_copies"), int),
    "share": float,
    "share_wanted": (float, type(None)),
}
_META: Shape = {
    "version": int,
    "created": float,
    "sequence_length": int,
    "pad_token_id": int,
    "objective": str,
    "chats": bool,
    "chat_template": (str, type(None)),
    "settings": dict,
    "content": str,
    "splits": {"*": {**dict.fromkeys(_COUNTED, int), "sources": [_SOURCE]}},
}
"""Fields of meta.json that are read."""


def split_file(folder: Path, split: str, name: str, suffix: str = ".npy") -> Path:
    """Return the file of one of ARRAYS, of DOCUMENTS, MARGINS or RECORDS, of a split in a cache folder."""
    return folder / f"{split}_{name}{suffix}"


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a cache folder. Raises UserError where the folder holds no complete cache of this version."""
    path = folder / "meta.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no tokenized data (no meta.json); run `distlora data prepare RUN`")
    remedy = _make_again(folder)
    meta = read_object(path, remedy, {"version": int})
    if meta["version"] != FORMAT_VERSION:
        raise UserError(
            f"{folder} was written in version {meta['version']} of the layout, this distlora reads "
            f"{FORMAT_VERSION}; run `distlora data prepare RUN` again"
        )
    check_shape(meta, _META, path, remedy)
    return meta


def _make_again(folder: Path) -> str:
    return f"delete {folder} and run `distlora data prepare RUN`"


@dataclass(frozen=True, slots=True)
class Records:
    """Prompts with the columns of their records, read from disk one at a time."""

    content: np.ndarray
    """(bytes of the file,) uint8, memory-mapped: what is deleted meanwhile is still there, as for the other arrays."""
    ends: np.ndarray
    """(N,) int64: where each line ends in the file."""

    @classmethod
    def open(cls, cache_dir: Path, split: str, rows: int) -> Records | None:
        """Open those of a split; None if its documents are no prompts."""
        path = split_file(cache_dir, split, RECORDS, ".jsonl")
        if not path.is_file():
            return None
        ends = _load(split_file(cache_dir, split, RECORDS), (rows,), np.int64)
        if path.stat().st_size != ends[-1]:
            raise UserError(f"{path} is damaged: it is cut short or too long; {_make_again(cache_dir)}")
        return cls(np.memmap(path, mode="r"), ends)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return {"prompt": text or messages, "columns": {...}} of a row."""
        start = int(self.ends[row - 1]) if row else 0
        record: dict[str, Any] = json.loads(self.content[start : int(self.ends[row])].tobytes())
        return record


def image_digest(content: bytes) -> bytes:
    """Return 16 bytes of the BLAKE2b hash of an encoded image."""
    return hashlib.blake2b(content, digest_size=16).digest()


def digest_number(digest: bytes) -> int:
    """Return 63 bits of the digest of an image, for a table of int64."""
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True, slots=True)
class StoredImages:
    """Encoded images of a split, read from disk one at a time."""

    content: np.ndarray
    """(bytes of the file,) uint8, memory-mapped."""
    table: np.ndarray
    """(I, 5) int64, in memory: row, first byte, bytes, tokens and digest of each image, in the tokens' order."""
    folder: Path

    @classmethod
    def open(cls, cache_dir: Path, split: str, count: int) -> StoredImages:
        """Open those of a split. Raises UserError when absent, cut short or misshapen."""
        table = np.array(_load(split_file(cache_dir, split, IMAGES), (count, IMAGE_COLUMNS), np.int64))
        path = split_file(cache_dir, split, IMAGES, ".bin")
        if not path.is_file() or (table[:, 1:3].sum(axis=1) > path.stat().st_size).any() or (table[:, 1:3] < 0).any():
            raise UserError(f"{path} is damaged: it is absent or cut short; {_make_again(cache_dir)}")
        return cls(np.memmap(path, mode="r"), table, cache_dir)

    def of(self, row: int) -> range:
        """Return the numbers of a row's images."""
        first, last = np.searchsorted(self.table[:, 0], [row, row + 1])
        return range(int(first), int(last))

    def read(self, number: int) -> bytes:
        """Return an encoded image. Raises UserError if it has changed."""
        row, start, size, _, digest = self.table[number].tolist()
        content = self.content[start : start + size].tobytes()
        if digest_number(image_digest(content)) != digest:
            place = self.folder
            raise UserError(f"{place} is damaged: an image of row {row:,} has changed; {_make_again(place)}")
        return content

    def largest(self) -> bytes:
        """Return an image with the most tokens, encoded."""
        return self.read(int(self.table[:, 3].argmax()))

    def take(self, rows: np.ndarray) -> StoredImages:
        """Return the images of these rows, (n,) integers, as those of the rows from 0 to n."""
        numbers = [self.of(row) for row in rows.tolist()]
        table = self.table[[number for of_row in numbers for number in of_row]]
        table[:, 0] = np.repeat(np.arange(len(rows)), [len(of_row) for of_row in numbers])
        return replace(self, table=table)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A split of N packed sequences of L tokens, memory-mapped: reading a sequence touches its pages only."""

    tokens: np.ndarray
    """(N, L) int32."""
    flags: np.ndarray
    """(N, L) uint8, bits TRAINED, STARTS, REJECTED, JUDGED, BAD, RIGHT and IMAGE."""
    targets: np.ndarray
    """(N,) int32, in memory: how many labels of each row are trained."""
    pairs: np.ndarray
    """(N,) int32, in memory: how many pairs of a chosen and a rejected answer, or judged answers, lie in each row."""
    pad_token_id: int
    """A valid token of the model, for rows that are not there."""
    counts: dict[str, Any]
    """The split's counts in meta.json."""
    folder: Path | None = None
    """The cache folder; None for sequences made in memory."""
    documents: np.ndarray | None = None
    """(P,) int64: the document that each piece is of, by its number in the data, in the order of the rows and of the
    pieces inside of them; None for rows made in memory."""
    records: Records | None = None
    """The records of prompts, a row each; None for other data."""
    margins: np.ndarray | None = None
    """(N, M) float32: the margin of each pair of a row of at most M, 0 after the last; None if no record has one."""
    classifies: bool = False
    """True if labels are the classes of steps: 1 where the flag is RIGHT, 0 elsewhere."""
    images: StoredImages | None = None
    """The images among the tokens; None: text alone."""

    @classmethod
    def open(cls, cache_dir: Path, split: str) -> PackedRows:
        """Open `train` or `eval` of a cache folder. Raises UserError when absent, cut short or misshapen."""
        cache_dir = Path(cache_dir)
        meta = read_meta(cache_dir)
        if split not in meta["splits"]:
            have = ", ".join(meta["splits"]) or "none"
            raise UserError(f"{cache_dir} holds no {split!r} rows, only {have}; {_make_again(cache_dir)}")
        counts = meta["splits"][split]
        shape = (counts["rows"], meta["sequence_length"])
        return cls(
            tokens=_load(split_file(cache_dir, split, "tokens"), shape, np.int32),
            flags=_load(split_file(cache_dir, split, "flags"), shape, np.uint8),
            targets=np.array(_load(split_file(cache_dir, split, "targets"), shape[:1], np.int32)),
            pairs=np.array(_load(split_file(cache_dir, split, "pairs"), shape[:1], np.int32)),
            pad_token_id=meta["pad_token_id"],
            counts=counts,
            folder=cache_dir,
            documents=_load(split_file(cache_dir, split, DOCUMENTS), (counts["pieces"],), np.int64),
            records=Records.open(cache_dir, split, counts["rows"]),
            margins=_load(split_file(cache_dir, split, MARGINS), (counts["rows"], counts[MARGINS]), np.float32)
            if MARGINS in counts
            else None,
            classifies=meta["objective"] in OBJECTIVES and OBJECTIVES[meta["objective"]].labels > 1,
            images=StoredImages.open(cache_dir, split, counts[IMAGES]) if IMAGES in counts else None,
        )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: np.ndarray) -> PackedRows:
        """Return the sequences of these numbers, (n,) integers, in this order, in memory; `counts` stay the split's."""
        margins = None if self.margins is None else self.margins[indices]
        images = None if self.images is None else self.images.take(indices)
        arrays = {name: getattr(self, name)[indices] for name in ARRAYS}
        return replace(self, documents=None, margins=margins, images=images, **arrays)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, flags) of the rows of these numbers, each (n, L), in memory.

        Raises UserError for rows that have changed since they were counted: a token that the model lacks, or more or
        fewer trained labels and pairs than the step's loss is divided by.
        """
        tokens, flags = np.array(self.tokens[indices]), np.array(self.flags[indices])
        wrong = (tokens.min(axis=1) < 0) | (tokens.max(axis=1) > self.counts.get("largest_token", np.inf))
        for counted, bit in ((self.targets, TRAINED), (self.pairs, REJECTED | JUDGED)):
            wrong |= np.count_nonzero(flags & bit, axis=1) != counted[indices]
        if wrong.any():
            row, place = indices[np.argmax(wrong)], self.folder or Path()
            raise UserError(f"{place} is damaged: row {row:,} is not what was counted; {_make_again(place)}")
        return tokens, flags

    @property
    def sequence_length(self) -> int:
        """Return the tokens per sequence."""
        return self.tokens.shape[1]


@dataclass(eq=False)
class RowOrder:
    """The order of the rows, as a pure function from the step to each rank's rows; holds no position.

    A step takes `global_batch` consecutive rows of the epoch's order, whatever the ranks; the last step of an epoch
    takes what is left. Micro-batch a of rank r takes those from (a * world + r) * micro_batch on, so the rows of a
    step are the same set for every `world` and `micro_batch`; what is missing at the end is empty rows.
    """

    rows: PackedRows
    _: KW_ONLY
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    seed: int
    shuffle: bool
    _order: tuple[int, np.ndarray] | None = field(default=None, init=False)
    """(epoch, order of its rows): computed once an epoch, not once a step."""

    def __post_init__(self) -> None:
        assert len(self.rows) > 0, "a split without rows is refused when it is prepared"
        assert 0 <= self.rank < self.world, f"rank {self.rank} of {self.world}"
        batches = self.global_batch, self.micro_batch
        assert min(batches) > 0, f"batches of {batches} rows"

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every row once."""
        return -(-len(self.rows) // self.global_batch)

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in each step."""
        return -(-self.global_batch // (self.world * self.micro_batch))

    def rows_of_ranks(self, step: int) -> np.ndarray:
        """Return the rows of all ranks in a step: (accumulation, world, micro_batch) int64, -1 for an empty row."""
        return self.deal(self.rows_of_step(step), self.accumulation)

    def deal(self, rows: np.ndarray, accumulation: int | None = None) -> np.ndarray:
        """Return the rows as those of each micro-batch and rank; None: as few micro-batches as hold them."""
        accumulation = accumulation or -(-len(rows) // (self.world * self.micro_batch))
        slots = np.full((accumulation, self.world, self.micro_batch), EMPTY, np.int64)
        slots.reshape(-1)[: len(rows)] = rows
        return slots

    def rows_of_step(self, step: int) -> np.ndarray:
        """Return the rows of all ranks in a step, (n,) int64."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[within * self.global_batch : (within + 1) * self.global_batch]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Return the order of the rows in an epoch: (N,) int64, a permutation keyed by (seed, epoch)."""
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.rows))
            if self.shuffle:
                order = np.argsort(hash64((ROW_ORDER, self.seed, epoch), len(self.rows)), kind="stable")
            self._order = (epoch, order)
        return self._order[1]


def open_split(run_dir: str | Path, split: str) -> PackedRows | None:
    """Return the rows of `train` or `eval` that RUN/data.json names; None for `eval` where nothing is held out."""
    path = Path(run_dir) / DATA_NAME
    if not path.is_file():
        raise UserError(f"{run_dir} has no prepared data (no data.json); run `distlora data prepare {run_dir}`")
    record = read_record(path)
    return PackedRows.open(Path(record["cache"]), split) if split in record["splits"] else None


def _load(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} does not exist; {_make_again(path.parent)}")
    try:
        # And not np.load, which takes a zip file or a pickle for what they are.
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError, OverflowError, tokenize.TokenError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_make_again(path.parent)}") from error
    if array.shape != shape or array.dtype != dtype:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}; {_make_again(path.parent)}"
        )
    return array


TOKENIZER_FILES = (
    "config.json",  # names the tokenizer's class where tokenizer_config.json does not
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Patterns of the files in a model's folder that decide how its tokenizer and chat template behave."""
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template*", "additional_chat_templates/*")
"""Files that can hold a chat template."""

PIXELS_NAME = "pixels.json"
"""File of an entry with images: what makes pixels of them (settings, versions, digests of the processor's files)."""
_ABANDONED_AFTER = 86_400.0
"""Seconds after which a partial entry belongs to a process that was killed: no preparation takes a day."""


def cache_key(
    sources: list[dict[str, Any]], model_dir: Path, settings: dict[str, Any], files: Sequence[str] = TOKENIZER_FILES
) -> str:
    """SHA-256, in 64 hex digits, over the documents and the model's `files`, the settings and the versions.

    `sources` are the fingerprints of where the documents come from (`Source.fingerprint`). `settings` holds plain JSON
    values: all that decide what the rows are, and nothing else. Where files lie does not matter. The versions of
    transformers and tokenizers count, since both have changed tokenizations.
    """
    header = {
        "layout": FORMAT_VERSION,
        "settings": settings,
        "sources": sources,
        "tokenizer": {
            str(path.relative_to(model_dir)): sha256(path)
            for pattern in files
            for path in sorted(model_dir.glob(pattern))
            if path.is_file()
        },
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def content_digest(folder: Path, splits: Sequence[str]) -> str:
    """SHA-256, in hex, over the arrays of an entry: equal where every row of every split is.

    The key of an entry says what it was made from; this says what came of it.
    """
    arrays = (*ARRAYS, MARGINS, IMAGES)
    files = {f"{split}/{name}": split_file(folder, split, name) for split in splits for name in arrays}
    files |= {f"{split}/{RECORDS}": split_file(folder, split, RECORDS, ".jsonl") for split in splits}
    files |= {f"{split}/{IMAGES}.bin": split_file(folder, split, IMAGES, ".bin") for split in splits}
    files[PIXELS_NAME] = folder / PIXELS_NAME
    digests = {name: sha256(file) for name, file in files.items() if file.is_file()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def new_entry(cache_dir: Path, key: str) -> Iterator[Path]:
    """Return a folder to write an entry in; at the end of the block it becomes `cache_dir`/`key`, or nothing at all.

    When another process published the same key meanwhile, ours is thrown away: the contents are equal. After an
    exception ours is removed; after a kill it stays under its temporary name, which nobody opens, until a later
    preparation finds it a day old.
    """
    private_folder(cache_dir)
    for abandoned in cache_dir.glob(".partial-*"):
        # Another preparation may remove or publish it at the same moment.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - abandoned.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(abandoned)
    partial = cache_dir / f".partial-{key[:12]}-{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            sync(path)
        try:
            partial.rename(cache_dir / key)
        except OSError:
            # A folder is not renamed onto one that has files: another process was first.
            if not (cache_dir / key).is_dir():
                raise
        sync(cache_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
