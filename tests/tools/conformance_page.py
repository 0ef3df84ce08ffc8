"""Write the tables of docs/models.md: `PYTHONPATH=tests python tests/tools/conformance_page.py`.

It takes 40 minutes the first time, and leaves what stands before the tables as it is.
After an upgrade of transformers, its difference says which models changed, came or are refused now.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from distlora.architecture import spec
from distlora.architecture.spec import Architecture, LayerKind, architecture_of
from distlora.config import UserError
from distlora.derive.images import derive_images
from support.image_configs import image_content
from support.model_types import CAUSAL, COMPOSITES, VARIANTS, config_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
COLUMNS = ("type", "layers", "packed documents", "LM head", "experts", "adapters", "formats", "full", "images", "plan")
NAMES = [*CAUSAL, *COMPOSITES, *VARIANTS]
"""All rows of the tables of text decoders."""
IMAGES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - {"inkling_mm_model"})
"""All rows of the table of images. The shrunk inkling_mm_model does not fit the memory of a small machine."""


def page() -> str:
    """Return the page: tables of the types that train, of those that take images, and of those that are refused."""
    rows = {name: row(name) for name in sorted(NAMES)}
    trained = [text for text in rows.values() if text.count("|") > 3]
    refused = [text for text in rows.values() if text.count("|") == 3]
    table = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *trained]
    before = PAGE.read_text().partition(table[0])[0]
    images = [image_row(name) for name in IMAGES]
    passed = sum(line.endswith("| yes |") for line in images)
    image_table = ["## Types with images", images_sentence(passed), "", "| type | images |", "|---|---|", *images]
    return (
        "\n".join(
            [
                before + table[0],
                *table[1:],
                "",
                *image_table,
                "",
                "## Refused",
                "| type | reason |",
                "|---|---|",
                *refused,
            ]
        )
        + "\n"
    )


def images_sentence(passed: int) -> str:
    """Return the sentence above the table of images."""
    return (
        f"{passed} of {len(IMAGES)} types that transformers builds for images and text pass all checks with images, at "
        "the settings of their class."
    )


@functools.cache
def image_cell(name: str) -> str:
    """Return "yes" for a type that trains with images, or the reason why it does not."""
    try:
        derive_images(json.dumps(image_content(name)), name)
    except UserError as error:
        return reason_of(error).removeprefix(f"images are not supported for {name}: ")
    return "yes"


def image_row(name: str) -> str:
    """Return the line of a type in the table of images."""
    print(f"\r{name:40}", end="", file=sys.stderr)
    return f"| `{name}` | {image_cell(name).replace('|', chr(92) + '|')} |"


def row(name: str) -> str:
    """Return the line of a type or variant."""
    print(f"\r{name:40}", end="", file=sys.stderr)
    try:
        architecture = architecture_of(config_of(name), name)
    except UserError as error:
        cells = [reason_of(error)]
    else:
        cells = cells_of(architecture, name)
    return f"| {' | '.join([f'`{name}`', *(cell.replace('|', chr(92) + '|') for cell in cells)])} |"


def reason_of(error: UserError) -> str:
    """Return a refusal without what to type and numbers of one machine."""
    return re.sub(r"\d\.\de[+-]\d\d", "more", str(error).partition("; ")[0])


def cells_of(architecture: Architecture, name: str) -> list[str]:
    """Return the cells of a type that trains, after its name."""
    kinds = architecture.kinds
    weights = [weight for kind in kinds for weight in kind.weights]
    own = any(weight.kind == "fused" for weight in weights)
    formats = ["hf", "peft", *([] if architecture.has_experts else ["bnb"])]
    full = not architecture.composite and not architecture.has_experts
    measured = any(half is not None for kind in kinds for half in kind.memory)
    return [
        listed(map(layer_of, kinds)),
        packed(architecture),
        architecture.head_form.kind,
        "adapters" if architecture.has_experts else "own code" if own else "",
        adapters(kinds),
        listed(formats),
        "yes" if full else "",
        "yes" if name in IMAGES and image_cell(name) == "yes" else "",
        "measured" if measured else "formulas",
    ]


def listed(words: Iterable[str]) -> str:
    """Return different words, in order."""
    return ", ".join(dict.fromkeys(words))


def layer_of(kind: LayerKind) -> str:
    """Return how a layer mixes tokens."""
    roles = {weight.role for weight in kind.weights}
    windowed = "windows" if kind.window is not None else "attention"
    return " + ".join([windowed] * ("attention" in roles) + ["mixer"] * ("mixer" in roles)) or "no linear mixes"


def packed(architecture: Architecture) -> str:
    """Return how packed documents are kept apart."""
    if architecture.documents == "single":
        return "one per sequence"
    apart = listed(path for kind in architecture.kinds for path in kind.apart)
    return architecture.documents + (f" + each alone in {apart}" if apart else "") + " + varlen" * architecture.varlen


def adapters(kinds: Iterable[LayerKind]) -> str:
    """Return how many weights of a layer have adapters, and the reasons why others have none."""
    adapted: set[str] = set()
    reasons: dict[str, set[str]] = {}
    for weight in (weight for kind in kinds for weight in kind.weights):
        if weight.no_adapter or weight.is_gate:
            reason = weight.no_adapter or "a gate, adapted by name alone"
            reasons.setdefault(reason, set()).add(weight.path.removesuffix(".weight"))
        elif weight.kind in ("linear", "experts"):
            adapted.add(weight.path)
    return "; ".join([str(len(adapted)), *(f"none on {listed(sorted(p))} ({why})" for why, p in reasons.items())])


if __name__ == "__main__":
    from distlora import derive

    spec.derive = derive.derive  # In this process: one for each type would import torch each time.
    PAGE.write_text(page())
