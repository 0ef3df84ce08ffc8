"""The trained tokens of a document, with real tokenizers and chat templates."""

import itertools
import json
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distlora.config import DataConfig, UserError
from distlora.data import chat_template
from distlora.data.chat_template import NAMED, ChatTemplate, template_source
from distlora.data.encoding import Encoder, TurnTokens
from distlora.data.formats import Document
from distlora.data.turns import Conversation, Turn
from support.chat_tokenizers import KINDS, chat_tokenizer
from support.data_folders import CHATML, MARKED, chat, write_model

GOLDEN = Path(__file__).parents[1] / "golden"
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
    """Return a function that saves a tokenizer with a template and loads it again."""
    from transformers import AutoTokenizer

    number = itertools.count()

    def build(template, **options):
        folder = write_model(tmp_path_factory.mktemp("model") / str(next(number)), template, **options)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    return build


def encode(tokenizer, *values, **options):
    """[(tokens, trained)] of documents at the places data.jsonl:1, data.jsonl:2, ..."""
    documents = [Document(f"data.jsonl:{line}", 1, value) for line, value in enumerate(values, start=1)]
    encoder = Encoder(tokenizer, "MODEL", DataConfig(path="data.jsonl", **options))
    encoded = [(document.tokens, document.trained) for document in encoder.encode(documents)]
    assert {(tokens.dtype, trained.dtype) for tokens, trained in encoded} == {(np.dtype("int32"), np.dtype("uint8"))}
    return encoded


def segments(tokenizer, tokens, trained):
    """Return a document as [text, trained] stretches."""
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
    return [[tokenizer.decode(tokens[a:b].tolist()), bool(trained[a])] for a, b in itertools.pairwise(edges)]


def trained_text(tokenizer, tokens, trained):
    """Return the trained stretches of a document as text."""
    return [text for text, is_trained in segments(tokenizer, tokens, trained) if is_trained]


def merged(golden):
    """Neighbouring segments of the same kind as one: the files break lines where a reader wants them."""
    return [
        ["".join(text for text, _ in group), is_trained]
        for is_trained, group in itertools.groupby(golden, key=lambda segment: segment[1])
    ]


GOLDEN_CASES = [
    pytest.param(template, case, train_on, id=f"{template}: {case['case']}, train_on={train_on}")
    for template in ("chatml", "llama3", "mistral", "gemma")
    for case in json.loads((GOLDEN / f"masks_{template}.json").read_text())
    for train_on in ("assistant", "last", "all")
    if train_on in case
]


@pytest.mark.parametrize(("template", "case", "train_on"), GOLDEN_CASES)
def test_the_trained_tokens_are_those_marked_by_hand(template, case, train_on):
    tokenizer = chat_tokenizer()
    value = {key: case[key] for key in ("messages", "tools") if key in case}
    (encoded,) = encode(tokenizer, value, template=template, train_on=train_on)
    assert segments(tokenizer, *encoded) == merged(case[train_on])


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_a_named_template_writes_turns_as_its_family_does(name, kind):
    golden = json.loads((GOLDEN / "chat_layouts.json").read_text())
    expected = golden["as the families write them, with the prompt for the next turn"][name]
    template = ChatTemplate(chat_tokenizer(kind), "MODEL", name)
    text = template.render("data.jsonl:1", golden["messages"], prompt=True)
    # The beginning of text is written where the tokenizer itself puts it in front of texts; Llama 2's is in the layout.
    if name != "llama2":
        expected = ("<s>" if kind == "llama3" else "") + expected.removeprefix("<s>")
    assert text == expected


PEERS = json.loads((GOLDEN / "peer_layouts.json").read_text())


@pytest.mark.parametrize("name", [f"{peer}: {name}" for peer in PEERS for name in PEERS[peer] if " " in peer])
def test_a_name_of_a_peer_writes_what_the_peer_writes_or_differs_for_a_reason(name):
    """The peers' own text, but for the beginning of text and the line break after the last turn."""
    peer, own_name = name.split(": ")
    text = ChatTemplate(chat_tokenizer(), "MODEL", own_name).render("data.jsonl:1", PEERS["messages"])
    is_same = text.removeprefix("<s>").rstrip("\n") == PEERS[peer][own_name].removeprefix("<s>").rstrip("\n")
    assert is_same != (name in PEERS["differs"])


def test_every_name_of_axolotls_chat_templates_has_a_meaning():
    names = (
        "alpaca chatml mistral_v1 mistral_v2v3 mistral_v3_tekken mistral_v7_tekken gemma cohere llama3 llama3_2_vision "
        "llama4 phi_3 phi_35 deepseek_v2 deepseek_v3 jamba qwen_25 qwen3 qwen3_5 falcon_h1 nemotron_h "
        "tokenizer_default exaone exaone4 pixtral llava qwen2_vl gemma3 gemma3n gemma4 gemma4_unified command_a "
        "command_a_tool_use command_a_rag aya tokenizer_default_fallback_chatml"
    )
    for name in names.split():  # All of its enum but jinja, which is a file here, and metharme.
        assert template_source(name) is None or "generation" in template_source(name)


def test_a_name_of_the_tokenizers_own_template_is_checked_against_it(load):
    own = ChatTemplate(load(CHATML), "MODEL", "qwen3_5")
    assert own.source is None
    assert own.name == "the chat template in MODEL (data.template=qwen3_5)"
    with pytest.raises(UserError, match=r"template=gemma4 means .*never writes <\|turn>; set data.template=null"):
        ChatTemplate(load(CHATML), "MODEL", "gemma4")
    with pytest.raises(UserError, match=r"no chat template, which data.template=tokenizer_default means; set"):
        ChatTemplate(load(None), "MODEL", "tokenizer_default")
    assert ChatTemplate(load(CHATML), "MODEL", "tokenizer_default_fallback_alpaca").source is None
    fallback = ChatTemplate(load(None), "MODEL", "tokenizer_default_fallback_qwen_25")
    assert fallback.source == ChatTemplate(load(None), "MODEL", "qwen25").source
    assert fallback.name.endswith("(qwen25)")


def test_qwen3_writes_reasoning_once_wherever_it_stands(load):
    thought = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}
    inside = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello"}
    for answer in (thought, inside):
        tokenizer = load(None)
        value = {"messages": [{"role": "user", "content": "Hi"}, answer]}
        (encoded,) = encode(tokenizer, value, template="qwen3")
        assert trained_text(tokenizer, *encoded) == ["<think>\nHm.\n</think>\n\nHello<|im_end|>"]


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_trains_the_same_tokens_by_its_marks_and_by_its_prefixes(name, tmp_path):
    """Without its marks the template is judged by what it writes: so the marks are where the prompts end."""
    unmarked = tmp_path / "unmarked.jinja"
    source = ChatTemplate(chat_tokenizer(), "MODEL", name).source
    unmarked.write_text(source.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""))
    values = [
        chat("Hi", "Hello there."),
        {"messages": [{"role": "system", "content": "Be\nbrief."}, *CONVERSATION["messages"]]},
        chat("A\n\nB", "- one\n- two\n\n```\nx = 1\n```", "C", "\u00e9 \U0001f600", "D", "3"),
    ]
    for train_on in ("assistant", "last"):
        by_marks = encode(chat_tokenizer(), *values, template=name, train_on=train_on)
        by_prefix = encode(chat_tokenizer(), *values, template=str(unmarked), train_on=train_on)
        for (tokens, trained), (prefix_tokens, prefix_trained) in zip(by_marks, by_prefix, strict=True):
            assert np.array_equal(tokens, prefix_tokens)
            assert np.array_equal(trained, prefix_trained)
            assert trained.any()


PIECES = ["<|im_start|>", "<|im_end|>", "</s>", "[INST]", " ", "  ", "\n", "\n\n", "a", "the", "Hello", "'t", "1", "23"]
PIECES += ["4567", "\u00e9", "\U0001f600", ".", "\u2581", "<|im_", "user"]


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=12), data=st.data())
def test_a_turns_ends_are_where_the_text_up_to_them_tokenized_by_itself_ends(kind, pieces, data):
    """The short cut (from the last special token on) against the whole: every text, cut anywhere."""
    tokenizer = chat_tokenizer(kind)
    text = "".join(pieces)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    tokenize = lambda part: tokenizer(part, add_special_tokens=False).input_ids  # noqa: E731
    whole, before, until = tokenize(text), tokenize(text[:start]), tokenize(text[:end])
    conversation = Conversation(
        place="x:1", text=text, turns=(Turn(message=0, start=start, end=end),), marked=False, inverse=True
    )
    turns = TurnTokens(tokenizer, ChatTemplate(tokenizer, "MODEL", "zephyr"))
    if whole[: len(before)] == before and whole[: len(until)] == until:
        (encoded,) = turns.encode([conversation])
        tokens, trained = encoded.tokens, encoded.trained
        assert tokens.tolist() == whole
        outside = [1] * len(before) + [0] * (len(until) - len(before)) + [1] * (len(whole) - len(until))
        assert trained.tolist() == outside[: len(whole)]
    else:
        with pytest.raises(UserError, match="the tokenizer merges"):
            list(turns.encode([conversation]))


def test_the_last_turn_can_be_trained_with_a_template_that_rewrites_earlier_ones(load):
    """The prompt is the conversation as the template writes it at inference: earlier turns without their thoughts."""
    tokenizer = load(FORGETFUL)
    (encoded,) = encode(tokenizer, CONVERSATION, train_on="last")
    prompt = tokenizer.apply_chat_template(CONVERSATION["messages"][:3], tokenize=False, add_generation_prompt=True)
    assert "Thought." not in prompt
    assert segments(tokenizer, *encoded) == [
        [prompt, False],
        ["Thought. There are seven.<|im_end|>", True],
        ["\n", False],
    ]


@pytest.mark.parametrize("mask", [{"weight": 0}, {"loss": False}, {"loss_weight": 0.0}, {"training": False}])
def test_masks_of_other_tools_are_honoured(load, mask):
    value = chat("Hi", "Hello there.", "Bye", "See you.")
    for message in value["messages"]:
        (name,) = mask
        message[name] = 1 if message["role"] == "assistant" else 0
    masked, ours = (json.loads(json.dumps(value)) for _ in range(2))
    masked["messages"][1] |= mask
    for message in ours["messages"]:
        del message[name]
    ours["messages"][1]["train"] = False
    found, expected, whole = encode(load(CHATML), masked, ours, value)
    assert np.array_equal(found[1], expected[1])
    assert found[1].sum() < whole[1].sum()


def test_marks_without_the_end_of_turn_token_are_extended_to_it(load):
    inside = "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    assert inside in MARKED
    template = MARKED.replace(inside, "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")
    for train_on in ("assistant", "last"):
        (encoded,) = encode(load(template), CONVERSATION, train_on=train_on)
        (expected,) = encode(load(MARKED), CONVERSATION, train_on=train_on)
        assert np.array_equal(encoded[0], expected[0])
        assert np.array_equal(encoded[1], expected[1])


@pytest.mark.parametrize("header", ["", "<|im_start|>", "<|im_start|>assistant", "<|im_start|>assistant\n"])
def test_marks_that_take_in_the_header_or_the_line_break_after_the_turn_are_cut(load, header):
    """Marks that begin inside of the header, behind `header`; published templates do both (SmolLM3, TRL's Qwen 2.5)."""
    inside = "<|im_start|>assistant\n".removeprefix(header)
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '" + header + "' }}{% generation %}"
        "{{ '" + inside + "' + m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = load(template)
    for value in (CONVERSATION, chat("Welcome.", "How many birds?", "Seven.", first="assistant")):
        ((tokens, trained),) = encode(tokenizer, value)
        answers = [m["content"] + "<|im_end|>" for m in value["messages"] if m["role"] == "assistant"]
        assert trained_text(tokenizer, tokens, trained) == answers


CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def answered(content, **more):
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content, **more}]}


def masked(flag):
    return {"messages": [{"role": "user", "content": "Hi", "train": flag}, *chat("x", "Hello")["messages"][1:]]}


ONE_MARK = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
LEFT_OUT = r"leaves out the tool 'weather'; remove 'tools', or set data\.template to one"
SHORTENED = "(m['content'] or '')[:12]"
REFUSED = [
    # (the tokenizer's template, options, documents, what the message says)
    (FORGETFUL, {}, [chat("Hi", "A."), CONVERSATION], r"l:2: messages\[1\]: .* rewrites this turn.*train_on=last"),
    (CHATML, {"train_on": "assistant"}, [masked(True)], r"l:1: messages\[0\]: train=True on a message of the user"),
    (CHATML, {"train_on": "all"}, [masked(False)], r"l:1: messages\[0\]: train=False on a message of the user"),
    (ONE_MARK, {}, [CONVERSATION], r"l:1: .* marks 1 parts with {% generation %} for 2 turns"),
    (LLAMA2, {}, [{"messages": [{"role": "system", "content": "x"}]}], r"l:1: .* only user and assistant"),
    (CHATML, {}, [chat("A.", "Hi", "B", first="assistant")], r"l:1: the conversation begins with the assistant"),
    (None, {}, [CONVERSATION], r"MODEL has no chat template.*set data.template to chatml, zephyr, vicuna, alpaca"),
    (CHATML, {"template": "llama3"}, [CONVERSATION], r"<\|eot_id\|>, .* lacks; set .* to chatml, .* or null"),
    (CHATML, {"template": "llama2"}, [CONVERSATION], r"data\.template=llama2 needs a beginning-of-text token"),
    (CHATML, {"template": "chatlm"}, [CONVERSATION], r"='chatlm' is not a known template \(did you mean 'chatml'\?\)"),
    (CHATML, {"template": "absent.jinja"}, [CONVERSATION], r"absent\.jinja is not a file"),
    *[
        (template, {}, documents, message)
        for template in (CHATML, MARKED)
        for documents, message in (
            ([answered("", tool_calls=[CALL])], r"messages\[1\]: .* does not write its call of weather"),
            ([answered("A", thinking="B")], r"messages\[1\]: .* does not write its reasoning"),
            ([answered("Hello") | {"tools": [CALL]}], LEFT_OUT),
            ([answered("It is weather.") | {"tools": [CALL]}], LEFT_OUT),
            # The tokenizer has a token for the first two newlines of 'assistant\n' + '\n\nHello'.
            ([answered("\n\nHello")], r"l:1: messages\[1\]: the tokenizer merges .* white space"),
        )
    ],
    *[
        (shortened, {}, [chat("Hi", "Short."), CONVERSATION], r"l:2: messages\[3\]: .* does not write its content as")
        for shortened in (CHATML.replace("m['content']", SHORTENED), MARKED.replace("m['content']", SHORTENED))
    ],
    *[
        (None, {"template": template}, [answered("A") | {"tools": TOOLS}], r"knows no tools; .* to .*chatml, llama3")
        for template in ("zephyr", "vicuna", "alpaca")
    ],
    *[
        (
            CHATML.replace("m['content']", f"({expression}) | string"),
            {},
            [answered("Hello")],
            rf"^data\.jsonl:1: .*({reason})",
        )
        for expression, reason in (
            ("m['content'][99].x", "UndefinedError|has no element|no attribute"),
            ("1 / (m['content'] | length - 2)", "ZeroDivisionError"),
            ("m['content'] | round", "TypeError"),
            ("m['content'].index('?')", "ValueError: substring not found"),
        )
    ],
]


@pytest.mark.parametrize(("template", "options", "documents", "message"), REFUSED, ids=[case[3] for case in REFUSED])
def test_what_a_template_cannot_write_is_refused_by_place(load, template, options, documents, message):
    with pytest.raises(UserError, match=message):
        encode(load(template), *documents, **options)


def test_a_prompt_whose_template_leaves_out_its_tools_is_refused(load):
    prompt = {"prompt": chat("Use weather.", "")["messages"][:1], "columns": {}, "tools": [CALL]}
    with pytest.raises(UserError, match=LEFT_OUT):
        encode(load(CHATML), prompt)


def test_tools_are_refused_where_the_tokenizer_lacks_the_markers_for_them(load):
    tokenizer = load(None)
    tokenizer.add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    assert encode(tokenizer, CONVERSATION, template="mistral")
    value = answered("Hello") | {"tools": TOOLS}
    with pytest.raises(UserError, match=r"data\.jsonl:1: data\.template=mistral writes tools with \[AVAILABLE_TOOLS\]"):
        encode(tokenizer, value, template="mistral")


def test_eot_tokens_end_a_trained_turn_although_they_are_not_special(load):
    from tokenizers import AddedToken

    template = CHATML.replace("<|im_end|>", "</turn>")
    tokenizer = load(template)
    tokenizer.add_tokens([AddedToken("</turn>", special=False, normalized=False), "</other>"])
    (encoded,) = encode(tokenizer, CONVERSATION, eot_tokens=("</turn>",))
    assert trained_text(tokenizer, *encoded) == ["It is Paris.</turn>", "There are seven.</turn>"]
    with pytest.raises(
        UserError, match=r"eot_tokens: the chat template in MODEL never writes </other>, and ends .*turn>"
    ):
        encode(tokenizer, CONVERSATION, eot_tokens=("</other>",))
    with pytest.raises(UserError, match=r"eot_tokens: <eot> is not one token .*model\.new_tokens=\["):
        encode(tokenizer, CONVERSATION, eot_tokens=("<eot>",))


@pytest.mark.parametrize("value", [{"text": "a"}, {"prompt": "a", "completion": "b"}], ids=str)
def test_a_tokenizer_without_an_end_of_text_is_refused_where_one_is_appended(load, value):
    tokenizer = load(CHATML, eos=False)
    with pytest.raises(UserError, match=r'set "eos_token" in MODEL/tokenizer_config\.json'):
        encode(tokenizer, value)


@pytest.mark.parametrize("bos", [False, True])
def test_a_completion_is_trained_with_its_end_of_text_from_an_exact_boundary(load, bos):
    r"""Joined, '\n' + '\n\n' would begin with a token of two; apart, the prompt is what it is at inference."""
    tokenizer = load(None, bos=bos)
    ((tokens, trained),) = encode(tokenizer, {"prompt": "Hello!\n", "completion": "\n\nParis."})
    prompt = tokenizer("Hello!\n").input_ids
    assert tokens[: len(prompt)].tolist() == prompt
    assert trained.tolist() == [0] * len(prompt) + [1] * (len(tokens) - len(prompt))
    assert tokenizer.decode(tokens[len(prompt) :].tolist()) == "\n\nParis.<|eos|>"
    assert tokens.tolist().count(tokenizer.convert_tokens_to_ids("<|bos|>")) == bos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Question: 2 + 2?\nAnswer:", " 4"),
        ("Hel", "lo there"),
        ("The ", "capital"),
        ("A\n", "\n\nB"),
        ("a", ""),
        ("", "the"),
    ],
)
def test_a_completion_goes_on_where_the_prompt_ends_and_no_space_comes_between(kind, prompt, completion):
    """Llama 2's tokenizer puts a space in front of every text, and the model would learn to write it."""
    tokenizer = chat_tokenizer(kind)
    ((tokens, trained),) = encode(tokenizer, {"prompt": prompt, "completion": completion})
    alone = tokenizer(prompt, add_special_tokens=kind == "llama3").input_ids
    assert tokens[: len(alone)].tolist() == alone
    assert trained.tolist() == [0] * len(alone) + [1] * (len(tokens) - len(alone))
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=True) == prompt + completion


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_of_a_text_is_trained_and_an_end_of_text_is_appended(load, bos):
    tokenizer = load(None, bos=bos)
    (tokens, trained), (empty, _) = encode(tokenizer, {"text": "The lazy dog."}, {"text": ""})
    assert tokens.tolist() == [*tokenizer("The lazy dog.").input_ids, tokenizer.eos_token_id]
    assert trained.all()
    assert len(empty) == 1 + bos


ENDED_OUTSIDE = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
)
"""The marks leave out the end-of-turn token."""


def with_marker(tokenizer):
    """Return the tokenizer with </tool_call> as an added token that is not special, as Qwen's and Hermes's have it."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("</tool_call>", special=False, normalized=False)])
    return tokenizer


@pytest.mark.parametrize("template", [MARKED, ENDED_OUTSIDE, CHATML], ids=["marked", "marked without its end", "plain"])
def test_a_turn_that_ends_in_a_marker_is_trained_up_to_its_end_of_turn_token(load, template):
    tokenizer = with_marker(load(template))
    value = chat("Hi", "a tool</tool_call>", "So?", "Yes.</tool_call>")
    (encoded,) = encode(tokenizer, value)
    assert trained_text(tokenizer, *encoded) == ["a tool</tool_call><|im_end|>", "Yes.</tool_call><|im_end|>"]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0.2 s of CPU time"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "more than 0.05 GiB of memory|0.2 s of CPU time"),
        ("{{ 'x' * (m['content'] | length) * 9999999 }}", "more than 0.05 GiB of memory"),
        ("{{ 'x' * 9999 }}", "writes 20,0.. characters, and the limit is 9,000"),
        ("{{ 9 ** 9 ** 9 }}", r"uses the operator \*\*"),
    ],
)
def test_a_template_without_end_is_refused_with_its_limit(load, monkeypatch, expression, reason):
    tokenizer = load(CHATML.replace("{{ '<|im_start|>'", expression + "{{ '<|im_start|>'", 1))
    for name, limit in {"RENDER_SECONDS": 0.2, "RENDER_GIB": 0.05, "MOST_CHARACTERS": 9000}.items():
        monkeypatch.setattr(chat_template, name, limit)
    handler, limits = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=rf"^data\.jsonl:1: the chat template in MODEL .*({reason})"):
        encode(tokenizer, chat("Hi", "Hello"))
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == (handler, limits)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
