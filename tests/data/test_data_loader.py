"""The rows of a rank in a step, and their tensors."""

import numpy as np
import pytest
import torch

from distlora.data.loader import StepLoader
from distlora.data.rows import REJECTED, STARTS, TRAINED, PackedRows, hash64

PAD, LENGTH = 3, 6


def make_rows(num_rows: int) -> PackedRows:
    """Return rows whose tokens are all different.

    Row n has the tokens from 100 * (n + 1) on, n % 4 trained labels, and n % 3 rejected answers.
    """
    tokens = np.arange(LENGTH, dtype=np.int32) + 100 * (1 + np.arange(num_rows, dtype=np.int32)[:, None])
    flags = np.zeros((num_rows, LENGTH), np.uint8)
    flags[:, [0, 4]] = STARTS
    targets = np.arange(num_rows, dtype=np.int32) % 4
    flags[:, :3] |= np.where(np.arange(3) < targets[:, None], TRAINED, 0).astype(np.uint8)
    pairs = np.arange(num_rows, dtype=np.int32) % 3
    flags[:, 1:3] |= np.where(np.arange(2) < pairs[:, None], REJECTED, 0).astype(np.uint8)
    return PackedRows(tokens=tokens, flags=flags, targets=targets, pairs=pairs, pad_token_id=PAD, counts={})


def make_loader(rows, *, global_batch=5, micro_batch=1, rank=0, world=1, seed=0, shuffle=True):
    return StepLoader(
        rows, global_batch=global_batch, micro_batch=micro_batch, rank=rank, world=world, seed=seed, shuffle=shuffle
    )


def rows_of_step(rows, step, **layout):
    """Return the rows of all ranks in a step, sorted, without empty ones."""
    ranks = [make_loader(rows, rank=rank, **layout).batch(step) for rank in range(layout.get("world", 1))]
    return sorted(row for batch in ranks for row in batch.rows if row >= 0)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
def test_a_step_has_the_same_rows_and_targets_on_any_layout(world, micro_batch):
    rows = make_rows(17)
    for step in range(2 * 4):
        expected = rows_of_step(rows, step)
        assert rows_of_step(rows, step, world=world, micro_batch=micro_batch) == expected
        for rank in range(world):
            loader = make_loader(rows, world=world, micro_batch=micro_batch, rank=rank)
            batch = loader.batch(step)
            assert batch.global_targets == sum(row % 4 for row in expected)
            assert len(batch.micro_batches) == loader.accumulation == -(-5 // (world * micro_batch))
            assert all(part.input_ids.shape == (micro_batch, LENGTH) for part in batch.micro_batches)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_visits_every_row_once_and_its_last_step_has_what_is_left(shuffle):
    rows = make_rows(17)
    loader = make_loader(rows, shuffle=shuffle)
    assert loader.steps_per_epoch == 4
    for epoch in range(3):
        seen = [loader.batch(epoch * 4 + step).rows for step in range(4)]
        assert [sum(row >= 0 for row in of_step) for of_step in seen] == [5, 5, 5, 2]
        assert sorted(row for of_step in seen for row in of_step if row >= 0) == list(range(17))


def test_the_order_of_a_seed_is_the_same_for_ever():
    """A resumed run must find the order it started with, whatever the versions: published splitmix64, and golden."""
    assert hash64((), 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash64((1, 2), 2).tolist() == [16613338946343043936, 5167718485781182436]
    assert make_loader(make_rows(10), global_batch=10, seed=1).batch(0).rows == (0, 9, 8, 1, 7, 5, 2, 3, 6, 4)


def test_tensors_of_a_row_are_shifted_and_positions_restart():
    rows = make_rows(4)
    part = make_loader(rows, global_batch=4, micro_batch=4, shuffle=False).batch(0).micro_batches[0]
    assert part.input_ids[2].tolist() == [300, 301, 302, 303, 304, 305]
    assert part.labels.tolist() == [
        [-100, -100, -100, -100, -100, -100],
        [201, -100, -100, -100, -100, -100],
        [301, 302, -100, -100, -100, -100],
        [401, 402, 403, -100, -100, -100],
    ]
    assert part.position_ids[2].tolist() == [0, 1, 2, 3, 0, 1]
    assert {tensor.dtype for tensor in (part.input_ids, part.labels, part.position_ids)} == {torch.int64}
