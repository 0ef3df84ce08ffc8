"""Settings of the run: optimizer, schedule, steps, checkpoints, evaluations and the experiment tracker."""

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Literal, NamedTuple

from distlora.config.errors import Refusals, at_least_zero, both, positive, require_choice, share
from distlora.config.objectives import OBJECTIVES, ObjectiveNeeds

DEFAULT_LR = 2e-4
"""Learning rate of adapters on a model without a published sweep."""
DEFAULT_WARMUP = 0.03
"""Fraction of the steps that are warm-up if nothing is set."""
DEFAULT_DECAY = 0.1
"""Fraction of the steps over which warmup_stable_decay decays if nothing is set."""

AUTO_EVALUATIONS = 5
"""Evaluations of a run with train.eval_every=auto, the last included and the first (before training) not."""
AUTO_SPACING = 5
"""Fewest steps between them."""
AUTO_SHARE = 5
"""Training sequences per held-out sequence that the evaluations between the first and the last run, at least. A forward
costs a third of a step, so they take at most 7 % of the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) or Muon on fp32 masters, and the schedule of the learning rate."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = "adamw"
    """`adamw` is torch's, in one fused pass. `adamw_8bit` and the paged ones are bitsandbytes': optimizer states in 8
    bits (2 bytes per parameter instead of 8), and moved to host memory while the GPU is short of it. `muon` is torch's
    (arXiv 2502.16982) for matrices, such as A and B, with momentum 0.95 and AdamW's size of an update, so that the same
    lr serves both; AdamW updates everything else: embeddings, LM head, vectors, adapters of fused experts."""
    lr: float | None = None
    """Peak learning rate, reached after the warm-up. null: by the model where a published sweep has it, else 2e-4; the
    plan says which, and RUN/config.yaml holds the number (`distlora/planner/learning_rate.py`)."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354, advises about 16 with a lower lr); 1: plain LoRA."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two optimizer states; with `muon` only of what AdamW updates."""
    eps: float = 1e-8
    """Constant that AdamW adds to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of the trained parameters."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    """Shape of the learning rate after the warm-up: down to min_lr_ratio at the last step (cosine, linear), constant,
    or constant and then linearly down over the last decay_ratio of the steps (warmup_stable_decay)."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from 0; null: warmup_ratio decides."""
    warmup_ratio: float | None = None
    """The same as a fraction of all steps; null: 0.03, unless warmup_steps is set."""
    decay_ratio: float = DEFAULT_DECAY
    """Fraction of all steps over which warmup_stable_decay decays."""
    min_lr_ratio: float = 0.0
    """Final learning rate of a decaying schedule, relative to lr."""

    @property
    def peak_lr(self) -> float:
        """Return lr, or the default where nothing has resolved null."""
        return DEFAULT_LR if self.lr is None else self.lr

    def warmup(self, total_steps: int) -> int:
        """Return the steps of the warm-up in a run of `total_steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round((DEFAULT_WARMUP if self.warmup_ratio is None else self.warmup_ratio) * total_steps)


class Cadence(NamedTuple):
    """Something that happens `times` times, evenly spaced, in each span of `steps` optimizer steps."""

    times: int
    steps: int

    def is_due(self, done: int) -> bool:
        """Return whether it follows the step after which `done` steps are done."""
        return done > 0 and done * self.times // self.steps > (done - 1) * self.times // self.steps


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Steps, batches, objective, precision and checkpoints of training."""

    objective: Literal[
        "sft", "dpo", "ipo", "orpo", "simpo", "kto", "distill", "reward", "process_reward", "grpo", "on_policy_distill"
    ] = "sft"
    """Objective: -log p of the trained tokens (`sft`), or a loss of pairs of a chosen and a rejected answer. `dpo`
    (arXiv 2305.18290) and `ipo` (2310.12036) have a reference, the model at the start of the run: no second model, 50 %
    more operations. `orpo` (2403.07691) and `simpo` (2405.14734) have none. `kto` (2402.01306) learns from single
    answers that are judged good or bad, with that reference: 150 % more operations. `distill` mixes `sft` with a
    divergence of the next-token distribution from a teacher's (2306.13649). `reward` trains a reward model on pairs
    (Bradley-Terry, 2203.02155): a score in place of the LM head. `process_reward` trains one that tells right steps of
    an answer from wrong ones (2305.20050). `grpo` samples answers to prompts and trains on their
    rewards (section `rollout`, docs/rl.md). `on_policy_distill` samples them too, and trains on a teacher's
    distribution of their tokens."""
    beta: float | None = None
    """Scale of the rewards of dpo, simpo and kto, regularization tau of ipo, weight lambda of orpo's odds ratio. A
    larger value keeps dpo, ipo and kto closer to the reference. Of distill and on_policy_distill the divergence, as in
    TRL's GKD: 0 is forward KL, 1 reverse KL, between them a Jensen-Shannon divergence. Of grpo the weight of the KL
    divergence from the initial model; 0 needs no reference (as TRL, DAPO and Dr. GRPO). null: 0.1; 2 with simpo, 1 with
    on_policy_distill, 0 with distill and grpo."""
    label_smoothing: float | None = None
    """Probability that a pair's answers are in the wrong order, from 0 to below 0.5, of dpo (cDPO, conservative DPO:
    ericmitchell.ai/cdpo.pdf) and simpo. null: 0."""
    target_margin: float | None = None
    """Difference of the two rewards that simpo aims at (gamma). null: 0.5."""
    sft_weight: float | None = None
    """Weight of -log p per token of the chosen answer, which is added to the loss of dpo, ipo and simpo (RPO, arXiv
    2404.19733; CPO-SimPO). orpo always has it with weight 1. null: 0."""
    teacher: str | None = None
    """Folder of a PEFT adapter, which on the run's base is the teacher of distill, of any rank; null: the model at the
    start of the run."""
    kd_ratio: float | None = None
    """Weight of the divergence in the loss of distill, from 0 to 1; -log p of the target tokens has the rest. null:
    0.5."""
    kd_temperature: float | None = None
    """Temperature of both distributions in the divergence of distill, which is multiplied by its square. null: 1."""
    center_rewards: float | None = None
    """Weight of the squared sum of a pair's two rewards in the loss of train.objective=reward, which keeps rewards
    around 0 (arXiv 2312.09244, which has 0.01). null: none."""
    desirable_weight: float | None = None
    """Weight of the good answers in the loss of kto. With more good answers than bad ones, lower it until both sides
    weigh about the same. null: 1."""
    undesirable_weight: float | None = None
    """Weight of the bad answers in the loss of kto. null: 1."""
    epochs: float = 1.0
    """Passes over the packed sequences; 0.5 is half of one, rounded up to whole steps."""
    max_steps: int | None = None
    """Number of optimizer steps instead of `epochs`; sequences are repeated, reshuffled, as often as needed."""
    global_batch: int = 8
    """Sequences per optimizer step, over all ranks and accumulation steps; with grpo answers, of which a sequence holds
    several. Results do not depend on the division."""
    micro_batch: int = 1
    """Sequences per rank and forward pass. Activation memory grows linearly with it."""
    accumulate: Literal["step", "block"] = "step"
    """Order of a rank's micro-batches: one after the other through the model, or through each layer. `step` runs the
    model once per micro-batch and gathers every layer each time. `block` gathers a layer once, runs all micro-batches
    through it, and keeps all activations between layers."""
    checkpointing: Literal["block", "selective", "offload", "none"] = "block"
    """Activations to save for backward: fewer take less memory and more time. `block` keeps only the input of each
    decoder layer and recomputes the layer: about 1/3 more compute. `selective` recomputes the MLP and the norm before
    it and keeps attention, whose cost grows with the square of the length: about 10 bytes per element of the hidden
    state more than `block`. `offload` is `block` with the inputs in host memory: layers x hidden x 2 bytes per token
    kept (`accumulate`); the device holds two inputs, and with accumulate=block those of a whole step for the layer that
    runs. `none` keeps all activations."""
    mlp_tile: int | None = None
    """Tokens per MLP tile, for long sequences: less memory, more time. Only one tile's intermediate activations exist
    at a time; backward recomputes each tile. For sequences from about 16,384 tokens; results differ by rounding only.
    NF4 weights are dequantized per tile, so use thousands of tokens, on CUDA a multiple of 256. null: the whole
    sequence."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype. Adapters, their gradients and the optimizer stay fp32."""
    attention: Literal["auto", "sdpa"] = "auto"
    """`auto`: attention within each packed document, without masks, in bf16: flash attention on CUDA, matrix products
    or compiled code on the CPU. `sdpa`: transformers' attention with masks, whose memory and time grow with the square
    of the sequence length; `auto` falls back to it. Gemma 2 and GPT-OSS have their own."""
    deterministic_attention: bool = True
    """On CUDA, sum attention's gradients in a fixed order, so that a resume is bit-identical. Backward then runs fewer
    programs at once: slow for sequences of one long document and few heads."""
    fused_kernels: Literal["own", "liger", "none"] = "own"
    """On CUDA, run norms, gated MLPs, rotary embeddings and the LM head's loss as single passes over memory. `own`:
    Triton kernels of distlora; `liger`: the first three of liger-kernel (needs `distlora[cuda]`); `none`: transformers'
    own modules. Each part that a model computes in such a form is replaced, beside experts and in hybrids too; the log
    names them."""
    compile: bool | Literal["auto"] = "auto"
    """On the CPU, run norms, gated MLPs, rotary embeddings and losses as compiled single passes, and attention in bf16
    and adapted linears if the processor has AVX2 (linears not with AMX, where oneDNN's are faster). The first start
    compiles them with the node's C++ compiler (3 to 5 CPU seconds) and keeps them in the cache folder. Faster, and
    saves fewer activations; results differ by rounding only. `auto`: true on the CPU if there is a compiler and the
    model has such layers, but not with adapter=full; a log line says why not. A run keeps what its first start decided,
    and the processor's instructions that its products use (RUN/compiled.json; `distlora doctor` shows them)."""
    neftune_alpha: float | None = None
    """Scale of NEFTune's noise on the input embeddings in training (arXiv 2310.05914, which tries 5 to 15): uniform on
    +-alpha/sqrt(L d) for a document of L tokens and hidden size d. The same noise on any number of ranks and after a
    resume; none in evaluations. null: no noise."""
    router_aux_loss: float | None = None
    """Weight of the routers' load-balancing loss (mixtures of experts) in the training loss; null: the value in
    config.json (router_aux_loss_coef if output_router_logits is true, else 0). Routers are frozen: it trains the
    adapters before them."""
    seed: int = 0
    """Seed of every random choice: initialization, held-out split, order of the sequences, dropout."""
    log_every: int = 1
    """Steps between reads of the device's counters (a host sync); every step is still logged, a few at a time. A
    non-finite loss or gradient is reported then; no parameter is updated from its step on."""
    eval_every: int | Literal["auto"] | None = "auto"
    """Steps between held-out evaluations; null: before the first and after the last step only. `auto`: five evenly
    spaced ones beside the first. Without early stopping and load_best_at_end there are fewer if they would take more
    than 7 % of the training time, or come less than five steps apart."""
    evals_per_epoch: int | None = None
    """Evenly spaced evaluations per epoch, instead of eval_every."""
    eval_documents: bool = False
    """Keep each held-out document's loss of the last evaluation in RUN/eval_documents.json, to test whether two runs
    differ by more than the choice of documents explains."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row without a better held-out loss; null: never."""
    early_stopping_threshold: float = 0.0
    """Decrease of the held-out loss that counts as better, in nats per token."""
    load_best_at_end: bool = False
    """Publish the adapter with the lowest held-out loss as RUN/adapter instead of the last. RUN/best has it anyway,
    except with adapter=full where eval_every is auto."""
    save_every: int | None = None
    """Steps between checkpoints; null: only by time (save_minutes), and at the end."""
    saves_per_epoch: int | None = None
    """Evenly spaced checkpoints per epoch, instead of save_every."""
    save_minutes: float | None = 10.0
    """Minutes between checkpoints, each after the current step: the most that a killed run loses. null: only by
    save_every and at the end."""
    save_in_background: bool = True
    """Copy the state to host memory and write it while training goes on. This needs host memory for one checkpoint on
    rank 0, and on each rank for its shard of sharded parameters. false: pause training until it is on disk."""
    loss_watchdog_threshold: float | None = None
    """Training loss above which a step counts as diverged: the run fails after loss_watchdog_patience of them in a row,
    and no checkpoint is written meanwhile. Checked whenever losses are read (log_every). null: never."""
    loss_watchdog_patience: int = 3
    """Steps in a row above loss_watchdog_threshold after which the run fails."""
    keep: int = 2
    """Number of newest checkpoints to keep, beside the one with the lowest held-out loss."""
    verify: bool = False
    """Check at every save that the frozen base in memory is unchanged: each rank checks its shard, and in the next
    forward the gathered layers. A run whose base has changed ends without that save. false: gathered layers are checked
    once, in the first forward."""
    sample_every: int | None = None
    """Steps between samples: answers to sample_prompts, written to RUN/samples.jsonl and to the tracker; null: none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts to sample from; each is a user turn if the tokenizer has a chat template."""
    sample_images: tuple[str, ...] = ()
    """Image files, one for each of sample_prompts in their order ("": none), before the prompt or at its <image>."""
    sample_tokens: int = 64
    """Most tokens per sample."""

    @property
    def needs(self) -> ObjectiveNeeds:
        """Return what the objective needs."""
        needs = OBJECTIVES[self.objective]
        if needs.reference_weight is None or self.of_objective(needs.reference_weight) != 0:
            return needs
        return replace(needs, reference=False)

    @property
    def refers_to_start(self) -> bool:
        """Return whether the objective's reference is the model at the start of the run."""
        return self.needs.reference and self.teacher is None

    def of_objective(self, name: str) -> float:
        """Return a setting of the objective, such as `beta`, or what null stands for."""
        value: float | None = getattr(self, name)
        return OBJECTIVES[self.objective].settings[name] if value is None else value

    @property
    def evaluates(self) -> bool:
        """Return whether the settings ask for evaluations during training."""
        return self.eval_every is not None or self.evals_per_epoch is not None

    def keeps_best(self, method: str) -> bool:
        """Return whether RUN/best is kept of an adapter.method: eval_every=auto alone writes no whole models."""
        is_default = self.eval_every == "auto" and self.evals_per_epoch is None and not self.compares_evaluations
        return self.evaluates and not (method == "full" and is_default)

    @property
    def compares_evaluations(self) -> bool:
        """Return whether early stopping or load_best_at_end depends on the evaluations."""
        return self.early_stopping_patience is not None or self.load_best_at_end

    def steps_per_epoch(self, rows: int) -> int:
        """Return the optimizer steps that visit each of `rows` packed sequences once; the last one may have fewer."""
        return -(-rows // self.global_batch)

    def total_steps(self, rows: int) -> int:
        """Return the optimizer steps of the whole run over `rows` packed sequences."""
        # As the decimal number that was typed: 0.1 of 30 steps are 3, not 4.
        return self.max_steps or math.ceil(Fraction(str(self.epochs)) * self.steps_per_epoch(rows))

    def evaluations(self, rows: int, held_out: int) -> Cadence | None:
        """Return when to evaluate beside the first and the last step, by the numbers of packed sequences."""
        if self.evals_per_epoch is not None:
            return Cadence(self.evals_per_epoch, self.steps_per_epoch(rows))
        if self.eval_every != "auto":
            return None if self.eval_every is None else Cadence(1, self.eval_every)
        total = self.total_steps(rows)
        if self.compares_evaluations:
            return Cadence(min(AUTO_EVALUATIONS, total), total)
        affordable = 1 + total * self.global_batch // (AUTO_SHARE * held_out)
        times = min(AUTO_EVALUATIONS, total // AUTO_SPACING, affordable)
        return Cadence(times, total) if times > 1 else None

    def saves(self, rows: int) -> Cadence | None:
        """Return when to save by the number of steps, for `rows` packed sequences."""
        if self.saves_per_epoch is not None:
            return Cadence(self.saves_per_epoch, self.steps_per_epoch(rows))
        return None if self.save_every is None else Cadence(1, self.save_every)

    def accumulation(self, ranks: int) -> int:
        """Return the micro-batches that each of `ranks` runs in a step."""
        return -(-self.global_batch // (ranks * self.micro_batch))

    def slices(self, ranks: int) -> int:
        """Return the micro-batches of each rank between forward and backward: all of a step with accumulate=block."""
        return self.accumulation(ranks) if self.accumulate == "block" else 1


TRACKERS = {
    "wandb": ("project", "entity", "group", "tags", "artifact"),
    "tensorboard": (),
    "mlflow": ("project", "tags", "artifact"),
    "trackio": ("project", "group"),
    "swanlab": ("project", "entity", "group", "tags"),
}
"""Tracker -> the settings that have an effect on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackerConfig:
    """The experiment trackers, beside metrics.jsonl, which a run always writes."""

    wandb: bool = False
    """Log to wandb: online with a key, offline under RUN/wandb without."""
    tensorboard: bool = False
    """Write TensorBoard's event files to RUN/tensorboard."""
    mlflow: bool = False
    """Log to MLflow: to MLFLOW_TRACKING_URI, or without it to mlflow.db beside the run folder."""
    trackio: bool = False
    """Log to Trackio: to its local database, or to what TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names, where the steps
    that a resume repeats appear twice."""
    swanlab: bool = False
    """Log to SwanLab: online with a key, offline under RUN/swanlab without."""
    project: str = "distlora"
    """Project in wandb, Trackio and SwanLab, experiment in MLflow."""
    entity: str | None = None
    """User or team in wandb, workspace in SwanLab; null: the key's own."""
    group: str | None = None
    """Group in wandb, Trackio and SwanLab."""
    tags: tuple[str, ...] = ()
    """Tags in wandb, MLflow and SwanLab."""
    artifact: bool = False
    """Upload the result: to wandb as the artifact adapter-<run id> (offline, `wandb sync` does), to MLflow as files."""

    @property
    def names(self) -> tuple[str, ...]:
        """Trackers that are on."""
        return tuple(name for name in TRACKERS if getattr(self, name))

    def supports(self, setting: str) -> bool:
        """Return whether a setting has an effect on one of the trackers that are on."""
        return any(setting in TRACKERS[name] for name in self.names)


def refused_in_optim(optim: OptimConfig) -> Refusals:
    """Check the optimizer and the schedule."""
    yield from positive(optim, "lr loraplus_lr_ratio eps")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield "betas= must be two numbers from 0 to below 1; set {field}=[0.9,0.999]"
    yield from at_least_zero(
        optim,
        weight_decay="is not a valid decay; set {field}=0 or more",
        max_grad_norm="is not a valid norm; set it above 0, or to 0 to turn clipping off",
        warmup_steps="is not a number of steps; set it to 0 or more",
    )
    yield from share(optim, "warmup_ratio decay_ratio min_lr_ratio")
    if optim.schedule == "constant" and optim.min_lr_ratio != 0:
        yield "min_lr_ratio= has no effect with optim.schedule=constant; leave it out"
    decays = optim.schedule == "warmup_stable_decay"
    if not decays and optim.decay_ratio != DEFAULT_DECAY:
        cure = "leave it out, or set optim.schedule=warmup_stable_decay"
        yield f"decay_ratio= has no effect with optim.schedule={optim.schedule}; {cure}"
    yield from both(optim, "warmup_steps", "warmup_ratio", "the length of the warm-up")
    if decays and (optim.warmup_ratio or 0) + optim.decay_ratio > 1:
        what = f"and optim.decay_ratio={optim.decay_ratio} together are more than all steps"
        yield f"warmup_ratio= {what}; lower one of them"


_POSITIVE = """epochs max_steps global_batch micro_batch log_every save_every evals_per_epoch saves_per_epoch
    save_minutes keep early_stopping_patience sample_every sample_tokens loss_watchdog_threshold
    loss_watchdog_patience neftune_alpha kd_temperature center_rewards desirable_weight undesirable_weight mlp_tile"""


def refused_in_train(train: TrainConfig) -> Refusals:
    """Check steps, batches, intervals and what the objective reads."""
    if isinstance(train.eval_every, str):
        require_choice("train.eval_every", train.eval_every, ("auto", "null", "a number of steps"))
    else:
        yield from positive(train, "eval_every")
    yield from both(train, "evals_per_epoch", "eval_every", "the steps between evaluations")
    yield from both(train, "saves_per_epoch", "save_every", "the steps between checkpoints")
    if train.loss_watchdog_threshold is None and train.loss_watchdog_patience != 3:
        yield "loss_watchdog_patience= has no effect without train.loss_watchdog_threshold; set both"
    yield from positive(train, _POSITIVE)
    if train.micro_batch > train.global_batch:
        what = f"is more than the sequences of a step, train.global_batch={train.global_batch}, and would be padded"
        yield f"micro_batch= {what} with empty ones; set {{field}}={train.global_batch} or less"
    if not isinstance(train.compile, bool):
        require_choice("train.compile", train.compile, ("auto", "true", "false"))
    yield from _objective(train)
    if train.mlp_tile is not None and train.checkpointing == "none":
        why = "recomputes each tile of an MLP, and train.checkpointing=none nothing"
        yield f"mlp_tile= {why}; set train.checkpointing=selective, which recomputes MLPs alone"
    yield from at_least_zero(
        train,
        router_aux_loss="is not a valid weight; set it to 0.001, or to 0 for none",
        early_stopping_threshold="is not a valid difference; set it to 0 or more",
    )
    if not 0 <= train.seed < 2**63:
        yield "seed= must be from 0 to 2^63 - 1; set {field}=0"
    if train.early_stopping_threshold != 0 and train.early_stopping_patience is None:
        yield "early_stopping_threshold= has no effect without train.early_stopping_patience; set both"
    for name in ("early_stopping_patience", "load_best_at_end"):
        if getattr(train, name) and not train.evaluates:
            yield f"{name}= needs evaluations during training; set train.eval_every"
    if (train.sample_every is None) != (not train.sample_prompts):
        yield "train.sample_every and train.sample_prompts belong together; set both or neither"
    if train.sample_images and len(train.sample_images) != len(train.sample_prompts):
        yield (
            f"sample_images= names {len(train.sample_images)} images for {len(train.sample_prompts)} prompts; name one "
            'for each of train.sample_prompts, or "" for none'
        )


def _objective(train: TrainConfig) -> Refusals:
    """Check the settings of the objective, and those that have no effect on it."""
    name, needs = train.objective, train.needs
    if train.neftune_alpha is not None and name != "sft":
        yield f"neftune_alpha= is for train.objective=sft, not {name}; leave it out"
    if train.router_aux_loss and name != "sft":
        yield f"router_aux_loss= belongs to a per-token loss, not to train.objective={name}; leave it out"
    if train.teacher is not None and not needs.distributions:
        cure = "leave it out, or set train.objective=distill"
        yield f"teacher= has no effect with train.objective={name}; {cure}"
    yield from share(train, "kd_ratio")
    if needs.distributions:
        yield from share(train, "beta")
    elif train.beta != 0 or needs.reference_weight != "beta":
        yield from positive(train, "beta")
    if train.label_smoothing is not None and not 0 <= train.label_smoothing < 0.5:
        yield "label_smoothing= must be from 0 to below 0.5; set {field}=0.1"
    less = "must be 0 or more; leave it out for its default"
    yield from at_least_zero(train, target_margin=less, sft_weight=less)
    others = {setting for other in OBJECTIVES.values() for setting in other.settings} - {*needs.settings}
    for setting in sorted(others):
        users = [objective for objective, other in OBJECTIVES.items() if setting in other.settings]
        if getattr(train, setting) is not None:
            among = f" (of {', '.join(users)})" if len(users) > 1 else ""
            cure = f"leave it out, or set train.objective={users[0]}{among}"
            yield f"{setting}= has no effect with train.objective={name}; {cure}"


def refused_in_tracker(tracker: TrackerConfig) -> Refusals:
    """Check that each setting has an effect on a tracker that is on."""
    for item in fields(tracker):
        users = [name for name, settings in TRACKERS.items() if item.name in settings]
        if users and getattr(tracker, item.name) != item.default and not tracker.supports(item.name):
            cure = f"leave it out, or set tracker={users[0]} (of {', '.join(users)})"
            yield f"{item.name}= has no effect with tracker={'+'.join(tracker.names) or 'none'}; {cure}"
