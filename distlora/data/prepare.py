"""The one process that tokenizes: a run's documents to a cache entry, before any worker starts.

The launcher starts it: `python -m distlora.data.prepare RUN`.
"""

import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.architecture.tokens import load_tokenizer, new_token_ids, tokenize_alone
from distlora.config import DataConfig, ModelConfig, TrainConfig, UserError, require
from distlora.config.file import load_config
from distlora.config.objectives import OBJECTIVES
from distlora.data.chat_template import template_choice, template_source
from distlora.data.encoding import Encoder
from distlora.data.formats import MASK_KEYS, Document
from distlora.data.images import PROCESSOR_FILES, ImageProcessor, ImageText, image_settings
from distlora.data.packing import DROPPED, DUPLICATE, TRUNCATED, Corpus, Mixture, count_sources, write_split
from distlora.data.rows import (
    FORMAT_VERSION,
    HELD_OUT,
    IMAGE_COLUMNS,
    PIXELS_NAME,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    PackedRows,
    below,
    cache_key,
    content_digest,
    hash64,
    new_entry,
    read_meta,
)
from distlora.data.sources import DataSource, find_sources, pinned_commits
from distlora.run_folder.layout import DATA_NAME
from distlora.system.atomic_io import sha256, write_json
from distlora.system.exit_codes import DONE, run_to_exit_code

_BATCH_DOCUMENTS, _BATCH_BYTES = 1024, 2_000_000
"""Bounds of a batch for the tokenizer: enough for all its threads, small enough to bound memory."""
_STREAM_DOCUMENTS, _STREAM_BYTES = 32, 250_000
"""The same where documents are read until there are enough: what is read beyond that is waste."""
PATIENCE = 10_000
"""Documents without a token to train after which a bounded reading gives a source up: it would read to its end."""
_PROGRESS_SECONDS = 3.0

Sources = dict[str, list[DataSource]]
"""The sources of each split that has its own: train, and eval where held-out documents are named."""


def prepare(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    sources: Sources | None = None,
    *,
    earlier_date: str | None = None,
) -> Path:
    """Return the folder of the cache entry of a run's data, made if it does not exist.

    If the chat template writes the date, the entry is valid for a day: today, or `earlier_date`, when the run was first
    prepared, while that entry exists. Progress goes to stderr. Raises UserError for a source that cannot be found, a
    broken record, a tokenizer that cannot do the format, a split without a trained token, and settings of chats where
    no source holds any.
    """
    model_dir = Path(model.path).expanduser()
    if not model_dir.is_dir():
        cure = "set {model.path} to a local Hugging Face model"
        raise UserError(f"{{model.path}}={model.path} is not a folder; {cure}")
    sources = sources or find_sources(data)
    settings, fingerprints = _settings(model, data, train, sources)
    cache_dir = Path(data.cache_dir).expanduser().absolute()
    files = (*TOKENIZER_FILES, *PROCESSOR_FILES) if data.images else TOKENIZER_FILES
    if "train_on" in settings and _writes_date(data, model_dir):
        today = settings | {"date": time.strftime("%Y-%m-%d")}
        earlier = settings | {"date": earlier_date}
        is_there = (cache_dir / cache_key(fingerprints, model_dir, earlier, files)).is_dir()
        settings = earlier if earlier_date is not None and is_there else today
    entry = cache_dir / cache_key(fingerprints, model_dir, settings, files)
    if not entry.is_dir():
        with new_entry(cache_dir, entry.name) as folder:
            _build(folder, model, data, train, sources, settings)
            for source in itertools.chain(*sources.values()):
                source.check_unchanged()
    for split in read_meta(entry)["splits"]:
        PackedRows.open(entry, split)  # A damaged entry is named here, not by every worker.
    return entry


def prepare_run(run_dir: str | Path) -> dict[str, Any]:
    """Prepare the data of RUN/config.yaml and write RUN/data.json.

    It holds {"cache": folder, "reused": bool, "preparation": `Config.preparation`, ...meta.json}. A run that
    was prepared before reads its hub data sets at the same commits again, whatever was pushed since. Returns
    what it wrote. Raises UserError as `prepare` does, and for a folder without a run.
    """
    run_dir = Path(run_dir)
    config = load_config(run_dir)
    started = time.time()
    sources = find_sources(config.data, pinned_commits(run_dir))
    entry = prepare(config.model, config.prepared_data, config.train, sources, earlier_date=_earlier_date(run_dir))
    meta = read_meta(entry)
    record = {"cache": str(entry), "reused": meta["created"] < started, "preparation": config.preparation, **meta}
    for split, counts in record["splits"].items():
        # The entry may have been made from files that lay elsewhere.
        for counted, source in zip(counts["sources"], sources.get(split, sources["train"]), strict=True):
            counted |= source.describe()
    write_json(run_dir / DATA_NAME, record)
    return record


def _settings(
    model: ModelConfig, data: DataConfig, train: TrainConfig, sources: Sources
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings that decide the packed sequences, and the fingerprints of the sources."""
    form = train.needs.data
    fingerprints = [source.fingerprint(form) for of_split in sources.values() for source in of_split]
    holds_out = "eval" not in sources and data.eval_fraction > 0
    weights = [source.config.weight for source in sources["train"] if source.config.weight is not None]
    config = Path(model.path).expanduser() / "config.json"
    documents = architecture_of(read_config(config.parent), config).documents if config.is_file() else None
    settings: dict[str, Any] = {
        "sequence_length": data.sequence_length,
        "too_long": data.too_long,
        "num_training_sources": len(sources["train"]),
        "new_tokens": list(model.new_tokens),
        "special_tokens": dict(model.special_tokens),
        "documents": "single" if documents == "single" else None,
        "deduplicate": data.deduplicate and ("with columns" if train.needs.data == "prompts" else True),
        "eval_fraction": data.eval_fraction if holds_out else None,
        "weights": weights,
        "stopping_strategy": data.stopping_strategy if weights else None,
        "stream_rows": _needed_rows(train) if data.streaming else None,
        "images": image_settings(data) | {"columns": IMAGE_COLUMNS} if data.images else None,
        "objective": train.objective if train.objective != "sft" else None,
        "dialogues": data.has_dialogues,
        "tools": data.tool_schemas or None,
    }
    if all(source["format"] in ("text", "prompt_completion") for source in fingerprints):
        for name in ("template", "train_on", "eot_tokens"):
            _require_default(data, name)
    else:
        template = template_source(data.template)
        settings |= {
            "train_on": data.train_on,
            "masks": list(MASK_KEYS),
            "step_separator": data.step_separator if train.needs.data == "steps" else None,
            "eot_tokens": list(data.eot_tokens),
            "template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
            "template_is_fallback": template is not None and template_choice(data.template).is_fallback,
        }
    effective = {name: value for name, value in settings.items() if value not in (None, False, [], {})}
    if holds_out or weights:  # Otherwise the seed has no effect on the rows.
        effective["seed"] = train.seed
    return effective, fingerprints


def _require_default(data: DataConfig, name: str) -> None:
    """Refuse a setting of chats where no source holds any."""
    value = getattr(data, name)
    default = {"template": None, "train_on": "assistant", "eot_tokens": ()}[name]
    require(value == default, f"data.{name}={value} has no effect: no source holds chats; leave data.{name} out")


def _writes_date(data: DataConfig, model_dir: Path) -> bool:
    """Return whether the chat template writes the date, as Llama 3.2's does: its tokens change every day."""
    source = template_source(data.template)
    if source is not None and ("strftime_now" in source or not template_choice(data.template).is_fallback):
        return "strftime_now" in source
    files = [path for pattern in TEMPLATE_FILES for path in model_dir.glob(pattern) if path.is_file()]
    return any(b"strftime_now" in path.read_bytes() for path in files)


def _earlier_date(run_dir: Path) -> str | None:
    """Return the date of the cache entry in RUN/data.json; None without a date or with a damaged record."""
    try:
        date = json.loads((run_dir / DATA_NAME).read_bytes())["settings"].get("date")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return date if isinstance(date, str) else None


def _needed_rows(train: TrainConfig) -> int:
    assert train.max_steps is not None, "refused when the settings were composed"
    return train.max_steps * train.global_batch


def _build(
    folder: Path,
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    sources: Sources,
    settings: dict[str, Any],
) -> None:
    """Write a whole cache entry into `folder`."""
    encoder = open_encoder(model, data, train.objective)
    tokenizer = encoder.tokenizer
    corpora, mixture = corpora_of(folder, data, sources), Mixture.of(data, sources["train"], train.seed)
    ended = np.ones(len(sources["train"]), bool)
    if "eval" in sources:  # First, since training leaves out what is held out.
        _read_whole(corpora["eval"], sources["eval"], encoder)
    if data.streaming:
        tokens = _needed_rows(train) * data.sequence_length
        ended = _read_enough(corpora["train"], sources["train"], encoder, mixture, tokens)
    else:
        _read_whole(corpora["train"], sources["train"], encoder)
    for split, corpus in corpora.items():
        check_trainable(corpus, sources[split], data)
    if (template := encoder.template) is None:
        for name in ("template", "eot_tokens"):
            _require_default(data, name)
    pad = next(
        (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
    )  # Any valid token does: nothing attends to padding from a document, and no label is on it.
    training = corpora["train"]
    is_held_out = mixture.held_out(training)
    in_split = {"train": (training, ~is_held_out, mixture, ended)}
    # Held-out documents are a mixture with the same shares, none of them twice.
    once = mixture._replace(until_all=False)
    if "eval" in sources:
        corpus = corpora["eval"]
        in_split["eval"] = (corpus, np.ones(len(corpus.documents), bool), once._replace(wanted=None), ended)
    elif mixture.eval_fraction > 0:
        in_split["eval"] = (training, is_held_out, once, np.ones_like(ended))
    if is_prompts := train.needs.data == "prompts":
        _shorten_rows(corpora)
    splits = {}
    for split, (corpus, chosen, shares, all_ended) in in_split.items():
        used = shares.use_pieces(corpus, chosen, all_ended)
        if not used.any():
            raise _nothing_left(split, data, corpus)
        splits[split] = write_split(
            folder, split, corpus, chosen, used, pad, single=is_prompts or "documents" in settings
        )
        count_sources(splits[split], corpus, sources.get(split, sources["train"]), used, shares.wanted)
    check_vocabulary(model, max(counts["largest_token"] for counts in splits.values()))
    for corpus in corpora.values():
        corpus.delete()
    if data.images:  # Pixels are made while training: what makes them is content.
        files = [path for name in PROCESSOR_FILES if (path := Path(model.path).expanduser() / name).is_file()]
        write_json(folder / PIXELS_NAME, image_settings(data) | {path.name: sha256(path) for path in files})
    meta = {
        "version": FORMAT_VERSION,
        "created": time.time(),
        "sequence_length": training.sequence_length,
        "pad_token_id": pad,
        "objective": train.objective,
        "chats": template is not None,
        "chat_template": template and template.source,
        "unwritten_reasoning": template.unwritten if template else (0, 0),
        "unread": [unread for source in itertools.chain(*sources.values()) if (unread := encoder.unread(source))],
        "settings": settings,
        "content": content_digest(folder, list(splits)),
        "model": str(Path(model.path).expanduser().absolute()),
        "ended": ended.tolist(),
        "splits": splits,
    }
    write_json(folder / "meta.json", meta)


def open_encoder(model: ModelConfig, data: DataConfig, objective: str) -> Encoder:
    """Return the encoder of a run's documents. Raises UserError for a tokenizer or a processor that cannot be read."""
    model_dir = Path(model.path).expanduser()
    # The processor first: it needs torch, which `tokenize_alone` hides from transformers.
    processor = ImageProcessor(model_dir, data) if data.images else None
    tokenizer = load_tokenizer(model_dir, model.new_tokens, model.special_tokens)
    images = None if processor is None else ImageText(processor, tokenizer)
    return Encoder(tokenizer, model.name or str(model_dir), data, objective, images)


def _shorten_rows(corpora: dict[str, Corpus]) -> None:
    """Make rows as long as the longest prompt: each has one of its own."""
    longest = max(int(corpus.pieces["length"].max(initial=2)) for corpus in corpora.values())
    for corpus in corpora.values():
        corpus.sequence_length = longest


def corpora_of(folder: Path, data: DataConfig, splits: Collection[str]) -> dict[str, Corpus]:
    """Return an empty corpus for each split; with data.deduplicate, training leaves out what the others have."""
    seen: set[bytes] | None = set() if data.deduplicate else None
    return {
        split: Corpus(folder / f"{split}_documents", data.sequence_length, seen, drops_seen=split == "train")
        for split in splits
    }


def check_vocabulary(model: ModelConfig, largest_token: int) -> None:
    """Refuse the tokenizer of another model, whose tokens the embedding lacks: on a GPU that is a device assertion."""
    model_dir = Path(model.path).expanduser()
    path = model_dir / "config.json"
    if not path.is_file():
        return
    settings = read_config(model_dir)
    if model.new_tokens:  # The vocabulary grows by as many rows as are missing.
        new_token_ids(model_dir, model.new_tokens, architecture_of(settings, path).vocabulary)
        return
    text = settings.get("text_config")
    vocab_size = settings.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    if isinstance(vocab_size, int) and largest_token >= vocab_size:
        raise UserError(
            f"the tokenizer in {model_dir} writes the token {largest_token}, beyond vocab_size={vocab_size} in "
            f"{path}; put the tokenizer of this model into the folder"
        )


def check_trainable(corpus: Corpus, sources: Sequence[DataSource | None], data: DataConfig) -> None:
    """Refuse a source of which no document has a token to train, and say what to change. None: do not check it."""
    for number, source in enumerate(sources):
        usable = corpus.pieces_of[corpus.documents["source"] == number] > 0
        # A bounded reading may end before it needs a source.
        if source is not None and len(usable) and not usable.any():
            raise nothing_to_train(corpus, source, number, data)


def _nothing_left(split: str, data: DataConfig, corpus: Corpus) -> UserError:
    """Return the error for a split that data.eval_fraction leaves empty."""
    num_usable = int(np.count_nonzero(corpus.pieces_of > 0))
    kept = "none was left to train on" if split == "train" else "none could be held out for evaluation"
    return UserError(
        f"{data.path or 'data.sources'}: with data.eval_fraction={data.eval_fraction} and {num_usable:,} documents "
        f"that have a token to train, {kept}; set data.eval_fraction={'0.05' if split == 'train' else '0'}, add "
        "documents, or name held-out ones with {data.eval_path}"
    )


def _read_whole(corpus: Corpus, sources: list[DataSource], encoder: Encoder) -> None:
    """Append every document of every source, one source after the other."""
    for number, source in enumerate(sources):
        _, too_long, documents = encoder.open(source)
        progress = _Progress(source.label, source.total_bytes)
        for batch in _batches(documents, _BATCH_DOCUMENTS, _BATCH_BYTES):
            corpus.append(encoder.encode(batch), number, too_long)
            progress.report(batch)


def _read_enough(
    corpus: Corpus, sources: list[DataSource], encoder: Encoder, mixture: Mixture, tokens: int
) -> np.ndarray:
    """Append documents until the training pieces have `tokens`, and no more; (S,) bool: which sources ended before.

    Of a mixture, the source that is furthest behind its share is read next; else each in turn. Held-out documents do
    not count towards the need. Raises UserError for a source whose first PATIENCE documents have no token to train.
    """
    opened = [encoder.open(source) for source in sources]
    streams = [_batches(documents, _STREAM_DOCUMENTS, _STREAM_BYTES) for _, _, documents in opened]
    ended, have_pieces, batches = np.zeros(len(sources), bool), np.zeros(len(sources), bool), np.zeros(len(sources))
    num_documents = np.zeros(len(sources), np.int64)
    targets_of, tokens_of = np.zeros(len(sources)), np.zeros(len(sources))
    progress = _Progress(", ".join(source.label for source in sources), None)
    while not ended.all() and not _suffices(corpus.sequence_length, mixture, tokens, targets_of, tokens_of, ended):
        behind = batches if mixture.wanted is None else targets_of / mixture.wanted
        number = int(np.argmin(np.where(ended, np.inf, behind)))
        batch = next(streams[number], None)
        if batch is None:
            ended[number] = True
            continue
        pieces = corpus.append(encoder.encode(batch), number, opened[number][1])
        hashes = hash64((HELD_OUT, mixture.seed, number), len(batch), start=int(num_documents[number]))
        first = corpus.num_documents - len(batch)
        trained = pieces[~below(hashes, mixture.eval_fraction)[pieces["document"] - first]]
        targets_of[number] += trained["targets"].sum()
        tokens_of[number] += trained["length"].sum()
        batches[number] += 1
        num_documents[number] += len(batch)
        have_pieces[number] |= len(pieces) > 0
        if num_documents[number] >= PATIENCE and not have_pieces[number]:
            raise nothing_to_train(corpus, sources[number], number, encoder.data)
        progress.report(batch)
    return ended


def nothing_to_train(corpus: Corpus, source: DataSource, number: int, data: DataConfig) -> UserError:
    """Why source `number`, of which no document in the corpus has a token to train, is no use, and what to change."""
    fates = corpus.documents["fate"][corpus.documents["source"] == number]
    if (fates == DUPLICATE).all():
        return UserError(
            f"{source.config.path}: every document equals an earlier or a held-out one; leave the source out, or set "
            "data.deduplicate=false"
        )
    advice = "every chat needs an assistant turn, every completion and text some content"
    if (long := np.isin(fates, (TRUNCATED, DROPPED))).any():
        fate = "left out as longer than a row" if (fates == DROPPED).any() else "truncated before it"
        advice = f"{np.count_nonzero(long):,} were {fate}: raise {{data.sequence_length}}={data.sequence_length}"
        advice += ", or set a lower data.image_max_pixels" * data.images
    which = "its first" if data.streaming and len(fates) >= PATIENCE else "its"
    return UserError(f"{source.config.path}: none of {which} {len(fates):,} documents has a token to train; {advice}")


def _suffices(
    length: int, mixture: Mixture, wanted: int, targets: np.ndarray, tokens: np.ndarray, ended: np.ndarray
) -> bool:
    """Return whether documents with these targets and tokens, (S,) each, fill the rows, or no further one is of use."""
    if mixture.wanted is None:
        return bool(tokens.sum() >= wanted)
    whole = mixture.volume(targets, ended)
    if not mixture.until_all and (ended & (targets > 0) & (targets / mixture.wanted <= whole)).any():
        return True
    used = tokens * mixture.wanted * whole / np.maximum(targets, 1)
    # Each source is used up to a whole piece: it may miss its part by half of one.
    return bool(used.sum() >= wanted + len(targets) * length)


def _batches(documents: Iterator[Document], most_documents: int, most_bytes: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if len(batch) == most_documents or num_bytes >= most_bytes:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


class _Progress:
    """A line on stderr every few seconds that says how far the tokenizing is."""

    def __init__(self, label: str, total_bytes: int | None) -> None:
        self._label = label
        self._total = total_bytes
        self._started = self._reported = time.monotonic()
        self._documents = self._bytes = 0

    def report(self, batch: list[Document]) -> None:
        self._documents += len(batch)
        self._bytes += sum(document.num_bytes for document in batch)
        now = time.monotonic()
        if now - self._reported < _PROGRESS_SECONDS:
            return
        self._reported = now
        done = f"{self._documents:,} documents, {self._bytes / 1e6:,.1f} MB"
        if self._total:
            done += f" of {self._total / 1e6:,.1f} MB"
        rate = self._bytes / 1e6 / (now - self._started)
        print(f"tokenizing {self._label}: {done}, {rate:.1f} MB/s", file=sys.stderr, flush=True)


def prepare_and_print(run_dir: str) -> int:
    """Prepare the data of a run, print the summary and return the exit code. Raises UserError as `prepare` does."""
    # This process is there to tokenize, whatever the shell says for processes that fork afterwards.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    print(summary(prepare_run(run_dir)))
    return DONE


NOTES = {
    "truncated": "truncated",
    "split": "split over rows",
    "dropped_long": "skipped as too long",
    "dropped": "skipped without a trained token",
    "unused": "skipped by the mixture",
    "duplicates": "skipped as duplicates",
}
"""Counts of documents in a split, and how the summary calls them."""


def summary(record: dict[str, Any]) -> str:
    """Return a few lines about RUN/data.json for the terminal."""
    lines = []
    for split, name in (("train", "training data"), ("eval", "held out     ")):
        if split not in record["splits"]:
            lines.append(f"{name}  none: no evaluation")
            continue
        counts = record["splits"][split]
        if record["objective"] == "grpo":
            long = counts["dropped_long"]
            lines.append(
                f"{name}  {counts['documents']:,} prompts of up to {record['sequence_length']:,} tokens"
                + (f" ({long:,} {NOTES['dropped_long']})" if long else "")
            )
            continue
        what = {"pairs": "pairs", "judged": f"documents, {counts['pairs']:,} judged answers"}.get(
            OBJECTIVES[record["objective"]].data, "documents"
        )
        share = counts["padding"] / (counts["rows"] * record["sequence_length"])
        notes = [f"{counts[key]:,} {words}" for key, words in NOTES.items() if counts.get(key)]
        lines.append(
            f"{name}  {counts['documents']:,} {what} in {counts['rows']:,} sequences of {record['sequence_length']:,} "
            f"tokens, {counts['targets']:,} of {counts['tokens']:,} tokens trained, padding {share:.1%}"
            + (f" ({', '.join(notes)})" if notes else "")
        )
        if "images" in counts:
            lines.append(
                f"  images       {counts['images']:,}, {counts['image_tokens']:,} tokens, "
                f"{counts['image_bytes'] / 1e6:,.1f} MB encoded"
                + (" (data.image_max_pixels makes them shorter)" if counts["dropped_long"] else "")
            )
        if len(counts["sources"]) > 1:
            for source in counts["sources"]:
                wanted = "" if source["share_wanted"] is None else f" (wanted {source['share_wanted']:.1%})"
                copies = f", up to {source['most_copies']:,} times each" if source["most_copies"] > 1 else ""
                lines.append(
                    f"  {source['share']:6.1%}{wanted} of the trained tokens: {source['documents']:,} documents"
                    f"{copies}, {source['targets']:,} tokens trained, {source['path']}"
                )
    if "documents" in record["settings"]:
        lines.append("packing        none: this model would mix documents of one sequence")
    if "stream_rows" in record["settings"]:
        needed, rows = record["settings"]["stream_rows"], record["splits"]["train"]["rows"]
        lines.append(
            f"streamed       until {needed:,} rows were full"
            if rows >= needed
            else f"streamed       to the end: {rows:,} of the {needed:,} rows that the steps need, so they are repeated"
        )
    count, characters = record.get("unwritten_reasoning", (0, 0))
    if count:
        lines.append(f"not rendered   reasoning of {count:,} turns, {characters:,} characters, by the chat template")
    lines += [f"not read       {unread}" for unread in record.get("unread", [])]
    lines.append(f"{'reused' if record['reused'] else 'cached'} in     {record['cache']}")
    return "\n".join(lines)


if __name__ == "__main__":
    tokenize_alone()
    advice = "free some space, or set data.cache_dir to another disk"
    sys.exit(run_to_exit_code(lambda: prepare_and_print(sys.argv[1]), full_disk=advice))
