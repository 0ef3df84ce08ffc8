"""Which tokens of a document are trained, with real tokenizers and chat templates."""

import itertools

import numpy as np
import pytest

from data_folders import CHATML, MARKED, chat, write_model
from distlora.config import UserError
from distlora.data.formats import Document
from distlora.data.templates import Encoder

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ 'Thought. ' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Like Qwen3's: the last assistant turn is written otherwise once it is no longer the last."""

CONVERSATION = chat("Hello!", "It is Paris.", "How many birds?", "There are seven.", "Seven?")


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """load(template, **options) -> tokenizer, saved and loaded again."""
    from transformers import AutoTokenizer

    number = itertools.count()

    def build(template, **options):
        folder = write_model(tmp_path_factory.mktemp("model") / str(next(number)), template, **options)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    return build


def encode(tokenizer, format, *values):
    """[(tokens, trained)] of documents on the lines 1, 2, ..."""
    documents = [Document(line, 1, value) for line, value in enumerate(values, start=1)]
    encoder = Encoder(tokenizer, format, "data.jsonl", "MODEL")
    encoded = [(tokens, trained) for tokens, trained in encoder.encode(documents)]
    assert {(tokens.dtype, trained.dtype) for tokens, trained in encoded} == {(np.dtype("int32"), np.dtype("uint8"))}
    return encoded


def trained_text(tokenizer, tokens, trained):
    """The trained stretches of a document as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained, [0]])))
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefix", "by the template's mask"])
def test_the_assistants_turns_are_trained_up_to_their_end_of_turn_and_no_further(load, template):
    tokenizer = load(template)
    ((tokens, trained),) = encode(tokenizer, "chat", CONVERSATION)
    assert tokens.tolist() == tokenizer.apply_chat_template(CONVERSATION["messages"], return_dict=False)
    assert trained_text(tokenizer, tokens, trained) == ["It is Paris.<|im_end|>", "There are seven.<|im_end|>"]


def test_both_ways_to_find_the_turns_agree_on_every_token(load):
    conversations = [
        CONVERSATION,
        chat("A", ""),
        chat("only a question"),
        {"messages": [{"role": "system", "content": "Be\n\nkind. "}, *CONVERSATION["messages"]]},
        {"messages": [*chat("Hi", "One.")["messages"], {"role": "assistant", "content": "Two."}]},
        chat("caf\u00e9 \U0001f600", "\U0001f600 na\u00efve"),
    ]
    by_prefix, by_mask = encode(load(CHATML), "chat", *conversations), encode(load(MARKED), "chat", *conversations)
    for (tokens, trained), (mask_tokens, mask_trained) in zip(by_prefix, by_mask, strict=True):
        assert np.array_equal(tokens, mask_tokens)
        assert np.array_equal(trained, mask_trained)


def test_a_template_without_special_tokens_in_its_turns_is_trained_to_the_turns_end(load):
    tokenizer = load(LLAMA2)
    ((tokens, trained),) = encode(tokenizer, "chat", chat("Hello!", "It is Paris.", "Seven?", "Yes."))
    assert trained_text(tokenizer, tokens, trained) == [" It is Paris. <|eos|>", " Yes. <|eos|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_by_line_and_turn(load):
    tokenizer = load(FORGETFUL)
    ((tokens, trained),) = encode(tokenizer, "chat", chat("Hello!", "It is Paris."))
    assert trained_text(tokenizer, tokens, trained) == ["Thought. It is Paris.<|im_end|>"]
    with pytest.raises(UserError, match=r"data\.jsonl:2: messages\[1\]: the chat template in MODEL rewrites this turn"):
        encode(tokenizer, "chat", chat("Hello!", "It is Paris."), CONVERSATION)


def test_a_turn_whose_first_token_reaches_into_the_prompt_is_refused(load):
    r"""The tokenizer has a token for the first two newlines of 'assistant\n' + '\n\nHello'."""
    tokenizer = load(CHATML)
    assert len(tokenizer("\n\n").input_ids) == 1
    with pytest.raises(UserError, match=r"data\.jsonl:1: messages\[1\]: the tokenizer joins .* strip the white space"):
        encode(tokenizer, "chat", chat("Hi", "\n\nHello"))


def test_a_conversation_that_the_template_refuses_is_named_with_its_reason(load):
    values = [chat("Hi", "Hello"), {"messages": [{"role": "system", "content": "x"}]}]
    with pytest.raises(UserError, match=r"data\.jsonl:2: the chat template refuses .*: only user and assistant"):
        encode(load(LLAMA2), "chat", *values)


def test_an_assistant_that_speaks_first_needs_a_template_that_marks_it(load):
    value = chat("Welcome.", "Hi", "Hello", first="assistant")
    with pytest.raises(UserError, match=r"data\.jsonl:1: the conversation begins with the assistant"):
        encode(load(CHATML), "chat", value)
    tokenizer = load(MARKED)
    ((tokens, trained),) = encode(tokenizer, "chat", value)
    assert trained_text(tokenizer, tokens, trained) == ["Welcome.<|im_end|>", "Hello<|im_end|>"]


def test_chat_without_a_template_is_refused(load):
    with pytest.raises(UserError, match="MODEL has no chat template"):
        encode(load(None), "chat", CONVERSATION)


@pytest.mark.parametrize("format", ["text", "prompt_completion"])
def test_a_tokenizer_without_an_end_of_text_is_refused_where_one_is_appended(load, format):
    tokenizer = load(CHATML, eos=False)
    with pytest.raises(UserError, match=r'set "eos_token" in MODEL/tokenizer_config\.json'):
        Encoder(tokenizer, format, "data.jsonl", "MODEL")


@pytest.mark.parametrize("bos", [False, True])
def test_a_completion_is_trained_with_its_end_of_text_from_an_exact_boundary(load, bos):
    r"""Joined, '\n' + '\n\n' would begin with a token of two; apart, the prompt is what it is at inference."""
    tokenizer = load(None, bos=bos)
    ((tokens, trained),) = encode(tokenizer, "prompt_completion", {"prompt": "Hello!\n", "completion": "\n\nParis."})
    prompt = tokenizer("Hello!\n").input_ids
    assert tokens[: len(prompt)].tolist() == prompt
    assert trained.tolist() == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
    assert tokenizer.decode(tokens[len(prompt) :].tolist()) == "\n\nParis.<|eos|>"
    assert tokens.tolist().count(tokenizer.convert_tokens_to_ids("<|bos|>")) == bos


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_of_a_text_is_trained_and_an_end_of_text_is_appended(load, bos):
    tokenizer = load(None, bos=bos)
    (tokens, trained), (empty, _) = encode(tokenizer, "text", {"text": "The lazy dog."}, {"text": ""})
    assert tokens.tolist() == [*tokenizer("The lazy dog.").input_ids, tokenizer.eos_token_id]
    assert trained.all()
    assert len(empty) == 1 + bos


def test_truncation_and_padding_saved_with_a_tokenizer_have_no_say(load, tmp_path):
    tokenizer = load(None)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    ((tokens, _),) = encode(tokenizer, "text", {"text": "The quick brown fox jumps over the lazy dog. " * 3})
    assert len(tokens) > 20
    assert tokenizer.pad_token_id not in tokens
