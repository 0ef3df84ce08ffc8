"""NEFTune's noise is a function of (seed, step, row, position, column) and the document's length.

test_dropout.py trains with it on several ranks, and resumes.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from distlora.model.adapters import StepRows
from distlora.model.embedding_noise import EmbeddingNoise, document_lengths
from distlora.training.setup import start_run_model
from distlora_kernels.dropout import philox
from support.runs import SINGLE
from support.small_models import make_run

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 2]])
LENGTHS = torch.tensor([[3, 3, 3, 2, 2, 1], [6] * 6, [1, 2, 2, 3, 3, 3]])


def test_the_noise_is_what_its_definition_says() -> None:
    assert torch.equal(document_lengths(POSITIONS), LENGTHS)
    noise, hidden, step, rows = EmbeddingNoise.of(5.0, seed=3), 11, 7, [4, 2**32 + 1, -1]
    added = noise.add(torch.zeros(3, 6, hidden), POSITIONS, StepRows(step, torch.tensor(rows)))
    for (b, row), position, column in itertools.product(enumerate(rows), range(6), range(hidden)):
        counter = (column // 8, position, row % 2**32, step)
        words = [int(word) for word in philox(noise.key, tuple(torch.tensor(word) for word in counter))]  # type: ignore[arg-type]
        half = words[column % 8 // 2] >> 16 * (column % 2) & 0xFFFF
        uniform = ((half - 2**16 if half >= 2**15 else half) + 0.5) / 2**15
        expected = 5.0 / float(LENGTHS[b, position] * hidden) ** 0.5 * uniform
        assert float(added[b, position, column]) == pytest.approx(expected, rel=1e-5)


def test_noise_is_uniform_and_depends_on_seed_and_step_but_not_on_other_rows() -> None:
    positions, rows = torch.arange(64).repeat(32, 1), torch.arange(32)

    def draw(seed: int, step: int, part: slice = slice(None)) -> torch.Tensor:
        places = StepRows(step, rows[part])
        return EmbeddingNoise.of(1.0, seed).add(torch.zeros(len(rows[part]), 64, 96), positions[part], places)

    drawn = draw(0, 5) * (64 * 96) ** 0.5
    assert abs(float(drawn.mean())) < 0.005
    assert float(drawn.var()) == pytest.approx(1 / 3, abs=0.005)
    assert float(drawn.abs().max()) < 1
    assert torch.equal(draw(0, 5, slice(3, 9)), draw(0, 5)[3:9])
    for other in (draw(1, 5), draw(0, 6)):
        assert abs(float((draw(0, 5) * other).mean())) * 64 * 96 < 0.005, "streams are correlated"


@pytest.mark.parametrize("new_tokens", [(), ("zu",)])
def test_only_training_rows_have_noise(folders: Path, tmp_path: Path, new_tokens: tuple[str, ...]) -> None:
    config = make_run(tmp_path / "run", folders, new_tokens=new_tokens, train={"neftune_alpha": 5.0})
    model, _, _ = start_run_model(config, SINGLE)
    tokens, positions = torch.arange(5, 29).view(2, 12), torch.arange(12).repeat(2, 1)

    def losses(step: int | None) -> torch.Tensor:
        places = None if step is None else StepRows(step, torch.tensor([4, 9]))
        return model(tokens, positions, tokens, step_rows=places)

    evaluated, noisy = losses(None), losses(3)
    assert torch.equal(losses(3), noisy)
    assert not torch.equal(losses(4), noisy)
    model.noise = None
    assert torch.equal(losses(None), evaluated)
    assert torch.equal(losses(3), evaluated)
    assert not torch.equal(noisy, evaluated)
