"""Answer the turns of tests/test_bench_step.py in place of a worker, without torch."""

import json
import os
import sys


def main() -> None:
    job = json.loads(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    print(json.dumps({"imported": 1000}), flush=True)
    print(json.dumps({"ran": job["way"]}), flush=True)
    for number, line in enumerate(sys.stdin):
        turn = json.loads(line)
        if job["way"] == "trainer" and number == 2:
            print(json.dumps({"failed": "RuntimeError: it broke"}), flush=True)
        elif job["way"] == "fsdp2" and rank == 1:
            sys.stderr.write("the last words\n")
            sys.exit(3)
        else:
            answer = {"seconds": [1.0 + rank] * turn["steps"], "cpu_seconds": [0.5] * turn["steps"]}
            on_gpu = job["way"] == "ours-bf16"
            answer |= {"losses": [2.0 + rank] * turn["steps"]}
            answer |= {"device_peak": 500 if on_gpu else None, "device_left": 400 if on_gpu else None}
            print(json.dumps(answer | {"moved": {"reduced": 8} if turn["count"] else None}), flush=True)


if __name__ == "__main__":
    main()
