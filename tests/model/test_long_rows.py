"""A row by its documents: nothing that a step makes grows faster than the row, and whole logits are never made."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from support.accounting import Made, flash_like
from support.family_models import edit_config, load_ours, tokens, write_family_folder
from support.small_models import VOCABULARY, use_chunks_of
from support.tiers import ci

pytestmark = pytest.mark.usefixtures("torch_products")  # What their blocks take is in test_products.py.

LONGEST = 4096
DOCUMENT = 128
"""Tokens of a document. Attention on the CPU has all scores of one."""


class Step(NamedTuple):
    largest: int
    """Elements of the largest tensor that is made."""
    peak: int
    """Bytes that are alive at once beside the model."""


def step(model: CausalLM, length: int, *, by_documents: bool = True) -> Step:
    """Forward and backward of a row of `length` tokens."""
    model.zero_grad()
    ids = tokens(1, length)
    with Made(model) as made:
        positions = torch.arange(DOCUMENT).repeat(1, length // DOCUMENT)
        documents = Documents.of(positions) if by_documents else None
        model(ids, positions, ids.roll(-1, dims=1), documents=documents).sum().backward()
    return Step(made.largest, made.peak)


@pytest.mark.parametrize(
    ("name", "settings"), [ci("llama-yarn", {"mlp_tile": 256}), ("gemma3-text", {"checkpointing": "selective"})]
)
def test_memory_grows_with_the_row_and_no_faster(
    name: str, settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gemma3 has two masks and windows, and makes none where it has documents."""
    use_chunks_of(monkeypatch, 128)
    write_family_folder(tmp_path, name)
    edit_config(tmp_path, max_position_embeddings=LONGEST)
    data = {"path": "none.jsonl", "sequence_length": LONGEST}
    model, _ = load_ours(tmp_path, data=data, train={"dtype": "bf16", **settings}, quant={"method": "none"})
    short = step(model, 1024, by_documents=False)
    assert short.largest >= 1024**2, "a mask is not seen, so the claim below says nothing"
    model.attend_by_documents(flash_like)
    steps = {length: step(model, length) for length in (1024, LONGEST // 2, LONGEST)}
    for length, made in steps.items():
        assert made.largest <= length / 1024 * steps[1024].largest
        assert made.peak <= length / 1024 * steps[1024].peak
        assert made.largest < min(length * VOCABULARY, length**2) / 2
