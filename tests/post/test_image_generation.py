"""Text about an image from our models: the tokens of transformers' own model and processor."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distlora.config import UserError
from distlora.data.prompts import GenerateRequest, read_prompts
from distlora.post import generate as worker
from distlora_launcher.cli.generate import check_files
from support.image_models import picture, write_colours, write_trainable
from support.runs import SINGLE, run_once
from support.small_models import make_run
from support.tiers import ci, slow

pytest.importorskip("torchvision", reason="image processors need torchvision: pip install 'distlora[vision]'")

QUESTION = "What colour is the left half?"


@pytest.mark.parametrize("family", ["qwen3_vl", ci("gemma3"), *map(slow, ("llava", "mistral3", "smolvlm"))])
def test_tokens_are_those_of_transformers_with_the_adapter(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import transformers

    write_trainable(tmp_path / family, family)
    write_colours(tmp_path, 20)
    data = {"path": str(tmp_path / "chats.jsonl"), "images": True, "sequence_length": 2048}
    make_run(
        tmp_path / "run",
        tmp_path,
        family,
        data=data,
        quant={"method": "none"},
        train={
            "global_batch": 2,
            "micro_batch": 1,
            "max_steps": 1,
            "sample_every": 1,
            "sample_tokens": 12,
            "sample_prompts": [QUESTION, "Name a colour."],
            "sample_images": [str(tmp_path / "image.png"), ""],
        },
    )
    picture((84, 56)).save(tmp_path / "image.png")
    run_once(SINGLE, run_dir=tmp_path / "run")
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    generator, tensors = torch.Generator().manual_seed(1), safetensors.torch.load_file(adapter)
    noise = {name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    safetensors.torch.save_file(noise, adapter)  # One that says more than a colour.
    seen: list[list[int]] = []
    stream = worker.Writer.stream

    def recorded(self: worker.Writer, tokens: list[int], *args: object, **more: object) -> worker.Completion:
        completion = stream(self, tokens, *args, **more)  # type: ignore[arg-type]
        seen.extend([tokens, completion.tokens])
        return completion

    monkeypatch.setattr(worker.Writer, "stream", recorded)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    run, image = str(tmp_path / "run"), str(tmp_path / "image.png")
    worker.run(GenerateRequest(run=run, weights=f"{run}/adapter", image=image, max_new_tokens=12), SINGLE)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / family)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[picture((84, 56))], add_special_tokens=False, return_tensors="pt")
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / family, dtype=torch.float32)
    length, greedy = inputs["input_ids"].shape[1], {"do_sample": False, "max_new_tokens": 12}
    untrained = base.generate(**inputs, **greedy)[0, length:].tolist()
    trained = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    theirs = trained.generate(**inputs, **greedy)[0, length:].tolist()
    assert seen[0] == inputs["input_ids"][0].tolist()
    assert seen[1] == [token for token in theirs if token != processor.tokenizer.eos_token_id]
    assert len(seen[1]) > 1
    assert theirs != untrained
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["prompt"] for sample in samples] == [QUESTION, "Name a colour."]
    prompts = [
        {"prompt": QUESTION, "images": ["image.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "image.png"}, content[1]]}]},
        {"prompt": "Name a colour."},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    names = {"prompts": str(tmp_path / "prompts.jsonl"), "out": str(tmp_path / "answers.jsonl")}
    # The run's own adapter, of its samples, is in its checkpoint; the file of the result now holds the noise.
    worker.run(GenerateRequest(run=run, weights=f"{run}/adapter", max_new_tokens=12, **names), SINGLE)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["completion"] for answer in answers[:2]] == [processor.tokenizer.decode(seen[1])] * 2
    Path(names["out"]).unlink()
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step_00000001")
    worker.run(GenerateRequest(run=run, weights=checkpoint, max_new_tokens=12, **names), SINGLE)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["completion"] for answer in answers[1:]] == [sample["text"] for sample in samples]


def test_an_image_that_no_prompt_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="each of --prompts names its own"):
        GenerateRequest(run="run", image="a.png", prompts="prompts.txt")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is this?", "images": ["no.png"]}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: messages\[0\]: there is no image .*no.png"):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is this?", "videos": ["a.mp4"]}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: videos: no model here reads video or audio"):
        read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is this?", "images": ["no.png"]}\n')
    (tmp_path / "no.png").touch()
    with pytest.raises(UserError, match=r"prompts\.jsonl:1 holds an image, and the run was trained on text alone"):
        check_files(str(tmp_path / "prompts.jsonl"), None, takes_images=False)
