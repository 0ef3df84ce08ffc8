"""The whole page: one file with its style and script in it, which a browser lets reach nothing else."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files

from distlora.system.numbers import moment
from distlora_launcher.report.markup import (
    Content,
    Html,
    raw,
    tag,
    text,
)


def section(name: str, title: str, *content: Content, note: Content = None) -> Html:
    """A part of the page; nothing where it has no content."""
    inner = text(content)
    if not inner:
        return Html("")
    heading = tag("h2", title, id=name)
    return tag("section", heading, None if note is None else tag("p", note, cls="note"), inner, aria_labelledby=name)


def page(*, kind: str, title: str, state: Content, lead: Sequence[Content], parts: Sequence[tuple[str, Html]]) -> str:
    """A report. `parts`: what the line of links calls each, and the section; those without content are left out."""
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Whatever a run's records hold: nothing is loaded, and no script runs but this one.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    shown = [(name, part) for name, part in parts if part]
    links = [tag("a", name, href=f"#{_id(part)}") for name, part in shown]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} - {kind}"),
        tag("style", raw(style)),
    ]
    written = f"distlora {version('distlora')}, written {moment(time.time())}"
    body = [
        tag(
            "header",
            tag("p", kind, cls="kind"),
            tag("h1", title, " ", state),
            [tag("p", line, cls="lead") for line in lead],
            tag("nav", links, aria_label="parts of the report") if links else None,
        ),
        tag("main", [part for _, part in shown]),
        tag("footer", written),
        tag("script", raw(script)),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def state_badge(state: str, kind: str) -> Html:
    """How it stands: a word, a shape and a colour. `kind`: good, busy, bad, or idle."""
    return tag("span", state, cls=f"state {kind}")


def table(heads: Sequence[Html], rows: Sequence[Html], *, cls: str | None = None) -> Html:
    """A table that scrolls by itself where the page is narrower. `heads`: its th's, if it has any."""
    head = tag("thead", tag("tr", heads)) if heads else None
    return tag("div", tag("table", head, tag("tbody", rows), cls=cls), cls="scroll")


def tiles(values: Iterable[tuple[str, Content, Content]]) -> Html:
    """The figures that matter most, each as (its name, what it is, what belongs to it or None); nothing of none."""
    boxes = [
        tag("div", tag("dt", name), tag("dd", value, None if more is None else tag("small", more)))
        for name, value, more in values
    ]
    return tag("dl", boxes, cls="tiles") if boxes else Html("")


def _id(part: Html) -> str:
    return part.partition('aria-labelledby="')[2].partition('"')[0]
