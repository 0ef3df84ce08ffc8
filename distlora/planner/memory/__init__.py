"""Memory of a rank on its device, by category and by moment of the peak. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    "codes",  # of NF4
    "scales",  # of NF4, both levels
    "weights",  # of linears that are not quantized
    "embeddings",  # embedding and head
    "norms",  # what else of the base: norms, biases, routers, the rotary embedding's frequencies
    "resident",  # blocks that stay gathered
    "adapters",  # with trained rows of tokens, DoRA's norms of rows, and the start that DPO compares with
    "gradients",  # of all that is trained
    "optimizer",
    "scratch",  # dequantized weights
    "gathered",  # blocks, embedding and head while they are whole, and the buffers that they come in
    "kept",  # activations from forward to backward
    "working",  # activations of what runs
    "logits",  # a chunk of them, and what the head has beside it
    "communication",  # buckets, staging
    "slack",  # of the allocator
]
KINDS: tuple[Kind, ...] = get_args(Kind)

Moment = Literal["loading", "embedding", "forward", "head", "head_backward", "block", "embedding_backward", "update"]
"""When a run may be at its peak: while adapters are made from the base, at the embedding, a block in forward, the head
in its forward, the head in its backward, a block in its backward, the embedding in its backward, the optimizer. A
forward without backward, an evaluation's, has less in each part than a training step: it keeps nothing. Samples
(train.sample_every) are in none: how many tokens a prompt has is known when it is encoded. Beside what is held they
take keys and values of every prompt and of train.sample_tokens (70B: 0.33 MB a token), which may be more than a step of
short rows takes."""
MOMENTS: tuple[Moment, ...] = get_args(Moment)
