"""`python -m distlora.data RUN`: prepare the data of a run. Exit code 0, 2 with one message for bad input, else 1."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from typing import Any

from distlora.config import UserError
from distlora.data.prepare import prepare_run


def main(arguments: list[str] | None = None) -> int:
    """Prepare the run named on the command line and print what its data amounts to; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distlora.data", description="Tokenize the data of a run.")
    parser.add_argument("run", help="a run folder, which holds config.yaml")
    run_dir = parser.parse_args(arguments).run
    try:
        record = prepare_run(run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = "free some space, or set data.cache_dir to another disk" if error.errno == errno.ENOSPC else ""
        print(f"error: {place}{error.strerror or error}; {reason}".rstrip("; "), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(summary(record))
    return 0


def summary(record: dict[str, Any]) -> str:
    """A few lines for a person, out of what RUN/data.json holds."""
    lines = []
    for split, name in (("train", "training data"), ("eval", "held out     ")):
        if split not in record["splits"]:
            lines.append(f"{name}  none: no evaluation")
            continue
        counts = record["splits"][split]
        share = counts["padding"] / (counts["rows"] * record["sequence_length"])
        notes = [f"{counts[key]:,} {key}" for key in ("truncated", "split", "dropped") if counts[key]]
        lines.append(
            f"{name}  {counts['documents']:,} documents in {counts['rows']:,} rows of {record['sequence_length']:,} "
            f"tokens, {counts['targets']:,} of {counts['tokens']:,} tokens trained, padding {share:.1%}"
            + (f" ({', '.join(notes)})" if notes else "")
        )
    lines.append(f"{'reused' if record['reused'] else 'cached'} in     {record['cache']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
