"""Weights that are no numbers are found, and large ones are none of them."""

from __future__ import annotations

import pytest
import torch

from distlora.weights.reader import all_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinities_are_found_wherever_they_are(dtype: torch.dtype) -> None:
    weights = torch.randn(1000).to(dtype)
    assert all_finite(weights)
    for place in (0, 517, 999):
        for value in (float("nan"), float("inf"), -float("inf")):
            damaged = weights.clone()
            damaged[place] = value
            assert not all_finite(damaged)
            damaged[(place + 1) % 1000] = -value
            assert not all_finite(damaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sum_that_overflows_says_nothing_of_its_weights(dtype: torch.dtype) -> None:
    assert all_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))


def test_bytes_are_numbers() -> None:
    assert all_finite(torch.full((7,), 255, dtype=torch.uint8))
