"""Write `--for llama.cpp`: the adapter alone, by llama.cpp's converter, to be added to a GGUF file of the base.

The matching base is `distlora export RUN --adapter base --format gguf`; a GGUF of the stored checkpoint lacks the
rounding of NF4.

llama.cpp adds (alpha / R) B (A x), with R from B's shape and one alpha per file; its converter reads lora_alpha alone.
Our scales may differ by weight, and rsLoRA's is alpha / sqrt(R). So the alpha is the most frequent scale times R, and B
of the other weights is rescaled. Experts are written one by one, as the converter reads them.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import gguf
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.config import UserError, require
from distlora.post.export.formats import Export
from distlora.post.export.llama_cpp import ADAPTERS, OUT_TYPES, convert, unpacked
from distlora.post.merge_worker import DTYPES
from distlora.post.merged_parameters import open_adapter
from distlora.post.weights import Factors, OpenBase, open_base
from distlora.system import atomic_io
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora.weights.reader import Reader


def write(export: Export) -> None:
    """Write the file; of PiSSA the plain LoRA of twice the rank, for the unchanged base."""
    trained, dtype = export.trained, str(export.request.dtype)
    base = open_base(trained.spec, trained.initial_adapter_dir)
    experts = base.model.architecture.experts_by_path
    with open_adapter(trained, base, "original") as adapter, Reader() as reader:
        assert adapter is not None
        factors = {path: adapter.factors(path, reader, experts=experts.get(path)) for path in adapter.file.paths}
    alphas = Counter(own.scaling * own.rank for own in factors.values() if own.scaling)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0  # llama.cpp reads alpha 0 as absent.
    tensors: dict[str, Tensor] = {}
    for path, own in factors.items():
        for name, a, b in _pairs(base, path, own):
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.clone()  # gate_proj and up_proj share it.
            tensors[f"base_model.model.{name}.lora_B.weight"] = (b * (own.scaling * own.rank / alpha)).contiguous()
    assert export.request.converter is not None
    with tempfile.TemporaryDirectory(dir=export.place.parent, prefix=".adapter-") as scratch:
        folder, config = Path(scratch), read_config(trained.base)
        config.pop("quantization_config", None)
        config.pop("auto_map", None)  # It names code.
        (folder / "base").mkdir()
        atomic_io.write_json(folder / "base" / "config.json", config)
        atomic_io.write_json(folder / CONFIG_NAME, {"peft_type": "LORA", "lora_alpha": alpha})
        safetensors.torch.save_file(tensors, folder / WEIGHTS_NAME)
        options = ("--base", str(folder / "base"), "--outtype", OUT_TYPES[dtype])
        with unpacked(Path(export.request.converter)) as converter:
            convert(converter / ADAPTERS, folder, export.place, *options)
    check_file(export.place, tensors, alpha, dtype)
    atomic_io.sync(export.place)
    print("every number that was trained is in the file, and no other")


def _pairs(base: OpenBase, path: str, own: Factors) -> list[tuple[str, Tensor, Tensor]]:
    """Return (name on disk, A, B) of each matrix on disk that one weight is made of.

    Raises UserError for one that the converter would not find.
    """
    weight = base.weights.get(f"{path}.weight") or base.weights.get(path)
    if weight is None:
        raise UserError(
            f"--for=llama.cpp: the adapter has {path}, which is not in the base's GGUF (its head is the embedding); "
            "write --format gguf, which merges it"
        )
    a, b = own.A.view(-1, *own.A.shape[-2:]), own.B.view(-1, *own.B.shape[-2:])
    pairs, row, rows = list[tuple[str, Tensor, Tensor]](), 0, b.shape[1]
    for name, segment in zip(weight.source.names, weight.source.segments, strict=True):
        require(
            weight.source.whole and name.endswith(".weight") and segment.shape[1:] == (a.shape[2],),
            f"--for=llama.cpp: {path} is a part of {name} or has all experts in it, and llama.cpp's converter reads an "
            "adapter of each matrix; write --format gguf, which merges it",
        )
        (expert, first), count = divmod(row, rows), segment.shape[0]
        pairs.append((name.removesuffix(".weight"), a[expert], b[expert, first : first + count]))
        row += count
    return pairs


def check_file(path: Path, tensors: dict[str, Tensor], alpha: float, dtype: str) -> None:
    """Raise UserError for a file of other numbers than these. The converter may order, split and stack matrices."""
    file = gguf.GGUFReader(path)
    wanted = {"general.type": "adapter", "adapter.type": "lora", gguf.Keys.Adapter.LORA_ALPHA: alpha}
    for key, value in wanted.items():
        stored = file.fields[key].contents() if key in file.fields else None
        same = stored == value if isinstance(value, str) else torch.tensor(stored or 0.0) == torch.tensor(value)
        require(bool(same), f"{path}: {key} is {stored!r}, not {value!r}")
    read = [torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()) for tensor in file.tensors]
    ours, theirs = (
        torch.cat([each.to(DTYPES[dtype]).float().flatten() for each in values]).unique()
        for values in (tensors.values(), read)
    )
    require(
        torch.equal(ours, theirs),
        f"{path}: llama.cpp's {ADAPTERS} wrote other numbers than were trained; please report it, and write "
        "--format gguf",
    )
