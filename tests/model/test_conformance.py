"""Every text decoder of the installed transformers, at the settings of its class: all checks of `distlora check`.

docs/models.md, which `tests/tools/conformance_page.py` writes, has a row for each. The types of a
newer transformers wait for theirs.
"""

import json

import pytest

from distlora.architecture.config_checks import CheckRequest
from distlora.derive.check import run
from support.model_types import MODELS_PAGE, config_of, on_page
from support.tiers import ci
from tools import conformance_page

IN_CI = [
    *("afmoe", "apertus", "bloom", "deepseek_v3", "glm4_moe", "gptj", "lfm2", "llama4_text", "mistral3", "nemotron_h"),
    *("cohere2", "granitemoehybrid", "qwen3_5_text"),
]
"""Popular types and the seams, for `make test-ci`."""
TYPES = [
    *map(ci, IN_CI),
    *(pytest.param(name, marks=pytest.mark.slow) for name in on_page(conformance_page.NAMES) if name not in IN_CI),
]


@pytest.mark.slow
def test_the_page_has_a_row_for_every_type() -> None:
    names = {*conformance_page.NAMES, *conformance_page.IMAGES}
    assert names == {*on_page(names)}, conformance_page.__doc__
    passed = MODELS_PAGE.partition("| type | images |")[2].count("` | yes |")
    assert conformance_page.images_sentence(passed) in MODELS_PAGE


@pytest.mark.slow
@pytest.mark.parametrize("name", on_page(conformance_page.IMAGES))
def test_a_type_with_images_passes_or_has_its_reason_on_the_page(name: str) -> None:
    assert conformance_page.image_row(name) in MODELS_PAGE, conformance_page.__doc__


@pytest.mark.parametrize("name", TYPES)
def test_a_type_passes_all_checks_and_is_on_the_page(name: str) -> None:
    """With PEFT, and where all types run on two ranks. A type that is refused has its reason on the page."""
    row = conformance_page.row(name)
    assert row in MODELS_PAGE, conformance_page.__doc__
    if row.count("|") > 3:
        run(CheckRequest(config=json.dumps(config_of(name)), place=name, ranks=1 if name in IN_CI else 2))
