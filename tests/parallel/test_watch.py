"""A hang ends with the rank and the step that the others wait for, and with the stacks of all."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distlora.parallel import Ranks, watch
from distlora.parallel.watch import HungError, Position, Verdict, Watch, judge
from distlora.run_folder import error_file
from distlora_launcher.launch.failures import first_failure, read_errors
from support.measured import free_port
from support.worlds import World
from tools.chaos import Life, read_lines, train_command, uninterrupted

TIMEOUT_SECONDS = 1.0


def watched(ranks: Ranks, *, case: str, port: int) -> tuple[float, str, tuple[int, ...], float] | None:
    """Run five marked steps, of which the fourth hangs as `case` says.

    Returns the report of this rank's watch: (when, message, culprits, seconds since the hang); None without one.
    """
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world)]
    dist.all_gather(pids, torch.tensor([os.getpid()]), group=ranks.group)
    store = dist.TCPStore("127.0.0.1", port, is_master=ranks.rank == 0, wait_for_workers=False)
    said: list[tuple[float, str, tuple[int, ...], float]] = []
    ended = threading.Event()
    began = 0.0
    # Marks are compared by their number, and what ran in this world before marked more on some ranks than on others.
    watch._here = (0, *watch._here[1:])

    def end(error: HungError, verdict: Verdict) -> None:
        now = time.monotonic()
        said.append((now, str(error), verdict.culprits, now - began))
        if case.startswith("stopped") and ranks.rank == 2:  # Where a process would end, the world must live on.
            os.kill(int(pids[stopped_rank(case)]), signal.SIGCONT)
        ended.set()

    stderr = sys.stderr
    if case == "asleep with a full disk":
        sys.stderr = full_log()
    silent_seconds = 10.0 if case == "saves" else None
    watching = Watch(
        store,
        ranks.rank,
        ranks.world,
        timeout_seconds=TIMEOUT_SECONDS,
        end=end,
        silent_seconds=silent_seconds,
        long_seconds=TIMEOUT_SECONDS if "rewards" in case else watch.LONG_SECONDS,
    )
    for step in range(1, 6):
        watch.at(step, "forward of micro-batch", 1)
        began = time.monotonic()
        if step == 4:
            time.sleep(TIMEOUT_SECONDS / 2)  # So that each has told where it is.
            hang(case, ranks.rank, ended)
        dist.all_reduce(torch.ones(1), group=ranks.group)
        watch.at(step, "update")
    dist.barrier(ranks.group)
    watching.stop()
    for thread in watching._threads:
        thread.join()
    sys.stderr = stderr
    dist.barrier(ranks.group)  # Rank 0 keeps the store until no thread needs it.
    return said[0] if said else None


def stopped_rank(case: str) -> int:
    return 0 if case == "stopped with the store" else 1


def hang(case: str, rank: int, ended: threading.Event) -> None:
    if case == "all in one place" or (case.startswith("asleep") and rank == 1):
        ended.wait(20)
    elif case == "saves" and rank == 1:
        watch.at(4, "saving", long=True)
        time.sleep(TIMEOUT_SECONDS / 2)
        subprocess.Popen(["sh", "-c", f"sleep 1.8; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)  # As one whose beats are late.
    elif "rewards" in case and rank == 1:
        watch.at(4, "computing rewards", long=True)
        for _ in range(40):
            ended.wait(TIMEOUT_SECONDS / 10)
            if case == "slow rewards":
                watch.moved()
    elif case.startswith("stopped") and rank == stopped_rank(case):
        os.kill(os.getpid(), signal.SIGSTOP)


def full_log() -> io.TextIOWrapper:
    """Return a log on a disk that is full."""
    return io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)


@pytest.mark.parametrize(
    ("case", "culprits", "words"),
    [
        (
            "asleep with a full disk" if sys.platform == "linux" else "asleep",
            (1,),
            r"rank 1 is in step 4 \(forward of micro-batch 1\) at threading.py:\d+ in wait; waiting for ",
        ),
        ("stopped", (1,), r"rank 1 gives no sign of life \(its process is stopped, .*, last in step [34] \("),
        ("rewards without progress", (1,), r"rank 1 is in step 4 \(computing rewards\) at .*; waiting for that: "),
        ("stopped with the store", (0,), r"rank 0, through which .* gives no sign of life .*; waiting: rank \d is in "),
        ("all in one place", (), r"ranks 0, 1, 2 are in step 4 \(forward of micro-batch 1\) at .*, and no other is"),
    ],
)
def test_the_rank_that_hangs_is_named(world: World, case: str, culprits: tuple[int, ...], words: str) -> None:
    """Check the rank that the first process to end names.

    Here the process lives on, and a later judge sees it elsewhere. gloo's waits let the watch run beside them.
    """
    told = [said for said in world.run(3, watched, case=case, port=free_port()) if said is not None]
    assert told
    _, message, named, seconds = min(told)
    assert named == culprits
    assert re.search(words, message), message
    assert re.match(r"nothing has moved for [1-9] s: ", message)
    assert seconds < 20 * TIMEOUT_SECONDS


@pytest.mark.parametrize("case", ["saves", "slow rewards"])
def test_what_may_take_long_is_waited_for(world: World, case: str) -> None:
    """By those that wait for it in a step, and though nothing is heard of it for 1.8 s; beyond that, if it moves."""
    assert world.run(3, watched, case=case, port=free_port()) == [None] * 3


def at(mark: int, *, waits: bool = False, beat: int = 1) -> Position:
    return Position(mark, f"place {mark}", long=False, waits=waits, beat=beat)


def later(positions: list[Position | None]) -> list[Position | None]:
    return [position and at(position.mark, waits=position.waits, beat=position.beat + 1) for position in positions]


@pytest.mark.parametrize(
    ("positions", "culprits"),
    [
        ([at(7, waits=True), at(7), at(7, waits=True)], (1,)),  # Who is in no collective is waited for,
        ([at(7, waits=True), at(8), at(7, waits=True)], (1,)),  # wherever he is;
        ([at(9), at(7), at(9)], (1,)),  # of several such, the one behind;
        ([at(9, waits=True), at(9, waits=True), at(8, waits=True)], (2,)),  # and where all wait, too.
        ([at(9), at(9)], ()),
        ([at(9, waits=True), None], (1,)),  # One that never came.
    ],
)
def test_who_is_waited_for(positions: list[Position | None], culprits: tuple[int, ...]) -> None:
    verdict = judge(positions, later(positions), 600.0)
    assert verdict.culprits == culprits
    assert not verdict.silent


def test_nobody_hangs_while_one_rank_moves() -> None:
    assert judge([at(9, waits=True), at(7)], [at(9, waits=True, beat=2), at(8, beat=2)], 600.0) is None


def test_a_rank_without_a_beat_is_named_even_where_it_is_ahead() -> None:
    verdict = judge([at(7), at(9)], [at(7, beat=2), at(9)], 600.0)
    assert verdict == Verdict(
        "nothing has moved for 600 s: rank 1 gives no sign of life (its process is stopped, or its node is down), last "
        "in place 9; waiting: rank 0 is in place 7",
        (1,),
        silent=True,
    )


@pytest.mark.slow
def test_a_rank_of_a_run_that_is_stopped_is_named_and_the_run_goes_on(folders: Path, tmp_path: Path) -> None:
    """By SIGSTOP."""
    uninterrupted(tmp_path / "whole", folders, 2)
    command = [*train_command(tmp_path / "run", folders, 2), "cluster.timeout_seconds=10"]
    life = Life(command, tmp_path / "output.txt", tmp_path / "tmp")
    assert life.wait_until(lambda: any(line["step"] > 1 for line in read_lines(tmp_path / "run" / "metrics.jsonl")))
    life.workers()[1].send_signal(signal.SIGSTOP)
    assert life.code() == 0, life.output()
    assert re.search(r"the run hung: nothing has moved for 1\d s: rank 1 gives no sign of life", life.output())
    assert not life.gone()
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.ci
def test_a_run_that_hangs_ends_seconds_after_its_limit(folders: Path, tmp_path: Path) -> None:
    """The ranks' reads of each other fall into the limit, and the launcher kills a rank that answers no SIGTERM."""
    (tmp_path / "tmp").mkdir()
    limits = ["cluster.timeout_seconds=8", "cluster.max_restarts=0"]
    command = [*train_command(tmp_path / "run", folders, 2), *limits]
    life = Life(command, tmp_path / "output.txt", tmp_path / "tmp")
    assert life.wait_until(lambda: any(line["step"] > 1 for line in read_lines(tmp_path / "run" / "metrics.jsonl")))
    life.workers()[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert life.code() == 1, life.output()
    assert time.monotonic() - began < 25, life.output()
    assert re.search(r"the run hung: nothing has moved for [89] s: rank 1 gives no sign of life", life.output())
    assert not life.gone()


def test_the_message_of_a_hang_leads_to_the_stacks_of_the_rank_that_hangs(tmp_path: Path) -> None:
    error_file.write(tmp_path / "rank_0.error.json", HungError("rank 2 is in step 4"), about=2)
    error_file.write(tmp_path / "rank_1.error.json", ConnectionError("closed by peer"))
    failure = first_failure(tmp_path, {}, [error for _, error in read_errors(tmp_path)])
    assert failure.message == f"the run hung: rank 2 is in step 4\nits stacks are in {tmp_path / 'rank_2.log'}"
    assert not failure.repeats
