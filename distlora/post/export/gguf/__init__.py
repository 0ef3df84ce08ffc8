"""Write GGUF files for llama.cpp: a merged model, or a LoRA adapter."""
