"""NF4 bytes and a whole run on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distlora.parallel import Ranks
from distlora.training import worker
from distlora_kernels.formats import nf4
from support.closeness import assert_losses_close
from support.small_models import make_run, read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantizing_and_dequantizing_on_the_device_equal_the_cpu(dtype: torch.dtype) -> None:
    weight = torch.randn(1001, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_cpu, on_gpu = nf4.nf4_quantize(weight), nf4.nf4_quantize(weight.cuda())
    for ours, theirs in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(ours, theirs.cpu())
    actual = nf4.NF4.dequantize(on_gpu, shape=(1001, 96), dtype=dtype).cpu()
    assert torch.equal(actual, nf4.NF4.dequantize(on_cpu, shape=(1001, 96), dtype=dtype))


def test_a_run_on_the_device_has_the_losses_of_the_cpu(folders: Path, tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        make_run(tmp_path / device, folders, train={"max_steps": 5})
        worker.run(tmp_path / device, Ranks(0, 1, torch.device(device), None))
        losses[device] = [line["loss"] for line in read_metrics(tmp_path / device) if "loss" in line]
    # fp32 sums in another order, through five AdamW steps.
    assert_losses_close(losses["cuda"], losses["cpu"], relative=1e-4)
