"""Model of a decoder: transformers' modules with a frozen 4-bit base, its adapters and its LM head."""
