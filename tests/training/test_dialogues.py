"""Dialogues: what an environment writes is not trained, and the model reads what it wrote, token for token."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distlora.config import DataConfig, UserError
from distlora.data.chat_template import ChatTemplate
from distlora.data.files import read_file
from distlora.data.turn_writer import MOST_LEVELS, TurnWriter, call_id
from distlora.generation.sampling import Request, Sample
from distlora.rewards.find import tool_schemas
from distlora.rewards.pool import RewardInput, RewardPool
from distlora.run_folder.layout import ROLLOUT_NAME, ROLLOUTS_NAME, answers_files
from distlora.training import worker
from distlora.training.dialogues import DialogueSampler
from support.chat_tokenizers import chat_tokenizer
from support.closeness import adapter_of, assert_adapters_close, assert_same_run
from support.family_models import SINGLE
from support.runs import run_until
from support.small_models import make_run, read_metrics, tokenizer
from support.tiers import ci
from support.worlds import World

MINE = '''
import os, random, time
from typing import Literal

class Game:
    def reset(self, prompt, turns, **columns):
        self.left = turns

    def step(self, answer):
        if answer == "raise": raise ValueError("an odd answer")
        if answer == "hang": time.sleep(1000)
        if answer == "exit": os._exit(1)
        if answer == "number": return 5
        if answer == "clock": return str(time.time())
        self.left -= 1
        if self.left == 0: return None
        draw = f"{random.random():.3f}"
        return [{"role": "system", "content": f"{len(answer)} letters"}, {"role": "user", "content": draw}]

def add(first: int, others: list[int], unit: Literal["m", "km"] = "m", note: str | None = None) -> str:
    """
    Add whole numbers.

    Args:
        first: The first number,
            of any size.
        others (list): The others.
        unit: Their unit.
        note: A remark: any text.
    """
    if others == [7]: time.sleep(1000)
    return f"{first + sum(others)} {unit}"

def call_all(completions, **columns):
    (messages,) = completions
    return [sum(message["role"] == "tool" for message in messages)]

class Talks:
    def reset(self, **columns): return "good morning"

def words(prompts, completions, completion_ids, **columns):
    kinds = "".join(message["role"][0] for message in completions[0])
    return [len(kinds) + 0.01 * (len(completions[0][0]["content"]) % 7)]
'''
SECTIONS: dict[str, Any] = {
    "data": {"sequence_length": 96, "eval_fraction": 0.2, "rewards": ["mine.words"], "environment": "mine.Game"},
    "rollout": {"num_generations": 4, "max_new_tokens": 48, "max_turns": 3, "stop": ["e", "a", "t"]},
    "train": {"objective": "grpo", "max_steps": 3, "global_batch": 8, "micro_batch": 2, "beta": 0.05},
}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dialogue_run(run_dir: Path, folders: Path, *, as_text: bool = False, **sections: dict[str, Any]) -> None:
    """Prepare a run whose environment ends a dialogue after one to four turns, and max_turns after three."""
    data = run_dir.with_suffix(".jsonl")
    texts = [f"Game {number}?" for number in range(10)]
    prompts = texts if as_text else [[{"role": "user", "content": text}] for text in texts]
    records = [{"prompt": prompt, "turns": 1 + number % 4} for number, prompt in enumerate(prompts)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    merged = {name: {**values, **sections.get(name, {})} for name, values in SECTIONS.items()}
    merged["data"] |= {"path": str(data), "reward_folder": str(run_dir.parent), "reward_processes": 1}
    make_run(run_dir, folders, **merged)


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    times = {"time", "tokens_per_second", "rollout/seconds", "peak_memory_bytes"}
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def answers_in(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of all rollouts."""
    paths = answers_files(run_dir / ROLLOUTS_NAME).values()
    return [record.value for path in paths for record in read_file(path, "", "auto")]


def test_dialogues_are_sampled_as_they_are_trained(folders: Path, mine: Path) -> None:
    """The same tokens to the last bit, in turns that the environment's lie between."""
    dialogue_run(mine / "run", folders, rollout={"batch_invariant": True}, train={"checkpointing": "none"})
    worker.run(mine / "run", SINGLE)
    lines, rows = steps_of(mine / "run"), answers_in(mine / "run")
    assert [line["rollout/logprob_difference_max"] for line in lines] == [0, 0, 0]
    assert all(line["grad_norm"] > 1e-3 for line in lines)
    turns = [row["completion"].count("<|assistant|>") + 1 for row in rows]
    assert set(turns) == {1, 2, 3}
    encode = tokenizer()
    for row, count in zip(rows, turns, strict=True):
        spoken = re.split(r"(?:<eos>)?<\|system\|>\d+ letters<\|user\|>0\.\d{3}<\|assistant\|>", row["completion"])
        assert len(spoken) == count
        whole = encode(row["completion"], add_special_tokens=False).input_ids
        assert row["tokens"] < len(whole) or count == 1, "the environment's are counted"
        assert int(row["reward"]) in (3 * count - 2, 3 * count), "messages of both"
        if row["ended"]:
            assert int(row["reward"]) == 3 * count - 2
    assert 0 < sum(row["ended"] for row in rows) < len(rows)
    means = [sum(row["tokens"] for row in rows if row["step"] == number) / 8 for number in (1, 2, 3)]
    assert [line["completions/mean_length"] for line in lines] == pytest.approx(means)
    # The loss has as many targets as the model wrote tokens, in groups whose rewards differ.
    trained = [sum(row["tokens"] for row in rows if row["step"] == number) for number in (1, 2, 3)]
    assert [line["target_tokens"] for line in lines] == trained


@pytest.mark.parametrize("stop_before", [1, ci(2)])
def test_a_killed_run_goes_on_with_the_same_dialogues(
    world: World, folders: Path, mine: Path, stop_before: int
) -> None:
    sections: dict[str, Any] = {
        "rollout": {"steps_per_generation": 2, "max_logprob_difference": 1e-5},
        "train": {"save_every": 1, "keep": 9, "eval_every": 2, "max_steps": 4},
    }
    for name, stop in (("whole", None), ("killed", stop_before)):
        dialogue_run(mine / name, folders, **sections)
        world.run(1, run_until, run_dir=mine / name, stop_before=stop)
    saved = mine / "killed" / "checkpoints" / f"step_{stop_before:08d}" / ROLLOUT_NAME
    assert saved.is_file() == (stop_before % 2 > 0), "a rollout is saved while steps need it"
    world.run(1, run_until, run_dir=mine / "killed")
    assert_same_run(mine / "killed", mine / "whole")
    assert steps_of(mine / "killed") == steps_of(mine / "whole")
    if stop_before == 1:
        dialogue_run(mine / "ranks", folders, **sections)
        world.run(2, run_until, run_dir=mine / "ranks")
        assert answers_in(mine / "ranks") == answers_in(mine / "whole")
        assert_adapters_close(adapter_of(mine / "ranks"), adapter_of(mine / "whole"))


def test_an_environment_that_fails_costs_its_dialogue_and_is_named(mine: Path) -> None:
    lines: list[str] = []
    data = DataConfig(path="-", environment="mine.Game", reward_timeout=3.0, reward_processes=2)
    spoken = ["three", "raise", "hang", "exit", "number", "clock", "other"]
    dialogues = [[{"role": "assistant", "content": text}] for text in spoken]
    with RewardPool(data, log=lines.append) as pool:
        inputs = [RewardInput(prompt="p", completion=each, columns={"turns": 3}) for each in dialogues]
        replies = pool.converse(inputs)
        again = pool.converse(inputs[:1])
        for dialogue, reply in zip(dialogues, replies, strict=True):
            dialogue += [*reply.get("value", []), {"role": "assistant", "content": "next"}]
        after = pool.converse([inputs[0], inputs[5]])
    kinds = [next(iter(reply)) for reply in replies]
    assert kinds == ["value", "errors", "timeouts", "errors", "invalid", "value", "value"]
    assert replies[0] == again[0]
    assert replies[0]["value"][0]["content"] == "5 letters"
    assert replies[0]["value"][1] == replies[6]["value"][1], "the same record, the same draws"
    assert after[0]["value"][0]["content"] == "4 letters"
    assert "before; use no clock" in after[1]["invalid"]
    assert "data.environment=mine.Game took longer than data.reward_timeout=3 seconds: the dialogue" in "".join(lines)
    assert "ValueError: an odd answer (mine.py:" in (pool.first_failure or "")
    with RewardPool(dataclasses.replace(data, environment="mine.Talks")) as pool:
        assert "reset" in pool.converse(inputs[:1])[0]["invalid"]


def test_turns_are_appended_to_the_tokens_that_the_model_wrote() -> None:
    encode = chat_tokenizer()
    chat = ChatTemplate(encode, "base", "llama3")
    writer, (end,) = TurnWriter(chat, encode), chat.end_of_turn()
    question, reply = [{"role": "user", "content": "Why?"}], [{"role": "user", "content": "And then?"}]
    said = [*question, {"role": "assistant", "content": "So."}]
    texts = [chat.render("-", question, prompt=True), "So.", chat.render("-", [*said, *reply], prompt=True)]
    prompt, answer, whole = (encode(text, add_special_tokens=False).input_ids for text in texts)
    for spoken in ([*answer, end], answer):
        assert prompt + spoken + writer.tokens(reply, spoken[-1], [end]) == whole


FORGETS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}<eos>"
    "{% endfor %}"
)
ENDLESS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            FORGETS + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            "writes a turn otherwise once",
        ),
        (ENDLESS + "{% if add_generation_prompt %}[assistant]{% endif %}", "with no token of its own"),
    ],
)
def test_a_template_that_would_write_earlier_turns_otherwise_is_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TurnWriter(ChatTemplate(tokenizer(), "base", source=source), tokenizer())


def with_tools() -> DataConfig:
    data = DataConfig(path="-", tools=("mine.add",), reward_timeout=3.0, reward_processes=2)
    return dataclasses.replace(data, tool_schemas=json.dumps(tool_schemas(data)))


def test_definitions_of_tools_are_those_of_transformers(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import get_json_schema

    monkeypatch.syspath_prepend(mine)
    module = importlib.import_module("mine")
    monkeypatch.delitem(sys.modules, "mine")
    expected = get_json_schema(module.add)
    assert expected["function"].pop("return") == {"type": "string"}  # No argument of a call.
    assert tool_schemas(with_tools()) == [expected]
    (mine / "bare.py").write_text("def f(x): pass\ndef g(x):\n    'Do.'\ndef h(*x: int):\n    'Do.'\n")
    for name, message in (("f", "has no docstring"), ("g", "its argument x is not known"), ("h", "leave out /")):
        with pytest.raises(UserError, match=message):
            tool_schemas(DataConfig(path="-", tools=(f"bare.{name}",)))


@pytest.mark.parametrize(
    ("template", "call", "several"),
    [
        ("chatml", '<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call>', True),
        ("qwen25", '<tool_call>{"arguments": %s, "name": "add"}</tool_call>', True),
        ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": %s}]', True),
        ("llama3", '{"name": "add", "parameters": %s}', False),
    ],
)
def test_calls_of_tools_are_read_and_answered_as_the_template_writes_them(
    mine: Path, template: str, call: str, several: bool
) -> None:
    encode, data = chat_tokenizer(), with_tools()
    chat = ChatTemplate(encode, "base", template)
    tools = json.loads(data.tool_schemas)
    writer, (end,) = TurnWriter(chat, encode, tools), chat.end_of_turn()
    assert writer.calls is not None
    right = {"first": 2, "others": [3]}
    text = call % json.dumps(right)
    assert [(each.name, each.arguments, each.error) for each in writer.calls.read(text)] == [("add", right, None)]
    assert writer.calls.read("It is 5.") == []
    assert "no such function: 'sub'; there is add" in str(writer.calls.read(text.replace("add", "sub"))[0].error)
    assert "is not JSON" in str(writer.calls.read(text[: text.index("[3")])[0].error)
    assert len(writer.calls.read(text + "\n" + text)) == 1 + several
    for levels, error in ((MOST_LEVELS - 1, None), (MOST_LEVELS, "to more than 64 levels"), (10**5, "64 levels")):
        (deep,) = writer.calls.read(call % ('{"first": ' * (levels - 1) + "{}" + "}" * (levels - 1)))
        assert (deep.error is None) == (error is None), levels
        assert error is None or error in str(deep.error)
        assert bool(deep.arguments) == (error is None)
    # The whole conversation, as the template writes it.
    question = [{"role": "user", "content": "2 + 3?"}]
    (made,) = writer.calls.read(text)
    said = {"role": "assistant", "content": "", "tool_calls": [made.message(0)]}
    reply = {"role": "tool", "name": "add", "tool_call_id": call_id(0), "content": "5 m"}
    prompt, past, whole = (
        encode(chat.render("-", messages, tools, prompt=is_prompt), add_special_tokens=False).input_ids
        for messages, is_prompt in ((question, True), ([*question, said], False), ([*question, said, reply], True))
    )
    spoken = past[: len(past) - past[::-1].index(end)]
    assert spoken[: len(prompt)] == prompt
    assert spoken + writer.tokens([reply], end, [end]) == whole


def test_a_tool_that_fails_gives_its_error_to_the_model(mine: Path) -> None:
    encode, data, lines = chat_tokenizer(), with_tools(), []  # type: ignore[var-annotated]
    texts = ['{"first": 2, "others": [3]}', '{"first": 2, "others": [7]}', '{"first": 2}', '{"first": 2,', None]
    texts += ['{"first": 2,"', "[" * 100]
    with RewardPool(data, log=lines.append) as pool:
        sampler = DialogueSampler(
            tokenizer=encode,
            stops=encode.convert_tokens_to_ids(["<|im_end|>"]),
            pool=pool,
            ranks=SINGLE,
            gather=lambda samples, count: [samples[index] for index in range(count)],
            writer=TurnWriter(ChatTemplate(encode, "base", "chatml"), encode, json.loads(data.tool_schemas)),
            max_turns=2,
        )

        def sample(requests: Sequence[Request]) -> list[Sample]:
            answers = []
            for request in requests:
                text = texts[request.seed]
                is_call = text is not None and len(request.tokens) == 1
                spoken = f'<tool_call>\n{{"name": "add", "arguments": {text}}}\n</tool_call>' if is_call else "Done."
                tokens = encode(spoken + "<|im_end|>", add_special_tokens=False).input_ids
                answers.append(Sample(tokens, [-1.0] * len(tokens), True))
            return answers

        dialogues, counts = sampler.run(
            [Request([5], seed, 300) for seed in range(len(texts))],
            lambda index, dialogue: RewardInput(prompt=[], completion=dialogue.messages, columns={}),
            sample,
            lambda phase: None,
        )
    said = [
        [message["content"] for message in dialogue.messages if message["role"] == "tool"] for dialogue in dialogues
    ]
    assert said[0] == ["5 m"]
    assert said[1] == ["error: took longer than data.reward_timeout=3 seconds"]
    assert said[2][0].startswith("error: TypeError: add() missing 1 required positional argument: 'others'")
    assert said[3][0].startswith("error: the call is not JSON")
    assert said[4] == []
    assert counts == {"tools/calls": 6, "tools/timeouts": 1, "tools/errors": 1, "tools/invalid": 3}
    assert [line.partition(":")[0] for line in lines] == [
        "the tool add took longer than data.reward_timeout=3 seconds",
        "the tool add TypeError",
        "a call of a tool",
    ], "two calls are not JSON"
    assert all(line.endswith("logged once)") and "the model reads this error" in line for line in lines)
    assert pool.first_failure is None, "no answer is left out"
    assert all(dialogue.ended and dialogue.messages[-1]["content"] == "Done." for dialogue in dialogues)
    for dialogue in dialogues:
        assert [logprob == 0 for logprob in dialogue.logprobs] == [not own for own in dialogue.written]
    text = encode.decode(dialogues[0].tokens)
    assert text.endswith("<tool_response>\n5 m\n</tool_response><|im_end|>\n<|im_start|>assistant\nDone.<|im_end|>")


def test_a_role_that_the_template_refuses_costs_its_dialogue(mine: Path) -> None:
    encode, lines = chat_tokenizer(), []  # type: ignore[var-annotated]
    data = DataConfig(path="-", environment="mine.Game", reward_processes=1)
    chat = ChatTemplate(encode, "base", "gemma2")
    with RewardPool(data, log=lines.append) as pool:
        sampler = DialogueSampler(
            tokenizer=encode,
            stops=chat.end_of_turn(),
            pool=pool,
            ranks=SINGLE,
            gather=lambda samples, count: [samples[index] for index in range(count)],
            writer=TurnWriter(chat, encode),
            max_turns=3,
        )
        tokens = [*encode("Hello", add_special_tokens=False).input_ids, *chat.end_of_turn()]
        dialogues, counts = sampler.run(
            [Request([5], 0, 300)],
            lambda index, dialogue: RewardInput(prompt=[], completion=dialogue.messages, columns={"turns": 3}),
            lambda requests: [Sample(tokens, [-1.0] * len(tokens), True) for _ in requests],
            lambda phase: None,
        )
    assert (dialogues[0].failed, counts["environment/invalid"]) == (True, 1)
    assert "its dialogue is left out (counted in environment/invalid" in "".join(lines)


def test_half_a_surrogate_pair_in_a_reply_does_not_end_the_run() -> None:
    encode = chat_tokenizer()
    writer = TurnWriter(ChatTemplate(encode, "base", "chatml"), encode)
    tokens = [writer.tokens([{"role": "user", "content": text}], 0, [0]) for text in ("a \ud83d", "a ?")]
    assert tokens[0] == tokens[1]


def test_prompts_and_templates_that_have_no_dialogue_are_refused_before_the_run(folders: Path, mine: Path) -> None:
    tools = {"environment": None, "tools": ["mine.add"], "tool_schemas": with_tools().tool_schemas}
    with pytest.raises(UserError, match=r"data\.tools: the chat template in .* leaves out the tool 'add'"):
        dialogue_run(mine / "tools", folders, data=tools)
    with pytest.raises(UserError, match=r"data\.environment=mine\.Game needs prompts of messages, and this one is"):
        dialogue_run(mine / "text", folders, as_text=True)
