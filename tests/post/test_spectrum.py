"""`distlora analyze spectrum`: against dense SVDs, constructed intruders, every kind of run, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.analysis import singular
from distlora.analysis import spectrum_worker as worker
from distlora.analysis.spectrum import SpectrumRequest
from distlora.analysis.spectrum_worker import MatrixChange, open_changes
from distlora.model.experts import ExpertWeight
from distlora.post.load_trained import load_trained
from distlora.post.trained import Name, Trained
from distlora.post.weights import Factors
from distlora.system.command_worker import from_json, to_json
from distlora.training import worker as training_worker
from distlora.weights.reader import Reader
from distlora_launcher.cli.analyze import check_spectrum
from distlora_launcher.cli.main import main
from distlora_launcher.terminal.arguments import read
from support.closeness import relative_error
from support.family_models import SINGLE
from support.peft_models import adapted
from support.small_models import make_run

TIGHT = 1e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)).Q


def with_values(out_features: int, in_features: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(U, U S V^T in fp32)."""
    left, right = orthonormal(out_features, len(values), seed), orthonormal(in_features, len(values), seed + 1)
    return left, ((left * values) @ right.T).float()


def request(**values: Any) -> SpectrumRequest:
    return SpectrumRequest(run="", first=Name(place="run"), first_name="run", out="out", **values)


def change(before: Tensor, after: Tensor, factors: Factors | None = None) -> MatrixChange:
    return MatrixChange(
        name="model.layers.0.mlp.up_proj.weight",
        layer=0,
        linear="mlp.up_proj",
        before=before,
        after=after,
        factors=factors,
    )


def intruding(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return (W, W'), where W' has three singular vectors nearly orthogonal to W's.

    They are its 1st, 2nd and 4th. The 6th is 0.6 of a small one of W's; the others are W's.
    """
    size = min(shape)
    values = 3 * torch.exp(-0.04 * torch.arange(size, dtype=torch.float64)) + 0.05
    left, base = with_values(*shape, values)
    outputs = torch.linalg.qr(
        torch.cat([left[:, :20], torch.randn(shape[0], 4, generator=generator(9), dtype=torch.float64)], dim=1)
    ).Q[:, 20:]
    inputs = torch.linalg.svd(base.double())[2][-4:].T if shape[1] > shape[0] else orthonormal(shape[1], 4, 7)
    mixed = 0.6 * left[:, 60] + 0.8 * outputs[:, 3]
    outputs[:, 3] = mixed / mixed.norm()
    strengths = torch.tensor([5.0, 4.0, 2.95, 2.75], dtype=torch.float64)
    return base, base + ((outputs * strengths) @ inputs.T).float()


@pytest.mark.parametrize("shape", [(90, 150), (150, 90)])
def test_intruders_are_those_of_every_cosine_and_bounds_decide_them(shape: tuple[int, int]) -> None:
    base, after = intruding(shape)
    thresholds = (0.3, 0.5, 0.7)
    all_of_base = torch.linalg.svd(base.double(), full_matrices=False)[0]
    first = torch.linalg.svd(after.double(), full_matrices=False)[0][:, :10]
    cosines = (all_of_base.T @ first).abs().max(dim=0).values
    exact, _, _ = singular.similarity(base, after, 10, thresholds, exact_up_to=200)
    assert (exact.lower - cosines).abs().max() < TIGHT
    for threshold in thresholds:
        assert exact.counts(threshold) == (int((cosines < threshold).sum()), 0)
    bounds, _, _ = singular.similarity(base, after, 10, (0.5, 0.7), exact_up_to=0)
    assert bool((bounds.lower <= cosines + 1e-9).all())
    assert bool((bounds.upper >= cosines - 1e-9).all())
    for threshold in (0.5, 0.7):
        assert bounds.counts(threshold) == exact.counts(threshold)


def first_cosines(base: Tensor, after: Tensor, top: int) -> Tensor:
    """Return the largest |cosine| of each first vector of W' with any left singular vector of W, by dense SVDs."""
    left, first = (torch.linalg.svd(each.double(), full_matrices=False)[0] for each in (base, after))
    return (left.T @ first[:, :top]).abs().max(dim=0).values


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (80, 80)])
@pytest.mark.parametrize("spectrum", ["flat", "falling", "two clusters", "steep", "power"])
def test_bounds_hold_whatever_the_spectrum(shape: tuple[int, int], spectrum: str) -> None:
    size = min(shape)
    noise, numbers = torch.rand(size, generator=generator(), dtype=torch.float64), torch.arange(size).double()
    values = {
        "flat": 1 + 0.02 * noise,
        "falling": torch.exp(-0.04 * numbers),
        "two clusters": torch.where(numbers < 20, 2.0, 1.0) + 1e-3 * noise,
        "steep": torch.logspace(0, -4, size, dtype=torch.float64),
        "power": (1 + numbers) ** -0.7,  # As of trained weights.
    }[spectrum]
    _, base = with_values(*shape, values)
    change_ = torch.randn(shape[0], 3, generator=generator(3)) @ torch.randn(3, shape[1], generator=generator(4))
    after = base + change_ * (1.05 * float(values.max()) / torch.linalg.matrix_norm(change_, 2))
    found, _, _ = singular.similarity(base, after, 4, (0.3, 0.5, 0.7), exact_up_to=0)
    cosines = first_cosines(base, after, 4)
    assert bool((found.lower <= cosines + 1e-6).all())
    assert bool((found.upper >= cosines - 1e-6).all())


def changes_of(trained: Trained) -> dict[str, MatrixChange]:
    with open_changes(trained) as changes, Reader() as reader:
        return {change.name: change for name in changes.names for change in changes.of(name, reader)}


@pytest.mark.parametrize(
    ("variant", "dora"),
    [("llama3-tied", False), ("qwen2", True), ("gemma3", False), ("mixtral", False), ("gpt-oss", False)],
)
def test_changes_are_what_a_model_on_nf4_computes_with(variant: str, dora: bool, tmp_path: Path) -> None:
    adapter = {"target_modules": "all-linear", "r": 4, "use_dora": dora}
    model, trained = adapted(tmp_path, variant, adapter=adapter, quant={"method": "nf4", "cache": False})
    found, checked_matrices = changes_of(trained), 0
    for path, weight in model.adapted_weights():
        dense, (pair,) = weight.frozen_weight.dense(torch.float32), weight.pairs
        if isinstance(weight, ExpertWeight):
            dense = dense.mT if weight.transposed else dense
            befores, downs, ups = dense, pair.down(), pair.up()  # type: ignore[union-attr]
            names = [f"{path}[{expert}]" for expert in range(len(dense))]
        else:
            befores, downs, ups, names = dense[None], pair.A[None], pair.B[None], [f"{path}.weight"]
        for name, before, down, up in zip(names, befores, downs, ups, strict=True):
            after = before + pair.scaling * (up @ down)
            if pair.magnitude is not None:
                after = after * (pair.magnitude / torch.linalg.vector_norm(after, dim=1))[:, None]
            assert torch.equal(found[name].before, before)
            assert relative_error(found[name].after, after) < 1e-6
            assert relative_error(found[name].delta(), after - before) < 1e-5
            assert (found[name].factors is None) == dora
            checked_matrices += 1
    assert checked_matrices == len(found)


@pytest.fixture(scope="module")
def pissa(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pissa") / "run"
    adapter = {"target_modules": "attention", "r": 4, "init": "pissa"}
    make_run(run_dir, folders, adapter=adapter, quant={"method": "nf4", "cache": False}, train={"max_steps": 3})
    training_worker.run(run_dir, SINGLE)
    return run_dir


@pytest.fixture(scope="module")
def full(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("full") / "run"
    make_run(run_dir, folders, adapter={"method": "full"}, quant={"method": "none"}, train={"max_steps": 3})
    training_worker.run(run_dir, SINGLE)
    return run_dir


def test_a_run_of_pissa_changed_the_weights_that_it_began_with(pissa: Path) -> None:
    """By what it published (a plain LoRA of twice the rank) and by its checkpoint alike."""
    published = Name(place=str(pissa)).read()
    step = Name(place=str(pissa), checkpoint="step_3").read()
    model, _ = load_trained(step, SINGLE)
    found = {source: changes_of(trained) for source, trained in (("published", published), ("step", step))}
    for path, linear in model.adapted_linears():
        name, (pair,) = f"{path}.weight", linear.pairs
        after = linear.frozen_weight.dense(torch.float32) + pair.scaling * (pair.B @ pair.A)
        for changes in found.values():
            assert relative_error(changes[name].after, after) < 1e-6
            assert changes[name].factors is not None
            assert relative_error(changes[name].before + changes[name].delta(), after) < 1e-6
        assert 0 < relative_error(found["step"][name].before, after) < 0.2
        delta = found["step"][name].delta()
        assert relative_error(found["published"][name].delta(), delta) < 1e-4


def test_the_command_equals_dense_svds(pissa: Path, full: Path, tmp_path: Path, capsys: Any) -> None:
    """Values to 1e-5 of the largest, ranks and cosines too; the report names what stands in the JSON."""
    words = [
        str(pissa),
        "--against",
        str(full),
        "--out",
        str(tmp_path / "out"),
        "--top",
        "6",
        "--threshold",
        "0.5,0.99",
    ]
    asked = check_spectrum(read(SpectrumRequest, "distlora analyze spectrum", words))
    found = worker.analyse(from_json(SpectrumRequest, to_json(asked)))
    assert json.loads((tmp_path / "out" / "spectrum.json").read_text()) == found
    sides = {"first": changes_of(asked.first.read()), "against": changes_of(Name(place=str(full)).read())}
    assert [weight["name"] for weight in found["weights"]] == list(sides["first"])
    for weight in found["weights"]:
        spaces = {}
        for side, changes in sides.items():
            entry, own = weight if side == "first" else weight["against"], changes[weight["name"]]
            left, values, _ = torch.linalg.svd(own.delta().double(), full_matrices=False)
            told = torch.tensor(entry["delta"]["values"], dtype=torch.float64)
            assert (told - values[: len(told)]).abs().max() < TIGHT * values[0]
            assert entry["delta"]["rank"] == (8 if side == "first" else len(values))
            shares = values[: len(told)] / values[: len(told)].sum()
            expected = float(torch.exp(-(shares * shares.log()).sum()))
            assert entry["delta"]["effective_rank"] == pytest.approx(expected, rel=TIGHT)
            stable = float(own.delta().norm() / values[0]) ** 2
            assert entry["delta"]["stable_rank"] == pytest.approx(stable, rel=TIGHT)
            base, first = (torch.linalg.svd(part.double())[0] for part in (own.before, own.after))
            cosines = (base[:, : min(own.before.shape)].T @ first[:, :6]).abs().max(dim=0).values
            assert torch.allclose(torch.tensor(entry["intruders"]["cosines"])[:, 0].double(), cosines, atol=TIGHT)
            spaces[side] = left[:, :8]
        principal = torch.linalg.svdvals(spaces["first"].T @ spaces["against"])
        told = torch.tensor(weight["angles"]["left"]["cosines"], dtype=torch.float64)
        assert torch.allclose(told, principal, atol=TIGHT)
    shares = [values["energy_share"] for values in found["first"]["linears"].values()]
    assert sum(shares) == pytest.approx(1)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Do they change the same directions?" in report
    assert (tmp_path / "out" / "spectrum.png").stat().st_size > 20_000
    assert "intruders are" in capsys.readouterr().out
    assert main(["analyze", "spectrum", str(pissa), "--out", str(tmp_path / "out")]) == 2
