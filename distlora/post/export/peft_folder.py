"""Write `--format peft`: the published adapter or that of a saved step, with a model card.

PEFT must reproduce our logits with it on the dequantized base. On the stored base in 16 or 32 bits the logits differ by
the quantization, which is reported.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import torch

from distlora.post.export.client_check import Ours, dense_model
from distlora.post.export.formats import Export, Reading, is_packed
from distlora.post.export.repository import as_plain_adapter, collect, write_files
from distlora.post.load_trained import weights_in
from distlora.run_folder.layout import read_result
from distlora.weights.peft_folder import CONFIG_NAME


def write(export: Export) -> None:
    """Write the folder; it names the base by its hub name, else by its folder or GGUF file."""
    trained, checkpoint = export.trained, export.request.name.checkpoint
    assert trained.run_dir is not None
    assert trained.weights is not None
    weights = weights_in(trained.weights)
    if checkpoint is None and weights.name.startswith("step_"):  # The newest of an unfinished run.
        checkpoint = weights.name
    result = dataclasses.replace(read_result(trained.run_dir, checkpoint), folder=weights)
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


def check(export: Export, ours: Ours) -> list[Reading]:
    """Return readings of PEFT on the trained-on base, and on the stored base if that differs."""
    readings = [ours.reading("PEFT on the base as it was trained on, fp32", _logits(export, ours), ours.exact)]
    spec = export.trained.spec
    if spec.quant.is_nf4 and not spec.adapter.for_nf4 and not is_packed(export.trained):
        gc.collect()
        readings.append(ours.reading("PEFT on the base without NF4, fp32", _logits(export, ours, original=True)))
    return readings


@torch.no_grad()
def _logits(export: Export, ours: Ours, *, original: bool = False) -> torch.Tensor:
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(dense_model(export.trained, original=original), export.place)
    logits: torch.Tensor = model.eval()(input_ids=ours.tokens).logits
    return logits
