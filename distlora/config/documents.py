"""The data: where documents come from, what in them is trained, how they fill rows."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from distlora.config.base import cache_root
from distlora.config.errors import Refusals, default_of, nearest, positive, require_choices, twice

DATA_FORMATS = ("auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "prompt_only", "steps")

Format = Literal[
    "auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "prompt_only", "steps"
]


BUILT_IN = {"exact_match": "answer", "regex": "pattern", "math": "answer", "json_schema": "schema"} | {
    "unit_tests": "tests"
}
"""Built-in rewards, and the column of a record that each reads."""
_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)+"
"""Pattern of a name in a module."""


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
    images: bool = False
    """Read the images of chats, for a model that takes images. Records with images are refused otherwise. Needs
    pillow and torchvision."""
    image_max_pixels: int = 0
    """Most pixels of an image: a larger one is resized before the model's image processor sees it; 0: no bound but the
    processor's own."""
    image_min_pixels: int = 0
    """Fewest pixels of an image: a smaller one is enlarged, as above; 0: no bound."""
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
    """Functions that score sampled answers (docs/rl.md): exact_match, regex, math, json_schema, unit_tests, a function
    of yours with TRL's signature as module.function, or a name in reward_models."""
    reward_models: Mapping[str, str] = field(default_factory=dict)
    """Reward models by the name that `rewards` gives them: {quality: runs/reward}. The folder of a run with
    train.objective=reward or of its adapter, which scores on this run's base, or of a sequence classifier of
    transformers with one output."""
    reward_folder: str | None = None
    """Folder with the modules of your functions, searched before the installed packages; null: the working folder.
    RUN/config.yaml holds its absolute path."""
    reward_digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the source file of each of these modules, and of each reward model's weights: a run goes on with the
    same rewards, or not at all. The launcher fills it in."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each reward in an answer's total; empty: 1 for all."""
    reward_columns: Mapping[str, str] = field(default_factory=dict)
    """Other names for columns that built-in rewards read: {answer: solution}."""
    reward_constants: Mapping[str, str] = field(default_factory=dict)
    """Columns of records that lack them, with the same text for all: {pattern: "^[0-9]+$"}."""
    environment: str | None = None
    """Class of yours, as module.Class, that each sampled answer is a dialogue with (docs/rl.md). null: an answer is one
    message."""
    tools: tuple[str, ...] = ()
    """Functions of yours, as module.function, that the model may call in its answers in the form of the chat template
    (docs/rl.md)."""
    tool_schemas: str = ""
    """Definitions of `tools` for the chat template, as JSON. The launcher fills it in."""
    reward_timeout: float = 10.0
    """Seconds that a reward of one answer, the environment's part in a dialogue, or a call of a tool may take. The
    process of a slower one is killed. The answer is left out; of a tool, the model reads the error."""
    reward_processes: int = 2
    """Processes per rank that compute rewards."""
    reward_memory_gb: float = 8.0
    """Private memory of each of these processes, in GB; a reward that needs more fails for the answer. Also the most
    that the weights of a classifier in reward_models may take on each rank."""
    rewards_execute_code: bool = False
    """Permission to run code that the model writes, for the reward unit_tests (docs/rl.md says within which limits).
    """
    rewards_isolation: Literal["namespaces", "limits"] = "namespaces"
    """Isolation of code that the model writes. `namespaces`: without network, other files and other processes, by
    Linux namespaces; `limits`: resource limits alone, for containers that forbid namespaces and isolate by themselves.
    """

    @property
    def reward_functions(self) -> tuple[str, ...]:
        """Names in `rewards` that the processes of rewards compute: built-in ones and functions of the user."""
        return tuple(name for name in self.rewards if name not in self.reward_models)

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the user's own functions, which the processes of rewards run."""
        own = (name for name in self.reward_functions if name not in BUILT_IN)
        return (*own, *filter(None, [self.environment]), *self.tools)

    @property
    def has_dialogues(self) -> bool:
        """True if a sampled answer may have several turns."""
        return self.environment is not None or bool(self.tools)

    def typed_function(self, name: str) -> str:
        """Return the setting that names a function, as it is typed."""
        if name in self.tools:
            return f"data.tools=[{name}]"
        return f"data.environment={name}" if name == self.environment else f"data.rewards=[{name}]"

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


def refused_in_source(source: SourceConfig) -> Refusals:
    """Check a source of a mixture."""
    if source.weight is not None and not 0 < source.weight < math.inf:
        what = f"data.sources: weight={source.weight} of {source.path} is not a valid weight"
        yield f"{what}; set it above 0, or remove the source"


def refused_in_data(data: DataConfig) -> Refusals:
    """Check where documents come from and how they are read."""
    for source in data.sources:
        require_choices("data", source)
        yield from refused_in_source(source)
    if data.sequence_length < 2:
        yield "sequence_length= leaves no token to predict; set it to 2 or more"
    if not 0 <= data.eval_fraction < 1:
        yield "eval_fraction= is not a fraction of the documents; set it from 0 to below 1"
    if data.path is not None and data.sources:
        yield "data.path and data.sources exclude each other; set one of them"
    if data.path is None and not data.sources:
        places = "data.path=FILE (or a folder, or a hub data set), or data.sources=[...]"
        yield f"data.path is not set; add {places}"
    if data.deduplicate and data.streaming:
        why = "compares all documents, and data.streaming=true reads only some of them"
        yield f"data.deduplicate=true {why}; set one of them to false"
    yield from _images(data)
    yield from _rewards(data)
    for item in fields(ReadingConfig) if data.sources else ():
        value, used = getattr(data, item.name), data.eval_path is not None and item.name not in ("split", "revision")
        default = default_of(item)
        if item.name != "path" and value != default and not used:  # A held-out source may use some of them.
            yield (
                f"{item.name}= has no effect beside data.sources; it belongs into each entry of data.sources (leave it "
                f"out, or set {{field}}={'null' if default is None else default} where a recipe sets it)"
            )
    weighted = [source.weight is not None for source in data.sources]
    if any(weighted) and not all(weighted):
        yield "data.sources: some have a weight and some have none; give all of them a weight, or none"
    if not any(weighted) and data.stopping_strategy != "first_exhausted":
        yield "stopping_strategy= needs weights in data.sources; add them, or leave it out"
    if data.eval_split is not None and data.eval_path is None and data.sources:
        yield "data.eval_split belongs to one data set, and data.sources names several; set data.eval_path too"


def _images(data: DataConfig) -> Refusals:
    """Check `data.images` and the bounds of images."""
    most, fewest = data.image_max_pixels, data.image_min_pixels
    for name in ("image_max_pixels", "image_min_pixels"):
        if not data.images and getattr(data, name) != 0:
            yield f"{name}= has no effect without data.images=true; leave it out"
        if getattr(data, name) < 0:
            yield f"{name}= is not a number of pixels; set it to 1 or more, or to 0 for the processor's own bound"
    if 0 < most < fewest:
        yield f"data.image_min_pixels={fewest} is above data.image_max_pixels={most}; set it to {most} or less"
    if data.images and data.too_long == "split":
        yield "data.too_long=split cuts documents into parts, and images belong to whole ones; set data.too_long=auto"


def _rewards(data: DataConfig) -> Refusals:
    """Check `data.rewards` and `data.reward_*`, which online reinforcement learning reads."""
    yield from positive(data, "reward_timeout reward_processes reward_memory_gb")
    of_processes = ("reward_timeout", "reward_processes", "reward_memory_gb")
    for item in fields(data):
        needed = bool(data.rewards) or (item.name in of_processes and bool(data.functions))
        if item.name in ("reward_folder", "reward_digests"):
            needed = bool(data.functions or (item.name == "reward_digests" and data.reward_models))
        if item.name.startswith("reward") and not needed and getattr(data, item.name) != default_of(item):
            own = "a function of yours in " * bool(data.rewards)
            yield f"{item.name}= has no effect without {own}data.rewards; leave it out"
    if data.environment is not None and re.fullmatch(_DOTTED, data.environment) is None:
        yield "environment= is not the name of a class of yours; write it as module.Class"
    yield from _tools(data)
    for name in data.reward_models:
        if name in BUILT_IN or re.fullmatch(r"[^\W\d]\w*", name) is None:
            why = "a built-in reward" if name in BUILT_IN else "not a valid name"
            cure = "choose a name of letters, digits and _ that no built-in reward has"
            yield f"data.reward_models={{{name}: ...}}: {name} is {why}; {cure}"
        elif name not in data.rewards:
            yield f"data.reward_models={{{name}: ...}} has no effect without {name} in data.rewards; add it there"
    for name in data.reward_functions:
        if name not in BUILT_IN and re.fullmatch(_DOTTED, name) is None:
            yield (
                f"data.rewards=[{name}] is neither a built-in reward ({', '.join(BUILT_IN)}) nor a function's "
                f"name{nearest(name, BUILT_IN)}; write a function of yours as module.function, or set "
                f"data.reward_models={{{name}: FOLDER}} for a reward model"
            )
    if (name := twice(data.rewards)) is not None:
        yield f"data.rewards names {name} twice; leave one of them out"
    weights = data.reward_weights
    if len(weights) not in (0, len(data.rewards)):
        what = f"data.reward_weights has {len(weights)} numbers, and data.rewards {len(data.rewards)} names"
        yield f"{what}; set one weight per reward, or none"
    if weights and not any(weights):
        yield "reward_weights= gives each answer a total of 0, so nothing is trained; set another number for one"
    if (weight := next((weight for weight in weights if not math.isfinite(weight)), None)) is not None:
        yield f"data.reward_weights: {weight} is not a valid weight; set a finite number"
    columns = {BUILT_IN[name] for name in data.rewards if name in BUILT_IN}
    for column in data.reward_columns:
        if column not in columns:
            yield (
                f"data.reward_columns={{{column}: ...}} renames a column that no built-in reward of data.rewards reads "
                f"({', '.join(sorted(columns)) or 'there is none'}){nearest(column, columns)}; leave it out"
            )
    runs_code = "unit_tests" in data.rewards
    if runs_code and not data.rewards_execute_code:
        yield (
            "data.rewards=[unit_tests] runs code that the model writes, and data.rewards_execute_code=false; read "
            "what docs/rl.md says of its limits, then add data.rewards_execute_code=true"
        )
    for setting, default in (("rewards_execute_code", False), ("rewards_isolation", "namespaces")):
        if not runs_code and getattr(data, setting) != default:
            yield f"{setting}= has no effect without data.rewards=[unit_tests]; leave it out"


def _tools(data: DataConfig) -> Refusals:
    """Check `data.tools`."""
    if data.tools and data.environment is not None:
        yield f"data.tools and data.environment={data.environment} exclude each other; set one of them"
    for name in data.tools:
        if re.fullmatch(_DOTTED, name) is None:
            yield f"data.tools=[{name}] is not the name of a function of yours; write it as module.function"
    if (short := twice([name.rpartition(".")[2] for name in data.tools])) is not None:
        yield f"data.tools has two functions named {short}, which the model could not tell apart; rename one of them"
    if data.tool_schemas and not data.tools:
        yield "tool_schemas= has no effect without data.tools; leave it out"
