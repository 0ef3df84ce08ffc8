"""The data: where documents come from, what in them is trained, how they fill rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from distlora.config.base import cache_root
from distlora.config.errors import require, require_choices
from distlora.config.rewards import check_rewards

DATA_FORMATS = ("auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "prompt_only", "steps")

Format = Literal[
    "auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "prompt_only", "steps"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingConfig:
    """The place of documents and how to read them."""

    path: str | None = None
    """The one source of documents: a file, a folder, or a data set's name on the hub. `sources` mixes several."""
    name: str | None = None
    """Configuration (subset) of a hub data set that has several."""
    split: str = "train"
    """Split of a hub data set. Datasets' slices work: train[:10%]. A file or folder has one split, train."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; null: its main branch."""
    format: Format = "auto"
    """Format of a document: chat {"messages"}, sharegpt {"conversations"}, alpaca {"instruction", "input", "output"},
    prompt_completion {"prompt", "completion"}, text {"text"}, preference {"prompt", "chosen", "rejected"} or
    prompt_only {"prompt"} with columns for rewards; `auto` reads it off the keys of the first one."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Other names for a format's keys: {prompt: question, completion: answer}."""
    ignore_columns: tuple[str, ...] = ()
    """Keys of a record, or of its messages, that are not read: [label, images]. Records with a key that means other
    training than data.format are refused otherwise."""
    reasoning_key: str | None = None
    """Key of a message that holds the assistant's reasoning, beside reasoning_content and thinking, which are read
    anyway."""
    sample_by: Literal["auto", "line", "paragraph", "document"] = "auto"
    """Unit of a document in a plain text file. `auto`: a paragraph where the file has blank lines, else a line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(ReadingConfig):
    """A source of documents."""

    path: str
    """A file (jsonl, json, parquet, csv, tsv, txt; compressed ones too), a folder of such files, or the name of a data
    set on the Hugging Face hub (org/name)."""
    weight: float | None = None
    """Share of the trained tokens in a mixture, relative to the other sources' weights; null in all: everything once.
    """

    def __post_init__(self) -> None:
        require_choices("data", self)
        require(
            self.weight is None or 0 < self.weight < math.inf,
            f"data.sources: weight={self.weight} of {self.path} is not a valid weight; set it above 0, or remove the "
            "source",
        )


def _written(value: Any) -> str:
    return "null" if value is None else str(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(ReadingConfig):
    """The documents to train on and how they become packed sequences."""

    sources: tuple[SourceConfig, ...] = ()
    """A mixture instead of `path`: [{path: a.json, weight: 0.7}, {path: b.txt, weight: 0.3}]. Weights are shares of the
    trained tokens; without any, every source is taken whole."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """End of an epoch of a weighted mixture, as in datasets.interleave_datasets: it ends when the first source is
    used up (no document twice), or when the last one is (the others are repeated)."""
    streaming: bool = False
    """Read only as many documents as train.max_steps needs, without downloading the rest of a hub data set."""
    template: str | None = None
    """Chat template: null is the tokenizer's own; a name (chatml, llama3, ...) or a .jinja file replaces it."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Trained tokens of a chat: every assistant turn, the last one, or all tokens."""
    step_separator: str = "\n"
    """Text behind each step of an answer (data.format=steps), at whose last token the step is judged."""
    eot_tokens: tuple[str, ...] = ()
    """Tokens that the template writes at the end of a turn, beside its special tokens: [<|eot|>]. They are trained with
    the assistant's turns, and generation stops at them."""
    deduplicate: bool = False
    """Drop training documents whose tokens equal those of an earlier or a held-out document."""
    sequence_length: int = 1024
    """Tokens per packed sequence; documents are packed into sequences. Activation memory grows linearly with it,
    attention quadratically.
    """
    too_long: Literal["auto", "truncate", "drop", "split"] = "auto"
    """Handling of a document longer than a sequence: cut off, left out, or continued as another document. `auto` splits
    plain text and truncates the rest. The numbers are reported."""
    eval_fraction: float = 0.05
    """Share of the documents that is held out, chosen by a hash of (seed, index); 0 with no eval_path: no evaluation.
    """
    eval_path: str | None = None
    """Held-out documents instead of a fraction: a file, a folder or a hub data set, read as `path` is."""
    eval_split: str | None = None
    """Split of the hub data set at eval_path, or at `path`, that is held out instead of a fraction."""
    cache_dir: str = field(default_factory=lambda: str(cache_root() / "data"))
    """Folder of tokenized rows, content-addressed: a second run with the same data does not tokenize again."""
    rewards: tuple[str, ...] = ()
    """Functions that score sampled answers (docs/rl.md): exact_match, regex, math, json_schema, unit_tests, or a
    function of yours with TRL's signature as module.function."""
    reward_folder: str | None = None
    """Folder with the modules of your functions, searched before the installed packages; null: the working folder.
    RUN/config.yaml holds its absolute path."""
    reward_digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the source file of each of these modules: a run goes on with the same functions, or not at all. The
    launcher fills it in."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in an answer's total; empty: 1 for all."""
    reward_columns: Mapping[str, str] = field(default_factory=dict)
    """Other names for columns that built-in rewards read: {answer: solution}."""
    reward_constants: Mapping[str, str] = field(default_factory=dict)
    """Columns of records that lack them, with the same text for all: {pattern: "^[0-9]+$"}."""
    reward_timeout: float = 10.0
    """Seconds that a reward of one answer may take; the process of a slower one is killed, and the answer is left
    out."""
    reward_processes: int = 2
    """Processes per rank that compute rewards."""
    reward_memory_gb: float = 8.0
    """Private memory of each of these processes, in GB; a reward that needs more fails for the answer."""
    rewards_execute_code: bool = False
    """Permission to run code that the model writes, for the reward unit_tests (docs/rl.md says within which limits).
    """
    rewards_isolation: Literal["namespaces", "limits"] = "namespaces"
    """Isolation of code that the model writes. `namespaces`: without network, other files and other processes, by
    Linux namespaces; `limits`: resource limits alone, for containers that forbid namespaces and isolate by themselves.
    """

    def __post_init__(self) -> None:
        require_choices("data", self)
        require(
            self.sequence_length >= 2,
            f"{{data.sequence_length}}={self.sequence_length} leaves no token to predict; set it to 2 or more",
        )
        require(
            0 <= self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction} is not a fraction of the documents; set it from 0 to below 1",
        )
        require(
            (self.path is None) != (not self.sources),
            "data.path and data.sources exclude each other; set one of them"
            if self.sources
            else "data.path is not set; add data.path=FILE (or a folder, or a hub data set), or data.sources=[...]",
        )
        require(
            not (self.deduplicate and self.streaming),
            "data.deduplicate=true compares all documents, and data.streaming=true reads only some of them; set one of "
            "them to false",
        )
        check_rewards(self)
        self._check_without_effect()
        weighted = [source.weight is not None for source in self.sources]
        require(
            all(weighted) or not any(weighted),
            "data.sources: some have a weight and some have none; give all of them a weight, or none",
        )
        require(
            any(weighted) or self.stopping_strategy == "first_exhausted",
            f"data.stopping_strategy={self.stopping_strategy} needs weights in data.sources; add them, or leave it out",
        )
        require(
            self.eval_split is None or self.eval_path is not None or not self.sources,
            "data.eval_split belongs to one data set, and data.sources names several; set data.eval_path too",
        )

    def _check_without_effect(self) -> None:
        """Refuse settings of a single source beside data.sources; a held-out source may use some of them."""
        if not self.sources:
            return
        for name in (item.name for item in fields(ReadingConfig) if item.name != "path"):
            value, default = getattr(self, name), getattr(ReadingConfig(), name)
            require(
                value == default or (self.eval_path is not None and name not in ("split", "revision")),
                f"data.{name}={value} has no effect beside data.sources; it belongs into each entry of data.sources "
                f"(leave it out, or set data.{name}={_written(default)} where a recipe sets it)",
            )

    @property
    def formats(self) -> tuple[Format, ...]:
        """Every format that is set: of `path` and eval_path, and of the mixture's sources."""
        return (self.format, *(source.format for source in self.sources))

    @property
    def training_sources(self) -> tuple[SourceConfig, ...]:
        """Return the training sources: the mixture, or `path` alone."""
        return self.sources or (self._source(self.path, self.split),)

    @property
    def held_out_source(self) -> SourceConfig | None:
        """Return the held-out source; None for a fraction of the training documents."""
        if self.eval_path is None and self.eval_split is None:
            return None
        return self._source(self.eval_path or self.path, self.eval_split or "train")

    def _source(self, path: str | None, split: str) -> SourceConfig:
        assert path is not None
        settings = {item.name: getattr(self, item.name) for item in fields(ReadingConfig)} | {"split": split}
        if path != self.path:
            settings |= {"name": self.name if self.path is None else None, "revision": None}
        return SourceConfig(**settings | {"path": path})
