"""Check a run before any process starts, without torch. Each refusal names the value, the reason and what to type.

The stages, in their order:

typed    `check_settings` in distlora.config: values alone, as the settings are composed
files    the run folder, the DeepSpeed file, the beginning of the data
model    the base's folder and headers, and settings that it does not support
machine  this node: GPUs, packages, folders to write, the user's code, what an earlier start has fixed

A new run passes all of them. A resume passes model and machine again, as the base and the node may have changed, and
`check_changeable` for settings that were changed in RUN/config.yaml; a node of a SLURM job passes `check_machine`.
Workers read RUN/config.yaml and trust it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.architecture.config_checks import check_config, check_train, read_config
from distlora.architecture.gguf_folder import NOTE_NAME, gguf_file
from distlora.architecture.images import image_layout, image_packages
from distlora.architecture.kept_weights import kept_by, nf4_outside_layers
from distlora.architecture.low_bit_headers import LowBitSegment, in_nf4
from distlora.architecture.safetensors_headers import SOURCE_DTYPES, check_stored_shape
from distlora.architecture.spec import Architecture, architecture_of
from distlora.architecture.targets import (
    check_patterns,
    check_router_loss,
    refuse_frozen_targets,
    select_adapted,
)
from distlora.architecture.tokens import check_before_tokenizer
from distlora.checkpoint.state import check_newest_settings, fixed_settings, settings_of_earlier_stages
from distlora.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    ModelSpec,
    OptimConfig,
    ParallelConfig,
    QuantConfig,
    TrainConfig,
    UserError,
    nearest,
    require,
)
from distlora.config.base import is_hub_name
from distlora.config.checks import check_changeable
from distlora.config.cluster import check_torch
from distlora.config.deepspeed_file import check_deepspeed, read_gathering, read_sections
from distlora.config.errors import FILES, as_typed
from distlora.config.objectives import OBJECTIVES
from distlora.rewards.find import check_functions, import_functions
from distlora.rewards.models import check_reward_models
from distlora.run_folder.layout import CHECKPOINTS, cannot_continue, checkpoint_folders, compiled_before
from distlora.system.exit_codes import require_package
from distlora.weights.initial_adapter_file import needs_initial_adapter, require_initial_adapter
from distlora.weights.peft_folder import (
    WEIGHTS_NAME,
    check_fits,
    check_shared,
    read_adapter_beside,
    read_peft_adapter,
)
from distlora.weights.peft_modules import check_modules, check_rows
from distlora_kernels import native

HEAD_LINES = 1000
"""Documents of each source that are checked here; the preparation reads all of them."""

ROW_TOKENS = 1024
"""Default sequence length of commands that read a text without a run."""


def check(config: Config, *, new_run: bool, before: Config | None = None) -> None:
    """Refuse a run that cannot work.

    new_run: refuse a folder that holds a run, unless several nodes share it. before: the settings that a new stage
    (`config`) replaces.
    """
    try:
        if new_run:
            if not config.cluster.on_each_node:
                check_run_dir(Path(config.run_dir))
            check_parallel(config.parallel, config.cluster.ranks)
            check_data(config.data, config.train.objective, config.run_dir)
        else:  # A user may change settings in RUN/config.yaml before a resume.
            try:
                check_changeable(config)
            except UserError as error:
                raise UserError(f"{Path(config.run_dir) / 'config.yaml'}: {error}") from error
        check_functions(config.data, on_this_node=config.cluster.launcher != "slurm")
        for image in filter(None, config.train.sample_images):
            require(Path(image).is_file(), f"train.sample_images={image} is not a file; name an image")
        check_model(config)
        if not new_run and checkpoint_folders(Path(config.run_dir)):
            checkpoints, earlier = Path(config.run_dir) / CHECKPOINTS, settings_of_earlier_stages(config.run_dir)
            earlier += [] if before is None else [fixed_settings(before)]
            check_newest_settings(checkpoints, fixed_settings(config), earlier)
            needed = needs_initial_adapter(config.adapter, is_reference=config.train.refers_to_start, restores=True)
            if config.adapter.decomposes and needed:
                require_initial_adapter(config.run_dir, config.adapter, CheckpointFiles(config.model.path))
        check_writable(Path(config.data.cache_dir), "data.cache_dir")
        if config.cluster.launcher == "slurm":  # The node that submits may differ from those that run.
            return
        check_machine(config.cluster, config.parallel, config.quant, config.optim, config.train)
        if not new_run and config.train.compile == "auto":
            check_compiled_before(Path(config.run_dir))
        if config.rollout.url is not None:
            # Imported late, as consumers are: other commands need neither.
            from distlora.generation.remote import RemoteEngine

            RemoteEngine(config.rollout.url, stop_tokens=(), run=config.name).connect()
        for name in config.tracker.names:
            if name != "wandb":  # It is always installed; a node that lacks it says so, and trains.
                require_package(name, f"tracker={name}")
        if config.data.images:
            image_packages()
        import_functions(config.data)  # Last, as it takes as long as the user's imports.
    except OSError as error:  # No permission, a name too long, a broken disk: the system's reason says enough.
        raise UserError(f"cannot read {error.filename}: {error.strerror}" if error.filename else str(error)) from error


def check_run_dir(run_dir: Path) -> None:
    """Refuse a folder that holds another run, and one that cannot be made."""
    if (run_dir / "config.yaml").is_file():
        raise UserError(
            f"run_dir={run_dir} already holds a run; continue it with `distlora resume {run_dir}`, "
            "or set another run_dir"
        )
    check_writable(run_dir, "run_dir")


def check_writable(place: Path, setting: str) -> None:
    """Refuse a folder that cannot be made or written, by trying: permissions do not tell all (root, /proc)."""
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"{setting}={place}: {existing} is a file; set another {setting}")
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{setting}={place}: cannot write in {existing} ({error.strerror}); set another {setting}"
        ) from error


DEVICES = Path("/dev")
"""Folder of the device files."""


def gpu_count() -> int:
    """Return the number of NVIDIA GPUs this process may use: by CUDA_VISIBLE_DEVICES, else by the device files.

    A container may see the files of all GPUs of its node and be refused those of the others.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len(visible_gpus(visible))
    files = [path for path in DEVICES.glob("nvidia*") if path.name[len("nvidia") :].isdigit()]
    return len([path for path in files if os.access(path, os.R_OK | os.W_OK)])


def visible_gpus(variable: str) -> list[str]:
    """Return the entries of CUDA_VISIBLE_DEVICES up to the first invalid one, where CUDA stops too."""
    entries = (entry.strip() for entry in variable.split(","))
    return list(itertools.takewhile(lambda entry: entry not in ("", "-1"), entries))


def check_machine(
    cluster: ClusterConfig, parallel: ParallelConfig, quant: QuantConfig, optim: OptimConfig, train: TrainConfig
) -> None:
    """Refuse what this node cannot run: too few GPUs, no DeepSpeed, an unknown endpoint, settings for or without a GPU.

    Without any GPU, as many CPU processes run as are set.
    """
    if cluster.on_each_node and cluster.rdzv_endpoint is not None:
        resolve_endpoint(cluster.rdzv_endpoint)
    if parallel.backend == "zero3" and cluster.ranks > 1:
        check_deepspeed()
    is_sharded = parallel.backend == "fsdp2" and cluster.ranks > 1 and parallel.shard_degree != 1
    if is_sharded and quant.method != "none":
        check_torch(importlib.metadata.version("torch"))
    check_gpu_count(cluster)
    require(
        gpu_count() > 0 or not optim.name.startswith("paged_"),
        f"optim.name={optim.name} pages optimizer states between a GPU and the host, and this node has no GPU; set "
        f"optim.name={optim.name.removeprefix('paged_')}",
    )
    if optim.name not in ("adamw", "muon"):
        require_package("bitsandbytes", f"optim.name={optim.name}", otherwise=", or set optim.name=adamw")
    if train.fused_kernels == "liger":
        require(gpu_count() > 0, "train.fused_kernels=liger is for GPUs, and this node has none; leave it out")
        require_package("liger_kernel", "train.fused_kernels=liger", otherwise=", or set train.fused_kernels=own")
    if train.compile is True and (reason := _reason_against_compiling()) is not None:
        raise UserError(f"train.compile=true {reason}; set train.compile=false")


def _reason_against_compiling() -> str | None:
    if gpu_count() > 0:
        return "is for the CPU, and this node has a GPU, where train.fused_kernels does the same"
    reason = native.unavailable_reason()
    return None if reason is None else f"needs a C++ compiler: {reason}"


def check_compiled_before(run_dir: Path) -> None:
    """Refuse to continue a run that train.compile=auto compiled where this node cannot compile it."""
    reason = _reason_against_compiling() if compiled_before(run_dir) else None
    require(reason is None, cannot_continue(run_dir, f"compiling {reason}"))


def check_gpu_count(cluster: ClusterConfig) -> None:
    """Refuse more processes than GPUs."""
    available = gpu_count()
    if 0 < available < cluster.gpus_per_node:
        raise UserError(
            f"cluster.gpus_per_node={cluster.gpus_per_node}, but this node has {available} "
            f"GPU{'s' if available > 1 else ''}; set cluster.gpus_per_node={available}"
        )


def check_parallel(parallel: ParallelConfig, ranks: int) -> None:
    """Refuse a wrong DeepSpeed file, and settings that have no effect with a single rank."""
    read_gathering(parallel)
    if parallel.deepspeed_config is not None:
        error = _schema_error(json.dumps(read_sections(parallel.deepspeed_config)[0]))
        require(not error, f"parallel.deepspeed_config={parallel.deepspeed_config}: DeepSpeed refuses {error}")
    for setting in ("offload_base", "deepspeed_config", "resident_blocks"):
        value = getattr(parallel, setting)
        require(
            not value or ranks > 1,
            f"parallel.{setting}={as_typed(value)} has no effect with one process, which does not "
            "shard the base; leave it out, or start more processes with cluster.gpus_per_node=2",
        )


@functools.cache
def _schema_error(section: str) -> str:
    """Return what DeepSpeed's schema refuses in a zero_optimization in JSON; empty if nothing. Takes seconds.

    Raises UserError if DeepSpeed cannot be imported.
    """
    check_deepspeed()
    command = [sys.executable, "-P", "-m", "distlora.parallel.deepspeed_schema", section]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or [f"its process ended with code {finished.returncode}"])[-1]
        raise UserError(
            f"parallel.deepspeed_config is checked by DeepSpeed, which could not be imported: {reason}; install it "
            "again (`python -c 'import deepspeed'` shows the whole error), or set parallel=fsdp2"
        )
    return str(json.loads(finished.stdout.splitlines()[-1]))  # DeepSpeed's log lines come before it.


@contextlib.contextmanager
def _local(model: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the model with a local folder: of one on the hub the small files and headers, before it is downloaded."""
    if is_hub_name(model.path) or gguf_file(model.path) is not None:
        from distlora_launcher.compose.hub import with_small_files

        with with_small_files(model) as local:
            yield local
    else:
        yield model


def check_model(config: Config) -> None:
    """Refuse a folder without a supported model, damaged weights, and settings that the model does not support."""
    adapter, train, url = config.adapter, config.train, config.rollout.url
    with _local(config.model) as model:
        spec = dataclasses.replace(config.spec, model=model)
        base, architecture = check_base(spec, sequence_length=config.data.sequence_length)
        require(
            train.needs.labels == 0 or "score.weight" not in base.headers,
            f"{base.folder} holds a score already (score.weight), and train.objective={train.objective} starts a "
            "new one; set model.path to a language model, or save the score with an adapter and set adapter.init_from",
        )
        check_model_sizes(config.parallel, config.quant, train, architecture, base.config)
        if config.data.images:
            layout, degree = image_layout(base.folder), config.shard_degree(config.cluster.ranks)
            require(
                not layout.reads_embedding or degree == 1,
                f"data.images=true with {degree} ranks that share the base: transformers reads this model's embedding "
                "where it is not gathered (per-layer inputs); set parallel.shard_degree=1, so that each rank has all "
                "of the base, or cluster.gpus_per_node=1",
            )
        if adapter.method == "full":
            return
        goes_on = bool(checkpoint_folders(Path(config.run_dir)))
        if needs_initial_adapter(adapter, is_reference=train.refers_to_start, restores=goes_on):
            check_initial_adapter(spec, architecture)
        if train.teacher is not None:
            read_adapter_beside("train.teacher", train.teacher, adapter, config.quant.method, architecture)
        check_reward_models(config.data, config.spec, architecture)
        if url is not None:
            from distlora.post.export.consumers import CONSUMERS, check_read_as_written

            targets = select_adapted(adapter, architecture)
            try:
                check_read_as_written(CONSUMERS["vllm"], base.config, architecture, adapter, targets)
            except UserError as error:
                raise UserError(
                    f"rollout.url={url}: vLLM would not sample with the adapter as trained: {error}; choose other "
                    "adapter.target_modules, or leave rollout.url out"
                ) from error


def check_base(
    spec: ModelSpec, *, sequence_length: int = 2, train: TrainConfig | None = None
) -> tuple[CheckpointFiles, Architecture]:
    """Return the files and the architecture of a base. Refuse one that is damaged, or that cannot have the adapter.

    train: settings of a command that trains without a run.
    """
    with _local(spec.model) as model:
        spec = dataclasses.replace(spec, model=model)
        architecture = check_model_folder(spec, sequence_length)
        base = CheckpointFiles(spec.path)
        kept_by(spec, base, architecture)
        check_tensors(base, architecture)
        check_router_loss(train, architecture, base.config)
        if train is not None:
            check_train(train, architecture)
        if spec.adapter.method == "lora":
            refuse_frozen_targets(spec.adapter.target_modules, architecture, base.headers)
            check_patterns(spec.adapter, select_adapted(spec.adapter, architecture))
        return base, architecture


def check_model_folder(spec: ModelSpec, sequence_length: int) -> Architecture:
    """Return the architecture of the model's folder. Refuse a folder without config.json or a tokenizer.

    Weights are not needed. Raises UserError also for settings that config.json rules out.
    """
    folder, model = spec.path, spec.model
    require(
        model.revision is None or model.name is not None,
        f"model.revision={model.revision} has no effect on the folder {model.path}; leave it out",
    )
    require(
        model.gguf_file is None or (folder / NOTE_NAME).is_file(),
        f"model.gguf_file={model.gguf_file} has no effect on the folder {folder}; leave it out, and set "
        "model.path to the GGUF file to train on it",
    )
    if not folder.is_dir():
        raise _no_folder(folder)
    settings = read_config(folder)
    alternatives = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in names) for names in alternatives):
        raise UserError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt); "
            "copy the tokenizer's files into it (tokenizer.save_pretrained writes them)"
        )
    full = spec.adapter.method == "full"
    architecture = check_config(settings, folder / "config.json", sequence_length=sequence_length, full=full)
    check_before_tokenizer(spec, settings)
    return architecture


def check_model_sizes(
    parallel: ParallelConfig,
    quant: QuantConfig,
    train: TrainConfig,
    architecture: Architecture,
    settings: Mapping[str, Any],
) -> None:
    """Refuse settings that a model does not support, by its config.json (`settings`) alone."""
    layers, blocks, dense = architecture.num_layers, parallel.resident_blocks, quant.num_dense
    require(
        isinstance(blocks, str) or blocks <= layers,
        f"parallel.resident_blocks={blocks} is more than the {layers:,} blocks of this model; set "
        f"parallel.resident_blocks={layers}, or auto (as many as fit)",
    )
    require(
        dense <= layers,
        f"quant.dense_layers={dense} is more than the {layers:,} layers of this model; set "
        f"quant.dense_layers={layers}, or auto (as many as fit)",
    )
    check_train(train, architecture)
    check_router_loss(train, architecture, settings)
    if train.attention == "sdpa":
        without = "train.attention=sdpa has no effect"
        why = f"{without} on {architecture.model_type}, whose attention goes through dense masks anyway; leave it out"
        require(architecture.varlen, why)
        require(
            train.dtype == "bf16",
            f"{without} with train.dtype={train.dtype}, which supports no other; leave it out",
        )
    require(
        train.compile is not True or architecture.compilable,
        f"train.compile=true: what it compiles is not what {architecture.model_type} computes in all of its layers; "
        "set train.compile=false",
    )


def _no_folder(folder: Path) -> UserError:
    if folder.exists():
        cure = "point it at the folder that holds config.json and the safetensors"
        return UserError(f"{{model.path}}={folder} is a file; {cure}")
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, siblings, cutoff=FILES)
    if not hint and not folder.parent.exists():
        hint = "; a model on the Hugging Face hub is named by its owner and its name, {model.path}=org/name"
    hint = hint or "; set {model.path} to a model's folder in Hugging Face format, or to its name on the hub (org/name)"
    return UserError(f"{{model.path}}={folder} does not exist{hint}")


def row_tokens(folder: Path) -> int:
    """Return ROW_TOKENS, or the model's context length if that is shorter."""
    model = read_config(folder)
    limit = architecture_of(model, folder / "config.json").text(model).get("max_position_embeddings")
    return min(ROW_TOKENS, limit) if isinstance(limit, int) and limit > 1 else ROW_TOKENS


def check_tensors(base: CheckpointFiles, architecture: Architecture) -> None:
    """Refuse a checkpoint that lacks a weight, or has one of another shape or dtype."""
    on_disk, parameters = base.headers, architecture.parameters()
    stored_as = architecture.on_disk(on_disk)
    head = f"{architecture.head}.weight"
    needed = [name for name in parameters if name != head or not architecture.tied]
    absent = [name for name in needed if name not in stored_as]
    if absent:
        count = f" ({len(absent)} tensors are missing in all)" if len(absent) > 1 else ""
        raise UserError(
            f"{base.folder}: no tensor {absent[0]} in its safetensors{count}; download the checkpoint again"
        )
    for name in needed:
        first, *others = stored_as[name]
        if not others and parameters[name].kind != "experts" and architecture.disk.rename(first, parameters)[1] is None:
            check_stored_shape(name, on_disk[first].shape, parameters[name].shape)
        for stored in stored_as[name]:
            segment = on_disk[stored]
            if in_nf4(segment) and not name.startswith(architecture.layer_prefix):
                raise nf4_outside_layers(name)
            if segment.dtype not in SOURCE_DTYPES and not isinstance(segment, LowBitSegment):
                raise UserError(
                    f"{segment.file}: {stored} is stored as {segment.dtype}; a base must be "
                    f"{', '.join(SOURCE_DTYPES)}, so set {{model.path}} to such a checkpoint"
                )


def check_initial_adapter(spec: ModelSpec, architecture: Architecture) -> None:
    """Refuse an adapter at init_from that does not fit the model's linears and embedding."""
    if spec.adapter.init_from is None:
        return
    initial = read_peft_adapter(spec.adapter.init_from, labels=None)  # Checked when the settings were composed.
    check_shared(check_fits(initial, spec.adapter, architecture), spec.adapter)
    file, stored, hidden = initial.folder / WEIGHTS_NAME, architecture.vocabulary, architecture.hidden
    check_rows(initial.token_rows, file, stored=stored, hidden=hidden)
    rows = range(stored, stored + len(spec.model.new_tokens) + 1)  # The worker knows how many fit into spare rows.
    check_modules(initial.modules, file, rows=rows, hidden=hidden)
    names = {spec.model.path, spec.model.name, spec.model.gguf_file}
    if initial.base is not None and Path(initial.base).name not in {Path(name).name for name in names if name}:
        base = spec.model.name or spec.model.path
        print(f"note: the adapter at init_from says that its base is {initial.base}; this run's is {base}", flush=True)


def check_data(data: DataConfig, objective: str, run_dir: str) -> None:
    """Refuse sources that are missing, empty or damaged in their first lines, and an unknown chat template.

    For a data set on the hub, its name, configuration and split are checked, unless this run has read it before.
    """
    from distlora.data.answers import check_objective
    from distlora.data.chat_template import template_source
    from distlora.data.sources import check_sources, pinned_commits

    template_source(data.template)
    form = OBJECTIVES[objective].data
    formats = check_sources(data, limit=HEAD_LINES, pinned=pinned_commits(Path(run_dir)), form=form)
    held_out = data.held_out_source
    sources = [*data.training_sources, *([held_out] if held_out is not None else [])]
    for source, format in zip(sources, formats, strict=True):
        if format is not None:
            check_objective(format, objective, source.path)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Return (host, port) of host:port or [IPv6 address]:port."""
    host, _, port = endpoint.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def resolve_endpoint(endpoint: str) -> str:
    """Return the first address of an endpoint's host. Raises UserError if this node cannot resolve it."""
    host, port = split_endpoint(endpoint)
    try:
        return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UserError(
            f"rendezvous endpoint {endpoint}: {socket.gethostname()} cannot resolve the host {host} "
            f"({error.strerror or error}); write its address, or a name that every node resolves"
        ) from error
