"""What reports are drawn with: axes, thinned and smoothed curves, numbers, markup."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distlora.system.numbers import length, number
from distlora_launcher.report.chart import (
    Chart,
    Level,
    Line,
    draw,
)
from distlora_launcher.report.markup import (
    data,
    tag,
    text,
    visible,
)
from distlora_launcher.report.scales import Scale, scale_of
from distlora_launcher.report.series import (
    Series,
    smoothed,
    thinned,
    window_of,
)
from distlora_launcher.report.words import difference, tick
from report_folders import Page

VALUES = st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=60)


@given(values=VALUES, from_zero=st.booleans())
def test_every_value_lies_on_its_axis_and_names_are_round_and_few(values: list[float], from_zero: bool) -> None:
    scale = scale_of(values, from_zero=from_zero)
    assert all(-1e-9 <= scale.place(value) <= 1 + 1e-9 for value in values)
    ticks = scale.ticks()
    assert len(ticks) <= 7
    assert ticks == sorted(ticks)
    assert all(scale.low * (1 - 1e-9) - 1e-9 <= each <= scale.high * (1 + 1e-9) + 1e-9 for each in ticks)


def test_round_values_of_axes() -> None:
    assert Scale(0.0, 1.0).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(5.3, 7.4).ticks() == pytest.approx([5.5, 6.0, 6.5, 7.0])
    assert Scale(0.9, 4000.0, is_log=True).ticks() == pytest.approx([1, 10, 100, 1000])
    assert Scale(1.0, 60.0, is_log=True).ticks() == pytest.approx([1, 2, 5, 10, 20, 50])
    names = [tick(value, 0.5, "number") for value in (5.5, 6.0)], [tick(v, 2000.0, "number") for v in (0.0, 4000.0)]
    assert names == (["5.5", "6.0"], ["0", "4,000"])
    assert [tick(value, 2e-5, "number") for value in (2e-5, 0.0)] == ["2e-5", "0"]
    assert tick(0.25, 0.25, "share") == "25%"


def test_one_spike_makes_an_axis_logarithmic_and_a_falling_loss_does_not() -> None:
    norms = [1.0, 1.2, 0.8, 1.1] * 20
    assert scale_of([*norms, 300.0]).is_log
    assert not scale_of([3.0 / (1 + step / 20) for step in range(80)]).is_log
    assert not scale_of([0.0, *norms, 300.0]).is_log, "0 has no logarithm"


@given(values=st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=3000))
def test_a_thinned_curve_keeps_its_ends_and_extremes(values: list[float]) -> None:
    whole = Series(range(len(values)), values)
    thin = thinned(whole, 100)
    assert len(thin) <= max(100, 1)
    assert (thin.steps[0], thin.steps[-1]) == (0, len(values) - 1)
    assert (min(thin.values), max(thin.values)) == (min(values), max(values))
    assert all(whole.values[int(step)] == value for step, value in zip(thin.steps, thin.values, strict=True))
    assert all(one < other for one, other in itertools.pairwise(thin.steps))


def test_a_smoothed_line_lies_on_a_straight_one() -> None:
    """It neither lags behind nor bends at the ends."""
    straight = Series(range(200), [3 - step / 100 for step in range(200)])
    mean = smoothed(straight, window_of(straight))
    assert len(mean) >= 190
    assert list(mean.values) == pytest.approx([3 - step / 100 for step in mean.steps], abs=1e-12)


def test_a_smoothed_curve_has_less_noise_everywhere() -> None:
    noisy = Series(range(1000), [(-1.0) ** step for step in range(1000)])
    assert max(map(abs, smoothed(noisy, window_of(noisy)).values)) < 0.1


@pytest.mark.parametrize(("value", "shown"), [
    (0, "0"), (2.10345, "2.103"), (972.56, "972.6"), (12345.6, "12,346"), (2.5e-5, "2.5e-05"), (0.005, "0.005"),
    (-3.0, "-3"), (1e30, "1e+30"), (999.99, "1,000"), (9999.7, "10,000"),
])  # fmt: skip
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_lengths_and_differences() -> None:
    shown = [length(seconds) for seconds in (0.42, 61.3, 119.7, 3599.9, 7500.0, 4.5e5)]
    assert shown == ["0.42 s", "61 s", "2 min 00 s", "1 h 00 min", "2 h 05 min", "5.21 days"]
    assert (difference(100, 102.3), difference(0, 5)) == ("+2.3 %", "")


def test_a_curve_is_at_its_values() -> None:
    series = Series([0, 5, 10], [1.0, 3.0, 2.0])
    levels = [Level(name="near", value=2.5), Level(name="far", value=1e6)]
    source = draw(Chart(title="Loss", unit="nats", lines=[Line(name="a", series=series)], levels=levels))
    page = Page(source)
    (curve,) = re.findall(r'd="M([\d. L]+)" class="curve"', source.split('class="plot"')[1])
    points = [tuple(map(float, point.split())) for point in curve.split("L")]
    low, high = page.charts[0]["y"]
    assert points == [
        (1000 * step / 10, pytest.approx(1000 * (1 - (value - low) / (high - low)), abs=0.06))
        for step, value in zip(series.steps, series.values, strict=True)
    ]
    assert source.count('class="level"') == 1 + 2 * 2, "the far level is named and not drawn"
    assert "a: 1 at step 0, 2 at step 10, lowest 1 at step 0" in source
    assert draw(Chart(title="Loss", unit="", lines=[Line(name="a", series=Series([], []))])) == ""
    assert 'class="dots"' in draw(Chart(title="Loss", unit="", lines=[Line(name="a", series=Series([3], [1.0]))]))


@given(st.text())
def test_any_text_is_text(content: str) -> None:
    page = Page(tag("p", content, title=content))
    assert page.elements == [("p", {"title": visible(content)})]
    assert "".join(page.shown) == visible(content)
    assert json.loads(Page(data({"x": content})).scripts[0][1]) == {"x": content}


def test_markup_takes_no_objects() -> None:
    with pytest.raises(TypeError):
        text(object())
    with pytest.raises(ValueError, match="not JSON compliant"):
        data(math.nan)


@pytest.mark.skipif(shutil.which("node") is None, reason="node checks the page's script")
def test_the_script_is_javascript() -> None:
    script = files("distlora_launcher.report").joinpath("page.js").read_text(encoding="utf-8")
    finished = subprocess.run(["node", "--check", "-"], input=script, text=True, capture_output=True)
    assert finished.returncode == 0, finished.stderr
