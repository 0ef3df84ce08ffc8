"""Write the model card of a trained run for the Hugging Face hub.

Every fact comes from the run folder (distlora.run_folder.layout). Local files are named without their folders. Needs no
torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from distlora.architecture.config_checks import read_config
from distlora.architecture.low_bit_methods import BNB_NF4, quantization_method
from distlora.architecture.spec import architecture_of
from distlora.checkpoint.state import fixed_settings
from distlora.config import SourceConfig, UserError
from distlora.config.base import is_hub_name
from distlora.config.file import parse_yaml, settings_by_name
from distlora.config.training import DEFAULT_WARMUP
from distlora.run_folder.layout import DATA_NAME, TEMPLATE_NAME, Result
from distlora.run_folder.stages import stage_rows
from distlora.system.numbers import length, size
from distlora.weights.peft_folder import WEIGHTS_NAME
from distlora_kernels.format_layouts import labels

HUB = "https://huggingface.co"
_VERSIONS = ("distlora", "torch", "transformers", "python")


def model_card(result: Result, *, repository: str, base: str | None, license_of_base: Mapping[str, Any]) -> str:
    """Return README.md of a hub repository: YAML metadata, then sections for readers.

    `base` is the base model's name on the hub, or None. `license_of_base` is what its card states (license,
    license_name, license_link), which a derived model inherits.
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
    """Return the YAML at the head of a model card; empty if there is none."""
    try:
        match = re.match(rb"---\n(.*?)\n---\n", card.read_bytes(), re.DOTALL) if card.is_file() else None
        values = parse_yaml(match[1]) if match else None
    except ValueError:  # A third party's card may be invalid.
        values = None
    return values if isinstance(values, dict) else {}


def _metadata(result: Result, base: str | None, license_of_base: Mapping[str, Any]) -> str:
    import yaml

    config = result.config
    tags = ["distlora"]
    if result.adapter is not None:
        tags = ["lora", *(["qlora"] if config.quant.method != "none" else []), *tags]
    datasets = sorted({source.path for source in config.data.training_sources if is_hub_name(source.path)})
    values: dict[str, Any] = {
        **({"base_model": base} if base else {}),
        "library_name": "peft" if result.adapter is not None else "transformers",
        "pipeline_tag": "image-text-to-text"
        if config.data.images
        else ("text-generation", "text-classification", "token-classification")[config.train.needs.labels],
        "tags": tags,
        **({"datasets": datasets} if datasets else {}),
        **license_of_base,
    }
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _introduction(result: Result, base: str | None) -> str:
    config = result.config
    if result.adapter is None:
        kind = "A fully fine-tuned model"
    elif config.quant.is_nf4:
        kind = "A QLoRA adapter, trained on the base in 4-bit NF4 with double quantization"
    elif config.quant.method == "keep":
        kind = f"A QLoRA adapter, trained on the base in the checkpoint's format, {_formats(result)}"
    elif config.quant.method == "mixed":
        number = len(config.quant.exceptions)
        kind = (
            f"A QLoRA adapter, trained on the base in 4-bit NF4 with {number} weights in larger formats (quant=mixed)"
        )
    else:
        kind = f"A LoRA adapter, trained on the base in {config.train.dtype}"
    if base is None and config.model.gguf_file is not None:
        return f"{kind}. The base is the GGUF file `{PurePath(config.model.gguf_file).name}`."
    if base is None:
        return f"{kind}. The base is a model that is not on the Hugging Face hub."
    commit = config.model.revision if base == config.model.name else None
    place = f"[{base}]({HUB}/{base})" + (f" at commit [`{commit[:12]}`]({HUB}/{base}/tree/{commit})" if commit else "")
    return f"{kind}. Base: {place}."


def _formats(result: Result) -> str:
    """Return the formats of the base's weights in low bits, in words."""
    return ", ".join(labels(result.summary.get("formats", []))) or "low bits"


_TRAIN_ON = {"assistant": "every assistant turn", "last": "the last assistant turn", "all": "all"}


def _data(result: Result) -> Iterator[str]:
    """Yield a line per source and one of counts per split."""
    splits = result.data.get("splits", {})
    sources = result.config.data.training_sources
    counted = splits.get("train", {}).get("sources", [{}] * len(sources))
    if len(counted) != len(sources):
        raise UserError(
            f"{DATA_NAME} counts {len(counted)} sources, and config.yaml names {len(sources)}; make it again with "
            "`distlora data prepare RUN`"
        )
    for source, counts in zip(sources, counted, strict=True):
        share = []
        if len(sources) > 1 and {"documents", "share"} <= counts.keys():
            share = [f"{counts['documents']:,} documents", f"{counts['share']:.1%} of the trained tokens"]
        yield f"- {_source(source, counts, share)}"
    held_out = result.config.data.held_out_source
    for split, title in (("train", "training"), ("eval", "held out")):
        if split in splits:
            counts = splits[split]
            place = ""
            if split == "eval" and held_out is not None:
                place = f"{_source(held_out, next(iter(counts.get('sources', [])), {}), [])}, "
            yield (
                f"- {title}: {place}{counts['documents']:,} documents, {counts['targets']:,} trained of "
                f"{counts['tokens']:,} tokens" + (f", {counts['images']:,} images" if "images" in counts else "")
            )
    data = result.config.data
    if data.images:
        bounds = {"at most": data.image_max_pixels, "at least": data.image_min_pixels}
        resized = " and ".join(f"{word} {pixels:,} pixels" for word, pixels in bounds.items() if pixels)
        sizes = f"resized to {resized}" if resized else "of any size"
        yield f"- images: {sizes}, then read by the base's image processor"
    if "train_on" not in result.data.get("settings", {}):  # The documents hold no chats.
        return
    if data.template is not None and result.chat_template is not None:
        yield f"- chat template: {_shown(data.template)} (not the base's own)"
    yield f"- trained tokens of a chat: {_TRAIN_ON[data.train_on]}"


def _source(source: SourceConfig, counts: Mapping[str, Any], more: list[str]) -> str:
    """Name a source by its hub name with split and commit, or by its file name. `more` joins the details."""
    name, details = _shown(source.path), [source.name]
    if is_hub_name(source.path):
        name = f"[{source.path}]({HUB}/datasets/{source.path})"
        commit = counts.get("commit") or source.revision
        details += [f"split {source.split}", f"commit `{commit[:12]}`" if commit else None]
    shown = ", ".join(detail for detail in [*details, *more] if detail)
    return name + (f" ({shown})" if shown else "")


_SETTINGS = (
    "model.new_tokens",
    "model.special_tokens",
    "quant.method",
    "data.sequence_length",
    "train.dtype",
    "train.neftune_alpha",
    "train.global_batch",
    "train.seed",
)
"""Settings in the card beside those of `adapter` and `optim`."""


def _settings(result: Result) -> Iterator[tuple[str, str]]:
    values, optim = settings_by_name(result.config), result.config.optim
    if optim.warmup_steps is None and optim.warmup_ratio is None:
        values["optim.warmup_ratio"] = DEFAULT_WARMUP
    for name, value in values.items():
        is_adapter_setting = name.startswith(("adapter.", "optim.loraplus"))
        is_unset = value is None or value is False or value in ([], (), {})
        if is_unset or not (name in _SETTINGS or name.startswith(("adapter.", "optim."))):
            continue
        if is_adapter_setting and result.adapter is None and name != "adapter.method":
            continue
        if isinstance(value, (list, tuple)):
            value = f"{len(value)} entries" if len(value) > 16 else ", ".join(map(str, value))
        elif isinstance(value, Mapping):
            value = ", ".join(f"{key}: {item}" for key, item in value.items())
        yield name, _shown(value) if name == "adapter.init_from" else str(value)
    if result.step is not None:
        yield "steps", f"{result.step:,}"
    yield from stage_rows(result.config, fixed_settings(result.config).keys())  # None of one machine.


def _figures(result: Result) -> Iterator[tuple[str, str]]:
    before, after = result.evaluations.get(0), result.evaluations.get(result.step or 0)
    if before is not None:
        adapter = result.config.adapter
        started = "of the base" if adapter.starts_as_base else "of the adapter that training started from"
        yield f"held-out loss {started} (nats per token)", f"{before:.4f}"
    if after is not None and result.step:
        yield f"held-out loss after {result.step:,} steps", f"{after:.4f}"
    summary, environment = result.summary, result.environment
    if {"ranks", "device"} <= environment.keys():
        yield "processes", f"{environment['ranks']} x {environment['device']}"
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "tokens_per_second": ("tokens a second", "{:,.0f}".format),
        "train_seconds": ("training time", length),
        "peak_memory_bytes": ("peak memory per rank", size),
        "bits_per_parameter": ("bits a quantized weight", "{:.3f}".format),
        "trainable_parameters": ("trained parameters", "{:,}".format),
    }
    yield from ((title, form(summary[name])) for name, (title, form) in shown.items() if name in summary)
    if result.adapter is not None:
        yield "adapter", f"{(result.folder / WEIGHTS_NAME).stat().st_size / 1e6:,.1f} MB"


_NF4 = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
_DENSE = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""transformers' settings that can dequantize, by quant_method."""
_TORCH_NAMES = {"bf16": "bfloat16", "fp32": "float32"}


def _use(result: Result, repository: str, base: str | None) -> str:
    file = result.config.model.gguf_file if base is None else None
    tokenizer = base or ("PATH_OF_THE_BASE" if file is None else "FOLDER_OF_THE_GGUF_FILE")
    config, auto, stored = Path(result.config.model.path) / "config.json", "AutoModelForCausalLM", None
    if config.is_file():
        model = read_config(config.parent)
        auto, stored = architecture_of(model, config).auto_class, quantization_method(model, config)
    if labels := result.config.train.needs.labels:
        auto = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")[labels - 1]
    if result.adapter is None:
        code = (
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f'model = {auto}.from_pretrained("{repository}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")\n'
        )
        return f"```python\n{code}```"
    commit = result.config.model.revision if base and base == result.config.model.name else None
    revision = f', revision="{commit}"' if commit else ""
    if file is not None:
        revision, stored = f', gguf_file="{PurePath(file).name}"', "GGUF blocks"
    is_low_bit = stored not in (None, BNB_NF4)  # bitsandbytes quantizes 16-bit checkpoints only.
    needs_nf4 = result.config.adapter.for_nf4 and not is_low_bit
    # PEFT adds to fused experts in 16 bits alone.
    dense = _DENSE.get(str(stored), "") if result.adapter and result.adapter.get("target_parameters") else ""
    readers = "AutoProcessor, AutoTokenizer" if result.config.data.images else "AutoTokenizer"
    classes = f"{auto}, {readers}" + (", BitsAndBytesConfig" if needs_nf4 else f", {dense}" if dense else "")
    code = f"from peft import PeftModel\nfrom transformers import {classes}\n\n"
    if needs_nf4:  # By default bitsandbytes computes in fp32.
        dtype = _TORCH_NAMES[result.config.train.dtype]
        code += f'nf4 = BitsAndBytesConfig(\n    {_NF4}, bnb_4bit_compute_dtype="{dtype}"\n)\n'
    how = f'{revision}, dtype="auto"' + (", quantization_config=nf4" if needs_nf4 else "")
    how += f", quantization_config={dense}(dequantize=True)" if dense else ""
    how += f", num_labels={labels}" if labels else ""
    code += f'base = {auto}.from_pretrained("{tokenizer}"{how})\n'
    load = f'model = PeftModel.from_pretrained(base, "{repository}")\n'
    own_tokenizer = result.config.model.changes_tokenizer
    if result.config.model.new_tokens:
        code += (
            f'tokenizer = AutoTokenizer.from_pretrained("{repository}")  # It has the new tokens.\n'
            "rows = max(len(tokenizer), base.get_input_embeddings().num_embeddings)\n"
            f"base.resize_token_embeddings(rows, mean_resizing=False)  # The adapter holds the new rows.\n{load}"
        )
    else:
        place = f'{repository}"' if own_tokenizer else f'{tokenizer}"{revision}'
        code += f'{load}tokenizer = AutoTokenizer.from_pretrained("{place})\n'
    if result.chat_template is not None and not own_tokenizer:  # The tokenizer reads it from here.
        code = "from pathlib import Path\n\nfrom huggingface_hub import hf_hub_download\n" + code
        code += (
            f"# The chats were rendered with {TEMPLATE_NAME} of this repository, not with the base's own template.\n"
            f'template = hf_hub_download("{repository}", "{TEMPLATE_NAME}")\n'
            'tokenizer.chat_template = Path(template).read_text(encoding="utf-8")\n'
        )
    if result.config.data.images:
        code += _use_images(f'{tokenizer}"{revision}')
    text = f"```python\n{code}```"
    if result.config.quant.method == "keep":
        text += "\n\nThe adapter is for the checkpoint's own quantized weights: training had the codes and scales in "
        text += f"{_formats(result)} that its files hold, and changed none of them."
    if not result.config.quant.is_nf4:
        return text
    note = "The base can be loaded in the 4-bit form that it was trained on: "
    note += f"`quantization_config=BitsAndBytesConfig({_NF4})`."
    if is_low_bit:
        note = f"The base is stored in {stored}; training had its values in NF4. `distlora merge` writes that model."
    elif result.config.adapter.pissa:
        note = (
            "Load the base in 16 bits: training had the base less the adapter's start in 4 bits, which is not what "
            "quantizing the base gives."
        )
    elif needs_nf4:
        note = "The base must be in this 4-bit form: LoftQ's adapter began as a correction of what NF4 loses."
    elif "active_parameters" in result.summary or result.adapter.get("target_parameters"):
        note = "Training had the experts in 4 bits; bitsandbytes leaves fused experts in 16."
    return f"{text}\n\n{note}"


def _use_images(place: str) -> str:
    """Return the code that asks about an image; `place`: the rest of the call that loads the base's processor."""
    return (
        f'processor = AutoProcessor.from_pretrained("{place})\n'
        "processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template\n\n"
        'content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What does it show?"}]\n'
        'how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}\n'
        'inputs = processor.apply_chat_template([{"role": "user", "content": content}], **how)\n'
        "answer = model.generate(**inputs, max_new_tokens=64)\n"
        "print(tokenizer.decode(answer[0, inputs.input_ids.shape[1] :]))\n"
    )


def _table(rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _shown(path: str) -> str:
    """Return a file's or folder's name without its path; a hub name whole."""
    return path if is_hub_name(path) else PurePath(path).name
