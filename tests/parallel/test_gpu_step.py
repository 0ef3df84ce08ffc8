"""Whole training steps under FSDP2 on one GPU, a world of one rank: gathers, prefetch, memory, the bytes of the base.

FSDP2 of torch 2.11 makes every sharded parameter require a gradient, which uint8 cannot; there, and in this test alone,
the packed bytes are Parameters of bf16 that are viewed as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distlora.checkpoint.saver import checkpoint_files
from distlora.config import Config
from distlora.config.cluster import FIRST_TORCH
from distlora.loading.tensor_files import write_files
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.frozen_linear import FrozenLinear
from distlora.model.layer_wrapper import HostInputs
from distlora.parallel import Backend, Ranks, Shards, fsdp2
from distlora.parallel.ranks import Traffic
from distlora.training import setup, worker
from distlora.training.optimizers import Optimizer
from distlora_kernels import operands
from distlora_kernels.operands import FrozenWeight
from support.small_models import make_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]
STEPS = 4
BYTES = ("codes", "scales")


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Create a process group of this process alone."""
    dist.init_process_group("cuda:nccl,cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def hold_bytes_as_bf16(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for linear in (m for m in model.modules() if isinstance(m, FrozenLinear)):
        for name in BYTES:
            packed = linear.get_parameter(name)
            setattr(linear, name, nn.Parameter(packed.data.view(torch.bfloat16), requires_grad=False))

    def frozen_weight(self: FrozenLinear) -> FrozenWeight:
        stored = self.stored
        parts = [part.detach().view(torch.uint8) for part in stored.parts[:2]]
        return stored._replace(parts=(*parts, *stored.parts[2:]))

    monkeypatch.setattr(FrozenLinear, "frozen_weight", property(frozen_weight))


def packed_bytes(model: CausalLM) -> dict[str, Tensor]:
    """Return copies of the quantized weights as bytes on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in BYTES:
            local = parameter.data.to_local() if isinstance(parameter.data, DTensor) else parameter.data
            found[name.replace("_fsdp_wrapped_module.", "")] = local.cpu().view(torch.uint8).clone()
    return found


def train_steps(model: CausalLM, device: torch.device) -> list[Tensor]:
    """Return the losses of some SGD steps on the adapters, and the adapters."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 500, (STEPS, 4, 65), generator=generator).to(device)
    # Two documents a row.
    positions = torch.cat([torch.arange(23), torch.arange(41)]).expand(4, 64)
    documents = model.documents_of(positions, device)
    positions = positions.to(device)
    adapters = list(adapter_parameters(model).values())
    losses, allocated, pinned = torch.empty(STEPS, device=device), [], []
    for step in range(STEPS):
        loss = model(tokens[step, :, :-1], positions, tokens[step, :, 1:], documents=documents).sum() / 256
        loss.backward()
        with torch.no_grad():
            for parameter in adapters:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        losses[step] = loss.detach()
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
        pinned.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    assert len(set(pinned)) == 1, f"host memory is pinned in a step: {pinned}"
    assert len(set(allocated[1:])) == 1, f"memory is left behind by steps: {allocated}"
    return [losses, *(parameter.detach().clone() for parameter in adapters)]


def started(config: Config, device: torch.device) -> CausalLM:
    model, _, _ = setup.start_run_model(config, Ranks(0, 1, device, None))
    with torch.no_grad():
        for index, parameter in enumerate(adapter_parameters(model).values()):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.copy_(values / parameter.shape[1] ** 0.5)
    return model


COPY = HostInputs.copy


def late_copy(inputs: HostInputs, to: Tensor, source: Tensor) -> torch.cuda.Event | None:
    """Run HostInputs.copy after milliseconds of work on its stream, so that code that does not wait is wrong."""
    with torch.cuda.stream(inputs._side):
        torch.cuda._sleep(10**7)
    return COPY(inputs, to, source)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dense_layers": 2},
        {"checkpointing": "none"},
        {"checkpointing": "offload"},
        {"checkpointing": "selective"},
        {"checkpointing": "selective", "mlp_tile": 24},
        {"mlp_tile": 24},
        {"checkpointing": "offload", "mlp_tile": 24},
    ],
    ids=str,
)
def test_steps_of_a_sharded_base_equal_those_of_a_whole_one(
    group: dist.ProcessGroup,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    settings = dict(settings)
    # With its index, as tensors and the workers have it: the scratch is kept by device.
    device = torch.device("cuda", torch.cuda.current_device())
    monkeypatch.setattr(operands, "_buffers", {})
    quant = {"dense_layers": settings.pop("dense_layers", 0)}
    config = make_run(tmp_path / "run", folders, train={"dtype": "bf16", **settings}, quant=quant)
    offloads = settings.get("checkpointing") == "offload"
    # What inputs on the host must not change is compared with inputs on the device.
    here = {"dtype": "bf16", **settings} | ({"checkpointing": "block"} if offloads else {})
    whole = started(make_run(tmp_path / "whole", folders, train=here, quant=quant), device)
    before = packed_bytes(whole)
    assert before
    expected = train_steps(whole, device)
    del whole
    if offloads:
        monkeypatch.setattr(HostInputs, "copy", late_copy)
    for prefetch in (False, True):
        with monkeypatch.context() as patch:
            model = started(config, device)
            if tuple(map(int, torch.__version__.split(".")[:2])) < FIRST_TORCH:
                hold_bytes_as_bf16(model, patch)
                patch.setattr(fsdp2, "check_torch", lambda version: None)
            fsdp2.shard(model, Shards(0, 1, group), device, prefetch=prefetch, traffic=Traffic())
            actual = train_steps(model, device)
            for ours, theirs in zip(actual, expected, strict=True):
                assert torch.equal(ours, theirs)
            after = packed_bytes(model)
            assert after.keys() == before.keys()
            for name, packed in before.items():
                assert torch.equal(after[name], packed), f"{name} has other bytes after {STEPS} steps"
            assert len(operands._buffers) == 1, "weights are dequantized on a stream beside the one that computes"
            del model
    assert torch.cuda.memory_stats()["num_alloc_retries"] == 0


def sharded_trainer(
    config: Config, device: torch.device, group: dist.ProcessGroup
) -> tuple[CausalLM, Optimizer, dict[str, nn.Parameter], Backend]:
    """Build a fully trained model sharded over one rank, and its optimizer."""
    model, _, _ = setup.start_run_model(config, Ranks(0, 1, device, None))
    ranks = Ranks(0, 1, device, group)
    backend = Backend(ranks, Shards.over(ranks), _root=model)
    fsdp2.shard(model, backend.shards, device, prefetch=False, traffic=backend.traffic)
    trained = worker.trained_parameters(model)
    backend.reduce_gradients_of(trained.values(), config.parallel.bucket_mb)
    return model, worker.build_optimizer(backend.updated(trained), config.optim), trained, backend


def test_moments_that_are_cut_over_the_ranks_are_restored_on_the_gpu(
    group: dist.ProcessGroup, folders: Path, tmp_path: Path
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    config = make_run(tmp_path / "run", folders, adapter={"method": "full"}, quant={"method": "none"})
    model, optimizer, trained, backend = sharded_trainer(config, device, group)
    tokens = torch.randint(0, 500, (2, 65), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(64, device=device).expand(2, 64)
    documents = model.documents_of(positions.cpu(), device)
    for _ in range(2):
        backend.zero_gradients()
        loss = model(tokens[:, :-1], positions, tokens[:, 1:], documents=documents).sum() / 128
        backend.backward(loss, last=True)
        backend.finish_gradients()
        optimizer.step(1e-3, torch.tensor(True, device=device))
    write_files(tmp_path, checkpoint_files(model, config.spec, optimizer, trained, backend), backend)
    saved = {path: state.cpu().clone() for path, state in optimizer.state_tensors().items()}
    assert any(state.abs().max() > 0 for path, state in saved.items() if path.startswith("exp_avg/"))

    model, optimizer, trained, backend = sharded_trainer(config, device, group)
    worker.restore(tmp_path, model, optimizer, trained, backend)
    restored = optimizer.state_tensors()
    assert restored.keys() == saved.keys()
    for path, state in restored.items():
        assert state.device == optimizer.parameters[path.partition("/")[2]].device
        assert torch.equal(state.cpu(), saved[path]), f"{path} is not what was saved"
