"""Run the worker of `distlora eval` in one process or in the ranks that torchrun started."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distlora.output.tables import Table
from distlora.parallel import Ranks
from distlora.post.evaluate.measure import Measured, check_same_tokens, measure, open_rows
from distlora.post.evaluate.merge_forms import add_to_receipt, other_forms
from distlora.post.evaluate.request import NAMES, EvaluateRequest
from distlora.post.merge.receipt import measured_table
from distlora.post.workers import made_on, run_on_ranks
from distlora.system import atomic_io
from distlora.system.progress import Progress, quieten, say


def run(request: EvaluateRequest, ranks: Ranks) -> dict[str, Any]:
    """Return all requested figures; progress goes to stderr. Every rank must call it alike."""
    tell = Progress() if ranks.rank == 0 else lambda text: None
    if request.tasks is not None:
        # Imported here because it imports lm-evaluation-harness.
        from distlora.post.evaluate.harness import run_tasks

        return {"dtype": request.dtype} | run_tasks(request, request.tasks, ranks, tell) | describe(ranks)
    assert request.text is not None
    models = [subject.read() for subject in request.subjects]
    rows, rows_in_all = open_rows(request.text, models[0], ranks)
    if request.draft is not None:
        from distlora.post.evaluate.speculation import run_draft

        return run_draft(request, request.draft, rows, tell) | describe(ranks)
    for model, subject in zip(models, request.subjects, strict=True):
        check_same_tokens(rows, models[0].spec.model, model.spec.model, subject.label)
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
    """Return the figures of each model for the JSON; a non-finite value is null."""
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
    """Return the environment of the figures."""
    return made_on(ranks.device, "distlora", "torch", "transformers") | {"ranks": ranks.world}


def deliver(request: EvaluateRequest, found: dict[str, Any]) -> None:
    """Print the table or JSON, and write the file or the receipt."""
    text = json.dumps(found, indent=1)
    print(text if request.as_json else shown(found).text(), flush=True)
    if request.merged is not None:
        add_to_receipt(request.merged, found)
    if request.out is not None:
        atomic_io.write_text(Path(request.out), text + "\n")
        say(f"wrote {request.out}")


def main(request: EvaluateRequest) -> int:
    """Evaluate models; return the exit code. Errors of several ranks go to torchrun."""
    quieten()

    def work(ranks: Ranks) -> None:
        found = run(request, ranks)
        if ranks.rank == 0:
            deliver(request, found)

    advice = "share the models among several GPUs with --processes N"
    return run_on_ranks(work, when_memory_is_out=advice, names=NAMES)


def shown(figures: Mapping[str, Any]) -> Table:
    """Return the table of the figures."""
    if "harness" in figures:
        return of_tasks(figures)
    return of_draft(figures) if "draft" in figures else measured_table(figures)


def of_tasks(figures: Mapping[str, Any]) -> Table:
    """Return one line per task and metric and one column per model.

    Paired differences to the first model are in brackets.
    """
    models = figures["models"]
    rows = [["task, metric", "questions", *(model["label"] for model in models)]]
    for task, metrics in models[0]["tasks"].items():
        for metric in metrics:
            cells = [_of_metric(model["tasks"][task][metric]) for model in models]
            rows.append([f"{task}, {metric}", f"{figures['questions'][task]:,}", *cells])
    return Table(
        f"lm-evaluation-harness {figures['harness']}, computed in {figures['dtype']}: value +- standard error"
        + (f" (difference to {figures['compared_with']} +- that of the paired difference)" if len(models) > 1 else ""),
        rows,
    )


def _of_metric(value: Mapping[str, Any]) -> str:
    cell = f"{value['value']:.4f}" + ("" if value["error"] is None else f" +- {value['error']:.4f}")
    if value.get("difference") is None:
        return cell
    error = value["difference_error"]
    return f"{cell} ({value['difference']:+.4f}" + ("" if error is None else f" +- {error:.4f}") + ")"


def of_draft(figures: Mapping[str, Any]) -> Table:
    """Return the figures of the target alone and with the draft."""
    rows = [["", "tokens", "seconds", "tokens/s", "forwards of the target", "tokens a forward", "of the draft"]]
    for name in ("alone", "with draft"):
        of = figures["runs"][name]
        cells = [f"{of['tokens']:,}", f"{of['seconds']:.2f}", f"{of['tokens'] / of['seconds']:,.1f}"]
        cells += [f"{of['target_forwards']:,}", f"{of['tokens'] / of['target_forwards']:.2f}"]
        rows.append([name, *cells, f"{of['draft_forwards']:,}"])
    prompts = figures["prompts"]
    same = figures["equal"]
    return Table(
        f"{figures['label']} with the draft {figures['draft']}, {prompts} prompts, computed in {figures['dtype']}: "
        f"{same} of {prompts} answers are those of greedy decoding, token for token",
        rows,
    )
