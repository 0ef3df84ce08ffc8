"""Write `--for peft`: the published adapter or that of a saved step, with a model card.

PEFT must reproduce our logits with it on the dequantized base. On the stored base in 16 or 32 bits the logits differ by
the quantization, which is reported. Fused weights are written in the layout of the release that --version names.
Letters: O out features, I in features, R rank, E experts.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.checkpoint_files import read_hf_config
from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import Architecture, architecture_of
from distlora.loading.peft_format import transposed_factors
from distlora.model.hf_model import transformers_model
from distlora.post.export.client_check import Ours, dense_model
from distlora.post.export.formats import ClientReading, Export, is_packed, release
from distlora.post.export.repository import as_plain_adapter, collect, write_files
from distlora.post.load_trained import result_of
from distlora.post.weights import error_line, read_factors
from distlora.run_folder.layout import Result
from distlora.system.import_peft import import_peft
from distlora.weights.peft_folder import CONFIG_NAME, EXPERTS_CHANGED, WEIGHTS_NAME, read_peft_adapter, with_layout
from distlora.weights.reader import Reader


def write(export: Export) -> None:
    """Write the folder; it names the base by its hub name, else by its folder or GGUF file."""
    trained = export.trained
    assert trained.weights is not None
    if trained.foreign:
        export.place.mkdir()
        write_files({name: trained.weights / name for name in (CONFIG_NAME, WEIGHTS_NAME)}, export.place)
    else:
        _write_result(export, result_of(trained, export.request.name.checkpoint))
    if _has_experts(export):
        _write_experts(export)


def _write_result(export: Export, result: Result) -> None:
    base = result.config.model.name
    with as_plain_adapter(result) as plain:
        files = collect(plain, repository=Path(export.request.out).name, base=base)
        if base is None:
            settings = json.loads(bytes(files[CONFIG_NAME]))
            place = result.config.model.gguf_file or result.config.model.path
            settings["base_model_name_or_path"] = place
            files[CONFIG_NAME] = (json.dumps(settings, indent=2) + "\n").encode()
            export.say(f"adapter_config.json names the base by its place on this node, {place}")
        export.place.mkdir()
        write_files(files, export.place)


def _has_experts(export: Export) -> bool:
    """Return True if the written adapter has fused weights. The run's own target_parameters may be () for all."""
    return bool(read_peft_adapter(export.place).settings["target_parameters"])


def _is_for_early(export: Export) -> bool:
    version = export.request.version
    return version is not None and release(version) < EXPERTS_CHANGED


def _write_experts(export: Export) -> None:
    """Write the factors of fused weights again in the layout of the release that the export is for, and compare dW."""
    trained = export.trained
    architecture = architecture_of(read_config(trained.base), trained.base / "config.json")
    read = with_layout(read_peft_adapter(export.place), architecture)
    counts = architecture.experts_by_path
    early = _early_paths(trained.base, architecture, read.paths) if _is_for_early(export) else frozenset()
    file, config = export.place / WEIGHTS_NAME, export.place / CONFIG_NAME
    version = export.request.version or ".".join(map(str, EXPERTS_CHANGED))
    with safetensors.safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    for path in early ^ read.transposed:
        a, b = (read.names[path, part] for part in "AB")
        tensors[a], tensors[b] = transposed_factors(tensors[a], tensors[b], counts[path])
    worst = 0.0
    with Reader() as reader:
        for path in early:  # Before the file is replaced.
            ours = read_factors(read, path, reader, experts=counts[path])
            a, b = (tensors[read.names[path, part]] for part in "AB")
            theirs = _early_factors(a, b, counts[path])
            worst = max(worst, ours.error(f"{path}: PEFT {version}", ours.scaling, *theirs))
    safetensors.torch.save_file(tensors, file, metadata=metadata)
    settings = json.loads(config.read_text()) | {"peft_version": version}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    if early:
        print(error_line(f"PEFT {version}", worst))


def _early_factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return B (E, O, R) and A (E, R, I) whose product PEFT 0.17 and 0.18 add (ParamWrapper.get_delta_weight).

    Their formula is "o r e, e r i -> e i o" of B (I, R E) and A (E R, O).
    """
    return a.reshape(experts, -1, a.shape[-1]).mT, b.reshape(b.shape[0], -1, experts).permute(2, 1, 0)


def _early_paths(base: Path, architecture: Architecture, paths: Sequence[str]) -> frozenset[str]:
    """Return the fused weights that PEFT before EXPERTS_CHANGED transposes: all but those of a transposed module."""
    theirs = transformers_model(
        read_hf_config(base),
        base,
        auto_class=architecture.auto_class,
        attention=architecture.attention,
        dtype=torch.float32,
    )
    experts = architecture.experts_by_path.keys() & set(paths)
    return frozenset(path for path in experts if not theirs.get_submodule(path.rpartition(".")[0]).is_transposed)


def check(export: Export, ours: Ours) -> list[ClientReading]:
    """Return readings of PEFT on the trained-on base, and on the stored base if that differs."""
    installed = release(re.match(r"[\d.]*\d", importlib.metadata.version("peft"))[0])  # type: ignore[index]
    if _has_experts(export) and (installed < EXPERTS_CHANGED) is not _is_for_early(export):
        export.say("PEFT has not loaded it: the installed release has the other layout of fused weights")
        return []
    readings = [ours.reading("PEFT on the base as it was trained on, fp32", _logits(export, ours), ours.exact)]
    spec = export.trained.spec
    if spec.quant.is_nf4 and not spec.adapter.for_nf4 and not is_packed(export.trained):
        gc.collect()
        readings.append(ours.reading("PEFT on the base without NF4, fp32", _logits(export, ours, original=True)))
    return readings


@torch.no_grad()
def _logits(export: Export, ours: Ours, *, original: bool = False) -> torch.Tensor:
    model: Any = import_peft().PeftModel.from_pretrained(dense_model(export.trained, original=original), export.place)
    logits: torch.Tensor = model.eval()(input_ids=ours.tokens).logits
    return logits
