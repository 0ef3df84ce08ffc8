"""Models by name and `distlora push`, with the real huggingface_hub client against a hub on the loopback interface."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import yaml

from distlora.architecture.config_checks import read_config
from distlora.architecture.spec import architecture_of
from distlora.config import Config, UserError
from distlora.config.file import as_mapping, build
from distlora_launcher.cli.main import main
from distlora_launcher.compose import hub as launcher_hub
from distlora_launcher.compose.hub import HubModel
from support.hub_server import Hub, start_hub
from support.launcher_fakes import MODEL_CONFIG, model_shapes, write_data, write_safetensors, write_tokenizer
from support.launcher_fakes import write_model as write_fake_model

DISTLORA = str(Path(sys.executable).with_name("distlora"))
GOLDEN = Path(__file__).parents[1] / "golden" / "model_card.md"

BIG = {"pad": (6_000_000,)}
"""A tensor that no model needs: 24 MB, so that a download shows in the bytes that the hub gave away."""


@pytest.fixture(scope="module")
def hub(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Models that can be trained and such that cannot, each for its own reason."""
    place = tmp_path_factory.mktemp("models")
    write_fake_model(place / "fake")
    write_safetensors(place / "fake" / "model.safetensors", {**model_shapes(), **BIG})
    fake = {path.name: path.read_bytes() for path in (place / "fake").iterdir()}
    no_norm = {name: shape for name, shape in model_shapes().items() if name != "model.norm.weight"}
    write_safetensors(place / "no_norm.safetensors", {**no_norm, **BIG})
    without_weights = {name: content for name, content in fake.items() if not name.endswith(".safetensors")}
    for model in (place / "fake", folders / "llama"):  # Else the first command to derive it says so.
        architecture_of(read_config(model), model)
    with start_hub() as running:
        running.add("org/tiny", folders / "llama")
        running.repos["models", "org/tiny"].commit(
            {
                "README.md": b"---\nlicense: apache-2.0\n---\nA tiny model.\n",
                "pytorch_model.bin": bytes(1000),
                "consolidated.safetensors": bytes(1000),
                "original/consolidated.00.pth": bytes(1000),
                "onnx/model.onnx": bytes(1000),
            }
        )
        running.add("org/fake", fake)
        running.add("org/gated", fake, gated=True)
        running.add("org/private", fake, private=True)
        running.add("org/gpt3", fake | {"config.json": json.dumps(MODEL_CONFIG | {"model_type": "gpt3"}).encode()})
        running.add("org/no-norm", fake | {"model.safetensors": (place / "no_norm.safetensors").read_bytes()})
        running.add("org/torch", without_weights | {"pytorch_model.bin": bytes(1000)})
        running.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(1000)})
        torn = b'{"weight_map": {"a": "b.safetensors"}}'
        running.add("org/torn", without_weights | {"model.safetensors.index.json": torn})
        yield running


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data.jsonl")
    return tmp_path


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(hub: Hub, place: Path) -> Run:
    """`distlora WORDS` as a process that knows this hub alone, its cache under `place`."""

    def run_it(*words: str, token: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = hub.environment(place / "home", token=token) | environment
        return subprocess.run([DISTLORA, *words], env=settings, cwd=place, capture_output=True, text=True)

    return run_it


def python(hub: Hub, place: Path, code: str, *arguments: object, **environment: str) -> str:
    """Return what a Python process prints that knows only this hub."""
    settings = hub.environment(place / "home") | environment
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, env=settings, cwd=place, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def train_words(model: str) -> list[str]:
    return ["train", f"model.path={model}", "data.path=data.jsonl", "data.sequence_length=64", "run_dir=run"]


LOAD_BY_NAME = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
model = AutoPeftModelForCausalLM.from_pretrained("owner/adapter")  # The base too: by its name and commit.
expected = load_file(sys.argv[1])
own = {name.replace(".default", ""): value for name, value in model.state_dict().items() if "lora_" in name}
assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)
tokens = torch.arange(5)[None]
adapted = model(tokens).logits
with model.disable_adapter():
    print(model.peft_config["default"].base_model_name_or_path, bool((model(tokens).logits != adapted).any()))
"""

RESTORE = """
import sys
from distlora.config.file import load_config
from distlora_launcher.compose.hub import restore
restore(load_config(sys.argv[1]).model)
"""


@pytest.mark.ci
def test_a_model_by_name_is_trained_pushed_and_loaded_by_peft(hub: Hub, folders: Path, place: Path, run: Run) -> None:
    hub.requests.clear()
    settings = [
        "train.max_steps=2",
        "train.global_batch=2",
        "train.dtype=fp32",
        "plan.measure=false",
        "optim.lr=5e-3",
        "tracker=none",
        f"data.cache_dir={place}/cache",
    ]
    data = f"data.path={folders / 'text.jsonl'}"
    trained = run(*train_words("org/tiny"), data, *settings)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "downloading org/tiny" in trained.stdout
    waits = re.compile(r"still starting the workers \(\d+ s\)")
    noise = [line for line in trained.stderr.splitlines() if not waits.fullmatch(line)]
    assert not noise, "no bars of other libraries in a log"
    commit = hub.repos["models", "org/tiny"].refs["main"]
    model = yaml.safe_load((place / "run" / "config.yaml").read_text())["model"]
    snapshot = Path(model["path"])
    assert (model["name"], model["revision"], snapshot.name) == ("org/tiny", commit, commit)
    assert {path.suffix for path in snapshot.iterdir()} <= {".json", ".jinja", ".md", ".safetensors"}
    assert hub.downloaded(".bin") + hub.downloaded("consolidated.safetensors") + hub.downloaded(".onnx") == 0
    weights = (folders / "llama" / "model.safetensors").stat().st_size
    assert hub.downloaded("/model.safetensors") <= weights + HEADER_BYTES, "headers, and one download"

    pushed = run("push", "run", "owner/adapter", token="hf_owner")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.endswith(f"{hub.url}/owner/adapter\n")
    repository = hub.repos["models", "owner/adapter"]
    files = repository.commits[repository.refs["main"]]
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert len(repository.commits) == 2, "the repository's own first commit, and one for all files"
    assert "base_model: org/tiny" in files["README.md"].decode()
    assert "license: apache-2.0" in files["README.md"].decode()
    assert str(place).encode() not in b"".join(files.values())
    loaded = python(hub, place, LOAD_BY_NAME, place / "run" / "adapter" / "adapter_model.safetensors")
    assert loaded == "org/tiny True\n"

    (snapshot / "model.safetensors").resolve().unlink()
    assert "downloading org/tiny" in python(hub, place, RESTORE, "run")
    assert (snapshot / "model.safetensors").stat().st_size == weights
    assert python(hub, place, RESTORE, "run") == ""
    (snapshot / "model.safetensors").unlink()  # As `distlora plan` leaves a model, with its small files alone.
    assert "downloading org/tiny" in python(hub, place, RESTORE, "run")
    assert (snapshot / "model.safetensors").stat().st_size == weights


REFUSALS: dict[str, tuple[str, list[str], list[str]]] = {
    # case: (model, more words, what the message says)
    "unknown type": ("org/gpt3", [], ["org/gpt3/config.json: model_type='gpt3' is not a model of transformers"]),
    "a missing tensor": ("org/no-norm", [], ["org/no-norm: no tensor model.norm.weight"]),
    "too long": ("org/fake", ["data.sequence_length=65"], ["64 positions", "org/fake/config.json"]),
    "gated": ("org/gated", [], ["error: model.path=org/gated is gated", "hf auth login"]),
}


@pytest.mark.parametrize("case", ["gated", *(pytest.param(case, marks=pytest.mark.ci) for case in [*REFUSALS][:-1])])
def test_what_cannot_be_trained_is_refused_before_its_weights_are_downloaded(
    case: str, hub: Hub, place: Path, run: Run
) -> None:
    model, words, expected = REFUSALS[case]
    hub.requests.clear()
    ended = run(*train_words(model), *words)
    assert ended.returncode == 2, ended.stderr
    for text in expected:
        assert text in ended.stderr
    assert hub.downloaded(".safetensors") <= HEADER_BYTES
    assert sorted(path.name for path in place.iterdir() if path.name != "home") == ["data.jsonl"]


LOOK = """
import sys
from distlora.config import ModelConfig, UserError
from distlora_launcher.compose.hub import with_small_files
for word in sys.argv[1:]:
    name, _, revision = word.partition("@")
    try:
        with with_small_files(ModelConfig(path=name, revision=revision or None)):
            print()
    except UserError as error:
        print(error)
"""
IS_ABSENT = "neither a folder here nor a model on the hub"
ABSENCES: list[tuple[dict[str, str], dict[str, list[str]]]] = [
    (
        {},
        {
            "org/torch": ["has no model.safetensors, only", "pytorch_model.bin", "spaces/safetensors/convert"],
            "org/adapter": ["only adapter_config.json", "of an adapter its base"],
            "org/torn": ["has no b.safetensors"],
            "org/gated": ["accept its licence at http", "/org/gated", "hf auth login"],
            "org/private": [IS_ABSENT, "hf auth login"],
            "org/fkae": [IS_ABSENT],
            "org/a--b": ["cannot be a name on the hub", "org/name"],
            "org/fake@mian": ["model.revision=mian", "no such branch", "Invalid rev id: mian", "/org/fake/tree/main"],
        },
    ),
    ({"HF_TOKEN": "hf_guest"}, {"org/gated": ["accept its licence"]}),
    ({"HF_TOKEN": "hf_old"}, {"org/fake": ["Invalid credentials", "set HF_TOKEN"]}),
    (
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        {"org/fake": ["http://127.0.0.1:9 cannot be reached", "Connection refused"]},
    ),
    ({"HF_HUB_OFFLINE": "1"}, {"org/fake": ["HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"]}),
]


@pytest.mark.parametrize(
    ("environment", "cases"), ABSENCES, ids=["plain", "guest", "dead token", "no network", "offline"]
)
def test_what_the_hub_does_not_give_is_one_line(
    environment: dict[str, str], cases: dict[str, list[str]], hub: Hub, place: Path
) -> None:
    said = python(hub, place, LOOK, *cases, **environment).splitlines()
    assert len(said) == len(cases)
    for (name, expected), line in zip(cases.items(), said, strict=True):
        for text in expected:
            assert text in line, name
        assert name.partition("@")[0] in line


@pytest.mark.ci
def test_chats_without_their_template_are_refused_before_the_download(
    folders: Path, hub: Hub, place: Path, run: Run
) -> None:
    files = {path.name: path.read_bytes() for path in (folders / "llama").iterdir()}
    hub.add("org/plain", {name: content for name, content in files.items() if not name.startswith("chat_template")})
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (place / "data.jsonl").write_text(json.dumps(chat) + "\n")
    hub.requests.clear()
    ended = run(*train_words("org/plain"), f"data.cache_dir={place / 'home' / 'rows'}")
    assert ended.returncode == 2, ended.stderr
    assert "org/plain has no chat template" in ended.stderr
    assert hub.downloaded(".safetensors") <= HEADER_BYTES
    assert not (place / "run").exists()


def test_showing_the_settings_asks_nobody(hub: Hub, run: Run) -> None:
    hub.requests.clear()
    ended = run(*train_words("org/fake"), "--cfg", "job")
    assert ended.returncode == 0, ended.stderr
    assert "path: org/fake" in ended.stdout
    assert hub.requests == []


HEADER_BYTES = 100_000
"""Bytes of a safetensors file that are read to parse its header."""

LOCALIZE = """
import sys
from distlora.config import ModelConfig
from distlora_launcher.compose.hub import localize
print(localize(ModelConfig(path=sys.argv[1])).revision)
"""


def test_what_is_cached_is_used_without_a_network(hub: Hub, place: Path) -> None:
    first = python(hub, place, LOCALIZE, "org/fake").splitlines()
    assert first[0].startswith("downloading org/fake (24 MB")
    (again,) = python(hub, place, LOCALIZE, "org/fake", HF_HUB_OFFLINE="1").splitlines()
    assert again == first[-1] == hub.repos["models", "org/fake"].refs["main"]


def test_what_a_quantized_checkpoint_says_of_itself_can_be_read_before_the_download(hub: Hub, place: Path) -> None:
    state = b'{"quant_type": "nf4", "blocksize": 64}'
    names = {"w": 300_000, "w.quant_state.bitsandbytes__nf4": len(state), "z": 300_000}
    header, offset = {}, 0
    for name, size in names.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + b"\1" * 300_000 + state + b"\1" * 300_000
    hub.add("org/packed", {"config.json": b"{}", "model.safetensors": content})
    hub.requests.clear()
    code = (
        "import sys; from pathlib import Path; from distlora.config import ModelConfig\n"
        "from distlora_launcher.compose.hub import with_small_files\n"
        "with with_small_files(ModelConfig(path='org/packed')) as model:\n"
        "    data = Path(model.path, 'model.safetensors').read_bytes()\n"
        "    print(len(data), data[int(sys.argv[1]) :][: int(sys.argv[2])].decode())"
    )
    start = 8 + len(text) + 300_000
    assert python(hub, place, code, start, len(state)) == f"{len(content)} {state.decode()}\n"
    assert hub.downloaded("model.safetensors") == HEADER_BYTES + len(state)


@pytest.mark.ci
def test_ctrl_c_ends_a_download_at_once_and_leaves_no_half_files(hub: Hub, place: Path) -> None:
    write_fake_model(place / "large")
    write_tokenizer(place / "large")
    write_safetensors(place / "large" / "model.safetensors", {**model_shapes(), **BIG})
    hub.add("org/large", place / "large")
    hub.seconds_per_chunk = 0.2
    try:
        command = [DISTLORA, *train_words("org/large"), f"data.cache_dir={place / 'home' / 'rows'}"]
        settings = hub.environment(place / "home")
        with subprocess.Popen(command, env=settings, cwd=place, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert any(line.startswith("downloading org/large") for line in process.stdout)
            deadline = time.monotonic() + 30
            while not list(place.glob("home/hub/models--org--large/blobs/*.incomplete")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
        assert process.returncode == 128 + signal.SIGINT
        assert not list(place.glob("home/hub/**/*.incomplete"))
        assert not list(place.glob("home/hub/**/model.safetensors")), "it did not wait for the rest of the file"
        assert not (place / "run").exists()
    finally:
        hub.seconds_per_chunk = 0.0


def finished_run(run_dir: Path, *, chat_template: str | None = None, **model: Any) -> Config:
    """Make the folder of a finished run, with figures that are easy to find in a card."""
    values = {
        "model": {"path": "/data/models/base", **model},
        "data": {
            "sources": [
                {"path": "/home/someone/chats.jsonl", "weight": 0.7},
                {"path": "org/texts", "name": "en", "weight": 0.3},
            ],
            "sequence_length": 512,
        },
        "adapter": {"r": 8, "rank_pattern": {"down_proj": 32}, "target_modules": "all-linear", "lora_dropout": 0.05},
        "optim": {"lr": 1e-4, "loraplus_lr_ratio": 16.0},
        "train": {"global_batch": 16, "eval_every": 50},
        "run_dir": str(run_dir),
    }
    config = build(Config, values)
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.model.name or config.model.path,
        "revision": config.model.revision,
        "r": 8,
        "lora_alpha": 16.0,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 32},
        "target_modules": ["down_proj", "q_proj"],
    }
    for folder in (run_dir / "adapter", run_dir / "best", run_dir / "checkpoints" / "step_00000100"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        safetensors.numpy.save_file({}, folder / "adapter_model.safetensors")
    environment = {"ranks": 2, "device": "NVIDIA H100", "torch": "2.13.0", "python": "3.11.7"}
    (run_dir / "checkpoints" / "step_00000100" / "state.json").write_text(json.dumps({"environment": environment}))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(as_mapping(config)))
    losses = {0: 2.5, 50: 1.25, 100: 1.5}
    lines = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {"documents": 1000, "targets": 200_000, "tokens": 250_000}
    sources = [
        {"commit": None, "documents": 900, "share": 0.702},
        {"commit": "d" * 40, "documents": 100, "share": 0.298},
    ]
    splits = {"train": counts | {"sources": sources}, "eval": {"documents": 50, "targets": 9_000, "tokens": 12_000}}
    record = {"splits": splits, "settings": {"train_on": "assistant"}, "chat_template": chat_template}
    (run_dir / "data.json").write_text(json.dumps(record))
    summary = {
        "tokens_per_second": 12345.6,
        "train_seconds": 3725.0,
        "peak_memory_bytes": 20 * 2**30,
        "trainable_parameters": 1_000_000,
        "bits_per_parameter": 4.127,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return config


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_card_says_what_the_run_folder_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(place / "run", name="org/base", revision=COMMIT)
    assert main(["push", "run", "owner/adapter", "--dry-run"]) == 0
    assert capsys.readouterr().out == GOLDEN.read_text()


def test_the_card_of_a_checkpoint_has_its_own_figures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(place / "run", name="org/base", revision=COMMIT)
    assert main(["push", "run", "owner/adapter", "--dry-run", "--checkpoint", "best"]) == 0
    assert "held-out loss after 50 steps | 1.2500" in capsys.readouterr().out


def test_no_path_of_this_machine_is_uploaded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(place / "run")
    assert main(["push", "run", "owner/adapter", "--dry-run", "out"]) == 0
    assert "--base-model ORG/NAME" in capsys.readouterr().err
    files = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for content in files.values():
        assert b"/data/models" not in content
        assert b"/home/someone" not in content
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert main(["push", "run", "owner/adapter", "--dry-run", "named", "--base-model", "org/base"]) == 0
    assert capsys.readouterr().err == ""
    named = json.loads((place / "named" / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["revision"]) == ("org/base", None)


def test_a_template_of_the_runs_own_is_uploaded_and_the_card_sets_it(place: Path) -> None:
    finished_run(place / "run", name="org/base", revision=COMMIT, chat_template="{{ 'a' }}\n\u00e9")
    assert main(["push", "run", "owner/adapter", "--dry-run", "out"]) == 0
    assert {path.name for path in (place / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    }
    assert (place / "out" / "chat_template.jinja").read_bytes().decode() == "{{ 'a' }}\n\u00e9"
    code = (place / "out" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'hf_hub_download("owner/adapter", "chat_template.jinja")' in code
    assert "tokenizer.chat_template = Path(template)" in code.splitlines()[-1]


@pytest.mark.parametrize("name", ["data.json", "summary.json", "metrics.jsonl", "adapter/adapter_config.json"])
def test_a_damaged_record_is_named(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(place / "run", name="org/base", revision=COMMIT)
    (place / "run" / name).write_text('{"a": }')
    assert main(["push", "run", "owner/adapter", "--dry-run"]) == 2
    assert f"{name} is damaged" in capsys.readouterr().err


def test_a_whole_model_is_pushed_with_its_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = finished_run(place / "run", name="org/base", revision=COMMIT)
    values = as_mapping(config)
    values["adapter"] = {"method": "full"}
    values["quant"]["method"], values["optim"]["loraplus_lr_ratio"] = "none", 1.0
    (place / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    write_fake_model(place / "run" / "model")
    assert main(["push", "run", "owner/model", "--dry-run", "out"]) == 0
    assert capsys.readouterr().out == "wrote 4 files to out\n"
    assert {path.name for path in (place / "out").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    card = (place / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert re.search(r"adapter\.method.*full", card)
    assert "lora" not in re.sub("distlora|loraplus_lr_ratio", "", card.lower())
    assert main(["push", "run", "owner/model", "--dry-run", "--checkpoint", "100"]) == 2
    assert "without the model's configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere", "owner/x"], "holds no run"),
        (["run"], "distlora push: the following arguments are required: ORG/NAME"),
        (["run", "x"], "has no owner; write USER/x or ORG/x"),
        (["run", "owner/a--b"], "is not a valid name on the hub"),
        (["run", "owner/x", "--chekpoint", "best"], "there is no option --chekpoint (did you mean '--checkpoint'?)"),
        (["run", "owner/x", "--checkpoint", "step_90"], "it has best, step_00000100"),
        (["run", "owner/x", "--dry-run", "data.jsonl"], "is not an empty folder"),
    ],
)
def test_a_bad_push_is_refused(
    words: list[str], expected: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(place / "run", name="org/base", revision=COMMIT)
    assert main(["push", *words]) == 2
    assert expected in capsys.readouterr().err


def test_an_unfinished_run_is_not_pushed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished_run(place / "run", name="org/base", revision=COMMIT)
    (place / "run" / "adapter").rename(place / "elsewhere")
    assert main(["push", "run", "owner/x"]) == 2
    assert re.search("is not finished.*distlora resume.*--checkpoint best, step_00000100", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "token", "words", "expected"),
    [
        ("owner/x", None, [], "hf auth login"),
        ("ower/x", "hf_owner", [], "may not write to ower/x"),
        ("owner/public", "hf_owner", ["--private"], "exists and is public"),
    ],
)
def test_what_the_hub_does_not_allow_is_explained(
    name: str, token: str | None, words: list[str], expected: str, hub: Hub, place: Path, run: Run
) -> None:
    hub.add("owner/public", {"README.md": b"x"})
    finished_run(place / "run", name="org/base", revision=COMMIT)
    ended = run("push", "run", name, *words, token=token)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert expected in ended.stderr
    assert ("models", "owner/x") not in hub.repos


def test_a_push_can_go_to_a_private_repository_and_a_branch(hub: Hub, place: Path, run: Run) -> None:
    finished_run(place / "run", name="org/base", revision=COMMIT)
    ended = run("push", "run", "owner/branch", "--private", "--revision", "dev", token="hf_owner")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("/owner/branch/tree/dev\n")
    assert ended.stderr == ""
    repository = hub.repos["models", "owner/branch"]
    assert repository.private
    assert "README.md" in repository.commits[repository.refs["dev"]]
    assert "README.md" not in repository.commits[repository.refs["main"]]


def test_a_full_disk_is_named_before_the_download(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_hub, "_sizes", lambda *_: {"w": 10**18})
    (place / "models--org--x/snapshots/c").mkdir(parents=True)
    with pytest.raises(UserError, match=r"needs 1e\+03 PB.*HF_HOME"):
        launcher_hub.download(HubModel("org/x", place / "models--org--x/snapshots/c", ("w",)))
