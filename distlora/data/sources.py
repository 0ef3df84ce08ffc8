"""Sources of documents: files, folders, data sets that save_to_disk wrote and the Hub, behind one `DataSource`.

Imports neither torch nor transformers nor numpy, and `datasets` only for what needs it: the launcher checks the head of
every source before anything starts. A Hub data set is pinned to a commit before anything is read from it, so that two
preparations of one run read the same documents. Every failure of the network, of access or of a name is one UserError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import DataConfig, SourceConfig, UserError, nearest, require
from distlora.config.base import is_hub_name
from distlora.config.errors import FILES
from distlora.config.objectives import DataForm
from distlora.data.answers import reads, to_answers
from distlora.data.dataset_rows import dataset_errors, first_line, records_of_rows, saved_records
from distlora.data.files import is_compressed, is_data_file, read_file
from distlora.data.formats import (
    Document,
    ReadOptions,
    SourceRecord,
    good,
    keys_of_messages,
    resolve_format,
    to_document,
)
from distlora.data.image_records import images_of
from distlora.data.json_values import listed
from distlora.system.atomic_io import sha256
from distlora.system.hub_errors import DATASET, explained, unreachable


def _resolve_commit(source: SourceConfig) -> str:
    """Return the commit that `source.revision` means now: one request, no data.

    Without a network, with a hub that is down, or with HF_HUB_OFFLINE=1, the commit of the copy that datasets has
    cached. Raises UserError for no such data set or revision, for a gated one without access, and for one that is
    neither reachable nor cached.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _cached_commit(source, "HF_HUB_OFFLINE is set, and")
    with explained(source.path, source.revision, DATASET):
        try:
            commit = HfApi().dataset_info(source.path, revision=source.revision, timeout=30).sha
        except Exception as error:
            if not unreachable(error):
                raise
            print(f"cannot reach the hub ({first_line(error)}); looking for a cached copy", file=sys.stderr, flush=True)
            return _cached_commit(source, f"the hub cannot be reached ({first_line(error)}), and")
    assert commit is not None, "the hub names the commit of every data set"
    return commit


def _check_hub(source: SourceConfig, commit: str, *, streaming: bool) -> None:
    """Refuse a configuration or a split that the data set lacks. Reads its file list and card, none of its rows."""
    import datasets

    if streaming and "[" in source.split:
        raise UserError(
            f"split={source.split} takes a slice, for which all of {source.path} must be there; name the split "
            "without a slice, or set data.streaming=false"
        )
    with dataset_errors(source):
        try:
            builder = datasets.load_dataset_builder(source.path, source.name, revision=commit)
        except ValueError as error:
            # datasets' own message for a configuration that is not there, or not named where there are several.
            if "onfig" not in str(error):
                raise
            names = datasets.get_dataset_config_names(source.path, revision=commit)
            problem = f"no configuration {source.name!r}{nearest(source.name, names)}" if source.name else "several"
            raise UserError(
                f"the data set {source.path} has {problem}; its configurations are {', '.join(names)}: "
                f"set data.name={names[0]}, for example"
            ) from error
    if builder.hash != commit:
        raise UserError(
            f"the cached copy of {source.path} is of commit {builder.hash}, and {commit} is wanted; connect to the "
            f"hub, or set data.revision={builder.hash}"
        )
    data_files = getattr(builder.config, "data_files", None) or {}
    splits = [str(name) for name in (builder.info.splits or data_files)]
    for name, _ in _split_parts(source.split):
        if splits and name not in splits and name != "all":
            raise UserError(
                f"the data set {source.path} has no split {name!r}{nearest(name, splits)}; "
                f"its splits are {', '.join(splits)}"
            )


def hub_records(source: SourceConfig, commit: str, *, streaming: bool, images: bool = False) -> Iterator[SourceRecord]:
    """Yield every row of a split in order. Streaming, nothing is downloaded but what the rows read so far lie in."""
    import datasets

    _check_hub(source, commit, streaming=streaming)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with dataset_errors(source):
        rows = datasets.load_dataset(source.path, source.name, split=source.split, revision=commit, streaming=streaming)
    yield from records_of_rows(rows, f"{source.path} {source.split}", source, images=images)


def _cached_commit(source: SourceConfig, why: str) -> str:
    import datasets

    # What HF_HUB_OFFLINE sets: from here on this process reads the cache, and waits for no retries.
    datasets.config.HF_HUB_OFFLINE = True
    try:
        commit: str = datasets.load_dataset_builder(source.path, source.name, revision=source.revision).hash
    except Exception as error:
        raise UserError(
            f"{why} the data set {source.path} is not in the cache of datasets ({first_line(error)}); connect to the "
            "hub once, or download its files and set {data.path} to their folder (no such folder exists on this node)"
        ) from error
    if source.revision is not None and not commit.startswith(source.revision) and len(source.revision) >= 7:
        raise UserError(
            f"{why} the cached copy of {source.path} is of commit {commit}, which cannot be checked against "
            f"data.revision={source.revision}; set data.revision={commit}, or connect to the hub"
        )
    return commit


_SPLIT_NAMES = re.compile(r"(?:^|[/._-])(train|training|test|testing|valid|validation|val|dev|eval)(?:[/._-]|$)", re.I)
_PATTERN = re.compile(r"[*?]|\[[^\]]*\]")
"""A pattern that a shell would expand."""
_STREAM_HEAD = 1 << 20
"""Bytes at the start of a streamed file that its fingerprint is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
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
    images: bool = False
    """Read the images of chats."""
    unread: Counter[str] = field(default_factory=Counter)
    """Number of records in which nothing read a key, so far; see `Document.unread`."""
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

    def head(self) -> DataSource:
        """Return the source for reading its first documents: a Hub data set is streamed if possible."""
        whole = self.commit is None or set("[+") & set(self.config.split) or self.config.split == "all"
        if whole:
            return self
        import datasets

        # Set, too, where the hub gave no answer.
        return self if datasets.config.HF_HUB_OFFLINE else dataclasses.replace(self, streaming=True)

    def records(self) -> Iterator[SourceRecord]:
        """Yield all records in order."""
        if self.commit is not None:
            yield from hub_records(self.config, self.commit, streaming=self.streaming, images=self.images)
        elif self.is_saved:
            yield from saved_records(self.config, images=self.images)
        else:
            for path in self.files:
                yield from read_file(path, good(self.config.format), self.config.sample_by)

    def open(self, has_template: bool, form: DataForm = "documents") -> tuple[str, Iterator[Document]]:
        """Return the format, resolved by the first record, and all documents. Raises UserError without a record.

        `form`: what a record is to the objective.
        """
        records = self.records()
        first = next(records, None)
        if first is None:
            raise UserError(
                f"{self.config.path} holds no document (an empty file or blank lines only); {good(self.config.format)}"
            )
        config, head = self.config, [first]
        if config.reasoning_key is not None:
            head = head_with_key(itertools.chain(head, records), config.reasoning_key)
        reading = ReadOptions(
            config.columns,
            config.ignore_columns,
            config.reasoning_key,
            judged=form == "judged",
            images=self.images,
            image_root=None if self.commit is not None else self._root,
        )
        format = resolve_format(first, config.format, reading)
        return format, self._documents(itertools.chain(head, records), format, has_template, reading)

    def _documents(
        self, records: Iterator[SourceRecord], format: str, has_template: bool, reading: ReadOptions
    ) -> Iterator[Document]:
        convert = to_answers if reads(format, reading) else to_document
        for record in records:
            document = convert(record, format, has_template, reading)
            self.unread.update(document.unread)
            yield document

    def fingerprint(self, form: DataForm = "documents") -> dict[str, Any]:
        """Return what decides the documents, as plain JSON for the cache key, without the place of local files.

        Local files count with all their bytes; streamed files with size, time and first MiB, since they may be too
        large to read twice. A Hub data set counts with its commit.
        """
        config = self.config
        settings: dict[str, Any] = {"columns": dict(config.columns), "split": config.split}
        settings |= {"ignore_columns": list(config.ignore_columns)} if config.ignore_columns else {}
        settings |= {"reasoning_key": config.reasoning_key} if config.reasoning_key is not None else {}
        if self.commit is not None:
            hub = {"hub": config.path, "name": config.name, "commit": self.commit, "format": config.format}
            return settings | hub
        settings |= {"sample_by": config.sample_by} if self.has_text else {}
        format = self.open(has_template=False)[0] if not self.is_saved else config.format
        settings |= {"images": self._images(form)} if self.images else {}
        return settings | {"files": [self._digest(path) for path in self.files], "format": format}

    @property
    def _root(self) -> Path:
        path = Path(self.config.path).expanduser().absolute()
        return path if path.is_dir() else path.parent

    def _images(self, form: DataForm) -> str:
        """Return a digest of the names, sizes and times of the local images, and note these two for each."""
        found: dict[str, tuple[int, int]] = {}
        for document in self.open(True, form)[1]:
            for side in (document.value, *(item for item in document.value.values() if isinstance(item, dict))):
                for image in images_of(side.get("messages", ())):
                    if isinstance(image, str) and image not in found:
                        found[image] = _stamp(Path(image))
        self.unread.clear()  # The preparation counts them again.
        self._stamps.update({Path(image): stamp for image, stamp in found.items()})
        named = {os.path.relpath(image, self._root): stamp for image, stamp in found.items()}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return the source's entry in data.json: enough to find it again."""
        names = ("path", "name", "split", "revision")
        return {name: getattr(self.config, name) for name in names} | {"commit": self.commit}

    def check_unchanged(self) -> None:
        """Refuse files that changed since the source was found: what was read would fit no fingerprint."""
        for path, stamp in self._stamps.items():
            if not path.exists() or _stamp(path) != stamp:
                raise UserError(f"{path} changed while it was read; start again")

    def _digest(self, path: Path) -> Any:
        if self.streaming:
            with path.open("rb") as file:
                return [*_stamp(path), hashlib.sha256(file.read(_STREAM_HEAD)).hexdigest()]
        return sha256(path)


def head_with_key(records: Iterator[SourceRecord], key: str) -> list[SourceRecord]:
    """Return the records up to the first of which a message has `key`. Raises UserError if 1,000 have none."""
    head, keys = list[SourceRecord](), set[str]()
    for record in itertools.islice(records, 1000):
        head.append(record)
        keys |= keys_of_messages(list(record.value.values()) if isinstance(record.value, dict) else None)
        if key in keys:
            return head
    place = head[0].place
    raise UserError(
        f"{place}: data.reasoning_key={key} is a key of no message in {len(head):,} records{nearest(key, keys)}; the "
        f"keys there are {listed(dict.fromkeys(sorted(keys)))}; correct it, or leave it out"
    )


def find_sources(data: DataConfig, pinned: Mapping[str, str] | None = None) -> dict[str, list[DataSource]]:
    """Return the sources of each split that has its own: train, and eval where held-out documents are named.

    `pinned` holds commits of hub data sets from an earlier start. Raises UserError for a source that cannot be found,
    for documents that two of them share, and for sample_by where nothing is plain text.
    """
    field = "data.sources" if data.sources else "data.path"
    found: dict[str, Any] = {"streaming": data.streaming, "images": data.images, "pinned": pinned}
    training = [find_source(source, field, **found) for source in data.training_sources]
    held_out = data.held_out_source
    named = [find_source(held_out, "data.eval_path", **found)] if held_out is not None else []
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


def _shared(first: DataSource, second: DataSource) -> str | None:
    """Return the name of a file or split that both sources read; None where they share no document.

    Files are compared by inode. Splits of a data set are compared by name; a shared name is refused unless both
    take different slices of it, whose overlap is not checked.
    """
    if first.commit is not None and second.commit is not None:
        if (first.config.path, first.config.name or "default") != (second.config.path, second.config.name or "default"):
            return None
        for name, rows in _split_parts(first.config.split):
            for other_name, other_part in _split_parts(second.config.split):
                overlap = name == other_name or "all" in (name, other_name)
                if overlap and (rows in (name, other_part) or other_part == other_name):
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
    config: SourceConfig,
    field: str = "data.path",
    *,
    streaming: bool = False,
    images: bool = False,
    pinned: Mapping[str, str] | None = None,
) -> DataSource:
    """Find the source that the setting `field` names. Reads no document.

    The hub is asked for the commit of a data set that is not pinned.

    Raises UserError for what is neither here nor on the hub, a kind that cannot be read, an empty folder, and a folder
    whose files are the splits of one data set.
    """
    if is_hub_name(config.path):
        commit = (pinned or {}).get(_pin_name(config.path, config.revision)) or _resolve_commit(config)
        label = f"{config.path} {config.split}"
        return DataSource(config=config, label=label, commit=commit, streaming=streaming, images=images)
    path = Path(config.path).expanduser()
    if not path.exists():
        raise _absent(path, field)
    is_saved = path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    for setting, value in (("name", config.name), ("revision", config.revision)):
        if value is not None:
            raise UserError(
                f"data.{setting}={value} belongs to a data set on the hub, and {path} is local; leave it out"
            )
    if config.split != "train" and not is_saved:
        raise UserError(
            f"{path} is local and has one split, train, not {config.split!r}; name the file that holds it instead"
        )
    require(
        not (streaming and images),
        f"data.streaming=true reads a part of {path}, and data.images=true checks all of its images; set one to false",
    )
    files = _files(path, field, is_saved)
    return DataSource(
        config=config,
        label=path.name,
        files=files,
        is_saved=is_saved,
        streaming=streaming,
        images=images,
        _stamps={file: _stamp(file) for file in files},
    )


def _absent(path: Path, field: str) -> UserError:
    folder = next((parent for parent in path.parents if not _PATTERN.search(str(parent))), path.parent)
    if _PATTERN.search(str(path)):
        return UserError(
            f"{{{field}}}={path} does not exist, and patterns are not expanded; name the folder, {folder}, whose files "
            "are all read, or list the files in data.sources=[{path: FILE}, {path: FILE}]"
        )
    siblings = os.listdir(path.parent) if path.parent.is_dir() else []
    hint, cure = (
        nearest(path.name, siblings, cutoff=FILES),
        "name a file, a folder, or a data set on the hub (org/name)",
    )
    return UserError(f"{{{field}}}={path} does not exist{hint}; {cure}")


def check_sources(
    data: DataConfig, *, limit: int, pinned: Mapping[str, str] | None = None, form: DataForm = "documents"
) -> list[str | None]:
    """Find every source, trained on and held out, and check its first `limit` documents; the resolved formats.

    Of a hub data set only the name, the configuration and the split are checked, and the format is None: its rows are
    not here yet. One that is pinned was read before and is not asked for again.
    """
    formats: list[str | None] = []
    for source in itertools.chain(*find_sources(data, pinned).values()):
        if source.commit is not None:
            if _pin_name(source.config.path, source.config.revision) not in (pinned or {}):
                _check_hub(source.config, source.commit, streaming=source.streaming)
            formats.append(None)
            continue
        format, documents = source.open(True, form)
        for _ in itertools.islice(documents, limit):
            pass
        formats.append(format)
    return formats


def _files(path: Path, field: str, is_saved: bool) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise UserError(f"{{{field}}}={path} is neither a file nor a folder; name one of them")
    inside = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(folder.startswith(".") for folder in file.relative_to(path).parts)
    )
    if is_saved:
        return tuple(inside)
    files = [file for file in inside if is_data_file(file)]
    if not files:
        formats = "jsonl, json, parquet, csv, tsv or txt"
        raise UserError(f"{{{field}}}={path} holds no file of a known format ({formats}); name the data")
    named = {str(file.relative_to(path)): _SPLIT_NAMES.search(file.relative_to(path).as_posix()) for file in files}
    splits = {match[1].lower() for match in named.values() if match}
    if any(name.startswith("train") for name in splits) and not all(name.startswith("train") for name in splits):
        other = next(name for name, match in named.items() if match and not match[1].lower().startswith("train"))
        first = next(name for name, match in named.items() if match and match[1].lower().startswith("train"))
        raise UserError(
            f"{{{field}}}={path} holds several splits, and all of its files would be read; set {{data.path}}="
            f"{path / first} and {{data.eval_path}}={path / other}"
        )
    return tuple(files)


def _identity(path: Path) -> tuple[int, int]:
    """Equal for all names of one file: links, and ways through other folders."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
