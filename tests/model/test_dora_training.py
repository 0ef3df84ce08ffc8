"""Check DoRA in a model: the norms of its base on any ranks, start, dropout, resume, rows that choose.

The comparison with PEFT on one to three ranks is in tests/model/test_methods.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.model.adapters import StepRows
from distlora.parallel import Ranks
from support.bitsandbytes_weights import ODD, quantize
from support.loaded_shards import loaded
from support.runs import SINGLE
from support.small_models import write_model_folder
from support.tiers import ci
from support.worlds import World

DORA = {"target_modules": "all-linear", "r": 8, "use_dora": True}


def norms_of(ranks: Ranks, *, folder: Path, sections: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """By path: a rank's row norms, and on a single rank the norms of the weight as the GEMMs see it, in fp64."""
    model, _ = loaded(folder, ranks, adapter=DORA, **sections)
    norms = {}
    for path, linear in model.adapted_linears():
        squares = linear.row_norms_squared
        dense = linear.frozen_weight.dense(linear.compute_dtype) if ranks.world == 1 else None
        norms[path] = (squares.clone(), None if dense is None else dense.double().square().sum(dim=1))
    return norms


@pytest.fixture(scope="module")
def bases(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return a folder and the sections of a config for each way in which a base is stored."""
    root = tmp_path_factory.mktemp("bases")
    write_model_folder(root / "odd", "llama", **ODD)
    quantize(root / "odd", root / "nested", bnb_4bit_use_double_quant=True)
    quantize(root / "odd", root / "plain", bnb_4bit_use_double_quant=False)
    return {
        "nf4": (folders / "llama", {}),
        "nf4-bf16": (folders / "llama", {"train": {"dtype": "bf16"}}),
        "dense": (folders / "llama", {"quant": {"method": "none"}}),
        "dense-bf16": (folders / "llama", {"quant": {"method": "none"}, "train": {"dtype": "bf16"}}),
        "nested": (root / "nested", {}),
        "plain": (root / "plain", {}),
    }


@pytest.mark.parametrize(
    "base", ["nf4", "nested", *(ci(base) for base in ("nf4-bf16", "dense", "dense-bf16", "plain"))]
)
def test_row_norms_are_those_of_the_weight_in_use_and_the_same_bits_on_any_ranks(
    world: World, bases: dict[str, tuple[Path, dict[str, Any]]], base: str
) -> None:
    folder, sections = bases[base]
    single = norms_of(SINGLE, folder=folder, sections=sections)
    for squares, expected in single.values():
        # Summed in fp64 and rounded once.
        assert bool(((squares.double() - expected).abs() <= 0.51 * torch.finfo(torch.float32).eps * expected).all())
    for norms in world.run(3, norms_of, folder=folder, sections=sections):
        assert all(torch.equal(norms[path][0], squares) for path, (squares, _) in single.items())


@pytest.mark.parametrize(("quant", "dtype"), [("nf4", "bf16"), ("none", "fp32")])
def test_a_fresh_dora_is_the_base_bit_for_bit(folders: Path, quant: str, dtype: str) -> None:
    """Compare rows with and without the adapter, alone and side by side, with dropout and without."""
    sections: dict[str, Any] = {"quant": {"method": quant}, "train": {"dtype": dtype}}
    tokens = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(40).expand_as(tokens)
    states = []
    for adapter in ({"target_modules": "qv", "r": 4}, DORA):
        model, _ = loaded(folders / "qwen3", adapter=adapter, **sections)
        states.append(model.hidden_states(tokens, positions))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], model.hidden_states(tokens, positions, adapter_rows=torch.tensor([0, -1])))
    at = StepRows(0, torch.tensor([0, 1]))
    assert torch.equal(states[0], model.hidden_states(tokens, positions, step_rows=at))
    for _, linear in model.adapted_linears():
        magnitude = linear.pairs[0].magnitude
        assert torch.equal(magnitude.detach(), linear.row_norms_squared.double().sqrt().float())
        with torch.no_grad():
            linear.pairs[0].B.normal_(generator=torch.Generator().manual_seed(0))
            magnitude.mul_(1.5)
    # Trained, it is another model, but for rows that use none: DPO's reference.
    assert not torch.equal(states[0], model.hidden_states(tokens, positions))
    assert torch.equal(states[0], model.hidden_states(tokens, positions, adapter_rows=torch.tensor([-1, -1])))
