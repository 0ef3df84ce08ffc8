"""Load an export with its real client, in a process of its own, and compare its logits with ours.

The last line of the process on stdout is JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from distlora.architecture.checkpoint_files import read_hf_config
from distlora.architecture.tokens import load_tokenizer
from distlora.config import ModelSpec, QuantConfig, UserError
from distlora.loading.decomposed_adapters import plain_form
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.post.export.formats import FORMATS, ClientReading, Export, ExportRequest
from distlora.post.load_trained import load_in_fp32, weights_in
from distlora.post.trained import Trained, with_adapter
from distlora.post.weights import open_base
from distlora.system.progress import ProgressLines, say
from distlora.weights.reader import Reader


def run(request: ExportRequest) -> dict[str, Any]:
    """Return the readings of the format's client."""
    assert request.place is not None
    trained = request.name.read()
    with onto_original(trained) if request.onto == "original" else contextlib.nullcontext(trained) as meant:
        ours = our_logits(meant)
    export = Export(request=request, trained=trained, place=Path(request.place), say=say, progress=ProgressLines())
    module: Any = importlib.import_module(FORMATS[request.format].module)
    readings = module.check(export, ours)
    return {
        "tokens": ours.tokens.shape[1],
        "moved": ours.moved,
        "readings": [dataclasses.asdict(reading) for reading in readings],
    }


def main(request: ExportRequest) -> None:
    """Print the readings of the client as JSON."""
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT and transformers warn about each other.
    print(json.dumps(run(request)))


EXACT, EXACT_RELATIVE = 1e-4, 1e-5
"""Largest difference of logits between two fp32 computations with the same weights: absolute, or as a share of the
largest logit (84 roundings of fp32), if that is more: a real model's logits reach 40, where 1e-4 is 26 roundings."""

TEXT = """A list keeps its items in order; a set forgets it, and holds each once.

def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # ZeroDivisionError where there are none

In 1969, 600 million people watched; the answer to 17 * 23 is 391. Über den Wolken, 東京タワー, ça va?
"Why," she asked, "does the function return None?" - because nothing in it says what else to return.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """The logits that a client's are compared with."""

    tokens: Tensor
    """(1, T)."""
    logits: Tensor
    """(1, T, vocabulary) fp32."""
    moved: float | None
    """Largest change of a logit by the adapter, the scale of readings; None if it cannot be separated."""

    @property
    def exact(self) -> float:
        """Return the bound of another fp32 computation's logits."""
        return max(EXACT, EXACT_RELATIVE * float(self.logits.abs().max()))

    def reading(self, what: str, logits: Tensor, bound: float | None = None) -> ClientReading:
        """Return the reading of a client's logits; a padded vocabulary is cut to ours."""
        theirs = logits.float().view(1, self.tokens.shape[1], -1)[..., : self.logits.shape[-1]]
        ours = self.logits
        log_ours, log_theirs = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        return ClientReading(
            what=what,
            difference=float((ours - theirs).abs().max()),
            kl=float((log_ours.exp() * (log_ours - log_theirs)).sum(-1).mean()),
            same_top=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
            bound=bound,
        )


@torch.no_grad()
def our_logits(trained: Trained) -> Ours:
    """Return the trained model's logits in fp32 on the CPU; free the model."""
    model, _ = load_in_fp32(trained, Ranks(0, 1, torch.device("cpu"), None))
    tokens = probe_tokens(trained.spec, model)
    logits = model.logits(tokens)
    moved = None
    if not model.token_rows:
        without = model.logits(tokens, adapter_rows=torch.full((1,), -1))
        moved = float((logits - without).abs().max())
    del model
    gc.collect()
    return Ours(tokens=tokens, logits=logits, moved=moved)


@contextlib.contextmanager
def onto_original(trained: Trained) -> Iterator[Trained]:
    """Yield the same adapter on the stored, unquantized base: what `--onto original` merges."""
    assert trained.weights is not None
    with plain_form(weights_in(trained.weights), trained.spec.adapter, trained.initial_adapter_dir) as folder:
        dense = replace(trained.spec, quant=QuantConfig(method="none"), dtype="fp32")
        yield replace(trained, spec=with_adapter(dense, folder), weights=folder, foreign=True)


def probe_tokens(spec: ModelSpec, model: CausalLM) -> Tensor:
    """Return (1, T) tokens of the probe text and of trained rows; arbitrary tokens without a tokenizer."""
    rows = model.vocabulary.stored
    trained = sorted(
        {id for ids in model.vocabulary.trained.values() for id in ids} | set(model.vocabulary.new.values())
    )
    try:
        ids = load_tokenizer(spec.path, spec.model.new_tokens, spec.model.special_tokens)(TEXT)["input_ids"]
    except UserError:
        ids = [(7919 * place + 13) % rows for place in range(128)]
    limit: int = model.decoder.config.max_position_embeddings  # type: ignore[assignment, union-attr]
    ids = (trained[:16] + [id for id in ids if id < rows])[: min(128, limit)]
    return torch.tensor([ids])


@torch.no_grad()
def dense_model(trained: Trained, *, original: bool = False) -> Any:
    """Return transformers' model with the base dequantized as trained on, or as stored (`original`).

    PiSSA's initial adapter is added back: the published adapter belongs to the unchanged base.
    """
    import transformers

    base = open_base(trained.spec, trained.initial_adapter_dir)
    architecture, folder = base.model.architecture, trained.spec.model.path
    config = read_hf_config(folder)
    model = getattr(transformers, architecture.auto_class).from_config(
        config,
        dtype=torch.float32,
        attn_implementation=architecture.attention,
        experts_implementation="eager",
        trust_remote_code=False,
    )
    model.eval()
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    with Reader() as reader:
        for name, weight in base.weights.items():
            fill(places[name], weight.published_rows(reader, original=original))
    if base.model.vocabulary.has_grown:
        model.resize_token_embeddings(base.model.vocabulary.rows, mean_resizing=False)
    return model


def fill(place: Tensor, pieces: Iterable[Tensor], dtype: torch.dtype | None = None) -> float:
    """Fill a parameter with pieces in flat order.

    Returns the largest difference of its old values from the new ones rounded to `dtype`; 0 without one.
    """
    values, first, apart = place.data.view(-1), 0, 0.0
    for piece in pieces:
        stored = values[first : first + piece.numel()]
        if dtype is not None:
            apart = max(apart, float((stored - piece.reshape(-1).to(dtype).float()).abs().max()))
        stored.copy_(piece.reshape(-1))
        first += piece.numel()
    assert first == len(values), "a parameter and its weights have other sizes"
    return apart
