"""Results of runs on images: the merged folder, the model card and what a GGUF file holds, read as users read them."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.architecture.images import image_layout
from distlora.config import UserError
from distlora.model.images import Images
from distlora.post import evaluate_worker
from distlora.post.evaluate import EvaluateRequest
from distlora.post.export import gguf_model
from distlora.post.load_trained import load_in_fp32, load_trained
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Name
from distlora.run_folder.layout import read_result
from distlora.training.model_card import model_card
from distlora_launcher.cli import evaluate as evaluating
from support.exports import export
from support.image_models import picture, write_colours, write_trainable
from support.runs import SINGLE, run_once
from support.small_models import make_run, read_metrics

pytest.importorskip("torchvision", reason="image processors need torchvision: pip install 'distlora[vision]'")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and a run of three steps on images."""
    folder = tmp_path_factory.mktemp("images")
    write_trainable(folder / "qwen3_vl", "qwen3_vl")
    write_colours(folder, 40)
    data = {"path": str(folder / "chats.jsonl"), "images": True, "image_max_pixels": 6000, "sequence_length": 256}
    train = {"global_batch": 4, "micro_batch": 2, "max_steps": 3}
    make_run(folder / "run", folder, "qwen3_vl", data=data, train=train, optim={"lr": 1e-2})
    run_once(SINGLE, run_dir=folder / "run")
    return folder


def test_the_card_names_images_and_its_code_answers_about_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = read_result(place / "run")
    card = model_card(result, repository="me/it", base=None, license_of_base={})
    assert "pipeline_tag: image-text-to-text" in card
    assert f" tokens, {result.data['splits']['train']['images']:,} images\n" in card
    assert "- images: resized to at most 6,000 pixels, then read by the base's image processor" in card
    picture((84, 56)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("me/it", str(place / "run" / "adapter")).replace("PATH_OF_THE_BASE", str(place / "qwen3_vl"))
    names: dict[str, Any] = {}
    exec(code, names)
    assert (names["inputs"].input_ids == image_layout(place / "qwen3_vl").token_id).any()
    assert names["answer"].shape[1] > names["inputs"].input_ids.shape[1]


def test_an_evaluation_reads_the_images_that_were_held_out(place: Path, tmp_path: Path) -> None:
    run = place / "run"
    request = evaluating.checked(EvaluateRequest(places=[str(run)], dtype="fp32"))
    assert request.source is not None
    assert request.source.images
    figures = evaluate_worker.run(request, SINGLE)
    adapted, base = figures["models"]
    losses = [line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line]
    assert adapted["loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert base["loss"] == pytest.approx(losses[0], rel=1e-6)  # Before the first step adapters add zero.
    shutil.copytree(place / "qwen3_vl", tmp_path / "other")
    settings = tmp_path / "other" / "processor_config.json"
    settings.write_text(settings.read_text().replace('"image_mean"', '"image_average"', 1))
    with pytest.raises(UserError, match="other reads images otherwise than"):
        evaluate_worker.tensors_for(request.source, {"other": tmp_path / "other"}, 1)


def test_a_gguf_file_of_a_model_of_images_is_said_to_hold_text_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(*_: Any) -> None:
        raise UserError("reached the converter")

    monkeypatch.setattr(gguf_model, "unpacked", contextlib.nullcontext)
    monkeypatch.setattr(gguf_model, "convert", convert)
    with pytest.raises(UserError, match="reached the converter"):
        export(place, "run", "gguf", tmp_path / "out.gguf", "fp32", converter=tmp_path)
    assert "the file holds the text decoder alone" in "".join(capsys.readouterr())


@pytest.mark.ci
@torch.no_grad()
def test_a_merged_folder_opens_by_auto_classes_and_computes_what_was_trained(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trained = Name(place=str(place / "run")).read()
    merge_to(trained, tmp_path / "merged", onto="trained", dtype=torch.float32, say=lambda _: None)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    content = [{"type": "image", "image": picture((84, 56))}, {"type": "text", "text": "What colour is the left half?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)(**inputs).logits
    model, _ = load_trained(replace(trained, spec=replace(trained.spec, images=True)), SINGLE)
    assert model.image_layout is not None
    ids = inputs.input_ids
    positions, is_image = torch.arange(ids.shape[1])[None], ids == model.image_layout.token_id
    tensors = {name: inputs[name] for name in model.image_layout.names}
    images = Images.of([[tensors]], is_image, ids, positions, model.merger, torch.device("cpu"))
    ours = model.head.logits(model.hidden_states(ids, positions, images=images).flatten(0, 1)).view_as(theirs)
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1)
    # Beside a run in bf16 the merged model is measured with the tower that it has: the base's.
    in_bf16, _ = load_in_fp32(replace(trained, spec=replace(trained.spec, images=True, dtype="bf16")), SINGLE)
    tower = dict(model.merger.visual.named_parameters())
    assert tower
    assert all(torch.equal(weight, tower[name]) for name, weight in in_bf16.merger.visual.named_parameters())
    without = AutoModelForImageTextToText.from_pretrained(place / "qwen3_vl", dtype=torch.float32)(**inputs).logits
    assert (without - theirs).abs().max() > 1e-2  # The adapter changes what is computed.
