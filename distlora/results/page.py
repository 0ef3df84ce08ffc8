"""Render a page: jinja2 templates with every value escaped, in one file that loads nothing from elsewhere."""

from __future__ import annotations

import time
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from distlora import __version__
from distlora.results.figures import as_text, visible
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


def render(template: str, **values: Any) -> str:
    """Render templates/`template` as a whole page."""
    written = f"distlora {__version__}, written {moment(time.time())}"
    return _environment().get_template(template).render(written=written, **values)


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
