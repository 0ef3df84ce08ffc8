"""Data sets of the Hugging Face `datasets` library: on the hub, and in folders written by save_to_disk.

A hub data set is pinned to a commit before anything is read from it, so that two preparations of one run read the same
documents. Every failure of the network, of access or of a name leaves here as one UserError.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distlora.config import SourceConfig, UserError, nearest
from distlora.config.json_files import check_shape, read_object
from distlora.data.files import without_nulls
from distlora.data.formats import Record
from distlora.system.hub_errors import DATASET, causes, explain_gate, explained, unreachable

_MEDIA = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")
"""Features that datasets would decode with libraries of their own; no format has them."""


def resolve_commit(source: SourceConfig) -> str:
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
            print(
                f"cannot reach the hub ({_first_line(error)}); looking for a cached copy", file=sys.stderr, flush=True
            )
            return _cached_commit(source, f"the hub cannot be reached ({_first_line(error)}), and")
    assert commit is not None, "the hub names the commit of every data set"
    return commit


def check_hub(source: SourceConfig, commit: str, *, streaming: bool) -> None:
    """Refuse a configuration or a split that the data set lacks. Reads its file list and card, none of its rows."""
    if streaming and "[" in source.split:
        raise UserError(
            f"split={source.split} takes a slice, for which all of {source.path} must be there; name the split "
            "without a slice, or set data.streaming=false"
        )
    builder = _builder(source, commit)
    data_files = getattr(builder.config, "data_files", None) or {}
    splits = [str(name) for name in (builder.info.splits or data_files)]
    for part in source.split.split("+"):
        name = part.partition("[")[0].strip()
        if splits and name not in splits and name != "all":
            raise UserError(
                f"the data set {source.path} has no split {name!r}{nearest(name, splits)}; "
                f"its splits are {', '.join(splits)}"
            )


class HubDataset:
    """The rows of one split at one commit."""

    def __init__(self, source: SourceConfig, commit: str, *, streaming: bool) -> None:
        self.source = source
        self.commit = commit
        self.streaming = streaming

    def records(self) -> Iterator[Record]:
        """Every row in order. Streaming, nothing is downloaded but what the rows read so far lie in."""
        import datasets

        check_hub(self.source, self.commit, streaming=self.streaming)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        source = self.source
        with _explained(source):
            rows = datasets.load_dataset(
                source.path, source.name, split=source.split, revision=self.commit, streaming=self.streaming
            )
        yield from _records(rows, f"{source.path} {source.split}", source)


class SavedDataset:
    """The rows of a folder that save_to_disk wrote: one data set, or several splits of which one is named."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self.folder = Path(source.path).expanduser()

    def records(self) -> Iterator[Record]:
        """Every row in order, memory-mapped."""
        import datasets

        _check_within(self.folder)
        try:
            saved = datasets.load_from_disk(str(self.folder))
        except Exception as error:
            raise UserError(
                f"{self.folder} holds no data set that can be loaded: {_first_line(error)}; save it again "
                "(save_to_disk), or set {data.path} to files"
            ) from error
        if isinstance(saved, datasets.DatasetDict):
            if self.source.split not in saved:
                raise UserError(
                    f"{self.folder} has no split {self.source.split!r}{nearest(self.source.split, saved)}; its splits "
                    f"are {', '.join(saved)}"
                )
            saved = saved[self.source.split]
        yield from _records(saved, str(self.folder), self.source)

    @staticmethod
    def is_saved(folder: Path) -> bool:
        """Return whether datasets' save_to_disk wrote this folder."""
        return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _check_within(folder: Path) -> None:
    """Raise UserError if a saved data set names splits or files outside its folder, which datasets would read."""
    remedy = "save it again (save_to_disk)"
    folders, place = [folder], folder / "dataset_dict.json"
    if place.is_file():
        values = read_object(place, remedy)
        check_shape(values, {"splits": [str]}, place, remedy)
        _check_names(values["splits"], place, remedy)
        folders = [folder / name for name in values["splits"]]
    for place in (inner / "state.json" for inner in folders):
        if place.is_file():
            values = read_object(place, remedy)
            check_shape(values, {"_data_files": [{"filename": str}]}, place, remedy)
            _check_names([file["filename"] for file in values["_data_files"]], place, remedy)


def _check_names(names: Sequence[str], place: Path, remedy: str) -> None:
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{place} names {name!r}, which does not lie in its folder; {remedy}")


def _records(rows: Any, label: str, source: SourceConfig) -> Iterator[Record]:
    features = rows.features or {}
    media = [name for name, feature in features.items() if type(feature).__name__ in _MEDIA]
    if media:
        rows = rows.remove_columns(media)
    with _explained(source):
        for number, row in enumerate(rows, start=1):
            value = without_nulls(row)
            yield Record(f"{label} row {number}", _num_characters(value), value)


def _num_characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_characters, value.values()))
    return sum(map(_num_characters, value)) if isinstance(value, list) else 0


def _builder(source: SourceConfig, commit: str) -> Any:
    """Return the builder of the data set at `commit`. Raises UserError for an absent or ambiguous configuration."""
    import datasets

    with _explained(source):
        try:
            builder = datasets.load_dataset_builder(source.path, source.name, revision=commit)
        except ValueError as error:
            # datasets' own message for a configuration that is not there, or not named where there are several.
            if "onfig" not in str(error):
                raise
            names = datasets.get_dataset_config_names(source.path, revision=commit)
            said = f"no configuration {source.name!r}{nearest(source.name, names)}" if source.name else "several"
            raise UserError(
                f"the data set {source.path} has {said}; its configurations are {', '.join(names)}: "
                f"set data.name={names[0]}, for example"
            ) from error
    if builder.hash != commit:
        raise UserError(
            f"the cached copy of {source.path} is of commit {builder.hash}, and {commit} is wanted; connect to the "
            f"hub, or set data.revision={builder.hash}"
        )
    return builder


def _cached_commit(source: SourceConfig, why: str) -> str:
    import datasets

    # What HF_HUB_OFFLINE sets: from here on this process reads the cache, and waits for no retries.
    datasets.config.HF_HUB_OFFLINE = True
    try:
        commit: str = datasets.load_dataset_builder(source.path, source.name, revision=source.revision).hash
    except Exception as error:
        raise UserError(
            f"{why} the data set {source.path} is not in the cache of datasets ({_first_line(error)}); connect to the "
            "hub once, or download its files and set {data.path} to their folder (there is none of that name here)"
        ) from error
    if source.revision is not None and not commit.startswith(source.revision) and len(source.revision) >= 7:
        raise UserError(
            f"{why} the cached copy of {source.path} is of commit {commit}, which cannot be checked against "
            f"data.revision={source.revision}; set data.revision={commit}, or connect to the hub"
        )
    return commit


@contextlib.contextmanager
def _explained(source: SourceConfig) -> Iterator[None]:
    """Turn errors of datasets and the Hub into a UserError about this data set."""
    import datasets.exceptions as raised

    try:
        with explained(source.path, source.revision, DATASET):
            yield
    except UserError:
        raise
    except Exception as error:
        # datasets drops the cause when it looks into its cache after a refusal, and leaves its sentence alone.
        if any("is a gated dataset" in str(link) for link in causes(error)):
            raise UserError(explain_gate(source.path, DATASET)) from error
        is_theirs = isinstance(error, (raised.DatasetsError, ValueError, FileNotFoundError, RuntimeError))
        if not is_theirs:
            raise
        raise UserError(
            f"the data set {source.path} cannot be loaded: {_first_line(error.__cause__ or error)}; download "
            "its files and set {data.path} to their folder"
        ) from error


def is_offline() -> bool:
    """Return whether only the cache of datasets is read: HF_HUB_OFFLINE is set or the Hub gave no answer."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
