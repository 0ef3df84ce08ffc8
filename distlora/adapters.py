"""LoRA and DoRA on a frozen linear: the adapter's parameters, their start, and their dropout.

Seam 3 lives here: an adapted linear holds one (A, B) pair per adapter name and a reference to its block's
`BlockContext`, which says which row of the batch uses which of them (-1 = none). With one adapter and no choice every
row uses it.

Letters: N adapters of a linear, R their ranks added up, M rows of the flattened input (batch x tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distlora import randomness
from distlora.config import AdapterConfig
from distlora.quant import FrozenLinear
from distlora.token_rows import TokenRows
from distlora_kernels.dora import initial_magnitude
from distlora_kernels.dropout import Dropout, threshold_of
from distlora_kernels.lora_linear import Adapter, Linear, Magnitude, RowChoice

DEFAULT_ADAPTER = "default"


class StepRows(NamedTuple):
    """Where a batch's rows are in training: what a dropout mask depends on beside its linear."""

    step: int
    """The optimizer step, from 0."""
    rows: Tensor
    """(B,) int64: the number of each row in the packed training data."""

    def part(self, part: slice) -> StepRows:
        return StepRows(self.step, self.rows[part])


class BlockContext:
    """What a block's linears must know of the rows of its current micro-batch beside their hidden states.

    The block wrapper sets them before it runs its layer, in recomputation too.
    """

    def __init__(self) -> None:
        self.adapter_rows: Tensor | None = None
        """(B,) int64: which adapter each row uses, -1 for none; None: every row uses the only adapter."""
        self.step_rows: StepRows | None = None
        """The rows' places in training; None: nothing is dropped (evaluation, generation)."""
        self.balanced: Tensor | None = None
        """(B, T) bool: the positions over which a router's choices are to be balanced; None: no loss asks for it."""
        self.first_token = 0
        """Which token of its row the first one is that the linears are given: not 0 in a tile of an MLP."""
        self._balance: Tensor | None = None

    def leave_balance(self, balance: Tensor) -> None:
        """What the router of the layer that runs says to `balanced`: (B, 2, experts) (balance.balance_of)."""
        self._balance = balance

    def take_balance(self) -> Tensor | None:
        """What the router left, which is kept no longer: it holds a graph."""
        balance, self._balance = self._balance, None
        return balance


class LoRAPair(nn.Module):
    """One adapter of one linear: A (r, in), B (out, r) and with DoRA the magnitude (out,), fp32 masters."""

    magnitude: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, rank: int, scaling: float, dora: bool = False) -> None:
        super().__init__()
        self.rank, self.scaling = rank, scaling
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32, device="meta"))
        self.B = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32, device="meta"))
        magnitude = torch.empty(out_features, dtype=torch.float32, device="meta")
        self.register_parameter("magnitude", nn.Parameter(magnitude) if dora else None)

    @torch.no_grad()
    def reset(self, config: AdapterConfig, *, seed: int, name: str) -> None:
        """A as PEFT starts it, B zero: the adapted model begins as the base. `name` is the linear's path and adapter.

        kaiming: uniform on +-1/sqrt(in) (kaiming_uniform_ with a = sqrt(5)); gaussian: std 1/r.
        """
        assert not config.decomposes, f"adapter.init={config.init} is distlora.loading.initialize's"
        shape = (self.A.shape[0], self.A.shape[1])
        if config.init == "gaussian":
            start = randomness.normal(shape, seed=seed, name=name) / shape[0]
        else:
            start = (2 * randomness.uniform(shape, seed=seed, name=name) - 1) / shape[1] ** 0.5
        self.A.copy_(start)
        self.B.zero_()


class Adapted:
    """A frozen weight that may have adapters: a linear, or all experts' at once."""

    adapters: nn.ModuleDict
    context: BlockContext
    _scales: Tensor | None
    """Of the adapters, on the device; None until rows choose, and when there is another one."""

    def _scale(self, pairs: Sequence[LoRAPair]) -> float | RowChoice:
        """The scale of the one adapter, or which adapter each row uses."""
        rows = self.context.adapter_rows
        if rows is None:
            if len(pairs) > 1:
                raise RuntimeError(f"{len(pairs)} adapters and no row choice: set CausalLM's adapter_rows")
            return pairs[0].scaling
        if self._scales is None:  # Copied to the device once, not in every step.
            self._scales = torch.tensor([pair.scaling for pair in pairs], device=rows.device)
        return RowChoice(rows, self._scales, tuple(pair.rank for pair in pairs))


class AdaptedLinear(Adapted, FrozenLinear):
    """A frozen linear with adapters: y = x W^T + s (drop(x) A^T) B^T, s by the adapter that the row uses.

    With DoRA the buffer `row_norms_squared` (out_features,) fp32 holds those of the frozen weight, rounded to `dtype`;
    it is replicated, and filled by `distlora.loading`. kernels/distlora_kernels/dora_linear.py has the formula.
    """

    row_norms_squared: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        quantized: bool,
        dtype: torch.dtype,
        context: BlockContext,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, quantized=quantized, dtype=dtype)
        self.adapters = nn.ModuleDict()
        self.register_buffer("row_norms_squared", None)
        self.context = context
        self.compute_dtype = dtype
        """What the GEMMs see the weight in."""
        self.dropout_threshold = 0
        """Probability of dropping an input in training, in units of 2^-16."""
        self.dropout_key = (0, 0)
        self._scales = None

    @property
    def pairs(self) -> list[LoRAPair]:
        return [pair for pair in self.adapters.values() if isinstance(pair, LoRAPair)]

    def add_adapter(self, name: str, config: AdapterConfig, *, path: str, seed: int) -> None:
        """One more adapter. `path` is the linear's Hugging Face path: by it patterns choose the rank and the scale, and
        with the run's seed it names the stream of the dropout masks.
        """
        rank, scaling = config.rank_of(path), config.scaling_of(path)
        threshold = threshold_of(config.lora_dropout)
        # Adapters side by side see one input, so they share its mask.
        assert not self.adapters or threshold == self.dropout_threshold, "the adapters of a linear differ in dropout"
        self.dropout_threshold, self.dropout_key = threshold, randomness.key_of(seed, f"{path}.dropout")
        dora = config.use_dora
        assert all((pair.magnitude is not None) == dora for pair in self.pairs), "DoRA's adapters and LoRA's do not mix"
        if dora and self.row_norms_squared is None:
            self.row_norms_squared = torch.empty(self.out_features, dtype=torch.float32, device="meta")
        self.adapters[name] = LoRAPair(self.in_features, self.out_features, rank=rank, scaling=scaling, dora=dora)
        self._scales = None

    def stacked_down(self) -> Tensor:
        """(R, in): the A of all adapters, one below the other."""
        pairs = self.pairs
        return pairs[0].A if len(pairs) == 1 else torch.cat([pair.A for pair in pairs])

    def operand(self) -> Linear:
        """With the adapters that the block's rows use now, and the inputs that these do not see."""
        pairs = self.pairs
        up = pairs[0].B if len(pairs) == 1 else torch.cat([pair.B for pair in pairs], dim=1)
        adapter = Adapter(self.stacked_down(), up, self._scale(pairs), self._dropout(), self._magnitude(pairs))
        return Linear(self.frozen_weight, adapter, self.bias)

    def _magnitude(self, pairs: list[LoRAPair]) -> Magnitude | None:
        if self.row_norms_squared is None:
            return None
        return Magnitude(torch.stack([pair.get_parameter("magnitude") for pair in pairs]), self.row_norms_squared)

    def _dropout(self) -> Dropout | None:
        at = self.context.step_rows
        if at is None or self.dropout_threshold == 0:
            return None
        return Dropout(self.dropout_key, self.dropout_threshold, at.step, at.rows, self.context.first_token)


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every replicated, trained parameter by its path in `module`: the embedding's and the head's trained rows, then
    adapters in forward order.
    """
    return {
        f"{path}.{name}": parameter
        for path, part in module.named_modules()
        if isinstance(part, (LoRAPair, TokenRows))
        for name, parameter in part.named_parameters()
    }


def reset_adapters(weights: Iterable[tuple[str, Adapted]], config: AdapterConfig, *, seed: int) -> None:
    """Start every adapter. The random stream is named by the weight's Hugging Face path and the adapter's name; a
    magnitude is the norm of the frozen row, which the loading must have computed.
    """
    for path, weight in weights:
        for name, pair in weight.adapters.items():
            assert isinstance(pair, LoRAPair)
            pair.reset(config, seed=seed, name=f"{path}.{name}")
            if pair.magnitude is not None:
                assert isinstance(weight, AdaptedLinear)
                assert weight.row_norms_squared is not None
                pair.magnitude.data.copy_(initial_magnitude(weight.row_norms_squared))
