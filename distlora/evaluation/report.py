"""The figures of an evaluation as plain values, and as a table. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distlora.tables import Table


def table(figures: Mapping[str, Any]) -> Table:
    """A line a model; differences are to the first."""
    head = ["", "loss", "perplexity", "difference", "std. error", "KL, nats", "max |logit diff.|", "other top token"]
    rows = [head]
    for model in figures["models"]:
        is_first = model["label"] == figures["compared_with"]
        compared = ["", "", "", "", ""] if is_first else compared_cells(model)
        rows.append([model["label"], f"{model['loss']:.4f}", f"{model['perplexity']:,.3f}", *compared])
    return Table(heading(figures), rows)


def compared_cells(model: Mapping[str, Any]) -> list[str]:
    """How a model differs from the first."""
    error = model["loss_standard_error"]
    return [
        signed(model["loss_difference"]),
        "-" if error is None else f"{error:.1g}",
        f"{model['divergence']:.2g}",
        f"{model['largest_logit_difference']:.2g}",
        f"{model['changed_tokens']:.2%}",
    ]


def heading(figures: Mapping[str, Any]) -> str:
    text = figures["text"]
    of = "" if text["rows"] == text["rows_in_all"] else f" of {text['rows_in_all']:,}"
    return (
        f"{text['targets']:,} tokens in {text['rows']:,}{of} rows of {text['name']}, computed in {figures['dtype']}; "
        f"differences of the loss, nats a token, to {figures['compared_with']}"
    )


def signed(value: float) -> str:
    """A difference of losses: four decimals where that says something, else the first digits."""
    return f"{value:+.4f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1e}"
