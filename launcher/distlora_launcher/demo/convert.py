"""A process of its own (`python -m distlora_launcher.demo.convert FILE.gguf FOLDER`): a GGUF file as a folder.

Writes an ordinary Hugging Face folder with the dequantized weights in bf16. The launcher imports no torch, so this does
not happen in it.
"""

import sys
from pathlib import Path


def main(file: str, folder: str) -> None:
    """Write config.json, model.safetensors, the tokenizer and its chat template to a folder."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    place, name = Path(file).parent, Path(file).name
    # transformers keeps the weights packed by default since it can, and cannot save those.
    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.bfloat16, trust_remote_code=False, **dense
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name, trust_remote_code=False)
    # The file names SmolLM's pre-tokenizer, which transformers does not read: each digit is a token of its own.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
