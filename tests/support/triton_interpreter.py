"""Run kernels on CPU tensors in Triton's interpreter, with its two silent bf16 faults patched."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_cast, _dot, _narrow = _Builder.cast_impl, _Builder.create_dot, _Builder.create_fp_to_fp


def _to_bf16(values: Any) -> Any:
    """Round fp32 to the 16 bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    lowest_kept = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + lowest_kept) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def _widened(handle: Any) -> Any:
    """Return a bf16 operand as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return interpreter.TensorHandle(bits.view(np.float32).reshape(handle.data.shape), tl.float32)


def _cast_impl(self: Any, source: Any, dtype: Any) -> Any:
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_to_bf16(source.data), tl.bfloat16)
    return _cast(self, source, dtype)


def _create_fp_to_fp(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
    to_nearest = rounding != interpreter._ir.ROUNDING_MODE.RTZ
    if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16 and to_nearest:
        return _cast_impl(self, source, dtype)
    return _narrow(self, source, dtype, rounding)


def _create_dot(self: Any, a: Any, b: Any, accumulator: Any, *precision: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), accumulator, *precision)


_Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot = _cast_impl, _create_fp_to_fp, _create_dot
