"""The curves of a run."""

from __future__ import annotations

from collections.abc import Iterator

from distlora.system.numbers import count
from distlora_launcher.report.chart import (
    Chart,
    Level,
    Line,
    charts_part,
)
from distlora_launcher.report.markup import Html
from distlora_launcher.report.run_records import RunRecords
from distlora_launcher.report.series import (
    SMOOTHED_FROM,
    Series,
    smoothed,
    window_of,
)

_KNOWN = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
    "mfu",
    "gathered_bytes",
    "reduced_bytes",
    "scattered_bytes",
    "between_copies_bytes",
)
_NAMES = {
    "rewards/chosen": "reward of the chosen answers",
    "rewards/rejected": "reward of the rejected answers",
    "rewards/margins": "margin of the rewards",
    "rewards/accuracies": "chosen answer preferred",
    "logps/chosen": "log p of the chosen answers",
    "logps/rejected": "log p of the rejected answers",
}


def curves_part(run: RunRecords) -> Html:
    """Every figure that changes over the steps."""
    return charts_part(_charts(run))


def _charts(run: RunRecords) -> Iterator[Chart]:
    training, config = run.metrics.training, run.config
    yield _loss(run)
    if "lr" in training:
        line = Line(name="learning rate", series=training["lr"])
        yield Chart(title="Learning rate", unit="", lines=[line], from_zero=True)
    if "grad_norm" in training:
        clip = (
            []
            if config is None or not config.optim.max_grad_norm
            else [Level(name="clipped at", value=config.optim.max_grad_norm)]
        )
        yield Chart(
            title="Gradient norm", unit="before clipping", lines=_with_mean("norm", training["grad_norm"]), levels=clip
        )
    if "tokens_per_second" in training:
        planned = (run.plan.get("time") or {}).get("tokens_per_second")
        yield Chart(
            title="Speed",
            unit="tokens a second",
            lines=_with_mean("measured", training["tokens_per_second"]),
            levels=[] if planned is None else [Level(name="planned", value=planned)],
            from_zero=True,
        )
    if "peak_memory_bytes" in training:
        yield _memory(run, training["peak_memory_bytes"])
    if "mfu" in training:
        yield Chart(
            title="MFU",
            unit="of the card's peak",
            lines=_with_mean("MFU", training["mfu"]),
            kind="share",
            from_zero=True,
        )
    for name, series in training.items():
        if name not in _KNOWN and not name.startswith("memory") and not series.is_constant:
            yield _other(run, name, series)


def _loss(run: RunRecords) -> Chart:
    training, held_out = run.metrics.training.get("loss"), run.metrics.held_out.get("eval_loss")
    lines, note = [], None
    if training is not None and len(training) >= SMOOTHED_FROM:
        window = window_of(training)
        lines.append(Line(name="training, each step", series=training, style="faint"))
        lines.append(Line(name=f"training, mean of {window} steps", series=smoothed(training, window)))
    elif training is not None:
        lines.append(Line(name="training", series=training))
    if held_out is not None:
        lines.append(Line(name="held out", series=held_out, colour=1, style="line points"))
    if run.metrics.non_finite:
        step, name = run.metrics.non_finite[0]
        note = f"Not finite, and so not drawn: {name} of step {step:,}" + (
            f", and {len(run.metrics.non_finite) - 1:,} more" if len(run.metrics.non_finite) > 1 else ""
        )
    unit = "nats a trained token" if run.config is None or run.config.train.objective == "sft" else "DPO's, a pair"
    return Chart(title="Loss", unit=unit, lines=lines, is_wide=True, note=note)


def _memory(run: RunRecords, series: Series) -> Chart:
    """What a rank has held at most so far: on a CPU by its resident pages, of which the plan has no files."""
    is_gpu = run.plan.get("machine", {}).get("is_gpu")
    planned = run.plan.get("device", {}).get("total") if is_gpu else run.plan.get("host", {}).get("while_training")
    return Chart(
        title="Peak memory",
        unit="of a rank so far" if is_gpu else "of a process so far, with the files that it maps",
        lines=[Line(name="measured", series=series)],
        levels=[] if planned is None else [Level(name="planned" if is_gpu else "planned without them", value=planned)],
        kind="bytes",
        from_zero=True,
    )


def _other(run: RunRecords, name: str, series: Series) -> Chart:
    """A figure of the objective's own, with what is held out beside it."""
    lines = _with_mean("training", series)
    if (held_out := run.metrics.held_out.get(f"eval_{name}")) is not None:
        lines.append(Line(name="held out", series=held_out, colour=1, style="line points"))
    kind = "share" if name == "rewards/accuracies" else "number"
    return Chart(title=_NAMES.get(name, name).capitalize(), unit="", lines=lines, kind=kind)  # type: ignore[arg-type]


def _with_mean(name: str, series: Series) -> list[Line]:
    """A figure, and where it has many values, their mean over some."""
    if len(series) < SMOOTHED_FROM or series.is_constant:
        return [Line(name=name, series=series)]
    window = window_of(series)
    return [
        Line(name="each step", series=series, style="faint"),
        Line(name=f"mean of {count(window)} steps", series=smoothed(series, window)),
    ]
