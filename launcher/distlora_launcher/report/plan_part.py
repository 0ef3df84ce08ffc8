"""What was planned beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from distlora.planner.memory.kinds import Kind
from distlora.planner.memory.measured import grouped
from distlora.planner.pages.words import KINDS, MOMENTS
from distlora.system.numbers import number, size
from distlora_launcher.report.document import table
from distlora_launcher.report.markup import Html, tag, text
from distlora_launcher.report.run_records import RunRecords
from distlora_launcher.report.words import difference

_TOGETHER = {"gathered": "gathered, and buffers of collectives", "working": "working: activations, logits, scratch"}
"""Names of what a measurement does not tell apart."""
_GATHERED = "gathered a step, on a rank"
_UNLIKE = "most memory of a process: planned without the files that it maps, measured with them"
"""On a CPU, where the two are no plan and its measurement: torch's libraries alone are some 100 MB of files."""
_OF_PACKS = (_GATHERED, _UNLIKE)
"""What one run of a pack shares with the others."""


def plan_part(run: RunRecords) -> Html:
    """Memory of a step by kind, and the run's other figures; nothing of a run that has no plan."""
    if not run.plan:
        return Html("")
    return text([_verdict(run), _memory(run), _figures(run)])


def _verdict(run: RunRecords) -> Html:
    machine, device = run.plan.get("machine", {}), run.plan.get("device", {})
    what = "card" if machine.get("is_gpu") else "process"
    fits = {True: "It fits.", False: "By the plan it does not fit.", None: "Whether it fits was not known."}
    words = [fits[run.plan.get("fits")]]
    if "total" in device:
        worst = MOMENTS.get(device.get("worst"), "")
        words.append(f"Planned: {size(device['total'])} a {what} at its peak{f', {worst}' if worst else ''}.")
    if (trials := _trials(run)) > 1:
        words.append(f"That is of the pack that this run was a part of, with {trials:,} trials on one base.")
    return tag("p", " ".join(words), cls="note")


def _trials(run: RunRecords) -> int:
    """How many runs the plan is of; 1 but in a pack."""
    trials: int = run.plan.get("trials", 1)
    return trials


def _memory(run: RunRecords) -> Html:
    """Of the one step that is measured; before it, what is planned."""
    measured = _kinds(run.summary or _last(run), "memory/")
    planned = _kinds(run.summary or _last(run), "memory_planned/")
    if not planned:
        planned = {kind: float(nbytes) for kind, nbytes in run.plan.get("device", {}).get("by_kind", {}).items()}
    if not planned:
        return Html("")
    here, there = (grouped({kind: round(value) for kind, value in each.items()}) for each in (measured, planned))
    kinds = sorted(here | there, key=lambda kind: -max(here.get(kind, 0), there.get(kind, 0)))
    most = max([*here.values(), *there.values(), 1])
    rows = [
        tag(
            "tr",
            tag("th", _TOGETHER.get(kind) or KINDS.get(cast(Kind, kind), kind), scope="row"),
            tag("td", size(there.get(kind, 0)), cls="n"),
            tag("td", size(here.get(kind, 0)) if here else "", cls="n"),
            tag("td", difference(there.get(kind, 0), here.get(kind, 0)) if here else "", cls="n"),
            tag(
                "td", _bar("planned", there.get(kind, 0) / most), _bar("measured", here.get(kind, 0) / most), cls="bars"
            ),
        )
        for kind in kinds
    ]
    planned_sum, measured_sum = sum(there.values()), sum(here.values())
    rows.append(
        tag(
            "tr",
            tag("th", "together", scope="row"),
            tag("td", size(planned_sum), cls="n"),
            tag("td", size(measured_sum) if here else "", cls="n"),
            tag("td", difference(planned_sum, measured_sum) if here else "", cls="n"),
            tag("td"),
            cls="total",
        )
    )
    keys = [
        tag("span", tag("span", cls=f"bar {name}"), f" {name} ", cls="key")
        for name in (("planned", "measured") if here else ("planned",))
    ]
    said = "Memory of one step at its peak, on the rank that had most."
    if not here:
        said = "What a step of this run takes was not measured." if run.summary else "No step is measured yet."
    heads = [
        tag("th", "memory", scope="col"),
        *(tag("th", name, scope="col", cls="n") for name in ("planned", "measured", "difference")),
        tag("th", keys, scope="col"),
    ]
    return text([tag("p", said, cls="note"), table(heads, rows, cls="full")])


def _figures(run: RunRecords) -> Html:
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", planned, cls="n"),
            tag("td", measured, cls="n"),
            tag("td", gap, cls="n"),
        )
        for name, planned, measured, gap in _compared(run)
    ]
    if not rows:
        return Html("")
    heads = [tag("th", "of the run", scope="col")]
    heads += [tag("th", name, scope="col", cls="n") for name in ("planned", "measured", "difference")]
    return text([tag("h3", "The run"), table(heads, rows)])


def _compared(run: RunRecords) -> Iterator[tuple[str, str, str, str]]:
    """(what, planned, measured, difference), of what both or one of them know."""
    plan, summary = run.plan, run.summary
    wire, host, time = plan.get("wire", {}), plan.get("host", {}), plan.get("time") or {}
    is_gpu = plan.get("machine", {}).get("is_gpu")
    result = next((saved.nbytes for saved in run.saved if saved.what == "result"), None)
    checkpoint = next((saved.nbytes for saved in reversed(run.saved) if saved.what == "checkpoint"), None)
    reduced = None if "reduced" not in wire else wire["reduced"] + wire.get("reduced_rows", 0)
    rows: list[tuple[str, Any, Any, bool]] = [
        ("tokens a second", time.get("tokens_per_second"), summary.get("tokens_per_second"), False),
        (
            "most memory of a card, by the allocator" if is_gpu else _UNLIKE,
            plan.get("device", {}).get("total") if is_gpu else host.get("while_training"),
            summary.get("peak_memory_bytes"),
            True,
        ),
        (_GATHERED, wire.get("gathered"), summary.get("gathered_bytes_per_step"), True),
        ("gradients summed a step, on a rank", reduced, summary.get("reduced_bytes_per_step"), True),
        ("gradients scattered a step, on a rank", wire.get("scattered"), summary.get("scattered_bytes_per_step"), True),
        ("a checkpoint", plan.get("disk", {}).get("checkpoint"), checkpoint, True),
        ("the result", plan.get("disk", {}).get("result"), result, True),
    ]
    for name, planned, measured, is_bytes in rows:
        if not planned and not measured:
            continue
        if _trials(run) > 1 and name not in _OF_PACKS:
            continue  # The plan's is of all its trials, what was measured is of this one.
        shown = [("" if each is None else size(each) if is_bytes else number(each)) for each in (planned, measured)]
        both = planned is not None and measured is not None and name != _UNLIKE
        yield name, shown[0] or "not known", shown[1], difference(planned, measured) if both else ""


def _bar(cls: str, share: float) -> Html:
    return tag("div", cls=f"bar {cls}", style=f"width:{100 * share:.1f}%") if share > 0 else tag("div", cls="bar")


def _last(run: RunRecords) -> Mapping[str, float]:
    """The figures of the measured step, of a run without a summary."""
    return {name: series.values[-1] for name, series in run.metrics.training.items() if name.startswith("memory")}


def _kinds(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Bytes by kind, of figures by name."""
    found = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {
        kind: float(value)
        for kind, value in found.items()
        if kind not in ("peak", "planned") and isinstance(value, (int, float)) and 0 < value < 1e30
    }
