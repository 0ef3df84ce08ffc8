"""The worker of `distlora eval`: every model on the same rows, then a table and the figures.

One process, or the ranks that torchrun started.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distlora.parallel import Ranks
from distlora.post.evaluate import report
from distlora.post.evaluate.measure import Measured, measure
from distlora.post.evaluate.receipt import add_to_receipt, other_forms
from distlora.post.evaluate.request import NAMES, Request
from distlora.post.evaluate.rows import check_same_tokens, open_rows
from distlora.post.work import made_on, run_on_ranks
from distlora.system import atomic_io
from distlora.system.exit_codes import request_text
from distlora.system.progress_lines import Progress, quieten, say


def run(request: Request, ranks: Ranks) -> dict[str, Any]:
    """The figures of everything that the request asks for; progress on stderr. Every rank must call it alike."""
    tell = Progress() if ranks.rank == 0 else lambda text: None
    if request.tasks is not None:
        # Imported here, as it imports lm-evaluation-harness.
        from distlora.post.evaluate.tasks import run_tasks

        return {"dtype": request.dtype} | run_tasks(request, request.tasks, ranks, tell) | describe(ranks)
    assert request.text is not None
    configs = [subject.found()[0] for subject in request.subjects]
    rows, rows_in_all = open_rows(request.text, configs[0], ranks)
    if request.draft is not None:
        from distlora.post.evaluate.speculation import run_draft

        return run_draft(request, request.draft, rows, tell) | describe(ranks)
    for config, subject in zip(configs, request.subjects, strict=True):
        check_same_tokens(rows, configs[0], config, subject.label)
    with other_forms(request.merged, ranks, tell) as forms:
        measured = measure((*request.subjects, *forms), request.dtype, rows, ranks, tell)
    text = {
        "name": request.text.name,
        "rows": len(rows),
        "rows_in_all": rows_in_all,
        "sequence_length": rows.sequence_length,
        "targets": int(rows.targets.sum()),
    }
    return {"text": text, "dtype": request.dtype} | figures(measured) | describe(ranks)


def figures(measured: list[Measured]) -> dict[str, Any]:
    """Of each model, by the names that the JSON has; what is not finite, as in a form that overflows, is null."""
    return {
        "compared_with": measured[0].subject.label,
        "models": [
            {
                "label": of.subject.label,
                "kind": of.subject.kind,
                **{
                    name: value if value is None or math.isfinite(value) else None
                    for name, value in {
                        "loss": of.loss.loss,
                        "perplexity": of.loss.perplexity,
                        "loss_difference": of.loss.difference,
                        "loss_standard_error": of.loss.standard_error,
                        "divergence": of.loss.divergence,
                        "largest_logit_difference": of.largest_logit_difference,
                        "changed_tokens": of.changed_tokens,
                    }.items()
                },
            }
            for of in measured
        ],
    }


def describe(ranks: Ranks) -> dict[str, Any]:
    """Where the figures come from."""
    return made_on(ranks.device, "distlora", "torch", "transformers") | {"ranks": ranks.world}


def deliver(request: Request, found: dict[str, Any]) -> None:
    """The table or the JSON on stdout, and the file or the receipt."""
    text = json.dumps(found, indent=1)
    print(text if request.as_json else report.shown(found).text(), flush=True)
    if request.merged is not None:
        add_to_receipt(request.merged, found)
    if request.out is not None:
        atomic_io.write_text(Path(request.out), text + "\n")
        say(f"wrote {request.out}")


def main(argument: str) -> int:
    """Evaluate; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C. Errors of several ranks go to torchrun."""
    request = Request.read(request_text(argument))
    quieten()

    def work(ranks: Ranks) -> None:
        found = run(request, ranks)
        if ranks.rank == 0:
            deliver(request, found)

    advice = "share the models among several GPUs with --processes N"
    return run_on_ranks(work, when_memory_is_out=advice, names=NAMES)
