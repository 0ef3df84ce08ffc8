"""Fixtures shared by several test files: a world of ranks, small model folders, the device of Triton kernels."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
import transformers

if not torch.cuda.is_available():
    from support import triton_interpreter  # noqa: F401  (before anything imports triton)

from distlora import derive
from distlora.architecture import spec
from distlora_kernels import dispatch, native, nf4_cpu, products
from support import cpu_paths
from support.family_models import FolderOf, write_family_folder
from support.preference_data import write_preferences
from support.small_models import write_model_folder, write_text_file
from support.worlds import Alone, World, start_world

ROOT = Path(__file__).parents[1]

DURATIONS = Path(__file__).with_name("durations.json")
"""Seconds of each test file, written by `--store-durations`."""

nf4_cpu.has_bitsandbytes()  # It imports it without TorchInductor, which PEFT would: 0.7 CPU seconds and a warning.

# Small tensors gain nothing from threads, and on a busy machine two threads wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

products.reserve()  # What a first product reserves is no step's memory.

LIBRARY = native._library
"""The function itself: tests replace it."""
CALLERS_COMPILER, NO_COMPILER = os.environ.get("CXX"), "none-in-tests"

# Caches stay out of the user's home; ranks and commands inherit the variable. All test processes share the derived
# architectures, and derive them in this process: a new process takes seconds. They are probed, not proved, because the
# proofs of a hundred small models take minutes. test_prove.py, test_conformance.py, the fixture `proof` and
# pretend_cuda/ prove models, and do not use this cache.
CALLERS_CACHE = os.environ.get("DISTLORA_CACHE")
_CACHES = tempfile.TemporaryDirectory(prefix="distlora-tests-")
os.environ["DISTLORA_CACHE"] = _CACHES.name
# Trackio reads it once, when a test imports TRL: two test processes would share the database in the user's home.
os.environ["TRACKIO_DIR"] = f"{_CACHES.name}/trackio"
SHARED = ROOT / ".pytest_cache" / "probed"
SHARED.mkdir(parents=True, exist_ok=True)
Path(_CACHES.name, "architectures").symlink_to(SHARED)
spec.derive = derive.derive
PROVED, derive._proved = derive._proved, derive.probe
transformers.utils.logging.disable_progress_bar()  # Such as that of a small model that it loads.

# A shell starts background jobs (`make test &`) with SIGINT ignored, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With `-m gpu`, skip the files that import what a bare GPU machine lacks; in any other run they are errors."""
    report = yield
    missing = re.search(r"(?:ModuleNotFound|Import)Error: (.*)", str(report.longrepr))
    if report.failed and missing is not None and collector.config.getoption("markexpr") == "gpu":
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {missing[1]}")
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-durations", action="store_true", help="write the seconds of each file to durations.json")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no process is left with one at the end."""
    seconds = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -seconds.get(item.path.stem, 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Store how long each file took; a file that did not run keeps its time."""
    if not config.getoption("--store-durations"):
        return
    found: collections.Counter[str] = collections.Counter()
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            found[Path(report.fspath).stem] += report.duration
    seconds = json.loads(DURATIONS.read_text()) | {name: round(total) for name, total in found.items()}
    DURATIONS.write_text(json.dumps(dict(sorted(seconds.items())), indent=0) + "\n")


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Make torch.empty give NaN, so that an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _train_compile_auto_is_off() -> Iterator[None]:
    """Leave train.compile=auto without a compiler: tests compare bits with other paths. `compiler` brings it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", NO_COMPILER)
        yield


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this test compile, with the compiler that the tests were started with."""
    if CALLERS_COMPILER is None:
        monkeypatch.delenv("CXX")
    else:
        monkeypatch.setenv("CXX", CALLERS_COMPILER)
    yield
    LIBRARY.cache_clear()  # Else train.compile=auto would be on in later tests of this process.
    products.use(False)


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this test derive models as commands do: with all checks, into an empty cache."""
    monkeypatch.setattr(derive, "_proved", PROVED)
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path / "cache"))
    spec._architecture_of.cache_clear()


@pytest.fixture
def torch_products() -> Iterator[None]:
    """Leave products to torch on every processor, for tests that compare bits or operations with transformers'."""
    for _ in cpu_paths.used("generic"):
        yield


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Yield the device of the Triton kernels: the GPU, or the CPU in Triton's interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with dispatch.interpreted():
            yield torch.device("cpu")


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Start four gloo ranks at the first use and keep them for the whole run."""
    with start_world() as running:
        yield running


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with small random models (llama, llama-tied, qwen3, mixtral) and text.jsonl."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("llama", "llama-tied", "qwen3", "mixtral"):
        write_model_folder(root / name, name)
    write_text_file(root / "text.jsonl")
    return root


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    """Start ranks that DeepSpeed has for itself, at the first use."""
    with contextlib.ExitStack() as stack:
        yield Alone(stack)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write preference pairs."""
    return write_preferences(tmp_path_factory.mktemp("preferences") / "pairs.jsonl")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """Return a function that writes a variant of family_models.py at its first use, and returns its folder."""

    @functools.cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("families") / name
        write_family_folder(path, name)
        (path / "tokenizer.json").write_text("{}")  # Its presence is all that is asked.
        return path

    return folder
