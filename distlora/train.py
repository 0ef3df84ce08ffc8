"""The worker: `python -m distlora.train RUN`, started once a rank by torchrun. A table of contents of a run.

Everything it does is in RUN/config.yaml and RUN/data.json, both written by the launcher; a run with checkpoints
continues from the newest whole one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from distlora import checkpoint
from distlora.adapters import adapter_parameters, reset_adapters
from distlora.checkpoint import Identity, Progress, TrainState
from distlora.config import Config, UserError
from distlora.config_file import load_config
from distlora.data.loader import StepLoader
from distlora.data.prepare import open_split
from distlora.loading.segments import fingerprint
from distlora.loading.weights import Loaded, load_base
from distlora.model import CausalLM, build_model, count_parameters, materialize_buffers
from distlora.optim import build_optimizer
from distlora.parallel import Backend, Ranks, join_ranks, leave_ranks, parallelize
from distlora.peft_format import load_initial_adapter
from distlora.reporting import Reporter
from distlora.results import BEST_NAME, finish, publish_result, restore, weight_files
from distlora.trainer import Hooks, Trainer, peak_memory_bytes


def run(run_dir: Path, ranks: Ranks) -> None:
    """One run, or the rest of one, on this rank."""
    config = load_config(run_dir)
    loader, eval_loader = open_data(run_dir, config, ranks)
    total_steps = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    data = json.loads((run_dir / "data.json").read_text())
    # Of the tokenized cache, its name: the hash of what is in it.
    identity = Identity(base_fingerprint=fingerprint(Path(config.model.path)), data_cache=Path(data["cache"]).name)
    chat_template: str | None = data["chat_template"]
    newest, damaged = checkpoint.newest(run_dir / "checkpoints")
    progress = Progress()
    if newest is not None:
        state = checkpoint.load_state(newest)
        checkpoint.check_matches(state, newest, identity)
        progress = state.progress

    with Reporter(
        run_dir, config, rank=ranks.rank, world=ranks.world, total_steps=total_steps, start_step=progress.step
    ) as reporter:
        for line in damaged:
            reporter.event(line)
        model = build_model(config)
        backend = parallelize(model, ranks, config)
        loaded = load_base(model, config.model.path, backend)
        materialize_buffers(model, ranks.device)
        reset_adapters(model.adapted_linears(), config.adapter, seed=config.train.seed)
        trained = trained_parameters(model)
        optimizer = build_optimizer(trained, config.optim)
        if newest is not None:
            restore(newest, model, optimizer)
            reporter.event(f"continuing from {newest.name}")
        elif config.adapter.init_from is not None:
            load_initial_adapter(model, config)
            reporter.event(f"starting from the adapter in {config.adapter.init_from}")
        backend.reduce_gradients_of(list(trained.values()), config.parallel.bucket_mb)
        describe(reporter, model, loaded, config)
        describe_steps(reporter, loader, total_steps)

        def save(progress: Progress) -> None:
            if backend.writes:
                files = {**weight_files(model, config), checkpoint.TRAINER_NAME: optimizer.state_tensors()}
                environment = checkpoint.environment(ranks.world, ranks.device)
                state = TrainState(progress=progress, identity=identity, environment=environment)
                checkpoint.save(run_dir / "checkpoints" / f"step_{progress.step:08d}", files, state)
                checkpoint.prune(run_dir / "checkpoints", config.train.keep)
            backend.barrier()

        def publish_best(progress: Progress) -> None:
            if backend.writes:
                publish_result(run_dir / BEST_NAME, model, config, chat_template)
            backend.barrier()

        trainer = Trainer(
            model,
            backend,
            optimizer,
            loader=loader,
            eval_loader=eval_loader,
            progress=progress,
            total_steps=total_steps,
            reporter=reporter,
            config=config,
            hooks=Hooks(save=save, publish_best=publish_best, sample=sample_hook(model, backend, config, reporter)),
        )
        trainer.fit()
        summarize(reporter, trainer, loaded, trained)
        if backend.writes:
            reporter.event(f"saved {finish(run_dir, model, config, progress, chat_template)}")
        backend.barrier()


def open_data(run_dir: Path, config: Config, ranks: Ranks) -> tuple[StepLoader, StepLoader | None]:
    """The loaders of the training rows and, if there are any, of the held-out rows."""
    settings = config.train

    def loader(split: str, *, shuffle: bool) -> StepLoader | None:
        rows = open_split(run_dir, split)
        if rows is None:
            return None
        return StepLoader(
            rows,
            global_batch=settings.global_batch,
            micro_batch=settings.micro_batch,
            rank=ranks.rank,
            world=ranks.world,
            seed=settings.seed,
            shuffle=shuffle,
        )

    train = loader("train", shuffle=True)
    if train is None:
        raise UserError(f"{run_dir} has no prepared training rows; start the run with `distlora train`")
    return train, loader("eval", shuffle=False)


def sample_hook(model: CausalLM, backend: Backend, config: Config, reporter: Reporter) -> Callable[[int], None] | None:
    """Shows what the model writes, where the config asks for samples. UserError for a prompt that cannot be asked."""
    if config.train.sample_every is None:
        return None
    # Here, as it imports much of transformers that other runs need not.
    from distlora.generation.sampler import Sampler

    sampler = Sampler(model, backend, config)
    return lambda step: reporter.samples(step, sampler())


def trained_parameters(model: CausalLM) -> dict[str, nn.Parameter]:
    """What the optimizer updates, by name, in forward order: the adapters, or everything."""
    return adapter_parameters(model) or {name: p for name, p in model.named_parameters() if p.requires_grad}


def describe(reporter: Reporter, model: CausalLM, loaded: Loaded, config: Config) -> None:
    """What was built, in two lines."""
    total, trainable = count_parameters(model)
    reporter.event(
        f"{model.hf_config.model_type}, {total:,} parameters in the base, {trainable:,} trained "
        f"({trainable / total:.2%}), {config.train.dtype}"
    )
    if loaded.bits_per_weight is not None:
        reporter.event(
            f"{loaded.quantized_weights:,} of them in NF4 at {loaded.bits_per_weight:.3f} bits each; "
            f"read {loaded.bytes_read / 2**20:,.0f} MiB on rank 0 "
            f"{'as stored' if loaded.prequantized else 'and quantized'} in {loaded.seconds:.1f} s"
        )


def describe_steps(reporter: Reporter, loader: StepLoader, total_steps: int) -> None:
    """How many steps of how many rows, and whether ranks will compute rows that are not there."""
    slots = loader.world * loader.micro_batch * loader.accumulation
    rows = min(loader.global_batch, len(loader.rows))
    line = f"{total_steps:,} step{'s' if total_steps > 1 else ''} of {rows:,} row{'s' if rows > 1 else ''}"
    if rows < slots:
        line += f"; each computes {slots - rows:,} empty rows beside them (global_batch {loader.global_batch:,}, "
        line += f"{loader.world} ranks x micro_batch {loader.micro_batch} x {loader.accumulation}"
        line += f", {len(loader.rows):,} rows in all)" if len(loader.rows) < loader.global_batch else ")"
    reporter.event(line)


def summarize(reporter: Reporter, trainer: Trainer, loaded: Loaded, trained: dict[str, nn.Parameter]) -> None:
    """RUN/summary.json: the figures that a person compares runs by. Every rank must call it."""
    backend, progress = trainer.backend, trainer.progress
    peak = torch.tensor(peak_memory_bytes(backend.ranks.device), dtype=torch.float64, device=backend.ranks.device)
    figures: dict[str, float] = {
        "peak_memory_bytes": int(backend.max_over_ranks(peak)),
        "trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
        "train_seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds,
    }
    if trainer.config.adapter.method == "lora":
        figures["adapter_bytes"] = sum(parameter.nbytes for parameter in trained.values())
    if loaded.bits_per_weight is not None:
        figures["bits_per_parameter"] = loaded.bits_per_weight
    if trainer.step_traffic is not None:  # None: the checkpoint that was resumed is the last step's.
        gathered = trainer.step_traffic.gathered_bytes
        extra = backend.unpacked_extra_bytes(trainer.model, trainer.passes_per_step)
        figures["gathered_bytes_per_step"] = gathered
        figures["gathered_bytes_per_step_bf16"] = gathered + extra
        figures["reduced_bytes_per_step"] = trainer.step_traffic.reduced_bytes
    if progress.evaluations:
        figures["base_eval_loss"] = progress.evaluations[min(progress.evaluations)]
        figures["eval_loss"] = progress.evaluations[max(progress.evaluations)]
        if progress.best_step is not None:
            figures["best_eval_loss"] = progress.evaluations[progress.best_step]
            figures["best_step"] = progress.best_step
    reporter.summary(figures)


@record
def main() -> None:
    """Entry of a worker process; torchrun's error file gets the exception of a rank that fails."""
    if len(sys.argv) != 2:
        raise UserError(
            "usage: python -m distlora.train RUN (the launcher does this; start runs with `distlora train`)"
        )
    ranks = join_ranks()
    run(Path(sys.argv[1]), ranks)
    leave_ranks(ranks)


if __name__ == "__main__":
    main()
