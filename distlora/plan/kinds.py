"""What memory is asked for, and when. Imports no torch."""

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

Moment = Literal["loading", "embedding", "forward", "head", "head_backward", "block", "update", "evaluation"]
"""When a run may be at its peak: while the base is read, at the embedding, a block in forward, the head in its forward,
the head in its backward, a block in its backward, the optimizer, a forward without backward."""
MOMENTS: tuple[Moment, ...] = get_args(Moment)
