"""Run a decoder layer's elementwise operations in one pass over memory each.

On the CPU elementwise.cpp runs them, on a GPU elementwise_triton.py.

The operations are RMSNorm, act(gate) * up, the rotary embedding, and a frozen LM head's cross-entropy with its
gradient. Saved for backward: a norm's input and one fp32 number per row; gate and up of the product; nothing of the
rotary embedding. The product's backward overwrites gate and up; the rotary embedding overwrites its input, its backward
the gradient. Callers must not use those tensors afterwards.

The functions named `reference_*` are the definitions, as in transformers' modules: the same roundings to the dtype,
with sums and exp in another order.

Letters: M rows, N columns, B rows of the batch, K heads, T tokens, E size of a head, R rotated columns of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from distlora_kernels import native
from distlora_kernels.dispatch import on_device_of, uses_triton

Activation = Literal["silu", "gelu_tanh"]

_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def call(name: str, dtype: torch.dtype, *arguments: Any) -> int:
    """Call the compiled function of this name and dtype and return its result, if it has one."""
    function = getattr(native.library(), f"{name}_{_NAMES[dtype]}")
    returned: int = function(*(_as_c(argument) for argument in arguments))
    return returned


def _as_c(argument: Any) -> Any:
    """Return an argument for C: a tensor as a pointer, floats and bools as float and int, other numbers as 64 bits.

    None is a null pointer, and ctypes' own values stay.
    """
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int(argument) if isinstance(argument, bool) else ctypes.c_int64(argument)
    return argument


def _run(name: str, first: Tensor, *arguments: Any) -> None:
    """Run an operation, whose compiled function and Triton wrapper have one name and the same arguments."""
    if not uses_triton(first):
        call(name, first.dtype, first, *arguments)
        return
    from distlora_kernels import elementwise_triton

    with on_device_of(first):
        getattr(elementwise_triton, name)(first, *arguments)


_makers: dict[int, tuple[weakref.ref[Tensor], Callable[[], Tensor]]] | None = None
"""Live outputs of norms and gated products by address, and the function that recomputes each."""


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Have autograd save, in place of the outputs of norms and gated products, how to recompute them.

    Each costs one more pass over memory in backward.
    """
    global _makers
    outer, _makers = _makers, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_packed, _unpacked):
            yield
    finally:
        _makers = outer


def _register(output: Tensor, make: Callable[[], Tensor]) -> None:
    if _makers is not None:
        _makers[output.data_ptr()] = (weakref.ref(output), make)


def _packed(tensor: Tensor) -> Any:
    known, make = (_makers or {}).get(tensor.data_ptr(), (None, None))
    output = None if known is None else known()
    if output is None or make is None or output.numel() != tensor.numel() or not tensor.is_contiguous():
        return tensor
    return make, tensor.shape


def _unpacked(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    make, shape = packed
    made: Tensor = make().view(shape)
    return made


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """Return the RMSNorm of x (..., N) with weight (N,): x / rms(x) in fp32, rounded, times weight.

    With `plus_one` the factor is 1 + weight in fp32, before rounding.
    """
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normal * (1.0 + weight.float())).type_as(x) if plus_one else weight * normal.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool) -> Tensor:
    """Return reference_rms_norm; only x gets a gradient, the weight is frozen."""
    assert not weight.requires_grad, "the gradient of a norm's weight is not computed"
    if weight.dtype != x.dtype:
        return reference_rms_norm(x, weight, eps, plus_one=plus_one)
    output: Tensor = _RMSNorm.apply(x, weight, eps, plus_one)
    x, frozen = x.detach(), weight.detach()
    _register(output, lambda: _normalized(x.contiguous(), frozen, eps, plus_one)[0])
    return output


def _normalized(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """Return y and 1 / rms(x) in fp32."""
    y, inverse = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _run("norm_forward", x, weight, y, inverse, inverse.numel(), x.shape[-1], eps, plus_one)
    return y, inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        x = x.contiguous()
        y, inverse = _normalized(x, weight, eps, plus_one)
        ctx.save_for_backward(x, weight, inverse)
        ctx.plus_one = plus_one
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        rows, columns = inverse.numel(), x.shape[-1]
        _run("norm_backward", dy, x, weight, inverse, dx, rows, columns, ctx.plus_one)
        return dx, None, None, None


def reference_gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return act(gate) * up, (..., N)."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return reference_gated. Both operands may be halves of one tensor."""
    gelu = activation == "gelu_tanh"
    if not _rows_alike(gate, up):
        gate, up = gate.contiguous(), up.contiguous()
    output: Tensor = _Gated.apply(gate, up, gelu)
    gate, up = gate.detach(), up.detach()
    _register(output, lambda: _product(gate, up, gelu))
    return output


def _product(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    y, columns = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), gate.shape[-1]
    _run("gate_forward", gate, up, y, y.numel() // columns, columns, _stride(gate), gelu)
    return y


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        y = _product(gate, up, gelu)
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy, columns = dy.contiguous(), gate.shape[-1]
        _run("gate_backward", dy, gate, up, dy.numel() // columns, columns, _stride(gate), ctx.gelu)
        return gate, up, None


def _stride(matrix: Tensor) -> int:
    """Return the distance of two rows of the last dimension, in elements."""
    return matrix.stride(-2) if matrix.dim() > 1 else matrix.shape[-1]


def _rows_alike(first: Tensor, second: Tensor) -> bool:
    """Return whether the rows of both have the same constant distance over all leading dimensions."""
    steps = [_stride(first)]
    for size in reversed(first.shape[1:-1]):
        steps.insert(0, steps[0] * size)
    is_matrix = first.stride(-1) == 1 and list(first.stride()[:-1]) == steps[-first.dim() + 1 :]
    return is_matrix and first.stride() == second.stride()


def reference_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, K, T, E) with the two halves of its first R columns rotated by cos and sin (B or 1, T, R)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]
    return torch.cat((turned, rest), dim=-1)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate q and k in place as reference_rotated does, with transformers' signature."""
    assert unsqueeze_dim == 1, "tables are for (B, K, T, E)"
    cos, sin = cos.to(q.dtype).contiguous(), sin.to(q.dtype).contiguous()
    rotated: tuple[Tensor, Tensor] = _Rotated.apply(q, k, cos, sin)
    return rotated


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return (*_turn(dq, dk, *ctx.saved_tensors, back=True), None, None)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """Rotate each in place if columns are contiguous and heads do not overlap, else a copy."""
    q, k = (x.contiguous() if x.stride(-1) != 1 or 0 in x.stride() else x for x in (q, k))
    if _makers is not None:  # An overwritten output cannot be recomputed.
        _makers.pop(q.data_ptr(), None)
        _makers.pop(k.data_ptr(), None)
    if uses_triton(q):
        from distlora_kernels import elementwise_triton

        with on_device_of(q):
            elementwise_triton.rotate(q, k, cos, sin, back=back)
        return q.view_as(q), k.view_as(k)
    batch_stride = 0 if cos.shape[0] == 1 else cos.stride(0)
    for x in (q, k):
        batch, heads, tokens, _ = x.shape
        sizes = (batch, heads, tokens, cos.shape[-1])
        call("rotate", x.dtype, x, cos, sin, *sizes, x.stride(0), x.stride(1), x.stride(2), batch_stride, back)
    return q.view_as(q), k.view_as(k)


def reference_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses (M,) fp32 of logits (M, N) and labels (M,) int64, and the gradient of their sum.

    The gradient is (M, N) in the logits' dtype; loss and gradient are 0 where the label is below 0.
    """
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        losses = F.cross_entropy(leaf.float(), labels.where(labels >= 0, -100), ignore_index=-100, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the losses of reference_cross_entropy and overwrite the logits with the gradient.

    Both are NaN where a label is N or more, which torch refuses; training stops at such a loss.
    """
    assert (labels.dtype, labels.shape) == (torch.int64, logits.shape[:1]), f"labels {labels.dtype} {labels.shape}"
    contiguous = logits.is_contiguous() and labels.is_contiguous()
    assert contiguous, "logits and labels must be contiguous"
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    _run("cross_entropy", logits, labels, losses, *logits.shape)
    return losses
