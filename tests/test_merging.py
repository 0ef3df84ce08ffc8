"""A merged folder, loaded by transformers, computes what the adapted model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distlora import train
from distlora.merging.merge import merge_to
from distlora.merging.receipt import Receipt
from distlora.model import CausalLM
from distlora.results import publish_result
from distlora.trained import Name, Trained
from distlora.trained_model import load_trained
from family_models import SINGLE, config_for, load_ours, our_logits, tokens, write_family_folder
from small_models import NEW_TOKENS, make_run

TRAINED: dict[str, Any] = {"train": {"max_steps": 4, "save_every": 2}, "optim": {"lr": 2e-2}}


def quiet(text: str) -> None:
    """Of progress."""


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
    receipt = merge_to(trained, out, onto="trained", dtype=torch.float32, say=quiet)
    ids = tokens(2, 24)
    ours = our_logits(model, ids)
    theirs = their_logits(out, ids, model.family.attention)
    assert (ours - theirs).abs().max() <= 1e-4
    assert Receipt.read(out) == receipt


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"adapter": {"use_dora": True}}),
    "pissa": ("qwen3", {"adapter": {"init": "pissa", "use_rslora": True}}),
    "rows": ("llama-tied", {"adapter": {"trainable_token_indices": [3, 700]}}),
    "new-tokens": ("llama", {"new_tokens": NEW_TOKENS}),
    "new-tokens-tied": ("llama-tied", {"new_tokens": NEW_TOKENS}),
    "modules": ("llama-tied", {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": "qv"}}),
    "head": ("llama-tied", {"adapter": {"modules_to_save": ["lm_head"], "target_modules": "qv"}}),
}
"""name -> (base, what is otherwise in its config)."""


@pytest.mark.parametrize("name", RUNS)
def test_so_does_that_of_a_run_and_of_its_checkpoint(name: str, folders: Path, tmp_path: Path) -> None:
    model_name, sections = RUNS[name]
    run = tmp_path / "run"
    make_run(run, folders, model_name, **sections | TRAINED)
    train.run(run, SINGLE)
    ids = tokens(2, 24)
    for checkpoint in (None, "step_2"):
        trained = Name(place=str(run), checkpoint=checkpoint).read()
        model, _ = load_trained(trained, SINGLE)
        if model.vocabulary.new:
            ids[:, :3] = torch.tensor(sorted(model.vocabulary.new.values()))
        ours = our_logits(model, ids)
        for onto in ("trained", "original"):
            out = tmp_path / f"{checkpoint}-{onto}"
            merge_to(trained, out, onto=onto, dtype=torch.float32, say=quiet)
            difference = float((ours - their_logits(out, ids, model.family.attention)).abs().max())
            assert difference <= 1e-4 if onto == "trained" else difference > 1e-3, (checkpoint, onto)
