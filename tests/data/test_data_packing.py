"""Packing: every token once, labels as defined, nothing across documents."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distlora.data.packing import assign_rows, build_rows, pack
from distlora.data.rows import STARTS, TRAINED

PAD = 7


@st.composite
def corpora(draw):
    """(L, documents): each document a list of (token, is it trained), of 1 to L tokens, all tokens different."""
    length = draw(st.integers(2, 12))
    sizes = draw(st.lists(st.integers(1, length), min_size=1, max_size=30))
    masks = draw(st.lists(st.booleans(), min_size=sum(sizes), max_size=sum(sizes)))
    flat = [(100 + index, trained) for index, trained in enumerate(masks)]
    bounds = np.cumsum([0, *sizes])
    return length, [flat[start:end] for start, end in itertools.pairwise(bounds)]


def packed(length, documents):
    """Return the rows of documents: tokens and flags, (N, L)."""
    lengths = np.array([len(document) for document in documents])
    flat = [item for document in documents for item in document]
    tokens = np.array([token for token, _ in flat], np.int32)
    trained = np.array([is_trained for _, is_trained in flat], np.uint8)
    packing = pack(np.cumsum(lengths) - lengths, lengths, length)
    parts = list(build_rows(packing, tokens, trained, PAD))
    covered = [row for rows, _, _ in parts for row in range(rows.start, rows.stop)]
    assert covered == list(range(packing.num_rows))
    return np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def naive_rows(length, documents):
    """Return the rows by their definition, one token at a time: (tokens, labels, positions) of each."""
    lengths = np.array([len(document) for document in documents])
    row_of = assign_rows(lengths, length).tolist()
    rows = []
    for row in range(max(row_of) + 1):
        tokens, labels, positions = [], [], []
        for document in (document for document, its_row in zip(documents, row_of, strict=True) if its_row == row):
            for position, (token, _) in enumerate(document):
                is_last = position == len(document) - 1
                target, trained = (None, False) if is_last else document[position + 1]
                tokens.append(token)
                labels.append(target if trained else -100)
                positions.append(position)
        padding = length - len(tokens)
        rows.append((tokens + [PAD] * padding, labels + [-100] * padding, positions + list(range(padding))))
    return rows


def read_row(tokens, flags):
    """Read the flags one position at a time: (tokens, labels, positions)."""
    labels = [int(tokens[t + 1]) if flag & TRAINED else -100 for t, flag in enumerate(flags.tolist())]
    positions = []
    for flag in flags.tolist():
        positions.append(0 if flag & STARTS else positions[-1] + 1)
    return tokens.tolist(), labels, positions


@settings(deadline=None, max_examples=200)
@given(corpora())
def test_rows_equal_the_definition_written_out_token_by_token(corpus):
    length, documents = corpus
    tokens, flags = packed(length, documents)
    assert [read_row(*row) for row in zip(tokens, flags, strict=True)] == naive_rows(length, documents)
