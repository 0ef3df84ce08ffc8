"""Our model of a decoder: transformers' own modules with what a frozen 4-bit base and its adapters need."""
