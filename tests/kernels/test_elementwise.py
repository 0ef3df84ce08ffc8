"""elementwise.cpp and the Triton kernels agree with transformers' formulas, forward and gradient, for any shape.

The kernels run on a GPU, or in Triton's interpreter.
"""

from __future__ import annotations

import _ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distlora_kernels import dispatch, native, processor
from distlora_kernels.elementwise import (
    Activation,
    cross_entropy_,
    gated,
    reference_cross_entropy,
    reference_gated,
    reference_rms_norm,
    reference_rotated,
    rms_norm,
    rotate,
)
from support.closeness import assert_close
from support.tiers import ci

needs_compiler = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"not compiled: {native.unavailable_reason()}"
)
pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(params=[pytest.param("compiled", marks=needs_compiler), "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the compiled functions, then with the kernels."""
    if request.param == "compiled":
        yield "cpu"
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        with dispatch.interpreted():
            yield "cpu"


DTYPES = (torch.bfloat16, torch.float32)
# Of what is rounded to bf16 in the same places, a value in some hundred lands on the other side: far below one ulp.
ULPS = {torch.bfloat16: 0.25, torch.float32: 2.0}


def drawn(
    *shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0, device: str | torch.device = "cpu"
) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def check(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, ulps=ULPS[actual.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (11, 576), (2, 3, 2880), (2, 40, 128), (1, 20481)])
def test_a_norm_is_transformers(dtype: torch.dtype, plus_one: bool, shape: tuple[int, ...], device: str) -> None:
    x = drawn(*shape, dtype=dtype, device=device).requires_grad_()
    weight = drawn(shape[-1], dtype=dtype, seed=1, device=device)
    dy = drawn(*shape, dtype=dtype, seed=2, device=device)
    expected = reference_rms_norm(x, weight, 1e-6, plus_one=plus_one)
    actual = rms_norm(x, weight, 1e-6, plus_one=plus_one)
    check(actual, expected)
    (wanted,) = torch.autograd.grad(expected, x, dy)
    (found,) = torch.autograd.grad(actual, x, dy)
    if shape[-1] > 1:  # Of one number the gradient is what rounding leaves of 0.
        assert_close(found, wanted, ulps=2.0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("halves", [False, True])
def test_a_gated_product_is_transformers(dtype: torch.dtype, activation: Activation, halves: bool, device: str) -> None:
    columns = 1536 if halves else 37
    both = drawn(3, 11, 2 * columns, dtype=dtype, scale=4.0, device=device)
    both[0, 0, :4] = torch.tensor([60.0, -60.0, 0.0, -200.0])
    dy = drawn(3, 11, columns, dtype=dtype, seed=1, device=device)
    gate, up = (part.contiguous().requires_grad_() for part in both.chunk(2, dim=-1))
    expected = reference_gated(gate, up, activation)
    wanted = torch.autograd.grad(expected, (gate, up), dy)
    whole = both.clone().requires_grad_()
    own = whole.clone()  # Backward writes over what it is given.
    parts = own.chunk(2, dim=-1) if halves else tuple(part.contiguous() for part in own.chunk(2, dim=-1))
    actual = gated(*parts, activation)
    check(actual, expected)
    (found,) = torch.autograd.grad(actual, whole, dy)
    # exp(x) of GELU's derivative has an error of some last bits, relative to what is near 0.
    assert_close(found, torch.cat(wanted, dim=-1), ulps=ULPS[dtype] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "turned"), [(24, 18), ci(64, 64), ci(128, 96)])
@pytest.mark.parametrize("tables", [1, 2])
def test_a_rotary_embedding_is_transformers_to_the_bit(
    dtype: torch.dtype, size: int, turned: int, tables: int, device: str
) -> None:
    q, k = (drawn(2, 9, heads * size, dtype=dtype, seed=heads, device=device).requires_grad_() for heads in (9, 3))
    angles = drawn(tables, 9, turned, dtype=torch.float32, seed=5, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    as_heads = [x.unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k)]
    expected = [reference_rotated(x, cos, sin) for x in as_heads]
    dys = [drawn(*y.shape, dtype=dtype, seed=7, device=device) for y in expected]
    wanted = torch.autograd.grad(expected, (q, k), dys)
    own = [x.clone().unflatten(-1, (-1, size)).transpose(1, 2) for x in (q, k)]
    actual = rotate(own[0], own[1], cos, sin)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
        assert a.shape == b.shape
    for a, b in zip(torch.autograd.grad(actual, (q, k), dys), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [3, 1000, 9001])
def test_losses_and_their_gradient_are_torchs(dtype: torch.dtype, columns: int, device: str) -> None:
    logits = drawn(50, columns, dtype=dtype, scale=6.0, device=device)
    labels = torch.randint(0, columns, (50,), generator=torch.Generator().manual_seed(1)).to(device)
    labels[7] = -100
    leaf = logits.double().requires_grad_()
    expected = F.cross_entropy(leaf, labels, ignore_index=-100, reduction="none")
    expected.sum().backward()
    own = logits.clone()
    assert_close(cross_entropy_(own, labels), expected.detach(), ulps=2.0)
    # With AVX2 a lane sums 1,126 of 9,001 exponentials in fp32, whose rounding is in every number of the row.
    assert_close(own, leaf.grad, ulps=ULPS[dtype] * 4)
    assert not own[7].any()


@needs_compiler
def test_no_row_depends_on_the_others_or_on_threads() -> None:
    x, weight = drawn(700, 96, dtype=torch.bfloat16), drawn(96, dtype=torch.bfloat16, seed=1)
    labels = torch.arange(700) % 96
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            logits = x.clone()
            losses = cross_entropy_(logits, labels)
            found.append((rms_norm(x, weight, 1e-6, plus_one=False), gated(x, x, "silu"), losses, logits))
    finally:
        torch.set_num_threads(threads)
    part = x[101:104].clone()
    alone = (rms_norm(part, weight, 1e-6, plus_one=False), gated(part, part, "silu"))
    logits = part.clone()
    for one, three, own in zip(*found, (*alone, cross_entropy_(logits, labels[101:104]), logits), strict=True):
        assert torch.equal(one, three)
        assert torch.equal(one[101:104], own)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_lost(dtype: torch.dtype, bad: float, device: str) -> None:
    """Non-finite values stay visible."""
    x, weight = drawn(2, 40, dtype=dtype, device=device), torch.ones(40, dtype=dtype, device=device)
    x[0, 3] = bad
    assert not rms_norm(x, weight, 1e-6, plus_one=False)[0].isfinite().all()
    assert not gated(x, torch.ones_like(x), "silu")[0, 3].isfinite() or bad < 0
    assert rms_norm(x, weight, 1e-6, plus_one=False)[1].isfinite().all()
    logits = x.clone()
    losses = cross_entropy_(logits, torch.tensor([5, 5], device=device))
    assert losses.isfinite().tolist() == [bad < 0 and bad == bad, True]


@needs_compiler
def test_a_machine_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "kept_in", None)
    for wrong in ("no-such-compiler", "'g++"):
        monkeypatch.setenv("CXX", wrong)
        assert f"CXX={wrong} is not a program" in str(native.unavailable_reason())
    failing = tmp_path / "cxx"
    monkeypatch.setenv("CXX", str(failing))
    for stderr, error, message in (
        ("elementwise.cpp:1: error: unknown target", native.NotCompiledError, "unknown target; set CXX to another"),
        (
            "fatal error: x.o: No space left on device",
            native.NotCompiledError,
            "set TMPDIR to a folder with free space",
        ),
        ("g++: fatal error: Killed signal terminated program cc1plus", MemoryError, "was killed"),
    ):
        failing.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
        failing.chmod(0o755)
        assert native.unavailable_reason() is None
        with pytest.raises(error, match=message):
            native._library.__wrapped__(processor.path())
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install g++" in str(native.unavailable_reason())


@needs_compiler
def test_a_compiled_library_is_kept_where_only_the_user_can_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls, script, folder = tmp_path / "calls", tmp_path / "cxx", tmp_path / "cache" / "compiled"

    def compiles(version: str) -> int:
        """Return how often a start calls the compiler, a script that copies some library."""
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\necho x >> {calls}\n'
            f'for last; do :; done\ncp {_ctypes.__file__} "$last"\n'
        )
        script.chmod(0o755)
        calls.write_text("")
        native._library.__wrapped__(processor.path())
        return len(calls.read_text().split())

    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(native, "kept_in", folder)
    once = len(native.SOURCES) + 1
    assert [compiles("one"), compiles("one")] == [once, 0]
    assert [compiles("two"), compiles("two"), compiles("one")] == [once, 0, 0]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so", ".so"], "nothing temporary is left"
    header = tmp_path / "products.h"
    header.write_bytes(native.HEADERS[1].read_bytes() + b"//")
    monkeypatch.setattr(native, "HEADERS", (native.HEADERS[0], header))
    damaged = folder / f"{native._key([str(script)])}.so"
    assert not damaged.exists(), "another header is another library"
    damaged.touch()
    assert [compiles("one"), compiles("one")] == [once, 0], "an empty file was replaced"
    assert damaged.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert [compiles("one"), compiles("one")] == [once, once], "another user could have left a library there"


def test_a_label_that_is_no_column_is_nan_and_writes_nowhere_else(device: str) -> None:
    whole = drawn(3, 40, dtype=torch.float32, device=device)
    expected, gradient = reference_cross_entropy(whole, torch.tensor([1, -100, 2], device=device))
    for label in (40, 2**40):
        own = whole.clone()
        losses = cross_entropy_(own, torch.tensor([1, label, 2], device=device))
        assert losses.isnan().tolist() == own.isnan().all(1).tolist() == [False, True, False]
        assert_close(losses[::2], expected[::2], ulps=2.0)
        check(own[::2], gradient[::2])
    with pytest.raises(AssertionError, match="int32"):
        cross_entropy_(whole, torch.tensor([1, 2, 3], dtype=torch.int32, device=device))
