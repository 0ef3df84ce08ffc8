"""Numbers as people read them. Imports no torch."""

import time


def size(nbytes: float) -> str:
    """Three digits and a unit of 1000s: `57.8 GB`."""
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def count(number: float) -> str:
    """`70.6 billion`."""
    for name, unit in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def number(value: float, digits: int = 4) -> str:
    """`2.103`, `12,346`, `2.5e-05`: so many digits, or all those of a large whole number."""
    if value == 0 or 1e-3 <= abs(value) < 10 ** (digits - 1) - 0.5:
        return f"{value:.{digits}g}"
    if 1e-3 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits - 1}g}"


def length(seconds: float) -> str:
    """Return a length of time in its largest units: `0.4 s`, `12 s`, `3 min`, `2 h 05 min`, `5 days`."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.0f} days"


def clock(seconds: float) -> str:
    """Return a time of the clock's form: `2:31`, `1:02:31`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def moment(seconds: float) -> str:
    """Return a point in time, in UTC."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # A damaged record's.
        return "an unknown time"
