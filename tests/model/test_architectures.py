"""Architectures that are built in have the parameters that the hub counts, and their files in conf/."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from distlora.architecture.shapes import ARCHITECTURES, architecture_named, nearest_architecture, shapes_of
from distlora_launcher.compose.compose import compose_config
from support.plan_inputs import by_type
from support.tiers import ci

CONF = Path(__file__).parents[2] / "conf" / "model"
SHIPPED: list[dict[str, Any]] = json.loads(
    resources.files("distlora.architecture").joinpath("known_models.json").read_text("utf-8")
)

HUB: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "parameters.json").read_text())
COUNTED = HUB["counted"]
"""Parameters in the safetensors of each, as its page on the hub shows them."""
UNTIED_ON_DISK = HUB["untied_on_disk"]
"""The same of those whose weights hold the head beside the embedding that it is tied to."""
WITH_VISION = HUB["with_vision"]
"""The same of those that have a vision tower beside the text model."""
UNPACKED = HUB["unpacked"]
"""What is in MXFP4 on disk, where the hub counts bytes, by the index's total_parameters; 20.91e9 and 116.83e9 in the
model card (arXiv 2508.10925, table 1)."""
QUANTIZED = {name: entry["names"][0] for entry in SHIPPED for name in entry.get("quantized", ())}
"""First names of the 16-bit models of the same sizes, by the names of those that are shipped in low bits."""

PUBLISHED: dict[str, tuple[float, float | None]] = HUB["published"]
"""Elements in the safetensors of each, as the hub's API counts them, and billions of active parameters by its card.
Cards alone have the round numbers. Of Ministral 8B and 14B the FP8 files are counted, with 476 and 560 scales."""
BY_DEFAULT = ("Qwen/Qwen3.5-4B", "google/gemma-4-E4B-it", "ibm-granite/granite-4.0-h-tiny", "zai-org/GLM-4.7-Flash")


def numel(name: str) -> int:
    settings = architecture_named(name)
    assert settings is not None, name
    return shapes_of(settings, name).numel


@pytest.mark.parametrize("name", by_type([*COUNTED, *UNTIED_ON_DISK, *UNPACKED]))
def test_parameters_are_as_many_as_the_hub_counts(name: str) -> None:
    settings = ARCHITECTURES[name]
    head = settings["vocab_size"] * settings["hidden_size"] if name in UNTIED_ON_DISK else 0
    assert numel(name) + head == (COUNTED | UNTIED_ON_DISK | UNPACKED)[name]


@pytest.mark.parametrize("name", by_type(WITH_VISION))
def test_a_vision_tower_is_what_else_a_gemma_holds(name: str) -> None:
    """SigLIP so400m, patches of 14 in 896 x 896 pixels, and its norm and projection into the text model."""
    hidden, inner, layers, patches = 1152, 4304, 27, (896 // 14) ** 2
    layer = 4 * (hidden + 1) * hidden + (hidden + 1) * inner + (inner + 1) * hidden + 2 * 2 * hidden
    tower = (3 * 14 * 14 + 1) * hidden + patches * hidden + layers * layer + 2 * hidden
    text = ARCHITECTURES[name]["text_config"]["hidden_size"]
    assert numel(name) + tower + hidden + hidden * text == WITH_VISION[name]


def test_all_of_them_are_counted() -> None:
    names = (*COUNTED, *UNTIED_ON_DISK, *WITH_VISION, *UNPACKED, *PUBLISHED)
    counted = {id(architecture_named(QUANTIZED.get(name, name))) for name in names}
    dense = {id(settings) for name, settings in ARCHITECTURES.items() if name not in QUANTIZED}
    assert counted == dense, "no sizes without a count"


def stored(module: Any) -> int:
    """Return the elements of a module's file, tied weights once, scalars not, as the hub counts them."""
    return sum(
        tensor.numel()
        for tensor in {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()
        if tensor.dim()
    )


def not_built(decoder: Any, text: dict[str, Any]) -> int:
    """Return the elements of a checkpoint that transformers does not build: multi-token prediction, unused keys."""
    hidden, kind = text["hidden_size"], text["model_type"]
    if kind in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "glm4_moe", "glm4_moe_lite"):
        own = 2 * text["vocab_size"] * hidden if kind.startswith("glm") else 0
        return stored(decoder.layers[-1]) + 2 * hidden * hidden + 3 * hidden + own
    if not (shared := text.get("num_kv_shared_layers")):
        return 0
    kinds = decoder.config.layer_types[-shared:]
    sizes = [text["global_head_dim" if each == "full_attention" else "head_dim"] for each in kinds]
    return sum((2 * hidden * text["num_key_value_heads"] + 1) * size for size in sizes)


@pytest.mark.parametrize("name", [name if name in BY_DEFAULT else ci(name) for name in PUBLISHED])
def test_a_config_that_ships_builds_as_many_parameters_as_are_published(name: str) -> None:
    """Compare totals to 1e-6, or to 1 % of a round number, and active parameters to the card's last digit.

    Cards count the embedding and the LM head among the active parameters, or do not.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    settings = next(entry["config"] for entry in SHIPPED if entry["names"][0] == name)
    auto = AutoModelForImageTextToText if "text_config" in settings else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(**settings))
    text, (total, active) = settings.get("text_config", settings), PUBLISHED[name]
    found = stored(model) + (not_built(model.get_decoder(), text) if isinstance(total, int) else 0)
    assert found == pytest.approx(total, rel=1e-6 if isinstance(total, int) else 0.01)
    if active is not None:
        head, embedding = (m.weight for m in (model.get_output_embeddings(), model.get_input_embeddings()))
        parameters = {p: p.numel() for p in (*model.get_decoder().parameters(), head)}
        count = next(text[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in text)
        chosen = text["top_k_experts" if "top_k_experts" in text else "num_experts_per_tok"]
        experts = sum(numel for p, numel in parameters.items() if p.dim() == 3 and len(p) == count)
        most = sum(parameters.values()) - experts * (count - chosen) / count
        least = most - sum(parameters[each] for each in {head, embedding})
        unit = 1e9 if isinstance(active, int) else 1e8
        assert math.floor(least / unit) * unit <= active * 1e9 <= math.ceil(most / unit) * unit


def test_all_that_ships_is_counted_and_says_where_it_was_seen() -> None:
    assert {entry["names"][0] for entry in SHIPPED if "source" in entry} == PUBLISHED.keys()
    names = [name.lower() for entry in SHIPPED for name in (*entry["names"], *entry.get("quantized", ()))]
    assert len(names) == len(set(names))


def test_names_know_no_upper_case_and_mistyped_ones_have_a_nearest() -> None:
    assert architecture_named("qwen/qwen2.5-7b") is ARCHITECTURES["Qwen/Qwen2.5-7B"]
    assert architecture_named("Qwen/Qwen2.5-8B") is None
    assert nearest_architecture("Qwen/Qwen2.5-8B") == " (did you mean 'Qwen/Qwen2.5-7B'?)"
    assert nearest_architecture("google/gemma-2-9b") == "", "another model, whose name is right"
    assert nearest_architecture("somebody/something") == ""


def test_every_file_of_conf_names_a_model_that_is_built_in() -> None:
    files = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    del files["local"]
    paths = {values["path"] for values in files.values()}
    assert paths >= QUANTIZED.keys()
    named = {id(architecture_named(QUANTIZED.get(path, path))) for path in paths}
    assert all(values["defaults"] == ["local"] for values in files.values())
    for settings in (architecture_named(entry["names"][0]) for entry in SHIPPED):
        names = [name for name, own in ARCHITECTURES.items() if own is settings]
        # Of sizes that differ in nothing that is calculated, the newest has the option; one in FP8 alone has none.
        unnamed = any(old in names[0] for old in ("Llama-3-", "Mistral-7B-v0.1", "8x22B-v0.1", "Mistral-Small-4"))
        assert (id(settings) in named) != unnamed, names
    config = compose_config(["model=llama3_70b"], may_lack_paths=True)
    assert config.model.path == "unsloth/Llama-3.3-70B-Instruct"
