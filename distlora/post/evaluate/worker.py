"""Run the worker of `distlora eval` in one process or in the ranks that the launcher started.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) is transformers' assisted generation with greedy
decoding: a smaller model drafts tokens that a merged model verifies, so the answers are those of greedy decoding with
fewer forwards. The target is a merged, static model, as assisted generation needs the logits of every drafted token.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.architecture.tokens import load_tokenizer
from distlora.config import UserError
from distlora.data.rows import PackedRows
from distlora.parallel import Ranks
from distlora.post.evaluate.measure import (
    add_to_receipt,
    check_same_tokens,
    measure,
    open_rows,
    other_forms,
    pieces,
)
from distlora.post.evaluate.request import NAMES, Draft, EvaluateRequest
from distlora.post.load_trained import made_on, run_on_ranks
from distlora.post.merge.merge import DTYPES, merge_to
from distlora.post.merge.request import measured_table
from distlora.results.tables import Table
from distlora.system import atomic_io
from distlora.system.progress import Progress, quieten, say


def run_draft(request: EvaluateRequest, draft: Draft, rows: PackedRows, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of one target with one draft.

    Raises UserError for a draft of another vocabulary, and for answers that are longer than the models' positions.
    """
    (subject,) = request.subjects
    prompts = _prompts(rows, draft.prompt_tokens)
    with tempfile.TemporaryDirectory(prefix="distlora-draft-") as scratch:
        folder = Path(scratch) / "merged" if subject.model is None else Path(subject.model)
        if subject.name is not None:
            merge_to(subject.name.read(), folder, onto="trained", dtype=DTYPES[request.dtype], say=say)
        ours, theirs = (load_tokenizer(place, ()).get_vocab() for place in (folder, Path(draft.model)))
        if ours != theirs:
            raise UserError(
                f"--draft={draft.model} has another vocabulary than the model ({len(theirs):,} tokens, and "
                f"{len(ours):,} in the model), so its tokens differ; name a smaller model of the same family"
            )
        target, helper = (_load(place, DTYPES[request.dtype]) for place in (folder, Path(draft.model)))
    forwards: Counter[str] = Counter()
    for model, name, which in ((target, subject.label, "target"), (helper, draft.model, "draft")):
        room = model.config.get_text_config().max_position_embeddings - draft.prompt_tokens
        if draft.new_tokens > room:
            raise UserError(
                f"--max-new-tokens={draft.new_tokens:,}: {name} has positions for {room:,} behind a prompt of "
                f"{draft.prompt_tokens}; write --max-new-tokens {room} or less"
            )
        model.register_forward_hook(lambda *_, which=which: forwards.update([which]))
    runs: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[list[int]]] = {"alone": [], "with draft": []}
    for name, assistant in (("alone", None), ("with draft", helper)):
        _continue(target, assistant, prompts[0], draft.new_tokens)  # The first call is slower.
        forwards.clear()
        began = time.perf_counter()
        for number, prompt in enumerate(prompts, start=1):
            answers[name].append(_continue(target, assistant, prompt, draft.new_tokens))
            say(f"{name}: {number}/{len(prompts)} prompts")
        runs[name] = {
            "tokens": sum(map(len, answers[name])),
            "seconds": time.perf_counter() - began,
            "target_forwards": forwards["target"],
            "draft_forwards": forwards["draft"],
        }
    return {
        "draft": draft.model,
        "label": subject.label,
        "dtype": request.dtype,
        "prompts": len(prompts),
        "equal": sum(a == b for a, b in zip(answers["alone"], answers["with draft"], strict=True)),
        "parameters": {"target": target.num_parameters(), "draft": helper.num_parameters()},
        "threads": torch.get_num_threads(),
        "runs": runs,
    }


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """Load a model on the GPU if there is one."""
    auto = getattr(transformers, architecture_of(read_config(folder), folder / "config.json").auto_class)
    model: Any = auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model.generation_config.eos_token_id = None  # No token ends an answer, so all have the same length.
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _prompts(rows: PackedRows, length: int) -> list[Tensor]:
    """Return prompts (1, length): the start of the first longer document of each row.

    Raises UserError if no document is longer.
    """
    found = [next((piece for piece in pieces(rows, row) if len(piece) > length), None) for row in range(len(rows))]
    prompts = [torch.tensor([piece[:length]]) for piece in found if piece is not None]
    if not prompts:
        raise UserError(
            f"no document in these {len(rows):,} rows has more than {length} tokens, whose first {length} are "
            "continued; name longer ones with --text FILE, or more with --rows N"
        )
    return prompts


def _continue(target: Any, assistant: Any | None, prompt: Tensor, new_tokens: int) -> list[int]:
    """Return the tokens of one prompt's greedy answer."""
    prompt = prompt.to(target.device)
    how = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    made = target.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=assistant, **how)
    tokens: list[int] = made[0, prompt.shape[1] :].tolist()
    return tokens


def run(request: EvaluateRequest, ranks: Ranks) -> dict[str, Any]:
    """Return all requested figures; progress goes to stderr. Every rank must call it alike."""
    tell = Progress() if ranks.rank == 0 else lambda text: None
    made = made_on(ranks.device, "distlora", "torch", "transformers") | {"ranks": ranks.world}
    if request.tasks is not None:
        # Imported here because it imports lm-evaluation-harness.
        from distlora.post.evaluate.harness import run_tasks

        return {"dtype": request.dtype} | run_tasks(request, request.tasks, ranks, tell) | made
    assert request.text is not None
    models = [subject.read() for subject in request.subjects]
    rows, rows_in_all = open_rows(request.text, models[0], ranks)
    if request.draft is not None:
        return run_draft(request, request.draft, rows, tell) | made
    for model, subject in zip(models, request.subjects, strict=True):
        check_same_tokens(rows, models[0].spec.model, model.spec.model, subject.label)
    with other_forms(request.merged, ranks, tell) as forms:
        measured = measure((*request.subjects, *forms), request.dtype, rows, ranks, tell)
    text = {
        "name": request.text.name,
        "rows": len(rows),
        "rows_in_all": rows_in_all,
        "sequence_length": rows.sequence_length,
        "targets": int(rows.targets.sum()),
    }
    return {"text": text, "dtype": request.dtype, "compared_with": measured[0]["label"], "models": measured} | made


def deliver(request: EvaluateRequest, found: dict[str, Any]) -> None:
    """Print the table or JSON, and write the file or the receipt."""
    text = json.dumps(found, indent=1)
    print(text if request.as_json else shown(found).text(), flush=True)
    if request.merged is not None:
        add_to_receipt(request.merged, found)
    if request.out is not None:
        atomic_io.write_text(Path(request.out), text + "\n")
        say(f"wrote {request.out}")


def main(request: EvaluateRequest) -> int:
    """Evaluate models; return the exit code. Errors of several ranks go to the launcher."""
    quieten()

    def work(ranks: Ranks) -> None:
        found = run(request, ranks)
        if ranks.rank == 0:
            deliver(request, found)

    advice = "shard the models over several GPUs with --processes N"
    return run_on_ranks(work, when_memory_is_out=advice, names=NAMES)


def shown(figures: Mapping[str, Any]) -> Table:
    """Return the table of the figures."""
    if "harness" in figures:
        return tasks_table(figures)
    return draft_table(figures) if "draft" in figures else measured_table(figures)


def tasks_table(figures: Mapping[str, Any]) -> Table:
    """Return one line per task and metric and one column per model.

    Paired differences to the first model are in brackets.
    """
    models = figures["models"]
    rows = [["task, metric", "questions", *(model["label"] for model in models)]]
    for task, metrics in models[0]["tasks"].items():
        for metric in metrics:
            cells = [_of_metric(model["tasks"][task][metric]) for model in models]
            rows.append([f"{task}, {metric}", f"{figures['questions'][task]:,}", *cells])
    return Table(
        f"lm-evaluation-harness {figures['harness']}, computed in {figures['dtype']}: value +- standard error"
        + (f" (difference to {figures['compared_with']} +- that of the paired difference)" if len(models) > 1 else ""),
        rows,
    )


def _of_metric(value: Mapping[str, Any]) -> str:
    cell = f"{value['value']:.4f}" + ("" if value["error"] is None else f" +- {value['error']:.4f}")
    if value.get("difference") is None:
        return cell
    error = value["difference_error"]
    return f"{cell} ({value['difference']:+.4f}" + ("" if error is None else f" +- {error:.4f}") + ")"


def draft_table(figures: Mapping[str, Any]) -> Table:
    """Return the figures of the target alone and with the draft."""
    rows = [["", "tokens", "seconds", "tokens/s", "forwards of the target", "tokens a forward", "of the draft"]]
    for name in ("alone", "with draft"):
        of = figures["runs"][name]
        cells = [f"{of['tokens']:,}", f"{of['seconds']:.2f}", f"{of['tokens'] / of['seconds']:,.1f}"]
        cells += [f"{of['target_forwards']:,}", f"{of['tokens'] / of['target_forwards']:.2f}"]
        rows.append([name, *cells, f"{of['draft_forwards']:,}"])
    prompts = figures["prompts"]
    same = figures["equal"]
    return Table(
        f"{figures['label']} with the draft {figures['draft']}, {prompts} prompts, computed in {figures['dtype']}: "
        f"{same} of {prompts} answers are those of greedy decoding, token for token",
        rows,
    )
