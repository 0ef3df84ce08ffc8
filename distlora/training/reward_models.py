"""Score sampled answers by reward models: adapters on this run's base, or sequence classifiers of transformers.

Letters: N answers of a rank, B rows of a forward, T tokens per row, H hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.architecture.tokens import load_tokenizer
from distlora.config import DataConfig, ModelSpec, UserError
from distlora.data.chat_template import ChatTemplate
from distlora.data.encoding import Encoder, tokenize
from distlora.data.formats import Document
from distlora.data.loader import IGNORED
from distlora.data.packing import assign_rows
from distlora.generation.engine import aside
from distlora.generation.prompts import PromptEncoder
from distlora.loading.peft_format import values_beside
from distlora.model.build import DTYPES, CausalLM
from distlora.model.layer_wrapper import computing_with
from distlora.parallel import Backend, watch
from distlora.parallel.ranks import max_over_ranks
from distlora.rewards.models import check_reward_models, read_reward_adapter, reward_adapter
from distlora.rewards.pool import RewardInput, Scores
from distlora.weights.peft_folder import WEIGHTS_NAME, PeftAdapter
from distlora.weights.peft_modules import SCORE

ROWS_AT_ONCE = 8
"""Answers that a classifier scores at once."""


class Scorer(Protocol):
    """A reward model."""

    def tokens(self, sample: RewardInput) -> list[int]:
        """Return the tokens of a prompt with its answer. Raises UserError for an answer that it cannot read."""

    def score(self, documents: Sequence[list[int]]) -> list[float]:
        """Return the scores of documents. Every rank must call it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModels:
    """The reward models of a run."""

    names: tuple[str, ...]
    """data.rewards."""
    scorers: Mapping[str, Scorer]
    """By their names among those."""
    log: Callable[[str], None]

    def merged(self, functions: Scores, inputs: Sequence[RewardInput]) -> Scores:
        """Return the rewards of answers from those of the functions, with the models'. Every rank must call it.

        An answer that a model cannot read, or has no finite score, counts as failed.
        """
        if not self.scorers:
            return functions
        failed, counts = [*functions.failed], dict(functions.counts)
        columns: dict[str, list[float | None]] = {}
        for name, scorer in self.scorers.items():
            documents, read = [], []
            errors = invalid = 0
            for index, sample in enumerate(inputs):
                try:
                    documents.append(scorer.tokens(sample))
                    read.append(index)
                except UserError as error:
                    if not errors:  # One line per rollout.
                        self.log(f"reward {name}: {error}; the answer is left out (counted in rewards/{name}/errors)")
                    failed[index], errors = True, errors + 1
            columns[name] = [None] * len(inputs)
            for index, score in zip(read, scorer.score(documents), strict=True):
                if math.isfinite(score):
                    columns[name][index] = score
                else:
                    failed[index], invalid = True, invalid + 1
            counts |= {f"rewards/{name}/errors": errors, f"rewards/{name}/invalid": invalid}
        values = []
        for index, row in enumerate(functions.values):
            own = iter(row)
            values.append([columns[name][index] if name in columns else next(own) for name in self.names])
        return Scores(values=values, failed=failed, counts=counts)


class AdapterScorer:
    """A reward model on this run's base: its adapter takes the place of the trained one for a forward of all ranks."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        adapter: PeftAdapter,
        prompts: PromptEncoder,
        texts: Encoder,
        *,
        micro_batch: int,
        pad: int,
    ) -> None:
        """`prompts`: writes chats by the run's template; `texts`: encodes a prompt and its completion."""
        self._model, self._backend, self._prompts, self._texts = model, backend, prompts, texts
        self._micro_batch, self._pad, self._length = micro_batch, pad, texts.data.sequence_length
        self._tools = json.loads(texts.data.tool_schemas or "[]")
        self._values = values_beside(model, adapter)
        with safetensors.safe_open(adapter.folder / WEIGHTS_NAME, framework="pt") as tensors:
            self._weight = tensors.get_tensor(SCORE).to(backend.ranks.device, torch.float32)
        model.reward_tensors += [*self._values.values(), self._weight]

    def tokens(self, sample: RewardInput) -> list[int]:
        """Return the tokens as the reward model was trained: of the chat template, or prompt, answer, end of text."""
        if self._prompts.template is not None and not isinstance(sample.prompt, str):
            return chat_tokens(self._prompts.template, self._prompts.tokenizer, sample, self._tools)
        document = Document("an answer", 0, {"prompt": sample.prompt, "completion": sample.completion})
        [encoded] = self._texts.encode([document])
        ids: list[int] = encoded.tokens.tolist()
        return ids

    @torch.no_grad()
    def score(self, documents: Sequence[list[int]]) -> list[float]:
        """Return the score at each document's last token that is not config.json's pad_token_id, as transformers."""
        sizes = np.array([len(document) for document in documents], np.int64)
        length = max(self._length, int(sizes.max(initial=0)))
        row_of = assign_rows(sizes, length)
        at_once = self._micro_batch
        forwards = -(-(int(row_of.max(initial=-1)) + 1) // at_once)
        forwards = max_over_ranks(forwards, self._backend.ranks)  # While the base is sharded, all run the same number.
        pad, device = self._model.hf_config.pad_token_id, self._backend.ranks.device
        scores = [0.0] * len(documents)
        with aside(self._model, self._backend), computing_with(self._values):
            for first in range(0, forwards * at_once, at_once):
                mine = [n for n, row in enumerate(row_of.tolist()) if first <= row < first + at_once]
                rows, last, filled = [], [], [0] * at_once
                for number in mine:
                    start = filled[row := int(row_of[number]) - first]
                    filled[row] += len(documents[number])
                    rows.append((row, start, documents[number]))
                    counted = [place for place, token in enumerate(documents[number]) if token != pad]
                    last.append((row, start + max(counted, default=0)))
                watch.moved()
                found = self._forward(rows, last, max(*filled, 1), device)
                for number, score in zip(mine, found, strict=True):
                    scores[number] = score
        return scores

    def _forward(
        self, rows: list[tuple[int, int, list[int]]], last: list[tuple[int, int]], length: int, device: torch.device
    ) -> list[float]:
        """Return the scores at `last` (row, position) of documents (row, first position, tokens) in `length` tokens."""
        ids = torch.full((self._micro_batch, length), self._pad)
        positions = torch.arange(length).repeat(self._micro_batch, 1)
        for row, start, document in rows:
            end = start + len(document)
            ids[row, start:end] = torch.tensor(document)
            positions[row, start:] = torch.arange(length - start)  # Behind it another one begins, or the padding.
            positions[row, end:] = torch.arange(length - end)
        states: list[Tensor] = []
        labels = torch.full_like(ids, IGNORED).to(device)
        documents = self._model.documents_of(positions, device)
        with self._model.head.read_by(states.append):
            self._model(ids.to(device), positions.to(device), labels, documents=documents)
        if not last:
            return []
        at = torch.tensor(last, device=device)
        return F.linear(states[0][at[:, 0], at[:, 1]].float(), self._weight)[:, 0].tolist()


class ClassifierScorer:
    """A sequence classifier of transformers with one output, whole on this rank, with a tokenizer of its own."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, data: DataConfig, *, chats: bool
    ) -> None:
        """Load it. `chats`: prompts are messages. `data`: has the tools of dialogues.

        Raises UserError where its tokenizer cannot write chats.
        """
        from transformers import AutoModelForSequenceClassification

        self._folder, self._device, self._tokenizer = folder, device, load_tokenizer(folder)
        self._template = ChatTemplate(self._tokenizer, str(folder)) if chats else None
        self._tools = json.loads(data.tool_schemas or "[]")
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        self._model = model.to(device).requires_grad_(False).train(False)
        self.weights: list[Tensor] = [parameter.data for parameter in model.parameters()]
        self._pad = self._model.config.get_text_config().pad_token_id
        self._longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def tokens(self, sample: RewardInput) -> list[int]:
        """Return the tokens by its own chat template, or of prompt and answer as one text. Refuses too many."""
        if self._template is not None and not isinstance(sample.prompt, str):
            ids = chat_tokens(self._template, self._tokenizer, sample, self._tools)
        else:
            ids = self._tokenizer(f"{sample.prompt}{sample.completion}", verbose=False).input_ids
        if self._longest is not None and len(ids) > self._longest:
            raise UserError(f"{len(ids):,} tokens of prompt and answer, and {self._folder} reads {self._longest:,}")
        return ids

    @torch.no_grad()
    def score(self, documents: Sequence[list[int]]) -> list[float]:
        """Return the outputs. Documents of about one length run together, where the model knows its padding."""
        order = sorted(range(len(documents)), key=lambda number: len(documents[number]))
        at_once = 1 if self._pad is None else ROWS_AT_ONCE
        scores = [0.0] * len(documents)
        for part in (order[first : first + at_once] for first in range(0, len(order), at_once)):
            watch.moved()
            sizes = torch.tensor([len(documents[number]) for number in part])
            is_token = torch.arange(int(sizes.max())) < sizes[:, None]
            ids = torch.full(is_token.shape, 0 if self._pad is None else self._pad)
            ids[is_token] = torch.tensor([token for number in part for token in documents[number]])
            mask = is_token.long().to(self._device)
            outputs = self._model(input_ids=ids.to(self._device), attention_mask=mask).logits[:, 0].tolist()
            for number, score in zip(part, outputs, strict=True):
                scores[number] = score
        return scores


def chat_tokens(template: ChatTemplate, tokenizer: Any, sample: RewardInput, tools: list[Any]) -> list[int]:
    """Return the tokens of messages with their answer. Raises UserError where the template refuses them."""
    text = template.render("an answer", [*sample.prompt, *sample.completion], tools)
    ids: list[int] = tokenize(tokenizer, [text]).input_ids[0]
    return ids


def open_reward_models(
    data: DataConfig,
    spec: ModelSpec,
    model: CausalLM,
    backend: Backend,
    prompts: PromptEncoder,
    *,
    micro_batch: int,
    pad: int,
    log: Callable[[str], None],
) -> RewardModels:
    """Load the reward models of data.reward_models on this rank.

    `pad` fills rows. Raises UserError for those that the run cannot use, or that have changed since it began.
    """
    check_reward_models(data, spec, model.architecture)
    scorers: dict[str, Scorer] = {}
    for name, place in data.reward_models.items():
        folder = reward_adapter(Path(place))
        if folder is not None:
            texts = Encoder(prompts.tokenizer, spec.model.path, data)
            adapter = read_reward_adapter(folder, spec, model.architecture)
            scorers[name] = AdapterScorer(model, backend, adapter, prompts, texts, micro_batch=micro_batch, pad=pad)
            log(f"the reward {name} is the base with the adapter in {folder}")
        else:
            chats = prompts.template is not None
            scorers[name] = other = ClassifierScorer(
                Path(place), DTYPES[spec.dtype], backend.ranks.device, data, chats=chats
            )
            model.reward_tensors += other.weights
            log(f"the reward {name} is the classifier in {place}, whole on each rank")
    return RewardModels(names=data.rewards, scorers=scorers, log=log)
