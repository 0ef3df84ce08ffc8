"""Write `--format hf`: the merged model as a Hugging Face folder, checked with transformers on the CPU in fp32.

In fp32 its logits equal ours. In 16 bits, rounding moves logits by more than a small adapter does, so a bound on logits
would show nothing. There the loaded weights must equal the rounded merged ones bit for bit, and with the unrounded ones
in their place the logits must equal ours.
"""

from __future__ import annotations

from typing import Any

import torch

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.post.export.client_check import Ours, fill
from distlora.post.export.formats import ClientReading, Export
from distlora.post.merge_worker import DTYPES, merge_to
from distlora.post.merged_parameters import open_adapter, parameters_of, pieces
from distlora.post.weights import open_base
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
def check(export: Export, ours: Ours) -> list[ClientReading]:
    """Return readings of transformers with the folder's weights, and with the unrounded ones."""
    import transformers

    request = export.request
    assert request.dtype is not None
    architecture = architecture_of(read_config(export.place), export.place / "config.json")
    model: Any = getattr(transformers, architecture.auto_class).from_pretrained(
        export.place,
        dtype=torch.float32,
        attn_implementation=architecture.attention,
        local_files_only=True,
        trust_remote_code=False,
        experts_implementation="eager",
    )
    model.eval()
    exact = request.dtype == "fp32"
    logits = model(input_ids=ours.tokens).logits
    readings = [ours.reading(f"transformers, weights in {request.dtype}", logits, ours.exact if exact else None)]
    if not exact:
        trained, original, apart = export.trained, request.onto == "original", 0.0
        base = open_base(trained.spec, trained.initial_adapter_dir)
        places = dict(model.named_parameters(remove_duplicate=False))
        with open_adapter(trained, base, request.onto) as adapter, Reader() as reader:
            for parameter in parameters_of(base, adapter):
                rows = (merged for _, merged in pieces(parameter, base, adapter, reader, original=original))
                apart = max(apart, fill(places[parameter.weight.name], rows, DTYPES[request.dtype]))
        readings.append(ClientReading(what="its weights and the merged ones, rounded", difference=apart, bound=0.0))
        logits = model(input_ids=ours.tokens).logits
        readings.append(ours.reading("transformers with the merged ones before rounding", logits, ours.exact))
    return readings
