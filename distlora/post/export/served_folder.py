"""Write `--for vllm` and `--for sglang`: the adapter in the layout that the server's loader reads (consumers.py).

The written adapter is a plain LoRA of one rank and one alpha: rsLoRA's scale and those of rank_pattern and
alpha_pattern are folded into alpha / r and B, and smaller ranks are padded with zeros. Modules that the server needs
beside an adapted one (k_proj beside q_proj, all experts of a layer) get zeros. Then every tensor of the file is bound
by the server's rules, and the change that the server computes from it is compared with ours, weight by weight.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.safetensors_headers import read_header
from distlora.config import UserError, require
from distlora.post.export.consumers import (
    CONSUMERS,
    PREFIX,
    Consumer,
    Served,
    ServedPair,
    Target,
    bind,
    served,
    targets,
)
from distlora.post.export.consumers import target_modules as targets_of
from distlora.post.export.formats import Export, release
from distlora.post.export.repository import collect, write_files
from distlora.post.load_trained import result_of, weights_in
from distlora.post.merged_parameters import open_adapter
from distlora.post.weights import Factors, error_line, open_base
from distlora.run_folder.layout import TEMPLATE_NAME
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import Reader

_Factors = Mapping[str, Callable[[], Factors]]
"""Reads an adapter's factors, by Hugging Face path."""


def write(export: Export) -> None:
    """Write the folder and check it. Raises UserError for an adapter that the server would not read as trained."""
    trained = export.trained
    assert trained.weights is not None
    consumer = CONSUMERS[export.request.format]
    base = open_base(trained.spec, trained.initial_adapter_dir)
    row = served(consumer, read_config(trained.base))
    # Not where the server reads experts in PEFT's layout (no names): its kernel for them is another one.
    shared_outer = trained.spec.adapter.expert_sharing == "shared_outer" and bool(row.experts and row.names)
    places = targets(consumer, row, base.model.architecture, shared_outer=shared_outer)
    export.place.mkdir()
    with open_adapter(trained, base, "original") as adapter, Reader() as reader:
        assert adapter is not None
        experts = base.model.architecture.experts_by_path
        factors = {
            path: functools.partial(adapter.factors, path, reader, experts=experts.get(path))
            for path in adapter.file.paths
        }
        spec = trained.spec.model
        config = write_adapter(export.place, consumer, places, factors)
        config |= {"base_model_name_or_path": spec.name or spec.gguf_file or spec.path, "revision": spec.revision}
        (export.place / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        worst = check_folder(export.place, consumer, row, places, factors)
    if trained.run_dir is not None and not trained.foreign:
        # What of a run changes its prompts: the chat template and a changed tokenizer.
        files = collect(
            result_of(trained, export.request.name.checkpoint), repository=export.place.name, base=spec.name
        )
        others = (CONFIG_NAME, WEIGHTS_NAME, "README.md")
        write_files({name: content for name, content in files.items() if name not in others}, export.place)
    has_template = (export.place / TEMPLATE_NAME).is_file()
    template = f" --chat-template {Path(export.request.out) / TEMPLATE_NAME}" if has_template else ""
    limit = consumer.limit(config["r"])
    command = consumer.command.format(base=spec.name or spec.path, adapter=export.request.out, rank=limit)
    export.say(f"{consumer.name} {consumer.version} binds every tensor ({consumer.source})")
    version = export.request.version or consumer.version
    if release(version) > release(consumer.version):
        export.say(f"the layout is that of {consumer.name} {consumer.version}; the source of {version} was not read")
    elif release(version) < release(consumer.version):
        export.say(f"{consumer.name} {version} was run with adapters of this model type (docs/merging.md)")
    print(error_line(consumer.name, worst))
    flags = [row.flags, consumer.stacks_flags if shared_outer else ""]
    print(f"serve it with: {' '.join([command, *filter(None, flags)])}{template}")
    if shared_outer:
        again = f"distlora export {trained.place} --adapter {weights_in(trained.weights)} --for {export.request.format}"
        print(
            f"each shared factor is stored once, so {consumer.name} serves it beside adapters of this layout alone; to "
            f"write one pair per expert: {again}"
        )


def write_adapter(folder: Path, consumer: Consumer, places: Mapping[str, Target], factors: _Factors) -> dict[str, Any]:
    """Write the weights file; return adapter_config.json without the base's name."""
    scales, rank = {}, 0
    for path, read in factors.items():
        trained = read()
        scales[path], rank = trained.scaling, max(rank, trained.rank)
    scale = Counter(scales.values()).most_common(1)[0][0] or 1.0
    groups = {target.group for target in places.values() if target.path in scales and target.group}
    written = {name: target for name, target in places.items() if target.path in scales or target.group in groups}
    tensors: dict[str, Tensor] = {}
    by_path: dict[str, list[str]] = {}
    for name, target in written.items():
        by_path.setdefault(target.path, []).append(name)
    for path, names in by_path.items():
        own = factors[path]() if path in factors else None
        for name in names:
            a, b = _pair(written[name], own, rank, scale)
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a, b
    safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": targets_of(consumer, written),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _pair(target: Target, own: Factors | None, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B of a target at the file's rank and scale; zeros without factors."""
    out, width = target.shape
    count = max(target.stack, 1)
    count_a, count_b = target.matrices or (count, count)
    a, b = torch.zeros(count_a, rank, width), torch.zeros(count_b, out, rank)
    if own is not None:
        mine_a, mine_b = own.A.view(-1, *own.A.shape[-2:]), own.B.view(-1, *own.B.shape[-2:])
        first = target.expert or 0
        a[:, : own.rank] = mine_a[first : first + count_a]
        b[:, :, : own.rank] = mine_b[first : first + count_b, target.rows] * (own.scaling / scale)
    if target.matrices is not None:
        return a, b
    if not target.stack:
        return a[0], b[0]
    return a.view(count * rank, width), b.permute(1, 2, 0).reshape(out, rank * count).contiguous()


def check_folder(
    folder: Path, consumer: Consumer, row: Served, places: Mapping[str, Target], factors: _Factors
) -> float:
    """Bind every tensor of a written folder; return the largest relative error of dW. Raises UserError as both."""
    header = read_header(folder / WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text())
    pairs = bind(consumer, row, places, config, {name: segment.shape for name, segment in header.items()})
    by_path: dict[str, list[ServedPair]] = {}
    for pair in pairs.values():
        by_path.setdefault(pair.target.path, []).append(pair)
    absent = sorted(factors.keys() - by_path.keys())
    if absent:
        raise UserError(f"{absent[0]} was trained, and {consumer.name} finds no tensor for it in {folder}")
    worst = 0.0
    with safetensors.safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        for path, matrices in by_path.items():
            ours = factors.get(path)
            worst = max(worst, _error(path, ours and ours(), matrices, file, consumer))
    return worst


def _error(path: str, ours: Factors | None, pairs: Iterable[ServedPair], file: Any, consumer: Consumer) -> float:
    """Return the relative error of one weight's dW. Raises UserError as `Factors.error`, and for changed others."""
    worst = total = 0.0
    for pair in pairs:
        a, b = file.get_tensor(pair.a), file.get_tensor(pair.b)
        if pair.target.stack:  # The server reads row e * R + j of A, column j * E + e of B.
            a = a.reshape(pair.target.stack, -1, a.shape[1])
            b = b.reshape(b.shape[0], -1, pair.target.stack).permute(2, 0, 1)
        elif pair.target.matrices is not None:  # The kernel reads a shared factor for each expert.
            a, b = (factor.expand(max(pair.target.matrices), -1, -1) for factor in (a, b))
        if ours is None:
            changed = Factors(A=a, B=b, scaling=pair.scale).norm()
            require(changed == 0, f"{path} was not trained, and {consumer.name} would change it by {changed:.1e}")
            continue
        index = ... if pair.target.expert is None else pair.target.expert
        mine = replace(ours, A=ours.A[index], B=ours.B[index][..., pair.target.rows, :])
        worst = max(worst, mine.error(f"{pair.b}: {consumer.name}", pair.scale, b, a))
        total += mine.norm() ** 2
    if ours is not None and abs(total - ours.norm() ** 2) > 1e-6 * total:
        raise UserError(f"{path}: the file holds a part of its rows alone, as {consumer.name} reads it")
    return worst
