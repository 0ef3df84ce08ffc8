"""What `distlora eval` is asked to do: the request that the command hands to its worker. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.config import Config, DataConfig, UserError, require
from distlora.config.places import cache_place
from distlora.post.trained import Name, base_alone
from distlora.run_folder.layout import DATA_NAME, read_record

NAMES = {
    "data.path": "--text",
    "data.eval_path": "--text",
    "data.sequence_length": "--sequence-length",
    "model.path": "MODEL",
}
"""Arguments of the command, by the settings that its errors name."""
Dtype = Literal["bf16", "fp32"]
PROMPT_TOKENS, NEW_TOKENS = 32, 64
"""Of each prompt that a draft helps to continue, and of each answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model that is evaluated: what `name` names, or the folder `model`."""

    label: str
    """What the table calls it."""
    kind: Literal["adapted", "base", "model", "merged", "form"]
    name: Name | None = None
    model: str | None = None
    """A folder in Hugging Face format."""
    quant: Literal["nf4", "none"] = "none"
    """And how its weights are held."""
    rounded: Literal["bf16", "fp16"] | None = None
    """What its weights are rounded to before anything is computed; they are not quantized then."""
    dtype: Dtype | None = None
    """What it computes in, where that is not the request's."""

    def found(self) -> tuple[Config, str | None, bool]:
        """(settings, weights, foreign), as `load_model` takes them."""
        if self.name is not None:
            trained = self.name.read()
            weights = None if trained.weights is None else str(trained.weights)
            return trained.config, weights, trained.foreign
        assert self.model is not None
        return base_alone(self.model, self.quant, run_dir=self.model), None, False


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What the models read: documents, or what a run held out of its own."""

    name: str
    """What the table calls it."""
    run: str | None = None
    """The run whose held-out rows it is."""
    path: str | None = None
    """Anything that data.path takes."""
    sequence_length: int = 1024
    """Tokens in a row; of held-out rows the run says it."""
    template: str | None = None
    """Of chats: in place of the tokenizer's own."""
    cache_dir: str = dataclasses.field(default_factory=lambda: str(Path(cache_place("data")).expanduser().absolute()))
    """Where tokenized rows are kept."""
    most_rows: int = 128
    """Of more, as many are taken at even distances."""

    def __post_init__(self) -> None:
        require(self.most_rows > 0, f"--rows={self.most_rows} is no number of rows; write 1 or more")
        require(
            self.sequence_length >= 2,
            f"--sequence-length={self.sequence_length} leaves no token to predict; write 2 or more",
        )

    def data(self) -> DataConfig:
        """What prepares the documents at `path`: all of them, none held out."""
        assert self.path is not None
        return DataConfig(
            path=self.path,
            eval_fraction=0.0,
            sequence_length=self.sequence_length,
            template=self.template,
            cache_dir=self.cache_dir,
        )


def held_out(run_dir: Path, config: Config, label: str, **settings: Any) -> Text:
    """What a run held out. Raises UserError where that is nothing that a perplexity can be measured on."""
    require(
        config.train.objective == "sft",
        f"{label} held out pairs of answers (train.objective={config.train.objective}), which have no perplexity; name "
        "a text with --text FILE",
    )
    require(
        "eval" in read_record(run_dir / DATA_NAME).get("splits", {}),
        f"{label} held no documents out (data.eval_fraction=0); name a text with --text FILE",
    )
    length = config.data.sequence_length
    return Text(name=f"the documents that {label} held out", run=str(run_dir), sequence_length=length, **settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """The merge whose receipt gets the figures."""

    folder: str
    name: Name
    """What it was made of."""
    compares: bool
    """Whether the other forms that it could have been stored in are measured too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Tasks of lm-evaluation-harness."""

    names: tuple[str, ...]
    folder: str | None = None
    """Where YAML files describe them; None: the harness's own."""
    fewshot: int | None = None
    """Examples before each question; None: as the task says."""
    limit: int | None = None
    """Most questions of a task."""
    as_chat: bool = False
    """Whether questions go through the chat template."""

    def __post_init__(self) -> None:
        require(all(self.names), f"--tasks={','.join(self.names)} has an empty name; write --tasks NAME,NAME")
        require(
            self.limit is None or self.limit > 0, f"--limit={self.limit} is no number of questions; write 1 or more"
        )
        require(
            self.fewshot is None or self.fewshot >= 0,
            f"--fewshot={self.fewshot} is no number of examples; write 0 or more",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A smaller model that proposes what the evaluated one then checks."""

    model: str
    """Its folder, in Hugging Face format."""
    prompt_tokens: int = PROMPT_TOKENS
    """Of each row of the text, what is continued."""
    new_tokens: int = NEW_TOKENS

    def __post_init__(self) -> None:
        require(self.new_tokens > 0, f"--max-new-tokens={self.new_tokens} is no number of tokens; write 1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRequest:
    """One evaluation. Everything is resolved: folders are absolute, defaults filled in."""

    subjects: tuple[Subject, ...]
    """The first is what the others are compared with."""
    text: Text | None
    """None: tasks alone."""
    dtype: Dtype
    """What they compute in."""
    tasks: Tasks | None = None
    draft: Draft | None = None
    out: str | None = None
    """A file for the figures as JSON."""
    as_json: bool = False
    """Whether stdout gets the JSON in place of the table."""
    merged: Merged | None = None

    def __post_init__(self) -> None:
        require(self.dtype in ("bf16", "fp32"), f"--dtype={self.dtype} is not known; write bf16 or fp32")


def check_out(out: str | None) -> None:
    """Refuse a file that is there, and a place where none can be."""
    if out is None:
        return
    place = Path(out)
    require(not place.exists(), f"--out={out} exists already; name another file, or remove it")
    if not place.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {place.parent}; make it first")
