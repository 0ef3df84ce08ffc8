"""`--format gguf-lora`: the adapter alone, which llama.cpp adds to a GGUF file of the base.

The base that it was trained on is `distlora export RUN --adapter base --format gguf`; on a GGUF of the checkpoint as it
is on disk it meets weights that NF4 has not rounded. Loaded with the former, in fp32, it must give our logits.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from distlora.deltas.base import Base, BaseWeight, open_base
from distlora.exporting.clients import dense_model
from distlora.exporting.gguf.adapter_file import write_adapter
from distlora.exporting.gguf.clients import HOW_TO_GET_IT, LlamaCpp, has_llama_cpp
from distlora.exporting.gguf.model_file import write_model
from distlora.exporting.gguf.model_format import name_of, tokenizer_of
from distlora.exporting.gguf.tensors import Names, Rows, Weight
from distlora.exporting.probe import EXACT, Ours
from distlora.exporting.request import Export, Reading
from distlora.loading.reader import Reader
from distlora.merging.adapter import open_adapter


def write(export: Export) -> None:
    """The file; of PiSSA the plain LoRA of twice the rank, which belongs to the unchanged base."""
    trained, dtype = export.trained, export.request.dtype
    assert dtype is not None
    base = open_base(trained.config)
    with open_adapter(trained, base, "original") as adapter, Reader() as reader:
        assert adapter is not None
        factors = {path: functools.partial(adapter.factors, path, reader) for path in adapter.file.paths}
        write_adapter(
            export.place,
            base.model.hf_config,
            factors,
            dtype=dtype,
            name=name_of(trained),
        )


def check(export: Export, ours: Ours) -> list[Reading]:
    """transformers' model of the base with what the file holds added to its weights; and llama.cpp, where it is
    installed, with a GGUF file of the base that is made for it."""
    trained, dtype = export.trained, export.request.dtype
    base = open_base(trained.config)
    bound = EXACT if dtype == "fp32" else None
    theirs = _added(dense_model(trained), base, export.place, ours.tokens)
    readings = [ours.reading(f"transformers with what the file adds, in {dtype}", theirs, bound)]
    if not has_llama_cpp():
        export.say(f"llama.cpp has not loaded it: it is not installed; {HOW_TO_GET_IT}")
        return readings
    with tempfile.TemporaryDirectory(dir=export.place.parent, prefix=".distlora-gguf-") as folder, Reader() as reader:
        path = Path(folder) / "base.gguf"
        weights = {
            name: Weight(name=name, shape=weight.shape, rows=functools.partial(_trained_on, weight, reader))
            for name, weight in base.weights.items()
        }
        write_model(path, base.model.hf_config, weights, tokenizer_of(trained), dtype="fp32", name="base", say=_nothing)
        client = LlamaCpp(path, export.place, context=ours.tokens.shape[1])
        readings.append(ours.reading(f"llama.cpp, adapter in {dtype}", client.logits(ours.tokens), bound))
    return readings


def _trained_on(weight: BaseWeight, reader: Reader) -> Rows:
    """What the plain adapter belongs to: as training held it, with what PiSSA took out of it."""
    for first, part in weight.rows(reader):
        taken = weight.residual
        yield (
            part if taken is None else part + taken.scaling * (taken.start.B[first : first + len(part)] @ taken.start.A)
        )


@torch.no_grad()
def _added(model: Any, base: Base, path: Path, input_ids: Tensor) -> Tensor:
    """Logits of transformers' model, its weights W + (alpha / R) B A with what the package reads from the file."""
    file, names = gguf.GGUFReader(path), Names.of(base.model.hf_config)
    alpha = file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    read = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in file.tensors}
    for name, parameter in model.named_parameters():
        if not name.endswith(".weight") or (b := read.get(f"{names.gguf_name(name)}.lora_b")) is None:
            continue
        places = torch.arange(len(b), dtype=torch.float32)[:, None]
        order = torch.cat(list(names.in_order(name, functools.partial(iter, [places]))())).long().flatten()
        back = torch.empty_like(b)
        back[order] = b
        parameter += alpha / b.shape[1] * back @ read[f"{names.gguf_name(name)}.lora_a"]
    logits: Tensor = model(input_ids=input_ids).logits
    return logits


def _nothing(text: str) -> None:
    """The model's own export has said it."""
