"""Products on each path of the CPU: one rounding away from fp64, compiled or not, and a run that keeps its path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distlora.config import UserError
from distlora.model.fused_modules import why_not_compiled
from distlora.parallel import Ranks
from distlora.run_folder.layout import COMPILED_NAME, path_before
from distlora.training.compile_choice import decide_compile
from distlora_kernels import attention, decode, processor, products
from distlora_kernels.formats import nf4
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, lora_linears
from distlora_launcher.cli.main import run_command
from support import cpu_paths
from support.closeness import relative_error
from support.small_models import config_with

ALONE = Ranks(0, 1, torch.device("cpu"), None)
ROUNDING = 2**-8
"""Most that a number changes when it is rounded to bf16, relative to it."""
SHAPES = [
    (1, 1, 1),
    (5, 7, 3),
    (130, 576, 192),
    (17, 64, 499),
    (33, 499, 64),
    (40, 1100, 1050),
    (1030, 20, 6),
    (3, 9001, 5),
]
"""Rows, summed elements, columns: odd ones, a prime vocabulary, and more than a block of each."""

pytestmark = pytest.mark.skipif(not cpu_paths.HERE, reason="this processor has no AVX2")


@pytest.fixture(params=cpu_paths.each_path())
def cpu_path(request: pytest.FixtureRequest, compiler: None) -> Iterator[str]:
    yield from cpu_paths.used(request.param)


def use_compiled(compiled: bool) -> None:
    if compiled and (reason := why_not_compiled()) is not None:
        pytest.skip(reason)
    products.use(compiled)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "by torch"])
def test_a_product_is_rounded_once(cpu_path: str, compiled: bool) -> None:
    """Whatever its operands' order in memory, and what is added; `out` may be what is added."""
    use_compiled(compiled)
    torch.manual_seed(0)
    for (m, k, n), left_turned, right_turned in itertools.product(SHAPES, (False, True), (False, True)):
        left = torch.randn(k, m).bfloat16().T if left_turned else torch.randn(m, k + 3).bfloat16()[:, :k]
        right = torch.randn(n, k).bfloat16().T if right_turned else torch.randn(k, n).bfloat16()
        whole, out = torch.randn(m, n).bfloat16(), torch.randn(m, n + 3).bfloat16()[:, :n]
        cases: list[tuple[Tensor | None, Tensor | None]] = [(None, None), (whole[0], None), (whole, out), (out, out)]
        for add, into in cases:
            expected = 0.5 * (left.double() @ right.double()) + (0 if add is None else add.double())
            result = products.product(left, right, add=add, factor=0.5, out=into)
            assert into is None or result is into
            assert relative_error(result, expected) <= ROUNDING, (m, k, n, left_turned, right_turned)


def test_no_sum_is_zero_and_no_row_is_no_work(cpu_path: str) -> None:
    for compiled in (False, why_not_compiled() is None):
        products.use(compiled)
        nothing, bias = torch.empty(3, 0).bfloat16(), torch.ones(4).bfloat16()
        assert torch.equal(products.product(nothing, nothing.new_empty(0, 4)), torch.zeros(3, 4).bfloat16())
        assert torch.equal(products.product(nothing, nothing.new_empty(0, 4), add=bias), torch.ones(3, 4).bfloat16())
        assert products.product(nothing.T, torch.ones(3, 4).bfloat16()).shape == (0, 4)


def test_a_batch_and_a_linear_with_its_gradients(cpu_path: str) -> None:
    use_compiled(why_not_compiled() is None)
    left, right = torch.randn(3, 40, 20).bfloat16(), torch.randn(3, 20, 30).bfloat16()
    assert relative_error(products.product(left, right), left.double() @ right.double()) <= ROUNDING
    x, weight, bias = (torch.randn(*shape).bfloat16().requires_grad_() for shape in ((2, 9, 20), (31, 20), (31,)))
    dy = torch.randn(2, 9, 31).bfloat16()
    y = products.linear(x, weight, bias)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.linear(*exact)
    for actual, wanted in zip(
        (y, *torch.autograd.grad(y, (x, weight, bias), dy)),
        (expected, *torch.autograd.grad(expected, exact, dy.double())),
        strict=True,
    ):
        assert relative_error(actual.detach(), wanted.detach()) <= ROUNDING


def test_paths_agree_to_their_roundings(compiler: None) -> None:
    """Adapted linears on NF4 and attention, forward and gradients: a rounding of inputs to each product apart."""
    found = {}
    for path in cpu_paths.HERE:
        for _ in cpu_paths.used(path):
            use_compiled(True)
            found[path] = [tensor.float() for tensor in computed()]
    first, *others = found.values()
    for other in others:
        assert max(map(relative_error, other, first)) <= 2**-7


def computed() -> list[Tensor]:
    torch.manual_seed(0)
    weight = FrozenWeight(nf4.nf4_quantize(torch.randn(192, 128) * 0.05), (192, 128), nf4.NF4)
    a, b = torch.randn(6, 128, requires_grad=True), torch.randn(192, 6, requires_grad=True)
    x = torch.randn(131, 128).bfloat16().requires_grad_()
    (y,) = lora_linears(x, (Linear(weight, Adapter(a, b, 0.5), None),))
    query, key, value = y.detach().view(131, 3, 4, 16).unbind(1)
    leaves = [tensor.contiguous().requires_grad_() for tensor in (query, key[:, :2], value[:, :2])]
    mixed = attention.attend(*leaves, torch.tensor([0, 50, 131]), 81, 0.25, None)
    gradients = torch.autograd.grad(y, (x, a, b), torch.randn_like(y))
    return [y.detach(), mixed.detach(), *gradients, *torch.autograd.grad(mixed, leaves, torch.randn_like(mixed))]


def test_products_and_attention_are_torchs_on_the_generic_path(compiler: None) -> None:
    """A run of an earlier version on AVX-512 without BF16 goes on with its bits so."""
    for _ in cpu_paths.used("generic"):
        use_compiled(True)
        assert not products.is_used()
        assert attention.unsupported_reason(4, 64) == "the path generic has no compiled attention"
        assert not decode.available()


def test_a_run_keeps_its_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_with({}, {"train": {"compile": False}, "model": {"path": "m"}, "data": {"path": "d"}})
    monkeypatch.setenv(processor.VARIABLE, cpu_paths.HERE[-1])
    assert decide_compile(config, ALONE, folder=tmp_path) == (config, [])
    monkeypatch.setenv(processor.VARIABLE, "generic")
    assert decide_compile(config, ALONE, folder=tmp_path) == (config, [])
    assert processor.path() == path_before(tmp_path) == cpu_paths.HERE[-1]
    monkeypatch.setattr(processor, "is_supported", lambda path: path == "generic")
    _, (line,) = decide_compile(config, ALONE, folder=tmp_path)
    assert f"CPU path changed from {cpu_paths.HERE[-1]} to generic: a processor of this run does not" in line
    assert processor.path() == "generic"
    assert path_before(tmp_path) == cpu_paths.HERE[-1]  # Where it can, it goes on as it began.
    (tmp_path / COMPILED_NAME).write_text('{"path": "sve"}')
    with pytest.raises(UserError, match=r"compiled.json has path=sve, which this version of distlora does not know"):
        path_before(tmp_path)
    processor.use(None)


def test_a_run_that_recorded_no_path_goes_on_as_it_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert path_before(tmp_path) is None
    (tmp_path / COMPILED_NAME).write_text('{"train.compile": true}')
    for path in ("amx", "avx512_bf16", "generic"):
        supported = {path, "generic", "avx512", "avx2"}
        monkeypatch.setattr(processor, "is_supported", supported.__contains__)
        assert path_before(tmp_path) == path


def test_doctor_describes_the_node_on_one_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(processor.VARIABLE, cpu_paths.HERE[-1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_command(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 20
    for part in (
        f"CPU path    {cpu_paths.HERE[-1]}: {processor.DESCRIPTIONS[cpu_paths.HERE[-1]]}",
        f"torch {torch.__version__}",
        "GPUs        none",
        "compiler    none: CXX=none-in-tests is not a program",
        "faster with a C++ compiler",
        f"faster with {processor.VARIABLE} unset, which overrides",
    ):
        assert part in shown
    monkeypatch.setenv(processor.VARIABLE, "sve")
    with pytest.raises(UserError, match=r"DISTLORA_CPU_PATH=sve is not a path of this processor; unset it or use"):
        run_command(["doctor"])
    train = ["train", "model.path=none", "data.path=none.jsonl"]
    with pytest.raises(UserError, match="DISTLORA_CPU_PATH=sve"):
        run_command(train)
