"""Write a small vision-language model of random weights into model/, and chats about pictures into data/.

The demo has no model that sees, so this one is made here. It knows no language; it shows that a run learns what only
the picture tells. Use a real model's name in its place: model.path=Qwen/Qwen3-VL-2B-Instruct.
"""

import json
import random
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    + START
    + IMAGE
    + END
    + "{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder):
    """Write a Qwen3-VL of four decoder layers, with a tokenizer and an image processor."""
    special = ["<pad>", "<|im_start|>", "<|im_end|>", IMAGE, VIDEO, START, END]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"user assistant What colour is it? {' '.join(COLOURS)}."] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<|im_end|>")
    images, videos = Qwen2VLImageProcessor(patch_size=16, merge_size=2), Qwen3VLVideoProcessor()
    Qwen3VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids
    text = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": ids("<|im_end|>"),
    }
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [8, 4, 4],
        "mrope_interleaved": True,
    }
    tower = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": 16,
        "out_hidden_size": 128,
    }
    tower |= {"deepstack_visual_indexes": [1], "num_position_embeddings": 64}
    tokens = {"image_token_id": ids(IMAGE), "video_token_id": ids(VIDEO)}
    tokens |= {"vision_start_token_id": ids(START), "vision_end_token_id": ids(END)}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=tower, **tokens))
    with torch.no_grad():  # A random head of std 0.02 cannot tell tokens apart, whatever is learned below it.
        model.lm_head.weight.mul_(25)
    model.save_pretrained(folder)


def write_chats(folder, count):
    """Write pictures of one colour with a little noise, and questions about it."""
    draw = random.Random(0)
    folder.mkdir(exist_ok=True)
    with open(folder / "chats.jsonl", "w") as file:
        for number in range(count):
            name = draw.choice(list(COLOURS))
            colour = tuple(max(0, min(255, value + draw.randrange(-20, 21))) for value in COLOURS[name])
            Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
            image = {"type": "image", "image": f"{number}.png"}
            asked = [image, {"type": "text", "text": "What colour is it?"}]
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]
            file.write(json.dumps({"messages": chat}) + "\n")


write_model(Path("model"))
write_chats(Path("data"), 200)
