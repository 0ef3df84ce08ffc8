"""Expert linears as grouped products (torch.nn.functional.grouped_mm): the path of GPUs in 16 bits.

Nothing is read on the host, so the fused weight is dequantized whole, whichever experts have rows: into the scratch
that every linear's weight takes (scratch.py). grouped_mm has no accumulation into its output, so the adapter's term is
added to the rounded product of the base, as PEFT adds it to a linear's output. Ranks are padded to a multiple of 8: its
rows must be 16 bytes.

Where rows choose adapters, the groups of the adapters' products are those of (expert, adapter), each with its own A and
B, filled up to the largest rank; rows without an adapter are a group whose A and B are 0. The base's groups stay the
experts. Rows of one adapter are added to nothing of another's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels.expert_operands import ExpertAdapter, ExpertChoice, ExpertGradients, ExpertLinear, Routing
from distlora_kernels.scratch import DenseWeights
from distlora_kernels.tables import on_device

_RANK_MULTIPLE = 8


def forward(x: Tensor, linear: ExpertLinear, routing: Routing, weights: DenseWeights) -> tuple[Tensor, Tensor | None]:
    """x (S, I) -> y (S, O), and what the backward keeps: s x A^T (S, R padded), None without an adapter."""
    y = _product(x, _dense(linear, x.dtype, weights).transpose(-2, -1), routing.ends)
    gated = None
    if linear.adapter is not None:
        a, b = _padded(linear.adapter, x.dtype)
        ends = _ends(linear.adapter, routing)
        gated = _gated(_product(x, a.transpose(-2, -1), ends), linear.adapter, routing)
        y += _product(gated, b.transpose(-2, -1), ends)
    if linear.bias is not None:
        y += linear.bias[routing.experts]
    return y, gated


def backward(
    x: Tensor | None,
    linear: ExpertLinear,
    routing: Routing,
    weights: DenseWeights,
    gated: Tensor | None,
    dy: Tensor,
    needs: tuple[bool, bool, bool],
) -> ExpertGradients:
    """The gradients of <y, dy> for x (S, I), a (E, R, I) and b (E, O, R), as `needs` asks for them."""
    dx = _product(dy, _dense(linear, dy.dtype, weights), routing.ends) if needs[0] else None
    if linear.adapter is None:
        return ExpertGradients(dx, None, None)
    assert x is not None
    assert gated is not None
    a, b = _padded(linear.adapter, dy.dtype)
    ends = _ends(linear.adapter, routing)
    dxa = _gated(_product(dy, b, ends), linear.adapter, routing)
    da = db = None
    if needs[1]:
        da = _cut(_sums(dxa.T, x, ends), linear.adapter, 1).to(linear.adapter.a.dtype)
    if needs[2]:
        db = _cut(_sums(dy.T, gated, ends), linear.adapter, 2).to(linear.adapter.b.dtype)
    if dx is not None:
        dx += _product(dxa, a, ends)
    return ExpertGradients(dx, da, db)


def _ends(adapter: ExpertAdapter, routing: Routing) -> Tensor:
    """Where the rows of each group of the adapter's products end."""
    if not isinstance(adapter.scale, ExpertChoice):
        return routing.ends
    assert routing.users is not None
    return routing.users.ends


def _product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left (S, P), right (G, P, Q) -> (S, Q), each row with its group's matrix."""
    return F.grouped_mm(left, right, offs=ends)


def _sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left (P, S), right (S, Q) -> (G, P, Q), each group's sum over its rows."""
    sums = F.grouped_mm(left, right, offs=ends)
    # Of a group without rows CUTLASS leaves on sm_100 what the accumulator held (pytorch issue 172439).
    idle = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return sums.masked_fill_(idle[:, None, None], 0.0)


def _dense(linear: ExpertLinear, dtype: torch.dtype, weights: DenseWeights) -> Tensor:
    """(E, O, I) in `dtype`; on a GPU until the next weight is taken."""
    weight = weights.take(0, linear.weight, dtype)
    return weight.transpose(-2, -1) if linear.transposed else weight


def _padded(adapter: ExpertAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (G, R, I) and b (G, O, R) of each group in `dtype`, R filled up with zeros."""
    a, b, choice = adapter.a.to(dtype), adapter.b.to(dtype), adapter.scale
    if not isinstance(choice, ExpertChoice):
        missing = -a.shape[1] % _RANK_MULTIPLE
        return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()
    rank = _rank(choice)
    groups_a, groups_b = [a.new_zeros(a.shape[0], rank, a.shape[2])], [b.new_zeros(*b.shape[:2], rank)]
    for number in choice.of_users:
        if number < 0:
            groups_a.append(groups_a[0])
            groups_b.append(groups_b[0])
        else:
            columns, missing = choice.columns(number), rank - choice.ranks[number]
            groups_a.append(F.pad(a[:, columns], (0, 0, 0, missing)))
            groups_b.append(F.pad(b[:, :, columns], (0, missing)))
    return torch.stack(groups_a, dim=1).flatten(0, 1), torch.stack(groups_b, dim=1).flatten(0, 1)


def _rank(choice: ExpertChoice) -> int:
    """The rank that adapters are filled up to."""
    return -(-max(choice.ranks) // _RANK_MULTIPLE) * _RANK_MULTIPLE


def _cut(sums: Tensor, adapter: ExpertAdapter, rank_dim: int) -> Tensor:
    """The gradient of a or b from the groups' sums, (G, R, I) or (G, O, R) padded."""
    choice = adapter.scale
    if not isinstance(choice, ExpertChoice):
        return sums.narrow(rank_dim, 0, adapter.a.shape[1])
    of_users = sums.unflatten(0, (-1, len(choice.of_users) + 1)).unbind(1)[1:]
    parts = {
        n: own.narrow(rank_dim, 0, choice.ranks[n]) for own, n in zip(of_users, choice.of_users, strict=True) if n >= 0
    }
    return torch.cat([parts[number] for number in range(len(choice.ranks))], dim=rank_dim)


def _gated(xa: Tensor, adapter: ExpertAdapter, routing: Routing) -> Tensor:
    """(S, R padded) times the scale, in its own dtype."""
    choice = adapter.scale
    if not isinstance(choice, ExpertChoice):
        return (xa * choice).to(xa.dtype)
    assert routing.users is not None
    of_users = tuple(0.0 if number < 0 else choice.scales[number] for number in choice.of_users)
    of_rows = on_device((*of_users, 0.0), xa.device)[routing.users.of_rows]  # In the end of none (-1).
    return (xa * of_rows[:, None]).to(xa.dtype)
