"""Every text decoder of the installed transformers shrinks to a small model with one layer of each kind that runs."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import torch

import distlora
from distlora.config import UserError
from distlora.derive.shrink import build, build_on_meta, decoder_layers, layer_kinds, read_settings, shrink
from support.model_types import CAUSAL, COMPOSITES, UNBUILDABLE, VARIANTS, config_of, on_page
from support.tiers import ci

# Windows, an expert share, latent attention with dense layers first, shared keys, periods, mixers, a scaled head,
# images beside the text, layers that share weights.
SEAMS = {
    *("gemma2", "qwen2_moe", "deepseek_v3", "gemma4_text@shared", "jamba", "qwen3_5_text@raw", "granite@scaled"),
    *("qwen3_vl", "zamba", "nemotron_h", "llama4_text@dense+moe", "phi3@longrope"),
}
NAMES = [name for name in on_page((*CAUSAL, *COMPOSITES, *VARIANTS)) if name not in UNBUILDABLE]
_ENTRIES = json.loads((resources.files(distlora) / "architecture/known_models.json").read_text())
KNOWN: dict[str, dict[str, Any]] = {entry["names"][0]: entry for entry in _ENTRIES}


@pytest.mark.parametrize("name", [name if name in SEAMS else ci(name) for name in NAMES])
def test_a_small_model_has_every_kind_of_layer_and_runs(name: str) -> None:
    full = read_settings(config_of(name))
    small = json.loads(json.dumps(shrink(config_of(name))))
    kinds = layer_kinds(build_on_meta(full))
    torch.manual_seed(0)
    model = build(small).eval()
    assert set(layer_kinds(model)) == set(kinds)
    assert min(2, len(kinds)) <= len(decoder_layers(model)) <= max(8, 2 * len(set(kinds)))
    assert sum(parameter.numel() for parameter in decoder_layers(model).parameters()) < 600_000
    text = model.config.get_text_config()
    assert small.get("logits_scaling") == full.get("logits_scaling"), "scales stay"
    text_model = model.language_model if name == "llama4" else model  # Its own forward fails without images.
    with torch.no_grad():
        logits = text_model(input_ids=torch.randint(8, 150, (2, 24)), use_cache=False).logits
    assert logits.shape == (2, 24, text.vocab_size)
    assert logits.isfinite().all()
    assert logits.std() > 0


@pytest.mark.ci
@pytest.mark.parametrize("name", KNOWN)
def test_the_known_models_shrink(name: str) -> None:
    config = KNOWN[name]["config"]
    small = shrink(config)
    assert set(layer_kinds(build_on_meta(small))) == set(layer_kinds(build_on_meta(read_settings(config))))


def test_a_kind_that_no_small_model_has_is_refused() -> None:
    """Its only mixer stands beyond eight layers, by a period that the small model keeps too."""
    with pytest.raises(UserError, match=r"small jamba have no layer like layer 20 .*cannot be checked before training"):
        shrink({"model_type": "jamba", "num_hidden_layers": 32, "attn_layer_period": 21, "attn_layer_offset": 20})


def test_bad_configs_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"model_type='lama' .*did you mean 'llama'"):
        shrink({"model_type": "lama"})
    with pytest.raises(UserError, match=r"cannot build the llama of this config.json: .*hidden_act|KeyError|'nope'"):
        shrink({"model_type": "llama", "hidden_act": "nope"})
