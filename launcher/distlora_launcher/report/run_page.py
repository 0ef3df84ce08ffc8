"""Build the report of a run from its records (`run_report`), with the commands to type next; write it at the end."""

import base64
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from distlora.config import Config, DataConfig, ModelConfig, UserError
from distlora.config.file import settings_by_name
from distlora.config.json_files import object_or_empty
from distlora.planner.memory import KINDS, PHASES
from distlora.planner.memory.measured import grouped
from distlora.results.figures import Curve, Figure, as_text, draw
from distlora.results.page import difference, loss, render
from distlora.results.record import Table
from distlora.run_folder.expert_load import idle_experts, imbalance
from distlora.run_folder.layout import DATA_NAME, METRICS_NAME, REPORT_NAME, find_result
from distlora.system import atomic_io
from distlora.system.numbers import count, length, moment, number, size
from distlora_launcher.report.records import (
    SMOOTHED_FROM,
    PageStatus,
    RunRecords,
    Series,
    WrittenSample,
    read_run,
    smoothed,
    total_steps,
    window_of,
)
from distlora_launcher.terminal.output import say, shown, warn

MAX_SAMPLES, MAX_PROMPTS = 12, 40
"""Samples per prompt, the first and the last among them, and prompts."""
MAX_EVALUATIONS, MAX_CHARACTERS = 10, 600
"""Evaluations whose best, worst and changed answers are shown, and characters of each."""
PICTURE_SIZE = 256
"""Pixels of the longer side of a sample's image."""
NO_DEFAULT = "no default"

_MERGED_CATEGORIES = {
    "gathered": "gathered shards and communication buffers",
    "working": "working memory: activations, logits, scratch",
}
"""Categories that a measurement cannot tell apart."""
_GATHERED = "gathered per step and rank"
_RESIDENT = "resident host memory per process, with Python, torch and its compiled kernels"
_SHARED_BY_TRIALS = (_GATHERED, _RESIDENT)
"""Figures that the trials of a multi-trial run share."""
_CHARTED = {"loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "mfu"}
_CHARTED |= {"target_tokens", "pairs", "answers", "answers/rejected"}
# between_copies: of runs before it was renamed.
_TRAFFIC_OF = ("gathered", "exchanged", "reduced", "scattered", "between_replicas", "between_copies")
_TRAFFIC = {f"{name}_bytes" for name in _TRAFFIC_OF}
_SAMPLED = {
    "reward": ("", ""),
    "reward_std": ("", ""),
    "completions/mean_length": ("Length of the answers", "tokens"),
    "completions/clipped_ratio": ("Share of answers cut off by rollout.max_new_tokens", ""),
    "frac_reward_zero_std": ("Share of groups with equal rewards, which have no gradient", ""),
    "rewards/failed": ("Answers left out because a reward failed", "answers"),
}
"""Figures of sampled answers, with the title and the unit of the chart of each; without a unit it is a share."""
_TITLES = {
    "experts/imbalance": "Busiest expert over the mean load, mean of the layers",
    "experts/imbalance_max": "Busiest expert over the mean load, in the worst layer",
    "experts/unused": "Share of the experts that no token has chosen yet",
    "rewards/chosen": "Reward of the chosen answers",
    "rewards/rejected": "Reward of the rejected answers",
    "rewards/margins": "Margin of the rewards",
    "rewards/accuracies": "Share of pairs whose chosen answer is preferred",
    "logps/chosen": "Log probability of the chosen answers",
    "logps/rejected": "Log probability of the rejected answers",
    "answers/chosen": "Share of good answers",
    "kl": "Estimate of KL between the model and the reference",
}


def run_report(run: RunRecords, status: PageStatus) -> str:
    """Return the report of a run, in any state, as one HTML page."""
    return render(
        "run.html.jinja",
        run=run,
        status=status,
        subtitle=" \u00b7 ".join(_subtitle(run)),
        outcome=_outcome(run),
        notes=_notes(run, status),
        figures=list(_figures(run)),
        charts=draw(_charts(run)),
        memory=_memory(run),
        plan_note=_plan_note(run),
        comparison=_comparison(run),
        experts=_experts(run),
        answers=list(_answers(run.samples)),
        samples=_samples([sample for sample in run.samples if sample.category is None]),
        settings=None if run.config is None else _settings(settings_by_name(run.config)),
        sources=_sources(run.data),
        saved=_saved(run),
        environment=_environment(run),
    )


def _subtitle(run: RunRecords) -> Iterator[str]:
    """Yield what was trained, on which base and on what, in a few words each."""
    if run.config is None:
        return
    adapter, quant, model = run.config.adapter, run.config.quant, run.config.model
    if adapter.method == "full":
        yield "full fine-tuning"
    else:
        name = ("" if quant.method == "none" else "Q") + ("DoRA" if adapter.use_dora else "LoRA")
        yield f"{name}, rank {adapter.r}"
    yield model.name or Path(model.path).name
    environment = run.state.get("environment", {})
    if {"ranks", "device"} <= environment.keys():
        ranks, is_gpu = environment["ranks"], run.plan.get("machine", {}).get("is_gpu")
        yield f"{ranks} x {environment['device']}" if is_gpu else f"{ranks} CPU process{'' if ranks == 1 else 'es'}"
    if run.metrics.ended is not None:
        yield moment(run.metrics.ended)


def _outcome(run: RunRecords) -> str | None:
    """Return what training did to the held-out loss or reward, in a sentence."""
    held_out = run.metrics.held_out.get("eval_loss")
    if (rewards := run.metrics.held_out.get("eval_reward")) is not None and rewards.steps[0] == 0 < rewards.steps[-1]:
        before, after = (f"{value:.3f}" for value in (rewards.values[0], rewards.values[-1]))
        end = f"{after} after step {rewards.steps[-1]:,.0f}"
        return f"The mean held-out reward went from {before} before training to {end}."
    if held_out is None or len(held_out) < 2 or held_out.steps[0] != 0:
        return None
    step, lowest = held_out.lowest()
    change = difference(held_out.values[0], held_out.values[-1])
    last = f"{loss(held_out.values[-1])} after step {held_out.steps[-1]:,.0f} ({change})"
    best = "" if step == held_out.steps[-1] else f" (lowest: {loss(lowest)} after step {step:,.0f})"
    return f"The held-out loss went from {loss(held_out.values[0])} before training to {last}{best}."


def _notes(run: RunRecords, status: PageStatus) -> list[str]:
    notes = list(run.problems)
    if unreached := run.summary.get("parameters_without_gradient"):
        more = ", ..." if len(unreached) > 4 else ""
        notes.append(f"no gradient reached {len(unreached):,} trained parameters: {', '.join(unreached[:4])}{more}")
    if status.error is None and run.metrics.non_finite:
        step, name = run.metrics.non_finite[0]
        notes.append(f"{name} was not finite at step {step:,}")
    return notes


def _figures(run: RunRecords) -> Iterator[tuple[str, str, str | None]]:
    """Yield (name, value, remark) of the most important figures."""
    summary, training = run.summary, run.metrics.training
    held_out = run.metrics.held_out.get("eval_loss")
    if (rewards := run.metrics.held_out.get("eval_reward")) is not None:
        yield "held-out reward", number(rewards.values[-1]), f"before training {number(rewards.values[0])}"
    elif held_out is not None:
        first = f"before training {loss(held_out.values[0])}" if held_out.steps[0] == 0 else None
        yield "held-out loss", loss(held_out.values[-1]), first if len(held_out) > 1 else None
        step, lowest = held_out.lowest()
        if step != held_out.steps[-1]:
            yield "lowest held-out loss", loss(lowest), f"after step {step:,.0f}"
    if (series := training.get("loss")) is not None:
        weights, window = run.metrics.weights(series), min(window_of(series), len(series))
        mean = fmean(series.values[-window:], None if weights is None else weights[-window:])
        yield "training loss", loss(mean), f"mean{_over(run)} of the last {window:,} steps" if window > 1 else None
    if training:
        total = None if run.config is None else total_steps(run.config.total_steps, run.data)
        yield "steps", f"{run.metrics.step:,}", None if total is None else f"of {total:,}"
    if (seconds := summary.get("train_seconds")) is not None:
        yield "training time", length(seconds), "of the steps alone"
    elif run.metrics.began is not None and run.metrics.ended is not None and training:
        elapsed = max(0.0, run.metrics.ended - run.metrics.began)
        yield "time so far", length(elapsed), f"until {moment(run.metrics.ended)}"
    if (speed := summary.get("tokens_per_second")) is not None:
        yield "tokens/s", number(speed), None
    peaks = training.get("peak_memory_bytes")
    if (peak := summary.get("peak_memory_bytes", peaks and peaks.values[-1])) is not None:
        planned = run.plan.get("device", {}).get("peak")
        yield "peak memory", size(peak), f"per rank, planned {size(planned)}" if planned else "per rank"
    if (trained := summary.get("trainable_parameters")) is not None:
        total_parameters = run.plan.get("model", {}).get("parameters")
        share = f"{trained / total_parameters:.2%} of the base" if total_parameters else None
        yield "trained parameters", count(trained), share


def _charts(run: RunRecords) -> Iterator[Figure]:
    training, config = run.metrics.training, run.config
    speed, peak = (run.plan.get("time") or {}).get("tokens_per_second"), run.plan.get("device", {}).get("peak")
    yield from _reward_charts(run)
    yield _loss_chart(run)
    if "lr" in training:
        yield Figure(title="Learning rate", curves=[training["lr"].curve("lr")], from_zero=True)
    if "grad_norm" in training:
        levels = [("clipped at", None if config is None else config.optim.max_grad_norm or None)]
        curves = _with_mean("", training["grad_norm"], run)
        yield Figure(title="Gradient norm", unit="before clipping", curves=curves, levels=levels)
    if "tokens_per_second" in training:
        curves, levels = _with_mean("", training["tokens_per_second"]), [("planned", speed)]
        yield Figure(title="Speed", unit="tokens/s", curves=curves, levels=levels, from_zero=True)
    peaks = training.get("peak_memory_bytes")
    if peaks is not None and not peaks.is_constant:  # The table has a single value.
        curves, levels = [peaks.curve("measured")], [("planned", peak)]
        unit = "per rank so far"
        yield Figure(title="Peak memory", unit=unit, curves=curves, levels=levels, kind="bytes", from_zero=True)
    if "mfu" in training:
        curves = _with_mean("", training["mfu"])
        yield Figure(title="MFU", unit="of the GPU's peak", curves=curves, kind="share", from_zero=True)
    drawn = _CHARTED | _TRAFFIC | _SAMPLED.keys()
    for name, series in training.items():
        if name not in drawn and not name.startswith("memory") and not series.is_constant:
            curves = _with_mean("training", series)
            if (held_out := run.metrics.held_out.get(f"eval_{name}")) is not None:
                curves.append(_held_out(held_out))
            kind = "share" if name in ("rewards/accuracies", "answers/chosen", "experts/unused") else "number"
            yield Figure(title=_TITLES.get(name, name), curves=curves, kind=cast(Any, kind))


def _reward_charts(run: RunRecords) -> Iterator[Figure]:
    """Yield the reward of the sampled answers, with its spread, and what explains it; nothing without rewards."""
    training, held_out = run.metrics.training, run.metrics.held_out
    if (rewards := training.get("reward")) is None:
        return
    curves, spread = _with_mean("sampled answers", rewards), training.get("reward_std", Series([], []))
    values = zip(rewards.steps, rewards.values, map(spread.at, rewards.steps), strict=True)
    edges = [(step, value - width, value + width) for step, value, width in values if width is not None]
    if edges:
        steps, lower, upper = map(list, zip(*edges, strict=True))
        name = "within one standard deviation of a group, on average"
        curves.insert(0, Curve(name=name, x=steps, y=lower, upper=upper, style="faint"))
    if "eval_reward" in held_out:
        curves.append(_held_out(held_out["eval_reward"]))
    yield Figure(title="Reward", unit="mean of the answers", curves=curves, is_wide=True)
    for name, (title, unit) in _SAMPLED.items():
        if title and (series := training.get(name)) is not None and not series.is_constant:
            kind: Any = "number" if unit else "share"
            curves = _with_mean("", series)
            if (evaluated := held_out.get(f"eval_{name}")) is not None:
                curves.append(_held_out(evaluated))
            yield Figure(title=title, unit=unit, curves=curves, kind=kind, from_zero=True)


def _loss_chart(run: RunRecords) -> Figure:
    training, held_out, note = run.metrics.training.get("loss"), run.metrics.held_out.get("eval_loss"), None
    lines = [] if training is None else _with_mean("training", training, run)
    samples = "reward" in run.metrics.training
    if held_out is not None and not samples:  # That of GRPO is the negative reward, which has a chart.
        lines.append(_held_out(held_out))
    if run.metrics.non_finite:
        step, name = run.metrics.non_finite[0]
        others = len(run.metrics.non_finite) - 1
        note = f"Not drawn because not finite: {name} of step {step:,}" + (f", and {others:,} more" if others else "")
    unit = "token" if run.config is None else run.config.train.needs.unit.removeprefix("target_").removesuffix("s")
    scale = "" if samples else "nats "  # GRPO's loss is no log-probability.
    return Figure(title="Loss", unit=f"{scale}per {unit}", curves=lines, is_wide=True, note=note)


def _held_out(series: Series) -> Curve:
    return series.curve("held out", colour=1, style="dotted points")


def _over(run: RunRecords) -> str:
    """Return what means of training steps are weighted by, in words."""
    names = {"target_tokens": " over the tokens", "pairs": " over the pairs", "answers": " over the answers"}
    return next((words for name, words in names.items() if name in run.metrics.training), "")


def _with_mean(name: str, series: Series, weighted: RunRecords | None = None) -> list[Curve]:
    """Return a curve, and if it has many values also its running mean, weighted by the steps' tokens of a run."""
    if len(series) < SMOOTHED_FROM or series.is_constant:
        return [series.curve(name or "each step")]
    name = f"{name}, " if name else ""
    window, weights, over = window_of(series), None, ""
    if weighted is not None:
        weights, over = weighted.metrics.weights(series), _over(weighted)
    return [
        series.curve(f"{name}each step", style="faint"),
        smoothed(series, window, weights).curve(f"{name}mean{over} of {window:,} steps"),
    ]


def _trials(run: RunRecords) -> int:
    trials: int = run.plan.get("trials", 1)
    return trials


def _plan_note(run: RunRecords) -> str | None:
    if not run.plan:
        return None
    machine, device = run.plan.get("machine", {}), run.plan.get("device", {})
    words = []
    if "peak" in device:
        where = PHASES.get(device.get("worst"), "")
        unit = "GPU" if machine.get("is_gpu") else "process"
        words.append(f"Planned peak: {size(device['peak'])} per {unit}{f', {where}' if where else ''}.")
    fits = {False: "By the plan the run does not fit.", None: "Whether the run fits was not known."}
    words += filter(None, [fits.get(run.plan.get("fits"))])
    if (trials := _trials(run)) > 1:
        words.append(f"The plan is of the multi-trial run with {trials:,} trials on one base.")
    return " ".join(words)


def _memory(run: RunRecords) -> dict[str, Any] | None:
    """Return the memory of the measured step by category, planned beside measured."""
    values = run.summary or {
        name: series.values[-1] for name, series in run.metrics.training.items() if name.startswith("memory")
    }
    measured, planned = _categories(values, "memory/"), _categories(values, "memory_planned/")
    planned = planned or {k: float(v) for k, v in run.plan.get("device", {}).get("by_kind", {}).items()}
    if not run.plan or not planned:
        return None
    here, there = (grouped({kind: round(value) for kind, value in each.items()}) for each in (measured, planned))
    kinds = sorted(here | there, key=lambda kind: -max(here.get(kind, 0), there.get(kind, 0)))
    rows = [
        (_MERGED_CATEGORIES.get(kind) or KINDS.get(kind, kind), there.get(kind, 0), here.get(kind, 0)) for kind in kinds
    ]
    note = "Memory is that of tensors on the device, at the peak of one step, on the rank with the most."
    if not here:
        note = "The memory of a step was not measured." if run.summary else "No step has been measured yet."
    return {
        "note": note,
        "is_measured": bool(here),
        "largest": max([*here.values(), *there.values(), 1]),
        "rows": [(*row, difference(*row[1:])) for row in rows],
        "total": (sum(there.values()), sum(here.values()), difference(sum(there.values()), sum(here.values()))),
    }


def _categories(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return bytes by category of the figures whose names have the prefix."""
    figures = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {
        name: float(value)
        for name, value in figures.items()
        if name not in ("peak", "planned") and isinstance(value, (int, float)) and 0 < value < 1e30
    }


def _comparison(run: RunRecords) -> Table | None:
    """Return the figures that the plan or the run knows."""
    plan, summary = run.plan, run.summary
    wire, disk = plan.get("wire", {}), plan.get("disk", {})
    saved = {saved.what: saved.nbytes for saved in run.saved}
    reduced = None if "reduced" not in wire else wire["reduced"] + wire.get("reduced_rows", 0)
    figures: list[tuple[str, Any, Any]] = [
        ("tokens/s", (plan.get("time") or {}).get("tokens_per_second"), summary.get("tokens_per_second")),
        (_RESIDENT, None, summary.get("resident_memory_bytes")),
        (_GATHERED, wire.get("gathered"), summary.get("gathered_bytes_per_step")),
        ("exchanged per step and rank", wire.get("exchanged"), summary.get("exchanged_bytes_per_step")),
        ("gradients all-reduced per step and rank", reduced, summary.get("reduced_bytes_per_step")),
        ("gradients scattered per step and rank", wire.get("scattered"), summary.get("scattered_bytes_per_step")),
        ("a checkpoint", disk.get("checkpoint"), saved.get("checkpoint")),
        ("the result", disk.get("result"), saved.get("result")),
    ]
    rows = []
    for name, planned, measured in figures:
        if (not planned and not measured) or (_trials(run) > 1 and name not in _SHARED_BY_TRIALS):
            continue
        write = number if name == "tokens/s" else size
        texts = ["" if value is None else write(value) for value in (planned, measured)]
        gap = "" if planned is None or measured is None else difference(planned, measured)
        rows.append([name, texts[0] or "not planned", texts[1], gap])
    return Table("", ["figure", "planned", "measured", "difference"], rows) if plan and rows else None


_LEVELS = ".\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Bars of an expert's load: none, then a quarter of the mean more each."""


def _experts(run: RunRecords) -> dict[str, Any] | None:
    """Return the load of each expert by layer."""
    if run.metrics.expert_tokens is None:
        return None
    step, load = run.metrics.expert_tokens
    frozen, idle = run.summary.get("expert_layers_without_adapter", []), idle_experts(load)
    rows: list[list[str | float]] = []
    for layer, tokens in sorted(load.items()):
        mean = sum(tokens) / len(tokens)
        bars = "".join(_LEVELS[0 if not n else min(1 + int(4 * n / mean), len(_LEVELS) - 1)] for n in tokens)
        notes = [idle.get(layer, ""), "no adapters" if str(layer) in frozen else ""]
        over = f"{imbalance(tokens):.2f} x"
        rows.append([layer, tokens.index(max(tokens)), over, "; ".join(filter(None, notes)), bars])
    count = sum(not n for tokens in load.values() for n in tokens)
    unused = f"No token chose {count:,} of {sum(map(len, load.values())):,} experts." if count else ""
    columns = ["layer", "busiest expert", "over the mean", "no token", "load"]
    return {"step": step, "table": Table("", columns, rows), "unused": unused}


def _answers(samples: Sequence[WrittenSample]) -> Iterator[Table]:
    """Yield the best, worst and changed answers of each evaluation, the newest first."""
    columns = {"": "", "reward": ".4g", "before": ".4g", "prompt": "", "answer": "", "answer before": ""}
    by_step: dict[int, list[WrittenSample]] = {}
    for sample in samples:
        if sample.category is not None:
            by_step.setdefault(sample.step, []).append(sample)
    for step, answers in sorted(by_step.items(), reverse=True)[:MAX_EVALUATIONS]:
        rows = [
            [answer.category, answer.reward, "" if answer.reward_before is None else answer.reward_before]
            + [_cut(text) for text in (answer.prompt, answer.text, answer.before or "")]
            for answer in answers
        ]
        yield Table(f"after step {step:,}", columns, rows)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ... ({len(text):,} characters)"


def _samples(samples: Sequence[WrittenSample]) -> list[tuple[str, str, list[WrittenSample], int]]:
    """Return (prompt, URL of its image, samples to show, number of samples left out) for each prompt."""
    by_prompt: dict[tuple[str, str | None], list[WrittenSample]] = {}
    for sample in samples:
        by_prompt.setdefault((sample.prompt, sample.image), []).append(sample)
    result = []
    for (prompt, image), texts in list(by_prompt.items())[:MAX_PROMPTS]:
        last = len(texts) - 1
        places = range(len(texts))
        if len(texts) > MAX_SAMPLES:
            places = [round(last * place / (MAX_SAMPLES - 1)) for place in range(MAX_SAMPLES)]  # type: ignore[assignment]
        url = "" if image is None else _small_picture(image)
        result.append((prompt, url, [texts[place] for place in places], len(texts) - len(places)))
    return result


def _small_picture(file: str) -> str:
    """Return an image as a data: URL of at most PICTURE_SIZE pixels a side; empty for what is no image here and now."""
    from distlora.data.images import open_image  # Imported late: reports of other runs need no numpy.

    made = io.BytesIO()
    try:
        with open_image(file, "the report") as image:
            image.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
            image.convert("RGB").save(made, "PNG")
    except (UserError, ModuleNotFoundError):  # The file is gone, or where the report is written there is no pillow.
        return ""
    return f"data:image/png;base64,{base64.b64encode(made.getvalue()).decode()}"


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return (setting, value, default) of changed settings, and by section (setting, value) of the others."""
    values = {name: value for name, value in settings.items() if name != "run_dir"}
    required: dict[str, Any] = {
        "model": ModelConfig(path=NO_DEFAULT),
        "data": DataConfig(path=NO_DEFAULT),
        "run_dir": NO_DEFAULT,
    }
    defaults = settings_by_name(Config(**required))
    unchanged: dict[str, list[tuple[str, Any]]] = {}
    for name, value in values.items():
        if value == defaults.get(name):
            unchanged.setdefault(name.partition(".")[0] if "." in name else "run", []).append((name, value))
    changed = [(name, value, defaults.get(name)) for name, value in values.items() if value != defaults.get(name)]
    return {"changed": changed, "unchanged": unchanged, "count": len(values) - len(changed)}


def _sources(data: Mapping[str, Any]) -> Table | None:
    """Return the counts and the sources of training and held-out data."""
    columns = {"": "", "documents": ",", "sequences": ",", "trained tokens": ",", "tokens": ",", "from": ""}
    rows = []
    for split, title in (("train", "training"), ("eval", "held out")):
        counts = data.get("splits", {}).get(split)
        if counts is not None:
            numbers = [counts.get(name, "") for name in ("documents", "rows", "targets", "tokens")]
            rows.append([title, *numbers, ", ".join(map(_source, counts.get("sources", [])))])
    return Table("", columns, rows) if rows else None


def _saved(run: RunRecords) -> Table | None:
    columns = {"folder": "", "what": "", "step": ",", "held-out loss": "", "size": ""}
    losses, rows = run.metrics.held_out.get("eval_loss"), []
    for saved in run.saved:
        at = None if losses is None or saved.step is None else losses.at(saved.step)
        what = saved.what if saved.is_whole else f"{saved.what}, incomplete"
        step = "" if saved.step is None else saved.step
        rows.append([saved.name, what, step, "" if at is None else loss(at), size(saved.nbytes)])
    return Table("", columns, rows) if rows else None


def _source(source: Mapping[str, Any]) -> str:
    parts = [str(source.get("path", "?"))]
    if source.get("name"):
        parts.append(str(source["name"]))
    if source.get("commit"):
        parts.append(f"at {str(source['commit'])[:12]}")
    share = source.get("share")
    return " ".join(parts) + (f" ({share:.0%})" if isinstance(share, float) and share < 1 else "")


def _environment(run: RunRecords) -> Table | None:
    """Return the base, the machine and the versions."""
    model, machine = run.plan.get("model", {}), run.plan.get("machine", {})
    rows: list[tuple[str, Any]] = []
    if run.config is not None:
        rows.append(("base", run.config.model.name or run.config.model.path))
        if run.config.model.revision is not None:
            rows.append(("revision", run.config.model.revision))
    if "parameters" in model:
        rows.append(("model type", f"{model.get('model_type', '')}, {count(model['parameters'])} parameters"))
        if quantized := model.get("parameters_quantized"):
            bits = run.summary.get("bits_per_parameter")
            with_scales = f", {bits:.3f} bits each with their scales" if bits is not None else ""
            rows.append(("quantized", f"{count(quantized)} parameters{with_scales}"))
    if "base_fingerprint" in run.state.get("identity", {}):
        rows.append(("fingerprint of the base", run.state["identity"]["base_fingerprint"]))
    if "name" in machine and "ranks" in machine:
        ranks = machine["ranks"]
        rows.append(("planned for", f"{machine['name']}, {ranks:,} process{'es' if ranks > 1 else ''}"))
    rows += run.state.get("environment", {}).items()
    return Table("", ["", ""], [[name, as_text(value)] for name, value in rows]) if rows else None


MAX_METRICS_BYTES = 4_000_000
"""Largest metrics.jsonl of which a report is made as the run ends: some ten thousand steps, 0.3 s."""


def write_final_report(run_dir: Path) -> None:
    """Write the report of a run whose workers have ended well. A failure is printed and costs the run nothing."""
    command = f"distlora report {shown(run_dir)}"
    try:
        if (run_dir / METRICS_NAME).stat().st_size > MAX_METRICS_BYTES:
            say(f"write a report of it with: {command}")
            return
        write_report(run_dir)
        say(f"report {shown(run_dir / REPORT_NAME)}")
    except Exception as error:
        warn(f"no report was written ({type(error).__name__}: {error}); the run is complete; try {command}")


def write_report(run_dir: Path) -> None:
    """Write RUN/report.html of a run that has its result, even while its launcher still holds the lock."""
    result = find_result(run_dir)
    headline = f"is done: {shown(result)}" if result is not None else "is done"
    standing = PageStatus(
        state="done",
        headline=headline,
        commands=(*commands_when_done(run_dir, result), *commands_always(run_dir)),
    )
    atomic_io.write_text(run_dir / REPORT_NAME, run_report(read_run(run_dir), standing))


def commands_when_done(run_dir: Path, result: Path | None) -> list[tuple[str, str]]:
    """Return (command, what it does) for a run with a result."""
    run, is_adapter = shlex.quote(str(run_dir)), result is not None and result.name == "adapter"
    splits = object_or_empty(run_dir / DATA_NAME).get("splits")
    text = "" if isinstance(splits, dict) and "eval" in splits else " --text FILE"
    commands = [
        (f"distlora generate {run}", "chat with the result"),
        (f"distlora eval {run}{text}", f"compare it with the base on {'documents' if text else 'the held-out data'}"),
    ]
    if is_adapter:
        commands.append((f"distlora merge {run}", "merge the adapter into the base: a Hugging Face model folder"))
    commands.append((f"distlora export {run} --format gguf", "make a GGUF file for llama.cpp or Ollama"))
    commands.append((f"distlora push {run} ORG/NAME", "upload it to the Hugging Face hub, with a model card"))
    if is_adapter:
        train = f"distlora train ... adapter.init_from={shlex.quote(str(result))}"
        commands.append((train, "train it further, on other data or for longer"))
    return commands


def commands_always(run_dir: Path) -> list[tuple[str, str]]:
    """Return (command, what it does) for a run in any state."""
    run = shlex.quote(str(run_dir))
    return [
        (f"distlora verify {run}", "check every byte of its checkpoints and records"),
        (f"distlora report {run}", "write this report again"),
    ]
