"""Whole runs on images: what only the image tells is learned, and ranks and a resume change nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import Config
from distlora.data.images import ImageTensors
from distlora.data.rows import open_split
from distlora.model.build import build_model
from distlora.parallel import Ranks
from distlora.planner import plan_of
from distlora.planner.model import find_model
from distlora.planner.report import page
from distlora.training import loop
from distlora.weights.reader import Reader
from distlora_launcher.compose.checks import check_model
from support.closeness import assert_adapters_close, assert_losses_close, assert_same_run
from support.image_models import write_colours, write_trainable
from support.low_bit_checkpoints import CHECKPOINTS, convert_folder
from support.plan_inputs import cpu_machine
from support.runs import SINGLE, outcome, result_of, run_once, run_until
from support.small_models import make_run, read_metrics
from support.tiers import ci, slow
from support.worlds import World

pytest.importorskip("torchvision", reason="image processors need torchvision: pip install 'distlora[vision]'")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    write_trainable(folder / "qwen3_vl", "qwen3_vl")
    write_colours(folder, 400)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_trainable(folder / "qwen3_vl", "qwen3_vl")
    write_colours(folder, 400, pairs=True)
    return folder


def prepared(run_dir: Path, folder: Path, model: str = "qwen3_vl", **sections: dict[str, Any]) -> Config:
    data = {"path": str(folder / "chats.jsonl"), "images": True, "sequence_length": 256} | sections.pop("data", {})
    train = {"global_batch": 4, "micro_batch": 2, "max_steps": None} | sections.pop("train", {})
    return make_run(run_dir, folder, model, data=data, train=train, **sections)


def test_ranks_train_on_images_as_one_process(colours: Path, tmp_path: Path, world: World) -> None:
    for name in ("one", "two"):
        config = prepared(tmp_path / name, colours, train={"max_steps": 3})
    run_once(SINGLE, run_dir=tmp_path / "one")
    losses, adapter = result_of(tmp_path / "one")
    of_ranks, adapter_of_ranks = outcome(world, 2, tmp_path / "two")
    assert torch.allclose(torch.tensor(of_ranks), torch.tensor(losses), rtol=1e-6, atol=0)
    for name, tensor in adapter.items():
        assert (adapter_of_ranks[name] - tensor).norm() <= 1e-5 * tensor.norm(), name
    # No collective depends on images: the traffic is that of the plan, to the byte.
    planned = plan_of(config, find_model(config), cpu_machine(2)).traffic
    *_, last = (line for line in read_metrics(tmp_path / "two") if "loss" in line)
    assert (last["gathered_bytes"], last["reduced_bytes"]) == (planned.gathered, planned.reduced)


@pytest.mark.parametrize(("accumulate", "rows"), [("step", 2), ("block", 4)])
def test_the_plan_counts_the_tower_and_the_features(colours: Path, tmp_path: Path, accumulate: str, rows: int) -> None:
    config = prepared(tmp_path / "run", colours, train={"max_steps": 3, "accumulate": accumulate})
    plan = plan_of(config, find_model(config), cpu_machine(1))
    spec = replace(config.spec, images=True)
    model = build_model(spec, base=CheckpointFiles(spec.path))
    layout = model.image_layout
    assert layout is not None
    assert plan.device.held["images"] == 4 * sum(parameter.numel() for parameter in model.tower())
    largest = layout.largest_image(0, 256)
    assert largest is not None
    assert largest.tokens == 256
    features = 4 * rows * 256 * plan.model.shapes.hidden * (1 + layout.deepstack)
    assert plan.device.moments["images"] == {"working": features + largest.fp32_bytes}
    words = " ".join(page(plan).split())
    assert re.search(r"the largest has 256 tokens .* the tower adds \d+% to the operations of a step", words), words


@pytest.mark.parametrize(
    ("family", "dtype", "worst"),
    [("qwen3_vl", "bf16", "images"), ci("qwen3_vl", "fp32", "block"), ci("gemma3", "bf16", "block")],
)
def test_the_memory_of_a_step_with_images_is_planned(
    colours: Path, tmp_path: Path, family: str, dtype: str, worst: str
) -> None:
    """Within 10 % of the peak. Images of 320x320 pixels are 100 tokens each in Qwen3-VL, 49 in Gemma 3.

    Gemma 3's masks of images that see ahead are dense.
    """
    if not (colours / family).exists():
        write_trainable(colours / family, family)
    from PIL import Image

    (tmp_path / "large").mkdir()
    for file in colours.glob("*.png"):
        with Image.open(file) as image:
            image.resize((320, 320)).save(tmp_path / "large" / file.name)
    shutil.copy(colours / "chats.jsonl", tmp_path / "large")
    data = {"path": str(tmp_path / "large" / "chats.jsonl"), "image_max_pixels": 320 * 320}
    train = {"max_steps": 3, "global_batch": 2, "dtype": dtype}
    config = prepared(tmp_path / "run", colours, family, data=data, train=train, plan={"measure": True})
    plan = plan_of(config, find_model(config), cpu_machine(1))
    assert plan.device.worst == worst
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan.as_json()))
    run_once(SINGLE, run_dir=tmp_path / "run")
    (measured,) = [line for line in read_metrics(tmp_path / "run") if "memory/peak" in line]
    assert measured["memory/images"] == plan.device.held["images"]
    assert plan.device.peak == pytest.approx(measured["memory/peak"], rel=0.1)


def images_run_before_settling(ranks: Ranks, *, run_dir: Path) -> list[list[int]]:
    """Return the grid of each image that the trainer itself runs."""
    with mock.patch.object(loop, "features_of", wraps=loop.features_of) as calls:
        run_once(ranks, run_dir=run_dir)
    return [image["image_grid_thw"].tolist()[0] for call in calls.call_args_list for image in call.args[1]]


@pytest.mark.ci
def test_resident_layers_are_chosen_after_the_largest_image_of_the_data(
    colours: Path, tmp_path: Path, world: World
) -> None:
    parallel = {"resident_blocks": "auto"}
    config = prepared(tmp_path / "run", colours, train={"max_steps": 2}, parallel=parallel)
    rows = open_split(tmp_path / "run", "train")
    assert rows is not None
    assert rows.images is not None
    tensors = ImageTensors(Path(config.model.path), config.data, ("pixel_values", "image_grid_thw"))
    of_data = [tensors(rows.images.read(number))["image_grid_thw"].tolist()[0] for number in range(60)]
    for grids in world.run(2, images_run_before_settling, run_dir=tmp_path / "run"):
        (grid,) = grids
        assert math.prod(grid) == max(map(math.prod, of_data)) > min(map(math.prod, of_data))


def held_out_losses(run_dir: Path, folder: Path, world: World, **sections: Any) -> list[float]:
    """Train 12 epochs on two ranks; return the losses of held-out data, in order."""
    train = {"epochs": 12} | sections.pop("train", {})
    prepared(run_dir, folder, train=train, adapter={"r": 16}, optim={"lr": 1e-2}, **sections)
    world.run(2, run_once, run_dir=run_dir)
    return [line["eval_loss"] for line in read_metrics(run_dir) if "eval_loss" in line]


@pytest.mark.ci
def test_two_ranks_learn_what_only_the_image_tells(colours: Path, tmp_path: Path, world: World) -> None:
    held_out = held_out_losses(tmp_path / "run", colours, world)
    rows = open_split(tmp_path / "run", "eval")
    assert rows is not None
    targets = int(rows.targets[:].sum())
    documents = targets / 3  # A colour, the end of the turn and the newline after it.
    blind = 0.8 * math.log(4) * documents / targets
    assert held_out[-1] < blind, (held_out, blind)


@pytest.mark.slow
def test_two_ranks_prefer_what_only_the_image_tells(pairs: Path, tmp_path: Path, world: World) -> None:
    sections = {"data": {"format": "preference"}, "train": {"objective": "dpo"}}
    held_out = held_out_losses(tmp_path / "run", pairs, world, **sections)
    # Four pairs of five can be told apart by their images alone: a blind model's loss of them is ln 2 or more.
    assert held_out[-1] < 0.8 * math.log(2), held_out


TOWER = ("_proj", "attn.qkv", "attn.proj", "linear_fc1", "linear_fc2")
LAYERS = ("_proj",)
BASES = [
    ("bnb-nf4", TOWER, "nf4"),
    ("bnb-nf4-absmax", LAYERS, "nf4"),
    ("fp8", TOWER, "keep"),
    ("ct-int4", LAYERS, "keep"),
    ("ct-nvfp4", LAYERS, "keep"),
    ("ct-mxfp4", LAYERS, "keep"),
    ("awq-32", LAYERS, "keep"),
    ("gptq-v2-32", LAYERS, "keep"),
    ("bnb-int8", TOWER, "none"),
]
"""Format of the base, endings of the modules in it, and quant= that keeps its values."""


@pytest.mark.ci
@pytest.mark.parametrize(
    ("format", "endings", "method"),
    [base if base[0] in ("fp8", "bnb-nf4") else slow(*base) for base in BASES],
    ids=[format for format, *_ in BASES],
)
def test_images_on_a_base_in_low_bits_train_as_on_its_values(
    colours: Path, tmp_path: Path, format: str, endings: tuple[str, ...], method: str
) -> None:
    low, dense, results = colours / f"{format}-low", colours / f"{format}-dense", {}
    convert_folder(colours / "qwen3_vl", low, CHECKPOINTS[format][1], only=endings)
    shutil.copytree(colours / "qwen3_vl", dense)
    with Reader() as reader:
        values = {
            name: reader.read([segment], 0, segment.numel).view(segment.shape).float()
            for name, segment in CheckpointFiles(low).headers.items()
        }
    safetensors.torch.save_file(values, dense / "model.safetensors", metadata={"format": "pt"})
    for folder, quant in ((low, method), (dense, "none")):
        run_dir, sections = tmp_path / folder.name, {"quant": {"method": quant}, "train": {"max_steps": 3}}
        check_model(prepared(run_dir, colours, folder.name, **sections))
        run_once(SINGLE, run_dir=run_dir)
        results[folder] = result_of(run_dir)
    assert_losses_close(results[low][0], results[dense][0])
    assert_adapters_close(results[low][1], results[dense][1])


@pytest.mark.ci
def test_a_run_on_images_that_was_stopped_goes_on_bit_for_bit(colours: Path, tmp_path: Path, world: World) -> None:
    for name, stops in (("whole", [None]), ("stopped", [3, None])):
        prepared(tmp_path / name, colours, train={"max_steps": 5, "save_every": 2})
        for stop in stops:
            world.run(2, run_until, run_dir=tmp_path / name, stop_before=stop)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
