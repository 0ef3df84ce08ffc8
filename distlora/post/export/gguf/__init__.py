"""GGUF, what llama.cpp loads: a merged model, or a LoRA adapter for one."""
