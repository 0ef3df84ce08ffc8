"""`distlora data preview`: what it shows is what a run trains on."""

import json
import sys

import numpy as np
import pytest
import yaml

from distlora.config import Config, UserError
from distlora.config.file import as_mapping, build
from distlora.data.prepare import prepare_run, summary
from distlora.data.rows import open_split
from distlora_launcher.cli import data as command
from support.chat_tokenizers import chat_tokenizer
from support.data_folders import chat, show_preview, show_row, write_lines
from support.launcher_fakes import write_model
from support.small_models import make_run, tokenizer

SHORT = chat("Hi", "Hello there.", "Bye", "See you.")
LONG = chat("Hi", "Hello there. " * 40)
CUT = chat("Hi " * 100, "Hello there.")
QUESTION = chat("Only a question?")
WITH_THOUGHTS = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A", "thinking": "B"}]
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model folder with a real tokenizer, which has the markers of every template and no template."""
    folder = write_model(tmp_path_factory.mktemp("preview") / "model")
    chat_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": len(chat_tokenizer())}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def settings(model, tmp_path):
    """Return a function that writes config.yaml for data settings."""

    def write(objective="sft", **data):
        values = {"sequence_length": 64, "eval_fraction": 0, "cache_dir": str(tmp_path / "cache"), **data}
        if "sources" not in values:
            values = {"template": "chatml", **values}
        sections = {"model": {"path": str(model)}, "data": values, "train": {"objective": objective}}
        config = build(Config, {**sections, "run_dir": str(tmp_path / "run")})
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
        return folder

    return write


def test_documents_are_shown_with_their_trained_tokens_marked(settings, tmp_path, capsys):
    path = write_lines(tmp_path / "chats.jsonl", [SHORT, SHORT, SHORT])
    assert show_preview(settings(path=str(path)), documents=1) == 0
    shown = capsys.readouterr().out.partition("What is trained")[0]
    title, _, text = shown.partition("\n")
    assert title.startswith(f"--- {path}:1: ")
    assert text.rstrip("\n") == (
        "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello there.<|im_end|>]]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[See you.<|im_end|>]]"
    )


def test_prompts_whose_answers_a_run_samples_are_not_marked_as_trained(settings, tmp_path, capsys):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "What is 2 + 3?", "answer": "5"}] * 3)
    assert show_preview(settings("grpo", path=str(path)), documents=1) == 0
    shown, _, figures = capsys.readouterr().out.partition("What is trained")
    assert ", 0 trained\n" in shown
    assert shown.rstrip().endswith("What is 2 + 3?")
    assert "trained          the answers that a run samples to these prompts of " in figures


def test_the_figures_are_those_of_the_preparation(settings, tmp_path, capsys):
    path = write_lines(tmp_path / "chats.jsonl", [*[SHORT] * 30, *[LONG] * 3, CUT, *[QUESTION] * 2])
    folder = settings(path=str(path))
    assert show_preview(folder, documents=0) == 0
    shown = capsys.readouterr().out
    counts = prepare_run(folder)["splits"]["train"]
    assert "(chat), all 36 documents\n" in shown
    assert f"packed in {counts['rows']:,} sequences of 64 tokens" in shown
    assert f", {counts['padding'] / (counts['rows'] * 64):.1%} padding" in shown
    assert f"\noptimizer steps of a run: {-(-counts['rows'] // 8)} (" in shown
    assert counts["dropped"] == 3
    assert "left out         3: 2 without a trained token, 1 truncated before the first trained token\n" in shown
    assert "too long         4 (11.1%) have more than 64 tokens: cut off there (data.too_long), " in shown


def test_the_template_what_it_does_not_render_and_duplicates_are_named(settings, tmp_path, capsys):
    thinking = chat("Hi", "Hello there.", "Bye", "See you.")
    thinking["messages"][1] |= {"thoughts": "Be polite.", "train": False}
    path = write_lines(tmp_path / "chats.jsonl", [thinking, thinking, SHORT])
    asked = {"path": str(path), "template": "gemma3", "reasoning_key": "thoughts", "deduplicate": True}
    assert show_preview(settings(**asked), documents=0) == 0
    shown = capsys.readouterr().out
    assert "  rendered by      data.template=gemma3 (gemma)\n" in shown
    assert "  not rendered     reasoning of 2 turns, 20 characters\n" in shown
    assert "  duplicates       1 equal an earlier or a held-out document: left out\n" in shown
    assert "left out         " not in shown
    folder = settings(**asked | {"train_on": "all"})
    assert show_preview(folder, documents=0) == 0
    assert "not rendered   reasoning of 2 turns, 20 characters" in summary(prepare_run(folder)), "a run names it too"


def test_keys_that_nothing_reads_are_named_once(settings, tmp_path, capsys):
    chats = [chat("Hi", "Hello there.") | {"id": number, "meta": None} for number in range(12)]
    chats[3]["messages"][0]["mood"] = chats[3]["messages"][1]["mood"] = "glad"
    chats[4]["messages"][1] |= {"loss": False, "reasoning_content": "Be polite."}
    path = write_lines(tmp_path / "chats.jsonl", chats)
    folder, named = settings(path=str(path)), "'id' (12 records), 'messages.mood' (1 records)"
    assert show_preview(folder, documents=0) == 0
    assert f"  not read         {named}\n" in capsys.readouterr().out
    for _ in range(2):
        assert f"not read       {named}\n" in summary(prepare_run(folder)), "a reused preparation names them too"
    template = tmp_path / "glad.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.mood }}] {{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    folder = settings(path=str(path), template=str(template), ignore_columns=["id"])
    assert "not read" not in summary(prepare_run(folder)), "the template reads it"


def test_documents_that_a_run_refuses_are_counted_and_the_first_is_named(settings, tmp_path, capsys):
    path = write_lines(tmp_path / "chats.jsonl", [SHORT, WITH_THOUGHTS, SHORT, WITH_THOUGHTS])
    folder = settings(path=str(path), template="zephyr")
    assert show_preview(folder) == 2
    shown = capsys.readouterr().out
    assert f"refused          2, which would stop a run. The first: {path}:2: messages[1]: " in shown
    with pytest.raises(UserError, match=r"chats\.jsonl:2: messages\[1\]"):
        prepare_run(folder)


def test_colours_are_for_terminals_and_control_characters_for_nobody(settings, tmp_path, capsys, monkeypatch):
    path = write_lines(tmp_path / "chats.jsonl", [chat("\x1b[31mred", "Hello")])
    folder = str(settings(path=str(path)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show_preview(folder) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[32mHello\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in coloured
    assert "[[" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert show_preview(folder) == 0
    plain = capsys.readouterr().out
    assert "[[Hello<|im_end|>]]" in plain
    assert "\x1b" not in plain
    for shown in (coloured, plain):
        assert "\\x1b[31mred" in shown


def test_the_command_takes_the_settings_of_a_run_and_starts_none(model, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_lines(tmp_path / "chats.jsonl", [SHORT] * 3)
    words = [f"model.path={model}", "data.path=chats.jsonl", "data.template=chatml", "data.train_on=last", "--rows=1"]
    assert command.main(["preview", *words, "data.sequence_length=64"]) == 0
    shown = capfd.readouterr().out
    assert "Hello there.<|im_end|>\n" in shown
    assert "[[See you.<|im_end|>]]" in shown
    assert [entry.name for entry in tmp_path.iterdir()] == ["chats.jsonl"]
    assert json.loads(path.read_text().splitlines()[0]) == SHORT


def test_a_row_is_shown_document_by_document_with_what_is_trained(folders, tmp_path, capsys):
    make_run(tmp_path / "run", folders)
    rows = open_split(tmp_path / "run", "train")
    number = int(np.argmax(rows.flags[:, 1:].sum(axis=1)))  # Of several documents.
    assert show_row(tmp_path / "run", number) == 0
    shown = capsys.readouterr().out
    assert f"row {number}: 64 tokens, {rows.targets[number]} trained" in shown
    texts = shown.split("--- tokens ")[1:]
    assert len(texts) > 1
    marked = "".join(text.partition("[[")[2].partition("]]")[0] for text in texts)
    trained = np.flatnonzero(rows.flags[number] & 1) + 1
    assert marked == tokenizer().decode(np.array(rows.tokens[number])[trained].tolist())

    assert show_row(tmp_path / "run", 100_000) == 2
    assert "there is no row 100,000" in capsys.readouterr().err
    for words in (["row"], ["row", str(tmp_path / "run")], ["row", str(tmp_path / "run"), "first"]):
        with pytest.raises(UserError, match="argument"):
            command.main(words)
    record = tmp_path / "run" / "data.json"
    record.write_text(record.read_text()[:100])
    assert show_row(tmp_path / "run", 0) == 2
    message = capsys.readouterr().err
    assert f"{record} is damaged" in message
    assert f"distlora data prepare {tmp_path / 'run'}" in message
