"""Test the space of a sweep in Hydra's grammar, and a trial's values as overrides of `distlora train`."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from distlora.config import UserError
from distlora.run_folder.sweep import words_of
from distlora_launcher.compose.compose import parse_overrides
from distlora_launcher.studies.sweep import (
    Dimension,
    Interval,
    Values,
    as_records,
    cells,
    count_cells,
    from_records,
    is_finite,
    split,
)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lr=1e-4,2e-4", Values("optim.lr", (1e-4, 2e-4))),
        ("adapter.r=range(8,33,step=8)", Values("adapter.r", (8, 16, 24, 32))),
        ("adapter.target_modules=qv,[q_proj,k_proj]", Values("adapter.target_modules", ("qv", ["q_proj", "k_proj"]))),
        ("++adapter.rank_pattern={down_proj:4},{}", Values("adapter.rank_pattern", ({"down_proj": 4}, {}))),
        ("adapter.use_rslora=true,false", Values("adapter.use_rslora", (True, False))),
        ("data.eval_path=null,'a b.jsonl'", Values("data.eval_path", (None, "a b.jsonl"))),
        ("quant=glob(n*)", Values("quant", ("nf4", "none"))),
        ("optim.lr=interval(1e-5,1e-3)", Interval("optim.lr", 1e-5, 1e-3)),
        ("optim.lr=tag(log,interval(1e-5,1e-3))", Interval("optim.lr", 1e-5, 1e-3, log=True)),
        ("adapter.r=interval(8,64)", Interval("adapter.r", 8, 64, integer=True)),
        ("train.max_steps=interval(10,20)", Interval("train.max_steps", 10, 20, integer=True)),
        ("adapter.lora_alpha=interval(8,64)", Interval("adapter.lora_alpha", 8, 64)),
        ("optim.lr=int(interval(1,3))", Interval("optim.lr", 1, 3, integer=True)),
        ("adapter.r=tag(log,int(interval(1,256)))", Interval("adapter.r", 1, 256, log=True, integer=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hydras_grammar_says_what_is_searched(word: str, expected: Dimension):
    space, shared = split([word, "train.seed=3"], {})
    assert space == (expected,)
    assert shared == ["train.seed=3"]
    assert from_records(as_records(space)) == space


def test_words_of_the_command_line_go_before_the_settings_of_a_file():
    space, shared = split(
        ["adapter.r=4,8", "optim.eps=1e-6", "train.seed=0,1"],
        {"optim.lr": "1e-4,2e-4", "adapter.r": "16,32", "optim.eps": "1e-8,1e-7"},
    )
    assert space == (Values("optim.lr", (1e-4, 2e-4)), Values("adapter.r", (4, 8)), Values("train.seed", (0, 1)))
    assert shared == ["optim.eps=1e-6"]


def test_cells_come_in_hydras_order():
    space = (Values("a", (1, 2)), Values("b", ("x", "y")))
    assert list(cells(space)) == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert count_cells(space) == 4
    assert is_finite(space)
    assert not is_finite((*space, Interval("c", 0, 1)))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lr=interval(1e-3,1e-5)", "write the smaller number first"),
        ("optim.lr=tag(log,interval(0,1))", "must start above 0"),
        ("optim.lr=tag(lgo,interval(1,2))", "unknown tag lgo"),
        ("adapter.r=interval(7.5,64)", "adapter.r is an integer"),
        ("adapter.r=8,16,8", "has 8 twice; leave one out"),
        ("run_dir=a,b", "run_dir is a setting of the sweep"),
        ("hydra.run.dir=a,b", "is a setting of the sweep"),
    ],
)
def test_what_cannot_be_searched_is_refused(word: str, expected: str):
    with pytest.raises(UserError, match=r".*") as refused:
        split([word], {})
    assert expected in str(refused.value)
    with pytest.raises(UserError, match=r"one value for optim\.lr"):
        split([], {"optim.lr": "1e-4"})


TEXTS = st.text(st.characters(codec="ascii", min_codepoint=32, exclude_characters="$"), min_size=1, max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = (
    SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), SCALARS)
)


@hypothesis.given(VALUES)
@hypothesis.settings(max_examples=40, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.example("it's \\")
@hypothesis.example("\\'")
@hypothesis.example("1e-4")
@hypothesis.example("null")
@hypothesis.example(["a,b", None, 1e-05])
@hypothesis.example({"down_proj": 4})
def test_hydra_reads_a_trials_words_as_its_values(value: Any):
    (override,) = parse_overrides(words_of({"setting": value}))
    assert override.value() == value
    assert type(override.value()) is type(value)
