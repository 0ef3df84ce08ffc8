"""HTML that is escaped by construction: what is not `Html` already is text, and shown as text."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

Content = Any
"""Html, a text or number (escaped), None (nothing), or an iterable of these."""

_VOID = frozenset({"meta", "br", "img", "col"})
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)
"""Controls, halves of characters that UTF-8 cannot hold, and marks that would turn the direction of what follows."""


class Html(str):
    """Markup that may stand in the page as it is. Only this module makes any, of what it has escaped."""

    __slots__ = ()


def text(content: Content) -> Html:
    """Any content as markup."""
    if content is None:
        return Html("")
    if isinstance(content, Html):
        return content
    if isinstance(content, (str, int, float)):
        return Html(html.escape(visible(str(content)), quote=True))
    if isinstance(content, Iterable):
        return Html("".join(map(text, content)))
    raise TypeError(f"{type(content).__name__} is no content of a page")


def visible(content: str) -> str:
    """A text that shows as it is: what cannot be seen in it is written out (`\\u202e`)."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], content.replace("\r\n", "\n"))


def tag(name: str, /, *children: Content, **attributes: str | float | bool | None) -> Html:
    """An element. Of an attribute's name `cls` is class, and `_` is `-`; None and False leave it out, True is bare."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{text(value)}"')
    opening = Html(f"<{' '.join(words)}>")
    return opening if name in _VOID else Html(f"{opening}{text(children)}</{name}>")


def data(value: Any) -> Html:
    """Plain values for the page's script, in an element that a browser does not run."""
    plain = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # Nothing in it can end the element or begin a comment; the same JSON to whoever parses it.
    safe = plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Html(f'<script type="application/json">{safe}</script>')


def raw(source: str) -> Html:
    """What this package itself has as a file: its style and its script."""
    return Html(source)
