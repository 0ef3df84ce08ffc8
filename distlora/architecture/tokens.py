"""New tokens, the vocabulary that they make, and which of its rows are trained. Imports no torch.

The one place where a tokenizer is made: preparation, preview, generation and whatever is published read text through
the same one, the base's with the texts of `model.new_tokens` added and those of `model.special_tokens` set.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distlora.architecture.spec import Architecture, architecture_of
from distlora.config import AdapterConfig, ModelSpec, UserError, nearest, require
from distlora.config.errors import short
from distlora.config.json_files import read_object

EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""The two matrices with a row for each token, as PEFT and Hugging Face name their modules."""

_CONTROL = re.compile(r"<\|.+\|>")
"""Texts that are added as special tokens: control tokens as Llama 3, Qwen and Phi write theirs, which decoders leave
out of text. Others (<think>, a word of a trade) are ordinary added tokens and stay in it."""

_tokenizes_alone = False
"""True if this process needs no torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The rows of embedding and head in training."""

    stored: int
    """Rows on disk."""
    rows: int
    """Rows in training: more than are stored where new tokens do not fit into spare ones."""
    new: Mapping[str, int] = field(default_factory=dict)
    """The id of each new token."""
    trained: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Ids whose rows alone are trained, ascending, by matrix. A head that is tied to the embedding has no entry: its
    rows are the embedding's."""

    @property
    def has_grown(self) -> bool:
        """True if training has more rows than are stored."""
        return self.rows > self.stored


def load_tokenizer(
    model_dir: Path, new_tokens: Sequence[str] = (), special_tokens: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Load the tokenizer in a model's folder, add new tokens and set special ones.

    Raises UserError where there is none that can be loaded, for one that is code of its own, for a new token that it
    has already, and for a special one that it has not.
    """
    transformers = _import_transformers()
    _refuse_code(model_dir / "tokenizer_config.json", known=transformers)
    try:
        # Without the word for code transformers asks on the terminal whether to run it.
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    # A damaged file shows as whatever its reader trips over, and tokenizers raises plain Exceptions.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
        raise UserError(
            f"{{model.path}}={model_dir} holds no tokenizer that can be loaded: {reason}; copy its files into it again "
            "(tokenizer.save_pretrained writes them)"
        ) from error
    if not isinstance(tokenizer.model_max_length, (int, float)):  # Every call compares with it.
        raise UserError(
            f"{{model.path}}={model_dir} holds model_max_length={short(tokenizer.model_max_length)} in "
            "tokenizer_config.json, which is not a number of tokens; copy the tokenizer's files into it again"
        )
    beside = model_dir / "chat_template.json"  # Of the processor of a model of images and text.
    if tokenizer.chat_template is None and beside.is_file():
        tokenizer.chat_template = read_object(beside, "download it again").get("chat_template")
    if new_tokens:
        _add(tokenizer, model_dir, new_tokens)
    if special_tokens:
        _set_special(tokenizer, model_dir, special_tokens)
    return tokenizer


def tokenize_alone() -> None:
    """Keep transformers from importing torch in this process, which only tokenizes. No effect once torch is imported.

    transformers imports torch and its DTensors for a tokenizer where they are installed: 2.0 of the 2.9 CPU seconds
    that the preparation of a small run took (2026-11-25).
    """
    global _tokenizes_alone
    _tokenizes_alone = "torch" not in sys.modules


def _import_transformers() -> Any:
    """Import transformers, which takes seconds that a reused cache does not pay."""
    if _tokenizes_alone and "transformers" not in sys.modules:
        # Python's documented way to hide a module: transformers has no setting. datasets is to find torch again.
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # To install torch.
        try:
            import transformers
        finally:
            del sys.modules["torch"]
    else:
        import transformers
    return transformers


def _refuse_code(config: Path, *, known: object) -> None:
    """Refuse a tokenizer that is code which comes with the weights, unless `known` (transformers) has the very class.

    transformers would take another class for it, and split texts otherwise than the model has learned.
    """
    if not config.is_file():
        return
    named = read_object(config, "download it again").get("auto_map")
    classes = named.get("AutoTokenizer") if isinstance(named, Mapping) else named
    for path in classes if isinstance(classes, list) else [classes]:
        if isinstance(path, str) and not hasattr(known, path.rpartition(".")[2]):
            raise UserError(
                f"{config}: auto_map requires code that comes with the weights ({path}), which distlora never runs; "
                "use a copy of the model whose tokenizer is one of transformers' (a tokenizer.json without auto_map)"
            )


def _add(tokenizer: Any, model_dir: Path, new_tokens: Sequence[str]) -> None:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for text in new_tokens:
        if text in known:
            raise UserError(
                f"model.new_tokens: {text} is token {known[text]} of the tokenizer in {model_dir} already; leave it "
                f"out, and to train its row add adapter.trainable_token_indices=[{known[text]}]"
            )
    for text in new_tokens:
        is_control = _CONTROL.fullmatch(text) is not None
        token = AddedToken(text, special=is_control, normalized=False)  # Matched as written, wherever it stands.
        added = tokenizer.add_tokens([token], special_tokens=is_control)
        if added != 1 or tokenizer(text, add_special_tokens=False).input_ids != [tokenizer.convert_tokens_to_ids(text)]:
            raise UserError(f"model.new_tokens: the tokenizer in {model_dir} cannot add {text!r}; leave it out")


def _set_special(tokenizer: Any, model_dir: Path, special_tokens: Mapping[str, str]) -> None:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for name, text in special_tokens.items():
        if text not in known:
            raise UserError(
                f"model.special_tokens.{name}={text} is not in the vocabulary of the tokenizer in {model_dir}"
                f"{nearest(text, known)}; add it with 'model.new_tokens=[{json.dumps(text)}]', or name one that it has"
            )
    before, start = len(tokenizer), tokenizer("a").input_ids[:1]
    old_start = tokenizer.bos_token_id
    tokens = {name: AddedToken(text, special=True, normalized=False) for name, text in special_tokens.items()}
    tokenizer.add_special_tokens(tokens)
    assert len(tokenizer) == before, "special tokens of the vocabulary add no rows"
    if start == [old_start] and old_start != tokenizer.bos_token_id:
        raise UserError(
            f"model.special_tokens.bos_token={special_tokens['bos_token']}: the tokenizer in {model_dir} puts "
            f"{tokenizer.convert_ids_to_tokens(old_start)} before every text, which this would not change; leave it out"
        )


def vocabulary_of(spec: ModelSpec, architecture: Architecture) -> Vocabulary:
    """Return the vocabulary of a run. Load the tokenizer for new tokens.

    Raises UserError for a new token that exists, a tokenizer of another model, and indices that are no rows.
    """
    path = Path(spec.model.path) / "config.json"
    check_rows_of_tokens(spec, architecture)
    stored = architecture.vocabulary
    new = new_token_ids(path.parent, spec.model.new_tokens, stored)
    rows = max(stored, *(id + 1 for id in new.values())) if new else stored
    trained = trained_indices(spec.adapter, tied=architecture.tied, new=tuple(new.values()))
    check_indices(spec, trained, rows, path)
    return Vocabulary(stored=stored, rows=rows, new=new, trained=trained)


def check_rows_of_tokens(spec: ModelSpec, architecture: Architecture) -> None:
    """Refuse trained rows of tokens, and matrices trained whole, for a model whose matrices do not allow it."""
    kind = architecture.model_type
    names = [path.rpartition(".")[2] for path in (architecture.embedding, architecture.head)]
    for setting in spec.adapter.token_settings(spec.model.new_tokens):
        reason = ""
        if names != [EMBEDDING, HEAD]:
            reason = f"trains {EMBEDDING} and {HEAD}, and {kind} names them {' and '.join(names)}"
        elif not architecture.takes_embeddings and setting != "adapter.modules_to_save":
            reason = f"trains rows of the embedding alone, and {kind} has a second table that reads token ids"
        require(not reason, f"{setting} {reason}; leave it out")


def new_token_ids(folder: Path, new_tokens: Sequence[str], stored: int) -> dict[str, int]:
    """Return the ids of model.new_tokens in a model's folder, whose embedding has `stored` rows.

    Raises UserError for a new token that exists and for the tokenizer of another model.
    """
    if not new_tokens:
        return {}
    tokenizer = load_tokenizer(folder, new_tokens)
    new = {text: tokenizer.convert_tokens_to_ids(text) for text in new_tokens}
    last = min(new.values()) - 1
    if last >= stored:
        raise UserError(
            f"the tokenizer in {folder} has the token {last}, beyond vocab_size={stored} in {folder / 'config.json'}, "
            "and new tokens would follow it; put the tokenizer of this model into the folder"
        )
    return new


def trained_indices(adapter: AdapterConfig, *, tied: bool, new: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the ids whose rows are trained, ascending, by matrix: new tokens in both, named ones as in PEFT.

    A matrix that adapter.modules_to_save trains whole has none, and unties the two. Raises UserError for a head that is
    trained apart from the embedding that it is tied to.
    """
    if adapter.method == "full":  # There every row is.
        return {}
    whole, named = adapter.modules_to_save, adapter.trainable_token_indices
    chosen = dict(named) if isinstance(named, Mapping) else {EMBEDDING: named or ()}
    if tied and len(whole) == 1 and (new or any(chosen.values())):
        raise UserError(
            f"adapter.modules_to_save=[{whole[0]}] unties the embedding and the LM head of this model, and the trained "
            "tokens would be trained in only one of them; "
            f"set adapter.modules_to_save=[{EMBEDDING},{HEAD}]"
        )
    if tied and not whole and HEAD in chosen:
        if tuple(chosen[HEAD]) != tuple(chosen.get(EMBEDDING, ())):  # PEFT asks for the same order, too.
            raise UserError(
                f"adapter.trainable_token_indices.{HEAD}={list(chosen[HEAD])}: this model's head is its embedding, so "
                f"its rows cannot be trained separately from {EMBEDDING}'s; write one list for both"
            )
        del chosen[HEAD]
    matrices = (EMBEDDING,) if tied and not whole else (EMBEDDING, HEAD)
    united = {matrix: tuple(sorted({*chosen.get(matrix, ()), *new})) for matrix in matrices if matrix not in whole}
    return {matrix: ids for matrix, ids in united.items() if ids}


def check_before_tokenizer(spec: ModelSpec, model: Mapping[str, Any]) -> None:
    """Refuse what `vocabulary_of` would, as far as config.json (`model`) tells alone."""
    path = Path(spec.model.path) / "config.json"
    architecture = architecture_of(model, path)
    check_rows_of_tokens(spec, architecture)
    trained = trained_indices(spec.adapter, tied=architecture.tied, new=())
    check_indices(spec, trained, architecture.vocabulary + len(spec.model.new_tokens), path)


def check_indices(spec: ModelSpec, trained: Mapping[str, tuple[int, ...]], rows: int, place: Path) -> None:
    """Refuse ids that are no rows of the model."""
    for ids in trained.values():
        if ids[-1] >= rows:
            initial = spec.adapter.init_from
            if initial is not None:
                raise UserError(
                    f"the adapter at adapter.init_from={initial} has trained the row {ids[-1]}, and the model has "
                    f"{rows:,} tokens (vocab_size in {place}, and model.new_tokens); "
                    f"{_new_tokens_hint(Path(initial), rows - len(spec.model.new_tokens))}"
                )
            raise UserError(
                f"adapter.trainable_token_indices has {ids[-1]}, and the model has {rows:,} tokens (vocab_size in "
                f"{place}, and model.new_tokens); set ids from 0 to {rows - 1}"
            )


def _new_tokens_hint(folder: Path, stored: int) -> str:
    """Return the end of a message on adapter ids beyond the base's rows: the setting that adds the tokens."""
    path = folder / "tokenizer.json"
    added: list[dict[str, Any]] = []
    if path.is_file():
        try:
            added = json.loads(path.read_bytes()).get("added_tokens") or []
        except ValueError:  # The fault that is being told is another one.
            added = []
    texts = [token["content"] for token in sorted(added, key=lambda token: token["id"]) if token["id"] >= stored]
    listed = ",".join(json.dumps(text, ensure_ascii=False) for text in texts) or "..."
    return f"its new tokens must be this run's, in their order: 'model.new_tokens=[{listed}]'"


def tokenizer_files(spec: ModelSpec) -> dict[str, bytes]:
    """Return the files of a tokenizer with new or other special tokens; empty if the base's tokenizer serves."""
    model = spec.model
    if not model.changes_tokenizer:
        return {}
    with tempfile.TemporaryDirectory(prefix="distlora-tokenizer-") as folder:
        load_tokenizer(Path(model.path), model.new_tokens, model.special_tokens).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
