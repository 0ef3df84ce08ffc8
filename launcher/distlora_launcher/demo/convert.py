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

    from distlora.derive.gguf import tokenizer_of
    from distlora.derive.gguf_header import read_gguf_header

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
    tokenizer = tokenizer_of(Path(file), read_gguf_header(Path(file)))
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
