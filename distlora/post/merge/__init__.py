"""A base and what was trained on it as one model in Hugging Face format, streamed, with a receipt of what that cost."""
