"""A save and a resume of a run, ours beside the peers', each way in processes of its own.

python -m distlora.bench.checkpoint [--r 16] [--tokens 64] [--rounds 4] [--layers 6] ...
                                                                            (`distlora bench checkpoint`)
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from distlora.bench.checkpoint import ours
from distlora.bench.checkpoint.saved import FLOOR, Saved
from distlora.bench.checkpoints import write_random_checkpoint
from distlora.bench.machine import made_here
from distlora.bench.network import free_port
from distlora.bench.processes import own_stdout, run_each
from distlora.output.figures import draw_bars
from distlora.output.result_files import Results
from distlora.output.tables import Table
from distlora.parallel import join_ranks, leave_ranks

MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
WAYS = {
    ("ours", 1): "ours",
    ("save_pretrained", 1): "PEFT save_pretrained",
    ("trainer", 1): "transformers Trainer",
    ("ours", 2): "ours on 2 ranks",
    ("accelerate", 2): "accelerate on 2 ranks, as it runs on a CPU",
    ("fsdp2", 2): "accelerate on 2 ranks, FSDP2 forced",
}


def rank_main(
    rank: int, world: int, port: int, way: str, folder: Path, out: Path, sizes: dict[str, int], results: Any
) -> None:
    """One rank's process."""
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(max(1, sizes["threads"] // world))
    ranks = join_ranks()
    r, tokens, rounds = sizes["r"], sizes["tokens"], sizes["rounds"]
    if way == "ours":
        found = ours.measure(folder, out, ranks, r=r, tokens=tokens, rounds=rounds)
    else:
        from distlora.bench.checkpoint import peers

        arguments: dict[str, Any] = {"r": r, "tokens": tokens, "saves": rounds + 1}
        if way in ("accelerate", "fsdp2"):
            found = peers.accelerate(folder, out, ranks, **arguments, forced=way == "fsdp2")
        else:
            found = (peers.trainer if way == "trainer" else peers.save_pretrained)(folder, out, ranks, **arguments)
    results.put((rank, found))
    leave_ranks(ranks)


def measure(folder: Path, adapter_ranks: Sequence[int], **sizes: int) -> Iterator[Saved]:
    """Every way on the model in `folder`, by the adapters' rank. `sizes`: tokens of a step, rounds, threads in all."""
    with tempfile.TemporaryDirectory() as temporary:
        for r in adapter_ranks:
            for number, ((way, world), name) in enumerate(WAYS.items()):
                print(f"r={r}: {name}", file=sys.stderr, flush=True)
                out = Path(temporary) / f"r{r}-{number}"
                out.mkdir()
                port = free_port()
                arguments = [(rank, world, port, way, folder, out, {"r": r, **sizes}) for rank in range(world)]
                yield from run_each(rank_main, arguments)[0]


def make_model(folder: Path, *, layers: int) -> int:
    """Returns its parameters."""
    return write_random_checkpoint(folder, MODEL | {"num_hidden_layers": layers}, num_shards=1)


def results(rows: Sequence[Saved], *, parameters: int, threads: int) -> Results:
    """`parameters`: of the model. `threads`: of all processes of a way."""
    head = ["", "ranks", "r", "MB", f"of {FLOOR} B a parameter", "training thread, ms", "CPU ms", "on the disk, ms"]
    lines = [[*head, "resume, ms", "CPU ms", "goes on"]]
    for row in rows:
        cells = [row.way, str(row.ranks), str(row.r), f"{row.nbytes / 1e6:.1f}", f"{row.over_floor:.2f}"]
        cells += [*_ms(row.save.seconds, row.save.cpu_seconds, row.on_disk)]
        cells += ["", ""] if row.resume is None else [*_ms(row.resume.seconds, row.resume.cpu_seconds)]
        cells.append("yes" if row.fault is None else f"no: {row.fault.partition(':')[0]}")
        lines.append(cells)
    names = {f"{row.way}, {row.ranks}, r={row.r}": row for row in rows}
    panels = [
        ("MB", {name: row.nbytes / 1e6 for name, row in names.items()}),
        ("ms of the training thread a save", {name: 1e3 * row.save.seconds for name, row in names.items()}),
        ("ms of a resume", {name: 1e3 * row.resume.seconds for name, row in names.items() if row.resume is not None}),
    ]
    heading = f"Adapters on every linear of a random Llama of {parameters / 1e6:.0f}M parameters; medians, on rank 0"
    return Results(
        name="checkpoint",
        heading="A save and a resume of a run",
        notes=made_here("transformers", "peft", "accelerate", "bitsandbytes", threads=threads),
        tables=[Table(heading, lines)],
        rows=[flat(row) for row in rows],
        reading=list(reading(rows)),
        draw=lambda path: draw_bars("A save and a resume", panels, path),
    )


def reading(rows: Sequence[Saved]) -> Iterator[str]:
    for own in (row for row in rows if row.way == "ours"):
        assert own.step is not None
        share = own.save.seconds / own.step.seconds
        yield (
            f"Ours on {own.ranks} rank{'s' if own.ranks > 1 else ''}, r={own.r}: a save takes {share:.1%} of a step of "
            f"{own.step.seconds:.2f} s from the thread that trains, and is {own.over_floor:.3f} of what a run needs to "
            f"go on; saving beside them adds {own.slower:+.1%} to the CPU seconds of steps."
        )
        for peer in rows:
            if peer.r == own.r and peer.ranks == own.ranks and not peer.way.startswith("ours"):
                times = (getattr(peer.save, name) / getattr(own.save, name) for name in ("seconds", "cpu_seconds"))
                yield (
                    f"{peer.way}, {peer.ranks}, r={peer.r}: {' and '.join(f'{each:.1f}' for each in times)} times ours "
                    f"of the training thread, by the clock and by CPU; {peer.nbytes / own.nbytes:.2f} times the bytes."
                )
    yield from (f"{row.way}, {row.ranks}, r={row.r}: {row.fault}" for row in rows if row.fault is not None)
    yield (
        "Ours hashes every file, syncs it to the disk and reads it back before older ones go, off the training thread; "
        "a resume hashes it again. The peers do neither. What ours resumed was what it had saved, bit for bit."
    )


def flat(row: Saved) -> dict[str, Any]:
    return {
        "way": row.way,
        "ranks": row.ranks,
        "r": row.r,
        "trained_parameters": row.trained,
        "bytes": row.nbytes,
        "save_seconds": row.save.seconds,
        "save_cpu_seconds": row.save.cpu_seconds,
        "on_disk_seconds": row.on_disk,
        "resume_seconds": None if row.resume is None else row.resume.seconds,
        "resume_cpu_seconds": None if row.resume is None else row.resume.cpu_seconds,
        "step_seconds": None if row.step is None else row.step.seconds,
        "fault": row.fault,
    }


def _ms(*seconds: float) -> Iterator[str]:
    return (f"{1e3 * each:,.1f}" for each in seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r", default="16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with own_stdout(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = make_model(folder, layers=options.layers)
        sizes = {"tokens": options.tokens, "rounds": options.rounds, "threads": options.threads}
        rows = list(measure(folder, [int(rank) for rank in options.r.split(",")], **sizes))
    found = results(rows, parameters=parameters, threads=options.threads)
    found.show(out=options.out, as_json=options.json)
