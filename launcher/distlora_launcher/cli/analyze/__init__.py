"""`distlora analyze WHAT ...`: what can be learned of a base and of an adapter by looking at them."""

from __future__ import annotations

from distlora_launcher.terminal.arguments import Subjects

ANALYSES = {
    "quantization": "MODEL: what NF4 and int4 cost a model: errors by layer, bits, perplexity, with plots",
    "spectrum": "RUN: singular values of dW, its rank by layer, intruder dimensions; against full fine-tuning",
    "intrinsic": "MODEL ...: how many dimensions fine-tuning needs, pretrained and random, by training in subspaces",
}

main = Subjects("analyze", "analyse", __name__, ANALYSES).run
