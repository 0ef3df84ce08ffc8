"""Images: how types take them, the proof beside transformers on shrunk composites, masks, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.architecture import images
from distlora.architecture.config_checks import CheckRequest
from distlora.architecture.images import ImageLayout
from distlora.config import UserError
from distlora.derive import check
from distlora.derive import images as of_images
from distlora.derive.images import IMAGE_BOUNDS, derive_images
from distlora.derive.shrink import shrink
from distlora.model.images import masks_that_see_ahead
from support.image_configs import image_content
from support.tiers import ci

pytest.importorskip("torchvision", reason="image processors need torchvision: pip install 'distlora[vision]'")

TYPES = [
    ("qwen3_vl", {"deepstack": 2, "has_grid": True, "merger": "model"}),
    ("gemma3", {"ahead": "ours", "names": ("pixel_values",)}),
    ci("qwen2_5_vl", {"has_grid": True, "names": ("pixel_values", "image_grid_thw")}),
    ci("qwen3_5", {"has_grid": True}),  # Documents of linear attention run one by one.
    ci("lfm2_vl", {"has_grid": False}),  # So do those of convolutions.
    ci("glm4v", {"has_grid": True}),
    ci("llava", {}),
    ci("llava_onevision", {}),  # Crops.
    ci("mistral3", {"has_grid": False}),
    ci("idefics3", {"names": ("pixel_values", "pixel_attention_mask")}),
    ci("internvl", {}),
    ci("gemma4", {"ahead": ""}),
]
"""All others are in `tests/model/test_conformance.py`."""


@pytest.mark.parametrize(("model_type", "expected"), TYPES)
def test_a_type_computes_with_images_as_transformers_does(model_type: str, expected: dict[str, Any]) -> None:
    layout = ImageLayout.from_json(derive_images(json.dumps(image_content(model_type)), model_type))
    for name, value in expected.items():
        assert getattr(layout, name) == value, name
    one_of_two = {"forward", "forward of experts or mixers"}
    assert dict(layout.checks).keys() | one_of_two == IMAGE_BOUNDS.keys()
    assert dict(layout.checks)["loss"] <= 1e-6
    assert layout.tower
    assert [work.tokens > 0 and work.flops > 0 for work in layout.work] == [True, True], "the tower was traced"
    assert all(weight.path.startswith(f"{layout.merger}.") for weight in layout.tower)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("masks", "packed"),
        ("positions", "forward"),
        ("order", "packed"),
    ],
)
def test_a_planted_fault_is_caught_by_name(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "masks":  # transformers' own, which take the first document's images for those of all.
        keep = of_images.with_masks
        monkeypatch.setattr(of_images, "with_masks", lambda *a: _with(keep(*a), ahead="transformers"))
    elif fault == "positions":
        monkeypatch.setattr("distlora.model.images.grid_positions", lambda *_: None)
    else:
        monkeypatch.setattr("distlora.derive.images.Samples.together", _swapped(of_images.Samples.together))
    with pytest.raises(UserError, match=rf"fails the check '{check}.*data.images=false"):
        derive_images(json.dumps(image_content("qwen3_vl" if fault == "positions" else "gemma3")), "a config.json")


def _with(layout: ImageLayout, **changes: Any) -> ImageLayout:
    changed = copy.copy(layout)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


def _swapped(together: Any) -> property:
    def changed(samples: Any) -> Any:
        ids, positions, labels, images = together.fget(samples)
        return ids, positions, labels, images[::-1]

    return property(changed)


def test_a_proof_is_made_again_for_other_versions_of_what_makes_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))
    layout = ImageLayout(merger="model", token_id=1, names=(), tower=(), has_grid=False)
    proved = []
    monkeypatch.setattr(images, "_derive", lambda content, place: proved.append(content) or layout.to_json())
    for version, proofs in (("0.28", 1), ("0.28", 1), ("0.29", 2)):
        monkeypatch.setattr(images, "image_packages", lambda version=version: {"torchvision": version})
        images._image_layout.cache_clear()
        assert images._image_layout("{}", "config.json") == layout
        assert len(proved) == proofs
    images._image_layout.cache_clear()


@pytest.mark.parametrize("model_type", ["pp_formulanet", "udop"])
def test_a_model_without_a_text_decoder_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(UserError, match=rf"{model_type} has no text decoder with an input embedding of its own"):
        derive_images(json.dumps({"config": {"model_type": model_type}, "processor": {}}), "config.json")


def test_numbers_as_names_of_settings_stay_in_a_shrunk_config() -> None:
    config = shrink({"model_type": "aria"})  # Its projector has numbers of patches as names.
    assert config["projector_patch_to_query_dict"] == {1225: 128, 4900: 256}


def test_types_without_a_merger_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="images are not supported for llama: transformers has no module around"):
        derive_images(json.dumps({"config": {"model_type": "llama"}, "processor": {}}), "config.json")
    without = image_content("qwen3_vl") | {"processor": {}}
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json; download it again"):
        derive_images(json.dumps(without), "config.json")


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        pytest.param(None, "images: yes; the vision tower and the projector have", marks=pytest.mark.ci),
        ({}, "images: not checked, because preprocessor_config.json is not on this node"),
        ({"image_processor_type": "NoSuchProcessor"}, "images: no; images are not supported for qwen3_vl"),
    ],
)
def test_the_check_command_says_whether_images_pass(
    settings: dict[str, Any] | None, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = image_content("qwen3_vl")
    processor = json.dumps(content["processor"] if settings is None else settings)
    check._show_images(CheckRequest(config=json.dumps(content["config"]), place="config.json", processor=processor))
    printed = capsys.readouterr().out
    assert answer in printed
    rows = re.findall(r"^images: .+? +(-?\d\.\de[+-]\d\d) +(\S+)$", printed, re.MULTILINE)
    assert bool(rows) == (settings is None)
    assert all(float(difference) <= float(allowed) for difference, allowed in rows)


def test_a_shrunk_tower_keeps_windows_and_layers_that_settings_name() -> None:
    tower = shrink(image_content("qwen2_5_vl")["config"])["vision_config"]
    assert tower["window_size"] == 112
    assert (len(tower["fullatt_block_indexes"]), tower["depth"]) == (2, 3)
    assert 0 not in tower["fullatt_block_indexes"]  # The first attends within windows.
    assert len(shrink(image_content("qwen3_vl")["config"])["vision_config"]["deepstack_visual_indexes"]) == 2


@pytest.mark.parametrize("seed", range(3))
def test_masks_that_see_ahead_are_those_of_each_document_alone(seed: int) -> None:
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import (
        create_masks_for_vision_model,
        get_block_sequence_ids_for_mask,
    )

    config = Gemma3TextConfig(sliding_window=5, num_hidden_layers=6)
    config._attn_implementation = "sdpa"
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (5,), generator=generator).tolist()
    documents = [torch.zeros(1, length, dtype=torch.bool) for length in lengths]
    for document in documents:  # Images longer and shorter than the window, some at an end, some side by side.
        start = int(torch.randint(0, document.shape[1], (), generator=generator))
        document[:, start : start + int(torch.randint(1, 12, (), generator=generator))] = True
    positions = torch.cat([torch.arange(length)[None] for length in lengths], dim=1)
    found = masks_that_see_ahead(config, positions, torch.cat(documents, dim=1), torch.float32)
    assert found.keys() == {"full_attention", "sliding_attention"}
    start = 0
    for document, length in zip(documents, lengths, strict=True):
        alone = create_masks_for_vision_model(
            config=config,
            inputs_embeds=torch.zeros(1, length, 8),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            cache=None,
            position_ids=None,
            block_sequence_ids=get_block_sequence_ids_for_mask(document.long(), device=torch.device("cpu")),
        )
        inside = slice(start, start + length)
        for kind, mask in found.items():
            rows = mask[:, :, inside]
            assert int(rows.sum()) == int(rows[..., inside].sum()), "a document sees another"
            expected = alone[kind]
            expected = torch.ones(length, length).tril().bool() if expected is None else expected
            assert torch.equal(rows[..., inside].squeeze(), expected.squeeze()), kind
        start += length
