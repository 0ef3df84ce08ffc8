"""Generation with a model in training form: prompts, an engine with a paged key-value cache, and sampling."""
