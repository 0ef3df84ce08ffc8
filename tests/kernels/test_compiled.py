"""train.compile: a decoder and its head compute what they did, and keep what is calculated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.checkpoint.saver import environment
from distlora.config import Config, UserError
from distlora.config.file import build
from distlora.derive.probes import probe
from distlora.derive.prove import move_adapters_off_start
from distlora.derive.shrink import shrink
from distlora.model import fused_modules
from distlora.model.attention import Documents
from distlora.model.build import CausalLM
from distlora.model.fused_modules import FusedRMSNorm
from distlora.model.lm_head import LossForm
from distlora.model.mlp import place_mlps
from distlora.parallel import Ranks
from distlora.planner.decoder_sizes import fused_parts
from distlora.planner.workload import Workload
from distlora.post.load_trained import load_trained
from distlora.post.trained import of_run
from distlora.training.compile_choice import decide_compile, record
from distlora.training.setup import start_run_model
from distlora_kernels import attention as compiled_attention
from distlora_kernels import lora_native, native, products
from distlora_kernels.formats import nf4
from distlora_kernels.lora_linear import Adapter, FrozenWeight, Linear, lora_linears
from distlora_kernels.operands import Needs, SavedLinear
from distlora_launcher.compose.checks import check_compiled_before, check_machine
from support import cpu_paths, family_models, model_types
from support.closeness import relative_error
from support.family_models import config_for, load_ours, tokens, write_family_folder
from support.fused_model import ONE_EACH, PARTIAL_ROTARY, run
from support.tiers import ci
from support.worlds import World

needs_compiler = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"not compiled: {native.unavailable_reason()}"
)
pytestmark = pytest.mark.usefixtures("compiler")
ALONE = Ranks(0, 1, torch.device("cpu"), None)
DORA = {"r": 4, "use_dora": True, "target_modules": "all-linear"}


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        *(ci(name) for name in (*ONE_EACH, PARTIAL_ROTARY) if name != "gemma2"),
    ],
)
def test_a_decoder_that_is_compiled_computes_what_it_did(name: str, tmp_path: Path) -> None:
    write_family_folder(tmp_path, name)
    # With and without recomputation: what writes over its input may be computed anew.
    train = {"dtype": "fp32", "checkpointing": "block" if name in ("llama-biases", "gemma2") else "none"}
    input_ids = tokens(2, 24)
    model, _ = load_ours(tmp_path, ALONE, train=train)
    expected_losses, expected = run(model, input_ids)
    before = dict(model.named_parameters())
    said = fused_modules.use_own(model.decoder, model.architecture, model.head, is_gpu=False)
    for block in model.blocks:
        block.remakes = not block.checkpointing
    gated = "GEGLU" if name.startswith("gemma") else "SwiGLU"
    norms = {"gemma2": 13, "gemma3": 19, "gemma3-text": 19, "qwen3": 13}.get(name, 7)
    assert f"RMSNorm ({norms}), {gated} (3), rotary embedding" in said
    assert said.endswith("cross-entropy") == (model.head.logit_softcap is None)
    assert all(before[path] is parameter for path, parameter in model.named_parameters())
    check(model, input_ids, expected_losses, expected)
    if name in ("gemma2", "phi3"):
        place_mlps(model.blocks, model.architecture, tile=7)
        check(model, input_ids, expected_losses, expected)


def check(model: CausalLM, input_ids: Tensor, expected_losses: Tensor, expected: list[Tensor]) -> None:
    """Compare within the bounds of test_fused_modules.py: the order of sums and the last bit of exp."""
    losses, gradients = run(model, input_ids)
    assert relative_error(losses, expected_losses) <= 1e-6
    for actual, gradient in zip(gradients, expected, strict=True):
        assert relative_error(actual, gradient) <= 3e-6


@needs_compiler
@pytest.mark.parametrize("name", [ci("llama"), "qwen3"])
def test_documents_are_attended_to_by_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors against fp32 are below those of what it takes the place of, however the blocks are recomputed."""
    stem, settings = family_models.VARIANTS[name]
    monkeypatch.setitem(family_models.VARIANTS, name, (stem, settings | {"head_dim": 32}))
    write_family_folder(tmp_path, name)
    input_ids, positions = tokens(2, 90), torch.cat([torch.arange(50), torch.arange(40)]).expand(2, -1)

    def found(**train: object) -> tuple[CausalLM, Tensor]:
        model, _ = load_ours(tmp_path, ALONE, quant={"method": "none"}, train=train)
        documents = Documents.of(positions) if train["dtype"] == "bf16" else None
        losses = model(input_ids, positions, input_ids.roll(-1, dims=1), documents=documents)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.sum() / input_ids.numel(), parameters)
        return model, torch.cat([losses.detach(), *(gradient.flatten() for gradient in gradients)])

    (_, exact), (_, plain) = found(dtype="fp32"), found(dtype="bf16")
    recomputed = []
    for checkpointing in ("none", "block", "selective"):
        model, own = found(dtype="bf16", compile=True, checkpointing=checkpointing)
        compiles = compiled_attention.unsupported_reason(2, 32) is None
        assert any("compiled for this processor" in note for note in model.notes if "attention" in note) == compiles
        # A row's loss is one rounded sum, so of the two losses either may be nearer by chance.
        assert relative_error(own[2:], exact[2:]) <= 1.1 * relative_error(plain[2:], exact[2:])
        assert relative_error(own[:2], exact[:2]) <= 2**-11
        recomputed.append(own)
    assert all(torch.equal(first, own) for first in recomputed)


@needs_compiler
def test_an_adapter_at_its_start_is_its_reference_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO's first loss is ln 2, and KTO's 0.5: the reference is computed as the policy is."""
    stem, settings = family_models.VARIANTS["llama"]
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    monkeypatch.setitem(family_models.VARIANTS, "llama", (stem, settings | sizes | {"head_dim": 64}))
    write_family_folder(tmp_path, "llama")
    config = config_for(tmp_path, train={"dtype": "bf16", "compile": True})
    model, _, _ = start_run_model(config, ALONE)
    input_ids, positions = tokens(2, 90), torch.cat([torch.arange(50), torch.arange(40)]).expand(2, -1)

    def found() -> Tensor:
        labels, documents = input_ids.roll(-1, dims=1), Documents.of(positions)
        return model(input_ids, positions, labels, documents=documents, losses=LossForm(with_reference=True)).detach()

    first = found()
    assert torch.equal(first[0], first[1])
    move_adapters_off_start(model)
    moved = found()
    assert torch.equal(moved[1], first[1])
    assert not torch.equal(moved[0], moved[1])


@needs_compiler
def test_saved_inputs_of_linears_are_not_overwritten(tmp_path: Path) -> None:
    write_family_folder(tmp_path, "llama")
    train = {"dtype": "fp32", "checkpointing": "none"}
    input_ids = tokens(2, 24)
    model, _ = load_ours(tmp_path, ALONE, train=train, adapter=DORA)
    losses, gradients = run(model, input_ids)
    model, _ = load_ours(tmp_path, ALONE, train=train | {"compile": True}, adapter=DORA)
    assert "DoRA's gradients read" in model.notes[-1]
    check(model, input_ids, losses, gradients)


@needs_compiler
def test_a_compiled_run_loads_without_a_compiler_and_with_transformers_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family_folder(tmp_path, "llama")
    load_ours(tmp_path, ALONE, train={"dtype": "fp32", "compile": True})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    with pytest.raises(UserError, match=r"no C\+\+ compiler .* or set train.compile=false"):
        fused_modules.require_compiled()
    again, _ = load_trained(
        of_run(
            config_of(
                train={"compile": True}, model={"path": str(tmp_path)}, data={"path": "d", "sequence_length": 64}
            ),
            None,
        ),
        ALONE,
    )
    fused = [
        name for name, module in again.named_modules() if isinstance(module, FusedRMSNorm) or "forward" in vars(module)
    ]
    assert fused == ["decoder"]  # Its own masks ask the host; its norms and layers are the modules of transformers.


@needs_compiler
def test_models_of_one_process_do_not_change_each_other(tmp_path: Path) -> None:
    """Whichever was built first: whether a model may be compiled, and every bit of its losses."""
    compiled, input_ids = {"llama": True, "qwen3": True, "llama, not compiled": False}, tokens(2, 24)
    losses: dict[str, set[str]] = {name: set() for name in compiled}
    for name in ("llama", "qwen3"):
        write_family_folder(tmp_path / name, name)
    for order in (list(compiled), list(reversed(compiled))):
        models = {}
        for name in order:
            train = {"dtype": "fp32", "compile": compiled[name]}
            models[name], _ = load_ours(tmp_path / name.partition(",")[0], ALONE, train=train)
            for kind in ("llama", "qwen3"):
                assert probe(shrink(model_types.config_of(kind)), kind).compilable
        products.use(False)  # Of the process: each start sets it.
        for name, model in models.items():
            losses[name].add(str(run(model, input_ids)[0].tolist()))
    assert all(len(found) == 1 for found in losses.values()), losses


def config_of(**settings: object) -> Config:
    return build(Config, {"model": {"path": "m"}, "data": {"path": "d"}, "run_dir": "r"} | settings)


def test_a_node_that_cannot_compile_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of(train={"compile": True})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for gpus, reason in (
        ("", r"no C\+\+ compiler .* set train.compile=false"),
        ("0", "is for the CPU, and this node has"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        with pytest.raises(UserError, match=reason):
            check_machine(config.cluster, config.parallel, config.quant, config.optim, config.train)


@pytest.fixture(params=cpu_paths.each_path())
def native_linears(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turn on the compiled products of adapted linears, on each path of this processor."""
    for _ in cpu_paths.used(request.param):
        if (reason := fused_modules.why_not_compiled()) is not None:
            pytest.skip(reason)
        products.use(True)
        yield


def frozen(kind: str, out: int, features: int) -> FrozenWeight:
    """Return a random weight: dense, NF4, or NF4 with plain absmax."""
    weight = torch.randn(out, features) * 0.02
    if kind == "dense":
        return FrozenWeight((weight.bfloat16(),), (out, features))
    if kind == "absmax":
        return FrozenWeight(nf4.quantize_blocks(weight.flatten()), (out, features), nf4.NF4_ABSMAX)
    return FrozenWeight(nf4.nf4_quantize(weight), (out, features), nf4.NF4)


@pytest.mark.parametrize("kind", ["nf4", "absmax", "dense"])
@pytest.mark.parametrize(("out", "features"), [(192, 128), (64, 2112), (64, 4160)])
def test_compiled_products_use_the_bits_of_the_weight(native_linears: None, kind: str, out: int, features: int) -> None:
    linear = Linear(frozen(kind, out, features))
    expected = linear.weight.dense(torch.bfloat16)
    ones = [torch.eye(size, dtype=torch.bfloat16) for size in (features, out)]
    (y,), _ = lora_native.forward(ones[0], [linear], [None], with_backward=False)
    assert torch.equal(y.T, expected)
    needs = Needs(True, (False,), (False,), (False,))
    gradients = lora_native.backward(None, [linear], [SavedLinear()], [ones[1]], needs)
    assert torch.equal(gradients.x, expected)


def test_compiled_linears_round_once(native_linears: None) -> None:
    """Outputs and the gradient of the input are as near to fp64 as one rounding; a row's bits are its own."""
    torch.manual_seed(0)
    shapes = [(192, True), (64, False), (128, False)]
    masters = [(torch.randn(6, 128).bfloat16().float(), torch.randn(out, 6).bfloat16().float()) for out, _ in shapes]
    linears = [
        Linear(frozen("nf4", out, 128), Adapter(a, b, 0.5), torch.randn(out).bfloat16() if bias else None)
        for (out, bias), (a, b) in zip(shapes, masters, strict=True)
    ]
    x = torch.randn(133, 128, dtype=torch.bfloat16, requires_grad=True)
    for a, b in masters:
        a.requires_grad_(), b.requires_grad_()
    assert lora_native.covers(x, linears)
    ys = lora_linears(x, linears)
    dys = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, dys)
    total = torch.zeros(133, 128, dtype=torch.float64)
    for (weight, adapter, bias), y, dy in zip(linears, ys, dys, strict=True):
        dense, a, b = weight.dense(torch.bfloat16).double(), adapter.a.detach(), adapter.b.detach()
        gated = (x.detach() @ a.bfloat16().T) * 0.5
        expected = (
            x.detach().double() @ dense.T + gated.double() @ b.double().T + (0 if bias is None else bias.double())
        )
        assert relative_error(y.detach(), expected) <= 0.5 * 2**-8
        dxa = (dy @ b.bfloat16()) * 0.5
        total += dy.double() @ dense + dxa.double() @ a.double()
        assert relative_error(adapter.a.grad, dxa.double().T @ x.detach().double()) <= 0.5 * 2**-8
        assert relative_error(adapter.b.grad, dy.double().T @ gated.double()) <= 0.5 * 2**-8
    assert relative_error(x.grad, total) <= 0.5 * 2**-8
    for part, y in zip(lora_linears(x[5:12].detach(), linears), ys, strict=True):
        assert torch.equal(part, y[5:12])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            again = lora_linears(x, linears)
            gradients = torch.autograd.grad(again, x, dys)
            assert all(map(torch.equal, (*again, *gradients), (*ys, x.grad)))
    finally:
        torch.set_num_threads(threads)


def out_of_memory() -> None:
    raise MemoryError("`g++` was killed")


def one_cannot(ranks: Ranks, *, folder: Path) -> tuple[object, list[str]]:
    """Decide where rank 1 cannot compile. Return (train.compile, lines), or (None, [error])."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_modules, "why_not_compiled", lambda: "it broke" if ranks.rank == 1 else None)
        try:
            config, lines = decide_compile(config_of(model={"path": str(folder)}), ranks, folder=folder)
        except UserError as error:
            return None, [str(error)]
    return config.train.compile, lines


@needs_compiler
def test_auto_is_decided_once_and_a_resume_keeps_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on, off, mixed, experts = (tmp_path / name for name in ("on", "off", "mixed", "experts"))
    for folder in (on, off, mixed):
        write_family_folder(folder, "llama")
    write_family_folder(experts, "mixtral")

    def outcome(folder: Path, device: str = "cpu", **settings: object) -> tuple[object, str]:
        config = config_of(model={"path": str(folder)}, **settings)
        assert config.train.compile == "auto"
        config, lines = decide_compile(config, Ranks(0, 1, torch.device(device), None), folder=folder)
        return config.train.compile, "".join(lines)

    assert outcome(on) == outcome(on) == (True, "")
    assert environment(1, ALONE.device, compiles=True).keys() > {"compiler", "processor"}
    assert outcome(experts) == (
        False,
        "train.compile=auto is off: mixtral computes other norms, MLPs or rotary embeddings than what is compiled",
    )
    full = {"adapter": {"method": "full"}, "quant": {"method": "none"}}
    assert "adapter=full trains the scales" in outcome(tmp_path, **full)[1]
    (tmp_path / "gpu").mkdir()
    assert outcome(tmp_path / "gpu", device="meta") == (False, "")
    (first, lines), (second, _) = world.run(2, one_cannot, folder=mixed)
    assert (first, second) == (False, False)
    assert lines == ["train.compile=auto is off: rank 1 cannot compile (logs/rank_1.log)"]
    (_, [first]), (_, [second]) = world.run(2, one_cannot, folder=on)
    assert "was compiled at its first start (train.compile=auto), and this node cannot: rank 1 cannot" in first
    assert "this node cannot: it broke. Continue it on a node that can" in second
    with pytest.raises(UserError, match=r"auto is false for this group of trials, but was not .*distlora resume"):
        record(on, ALONE, compiles=False)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", out_of_memory)
        (tmp_path / "small").mkdir()
        write_family_folder(tmp_path / "small", "llama")
        assert outcome(tmp_path / "small") == (False, "train.compile=auto is off: `g++` was killed")

    with monkeypatch.context() as patch:
        patch.setenv("CXX", "missing")
        patch.setattr(native, "_library", native._library.__wrapped__)
        compiles, line = outcome(off)
        assert (compiles, "CXX=missing is not a program; set CXX to a C++ compiler" in line) == (False, True)
        with pytest.raises(
            UserError, match=r"compiled at its first start .*this node cannot: CXX=missing.* set train.compile to"
        ):
            outcome(on)
        with pytest.raises(UserError, match=r"compiled at its first start.*CXX=missing.* set train.compile to false"):
            check_compiled_before(on)
        check_compiled_before(off)
    assert outcome(off) == (False, "train.compile=auto is off, as at this run's first start")
    check_compiled_before(on)


def test_the_plan_has_the_compiler_of_this_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_family_folder(tmp_path, "llama")
    architecture = architecture_of(read_config(tmp_path), tmp_path)

    def plans(compile: object) -> bool:
        work = Workload.of(config_of(train={"compile": compile}))
        return fused_parts(work, architecture, is_gpu=False) == {"norms", "mlps", "rotary", "loss"}

    with_one = native.unavailable_reason() is None
    assert (plans("auto"), plans(True), plans(False)) == (with_one, True, False)
    monkeypatch.setenv("CXX", "missing")
    assert not plans("auto")
