"""`distlora bench NAME ...`: measure this machine beside the plan and beside other libraries."""

from __future__ import annotations

from distlora_launcher.terminal.arguments import Subjects

BENCHES = {
    "step": "a training step beside PEFT + bitsandbytes, Trainer and accelerate FSDP2: speed, memory, traffic, losses",
    "load": "loading and quantizing a checkpoint, with and without the cache, beside transformers + bitsandbytes",
    "checkpoint": "a save and a resume beside PEFT, Trainer and accelerate: bytes, seconds",
    "memory": "the memory of a training step by category, planned and measured",
    "methods": "adapter methods and full fine-tuning on the demo's base and data: losses, memory, time",
    "kernels": "the GPU kernels; with --offline their compiled code, without a GPU",
}

main = Subjects("bench", "measure", __name__, BENCHES).run
