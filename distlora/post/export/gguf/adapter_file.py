"""A LoRA adapter as GGUF, for llama.cpp to add to a model's GGUF as it computes (--lora).

llama.cpp adds (alpha / R) B (A x), R from B's shape and one alpha for the whole file. Ours may differ by weight, and
with rsLoRA is alpha / sqrt(R): the file's alpha is the scale times R of most weights, and B of the others is multiplied
by what theirs lacks, before it is rounded to --dtype. llama.cpp's convert_lora_to_gguf.py writes lora_alpha alone,
whatever use_rslora, alpha_pattern and rank_pattern say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf import GGUFWriter

from distlora.post.deltas.factors import Factors
from distlora.post.export.gguf.file import write_file
from distlora.post.export.gguf.tensors import (
    TYPES,
    Names,
    Planned,
    Rows,
)

Factory = Callable[[], Factors]


def write_adapter(path: Path, config: Any, factors: Mapping[str, Factory], *, dtype: str, name: str) -> None:
    """`factors` by Hugging Face path, each read when it is written; `config` is transformers' own, of the base.

    Raises UserError for a weight that llama.cpp's architecture has not.
    """
    names = Names.of(config)
    alphas, shapes = dict[str, float](), dict[str, tuple[tuple[int, ...], tuple[int, ...]]]()
    for place, read in factors.items():
        own = read()
        alphas[place], shapes[place] = own.scaling * own.rank, (tuple(own.A.shape), tuple(own.B.shape))
    # llama.cpp takes an alpha of 0 for none at all.
    alpha = Counter(alpha for alpha in alphas.values() if alpha).most_common(1)[0][0] if any(alphas.values()) else 1.0
    tensors = []
    for place, read in factors.items():
        base = names.gguf_name(f"{place}.weight")
        b = names.in_order(f"{place}.weight", _rows_of(read, "B", alphas[place] / alpha))
        for part, shape, rows in zip("ab", shapes[place], (_rows_of(read, "A"), b), strict=True):
            tensors.append(Planned(name=f"{base}.lora_{part}", shape=shape, type=TYPES[dtype], rows=rows))

    def describe(writer: GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name)

    write_file(path, names.arch, describe, tensors)


def _rows_of(read: Factory, part: Literal["A", "B"], times: float = 1.0) -> Callable[[], Rows]:
    return lambda: iter([getattr(read(), part) * times])
