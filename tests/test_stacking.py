"""What of several trials runs at once: their rows on top of each other, their gradients in one order."""

from __future__ import annotations

import torch
from torch import nn

from distlora.data.loader import MicroBatch, Share, StepBatch, stacks
from distlora.parallel import Ranks
from distlora.parallel.gradients import GradientReducer, Launches
from distlora.parallel.traffic import Traffic
from worlds import World


def micro_batch(first: int, rows: int = 2) -> MicroBatch:
    numbers = torch.arange(first, first + rows)
    tokens = numbers[:, None].expand(rows, 4)
    return MicroBatch(tokens, tokens, tokens, numbers)


def share(slot: int | None, step: int | None, *firsts: int) -> Share:
    parts = [micro_batch(first) for first in firsts]
    rows = tuple(int(row) for part in parts for row in part.rows)
    return Share(StepBatch(parts, global_targets=8, global_pairs=0, global_rows=len(rows), rows=rows), slot, step)


def test_a_run_alone_is_not_changed() -> None:
    own = share(None, 3, 0, 10)
    first, second = stacks([own], whole=False)
    assert first.batch is own.batch.micro_batches[0]
    assert (second.batch.slots, second.step, second.owners) == (None, 3, [(0, 2)])
    (whole,) = stacks([own], whole=True)
    assert whole.batch.rows.tolist() == [0, 1, 10, 11]
    assert whole.owners == [(0, 4)]


def test_rows_of_trials_lie_on_top_of_each_other_with_their_slots_and_steps() -> None:
    first, second = stacks([share(4, 7, 0, 10), share(1, 2, 20)], whole=False)
    assert first.batch.rows.tolist() == [0, 1, 20, 21]
    assert first.batch.slots is not None
    assert first.batch.slots.tolist() == [4, 4, 1, 1]
    assert isinstance(first.step, torch.Tensor)
    assert first.step.tolist() == [7, 7, 2, 2]
    assert [(owner, rows.tolist()) for owner, rows in first.of_owners(first.batch.rows)] == [(0, [0, 1]), (1, [20, 21])]
    # The trial that has fewer micro-batches is not in the second.
    assert second.batch.rows.tolist() == [10, 11]
    assert second.owners == [(0, 2)]


def test_slices_of_a_block_have_as_many_rows_each() -> None:
    (whole,) = stacks([share(4, 7, 0, 10), share(1, 2, 20)], whole=True)
    assert whole.batch.rows.tolist() == [0, 1, 20, 21, 10, 11, -1, -1]
    assert whole.batch.labels[-2:].unique().tolist() == [-100]
    assert whole.batch.slots is not None
    assert whole.batch.slots.tolist() == [4, 4, 1, 1, 4, 4, 1, 1]
    assert whole.owners == [(0, 2), (1, 2), (0, 2), (1, 2)]


def test_an_evaluation_has_no_steps() -> None:
    (part,) = stacks([share(0, None, 0), share(1, None, 5)], whole=False)
    assert part.step is None


def sums_of_two_runs(ranks: Ranks) -> list[list[float]]:
    """Two runs' gradients over the ranks, whose backward passes come in another order on each; then one alone."""
    traffic = Traffic()
    launches = Launches(ranks.group, traffic)
    runs = [[nn.Parameter(torch.zeros(4)) for _ in range(number)] for number in (5, 2)]
    # A bucket for each parameter.
    reducers = [GradientReducer(parameters, bucket_bytes=1, launches=launches) for parameters in runs]
    found = []
    for present in ([0, 1], [1]):
        if present == [1]:
            reducers[0].release()
        for number in present:
            reducers[number].zero()
            reducers[number].expect(last=True)
        for number in present if ranks.rank == 0 else reversed(present):
            own = runs[number]
            sum((parameter * (ranks.rank + 1 + number)).sum() for parameter in own).backward()  # type: ignore[union-attr]
        launches.finish()
        found += [[float(p.grad[0]) for p in runs[number] if p.grad is not None] for number in present]
    return [*found, [float(traffic.reduced_bytes)]]


def test_sums_are_right_whatever_the_order_in_which_ranks_finish_them(world: World) -> None:
    for result in world.run(2, sums_of_two_runs):
        assert result == [[3.0] * 5, [5.0] * 2, [5.0] * 2, [16.0 * (5 + 2 + 2)]]


def test_buckets_take_turns_by_how_far_backward_is() -> None:
    launches = Launches(None, Traffic())
    for number in (4, 2):
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(number)]
        GradientReducer(parameters, bucket_bytes=1, launches=launches)
    assert [bucket.behind for bucket in launches._buckets] == [0.25, 0.5, 0.5, 0.75, 1.0, 1.0]
