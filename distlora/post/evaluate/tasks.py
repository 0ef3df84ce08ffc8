"""Models on tasks of lm-evaluation-harness, one after the other, and how each differs from the first, question by
question."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from distlora.architecture.tokens import load_tokenizer
from distlora.config import UserError, nearest
from distlora.data.chat import ChatTemplate
from distlora.parallel import Ranks
from distlora.post.divergence import let_go
from distlora.post.evaluate.harness import HarnessModel
from distlora.post.evaluate.measure import load_shared
from distlora.post.evaluate.request import Request, Subject, Tasks
from distlora.run_folder.layout import DATA_NAME, read_record
from distlora.system.progress_lines import still_loading

BOOTSTRAPS = 1000
"""Resamplings behind the standard error of a metric that is no mean."""

Say = Callable[[str], None]


def run_tasks(request: Request, tasks: Tasks, ranks: Ranks, say: Say) -> dict[str, Any]:
    """The figures of every model; nothing on ranks that the harness gives none. Every rank must call it alike.

    Raises UserError for a task that is not there.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # It remarks on each default of each task.
    manager = open_tasks(tasks)
    models: list[dict[str, Any]] = []
    first: Mapping[str, Any] | None = None
    questions: dict[str, int] = {}
    for number, subject in enumerate(request.subjects, start=1):
        say(f"loading {subject.label} ({number} of {len(request.subjects)})")
        with still_loading() if ranks.rank == 0 else contextlib.nullcontext():
            model, backend = load_shared(subject, request.dtype, ranks)
        harness = HarnessModel(model, backend, *reading_of(subject, tasks), say=say)
        found = evaluate(harness, tasks, manager, ranks)
        del model, backend, harness
        let_go(ranks.device)
        if found is None:
            continue
        first = first or found
        questions = {name: len(found["samples"][name]) for name in found["samples"]}
        models.append({"label": subject.label, "kind": subject.kind, "tasks": figures_of(found, first)})
    if not models:
        return {}
    return {
        "harness": importlib.metadata.version("lm_eval"),
        "compared_with": models[0]["label"],
        "fewshot": tasks.fewshot,
        "chat": tasks.as_chat,
        "questions": questions,
        "models": models,
    }


def open_tasks(tasks: Tasks) -> TaskManager:
    """The harness's index of tasks: its own, or those of a folder."""
    manager = TaskManager(include_path=tasks.folder, include_defaults=tasks.folder is None)
    for name in tasks.names:
        if not manager.match_tasks([name]):
            where = "lm-evaluation-harness" if tasks.folder is None else tasks.folder
            raise UserError(
                f"--tasks={name}: {where} has no such task{nearest(name, manager.all_tasks)}; write one that it has"
                + ("" if tasks.folder else ", or name a folder of YAML files with --tasks-folder")
            )
    return manager


def evaluate(harness: HarnessModel, tasks: Tasks, manager: TaskManager, ranks: Ranks) -> Mapping[str, Any] | None:
    """What the harness makes of one model, samples included; None on other ranks than a machine's first."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results.
        found: Mapping[str, Any] | None = lm_eval.simple_evaluate(
            harness,
            tasks=list(tasks.names),
            num_fewshot=tasks.fewshot,
            limit=tasks.limit,
            apply_chat_template=tasks.as_chat,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS if ranks.rank == 0 else 0,
            log_samples=True,
        )
    return found


def reading_of(subject: Subject, tasks: Tasks) -> tuple[Any, ChatTemplate | None]:
    """(tokenizer, chat template): as the model was taught to read."""
    config, _, _ = subject.found()
    tokenizer = load_tokenizer(Path(config.model.path), config.model.new_tokens)
    if not tasks.as_chat:
        return tokenizer, None
    data = read_record(Path(config.run_dir) / DATA_NAME)
    return tokenizer, ChatTemplate(tokenizer, config.model.path, source=data.get("chat_template"))


def figures_of(found: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By task and metric."""
    tasks: dict[str, dict[str, Any]] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if metric.endswith("_stderr") or not kind or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            of = {"value": float(value), "error": error if isinstance(error, float) and math.isfinite(error) else None}
            if found is not first:
                of |= paired(*(by_question(which, task, metric, kind) for which in (found, first)))
            tasks.setdefault(task, {})[metric if kind == "none" else f"{metric} ({kind})"] = of
    return tasks


def by_question(found: Mapping[str, Any], task: str, metric: str, kind: str) -> list[float]:
    """A metric of each question; empty where it has no figure of its own, as where several make one."""
    samples = [s for s in found["samples"].get(task, []) if s.get("filter", "none") == kind]
    values = [sample.get(metric) for sample in samples]
    return [float(v) for v in values] if all(isinstance(v, (int, float)) for v in values) else []


def paired(values: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard error of the differences: what makes a question hard for both is no noise."""
    if not values or len(values) != len(theirs):
        return {"difference": None, "difference_error": None}
    differences = torch.tensor(values, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    count = len(values)
    error = float(differences.std()) / math.sqrt(count) if count > 1 else None
    return {"difference": float(differences.mean()), "difference_error": error}
