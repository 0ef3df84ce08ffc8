"""Define the request of `distlora eval`. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.config import DataConfig, UserError, require
from distlora.config.base import cache_root
from distlora.post.trained import Name, Quant, Trained, base_spec
from distlora.run_folder.layout import DATA_NAME, read_record

NAMES = {
    "data.path": "--text",
    "data.eval_path": "--text",
    "data.sequence_length": "--sequence-length",
    "model.path": "MODEL",
}
"""Arguments of the command by the setting that an error names."""
Dtype = Literal["bf16", "fp32"]
PROMPT_TOKENS, NEW_TOKENS = 32, 64
"""Tokens of each prompt that a draft continues, and of each answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model to evaluate: a trained one (`name`) or a folder (`model`)."""

    label: str
    """Label in the table."""
    kind: Literal["adapted", "base", "model", "merged", "form"]
    name: Name | None = None
    model: str | None = None
    """Folder in Hugging Face format."""
    quant: Quant = "none"
    """Quantization of a folder's weights."""
    rounded: Literal["bf16", "fp16"] | None = None
    """Dtype that unquantized weights are rounded to before evaluation."""
    dtype: Dtype | None = None
    """Compute dtype if it differs from the request's."""

    def read(self) -> Trained:
        """Return the model of the subject."""
        if self.name is not None:
            return self.name.read()
        assert self.model is not None
        return Trained(place=self.model, spec=base_spec(self.model, self.quant), weights=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The text: documents, or the held-out documents of a run."""

    name: str
    """Label in the table."""
    run: str | None = None
    """Run whose held-out rows are read."""
    path: str | None = None
    """Documents; anything that data.path takes."""
    sequence_length: int = 1024
    """Tokens per row; held-out rows have the run's."""
    template: str | None = None
    """Chat template in place of the tokenizer's."""
    cache_dir: str = dataclasses.field(default_factory=lambda: str(cache_root() / "data"))
    """Cache of tokenized rows."""
    most_rows: int = 128
    """Most rows; of more, as many are taken at even distances."""

    def __post_init__(self) -> None:
        require(self.most_rows > 0, f"--rows={self.most_rows} is not a valid number of rows; write 1 or more")
        require(
            self.sequence_length >= 2,
            f"--sequence-length={self.sequence_length} leaves no token to predict; write 2 or more",
        )

    def data(self) -> DataConfig:
        """Return the data settings that prepare all documents at `path`, none held out."""
        assert self.path is not None
        return DataConfig(
            path=self.path,
            eval_fraction=0.0,
            sequence_length=self.sequence_length,
            template=self.template,
            cache_dir=self.cache_dir,
        )


def held_out(trained: Trained, label: str, **settings: Any) -> Text:
    """Return the held-out text of a run. Raises UserError if no perplexity can be measured on it."""
    assert trained.run_dir is not None
    assert trained.data is not None
    require(
        trained.train.needs.data == "documents",
        f"{label} held out data of train.objective={trained.train.objective}, which has no perplexity; "
        "name a text with --text FILE",
    )
    require(
        "eval" in read_record(trained.run_dir / DATA_NAME).get("splits", {}),
        f"{label} held no documents out (data.eval_fraction=0); name a text with --text FILE",
    )
    length = trained.data.sequence_length
    return Text(
        name=f"the documents that {label} held out", run=str(trained.run_dir), sequence_length=length, **settings
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """The merge whose receipt gets the figures."""

    folder: str
    name: Name
    """The merged model's source."""
    compares: bool
    """True to measure the other storage forms too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Tasks of lm-evaluation-harness."""

    names: tuple[str, ...]
    folder: str | None = None
    """Folder of their YAML files; None for the harness's own tasks."""
    fewshot: int | None = None
    """Examples before each question; None for the task's own number."""
    limit: int | None = None
    """Most questions per task."""
    as_chat: bool = False
    """True to render questions with the chat template."""

    def __post_init__(self) -> None:
        require(all(self.names), f"--tasks={','.join(self.names)} has an empty name; write --tasks NAME,NAME")
        require(
            self.limit is None or self.limit > 0,
            f"--limit={self.limit} is not a valid number of questions; write 1 or more",
        )
        require(
            self.fewshot is None or self.fewshot >= 0,
            f"--fewshot={self.fewshot} is not a valid number of examples; write 0 or more",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A smaller model that drafts tokens for the evaluated one."""

    model: str
    """Its folder in Hugging Face format."""
    prompt_tokens: int = PROMPT_TOKENS
    """Tokens of each row that are the prompt."""
    new_tokens: int = NEW_TOKENS

    def __post_init__(self) -> None:
        require(
            self.new_tokens > 0, f"--max-new-tokens={self.new_tokens} is not a valid number of tokens; write 1 or more"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRequest:
    """The request of `distlora eval`. Folders are absolute, defaults filled in."""

    subjects: tuple[Subject, ...]
    """Models; the first is the one that others are compared with."""
    text: Text | None
    """Text to measure on; None for tasks."""
    dtype: Dtype
    """Compute dtype."""
    tasks: Tasks | None = None
    draft: Draft | None = None
    out: str | None = None
    """File for the figures as JSON."""
    as_json: bool = False
    """True to print JSON instead of the table."""
    merged: Merged | None = None

    def __post_init__(self) -> None:
        require(self.dtype in ("bf16", "fp32"), f"--dtype={self.dtype} is not known; write bf16 or fp32")


def check_out(out: str | None) -> None:
    """Raise UserError if `out` exists or its folder does not."""
    if out is None:
        return
    place = Path(out)
    require(not place.exists(), f"--out={out} exists already; name another file, or remove it")
    if not place.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {place.parent}; make it first")
