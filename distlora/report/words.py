"""Numbers as people read them."""

from __future__ import annotations

import time

from distlora.plan.pages.words import count, size
from distlora.report.scales import Kind

__all__ = ["count", "difference", "figure", "length", "loss", "moment", "number", "size", "tick"]


def number(value: float, digits: int = 4) -> str:
    """`2.103`, `12,346`, `2.5e-05`: so many digits, or all those of a large whole number."""
    if value == 0 or 1e-3 <= abs(value) < 10 ** (digits - 1) - 0.5:
        return f"{value:.{digits}g}"
    if 1e-3 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits - 1}g}"


def loss(value: float) -> str:
    """As the terminal has it."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def figure(value: float, kind: Kind) -> str:
    """A value of a chart."""
    return size(value) if kind == "bytes" else f"{value:.1%}" if kind == "share" else number(value)


def tick(value: float, step: float, kind: Kind) -> str:
    """The name of a round value on an axis whose values are `step` apart."""
    if kind == "bytes":
        return size(value)
    if kind == "share":
        return f"{value:.{0 if step >= 0.01 else 1}%}"
    if abs(value) < step * 1e-6:
        return "0"
    if abs(value) >= 1e6 or step < 1e-4:
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    decimals = 0
    while decimals < 5 and abs(round(step, decimals) - step) > 1e-9 * step:
        decimals += 1
    return f"{value:,.{decimals}f}"


def length(seconds: float) -> str:
    """A length of time: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`, `5.2 days`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{seconds / 86400:.3g} days"


def moment(seconds: float) -> str:
    """A point in time, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # A damaged record's.
        return "an unknown time"


def difference(planned: float, measured: float) -> str:
    """How far a measurement is from its plan: `+2.1 %`."""
    return "" if planned == 0 else f"{measured / planned - 1:+.1%}".replace("%", " %")
