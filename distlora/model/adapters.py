"""LoRA and DoRA on a frozen linear, and trained token rows: their parameters, initial values and dropout.

Extension point 3 is here: an adapted linear holds one (A, B) pair per adapter name, and its layer's `BlockContext` says
which adapter each row of the batch uses. Rows choose by *slot*, a number with the same meaning in every linear: in
multi-trial training the slot of a trial. A trial may have no adapter in some linear; its rows then use the base alone.

Letters: N adapters of a linear, R sum of their ranks, M rows of the flattened input (batch x tokens).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distlora.architecture.shapes import WIDENED_AT_ONCE
from distlora.config import AdapterConfig
from distlora.model.by_document import DocumentRows
from distlora.model.frozen_linear import FrozenLinear
from distlora.system import randomness
from distlora_kernels.dora import initial_magnitude
from distlora_kernels.dropout import ChosenDropout, Dropout, Stream, threshold_of
from distlora_kernels.lora_linear import Adapter, Copies, Linear, Magnitude, RowChoice
from distlora_kernels.products import linear

DEFAULT_ADAPTER = "default"

NO_DROPOUT = Stream((0, 0), 0)

MOST_SLOTS = 256
"""Maximum number of slots: the size of the table from slots to a linear's adapters."""


class StepRows(NamedTuple):
    """Position of a batch's rows in training, which determines dropout masks together with the linear's name."""

    step: int | Tensor
    """Optimizer step, from 0; (B,) int64 on the device if it differs between rows, as in multi-trial training."""
    rows: Tensor
    """(B,) int64: index of each row in the packed training data."""

    def part(self, span: slice) -> StepRows:
        """Return the rows of a slice of the micro-batch."""
        return StepRows(self.step[span] if isinstance(self.step, Tensor) else self.step, self.rows[span])


class Rows(NamedTuple):
    """Information about a micro-batch's rows that the linears and the router of a layer need."""

    adapters: Tensor | None = None
    """(B,) int64: slot of each row's adapter, -1 for none; None: all rows use the only adapter."""
    places: StepRows | None = None
    """Positions in training; None: no dropout (evaluation, generation)."""
    balanced: Tensor | None = None
    """(B, T) bool: positions that count in the router's load-balancing loss; None: no such loss."""
    packed: DocumentRows | None = None
    """Documents of the rows, for modules that run each alone (ByDocument); None: none does."""
    counted: Tensor | None = None
    """(B, T) bool: positions that count in the load of the experts; None: it is not counted."""

    def part(self, span: slice) -> Rows:
        """Return the rows of a slice of the micro-batch."""
        return Rows(
            None if self.adapters is None else self.adapters[span],
            None if self.places is None else self.places.part(span),
            None if self.balanced is None else self.balanced[span],
            None if self.packed is None else self.packed.part(span),
            None if self.counted is None else self.counted[span],
        )


class BlockContext:
    """Link from the layer wrapper, which sets `rows` before it runs the layer, in recomputation too, to its linears."""

    def __init__(self) -> None:
        self.rows = Rows()
        """The rows of the slice that runs."""
        self.first_token = 0
        """Index within its row of the first token that the linears get: above 0 in a tile of an MLP."""
        self.recomputes = False
        """True while backward runs the layer, or its MLP, again."""
        self.uses_start = False
        """True while the adapters have their initial values, for DPO's reference."""
        self.uses_base = False
        """True while no row uses an adapter: linears then compute what they do without one, to the bit."""
        self.expert_tokens: Tensor | None = None
        """(E,) int64 on the device: tokens that have chosen each expert of the layer; None: they are not counted."""
        self._balance: Tensor | None = None
        self._chosen: tuple[Tensor, dict[tuple[int, ...], Tensor]] | None = None

    def chosen(self, slots: tuple[int, ...]) -> Tensor:
        """Return (B,) int64: index into `slots` of each row's adapter, -1 for none of them.

        Nothing is read on the host, and linears with the same slots share the result.
        """
        rows = self.rows.adapters
        assert rows is not None
        if self._chosen is None or self._chosen[0] is not rows:
            self._chosen = (rows, {})
        known = self._chosen[1]
        if slots not in known:
            known[slots] = _places(slots, rows.device)[rows]
        return known[slots]

    def count_expert_tokens(self, choices: Tensor) -> None:
        """Add the tokens of the rows to the load of the experts that they choose, (T, K) int64."""
        if self.expert_tokens is None or self.rows.counted is None or self.recomputes:
            return
        counts = self.rows.counted.reshape(-1, 1).expand_as(choices).long().reshape(-1)
        self.expert_tokens.scatter_add_(0, choices.reshape(-1), counts)

    def leave_balance(self, balance: Tensor) -> None:
        """Store the router's statistics over `balanced`: (B, 2, experts) (experts.balance_of)."""
        self._balance = balance

    def take_balance(self) -> Tensor | None:
        """Return and forget the router's statistics, which hold a graph."""
        balance, self._balance = self._balance, None
        return balance


@functools.lru_cache(maxsize=1024)
def _places(slots: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (MOST_SLOTS + 1,) int64: slot -> index in `slots`, -1 if absent and for slot -1."""
    places = torch.full((MOST_SLOTS + 1,), -1, dtype=torch.int64)
    places[list(slots)] = torch.arange(len(slots))
    return places.to(device)


class Replicated(nn.Module):
    """Marks modules whose own parameters are trained and replicated: every rank holds them whole."""


class LoRAPair(Replicated):
    """One adapter of one linear: A (r, in), B (out, r) and with DoRA the magnitude (out,), fp32 masters."""

    magnitude: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        slot: int = 0,
        rank: int,
        scaling: float,
        dropout: Stream = NO_DROPOUT,
        dora: bool = False,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.slot, self.rank, self.scaling = slot, rank, scaling
        self.dropout = dropout
        """Dropout of its inputs in training."""
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32, device=device))
        magnitude = torch.empty(out_features, dtype=torch.float32, device=device)
        self.register_parameter("magnitude", nn.Parameter(magnitude) if dora else None)
        self.copies: Copies | None = None
        """Copies of A and B for this step's products (AdapterCopies)."""

    @torch.no_grad()
    def reset(self, config: AdapterConfig, *, seed: int, name: str) -> None:
        """Initialize A as PEFT does and B with zeros, so that the adapted model equals the base.

        `name` is the linear's path and adapter. kaiming: uniform on +-1/sqrt(in) (kaiming_uniform_ with a = sqrt(5));
        gaussian: std 1/r.
        """
        assert not config.decomposes, f"adapter.init={config.init} is distlora.loading.decomposed_adapters's"
        shape = (self.A.shape[0], self.A.shape[1])
        if config.init == "gaussian":
            start = randomness.normal(shape, seed=seed, name=name) / shape[0]
        else:
            start = (2 * randomness.uniform(shape, seed=seed, name=name) - 1) / shape[1] ** 0.5
        self.A.copy_(start)
        self.B.zero_()


def slot_name(slot: int) -> str:
    """Return the adapter's name in its linears."""
    return f"slot{slot}"


class Adapted:
    """Frozen weight that may have adapters: a linear, or all experts' at once."""

    adapters: nn.ModuleDict
    context: BlockContext

    def add_adapter(
        self,
        name: str,
        config: AdapterConfig,
        *,
        path: str,
        seed: int,
        slot: int | None = None,
        device: torch.device | str = "meta",
    ) -> LoRAPair:
        """Add an adapter. `path` is the weight's Hugging Face path, which patterns match for rank and scale.

        `path` and `seed` also name the stream of the dropout masks; experts have no dropout.
        """
        assert name not in self.adapters, f"{path} has an adapter {name} already"
        self.adapters[name] = pair = self._new_pair(config, path, seed)(
            slot=len(self.adapters) if slot is None else slot,
            rank=config.rank_of(path),
            scaling=config.scaling_of(path),
            device=device,
        )
        return pair

    def _new_pair(self, config: AdapterConfig, path: str, seed: int) -> Callable[..., LoRAPair]:
        """Return what makes an adapter from its slot, rank, scaling and device."""
        raise NotImplementedError

    def check_alone(self) -> None:
        """Check that rows which choose nothing have only one adapter to use."""
        if len(self.adapters) > 1:
            raise RuntimeError(f"{len(self.adapters)} adapters and no row choice: set CausalLM's adapter_rows")

    def _scale(self, pairs: Sequence[LoRAPair]) -> float | RowChoice:
        """Return the scale of the only adapter, or which adapter each row uses."""
        if self.context.rows.adapters is None:
            self.check_alone()
            return pairs[0].scaling
        rows = self.context.chosen(tuple(pair.slot for pair in pairs))
        return RowChoice(rows, tuple(pair.scaling for pair in pairs), tuple(pair.rank for pair in pairs))


class AdaptedLinear(Adapted, FrozenLinear):
    """Frozen linear with adapters: y = x W^T + s (drop(x) A^T) B^T, with s of the row's adapter.

    With DoRA the buffer `row_norms_squared` (out_features,) fp32 holds those of the frozen weight, rounded to `dtype`;
    it is replicated and filled by `distlora.loading`. kernels/distlora_kernels/dora.py has the formula.
    """

    row_norms_squared: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        format: str | None,
        dtype: torch.dtype,
        context: BlockContext,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, format=format, dtype=dtype)
        self.adapters = nn.ModuleDict()
        self.register_buffer("row_norms_squared", None)
        self.context = context
        self.compute_dtype = dtype
        """Dtype of the dequantized weight in GEMMs."""

    @property
    def pairs(self) -> list[LoRAPair]:
        """Return the LoRA adapters, without those of other methods."""
        return [pair for pair in self.adapters.values() if isinstance(pair, LoRAPair)]

    def _new_pair(self, config: AdapterConfig, path: str, seed: int) -> Callable[..., LoRAPair]:
        dora = config.use_dora
        if dora and not self.pairs:
            self.expect_magnitudes()
        assert dora == (self.row_norms_squared is not None), "DoRA's adapters and LoRA's do not mix"
        dropout = Stream(randomness.key_of(seed, f"{path}.dropout"), threshold_of(config.lora_dropout))
        return functools.partial(LoRAPair, self.in_features, self.out_features, dropout=dropout, dora=dora)

    def expect_magnitudes(self) -> None:
        """Prepare for DoRA adapters, before loading."""
        if self.row_norms_squared is None:
            self.row_norms_squared = torch.empty(self.out_features, dtype=torch.float32, device="meta")

    def stacked_down(self) -> Tensor:
        """Stack A of all adapters: (R, in)."""
        pairs = self.pairs
        return pairs[0].A if len(pairs) == 1 else torch.cat([pair.A for pair in pairs])

    def operand(self) -> Linear:
        """Return the operand with the adapters that the layer's rows use now, and their dropped inputs."""
        pairs = self.pairs
        if not pairs or self.context.uses_base:
            return super().operand()
        up = pairs[0].B if len(pairs) == 1 else torch.cat([pair.B for pair in pairs], dim=1)
        scale = self._scale(pairs)
        magnitude = None
        if self.row_norms_squared is not None:
            magnitudes = torch.stack([pair.get_parameter("magnitude") for pair in pairs])
            magnitude = Magnitude(magnitudes, self.row_norms_squared)
        copies = pairs[0].copies if isinstance(scale, float) and not self.context.uses_start else None
        adapter = Adapter(self.stacked_down(), up, scale, self._dropout(pairs, scale), magnitude, copies)
        return Linear(self.frozen_weight, adapter, self.bias)

    def _dropout(self, pairs: list[LoRAPair], scale: float | RowChoice) -> Dropout | ChosenDropout | None:
        at = self.context.rows.places
        if at is None or not any(pair.dropout.threshold for pair in pairs):
            return None
        first = self.context.first_token
        if isinstance(scale, RowChoice):
            steps = at.step if isinstance(at.step, Tensor) else torch.full_like(at.rows, at.step)
            return ChosenDropout(tuple(pair.dropout for pair in pairs), scale.rows, steps, at.rows, first)
        assert isinstance(at.step, int), "rows of several steps have a choice of adapters"
        return Dropout(*pairs[0].dropout, at.step, at.rows, first)


class AdapterCopies:
    """Adapters in the dtype of products, copied once per step: else forward, recomputation and backward cast them.

    For one trial on a GPU, whose kernels take B times the scale.
    """

    def __init__(self, linears: Iterable[AdaptedLinear]) -> None:
        """Allocate the copies: all A first, so that those of linears with one input are neighbours."""
        pairs = [(pair, linear.compute_dtype) for linear in linears for pair in linear.pairs]
        self._pairs = [pair for pair, dtype in pairs if pair.A.dtype != dtype]
        masters = [pair.A for pair in self._pairs] + [pair.B for pair in self._pairs]
        if not masters:
            return
        sizes = [-(-master.numel() // 8) * 8 for master in masters]  # Kernels load 16 bytes at once.
        flat = torch.empty(sum(sizes), dtype=pairs[0][1], device=masters[0].device)
        copies = [
            piece[: master.numel()].view_as(master) for piece, master in zip(flat.split(sizes), masters, strict=True)
        ]
        self._downs, self._ups = copies[: len(self._pairs)], copies[len(self._pairs) :]

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, *, one_adapter: bool) -> Self:
        """Return the copies of all adapted linears, and none on a CPU or where rows choose between adapters."""
        copied = one_adapter and device.type == "cuda"
        return cls(module for module in model.modules() if copied and isinstance(module, AdaptedLinear))

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Have products read new copies of the adapters, which must not change within this context."""
        if self._pairs:
            torch._foreach_copy_(self._downs, [pair.A.data for pair in self._pairs])
            for pair, down, up in zip(self._pairs, self._downs, self._ups, strict=True):
                factor = pair.scaling * pair.dropout.scale if pair.dropout.threshold else pair.scaling
                torch.mul(pair.B.data, factor, out=up)
                pair.copies = Copies(down, up, factor)
        try:
            yield
        finally:
            for pair in self._pairs:
                pair.copies = None


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return every replicated trained parameter by its path in `module`.

    Trained token rows, then adapters in forward order, then a reward model's score.
    """
    return {
        f"{path}.{name}": parameter
        for path, child in module.named_modules()
        if isinstance(child, Replicated)
        for name, parameter in child.named_parameters()
    }


def reset_adapters(weights: Iterable[tuple[str, Adapted]], config: AdapterConfig, *, seed: int) -> None:
    """Initialize every adapter. The weight's Hugging Face path and the adapter's name select the random stream."""
    for path, weight in weights:
        for name, pair in weight.adapters.items():
            assert isinstance(pair, LoRAPair)
            start_pair(pair, weight, config, seed=seed, name=f"{path}.{name}")


def start_pair(pair: LoRAPair, weight: Adapted, config: AdapterConfig, *, seed: int, name: str) -> None:
    """Initialize one adapter. A DoRA magnitude is the norm of the frozen row, which loading must have computed."""
    pair.reset(config, seed=seed, name=name)
    if pair.magnitude is not None:
        assert isinstance(weight, AdaptedLinear)
        assert weight.row_norms_squared is not None
        pair.magnitude.data.copy_(initial_magnitude(weight.row_norms_squared))


class TokenRows(Replicated):
    """Trained rows of an otherwise frozen embedding or LM head (PEFT's trainable tokens), by ascending token id.

    They replace rows after the lookup of the embedding, and columns of the head's logits. N trained rows, V vocabulary.
    """

    def __init__(self, ids: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        assert ids == tuple(sorted(set(ids))), "token ids must ascend"
        self.ids = ids
        self.rows = nn.Parameter(torch.empty(len(ids), hidden_size, dtype=torch.float32, device="meta"))
        """(N, H) fp32 masters, in the order of `ids`."""
        self._ids: Tensor | None = None

    def embed(self, embedding: nn.Module, input_ids: Tensor) -> Tensor:
        """Embed (B, T) int64 -> (B, T, H) in the embedding's dtype, with the trained rows for their tokens.

        An embedding scale (Gemma's) applies to trained rows too. The row of the padding token gets no gradient, as in
        torch.
        """
        scale = getattr(embedding, "embed_scale", None)
        padding = getattr(embedding, "padding_idx", None)
        slots = self._slots(input_ids)
        frozen_slot = self.ids.index(padding) if padding in self.ids else None
        return _ReplaceRows.apply(embedding(input_ids), self.rows, slots, scale, frozen_slot)

    def replace_columns(self, logits: Tensor, columns: Tensor) -> Tensor:
        """Replace the trained tokens' columns of logits (..., V) by `columns` (..., N), both fp32."""
        return logits.index_copy(-1, self._ids_on(logits.device), columns)

    def columns(self, hidden: Tensor) -> Tensor:
        """Return (..., N) fp32 logits of the trained tokens from (..., H), computed in the dtype of `hidden`."""
        return linear(hidden, self.rows.to(hidden.dtype)).float()

    def _slots(self, input_ids: Tensor) -> Tensor:
        """Return int64 like input_ids: index of each token's trained row, -1 for none."""
        ids = self._ids_on(input_ids.device)
        slots = torch.searchsorted(ids, input_ids).clamp_(max=len(ids) - 1)
        return torch.where(ids[slots] == input_ids, slots, -1)

    def _ids_on(self, device: torch.device) -> Tensor:
        if self._ids is None or self._ids.device != device:  # Copied to the device once, not in every step.
            self._ids = torch.tensor(self.ids, device=device)
        return self._ids


class _ReplaceRows(torch.autograd.Function):
    """Embedded tokens (B, T, H) with some rows replaced. The frozen embedding has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, embedded: Tensor, rows: Tensor, slots: Tensor, scale: Tensor | None, frozen_slot: int | None
    ) -> Tensor:
        ctx.save_for_backward(slots, scale)
        ctx.num_rows, ctx.frozen_slot = len(rows), frozen_slot
        trained = rows.to(embedded.dtype)
        if scale is not None:
            trained = trained * scale.to(embedded.dtype)
        return torch.where((slots >= 0)[..., None], trained[slots.clamp(min=0)], embedded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slots, scale = ctx.saved_tensors
        # The product with a matrix of zeros and ones sums in a fixed order; index_add does not on a GPU.
        rows = sum_by_slot(gradient.flatten(0, -2), slots.flatten(), ctx.num_rows)
        if scale is not None:
            rows *= scale.to(gradient.dtype).float()
        if ctx.frozen_slot is not None:
            rows[ctx.frozen_slot] = 0
        return None, rows, None, None, None


def sum_by_slot(values: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """Sum values (T, H) by slots (T,) int64, -1 for none -> (num_slots, H) fp32."""
    total = torch.zeros(num_slots, values.shape[1], dtype=torch.float32, device=values.device)
    numbers = torch.arange(num_slots, device=values.device)[:, None]
    for chunk, part_slots in zip(values.split(WIDENED_AT_ONCE), slots.split(WIDENED_AT_ONCE), strict=True):
        total.addmm_((numbers == part_slots).float(), chunk.float())
    return total


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights^T values: weights (T, N) fp32, values (T, H) -> (N, H) fp32."""
    total = torch.zeros(weights.shape[1], values.shape[1], dtype=torch.float32, device=values.device)
    for chunk, part_values in zip(weights.split(WIDENED_AT_ONCE), values.split(WIDENED_AT_ONCE), strict=True):
        total.addmm_(chunk.t(), part_values.float())
    return total
