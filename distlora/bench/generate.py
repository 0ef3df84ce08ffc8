"""Measure generation beside transformers' generate on bitsandbytes' NF4: `python -m distlora.bench.generate MODEL`.

Both hold the model's base in NF4 with double quantization, in one process on a CPU, and generate greedily, to the last
of `--tokens` tokens. Ours computes in bf16, the peer in its faster dtype: fp32 where products of bf16 are widened. They
take turns, and a ratio compares turns of one round. CPU seconds are those of the process: other work on the machine
changes them less than the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distlora.bench.host import libraries_print_to_stderr, measurement_notes
from distlora.bench.peer_models import load_base
from distlora.config import Config
from distlora.config.file import build
from distlora.generation.engine import Engine
from distlora.generation.requests import Request
from distlora.output.results import Table, spread
from distlora.parallel import Ranks
from distlora.system.progress import say
from distlora.training.setup import start_run_model
from distlora_kernels import processor

PROMPT_TOKENS = 32
WANTED = {1: 2.0, 8: 2.0, 32: 2.0}
"""Required ratio of tokens per second, by prompts at once."""


def turn(run: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of a call."""
    began, cpu = time.perf_counter(), time.process_time()
    run(*arguments)
    return time.perf_counter() - began, time.process_time() - cpu


def ways(folder: Path, *, adapter: bool) -> dict[str, Callable[[list[list[int]], int], None]]:
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


def main() -> None:
    """Print a table with a line for each number of prompts."""
    parser = argparse.ArgumentParser(prog="python -m distlora.bench.generate", description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a model in Hugging Face format")
    parser.add_argument("--prompts", default="1,8,32", help="numbers of prompts at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of a completion (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each library (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--adapter", action="store_true", help="ours with a LoRA adapter, r = 16 on every linear")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with libraries_print_to_stderr():
        table = measured(options)
    print(table.markdown(), measurement_notes("transformers", "bitsandbytes"), sep="\n\n")


def measured(options: argparse.Namespace) -> Table:
    """Return a line for each number of prompts."""
    generator = torch.Generator().manual_seed(0)
    both = ways(options.model, adapter=options.adapter)
    rows = []
    for number in map(int, options.prompts.split(",")):
        prompts = torch.randint(5, 1000, (number, PROMPT_TOKENS), generator=generator).tolist()
        for run in both.values():
            run(prompts, 2)
        turns = [[turn(run, prompts, options.tokens) for run in both.values()] for _ in range(options.rounds)]
        say(f"{number} prompts: measured")
        ours, theirs = zip(*turns, strict=True)
        rates = [spread([number * options.tokens / seconds for seconds, _ in way]) for way in (ours, theirs)]
        pairs = list(zip(ours, theirs, strict=True))
        ratios = [statistics.median(other[kind] / own[kind] for own, other in pairs) for kind in range(2)]
        wanted = WANTED.get(number)
        rows.append([f"{number}", *rates, *(f"{ratio:.2f}" for ratio in ratios), "" if wanted is None else f"{wanted}"])
    heads = ["prompts at once", *(f"{name}, tokens/s" for name in both), "ratio", "ratio by CPU seconds", "required"]
    return Table(f"greedy, {options.tokens} tokens after prompts of {PROMPT_TOKENS}", [heads, *rows])


if __name__ == "__main__":
    main()
