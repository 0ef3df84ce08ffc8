"""Time greedy generation beside transformers' generate on bitsandbytes' NF4, in one process on a CPU.

    python benchmarks/generate.py MODEL [--prompts 1,8,32] [--adapter]

Both hold the model's base in NF4 with double quantization and generate to the last of --tokens tokens. Ours computes in
bf16, the peer in its faster dtype: fp32 where products of bf16 are widened. They take turns, and a ratio compares turns
of one round. CPU seconds are those of the process: other work on the machine changes them less than the time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distlora.config import Config
from distlora.config.file import build
from distlora.generation.engine import Engine
from distlora.generation.sampling import Request
from distlora.parallel import Ranks
from distlora.results.record import Table
from distlora.system.progress import say
from distlora.training.setup import start_run_model
from distlora_kernels import processor
from measuring import libraries_print_to_stderr, load_base, measurement_notes, number, numbers, parser_of, show, spread

PROMPT_TOKENS = 32
WANTED = 2.0
"""Required ratio of tokens per second, for 1, 8 and 32 prompts at once."""
Generate = Callable[[list[list[int]], int], None]


def turn(run: Generate, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of a call."""
    began, cpu = time.perf_counter(), time.process_time()
    run(prompts, tokens)
    return time.perf_counter() - began, time.process_time() - cpu


def ways(folder: Path, *, adapter: bool) -> dict[str, Generate]:
    """Return what each library does with prompts of one length and a number of tokens."""
    sections: dict[str, Any] = {"model": {"path": str(folder)}, "data": {"path": "none"}, "run_dir": "none"}
    sections |= {"quant": {"cache": False}, "adapter": {"target_modules": "all-linear", "r": 16}}
    model, backend, _ = start_run_model(build(Config, sections), Ranks(0, 1, torch.device("cpu"), None))
    peer = load_base(folder, dtype=torch.float32 if processor.widens() else torch.bfloat16)
    slot = None if adapter else -1

    def ours(prompts: list[list[int]], count: int) -> None:
        requests = [Request(prompt, max_new_tokens=count, temperature=0.0, slot=slot) for prompt in prompts]
        Engine(model, backend, compiled=True).run(requests)

    def theirs(prompts: list[list[int]], count: int) -> None:
        ids = torch.tensor(prompts)
        exactly = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        peer.generate(ids, attention_mask=torch.ones_like(ids), **exactly)

    return {"distlora": ours, "transformers + bitsandbytes": theirs}


def main() -> int:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("model", type=Path, help="folder of a model in Hugging Face format")
    parser.add_argument("--prompts", type=numbers, default=(1, 8, 32), help="numbers of prompts at once (1,8,32)")
    parser.add_argument("--tokens", type=number, default=100, help="tokens of a completion (%(default)s)")
    parser.add_argument("--rounds", type=number, default=3, help="turns of each library (%(default)s)")
    parser.add_argument("--threads", type=number, default=2, help="threads (%(default)s)")
    parser.add_argument("--adapter", action="store_true", help="ours with a LoRA adapter, r = 16 on every linear")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator, rows = torch.Generator().manual_seed(0), []
    with libraries_print_to_stderr():
        both = ways(options.model, adapter=options.adapter)
        for count in options.prompts:
            prompts = torch.randint(5, 1000, (count, PROMPT_TOKENS), generator=generator).tolist()
            for run in both.values():
                run(prompts, 2)
            turns = [[turn(run, prompts, options.tokens) for run in both.values()] for _ in range(options.rounds)]
            say(f"{count} prompts: measured")
            rates = [spread([count * options.tokens / each[way][0] for each in turns]) for way in range(2)]
            ratios = (statistics.median(theirs[kind] / ours[kind] for ours, theirs in turns) for kind in range(2))
            required = f"{WANTED}" if count in (1, 8, 32) else ""
            rows.append([f"{count}", *rates, *(f"{ratio:.2f}" for ratio in ratios), required])
    heads = ["prompts at once", *(f"{name}, tokens/s" for name in both), "ratio", "ratio by CPU seconds", "required"]
    table = Table(f"greedy, {options.tokens} tokens after prompts of {PROMPT_TOKENS}", heads, rows)
    show("Generation", [table], measurement_notes("transformers", "bitsandbytes"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
