"""Replace `distlora train` and `distlora resume` in a sweep's trial: write the files of a run, without torch.

Its held-out loss falls in each step, to |log10(optim.lr) + 3| + 1; above 2.5 it waits to be pruned. `name` selects
other behavior.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path

STEPS = 4


def main() -> int:
    signals: list[int] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: signals.append(number))
    if Path("broken_machine").exists():
        print("error: no CUDA-capable device is detected", file=sys.stderr)
        return 1
    if sys.argv[1] == "resume":
        run_dir = Path(sys.argv[2])
        settings = json.loads((run_dir / "config.yaml").read_text())
    else:
        settings = dict(word.partition("=")[::2] for word in sys.argv[2:])
        run_dir = Path(settings["run_dir"])
        if settings.get("name") == "refused":
            print("error: adapter.r=0 is not a valid rank; set adapter.r=1", file=sys.stderr)
            return 2
        (run_dir / "logs").mkdir(parents=True)
        (run_dir / "config.yaml").write_text(json.dumps(settings))
    with (run_dir / "starts").open("a") as file:
        file.write(sys.argv[1] + "\n")
    return train(run_dir, settings, signals)


def train(run_dir: Path, settings: dict[str, str], signals: list[int]) -> int:
    behaviour = settings.get("name", "")
    best = abs(math.log10(float(settings.get("optim.lr", "1e-3"))) + 3) + 1
    metrics = run_dir / "metrics.jsonl"
    begun = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for step in range(begun, STEPS + 1):
        with metrics.open("a") as file:
            loss = best + (STEPS - step) / 10 if behaviour != "diverges_at_the_end" or step < STEPS else None
            file.write(json.dumps({"step": step, "time": time.time(), "eval_loss": loss}) + "\n")
        if behaviour == "diverges" and step == 2:
            error = {"type": "NonFiniteError", "message": "the loss is nan in step 2", "bad_input": False}
            (run_dir / "logs" / "rank_0.error.json").write_text(json.dumps(error | {"time": time.time()}))
            return 1
        if behaviour == "takes_too_much":
            error = {
                "type": "OutOfMemoryError",
                "message": "CUDA out of memory. Tried to allocate 2 GiB",
                "bad_input": False,
            }
            (run_dir / "logs" / "rank_0.error.json").write_text(json.dumps(error | {"time": time.time()}))
            return 1
        if behaviour == "is_killed" and step == 2:
            signal.raise_signal(signal.SIGKILL)
        # Long enough to be read and pruned in between; a waiting trial is continued by the next start.
        waits = (behaviour == "waits" and begun == 0) or best > 2.5
        until = time.monotonic() + (60 if waits and step == 2 else 0.3)
        while time.monotonic() < until and not signals and not (run_dir.parent / "go").exists():
            time.sleep(0.02)
        if signals:
            return 75
    (run_dir / "summary.json").write_text(json.dumps({"trainable_parameters": 12, "peak_memory_bytes": 34}))
    (run_dir / "adapter").mkdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
