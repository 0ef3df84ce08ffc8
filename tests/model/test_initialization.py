"""Initialize adapters from the base's weights (PiSSA, LoftQ), the same on any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from distlora.config import Config, UserError
from distlora.config.file import load_config
from distlora.loading import decomposed_adapters
from distlora.loading.peft_format import adapter_tensors
from distlora.model.build import CausalLM
from distlora.parallel import Ranks, watch
from distlora.post.load_trained import load_trained
from distlora.post.trained import find_weights, of_run
from distlora.system import randomness
from distlora.training import worker
from distlora.training.setup import StartOptions, start_run_model
from distlora.weights.decompose import LowRankFactors, Sketch, principal_part
from distlora.weights.initial_adapter_file import INITIAL_ADAPTER_NAME
from distlora.weights.peft_folder import read_peft_adapter
from distlora_launcher.cli.main import main
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import compose_config
from support.closeness import assert_same_run, relative_error
from support.family_models import SINGLE, config_for, dequantized, our_logits, tokens, write_family_folder
from support.runs import run_until
from support.small_models import make_run, write_model_folder, write_text_file
from support.worlds import World

PROBE = tokens(2, 40)
SETTINGS = {"max_steps": 4, "save_every": 2, "log_every": 1, "global_batch": 6}


def weight_of(out_features: int, in_features: int, *, decay: float = 0.0) -> Tensor:
    """Return a random weight; with `decay` its k-th singular value is about (1 + k)^-decay."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(out_features))
    if decay:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight = left @ torch.diag((1.0 + torch.arange(len(values))) ** -decay) @ right
    return weight


def product(start: LowRankFactors, scaling: float) -> Tensor:
    return scaling * start.B.double() @ start.A.double()


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)], ids=str)
def test_subspace_iterations_equal_torch_svd_lowrank(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rank = weight_of(*shape, decay=0.5), 6
    drawn = randomness.normal((60, rank), seed=3, name="linear.sketch")
    monkeypatch.setattr(torch, "randn", lambda *size, dtype, device: drawn.to(dtype).reshape(size))
    left, values, right = torch.svd_lowrank(weight, rank, niter=2)
    theirs = left @ torch.diag(values) @ right.T
    monkeypatch.undo()
    ours = principal_part(weight, rank, scaling=1.0, sketch=Sketch(3, "linear.sketch", 2))
    exact = product(principal_part(weight, rank, scaling=1.0), 1.0)
    # Their QR and products are in fp32.
    assert relative_error(product(ours, 1.0), theirs) < 1e-5
    assert 1e-3 < relative_error(product(ours, 1.0), exact) < 0.5, "a sketch of two iterations, not the exact part"
    many = principal_part(weight, rank, scaling=1.0, sketch=Sketch(3, "linear.sketch", 200))
    assert relative_error(product(many, 1.0), exact) < 1e-5


def started(
    ranks: Ranks, *, run_dir: Path, boundary: watch.Marker = watch.at
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, int]]]:
    """Return the initial A and B, and this rank's rows of the base."""
    model, backend, _ = start_run_model(load_config(run_dir), ranks, StartOptions(boundary=boundary))
    base = {
        name: (local.clone(), first)
        for name, parameter in model.named_parameters()
        if ".adapters." not in name
        for local, first in [backend.local_rows(parameter)]
    }
    base |= {name: (buffer.clone(), 0) for name, buffer in model.named_buffers() if name.endswith("offset")}
    return {name: parameter.detach().clone() for name, parameter in adapter_tensors(model).items()}, base


@pytest.mark.parametrize(
    ("init", "method"),
    [
        ("pissa", "nf4"),
        ("loftq", "nf4"),
        pytest.param("pissa_niter_2", "none", marks=pytest.mark.ci),
    ],
)
def test_any_world_size_has_the_same_adapters_and_base(
    world: World, folders: Path, tmp_path: Path, init: str, method: str
) -> None:
    adapter = {"init": init, "rank_pattern": {"k_proj": 3, "down_proj": 11}, "alpha_pattern": {"o_proj": 5.0}}
    reference: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    for size in (1, 3):
        run_dir = tmp_path / str(size)
        make_run(run_dir, folders, adapter={"target_modules": "all-linear", **adapter}, quant={"method": method})
        by_rank = world.run(size, started, run_dir=run_dir)
        stored = safetensors.torch.load_file(run_dir / INITIAL_ADAPTER_NAME)
        whole = {}
        for name, (part, _) in by_rank[0][1].items():
            whole[name] = part if part.dim() == 0 else torch.cat([base[name][0] for _, base in by_rank])
        for adapters, base in by_rank:
            assert all(torch.equal(tensor, stored[name]) for name, tensor in adapters.items())
            assert all(torch.equal(base[name][0], whole[name]) for name in base if name.endswith("offset"))
        reference = reference or (stored, whole)
        assert stored.keys() == reference[0].keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in reference[0].items())
        assert all(torch.equal(whole[name], tensor) for name, tensor in reference[1].items())


def peft_model(folder: Path, config: Config, init: str) -> Any:
    """Return PEFT's model with the same settings, on the Hugging Face model of the folder."""
    adapter = config.adapter
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=init,  # type: ignore[arg-type]
        target_modules="all-linear",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]
        use_rslora=adapter.use_rslora,
    )
    return peft.get_peft_model(base, settings)


def test_pissa_on_an_unquantized_base_equals_peft(folders: Path, tmp_path: Path) -> None:
    """Compare the residual base, s B A, the logits and the gradients; signs of singular vectors are arbitrary."""
    adapter = {"init": "pissa", "use_rslora": True, "r": 4, "lora_alpha": 6.0}
    config = make_run(tmp_path / "run", folders, adapter=adapter, quant={"method": "none"})
    ours, _, _ = start_run_model(config, SINGLE)
    theirs = peft_model(folders / "llama", config, "pissa")
    labels = torch.cat([PROBE[:, 1:], torch.full((2, 1), -100)], dim=1)
    loss = ours(PROBE, torch.arange(40).expand_as(PROBE), labels).sum() / (labels >= 0).sum()
    loss.backward()
    expected = theirs(input_ids=PROBE, labels=PROBE)
    expected.loss.backward()
    assert abs(loss.item() - expected.loss.item()) < 1e-5
    assert (our_logits(ours, PROBE) - expected.logits).abs().max() <= 1e-4
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32)
    for path, linear in ours.adapted_linears():
        peer = theirs.get_submodule(f"base_model.model.{path}")
        (pair,), their_a, their_b = linear.pairs, peer.lora_A["default"].weight, peer.lora_B["default"].weight
        assert pair.scaling == peer.scaling["default"]
        # Their SVD in fp32 turns singular vectors by eps * largest / gap (Wedin); ours is exact to fp32.
        weight = plain.get_parameter(f"{path}.weight").detach()
        values = torch.linalg.svdvals(weight.double())
        turned = 8 * torch.finfo(torch.float32).eps * float(values[0] / -values[:5].diff().max())
        assert turned < 1e-3
        assert relative_error(linear.weight, peer.base_layer.weight) < turned
        assert relative_error(pair.B @ pair.A, their_b @ their_a) < turned
        whole = linear.weight.double() + product(LowRankFactors(pair.A, pair.B), pair.scaling)
        assert relative_error(whole, weight) < 2 * torch.finfo(torch.float32).eps
        sign = (pair.A * their_a).sum(dim=1).sign()
        assert relative_error(sign[:, None] * pair.A, their_a) < turned
        assert relative_error(sign[:, None] * pair.A.grad, their_a.grad) < 1e-4
        assert relative_error(sign * pair.B.grad, their_b.grad) < 1e-4


@pytest.mark.parametrize("name", ["gemma3-untied", "gpt-oss"])
def test_initial_adapter_comes_from_the_weight_in_every_family(tmp_path: Path, name: str) -> None:
    """Check renamed tensors, fused linears, biases and attention beside experts, on a bf16 base."""
    write_family_folder(tmp_path / name, name)
    adapter = {"init": "pissa", "r": 4, "target_modules": "attention"}
    sections = {"adapter": adapter, "quant": {"method": "none"}, "train": {"dtype": "bf16"}}
    config = config_for(tmp_path / name, run_dir=str(tmp_path), **sections)
    ours, _, _ = start_run_model(config, SINGLE)
    weights = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
    eps = torch.finfo(torch.bfloat16).eps
    for path, linear in ours.adapted_linears():
        (pair,), weight = linear.pairs, weights.get_parameter(f"{path}.weight")
        assert linear.weight.dtype == torch.bfloat16
        start = product(LowRankFactors(pair.A, pair.B), pair.scaling).detach()
        assert start.norm() > 0.3 * weight.norm()
        assert relative_error(linear.weight.double() + start, weight) < eps
        assert relative_error(linear.weight, weight - start) < eps


def test_loftq_adds_the_quantization_error_back(folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "plain", folders)
    config = make_run(tmp_path / "run", folders, adapter={"init": "loftq", "alpha_pattern": {"up_proj": 3.0}})
    marks: list[str] = []

    def mark(step: int | None, phase: str, part: int | None = None, *, long: bool = False) -> None:
        marks.extend([phase] if long else [])

    _, plain = started(SINGLE, run_dir=tmp_path / "plain")
    _, base = started(SINGLE, run_dir=tmp_path / "run", boundary=mark)
    assert all(torch.equal(base[name][0], tensor) for name, (tensor, _) in plain.items())
    weights = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32)
    for path, linear in start_run_model(config, SINGLE)[0].adapted_linears():
        assert f"decomposing {path}" in marks, "the watch sees that a start moves, which may take hours"
        (pair,), weight = linear.pairs, weights.get_parameter(f"{path}.weight")
        error = (weight.detach() - linear.frozen_weight.dense(torch.float32)).double()
        values = torch.linalg.svdvals(error)
        rest = error - product(LowRankFactors(pair.A, pair.B), pair.scaling).detach()
        assert rest.norm() < error.norm()
        assert (rest.norm() - values[8:].norm()).abs() < 1e-6 * error.norm(), "and by as much as 8 ranks can"


@pytest.mark.ci
def test_loftq_adapter_belongs_to_the_nf4_base(tmp_path: Path) -> None:
    """Check that the model card loads that base, and that another run accepts the adapter only on it."""
    run_dir, out, folders = tmp_path / "run", tmp_path / "out", tmp_path
    # Rows are whole blocks: for others bitsandbytes' own CPU kernel is wrong (tests/kernels/test_nf4.py).
    write_model_folder(folders / "llama", "llama", hidden_size=128, intermediate_size=192, head_dim=32)
    write_text_file(folders / "text.jsonl")
    make_run(run_dir, folders, adapter={"init": "loftq"}, train=SETTINGS)
    worker.run(run_dir, SINGLE)
    words = ["push", str(run_dir), "org/name", "--base-model", "org/base"]
    for more, place in (["--checkpoint", "step_4"], out / "step"), ([], out / "result"):
        assert main([*words, *more, "--dry-run", str(place)]) == 0
        assert read_peft_adapter(place).settings["init_from_loftq"]
    card = (out / "result" / "README.md").read_text()
    assert "LoftQ's adapter began as a correction" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("org/base", str(folders / "llama")).replace("org/name", str(out / "result")), names)
    ours, _ = load_trained(of_run(load_config(run_dir), str(run_dir / "adapter")), SINGLE)
    with torch.no_grad():
        # Of a model in evaluation bitsandbytes computes in bf16 on a CPU.
        theirs, expected = names["model"].train()(PROBE).logits, our_logits(ours, PROBE)
        dense = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32)
        wrong = peft.PeftModel.from_pretrained(dense, out / "result")(PROBE).logits
    # In one block of 100 bitsandbytes rounds the absmax to the next entry (tests/kernels/test_nf4.py).
    assert (theirs - expected).norm() < 0.05 * (wrong - expected).norm(), "a base in 16 bits is another one"
    assert (theirs - expected).abs().max() < 2e-2

    published = str(run_dir / "adapter")
    paths = [f"model.path={folders / 'llama'}", f"data.path={folders / 'text.jsonl'}", f"adapter.init_from={published}"]
    with pytest.raises(UserError, match=r"init_from=.* started by LoftQ: .* quant=none loses nothing; set quant=nf4"):
        compose_config([*paths, "quant=none"])
    config = compose_config(paths)
    assert config.adapter.init_from_loftq
    plain = make_run(tmp_path / "plain", folders, quant={"method": "none"})
    for generates in (
        lambda: find_weights(tmp_path / "plain", plain, published, None),
        lambda: load_trained(of_run(plain, published, foreign=True), SINGLE),
    ):
        with pytest.raises(UserError, match=r"--adapter .* started by LoftQ"):
            generates()


def with_residual(run_dir: Path, folders: Path) -> tuple[CausalLM, transformers.PreTrainedModel]:
    """Return the trained model of a PiSSA run, and the Hugging Face model of its dequantized W_res + s B0 A0."""
    config = load_config(run_dir)
    ours, _ = load_trained(of_run(config, str(run_dir / "adapter")), SINGLE)
    base, start = (
        dequantized(folders / "llama", ours),
        decomposed_adapters.load_initial_factors(config.run_dir),
    )
    with torch.no_grad():
        for path, linear in ours.adapted_linears():
            a, b = (start[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            base.get_parameter(f"{path}.weight").add_(linear.pairs[0].scaling * b @ a)
    return ours, base


PATTERNS = {"rank_pattern": {"k_proj": 3, "down_proj": 6}, "alpha_pattern": {"o_proj": 5.0, "k_proj": 2.0}}


@pytest.mark.parametrize(
    ("init", "method", "rslora"),
    [("pissa", "nf4", True), pytest.param("pissa_niter_3", "none", False, marks=pytest.mark.ci)],
)
def test_pissa_publishes_a_plain_lora_for_the_unchanged_base(
    folders: Path, tmp_path: Path, init: str, method: str, rslora: bool
) -> None:
    adapter = {"init": init, "use_rslora": rslora, "r": 4, "lora_alpha": 8.0, **PATTERNS}
    quant = {"method": method}
    settings = {"max_steps": 4, "eval_every": 2, "save_every": 2, "load_best_at_end": True}
    run_dir = tmp_path / "run"
    make_run(run_dir, folders, adapter=adapter, quant=quant, train=settings, optim={"lr": 1e-2})
    worker.run(run_dir, SINGLE)
    read = peft.LoraConfig.from_pretrained(run_dir / "adapter")
    assert (read.r, read.use_rslora, read.init_lora_weights) == (8, rslora, True)
    assert read.rank_pattern == {"k_proj": 6, "down_proj": 12}
    ours, base = with_residual(run_dir, folders)
    bases = [base]
    if quant["method"] == "none":  # The dense base itself, to the rounding of W_res.
        bases.append(transformers.AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32))
    for base in bases:
        with torch.no_grad():
            plain = base(PROBE).logits
            tuned = peft.PeftModel.from_pretrained(base, run_dir / "adapter")
            for path, linear in ours.adapted_linears():
                scaling = tuned.get_submodule(f"base_model.model.{path}").scaling["default"]
                assert abs(scaling - linear.pairs[0].scaling) < 1e-14 * scaling
            difference = (tuned(PROBE).logits - our_logits(ours, PROBE)).abs().max()
            assert difference <= 1e-4, f"logits are {difference:.1e} apart"
            assert (tuned(PROBE).logits - plain).abs().max() > 1e-2, "the adapter does nothing, so this says nothing"

    # A checkpoint holds rank r, the best and the result rank 2r; all of the same step are the same model.
    summary = json.loads((run_dir / "summary.json").read_text())
    assert "initial_eval_loss" in summary
    assert "base_eval_loss" not in summary
    best = summary["best_step"]
    for folder in ("adapter", "best", f"checkpoints/step_{best:08d}"):
        other, _ = load_trained(of_run(load_config(run_dir), str(run_dir / folder)), SINGLE)
        assert torch.equal(our_logits(other, PROBE), our_logits(ours, PROBE)), folder
    checkpointed = safetensors.torch.load_file(run_dir / f"checkpoints/step_{best:08d}" / "adapter_model.safetensors")
    assert checkpointed["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (6, 200)

    # The base alone is the checkpoint's, and the plain adapter is another run's start.
    alone, _ = load_trained(of_run(load_config(run_dir), None), SINGLE)
    make_run(tmp_path / "plain", folders, quant=quant)
    unchanged, _, _ = start_run_model(load_config(tmp_path / "plain"), SINGLE)
    assert torch.equal(our_logits(alone, PROBE), our_logits(unchanged, PROBE))
    foreign, _ = load_trained(of_run(load_config(tmp_path / "plain"), str(run_dir / "adapter"), foreign=True), SINGLE)
    if quant["method"] == "none":  # NF4(W) is another base than NF4(W_res) + s B0 A0.
        assert (our_logits(foreign, PROBE) - our_logits(ours, PROBE)).abs().max() <= 1e-4


def no_second_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> LowRankFactors:
        raise AssertionError("the start was computed again")

    monkeypatch.setattr(decomposed_adapters, "principal_part", refuse)


@pytest.mark.parametrize("init", ["pissa", pytest.param("loftq", marks=pytest.mark.slow)])
def test_resume_rebuilds_the_base_from_the_initial_adapter_file(
    folders: Path, tmp_path: Path, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "stopped"):
        make_run(tmp_path / name, folders, adapter={"init": init}, train=SETTINGS)
    run_until(SINGLE, run_dir=tmp_path / "whole", stop_before=None)
    run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=1)
    no_second_decomposition(monkeypatch)
    run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=3)
    moved = (tmp_path / "stopped").rename(tmp_path / "moved")
    run_until(SINGLE, run_dir=moved, stop_before=None)
    assert_same_run(moved, tmp_path / "whole")


@pytest.mark.ci
def test_missing_damaged_or_foreign_initial_adapter_is_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    make_run(run_dir, folders, adapter={"init": "pissa"}, train=SETTINGS)
    run_until(SINGLE, run_dir=run_dir, stop_before=3)
    no_second_decomposition(monkeypatch)
    path = run_dir / INITIAL_ADAPTER_NAME
    content = path.read_bytes()

    def refuses(match: str) -> None:
        for use in (
            lambda: worker.run(run_dir, SINGLE),
            lambda: check(load_config(run_dir), new_run=False),
            lambda: load_trained(of_run(load_config(run_dir), str(run_dir / "checkpoints")), SINGLE),
        ):
            with pytest.raises(UserError, match=match):
                use()

    path.unlink()
    refuses(f"{INITIAL_ADAPTER_NAME} is missing")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuses(f"{INITIAL_ADAPTER_NAME} is damaged: its tensors .* restore a complete copy")
    for end in (-100, 4, 0):
        path.write_bytes(content[:end])
        refuses(f"{INITIAL_ADAPTER_NAME} is truncated.*; restore a complete copy, or start a new run$")
    other = tmp_path / "other"
    monkeypatch.undo()
    make_run(other, folders, adapter={"init": "pissa_niter_1"}, train=SETTINGS)
    started(SINGLE, run_dir=other)
    shutil.copy(other / INITIAL_ADAPTER_NAME, path)
    refuses(f"{INITIAL_ADAPTER_NAME} was made by adapter.init=pissa_niter_1, this run's is pissa")
    path.write_bytes(content)
    text, theirs = (run_dir / "config.yaml").read_text(), "was trained on another base:"
    (run_dir / "config.yaml").write_text(text.replace("lora_alpha: 16.0", "lora_alpha: 8.0"))
    changed = "was made with adapter.lora_alpha=16.0, and config.yaml now has adapter.lora_alpha=8.0"
    refuses(f"{changed}|{theirs} .* or what PiSSA took .*scaled by adapter.lora_alpha, .*restore them$")
    (run_dir / "config.yaml").write_text(text.replace("  r: 8", "  r: 4"))
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(UserError, match=f"{INITIAL_ADAPTER_NAME} does not fit the adapter in config.yaml: .* shape"):
        worker.run(run_dir, SINGLE)
