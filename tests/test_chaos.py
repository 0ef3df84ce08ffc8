"""A short part of `make chaos` (tests/chaos.py): one run, killed in each way."""

from __future__ import annotations

import random
from pathlib import Path

from chaos import KINDS, Campaign, Kill, draw, table, train_command, uninterrupted

KILLS = (
    Kill("SIGUSR1", "evaluation", delay=0.0, rank=1, manner="to one rank"),
    Kill("-9 of one rank", "step", delay=0.1, rank=1, manner=""),
    Kill("-9 of all", "saving", delay=0.0, rank=0, manner=""),
    Kill("SIGTERM", "step", delay=0.05, rank=0, manner="twice"),
)


def test_a_run_killed_in_each_way_ends_as_if_it_had_not_been(folders: Path, tmp_path: Path) -> None:
    uninterrupted(tmp_path / "whole", folders, len(KILLS))
    command = train_command(tmp_path / "killed", folders, len(KILLS))
    campaign = Campaign(tmp_path / "killed", tmp_path / "whole", command, KILLS)
    campaign.run()
    assert campaign.problems == []
    assert all(kill.at for kill in KILLS), "the run ended before the last kill"
    assert [kill.ended for kill in KILLS] == ["75", "restarted", "-9", "75"]
    assert all(kill.seconds_lost is not None for kill in KILLS)
    repeated = [kill.steps_repeated for kill in KILLS]
    assert repeated[0] == repeated[3] == 0, "what was trained is saved on request"
    print(table(KILLS))


def test_kills_are_drawn_of_all_kinds_and_alike_for_one_seed() -> None:
    kills = draw(50, random.Random(1))
    assert kills == draw(50, random.Random(1))
    assert kills != draw(50, random.Random(2))
    assert [sum(kill.kind == kind for kill in kills) for kind in KINDS] == [10] * 5
