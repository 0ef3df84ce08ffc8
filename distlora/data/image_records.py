"""Images of records: parts of a content, columns and placeholders in texts, all to parts that hold their image.

An image is the path of a local file (str) or its encoded bytes. A canonical message with images has a list as content:
{"type": "text", "text": str} and {"type": "image", "image": str | bytes}. Imports neither torch nor numpy.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.data.json_values import expect

COLUMNS = ("images", "image")
"""Keys of a record that hold its images: a list, or a single one."""
PART_TYPES = ("image", "image_url", "input_image")
"""Types of a content's parts that are images, in the words of OpenAI's APIs and of Hugging Face."""
MARKER = "<image>"
"""Text that stands for an image in the data of LLaVA and LLaMA-Factory."""
_PART_KEYS = ("image", "image_url", "path", "url", "base64", "bytes", "value")
"""Keys of an image part that may hold the image."""


def image_part(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of one of PART_TYPES in canonical form; its image is None if it is one of the record's column."""
    key = next((key for key in _PART_KEYS if part.get(key)), None)
    image = None if key is None else part[key]
    if key == "base64" and isinstance(image, str) and not image.startswith("data:"):
        image = f"data:;base64,{image}"
    return {"type": "image", "image": image}


def joined_parts(parts: Sequence[str | dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return texts as one text, or, if there are images among them, as parts."""
    if all(isinstance(part, str) for part in parts):
        return "".join(str(part) for part in parts)
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def images_of(messages: Sequence[dict[str, Any]]) -> tuple[str | bytes, ...]:
    """Return the images of canonical messages, in their order."""
    contents = (message["content"] for message in messages if isinstance(message.get("content"), list))
    return tuple(part["image"] for content in contents for part in content if part["type"] == "image")


def refuse_images(messages: Sequence[dict[str, Any]], place: str, cure: str) -> None:
    """Raise UserError for an image in canonical messages, which ends with `cure`."""
    for index, message in enumerate(messages):
        if isinstance(message.get("content"), list):
            raise UserError(f"{place}: messages[{index}]: a part of 'content' is an image; {cure}")


def with_images(form: dict[str, Any], record: dict[str, Any], place: str, root: Path | None) -> dict[str, Any]:
    """Return a canonical document whose messages hold the images of their record.

    A part without an image, or MARKER in a text, takes the next of the record's column; without any such place, the
    images stand before the first message of the user. Both answers of a pair have all of them. `root`: folder of
    relative paths; None: the data lies on a server. Raises UserError for images outside of a chat or in the assistant's
    turns, for more or fewer places than images, and for an image that is no local file.
    """
    column = [image for key in COLUMNS for image in _listed(record.get(key)) if image]
    sides = {key: form[key] for key in ("chosen", "rejected", "answer") if isinstance(form.get(key), dict)}
    chats = [side for side in (form, *sides.values()) if "messages" in side]
    if column and not chats:
        raise UserError(
            f'{place}: images belong to chats, and this record is none; write it as {{"messages": [...], "images": '
            "[...]}, or leave the images unread with data.ignore_columns"
        )
    if "messages" in form:
        return form | {"messages": _placed(form["messages"], column, place, root)}
    placed = {
        key: side | {"messages": _placed(side["messages"], column, f"{place}, {key}", root)}
        for key, side in sides.items()
        if "messages" in side
    }
    return form | placed


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _placed(messages: list[Any], column: list[Any], place: str, root: Path | None) -> list[Any]:
    parted = [_parts(message.get("content")) for message in messages]
    places = sum(part.get("image", part) is None for parts in parted for part in parts)
    own = sum(part.get("image") is not None for parts in parted for part in parts)
    if column and not places and not own:
        first = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
        parted[first] = [{"type": "image", "image": None} for _ in column] + parted[first]
        places = len(column)
    if places != len(column):
        raise UserError(
            f"{place}: {places} places for images ({MARKER} in a text, or a part without a file) and {len(column)} "
            "images in the record's 'images'; give each image its place"
        )
    images, result = iter(column), []
    for index, (message, parts) in enumerate(zip(messages, parted, strict=True)):
        if not any(part["type"] == "image" for part in parts):
            result.append(message)
            continue
        where = f"{place}: messages[{index}]"
        if message["role"] == "assistant":
            raise UserError(f"{where}: an image in the assistant's turn cannot be trained on; move it to the user's")
        filled = [
            part
            if part["type"] == "text"
            else part | {"image": _image(next(images) if part["image"] is None else part["image"], where, root)}
            for part in parts
        ]
        result.append(message | {"content": filled})
    return result


def _parts(content: Any) -> list[dict[str, Any]]:
    """Return a content as parts, with an image part in the place of each MARKER."""

    def split() -> Iterator[dict[str, Any]]:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            if part["type"] == "image":
                yield part
                continue
            for number, text in enumerate(part["text"].split(MARKER)):
                if number:
                    yield {"type": "image", "image": None}
                if text:
                    yield {"type": "text", "text": text}

    return list(split())


def _image(image: Any, where: str, root: Path | None) -> str | bytes:
    """Return the path or the bytes of an image as data holds it: a path, a data: URL, or {"bytes", "path", "url"}."""
    if isinstance(image, dict):
        image = next((image[key] for key in ("bytes", "path", "url") if image.get(key)), None)
    if isinstance(image, bytes):
        return image
    text: str = expect(image, str, f"{where}: an image", "write the path of a file, or a data: URL with base64")
    if text.startswith("data:"):
        header, _, content = text.partition(",")
        try:
            return base64.b64decode(content if header.endswith(";base64") else "?", validate=True)
        except binascii.Error as error:
            raise UserError(f"{where}: the data: URL of an image is not base64 ({error}); encode it again") from error
    if text.startswith(("http:", "https:")):
        raise UserError(
            f"{where}: the image {text[:200]} lies on a server, and a run that reads the network cannot be repeated; "
            "download the images, and name their files"
        )
    if root is None:
        raise UserError(
            f"{where}: the image {text[:200]} is a file, and the data set lies on the hub; use a data set whose column "
            "has the feature Image, or download it"
        )
    path = root / Path(text.removeprefix("file://")).expanduser()
    if not path.is_file():
        raise UserError(
            f"{where}: there is no image {path}; relative paths begin at the folder of the data, so put the images "
            "there, or write absolute paths"
        )
    return str(path)
