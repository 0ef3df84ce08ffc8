"""Render a report: jinja2 templates with every value escaped, in one file that loads nothing from elsewhere."""

from __future__ import annotations

import json
import re
import time
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from distlora import __version__
from distlora.system.numbers import count, length, moment, number, size

if TYPE_CHECKING:
    import jinja2

STATE_CLASSES = {
    "done": "good",
    "complete": "good",
    "running": "busy",
    "queued": "busy",
    "ending": "busy",
    "failed": "bad",
    "ended": "bad",
}
"""CSS class of each state; the others are idle."""

_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)
"""Control characters, lone surrogates, and marks that reverse the direction of the text after them."""


def render(template: str, **values: Any) -> str:
    """Render templates/`template` as a whole page."""
    written = f"distlora {__version__}, written {moment(time.time())}"
    return _environment().get_template(template).render(written=written, **values)


def visible(text: str) -> str:
    r"""Write out the characters of a text that cannot be seen, as in "\u202e"."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def as_text(value: Any) -> str:
    """Return a setting's value in full."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shorten(value: Any, limit: int = 40) -> str:
    """Return a setting's value for a table of trials."""
    text = f"{value:.6g}" if isinstance(value, float) else as_text(value)
    return text if len(text) <= limit else f"{text[: limit - 2]}..."


def loss(value: float) -> str:
    """Return a loss with the digits that the terminal shows."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def difference(planned: float, measured: float) -> str:
    """Return how far a measurement is from its plan, as in `+2.1 %`."""
    return "" if planned == 0 else f"{measured / planned - 1:+.1%}".replace("%", " %")


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files(__package__).joinpath("templates", name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {
        "size": size,
        "count": count,
        "duration": length,
        "number": number,
        "loss": loss,
        "as_text": as_text,
        "shorten": shorten,
        "markdown": _markdown,
        "state_class": lambda state: STATE_CLASSES.get(state, "idle"),
    }
    return environment


def _markdown(lines: list[str]) -> Any:
    """Render Markdown of a sweep's results: tables, lists, code; no links, images or HTML."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    return Markup(parser.render(visible("\n".join(lines))))
