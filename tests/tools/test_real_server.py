"""What a test of a real server says when the server does not come up."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.measured import free_port
from support.real_server import NotServed, serving

FAILS = "print('(EngineCore pid=7) [core.py:1] ValueError: no such model'); print('the end'); raise SystemExit(3)"
SLEEPS = "import time; print('loading', flush=True); time.sleep(100)"


@pytest.mark.parametrize(
    ("code", "seconds", "says"),
    [
        (FAILS, 60.0, r"ended with code 3: ValueError: no such model\n(.*\n)*the end$"),
        (SLEEPS, 1.0, r"is not up after 1 s: loading$"),
    ],
)
def test_a_server_that_ends_is_told_from_one_that_is_slow(code: str, seconds: float, says: str, tmp_path: Path) -> None:
    health, log = f"http://127.0.0.1:{free_port()}/health", tmp_path / "log"
    with (
        pytest.raises(NotServed, match=says),
        serving([sys.executable, "-c", code], health, log, os.environ, seconds=seconds),
    ):
        pytest.fail("it answers")
