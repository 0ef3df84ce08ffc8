"""Give the trainer each step's answers: sampled and scored when those of the last rollout are used up."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distlora.checkpoint.state import Progress
from distlora.config import Config, RolloutConfig, UserError, require
from distlora.data.loader import EMPTY, StepBatch, StepLoader
from distlora.data.packing import PARTS, SAMPLES, hash64
from distlora.generation.engine import Engine
from distlora.generation.prompts import PromptEncoder
from distlora.generation.remote import RemoteEngine
from distlora.generation.requests import Request
from distlora.model.build import CausalLM
from distlora.parallel import Backend, watch
from distlora.rewards.pool import RewardInput, RewardPool
from distlora.run_folder.layout import ROLLOUT_ADAPTER_NAME, ROLLOUT_ID_NAME, ROLLOUT_NAME
from distlora.system import atomic_io
from distlora.training.publish import publish_result
from distlora.training.rollouts.rollout import Rollout, figures_of, pack_answers, sums_of_rewards
from distlora.training.rollouts.served import ServedEngine

_HELD_OUT = -1
"""In place of a step: the answers to held-out prompts."""
SHOWN = 3
"""Held-out prompts whose answers are written at each evaluation."""


class RewardsFailedError(RuntimeError):
    """Report that no answer has had a reward for rollout.max_failed_steps steps."""


@dataclass(eq=False)
class RolloutLoader:
    """Answers of each step, with the interface of StepLoader. Every rank calls it alike.

    The prompts of a rollout, the seeds of its answers and their order are functions of (train.seed, its number). All
    ranks hold the whole rollout; a rank generates and scores its part of the answers.
    """

    prompts: StepLoader
    """The prompts of each rollout, a row each."""
    held_out: StepLoader | None
    _: KW_ONLY
    config: Config
    engine: Engine | ServedEngine
    encoder: PromptEncoder
    pool: RewardPool
    backend: Backend
    boundary: watch.Marker
    """Called between the parts of a rollout; it may raise Stopped."""
    progress: Progress
    """Progress of the run, which keeps the engine's choice for a resume."""
    log: Callable[[str], None]
    rollout: Rollout | None = None
    """The newest rollout; of a resumed run what the checkpoint held."""
    peak_bytes: int = 0
    """Peak bytes of tensors on a GPU until the newest answers were sampled, which is no part of the planned step."""
    _figures: dict[str, float] = field(default_factory=dict)
    """Metrics of the rollout."""
    _num_rows: dict[int, int] = field(default_factory=dict)
    """Rows of each step of this start."""
    _failed_steps: int = 0
    """Steps in a row without a reward, up to the newest."""

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return self.prompts.rank

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit every prompt once."""
        return self.prompts.steps_per_epoch * self.config.steps_per_rollout

    def sample(self, step: int) -> Rollout:
        """Return the rollout of a step (from 0). Its answers are sampled where it begins."""
        within = step % self.config.steps_per_rollout
        if self.rollout is None or int(self.rollout.step) != step - within:
            if within:
                raise UserError(
                    f"the checkpoint of step {step} lacks the answers that it was trained on; move it out of the run "
                    "folder, and the checkpoint before it is used"
                )
            began, settings, number = time.monotonic(), self.config.rollout, step // self.config.steps_per_rollout
            rows, seed = self.prompts.rows_of_step(number), (1, number)
            self.rollout, _ = self._answers(
                self.prompts, rows, settings.num_generations, settings.temperature, seed, step
            )
            self._figures["rollout/seconds"] = time.monotonic() - began
        return self.rollout

    def batch(self, step: int) -> StepBatch:
        """Return this rank's micro-batches of a step (from 0)."""
        rollout, settings, within = self.sample(step), self.config.rollout, step % self.config.steps_per_rollout
        totals = rollout.totals(self.config.data.reward_weights)
        iteration, part = divmod(within, settings.steps_per_generation)
        order = np.arange(len(rollout))
        if settings.steps_per_generation > 1:  # So that a step has answers of more groups.
            words = (PARTS, self.config.train.seed, step - within, iteration)
            order = np.argsort(hash64(words, len(rollout)), kind="stable")
        first, last = (number * len(rollout) // settings.steps_per_generation for number in (part, part + 1))
        self._require_rewards(step, totals[order[first:last]])
        figures = figures_of(rollout, totals, self.config.data.rewards, settings.num_generations)
        batch = self._packed(step, rollout, order[first:last], totals, settings)
        self._figures, figures = {}, {**figures, **self._figures, "rollout/staleness": within}
        return replace(batch, figures=figures)

    def _require_rewards(self, step: int, totals: np.ndarray) -> None:
        """Raise RewardsFailedError if these totals of a step, and of those before it, are missing too often."""
        self._failed_steps = self._failed_steps + 1 if np.isnan(totals).all() else 0
        total = self.config.train.total_steps(self.config.rows_per_epoch(len(self.prompts.rows)))
        if self._failed_steps >= min(self.config.rollout.max_failed_steps, total):
            count = f"{self._failed_steps} steps" if self._failed_steps > 1 else "step"
            raise RewardsFailedError(
                f"no answer of the last {count}, up to step {step + 1}, has a reward "
                f"(rollout.max_failed_steps={self.config.rollout.max_failed_steps}): nothing is trained. Correct "
                f"data.rewards=[{','.join(self.config.data.rewards)}] and start a new run, or continue this one once "
                f"what they need works again: distlora resume {self.config.run_dir}\n"
                f"{self.pool.first_failure or 'each reward returned None, or the log of an earlier start says why'}"
            )

    def _packed(
        self, step: int, rollout: Rollout, answers: np.ndarray, totals: np.ndarray, settings: RolloutConfig
    ) -> StepBatch:
        """Return this rank's micro-batches of these answers of a rollout, (n,) integers."""
        pad = self.prompts.rows.pad_token_id
        packed = pack_answers(
            rollout,
            answers,
            totals,
            settings,
            sequence_length=self.config.data.sequence_length,
            pad=pad,
            with_kl=self.config.train.needs.reference,
        )
        self._num_rows[step] = len(packed)
        own = self.rows_of_ranks(step)[:, self.rank]
        return StepBatch(
            micro_batches=[packed.micro_batch(rows, pad) for rows in own],
            global_targets=packed.num_labels,
            global_pairs=0,
            global_rows=len(packed),
            rows=tuple(own.reshape(-1).tolist()),
        )

    def rows_of_ranks(self, step: int) -> np.ndarray:
        """Return the rows of all ranks in a past step: (accumulation, world, micro_batch), -1 for an empty row."""
        count, world, micro_batch = self._num_rows[step], self.prompts.world, self.prompts.micro_batch
        slots = np.full((-(-count // (world * micro_batch)), world, micro_batch), EMPTY, np.int64)
        slots.reshape(-1)[:count] = np.arange(count)
        return slots

    def files(self, step: int) -> dict[str, dict[str, Tensor]]:
        """Return the file of a checkpoint after `step` steps: the rollout, if a next step trains on it."""
        per_rollout = self.config.steps_per_rollout
        if self.rollout is None or step % per_rollout == 0 or int(self.rollout.step) != step - step % per_rollout:
            return {}
        return {ROLLOUT_NAME: self.rollout.tensors()}

    def restore(self, checkpoint: Path) -> None:
        """Take the rollout of a checkpoint, if it holds one."""
        if (path := checkpoint / ROLLOUT_NAME).is_file():
            self.rollout = Rollout.read(path)

    def evaluate(self, step: int) -> tuple[dict[str, float], list[tuple[str, str]], StepBatch | None]:
        """Return the metrics of answers to the held-out prompts, the first SHOWN prompts with their answers, and all.

        eval_loss is the negative mean reward, as that is what the objective minimizes; there is none without a reward.
        An objective without rewards computes it from all answers, which others do not get (None).
        """
        assert self.held_out is not None
        rows = np.arange(len(self.held_out.rows))
        rollout, texts = self._answers(self.held_out, rows, 1, self.config.rollout.eval_temperature, (0,), step)
        totals = rollout.totals(self.config.data.reward_weights)
        figures = figures_of(rollout, totals, self.config.data.rewards, 1)
        for name in ("reward_std", "frac_reward_zero_std", "entropy"):
            figures.pop(name, None)
        loss = {"loss": -figures["reward"]} if self.config.train.needs.rewards and "reward" in figures else {}
        figures, self._figures = {**loss, **figures, **self._figures}, {}
        shown = [(_text_of(self._record(self.held_out, row)["prompt"]), texts[row]) for row in range(len(texts))]
        batch = None
        if not self.config.train.needs.rewards:
            alone = replace(self.config.rollout, num_generations=1)
            batch = self._packed(_HELD_OUT, rollout, np.arange(len(rollout)), np.zeros(len(rollout)), alone)
        return {f"eval_{name}": value for name, value in figures.items()}, shown, batch

    def _answers(
        self,
        prompts: StepLoader,
        rows: np.ndarray,
        group: int,
        temperature: float,
        words: Sequence[int],
        step: int,
    ) -> tuple[Rollout, list[str]]:
        """Return `group` answers to each prompt (rows,), scored, and the first SHOWN of them as text.

        `words`: what their seeds depend on beside train.seed.
        """
        settings, watched = self.config.rollout, step + 1
        self.boundary(watched, "sampling answers", long=True)
        tokens = [prompts.rows.tokens[row, : prompts.rows.targets[row] + 1].tolist() for row in rows.tolist()]
        seeds = hash64((SAMPLES, self.config.train.seed, *words), len(rows) * group).tolist()
        requests = [
            Request(
                tokens=tokens[index // group],
                seed=seed,
                max_new_tokens=settings.max_new_tokens,
                temperature=temperature,
                stop=settings.stop,
            )
            for index, seed in enumerate(seeds)
        ]
        if isinstance(self.engine, Engine):
            before, device = self.engine.chosen, self.backend.ranks.device
            if device.type == "cuda":
                self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(device))
            samples = self.engine.run(
                requests, boundary=lambda part: self.boundary(watched, "sampling answers", part, long=True)
            )
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            self.progress.sampling = self.engine.chosen
            if before not in (None, self.engine.chosen):
                self.log("memory has become too small for as many answers at once as before; later answers may differ")
        else:
            samples = self.engine.run(requests)
        self.boundary(watched, "computing rewards", long=True)
        texts = {}
        inputs = []
        mine = self.backend.ranks.part_of(len(samples))
        for index in dict.fromkeys([*range(min(SHOWN, len(samples))), *mine]):
            texts[index] = self._decoded(samples[index].tokens)
        for index in mine:
            record = self._record(prompts, int(rows[index // group]))
            is_text = isinstance(record["prompt"], str)
            inputs.append(
                RewardInput(
                    prompt=record["prompt"],
                    completion=texts[index] if is_text else [{"role": "assistant", "content": texts[index]}],
                    columns=record["columns"],
                    completion_ids=samples[index].tokens,
                )
            )
        rewards, failed = self._scored(inputs, mine, len(samples))
        rollout = Rollout(
            step=np.array(step, np.int64),
            prompt_lengths=np.array([len(request.tokens) for request in requests], np.int64),
            lengths=np.array([len(sample.tokens) for sample in samples], np.int64),
            tokens=np.concatenate([[*r.tokens, *s.tokens] for r, s in zip(requests, samples, strict=True)]),
            logps=np.concatenate([np.array(sample.logprobs, np.float32) for sample in samples]),
            ended=np.array([sample.ended for sample in samples], np.int64),
            rewards=rewards,
            failed=failed,
        )
        return rollout, [texts[index] for index in range(min(SHOWN, len(samples)))]

    def _scored(self, inputs: list[RewardInput], mine: range, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all ranks' rewards (N, R), NaN where there is none, and failures (N,); counts of these are metrics."""
        scores = self.pool.score(inputs)
        table = torch.zeros(count, len(self.config.data.rewards) + 1, dtype=torch.float64)
        if inputs:
            values = [[math.nan if value is None else value for value in row] for row in scores.values]
            failed = torch.tensor(scores.failed, dtype=torch.float64)
            table[mine.start : mine.stop] = torch.cat(
                [torch.tensor(values, dtype=torch.float64), failed[:, None]], dim=1
            )
        counts = torch.tensor(list(scores.counts.values()), dtype=torch.float64)
        device = self.backend.ranks.device
        sums = self.backend.sum_over_ranks(torch.cat([table.flatten(), counts]).to(device)).cpu()
        failures = zip(scores.counts, sums[table.numel() :].tolist(), strict=True)
        self._figures = {name: int(number) for name, number in failures if number}
        table = sums[: table.numel()].view(table.shape)
        rewards, missing = table[:, :-1].contiguous().numpy(), table[:, -1].to(torch.int64).numpy()
        if self.config.data.rewards:
            weights = self.config.data.reward_weights
            overflows = np.isinf(sums_of_rewards(rewards, weights))
            if overflows.any():
                text = f"{overflows.sum()} answers are left out: their rewards, weighted by data.reward_weights="
                self.log(text := f"{text}{[*weights]}, have a sum that is no finite number of fp32")
                self.pool.first_failure = self.pool.first_failure or text
            missing |= overflows
        return rewards, missing

    def _decoded(self, tokens: list[int]) -> str:
        text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _record(self, prompts: StepLoader, row: int) -> dict[str, Any]:
        assert prompts.rows.records is not None, "data of prompts"
        return prompts.rows.records[row]


@contextlib.contextmanager
def open_rollouts(
    config: Config,
    prompts: StepLoader,
    held_out: StepLoader | None,
    model: CausalLM,
    backend: Backend,
    data: Mapping[str, Any],
    *,
    checkpoint: Path | None,
    progress: Progress,
    log: Callable[[str], None],
    boundary: watch.Marker,
) -> Iterator[RolloutLoader]:
    """Start the processes of rewards, and return the loader of sampled answers.

    `data`: content of RUN/data.json. `checkpoint`: where a resumed run finds the newest rollout, and `progress`
    what its first start chose.
    """
    if config.rollout.temperature != 1.0 and not model.head.is_product:
        raise UserError(
            f"rollout.temperature={config.rollout.temperature:g} divides logits, which "
            f"{model.hf_config.model_type} does not compute by a product alone; set it to 1"
        )
    encoder = PromptEncoder(model, config.model, data)
    ends = encoder.stop_tokens(config.model.path)
    with contextlib.ExitStack() as stack:
        engine: Engine | ServedEngine
        if config.rollout.url is None:
            if config.rollout.batch_invariant:
                require(
                    backend.ranks.device.type == "cpu",
                    "rollout.batch_invariant=true is for the CPU, and this rank has a GPU; leave it out",
                )
                model.make_batch_invariant()
            engine = Engine(model, backend, end_tokens=ends, tokenizer=encoder.tokenizer, chosen=progress.sampling)
        else:
            engine = stack.enter_context(contextlib.closing(_served(config, model, backend, data, ends)))
        pool = stack.enter_context(RewardPool(config.data, log=log, moved=watch.moved))
        loader = RolloutLoader(
            prompts,
            held_out,
            config=config,
            engine=engine,
            encoder=encoder,
            pool=pool,
            backend=backend,
            boundary=boundary,
            progress=progress,
            log=log,
        )
        if checkpoint is not None:
            loader.restore(checkpoint)
        yield loader


def _served(
    config: Config, model: CausalLM, backend: Backend, data: Mapping[str, Any], ends: Sequence[int]
) -> ServedEngine:
    """Return the server of rollout.url. Raises UserError if it does not answer."""
    assert config.rollout.url is not None
    run_dir = Path(config.run_dir)
    name = _name_on_server(run_dir) if backend.writes else ""  # Only the rank that writes talks to the server.
    remote = RemoteEngine(config.rollout.url, stop_tokens=ends, run=name)
    if backend.writes:
        remote.connect()

    def publish(folder: Path) -> None:
        publish_result(folder, model, config.spec, data["chat_template"], backend, run_dir=run_dir)

    return ServedEngine(remote, run_dir / ROLLOUT_ADAPTER_NAME, publish, backend)


def _name_on_server(run_dir: Path) -> str:
    """Return the prefix of the run's adapter names, which no other run has; a resume replaces those left by a kill."""
    path = run_dir / ROLLOUT_ID_NAME
    if not path.is_file():
        atomic_io.write_text(path, secrets.token_hex(8))
    return f"{run_dir.resolve().name}-{path.read_text(encoding='utf-8')}"


def _text_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a prompt as a text: of messages the last one's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
