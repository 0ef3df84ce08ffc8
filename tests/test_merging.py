"""A merged folder, loaded by transformers, computes what the adapted model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.merging.merge import merge_to
from distlora.merging.receipt import Receipt
from distlora.model import CausalLM
from distlora.results import publish_result
from distlora.trained import Name, Trained
from family_models import config_for, load_ours, our_logits, tokens, write_family_folder

QUIET = lambda text: None  # noqa: E731


def adapted(tmp_path: Path, variant: str, **sections: dict[str, Any]) -> tuple[CausalLM, Trained]:
    """A model of ours with an adapter that is not zero, and the adapter as a PEFT folder on its base."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_family_folder(base, variant)
    model, backend = load_ours(base, **sections)
    config = config_for(base, **sections)
    publish_result(adapter, model, config, None, backend)
    return model, Name(place=str(adapter), base=str(base), quant=config.quant.method).read()


def their_logits(folder: Path, input_ids: torch.Tensor, attention: str) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=attention, experts_implementation="eager"
    )
    with torch.no_grad():
        return model(input_ids).logits.float()


@pytest.mark.parametrize("variant", ["llama3-tied", "qwen2", "gemma3", "phi3", "mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_the_merged_model_computes_what_the_adapted_one_does(variant: str, quant: str, tmp_path: Path) -> None:
    model, trained = adapted(tmp_path, variant, quant={"method": quant, "cache": False})
    out = tmp_path / "merged"
    receipt = merge_to(trained, out, onto="trained", dtype=torch.float32, say=QUIET)
    ids = tokens(2, 24)
    ours = our_logits(model, ids)
    theirs = their_logits(out, ids, model.family.attention)
    assert (ours - theirs).abs().max() <= 1e-4
    assert Receipt.read(out) == receipt
