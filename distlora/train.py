"""The worker: `python -m distlora.train RUN`, started once a rank by torchrun. A table of contents of a run.

Everything it does is in RUN/config.yaml and RUN/data.json, both written by the launcher; a run with checkpoints
continues from the newest whole one.
"""

from __future__ import annotations

import json
import shutil
import sys
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
from distlora.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from distlora.parallel import Ranks, join_ranks, leave_ranks, parallelize
from distlora.peft_format import CONFIG_NAME, WEIGHTS_NAME, adapter_config, adapter_tensors
from distlora.reporting import Reporter
from distlora.trainer import Trainer, peak_memory_bytes

MODEL_NAME = "model.safetensors"
COMPANIONS = (".json", ".jinja", ".txt", ".model")
"""What of a base's folder goes into RUN/model beside the weights, by suffix."""


def run(run_dir: Path, ranks: Ranks) -> None:
    """One run, or the rest of one, on this rank."""
    config = load_config(run_dir)
    loader, eval_loader = open_data(run_dir, config, ranks)
    total_steps = config.train.max_steps or config.train.epochs * loader.steps_per_epoch
    identity = Identity(base_fingerprint=fingerprint(Path(config.model.path)), data_cache=data_cache(run_dir))
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
        optimizer = build_optimizer(trained.values(), config.optim)
        if newest is not None:
            restore(newest, model, trained, optimizer)
            reporter.event(f"continuing from {newest.name}")
        backend.reduce_gradients_of(list(trained.values()), config.parallel.bucket_mb)
        describe(reporter, model, loaded, config)
        describe_steps(reporter, loader, total_steps)

        def save(progress: Progress) -> None:
            if backend.writes:
                names: dict[torch.Tensor, str] = {parameter: name for name, parameter in trained.items()}
                files = {**weight_files(model, config), checkpoint.TRAINER_NAME: optimizer_tensors(optimizer, names)}
                environment = checkpoint.environment(ranks.world, ranks.device)
                state = TrainState(progress=progress, identity=identity, environment=environment)
                checkpoint.save(run_dir / "checkpoints" / f"step_{progress.step:08d}", files, state)
                checkpoint.prune(run_dir / "checkpoints", config.train.keep)
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
            save=save,
        )
        trainer.fit()
        summarize(reporter, trainer, loaded, trained)
        if backend.writes:
            reporter.event(f"saved {publish_result(run_dir, model, config)}")
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


def data_cache(run_dir: Path) -> str:
    """The name of the run's tokenized cache: the hash of what is in it."""
    return Path(json.loads((run_dir / "data.json").read_text())["cache"]).name


def trained_parameters(model: CausalLM) -> dict[str, nn.Parameter]:
    """What the optimizer updates, by name, in forward order: the adapters, or everything."""
    return adapter_parameters(model) or {name: p for name, p in model.named_parameters() if p.requires_grad}


def weight_files(model: CausalLM, config: Config) -> dict[str, dict]:
    """The files of a checkpoint that hold what was trained: an adapter in PEFT's format, or the whole model."""
    if config.adapter.method == "full":
        return {MODEL_NAME: model.hf_state_dict()}
    tensors = adapter_tensors(model)
    return {CONFIG_NAME: adapter_config(config, model), WEIGHTS_NAME: dict(tensors)}


@torch.no_grad()
def restore(folder: Path, model: CausalLM, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Take the trained parameters and the optimizer's state from a checkpoint."""
    has_adapter = (folder / WEIGHTS_NAME).is_file()
    own = dict(adapter_tensors(model)) if has_adapter else model.hf_state_dict()
    for name, tensor in checkpoint.load_tensors(folder, WEIGHTS_NAME if has_adapter else MODEL_NAME).items():
        own[name].copy_(tensor)
    load_optimizer_tensors(optimizer, trained, checkpoint.load_tensors(folder, checkpoint.TRAINER_NAME))


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
            f"read {loaded.bytes_read / 2**20:,.0f} MiB on rank 0 and quantized in {loaded.seconds:.1f} s"
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
    reporter.summary(figures)


def publish_result(run_dir: Path, model: CausalLM, config: Config) -> Path:
    """RUN/adapter (PEFT format) or RUN/model (a Hugging Face folder), whole or not at all."""
    full = config.adapter.method == "full"
    target = run_dir / ("model" if full else "adapter")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    if full:
        for path in Path(config.model.path).iterdir():  # The tokenizer and the generation config come along.
            if path.suffix in COMPANIONS and not path.name.endswith(".index.json"):
                shutil.copy2(path, temporary / path.name)
        # In the base's own dtype, which the fp32 masters are rounded to once, here.
        dtype = model.hf_config.dtype or torch.float32
        model.hf_config.save_pretrained(temporary)
        tensors = {name: tensor.to(dtype) for name, tensor in model.hf_state_dict().items()}
        checkpoint.write_files(temporary, {MODEL_NAME: tensors})
    else:
        checkpoint.write_files(temporary, weight_files(model, config))
    checkpoint.publish(temporary, target)
    return target


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
