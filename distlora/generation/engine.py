"""Decode many requests with one model: continuous batching over a paged key-value cache.

A row that ends leaves the batch, and the next request takes its place. Requests with the same prompt share its keys and
values, which are computed once. Rows of several adapters run in one batch. The ranks divide the requests; while the
base is sharded, they run the same number of forwards.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distlora.architecture.shapes import CACHE_SHARE, DENSE_ROWS, DENSE_SHARE, MOST_ROWS
from distlora.checkpoint.state import SamplingChoice
from distlora.config import UserError
from distlora.generation import step_graph
from distlora.generation.compiled_step import CompiledStep, fits
from distlora.generation.prompts import context_limit
from distlora.generation.sampling import NUMBERS, Form, Request, Sample, choose, choose_by, numbers_of
from distlora.generation.step_graph import StepGraphs, padded_rows
from distlora.model.adapters import AdapterCopies
from distlora.model.batch_invariant import batch_invariant
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.paged_cache import BLOCK, CacheStep, PagedCache, Past
from distlora.parallel import Backend
from distlora.parallel.ranks import max_over_ranks
from distlora.system.transfer import to_device
from distlora_kernels import products

PREFILL_TOKENS = 2048
"""Tokens of prompts per forward, padding included; a longer prompt runs alone."""
FORWARDS = 32
"""Forwards between two checks whether any rank has work left, while no forward needs the other ranks."""

MOST_BYTES = 4
"""Bytes of a character in UTF-8. A token has one byte at least."""


class StopStrings:
    """Texts of which each ends a completion, wherever the tokens divide it."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        assert tokenizer is not None, "stop strings need a tokenizer"
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        # A text, and one character before it that its first token may belong to.
        self._size = MOST_BYTES * (max(map(len, texts)) + 2)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Return whether the last token completed a text. Earlier ones have been asked about."""
        tail = self._tokenizer.decode(list(tokens[-self._size :]), clean_up_tokenization_spaces=False)
        return any(text in tail for text in self._texts)


@dataclass(slots=True, eq=False)
class _Prefix:
    """A prompt whose keys and values are computed once for its requests."""

    tokens: list[int]
    slot: int | None
    users: int = 0
    """Requests that wait for a place, or for this prompt's logits."""
    blocks: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    """(V,) fp32 after its last token; None before its forward."""
    rows: int = 0
    """Running rows that read its blocks."""


@dataclass(slots=True, eq=False)
class _Row:
    """A request that has a place in the batch."""

    index: int
    request: Request
    prefix: _Prefix
    own: list[int]
    """Blocks behind the prompt's whole ones, for all tokens that it may have."""
    limit: int
    """Tokens that it may generate."""
    stops: StopStrings | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the prompt and generated ones."""
        return len(self.prefix.tokens) + len(self.tokens)

    @property
    def table(self) -> list[int]:
        """Blocks of all its tokens, in order."""
        return self.prefix.blocks[: len(self.prefix.tokens) // BLOCK] + self.own


def serves(model: CausalLM) -> bool:
    """Return whether the engine computes this model's attention; transformers' generate takes the others."""
    return model.architecture.pages_cache and not model.token_rows


class Engine:
    """Generates completions with a model that `serves` accepts.

    `end_tokens`: each of them ends a completion. `tokenizer`: of transformers, for stop strings.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        *,
        end_tokens: Sequence[int] = (),
        tokenizer: Any = None,
        most_rows: int | None = None,
        resident: bool = True,
        compiled: bool | None = None,
        captured: bool | None = None,
        chosen: SamplingChoice | None = None,
    ) -> None:
        """Prepare to run requests.

        `resident`: keep the base whole on each rank meanwhile, where memory allows. `compiled`: decode by one compiled
        call where that is possible; None: if the model's linears are compiled. `captured`: replay decoding steps as
        CUDA graphs on a GPU; None: step_graph.CAPTURED. `chosen`: an earlier engine's choice.
        """
        assert serves(model), "the engine does not serve this model"
        self._model, self._backend, self._tokenizer = model, backend, tokenizer
        self._ends = frozenset(end_tokens)
        self._most_rows = most_rows or MOST_ROWS[backend.ranks.device.type]
        self._resident = resident
        self._captured = step_graph.CAPTURED if captured is None else captured
        self._compiled = products.is_used() if compiled is None else compiled
        self.chosen = chosen
        """What the free memory of the first run decided, alike on all ranks: later runs compute the same numbers. It
        changes only where memory has become too small for it."""

    @torch.no_grad()
    def run(
        self,
        requests: Sequence[Request],
        on_done: Callable[[int, Sample], None] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        boundary: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Return the samples of all requests, in their order. Every rank calls it with the same requests.

        The ranks divide the requests into neighbouring parts. `on_done(index, sample)` and `on_token(index, token)` are
        called on the rank that generates it, as soon as it is there. `boundary(number)` is called between forwards, at
        least every FORWARDS of them, on all ranks alike; it may raise.

        Raises UserError for a prompt that is empty or leaves no room for a token.
        """
        limit = context_limit(self._model)
        for request in requests:
            if not 0 < len(request.tokens) < limit:
                raise UserError(
                    f"a prompt of {len(request.tokens):,} tokens: the model has {limit:,} positions for the prompt and "
                    "its completion, and needs one token at least; shorten or write it"
                )
        mine = self._backend.ranks.part_of(len(requests))
        with contextlib.ExitStack() as stack:
            stack.enter_context(aside(self._model, self._backend))
            one_adapter = all(request.slot is None for request in requests)
            copies = AdapterCopies.of(self._model, self._backend.ranks.device, one_adapter=one_adapter)
            stack.enter_context(copies.fresh())
            stack.enter_context(batch_invariant(self._model.is_batch_invariant))
            batch = _Batch(self, [(index, requests[index]) for index in mine], limit, on_done, on_token)
            stack.enter_context(batch.cache.attending(self._model.decoder))
            # The cache has no blocks yet: it gets a part of the memory that the whole base leaves.
            alone = stack.enter_context(self._backend.whole_base(self._model, batch.run_nothing, wanted=self._resident))
            has_room = alone and self._resident and self._has_room(min(len(mine), self._most_rows))
            self.chosen = self._choose(has_room=has_room)
            captures = self._captured and alone and self._backend.ranks.device.type == "cuda"
            batch.allocate(self.chosen.blocks, captures=captures)
            batch.compiles = self.chosen.compiles
            if self.chosen.dense and not batch.compiles:
                stack.enter_context(dense_copies(self._model))
            for number in itertools.count(1):
                if not self._any(batch.works):
                    break
                if boundary is not None:
                    boundary(number)
                for _ in range(FORWARDS if alone else 1):
                    if batch.works or not alone:
                        batch.forward()
        return gathered(batch.samples, len(requests), self._backend)

    def _choose(self, *, has_room: bool) -> SamplingChoice:
        """Return the most blocks of a rank, and what it decodes with. Every rank must call it."""
        before, on_cpu = self.chosen, self._backend.ranks.device.type == "cpu"
        dense = has_room and (before is None or before.dense)
        taken = dense_bytes(self._model) if dense and not on_cpu else 0
        room = _memory_blocks(self._model, self._backend, taken)
        blocks = int(CACHE_SHARE * room) if room < sys.maxsize else room
        if before is not None and before.blocks <= room:
            blocks = before.blocks
        may_compile = has_room and on_cpu and self._compiled and not self._model.is_batch_invariant
        compiles = may_compile and fits(self._model)
        return SamplingChoice(
            blocks=-max_over_ranks(-blocks, self._backend.ranks),
            compiles=compiles and (before is None or before.compiles),
            dense=dense,
        )

    def _has_room(self, rows: int) -> bool:
        """Return whether every rank has memory for the dequantized weights, and gains by them. Every rank must call it.

        `rows` that decode together gain on a CPU, above DENSE_ROWS on a GPU, and where no product decodes the format.
        """
        nbytes = dense_bytes(self._model) / DENSE_SHARE
        if self._backend.ranks.device.type == "cpu":
            return not self._backend.lacks_host_memory(int(nbytes))
        fused = all(weight.frozen_weight.is_nf4 for weight in quantized_weights(self._model))
        lacks = (fused and rows <= DENSE_ROWS) or nbytes > self._backend.free_bytes()
        return not max_over_ranks(int(lacks), self._backend.ranks)

    def _any(self, works: bool) -> bool:
        """Return whether any rank has work left."""
        return bool(max_over_ranks(int(works), self._backend.ranks))


class _Batch:
    """The requests of this rank: those that wait, and the rows that run."""

    def __init__(
        self,
        engine: Engine,
        requests: list[tuple[int, Request]],
        limit: int,
        on_done: Callable[[int, Sample], None] | None,
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self._engine, self._limit, self._on_done, self._on_token = engine, limit, on_done, on_token
        self._model, self._device = engine._model, engine._backend.ranks.device
        self._waiting = deque(requests)
        self._prefixes: dict[tuple[tuple[int, ...], int | None], _Prefix] = {}
        for _, request in requests:
            self._prefix_of(request).users += 1
        chosen = {request.slot for _, request in requests}
        assert None not in chosen or len(chosen) == 1, "requests name a slot or none does"
        self._slots = None if None in chosen else {slot for slot in chosen if slot is not None}
        """Slots of the requests; None if they choose no adapter."""
        self.samples: dict[int, Sample] = {}
        self._rows: list[_Row] = []
        self._starting: list[_Row] = []
        """Rows whose prompt has not run yet."""
        self.cache = PagedCache(0, batch_invariant=self._model.is_batch_invariant)
        self.compiles = False
        """Decode by one compiled call (`CompiledStep`)."""
        self._compiled: CompiledStep | None = None
        self._graphs: StepGraphs | None = None
        self._width = 0
        """Blocks that any row may have."""
        self._free: list[int] = []
        self._tables: Tensor | None = None
        """(N, blocks) of the rows; None after the rows have changed."""

    @property
    def works(self) -> bool:
        """True while requests wait or rows run."""
        return bool(self._waiting or self._rows or self._starting)

    def _prefix_of(self, request: Request) -> _Prefix:
        key = (tuple(request.tokens), request.slot)
        return self._prefixes.setdefault(key, _Prefix(list(request.tokens), request.slot))

    def _tokens_of(self, request: Request) -> int:
        """Return the tokens that a request may generate."""
        return min(request.max_new_tokens, self._limit - len(request.tokens))

    def _own_blocks(self, request: Request) -> int:
        """Return the number of blocks that are a row's alone. The last token is never read."""
        total = len(request.tokens) + self._tokens_of(request) - 1
        return max(-(-total // BLOCK) - len(request.tokens) // BLOCK, 0)

    def allocate(self, most: int, *, captures: bool) -> None:
        """Give the cache blocks for all rows at once, but not more than `most`; at least for the largest request.

        `captures`: decode by graphs. A further block is then for the rows that fill a graph up.
        """
        requests = [request for _, request in self._waiting]
        sizes = sorted(self._own_blocks(request) - (-len(request.tokens) // BLOCK) for request in requests)
        wanted = sum(sizes[-self._engine._most_rows :])
        blocks = max(min(wanted, most), sizes[-1] if sizes else 0)
        self.cache.resize(blocks + captures)
        self._free = list(range(blocks))
        if captures and requests:
            self._width = max(self._own_blocks(request) + len(request.tokens) // BLOCK for request in requests)
            self._graphs = StepGraphs(self._step, self._device)

    def forward(self) -> None:
        """Run the model once: prompts that have a place, else one token of each row, else nothing that counts."""
        self._admit()
        prompts = self._next_prompts()
        if prompts:
            self._run_prompts(prompts)
        elif self._rows:
            self._run_rows()
        else:
            self.run_nothing()

    def run_nothing(self) -> None:
        """Run the model once for the other ranks' sake."""
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        slots = None if self._slots is None else self._sent([-1])  # Several adapters need a choice.
        self._logits(nothing, nothing, None, slots, CacheStep(nothing[0, :0], nothing[0, :0]))

    def _admit(self) -> None:
        """Give waiting requests a place, in order, while there are rows and blocks."""
        while self._waiting and len(self._rows) + len(self._starting) < self._engine._most_rows:
            index, request = self._waiting[0]
            prefix = self._prefix_of(request)
            own, shared = self._own_blocks(request), -(-len(prefix.tokens) // BLOCK) if not prefix.blocks else 0
            if own + shared > len(self._free):
                if self._rows or self._starting:
                    break
                self._forget_other_prompts(prefix)
                continue
            self._waiting.popleft()
            prefix.blocks += [self._free.pop() for _ in range(shared)]
            blocks = [self._free.pop() for _ in range(own)]
            stops = StopStrings(self._engine._tokenizer, request.stop) if request.stop else None
            self._starting.append(_Row(index, request, prefix, blocks, self._tokens_of(request), stops))
        self._start()

    def _forget_other_prompts(self, kept: _Prefix) -> None:
        """Free the blocks of prompts that no row reads, and that later requests have to compute again."""
        for prefix in self._prefixes.values():
            if prefix is not kept:
                self._free_blocks(prefix)

    def _free_blocks(self, prefix: _Prefix) -> None:
        self._free += prefix.blocks
        prefix.blocks, prefix.logits = [], None

    def _start(self) -> None:
        """Choose the first token of rows whose prompt has run."""
        ready = [row for row in self._starting if row.prefix.logits is not None]
        if not ready:
            return
        self._starting = [row for row in self._starting if row.prefix.logits is None]
        # The prompt's last block is only partly filled: each row has a copy of it.
        copied = [row for row in ready if len(row.prefix.tokens) % BLOCK and row.own]
        if copied:
            self.cache.copy_blocks([row.prefix.blocks[-1] for row in copied], [row.own[0] for row in copied])
        logits = torch.stack([row.prefix.logits for row in ready if row.prefix.logits is not None])
        for row in ready:
            row.prefix.users -= 1
            row.prefix.rows += 1
        self._rows += ready
        self._rows.sort(key=lambda row: (row.request.slot is not None, row.request.slot or 0, row.index))
        self._tables = None
        self._append(ready, _in_one(choose(logits, [row.request for row in ready], [row.length for row in ready])))

    def _next_prompts(self) -> list[_Prefix]:
        """Return prompts that run together: as many as fit in PREFILL_TOKENS, padded to the longest."""
        prompts: list[_Prefix] = []
        for prefix in dict.fromkeys(row.prefix for row in self._starting):
            longest = max(len(prompt.tokens) for prompt in (*prompts, prefix))
            if prompts and longest * (len(prompts) + 1) > PREFILL_TOKENS:
                break
            prompts.append(prefix)
        return sorted(prompts, key=lambda prefix: (prefix.slot is not None, prefix.slot or 0))

    def _run_prompts(self, prompts: list[_Prefix]) -> None:
        longest = max(len(prompt.tokens) for prompt in prompts)
        ids = torch.tensor([prompt.tokens + [0] * (longest - len(prompt.tokens)) for prompt in prompts])
        positions = torch.arange(longest, device=self._device).expand_as(ids)
        sources = [row * longest + at for row, prompt in enumerate(prompts) for at in range(len(prompt.tokens))]
        places = [
            prompt.blocks[at // BLOCK] * BLOCK + at % BLOCK for prompt in prompts for at in range(len(prompt.tokens))
        ]
        last = self._sent([len(prompt.tokens) - 1 for prompt in prompts])
        step = CacheStep(self._sent(places), self._sent(sources))
        slots = None if self._slots is None else self._sent([prompt.slot for prompt in prompts])
        logits = self._logits(to_device(ids, self._device), positions, last, slots, step)
        for prompt, row in zip(prompts, logits, strict=True):
            prompt.logits = row.clone()
        self._start()

    def _run_rows(self) -> None:
        """Generate one token of each row."""
        rows, graphs = self._rows, self._graphs
        more = 0 if graphs is None else padded_rows(len(rows)) - len(rows)
        if self._tables is None:
            most = self._width or max(len(row.table) for row in rows)
            tables = [row.table + [0] * (most - len(row.table)) for row in rows]
            self._tables = self._sent(tables + more * [[self.cache.num_blocks - 1] * most])
        # One copy to the device per token: integers below 2^53 are exact in fp64.
        filled = more * [(0, (self.cache.num_blocks - 1) * BLOCK, 1, -1, 0.0, 1.0, 0.0, 0.0)]
        columns = zip(*map(_numbers_of_row, rows), *filled, strict=True)
        numbers = to_device(torch.tensor(list(columns), dtype=torch.float64), self._device)
        form = Form.of([row.request for row in rows])
        chosen = (graphs or self._step)(numbers, self._tables, form)
        self._append(list(rows), chosen[:, : len(rows)])

    def _step(self, numbers: Tensor, tables: Tensor, form: Form) -> Tensor:
        """Return the next tokens of rows and their log-probabilities (2, N) fp64; the host reads nothing on a GPU.

        numbers (4 + NUMBERS, N) fp64 on the device: `_numbers_of_row` of each. tables (N, B) int64: blocks of each.
        """
        tokens, places, lengths, slots = numbers[:-NUMBERS].long()
        positions = (lengths - 1)[:, None]
        longest = int(lengths.max()) if self._device.type == "cpu" else 0
        step = CacheStep(places, places[:0], tables, lengths, longest)
        chosen = None if self._slots is None else slots
        if not self.compiles:
            logits = self._logits(tokens[:, None], positions, None, chosen, step).squeeze(1)
        else:
            if self._compiled is None:
                self._compiled = CompiledStep(self._model, self.cache, self._slots)
            logits = self._compiled(tokens[:, None], positions, step, chosen)
        return _in_one(choose_by(logits, numbers[-NUMBERS:], form))

    def _sent(self, numbers: Sequence[Any]) -> Tensor:
        """Return integers as an int64 tensor on the device, without waiting for it."""
        return to_device(torch.tensor(numbers), self._device)

    def _logits(
        self, ids: Tensor, positions: Tensor, last: Tensor | None, slots: Tensor | None, step: CacheStep
    ) -> Tensor:
        """Return the logits (N, V) fp32 after the token `last` (N,) of each row of ids and positions (N, T).

        last=None: (N, 1, V) after the last token. `slots` (N,): the rows' adapters.
        """
        with self.cache.step(step):
            past = Past(None, self.cache, last)
            return self._model(ids, positions, None, adapter_rows=slots, past=past)

    def _append(self, rows: Sequence[_Row], chosen: Tensor) -> None:
        """Append the chosen tokens and their log-probabilities (2, N) fp64, and let rows go that have ended."""
        tokens, logprobs = chosen.tolist()  # The only wait for the device per token.
        gone: set[_Row] = set()
        for row, number, logprob in zip(rows, tokens, logprobs, strict=True):
            token = int(number)
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if self._on_token is not None:
                self._on_token(row.index, token)
            ended = token in self._engine._ends or token in row.request.stop_tokens
            ended = ended or (row.stops is not None and row.stops.ends(row.tokens))
            if ended or len(row.tokens) >= row.limit:
                gone.add(row)
                self._finish(row, ended)
        if gone:
            self._rows = [row for row in self._rows if row not in gone]
            self._tables = None

    def _finish(self, row: _Row, ended: bool) -> None:
        self._free += row.own
        prefix = row.prefix
        prefix.rows -= 1
        if not prefix.users and not prefix.rows:
            self._free_blocks(prefix)
        self.samples[row.index] = sample = Sample(row.tokens, row.logprobs, ended)
        if self._on_done is not None:
            self._on_done(row.index, sample)


def _in_one(chosen: tuple[Tensor, Tensor]) -> Tensor:
    """Return tokens (N,) int64 and log-probabilities (N,) fp32 as (2, N) fp64, which is exact: one copy to the host."""
    return torch.stack([column.double() for column in chosen])


def _numbers_of_row(row: _Row) -> tuple[float, ...]:
    """Return what a step needs of a row: last token, its place in the cache, tokens, slot, and `numbers_of` it."""
    at = row.length - 1
    block = row.own[at // BLOCK - len(row.prefix.tokens) // BLOCK]
    slot = -1 if row.request.slot is None else row.request.slot
    return row.tokens[-1], block * BLOCK + at % BLOCK, row.length, slot, *numbers_of(row.request, row.length)


def gathered(samples: dict[int, Sample], count: int, backend: Backend) -> list[Sample]:
    """Return the samples of all ranks, in order, on each of them. Each sample is one rank's."""
    if backend.ranks.world > 1:
        most = torch.tensor(max((len(sample.tokens) for sample in samples.values()), default=0))
        longest = int(backend.max_over_ranks(most.to(backend.ranks.device)))
        # Exact: each row is one rank's, and zeros are added. Floats travel as their bits.
        table = torch.zeros(count, 2 + 2 * longest, dtype=torch.int64)
        for index, sample in samples.items():
            size = len(sample.tokens)
            table[index, :2] = torch.tensor([size, sample.ended])
            table[index, 2 : 2 + size] = torch.tensor(sample.tokens)
            bits = torch.tensor(sample.logprobs, dtype=torch.float64).view(torch.int64)
            table[index, 2 + longest : 2 + longest + size] = bits
        table = backend.sum_over_ranks(table.to(backend.ranks.device)).cpu()
        for index, (size, ended, *rest) in enumerate(table.tolist()):
            logprobs = table[index, 2 + longest : 2 + longest + size].view(torch.float64).tolist()
            samples[index] = Sample(rest[:size], logprobs, bool(ended))
    return [samples[index] for index in range(count)]


def _memory_blocks(model: CausalLM, backend: Backend, taken: int) -> int:
    """Return the number of blocks of keys and values that fill the free memory; sys.maxsize if that is unknown.

    `taken` bytes of it are for something else.
    """
    kinds = [model.architecture.layer(index) for index in range(model.architecture.num_layers)]
    size = _dtype_of(model).itemsize
    per_token = sum(2 * size * kind.heads[1] * kind.heads[2] for kind in kinds if kind.heads is not None)
    free = backend.free_bytes()
    # Exactly 0 is an unknown amount; below it, nothing is free.
    return max(int((free - taken) / (per_token * BLOCK)), 0) if free else sys.maxsize


def _dtype_of(model: CausalLM) -> torch.dtype:
    """Return the dtype of the hidden states."""
    weight = model.embedding.weight
    assert isinstance(weight, Tensor)
    return model.compute_dtype or weight.dtype


@contextlib.contextmanager
def aside(model: CausalLM, backend: Backend) -> Iterator[None]:
    """Generate within a run: restore the model's slicing and the traffic counters afterwards."""
    num_micro, traffic = [block.num_micro for block in model.blocks], copy.copy(backend.traffic)
    model.set_num_micro(1)
    try:
        yield
    finally:
        for block, number in zip(model.blocks, num_micro, strict=True):
            block.num_micro = number
        backend.traffic.restore(traffic)


def quantized_weights(model: CausalLM) -> list[FrozenTensor]:
    """Return the weights of the layers that each forward dequantizes."""
    modules = (module for block in model.blocks for module in block.modules() if isinstance(module, FrozenTensor))
    return [weight for weight in modules if weight.quantized and weight.dense_copy is None]


def dense_bytes(model: CausalLM) -> int:
    """Return the bytes of the copies of `dense_copies`."""
    return sum(weight.numel for weight in quantized_weights(model)) * _dtype_of(model).itemsize


@contextlib.contextmanager
def dense_copies(model: CausalLM) -> Iterator[None]:
    """Keep the dequantized weights within this context: each token reads them all. Products have the same bits."""
    weights = quantized_weights(model)
    for weight in weights:
        weight.dense_copy = weight.frozen_weight.dense(_dtype_of(model))
    try:
        yield
    finally:
        for weight in weights:
            weight.dense_copy = None
