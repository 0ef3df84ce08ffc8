"""llama.cpp's converter for tests."""

import os
import shutil
from pathlib import Path

import pytest

from distlora.config import UserError
from distlora.post.export import llama_cpp


@pytest.fixture(scope="session", name="converter")
def patched_converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return llama.cpp's converter, which takes an unknown tokenizer for GPT-2's: it knows them by a hash.

    Of a checkout in LLAMA_CPP, else downloaded. Skips without a network.
    """
    pytest.importorskip("sentencepiece")
    try:
        found = llama_cpp.converter(os.environ.get("LLAMA_CPP"))
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("llama.cpp")
    with llama_cpp.unpacked(found) as unpacked:
        for part in (llama_cpp.MODELS, llama_cpp.ADAPTERS):
            shutil.copy(unpacked / part, folder)
        for part in ("conversion", "gguf-py/gguf"):
            shutil.copytree(unpacked / part, folder / part)
    table = folder / "conversion" / "base.py"
    text, before = table.read_text(encoding="utf-8"), "\n        res = None\n"
    assert text.count(before) == 1
    table.write_text(text.replace(before, '\n        res = "gpt-2"\n'), encoding="utf-8")
    return folder
