"""Evaluate quantized, adapted and sharded models with lm-evaluation-harness.

`HarnessModel` replaces the harness's HFLM. Tokenization, windows, few-shot examples and metrics are the harness's,
logits are ours. Every rank scores its own batch in one pass through the sharded base, and results are added to zeros of
other ranks, which is exact.

T tokens, H hidden size, V vocabulary, N requests.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import GenerationConfig

from distlora.architecture.tokens import load_tokenizer
from distlora.config import UserError, nearest
from distlora.data.chat_template import ChatTemplate, start_tokens
from distlora.generation.prompts import context_limit
from distlora.generation.writer import Completion, Writer
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks, sum_over_ranks
from distlora.post.divergence import LOGITS_AT_ONCE, let_go
from distlora.post.evaluate import EvaluateRequest
from distlora.post.evaluate_worker import load
from distlora.run_folder.layout import DATA_NAME, read_record
from distlora.system.progress import still

TOKENS_AT_ONCE = 4096
"""Tokens per batch, padding included."""

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of the harness: texts, tokens of the context, tokens of the continuation."""


class HarnessModel(TemplateLM):
    """A `CausalLM` for lm-evaluation-harness. Every rank makes the same calls and gets the same answers.

    The harness sees one process: it would otherwise give ranks unequal numbers of requests, and ranks with a sharded
    base must run together.
    """

    def __init__(
        self,
        model: CausalLM,
        backend: Backend,
        tokenizer: Any,
        template: ChatTemplate | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__()
        self.model, self.ranks_of, self.tokenizer, self.template, self.say = model, backend, tokenizer, template, say
        self.max_length = context_limit(model)
        self._start = start_tokens(tokenizer)
        self._writer = Writer(model, backend, tokenizer)
        self._device = backend.ranks.device

    @property
    def eot_token_id(self) -> int:
        """Return the end-of-text token."""
        id: int = self.tokenizer.eos_token_id
        return id

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Return the tokenizer's name, without slashes."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenize a text, with the start tokens unless the text has them."""
        tokens: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False).input_ids
        starts = self._start if add_special_tokens in (None, True) else []
        return tokens if tokens[: len(starts)] == starts else starts + tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the run's chat template."""
        assert self.template is not None, "refused when the request was made"
        return self.template.render("the task", chat_history, (), prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template's name for the harness's record."""
        return None if self.template is None or not chat_template else "the run's"

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of each whole text, in windows of `max_length` tokens that predict every token once."""
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Return (log p of the continuation, whether every token was the likeliest) for each request."""
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        scores = torch.zeros(len(rows), 2, dtype=torch.float64)
        batches, ranks = list(batches_of([len(row) for row, _ in rows])), self.ranks_of.ranks
        for first in range(0, len(batches), ranks.world):
            mine = first + ranks.rank
            batch = batches[mine] if mine < len(batches) else []
            values = self._score([rows[index] for index in batch] or [([0, 0], 1)])
            if batch:
                scores[torch.tensor(batch)] = values
            done = sum(len(batch) for batch in batches[: first + ranks.world])
            self.say(f"scored {done:,} of {len(rows):,}")
        sum_over_ranks(scores, ranks)
        return [(value, misses == 0) for value, misses in scores.tolist()]

    def _row(self, context: list[int], continuation: list[int]) -> tuple[list[int], int]:
        """Return (the last max_length + 1 tokens, number of scored tokens)."""
        row = (context + continuation)[-(self.max_length + 1) :]
        return row, min(len(continuation), len(row) - 1)

    def _score(self, rows: Sequence[tuple[list[int], int]]) -> Tensor:
        """Return (N, 2) fp64: the sum of log p, and the number of tokens that were not the likeliest."""
        device, longest = self._device, max(len(row) for row, _ in rows) - 1
        input_ids = torch.tensor([row[:-1] + [0] * (longest + 1 - len(row)) for row, _ in rows])
        positions = torch.arange(longest).expand_as(input_ids)
        documents = self.model.documents_of(positions, device)
        scores = torch.zeros(len(rows), 2, dtype=torch.float64)
        with self.model.head.read_by(lambda hidden: self._read(hidden, rows, scores)):
            # The labels are unused by a head that is read, but without them it gets the last position alone.
            self.model(input_ids.to(device), positions.to(device), input_ids.to(device), documents=documents)
        return scores

    def _read(self, hidden: Tensor, rows: Sequence[tuple[list[int], int]], scores: Tensor) -> None:
        """Add the figures of the scored tokens to `scores`, given the last hidden states (N, T, H)."""
        device = hidden.device
        owner = [number for number, (_, scored) in enumerate(rows) for _ in range(scored)]
        place = [at for row, scored in rows for at in range(len(row) - 1 - scored, len(row) - 1)]
        target = torch.tensor([token for row, scored in rows for token in row[-scored:]], device=device)
        at_targets = hidden[torch.tensor(owner, device=device), torch.tensor(place, device=device)]
        size = max(16, LOGITS_AT_ONCE // self.model.vocabulary.rows)
        for first in range(0, len(target), size):
            span = slice(first, first + size)
            log_p = self.model.head.logits(at_targets[span]).log_softmax(-1)
            values = log_p.gather(1, target[span, None]).squeeze(1)
            missed = log_p.argmax(-1) != target[span]
            scores.index_add_(0, torch.tensor(owner[span]), torch.stack([values.double(), missed.double()], 1).cpu())

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate behind each context until a stop text."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for settings, numbers in groups.items():
            config, until = self._generation(json.loads(settings))
            room = self.max_length - config.max_new_tokens
            if room < 1:
                raise UserError(
                    f"a task asks for answers of {config.max_new_tokens:,} tokens, and the model has "
                    f"{self.max_length:,} positions for question and answer; lower max_gen_toks in generation_kwargs"
                )
            contexts = {number: self.tok_encode(requests[number].args[0])[-room:] for number in numbers}
            contexts = {number: tokens or [self.prefix_token_id] for number, tokens in contexts.items()}
            order = sorted(numbers, key=lambda number: -len(contexts[number]))
            before, num_done = len(answers), itertools.count(1)

            def done(_index: int, _completion: Completion, before: int = before, num_done: Any = num_done) -> None:
                self.say(f"answered {before + next(num_done):,} of {len(requests):,}")

            prompts = [contexts[number] for number in order]
            completions = self._writer.complete(prompts, config, stop=until, on_done=done)
            for number, made in zip(order, completions, strict=True):
                # Padding behind an ended row is removed with its stop text.
                text = self.tokenizer.decode(made.tokens)
                answers[number] = postprocess_generated_text(text, until, None)
        return [answers[number] for number in range(len(requests))]

    def _generation(self, settings: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
        """Return (generation config, stop texts) of a task's generation_kwargs."""
        values: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), 256))  # HFLM's default.
        end = self.tokenizer.decode([self.eot_token_id])
        until = [text for text in values.pop("until") if text]
        pad = self.tokenizer.pad_token_id
        config = GenerationConfig(
            max_new_tokens=values.pop("max_gen_toks"),
            eos_token_id=[self.eot_token_id],
            pad_token_id=self.eot_token_id if pad is None else pad,
            do_sample=values.pop("do_sample"),
        )
        values.pop("max_length", None)
        if config.do_sample:
            config.update(top_k=0)  # No limit unless the task sets one; transformers would take 50.
        else:
            for name in ("temperature", "top_p", "top_k"):
                values.pop(name, None)
        if unknown := config.update(**values):
            raise UserError(
                f"generation_kwargs of a task has {', '.join(sorted(unknown))}, which transformers does not know; take "
                "it out"
            )
        return config, [*until, *([end] if end not in until else [])]


def batches_of(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices in batches of at most TOKENS_AT_ONCE padded tokens.

    The longest come first, so that out-of-memory shows early.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def run_tasks(request: EvaluateRequest, ranks: Ranks, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of every model, {} on ranks that the harness gives none. Every rank must call it.

    Raises UserError for an unknown task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # It logs every default of every task.
    manager = TaskManager(include_path=request.tasks_folder, include_defaults=request.tasks_folder is None)
    for name in request.tasks:
        if not manager.match_tasks([name]):
            where = "lm-evaluation-harness" if request.tasks_folder is None else request.tasks_folder
            raise UserError(
                f"--tasks={name}: {where} has no such task{nearest(name, manager.all_tasks)}; write one that it has"
                + ("" if request.tasks_folder else ", or name a folder of YAML files with --tasks-folder")
            )
    models: list[dict[str, Any]] = []
    first: Mapping[str, Any] | None = None
    questions: dict[str, int] = {}
    for number, subject in enumerate(request.subjects, start=1):
        say(f"loading {subject.label} ({number} of {len(request.subjects)})")
        with still("loading") if ranks.rank == 0 else contextlib.nullcontext():
            model, backend = load(subject, request.compute_dtype, ranks)
        trained, template = subject.read(), None
        tokenizer = load_tokenizer(trained.base, trained.spec.model.new_tokens, trained.spec.model.special_tokens)
        if request.chat:
            data = read_record((trained.run_dir or trained.base) / DATA_NAME)
            template = ChatTemplate(tokenizer, trained.spec.model.path, source=data.get("chat_template"))
        harness = HarnessModel(model, backend, tokenizer, template, say=say)
        with contextlib.redirect_stdout(sys.stderr):
            results: Mapping[str, Any] | None = lm_eval.simple_evaluate(  # None on a node's other ranks.
                harness,
                tasks=list(request.tasks),
                num_fewshot=request.fewshot,
                limit=request.limit,
                apply_chat_template=request.chat,
                task_manager=manager,
                bootstrap_iters=1000 if ranks.rank == 0 else 0,
                log_samples=True,
            )
        del model, backend, harness
        let_go(ranks.device)
        if results is None:
            continue
        first = first or results
        questions = {name: len(results["samples"][name]) for name in results["samples"]}
        models.append({"label": subject.label, "kind": subject.kind, "tasks": figures_of(results, first)})
    if not models:
        return {}
    return {
        "harness": importlib.metadata.version("lm_eval"),
        "compared_with": models[0]["label"],
        "fewshot": request.fewshot,
        "chat": request.chat,
        "questions": questions,
        "models": models,
    }


def figures_of(results: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return figures by task and metric."""
    tasks: dict[str, dict[str, Any]] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            of = {"value": float(value), "error": error if isinstance(error, float) and math.isfinite(error) else None}
            if results is not first:
                of |= paired(*(_by_question(which, task, metric, kind) for which in (results, first)))
            tasks.setdefault(task, {})[metric if kind == "none" else f"{metric} ({kind})"] = of
    return tasks


def _by_question(results: Mapping[str, Any], task: str, metric: str, kind: str) -> list[float]:
    """Return a metric per question; empty if questions have no value of their own."""
    samples = [s for s in results["samples"].get(task, []) if s.get("filter", "none") == kind]
    values = [sample.get(metric) for sample in samples]
    return [float(v) for v in values] if all(isinstance(v, (int, float)) for v in values) else []


def paired(values: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and standard error of the paired differences."""
    if not values or len(values) != len(theirs):
        return {"difference": None, "difference_error": None}
    differences = torch.tensor(values, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    count = len(values)
    error = float(differences.std()) / math.sqrt(count) if count > 1 else None
    return {"difference": float(differences.mean()), "difference_error": error}
