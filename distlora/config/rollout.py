"""Settings of online reinforcement learning: how answers are sampled, and how their rewards become a loss."""

from dataclasses import dataclass, fields
from typing import Literal

from distlora.config.errors import Refusals, at_least_zero, positive

MOST_DIFFERENCE = {"fp32": 1e-4, "bf16": 0.2}
"""Default of rollout.max_logprob_difference by train.dtype: several times what sums in another order make of it, which
is 3e-6 in fp32 and 0.04 in bf16 (SmolLM2-135M on a CPU, 2026-11-29). Positions that are off by one, or
another adapter, make far more."""


OF_REWARDS = (
    *("loss_type", "scale_rewards", "importance_sampling_level", "epsilon", "epsilon_high", "use_bias_correction_kl"),
    *("max_resamples", "max_failed_steps", "batch_invariant", "max_logprob_difference"),
)
"""Settings that have an effect only where answers are trained on by their rewards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Answers that the model samples to the prompts of the data, and the loss by their rewards (train.objective=grpo).

    Names and defaults are those of TRL's GRPOConfig where it has the setting; max_new_tokens is its
    max_completion_length.
    """

    num_generations: int = 8
    """Answers per prompt: the group whose mean reward an answer is compared with. Divides train.global_batch x
    steps_per_generation, the answers of a rollout."""
    max_new_tokens: int = 512
    """Most tokens of an answer. A prompt may have data.sequence_length less this; longer ones are dropped."""
    temperature: float = 1.0
    """Temperature of sampling. The loss and its ratios are those of the model at this temperature."""
    max_turns: int = 8
    """Most messages that the model writes in a dialogue (data.environment, data.tools). max_new_tokens is then the most
    tokens behind the prompt, those that the environment or the tools wrote included."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, besides the tokens that end a text or a turn. The answer includes it."""
    steps_per_generation: int = 1
    """Optimizer steps that share a rollout, each with train.global_batch of its answers; from the second on they are
    off policy (rollout/staleness)."""
    num_iterations: int = 1
    """Passes over a rollout's answers."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Average of the tokens' losses: over all tokens of the step (`dapo`, arXiv 2503.14476), over each answer's tokens
    and then over answers (`grpo`, arXiv 2402.03300), or their sum over answers x max_new_tokens (`dr_grpo`, arXiv
    2503.20783)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divisor of an advantage, reward less the group's mean: the group's standard deviation, that of all answers of the
    rollout, or none (Dr. GRPO)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio of new to old probability, which is clipped: each token's, or the geometric mean of an answer's (GSPO,
    arXiv 2507.18071)."""
    epsilon: float = 0.2
    """Ratios below 1 - epsilon are clipped; GSPO needs about 3e-4."""
    epsilon_high: float | None = None
    """Ratios above 1 + epsilon_high are clipped; null: epsilon. DAPO sets 0.28."""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the ratio, so that its gradient is that of the KL divergence (DeepSeek-V3.2). false:
    equation 4 of the GRPO paper. Needs train.beta."""
    mask_truncated_completions: bool = False
    """Leave answers that max_new_tokens cut off out of the loss (DAPO)."""
    max_resamples: int = 0
    """Times that groups with equal rewards, which have no gradient, may be replaced by groups of other prompts (DAPO's
    dynamic sampling). Each time as many prompts are sampled as groups with equal rewards are left."""
    max_failed_steps: int = 3
    """Steps in a row without a reward of any answer, which train nothing, after which the run fails."""
    eval_temperature: float = 0.0
    """Temperature of the one answer to each held-out prompt; 0: the likeliest token."""
    batch_invariant: bool = False
    """Compute each token alike in sampling and training, whatever runs beside it, so that their log-probabilities are
    equal to the last bit. On the CPU only, and several times slower: to tell rounding from other differences."""
    url: str | None = None
    """Address of a vLLM server of the same base that samples instead of the trainer's own weights, such as
    http://localhost:8000 (docs/rl.md says how to start it). Its key, if it has one, is the environment variable
    VLLM_API_KEY. null: the run samples itself."""
    max_logprob_difference: float | None = None
    """Largest mean difference, in nats, between the log-probabilities that the sampler reported and those that training
    computes at the same weights; a run that exceeds it fails. null: 1e-4 in fp32, 0.2 in bf16."""

    keep: int = 100
    """Number of newest rollouts whose answers, with rewards and advantages, are kept in RUN/rollouts, a parquet file
    each, and of newest evaluations in RUN/eval_answers. 0: none."""

    @property
    def steps(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.steps_per_generation * self.num_iterations

    @property
    def changed(self) -> list[str]:
        """Names of the settings that differ from the defaults."""
        return [item.name for item in fields(self) if getattr(self, item.name) != item.default]

    def most_difference(self, dtype: str) -> float:
        """Return the bound of the mean difference of log-probabilities, in nats."""
        return MOST_DIFFERENCE[dtype] if self.max_logprob_difference is None else self.max_logprob_difference


def refused_in_rollout(rollout: RolloutConfig) -> Refusals:
    """Check how answers are sampled."""
    numbers = "num_generations max_new_tokens temperature steps_per_generation num_iterations epsilon epsilon_high"
    yield from positive(rollout, f"{numbers} max_turns max_failed_steps max_logprob_difference")
    if rollout.epsilon > 1:
        yield "epsilon= would clip at a negative ratio; set it to at most 1 (0.2 is usual)"
    yield from at_least_zero(rollout, eval_temperature="is not a temperature; set 0 (the likeliest token) or more")
    yield from at_least_zero(rollout, max_resamples="is no number of times; set 0 (never) or more")
    yield from at_least_zero(rollout, keep="is no number of rollouts; set 0 (keep none) or more")
    if rollout.batch_invariant and rollout.temperature != 1:
        yield (
            "rollout.batch_invariant=true: training divides hidden states by "
            f"rollout.temperature={rollout.temperature:g}, and sampling the logits, which rounds otherwise; set "
            "rollout.temperature=1"
        )
    if rollout.url is not None and set("@?#") & set(rollout.url):
        yield (
            "rollout.url has a user, a password or a query, which RUN/config.yaml and messages would show; write only "
            "http://host:port, and export the server's key as VLLM_API_KEY"
        )
    if rollout.url is not None and not rollout.url.startswith(("http://", "https://")):
        yield "url= is not an address; set {field}=http://localhost:8000"
    if rollout.url is not None and rollout.batch_invariant:
        server = f"a server (rollout.url={rollout.url})"
        yield f"rollout.batch_invariant=true has no effect on {server}; leave one out"
    if not all(rollout.stop):
        yield "rollout.stop has an empty text, which would end every answer at once; leave it out"
