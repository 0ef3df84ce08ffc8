"""Which kernels a run's blocks take, by its settings and its device: what memory and time are planned by alike. Imports
no torch.
"""

from __future__ import annotations

from distlora.config import Config
from distlora.decoder_sizes import Decoder
from distlora.families import Family


def attends_by_documents(config: Config, family: Family, decoder: Decoder, *, is_gpu: bool) -> bool:
    """Whether attention is flash attention within each document, or computes all pairs of a row and hides some by a
    mask (attention.py, `choose`)."""
    takes_heads = decoder.head_size % 8 == 0 and decoder.head_size <= 256
    return is_gpu and family.attention == "sdpa" and config.train.dtype == "bf16" and takes_heads


def fuses(config: Config, family: Family, *, is_gpu: bool, has_liger: bool) -> bool:
    """Whether norms are liger-kernel's (liger.py) or compiled (compiled.py); so are MLPs and rotary embeddings where
    there is no DoRA."""
    if config.adapter.method == "full" or family.experts is not None:
        return False
    return config.train.liger and has_liger if is_gpu else config.train.compile
