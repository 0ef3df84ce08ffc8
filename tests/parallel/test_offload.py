"""Check the inputs of checkpointed decoder layers in host memory.

The numbers are the same; inputs leave and return in order, in the same memory from step to step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from distlora.config import UserError
from distlora.model.adapters import BlockContext
from distlora.model.build import CausalLM
from distlora.model.layer_wrapper import Block, HostInputs
from distlora.parallel import Ranks
from distlora.system import host_memory
from distlora.training import setup, worker
from support.dequantized_layers import Layer
from support.runs import outcome
from support.small_models import make_run, read_metrics
from support.tiers import ci
from support.worlds import World

BLOCKS = 4


class Recorded(HostInputs):
    """Writes down what is copied: ("out" or "back", which place)."""

    def __init__(self, num_inputs: int, nbytes: int) -> None:
        super().__init__(torch.device("cpu"))
        self.reserve(num_inputs, nbytes)
        self.places = [place.data_ptr() for places in self._free.values() for place in places]
        self.copies: list[tuple[str, int]] = []

    def copy(self, to: Tensor, source: Tensor) -> None:
        way, place = ("out", to) if to.data_ptr() in self.places else ("back", source)
        self.copies.append((way, place.data_ptr()))
        super().copy(to, source)


def num_free(inputs: HostInputs) -> int:
    """Return the number of free places."""
    return sum(map(len, inputs._free.values()))


def blocks_and_input(num_micro: int = 1, inputs: HostInputs | None = None) -> tuple[nn.Sequential, Tensor]:
    blocks = []
    for _ in range(BLOCKS):
        context = BlockContext()
        block = Block(Layer(context), context)
        block.checkpointing, block.num_micro, block.host_inputs = True, num_micro, inputs
        blocks.append(block)
    x = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(7), requires_grad=True)
    return nn.Sequential(*blocks), x


def test_of_the_inputs_the_device_holds_the_newest_and_in_backward_two() -> None:
    inputs = Recorded(BLOCKS, 4 * 5 * 64 * 4)
    model, x = blocks_and_input(1, inputs)
    storages: list[StorageWeakRef] = []
    for block in model:
        block.register_forward_pre_hook(lambda _, args: storages.append(StorageWeakRef(args[0].untyped_storage())))
    loss = model(x.detach()).square().sum()
    assert [storage.expired() for storage in storages[1:]] == [True] * (BLOCKS - 2) + [False]
    alive: list[int] = []
    back: list[StorageWeakRef] = []
    bring = inputs.copy

    def watched(to: Tensor, source: Tensor) -> None:
        back.append(StorageWeakRef(to.untyped_storage()))
        bring(to, source)
        alive.append(sum(not storage.expired() for storage in [*storages[1:], *back]))

    inputs.copy = watched  # type: ignore[method-assign]
    loss.backward()
    assert alive == [2] * (BLOCKS - 1), "the one that is recomputed from, and the next"
    assert all(storage.expired() for storage in [*storages[1:], *back])


def run_and_memory(ranks: Ranks, *, run_dir: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return metrics and memory of the inputs: (places reserved, places at the end, bytes of growth)."""
    figures: list[int] = []
    original = setup.reserve_offload_memory
    reserved: list[HostInputs] = []

    def reserve(model: CausalLM, count: int, nbytes: int, device: torch.device) -> None:
        original(model, count, nbytes, device)
        inputs = model.blocks[0].host_inputs
        reserved.append(inputs)
        figures.extend((num_free(inputs), inputs.taken_bytes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "reserve_offload_memory", reserve)
        worker.run(run_dir, ranks)
    return read_metrics(run_dir), [*figures, num_free(reserved[0]), reserved[0].taken_bytes]


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (1, {"micro_batch": 5, "accumulate": "block"}),
        ci(3, {"micro_batch": 2, "accumulate": "block", "eval_every": 1}),
    ],
    ids=str,
)
def test_a_run_is_the_same_bit_for_bit_and_takes_no_memory_in_a_step(
    world: World, folders: Path, tmp_path: Path, size: int, settings: dict[str, Any]
) -> None:
    settings = {"max_steps": 2, **settings}
    make_run(tmp_path / "block", folders, train={**settings, "checkpointing": "block"})
    expected_losses, expected = outcome(world, size, tmp_path / "block")
    make_run(tmp_path / "run", folders, train={**settings, "checkpointing": "offload"})
    metrics, figures = world.run(size, run_and_memory, run_dir=tmp_path / "run")[0]
    assert [line["loss"] if "loss" in line else line["eval_loss"] for line in metrics] == expected_losses
    adapter = safetensors.torch.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], tensor) for name, tensor in expected.items())
    slices = -(-12 // (size * settings["micro_batch"])) if settings["accumulate"] == "block" else 1
    assert figures[:2] == figures[2:]
    assert figures[0] == 3 * slices, "an input for each block and slice"


def refused(ranks: Ranks, *, run_dir: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(ranks.world))
        patch.setattr(host_memory, "available_bytes", lambda: 2**26 if ranks.rank == 1 else 2**40)
        patch.setattr(setup, "load_base", lambda *arguments, **options: pytest.fail("minutes for a large model"))
        with pytest.raises(UserError) as error:
            setup.start_run_model(worker.load_config(run_dir), ranks)
    return str(error.value)


def test_a_machine_with_too_little_host_memory_is_refused_on_every_rank(
    world: World, folders: Path, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", folders, train={"checkpointing": "offload", "accumulate": "block", "micro_batch": 1})
    messages = world.run(2, refused, run_dir=tmp_path / "run")
    for message, left in zip(messages, ("1,024.00 GiB", "0.06 GiB"), strict=True):
        assert (
            "0.06 GiB of host memory for the inputs of the decoder layers on each process (3 layers x 6 x 0.0 MiB)"
            in message
        )
        assert f"this one has {left} left for 2" in message
        assert "set train.accumulate=step, which takes 1/6 of it, or train.checkpointing=block" in message
