"""The figures of docs/scale.md are what the planner says today."""

from __future__ import annotations

import re

import pytest

from distlora.planner import plan_of
from distlora.planner.machine import machine_of
from distlora.planner.model import find_model
from distlora_launcher.compose.compose import compose_config
from messages import ROOT

ROWS = re.findall(
    r"^\| [^|]+ \| [^|]+ \| `(?P<words>[^`]+)` \| (?P<gigabytes>[\d.]+) \| (?P<tokens>[\d,]+) \|$",
    (ROOT / "docs" / "scale.md").read_text(),
    re.MULTILINE,
)


def test_the_page_has_a_ladder() -> None:
    assert len(ROWS) >= 12


@pytest.mark.parametrize(("words", "gigabytes", "tokens"), ROWS)
def test_each_step_fits_and_needs_what_the_page_says(words: str, gigabytes: str, tokens: str) -> None:
    config = compose_config([*words.split(), "data.path=/documents.jsonl", "run_dir=/run"])
    plan = plan_of(config, find_model(config), machine_of(config))
    assert plan.fits
    assert plan.device.total / 1e9 == pytest.approx(float(gigabytes), rel=0.02)
    assert plan.time.tokens_per_second == pytest.approx(int(tokens.replace(",", "")), rel=0.02)
