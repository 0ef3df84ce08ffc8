"""A model by its config.json and its tokenizer: its family, its shapes, what of it is adapted."""
