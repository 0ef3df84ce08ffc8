"""transformers' own model of a base on the CPU, in fp32, with the weights that were trained on, or those on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distlora.post.deltas.base import Base, BaseWeight, open_base
from distlora.post.trained import Trained
from distlora.weights.reader import Reader


@torch.no_grad()
def dense_model(trained: Trained, *, original: bool = False) -> Any:
    """The base as training had it, dequantized, or `original`, as its checkpoint has it.

    What PiSSA took out of a weight before that was quantized is put back: the adapter that such a run publishes is one
    of the unchanged base.
    """
    import transformers

    base = open_base(trained.config)
    family, folder = base.model.family, trained.config.model.path
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):  # The weights come from us, dense.
        del config.quantization_config
    how: dict[str, Any] = {"attn_implementation": family.attention}
    if family.experts is not None:
        how["experts_implementation"] = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False, **how)
    model.eval()
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    with Reader() as reader:
        for name, weight in base.weights.items():
            _fill(places[name], weight, reader, original=original)
    _grow(model, base)
    return model


def _fill(place: Tensor, weight: BaseWeight, reader: Reader, *, original: bool) -> None:
    columns = weight.shape[-1] if weight.shape else 1
    rows = place.data.view(-1, columns)
    residual = None if original else weight.residual
    for first, part in weight.rows(reader, original=original):
        rows[first : first + len(part)] = part
        if residual is not None:
            start = residual.start
            rows[first : first + len(part)] += residual.scaling * (start.B[first : first + len(part)] @ start.A)


def _grow(model: nn.Module, base: Base) -> None:
    vocabulary = base.model.vocabulary
    if vocabulary.has_grown:
        model.resize_token_embeddings(vocabulary.rows, mean_resizing=False)  # type: ignore[operator]
