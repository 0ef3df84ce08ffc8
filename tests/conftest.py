"""Fixtures that several subjects share: a world of ranks, small model folders, a data file, a tokenizer."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    import triton_interpreter  # noqa: F401  (before anything imports triton)

from distlora.model import fused_modules
from distlora_kernels import dispatch
from small_models import write_model_folder, write_text_file
from worlds import World, start_world

LONGEST = (
    "test_slurm_cluster",
    "test_packed",
    "test_end_to_end",
    "test_parity",
    "test_sweeps",
    "test_methods",
    "test_families",
    "test_launcher_workers",
    "test_exporting",
    "test_zero3",
    "test_generation",
    "test_full",
    "test_resume",
    "test_hsdp",
    "test_offline",
    "test_hub",
    "test_dropout",
    "test_evaluation",
    "test_layout",
    "test_loading_memory",
    "test_prequantized",
    "test_quantized_cache",
    "test_documents",
    "test_data_hub",
)
"""Files that take longest, in the order in which they begin: three processes share the files, and whichever has nothing
left waits for the others' last ones. Those of real commands, which mostly wait, beside those that compute."""

# Small tensors gain nothing from threads, and on a busy machine two of them wait for each other; in commands, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts its background jobs (`make test &`) deaf to Ctrl-C, which the commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True)
def _rotary_embeddings_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is put in for the whole process (distlora/model/fused_modules.py); a test that follows needs the family's
    own."""
    exchange = fused_modules.exchange

    def undone_later(decoder: Any, *arguments: Any, **options: Any) -> str:
        module = sys.modules[type(decoder).__module__]
        monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)
        return exchange(decoder, *arguments, **options)

    monkeypatch.setattr(fused_modules, "exchange", undone_later)


@pytest.fixture
def triton_device() -> Iterator[torch.device]:
    """Where the Triton kernels run in a test: the GPU, or without one the CPU, in Triton's interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with dispatch.interpreted():
            yield torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _caches_are_the_test_runs_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a test does not place elsewhere is kept in no user's home; worlds and commands inherit it."""
    os.environ["DISTLORA_CACHE"] = str(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Four gloo ranks, started at the first use and kept for the whole run."""
    with start_world() as running:
        yield running


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small random models (llama, llama-tied, qwen3, mixtral) and text.jsonl."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("llama", "llama-tied", "qwen3", "mixtral"):
        write_model_folder(root / name, name)
    write_text_file(root / "text.jsonl")
    return root
