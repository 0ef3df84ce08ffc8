"""Write `--for llama.cpp`: the adapter alone, which llama.cpp adds to a GGUF file of the base.

The matching base is `distlora export RUN --adapter base --format gguf`; a GGUF of the stored checkpoint lacks the
rounding of NF4. With the former in fp32, the logits must equal ours.

llama.cpp adds (alpha / R) B (A x), with R from B's shape and one alpha per file. Our scales may differ by weight, and
rsLoRA's is alpha / sqrt(R). So the file's alpha is the most frequent scale times R, and B of the other weights is
rescaled before rounding. llama.cpp's convert_lora_to_gguf.py writes lora_alpha alone and ignores use_rslora,
alpha_pattern and rank_pattern.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from torch import Tensor

from distlora.config import UserError, require
from distlora.post.export.client_check import Ours, dense_model
from distlora.post.export.formats import Export, Reading
from distlora.post.export.gguf.model_format import (
    HOW_TO_GET_IT,
    LlamaCpp,
    has_llama_cpp,
    logits_of,
    name_of,
    tokenizer_of,
    write_model,
)
from distlora.post.export.gguf.tensors import TYPES, Names, Planned, Rows, Weight, half_steps, write_file
from distlora.post.merge.parameters import open_adapter
from distlora.post.weights import Base, Factors, error_line, open_base
from distlora.weights.reader import Reader

_Pair = tuple[Tensor, Tensor, float]
"""A, B with rows in Hugging Face order, and alpha / R, llama.cpp's multiplier, of one weight in the file."""


def write(export: Export) -> None:
    """Write the file; of PiSSA the plain LoRA of twice the rank, for the unchanged base."""
    trained, dtype = export.trained, export.request.dtype
    assert dtype is not None
    base = open_base(trained.spec, trained.initial_adapter_dir)
    with open_adapter(trained, base, "original") as adapter, Reader() as reader:
        assert adapter is not None
        check_paths(adapter.file.paths, base)
        factors = {path: functools.partial(adapter.factors, path, reader) for path in adapter.file.paths}
        write_adapter(export.place, base.model.hf_config, factors, dtype=dtype, name=name_of(trained))
        bind(export.place, base)
        export.say("llama.cpp binds every tensor (ggml-org/llama.cpp 0650ea8c0: src/llama-adapter.cpp)")
        if dtype == "fp32":
            read, worst = _read(export.place, base), 0.0
            for path, own in factors.items():
                require(path in read, f"{path} was trained, and the file holds no tensor for it")
                a, b, scale = read[path]
                worst = max(worst, own().error(f"{path}: llama.cpp", scale, b, a))
            print(error_line("llama.cpp", worst))


def bind(path: Path, base: Base) -> None:
    """Raise UserError for a tensor of the file that llama.cpp's loader refuses, ignores or reads transposed."""
    file, names = gguf.GGUFReader(path), Names.of(base.model.hf_config)
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": names.arch}
    for key, value in wanted.items():
        found = file.fields[key].contents() if key in file.fields else None
        require(found == value, f"{path}: {key} is {found!r}, and llama.cpp reads {value!r}")
    alpha = file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents() if gguf.Keys.Adapter.LORA_ALPHA in file.fields else 0
    require(alpha != 0, f"{path}: llama.cpp reads alpha=0 as alpha = rank; write the adapter's own")
    matrices = {name: weight.shape for name, weight in base.weights.items() if name.endswith(".weight")}
    shapes = {names.gguf_name(name): shape for name, shape in matrices.items() if len(shape) == 2}
    tensors = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in file.tensors}
    for name, shape in tensors.items():
        place, _, part = name.rpartition(".")
        require(part in ("lora_a", "lora_b"), f"{name}: llama.cpp reads *.lora_a and *.lora_b, nothing else")
        require(place in shapes, f"{name}: {place} does not exist in llama.cpp's {names.arch}")
        other = tensors.get(f"{place}.lora_{'b' if part == 'lora_a' else 'a'}")
        require(other is not None, f"{name}: llama.cpp finds one half of the pair alone")
        assert other is not None
        out, width = shapes[place]
        fits = shape == (other[1], width) if part == "lora_a" else shape == (out, other[0])
        turned = "; it is transposed" if shape[::-1] in ((other[-1], width), (out, other[0])) and not fits else ""
        require(fits, f"{name}: it has shape {list(shape)}, which does not fit a weight of {[out, width]}{turned}")


def check_paths(paths: Sequence[str], base: Base) -> None:
    """Raise UserError for a weight that the base's GGUF lacks."""
    absent = [path for path in paths if f"{path}.weight" not in base.weights]
    if absent:
        raise UserError(
            f"--for=llama.cpp: the adapter has {absent[0]}, which is not in the base's GGUF (its head is the "
            "embedding); write --format gguf, which merges it"
        )


def check(export: Export, ours: Ours) -> list[Reading]:
    """Return readings of transformers with the file's change added, and of llama.cpp if installed.

    llama.cpp reads a GGUF of the base.
    """
    trained, dtype = export.trained, export.request.dtype
    assert dtype is not None
    base = open_base(trained.spec, trained.initial_adapter_dir)
    bound = ours.exact if dtype == "fp32" else None
    read = _read(export.place, base)
    readings = []
    if dtype != "fp32":
        what = f"the file's B and A beside the adapter's, in what rounding to {dtype} may move each"
        readings.append(Reading(what=what, difference=_apart(export, base, read, dtype), bound=1.0))
    theirs = _added(dense_model(trained), read, ours.tokens)
    readings.append(ours.reading(f"transformers with what the file adds, in {dtype}", theirs, bound))
    if not has_llama_cpp():
        export.say(f"llama.cpp has not loaded it: it is not installed; {HOW_TO_GET_IT}")
        return readings
    with tempfile.TemporaryDirectory(dir=export.place.parent, prefix=".distlora-gguf-") as folder, Reader() as reader:
        path = Path(folder) / "base.gguf"
        weights = {
            name: Weight(name=name, shape=weight.shape, rows=functools.partial(weight.published_rows, reader))
            for name, weight in base.weights.items()
        }
        tokenizer = tokenizer_of(trained)
        write_model(path, base.model.hf_config, weights, tokenizer, dtype="fp32", name="base", say=lambda text: None)
        client = LlamaCpp(path, export.place, context=ours.tokens.shape[1])
        readings.append(ours.reading(f"llama.cpp, adapter in {dtype}", client.logits(ours.tokens), bound))
    return readings


def _read(path: Path, base: Base) -> dict[str, _Pair]:
    """Read the factors by Hugging Face path with the gguf package."""
    file, names = gguf.GGUFReader(path), Names.of(base.model.hf_config)
    alpha = file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    read = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in file.tensors}
    pairs = {}
    for name in base.weights:
        if not name.endswith(".weight") or (b := read.get(f"{names.gguf_name(name)}.lora_b")) is None:
            continue
        places = torch.arange(len(b), dtype=torch.float32)[:, None]
        order = torch.cat(list(names.in_order(name, functools.partial(iter, [places]))())).long().flatten()
        back = torch.empty_like(b)
        back[order] = b
        a = read[f"{names.gguf_name(name)}.lora_a"]
        pairs[name.removesuffix(".weight")] = (a, back, alpha / b.shape[1])
    return pairs


@torch.no_grad()
def _added(model: Any, read: Mapping[str, _Pair], input_ids: Tensor) -> Tensor:
    """Return logits of transformers' model with W + (alpha / R) B A."""
    for path, (a, b, scale) in read.items():
        model.get_parameter(f"{path}.weight").add_(b @ a, alpha=scale)
    return logits_of(model, input_ids)


def _apart(export: Export, base: Base, read: Mapping[str, _Pair], dtype: str) -> float:
    """Return the largest error of A or B in units of the rounding of `dtype`."""
    most = 0.0
    with open_adapter(export.trained, base, "original") as adapter, Reader() as reader:
        assert adapter is not None
        if set(adapter.file.paths) != set(read):
            return float("inf")
        for path, (a, b, scale) in read.items():
            own = adapter.factors(path, reader)
            exact = own.B * (own.scaling / scale)
            most = max(most, half_steps(own.A, a, TYPES[dtype]), half_steps(exact, b, TYPES[dtype]))
    return most


def write_adapter(
    path: Path, config: Any, factors: Mapping[str, Callable[[], Factors]], *, dtype: str, name: str
) -> None:
    """Write factors, read as they are written, to a GGUF adapter; `config` is transformers' config of the base.

    Raises UserError for a weight that llama.cpp's architecture lacks.
    """
    names = Names.of(config)
    alphas, shapes = dict[str, float](), dict[str, tuple[tuple[int, ...], tuple[int, ...]]]()
    for place, read in factors.items():
        own = read()
        alphas[place], shapes[place] = own.scaling * own.rank, (tuple(own.A.shape), tuple(own.B.shape))
    # llama.cpp reads alpha 0 as absent.
    alpha = Counter(alpha for alpha in alphas.values() if alpha).most_common(1)[0][0] if any(alphas.values()) else 1.0
    tensors = []
    for place, read in factors.items():
        base = names.gguf_name(f"{place}.weight")
        a, b = (functools.partial(_rows, read, part, alphas[place] / alpha) for part in "AB")
        rows_of: tuple[Callable[[], Rows], ...] = (a, names.in_order(f"{place}.weight", b))
        for part, shape, rows in zip("ab", shapes[place], rows_of, strict=True):
            tensors.append(Planned(name=f"{base}.lora_{part}", shape=shape, type=TYPES[dtype], rows=rows))

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name)

    write_file(path, names.arch, describe, tensors)


def _rows(read: Callable[[], Factors], part: str, times: float) -> Rows:
    """Yield A, or B with the scale that the file's alpha lacks."""
    own = read()
    yield own.A if part == "A" else own.B * times
