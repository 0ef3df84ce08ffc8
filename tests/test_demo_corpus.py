"""The demo's text and questions: enough of it, on one side only, the same each time; and its tokenizer and template."""

import ast

import pytest

from distlora_launcher.demo import corpus, initial_model


@pytest.fixture(scope="module")
def built():
    return corpus.build_corpus()


@pytest.fixture(scope="module")
def tokenizer(built):
    return initial_model.train_tokenizer(built.pretraining[:2000])


def test_no_answer_is_on_two_sides(built):
    answers = {
        side: {corpus.fingerprint(messages[1]["content"]) for messages in getattr(built, side)}
        for side in ("pairs", "held_out")
    }
    assert answers["pairs"].isdisjoint(answers["held_out"])
    openings = {corpus.fingerprint(corpus.first_paragraph(text)) for text in built.pretraining}
    assert openings.isdisjoint(answers["pairs"] | answers["held_out"])
    assert len({corpus.fingerprint(text) for text in built.pretraining}) == len(built.pretraining)


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
