"""Sources of documents: files, folders, saved data sets and the Hub, behind one `Source`.

Imports neither torch nor transformers nor numpy, and `datasets` only for what needs it: the launcher checks the head
of every source before anything starts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import DataConfig, SourceConfig, UserError, nearest
from distlora.config.errors import FILES
from distlora.config.places import is_hub_name
from distlora.data.files import is_compressed, is_data_file, read_file
from distlora.data.formats import Document, Record, good, resolve_format, to_document
from distlora.data.hub import HubDataset, SavedDataset, check_hub, is_offline, resolve_commit

_SPLIT_NAMES = re.compile(r"(?:^|[/._-])(train|training|test|testing|valid|validation|val|dev|eval)(?:[/._-]|$)", re.I)
_PATTERN = re.compile(r"[*?]|\[[^\]]*\]")
"""A pattern that a shell would expand."""
_STREAM_HEAD = 1 << 20
"""Bytes at the start of a streamed file that its fingerprint is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source that was found and not yet read."""

    config: SourceConfig
    label: str
    """Name for messages: of the file or folder, or of the data set with its split."""
    files: tuple[Path, ...] = ()
    """Local files in the order in which they are read, those of a saved data set included."""
    commit: str | None = None
    """Commit of a Hub data set."""
    is_saved: bool = False
    """A folder that datasets' save_to_disk wrote."""
    streaming: bool = False
    _stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int | None:
        """Size of what is read, for progress; None where it is not known (compressed files, the hub)."""
        if self.commit is not None or any(is_compressed(path) for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    @property
    def has_text(self) -> bool:
        """Return whether it has plain text files, which sample_by splits into documents."""
        return any(".txt" in (suffix.lower() for suffix in path.suffixes) for path in self.files)

    def head(self) -> Source:
        """Return the source for reading its first documents: a Hub data set is streamed if possible."""
        whole = self.commit is None or set("[+") & set(self.config.split) or self.config.split == "all"
        return self if whole or is_offline() else dataclasses.replace(self, streaming=True)

    def records(self) -> Iterator[Record]:
        """Yield all records in order."""
        if self.commit is not None:
            yield from HubDataset(self.config, self.commit, streaming=self.streaming).records()
        elif self.is_saved:
            yield from SavedDataset(self.config).records()
        else:
            for path in self.files:
                yield from read_file(path, self.config.format, self.config.sample_by)

    def open(self, has_template: bool) -> tuple[str, Iterator[Document]]:
        """Return the format, resolved by the first record, and all documents. Raises UserError without a record."""
        records = self.records()
        first = next(records, None)
        if first is None:
            raise UserError(
                f"{self.config.path} holds no document (an empty file or blank lines only); {good(self.config.format)}"
            )
        format = resolve_format(first, self.config.format, self.config.columns)
        columns = self.config.columns
        return format, (
            to_document(record, format, columns, has_template) for record in itertools.chain([first], records)
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the documents, as plain JSON for the cache key, without the place of local files.

        Local files count with all their bytes; streamed files with size, time and first MiB, since they may be too
        large to read twice. A Hub data set counts with its commit.
        """
        settings: dict[str, Any] = {"columns": dict(self.config.columns), "split": self.config.split}
        if self.commit is not None:
            return settings | {
                "hub": self.config.path,
                "name": self.config.name,
                "commit": self.commit,
                "format": self.config.format,
            }
        if self.has_text:
            settings["sample_by"] = self.config.sample_by
        format = self.open(has_template=False)[0] if not self.is_saved else self.config.format
        return settings | {"files": [self._digest(path) for path in self.files], "format": format}

    def describe(self) -> dict[str, Any]:
        """Return the source's entry in data.json: enough to find it again."""
        return {
            "path": self.config.path,
            "name": self.config.name,
            "split": self.config.split,
            "revision": self.config.revision,
            "commit": self.commit,
        }

    def check_unchanged(self) -> None:
        """Refuse files that changed since the source was found: what was read would fit no fingerprint."""
        for path, stamp in self._stamps.items():
            if not path.exists() or _stamp(path) != stamp:
                raise UserError(f"{path} changed while it was read; start again")

    def _digest(self, path: Path) -> Any:
        if self.streaming:
            with path.open("rb") as file:
                return [*_stamp(path), hashlib.sha256(file.read(_STREAM_HEAD)).hexdigest()]
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_sources(data: DataConfig, pinned: Mapping[str, str] | None = None) -> dict[str, list[Source]]:
    """Return the sources of each split that has its own: train, and eval where held-out documents are named.

    `pinned` holds commits of hub data sets from an earlier start. Raises UserError for a source that cannot be found,
    for documents that two of them share, and for sample_by where nothing is plain text.
    """
    field = "data.sources" if data.sources else "data.path"
    training = [find_source(source, field, streaming=data.streaming, pinned=pinned) for source in data.training_sources]
    held_out = data.held_out_source
    named = (
        [find_source(held_out, "data.eval_path", streaming=data.streaming, pinned=pinned)]
        if held_out is not None
        else []
    )
    for number, source in enumerate(training):
        for other in training[:number]:
            if shared := _shared(source, other):
                raise UserError(
                    f"data.sources names {shared} twice, so its held-out documents would be trained on; "
                    "keep one of them (a larger weight repeats it with data.stopping_strategy=all_exhausted)"
                )
        for other in named:
            if shared := _shared(source, other):
                raise UserError(
                    f"{shared} is both trained on and held out; name another data.eval_split or {{data.eval_path}}"
                )
    # Without data.sources one setting is for both the training and the held-out source.
    groups = [[source] for source in [*training, *named]] if data.sources else [[*training, *named]]
    for group in groups:
        sample_by = group[0].config.sample_by
        if sample_by != "auto" and not any(source.has_text for source in group):
            raise UserError(
                f"data.sample_by={sample_by} has no effect: {group[0].config.path} holds no .txt file; leave it out"
            )
    return {"train": training, **({"eval": named} if named else {})}


def _shared(first: Source, second: Source) -> str | None:
    """Return the name of a file or split that both sources read; None where they share no document.

    Files are compared by inode. Splits of a data set are compared by name; a shared name is refused unless both
    take different slices of it, whose overlap is not checked.
    """
    if first.commit is not None and second.commit is not None:
        if (first.config.path, first.config.name or "default") != (second.config.path, second.config.name or "default"):
            return None
        for name, part in _split_parts(first.config.split):
            for other_name, other_part in _split_parts(second.config.split):
                overlap = name == other_name or "all" in (name, other_name)
                if overlap and (part in (name, other_part) or other_part == other_name):
                    return f"{first.config.path} (split {name})"
        return None
    if first.is_saved and second.is_saved and first.config.split != second.config.split:
        return None
    files = {_identity(file) for file in first.files}
    common = next((file for file in second.files if _identity(file) in files), None)
    if common is None or not first.is_saved:
        return None if common is None else str(common)
    return f"{first.config.path} (split {first.config.split})"


def _split_parts(split: str) -> list[tuple[str, str]]:
    """train[:5%]+test -> [(train, train[:5%]), (test, test)]."""
    parts = [part.strip() for part in split.split("+")]
    return [(part.partition("[")[0].strip(), part) for part in parts]


def pinned_commits(run_dir: Path) -> dict[str, str]:
    """Return the commits of hub data sets that an earlier start of this run read, out of RUN/data.json.

    A record that is damaged pins nothing: the preparation makes it again.
    """
    path = run_dir / "data.json"
    if not path.is_file():
        return {}
    try:
        splits = json.loads(path.read_bytes())["splits"].values()
        sources = [source for counts in splits for source in counts["sources"] if source["commit"] is not None]
        pins = {_pin_name(source["path"], source["revision"]): source["commit"] for source in sources}
        return {name: commit for name, commit in pins.items() if isinstance(commit, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _pin_name(path: str, revision: str | None) -> str:
    return f"{path}@{revision or ''}"


def find_source(
    config: SourceConfig, field: str = "data.path", *, streaming: bool = False, pinned: Mapping[str, str] | None = None
) -> Source:
    """Find the source that the setting `field` names. Reads no document.

    The hub is asked for the commit of a data set that is not pinned.

    Raises UserError for what is neither here nor on the hub, a kind that cannot be read, an empty folder, and a folder
    whose files are the splits of one data set.
    """
    if is_hub_name(config.path):
        commit = (pinned or {}).get(_pin_name(config.path, config.revision)) or resolve_commit(config)
        label = f"{config.path} {config.split}"
        return Source(config=config, label=label, commit=commit, streaming=streaming)
    path = Path(config.path).expanduser()
    if not path.exists():
        raise _absent(path, field)
    is_saved = path.is_dir() and SavedDataset.is_saved(path)
    for setting, value in (("name", config.name), ("revision", config.revision)):
        if value is not None:
            raise UserError(
                f"data.{setting}={value} belongs to a data set on the hub, and {path} is local; leave it out"
            )
    if config.split != "train" and not is_saved:
        raise UserError(
            f"{path} is local and has one split, train, not {config.split!r}; name the file that holds it instead"
        )
    files = _files(path, field, is_saved)
    return Source(
        config=config,
        label=path.name,
        files=files,
        is_saved=is_saved,
        streaming=streaming,
        _stamps={file: _stamp(file) for file in files},
    )


def _absent(path: Path, field: str) -> UserError:
    folder = next((parent for parent in path.parents if not _PATTERN.search(str(parent))), path.parent)
    if _PATTERN.search(str(path)):
        return UserError(
            field=field,
            value=str(path),
            reason="does not exist, and patterns are not expanded",
            cure=f"name the folder, {folder}, whose files are all read, or list the files in "
            "data.sources=[{path: FILE}, {path: FILE}]",
        )
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    return UserError(
        field=field,
        value=str(path),
        reason=f"does not exist{nearest(path.name, siblings, cutoff=FILES)}",
        cure="name a file, a folder, or a data set on the hub (org/name)",
    )


def check_sources(data: DataConfig, *, limit: int, pinned: Mapping[str, str] | None = None) -> list[str | None]:
    """Find every source, trained on and held out, and check its first `limit` documents; the resolved formats.

    Of a hub data set only the name, the configuration and the split are checked, and the format is None: its rows are
    not here yet. One that is pinned was read before and is not asked for again.
    """
    found = [source for of_split in find_sources(data, pinned).values() for source in of_split]
    return [_check_head(source, limit, pinned or {}) for source in found]


def _check_head(source: Source, limit: int, pinned: Mapping[str, str]) -> str | None:
    if source.commit is not None:
        if _pin_name(source.config.path, source.config.revision) not in pinned:
            check_hub(source.config, source.commit, streaming=source.streaming)
        return None
    format, documents = source.open(has_template=True)
    for _ in itertools.islice(documents, limit):
        pass
    return format


def _files(path: Path, field: str, is_saved: bool) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise UserError(field=field, value=str(path), reason="is neither a file nor a folder", cure="name one of them")
    inside = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if is_saved:
        return tuple(inside)
    files = [file for file in inside if is_data_file(file)]
    if not files:
        raise UserError(
            field=field,
            value=str(path),
            reason="holds no file of a known kind (jsonl, json, parquet, csv, tsv or txt)",
            cure="name the data",
        )
    named = {str(file.relative_to(path)): _SPLIT_NAMES.search(file.relative_to(path).as_posix()) for file in files}
    splits = {match[1].lower() for match in named.values() if match}
    if any(name.startswith("train") for name in splits) and not all(name.startswith("train") for name in splits):
        other = next(name for name, match in named.items() if match and not match[1].lower().startswith("train"))
        first = next(name for name, match in named.items() if match and match[1].lower().startswith("train"))
        raise UserError(
            field=field,
            value=str(path),
            reason="holds several splits, and all of its files would be read",
            cure=f"set {{data.path}}={path / first} and {{data.eval_path}}={path / other}",
        )
    return tuple(files)


def _identity(path: Path) -> tuple[int, int]:
    """Equal for all names of one file: links, and ways through other folders."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
