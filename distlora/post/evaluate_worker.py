"""Run the worker of `distlora eval` in one process or in the ranks that the launcher started.

Models are measured on the same rows of text one after the other, a merged one also in other forms.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) is transformers' assisted generation with greedy
decoding: a smaller model drafts tokens that a merged model verifies, so the answers are those of greedy decoding with
fewer forwards. The target is a merged, static model, as assisted generation needs the logits of every drafted token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from distlora.architecture.config_checks import read_config
from distlora.architecture.images import PROCESSOR_FILE, image_layout, processor_settings
from distlora.architecture.spec import architecture_of
from distlora.architecture.tokens import load_tokenizer
from distlora.config import ModelConfig, UserError
from distlora.config.file import load_config
from distlora.data.images import ImageTensors
from distlora.data.prepare import check_vocabulary, prepare
from distlora.data.rows import STARTS, PackedRows, open_split
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks, from_rank_0
from distlora.post.divergence import Readings, compare, evenly, let_go
from distlora.post.evaluate import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Dtype,
    EvaluateRequest,
    Merged,
    Subject,
    Text,
    table_of,
)
from distlora.post.load_trained import load_in_fp32, load_trained, made_on, require_whole_embedding, run_on_ranks
from distlora.post.merge import Onto, Receipt, check_mergeable
from distlora.post.merge_worker import DTYPES, merge_to
from distlora.post.trained import Trained
from distlora.system import atomic_io
from distlora.system.progress import ProgressLines, say, still


def run(request: EvaluateRequest, ranks: Ranks) -> dict[str, Any]:
    """Return all requested figures; progress goes to stderr. Every rank must call it alike."""
    tell = ProgressLines() if ranks.rank == 0 else lambda text: None
    made = made_on(ranks.device, "distlora", "torch", "transformers") | {"ranks": ranks.world}
    if request.tasks:
        # Imported here because it imports lm-evaluation-harness.
        from distlora.post.evaluate_harness import run_tasks

        return {"dtype": request.compute_dtype} | run_tasks(request, ranks, tell) | made
    assert request.source is not None
    models = [subject.read() for subject in request.subjects]
    rows, rows_in_all = open_rows(request.source, models[0], ranks)
    if request.draft is not None:
        return run_draft(request, request.draft, rows, tell) | made
    for model, subject in zip(models, request.subjects, strict=True):
        check_same_tokens(rows, models[0].spec.model, model.spec.model, subject.label)
    folders = {subject.label: model.base for model, subject in zip(models, request.subjects, strict=True)}
    image_tensors = None if rows.images is None else tensors_for(request.source, folders, ranks.world)
    with other_forms(request.merged, ranks, tell) as forms:
        measured = measure((*request.subjects, *forms), request.compute_dtype, rows, ranks, tell, image_tensors)
    text = {
        "name": request.source.name,
        "rows": len(rows),
        "rows_in_all": rows_in_all,
        "sequence_length": rows.sequence_length,
        "targets": int(rows.targets.sum()),
    }
    return {
        "text": text,
        "dtype": request.compute_dtype,
        "compared_with": measured[0]["label"],
        "models": measured,
    } | made


def deliver(request: EvaluateRequest, figures: dict[str, Any]) -> None:
    """Print the table or JSON, and write the file or the receipt."""
    text = json.dumps(figures, indent=1)
    print(text if request.json else table_of(figures).text(), flush=True)
    if request.merged is not None:
        add_to_receipt(request.merged, figures)
    if request.out is not None:
        atomic_io.write_text(Path(request.out), text + "\n")
        say(f"wrote {request.out}")


def main(request: EvaluateRequest) -> int:
    """Evaluate models; return the exit code. Errors of several ranks go to the launcher."""

    def work(ranks: Ranks) -> None:
        figures = run(request, ranks)
        if ranks.rank == 0:
            deliver(request, figures)

    advice = "shard the models over several GPUs with --processes N"
    return run_on_ranks(work, when_memory_is_out=advice)


def measure(
    subjects: Sequence[Subject],
    dtype: Dtype,
    rows: PackedRows,
    ranks: Ranks,
    say: Callable[[str], None],
    image_tensors: ImageTensors | None = None,
) -> list[dict[str, Any]]:
    """Return the figures of each model in order, with one in memory at a time; a non-finite value is None.

    Every rank must call it alike. Divergences and differences are those from the first model: the largest of a logit
    over all targets, and the share of the targets whose likeliest token differs. `image_tensors` as of `Readings`.
    """
    targets = torch.from_numpy(rows.targets.astype(np.float64))
    first: Readings | None = None
    measured = []
    for number, subject in enumerate(subjects, start=1):
        say(f"loading {subject.label} ({number} of {len(subjects)})")
        with still("loading") if ranks.rank == 0 else contextlib.nullcontext():
            model, _ = load(subject, dtype, ranks, images=image_tensors is not None)
        readings = Readings(rows, ranks, say, first, image_tensors)
        readings.take(model, subject.label)
        del model
        let_go(ranks.device)
        first = first or readings
        loss = compare(readings.losses, first.losses, readings.divergences, targets)
        figures = {
            "loss": loss.loss,
            "perplexity": loss.perplexity,
            "loss_difference": loss.difference,
            "loss_standard_error": loss.standard_error,
            "divergence": loss.divergence,
            "largest_logit_difference": float(readings.largest.max()),
            "changed_tokens": float(readings.changed.sum() / targets.sum()),
        }
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in figures.items()}
        measured.append({"label": subject.label, "kind": subject.kind, **finite})
    return measured


@torch.no_grad()
def load(subject: Subject, dtype: Dtype, ranks: Ranks, *, images: bool = False) -> tuple[CausalLM, Backend]:
    """Load the model of a subject on these ranks, and its backend. `images`: also what takes images."""
    computes_in, trained = subject.dtype or dtype, subject.read()
    trained = replace(trained, spec=replace(trained.spec, images=images))
    if subject.name is not None and computes_in == "fp32":
        return load_in_fp32(trained, ranks)
    model, backend = load_trained(replace(trained, spec=replace(trained.spec, dtype=computes_in)), ranks)
    if subject.rounded is not None:  # As a checkpoint in 16 bits would be.
        for parameter in model.parameters():
            parameter.copy_(parameter.to(DTYPES[subject.rounded]))
        backend.watch_weights(model)
    return model, backend


def open_rows(text: Text, first: Trained, ranks: Ranks) -> tuple[PackedRows, int]:
    """Return (rows to read, number of all rows) in tokens of the first model. Every rank must call it.

    Raises UserError for unreadable text and for missing rows.
    """
    if text.run is not None:
        rows = open_split(text.run, "eval")
        assert rows is not None, "refused when the request was made"
    else:
        arguments = (first.spec.model, text.data(), first.train)
        if ranks.rank == 0:
            prepare(*arguments)
        from_rank_0(0, ranks)  # The other ranks use the cache that rank 0 made.
        rows = PackedRows.open(prepare(*arguments), "train")
    return evenly(rows, text.most_rows), len(rows)


def tensors_for(text: Text, folders: Mapping[str, Path], world: int) -> ImageTensors:
    """Return what makes the tensors of the images that a run held out, for the models in `folders`, by label.

    Raises UserError for a model that reads images otherwise than the run's.
    """
    assert text.run is not None, "images of a text without its run"
    config = load_config(text.run)
    base = config.spec.path
    layout, settings = image_layout(base), processor_settings(base)
    require_whole_embedding(layout, base, world)
    for label, folder in folders.items():
        same = processor_settings(folder) == settings
        if not same or (other := image_layout(folder)).token_id != layout.token_id or other.names != layout.names:
            raise UserError(
                f"{label} reads images otherwise than {base}: its {PROCESSOR_FILE} or its token for images differs; "
                "leave it out, or name a text with --text FILE"
            )
    return ImageTensors(base, config.data, layout.names)


def check_same_tokens(rows: PackedRows, first: ModelConfig, other: ModelConfig, label: str) -> None:
    """Raise UserError if a model's tokenizer differs on this text, as losses per token would not be comparable."""
    folder = Path(other.path)
    check_vocabulary(other, int(np.max(rows.tokens, initial=0)))
    if (folder, other.new_tokens, other.special_tokens) == (Path(first.path), first.new_tokens, first.special_tokens):
        return
    ours, theirs = (load_tokenizer(Path(m.path), m.new_tokens, m.special_tokens) for m in (first, other))
    for row in range(min(64, len(rows))):
        for piece in pieces(rows, row):
            # Retokenize the decoded text with both.
            text = ours.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if ours.encode(text, add_special_tokens=False) != theirs.encode(text, add_special_tokens=False):
                raise UserError(
                    f"{label} has another tokenizer than {first.path}: it makes other tokens of {text[:40]!r}, "
                    "and a loss a token of one cannot be compared with that of the other; evaluate them one at a time"
                )


def pieces(rows: PackedRows, row: int) -> list[list[int]]:
    """Return the documents of a row, padding included."""
    tokens, flags = rows.read(np.array([row]))
    starts = np.flatnonzero(flags[0] & STARTS)
    return [document.tolist() for document in np.split(tokens[0], starts) if len(document)]


TOO_FAR = 1e-2
"""Largest expected logit difference between an exact fp32 sum and the trained model; deep models reach 1e-3."""


@contextlib.contextmanager
def other_forms(merged: Merged | None, ranks: Ranks, tell: Callable[[str], None]) -> Iterator[list[Subject]]:
    """Yield the forms that a merge is compared with; remove the folders made for it afterwards.

    The forms are the exact sum in fp32, rounded to bf16 and fp16, quantized to NF4 again, and the sum on the stored
    base. The trained model computed in bf16 is added as a yardstick.
    """
    if merged is None or not merged.compares:
        yield []
        return
    folder = Path(merged.folder)
    scratch = folder.with_name(f".{folder.name}-compared")
    try:
        trained, receipt = merged.name.read(), Receipt.read(folder)
        yield _forms(merged, trained, receipt, scratch, ranks, tell)
    finally:
        from_rank_0(0, ranks)
        if ranks.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def _forms(
    merged: Merged, trained: Trained, receipt: Receipt, scratch: Path, ranks: Ranks, tell: Callable[[str], None]
) -> list[Subject]:
    def exact_sum(onto: Onto) -> str:
        """Return the folder of the sum: the merge itself, or a new one."""
        if (receipt.onto, receipt.dtype) == (onto, "fp32"):
            return merged.folder
        if ranks.rank == 0:
            scratch.mkdir(exist_ok=True)
            merge_to(trained, scratch / onto, onto=onto, dtype=torch.float32, say=tell)
        from_rank_0(0, ranks)
        return str(scratch / onto)

    if ranks.rank == 0 and scratch.is_dir():
        shutil.rmtree(scratch)  # Left by a comparison that was killed.
    exact = exact_sum("trained")
    forms = [
        Subject(label="exact sum in fp32", kind="form", model=exact),
        Subject(label="exact sum in bf16", kind="form", model=exact, rounded="bf16"),
        Subject(label="exact sum in fp16", kind="form", model=exact, rounded="fp16"),
        Subject(label="exact sum in NF4 again", kind="form", model=exact, quant="nf4"),
    ]
    if receipt.onto == "trained":
        own = {"fp32": 0, "bf16": 1, "fp16": 2}.get(receipt.dtype)
        forms = [form for number, form in enumerate(forms) if number != own]
    if trained.spec.quant.is_nf4 and receipt.onto == "trained":
        try:
            check_mergeable(trained, "original")
        except UserError:
            pass  # The adapter belongs to the NF4 base alone.
        else:
            on_disk = exact_sum("original")
            forms.append(Subject(label="sum on the base on disk, fp32", kind="form", model=on_disk))
    forms.append(Subject(label="as trained, computed in bf16", kind="adapted", name=merged.name, dtype="bf16"))
    return forms


def add_to_receipt(merged: Merged, figures: dict[str, Any]) -> None:
    """Write the section `measured` of merge.json, and merge.md."""
    folder = Path(merged.folder)
    receipt = Receipt.read(folder)
    dataclasses.replace(receipt, measured=figures).write(folder)
    (own,) = (model for model in figures["models"] if model["kind"] == "merged")
    furthest = own["largest_logit_difference"]
    if (receipt.onto, receipt.dtype) == ("trained", "fp32") and (furthest is None or furthest > TOO_FAR):
        distance = "NaN" if furthest is None else f"{furthest:.2g}"
        say(
            f"WARNING: a logit of {merged.folder} is {distance} from the model as it was trained, more "
            "than rounding explains; do not use it, and report this"
        )


def run_draft(request: EvaluateRequest, draft: str, rows: PackedRows, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of one target with one draft.

    Raises UserError for a draft of another vocabulary, and for answers that are longer than the models' positions.
    """
    (subject,), new_tokens = request.subjects, request.max_new_tokens or NEW_TOKENS
    prompts = _prompts(rows, PROMPT_TOKENS)
    with tempfile.TemporaryDirectory(prefix="distlora-draft-") as scratch:
        folder = Path(scratch) / "merged" if subject.model is None else Path(subject.model)
        if subject.name is not None:
            merge_to(subject.name.read(), folder, onto="trained", dtype=DTYPES[request.compute_dtype], say=say)
        ours, theirs = (load_tokenizer(place, ()).get_vocab() for place in (folder, Path(draft)))
        if ours != theirs:
            raise UserError(
                f"--draft={draft} has another vocabulary than the model ({len(theirs):,} tokens, and "
                f"{len(ours):,} in the model), so its tokens differ; name a smaller model of the same family"
            )
        target, helper = (_load(place, DTYPES[request.compute_dtype]) for place in (folder, Path(draft)))
    forwards: Counter[str] = Counter()
    for model, name, which in ((target, subject.label, "target"), (helper, draft, "draft")):
        room = model.config.get_text_config().max_position_embeddings - PROMPT_TOKENS
        if new_tokens > room:
            raise UserError(
                f"--max-new-tokens={new_tokens:,}: {name} has positions for {room:,} behind a prompt of "
                f"{PROMPT_TOKENS}; write --max-new-tokens {room} or less"
            )
        model.register_forward_hook(lambda *_, which=which: forwards.update([which]))
    runs: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[list[int]]] = {"alone": [], "with draft": []}
    for name, assistant in (("alone", None), ("with draft", helper)):
        _continue(target, assistant, prompts[0], new_tokens)  # The first call is slower.
        forwards.clear()
        began = time.perf_counter()
        for number, prompt in enumerate(prompts, start=1):
            answers[name].append(_continue(target, assistant, prompt, new_tokens))
            say(f"{name}: {number}/{len(prompts)} prompts")
        runs[name] = {
            "tokens": sum(map(len, answers[name])),
            "seconds": time.perf_counter() - began,
            "target_forwards": forwards["target"],
            "draft_forwards": forwards["draft"],
        }
    return {
        "draft": draft,
        "label": subject.label,
        "dtype": request.compute_dtype,
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
    prompt_tokens = [
        next((piece for piece in pieces(rows, row) if len(piece) > length), None) for row in range(len(rows))
    ]
    prompts = [torch.tensor([piece[:length]]) for piece in prompt_tokens if piece is not None]
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
