"""Answer the turns of tests/launcher/test_bench_step.py in place of a worker, without torch."""

import json
import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    way: str


def main(request: Job) -> int:
    rank = int(os.environ.get("RANK", "0"))
    print(json.dumps({"imported": 1000}), flush=True)
    print(json.dumps({"ran": request.way}), flush=True)
    for number, line in enumerate(sys.stdin):
        turn = json.loads(line)
        if request.way == "trainer" and number == 2:
            print(json.dumps({"failed": "RuntimeError: it broke"}), flush=True)
        elif request.way == "fsdp2" and rank == 1:
            sys.stderr.write("the last words\n")
            return 3
        else:
            answer = {"seconds": [1.0 + rank] * turn["steps"], "cpu_seconds": [0.5] * turn["steps"]}
            answer |= {"losses": [2.0 + rank] * turn["steps"]}
            rest = {"device_peak": None, "moved": {"reduced": 8} if turn["count"] else None}
            print(json.dumps(answer | rest), flush=True)
    return 0
