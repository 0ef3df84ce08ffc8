"""Rows of data sets in the library `datasets`, those of the hub and those that save_to_disk wrote, to records.

Imports `datasets` in functions only: the launcher checks the head of every source before anything starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distlora.config import SourceConfig, UserError, nearest
from distlora.config.json_files import read_object
from distlora.data.files import without_nulls
from distlora.data.formats import SourceRecord
from distlora.system.hub_errors import DATASET, explained

_MEDIA = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh")
"""Features that datasets would decode with libraries of their own."""


def saved_records(source: SourceConfig, *, images: bool) -> Iterator[SourceRecord]:
    """Yield every row of a folder that save_to_disk wrote: one data set, or several splits of which one is named."""
    import datasets

    folder = Path(source.path).expanduser()
    _check_within(folder)
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(
            f"{folder} holds no data set that can be loaded: {first_line(error)}; save it again (save_to_disk), or "
            "set {data.path} to files"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if source.split not in saved:
            raise UserError(
                f"{folder} has no split {source.split!r}{nearest(source.split, saved)}; its splits are "
                f"{', '.join(saved)}"
            )
        saved = saved[source.split]
    yield from records_of_rows(saved, str(folder), source, images=images)


def _check_within(folder: Path) -> None:
    """Raise UserError if a saved data set names splits or files outside its folder, which datasets would read."""
    remedy = "save it again (save_to_disk)"

    def check_names(names: Sequence[str], place: Path) -> None:
        for name in names:
            if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
                raise UserError(f"{place} names {name!r}, which does not lie in its folder; {remedy}")

    folders, place = [folder], folder / "dataset_dict.json"
    if place.is_file():
        values = read_object(place, remedy, {"splits": [str]})
        check_names(values["splits"], place)
        folders = [folder / name for name in values["splits"]]
    for place in (inner / "state.json" for inner in folders):
        if place.is_file():
            values = read_object(place, remedy, {"_data_files": [{"filename": str}]})
            check_names([file["filename"] for file in values["_data_files"]], place)


def records_of_rows(rows: Any, label: str, source: SourceConfig, *, images: bool) -> Iterator[SourceRecord]:
    """Yield rows; images stay encoded. Raises UserError for a column of other media, or of images that are not read."""
    features = rows.features or {}
    media = [name for name, feature in features.items() if any(f"{kind}(" in repr(feature) for kind in _MEDIA)]
    for name in media:
        is_images = images and not any(f"{kind}(" in repr(features[name]) for kind in _MEDIA if kind != "Image")
        if name in source.ignore_columns:
            rows = rows.remove_columns(name)
        elif is_images:
            rows = rows.cast_column(name, _undecoded(features[name]))
        else:
            raise UserError(
                f"{label}: the column {name!r} holds media, which only vision and audio models read: images with "
                "data.images=true, others not yet. To train on the text alone, set data.ignore_columns="
                f"[{','.join(media)}]"
            )
    with dataset_errors(source):
        for number, row in enumerate(rows, start=1):
            value = without_nulls(row)
            size = len(str({key: item for key, item in value.items() if key not in media}))
            yield SourceRecord(f"{label} row {number}", size, value)


def _undecoded(feature: Any) -> Any:
    """Return a feature whose images stay the bytes and paths that the data set holds."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {key: _undecoded(item) for key, item in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded(feature.feature))
    return feature


@contextlib.contextmanager
def dataset_errors(source: SourceConfig) -> Iterator[None]:
    """Turn errors of datasets and the Hub into a UserError about this data set."""
    import datasets.exceptions as raised

    try:
        with explained(source.path, source.revision, DATASET):
            yield
    except UserError:
        raise
    except Exception as error:
        is_theirs = isinstance(error, (raised.DatasetsError, ValueError, FileNotFoundError, RuntimeError))
        if not is_theirs:
            raise
        raise UserError(
            f"the data set {source.path} cannot be loaded: {first_line(error.__cause__ or error)}; download "
            "its files and set {data.path} to their folder"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
