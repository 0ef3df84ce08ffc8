"""Which settings, and what would fit."""
