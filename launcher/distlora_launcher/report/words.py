"""The figures of a page, as people read them."""

from __future__ import annotations

from distlora.system.numbers import number, size
from distlora_launcher.report.scales import Kind


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


def difference(planned: float, measured: float) -> str:
    """How far a measurement is from its plan: `+2.1 %`."""
    return "" if planned == 0 else f"{measured / planned - 1:+.1%}".replace("%", " %")
