"""Weights in low bits as checkpoints ship them: values of any range, and stored blocks."""

from distlora.weights.low_bit.codecs import CODECS
from distlora.weights.low_bit.gguf import GgufCodec

CODECS["gguf"] = GgufCodec()
