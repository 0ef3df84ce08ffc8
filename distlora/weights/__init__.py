"""Read and write weights on disk: safetensors, low-bit source formats, the quantized-weights cache, PEFT folders."""
