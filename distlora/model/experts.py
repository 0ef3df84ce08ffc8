"""Mixtures of experts: frozen fused weights, and adapters per expert.

transformers keeps the experts of a layer as two 3-D parameters, gate_up_proj (up_proj where there is no gate) and
down_proj, and calls them with the router's choice. `Experts` replaces them with the same arguments; the router and the
rest of the layer stay the family's. Adapters have PEFT's layout (`target_parameters`): A (E * r, in) with an expert's r
rows next to each other, B (out, E * r) with the experts innermost, delta W_e = s B_e A_e.

Experts of llama4, dbrx, jetmoe and longcat_flash run their family's own code. Where it reads such a Parameter, it gets
the dequantized tensor: the module's class becomes a subclass with a property of that name (`freeze_parameters`). Such a
weight is frozen and has no adapter. Autograd keeps the dense tensor between a layer's forward and backward, one layer's
at a time with activation checkpointing.

Letters: B rows of the batch, T tokens of all of them, K experts per token, S = K T, E experts, H hidden size.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from distlora.architecture.targets import EXPERT_WEIGHTS
from distlora.config import AdapterConfig, TrainConfig
from distlora.model.adapters import Adapted, BlockContext, LoRAPair
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.layer_wrapper import Block
from distlora_kernels.experts import combine, dispatch, expert_linear, runs_grouped
from distlora_kernels.operands import ExpertAdapter, ExpertChoice, FrozenWeight, Routing

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ExpertPair(LoRAPair):
    """One adapter of one fused weight, fp32 masters in PEFT's layout.

    Row e * r + j of A (E * r, in) and column j * E + e of B (out, E * r) are the j-th of expert e. A factor that all
    experts share is (r, in) or (out, r).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        slot: int = 0,
        num_experts: int,
        rank: int,
        scaling: float,
        shared: Literal["A", "B"] | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(in_features, out_features, slot=slot, rank=num_experts * rank, scaling=scaling, device=device)
        self.num_experts, self.rank = num_experts, rank  # Rank of one expert.
        self.shared = shared
        """The factor that all experts share; None: each has its own."""
        if shared is not None:
            shape = (rank, in_features) if shared == "A" else (out_features, rank)
            setattr(self, shared, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))

    def down(self) -> Tensor:
        """View A as (E, r, in), or (1, r, in) if it is shared."""
        return self.A.view(-1, self.rank, self.A.shape[1])

    def up(self) -> Tensor:
        """View B as (E, out, r), or (1, out, r) if it is shared."""
        return self.B.view(len(self.B), self.rank, -1).permute(2, 0, 1)

    @property
    def shape_of_copies(self) -> tuple[int, int]:
        """Shape of a shared factor in PEFT's layout, (E * r, in) or (out, E * r): a copy per expert."""
        rows = self.num_experts * self.rank
        return (rows, self.A.shape[1]) if self.shared == "A" else (len(self.B), rows)

    def copies_of(self, factor: Tensor) -> Tensor:
        """Return the copies of a value of the shared factor in PEFT's layout."""
        if self.shared == "A":
            return factor.repeat(self.num_experts, 1)
        return factor.repeat_interleave(self.num_experts, dim=1)

    def one_of(self, copies: Tensor) -> Tensor | None:
        """Return the shared factor of which PEFT's layout has copies; None if they differ."""
        factor = copies[: self.rank] if self.shared == "A" else copies[:, :: self.num_experts]
        return factor if torch.equal(self.copies_of(factor), copies) else None

    @torch.no_grad()
    def reset(self, config: AdapterConfig, *, seed: int, name: str) -> None:
        """Initialize like a linear of one expert's rank."""
        super().reset(config, seed=seed, name=name)
        if config.init == "gaussian":  # Std 1 / r, not 1 / (E r).
            self.A.mul_(len(self.A) // self.rank)


class ExpertWeight(Adapted, FrozenTensor):
    """Frozen fused weight of all experts, with adapters or none: (E, out, in), or (E, in, out) if `transposed`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        transposed: bool,
        format: str | None,
        dtype: torch.dtype,
        context: BlockContext,
    ) -> None:
        super().__init__(shape, format=format, dtype=dtype)
        self.transposed = transposed
        self.num_experts = shape[0]
        self.out_features, self.in_features = reversed(shape[1:]) if transposed else shape[1:]
        self.adapters = nn.ModuleDict()
        self.context = context
        self.local = slice(0, self.num_experts)
        """Experts that this rank computes: all, unless they are divided over ranks (parallel.expert_degree)."""
        self.on_demand = False
        """True if experts that no token chose are not gathered (parallel.experts)."""

    @property
    def pairs(self) -> list[ExpertPair]:
        """Return the LoRA adapters, without those of other methods."""
        return [pair for pair in self.adapters.values() if isinstance(pair, ExpertPair)]

    @property
    def num_local(self) -> int:
        """Number of experts that this rank computes."""
        return self.local.stop - self.local.start

    @property
    def is_divided(self) -> bool:
        """True if other ranks compute the other experts; the parameters then stay this rank's rows (DTensor)."""
        return self.num_local < self.num_experts

    @property
    def stored(self) -> FrozenWeight:
        """The Parameters themselves, or this rank's rows of them: the weight of the local experts."""
        weight = super().stored
        if not self.is_divided:
            return weight
        parts: list[Any] = list(weight.parts)
        number = len(self.part_names) or 1  # Behind them are replicated parts.
        local = (*(part.to_local() for part in parts[:number]), *parts[number:])
        return FrozenWeight(local, (self.num_local, *self.shape[1:]), weight.format)

    def _new_pair(self, config: AdapterConfig, path: str, seed: int) -> Callable[..., LoRAPair]:
        sizes, shared = (self.in_features, self.out_features), config.shared_factor(path)
        return functools.partial(ExpertPair, *sizes, num_experts=self.num_experts, shared=shared)

    def forward(self, x: Tensor, routing: Routing, bias: Tensor | None, slots: tuple[int, ...] = ()) -> Tensor:
        """Return (S, out) from x (S, in), sorted by local expert, with the adapters that the tokens' rows use.

        `slots` are those that the routing's adapter choice refers to.
        """
        if bias is not None and self.is_divided:  # Gathered with the layer.
            bias = bias[self.local].clone()
        return expert_linear(
            x, self.frozen_weight, routing, transposed=self.transposed, adapter=self._adapter(routing, slots), bias=bias
        )

    def _adapter(self, routing: Routing, slots: tuple[int, ...]) -> ExpertAdapter | None:
        pairs = self.pairs
        if not pairs:
            return None
        a, b = pairs[0].down(), pairs[0].up()
        if len(pairs) > 1:  # Trials may share other factors.
            every = (self.num_experts, -1, -1)
            a = torch.cat([pair.down().expand(every) for pair in pairs], dim=1)
            b = torch.cat([pair.up().expand(every) for pair in pairs], dim=2)
        if self.is_divided:  # A shared factor is that of all experts.
            a, b = (factor[self.local] if len(factor) > 1 else factor for factor in (a, b))
        if routing.users is None:
            self.check_alone()
            return ExpertAdapter(a, b, pairs[0].scaling)
        numbers = {pair.slot: number for number, pair in enumerate(pairs)}
        numbers_by_user = tuple(numbers.get(slot, -1) for slot in slots)
        choice = ExpertChoice(
            numbers_by_user, tuple(pair.scaling for pair in pairs), tuple(pair.rank for pair in pairs)
        )
        return ExpertAdapter(a, b, choice)


class RowExchange(Protocol):
    """Exchange of one call's rows between the ranks that divide a layer's experts. S own rows, R received ones."""

    @property
    def experts(self) -> Tensor:
        """Return (R,) int64, the expert of each received row, counted from this rank's first."""

    def send(self, rows: Tensor) -> Tensor:
        """Return (R, ...), the rows of this rank's experts, from (S, ...) sorted by expert."""

    def give_back(self, rows: Tensor) -> Tensor:
        """Return (S, H), each row's result, from those of the received rows (R, H)."""


class Experts(nn.Module):
    """Replacement of a family's experts module, with its arguments.

    Gate and up, the activation, down: each expert on the tokens that chose it, weighted and summed.
    """

    def __init__(
        self,
        weights: Mapping[str, ExpertWeight],
        *,
        biases: Sequence[nn.Parameter] | None,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.names = tuple(weights)
        """Names of the two weights: gate_up_proj or, without gate, up_proj, and down_proj."""
        for index, (name, weight) in enumerate(weights.items()):
            self.add_module(name, weight)
            self.register_parameter(f"{name}_bias", None if biases is None else biases[index])
        self.activation = activation
        """The family's activation of gate and up, (S, 2 * intermediate) -> (S, intermediate), or of up alone."""
        self.exchange: Callable[[Tensor], RowExchange] | None = None
        """Begins an exchange from (E,) int64, the number of rows of each expert; None: this rank has all experts."""
        self.gather: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
        """Gathers the experts of (T, K) int64 choices, and returns the identity of their output (S, H) whose backward
        gathers them again; None: they are there with the layer."""

    @property
    def weights(self) -> list[ExpertWeight]:
        """Return the two weights in the order of their use."""
        return [weight for weight in self.children() if isinstance(weight, ExpertWeight)]

    def forward(self, hidden_states: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        """Return (T, H) from hidden_states (T, H), choices (T, K) int64 and their weights (T, K)."""
        up, *_ = weights_of = self.weights
        context = up.context
        context.count_expert_tokens(choices)
        again = None if self.gather is None else self.gather(choices)
        slots: tuple[int, ...] = ()
        adapters = None
        if context.rows.adapters is not None:
            slots = tuple(sorted({pair.slot for weight in weights_of for pair in weight.pairs}))
        if slots:
            slot_of_row = context.chosen(slots)
            adapters = (slot_of_row.repeat_interleave(hidden_states.shape[0] // slot_of_row.shape[0]), len(slots))
        sizes = [size for weight in weights_of for size in weight.shape[1:]]
        on_host = not runs_grouped(hidden_states, *sizes, num_groups=up.num_local * (len(slots) + 1))
        here = on_host and self.exchange is None
        routing = Routing.of(choices, up.num_experts, on_host=here, adapters=adapters)
        rows = dispatch(hidden_states, routing)
        if self.exchange is None:
            output = self._run(rows, routing, slots)
            output = output if again is None else again(output)
        else:
            exchange = self.exchange(torch.diff(routing.ends, prepend=routing.ends.new_zeros(1)).long())
            received = exchange.send(rows)
            if routing.users is not None:
                adapters = (exchange.send(routing.users.of_rows), len(slots))
            local = Routing.of(exchange.experts[:, None], up.num_local, on_host=on_host, adapters=adapters)
            output = exchange.give_back(combine(self._run(dispatch(received, local), local, slots), local))
        weighted = output * weights.T.reshape(-1)[routing.order, None]
        return combine(weighted.to(hidden_states.dtype), routing)

    def _run(self, rows: Tensor, routing: Routing, slots: tuple[int, ...]) -> Tensor:
        """Return (S, H), each row through its expert, from (S, H) sorted by local expert."""
        up, down = self.weights
        up_bias, down_bias = (getattr(self, f"{name}_bias") for name in self.names)
        return down(self.activation(up(rows, routing, up_bias, slots)), routing, down_bias, slots)


def find_experts(layer: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names of the fused weights of each module of experts that `Experts` can replace, by its path.

    Such a module has the attributes of transformers' use_experts_implementation and two weights of EXPERT_WEIGHTS with
    or without biases, and nothing else. Other experts keep their code (`freeze_parameters`).
    """
    experts: dict[str, tuple[str, ...]] = {}
    for path, module in layer.named_modules():
        marked: Any = module
        if not hasattr(module, "has_gate") or getattr(module, "has_post_expert_norm", False):
            continue
        names = EXPERT_WEIGHTS[:1] + EXPERT_WEIGHTS[2:] if marked.has_gate else EXPERT_WEIGHTS[1:]
        biases = [f"{name}_bias" for name in names] if marked.has_bias else []
        tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        if sorted(tensors) == sorted([*names, *biases]):
            experts[path] = names
    return experts


def divided_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of experts that are divided over ranks, of which each rank has and uses its rows only."""
    weights = (each for each in module.modules() if isinstance(each, ExpertWeight) and each.is_divided)
    return {parameter for weight in weights for parameter in weight.parameters(recurse=False)}


def replace_experts(
    layer: nn.Module,
    formats: Mapping[str, str | None],
    *,
    dtype: torch.dtype,
    context: BlockContext,
    as_stored: Collection[str] = (),
) -> dict[str, ExpertWeight]:
    """Replace the experts of a decoder layer by `Experts`, on meta. Return the fused weights by their names in it.

    `formats`: the weights' formats by their names in the layer. The activation stays the family's. Shapes, biases and
    a transposed weight are read from the module. Of the names in `as_stored` a transposed weight is held as (E, out,
    in) all the same, the order in which gpt-oss' checkpoints store its low bits.
    """
    replaced: dict[str, ExpertWeight] = {}
    for path, names in find_experts(layer).items():
        module: Any = layer.get_submodule(path)
        weights = {}
        for name in names:
            shape, transposed = tuple(module.get_parameter(name).shape), bool(module.is_transposed)
            if transposed and f"{path}.{name}" in as_stored:
                shape, transposed = (shape[0], shape[2], shape[1]), False
            form = formats[f"{path}.{name}"]
            weights[name] = ExpertWeight(shape, transposed=transposed, format=form, dtype=dtype, context=context)
        biases = [module.get_parameter(f"{name}_bias") for name in names] if module.has_bias else None
        activation = module._apply_gate if module.has_gate else module.act_fn
        layer.set_submodule(path, Experts(weights, biases=biases, activation=activation))
        replaced |= {f"{path}.{name}": weight for name, weight in weights.items()}
    return replaced


class Router(nn.Module):
    """A family's router that stores statistics in the layer's context if a loss balances it."""

    def __init__(self, inner: nn.Module, context: BlockContext, *, top_k: int) -> None:
        super().__init__()
        self.inner = inner
        self.context, self.top_k = context, top_k

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the family's router's output for (T, H): router logits (T, E), alone or first."""
        output: Any = self.inner(*args, **kwargs)
        balanced = self.context.rows.balanced
        if balanced is not None:
            logits = output if isinstance(output, Tensor) else output[0]
            self.context.leave_balance(balance_of(logits, balanced, self.top_k))
        return output


def weight_of(train: TrainConfig, hf_config: PretrainedConfig) -> float:
    """Return the weight of the router loss in training: train.router_aux_loss, or config.json's.

    As in transformers, that is router_aux_loss_coef if output_router_logits is set, otherwise 0. It belongs to
    next-token losses: with another objective it is 0.
    """
    if train.objective != "sft":
        return 0.0
    if train.router_aux_loss is not None:
        return train.router_aux_loss
    wanted = getattr(hf_config, "output_router_logits", False)
    return float(getattr(hf_config, "router_aux_loss_coef", None) or 0.0) if wanted else 0.0


def find_routers(hf_model: nn.Module, layer: nn.Module) -> list[str]:
    """Return the paths in `layer` of routers whose logits transformers' load-balancing loss takes; often none.

    They are the modules that the model records as `router_logits`, if its class adds the loss of Mixtral's, which
    `balance_sums` is, to that of the targets.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss = getattr(sys.modules[type(hf_model).__module__], "load_balancing_loss_func", None)
    logits = tuple(torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0)))
    calls = [(logits, 4, 2, mask) for mask in (None, torch.arange(10).view(2, 5) < 8)]
    if loss is None or not all(loss(*call) == load_balancing_loss_func(*call) for call in calls):
        return []
    recorders = [getattr(module, "_can_record_outputs", None) or {} for module in hf_model.modules()]
    routers = [outputs["router_logits"] for outputs in recorders if "router_logits" in outputs]
    names = {(router.target_class, f".{router.layer_name or ''}.") for router in routers if router.index == 0}
    return [
        path
        for path, module in layer.named_modules()
        if any(isinstance(module, kind) and name in (f".{path}.", "..") for kind, name in names)
    ]


def place_routers(blocks: Sequence[Block], paths: Sequence[str], top_k: int) -> None:
    """Put a `Router` around each layer's router; `paths` has "" for a layer without one."""
    for block, path in zip(blocks, paths, strict=True):
        if path:
            block.inner.set_submodule(path, Router(block.inner.get_submodule(path), block.context, top_k=top_k))


def balance_of(logits: Tensor, balanced: Tensor, top_k: int) -> Tensor:
    """Return (B, 2, E) fp32 from router logits (T, E): per row, sums over the positions in `balanced` (B, L) bool.

    The sums count how often an expert is among the top_k, and add its probability. The operations are those of
    transformers' load_balancing_loss_func.
    """
    batch, num_experts = balanced.shape[0], logits.shape[-1]
    probabilities = torch.softmax(logits, dim=-1)
    chosen = torch.topk(probabilities, top_k, dim=-1).indices
    mask = balanced.reshape(-1, 1).float()
    counts = torch.zeros_like(probabilities, dtype=torch.float32).scatter_(
        1, chosen, mask.expand(-1, top_k).contiguous()
    )
    both = torch.stack((counts, probabilities.float() * mask), dim=1)
    return both.view(batch, -1, 2, num_experts).sum(dim=1)


def balanced_positions(labels: Tensor) -> Tensor:
    """Return (B, T) bool from labels (B, T): the positions up to a row's last target, none for an empty row.

    What follows is padding or trains nothing.
    """
    targets = torch.roll(labels >= 0, 1, dims=1)  # The target of position t is the token at t + 1.
    targets[:, 0] = False
    return targets.flip(1).int().cumsum(dim=1).flip(1) > 0


def balance_sums(blocks: Sequence[Block], labels: Tensor, balanced: Tensor) -> Tensor:
    """Return (B,) fp32: each row's load-balancing loss in the last forward, once per target; 0 without positions.

    It is the load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) over a row's `balanced`
    positions (B, L) and all layers together, as transformers computes it for that row alone. A step's loss, a mean over
    targets, is then the mean over rows of transformers' loss, weighted by targets.
    """
    balances = [block.balance for block in blocks if block.balance is not None]
    for block in blocks:
        block.balance = None  # It holds the graph.
    total = torch.stack(balances).sum(dim=0)
    positions = balanced.sum(dim=1).clamp_min(1) * len(balances)
    mean = total / positions[:, None, None]
    return (labels >= 0).sum(dim=1) * ((mean[:, 0] * mean[:, 1]).sum(dim=1) * total.shape[-1])


_LEAST = 2**16
"""Elements of the smallest weight that is worth quantizing."""
_SHARE = 32
"""Such a module has at least one in this many of its layer's parameters. Routers and gates have fewer: they decide by
small differences, and stay dense."""


class ReadWeight(FrozenTensor):
    """Frozen weight that a module's own code reads, in `dtype`."""

    def __init__(self, shape: tuple[int, ...], *, format: str | None, dtype: torch.dtype) -> None:
        super().__init__(shape, format=format, dtype=dtype)
        self.dtype = dtype
        self.dense: Tensor | None = None
        """The dequantized weight, from its first use in a forward of the layer to the end of it."""

    def read(self) -> Tensor:
        """Return the dequantized weight. Code that loops over experts reads it once for each."""
        if self.dense is None:
            self.dense = self.frozen_weight.dense(self.dtype)
        return self.dense


def find_large_parameters(layer: nn.Module, linears: Collection[str]) -> list[str]:
    """Return the paths of the Parameters of a layer of the real size (on meta) to be kept in 4 bits.

    `linears`: paths of the modules that become frozen linears.
    """
    others = {path: module for path, module in layer.named_modules() if path not in linears}
    experts = find_experts(layer)
    total = sum(parameter.numel() for parameter in layer.parameters())
    names = []
    for path, module in others.items():
        if path in experts or isinstance(module, (nn.Embedding, nn.Conv1d)):
            continue
        own = {n: p.numel() for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.numel() >= _LEAST}
        if own and _SHARE * sum(own.values()) >= total:
            names += [f"{path}.{name}" for name in own]
    return names


def freeze_parameters(
    layer: nn.Module, formats: Mapping[str, str | None], *, dtype: torch.dtype
) -> dict[str, ReadWeight]:
    """Replace Parameters of a decoder layer by frozen weights, on meta. Return them by path.

    `formats`: the paths in the layer, with the formats of their weights.
    """
    weights = {}
    for path, format in formats.items():
        owner, _, name = path.rpartition(".")
        module = layer.get_submodule(owner)
        weights[path] = ReadWeight(tuple(module.get_parameter(name).shape), format=format, dtype=dtype)
        del module._parameters[name]
        of: Any = type(module)
        # torch.nn.utils.parametrize does the same, but moves the weight to another path than transformers'.
        module.__class__ = _reading(of, name)
        module._modules[name] = weights[path]  # add_module refuses the name of a property.

    def forget(*_: Any) -> None:
        for weight in weights.values():
            weight.dense = None

    if weights:
        layer.register_forward_pre_hook(forget)
        layer.register_forward_hook(forget, always_call=True)  # Recomputation leaves by an exception.
    return weights


@functools.cache
def _reading(of: Any, name: str) -> Any:
    """Return a subclass whose attribute `name` is the dense tensor of its ReadWeight `name`."""

    def read(module: nn.Module) -> Tensor:
        weight = module._modules[name]
        assert isinstance(weight, ReadWeight)
        return weight.read()

    return type(of.__name__, (of,), {"__module__": of.__module__, name: property(read)})
