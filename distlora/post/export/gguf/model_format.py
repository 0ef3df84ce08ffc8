"""Write `--format gguf`: the merged model in one file, a few rows at a time, checked with transformers and llama.cpp.

In fp32 both must reproduce our logits. In a smaller type the weights must equal the rounded ones; the change of logits
is printed.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType
from torch import Tensor

from distlora.architecture.tokens import load_tokenizer
from distlora.config import AdapterConfig, QuantConfig, UserError
from distlora.post.export.client_check import TEXT, Ours, fill
from distlora.post.export.formats import Export, Reading
from distlora.post.export.gguf.tensors import (
    Names,
    Rows,
    Weight,
    add_hyperparameters,
    half_steps,
    plan,
    rope_factors,
    write_file,
)
from distlora.post.export.gguf.vocabulary import add_vocabulary
from distlora.post.load_trained import weights_in
from distlora.post.merge.parameters import Onto, Parameter, open_adapter, parameters_of, pieces
from distlora.post.trained import Trained
from distlora.post.weights import open_base
from distlora.weights.reader import Reader

HOW_TO_GET_IT = "`pip install llama-cpp-python` builds it, in some minutes, with a C++ compiler"


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
    )
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, input_ids: Tensor) -> Tensor:
    """Return logits (1, T, V) in fp32 of a transformers model."""
    logits: Tensor = model(input_ids=input_ids).logits
    return logits


def has_llama_cpp() -> bool:
    """Return True if llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """llama.cpp on the CPU with fp32 keys and values (fp16 by default)."""

    def __init__(self, path: Path, adapter: Path | None = None, *, context: int) -> None:
        import llama_cpp

        fp32 = llama_cpp.GGML_TYPE_F32
        self.model = llama_cpp.Llama(
            str(path),
            lora_path=None if adapter is None else str(adapter),
            n_ctx=context,
            n_batch=context,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
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

    def greedy(self, input_ids: Tensor, count: int) -> list[int]:
        """Return the next tokens by greedy decoding."""
        made = []
        for token in self.model.generate(input_ids.flatten().tolist(), temp=0.0, repeat_penalty=1.0, top_k=1):
            made.append(int(token))
            if len(made) == count:
                break
        return made


def write(export: Export) -> None:
    """Write the file."""
    request, trained = export.request, export.trained
    assert request.dtype is not None
    with opened(trained, request.onto) as (config, weights):
        names = {"dtype": request.dtype, "name": name_of(trained)}
        write_model(export.place, config, weights, tokenizer_of(trained), **names, say=export.say)


def check(export: Export, ours: Ours) -> list[Reading]:
    """Return readings of transformers, and of llama.cpp if installed.

    A missing adapter of small effect would meet any bound on rounded logits. So transformers' weights are compared with
    the trained ones up to rounding, and the unrounded model's logits with ours.
    """
    request = export.request
    assert request.dtype is not None
    place, bound = export.place, ours.exact if request.dtype == "fp32" else None
    readings = []
    with opened(export.trained, request.onto) as (config, weights):
        model = transformers_model(place, config)
        what = f"transformers: weights, in what rounding to {request.dtype} may move each"
        readings.append(Reading(what=what, difference=_apart(model, config, weights, request.dtype), bound=1.0))
        logits = logits_of(model, ours.tokens)
        readings.append(ours.reading(f"transformers, weights in {request.dtype}", logits, bound))
        if request.dtype != "fp32":
            for name, weight in weights.items():
                fill(model.get_parameter(name), weight.rows())
            what = f"transformers, before weights are {request.dtype}"
            readings.insert(0, ours.reading(what, logits_of(model, ours.tokens), ours.exact))
    del model
    if not has_llama_cpp():
        export.say(f"llama.cpp has not loaded it: it is not installed; {HOW_TO_GET_IT}")
        return readings
    client = LlamaCpp(place, context=ours.tokens.shape[1])
    readings.append(ours.reading(f"llama.cpp, weights in {request.dtype}", client.logits(ours.tokens), bound))
    if client.tokenize(TEXT) != tokenizer_of(export.trained)(TEXT, add_special_tokens=False)["input_ids"]:
        export.say("warning: llama.cpp makes other tokens of the probe text than the model's tokenizer does")
    return readings


@torch.no_grad()
def _apart(model: Any, config: Any, weights: Mapping[str, Weight], dtype: str) -> float:
    """Return the largest error of a weight in units of the rounding of `dtype`."""
    most = 0.0
    for weight, tensor in zip(weights.values(), plan(Names.of(config), weights, dtype), strict=True):
        read, first = model.get_parameter(weight.name).view(-1, weight.shape[-1]), 0
        for rows in weight.rows():
            most = max(most, half_steps(rows, read[first : first + len(rows)], tensor.type))
            first += len(rows)
        assert first == len(read), weight.name
    return most


@contextlib.contextmanager
def opened(trained: Trained, onto: Onto) -> Iterator[tuple[Any, dict[str, Weight]]]:
    """Yield transformers' config with the grown vocabulary, and the trained weights, read on demand, by name."""
    if trained.spec.adapter.method == "full":
        trained = _as_base(trained)
    base = open_base(trained.spec, trained.initial_adapter_dir)
    with open_adapter(trained, base, onto) as adapter, Reader() as reader:

        def rows_of(parameter: Parameter) -> Callable[[], Rows]:
            original = onto == "original"
            return lambda: (merged for _, merged in pieces(parameter, base, adapter, reader, original=original))

        weights = {}
        for parameter in parameters_of(base, adapter):
            name = parameter.weight.name
            # GGUF has no tied head, even if the checkpoint stores a copy, and no vision tower.
            if name not in base.weights and not (name == base.head_name and not base.model.tied):
                continue
            shape = next(iter(parameter.outputs.values())) if parameter.matrix else parameter.weight.shape
            weights[name] = Weight(name=name, shape=shape, rows=rows_of(parameter))
        yield base.model.hf_config, weights


def _as_base(trained: Trained) -> Trained:
    """Return a fully trained model as a base. Raises UserError for a saved step, which has no config.json."""
    assert trained.weights is not None
    folder = weights_in(trained.weights)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a saved step of the whole model, without its config.json; leave --checkpoint out, or finish "
            "the run (distlora resume)"
        )
    model = replace(trained.spec.model, path=str(folder), new_tokens=(), special_tokens={})
    spec = replace(trained.spec, model=model, adapter=AdapterConfig(r=1), quant=QuantConfig(method="none"))
    return replace(trained, spec=spec, weights=None)


def tokenizer_of(trained: Trained) -> Any:
    """Load the tokenizer of the base, with the run's new tokens."""
    model = trained.spec.model
    return load_tokenizer(Path(model.path), model.new_tokens, model.special_tokens)


def name_of(trained: Trained) -> str:
    """Return a name for people."""
    base = (trained.spec.model.name or trained.base.name).rpartition("/")[2]
    return base if trained.weights is None else f"{base} {Path(trained.place).name}"


_FILE_TYPES = {
    "fp32": LlamaFileType.ALL_F32,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "fp16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def write_model(
    path: Path,
    config: Any,
    weights: Mapping[str, Weight],
    tokenizer: Any,
    *,
    dtype: str,
    name: str,
    say: Callable[[str], None],
) -> None:
    """Write a GGUF model. `config` and `tokenizer` are transformers', `name` is for people.

    Raises UserError for what llama.cpp would compute differently.
    """
    names = Names.of(config)
    tensors = rope_factors(config) + plan(names, weights, dtype)

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        add_hyperparameters(writer, config, say)
        writer.add_file_type(_FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer, config.vocab_size, say)

    write_file(path, names.arch, describe, tensors)
