"""A merge into the low bits that a base is shipped in: nearest codes, untouched bytes, an honest receipt, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.low_bit_headers import LowBitSegment
from distlora.config import UserError
from distlora.post.load_trained import load_trained
from distlora.post.merge import REQUANTIZED, Receipt, default_dtype
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Name, Trained
from distlora.training.publish import publish_result
from distlora.weights.low_bit.codecs import MatrixRows
from distlora.weights.low_bit.requantize import GRIDS, requantize
from distlora.weights.reader import Reader
from distlora_launcher.cli.main import main
from support.family_models import SINGLE, VARIANTS, config_for, load_ours, our_logits, tokens, write_family_folder
from support.low_bit_checkpoints import CHECKPOINTS, Checkpoint, checkpoint, convert_folder, write
from support.small_models import make_run, tokenizer, write_text_file
from support.tiers import ci


def quiet(text: str) -> None:
    """Silence progress."""


def read(folder: Path) -> dict[str, Tensor]:
    """Return all weights in fp32, as tests/model/test_low_bit.py proves them to be the libraries' values."""
    with Reader() as reader:
        return {
            name: reader.read([segment], 0, segment.numel).view(segment.shape).float()
            for name, segment in CheckpointFiles(folder).headers.items()
        }


def requantized(folder: Path, made: Checkpoint, weight: Tensor) -> tuple[Checkpoint, float]:
    """Return the checkpoint with its weight replaced, and the squared error that was reported."""
    files = CheckpointFiles(folder)
    (tensor,) = [each.tensor for each in files.headers.values() if isinstance(each, LowBitSegment)]
    names, tensors = {segment: name for name, segment in files.stored.items()}, dict(made[0])
    with Reader() as reader:
        rows = weight.mT if tensor.transposed else weight
        bands = _matrices(rows, tensor.block[0])
        found = [requantize(MatrixRows(tensor, reader, m, low, low + len(part)), part) for (m, low), part in bands]
    for part in ("codes", "scales"):
        name = names[tensor.parts[part]]
        old, new = tensors[name], torch.cat([parts[part].reshape(-1) for parts, _ in found])
        tensors[name] = new.view(old.dtype).view(old.shape)
    return (tensors, *made[1:]), sum(lost for _, lost in found)


def _matrices(rows: Tensor, height: int) -> list[tuple[tuple[int, int], Tensor]]:
    """Return ((matrix, first row), rows) of two bands of each matrix."""
    size = rows.shape[-2]
    middle = size // 2 // height * height
    bands = [(0, middle), (middle, size)] if middle else [(0, size)]
    matrices = rows if rows.dim() == 3 else rows[None]
    return [((m, low), each[low:high].contiguous()) for m, each in enumerate(matrices) for low, high in bands]


AS_THE_LIBRARY = ("fp8-ragged", "fp8-bf16-scales", "fp8-tensor", "mxfp4", "ct-int4", "ct-int8", "ct-nvfp4", "ct-mxfp4")
OTHERS = ("fp8-ue8m0", "fp8-experts", "fp8-ragged-experts", "ct-int4-zeros", "ct-int4-channel", "ct-int8-packed")
OTHERS += ("ct-fp8-channel", "ct-fp8-block", "modelopt-nvfp4", "modelopt-fp8")


@pytest.mark.parametrize("name", [*AS_THE_LIBRARY, *OTHERS])
def test_a_weight_gets_the_nearest_codes_and_never_loses_more_than_its_change(tmp_path: Path, name: str) -> None:
    """The error is the one reported; of other values it is at most that of the library that writes the format."""
    made = checkpoint(name)
    write(tmp_path / "shipped", made)
    (weight,) = read(tmp_path / "shipped").values()
    again, lost = requantized(tmp_path / "shipped", made, weight)
    write(tmp_path / "again", again)
    assert lost == 0
    assert torch.equal(*read(tmp_path / "again").values(), weight)
    torch.manual_seed(2)
    for size in (1e-3, 0.05, 1.0):
        changed = weight + size * weight.std() * torch.randn(weight.shape)
        again, lost = requantized(tmp_path / "shipped", made, changed)
        write(tmp_path / f"{size}", again)
        (value,) = read(tmp_path / f"{size}").values()
        error, change = (float((changed - other).norm()) for other in (value, weight))
        assert lost**0.5 == pytest.approx(error, rel=1e-3)
        assert error <= change * (1 + 1e-5)
        if name in AS_THE_LIBRARY and (name, size) != ("ct-nvfp4", 1.0):  # Beyond the range of its global scale.
            (theirs,) = CHECKPOINTS[name][1](changed.mT if name == "mxfp4" else changed)[2].values()
            assert error <= 1.001 * float((theirs.float() - changed).norm())
    assert error < 0.4 * change


MERGED: dict[str, tuple[str, dict[str, Any], str, Any, tuple[str, ...]]] = {
    # Of ragged tiles transformers takes other blocks than the settings name.
    "fp8": ("llama", {"hidden_size": 96, "intermediate_size": 256}, "fp8", ["q_proj", "up_proj"], ("_proj",)),
    "mxfp4": ("gpt-oss", {"hidden_size": 96, "intermediate_size": 64}, "mxfp4", "all-linear", ("up_proj", "down_proj")),
    "fp8-experts": ("qwen3-moe", {}, "fp8-bf16-scales", "all-linear", ("_proj",)),
    "int4": ("mixtral", {"intermediate_size": 64}, "ct-int4", "all-linear", ("w2",)),
    "nvfp4": ("gemma2", {"intermediate_size": 192}, "modelopt-nvfp4", ["o_proj", "down_proj"], ("_proj",)),
}
"""By name: the variant and its sizes, the format and the modules in it, and the modules with an adapter."""


def trained_on(folder: Path, name: str, quant: str) -> Trained:
    """Write a base, and an adapter on it that is not zero."""
    variant, sizes, format, targets, endings = MERGED[name]
    base, adapter = folder / "base", folder / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        stem, settings = VARIANTS[variant]
        patch.setitem(VARIANTS, variant, (stem, settings | sizes))
        write_family_folder(folder / "dense", variant)
    tokenizer().save_pretrained(folder / "dense")
    convert_folder(folder / "dense", base, CHECKPOINTS[format][1], only=endings)
    sections = {"quant": {"method": quant, "cache": False}, "adapter": {"target_modules": targets, "r": 4}}
    model, backend = load_ours(base, **sections)
    publish_result(adapter, model, config_for(base, **sections).spec, None, backend)
    return Name(place=str(adapter), base=str(base), quant=quant).read()  # type: ignore[arg-type]


def by_transformers(folder: Path, name: str) -> Any:
    """Return the model as transformers dequantizes it on a CPU, in fp32."""
    import transformers

    settings = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}[name](dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, experts_implementation="eager"
    )


@pytest.mark.parametrize("name", ["fp8", "mxfp4", *(ci(name) for name in MERGED if name not in ("fp8", "mxfp4"))])
def test_a_merge_into_the_shipped_format_changes_what_is_adapted_alone(tmp_path: Path, name: str) -> None:
    """Values by transformers where it loads them on a CPU, else as our reader gives them; the receipt has the error."""
    base, exact, out = (tmp_path / each for each in ("base", "exact", "out"))
    trained = trained_on(tmp_path, name, "none" if name == "fp8-experts" else "keep")
    merge_to(trained, exact, onto="trained", dtype=torch.float32, say=quiet)
    receipt = merge_to(trained, out, onto="trained", dtype=None, say=quiet)
    assert Receipt.read(out) == receipt
    assert "| error" in (out / "merge.md").read_text()
    before, merged, stored = read(base), read(exact), read(out)
    assert before.keys() == merged.keys() == stored.keys()
    if name in ("fp8", "mxfp4"):
        theirs = by_transformers(out, name).state_dict()
        assert all(torch.equal(value, stored[each]) for each, value in theirs.items() if each in stored)
        assert len(theirs.keys() & stored.keys()) > len(stored) / 2
    # The dtype of an adapter without its run is a guess, and rounds what is dense.
    changed = {each for each in before if (before[each] - merged[each]).norm() > 0.01 * before[each].norm()}
    squares = torch.zeros(3)
    for each in changed:
        error, change = (float((other - merged[each]).norm()) for other in (stored[each], before[each]))
        assert error <= change * (1 + 1e-5)
        squares += torch.tensor([error**2, change**2, float(merged[each].norm()) ** 2])
        if each in receipt.weights:  # Others are parts of a weight.
            assert receipt.weights[each]["error"] == pytest.approx(error / float(merged[each].norm()), rel=1e-3)
    lost, added, whole = squares.sqrt().tolist()
    assert receipt.total["error"] == pytest.approx(lost / whole, rel=1e-3)
    assert receipt.total["kept"]["shipped"] == pytest.approx(1 - lost / added, rel=1e-3)
    assert added > lost > 0
    files = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (base, out)]
    assert files[0].keys() == files[1].keys()
    same = {part for part in files[0] if torch.equal(*(file[part].reshape(-1).view(torch.uint8) for file in files))}
    may_change = tuple(each.removesuffix(".weight") for each in changed)
    assert {part for part in files[0] if not part.startswith(may_change)} <= same
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert configs[0] == configs[1]
    assert "quantization_config" in configs[0]


def test_the_adapter_is_valid_for_the_shipped_gpt_oss_in_peft(tmp_path: Path) -> None:
    """As the model card loads it: PEFT on the dequantized base, experts included, gives our logits."""
    from peft import PeftModel

    trained, ids = trained_on(tmp_path, "mxfp4", "keep"), tokens(2, 24)
    assert trained.weights is not None
    ours, _ = load_trained(trained, SINGLE)
    theirs = PeftModel.from_pretrained(by_transformers(tmp_path / "base", "mxfp4"), trained.weights)
    settings = json.loads((trained.weights / "adapter_config.json").read_text())
    assert sorted(settings["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - our_logits(ours, ids)).abs().max() <= 1e-4


def test_an_adapter_trained_on_nf4_is_merged_onto_the_shipped_values(tmp_path: Path) -> None:
    trained = trained_on(tmp_path, "fp8", "nf4")
    with pytest.raises(UserError, match=r"trained on .* with quant=nf4, .* add --onto original"):
        merge_to(trained, tmp_path / "out", onto="trained", dtype=None, say=quiet)
    receipt = merge_to(trained, tmp_path / "out", onto="original", dtype=None, say=quiet)
    assert receipt.total["kept"]["shipped"] > 0
    assert default_dtype(trained) == "bf16"


def test_what_cannot_be_written_again_is_refused_by_name_before_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(GRIDS) == sorted(REQUANTIZED)
    write_family_folder(tmp_path / "dense", "llama")
    tokenizer().save_pretrained(tmp_path / "dense")
    reasons = {"dense": "are not in low bits", "awq-32": "stored as awq, which can be read only"}
    reasons["gptq-64-order"] = "q_proj.weight is stored as gptq, which can be read only"
    write_text_file(tmp_path / "text.jsonl")
    for name, reason in reasons.items():
        if name != "dense":
            convert_folder(tmp_path / "dense", tmp_path / name, CHECKPOINTS[name][1], only=("q_proj",))
        run = tmp_path / f"run-{name}"
        make_run(run, tmp_path, name, quant={"method": "none"})
        (run / "checkpoints" / "step_00000002").mkdir(parents=True)
        assert main(["merge", str(run), "--dtype", "shipped"]) == 2
        assert reason in capsys.readouterr().err
