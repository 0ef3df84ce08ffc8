"""Images on several ranks, of which some have none: no rank waits for another, and training equals that of one process.

The single process runs all rows at once, in slices and with recomputation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distlora.architecture.images import ImageLayout
from distlora.architecture.spec import Architecture
from distlora.config import ParallelConfig
from distlora.derive import small_of
from distlora.derive.images import Samples, composite, with_own_tokens
from distlora.derive.prove import SINGLE, load_ours, next_tokens, positions_of, relative_error
from distlora.derive.shrink import build_on_meta, read_settings
from distlora.model.adapters import adapter_parameters
from distlora.model.images import Images, ProcessedImage
from distlora.parallel import Ranks
from support.image_configs import image_content
from support.tiers import ci
from support.worlds import World, start_world

pytest.importorskip("torchvision", reason="image processors need torchvision: pip install 'distlora[vision]'")

NUM_ROWS = 4


class Composite(NamedTuple):
    folder: Path
    small: str
    layout: str
    samples: Samples


@pytest.fixture(scope="module")
def composites(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Composite] = {}

    def of(model_type: str) -> Composite:
        if model_type not in made:
            folder, content = tmp_path_factory.mktemp(model_type), image_content(model_type)
            full = build_on_meta(read_settings(content["config"]))
            small, config = small_of(content["config"], full, model_type)
            numbered = with_own_tokens(config)
            _, layout, samples, _ = composite(small, numbered, content["processor"], model_type, folder)
            made[model_type] = Composite(folder, small.to_json(), layout.to_json(), samples)
        return made[model_type]

    return of


@pytest.fixture(scope="module")
def regrouped() -> Iterator[World]:
    with start_world(regroups=True) as running:  # DeepSpeed broadcasts within the default group.
        yield running


class Row(NamedTuple):
    ids: Tensor
    positions: Tensor
    labels: Tensor
    images: tuple[ProcessedImage, ...]


def rows_of(samples: Samples) -> list[Row]:
    """Return NUM_ROWS packed rows of one length. Those with even numbers have images."""
    packed, generator = Row(*samples.together), torch.Generator().manual_seed(8)
    rows = []
    for number in range(NUM_ROWS):
        text = torch.randint(5, 95, packed.ids.shape, generator=generator)
        others = packed.ids != samples.token_id
        ids = torch.where(others, text, packed.ids)
        labels = torch.where(packed.labels < 0, packed.labels, next_tokens(ids))
        if number % 2 == 0:
            rows.append(Row(ids, packed.positions, labels, packed.images))
        else:
            rows.append(Row(text, positions_of(text), next_tokens(text), ()))
    return rows


def train(ranks: Ranks, made: Composite, **parallel: Any) -> tuple[Tensor, Tensor]:
    """Return the losses and the adapter (flat) of three AdamW steps, whose rows are divided over the ranks."""
    degree = parallel.pop("shard_degree", None)
    layout = ImageLayout.from_json(made.layout)
    small = Architecture.from_json(made.small)
    settings = ParallelConfig(**parallel) if parallel else None
    ours, backend = load_ours(small, made.folder, ranks=ranks, images=layout, parallel=settings, shard_degree=degree)
    backend.watch_weights(ours)
    all_rows = rows_of(made.samples)
    batches: Sequence[Sequence[Row]] = [[row] for row in all_rows[ranks.rank :: ranks.world]]
    if ranks.world == 1:
        batches = [all_rows]
        ours.set_num_micro(2)
        for block in ours.blocks:
            block.checkpointing = True
    parameters = adapter_parameters(ours)
    backend.reduce_gradients_of(list(parameters.values()), 4.0)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, eps=1e-5, weight_decay=0.0)
    losses = []
    for _ in range(3):
        total = torch.zeros(())
        for number, batch in enumerate(batches):
            ids, positions, labels = (torch.cat(tensors) for tensors in list(zip(*batch, strict=True))[:3])
            images = Images.of(
                [row.images for row in batch], ids == layout.token_id, ids, positions, ours.merger, ids.device
            )
            assert (images is None) == (not any(row.images for row in batch))
            loss = ours(ids, positions, labels, images=images).sum() / 1000
            backend.backward(loss, last=number == len(batches) - 1)
            total += loss.detach()
        backend.finish_gradients()
        losses.append(backend.sum_over_ranks(total.clone()))
        optimizer.step()
        backend.zero_gradients()
    backend.check_weights()
    return torch.stack(losses), torch.cat([parameter.detach().flatten() for parameter in parameters.values()])


CASES = [
    ("qwen3_vl", 2, {"backend": "fsdp2"}),
    ci("qwen3_vl", 2, {"backend": "zero3"}),
    ci("qwen3_vl", 4, {"backend": "fsdp2", "shard_degree": 2}),
    ci("gemma3", 2, {"backend": "fsdp2"}),
    ci("gemma3", 2, {"backend": "zero3"}),
]


@pytest.mark.parametrize(("model_type", "world_size", "parallel"), CASES)
def test_ranks_without_images_train_as_one_process(
    model_type: str, world_size: int, parallel: dict[str, Any], regrouped: World, composites: Any
) -> None:
    made = composites(model_type)
    losses, adapter = train(SINGLE, made)
    assert losses[-1] < losses[0]
    results = regrouped.run(world_size, train, made=made, **parallel)
    for of_rank, adapter_of_rank in results:
        assert relative_error(of_rank, losses) <= 1e-6
        assert relative_error(adapter_of_rank, adapter) <= 2e-6
        assert torch.equal(adapter_of_rank, results[0][1])
