"""`--format hf`: the merged model (distlora/merging) as transformers loads it, on the CPU, in fp32.

In fp32 its logits are ours. In 16 bits the weights are rounded once more; the bound is then one for gross faults, and
what the rounding costs is printed.
"""

from __future__ import annotations

from typing import Any

import torch

from distlora.exporting.probe import EXACT, Ours
from distlora.exporting.request import Export, Reading
from distlora.families import family_of, read_config
from distlora.merging.kept import DTYPES
from distlora.merging.merge import merge_to

ROUNDINGS = 16
"""Of the largest logit to the dtype, that rounded weights may move a logit by: the demo's bf16 takes a third of one,
and errors of a deeper model's layers add up like a random walk. A misplaced tensor moves them by more."""


def write(export: Export) -> None:
    """A folder with its receipt, merge.json."""
    request = export.request
    assert request.dtype is not None
    dtype = DTYPES[request.dtype]
    receipt = merge_to(export.trained, export.place, onto=request.onto, dtype=dtype, say=export.progress)
    kept = receipt.total.get("kept", {}).get(request.dtype)
    if kept is not None:
        export.say(f"{kept:.2%} of what was trained is left in {request.dtype} (merge.json has it by weight)")


@torch.no_grad()
def check(export: Export, ours: Ours) -> list[Reading]:
    """transformers with the folder's weights, computing in fp32."""
    import transformers

    request = export.request
    family = family_of(read_config(export.place), export.place / "config.json")
    how: dict[str, Any] = {"experts_implementation": "eager"} if family.experts is not None else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        export.place, dtype=torch.float32, attn_implementation=family.attention, local_files_only=True, **how
    )
    logits = model.eval()(input_ids=ours.tokens).logits
    bound = EXACT
    if request.dtype != "fp32":
        bound = ROUNDINGS * torch.finfo(DTYPES[request.dtype or "bf16"]).eps / 2 * float(ours.logits.abs().max())
        bound = min(bound, ours.moved / 4) if ours.moved else bound  # An adapter that is not in it is seen.
    base = "the base as it was trained on" if request.onto == "trained" else "the base as it is on disk"
    return [ours.reading(f"transformers on weights in {request.dtype}, merged onto {base}, fp32", logits, bound)]
