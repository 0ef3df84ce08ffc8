"""Rollouts of online reinforcement learning: answers that the model samples, scored and packed for each step.

Letters: N answers, G answers of a group (of one prompt), R rewards, L tokens per row, B rows of a micro-batch.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distlora.checkpoint.state import RunProgress
from distlora.config import Config, DataConfig, RolloutConfig, UserError, require
from distlora.data.loader import IGNORED, MicroBatch, StepBatch
from distlora.data.packing import assign_rows
from distlora.data.rows import EMPTY, PARTS, SAMPLES, RowOrder, hash64
from distlora.data.turn_writer import TurnWriter
from distlora.generation.engine import Engine, gathered
from distlora.generation.prompts import PromptEncoder
from distlora.generation.sampling import Request, Sample
from distlora.model.build import CausalLM
from distlora.parallel import Backend, watch
from distlora.rewards.pool import RewardInput, RewardPool
from distlora.run_folder.layout import EVAL_ANSWERS_NAME, ROLLOUT_NAME, ROLLOUTS_NAME
from distlora.training.dialogues import Dialogue, DialogueSampler
from distlora.training.objectives.grpo import advantages_of
from distlora.training.open_run import OpenRun
from distlora.training.publish import publish_result
from distlora.training.reward_models import RewardModels, open_reward_models
from distlora.training.rollout_files import AnswerFiles, columns_of, notable_answers
from distlora.training.sampled_answers import Rollout, figures_of, has_equal_rewards, sums_of_rewards
from distlora.training.served_engine import ServedEngine, start_served_engine

SHOWN = 3
"""Held-out prompts whose answers are written at each evaluation."""
LENGTH_MULTIPLE = 64
"""The rows of a step are as long as the fullest, rounded up to this, and at most data.sequence_length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedAnswers:
    """The answers of a step as rows: prompt and answer are a document, whose labels are the answer's tokens."""

    rows: MicroBatch
    """All rows."""
    num_labels: int

    def __len__(self) -> int:
        return len(self.rows.input_ids)

    def micro_batch(self, rows: np.ndarray, pad: int) -> MicroBatch:
        """Return the rows of these numbers (B,), EMPTY for one without labels."""
        numbers = torch.from_numpy(rows.astype(np.int64))
        is_empty, chosen = numbers == EMPTY, numbers.clamp(min=0)
        batch = MicroBatch._make(None if tensor is None else tensor[chosen] for tensor in self.rows)
        batch.input_ids[is_empty], batch.labels[is_empty] = pad, IGNORED
        batch.position_ids[is_empty] = torch.arange(batch.labels.shape[1])
        return batch._replace(rows=numbers)


def pack_answers(
    rollout: Rollout,
    answers: np.ndarray,
    totals: np.ndarray,
    settings: RolloutConfig,
    *,
    sequence_length: int,
    pad: int,
    with_kl: bool,
) -> PackedAnswers:
    """Pack the answers of these numbers, (n,) integers, for one optimizer step, with weights of rollout.loss_type.

    Answers whose loss has no gradient whatever the model is do not run: those of a group with equal rewards, without a
    KL term, and truncated ones that are masked. They count in the means all the same. `totals` (N,) of all answers.
    """
    advantages = advantages_of(totals, settings.num_generations, settings.scale_rewards)
    counts = ~np.isnan(totals)
    trains = counts & ((rollout.ended == 1) | (not settings.mask_truncated_completions))
    runs = [answer for answer in answers.tolist() if trains[answer] and (with_kl or advantages[answer] != 0)]
    lengths, own = rollout.lengths, rollout.written_lengths
    num_labels = int(own[runs].sum())
    # The sum of the weighted losses is divided by num_labels.
    if settings.loss_type == "dapo":
        weights = np.full(len(rollout), num_labels / max(int(own[answers][trains[answers]].sum()), 1))
    else:
        divisor = own if settings.loss_type == "grpo" else np.full(len(rollout), settings.max_new_tokens)
        weights = num_labels / (max(int(np.count_nonzero(counts[answers])), 1) * divisor)
    sizes = rollout.prompt_lengths + lengths
    row_of = assign_rows(sizes[runs], sequence_length)
    num_rows = max(int(row_of.max(initial=0)) + 1, 1)
    fullest = int(np.bincount(row_of, weights=sizes[runs], minlength=1).max(initial=1))
    length = min(-(-fullest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, sequence_length)
    input_ids = np.full((num_rows, length), pad, np.int64)
    labels = np.full((num_rows, length), IGNORED, np.int64)
    position_ids = np.tile(np.arange(length), (num_rows, 1))
    of_labels = np.zeros((3, num_rows, length), np.float32)
    ends, logp_ends = np.cumsum(sizes), np.cumsum(lengths)
    filled = np.zeros(num_rows, np.int64)
    for row, answer in zip(row_of.tolist(), runs, strict=True):
        start, size = int(filled[row]), int(sizes[answer])
        filled[row] += size
        tokens = rollout.tokens[ends[answer] - size : ends[answer]]
        input_ids[row, start : start + size] = tokens
        # Behind it another answer begins, or the padding.
        position_ids[row, start:] = np.arange(length - start)
        position_ids[row, start + size :] = np.arange(length - start - size)
        # The label at a position is the next token. Those of a dialogue's environment are none.
        places = slice(start + int(rollout.prompt_lengths[answer]) - 1, start + size - 1)
        within = slice(logp_ends[answer] - lengths[answer], logp_ends[answer])
        labels[row, places] = np.where(rollout.written[within] == 1, tokens[rollout.prompt_lengths[answer] :], IGNORED)
        of_labels[0, row, places] = rollout.logps[within]
        of_labels[1:, row, places] = np.array([[advantages[answer]], [weights[answer]]])
    sampled = torch.from_numpy(of_labels)
    whole = MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        rows=torch.arange(num_rows),
        logps=sampled[0],
        advantages=sampled[1],
        weights=sampled[2],
    )
    return PackedAnswers(rows=whole, num_labels=num_labels)


class RewardsFailedError(RuntimeError):
    """Report that no answer has had a reward for rollout.max_failed_steps steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluation on held-out prompts."""

    figures: dict[str, float]
    samples: list[tuple[str, str]]
    """The first SHOWN prompts with their answers."""
    notable: list[dict[str, Any]]
    """Rows of `notable_answers`, on the rank that writes."""
    answers: StepBatch | None
    """All answers, of which an objective without rewards computes the loss; None for others."""


@dataclass(eq=False)
class RolloutLoader:
    """Answers of each step, with the interface of StepLoader. Every rank calls it alike.

    The prompts of a rollout, the seeds of its answers and their order are functions of (train.seed, its number). All
    ranks hold the whole rollout; a rank generates and scores its part of the answers.
    """

    prompts: RowOrder
    """The prompts of each rollout, a row each."""
    held_out: RowOrder | None
    _: KW_ONLY
    config: Config
    engine: Engine | ServedEngine
    sampler: DialogueSampler
    pool: RewardPool
    reward_models: RewardModels
    backend: Backend
    boundary: watch.Marker
    """Called between the parts of a rollout; it may raise Stopped."""
    progress: RunProgress
    """Progress of the run, which keeps the engine's choice for a resume."""
    log: Callable[[str], None]
    sampled: AnswerFiles
    """RUN/rollouts, which shows a person what was sampled."""
    evaluated: AnswerFiles
    """RUN/eval_answers."""
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
        return self.prompts.steps_per_epoch * self.config.rollout.steps

    def sample(self, step: int) -> Rollout:
        """Return the rollout of a step (from 0). Its answers are sampled where it begins."""
        within = step % self.config.rollout.steps
        if self.rollout is None or int(self.rollout.step) != step - within:
            if within:
                raise UserError(
                    f"the checkpoint of step {step} lacks the answers that it was trained on; move it out of the run "
                    "folder, and the checkpoint before it is used"
                )
            began, settings, number = time.monotonic(), self.config.rollout, step // self.config.rollout.steps
            self.rollout = self._resampled(number, step)
            if self.sampled.writes:
                totals = self.rollout.totals(self.config.data.reward_weights)
                advantages = advantages_of(totals, settings.num_generations, settings.scale_rewards)
                columns = self._columns(step + 1, self.rollout, totals, advantages, settings.num_generations)
                self._write(self.sampled, step + 1, columns)
            self._figures["rollout/seconds"] = time.monotonic() - began
        return self.rollout

    def _resampled(self, number: int, step: int) -> Rollout:
        """Return the answers of a rollout. Those of groups with equal rewards make room for answers to other prompts.

        At most rollout.max_resamples times as many other prompts are drawn as there are such groups. A group takes a
        place only if its rewards differ.
        """
        settings, weights = self.config.rollout, self.config.data.reward_weights
        group, asked = settings.num_generations, self.prompts.rows_of_step(number)
        rollout, _ = self._answers(self.prompts, asked, group, settings.temperature, (1, number), step)
        counts, replaced = dict(self._figures), 0
        for attempt in range(1, settings.max_resamples + 1):
            equal = np.flatnonzero(has_equal_rewards(rollout.totals(weights), group) == 1)
            words = (SAMPLES, self.config.train.seed, 2, number, attempt)
            order = np.argsort(hash64(words, len(self.prompts.rows)), kind="stable")
            rows = order[~np.isin(order, asked)][: len(equal)]
            if len(rows) == 0:
                break
            others, _ = self._answers(self.prompts, rows, group, settings.temperature, (1, number, attempt), step)
            counts = {name: counts.get(name, 0) + self._figures.get(name, 0) for name in counts | self._figures}
            asked = np.concatenate([asked, rows])
            differ = np.flatnonzero(has_equal_rewards(others.totals(weights), group) == 0)
            places, chosen = (answers_of(groups, group) for groups in (equal[: len(differ)], differ))
            rollout, replaced = rollout.with_answers(places, others, chosen), replaced + len(differ)
        self._figures = counts | ({"rollout/replaced_groups": replaced} if settings.max_resamples else {})
        return rollout

    def _columns(
        self, step: int, rollout: Rollout, totals: np.ndarray, advantages: np.ndarray | None, group: int
    ) -> dict[str, Any]:
        names, tokenizer = self.config.data.rewards, self.sampler.tokenizer
        return columns_of(step, rollout, totals, advantages, names, group, tokenizer)

    def _write(self, files: AnswerFiles, step: int, columns: Mapping[str, Any]) -> None:
        """Write the answers of a step. If the disk refuses them, say so and continue."""
        try:
            files.write(step, columns)
        except OSError as error:
            self.log(f"WARNING: answers could not be written to {files.folder} ({error}). Training continues")

    def batch(self, step: int) -> StepBatch:
        """Return this rank's micro-batches of a step (from 0)."""
        rollout, settings, within = self.sample(step), self.config.rollout, step % self.config.rollout.steps
        totals = rollout.totals(self.config.data.reward_weights)
        iteration, part = divmod(within, settings.steps_per_generation)
        order = np.arange(len(rollout))
        if settings.steps_per_generation > 1:  # So that a step has answers of more groups.
            words = (PARTS, self.config.train.seed, step - within, iteration)
            order = np.argsort(hash64(words, len(rollout)), kind="stable")
        first, last = (number * len(rollout) // settings.steps_per_generation for number in (part, part + 1))
        self._require_rewards(step, totals[order[first:last]])
        figures = figures_of(rollout, totals, self.config.data.rewards, settings.num_generations)
        batch = self._packed(rollout, order[first:last], totals, settings)
        self._num_rows[step] = batch.global_rows
        self._figures, figures = {}, {**figures, **self._figures, "rollout/staleness": within}
        return replace(batch, figures=figures)

    def _require_rewards(self, step: int, totals: np.ndarray) -> None:
        """Raise RewardsFailedError if these totals of a step, and of those before it, are missing too often."""
        self._failed_steps = self._failed_steps + 1 if np.isnan(totals).all() else 0
        total = self.config.total_steps(len(self.prompts.rows))
        if self._failed_steps >= min(self.config.rollout.max_failed_steps, total):
            count = f"{self._failed_steps} steps" if self._failed_steps > 1 else "step"
            raise RewardsFailedError(
                f"no answer of the last {count}, up to step {step + 1}, has a reward "
                f"(rollout.max_failed_steps={self.config.rollout.max_failed_steps}): nothing is trained. Correct "
                f"data.rewards=[{','.join(self.config.data.rewards)}] and start a new run, or continue this one once "
                f"what they need works again: distlora resume {self.config.run_dir}\n"
                f"{self.pool.first_failure or 'each reward returned None, or the log of an earlier start says why'}"
            )

    def _packed(self, rollout: Rollout, answers: np.ndarray, totals: np.ndarray, settings: RolloutConfig) -> StepBatch:
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
        own = self.prompts.deal(np.arange(len(packed)))[:, self.rank]
        return StepBatch(
            micro_batches=[packed.micro_batch(rows, pad) for rows in own],
            global_targets=packed.num_labels,
            global_pairs=0,
            global_rows=len(packed),
            rows=tuple(own.reshape(-1).tolist()),
        )

    def rows_of_ranks(self, step: int) -> np.ndarray:
        """Return the rows of all ranks in a past step: (accumulation, world, micro_batch), -1 for an empty row."""
        return self.prompts.deal(np.arange(self._num_rows[step]))

    def files(self, step: int) -> dict[str, dict[str, Tensor]]:
        """Return the file of a checkpoint after `step` steps: the rollout, if a next step trains on it."""
        per_rollout = self.config.rollout.steps
        if self.rollout is None or step % per_rollout == 0 or int(self.rollout.step) != step - step % per_rollout:
            return {}
        return {ROLLOUT_NAME: self.rollout.tensors()}

    def restore(self, checkpoint: Path) -> None:
        """Take the rollout of a checkpoint, if it holds one."""
        if (path := checkpoint / ROLLOUT_NAME).is_file():
            self.rollout = Rollout.read(path)

    def evaluate(self, step: int) -> Evaluation:
        """Answer the held-out prompts, and return the metrics of the answers.

        eval_loss is the negative mean reward, as that is what the objective minimizes; there is none without a reward.
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
        prompts = [_text_of(self._record(self.held_out, row)["prompt"]) for row in rows.tolist()]
        notable: list[dict[str, Any]] = []
        if self.backend.writes:
            columns = self._columns(step, rollout, totals, None, 1)
            if self.config.data.rewards:
                notable = notable_answers(columns, self._evaluated_before(step), prompts)
            if self.evaluated.writes:
                self._write(self.evaluated, step, columns)
        batch = None
        if not self.config.train.needs.rewards:
            alone = replace(self.config.rollout, num_generations=1)
            batch = self._packed(rollout, np.arange(len(rollout)), np.zeros(len(rollout)), alone)
        return Evaluation(
            figures={f"eval_{name}": value for name, value in figures.items()},
            samples=list(zip(prompts, texts, strict=False)),
            notable=notable,
            answers=batch,
        )

    def _evaluated_before(self, step: int) -> list[dict[str, Any]]:
        """Return the answers of the evaluation before. If their file is damaged, say so and compare with none."""
        try:
            return self.evaluated.before(step)
        except UserError as error:
            self.log(f"WARNING: {error}, or delete it. Answers that have changed since then are not shown")
            return []

    def _answers(
        self,
        prompts: RowOrder,
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

        def inputs(index: int, dialogue: Dialogue) -> RewardInput:
            record = self._record(prompts, int(rows[index // group]))
            is_text = isinstance(record["prompt"], str)
            return RewardInput(
                prompt=record["prompt"],
                completion=dialogue.messages[0]["content"] if is_text else dialogue.messages,
                columns=record["columns"],
                completion_ids=dialogue.tokens,
            )

        answers, counts = self.sampler.run(
            requests,
            inputs,
            lambda going: self._samples(going, watched),
            lambda phase: self.boundary(watched, phase, long=True),
        )
        self.boundary(watched, "computing rewards", long=True)
        mine = self.backend.ranks.part_of(len(answers))
        scored = [inputs(index, answers[index]) for index in mine]
        rewards, failed = self._scored(scored, mine, len(answers), counts)
        rollout = Rollout(
            step=np.array(step, np.int64),
            prompt_lengths=np.array([len(request.tokens) for request in requests], np.int64),
            lengths=np.array([len(answer.tokens) for answer in answers], np.int64),
            written=np.concatenate([answer.written for answer in answers]),
            tokens=np.concatenate([[*r.tokens, *a.tokens] for r, a in zip(requests, answers, strict=True)]),
            logps=np.concatenate([np.array(answer.logprobs, np.float32) for answer in answers]),
            ended=np.array([answer.ended for answer in answers], np.int64),
            rewards=rewards,
            failed=failed | np.array([answer.failed for answer in answers], np.int64),
        )
        return rollout, [self.sampler.text(answer) for answer in answers[:SHOWN]]

    def _samples(self, requests: Sequence[Request], watched: int) -> list[Sample]:
        """Return the engine's samples of requests."""
        if not isinstance(self.engine, Engine):
            return self.engine.run(requests)
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
        return samples

    def _scored(
        self, inputs: list[RewardInput], mine: range, count: int, others: dict[str, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return all ranks' rewards (N, R), NaN where there is none, and failures (N,).

        Counts of these, and `others` of this rank, are metrics.
        """
        scores = self.reward_models.merged(self.pool.score(inputs), inputs)
        by_name = scores.counts | others
        table = torch.zeros(count, len(self.config.data.rewards) + 1, dtype=torch.float64)
        if inputs:
            values = [[math.nan if value is None else value for value in row] for row in scores.values]
            failed = torch.tensor(scores.failed, dtype=torch.float64)
            table[mine.start : mine.stop] = torch.cat(
                [torch.tensor(values, dtype=torch.float64), failed[:, None]], dim=1
            )
        counts = torch.tensor(list(by_name.values()), dtype=torch.float64)
        device = self.backend.ranks.device
        sums = self.backend.sum_over_ranks(torch.cat([table.flatten(), counts]).to(device)).cpu()
        failures = zip(by_name, sums[table.numel() :].tolist(), strict=True)
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

    def _record(self, prompts: RowOrder, row: int) -> dict[str, Any]:
        assert prompts.rows.records is not None, "data of prompts"
        return prompts.rows.records[row]


@contextlib.contextmanager
def open_rollouts(
    opened: OpenRun,
    model: CausalLM,
    backend: Backend,
    *,
    log: Callable[[str], None],
    boundary: watch.Marker,
) -> Iterator[RolloutLoader]:
    """Start the processes of rewards, and return the loader of sampled answers, with the newest rollout of a resume."""
    config = opened.config
    require(
        config.rollout.temperature == 1.0 or model.head.is_product,
        f"rollout.temperature={config.rollout.temperature:g} divides logits, which {model.hf_config.model_type} does "
        "not compute by a product alone; set it to 1",
    )
    encoder = PromptEncoder(model, config.model, opened.data)
    ends = encoder.stop_tokens(config.model.path)
    with contextlib.ExitStack() as stack:
        engine: Engine | ServedEngine
        if config.rollout.url is None:
            if config.rollout.batch_invariant:
                on_cpu = backend.ranks.device.type == "cpu"
                require(on_cpu, "rollout.batch_invariant=true is for the CPU, and this rank has a GPU; leave it out")
                model.make_batch_invariant()
            engine = Engine(
                model, backend, end_tokens=ends, tokenizer=encoder.tokenizer, chosen=opened.progress.sampling
            )
        else:
            run_dir, template = Path(config.run_dir), opened.data["chat_template"]

            def publish(folder: Path) -> None:
                publish_result(folder, model, config.spec, template, backend, run_dir=run_dir)

            served = start_served_engine(config.rollout.url, run_dir, ends, publish, backend)
            engine = stack.enter_context(contextlib.closing(served))
        models = open_reward_models(
            config.data,
            config.spec,
            model,
            backend,
            encoder,
            micro_batch=config.train.micro_batch,
            pad=opened.loader.rows.pad_token_id,
            log=log,
        )
        pool = stack.enter_context(RewardPool(config.data, log=log, moved=watch.moved))
        sampler = DialogueSampler(
            tokenizer=encoder.tokenizer,
            stops=ends,
            pool=pool,
            ranks=backend.ranks,
            gather=lambda samples, count: gathered(samples, count, backend),
            writer=_turn_writer(config.data, encoder),
            max_turns=config.rollout.max_turns,
        )
        sampled, evaluated = (
            AnswerFiles(
                Path(config.run_dir) / name, config.rollout.keep, done=opened.progress.step, writes=backend.writes
            )
            for name in (ROLLOUTS_NAME, EVAL_ANSWERS_NAME)
        )
        loader = RolloutLoader(
            opened.loader,
            opened.eval_loader,
            config=config,
            engine=engine,
            sampler=sampler,
            pool=pool,
            reward_models=models,
            backend=backend,
            boundary=boundary,
            progress=opened.progress,
            log=log,
            sampled=sampled,
            evaluated=evaluated,
        )
        if opened.newest is not None:
            loader.restore(opened.newest)
        yield loader


def _turn_writer(data: DataConfig, encoder: PromptEncoder) -> TurnWriter | None:
    """Return the writer of what an environment or tools answer; None without them."""
    if not data.has_dialogues:
        return None
    assert encoder.template is not None, "the preparation has refused prompts that are no messages"
    return TurnWriter(encoder.template, encoder.tokenizer, json.loads(data.tool_schemas or "[]"))


def answers_of(groups: np.ndarray, group: int) -> np.ndarray:
    """Return the numbers of the answers of groups (n,): (n G,) integers."""
    return (groups[:, None] * group + np.arange(group)).reshape(-1)


def _text_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a prompt as a text: of messages the last one's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
