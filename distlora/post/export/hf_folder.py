"""Write `--format hf`: the merged model as a Hugging Face folder, checked with transformers on the CPU in fp32.

In fp32 its logits equal ours. In 16 bits, rounding moves logits by more than a small adapter does, so a bound on logits
would show nothing. There the loaded weights must equal the rounded merged ones bit for bit, and with the unrounded ones
in their place the logits must equal ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distlora.architecture.families import family_of, read_config
from distlora.post.base_weights import open_base
from distlora.post.export.client_check import EXACT, Ours
from distlora.post.export.formats import Export, Reading
from distlora.post.merge.adapter import open_adapter
from distlora.post.merge.merge import merge_to
from distlora.post.merge.parameters import parameters_of, pieces
from distlora.post.merge.rounding_loss import DTYPES
from distlora.weights.reader import Reader


def write(export: Export) -> None:
    """Write the folder with its receipt, merge.json."""
    request = export.request
    assert request.dtype is not None
    dtype = DTYPES[request.dtype]
    receipt = merge_to(export.trained, export.place, onto=request.onto, dtype=dtype, say=export.progress)
    kept = receipt.total.get("kept", {}).get(request.dtype)
    if kept is not None:
        export.say(f"{kept:.2%} of what was trained is left in {request.dtype} (merge.json has it by weight)")


@torch.no_grad()
def check(export: Export, ours: Ours) -> list[Reading]:
    """Return readings of transformers with the folder's weights, and with the unrounded ones."""
    import transformers

    request = export.request
    assert request.dtype is not None
    family = family_of(read_config(export.place), export.place / "config.json")
    how: dict[str, Any] = {"experts_implementation": "eager"} if family.experts is not None else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        export.place,
        dtype=torch.float32,
        attn_implementation=family.attention,
        local_files_only=True,
        trust_remote_code=False,
        **how,
    )
    model.eval()
    exact = request.dtype == "fp32"
    readings = [
        ours.reading(
            f"transformers, weights in {request.dtype}",
            model(input_ids=ours.tokens).logits,
            EXACT if exact else None,
        )
    ]
    if not exact:
        apart = unround(model, export, DTYPES[request.dtype])
        readings.append(Reading(what="its weights and the merged ones, rounded", difference=apart, bound=0.0))
        logits = model(input_ids=ours.tokens).logits
        readings.append(ours.reading("transformers with the merged ones before rounding", logits, EXACT))
    return readings


def unround(model: Any, export: Export, dtype: torch.dtype) -> float:
    """Replace the model's weights by the unrounded merged ones.

    Returns the largest difference from their rounded values.
    """
    trained, original, apart = export.trained, export.request.onto == "original", 0.0
    base = open_base(trained.spec, trained.initial_adapter_dir)
    places = dict(model.named_parameters(remove_duplicate=False))
    with open_adapter(export.trained, base, export.request.onto) as adapter, Reader() as reader:
        for parameter in parameters_of(base, Path(export.trained.spec.model.path), adapter):
            read, first = places[parameter.weight.name].data.view(-1), 0
            for piece in pieces(parameter, base, adapter, reader, original=original):
                merged = piece.merged.reshape(-1)
                part = read[first : first + len(merged)]
                apart = max(apart, float((part - merged.to(dtype).float()).abs().max()))
                part.copy_(merged)
                first += len(merged)
            assert first == len(read), parameter.weight.name
    return apart
