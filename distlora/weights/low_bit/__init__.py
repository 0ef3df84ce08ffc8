"""Weights in low bits as checkpoints ship them: values of any range, and stored blocks."""
