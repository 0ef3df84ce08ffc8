"""The figures of an evaluation as a table. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlora.output.tables import Table
from distlora.post.merge.page import measured_table


def shown(figures: Mapping[str, Any]) -> Table:
    """The table of what was evaluated."""
    if "harness" in figures:
        return of_tasks(figures)
    return of_draft(figures) if "draft" in figures else measured_table(figures)


def of_tasks(figures: Mapping[str, Any]) -> Table:
    """A line for each metric of each task, a column a model; of the second and on, the difference to the first in
    brackets where each question has a figure of its own."""
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
    """The target alone, and with the draft."""
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
