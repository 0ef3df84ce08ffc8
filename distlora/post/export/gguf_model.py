"""Write `--format gguf`: the merged model by llama.cpp's converter; checked with transformers and llama.cpp.

In fp32 both must reproduce our logits. In a smaller type the weights must equal the rounded ones; the change of logits
is printed.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from distlora.architecture.checkpoint_files import read_hf_config
from distlora.architecture.tokens import load_tokenizer
from distlora.config import AdapterConfig, QuantConfig, require
from distlora.post.export.client_check import TEXT, Ours, fill
from distlora.post.export.formats import ROPES, ClientReading, Export
from distlora.post.export.llama_cpp import MODELS, OUT_TYPES, convert, unpacked
from distlora.post.load_trained import weights_in
from distlora.post.merge_worker import DTYPES, merge_to
from distlora.post.merged_folder import check_space
from distlora.post.merged_parameters import open_adapter, parameters_of, pieces
from distlora.post.trained import Trained
from distlora.post.weights import open_base
from distlora.system import atomic_io
from distlora.weights.reader import Reader

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "q8_0": 34 / 32}
"""Bytes of a weight in the file, by dtype."""


def write(export: Export) -> None:
    """Merge into a folder beside the file, and convert that."""
    request, trained = export.request, export.trained
    assert request.dtype is not None
    assert request.converter is not None
    base = (trained.spec.model.name or trained.base.name).rpartition("/")[2]
    name = base if trained.weights is None else f"{base} {Path(trained.place).name}"
    whole = trained.spec.adapter.method == "full"
    merged = DTYPES.get(request.dtype, torch.float32)  # The converter rounds from fp32 to 8 bits.
    weight_bytes = BYTES[request.dtype] + (0 if whole else merged.itemsize)
    opened = open_base(trained.spec, trained.initial_adapter_dir)
    if opened.model.architecture.composite:
        export.say("the file holds the text decoder alone, without the vision tower and the projector: no images")
    num_bytes = int(weight_bytes * sum(math.prod(weight.shape) for weight in opened.weights.values()))
    check_space(export.place.parent, num_bytes, "the file" if whole else "the file, with the merged model beside it,")
    with tempfile.TemporaryDirectory(dir=export.place.parent, prefix=".merged-") as scratch:
        folder = Path(scratch) / "model"
        if whole:
            folder = _whole(trained)
        else:
            merge_to(trained, folder, onto=request.onto, dtype=merged, say=export.progress)
        options = ("--outtype", OUT_TYPES[request.dtype], "--model-name", name)
        with unpacked(Path(request.converter)) as converter:
            convert(converter / MODELS, folder, export.place, *options)
        hold_to_config(export.place, read_hf_config(folder), export.say)
    atomic_io.sync(export.place)


def hold_to_config(path: Path, config: Any, say: Callable[[str], None]) -> None:
    """Raise UserError for a file that lacks the rotary embedding of a config.

    Its context length is limited to a sliding window that it lacks, or that llama.cpp ignores (phi3): up to there the
    model attends to all.
    """
    file, text = gguf.GGUFReader(path, "r+"), config.get_text_config()
    family = file.fields["general.architecture"].contents()
    names = {tensor.name for tensor in file.tensors} | {key.removeprefix(f"{family}.") for key in file.fields}
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    kind, rotated = rope.get("rope_type", "default"), rope.get("partial_rotary_factor") or 1
    lost = {
        f"rope_type={kind!r}": ROPES[kind],
        f"partial_rotary_factor={rotated}": rotated != 1 and "rope.dimension_count",
    }
    for what, key in lost.items():
        require(
            not key or key in names,
            f"--format=gguf: config.json has {what}, and llama.cpp's converter wrote no {key} for {text.model_type}; "
            "write --format hf",
        )
    window, limit = getattr(text, "sliding_window", None), getattr(text, "max_position_embeddings", None)
    types = getattr(text, "layer_types", None) or ["sliding_attention"]
    if not window or "sliding_attention" not in types or (limit and window >= limit):
        return
    if "attention.sliding_window" not in names or family == "phi3":
        field = file.fields[f"{family}.context_length"]
        field.parts[field.data[0]][0] = window
        file.data.flush()
        say(
            f"the model attends to a window of {window:,} tokens, and llama.cpp's {family} to all: they are the same "
            f"up to {window:,} tokens, which the file names as its context (of {limit:,})"
        )


def _whole(trained: Trained) -> Path:
    """Return the folder of a fully trained model. Raises UserError for a saved step, which has no config.json."""
    assert trained.weights is not None
    folder = weights_in(trained.weights)
    require(
        (folder / "config.json").is_file(),
        f"{folder} is a saved step of the whole model, without its config.json; leave --checkpoint out, or finish "
        "the run (distlora resume)",
    )
    return folder


@torch.no_grad()
def check(export: Export, ours: Ours) -> list[ClientReading]:
    """Return readings of transformers, if it reads the architecture, and of llama.cpp, if it is installed.

    A missing adapter of small effect would meet any bound on rounded logits. So transformers' weights are compared with
    the trained ones up to rounding, and the unrounded model's logits with ours.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    dtype = str(export.request.dtype)
    bound = ours.exact if dtype == "fp32" else None
    readings = []
    try:
        load_gguf_checkpoint(str(export.place))
    except ValueError as error:  # What it says of an architecture that it does not know.
        export.say(f"transformers does not read the file: {error}")
    else:
        readings += _by_transformers(export, ours, dtype, bound)
    if not has_llama_cpp():
        export.say("llama.cpp has not loaded it: `pip install llama-cpp-python` builds it, in some minutes")
        return readings
    client = LlamaCpp(export.place, context=ours.tokens.shape[1])
    readings.append(ours.reading(f"llama.cpp, weights in {dtype}", client.logits(ours.tokens), bound))
    model = export.trained.spec.model
    tokenizer = load_tokenizer(Path(model.path), model.new_tokens, model.special_tokens)
    if client.tokenize(TEXT) != tokenizer(TEXT, add_special_tokens=False)["input_ids"]:
        export.say("warning: llama.cpp makes other tokens of the probe text than the model's tokenizer does")
    return readings


def _by_transformers(export: Export, ours: Ours, dtype: str, bound: float | None) -> list[ClientReading]:
    trained, original, most = export.trained, export.request.onto == "original", 0.0
    if trained.spec.adapter.method == "full":  # Its folder is a base with nothing trained on it.
        model = replace(trained.spec.model, path=str(_whole(trained)), new_tokens=(), special_tokens={})
        spec = replace(trained.spec, model=model, adapter=AdapterConfig(r=1), quant=QuantConfig(method="none"))
        trained = replace(trained, spec=spec, weights=None)
    base = open_base(trained.spec, trained.initial_adapter_dir)
    client = transformers_model(export.place, base.model.hf_config)
    logits = [client(input_ids=ours.tokens).logits]
    places = dict(client.named_parameters())
    if absent := base.weights.keys() - places.keys() - {base.head_name}:
        export.say(f"transformers has no {min(absent)} in a model of a GGUF file, and is not compared")
        return []
    with open_adapter(trained, base, export.request.onto) as adapter, Reader() as reader:
        for parameter in parameters_of(base, adapter):
            if (place := places.get(parameter.weight.name)) is None:  # A stored copy of a tied head, or a vision tower.
                continue
            read = place.clone()
            fill(place, (merged for _, merged in pieces(parameter, base, adapter, reader, original=original)))
            most = max(most, half_steps(place, read, dtype))
    logits.append(client(input_ids=ours.tokens).logits)
    return [
        ours.reading("transformers, before weights are rounded", logits[1], ours.exact),
        ClientReading(
            what=f"transformers: weights, in what rounding to {dtype} may move each", difference=most, bound=1.0
        ),
        ours.reading(f"transformers, weights in {dtype}", logits[0], bound),
    ]


def half_steps(exact: Tensor, read: Tensor, dtype: str) -> float:
    """Return the largest distance of `read` from `exact`, in units of the rounding of `dtype`."""
    size = exact.abs()
    step = size * {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "q8_0": 2**-11}[dtype] + 2**-25 * (dtype != "fp32")
    if dtype == "q8_0" and exact.shape[-1] % 32 == 0:  # Half of a 127th of the block's maximum, with a scale in fp16.
        largest = size.view(-1, 32).amax(-1, keepdim=True).expand(-1, 32).reshape(size.shape)
        step = largest / 127 * (0.5 + 127 * 2**-11) + 2**-18
    apart = (read - exact).abs()
    # No number that is none or infinite, in either, is near to another.
    return float(torch.where(apart == 0, 0.0, apart / step).nan_to_num(float("inf"), posinf=float("inf")).max())


def transformers_model(path: Path, config: Any) -> Any:
    """Load a model in fp32.

    `config` is passed as GGUF files lack some rotary embeddings and head sizes for transformers.
    """
    import transformers

    if config.model_type == "mistral":  # GGUF stores Mistral as Llama.
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        config = transformers.LlamaConfig(**values)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        experts_implementation="eager",
    )
    return model.eval()


def has_llama_cpp() -> bool:
    """Return True if llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """llama.cpp on the CPU with fp32 keys and values (fp16 by default)."""

    def __init__(self, path: Path, adapter: Path | None = None, *, context: int) -> None:
        import llama_cpp

        fp32, threads = llama_cpp.GGML_TYPE_F32, torch.get_num_threads()
        self.model = llama_cpp.Llama(
            str(path),
            lora_path=None if adapter is None else str(adapter),
            n_ctx=context,
            n_batch=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            type_k=fp32,
            type_v=fp32,
            flash_attn=False,
            n_gpu_layers=0,
            verbose=False,
        )

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits (1, T, V) in fp32."""
        ids = input_ids.flatten().tolist()
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(np.array(self.model.scores[: len(ids)], dtype=np.float32))[None]

    def tokenize(self, text: str) -> list[int]:
        """Tokenize without start and end tokens; special tokens in the text are text."""
        ids: list[int] = self.model.tokenize(text.encode(), add_bos=False, special=False)
        return ids
