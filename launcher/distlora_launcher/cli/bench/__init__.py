"""`distlora bench WHAT ...`: what this machine does, beside what the plan says and what the peers do."""

from __future__ import annotations

from distlora_launcher.terminal.subjects import Subjects

BENCHES = {
    "step": "a training step beside PEFT + bitsandbytes, Trainer and accelerate's FSDP2: speed, memory, bytes, losses",
    "load": "reading and quantizing a checkpoint, with and without the cache, beside transformers + bitsandbytes",
    "checkpoint": "a save and a resume of a run, beside PEFT's, Trainer's and accelerate's: bytes, seconds",
    "memory": "what a step has in memory, by kind, planned and measured",
    "methods": "adapter methods and full fine-tuning on the demo's base and data: losses, memory, time",
    "kernels": "the GPU kernels; with --offline what they compile to, without a GPU",
}

main = Subjects("bench", "measure", __name__, BENCHES).run
