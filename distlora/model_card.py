"""What a run folder says of its result, and the model card that states it on the Hugging Face hub.

Every fact comes from the run folder: config.yaml, data.json, metrics.jsonl, summary.json, state.json of the newest
checkpoint, the adapter's own configuration. Files of this machine are named without their folders. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from distlora.config import Config, UserError, nearest
from distlora.config.places import is_hub_name
from distlora.config_file import load_config

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB = "https://huggingface.co"
PUBLISHED = {"lora": "adapter", "full": "model"}
"""The folder in RUN that a finished run leaves, by adapter.method."""

_CPU = re.compile(r"DEFAULT|NO AVX|AVX\d+|NEON|SVE\d*|VSX|Z ?VECTOR")
"""What torch.backends.cpu.get_cpu_capability() answers; a GPU has a name."""
_CHECKPOINT = re.compile(r"(?:step_)?0*(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Something that a run trained, and what the run folder says of it."""

    config: Config
    folder: Path
    """The files: an adapter in PEFT's format, or a whole model."""
    step: int | None
    """Optimizer steps behind it; None where no figure was logged."""
    adapter: Mapping[str, Any] | None
    """adapter_config.json; None for a whole model."""
    evaluations: Mapping[int, float]
    """Held-out loss, nats a token, by step."""
    data: Mapping[str, Any]
    """data.json."""
    summary: Mapping[str, Any]
    """summary.json; empty before the end of a run."""
    environment: Mapping[str, Any]
    """What the newest checkpoint was made on: ranks, device, versions."""


def read_result(run_dir: Path, checkpoint: str | None = None) -> Result:
    """What a run published, or with `checkpoint` its best (`best`) or a saved step (`step_100`, `100`).

    Raises UserError for a folder without a run, a run that is not finished, and a checkpoint that is not there.
    """
    config = load_config(run_dir)
    lines = _read_lines(run_dir / "metrics.jsonl")
    evaluations = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    summary = _read_json(run_dir / "summary.json")
    last = max((line["step"] for line in lines), default=None)
    if checkpoint is None:
        folder = run_dir / PUBLISHED[config.adapter.method]
        if not folder.is_dir():
            raise UserError(
                f"{run_dir} is not finished: it has no {folder.name} folder; continue it with `distlora resume "
                f"{run_dir}`, or name what it has with --checkpoint{_saved(run_dir)}"
            )
        step = summary.get("best_step", last) if config.train.load_best_at_end else last
    elif checkpoint == "best":
        folder = run_dir / "best"
        if not folder.is_dir():
            raise UserError(
                f"{run_dir} has no best: that needs evaluations during training (train.eval_every); leave "
                "--checkpoint out, or name a saved step"
            )
        trained = {step: loss for step, loss in evaluations.items() if step > 0}
        step = min(trained, key=trained.__getitem__, default=None)
    else:
        step, folder = _checkpoint(run_dir, checkpoint, config)
    is_adapter = config.adapter.method == "lora"
    return Result(
        config=config,
        folder=folder,
        step=step,
        adapter=json.loads((folder / ADAPTER_CONFIG).read_text()) if is_adapter else None,
        evaluations=evaluations,
        data=_read_json(run_dir / "data.json"),
        summary=summary,
        environment=_environment(run_dir),
    )


def model_card(result: Result, *, repository: str, base: str | None, license_of_base: Mapping[str, Any]) -> str:
    """README.md of a repository on the hub: metadata in YAML, then sections for people.

    `base` is the base model's name on the hub, None where it has none; `license_of_base` what its own card says
    (license, license_name, license_link), which a derived model inherits.
    """
    sections = [
        f"# {repository.rpartition('/')[2]}",
        _introduction(result, base),
        "## Data\n\n" + "\n".join(_data(result)),
        "## Settings\n\n" + _table(_settings(result)),
        "## Figures\n\n" + _table(_figures(result)),
        "## Use\n\n" + _use(result, repository, base),
    ]
    versions = ", ".join(f"{name} {result.environment[name]}" for name in _VERSIONS if name in result.environment)
    if versions:
        sections.append(f"Trained with {versions}.")
    return f"---\n{_metadata(result, base, license_of_base)}---\n\n" + "\n\n".join(sections) + "\n"


def read_metadata(card: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none."""
    import yaml

    match = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        values = None
    return values if isinstance(values, dict) else {}


_VERSIONS = ("distlora", "torch", "transformers", "python")


def _metadata(result: Result, base: str | None, license_of_base: Mapping[str, Any]) -> str:
    import yaml

    config = result.config
    tags = ["distlora"]
    if result.adapter is not None:
        tags = ["lora", *(["qlora"] if config.quant.method == "nf4" else []), *tags]
    datasets = sorted({source.path for source in config.data.training_sources if is_hub_name(source.path)})
    values: dict[str, Any] = {
        **({"base_model": base} if base else {}),
        "library_name": "peft" if result.adapter is not None else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
        **({"datasets": datasets} if datasets else {}),
        **license_of_base,
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _introduction(result: Result, base: str | None) -> str:
    config = result.config
    if result.adapter is None:
        kind = "A fully fine-tuned model"
    elif config.quant.method == "nf4":
        kind = "A QLoRA adapter, trained on the base in 4-bit NF4 with double quantization"
    else:
        kind = f"A LoRA adapter, trained on the base in {config.train.dtype}"
    if base is None:
        return f"{kind}. The base is a model that is not on the Hugging Face hub."
    commit = config.model.revision if base == config.model.name else None
    place = f"[{base}]({HUB}/{base})" + (f" at commit [`{commit[:12]}`]({HUB}/{base}/tree/{commit})" if commit else "")
    return f"{kind}. Base: {place}."


def _data(result: Result) -> Iterator[str]:
    """A line a source, and one of counts for each split."""
    splits = result.data.get("splits", {})
    sources = result.config.data.training_sources
    counted = splits.get("train", {}).get("sources", [{}] * len(sources))
    for source, counts in zip(sources, counted, strict=True):
        name, details = _shown(source.path), [source.name]
        if is_hub_name(source.path):
            name = f"[{source.path}]({HUB}/datasets/{source.path})"
            commit = counts.get("commit") or source.revision
            details += [f"split {source.split}", f"commit `{commit[:12]}`" if commit else None]
        if len(sources) > 1 and counts:
            details += [f"{counts['documents']:,} documents", f"{counts['share']:.1%} of the trained tokens"]
        shown = ", ".join(detail for detail in details if detail)
        yield f"- {name}" + (f" ({shown})" if shown else "")
    for split, title in (("train", "training"), ("eval", "held out")):
        if split in splits:
            counts = splits[split]
            yield (
                f"- {title}: {counts['documents']:,} documents, {counts['targets']:,} trained of "
                f"{counts['tokens']:,} tokens"
            )
    data = result.config.data
    if data.template is not None:
        yield f"- chat template: {_shown(data.template)} (not the base's own)"
    yield f"- trained tokens of a chat: {_TRAIN_ON[data.train_on]}"


_TRAIN_ON = {"assistant": "every assistant turn", "last": "the last assistant turn", "all": "all"}


def _settings(result: Result) -> Iterator[tuple[str, str]]:
    config, adapter = result.config, result.adapter
    optim, train = config.optim, config.train
    if adapter is None:
        yield "method", "full fine-tuning"
    else:
        yield "method", "LoRA" + (", rsLoRA scaling" if adapter.get("use_rslora") else "")
        yield "r", _with_pattern(adapter["r"], adapter.get("rank_pattern"))
        yield "lora_alpha", _with_pattern(adapter["lora_alpha"], adapter.get("alpha_pattern"))
        yield "lora_dropout", f"{config.adapter.lora_dropout:g}"
        targets = adapter["target_modules"]
        many = isinstance(targets, list) and len(targets) > 16
        yield "target_modules", f"{len(targets)} linears" if many else _joined(targets)
        if config.adapter.init_from is not None:
            yield "started from", _shown(config.adapter.init_from)
    yield "base in training", "NF4, double quantization" if config.quant.method == "nf4" else train.dtype
    yield "compute dtype", train.dtype
    yield "optimizer", f"{optim.name}, betas {_joined(optim.betas)}, weight decay {optim.weight_decay:g}"
    ratio = f" (B: {optim.loraplus_lr_ratio:g} times that)" if optim.loraplus_lr_ratio != 1 else ""
    yield "learning rate", f"{optim.lr:g}{ratio}"
    yield "schedule", f"{optim.schedule}, warm-up over {optim.warmup_ratio:.0%} of the steps"
    yield "gradient norm", f"clipped to {optim.max_grad_norm:g}" if optim.max_grad_norm else "not clipped"
    length = config.data.sequence_length
    yield "batch", f"{train.global_batch:,} rows of {length:,} tokens, documents packed"
    if result.step is not None:
        yield "steps", f"{result.step:,}"
    yield "seed", str(train.seed)


def _figures(result: Result) -> Iterator[tuple[str, str]]:
    """What was measured, as far as the run folder has it."""
    before, after = result.evaluations.get(0), result.evaluations.get(result.step or 0)
    if before is not None:
        yield "held-out loss of the base (nats a token)", f"{before:.4f}"
    if after is not None and result.step:
        yield f"held-out loss after {result.step:,} steps", f"{after:.4f}"
    summary, environment = result.summary, result.environment
    if "tokens_per_second" in summary:
        yield "tokens a second", f"{summary['tokens_per_second']:,.0f}"
    if "train_seconds" in summary:
        yield "training time", _duration(summary["train_seconds"])
    if "ranks" in environment:
        device = str(environment["device"])
        yield "processes", f"{environment['ranks']} x {f'CPU ({device})' if _CPU.fullmatch(device) else device}"
    if "peak_memory_bytes" in summary:
        yield "peak memory of a process", f"{summary['peak_memory_bytes'] / 2**30:,.2f} GiB"
    if "bits_per_parameter" in summary:
        yield "bits a quantized weight", f"{summary['bits_per_parameter']:.3f}"
    if "trainable_parameters" in summary:
        yield "trained parameters", f"{summary['trainable_parameters']:,}"
    if result.adapter is not None:
        yield "adapter", f"{(result.folder / ADAPTER_WEIGHTS).stat().st_size / 1e6:,.1f} MB"


def _use(result: Result, repository: str, base: str | None) -> str:
    tokenizer = base or "PATH_OF_THE_BASE"
    if result.adapter is None:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repository}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n'
        )
        return f"```python\n{code}```"
    commit = result.config.model.revision if base and base == result.config.model.name else None
    revision = f', revision="{commit}"' if commit else ""
    code = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{tokenizer}"{revision}, dtype="auto")\n'
        f'model = PeftModel.from_pretrained(base, "{repository}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}"{revision})\n'
    )
    text = f"```python\n{code}```"
    if result.config.quant.method == "nf4":
        text += (
            "\n\nThe base can be loaded in the 4-bit form that it was trained on: `quantization_config="
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`.'
        )
    return text


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _with_pattern(value: float, pattern: Mapping[str, Any] | None) -> str:
    others = ", ".join(f"{key}: {item:g}" for key, item in (pattern or {}).items())
    return f"{value:g}" + (f" ({others})" if others else "")


def _joined(values: Any) -> str:
    return values if isinstance(values, str) else ", ".join(str(value) for value in values)


def _shown(path: str) -> str:
    """A file or folder without its place on this machine; a name on the hub whole."""
    return path if is_hub_name(path) else PurePath(path).name


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _checkpoint(run_dir: Path, name: str, config: Config) -> tuple[int, Path]:
    """(step, folder) of a saved step."""
    match = _CHECKPOINT.fullmatch(name)
    folder = run_dir / "checkpoints" / f"step_{int(match[1]):08d}" if match else None
    if match is None or folder is None or not folder.is_dir():
        have = [path.name for path in sorted((run_dir / "checkpoints").glob("step_*"))]
        raise UserError(
            f"--checkpoint {name}: {run_dir} has no such checkpoint{nearest(name, have)}; "
            f"it has{_saved(run_dir) or ' none'}"
        )
    if config.adapter.method == "full":
        raise UserError(
            f"--checkpoint {name} holds weights without the model's configuration; leave --checkpoint out to take the "
            "finished model"
        )
    return int(match[1]), folder


def _saved(run_dir: Path) -> str:
    """` best, step_00000100` for what a run has saved, or an empty string."""
    names = [path.name for path in sorted((run_dir / "checkpoints").glob("step_*"))]
    names = (["best"] if (run_dir / "best").is_dir() else []) + names
    return f" {', '.join(names)}" if names else ""


def _environment(run_dir: Path) -> dict[str, Any]:
    states = sorted((run_dir / "checkpoints").glob("step_*/state.json"))
    return _read_json(states[-1]).get("environment", {}) if states else {}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a kill may have cut off the last."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
