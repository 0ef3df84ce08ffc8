"""`distlora analyze quantization`: figures of hand-made weights, one model in four formats, the command."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.analysis import roundtrip
from distlora.analysis.quantization import QuantizationRequest, record
from distlora.analysis.quantization_worker import put_through, read_rows
from distlora.analysis.quantization_worker import run as analyse
from distlora.analysis.roundtrip import Sums, block_weights, find_weights, measure, measure_references
from distlora.data.loader import StepLoader
from distlora.parallel import Ranks
from distlora.post.divergence import Readings, evenly
from distlora.training.setup import start_model
from distlora.weights.reader import Reader
from distlora_kernels import reference
from distlora_launcher.cli.main import main
from support import quantization_requests
from support.bitsandbytes_weights import quantize
from support.closeness import assert_losses_close
from support.family_models import write_family_folder
from support.launcher_fakes import MODEL_CONFIG, write_model
from support.small_models import tokenizer

ONE = Ranks(0, 1, torch.device("cpu"), None)


def whole(weights: Tensor) -> Sums:
    return measure(lambda size: iter(weights.split(size)), (weights.numel(),))


def nearest(value: float, levels: tuple[float, ...]) -> float:
    return min(levels, key=lambda level: abs(level - value))


@pytest.mark.parametrize(
    ("exact", "lossy", "levels"), [("int4", "nf4", roundtrip.INT4_LEVELS), ("nf4", "int4", reference.NF4_LEVELS)]
)
def test_weights_on_the_levels_of_one_format_have_the_errors_of_the_other_by_hand(
    exact: str, lossy: str, levels: tuple[float, ...]
) -> None:
    """Blocks of one absmax, which the second level holds exactly: the error is that of the levels alone."""
    scale = 7.0
    values = [scale * level for level in (levels * 5)[:63]] + [scale]
    weights = torch.tensor(values * 300)
    sums = whole(weights)
    other = reference.NF4_LEVELS if lossy == "nf4" else roundtrip.INT4_LEVELS
    errors = [value - scale * nearest(value / scale, other) for value in values]
    norm = math.sqrt(sum(value**2 for value in values))
    assert sums.relative_error(exact) < 1e-7
    assert sums.relative_error(lossy) == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / norm, rel=1e-6)
    assert sums.formats[lossy].largest == pytest.approx(max(map(abs, errors)), rel=1e-6)
    assert sums.snr_db(lossy) == pytest.approx(20 * math.log10(norm / math.sqrt(sum(e**2 for e in errors))), rel=1e-5)


def test_nf4_wins_on_normal_weights_and_int4_on_uniform_ones() -> None:
    """int4 on uniform weights by hand: steps of 1/7 of an absmax of 64/65 on average, the largest of 64 exact."""
    found = measure_references()
    by_hand = math.sqrt(3 / 12) / 7 * (64 / 65) * math.sqrt(63 / 64)
    assert found["uniform"].relative_error("int4") == pytest.approx(by_hand, rel=0.005)
    assert found["uniform"].relative_error("nf4") > 1.2 * by_hand
    for name, kurtosis in (("uniform", -1.2), ("normal", 0.0), ("Laplace", 3.0)):
        assert found[name].excess_kurtosis == pytest.approx(kurtosis, abs=0.05)
    for name in ("normal", "Laplace"):
        assert found[name].relative_error("int4") > 1.15 * found[name].relative_error("nf4")


def request_for(folder: Path, out: Path, **settings: Any) -> QuantizationRequest:
    tiny = {"model": str(folder / "llama"), "model_name": "tiny", "rows": 9}
    return quantization_requests.request_for(folder, out, **tiny | settings)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_dense_model_of_restored_weights_is_the_packed_one(folders: Path, tmp_path: Path, name: str) -> None:
    """So int4, which has no packed path, is measured as NF4 is; and a model does not diverge from itself."""
    folder = folders / name
    if name == "mixtral":
        folder = tmp_path / name
        write_family_folder(folder, name)
        tokenizer().save_pretrained(folder)
    request = request_for(folders, tmp_path / "out", model=str(folder))
    rows = evenly(read_rows(request), request.rows)
    assert len(rows) == 9
    weights, _ = find_weights(request.spec("nf4"))
    assert {len(weight.shape) for weight in weights} == ({2, 3} if name == "mixtral" else {2})
    packed, _, _ = start_model(request.spec("nf4"), ONE)
    model, _, _ = start_model(request.spec("none"), ONE)
    readings = {}
    readings["dense"] = Readings(rows, ONE, print)
    readings["dense"].take(model, "dense")
    readings["again"] = Readings(rows, ONE, print, readings["dense"])
    readings["again"].take(model, "again")
    by_name = {weight.name: weight for weight in weights}
    with Reader() as reader:
        for weight, module in block_weights(model):
            if weight in by_name:  # A router stays as it is.
                put_through(by_name[weight], "nf4", module.weight, reader)
    for kind, other in (("restored", model), ("packed", packed)):
        readings[kind] = Readings(rows, ONE, print, readings["dense"])
        readings[kind].take(other, kind)
    dense, restored = readings["dense"], readings["restored"]
    assert torch.equal(restored.losses, readings["packed"].losses)
    assert torch.equal(readings["again"].losses, dense.losses)
    assert torch.equal(readings["again"].divergences, torch.zeros(9, dtype=torch.float64))
    assert bool((restored.divergences > 0).all())
    loader = StepLoader(rows, global_batch=9, micro_batch=9, rank=0, world=1, seed=0, shuffle=False)
    (batch,) = loader.batch(0).micro_batches
    with torch.no_grad():
        as_trained = packed(batch.input_ids, batch.position_ids, batch.labels)
    assert_losses_close(restored.losses.tolist(), as_trained.tolist())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a working folder with a model and a text; nothing may become another process."""

    def refuse(*arguments: object) -> None:
        pytest.fail(f"became {arguments}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execve", refuse)
    write_model(tmp_path / "model", shards=2)
    (tmp_path / "text.txt").write_text("One line.\nAnother.\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.md").write_text("figures")
    quantized = MODEL_CONFIG | {"quantization_config": {"quant_method": "hqq", "bits": 4}}
    write_model(tmp_path / "gptq")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(quantized))
    yield tmp_path
    assert not (tmp_path / "analysis").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantisation", "model"], "did you mean 'quantization'?"),
        (["quantization"], "MODEL"),
        (["quantization", "modle"], "did you mean 'model'?"),
        (["quantization", "text.txt"], "is a file"),
        (["quantization", "gptq"], "quant_method='hqq'"),
        (["quantization", "model", "--txt", "text.txt"], "did you mean '--text'?"),
        (["quantization", "model", "--text", "texts.txt"], "did you mean 'text.txt'?"),
        (["quantization", "model", "--text", "empty.jsonl"], "holds no document"),
        (["quantization", "model", "--text", "text.txt", "--no-perplexity"], "has no effect with --no-perplexity"),
        (["quantization", "model", "--out", "old"], "holds an earlier analysis"),
        (["quantization", "model", "--dtype", "fp16"], "choose from 'bf16', 'fp32'"),
        (["quantization", "model", "--rows", "0"], "--rows=0"),
        (
            ["quantization", "model", "--formats", "nf4,gptq"],
            "--formats='gptq' is not one of nf4, int8, fp8_block, bf16",
        ),
        (["quantization", "model", "--harm-rows", "3"], "--harm-rows=3 needs --formats"),
        (["quantization", "model", "--rows", "many"], "--rows"),
        (["quantization", "model", "--sequence-length", "1"], "leaves no token to predict"),
        (["quantization", "model", "--sequence-length", "65"], "--sequence-length"),
    ],
)
def test_mistakes_are_named_before_torch_is_imported(
    place: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert "data.path" not in error
    assert "model.path" not in error


def test_an_analysis_from_weights_to_report(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = request_for(folders, tmp_path / "out", model=str(folders / "llama-tied"))
    analyse(request)
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert len(found["tensors"]) == 21
    assert set(found["linears"]) == {
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    for grouped in ("layers", "linears"):
        assert sum(group["weights"] for group in found[grouped].values()) == found["overall"]["weights"]
        assert (
            sum(group["formats"]["nf4"]["bytes"] for group in found[grouped].values())
            == (found["overall"]["formats"]["nf4"]["bytes"])
        )
    weights, total = find_weights(request.spec("nf4"))
    dense, _, _ = start_model(request.spec("none"), ONE)
    assert found["model"]["parameters"] == total
    assert total == sum(p.numel() for name, p in dense.named_parameters() if ".adapters." not in name)
    assert sum(weight.numel for weight in weights) == found["overall"]["weights"]
    formats = found["perplexity"]["formats"]
    assert list(formats) == ["fp32", "nf4", "int4"]
    assert formats["fp32"]["points"] == formats["fp32"]["divergence"] == 0
    assert formats["nf4"]["perplexity"] == pytest.approx(math.exp(formats["nf4"]["loss"]))
    assert formats["int4"]["divergence"] > formats["nf4"]["divergence"] > 0
    text = (tmp_path / "out" / "report.md").read_text()
    shown = capsys.readouterr().out
    for sentence in record(found).findings:
        assert sentence in text
        assert sentence in shown
    assert "quantization.png" in text
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    fp32, bf16 = (next(cells[2:-1] for cells in lines if cells[1:2] == [name]) for name in ("fp32", "bf16"))
    assert fp32 == ["", "", "", "", "", f"{formats['fp32']['perplexity']:,.2f}", "", ""]
    assert (bf16[0], bf16[5:]) == ("0.0017", ["", "", ""])
    assert (tmp_path / "out" / "quantization.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_in_nf4_has_nothing_to_compare_with(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(folders / "llama", tmp_path / "packed", bnb_4bit_use_double_quant=True)
    assert main(["analyze", "quantization", "packed", "--no-perplexity"]) == 2
    error = capsys.readouterr().err
    assert "packed is quantized already (21 weights in NF4), so there are no 16-bit weights to compare with" in error
    assert not (tmp_path / "analysis").exists()
