"""A pack that trains nothing, for tests of what feeds one: `python -m ...launch.bound support.fake_pack PACK`.

A trial takes four steps and is evaluated after each second one. FAKE_PACK in the environment is JSON: `most`, so many
trials at once are too much; `kills`, trials that end the process; `fails`, trials that fail by themselves; `losses`,
what a trial's evaluations come to; `hangs`, whether trials train on until they are stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from distlora.system import atomic_io
from distlora.training.multi_trial import protocol

STEPS, EVERY = 4, 2


def last_step(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return json.loads(metrics.read_text().splitlines()[-1])["step"] if metrics.is_file() else 0


def step(run_dir: Path, number: int, plan: dict[str, Any]) -> int:
    done = last_step(run_dir) + 1
    with (run_dir / "metrics.jsonl").open("a") as file:
        figures: dict[str, float] = {"step": done, "loss": 2.0}
        if done % EVERY == 0:
            figures = {"step": done, "eval_loss": plan.get("losses", {}).get(str(number), 1.0) / done}
        file.write(json.dumps(figures) + "\n")
    return done


def end(pack: Path, number: int, state: str, reason: str | None, done: int) -> None:
    outcome = {"state": state, "reason": reason, "step": done, "seconds": 0.5}
    atomic_io.write_json(protocol.outcome_file(pack, number), outcome)


def numbers(folder: Path) -> set[int]:
    return {int(path.stem) for path in folder.glob("*.json")}


def main(pack: Path) -> int:
    plan = json.loads(os.environ.get("FAKE_PACK", "{}"))
    settings = json.loads((pack / protocol.SETTINGS_NAME).read_text())
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: stopped.append(signum))
    with (pack / "starts.txt").open("a") as file:
        file.write(f"{settings['slots']}\n")
    inside: dict[int, Path] = {}
    while True:
        closed = (pack / protocol.CLOSED_NAME).exists()
        waiting = sorted(numbers(pack / protocol.INBOX) - numbers(pack / protocol.OUTCOMES) - inside.keys())
        for number in waiting[: settings["slots"] - len(inside)]:
            inside[number] = Path(json.loads(protocol.inbox_file(pack, number).read_text())["run_dir"])
        atomic_io.write_json(pack / protocol.SLOTS_NAME, {"numbers": list(inside)})
        if stopped:
            return 75
        if len(inside) > plan.get("most", 99) or set(plan.get("kills", [])) & inside.keys():
            print("error: out of memory", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if closed and not inside and not waiting:
            return 0
        for number, run_dir in list(inside.items()):
            if number in plan.get("fails", []):
                end(pack, number, "failed", "step 1: the loss is not finite", 0)
                del inside[number]
                continue
            done = last_step(run_dir)
            if done and done % EVERY == 0 and done < STEPS and settings["verdicts"]:
                verdict = protocol.verdict_file(pack, number, done)
                if not verdict.exists():
                    continue
                if json.loads(verdict.read_text())["prune"]:
                    end(pack, number, "pruned", None, done)
                    del inside[number]
                    continue
            if step(run_dir, number, plan) >= STEPS and not plan.get("hangs"):
                (run_dir / "adapter").mkdir()
                (run_dir / "adapter" / "adapter_config.json").write_text("{}")
                (run_dir / "adapter" / "adapter_model.safetensors").touch()
                end(pack, number, "complete", None, STEPS)
                del inside[number]
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
