"""Read how a model's folder takes images, with what the proof on its shrunk composite found. Needs no torch.

A vision-language model of transformers has one module above the text decoder that takes images, the *merger*: it runs
the vision tower and the projector, and writes their output over the embeddings of placeholder tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import Weight, cached_path, derived, kept_text
from distlora.config.json_files import read_object
from distlora.system.exit_codes import require_package

PROCESSOR_FILE = "preprocessor_config.json"
"""File with the settings of a model's image processor."""
LATER_PROCESSOR_FILE = "processor_config.json"
"""File that holds them under `image_processor` in folders of transformers 5."""
TOKEN_NAMES = ("image_token_id", "image_token_index", "img_context_token_id", "im_patch_id", "image_patch_id")
"""Names in a config for the token whose embedding an embedding of the image replaces."""


class TowerWork(NamedTuple):
    """Work of the tower and the projector for one image."""

    pixels: int
    tokens: int
    pixel_numel: int
    """Elements of the image processor's floating-point tensors."""
    fp32_bytes: int
    """Peak bytes of activations in fp32, without these tensors."""
    bf16_bytes: int
    flops: int

    def activation_bytes(self, itemsize: int) -> int:
        """Return the peak bytes of activations in a dtype of 2 or 4 bytes."""
        return self.bf16_bytes if itemsize == 2 else self.fp32_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLayout:
    """Description of how a model takes images."""

    merger: str
    """Path of the module that merges features into the embeddings."""
    token_id: int
    """Token that stands for one feature in the input."""
    names: tuple[str, ...]
    """Outputs of the image processor that the tower takes (`pixel_values`, `image_grid_thw`)."""
    tower: tuple[Weight, ...]
    """The merger's weights outside of the decoder (tower, projector), by paths in the model."""
    has_grid: bool
    """True if positions have a time, a height and a width (M-RoPE)."""
    ahead: Literal["", "ours", "transformers"] = ""
    """Whose masks of packed documents let a token of an image see the image's later tokens; empty: it sees none."""
    reads_embedding: bool = False
    """True if the merger reads the embedding's weight outside of the embedding's forward (per-layer inputs)."""
    deepstack: int = 0
    """Number of decoder layers after which features are added to the hidden states."""
    work: tuple[TowerWork, ...] = ()
    """Of a small and of a larger image; empty if the tower could not be traced."""
    checks: tuple[tuple[str, float], ...] = ()
    """Name and largest difference of each check on a shrunk model with random weights."""
    seconds: float = 0.0
    """Time that deriving and checking took."""

    @property
    def numel(self) -> int:
        """Number of parameters that each rank holds whole."""
        return sum(weight.numel for weight in self.tower)

    def largest_image(self, max_pixels: int, sequence_length: int) -> TowerWork | None:
        """Return the work of the largest image of a run; None if the tower could not be traced.

        An image is never cut, so it has at most `sequence_length` tokens. `max_pixels`: data.image_max_pixels.
        """
        if not self.work:
            return None
        small, large = self.work
        fixed = small.tokens == large.tokens
        tokens = min(large.tokens if fixed else sequence_length, sequence_length)
        if max_pixels and not fixed:
            tokens = min(tokens, math.ceil(max_pixels * large.tokens / large.pixels))

        def grown(low: int, high: int) -> int:
            """Return the value at `tokens` of a curve a t + b t^2 through those of the traced images."""
            slopes = low / small.tokens, high / large.tokens
            square = 0.0 if fixed else max(0.0, (slopes[1] - slopes[0]) / (large.tokens - small.tokens))
            return round(tokens * (slopes[1] + square * (tokens - large.tokens)))

        values = (grown(*pair) for pair in zip(small[2:], large[2:], strict=True))
        return TowerWork(round(tokens * large.pixels / large.tokens), tokens, *values)

    @classmethod
    def from_json(cls, text: str) -> ImageLayout:
        """Return the layout in a text of `to_json`."""
        values = json.loads(text)
        values["tower"] = tuple(Weight(path=w["path"], shape=tuple(w["shape"])) for w in values["tower"])
        values["work"] = tuple(TowerWork(*work) for work in values["work"])
        values |= {"names": tuple(values["names"]), "checks": tuple((name, value) for name, value in values["checks"])}
        return cls(**values)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(dataclasses.asdict(self))


def image_packages() -> dict[str, str]:
    """Return the versions of the packages that make pixels. Raises UserError for one that is not installed."""
    for module in ("PIL", "torchvision"):
        require_package(module, "data.images=true")
    return {package: importlib.metadata.version(package) for package in ("pillow", "torchvision")}


def image_layout(folder: str | Path) -> ImageLayout:
    """Return how the model in a folder takes images.

    The first call for a config.json starts a process that checks images on a shrunk model (`distlora.derive`); its
    result is kept in the cache. Raises UserError with the reason for a model whose images are not supported.
    """
    folder = Path(folder)
    content = {"config": read_config(folder), "processor": processor_settings(folder)}
    return _image_layout(json.dumps(content, sort_keys=True), str(folder / "config.json"))


@functools.lru_cache(maxsize=16)
def _image_layout(content: str, place: str) -> ImageLayout:
    return ImageLayout.from_json(
        kept_text(cached_path(f"images {content} {image_packages()}"), lambda: _derive(content, place))
    )


def _derive(content: str, place: str) -> str:
    answer = derived("checking how transformers merges images", "--images", place, content=content)
    layout = ImageLayout.from_json(answer)
    print(
        f"{place}: images checked in {layout.seconds:.0f} s on a small model: forward, gradients and packing equal "
        "transformers'",
        file=sys.stderr,
    )
    return answer


def processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor in a folder; empty without one."""
    if (file := folder / PROCESSOR_FILE).is_file():
        return read_object(file, "download the folder again")
    if (file := folder / LATER_PROCESSOR_FILE).is_file():
        settings: dict[str, Any] = read_object(file, "download the folder again").get("image_processor") or {}
        return settings
    return {}
