"""Check that a gather returns what every rank loaded; else the run ends by name, before a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distlora.parallel import Backend, Ranks, fsdp2
from distlora.parallel.integrity import LINE, DamagedWeightsError, checksums
from distlora.training import worker
from distlora_kernels.formats import nf4
from support.runs import started
from support.small_models import make_run, read_metrics
from support.worlds import World


def of(data: Tensor) -> int:
    return int(checksums(data[None]))


def test_every_kind_of_damage_is_seen_in_every_place() -> None:
    size = 4 * LINE + 1000  # More than one line.
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = of(data)
    places = [*range(8), 4 * LINE - 1, 4 * LINE, size - 2]
    for place in places:
        for bit in range(8):
            damaged = data.clone()
            damaged[place] ^= 1 << bit
            assert of(damaged) != expected, (place, bit)
    for one, other in [(0, 1), (3, 7), (2, 2 + 2**15), (3, 4 * LINE - 1), (4 * LINE + 1, 4 * LINE + 5)]:
        swapped = data.clone()
        swapped[one], swapped[other] = data[other].item() ^ 0x80, data[other]
        before = of(swapped)
        swapped[one], swapped[other] = swapped[other].item(), swapped[one].item()
        assert of(swapped) != before, (one, other)
    rows = data[: 4 * LINE].view(-1, 256)
    assert of(rows.flip(0).flatten()) != of(rows.flatten())
    assert of(rows.roll(1, 0).flatten()) != of(rows.flatten())
    assert of(torch.zeros(size, dtype=torch.uint8)) == 0 != of(torch.ones(size, dtype=torch.uint8))


def own_rows(backend: Backend, name: str) -> Tensor:
    """Return this rank's rows of a tensor, in the memory that they are kept in."""
    (rows,) = [frozen.rows for frozen in backend._frozen._tensors if frozen.name == name]
    return rows


def sound_then_every_unit_damaged(ranks: Ranks, *, run_dir: Path, damaged: tuple[str, ...]) -> list[str]:
    """Run a sound forward, then return the message for one bad byte of rank 1 in each tensor."""
    model, backend, batch = started(ranks, run_dir)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    model(*batch)
    after = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    units = len(model.blocks) + 3
    assert sum(hooks) - sum(after) == units + 1, "a hook stays"
    said = []
    for name in damaged:
        rows = own_rows(backend, name)
        flat = rows.flatten().view(torch.uint8)
        if ranks.rank == 1:
            assert flat.data_ptr() == rows.data_ptr()
            flat[len(flat) // 2] ^= 4
        backend.barrier()  # Other ranks read this memory without waiting.
        backend._frozen.check_next_forward()
        model.reshard()  # The root stays gathered after a forward without backward.
        with pytest.raises(DamagedWeightsError) as caught:
            model(*batch)
        with pytest.raises(DamagedWeightsError, match="what was trained since the last save"):
            backend.check_weights()
        if ranks.rank == 1:
            flat[len(flat) // 2] ^= 4
        backend.barrier()
        said.append(str(caught.value))
        model.reshard()
    backend.check_weights()
    model(*batch)
    if ranks.rank == 1 and (offsets := [b for name, b in model.named_buffers() if name.endswith("up_proj.offset")]):
        offsets[1].add_(1)
    said.append("")
    if any(name.endswith(".offset") for name, _ in model.named_buffers()):
        with pytest.raises(DamagedWeightsError) as caught:
            backend.watch_weights(model)
        said[-1] = str(caught.value)
    return said


CELLS = [
    ("llama", 3, {}, ("model.layers.1.mlp.up_proj.codes", "model.layers.0.mlp.gate_proj.scales", "model.norm.weight")),
    (
        "llama-tied",
        2,
        {"quant": {"method": "none"}},
        ("model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"),
    ),
    ("mixtral", 2, {}, ("model.layers.0.mlp.experts.gate_up_proj.group_scale",)),
]


@pytest.mark.parametrize(("model", "size", "sections", "damaged"), CELLS, ids=lambda value: str(value)[:20])
def test_a_byte_that_changed_in_a_shard_is_named_on_every_rank(
    world: World, folders: Path, tmp_path: Path, model: str, size: int, sections: dict, damaged: tuple[str, ...]
) -> None:
    make_run(tmp_path / "run", folders, model, **sections)
    by_rank = world.run(size, sound_then_every_unit_damaged, run_dir=tmp_path / "run", damaged=damaged)
    assert all(said == by_rank[0] for said in by_rank)
    *of_shards, of_offset = by_rank[0]
    assert (
        model != "llama" or "layers.1.mlp.up_proj.offset differs between rank 0 and rank 1 after loading" in of_offset
    )
    for name, said in zip(damaged, of_shards, strict=True):
        assert f"the frozen base is damaged: {name}, rows " in said
        assert "those of rank 1" in said
        assert "the memory of rank 1 has changed since then; nothing was trained on them" in said


def damaged_on_the_way(ranks: Ranks, *, run_dir: Path) -> str:
    """Run with one byte of the second block wrong on rank 0, in its first gather."""
    calls, gather = [0], fsdp2._all_gather

    def faulty(output: Tensor, given: Tensor, **options: Any) -> dist.Work | None:
        work = gather(output, given, **options)
        calls[0] += 1
        if ranks.rank == 0 and calls[0] == 4:
            if work is not None:
                work.wait()
            # Of rank 1, whose bytes are the second half: padding of attention's four groups, then gate_proj's codes.
            whole = output.view(torch.uint8)
            whole[len(whole) // 2 + 4 * nf4.NF4.group_bytes + 100] ^= 32
        return work

    fsdp2._all_gather = faulty
    try:
        with pytest.raises(DamagedWeightsError) as caught:
            worker.run(run_dir, ranks)
    finally:
        fsdp2._all_gather = gather
    return str(caught.value)


def test_a_byte_that_one_rank_got_wrong_ends_the_run_on_all_before_a_step(
    world: World, folders: Path, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", folders, train={"save_every": 1, "max_steps": 2})
    by_rank = world.run(2, damaged_on_the_way, run_dir=tmp_path / "run")
    assert by_rank[0] == by_rank[1]
    assert "the frozen base is damaged: model.layers.1.mlp.gate_proj.codes, rows 1 to 1" in by_rank[0]
    assert (
        "those of rank 1, are not what rank 1 loaded; rank 1 still has it and rank 0 got something else" in by_rank[0]
    )
    assert not list(tmp_path.glob("run/checkpoints/step_*"))
    assert read_metrics(tmp_path / "run") == []


def rots_before_the_second_save(ranks: Ranks, *, run_dir: Path) -> str:
    """Run with a byte of rank 1's shard that changes after the first save."""
    calls, check = [0], Backend.check_weights

    def later(backend: Backend) -> None:
        calls[0] += 1
        if calls[0] == 2 and ranks.rank == 1:
            own_rows(backend, "model.layers.2.mlp.up_proj.scales").view(torch.uint8)[0, 5] ^= 1
        check(backend)

    Backend.check_weights = later
    try:
        with pytest.raises(DamagedWeightsError) as caught:
            worker.run(run_dir, ranks)
    finally:
        Backend.check_weights = check
    return str(caught.value)


def test_with_train_verify_a_save_after_damage_is_not_made(world: World, folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, train={"save_every": 2, "max_steps": 6, "verify": True})
    by_rank = world.run(2, rots_before_the_second_save, run_dir=tmp_path / "run")
    assert by_rank[0] == by_rank[1]
    assert "the memory of rank 1 has changed" in by_rank[0]
    assert "what was trained since the last save may be wrong and is not saved" in by_rank[0]
    assert [folder.name for folder in tmp_path.glob("run/checkpoints/step_*")] == ["step_00000002"]


def test_one_process_checks_what_it_loaded_at_every_save(folders: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", folders, "qwen3", train={"max_steps": 2, "verify": True}, quant={"dense_layers": 1})
    single = Ranks(0, 1, torch.device("cpu"), None)
    worker.run(tmp_path / "run", single)
    assert (tmp_path / "run" / "adapter").is_dir()
    model, backend, batch = started(single, tmp_path / "run")
    model(*batch)
    backend.check_weights()
    copy = model.blocks[0].get_submodule("inner.mlp.gate_proj").dense_copy
    copy[3, 5] += 1
    with pytest.raises(DamagedWeightsError, match=r"the copy of model\.layers\.0\.mlp\.gate_proj .* of rank 0 is not"):
        backend.check_weights()
    copy[3, 5] -= 1
    model.blocks[1].get_parameter("inner.mlp.down_proj.codes").data[0, 77] ^= 16
    with pytest.raises(DamagedWeightsError, match=r"layers\.1\.mlp\.down_proj\.codes, rows 0 to 1, those of rank 0"):
        backend.check_weights()
