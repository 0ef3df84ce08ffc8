"""state.json: the progress of a run, what its checkpoint belongs to, and the environment. Needs no torch."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from distlora.config import Config, UserError
from distlora.config.checks import CHANGEABLE
from distlora.config.errors import as_typed, short
from distlora.config.file import settings_by_name
from distlora.config.json_files import Shape, read_object
from distlora.run_folder.expert_load import ExpertTokens, expert_tokens_in
from distlora.run_folder.layout import STATE_NAME, steps
from distlora.run_folder.stages import earlier_stages
from distlora.weights.initial_adapter_file import needs_initial_adapter
from distlora.weights.peft_folder import weights_digest

OR_WHAT_PISSA_TOOK = (
    ", or what PiSSA took out of them (its start, scaled by adapter.lora_alpha, use_rslora, alpha_pattern and "
    "rank_pattern in config.yaml),"
)
"""Part of a message: what besides its weights makes a base another one."""

_FREE = {
    # Their contents are identified: by the digests of init_from, teacher, packed sequences, rewards.
    "adapter": "init_from init_from_loftq",
    "data": "path name split revision format columns ignore_columns reasoning_key sample_by sources eval_path "
    "eval_split template cache_dir reward_folder reward_models reward_timeout reward_processes reward_memory_gb "
    "rewards_execute_code rewards_isolation",
    "optim": "",
    "train": "teacher micro_batch accumulate checkpointing mlp_tile attention deterministic_attention "
    "fused_kernels compile log_every eval_every evals_per_epoch eval_documents save_every saves_per_epoch save_minutes "
    "save_in_background loss_watchdog_threshold loss_watchdog_patience keep verify sample_every sample_prompts "
    "sample_images sample_tokens",
    "rollout": "max_failed_steps eval_temperature url max_logprob_difference keep",
}
"""Settings of these sections that may change on resume: they change the result by rounding at most."""
_OF_EVALUATIONS = ("train.eval_every", "train.evals_per_epoch", "train.eval_documents", "rollout.eval_temperature")
"""Settings that decide when a run stops or which adapter it publishes, if it compares evaluations."""
_OF_STAGES = {
    "optim": "lr loraplus_lr_ratio betas eps weight_decay max_grad_norm schedule warmup_steps warmup_ratio decay_ratio "
    "min_lr_ratio",
    "train": "max_steps epochs early_stopping_patience early_stopping_threshold eval_every evals_per_epoch "
    "eval_documents",
    "rollout": "url keep max_failed_steps max_logprob_difference",
    "quant": "cache cache_dir cache_gb",
    "data": "reward_timeout reward_processes reward_memory_gb",
}
"""Settings that a new stage of a run may change: they change the next steps, or no result, and fit any saved state."""


class SamplingChoice(NamedTuple):
    """Choice by the free memory of a run's first start. Rows that are decoded together round otherwise."""

    blocks: int
    """Most blocks of keys and values per rank."""
    compiles: bool
    """Whether a token is decoded by one compiled call."""
    dense: bool = True
    """Whether the weights are dequantized once per call; on a GPU their products then round elsewhere."""


@dataclass(slots=True)
class RunProgress:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps done; the data position follows from it."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """Held-out loss in nats per target token, by step."""
    seconds: float = 0.0
    """Wall time of the steps in seconds, without evaluation, saving and steps whose memory is measured."""
    tokens: int = 0
    """Tokens in the sequences of these steps, over all ranks; padding sequences do not count."""
    published_step: int | None = None
    """Step whose state RUN/best holds; None if there is none."""
    expert_tokens: ExpertTokens | None = None
    """Tokens that chose each expert in these steps, by layer; None without a mixture of experts, and if some steps'
    are not known."""
    sampling: SamplingChoice | None = None
    """How the run samples answers; None if it does not, or has not yet."""

    @property
    def best_step(self) -> int | None:
        """Trained step with the lowest finite held-out loss; None before there is one."""
        trained = {step: loss for step, loss in self.evaluations.items() if step > 0 and math.isfinite(loss)}
        return min(trained, key=trained.__getitem__) if trained else None

    def evaluations_since_best(self, threshold: float) -> int:
        """Count the evaluations since one was more than `threshold` below all before it; the base's is the first."""
        best, since = math.inf, -1  # The first evaluation does not count.
        for _, loss in sorted(self.evaluations.items()):
            since = 0 if loss < best - threshold else since + 1
            best = min(best, loss) if math.isfinite(loss) else best
        return max(since, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """The run that a checkpoint belongs to; resuming with another identity would be another run."""

    base_fingerprint: str
    """`weights.initial_adapter_file.base_identity` of the run."""
    data_digest: str
    """`content` in data.json: the hash of the packed sequences."""
    settings: Mapping[str, Any]
    """`fixed_settings` of the run."""
    reference_digest: str | None = None
    """SHA-256 of the weights at train.teacher, or at adapter.init_from if they are DPO's reference: those that every
    resume reads."""
    earlier: Sequence[Mapping[str, Any]] = ()
    """`fixed_settings` of the run's earlier stages, which its checkpoints may have too. Not saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """The content of state.json."""

    progress: RunProgress
    identity: Identity
    environment: dict[str, Any]
    """`saver.environment()` of the saving run; a resume with an equal one is bit-exact."""


def fixed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide a run's result, by full name, as plain values."""
    free = {f"{section}.{name}" for section, names in _FREE.items() for name in names.split()}
    free -= {*(_OF_EVALUATIONS if config.train.compares_evaluations else ())}
    sections = _FREE.keys() - (set() if config.train.needs.data == "prompts" else {"rollout"})
    fixed = {"model.new_tokens", "model.special_tokens", "quant.method", "quant.formats"}
    return {
        name: value
        for name, value in settings_by_name(config).items()
        if name in fixed or (name.partition(".")[0] in sections and name not in free)
    }


def changeable_settings(config: Config) -> set[str]:
    """Return the settings that `distlora resume RUN setting=value` may change, by full name."""
    of_stages = {f"{section}.{name}" for section, names in _OF_STAGES.items() for name in names.split()}
    free = {name for name in settings_by_name(config) if name.partition(".")[0] in CHANGEABLE}
    return of_stages | (free - fixed_settings(config).keys())


_NULL = type(None)
_SHAPE: Shape = {
    "progress": {"step": int, "evaluations": dict, "seconds": float, "tokens": int, "published_step?": (int, _NULL)},
    "identity": {"base_fingerprint": str, "data_digest": str, "settings": dict, "reference_digest?": (str, _NULL)},
    "environment": dict,
}


def load_state(folder: Path) -> TrainState:
    """Read a checkpoint's state.json. Raises UserError if it is missing or has another format."""
    path, remedy = folder / STATE_NAME, f"move {folder} out of the run folder, and the previous checkpoint is used"
    values = read_object(path, remedy, _SHAPE)
    progress, identity = values["progress"], values["identity"]
    for step, loss in progress["evaluations"].items():
        is_number = isinstance(loss, float) or (type(loss) is int and abs(loss) < 2**63)  # NaN and Inf are numbers.
        if not is_number or not step.isdecimal() or len(step) > 20:
            raise UserError(f"{path} is damaged: progress.evaluations has {short(step)}: {short(loss)}; {remedy}")
    tokens = expert_tokens_in(progress.get("expert_tokens"))
    if tokens is None and progress.get("expert_tokens") is not None:
        raise UserError(f"{path} is damaged: progress.expert_tokens has no counts of tokens by layer; {remedy}")
    sampling = progress.get("sampling")
    if sampling is not None and (
        not isinstance(sampling, list) or list(map(type, sampling)) not in ([int, bool], [int, bool, bool])
    ):
        raise UserError(f"{path} is damaged: progress.sampling is {short(sampling)}; {remedy}")
    for name in ("step", "tokens", "published_step"):
        if (progress.get(name) or 0) < 0:
            raise UserError(f"{path} is damaged: progress.{name} is {progress[name]}; {remedy}")
    return TrainState(
        progress=RunProgress(
            step=progress["step"],
            evaluations={int(step): float(loss) for step, loss in progress["evaluations"].items()},
            seconds=float(progress["seconds"]),
            tokens=progress["tokens"],
            published_step=progress.get("published_step"),
            expert_tokens=tokens,
            sampling=None if sampling is None else SamplingChoice(*sampling),
        ),
        identity=Identity(
            base_fingerprint=identity["base_fingerprint"],
            data_digest=identity["data_digest"],
            settings=identity["settings"],
            reference_digest=identity.get("reference_digest"),
        ),
        environment=values["environment"],
    )


def check_matches(state: TrainState, folder: Path, identity: Identity, *, reference: str) -> None:
    """Raise UserError with both values if a checkpoint's settings, base, data or reference differ from the run's.

    `reference`: `Config.reference_setting`.
    """
    saved = state.identity
    check_fixed_settings(state, folder, identity.settings, identity.earlier)
    if saved.base_fingerprint != identity.base_fingerprint:
        raise UserError(
            f"{folder} belongs to another base model (fingerprint {saved.base_fingerprint[:12]}, now "
            f"{identity.base_fingerprint[:12]}): the weights at model.path{OR_WHAT_PISSA_TOOK} have changed since; "
            "restore them"
        )
    if saved.data_digest != identity.data_digest:
        raise UserError(
            f"{folder} was trained on other data (packed sequences {saved.data_digest[:12]}, now "
            f"{identity.data_digest[:12]}): the files at data.path have changed since; restore them"
        )
    if saved.reference_digest != identity.reference_digest:
        then, now = ((digest or "none")[:12] for digest in (saved.reference_digest, identity.reference_digest))
        raise UserError(
            f"{folder} was trained against another reference (SHA-256 {then}, now {now}): the adapter at "
            f"{reference} has changed since; restore it"
        )


def check_fixed_settings(
    state: TrainState, folder: Path, settings: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Raise UserError if the `fixed_settings` of the checkpoint in `folder` are those of no stage of the run.

    settings: those of the present stage. Settings that did not exist when the checkpoint was made are ignored.
    """
    then = state.identity.settings
    stages = [{name: value for name, value in each.items() if name in then} for each in (settings, *earlier)]
    differing = list(_differences(then, stages[0]))
    if differing and all(any(_differences(then, stage)) for stage in stages):
        raise UserError(
            f"{folder} was made with {', '.join(f'{name}={as_typed(then)}' for name, then, _ in differing)}, and "
            f"config.yaml now has {', '.join(f'{name}={as_typed(now)}' for name, _, now in differing)}; set "
            f"{'them' if len(differing) > 1 else 'it'} back there (`distlora resume RUN setting=value` changes what a "
            "run may change), or start a new run"
        )


def newest_state(checkpoints: Path) -> tuple[Path, TrainState] | None:
    """Return the newest readable checkpoint and its state, without reading its tensors; None without checkpoints."""
    for folder in reversed(steps(checkpoints)):
        with contextlib.suppress(UserError, OSError):
            return folder, load_state(folder)
    return None


def check_newest_settings(
    checkpoints: Path, settings: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Apply `check_fixed_settings` to the newest readable checkpoint.

    The launcher calls it to refuse before a worker starts. Without checkpoints it does nothing.
    """
    if (newest := newest_state(checkpoints)) is not None:
        check_fixed_settings(newest[1], newest[0], settings, earlier)


def environment_line(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describe how the environment of a checkpoint differs from the present one; None if it does not.

    Settings that did not exist then are ignored.
    """
    now = {name: value for name, value in now.items() if name in then or "." not in name}
    differing = [f"{name} {before} (now {after})" for name, before, after in _differences(then, now)]
    if not differing:
        return None
    return (
        f"the checkpoint was made with {', '.join(differing)}: the order of the data is the same, but the "
        "results may differ in the last bits from an uninterrupted run"
    )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in (*now, *(name for name in then if name not in now)):
        before, after = then.get(name), now.get(name)
        if before != after:
            yield name, before, after


def identity_of(config: Config, *, data_digest: str, base_identity: str) -> Identity:
    """Return what the checkpoints of a run belong to.

    `data_digest`: `content` in data.json. `base_identity`: `weights.initial_adapter_file.base_identity`. Raises
    UserError if the run needs an adapter as its reference and it is missing.
    """
    adapter, train, digest = config.adapter, config.train, None
    if train.teacher is not None:
        digest = weights_digest(train.teacher)
    elif adapter.init_from is not None and needs_initial_adapter(
        adapter, is_reference=train.refers_to_start, restores=True
    ):
        digest = weights_digest(adapter.init_from)
    return Identity(
        base_fingerprint=base_identity,
        data_digest=data_digest,
        settings=fixed_settings(config),
        reference_digest=digest,
        earlier=settings_of_earlier_stages(config.run_dir),
    )


def settings_of_earlier_stages(run_dir: str) -> list[dict[str, Any]]:
    """Return the `fixed_settings` of a run's earlier stages."""
    return [fixed_settings(each) for each in earlier_stages(Path(run_dir)).values()]
