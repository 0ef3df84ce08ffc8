"""A training step of ours and of the peers on two gloo ranks of this machine, counted; JSON on stdout.

    python -m distlora.bench.measured [--accumulation 1,8] [--tied]        (`distlora bench comm --measure` runs it)

As root on Linux the ranks have a network of their own, whose bytes are read too: what nobody else sends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distlora.bench.checkpoints import write_random_checkpoint
from distlora.bench.comm import PEERS, SMALL, Counted, our_name
from distlora.bench.network import free_port, take_own_network
from distlora.bench.processes import own_stdout, run_each
from distlora.bench.traffic import Counts, measure_ours, measure_peer
from distlora.config import Config
from distlora.config.file import build
from distlora.parallel import Ranks

RANKS = 2
ADAPTER_RANK, LENGTH = 16, 32


def config_of(folder: Path, accumulate: str) -> Config:
    """A run on the model in `folder` with an adapter on every linear."""
    sections: dict[str, Any] = {
        "model": {"path": str(folder)},
        "data": {"path": "none", "sequence_length": LENGTH},
        "adapter": {"r": ADAPTER_RANK, "target_modules": "all-linear"},
        "train": {"accumulate": accumulate},
        "run_dir": "none",
    }
    return build(Config, sections)


def measure(ranks: Ranks, folder: Path, accumulations: Sequence[int]) -> Iterator[Counted]:
    """Every cell on this rank."""
    for accumulation in accumulations:
        for accumulate in ("step", "block"):
            config = config_of(folder, accumulate)
            counts, traffic = measure_ours(config, ranks, accumulation=accumulation)
            own = {kind: getattr(traffic, f"{kind}_bytes") for kind in ("gathered", "scattered", "reduced")}
            yield _counted(our_name(config), accumulation, counts, own)
        for storage, who in PEERS.items():
            counts, became = measure_peer(
                folder, ranks, storage, r=ADAPTER_RANK, length=LENGTH, accumulation=accumulation
            )
            assert became.startswith("FSDP"), f"accelerate trained with something else: {became}"
            yield _counted(who, accumulation, counts, None)


def _counted(who: str, accumulation: int, counts: Counts, own: dict[str, int] | None) -> Counted:
    values = asdict(counts)
    del values["calls"]
    return Counted(who=who, accumulation=accumulation, by_backend=own, **values)


def rank_main(rank: int, port: int, folder: Path, accumulations: Sequence[int], results: Any) -> None:
    """One rank's process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(rank, RANKS, torch.device("cpu"), dist.group.WORLD)
    results.put((rank, list(measure(ranks, folder, accumulations))))
    dist.barrier()
    dist.destroy_process_group()


def run(accumulations: Sequence[int], *, own_network: bool, tied: bool) -> list[Counted]:
    """What each step carried on a rank. Raises RuntimeError where a rank failed, or counted another step than rank 0.

    `own_network`: nobody but the ranks uses this process' loopback interface. `tied`: the model's head is its
    embedding.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_random_checkpoint(folder, SMALL | {"tie_word_embeddings": tied}, num_shards=1)
        port = free_port()
        first, *others = run_each(rank_main, [(rank, port, folder, tuple(accumulations)) for rank in range(RANKS)])
    without_network = [[dataclasses.replace(row, loopback=None) for row in rows] for rows in (first, *others)]
    if any(rows != without_network[0] for rows in without_network):
        raise RuntimeError("the ranks carried different numbers of bytes")
    return first if own_network else without_network[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--tied", action="store_true", help="of a model whose head is its embedding")
    options = parser.parse_args(arguments)
    own_network = take_own_network()
    with own_stdout():
        rows = run(options.accumulation, own_network=own_network, tied=options.tied)
    print(json.dumps([asdict(row) for row in rows]), flush=True)


if __name__ == "__main__":
    main()
