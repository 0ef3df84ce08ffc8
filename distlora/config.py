"""Every setting of a run: frozen dataclasses whose field docstrings say what grows or breaks.

A run is described once, by the launcher, as RUN/config.yaml; every rank and every resume builds the same `Config` from
that file. This module imports neither torch nor hydra, so the launcher can refuse a wrong value in a second. What a
single field can tell (ranges, names) is checked here, in `__post_init__`; what needs the model's folder or the data
file is checked by the launcher (`distlora_launcher/checks.py`), before any worker starts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(ValueError):
    """Bad input: the message holds the value, the reason and what to type instead. Ends a command with exit code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the choice closest to a mistyped word, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            value is None or 0 < value < math.inf,
            f"{section}.{name}={value} must be positive; set {section}.{name} to a number above 0",
        )


MODEL_FAMILIES = ("llama", "qwen3")
"""model_type values whose ForCausalLM.forward is decoder, linear head and nothing more (read in transformers 5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    path: str
    """A local folder in Hugging Face format: config.json, safetensors (one file or sharded with an index), tokenizer.
    """


DATA_FORMATS = ("auto", "chat", "prompt_completion", "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str
    """A jsonl file, one document a line: {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}."""
    format: Literal["auto", "chat", "prompt_completion", "text"] = "auto"
    """Which of the three every line has; `auto` reads it off the first line."""
    sequence_length: int = 1024
    """Tokens in a row; documents are packed into rows. Activation memory grows linearly with it, attention
    quadratically.
    """
    eval_fraction: float = 0.05
    """Share of the documents that is held out, chosen by a hash of (seed, index); 0 with no eval_path: no evaluation.
    """
    eval_path: str | None = None
    """A jsonl file of held-out documents instead of a fraction of `path`."""
    cache_dir: str = "~/.cache/distlora/data"
    """Where tokenized rows are kept, content-addressed: a second run with the same data does not tokenize again."""

    def __post_init__(self) -> None:
        require(
            self.format in DATA_FORMATS,
            f"data.format={self.format!r} is not one of {', '.join(DATA_FORMATS)}{nearest(self.format, DATA_FORMATS)}",
        )
        require(
            self.sequence_length >= 2,
            f"data.sequence_length={self.sequence_length} leaves no token to predict; set it to 2 or more",
        )
        require(
            0 <= self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction} is not a share of the documents; set it from 0 to below 1",
        )


TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Names and meanings follow PEFT's LoraConfig."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank adapters on a frozen base; `full` trains every parameter (the baseline; needs quant=none).
    """
    r: int = 16
    """Rows of A and columns of B. Adapter, gradient and optimizer memory grow linearly with it."""
    lora_alpha: float = 16.0
    """Numerator of the scale s: alpha/sqrt(r) with use_rslora, else alpha/r."""
    use_rslora: bool = True
    """Scale by alpha/sqrt(r) (Kalajdzievski 2023), which keeps the update's size independent of r."""
    target_modules: str | tuple[str, ...] = "attention"
    """Which linears get an adapter: a preset (qv, attention, mlp, all-linear), a list of module names (the last parts
    of their paths), or a regular expression that matches whole paths."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts (B is zero): Kaiming-uniform as in PEFT, or a normal distribution of std 1/r."""

    def __post_init__(self) -> None:
        methods = ("lora", "full")
        require(
            self.method in methods,
            f"adapter.method={self.method!r} is not one of {', '.join(methods)}{nearest(self.method, methods)}",
        )
        require(self.r > 0, f"adapter.r={self.r} is not a rank; set adapter.r=1 or more (16 is the usual start)")
        _positive("adapter", self, "lora_alpha")
        inits = ("kaiming", "gaussian")
        require(
            self.init in inits,
            f"adapter.init={self.init!r} is not one of {', '.join(inits)}{nearest(self.init, inits)}",
        )
        require(len(self.target_modules) > 0, "adapter.target_modules is empty; set adapter.target_modules=attention")

    @property
    def scaling(self) -> float:
        """s in y = x W^T + s (x A^T) B^T: alpha/sqrt(r) (rsLoRA, arXiv 2312.03732) or alpha/r (LoRA, 2106.09685)."""
        return self.lora_alpha / self.r**0.5 if self.use_rslora else self.lora_alpha / self.r


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    method: Literal["nf4", "none"] = "nf4"
    """`nf4` keeps the linears of the decoder blocks in NF4 with double quantization, 4.127 bits a weight; `none` keeps
    them in the run's dtype."""

    def __post_init__(self) -> None:
        methods = ("nf4", "none")
        require(
            self.method in methods,
            f"quant.method={self.method!r} is not one of {', '.join(methods)}{nearest(self.method, methods)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    backend: Literal["fsdp2"] = "fsdp2"
    """What shards the frozen base over the ranks. One process needs no sharding and gets none."""
    prefetch: bool = True
    """Gather the next block while this one computes. Two blocks are then resident instead of one."""
    bucket_mb: float = 4.0
    """MiB of adapter gradients in one all-reduce. Smaller buckets overlap earlier and cost more launches."""

    def __post_init__(self) -> None:
        require(
            self.backend == "fsdp2", f"parallel.backend={self.backend!r} is not available; set parallel.backend=fsdp2"
        )
        _positive("parallel", self, "bucket_mb")


SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) on fp32 masters, and the schedule of its learning rate."""

    lr: float = 2e-4
    """Peak learning rate, reached after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of the trained parameters."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up, down to 0 at the last step (cosine, linear)."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "eps")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={list(self.betas)} must be two numbers from 0 to below 1; set optim.betas=[0.9,0.999]",
        )
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is negative; set optim.weight_decay=0")
        require(self.max_grad_norm >= 0, f"optim.max_grad_norm={self.max_grad_norm} is negative; 0 turns clipping off")
        require(
            self.schedule in SCHEDULES,
            f"optim.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}{nearest(self.schedule, SCHEDULES)}",
        )
        require(
            0 <= self.warmup_ratio <= 1, f"optim.warmup_ratio={self.warmup_ratio} is not a share; set it from 0 to 1"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    epochs: int = 1
    """Passes over the packed rows."""
    max_steps: int | None = None
    """Number of optimizer steps instead of `epochs`; the rows are repeated, reshuffled, as often as that takes."""
    global_batch: int = 8
    """Rows in one optimizer step, over all ranks and accumulation steps. Results do not depend on how they are split.
    """
    micro_batch: int = 1
    """Rows that a rank runs at once. Activation memory grows linearly with it."""
    accumulate: Literal["step", "block"] = "step"
    """Where a rank's micro-batches are looped over: `step` runs the model once for each (every block is gathered each
    time); `block` runs each block over all of them while it is gathered once, and keeps all boundary activations."""
    checkpointing: Literal["block", "none"] = "block"
    """`block` keeps only the inputs of each decoder block and recomputes it in backward: about 1/3 more compute."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype. Adapters, their gradients and the optimizer stay fp32."""
    seed: int = 0
    """Names every random choice of the run: initialization, held-out split, order of the rows."""
    log_every: int = 1
    """Steps between reads of the device's counters (a host sync); every step is still logged, a few at a time."""
    eval_every: int | None = None
    """Steps between held-out evaluations; null: before the first and after the last step only."""
    save_every: int | None = None
    """Steps between checkpoints; null: at the end only."""
    keep: int = 2
    """Newest checkpoints that are kept."""

    def __post_init__(self) -> None:
        _positive(
            "train",
            self,
            "epochs",
            "max_steps",
            "global_batch",
            "micro_batch",
            "log_every",
            "eval_every",
            "save_every",
            "keep",
        )
        for name, choices in {
            "accumulate": ("step", "block"),
            "checkpointing": ("block", "none"),
            "dtype": ("bf16", "fp32"),
        }.items():
            value = getattr(self, name)
            require(
                value in choices,
                f"train.{name}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}",
            )
        require(0 <= self.seed < 2**63, f"train.seed={self.seed} must be from 0 to 2^63 - 1; set train.seed=0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerConfig:
    name: Literal["wandb", "none"] = "wandb"
    """`wandb` logs beside metrics.jsonl: online with a key, offline under RUN/wandb without; `none` writes
    metrics.jsonl only.
    """
    project: str = "distlora"
    """Project in wandb."""
    group: str | None = None
    """Group in wandb."""
    tags: tuple[str, ...] = ()
    """Tags in wandb."""

    def __post_init__(self) -> None:
        names = ("wandb", "none")
        require(
            self.name in names,
            f"tracker.name={self.name!r} is not one of {', '.join(names)}{nearest(self.name, names)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """Worker processes on each machine: one a GPU, or that many CPU processes where there is none."""

    def __post_init__(self) -> None:
        _positive("cluster", self, "gpus_per_node")
        require(
            self.nodes == 1,
            f"cluster.nodes={self.nodes}: more than one needs the SLURM launcher, not built yet; set cluster.nodes=1",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run. The sections are Hydra's config groups (conf/)."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    name: str = "distlora"
    """Names the run in its folder and in wandb."""
    run_dir: str
    """The run folder: config.yaml, metrics.jsonl, logs/, checkpoints/, adapter/."""

    def __post_init__(self) -> None:
        if self.adapter.method == "full":
            require(
                self.quant.method == "none",
                f"adapter=full trains every parameter, which quant={self.quant.method} cannot store; add quant=none",
            )
