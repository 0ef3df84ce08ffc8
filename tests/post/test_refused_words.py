"""Words behind the commands for results that are refused in one line, before a process is started for the work."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from distlora.training import worker
from distlora_launcher.cli.main import main
from support.family_models import SINGLE
from support.small_models import make_run, write_model_folder, write_text_file

SHORT = {"max_steps": 4, "save_every": 2, "global_batch": 3}
FULL = {"adapter": {"method": "full"}, "quant": {"method": "none"}}
CHECKPOINT = "checkpoints/step_00000002"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make models, texts, and runs: finished ones on two bases, one without a step, two with a checkpoint's folder."""
    place = tmp_path_factory.mktemp("refused")
    for name in ("models/llama", "models/qwen3", "others/llama"):
        write_model_folder(place / name, Path(name).name, initializer_range=0.07 if "others" in name else 0.08)
    for folder, run in (("models", "RUN"), ("others", "OTHER")):
        write_text_file(place / folder / "text.jsonl")
        make_run(place / run, place / folder, train=SHORT)
        worker.run(place / run, SINGLE)
    make_run(place / "untrained", place / "models")
    make_run(place / "full", place / "models", **FULL, train=SHORT)
    make_run(place / "loftq", place / "models", adapter={"init": "loftq"}, train=SHORT)
    for name in ("empty", "there", f"full/{CHECKPOINT}", f"loftq/{CHECKPOINT}", "odd"):
        (place / name).mkdir(parents=True)
    (place / "odd" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_bias": true}')
    (place / "bad.jsonl").write_text('{"prompt": "A"}\n{"promt": "B"}\n')
    (place / "cut.jsonl").write_text('{"prompt": "A"}\n{"prompt": "B"\n')
    (place / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    (place / "latin.txt").write_bytes(b"caf\xe9\n")
    (place / "good.txt").write_text("A list\n")
    return place


EVAL, INTRINSIC = "eval models/llama --text models/text.jsonl", "analyze intrinsic models/llama"
DATA = "--data models/text.jsonl"
REFUSED = [
    ("generate RUN --temprature 1", "there is no option --temprature (did you mean '--temperature'?)"),
    ("generate RUN --temperature hot", "--temperature: invalid float value: 'hot'"),
    ("generate RUN --temperature 0 --top-k 5", "--top-p and --top-k have no effect"),
    ("generate RUN --top-p 2", "--top-p=2.0 must be above 0 and at most 1"),
    ("generate RUN --max-new-tokens 0", "--max-new-tokens=0"),
    ("generate RUN --adapter base --checkpoint step_2", "--adapter and --checkpoint exclude"),
    ("generate RUN --checkpoint step_3", "step_3"),
    ("generate RUN --checkpoint best", "no best"),
    ("generate RUN --adapter nowhere", "nowhere does not exist"),
    ("generate RUN --adapter odd", "odd/adapter_config.json: lora_bias=True is not supported"),
    ("generate RUN --raw --system Hi", "--system is a message of a chat"),
    ("generate RUN --out x.jsonl", "--out=x.jsonl is where the answers to --prompts go"),
    ("generate RUN --prompts nowhere.txt", "--prompts=nowhere.txt is not a file"),
    ("generate RUN --prompts prompts.csv", "ends in '.csv'; name a .txt or .jsonl file"),
    ("generate RUN --prompts bad.jsonl", "bad.jsonl:2 has neither 'prompt' nor 'messages'"),
    ("generate RUN --prompts cut.jsonl", "--prompts=cut.jsonl:2: not valid JSON, column 15"),
    ("generate RUN --prompts cut.jsonl", '; a good line: {"prompt": "What is a list?"} or {"messages": '),
    ("generate RUN --prompts latin.jsonl", "--prompts=latin.jsonl:1: byte 16 (0xe9) is not UTF-8"),
    ("generate RUN --prompts latin.txt", "--prompts=latin.txt: a byte 0xe9 is not UTF-8"),
    ("generate RUN --prompts good.txt --out bad.jsonl", "--out=bad.jsonl exists already"),
    ("generate RUN --processes 2", "several processes cannot share a terminal; add --prompts"),
    ("generate RUN RUN", "is one argument too many"),
    ("generate nowhere", "nowhere holds no run"),
    ("generate", "the following arguments are required: RUN"),
    ("generate untrained", "has nothing trained yet"),
    ("eval models/llama", "add --text FILE"),
    ("eval nowhere --text good.txt", "nowhere does not exist"),
    ("eval empty --text good.txt", "neither a run, an adapter nor a model"),
    ("eval untrained", "nothing trained yet"),
    ("eval RUN --quant none", "was trained with quant=nf4"),
    ("eval RUN --sequence-length 9", "belongs to --text"),
    ("eval RUN RUN", "named twice"),
    (f"{EVAL} --sequence-length 100000", "--sequence-length 100,000"),
    (f"{EVAL} --checkpoint best", "and none is named"),
    ("eval models/llama --text gone.jsonl", "gone.jsonl"),
    (f"{EVAL} --rows 0", "--rows=0"),
    (f"{EVAL} --out there", "exists already"),
    ("eval RUN/adapter", "write"),
    (f"{EVAL} --rowz 1", "--rows"),
    (f"{EVAL} --tasks tiny_choice", "their own text"),
    ("eval models/llama --tasks a,,b", "names nothing between two commas"),
    ("eval models/llama --tasks a --tasks-folder empty", "no YAML"),
    ("eval models/llama --tasks a --limit 0", "--limit=0"),
    (f"{EVAL} --fewshot 2", "add --tasks"),
    (f"{EVAL} --chat", "add --tasks"),
    (f"{EVAL} --max-new-tokens 2", "add --draft"),
    (f"{EVAL} models/qwen3 --draft models/llama", "name one"),
    (f"{EVAL} --quant nf4 --draft models/llama", "not quantized"),
    (f"{EVAL} --draft models/llama --max-new-tokens 0", "--max-new-tokens=0"),
    ("merge full", "trained the whole model (adapter=full)"),
    ("merge loftq --onto original", "started by LoftQ"),
    ("merge loftq --out there", "exists already"),
    ("merge loftq --dtype fp8", "fp32"),
    ("merge loftq --no-measure --rows 3", "--rows has no effect"),
    ("merge loftq --no-measure --processes 2", "--processes has no effect"),
    ("merge loftq --rows 0", "--rows=0"),
    ("analyze spectrum RUN --top 0", "--top=0"),
    ("analyze spectrum RUN --threshold half", "--threshold 0.5,0.7"),
    ("analyze spectrum RUN --threshold 1.5", "not a cosine between 0 and 1"),
    ("analyze spectrum RUN --threshold 0.5,0.5000001", "the same in six digits"),
    ("analyze spectrum RUN --adapter base", "changed nothing"),
    ("analyze spectrum RUN --agianst RUN", "did you mean '--against'?"),
    ("analyze spectrum RUN --against OTHER", "whose weights differ"),
    ("analyze spectrum nothing", "nothing"),
    (INTRINSIC, "--data FILE is missing"),
    (f"{INTRINSIC} --data no.jsonl", "no.jsonl does not exist"),
    (f"{INTRINSIC} {DATA} --share 1.5", "--share=1.5 is not a valid fraction"),
    (f"{INTRINSIC} {DATA} --scaling said", "--scaling=said is not known; write none, layers"),
    (f"{INTRINSIC} {DATA} --start 2000 --most 10", "--start=2,000 is beyond --most=10"),
    (f"{INTRINSIC} {DATA} --sequence-length 4096", "--sequence-length 4,096"),
    (f"{INTRINSIC} {DATA} --also 64,1000000", "--also=1,000,000 is beyond --most=100,000"),
    (f"analyze intrinsic nowhere {DATA}", "nowhere does not exist"),
    (f"{INTRINSIC} models/llama {DATA}", "two models are called llama"),
    (f"{INTRINSIC} {DATA} --step 3", "did you mean '--steps'?"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED)
def test_words_are_refused_with_the_reason(
    words: str, reason: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    before = sorted(os.listdir())
    assert main(shlex.split(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert reason in captured.err
    assert sorted(os.listdir()) == before
