"""A base's weights and an adapter's factors, read from disk one at a time, equal what a model loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distlora.config import Config
from distlora.config.file import build
from distlora.model.frozen_linear import FrozenTensor
from distlora.post.weights import open_base
from distlora.training.setup import start_run_model
from distlora.weights.reader import Reader
from support.family_models import SINGLE, write_family_folder


def config_of(folder: Path, quant: str) -> Config:
    return build(
        Config,
        {
            "model": {"path": str(folder)},
            "data": {"path": str(folder), "sequence_length": 64},
            "adapter": {"target_modules": "attention"},
            "quant": {"method": quant, "cache": False},
            "train": {"dtype": "fp32"},
            "run_dir": "none",
        },
    )


@pytest.mark.parametrize("variant", ["llama3-tied", "gemma3", "mixtral", "gpt-oss"])
def test_the_weights_are_those_that_a_model_loads(variant: str, tmp_path: Path) -> None:
    folder = tmp_path / variant
    write_family_folder(folder, variant)
    for quant in ("nf4", "none"):
        config = config_of(folder, quant)
        model, _, _ = start_run_model(config, SINGLE, training=False)
        base = open_base(config.spec)
        checked = 0
        with Reader() as reader:
            for path, module in model.named_modules():
                if isinstance(module, FrozenTensor):
                    weight = base.weights[model.hf_name(f"{path}.weight")]
                    assert weight.is_nf4 == module.quantized
                    assert torch.equal(weight.whole(reader), module.frozen_weight.dense(torch.float32))
                    rows = [part for _, part in weight.rows(reader)]
                    assert torch.equal(torch.cat(rows), weight.whole(reader).view(-1, weight.shape[-1]))
                    checked += 1
        assert checked


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_what_training_rounds_to_its_dtype_is_rounded(quant: str, tmp_path: Path) -> None:
    """An fp32 base in a run of bf16: embedding, norms and what is not quantized are held in bf16."""
    write_family_folder(tmp_path / "llama", "llama")
    config = config_of(tmp_path / "llama", quant)
    config = replace(config, train=replace(config.train, dtype="bf16"))
    model, _, _ = start_run_model(config, SINGLE, training=False)
    held = {model.hf_name(name): parameter for name, parameter in model.named_parameters()}
    checked = 0
    with Reader() as reader:
        for name, weight in open_base(config.spec).weights.items():
            if name in held and not weight.is_nf4:
                assert torch.equal(weight.whole(reader), held[name].detach().float()), name
                checked += not torch.equal(weight.whole(reader), weight.whole(reader, original=True))
    assert checked > (20 if quant == "none" else 2)
