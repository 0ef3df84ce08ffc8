"""The counter-based generator: the published Philox, and independence of shape and order."""

from __future__ import annotations

import pytest
import torch

from distlora.system import randomness
from distlora_kernels.dropout import philox

# Known answers of Random123's kat_vectors for philox4x32-10: counter, key -> words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter: tuple, key: tuple, words: tuple) -> None:
    words_of_one = philox(key, tuple(torch.tensor([word]) for word in counter))  # type: ignore[arg-type]
    assert [int(word) for word in words_of_one] == list(words)


def test_an_element_depends_on_its_position_alone() -> None:
    long = randomness.uniform((1000,), seed=3, name="a")
    assert torch.equal(randomness.uniform((7, 11), seed=3, name="a").view(-1), long[:77])
    assert not torch.equal(randomness.uniform((1000,), seed=3, name="b"), long)
    assert not torch.equal(randomness.uniform((1000,), seed=4, name="a"), long)


def test_distributions_have_their_moments() -> None:
    uniform = randomness.uniform((200_000,), seed=0, name="u")
    assert uniform.min() > 0
    assert uniform.max() < 1
    # Four standard errors of the mean and of the variance of 200,000 draws.
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
    normal = randomness.normal((200_000,), seed=0, name="n")
    assert abs(normal.mean()) < 4 / 200_000**0.5
    assert abs(normal.var() - 1) < 4 * (2 / 200_000) ** 0.5
