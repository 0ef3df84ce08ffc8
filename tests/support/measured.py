"""Measure runs: processes and their memory, random models and sequences, a run without a folder."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors.torch
import torch
from torch import nn

from distlora.checkpoint.state import RunProgress, identity_of
from distlora.config import Config
from distlora.data.loader import step_loader
from distlora.data.rows import STARTS, TRAINED, PackedRows
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Gradients, Ranks
from distlora.parallel.watch import Control
from distlora.training.compile_choice import decide_compile
from distlora.training.loop import Trainer
from distlora.training.open_run import OpenRun
from distlora.training.optimizers import Optimizer, build_optimizer
from distlora.training.reporter import Reporter
from distlora.training.setup import start_adapters, start_run_model
from distlora.training.trial import Hooks, TrainedParts, Trial
from distlora.training.worker import trained_parameters


def free_port() -> int:
    """Return a free TCP port of the loopback interface, for a rendezvous of ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def anonymous_bytes(process: int | str = "self") -> int:
    """Return RssAnon of a process, in bytes. RuntimeError where Linux does not report it."""
    with open(f"/proc/{process}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no RssAnon; this measurement needs Linux 4.5 or newer")


class PeakMemory:
    """Sample this process' anonymous memory: `with PeakMemory() as memory: ...`, then `memory.peak` in bytes.

    The peak is relative to the memory at the start. Anonymous memory is what counts against a job's limit and cannot be
    dropped.
    """

    def __enter__(self) -> PeakMemory:
        self.start, self.peak, self._done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes() - self.start)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, anonymous_bytes() - self.start)
            time.sleep(0.002)


@contextlib.contextmanager
def set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for processes that are started inside: libraries read them when they are loaded."""
    before = dict(os.environ)
    os.environ |= variables
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_each(
    target: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    *,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run target(*values, results) once for each of `arguments`, in fresh processes, and return their figures.

    Each process puts (its number, its figures) into `results`; the returned list is ordered by number. `environment`
    holds variables set in the processes, beside this process' environment. Raises RuntimeError if a process failed; the
    others are terminated.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*values, results)) for values in arguments]
    with set_environment(environment or {}):
        for process in processes:
            process.start()
    answers: list[tuple[int, Any]] = []
    # Read before waiting: a process whose figures fill the pipe ends only when they are read.
    while len(answers) < len(processes) or any(process.is_alive() for process in processes):
        with contextlib.suppress(queue.Empty):
            answers.append(results.get(timeout=0.2))
        if any(process.exitcode for process in processes):
            break
    failed = [process.exitcode for process in processes if process.exitcode]
    if failed:
        for process in processes:
            process.terminate()
        raise RuntimeError(f"{target.__name__} failed with exit code {failed[0]}; its error is above")
    return [figures for _, figures in sorted(answers, key=lambda each: each[0])]


def set_rank(rank: int, world: int, port: int) -> None:
    """Set torch.distributed's environment variables of one rank on this node."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}


def llama(*, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Return config.json of a Llama of up to 4,096 tokens."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
    }


LLAMA_700M = llama(vocabulary=32_000, hidden=2048, inner=5632, layers=14, heads=32, kv_heads=8)
"""A Llama with 762 million parameters."""
LLAMA_1B5 = LLAMA_700M | {"intermediate_size": 6400, "num_hidden_layers": 28}
"""A Llama with 1.53 billion parameters, 1.39 of them in linears of its decoder layers."""


def write_random_checkpoint(folder: Path, settings: dict[str, Any], *, num_shards: int) -> int:
    """Write a bf16 Llama with random weights in `num_shards` safetensors files. Returns the number of parameters.

    One array of random numbers is repeated through all weights: generating fresh ones takes longer than loading them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**settings, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    noise = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        shard_names = names[shard * len(names) // num_shards : (shard + 1) * len(names) // num_shards]
        tensors = {}
        for name in shard_names:
            shape = shapes[name]
            repeated = noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape).clone()
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else repeated
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard_names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.numel() for shape in shapes.values())


def random_rows(count: int, length: int, vocabulary: int) -> PackedRows:
    """Return sequences of one document each, in which every token but the first is trained."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (count, length), dtype=np.int32)
    flags = np.full((count, length), TRAINED, np.uint8)
    flags[:, 0] |= STARTS
    flags[:, -1] &= ~np.uint8(TRAINED)
    return packed(tokens, flags)


def packed(tokens: np.ndarray, flags: np.ndarray) -> PackedRows:
    """Return tokens and flags (sequences, length) as the trainer's packed sequences, without their documents."""
    targets = np.count_nonzero(flags & TRAINED, axis=1).astype(np.int32)
    return PackedRows(tokens, flags, targets, np.zeros(len(tokens), np.int32), 0, {})


def random_tokens(rows: int, length: int, vocabulary: int, rank: int) -> torch.Tensor:
    """Return (rows, length) int64 tokens, different on each rank."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(rank))


def ignore(*arguments: Any) -> None:
    """Do nothing, in place of a log, a save or a publication."""


class Quiet(Reporter):
    """A reporter that writes nothing and keeps the newest loss."""

    def __init__(self, config: Config) -> None:
        steps = config.train.max_steps or 0  # Only rank 0 writes.
        super().__init__(Path(config.run_dir), config, rank=1, world=2, total_steps=steps, progress=RunProgress())

    def log(self, step: int, metrics: Mapping[str, float], **rest: Any) -> None:
        """Keep the loss."""
        self.loss = metrics["loss"]


@dataclass(slots=True)
class Started:
    """A run's model and optimizer before the first step. Every rank makes it alike."""

    config: Config
    ranks: Ranks
    model: CausalLM
    backend: Backend
    trained: dict[str, nn.Parameter]
    gradients: Gradients
    optimizer: Optimizer

    @classmethod
    def of(cls, config: Config, ranks: Ranks) -> Self:
        """Build the model, load its weights and start its adapters and optimizer."""
        config, _ = decide_compile(config, ranks)
        model, backend, _ = start_run_model(config, ranks)
        trained = trained_parameters(model)
        gradients = backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
        optimizer = build_optimizer(backend.updated(trained), config.optim)
        start_adapters(model, config.spec, backend, config.train, restores=False, log=ignore)
        return cls(config, ranks, model, backend, trained, gradients, optimizer)

    def trainer(self, rows: PackedRows, *, save: Callable[[RunProgress], None] = ignore) -> tuple[Trainer, Quiet]:
        """Return a trainer of train.max_steps steps over the sequences in their order, and its reporter."""
        settings, quiet = self.config.train, Quiet(self.config)
        assert settings.max_steps is not None
        run = OpenRun(
            folder=Path(),
            config=self.config,
            loader=step_loader(rows, settings, self.ranks, shuffle=False),
            eval_loader=None,
            data={},
            identity=lambda: identity_of(self.config, data_digest="", base_identity=""),
            made_on={},
            newest=None,
            progress=RunProgress(),
            notes=[],
        )
        trained = TrainedParts(trained_parameters(self.model), self.gradients, self.optimizer)
        hooks = Hooks(save=save, save_last=save, publish_best=ignore)
        trial = Trial(self.model, self.backend, run, trained, quiet, hooks)
        trainer = Trainer(self.model, self.backend, Control(self.ranks.control, save_minutes=None), trial)
        return trainer, quiet
