"""Merge a base and its adapter into one model in Hugging Face format, streamed, with a receipt."""
