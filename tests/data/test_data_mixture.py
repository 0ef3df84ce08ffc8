"""Mixtures: shares of the trained tokens, what is left out or repeated, and that choices depend on the data alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlora.config import Config, DataConfig, ModelConfig, SourceConfig, TrainConfig
from distlora.data.packing import Mixture, copies
from distlora.data.prepare import summary
from distlora.data.rows import PackedRows, read_meta
from support.data_folders import CHATML, chat, prepare, write_lines, write_model


@st.composite
def mixtures(draw):
    """(targets (P,), sources (P,), weights): every source has a piece."""
    num_sources = draw(st.integers(1, 4))
    sizes = [draw(st.lists(st.integers(1, 50), min_size=1, max_size=40)) for _ in range(num_sources)]
    weights = draw(st.lists(st.floats(0.05, 20), min_size=num_sources, max_size=num_sources))
    sources = np.repeat(np.arange(num_sources), [len(size) for size in sizes])
    return np.concatenate(sizes).astype(np.int64), sources, weights


@settings(deadline=None, max_examples=200)
@given(mixtures(), st.booleans())
def test_every_source_misses_its_share_by_less_than_a_piece(mixture, until_all):
    targets, sources, weights = mixture
    wanted = np.array(weights) / sum(weights)
    sizes = np.bincount(sources, weights=targets)
    whole = Mixture(wanted, until_all, 0.0, 3).volume(sizes, np.ones(len(sizes), bool))
    used = copies(targets, sources, wanted, whole, seed=3)
    got = np.bincount(sources, weights=targets * used)
    for source, share in enumerate(wanted):
        assert abs(got[source] - share * whole) <= targets[sources == source].max()
    if until_all:
        assert used.min() >= 1, "every document at least once"
    else:
        assert used.max() == 1, "no document twice"
        limiting = int(np.argmin(sizes / wanted))
        assert got[limiting] == sizes[limiting], "the first source to end is used up"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture
def prepared(tmp_path, model):
    """Return a function that prepares sources: meta.json and the cache entry."""

    def run(sources, *, model_path=model, max_steps=None, sequence_length=64, **data):
        config = Config(
            model=ModelConfig(path=str(model_path)),
            data=DataConfig(
                sources=tuple(SourceConfig(**source) for source in sources),
                sequence_length=sequence_length,
                cache_dir=str(tmp_path / "cache"),
                **data,
            ),
            train=TrainConfig(max_steps=max_steps, global_batch=4),
            run_dir=str(tmp_path / "run"),
        )
        entry = prepare(config)
        return read_meta(entry), entry

    return run


@pytest.fixture
def two_sources(tmp_path):
    """Return a chat file of some 600 trained tokens and a text file of some 6,000."""
    chats = write_lines(tmp_path / "chats.jsonl", [chat(f"Why {n}?", f"Foxes sleep {n} times.") for n in range(40)])
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": f"{n} birds sit in the old tree. " * 3} for n in range(80)])
    return chats, texts


def mixed(two_sources, *weights):
    return [{"path": str(path), "weight": weight} for path, weight in zip(two_sources, weights, strict=True)]


def test_first_exhausted_uses_the_largest_part_that_has_the_shares(prepared, two_sources):
    meta, entry = prepared(mixed(two_sources, 3, 1), eval_fraction=0.2)
    for split, counts in meta["splits"].items():
        chats, texts = counts["sources"]
        assert chats["share_wanted"] == 0.75
        assert abs(chats["share"] - 0.75) < (0.02 if split == "train" else 0.1)
        assert chats["targets"] + texts["targets"] == counts["targets"]
        assert PackedRows.open(entry, split).targets.sum() == counts["targets"]
        assert chats["documents"] + texts["documents"] == counts["documents"]
        assert counts["unused"] > 0, "texts that the shares leave out"
    documents = [meta["splits"][split]["sources"][0]["documents"] for split in ("train", "eval")]
    assert sum(documents) == 40, "the smaller source is used up, in both splits"


def test_all_exhausted_repeats_the_smaller_source_and_leaves_nothing_out(prepared, two_sources):
    meta, _ = prepared(mixed(two_sources, 1, 1), eval_fraction=0, stopping_strategy="all_exhausted")
    counts = meta["splits"]["train"]
    chats, texts = counts["sources"]
    assert (chats["documents"], texts["documents"], counts["unused"]) == (40, 80, 0)
    assert chats["most_copies"] > 1
    assert texts["most_copies"] == 1
    assert abs(chats["share"] - 0.5) < 0.01


def test_without_weights_every_source_is_taken_whole(prepared, two_sources):
    meta, entry = prepared([{"path": str(path)} for path in two_sources], eval_fraction=0)
    counts = meta["splits"]["train"]
    assert [source["documents"] for source in counts["sources"]] == [40, 80]
    assert counts["sources"][0]["share_wanted"] is None
    record = {**meta, "cache": str(entry), "reused": False}
    assert "40 documents" in summary(record)
    assert "chats.jsonl" in summary(record)


def test_a_streamed_mixture_reads_both_sources_as_far_as_their_shares_need(prepared, two_sources, tmp_path):
    many = write_lines(tmp_path / "many.jsonl", [{"text": f"{n} birds sit in the tree. " * 3} for n in range(5000)])
    sources = mixed((two_sources[0], many), 1, 3)
    meta, _ = prepared(sources, streaming=True, max_steps=5, eval_fraction=0.1)
    counts = meta["splits"]["train"]
    assert counts["rows"] >= 20
    assert counts["sources"][1]["documents"] < 300
    assert abs(counts["sources"][0]["share"] - 0.25) < 0.05
    assert meta["ended"] == [False, False]

    meta, _ = prepared(sources, streaming=True, max_steps=100, eval_fraction=0, stopping_strategy="all_exhausted")
    counts = meta["splits"]["train"]
    assert counts["rows"] >= 400
    assert meta["ended"] == [True, False]
    assert counts["sources"][0]["most_copies"] > 1
    assert counts["sources"][1]["most_copies"] == 1
    assert abs(counts["sources"][0]["share"] - 0.25) < 0.02

    meta, _ = prepared(sources, streaming=True, max_steps=100, eval_fraction=0)
    counts = meta["splits"]["train"]
    assert meta["ended"] == [True, False], "reading on would not help: the first source ends the mixture"
    assert counts["sources"][0]["documents"] == 40
    assert counts["sources"][1]["documents"] < 300
