"""`distlora merge --residual`, then `distlora unmerge`: the base's files come back, bit for bit."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.config import UserError
from distlora.post.merge.difference import decode, encode
from distlora.post.merge.merge import merge_to
from distlora.post.merge.unmerge import unmerge
from distlora.post.trained import Name
from distlora.training.publish import publish_result
from family_models import config_for, hf_model, load_ours
from test_merging import adapted, quiet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_bits_come_back_from_any_prediction(dtype: torch.dtype) -> None:
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    limits = torch.iinfo(integers)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(limits.min, limits.max + 1, (2, 5000), generator=generator).to(integers)
    bits[:, :4] = torch.tensor([0, limits.min, limits.max, -1])
    bits[1, 2000:] = bits[0, 2000:]
    values, predicted = bits.view(dtype)
    contents = encode(values, predicted)
    assert torch.equal(decode(contents, predicted).view(integers), bits[0])
    near = (values[2000:].float() * (1 + 1e-3)).to(dtype)
    assert torch.equal(decode(encode(values[2000:], near), near).view(integers), bits[0, 2000:])


CASES: dict[str, tuple[str, dict[str, Any], str, torch.dtype]] = {
    "trained": ("llama3-tied", {}, "trained", torch.bfloat16),
    "original": ("gemma3", {}, "original", torch.bfloat16),
    "fp16": ("qwen2", {}, "original", torch.float16),
    "fp32": ("mixtral", {}, "trained", torch.float32),
    "transposed": ("gpt-oss", {}, "original", torch.bfloat16),
    "dora": ("qwen3", {"adapter": {"use_dora": True, "r": 4}}, "original", torch.bfloat16),
}


@pytest.mark.parametrize("name", CASES)
def test_the_base_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    variant, sections, onto, dtype = CASES[name]
    _, trained = adapted(tmp_path, variant, **sections)
    merged, back, base = tmp_path / "merged", tmp_path / "back", tmp_path / "base"
    receipt = merge_to(trained, merged, onto=onto, dtype=dtype, say=quiet, residual=True)  # type: ignore[arg-type]
    base.rename(tmp_path / "gone")
    (tmp_path / "adapter").rename(tmp_path / "gone-adapter")
    files = unmerge(merged, back, say=quiet)
    assert {path.name for path in back.iterdir()} == set(files) == {path.name for path in (tmp_path / "gone").iterdir()}
    match, mismatch, errors = filecmp.cmpfiles(back, tmp_path / "gone", files, shallow=False)
    assert (sorted(match), mismatch, errors) == (sorted(files), [], [])
    assert receipt.residual["files"] == files


def test_most_of_a_base_in_16_bits_is_predicted_and_damage_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    hf_model("llama").bfloat16().save_pretrained(base)
    model, backend = load_ours(base)
    publish_result(tmp_path / "adapter", model, config_for(base), None, backend)
    trained = Name(place=str(tmp_path / "adapter"), base=str(base)).read()
    for onto, limit in (("original", 0.2), ("trained", 0.7)):
        receipt = merge_to(trained, tmp_path / onto, onto=onto, dtype=torch.bfloat16, say=quiet, residual=True)
        content = tmp_path / onto / "residual" / "residual.bin"
        assert content.stat().st_size < limit * receipt.residual["base_bytes"]
    merged, out = tmp_path / "original", tmp_path / "back"
    for damaged in (merged / "model.safetensors", content):
        whole = damaged.read_bytes()
        place = len(whole) // 2
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"{damaged.name} is not what was written"):
            unmerge(damaged.parent if damaged.parent == merged else damaged.parents[1], out, say=quiet)
        assert not out.exists()
        damaged.write_bytes(whole)
    unmerge(merged, out, say=quiet)
    assert filecmp.cmp(out / "model.safetensors", base / "model.safetensors", shallow=False)
