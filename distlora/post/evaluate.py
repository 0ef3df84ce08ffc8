"""Define the request of `distlora eval`. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.config import DataConfig, UserError, require
from distlora.config.base import cache_root
from distlora.post.trained import Name, Quant, Trained, base_spec
from distlora.results.record import Table
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
    images: bool = False
    """True if the rows hold images."""

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
    return Text(
        name=f"the documents that {label} held out",
        run=str(trained.run_dir),
        sequence_length=trained.data.sequence_length,
        images=trained.data.images,
        **settings,
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
class EvaluateRequest:
    """Compare models on the same text: loss, perplexity, and differences from the first model.

    Each difference has a standard error; the KL divergence of the predictions is printed too. The base of each run is
    added. --checkpoint, --adapter and --quant apply to every RUN, --model to every adapter without a run.

    example: distlora eval runs/first runs/second --text held_out.jsonl
    """

    places: list[str]
    """RUN|MODEL: folder of a run, an adapter in PEFT format with --model, or a model in Hugging Face format (a folder
    or a name on the hub)."""
    checkpoint: str | None = None
    """NAME: checkpoint of the runs: step_100, or best (lowest held-out loss). Default: the result."""
    adapter: str | None = None
    """PATH|base: another LoRA adapter for the run's base, or the base alone (base)."""
    model: str | None = None
    """BASE: base model of an adapter without a run: a folder or a name on the hub."""
    quant: Quant | None = None
    """Precision: load a model in NF4, in the low bits that it ships (keep) or in 16 bits; for an adapter without a run,
    its base during training (default: nf4)."""
    text: str | None = None
    """FILE: documents in any format of data.path (default: the held-out data of the first RUN; for chats, the
    answers)."""
    rows: int | None = None
    """N: maximum number of sequences, evenly spaced (default: 128)."""
    sequence_length: int | None = None
    """N: tokens per sequence of --text (default: as in the run; without a run 1,024, or the context length if
    shorter)."""
    dtype: Dtype | None = None
    """Compute dtype (default: that of the first run; without a run bf16 on a GPU, fp32 on a CPU)."""
    no_base: bool = False
    """Leave out the bases of the runs."""
    processes: int = 1
    """N: shard each model over N processes, one per GPU."""
    json: bool = False
    """Print JSON instead of the table."""
    out: str | None = None
    """FILE: write the figures as JSON to this new file."""
    tasks: tuple[str, ...] = ()
    """NAME,NAME: evaluate on tasks of lm-evaluation-harness instead of a text, and compare with the first model per
    question."""
    tasks_folder: str | None = None
    """DIR: folder of the tasks' YAML files (default: the harness's own); Python code that they name is executed."""
    fewshot: int | None = None
    """N: few-shot examples before each question (default: the task's own)."""
    limit: int | None = None
    """N: use only the first N questions of each task."""
    chat: bool = False
    """Apply the chat template to the questions of --tasks."""
    draft: str | None = None
    """MODEL: measure speculative decoding with this smaller draft model of the same vocabulary, beside greedy decoding:
    the merged RUN continues the first 64 tokens of --rows sequences (default: 8)."""
    max_new_tokens: int | None = None
    """N: tokens per answer with --draft (default: 64)."""

    # Found by the launcher, which resolves those above; a field with a docstring would be an argument.
    # Models; the first is the one that others are compared with.
    subjects: tuple[Subject, ...] = ()
    # Text to measure on; None for tasks.
    source: Text | None = None
    merged: Merged | None = None

    def __post_init__(self) -> None:
        for flag, least, what in (
            ("limit", 1, "questions"),
            ("fewshot", 0, "examples"),
            ("max_new_tokens", 1, "tokens"),
        ):
            value = getattr(self, flag)
            require(
                value is None or value >= least,
                f"--{flag.replace('_', '-')}={value} is not a valid number of {what}; write {least} or more",
            )

    @property
    def compute_dtype(self) -> Dtype:
        """Return the dtype, which the launcher has resolved."""
        assert self.dtype is not None
        return self.dtype


def check_out(out: str | None) -> None:
    """Raise UserError if `out` exists or its folder does not."""
    if out is None:
        return
    place = Path(out)
    require(not place.exists(), f"--out={out} exists already; name another file, or remove it")
    if not place.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {place.parent}; make it first")


def table_of(figures: Mapping[str, Any]) -> Table:
    """Return the table of the figures."""
    if "harness" in figures:
        return tasks_table(figures)
    return draft_table(figures) if "draft" in figures else measured_table(figures)


def tasks_table(figures: Mapping[str, Any]) -> Table:
    """Return one line per task and metric and one column per model.

    Paired differences to the first model are in brackets.
    """
    models = figures["models"]
    columns = {"task, metric": "", "questions": ","} | {model["label"]: "" for model in models}
    rows = []
    for task, metrics in models[0]["tasks"].items():
        for metric in metrics:
            cells = [_of_metric(model["tasks"][task][metric]) for model in models]
            rows.append([f"{task}, {metric}", figures["questions"][task], *cells])
    return Table(
        f"lm-evaluation-harness {figures['harness']}, computed in {figures['dtype']}: value +- standard error"
        + (f" (difference to {figures['compared_with']} +- that of the paired difference)" if len(models) > 1 else ""),
        columns,
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
    columns = {"": "", "tokens": ",", "seconds": ".2f", "tokens/s": ",.1f", "forwards of the target": ","}
    columns |= {"tokens a forward": ".2f", "of the draft": ","}
    rows = []
    for name in ("alone", "with draft"):
        of = figures["runs"][name]
        tokens, forwards = of["tokens"], of["target_forwards"]
        rate = tokens / of["seconds"]
        rows.append([name, tokens, of["seconds"], rate, forwards, tokens / forwards, of["draft_forwards"]])
    prompts = figures["prompts"]
    same = figures["equal"]
    return Table(
        f"{figures['label']} with the draft {figures['draft']}, {prompts} prompts, computed in {figures['dtype']}: "
        f"{same} of {prompts} answers are those of greedy decoding, token for token",
        columns,
        rows,
    )


def measured_table(figures: Mapping[str, Any]) -> Table:
    """Return a table with one line per model; differences are to the first."""
    columns = {"": "", "loss": ".4f", "perplexity": ",.3f", "difference": ""}
    columns |= {"std. error": ".1g", "KL, nats": ".2g", "max |logit diff.|": ".2g", "other top token": ".2%"}
    keys = ("loss_standard_error", "divergence", "largest_logit_difference", "changed_tokens")
    rows = []
    for model in figures["models"]:
        is_first = model["label"] == figures["compared_with"]
        cells = [""] * 5 if is_first else [signed(model["loss_difference"]), *(model[key] for key in keys)]
        rows.append([model["label"], model["loss"], model["perplexity"], *cells])
    text = figures["text"]
    of = "" if text["rows"] == text["rows_in_all"] else f" of {text['rows_in_all']:,}"
    heading = (
        f"{text['targets']:,} tokens in {text['rows']:,}{of} rows of {text['name']}, computed in {figures['dtype']}; "
        f"differences of the loss, nats per token, to {figures['compared_with']}"
    )
    return Table(heading, columns, rows)


def signed(value: float | None) -> str:
    """Format a difference of losses: four decimals, or the first digits of a small one."""
    if value is None:
        return "-"
    return f"{value:+.4f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1e}"
