"""A process of its own (`python -m distlora_launcher.demo.answers BASE ADAPTER QUESTION FILE`): PEFT loads the result.

Writes {"before": ..., "after": ...} to FILE: the greedy answers of the base as Hugging Face loads it, without and with
the adapter. Nothing of distlora computes here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LONGEST_ANSWER = 60
"""Tokens; a base this small repeats itself beyond that."""


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Return the greedy answer to one question, as text without special tokens."""
    import torch

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(base: str, adapter: str, question: str, file: str) -> None:
    """Write the answers of the base and of the adapter to a file."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    plain = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, trust_remote_code=False)
    model = PeftModel.from_pretrained(plain, adapter)
    with model.disable_adapter():
        before = answer(model, tokenizer, question)
    after = answer(model, tokenizer, question)
    Path(file).write_text(json.dumps({"before": before, "after": after}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
