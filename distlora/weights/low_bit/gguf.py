NOTE_NAME = "gguf.json"
