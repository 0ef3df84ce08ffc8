"""A merge streams: what a process needs for it does not grow with the model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distlora.architecture.safetensors_headers import read_headers
from distlora.post.merge.request import MergeRequest
from distlora.post.trained import Name
from distlora.system.command_worker import to_json
from large_models import QWEN25_1_5B, write_large_adapter, write_large_model

SMALL = QWEN25_1_5B | {
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 32000,
}
"""90 M parameters: 180 MB on disk, 360 MB merged."""

CHILD = """
import re, sys
from pathlib import Path
from distlora.post.merge.merge import run
from distlora.post.merge.request import MergeRequest
from distlora.system.command_worker import from_json

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

from transformers import Qwen2ForCausalLM
before = peak()
run(from_json(MergeRequest, sys.argv[1]))
print("peak", before, peak())
"""


def peaks(tmp_path: Path, config: dict[str, object]) -> tuple[int, int, int]:
    """(bytes of the process after its imports, at most, of the largest tensor)."""
    write_large_model(tmp_path / "base", config)
    write_large_adapter(tmp_path / "adapter", config)
    name = Name(place=str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    request = MergeRequest(name=name, out=str(tmp_path / "merged"))
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, to_json(request)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    _, before, after = finished.stdout.splitlines()[-1].split()
    files = json.loads((tmp_path / "merged" / "merge.json").read_text())["files"]
    assert len(files) >= 3
    largest = max(segment.num_bytes for segment in read_headers(tmp_path / "base").values())
    return int(before), int(after), largest


@pytest.mark.ci
def test_a_merge_takes_a_few_pieces_of_memory(tmp_path: Path) -> None:
    before, after, _ = peaks(tmp_path, SMALL)
    # Four tensors at once, of each some pieces of 4 MiB, and what the allocator keeps.
    assert after - before < 200e6, f"{(after - before) / 1e6:.0f} MB"


@pytest.mark.slow
def test_a_model_of_1_5b_stays_within_the_bound(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 10 GB of disk: base, adapter, and the merged model in fp32")
    _, after, largest = peaks(tmp_path, QWEN25_1_5B)
    assert after <= 3 * largest + 300e6, f"{after / 1e6:.0f} MB"
