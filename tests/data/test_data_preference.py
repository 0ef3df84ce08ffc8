"""Preference data: every form that TRL reads becomes two documents that begin alike, side by side in one row.

Judged data: every form of TRL, LLaMA-Factory and Axolotl becomes one document and a verdict.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distlora.architecture.tokens import load_tokenizer
from distlora.config import Config, UserError
from distlora.config.file import build
from distlora.data.answers import check_objective, to_answers
from distlora.data.encoding import Encoded
from distlora.data.formats import ReadOptions, SourceRecord, resolve_format
from distlora.data.loader import MicroBatch, StepLoader
from distlora.data.rows import REJECTED, STARTS, TRAINED, PackedRows, read_meta
from support.data_folders import MARKED, prepare, write_lines, write_model


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, GOOD, BAD = said("user", "Who?"), said("assistant", "Me."), said("assistant", "You.")
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "explicit": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "implicit": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "a copy of the prompt, as UltraFeedback": {"prompt": "Who?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "a prompt in front of both": {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "a question and messages": {"prompt": "Who?", "chosen": [GOOD], "rejected": [BAD]},
    "single messages, as Axolotl": {"prompt": [ASKED], "chosen": GOOD, "rejected": BAD},
    "a conversation and texts": {"prompt": [ASKED], "chosen": "Me.", "rejected": "You."},
    "ShareGPT's words, as LLaMA-Factory": {
        "prompt": [{"from": "human", "value": "Who?"}],
        "chosen": {"from": "gpt", "value": "Me."},
        "rejected": {"from": "gpt", "value": "You."},
    },
    "a conversation beside it, as LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "Who?"}],
        "chosen": {"from": "gpt", "value": "Me."},
        "rejected": {"from": "gpt", "value": "You."},
    },
    "messages beside it, as Axolotl": {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
    "messages and texts, as Axolotl": {"messages": [ASKED], "chosen": "Me.", "rejected": "You."},
    "other names": {"chosen_messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
    "a question, as Intel's pairs": {"question": "Who?", "chosen": "Me.", "rejected": "You."},
    "an instruction, as LLaMA-Factory": {"instruction": "Who?", "input": "", "chosen": "Me.", "rejected": "You."},
    "an input, as distilabel": {"input": "Who?", "chosen_response": "Me.", "rejected_response": "You."},
}


def pair_of(value: dict[str, Any], **columns: str) -> dict[str, Any]:
    record = SourceRecord("pairs.jsonl:1", 10, value)
    format = resolve_format(record, "auto", ReadOptions(columns))
    assert format == "preference"
    return to_answers(record, format, True, ReadOptions(columns)).value


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_every_form_of_conversation_is_the_same_pair(form: str) -> None:
    pair = pair_of(CONVERSATIONS[form])
    assert pair == {"chosen": {"messages": [ASKED, GOOD]}, "rejected": {"messages": [ASKED, BAD]}}


def test_the_assistants_turns_in_the_common_prompt_are_not_trained() -> None:
    before = [said("system", "Be brief."), ASKED, GOOD, said("user", "Sure?")]
    pair = pair_of({"chosen": [*before, said("assistant", "Yes.")], "rejected": [*before, said("assistant", "No.")]})
    for side in ("chosen", "rejected"):
        flags = [message.get("train") for message in pair[side]["messages"]]
        assert flags == [None, None, False, None, None]


def test_what_comes_before_the_question_is_kept_and_not_trained() -> None:
    value = {"system": "Be brief.", "history": [["Hi", "Yes?"]], "instruction": "Who", "input": "is it?"}
    opening = [said("system", "Be brief."), said("user", "Hi"), said("assistant", "Yes?") | {"train": False}]
    asked = said("user", "Who\nis it?")
    pair = pair_of(value | {"chosen": "Me.", "rejected": "You."})
    assert pair["rejected"] == {"messages": [*opening, asked, BAD]}
    assert pair_of({"system": "S", "prompt": [ASKED], "chosen": GOOD, "rejected": BAD})["chosen"] == {
        "messages": [said("system", "S"), ASKED, GOOD]
    }
    record = SourceRecord("pairs.jsonl:1", 10, {"instruction": "Who?", "chosen": "Me.", "rejected": "You."})
    without = to_answers(record, "preference", has_template=False).value
    assert without["chosen"]["completion"] == "Me."
    assert "### Instruction:\nWho?\n" in without["chosen"]["prompt"], "in Alpaca's words, without a chat template"


def test_texts_keep_their_prompt_or_get_what_both_begin_with() -> None:
    explicit = pair_of({"prompt": "It is", "chosen": " day.", "rejected": " night."})
    assert explicit["chosen"] == {"prompt": "It is", "completion": " day."}
    hh = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And now?\n\nAssistant:"
    marked = pair_of({"chosen": hh + " I think so.", "rejected": hh + " I thank you."})
    assert marked == {
        "chosen": {"prompt": hh, "completion": " I think so."},
        "rejected": {"prompt": hh, "completion": " I thank you."},
    }
    plain = pair_of({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert plain["chosen"] == {"prompt": "The sky is", "completion": " blue."}, "words stay whole"
    renamed = pair_of({"question": "Q", "good": "a", "bad": "b"}, prompt="question", chosen="good", rejected="bad")
    assert renamed["rejected"] == {"prompt": "Q", "completion": "b"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"chosen": "Yes.", "rejected": "No."}, "do not begin with the same words and there is no 'prompt'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no message in common and there is no 'prompt'"),
        ({"messages": [ASKED, GOOD], "chosen": "It is I.", "rejected": "It is you."}, "'messages' ends with an answer"),
        ({"history": [["a", "b"]], "instruction": "Who?", "chosen": [GOOD], "rejected": [BAD]}, "'history' needs a"),
        ({"history": [["a", "b"]], "chosen": "It is I.", "rejected": "It is you."}, "'history' needs a"),
        ({"prompt": 3, "chosen": [GOOD], "rejected": [BAD]}, "'prompt' is a number"),
        ({"prompt": [ASKED], "chosen": 3, "rejected": [BAD]}, "'chosen' is a number, neither a string nor a list"),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [said("bot", "x")]}, r"1, rejected: messages\[0\] has the"),
        ({"prompt": [ASKED], "chosen": [], "rejected": [BAD]}, "pairs.jsonl:1, chosen: 'messages' is empty"),
    ],
    ids=str,
)
def test_what_is_no_pair_is_refused_by_its_place(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_answers(SourceRecord("pairs.jsonl:1", 10, value), "preference", has_template=True)


def test_data_that_does_not_fit_the_objective_is_refused_with_what_to_type() -> None:
    with pytest.raises(
        UserError, match=r"set train\.objective=dpo or .*, or fine-tune on the chosen answers with data"
    ):
        check_objective("preference", "sft", "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl is chat, and train\.objective=dpo compares"):
        check_objective("chat", "dpo", "a.jsonl")
    with pytest.raises(UserError, match=r"a\.txt is text, and train\.objective=kto learns from single answers"):
        check_objective("text", "kto", "a.txt")
    both = {"messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    with pytest.raises(UserError, match=r"fits the formats chat and preference; .*=chat or data\.format=preference"):
        resolve_format(SourceRecord("a.jsonl:1", 10, both), "auto")
    advised = resolve_format(
        SourceRecord("a.jsonl:1", 10, CONVERSATIONS["implicit"]), "auto", ReadOptions({"messages": "chosen"})
    )
    assert advised == "chat"


JUDGED_ANSWERS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "TRL": ({"prompt": [ASKED], "completion": [GOOD], "label": True}, {}),
    "messages": ({"messages": [ASKED, GOOD], "label": 1}, {}),
    "LLaMA-Factory's alpaca": ({"instruction": "Who?", "output": "Me.", "kto_tag": True}, {}),
    "LLaMA-Factory's ShareGPT": (
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}], "kto_tag": "true"},
        {},
    ),
    "Axolotl's chatml.intel": (
        {"question": "Who?", "completion": "Me.", "rating": True},
        {"instruction": "question", "output": "completion", "label": "rating"},
    ),
}


def judged(value: dict[str, Any], **columns: str) -> dict[str, Any]:
    record, reading = SourceRecord("judged.jsonl:1", 10, value), ReadOptions(columns, judged=True)
    return to_answers(record, resolve_format(record, "auto", reading), True, reading).value


@pytest.mark.parametrize("form", JUDGED_ANSWERS)
def test_every_form_of_judged_answer_is_the_same_document(form: str) -> None:
    value, columns = JUDGED_ANSWERS[form]
    assert judged(value, **columns) == {"answer": {"messages": [ASKED, GOOD]}, "good": True}


def test_of_a_judged_chat_only_the_answer_is_trained() -> None:
    before = [ASKED, GOOD, said("user", "Sure?")]
    flags = [turn.get("train") for turn in judged({"messages": [*before, BAD], "label": False})["answer"]["messages"]]
    assert flags == [None, False, None, None]
    both = judged({"prompt": [ASKED], "completion": [GOOD, said("user", "Sure?"), BAD], "label": False})
    assert all("train" not in turn for turn in both["answer"]["messages"]), "all turns behind the prompt are the answer"
    texts = judged({"prompt": "It is", "completion": " day.", "label": 0})
    assert texts == {"answer": {"prompt": "It is", "completion": " day."}, "good": False}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "a", "completion": "b"}, r"no 'label' \(or 'kto_tag'\) says whether its answer is good"),
        ({"prompt": "a", "completion": "b", "label": 0.7}, r"'label' is 0\.7, where true \(a good answer\) or false"),
        ({"prompt": "a", "completion": "b", "label": math.nan}, r"'label' is NaN, where true"),
        ({"prompt": "a", "completion": "b", "label": True, "kto_tag": False}, "'label' is true and 'kto_tag' is false"),
        ({"messages": [ASKED], "label": True}, "the last message is the user's, so there is no answer to judge"),
        ({"prompt": "a", "completion": "b", "label": True, "score": 1}, "'score' rates it"),
        (CONVERSATIONS["implicit"] | {"label": True}, "'label' says whether its answer is good"),
    ],
    ids=str,
)
def test_a_record_without_a_verdict_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^judged\.jsonl:1: {message}"):
        judged(value)


def test_mismatched_rows_have_each_prompt_with_the_answer_before_it_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Packed, cut to the length of a row, and the two answers of a pair apart."""
    lines = [
        {"prompt": "It is" + " so" * n, "completion": " day" * (n % 5 + 1), "label": n % 3 == 0} for n in range(1, 14)
    ]
    long = {"prompt": "Is it" + " so" * 20, "completion": " day" * 30, "label": True}
    pair = {"prompt": "It is", "chosen": " the night", "rejected": " the day"}
    path = write_lines(tmp_path / "pairs.jsonl", [pair])
    sources = [{"path": str(write_lines(tmp_path / "judged.jsonl", [*lines, long]))}, {"path": str(path)}]
    rows = prepared(tmp_path, [pair], objective="kto", path=None, sources=sources)
    assert (rows.counts["documents"], rows.counts["pairs"], rows.counts["split"]) == (15, 16, 0)
    loaders = {
        world: [
            StepLoader(
                rows, global_batch=99, micro_batch=2, rank=rank, world=world, seed=0, shuffle=True, mismatched=True
            )
            for rank in range(world)
        ]
        for world in (1, 2, 3)
    }
    batch = loaders[1][0].batch(0)
    documents = documents_in(batch.micro_batches)
    assert batch.global_pairs == len(documents) == 16
    tokenizer = load_tokenizer(tmp_path / "model")
    number = [tokenizer.decode(prompt).count(" so") for prompt, _ in documents]
    good = [
        n in (3, 6, 9, 12, 20) or " night" in tokenizer.decode(answer)
        for n, (_, answer) in zip(number, documents, strict=True)
    ]
    verdicts = torch.cat([part.judged.flatten() for part in batch.micro_batches if part.judged is not None])
    assert verdicts[verdicts != 0].tolist() == [1 if each else -1 for each in good]
    before = [documents[-1], *documents[:-1]]
    expected = [(prompt + other)[:64] for (prompt, _), (_, other) in zip(documents, before, strict=True)]
    for world, of_ranks in loaders.items():
        batches = [loader.batch(0).mismatched for loader in of_ranks]
        assert len({len(parts) for parts in batches}) == 1, "every rank runs as many"
        found = [prompt + answer for prompt, answer in documents_in(itertools.chain(*batches))]
        assert sorted(found) == sorted(expected), world


def documents_in(batches: Iterable[MicroBatch]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every document but padding."""
    found = []
    for part in batches:
        for tokens, labels, positions in zip(*(column.tolist() for column in part[:3]), strict=True):
            starts = [index for index, position in enumerate(positions) if position == 0]
            for start, end in itertools.pairwise([*starts, len(tokens)]):
                trained = [index for index in range(start, end) if labels[index] >= 0]
                if trained:
                    assert trained == list(range(trained[0], end - 1)), "the answer is the end of its document"
                    found.append((tokens[start : trained[0] + 1], tokens[trained[0] + 1 : end]))
    return found


def prepared(folder: Path, pairs: list[Any], objective: str = "dpo", **data: Any) -> PackedRows:
    """Return the training rows of these pairs."""
    model = folder / "model"
    if not model.exists():
        write_model(model, MARKED)
    path = str(write_lines(folder / "pairs.jsonl", pairs))
    values = {"path": path, "eval_fraction": 0.0, "cache_dir": str(folder / "cache"), "sequence_length": 64, **data}
    train = {"objective": objective}
    config = build(Config, {"model": {"path": str(model)}, "data": values, "train": train, "run_dir": str(folder)})
    return PackedRows.open(prepare(config), "train")


def sides_of(rows: PackedRows) -> list[tuple[list[int], list[int]]]:
    """(tokens, trained tokens) of every document but padding, row by row."""
    found = []
    for tokens, flags in zip(rows.tokens, rows.flags, strict=True):
        starts = [*np.flatnonzero(flags & STARTS).tolist(), len(tokens)]
        for start, end in itertools.pairwise(starts):
            labels = np.flatnonzero(flags[start:end] & TRAINED) + 1
            if len(labels):
                found.append((tokens[start:end].tolist(), tokens[start:end][labels].tolist()))
    return found


def test_a_row_holds_whole_pairs_with_the_answers_alone_trained(tmp_path: Path) -> None:
    pairs = [{"prompt": "It is", "chosen": " day" * n, "rejected": " the night"} for n in (1, 2, 3, 4)]
    rows = prepared(tmp_path, [*pairs, CONVERSATIONS["implicit"]])
    tokenizer = load_tokenizer(tmp_path / "model")
    found = sides_of(rows)
    assert len(found) == 2 * 5 == 2 * rows.pairs.sum()
    texts = [(tokenizer.decode(tokens), tokenizer.decode(trained)) for tokens, trained in found]
    for (chosen, _), (rejected, trained) in zip(texts[::2], texts[1::2], strict=True):
        if chosen.startswith("<|im_start|>"):
            assert (rejected, trained) == (
                "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nYou.<|im_end|>\n",
                "You.<|im_end|>",
            )
        else:
            assert chosen.startswith("It is day")
            assert (rejected, trained) == ("It is the night<|eos|>", " the night<|eos|>")
    assert np.array_equal((rows.flags & REJECTED > 0).sum(axis=1), rows.pairs)
    batch = StepLoader(rows, global_batch=9, micro_batch=9, rank=0, world=1, seed=0, shuffle=True).batch(0)
    assert batch.global_pairs == 5
    assert (batch.micro_batches[0].labels >= 0).sum() == rows.targets.sum() == sum(len(t) for _, t in found)


def test_a_pair_that_is_too_long_loses_the_ends_of_both_at_the_same_length(tmp_path: Path) -> None:
    def encoded(chosen: int, rejected: int) -> Encoded:
        sides = [Encoded(np.arange(n, dtype=np.int32), np.ones(n, np.uint8)) for n in (chosen, rejected)]
        return Encoded.pair(*sides)

    for lengths, kept in (((50, 6), (14, 6)), ((6, 50), (6, 14)), ((30, 40), (10, 10)), ((10, 11), (10, 10))):
        cut = encoded(*lengths).cut(20)
        assert (cut.rejected, len(cut.tokens)) == (kept[0], sum(kept))
        assert cut.tokens.tolist() == [*range(kept[0]), *range(kept[1])]
    short = {"prompt": "It is", "chosen": " day", "rejected": " the night"}
    long = short | {"rejected": " night" * 80}
    hopeless = short | {"prompt": "It is" * 80}
    for too_long, pairs in (("auto", 2), ("drop", 1)):
        rows = prepared(tmp_path, [short, long, hopeless], too_long=too_long)
        assert rows.pairs.sum() == pairs
        counted = {name: rows.counts[name] for name in ("documents", "truncated", "dropped", "dropped_long", "pairs")}
        lost = {"truncated": 1, "dropped": 1, "dropped_long": 0}
        if too_long == "drop":
            lost = {"truncated": 0, "dropped": 0, "dropped_long": 2}
        assert counted == {"documents": pairs, "pairs": pairs, **lost}


def test_pairs_are_held_out_mixed_and_streamed_whole(tmp_path: Path) -> None:
    pairs = [{"prompt": f"It is {n}", "chosen": " day", "rejected": " the night"} for n in range(40)]
    rows = prepared(tmp_path, pairs, eval_fraction=0.2)
    entry = next(path for path in (tmp_path / "cache").iterdir())
    meta, held_out = read_meta(entry), PackedRows.open(entry, "eval")
    assert meta["objective"] == "dpo"
    assert 0 < held_out.pairs.sum() < 20
    assert rows.pairs.sum() + held_out.pairs.sum() == 40
    assert len(sides_of(held_out)) == 2 * held_out.pairs.sum()
