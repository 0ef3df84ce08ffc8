"""Measure speculative decoding: a smaller model drafts tokens that a merged model verifies.

It runs transformers' assisted generation (Leviathan et al. 2023, arXiv 2211.17192) with greedy decoding, so the answers
are those of greedy decoding with fewer forwards. The target is a merged, static model, because assisted generation
needs the logits of every drafted token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from distlora.architecture.tokens import load_tokenizer
from distlora.config import UserError
from distlora.data.rows import PackedRows
from distlora.post.evaluate.measure import pieces
from distlora.post.evaluate.request import Draft, EvaluateRequest, Subject
from distlora.post.merge.merge import merge_to
from distlora.post.merge.rounding_loss import DTYPES

Say = Callable[[str], None]


def run_draft(request: EvaluateRequest, draft: Draft, rows: PackedRows, say: Say) -> dict[str, Any]:
    """Return the figures of one target with one draft. Raises UserError for a draft of another vocabulary."""
    (subject,) = request.subjects
    dtype = DTYPES[request.dtype]
    prompts = prompts_of(rows, draft.prompt_tokens)
    with static_folder(subject, dtype, say) as folder:
        check_vocabulary(folder, Path(draft.model))
        target, helper = (load(place, dtype) for place in (folder, Path(draft.model)))
    for model, name in ((target, subject.label), (helper, draft.model)):
        room = model.config.get_text_config().max_position_embeddings - draft.prompt_tokens
        if draft.new_tokens > room:
            raise UserError(
                f"--max-new-tokens={draft.new_tokens:,}: {name} has positions for {room:,} behind a prompt of "
                f"{draft.prompt_tokens}; write --max-new-tokens {room} or less"
            )
    runs: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[list[int]]] = {}
    for name, assistant in (("alone", None), ("with draft", helper)):
        generate(target, assistant, prompts[0], draft.new_tokens)  # The first call is slower.
        runs[name], answers[name] = timed(target, assistant, helper, prompts, draft.new_tokens, name, say)
    equal = sum(a == b for a, b in zip(answers["alone"], answers["with draft"], strict=True))
    return {
        "draft": draft.model,
        "label": subject.label,
        "dtype": request.dtype,
        "prompts": len(prompts),
        "equal": equal,
        "parameters": {"target": target.num_parameters(), "draft": helper.num_parameters()},
        "threads": torch.get_num_threads(),
        "runs": runs,
    }


@contextmanager
def static_folder(subject: Subject, dtype: torch.dtype, say: Say) -> Iterator[Path]:
    """Yield the model's Hugging Face folder, merged temporarily if needed."""
    if subject.name is None:
        assert subject.model is not None
        yield Path(subject.model)
        return
    with tempfile.TemporaryDirectory(prefix="distlora-draft-") as scratch:
        folder = Path(scratch) / "merged"
        merge_to(subject.name.read(), folder, onto="trained", dtype=dtype, say=say)
        yield folder


def check_vocabulary(target: Path, draft: Path) -> None:
    """Raise UserError if the vocabularies differ, as drafted tokens must mean the same to both."""
    ours, theirs = (load_tokenizer(folder, ()).get_vocab() for folder in (target, draft))
    if ours != theirs:
        raise UserError(
            f"--draft={draft} has another vocabulary than the model ({len(theirs):,} tokens, and {len(ours):,} here), "
            "so its tokens mean something else; name a smaller model of the same family"
        )


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Load a model on the GPU if there is one; no token ends an answer, so all have the same length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    model.generation_config.eos_token_id = None  # No token ends an answer, so all have the same length.
    model.eval()
    return model.to(device)


def prompts_of(rows: PackedRows, length: int) -> list[Tensor]:
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


def generate(target: Any, assistant: Any | None, prompt: Tensor, new_tokens: int) -> list[int]:
    """Return the tokens of one prompt's greedy answer."""
    prompt = prompt.to(target.device)
    made = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=assistant,
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    tokens: list[int] = made[0, prompt.shape[1] :].tolist()
    return tokens


def timed(
    target: Any, assistant: Any | None, helper: Any, prompts: list[Tensor], new_tokens: int, name: str, say: Say
) -> tuple[dict[str, Any], list[list[int]]]:
    """Return (figures, answers) of all prompts, one after the other."""
    forwards = {"target": 0, "draft": 0}

    def count(which: str) -> Callable[..., None]:
        def counted(*_: Any) -> None:
            forwards[which] += 1

        return counted

    hooks = [m.register_forward_hook(count(which)) for which, m in (("target", target), ("draft", helper))]
    began, answers = time.perf_counter(), []
    try:
        for number, prompt in enumerate(prompts, start=1):
            answers.append(generate(target, assistant, prompt, new_tokens))
            say(f"{name}: {number}/{len(prompts)} prompts")
    finally:
        for hook in hooks:
            hook.remove()
    figures = {
        "tokens": sum(map(len, answers)),
        "seconds": time.perf_counter() - began,
        "target_forwards": forwards["target"],
        "draft_forwards": forwards["draft"],
    }
    return figures, answers
