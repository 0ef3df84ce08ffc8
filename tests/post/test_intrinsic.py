"""`distlora analyze intrinsic`: the projection, training through it, the search, an analysis that is killed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.analysis import intrinsic as search
from distlora.analysis.intrinsic import REQUEST_NAME, TRAININGS_NAME, IntrinsicRequest, record
from distlora.analysis.intrinsic_worker import run as analyse
from distlora.analysis.subspace_training import (
    Bench,
    FlatParameters,
    Projection,
    Subspace,
    Training,
    layer_of,
    random_weights,
)
from distlora.system.command_worker import to_json
from distlora.training import worker as train
from distlora_launcher.cli import analyze
from distlora_launcher.cli.main import main
from support.closeness import assert_losses_close, relative_error
from support.family_models import SINGLE, load_ours, write_family_folder
from support.small_models import make_run, read_metrics

CPU = torch.device("cpu")
FULL: dict[str, Any] = {"adapter": {"method": "full"}, "quant": {"method": "none"}}


def dense(subspace: Projection) -> Tensor:
    """P, column by column."""
    return torch.stack(
        [subspace.parameters_of(unit, torch.empty(subspace.size)) for unit in torch.eye(subspace.dimension)], dim=1
    )


@pytest.mark.parametrize(
    ("size", "dimension", "bound"), [(4096, 128, 1e-5), (3 * 512, 300, 1e-5), (1000, 37, 0.05), (10_000, 300, 0.02)]
)
def test_columns_are_orthonormal_but_for_a_last_block_that_is_cut_off(size: int, dimension: int, bound: float) -> None:
    values = torch.linalg.svdvals(dense(Projection(0, size=size, dimension=dimension, device=CPU)))
    assert float((values - 1).abs().max()) < bound


def test_layers_are_the_embedding_each_block_the_norm_and_a_head_of_its_own(folders: Path) -> None:
    assert layer_of("decoder.layers.13.inner.mlp.up_proj.weight") == "layers.13"
    model, _ = load_ours(folders / "llama", **FULL)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flat = FlatParameters(model)
    assert list(flat.layers) == ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "head"]
    flat.values.mul_(2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, 2 * before[name]), name


@pytest.mark.parametrize("scales_layers", [False, True])
def test_gradients_go_through_the_subspace(folders: Path, scales_layers: bool) -> None:
    """Against the dense P and autograd; sums over 400,000 products in fp32, whose signs cancel."""
    model, _ = load_ours(folders / "llama-tied", **FULL)
    flat = FlatParameters(model)
    start = flat.values.detach().clone()
    subspace = Subspace(flat, start, dimension=25, seed=0, scales_layers=scales_layers)
    count = 20 if scales_layers else 25
    assert sum(p.numel() for p in subspace.parameters.values()) == 25
    generator = torch.Generator().manual_seed(0)
    u = (0.01 * torch.randn(count, generator=generator)).requires_grad_()
    factors = (1 + torch.rand(5, generator=generator)).requires_grad_() if scales_layers else torch.ones(5)
    with torch.no_grad():
        subspace.u.copy_(u)
        if subspace.scales is not None:
            subspace.scales.copy_(factors)
    subspace.push()
    sizes = torch.tensor([layer.stop - layer.start for layer in flat.layers.values()])
    matrix = dense(subspace.projection) * math.sqrt(len(start) / count)
    theta = start + factors.repeat_interleave(sizes) * (matrix @ u)
    assert torch.allclose(flat.values, theta, atol=1e-6)
    weights = torch.randn(len(start), generator=generator)
    (theta @ weights).backward()
    flat.gradients.copy_(weights)
    subspace.pull()
    assert relative_error(subspace.u.grad, u.grad) < 1e-4
    if subspace.scales is not None:
        assert relative_error(subspace.scales.grad, factors.grad) < 1e-4


def request_for(folders: Path, out: Path, **settings: Any) -> IntrinsicRequest:
    out.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "models": [str(folders / "llama-tied")],
        "names": ("tiny",),
        "data": str(folders / "text.jsonl"),
        "eval_data": None,
        "out": str(out),
        "cache_dir": str(folders / "cache"),
        "steps": 4,
        "batch": 4,
        "sequence_length": 32,
        "lr": 3e-3,
        "seeds": 2,
        "start": 64,
        "most": 300,
        "resolution": 10.0,
    }
    return IntrinsicRequest(**values | settings)


def test_full_fine_tuning_here_is_that_of_a_run(folders: Path, tmp_path: Path) -> None:
    request = request_for(folders, tmp_path / "out")
    bench = Bench(request, str(folders / "llama-tied"), SINGLE, lambda text: None)
    training = Training(model="tiny", random=False, scaling="full", dimension=bench.size, lr=3e-3, seed=0)
    ours = bench.run(training)
    make_run(
        tmp_path / "run",
        folders,
        "llama-tied",
        **FULL,
        data={"sequence_length": 32},
        optim={"lr": 3e-3, "eps": 1e-8, "warmup_ratio": 0.1},
        train={"max_steps": 4, "global_batch": 4, "micro_batch": 4, "checkpointing": "none"},
    )
    train.run(tmp_path / "run", SINGLE)
    assert ours.loss is not None
    assert_losses_close([ours.loss], [read_metrics(tmp_path / "run")[-1]["eval_loss"]])
    assert bench.run(training).loss == ours.loss  # From the same start again.


@pytest.mark.parametrize("variant", ["llama-biases", "gemma3-text", "phi3"])
def test_random_weights_are_those_that_transformers_starts_with(tmp_path: Path, variant: str) -> None:
    import transformers

    write_family_folder(tmp_path, variant)
    model, _ = load_ours(tmp_path, **FULL)
    random_weights(model, str(tmp_path), 5)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(5)
    fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs = dict(fresh.named_parameters())
    ours = model.hf_state_dict()
    assert len(ours) > 20
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def test_the_search_finds_the_dimension_in_few_steps() -> None:
    asked = []

    def reaches(dimension: int) -> bool:
        asked.append(dimension)
        return dimension >= 777

    found = search.bracket(reaches, start=1024, least=1, most=100_000, resolution=1.5)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 777 <= found.high <= 1.5 * found.low
    assert len(asked) == len(set(asked)) <= 6
    for true, expected in ((3, search.Bracket(None, 5)), (10**6, search.Bracket(1000, None))):
        assert search.bracket(lambda d, true=true: d >= true, start=64, least=5, most=1000, resolution=2) == expected


@pytest.mark.ci
def test_an_analysis_that_was_killed_goes_on_to_the_same_result(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = request_for(folders, tmp_path / "whole", random=True, also=(40,), seeds=1)
    analyse(whole, SINGLE)
    found = json.loads((tmp_path / "whole" / "intrinsic.json").read_text())
    shown = capsys.readouterr().out
    assert [(arm["start"], list(arm["subspaces"])) for arm in found["arms"]] == [
        ("pretrained", ["none", "layers"]),
        ("random", ["none", "layers"]),
    ]
    text = (tmp_path / "whole" / "report.md").read_text()
    for sentence in record(found).findings:
        assert sentence in text
        assert sentence in shown
    assert (tmp_path / "whole" / "intrinsic.png").read_bytes().startswith(b"\x89PNG")
    for arm in found["arms"]:
        for scaling, found_in in arm["subspaces"].items():
            assert found_in["least"] == (6 if scaling == "layers" else 1)
            assert 40 in [point["dimension"] for point in found_in["points"]]
            for point in found_in["points"]:
                gains = [(arm["untrained"] - loss) / (arm["untrained"] - arm["full"]) for loss in point["losses"]]
                assert point["shares"] == pytest.approx(gains)

    done = (tmp_path / "whole" / TRAININGS_NAME).read_text().splitlines()
    assert len(done) == len(set(done))
    cut = request_for(folders, tmp_path / "cut", random=True, also=(40,), seeds=1)
    half = "\n".join(done[: len(done) // 2])
    (tmp_path / "cut" / TRAININGS_NAME).write_text(half + "\n" + done[len(done) // 2][:40])
    trained = []
    train_one = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, training: trained.append(training) or train_one(self, training))
    analyse(cut, SINGLE)
    assert len(trained) == len(done) - len(done) // 2
    assert json.loads((tmp_path / "cut" / "intrinsic.json").read_text()) == found
    trained.clear()
    analyse(cut, SINGLE)  # The line that was cut has cost no other.
    assert trained == []


def test_an_analysis_is_not_written_over_another(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = str(folders / "llama-tied"), str(folders / "text.jsonl")
    handed: list[IntrinsicRequest] = []
    monkeypatch.setattr(analyze, "become", lambda worker, request: handed.append(request))
    assert main(["analyze", "intrinsic", str(folders / "mixtral"), "--data", data]) == 2
    assert "and adapter=full on a mixture of experts (mixtral) is covered" in capsys.readouterr().err
    asked = ["analyze", "intrinsic", model, "--data", data, "--out", "out"]
    for _ in range(2):
        main(asked)  # The second goes on.
    assert [to_json(request) for request in handed] == [(tmp_path / "out" / REQUEST_NAME).read_text()] * 2
    assert main([*asked, "--steps", "7"]) == 2
    assert "out holds an analysis with other options" in capsys.readouterr().err
    (tmp_path / "out" / "intrinsic.json").write_text("{}")
    assert main(asked) == 2
    assert "out holds a finished analysis" in capsys.readouterr().err
