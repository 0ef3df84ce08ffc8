"""Compare a save and a resume of a run, each way in its own processes.

python -m distlora.bench.checkpoint.compare REQUEST      (requests.CheckpointBench)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from distlora.bench.checkpoint import ours
from distlora.bench.checkpoint.saved import FLOOR, Saved
from distlora.bench.host_counters import free_port
from distlora.bench.machine import measurement_notes
from distlora.bench.processes import libraries_print_to_stderr, run_each, set_rank
from distlora.bench.random_inputs import write_random_checkpoint
from distlora.bench.requests import CheckpointBench, from_argument
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
"""config.json of the random Llama."""
WAYS = {
    ("ours", 1): "ours",
    ("save_pretrained", 1): "PEFT save_pretrained",
    ("trainer", 1): "transformers Trainer",
    ("ours", 2): "ours on 2 ranks",
    ("accelerate", 2): "accelerate on 2 ranks, as it runs on a CPU",
    ("fsdp2", 2): "accelerate on 2 ranks, FSDP2 forced",
}
"""(way, ranks) and its title."""


def rank_main(
    rank: int, world: int, port: int, way: str, folder: Path, out: Path, sizes: dict[str, int], results: Any
) -> None:
    """Measure one way on one rank."""
    if world > 1:
        set_rank(rank, world, port)
    torch.set_num_threads(max(1, sizes["threads"] // world))
    ranks = join_ranks()
    r, tokens, rounds = sizes["r"], sizes["tokens"], sizes["rounds"]
    if way == "ours":
        rows = ours.measure(folder, out, ranks, r=r, tokens=tokens, rounds=rounds)
    else:
        from distlora.bench.checkpoint import peers

        arguments: dict[str, Any] = {"r": r, "tokens": tokens, "saves": rounds + 1}
        if way in ("accelerate", "fsdp2"):
            rows = peers.accelerate(folder, out, ranks, **arguments, forced=way == "fsdp2")
        else:
            rows = (peers.trainer if way == "trainer" else peers.save_pretrained)(folder, out, ranks, **arguments)
    results.put((rank, rows))
    leave_ranks(ranks)


def measure(folder: Path, adapter_ranks: Sequence[int], **sizes: int) -> Iterator[Saved]:
    """Yield every way on the model in `folder`, for each adapter rank.

    Args:
        folder: The model's folder.
        adapter_ranks: Ranks of the adapters.
        sizes: tokens per step, rounds, threads of all processes.
    """
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
    """Write the random model. Returns its number of parameters."""
    return write_random_checkpoint(folder, MODEL | {"num_hidden_layers": layers}, num_shards=1)


def results(rows: Sequence[Saved], *, parameters: int, threads: int) -> Results:
    """Return the table; `parameters` counts the model's, `threads` those of all processes of a way."""
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
        notes=measurement_notes("transformers", "peft", "accelerate", "bitsandbytes", threads=threads),
        tables=[Table(heading, lines)],
        rows=[flat(row) for row in rows],
        reading=list(reading(rows)),
        draw=lambda path: draw_bars("A save and a resume", panels, path),
    )


def reading(rows: Sequence[Saved]) -> Iterator[str]:
    """Yield a sentence for each of ours and each peer beside it."""
    for saved in (row for row in rows if row.way == "ours"):
        assert saved.step is not None
        share = saved.save.seconds / saved.step.seconds
        yield (
            f"Ours on {saved.ranks} rank{'s' if saved.ranks > 1 else ''}, r={saved.r}: a save takes {share:.1%} of a "
            f"step of {saved.step.seconds:.2f} s on the training thread and {saved.over_floor:.3f} of the bytes that a "
            f"resume needs; saving in the background adds {saved.slower:+.1%} to the CPU seconds of a step."
        )
        for peer in rows:
            if peer.r == saved.r and peer.ranks == saved.ranks and not peer.way.startswith("ours"):
                times = (getattr(peer.save, name) / getattr(saved.save, name) for name in ("seconds", "cpu_seconds"))
                yield (
                    f"{peer.way}, {peer.ranks}, r={peer.r}: {' and '.join(f'{each:.1f}' for each in times)} times ours "
                    f"on the training thread (wall-clock, CPU); {peer.nbytes / saved.nbytes:.2f} times the bytes."
                )
    yield from (f"{row.way}, {row.ranks}, r={row.r}: {row.fault}" for row in rows if row.fault is not None)
    yield (
        "Ours hashes every file, syncs it to disk and reads it back before older checkpoints are removed, off the "
        "training thread; a resume hashes it again. The peers do neither. The resumed state of ours equals the saved "
        "one bit for bit."
    )


def flat(row: Saved) -> dict[str, Any]:
    """Return a row's figures in bytes and seconds."""
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


def main() -> None:
    """Run the worker: measure as the request says, and print."""
    request = from_argument(CheckpointBench)
    with libraries_print_to_stderr(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        parameters = make_model(folder, layers=request.layers)
        sizes = {"tokens": request.tokens, "rounds": request.rounds, "threads": request.threads}
        rows = list(measure(folder, request.r, **sizes))
    report = results(rows, parameters=parameters, threads=request.threads)
    report.show(out=None if request.out is None else Path(request.out), as_json=request.json)


if __name__ == "__main__":
    main()
