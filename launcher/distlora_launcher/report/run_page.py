"""The report of a run: `run_report` is the page, its parts follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distlora.system.numbers import (
    count,
    length,
    moment,
    number,
    size,
)
from distlora_launcher.report.curves import curves_part
from distlora_launcher.report.document import (
    page,
    section,
    state_badge,
    table,
    tiles,
)
from distlora_launcher.report.markup import (
    Content,
    Html,
    tag,
    text,
)
from distlora_launcher.report.plan_part import plan_part
from distlora_launcher.report.run_records import (
    RunRecords,
    Sample,
    Standing,
    as_text,
)
from distlora_launcher.report.settings import settings_part
from distlora_launcher.report.words import difference, loss

STATES = {
    "done": "good",
    "running": "busy",
    "queued": "busy",
    "ending": "busy",
    "failed": "bad",
    "ended": "bad",
}
"""How each state is shown; others are idle."""
MOST_SAMPLES, LONGEST_SAMPLE, LONGEST_PROMPT = 12, 2000, 600
"""Of a prompt, first and last among them; characters of a text."""


def run_report(run: RunRecords, standing: Standing) -> str:
    """The page of a run, in whatever state it is."""
    lead: list[Content] = [tag("code", str(run.folder)), f"{run.name} {standing.said}."]
    if (outcome := _outcome(run)) is not None:
        lead.append(outcome)
    return page(
        kind="Training run",
        title=run.name,
        state=state_badge(standing.state, STATES.get(standing.state, "idle")),
        lead=lead,
        parts=[
            ("Notes", section("notes", "Notes", _notes(run, standing))),
            ("Figures", section("figures", "Figures", tiles(_figures(run)))),
            ("Curves", section("curves", "Curves", curves_part(run))),
            ("Plan and measurement", section("plan", "Plan and measurement", plan_part(run))),
            ("Samples", section("samples", "Samples", samples_part(run.samples), note=_SAMPLES_NOTE)),
            ("Settings", section("settings", "Settings", None if run.config is None else settings_part(run.config))),
            ("Data", section("data", "Data", data_part(run))),
            ("Saved", section("saved", "Checkpoints and result", saved_part(run))),
            ("Base and environment", section("environment", "Base and environment", environment_part(run))),
            ("Next", section("next", "What can be typed now", commands_part(standing.commands))),
        ],
    )


_SAMPLES_NOTE = "What the model wrote while it was trained, to train.sample_prompts."


def _outcome(run: RunRecords) -> str | None:
    """What the run is about, in a sentence."""
    held_out = run.metrics.held_out.get("eval_loss")
    if held_out is None or len(held_out) < 2 or held_out.steps[0] != 0:
        return None
    step, lowest = held_out.lowest()
    last = f"{loss(held_out.values[-1])} after step {held_out.steps[-1]:,.0f}"
    best = "" if step == held_out.steps[-1] else f", its lowest {loss(lowest)} after step {step:,.0f}"
    return f"The held-out loss went from {loss(held_out.values[0])} before training to {last}{best}."


def _notes(run: RunRecords, standing: Standing) -> Content:
    """Why it failed, what could not be read, what a person should know."""
    if standing.error is not None:
        yield tag("div", standing.error, cls="box bad")
    unreached = run.summary.get("parameters_without_gradient") or []
    said = list(run.problems)
    if unreached:
        said.append(f"no gradient has reached {len(unreached):,} trained parameters: {', '.join(unreached[:4])}, ...")
    if standing.error is None and run.metrics.non_finite:
        step, name = run.metrics.non_finite[0]
        said.append(f"{name} was not finite at step {step:,}")
    if said:
        yield tag("div", tag("ul", [tag("li", line) for line in said]), cls="box")
    if run.metrics.step == 0 and not run.metrics.training:
        yield tag("p", "Nothing has been trained yet, so there are no curves.", cls="note")


def _figures(run: RunRecords) -> Iterator[tuple[str, str, str | None]]:
    """(what, value, what belongs to it)."""
    summary, training = run.summary, run.metrics.training
    held_out = run.metrics.held_out.get("eval_loss")
    if held_out is not None:
        first = f"before training {loss(held_out.values[0])}" if held_out.steps[0] == 0 else None
        yield "held-out loss", loss(held_out.values[-1]), first if len(held_out) > 1 else None
        step, lowest = held_out.lowest()
        if len(held_out) > 2:
            yield "lowest held-out loss", loss(lowest), f"after step {step:,.0f}"
    if "loss" in training:
        series = training["loss"]
        yield "training loss", loss(series.values[-1]), f"of step {series.steps[-1]:,.0f}"
    if run.metrics.training:
        total = _total_steps(run)
        yield "steps", f"{run.metrics.step:,}", None if total is None else f"of {total:,}"
    if (seconds := summary.get("train_seconds")) is not None:
        yield "training time", length(seconds), "evaluations and saves not counted"
    elif run.metrics.began is not None and run.metrics.ended is not None and run.metrics.training:
        yield (
            "time so far",
            length(max(0.0, run.metrics.ended - run.metrics.began)),
            f"until {moment(run.metrics.ended)}",
        )
    if (speed := summary.get("tokens_per_second")) is not None:
        yield "tokens a second", number(speed), None
    if (peak := summary.get("memory/peak")) is not None:
        gap = difference(summary.get("memory/planned") or 0, peak)
        yield "memory of a step", size(peak), f"{gap} to the plan" if gap else None
    if (trained := summary.get("trainable_parameters")) is not None:
        whole = run.plan.get("model", {}).get("parameters")
        yield "trained parameters", count(trained), f"{trained / whole:.2%} of the base" if whole else None
    if (bits := summary.get("bits_per_parameter")) is not None:
        yield "bits a 4-bit weight", f"{bits:.3f}", "scales included"


def _total_steps(run: RunRecords) -> int | None:
    if run.config is None:
        return None
    if run.config.train.max_steps is not None:
        return run.config.train.max_steps
    rows = run.data.get("splits", {}).get("train", {}).get("rows")
    return None if not rows else run.config.train.epochs * -(-rows // run.config.train.global_batch)


def samples_part(samples: Sequence[Sample]) -> Html:
    """By prompt, in the order of the steps."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    return text([_answers(prompt, found) for prompt, found in list(by_prompt.items())[:40]])


def _answers(prompt: str, samples: list[Sample]) -> Html:
    shown = samples
    if len(samples) > MOST_SAMPLES:
        last = len(samples) - 1
        shown = [samples[round(last * place / (MOST_SAMPLES - 1))] for place in range(MOST_SAMPLES)]
    rows = [
        text([tag("dt", f"step {sample.step:,}"), tag("dd", _cut(sample.text, LONGEST_SAMPLE))]) for sample in shown
    ]
    left_out = len(samples) - len(shown)
    note = (
        tag("p", f"{left_out:,} steps between are left out (samples.jsonl has them)", cls="note") if left_out else None
    )
    return text([tag("p", _cut(prompt, LONGEST_PROMPT), cls="prompt"), tag("dl", rows, cls="answers"), note])


def _cut(content: str, most: int) -> Content:
    if not content.strip():
        blank = "nothing" if not content else f"nothing but {len(content):,} blanks and line ends"
        return tag("span", blank, cls="empty")
    if len(content) <= most:
        return content.strip("\n")
    return [content[:most], tag("span", f" ... {len(content) - most:,} characters more", cls="empty")]


def data_part(run: RunRecords) -> Html:
    """What was trained on and what held out."""
    rows = []
    for split, title in (("train", "training"), ("eval", "held out")):
        counts = run.data.get("splits", {}).get(split)
        if counts is None:
            continue
        cells = [counts.get(name) for name in ("documents", "rows", "targets", "tokens")]
        sources = ", ".join(_source(source) for source in counts.get("sources", []))
        numbers = [tag("td", "" if value is None else f"{value:,}", cls="n") for value in cells]
        rows.append(tag("tr", tag("th", title, scope="row"), numbers, tag("td", tag("code", sources), cls="long")))
    if not rows:
        return Html("")
    heads = [tag("th", "", scope="col")]
    heads += [tag("th", name, scope="col", cls="n") for name in ("documents", "rows", "trained tokens", "tokens")]
    heads.append(tag("th", "from", scope="col"))
    digest = run.data.get("content")
    note = tag("p", "SHA-256 of the packed rows: ", tag("code", digest), cls="note") if digest else None
    return text([table(heads, rows), note])


def _source(source: dict[str, object]) -> str:
    parts = [str(source.get("path", "?"))]
    if source.get("name"):
        parts.append(str(source["name"]))
    if source.get("commit"):
        parts.append(f"at {str(source['commit'])[:12]}")
    share = source.get("share")
    return " ".join(parts) + (f" ({share:.0%})" if isinstance(share, float) and share < 1 else "")


def saved_part(run: RunRecords) -> Html:
    held_out = run.metrics.held_out.get("eval_loss")
    rows = []
    for saved in run.saved:
        measured = None if held_out is None or saved.step is None else held_out.at(saved.step)
        said = saved.what if saved.is_whole else f"{saved.what}, not whole"
        rows.append(
            tag(
                "tr",
                tag("th", tag("code", saved.name), scope="row"),
                tag("td", said),
                tag("td", "" if saved.step is None else f"{saved.step:,}", cls="n"),
                tag("td", "" if measured is None else loss(measured), cls="n"),
                tag("td", size(saved.nbytes), cls="n"),
            )
        )
    heads = [tag("th", "folder", scope="col"), tag("th", "", scope="col")]
    heads += [tag("th", name, scope="col", cls="n") for name in ("step", "held-out loss", "size")]
    return table(heads, rows) if rows else Html("")


def environment_part(run: RunRecords) -> Html:
    """Which base, on which machines, by which versions."""
    model, machine = run.plan.get("model", {}), run.plan.get("machine", {})
    base: dict[str, Content] = {}
    if run.config is not None:
        base["base"] = tag("code", run.config.model.name or run.config.model.path)
        if run.config.model.revision is not None:
            base["revision"] = tag("code", run.config.model.revision)
    if "parameters" in model:
        base["kind"] = f"{model.get('model_type', '')}, {count(model['parameters'])} parameters"
        if packed := model.get("parameters_in_4_bit"):
            base["in 4 bits"] = f"{count(packed)} of them"
    if "identity" in run.state and "base_fingerprint" in run.state["identity"]:
        base["identity of the base"] = tag("code", run.state["identity"]["base_fingerprint"])
    if "name" in machine and "ranks" in machine:
        ranks = machine["ranks"]
        base["planned for"] = f"{machine['name']}, {ranks:,} process{'es' if ranks > 1 else ''}"
    made_on = {name: tag("code", as_text(value)) for name, value in run.state.get("environment", {}).items()}
    lists = [_pairs(base), _pairs(made_on)]
    return tag("div", lists, cls="columns") if base or made_on else Html("")


def _pairs(values: dict[str, Content]) -> Html:
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value, cls="long")) for name, value in values.items()]
    return tag("table", tag("tbody", rows)) if rows else Html("")


def commands_part(commands: Sequence[tuple[str, str]]) -> Html:
    rows = [text([tag("dt", tag("code", command)), tag("dd", said)]) for command, said in commands]
    return tag("dl", rows, cls="commands") if rows else Html("")
