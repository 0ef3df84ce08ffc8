"""The skinny products agree with fp64 from the same rounded inputs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from distlora_kernels.dropout import ChosenDropout, Dropout, Stream, dropped
from distlora_kernels.operands import RowChoice, counters
from distlora_kernels.skinny import skinny_down, skinny_dy, skinny_grad, skinny_up
from support.closeness import assert_close
from support.tiers import diagonal

pytestmark = pytest.mark.usefixtures("nan_memory")

KEY = (0x01234567, 0x89ABCDEF)
SHAPES = [(1, 66, 100, 3), (37, 100, 66, 16), (300, 256, 256, 48), (40, 96, 80, 130)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RANKS = (3, 8, 4)
CHOSEN = [1, -1, 0, 2, 1]


@pytest.fixture
def device(triton_device: torch.device) -> torch.device:
    return triton_device


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return x (M, I), a (R, I), b (O, R), dy (M, O), xa (M, R), bias (O,)."""
    m, i, o, r = shape
    shapes: dict[str, tuple[int, ...]] = {
        "x": (m, i),
        "a": (r, i),
        "b": (o, r),
        "dy": (m, o),
        "xa": (m, r),
        "bias": (o,),
    }
    return {name: normal(*s, dtype=dtype, device=device, seed=n) for n, (name, s) in enumerate(shapes.items())}


def choice_of(device: torch.device) -> RowChoice:
    return RowChoice(torch.tensor(CHOSEN, device=device), (0.5, 2.0, 1.25), RANKS)


def dropout_of(device: torch.device, rows: list[int]) -> Dropout:
    return Dropout(KEY, 20_000, 7, torch.tensor(rows, device=device))


def seen(x: Tensor, dropout: Dropout | ChosenDropout | None) -> Tensor:
    return x.double() if dropout is None else x.double().masked_fill(dropped(dropout, *x.shape), 0)


def expand(compact: Tensor, choice: RowChoice) -> Tensor:
    """Expand (M, max(ranks)) to (M, R): each row's values in its adapter's columns, zeros elsewhere."""
    wide = compact.new_zeros(compact.shape[0], sum(choice.ranks))
    tokens = compact.shape[0] // len(CHOSEN)
    for row, adapter in enumerate(CHOSEN):
        if adapter >= 0:
            first, rank = sum(RANKS[:adapter]), RANKS[adapter]
            part = slice(row * tokens, (row + 1) * tokens)
            wide[part, first : first + rank] = compact[part, :rank]
    return wide


def assert_sum_close(actual: Tensor, expected: Tensor) -> None:
    """Assert one rounding (0.3 ulps) and up to sqrt(n) / 2 ulps for n <= 300 sequential fp32 additions."""
    assert_close(actual, expected, ulps=8 if actual.dtype == torch.float32 else 0.5)
    assert torch.isfinite(actual).all()


@pytest.mark.parametrize("shape", [(37, 100, 66, 16), (300, 256, 256, 48), (20, 2100, 2100, 3)], ids=str)
def test_a_product_and_a_copy_of_its_rows_fill_columns_of_a_wider_matrix(
    shape: tuple[int, int, int, int], device: torch.device
) -> None:
    """Both have the bits of products into memory of their own; the columns around them stay as they are."""
    x, a, b, dy, xa, _ = operands(shape, torch.bfloat16, device).values()
    rank, columns = a.shape[0], dy.shape[1]
    wide = torch.full((dy.shape[0], columns + 2 * rank + 5), 7.0, dtype=dy.dtype, device=device)
    copy, out = wide[:, :columns], wide[:, columns + rank : columns + 2 * rank]
    alone, beside = skinny_dy(dy, b, xa, scale=0.3), skinny_dy(dy, b, xa, scale=0.3, out=out, copy=copy)
    assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))
    assert torch.equal(copy, dy)
    assert torch.equal(out, alone[0])
    assert (wide[:, columns : columns + rank] == 7).all()
    assert (wide[:, columns + 2 * rank :] == 7).all()
    alone, columns = skinny_down(x, a), x.shape[1] + rank
    wide = torch.full((len(x), columns + 5), 7.0, dtype=x.dtype, device=device)
    assert torch.equal(skinny_down(x, a, wide=wide[:, :columns]), alone)
    assert torch.equal(wide[:, :columns], torch.cat([x, alone], dim=1))
    assert (wide[:, columns:] == 7).all()


@pytest.mark.parametrize(("shape", "dtype"), diagonal(SHAPES, DTYPES), ids=str)
def test_products_equal_fp64(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    t = operands(shape, dtype, device)
    x, a, b, dy, xa, bias = t.values()
    dxa, db = skinny_dy(dy, b, xa, scale=0.3)
    for actual, expected, wanted in (
        (skinny_down(x, a), x.double() @ a.double().T, dtype),
        (skinny_up(xa, b), xa.double() @ b.double().T, dtype),
        (skinny_up(xa, b, bias=bias), xa.double() @ b.double().T + bias.double(), dtype),
        (skinny_up(xa, a.T), xa.double() @ a.double(), dtype),
        (dxa, dy.double() @ b.double(), dtype),
        (db, 0.3 * (dy.double().T @ xa.double()), torch.float32),
        (skinny_grad(xa, x), xa.double().T @ x.double(), torch.float32),
    ):
        assert actual.dtype == wanted
        assert actual.is_contiguous()
        assert_sum_close(actual, expected)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 1), (torch.float32, 21)], ids=str)
def test_rows_choose_adapters(dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    m, choice = tokens * len(CHOSEN), choice_of(device)
    x, a, b, dy, _, bias = operands((m, 100, 66, sum(RANKS)), dtype, device).values()
    compact = normal(m, max(RANKS), dtype=dtype, device=device, seed=9)
    wide, double = expand(compact, choice).double(), [t.double() for t in (x, a, b, dy)]
    uses = expand(torch.ones_like(compact), choice).double()
    xa = skinny_down(x, a, choice=choice)
    dxa, db = skinny_dy(dy, b, compact, scale=0.3, choice=choice)
    owners = torch.tensor([n for n, rank in enumerate(RANKS) for _ in range(rank)], device=device)
    assert xa.shape == dxa.shape == compact.shape
    for actual, expected in (
        (expand(xa, choice), uses * (double[0] @ double[1].T)),
        (skinny_up(compact, b, choice=choice), wide @ double[2].T),
        (skinny_up(compact, b, bias=bias, choice=choice), wide @ double[2].T + bias.double()),
        (skinny_up(compact, a.T, choice=choice), wide @ double[1]),
        (expand(dxa, choice), uses * (double[3] @ double[2])),
        (db, 0.3 * torch.tensor(choice.scales, device=device)[owners].double() * (double[3].T @ wide)),
        (skinny_grad(compact, x, choice=choice), wide.T @ double[0]),
    ):
        assert_sum_close(actual, expected)
    unused = torch.arange(max(RANKS), device=device) >= torch.tensor([*RANKS, 0], device=device)[choice.rows][:, None]
    for columns in (xa, dxa):
        assert not columns[unused.repeat_interleave(tokens, dim=0)].any(), "columns beyond an adapter's rank are not 0"


def own_dropout_of(choice: RowChoice) -> ChosenDropout:
    """Return another key and probability for each adapter, one of them 0, over two steps."""
    streams = tuple(Stream((KEY[0] + n, KEY[1] ^ n << 31), bound) for n, bound in enumerate((20_000, 0, 65_535)))
    steps = torch.arange(len(CHOSEN), device=choice.rows.device) % 2 + 2**32 - 1
    rows = torch.tensor([5, 5, 2**33 + 1, -1, 5], device=choice.rows.device)
    return ChosenDropout(streams, choice.rows, steps, rows, first=70_001)


@pytest.mark.parametrize("kind", ["alone", "chosen", "own"])
def test_dropout_is_that_of_its_definition(kind: str, device: torch.device) -> None:
    """Rows of the dropout differ from those of the choice; tiles span them; columns end within 8; parts of rows run."""
    dtype, m, i = torch.bfloat16, 105, 100
    choice, rank = (None, 8) if kind == "alone" else (choice_of(device), sum(RANKS))
    dropout: Dropout | ChosenDropout = dropout_of(device, [5, 2**33 + 1, -1])._replace(first=70_001)
    if kind == "own":
        dropout = own_dropout_of(choice)
    x, a, *_ = operands((m, i, 8, rank), dtype, device).values()
    compact = normal(m, 8, dtype=dtype, device=device, seed=9)
    wide = compact if choice is None else expand(compact, choice)
    mask = dropped(dropout, m, i)
    dx = skinny_up(compact, a.T, choice=choice, dropout=dropout)
    whole = skinny_up(compact, a.T, choice=choice)
    assert torch.equal(dx, whole.masked_fill(mask, 0))
    # An input that only the mask can hide: a single wrong element would show.
    loud = torch.where(mask, 1e4, x.float()).to(dtype)
    for op in (
        functools.partial(skinny_down, a=a, choice=choice, dropout=dropout),
        functools.partial(skinny_grad, compact, choice=choice, dropout=dropout),
    ):
        assert torch.equal(op(x=x), op(x=loud))
    xa = skinny_down(x, a, choice=choice, dropout=dropout)
    exact = seen(x, dropout) @ a.double().T
    if choice is None:
        assert_sum_close(xa, exact)
    else:
        assert_sum_close(expand(xa, choice), expand(torch.ones_like(compact), choice).double() * exact)
    assert_sum_close(skinny_grad(compact, x, choice=choice, dropout=dropout), wide.double().T @ seen(x, dropout))


def test_operands_may_be_slices(device: torch.device) -> None:
    """A group's xa is split into the columns of each linear; a batch's rows into micro-batches."""
    x, a, b, dy, xa, _ = operands((40, 96, 80, 48), torch.bfloat16, device).values()
    part = slice(16, 32)
    for sliced, copied in (
        (skinny_up(xa[:, part], b[:, part]), skinny_up(xa[:, part].contiguous(), b[:, part].contiguous())),
        (skinny_grad(xa[:, part], x), skinny_grad(xa[:, part].contiguous(), x)),
        (skinny_down(x[3:, 5:70], a[:, 5:70]), skinny_down(x[3:, 5:70].contiguous(), a[:, 5:70].contiguous())),
        (skinny_dy(dy.T.contiguous().T, b, xa, scale=1.0)[1], skinny_dy(dy, b, xa, scale=1.0)[1]),
    ):
        assert torch.equal(sliced, copied)


def test_the_same_inputs_give_the_same_bits(triton_device: torch.device) -> None:
    """Also where the sums are split: 16 rows of 1,024 columns, 300 rows of 64."""
    x, a, b, dy, xa, _ = operands((16, 1024, 1024, 16), torch.bfloat16, triton_device).values()
    tall, left = (
        operands((300, 64, 64, 16), torch.bfloat16, triton_device)["x"],
        normal(300, 16, dtype=torch.bfloat16, device=triton_device, seed=9),
    )

    def results() -> list[Tensor]:
        return [skinny_down(x, a), skinny_up(xa, b), *skinny_dy(dy, b, xa, scale=0.3), skinny_grad(left, tall)]

    for first, second in zip(results(), results(), strict=True):
        assert torch.equal(first, second)
    assert_sum_close(skinny_down(x, a), x.double() @ a.double().T)
    assert_sum_close(skinny_dy(dy, b, xa, scale=0.3)[0], dy.double() @ b.double())


def test_the_order_in_which_programs_end_changes_no_bit(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program adds the parts: of 9 stripes by groups of 8, of several splits, of rows that choose."""
    choice, m = choice_of(triton_device), 2100
    tall = operands((m, 300, 260, 16), torch.bfloat16, triton_device)
    chosen = operands((m, 300, 260, sum(RANKS)), torch.bfloat16, triton_device)
    compact = normal(m, max(RANKS), dtype=torch.bfloat16, device=triton_device, seed=9)

    def results() -> list[Tensor]:
        x, a, b, dy, xa, _ = tall.values()
        return [
            *(skinny_down(x[:40], a), *skinny_dy(dy, b, xa, scale=0.3), skinny_grad(xa, x)),
            *skinny_dy(dy, chosen["b"], compact, scale=0.3, choice=choice),
            skinny_grad(compact, x, choice=choice),
        ]

    first = results()
    assert_sum_close(first[2], 0.3 * (tall["dy"].double().T @ tall["xa"].double()))
    if triton_device.type == "cpu":
        builder = interpreter.interpreter_builder
        start = builder.set_grid_idx

        def from_the_end(*index: int) -> None:
            start(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", from_the_end)
    for one, other in zip(first, results(), strict=True):
        assert torch.equal(one, other)
    assert not counters(triton_device, 1).any(), "a counter is not 0 for the next launch"
