"""Check that gradients of trials trained together are summed in one order."""

from __future__ import annotations

import torch
from torch import nn

from distlora.parallel import Ranks
from distlora.parallel.gradients import GradientReducer, Launches
from distlora.parallel.ranks import Traffic
from support.worlds import World


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
            reducers[number].expect(torch.zeros(()), last=True)
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
