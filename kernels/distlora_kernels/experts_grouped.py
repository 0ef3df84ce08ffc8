"""Run expert linears as grouped products (torch.nn.functional.grouped_mm): the path of GPUs in 16 bits.

Nothing is read on the host. The fused weight is dequantized into the scratch that every linear uses (operands.py), in
low bits without the experts that no token chose: a product reads nothing of a group without rows. grouped_mm does not
accumulate into its output, so the adapter's term is added to the rounded product of the base, as in PEFT. Ranks are
padded to a multiple of 8, since rows must be 16 bytes.

If tokens choose adapters, the groups of the adapters' products are (expert, adapter), each with its A and B padded to
the largest rank; rows without an adapter are a group whose A and B are 0. The base's groups stay the experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels.buffers import RANK_MULTIPLE
from distlora_kernels.dispatch import on_device
from distlora_kernels.operands import ExpertAdapter, ExpertChoice, ExpertGradients, ExpertLinear, Routing, take_chosen


def forward(x: Tensor, linear: ExpertLinear, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Return y (S, O) of x (S, I), and s x A^T (S, padded R) for backward; None without an adapter."""
    y = _product(x, _dense(linear, x.dtype, routing).transpose(-2, -1), routing.ends)
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
    gated: Tensor | None,
    dy: Tensor,
    needs: tuple[bool, bool, bool],
) -> ExpertGradients:
    """Return the gradients of <y, dy> for x (S, I), a (E, R, I) and b (E, O, R) that are needed."""
    dx = _product(dy, _dense(linear, dy.dtype, routing), routing.ends) if needs[0] else None
    if linear.adapter is None:
        return ExpertGradients(dx, None, None)
    assert x is not None
    assert gated is not None
    a, b = _padded(linear.adapter, dy.dtype)
    ends = _ends(linear.adapter, routing)
    dxa = _gated(_product(dy, b, ends), linear.adapter, routing)
    da = db = None
    if needs[1]:
        da = _without_padding(_sums(dxa.T, x, ends, len(a)), linear.adapter, linear.adapter.a, 1)
    if needs[2]:
        db = _without_padding(_sums(dy.T, gated, ends, len(b)), linear.adapter, linear.adapter.b, 2)
    if dx is not None:
        dx += _product(dxa, a, ends)
    return ExpertGradients(dx, da, db)


def _ends(adapter: ExpertAdapter, routing: Routing) -> Tensor:
    """Return the end of the rows of each group of the adapter's products."""
    if not isinstance(adapter.scale, ExpertChoice):
        return routing.ends
    assert routing.users is not None
    return routing.users.ends


def _product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row of left (S, P) with its group's matrix of right (G, P, Q), or the only one -> (S, Q)."""
    return left @ right[0] if len(right) == 1 else F.grouped_mm(left, right, offs=ends)


def _sums(left: Tensor, right: Tensor, ends: Tensor, groups: int) -> Tensor:
    """Return each group's product over its rows, left (P, S), right (S, Q) -> (G, P, Q); 1 group has all rows."""
    if groups == 1:
        return (left @ right)[None]
    sums = F.grouped_mm(left, right, offs=ends)
    # For a group without rows CUTLASS on sm_100 leaves stale accumulator values (pytorch issue 172439).
    idle = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return sums.masked_fill_(idle[:, None, None], 0.0)


def _dense(linear: ExpertLinear, dtype: torch.dtype, routing: Routing) -> Tensor:
    """Return the weight (E, O, I) of the experts with rows; on a GPU it is valid until the next weight is taken."""
    weight = take_chosen(linear.weight, dtype, routing.ends)
    return weight.transpose(-2, -1) if linear.transposed else weight


def _padded(adapter: ExpertAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a (G, R, I) and b (G, O, R) of each group in `dtype`, padded with zeros in R; a shared factor is one."""
    a, b, choice = adapter.a.to(dtype), adapter.b.to(dtype), adapter.scale
    if not isinstance(choice, ExpertChoice):
        missing = -a.shape[1] % RANK_MULTIPLE
        return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()
    rank, experts = _rank(choice), max(len(a), len(b))
    a, b = a.expand(experts, -1, -1), b.expand(experts, -1, -1)
    groups_a, groups_b = [a.new_zeros(a.shape[0], rank, a.shape[2])], [b.new_zeros(*b.shape[:2], rank)]
    for number in choice.numbers_by_user:
        if number < 0:
            groups_a.append(groups_a[0])
            groups_b.append(groups_b[0])
        else:
            columns, missing = choice.columns(number), rank - choice.ranks[number]
            groups_a.append(F.pad(a[:, columns], (0, 0, 0, missing)))
            groups_b.append(F.pad(b[:, :, columns], (0, missing)))
    return torch.stack(groups_a, dim=1).flatten(0, 1), torch.stack(groups_b, dim=1).flatten(0, 1)


def _rank(choice: ExpertChoice) -> int:
    """Return the rank that adapters are padded to."""
    return -(-max(choice.ranks) // RANK_MULTIPLE) * RANK_MULTIPLE


def _without_padding(sums: Tensor, adapter: ExpertAdapter, factor: Tensor, rank_dim: int) -> Tensor:
    """Return the gradient of a `factor`, a or b, from the groups' padded sums, (G, R, I) or (G, O, R)."""
    choice = adapter.scale
    if not isinstance(choice, ExpertChoice):
        return sums.narrow(rank_dim, 0, adapter.a.shape[1]).to(factor.dtype)
    by_user = sums.unflatten(0, (-1, len(choice.numbers_by_user) + 1)).unbind(1)[1:]
    parts = {
        n: part.narrow(rank_dim, 0, choice.ranks[n])
        for part, n in zip(by_user, choice.numbers_by_user, strict=True)
        if n >= 0
    }
    gradient = torch.cat([parts[number] for number in range(len(choice.ranks))], dim=rank_dim).to(factor.dtype)
    return gradient.sum(0, keepdim=True) if len(factor) < len(gradient) else gradient


def _gated(xa: Tensor, adapter: ExpertAdapter, routing: Routing) -> Tensor:
    """Return x A^T (S, padded R) times the scale, in its dtype."""
    choice = adapter.scale
    if not isinstance(choice, ExpertChoice):
        return (xa * choice).to(xa.dtype)
    assert routing.users is not None
    scales = tuple(0.0 if number < 0 else choice.scales[number] for number in choice.numbers_by_user)
    by_row = on_device((*scales, 0.0), xa.device)[routing.users.of_rows]  # The last is for no adapter (-1).
    return (xa * by_row[:, None]).to(xa.dtype)
