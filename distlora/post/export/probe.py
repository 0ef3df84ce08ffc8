"""Logits on a probe text: of the model as it was trained, and how far a client's are from them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from distlora.architecture.tokens import load_tokenizer
from distlora.config import Config, QuantConfig, UserError
from distlora.loading.plain_adapter import plain_form
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.post.export.request import Reading
from distlora.post.load_trained import load_in_fp32, weights_in
from distlora.post.trained import Trained, with_adapter

TOKENS = 128
EXACT = 1e-4
"""Largest difference of logits between two computations in fp32 with the same weights."""

TEXT = """A list keeps its items in order; a set forgets it, and holds each once.

def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # ZeroDivisionError where there are none

In 1969, 600 million people watched; the answer to 17 * 23 is 391. Über den Wolken, 東京タワー, ça va?
"Why," she asked, "does the function return None?" - because nothing in it says what else to return.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """What the client is compared with."""

    tokens: Tensor
    """(1, T)."""
    logits: Tensor
    """(1, T, vocabulary) fp32."""
    moved: float | None
    """The largest difference that the adapter makes, beside which those of clients are read; None where it cannot be
    told apart."""

    def reading(self, what: str, logits: Tensor, bound: float | None = None) -> Reading:
        """Those of a client. A vocabulary that it has padded counts as far as ours goes."""
        theirs = logits.float().view(1, self.tokens.shape[1], -1)[..., : self.logits.shape[-1]]
        ours = self.logits
        log_ours, log_theirs = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        return Reading(
            what=what,
            difference=float((ours - theirs).abs().max()),
            kl=float((log_ours.exp() * (log_ours - log_theirs)).sum(-1).mean()),
            same_top=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
            bound=bound,
        )


@torch.no_grad()
def our_logits(trained: Trained) -> Ours:
    """The model that was trained, computed in fp32 on the CPU, as the clients are, and gone when this returns."""
    model, _ = load_in_fp32(trained, Ranks(0, 1, torch.device("cpu"), None))
    tokens = probe_tokens(trained.config, model)
    logits = _logits(model, tokens)
    moved = None
    if not model.token_rows:
        without = _logits(model, tokens, adapter_rows=torch.full((1,), -1))
        moved = float((logits - without).abs().max())
    del model
    gc.collect()
    return Ours(tokens=tokens, logits=logits, moved=moved)


@contextlib.contextmanager
def onto_original(trained: Trained) -> Iterator[Trained]:
    """The same adapter on the base as it is on disk, unquantized: what `--onto original` merges."""
    assert trained.weights is not None
    with plain_form(weights_in(trained.weights), trained.config.adapter, trained.config.run_dir) as folder:
        config = trained.config
        dense = replace(config, quant=QuantConfig(method="none"), train=replace(config.train, dtype="fp32"))
        yield replace(trained, config=with_adapter(dense, folder), weights=folder, foreign=True)


def _logits(model: CausalLM, tokens: Tensor, adapter_rows: Tensor | None = None) -> Tensor:
    positions = torch.arange(tokens.shape[1])[None]
    hidden = model.hidden_states(tokens, positions, adapter_rows)
    return model.head.logits(hidden.flatten(0, 1)).view(1, tokens.shape[1], -1)


def probe_tokens(config: Config, model: CausalLM) -> Tensor:
    """(1, T): the probe text, and tokens whose rows were trained; numbers where the base has no tokenizer."""
    rows = model.vocabulary.stored
    trained = sorted(
        {id for ids in model.vocabulary.trained.values() for id in ids} | set(model.vocabulary.new.values())
    )
    try:
        ids = load_tokenizer(Path(config.model.path), config.model.new_tokens)(TEXT)["input_ids"]
    except UserError:
        ids = [(7919 * place + 13) % rows for place in range(TOKENS)]
    limit: int = model.decoder.config.max_position_embeddings  # type: ignore[assignment, union-attr]
    ids = (trained[:16] + [id for id in ids if id < rows])[: min(TOKENS, limit)]
    return torch.tensor([ids])
