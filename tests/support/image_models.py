"""Folders of small models with a processor of images, for eight families, without weights."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}" + _PARTS + "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TILES = ["<fake_token_around_image>", "<global-img>"]
_TILES += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
_QWEN: dict[str, Any] = {
    "processor": "Qwen3VLProcessor",
    "image_processor": "Qwen2VLImageProcessor",
    "video": "Qwen3VLVideoProcessor",
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "token": "<|image_pad|>",
    "more": ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
}
_SMALL = {"size": {"longest_edge": 728}, "max_image_size": {"longest_edge": 364}}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_vl": _QWEN | {"pixels": {"patch_size": 16, "merge_size": 2}},
    "qwen3_5": _QWEN,
    "gemma3": {
        "processor": "Gemma3Processor",
        "image_processor": "Gemma3ImageProcessor",
        "image": "<start_of_image>",
        "token": "<image_soft_token>",
        "settings": {"image_seq_length": 49},
        "named": {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    },
    "mistral3": {
        "processor": "PixtralProcessor",
        "image_processor": "PixtralImageProcessor",
        "image": "[IMG]",
        "token": "[IMG]",
        "more": ["[IMG_BREAK]", "[IMG_END]"],
        "settings": {"spatial_merge_size": 2, "patch_size": 14},
    },
    "smolvlm": {
        "processor": "SmolVLMProcessor",
        "image_processor": "SmolVLMImageProcessor",
        "pixels": _SMALL,
        "video": "SmolVLMVideoProcessor",
        "image": "<image>",
        "token": "<image>",
        "more": _TILES,
        "named": {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
    },
    "idefics3": {
        "processor": "Idefics3Processor",
        "image_processor": "Idefics3ImageProcessor",
        "pixels": _SMALL,
        "image": "<image>",
        "token": "<image>",
        "more": _TILES,
    },
    "llava": {
        "processor": "LlavaProcessor",
        "image_processor": "LlavaImageProcessor",
        "pixels": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        "image": "<image>\n",
        "token": "<image>",
        "settings": {
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    },
    "internvl": {
        "processor": "InternVLProcessor",
        "image_processor": "GotOcr2ImageProcessor",
        "video": "InternVLVideoProcessor",
        "image": "<IMG_CONTEXT>\n",
        "token": "<IMG_CONTEXT>",
        "named": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    },
}
TEXTS = ["What colour is the left half? It is red.", "user\nassistant\nsystem\n\n", "green blue white black"] * 20


@cache
def write_image_model(folder: Path, family: str, config: str = "{}") -> Any:
    """Write the folder of a model without weights and return its processor. `config`: more of config.json."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    form = FAMILIES[family]
    special = ["<pad>", "<|im_start|>", "<|im_end|>", form["token"], *form.get("more", ())]
    special = list(dict.fromkeys([*special, *form.get("named", {}).values()]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=form.get("named")
    )
    tokenizer.chat_template = _CHATML.replace("IMAGE", form["image"])
    parts = {"image_processor": getattr(transformers, form["image_processor"])(**form.get("pixels", {}))}
    if "video" in form:
        parts["video_processor"] = getattr(transformers, form["video"])()
    processor = getattr(transformers, form["processor"])(
        **parts, tokenizer=tokenizer, **form.get("settings", {}), chat_template=tokenizer.chat_template
    )
    processor.save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids(form["token"])
    settings = {"model_type": family, "image_token_id": token} | json.loads(config)
    (folder / "config.json").write_text(json.dumps(settings))
    return processor


def picture(size: tuple[int, int], seed: int = 0) -> Any:
    """Return a random PIL image of (width, height)."""
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def write_trainable(folder: Path, family: str) -> None:
    """Write the folder of a small vision-language model with random weights, a tokenizer and a processor."""
    import torch

    from distlora.architecture.checkpoint_files import hf_config_of
    from distlora.derive.shrink import shrink
    from distlora.model.hf_model import auto_class_of, transformers_model
    from support.image_configs import image_content

    tokenizer = write_image_model(folder, family).tokenizer
    config = shrink(image_content(family)["config"])
    config["text_config"] |= {"vocab_size": 512, "max_position_embeddings": 131072}
    names = {"image_token_id": FAMILIES[family]["token"], "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    names |= {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>"}
    for name, token in names.items():
        if name in config:
            config[name] = tokenizer.convert_tokens_to_ids(token)
    config["text_config"]["eos_token_id"] = tokenizer.eos_token_id
    hf_config = hf_config_of(config, family)
    torch.manual_seed(0)
    auto_class = auto_class_of(hf_config, family)
    model = transformers_model(
        hf_config, family, auto_class=auto_class, attention="eager", dtype=torch.float32, device="cpu"
    )
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        if head is not model.get_input_embeddings().weight:
            head.mul_(25)  # A random head of std 0.02 cannot tell tokens apart, whatever is learned below it.
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.05)  # Gemma 3's projector starts at zero, and would hide its images.
    model.save_pretrained(folder)


def write_colours(folder: Path, count: int, *, pairs: bool = False) -> None:
    """Write images of two coloured halves, and chats that ask for the colour of one of them; every fifth has no image.

    With `pairs` as preferences of the right colour over another.
    """
    from PIL import Image

    draw = random.Random(0)
    records = []
    for number in range(count):
        left, right = draw.choice(list(COLOURS)), draw.choice(list(COLOURS))
        width, height = draw.choice([(56, 56), (84, 56), (56, 112)])
        image = Image.new("RGB", (width, height), COLOURS[left])
        image.paste(COLOURS[right], (width // 2, 0, width, height))
        image.save(folder / f"{number}.png")
        side = draw.choice(["left", "right"])
        colour = left if side == "left" else right
        content: Any = [{"type": "image", "image": f"{number}.png"}]
        content += [{"type": "text", "text": f"What colour is the {side} half?"}]
        if number % 5 == 4:
            content = f"Say {colour}."
        question = {"role": "user", "content": content}
        if pairs:
            other = draw.choice([name for name in COLOURS if name != colour])
            answers = {"chosen": colour, "rejected": other}
            sides = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
            records.append({"prompt": [question], **sides})
        else:
            records.append({"messages": [question, {"role": "assistant", "content": colour}]})
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
