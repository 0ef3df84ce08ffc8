"""Memory of a rank on its device, by category and by phase of the peak. Imports no torch."""

from __future__ import annotations

Kind = str
"""A category of memory: a key of KINDS."""
KINDS = {
    "codes": "codes of the base weights",
    "scales": "quantization scales",
    "weights": "16-bit weights of the base",
    "embeddings": "embedding and LM head",
    "norms": "norms and biases",  # With routers and the rotary embedding's frequencies.
    "images": "vision tower",  # With the projector, whole on each rank.
    "dense": "dense copies of 4-bit weights",
    "resident": "resident decoder layers",
    "adapters": "trained parameters, fp32",  # With DoRA's norms of rows, DPO's reference, and copies in bf16.
    "rewards": "reward models",  # Values of adapters on this base, and classifiers whole on each rank.
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "scratch": "dequantized weights",
    "gathered": "gathered from other ranks",  # With the buffers that units come in.
    "kept": "activations saved for backward",
    "working": "activations of what runs",
    "logits": "logits and their gradients",  # Of a chunk, with the LM head's memory beside it.
    "communication": "communication buffers",
    "slack": "allocator slack",
}
"""Categories of memory, in words."""

Phase = str
"""A phase of a run at which memory may peak: a key of PHASES."""
PHASES = {
    "loading": "while adapters are initialized from the base",
    "images": "in the vision tower",
    "embedding": "in the embedding's forward",
    "forward": "in a decoder layer's forward",
    "head": "in the LM head's forward",
    "head_backward": "in the LM head's backward",
    "block": "in a decoder layer's backward",
    "embedding_backward": "in the embedding's backward",
    "update": "in the optimizer step",
}
"""Phases, in words. An evaluation has less in each part than a training step. Samples (train.sample_every) are in
none: beside what is held they take keys and values of every prompt and of train.sample_tokens (70B: 0.33 MB per
token)."""
