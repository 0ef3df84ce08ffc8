"""`python -m distlora.data RUN`: prepare the data of a run. Exit code 0, 2 with one message for bad input, else 1."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from distlora.architecture.tokens import tokenize_alone
from distlora.data.prepare import prepare_run
from distlora.system.exit_codes import DONE, run_to_exit_code


def main(arguments: list[str] | None = None) -> int:
    """Prepare the run named on the command line and print what its data amounts to; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m distlora.data", description="Tokenize the data of a run.")
    parser.add_argument("run", help="a run folder, which holds config.yaml")
    run_dir = parser.parse_args(arguments).run
    # This process is there to tokenize, whatever the shell says for processes that fork afterwards.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    def prepare() -> int:
        print(summary(prepare_run(run_dir)))
        return DONE

    return run_to_exit_code(prepare, full_disk="free some space, or set data.cache_dir to another disk")


NOTES = {
    "truncated": "truncated",
    "split": "split over rows",
    "dropped_long": "left out as too long",
    "dropped": "left out without a trained token",
    "unused": "left out by the mixture",
}
"""Counts of documents in a split, and how the summary calls them."""


def summary(record: dict[str, Any]) -> str:
    """A few lines for a person, out of what RUN/data.json holds."""
    lines = []
    for split, name in (("train", "training data"), ("eval", "held out     ")):
        if split not in record["splits"]:
            lines.append(f"{name}  none: no evaluation")
            continue
        counts = record["splits"][split]
        what = "pairs" if counts["pairs"] else "documents"
        share = counts["padding"] / (counts["rows"] * record["sequence_length"])
        notes = [f"{counts[key]:,} {words}" for key, words in NOTES.items() if counts[key]]
        lines.append(
            f"{name}  {counts['documents']:,} {what} in {counts['rows']:,} rows of {record['sequence_length']:,} "
            f"tokens, {counts['targets']:,} of {counts['tokens']:,} tokens trained, padding {share:.1%}"
            + (f" ({', '.join(notes)})" if notes else "")
        )
        if len(counts["sources"]) > 1:
            lines += [_source_line(source) for source in counts["sources"]]
    if "stream_rows" in record["settings"]:
        needed, rows = record["settings"]["stream_rows"], record["splits"]["train"]["rows"]
        lines.append(
            f"streamed       until {needed:,} rows were full"
            if rows >= needed
            else f"streamed       to the end: {rows:,} of the {needed:,} rows that the steps take, so they are repeated"
        )
    lines.append(f"{'reused' if record['reused'] else 'cached'} in     {record['cache']}")
    return "\n".join(lines)


def _source_line(source: dict[str, Any]) -> str:
    wanted = "" if source["share_wanted"] is None else f" (wanted {source['share_wanted']:.1%})"
    copies = f", up to {source['most_copies']:,} times each" if source["most_copies"] > 1 else ""
    return (
        f"  {source['share']:6.1%}{wanted} of the trained tokens: {source['documents']:,} documents{copies}, "
        f"{source['targets']:,} tokens trained, {source['path']}"
    )


if __name__ == "__main__":
    tokenize_alone()
    sys.exit(main())
