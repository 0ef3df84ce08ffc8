"""A process of its own (`python -m distlora_launcher.demo.initial_model FOLDER TEXT.jsonl`): the model to pretrain.

Writes an ordinary Hugging Face folder: a small Llama with random weights, a byte-level BPE tokenizer trained on the
text, and a chat template. The launcher imports no torch, so this does not happen in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 4096
HIDDEN, LAYERS, HEAD_DIM, KEY_VALUE_HEADS = 256, 2, 64, 2
INTERMEDIATE = 704
POSITIONS = 1024
INITIALIZER_RANGE = 0.05
"""Standard deviation of the random weights: near 1/sqrt(HIDDEN), above the usual 0.02, which suits wider models."""

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
"""END closes a document of plain text and a turn of a chat alike, so that pretraining has taught it before any chat."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] == 'assistant' %}}{{{{ '{ASSISTANT}' }}}}"
    f"{{% generation %}}{{{{ message['content'] + '{END}' }}}}{{% endgeneration %}}"
    f"{{% else %}}{{{{ '{USER}' + message['content'] + '{END}' }}}}{{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}{{% endif %}}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of VOCABULARY tokens, the four special ones first; the same for the same texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=POSITIONS
    )
    wrapped.add_special_tokens({"additional_special_tokens": [USER, ASSISTANT]})
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """2.5 million parameters; stored in bf16, as models of this kind are."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD_DIM,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def write_initial_model(folder: Path, texts: Iterable[str]) -> None:
    """FOLDER/{config.json, model.safetensors, tokenizer.json, ...}."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(tokenizer)).bfloat16().save_pretrained(folder)


def main(folder: str, text_file: str) -> None:
    """Write the model folder for a text file."""
    with Path(text_file).open(encoding="utf-8") as lines:
        write_initial_model(Path(folder), (json.loads(line)["text"] for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
