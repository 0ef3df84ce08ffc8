"""What passes between a sweep's worker (the launcher) and a pack (the processes that train), as files in PACK.

Each file appears whole (durable.write_json), and all but the last two are written once, so neither side locks anything:

```
PACK/config.yaml             the settings that all trials share, as a run's; run_dir is PACK      launcher
PACK/pack.json               {"slots": k, "verdicts": bool}                                       launcher
PACK/inbox/0007.json         {"number", "run_dir"}: a trial that is prepared (RUN/config.yaml,    launcher
                             RUN/data.json) and may start, or go on from its newest checkpoint
PACK/closed                  no more trials will come                                             launcher
PACK/verdicts/0007_00000050.json  {"prune": bool}: after trial 7's evaluation at step 50, which   launcher
                             the pack waits for
PACK/outcomes/0007.json      {"state": complete|pruned|failed, "reason", "step", "seconds"}       pack
PACK/seats.json              {"numbers"}: of the trials in slots, and of the one that is about    pack
                             to enter, in the order in which they did: whom to ask when the pack dies
PACK/stopped.json            {"signal", "time"}: it was asked to stop; not there after a start    pack
```

The pack takes trials in the order of their numbers into free slots, between steps. It ends (exit code 0) when the inbox
is closed and every trial that was in it has an outcome; asked to stop, it saves every trial that is in a slot and
leaves PACK/stopped.json, of which `run_workers` makes exit code 75. A trial's figures are in its own run folder, as
those of a run alone. A pack that is started again finds the same inbox, and goes on with what has no outcome. With
"verdicts" it waits for one after each evaluation after which a trial would go on, but for the base's at step 0.
"""

from __future__ import annotations

from pathlib import Path

PACK_NAME, CLOSED_NAME, SEATS_NAME = "pack.json", "closed", "seats.json"
INBOX, VERDICTS, OUTCOMES = "inbox", "verdicts", "outcomes"


def inbox_file(pack: Path, number: int) -> Path:
    return pack / INBOX / f"{number:04d}.json"


def verdict_file(pack: Path, number: int, step: int) -> Path:
    return pack / VERDICTS / f"{number:04d}_{step:08d}.json"


def outcome_file(pack: Path, number: int) -> Path:
    return pack / OUTCOMES / f"{number:04d}.json"
