"""Write `--format gguf`: the merged model in one file, a few rows at a time, checked with transformers and llama.cpp.

In fp32 both must reproduce our logits. In a smaller type the weights must equal the rounded ones; the change of logits
is printed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter, LlamaFileType

from distlora.architecture.tokens import load_tokenizer
from distlora.config import AdapterConfig, QuantConfig, UserError
from distlora.post.base_weights import HEAD_NAME, Base, open_base
from distlora.post.export.client_check import EXACT, TEXT, Ours
from distlora.post.export.formats import Export, Reading
from distlora.post.export.gguf.clients import HOW_TO_GET_IT, LlamaCpp, has_llama_cpp, logits_of, transformers_model
from distlora.post.export.gguf.hyperparameters import add_hyperparameters, rope_factors
from distlora.post.export.gguf.tensors import Names, Planned, Rows, Weight, half_steps, plan, write_file
from distlora.post.export.gguf.vocabulary import add_vocabulary
from distlora.post.load_trained import weights_in
from distlora.post.merge.adapter import Onto, open_adapter
from distlora.post.merge.parameters import Parameter, parameters_of, pieces
from distlora.post.trained import Trained
from distlora.weights.reader import Reader


@dataclass(frozen=True, slots=True)
class Opened:
    """The base and the weights to write."""

    base: Base
    weights: Mapping[str, Weight]
    """Weights by Hugging Face name; read inside `opened`."""

    @property
    def config(self) -> Any:
        """Return transformers' config, with the grown vocabulary."""
        return self.base.model.hf_config


def write(export: Export) -> None:
    """Write the file."""
    request, trained = export.request, export.trained
    assert request.dtype is not None
    with opened(trained, request.onto) as found:
        write_model(
            export.place,
            found.config,
            found.weights,
            tokenizer_of(trained),
            dtype=request.dtype,
            name=name_of(trained),
            say=export.say,
        )


def check(export: Export, ours: Ours) -> list[Reading]:
    """Return readings of transformers, and of llama.cpp if installed.

    A missing adapter of small effect would meet any bound on rounded logits. So transformers' weights are compared with
    the trained ones up to rounding, and the unrounded model's logits with ours.
    """
    request = export.request
    assert request.dtype is not None
    bound: float | None = EXACT
    place = export.place
    with opened(export.trained, request.onto) as found:
        readings = []
        if request.dtype != "fp32":
            exact = logits_of(_in_fp32(found), ours.tokens)
            readings.append(ours.reading(f"transformers, before weights are {request.dtype}", exact, bound))
        model = transformers_model(place, found.config)
        apart = apart_of(model, found, request.dtype)
    what = f"transformers: weights, in what rounding to {request.dtype} may move each"
    readings.append(Reading(what=what, difference=apart, bound=1.0))
    bound = bound if request.dtype == "fp32" else None
    readings.append(ours.reading(f"transformers, weights in {request.dtype}", logits_of(model, ours.tokens), bound))
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
def _in_fp32(found: Opened) -> Any:
    """Return transformers' model with the unrounded weights."""
    import transformers

    config = copy.deepcopy(found.config)
    config.tie_word_embeddings = HEAD_NAME not in found.weights
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.eval()
    for name, weight in found.weights.items():
        place, first = model.get_parameter(name).data.view(-1, weight.shape[-1]), 0
        for rows in weight.rows():
            place[first : first + len(rows)] = rows
            first += len(rows)
    return model


@torch.no_grad()
def apart_of(model: Any, found: Opened, dtype: str) -> float:
    """Return the largest error of a weight in units of the rounding of `dtype`."""
    most = 0.0
    tensors = plan(Names.of(found.config), found.weights, dtype)
    for weight, tensor in zip(found.weights.values(), tensors, strict=True):
        read, first = model.get_parameter(weight.name).view(-1, weight.shape[-1]), 0
        for rows in weight.rows():
            most = max(most, half_steps(rows, read[first : first + len(rows)], tensor.type))
            first += len(rows)
        assert first == len(read), weight.name
    return most


@contextlib.contextmanager
def opened(trained: Trained, onto: Onto) -> Iterator[Opened]:
    """Yield the trained weights, read on demand."""
    if trained.spec.adapter.method == "full":
        trained = _as_base(trained)
    base = open_base(trained.spec, trained.initial_adapter_dir)
    folder = trained.base
    with open_adapter(trained, base, onto) as adapter, Reader() as reader:

        def rows_of(parameter: Parameter) -> Callable[[], Rows]:
            return lambda: (p.merged for p in pieces(parameter, base, adapter, reader, original=onto == "original"))

        weights = {}
        for parameter in parameters_of(base, folder, adapter):
            name = parameter.weight.name
            # GGUF has no tied head, even if the checkpoint stores a copy, and no vision tower.
            if name not in base.weights and not (name == HEAD_NAME and not base.model.tied):
                continue
            shape = next(iter(parameter.outputs.values())) if parameter.matrix else parameter.weight.shape
            weights[name] = Weight(name=name, shape=shape, rows=rows_of(parameter))
        yield Opened(base, weights)


def _as_base(trained: Trained) -> Trained:
    """Return a fully trained model as a base. Raises UserError for a saved step, which has no config.json."""
    assert trained.weights is not None
    folder = weights_in(trained.weights)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a saved step of the whole model, without its config.json; leave --checkpoint out, or finish "
            "the run (distlora resume)"
        )
    spec = trained.spec
    whole = replace(
        spec,
        model=replace(spec.model, path=str(folder), new_tokens=()),
        adapter=AdapterConfig(r=1),
        quant=QuantConfig(method="none"),
    )
    return replace(trained, spec=whole, weights=None)


def tokenizer_of(trained: Trained) -> Any:
    """Load the tokenizer of the base, with the run's new tokens."""
    model = trained.spec.model
    return load_tokenizer(Path(model.path), model.new_tokens)


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
    tensors = plan(names, weights, dtype)
    if (factors := rope_factors(config)) is not None:
        tensors.insert(0, Planned.of_array("rope_freqs.weight", factors))

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        add_hyperparameters(writer, config, say)
        writer.add_file_type(_FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer, config.vocab_size, say)

    write_file(path, names.arch, describe, tensors)
