"""Write `--format bnb`: the NF4 base that was trained on, in bitsandbytes' layout, with the adapter in `adapter/`.

transformers and bitsandbytes load the folder, PEFT the adapter; our own loader gets the trained-on weights back bit for
bit. Only this format keeps PiSSA exactly: W minus the initial adapter in NF4, A and B of the run's rank. A base that is
stored in NF4 is copied. The cache of quantized weights has the same files, without the dense tensors.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distlora.architecture.config_checks import read_config
from distlora.architecture.low_bit_headers import LowBitSegment, in_nf4, nf4_config, nf4_tensors
from distlora.config import UserError, require
from distlora.loading.decomposed_adapters import is_pair, load_initial_factors, trained_config, trained_part
from distlora.loading.peft_format import header_marks
from distlora.post.export.client_check import Ours
from distlora.post.export.formats import ClientReading, Export
from distlora.post.load_trained import check_base_unchanged, weights_in
from distlora.post.merge_worker import DTYPES
from distlora.post.merged_folder import Clock, check_space, copy_companions, each, file_of
from distlora.post.trained import Trained
from distlora.post.weights import BaseWeight, OpenBase, open_base, require_whole_tensors
from distlora.run_folder.layout import STATE_NAME
from distlora.system import atomic_io
from distlora.system.import_peft import import_peft
from distlora.weights.low_bit.codecs import write_groups, write_statistics
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import TORCH_DTYPES, Reader
from distlora.weights.writer import FilePlan, Files, lay_out_files, write_index

ADAPTER = "adapter"
"""Folder of the adapter inside the export."""


def write(export: Export) -> None:
    """Write the export a few rows at a time; copy unchanged tensors byte for byte."""
    trained, place = export.trained, export.place
    source = trained.base
    base = open_base(trained.spec, trained.initial_adapter_dir)
    quantized = [weight for weight in base.weights.values() if weight.is_nf4 and not weight.kept]
    dtype = str(DTYPES[export.request.dtype or "fp32"]).removeprefix("torch.")
    if not export.request.no_check:
        odd = next((w for w in base.weights.values() if w.is_nf4 and w.shape[-1] % 64 == 32), None)
        if odd is not None:  # bitsandbytes (0.50) would compute the check incorrectly.
            raise UserError(
                f"{odd.name} has rows of {odd.shape[-1]:,} weights: of 32, 96, 160... bitsandbytes takes wrong scales "
                "on a CPU, so the export cannot be checked here; add --no-check"
            )
    plan = plan_files(base, quantized)
    check_space(place, sum(plan.sizes.values()))
    place.mkdir()
    with Files(place, plan) as files:
        clock = Clock("quantizing", sum(4 * weight.numel for weight in quantized), export.progress)
        # One weight per thread: pieces of 4 MiB are too small to share.
        each(lambda weight: write_weight(weight, files, dtype, clock), quantized, clock)
        for name in plan.copied.keys() - write_rounded(base, files):
            files.copy(name)
    write_index(place, plan)
    copy_companions(place, trained)
    config = read_config(source)
    if quantized:
        config["quantization_config"] = nf4_config(dtype, skipped(base, quantized))
    atomic_io.write_json(place / "config.json", config)
    (place / ADAPTER).mkdir()
    write_adapter(trained, place / ADAPTER, base_name=Path(export.request.out).name)
    (place / "README.md").write_text(card(export, base), encoding="utf-8")


def write_rounded(base: OpenBase, files: Files) -> set[str]:
    """Write unquantized weights that training rounds, in their stored dtype; return their stored names."""
    done = set()
    with Reader() as reader:
        for weight in base.weights.values():
            stored = weight.source.segments[0].dtype
            if weight.is_nf4 or weight.held in (torch.float32, TORCH_DTYPES[stored]):
                continue
            names, first = weight.source.names, 0
            require(
                len(names) == 1,
                f"{weight.name}: {len(names)} tensors in {stored} on disk, which training rounds to {weight.held}; "
                "write --format hf, or train with train.dtype=fp32",
            )
            name = names[0]
            for chunk in weight.chunks(reader):
                files.write(name, first, chunk.to(TORCH_DTYPES[stored]))
                first += len(chunk)
            done.add(name)
    return done


def plan_files(base: OpenBase, quantized: Sequence[BaseWeight]) -> FilePlan:
    """Lay out the base's files with the parts of each quantized weight in its place."""
    require_whole_tensors(base)
    replaced = {name_of(weight): nf4_tensors(name_of(weight), weight.shape) for weight in quantized}
    is_nf4 = any(map(in_nf4, base.files.headers.values()))
    on_disk = base.files.stored if is_nf4 else base.files.headers
    copied = {name: segment for name, segment in on_disk.items() if name not in replaced}
    kept = next((name for name, segment in copied.items() if isinstance(segment, LowBitSegment)), None)
    if kept is not None:
        raise UserError(
            f"{kept} is in low bits in {base.files.folder} and not among the weights that quant=nf4 quantizes, so "
            "bitsandbytes cannot load it; run `distlora merge` instead, which writes it dense"
        )
    tables: dict[str, dict[str, tuple[str, Sequence[int]]]] = {file_of(s): {} for s in on_disk.values()}
    for name, segment in on_disk.items():
        tables[file_of(segment)] |= replaced.get(name, {name: (segment.dtype, segment.shape)})
    return lay_out_files(tables, copied)


def skipped(base: OpenBase, quantized: Sequence[BaseWeight]) -> list[str]:
    """Return the modules that stay dense.

    These are the head, and the shortest paths outside the decoder without a quantized weight.
    """
    held = {".".join(weight.name.split(".")[:size]) for weight in quantized for size in range(weight.name.count("."))}
    modules = {base.model.architecture.head}
    for path in base.model.outside_linears:
        words = path.split(".")
        prefixes = (".".join(words[: size + 1]) for size in range(len(words)))
        modules.add(next(prefix for prefix in prefixes if prefix not in held))
    return sorted(modules)


def write_adapter(trained: Trained, folder: Path, *, base_name: str) -> None:
    """Write the adapter of the quantized base; for PiSSA the trained one, not the difference from the initial one."""
    assert trained.weights is not None
    weights = weights_in(trained.weights)
    settings = json.loads((weights / CONFIG_NAME).read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base_name, "revision": None}
    if not trained.foreign:
        check_base_unchanged(weights, trained)
    if not trained.spec.adapter.pissa:
        shutil.copyfile(weights / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    else:
        tensors = load_file(weights / WEIGHTS_NAME)
        if not (weights / STATE_NAME).is_file():
            start = load_initial_factors(trained.initial_adapter_dir)
            settings = trained_config(settings)
            for name in filter(is_pair, tensors):
                tensors[name] = trained_part(name, tensors[name], start[name], weights).contiguous()
        # With "pissa", PEFT would decompose the base it loads onto.
        settings["init_lora_weights"] = True
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt", **header_marks(trained.spec.adapter)})
    atomic_io.write_json(folder / CONFIG_NAME, settings)


def card(export: Export, base: OpenBase) -> str:
    """Return README.md: what the export is and how to load it."""
    name, vocabulary, auto = Path(export.request.out).name, base.model.vocabulary, base.model.architecture.auto_class
    grows = ""
    if vocabulary.has_grown:
        call = f"model.resize_token_embeddings({vocabulary.rows}, mean_resizing=False)"
        grows = f"{call}  # The adapter holds the new rows.\n"
    return (
        f"# {name}\n\nA base in NF4 with double quantization as bitsandbytes stores it, the one that the adapter in "
        f"`{ADAPTER}/` was trained on.\n\n```python\n"
        "from peft import PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{name}", dtype="auto", device_map="auto")\n{grows}'
        f'model = PeftModel.from_pretrained(model, "{name}/{ADAPTER}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```\n'
    )


def check(export: Export, ours: Ours) -> list[ClientReading]:
    """Return readings of our own loader, of bitsandbytes dequantized in fp32, and of the folder as users load it."""
    trained, place = export.trained, export.place
    dtype = json.loads((place / "config.json").read_text("utf-8"))["quantization_config"].get("bnb_4bit_compute_dtype")
    model = open_base(trained.spec, trained.initial_adapter_dir).model
    vocabulary, auto = model.vocabulary, model.architecture.auto_class
    grown = vocabulary.rows if vocabulary.has_grown else None
    dense = _logits(place, ours, torch.float32, grown, auto, dense=True)
    what = "transformers, bitsandbytes and PEFT, dequantized in fp32"
    readings = [taken_back(trained, place), ours.reading(what, dense, ours.exact)]
    gc.collect()
    as_loaded = _logits(place, ours, "auto", grown, auto, dense=False)
    readings.append(ours.reading(f"the same as they load it, computing in {dtype} on this CPU", as_loaded))
    return readings


def taken_back(trained: Trained, place: Path) -> ClientReading:
    """Compare the weights that a run on the export would train on with this run's."""
    spec = trained.spec
    # The export's tokenizer already has the new tokens.
    model = replace(spec.model, path=str(place), new_tokens=(), special_tokens={})
    again = replace(spec, model=model, adapter=replace(spec.adapter, init="kaiming"))
    base, back = open_base(spec, trained.initial_adapter_dir).weights, open_base(again).weights
    difference = 0.0 if base.keys() == back.keys() else float("inf")
    with Reader() as reader, Reader() as other:
        for name, weight in base.items():
            for mine, theirs in zip(weight.chunks(reader), back[name].chunks(other), strict=True):
                if not torch.equal(mine, theirs):
                    difference = max(difference, float((mine - theirs).abs().max()))
    return ClientReading(what="our own loader: weights", difference=difference, bound=0.0)


@torch.no_grad()
def _logits(place: Path, ours: Ours, dtype: Any, rows: int | None, auto: str, *, dense: bool) -> torch.Tensor:
    import transformers

    peft = import_peft()  # Before transformers imports bitsandbytes.
    model: Any = getattr(transformers, auto).from_pretrained(
        place, dtype=dtype, device_map="cpu", local_files_only=True, trust_remote_code=False
    )
    if dense:
        for module in model.modules():
            if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
                state.dtype = torch.float32
        model = model.dequantize(dtype=torch.float32).float()
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.PeftModel.from_pretrained(model, place / ADAPTER)
    logits: torch.Tensor = model.eval()(input_ids=ours.tokens).logits
    return logits


def name_of(weight: BaseWeight) -> str:
    """Return the stored name. Raises UserError for a weight that is not one matrix on disk."""
    names = weight.source.names
    if len(names) > 1 or len(weight.shape) != 2:
        raise UserError(
            f"{weight.name} has shape {list(weight.shape)} and is made of {len(names)} tensors on disk, and "
            "bitsandbytes holds linears alone; write --format hf or peft"
        )
    return names[0]


def write_weight(weight: BaseWeight, files: Files, dtype: str, clock: Clock) -> None:
    """Write all tensors of a quantized weight. `dtype` is torch's name of the dequantized dtype."""
    name, group = name_of(weight), 0
    with Reader() as reader:
        second = weight.second_level(reader)
        for size, codes in weight.codes(reader):
            scales, group_scale, _ = second.groups(group, len(codes))
            write_groups(files, name, weight.shape, group, (codes, scales, group_scale))
            group += len(codes)
            clock.passed(4 * size, weight.name)
    write_statistics(files, name, weight.shape, second.offset, dtype)
