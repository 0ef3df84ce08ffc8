"""The demo's text and questions: enough of it, on one side only, the same each time; and its tokenizer and template."""

import ast
import json

import pytest

from distlora_launcher.demo import base, corpus, initial_model, run


@pytest.fixture(scope="module")
def built():
    return corpus.build_corpus()


@pytest.fixture(scope="module")
def tokenizer(built):
    return initial_model.train_tokenizer(built.pretraining[:2000])


def test_there_is_enough_text(built):
    assert sum(map(len, built.pretraining)) > 1_200_000
    assert len(built.pairs) > 1000
    assert 80 < len(built.held_out) < len(built.pairs) / 5


@pytest.mark.ci
def test_the_text_is_the_same_each_time(built):
    assert built == corpus.build_corpus()


def test_no_answer_is_on_two_sides(built):
    answers = {
        side: {corpus.fingerprint(messages[1]["content"]) for messages in getattr(built, side)}
        for side in ("pairs", "held_out")
    }
    assert answers["pairs"].isdisjoint(answers["held_out"])
    openings = {corpus.fingerprint(corpus.first_paragraph(text)) for text in built.pretraining}
    assert openings.isdisjoint(answers["pairs"] | answers["held_out"])
    assert len({corpus.fingerprint(text) for text in built.pretraining}) == len(built.pretraining)


def test_clean_leaves_plain_english_and_code():
    text = """Return *x* as ``int``; see :func:`~os.path.join` and **both**.

    >>> f(1)
    2

Notes
=====
2 * 3 * 4 and **kwargs stay."""
    assert corpus.clean(text) == (
        "Return x as `int`; see `os.path.join` and both.\n\nNotes\n2 * 3 * 4 and **kwargs stay."
    )


def test_names_and_signatures_are_those_a_reader_would_type():
    source = '''
class Box:
    """A box."""
    def put(self, item: object, *, twice: bool = False) -> None:
        """Put an item in."""
    @classmethod
    def empty(cls):
        """An empty one."""
async def ship(*boxes, **options):
    """Send boxes."""
    def inner():
        """Not reachable."""
'''
    found = list(corpus.docstrings_of(ast.parse(source), "store"))
    assert [(docstring.name, docstring.signature) for docstring in found] == [
        ("store.Box", None),
        ("store.Box.put", "(item, *, twice=False)"),
        ("store.Box.empty", "()"),
        ("store.ship", "(*boxes, **options)"),
    ]


def test_the_template_marks_exactly_the_answer_and_its_end(built, tokenizer):
    for messages in built.held_out[:20]:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = [t for t, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(trained) == messages[1]["content"] + initial_model.END
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert encoded["input_ids"] == prompt + trained  # what is trained is what generation has to write


def test_the_initial_model_is_an_ordinary_folder(built, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    initial_model.write_initial_model(tmp_path, built.pretraining[:500])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert (loaded.eos_token, loaded.pad_token) == (initial_model.END, initial_model.PAD)
    assert loaded.chat_template == initial_model.CHAT_TEMPLATE
    text = "Return a = b[0];\n  caf\u00e9 \u2014 \U0001f40d"
    assert loaded.decode(loaded(text).input_ids) == text
    assert model.config.eos_token_id == loaded.eos_token_id


def test_another_text_makes_another_base_in_the_cache_that_is_asked_for(built, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))
    folder = base.base_folder(built)
    assert folder.parent == tmp_path / "demo"
    assert folder == base.base_folder(built)
    other = corpus.Corpus([*built.pretraining, "more"], built.pairs, built.held_out)
    assert folder != base.base_folder(other)
    monkeypatch.delenv("DISTLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert base.base_folder(built).parent == tmp_path / "xdg" / "distlora" / "demo"


def test_written_documents_are_what_train_reads(built, tmp_path):
    built.write(tmp_path)
    texts = [json.loads(line) for line in (tmp_path / "pretraining.jsonl").read_text().splitlines()]
    assert [document["text"] for document in texts] == built.pretraining
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [[m["role"] for m in document["messages"]] for document in pairs] == [["user", "assistant"]] * len(pairs)


FIGURES = {
    "base_eval_loss": 6.0,
    "eval_loss": 4.0,
    "bits_per_parameter": 4.127,
    "gathered_bytes_per_step": 1_000_000,
    "gathered_bytes_per_step_bf16": 3_500_000,
    "reduced_bytes_per_step": 300_000,
    "peak_memory_bytes": 400 * 2**20,
    "adapter_bytes": 600_000,
    "trainable_parameters": 150_000,
    "train_seconds": 60.4,
    "tokens_per_second": 4321.0,
}


def test_the_table_states_what_was_measured():
    text = run.table(FIGURES, ranks=2, seconds=200)
    for shown in (
        "6.000",
        "4.000",
        "4.127 bits",
        "976.6 KiB",
        "3.3 MiB",
        "3.5x",
        "400.0 MiB",
        "150,000",
        "60 s at 4,321",
    ):
        assert shown in text
    assert "7.4 times" in run.verdict(FIGURES)
    assert "should" in run.verdict(FIGURES | {"eval_loss": 6.5})


def test_one_process_gathers_nothing():
    alone = {"gathered_bytes_per_step": 0, "gathered_bytes_per_step_bf16": 0, "reduced_bytes_per_step": 0}
    assert "none" in run.table(FIGURES | alone, ranks=1, seconds=200)
