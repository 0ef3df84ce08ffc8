"""quant=mixed: harm by format, the choice of formats within a size, and a run on them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.analysis.quantization import QuantizationRequest
from distlora.analysis.quantization_worker import put_through, read_rows
from distlora.analysis.quantization_worker import run as analyse
from distlora.analysis.roundtrip import block_weights, find_weights, measure_sensitivity
from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.config import Config, UserError
from distlora.config.base import MIXED_FORMATS
from distlora.config.file import as_mapping, build
from distlora.loading.load_base import load_base
from distlora.model.frozen_linear import FrozenTensor
from distlora.parallel import Ranks
from distlora.planner import plan_of
from distlora.planner.machine import machine_of
from distlora.planner.mixed import choose_formats, least_harm, read_harm, with_formats
from distlora.planner.model import find_model
from distlora.post.divergence import Readings, evenly
from distlora.post.weights import open_base
from distlora.training.setup import start_model
from distlora.weights.reader import Reader
from distlora_kernels.formats import FORMATS, nf4
from distlora_kernels.formats.fp8_block import in_tiles
from distlora_launcher.compose.compose import compose_config
from support import quantization_requests
from support.closeness import relative_error
from support.family_models import write_family_folder
from support.runs import build_run_model, parallelize_run
from support.small_models import tokenizer, write_model_folder, write_text_file
from support.tiers import ci
from support.worlds import World

ONE = Ranks(0, 1, torch.device("cpu"), None)


def request_for(folder: Path, out: Path, **settings: Any) -> QuantizationRequest:
    return quantization_requests.request_for(folder, out, **{"harm_rows": 24, "formats": MIXED_FORMATS} | settings)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of one layer, whose weights are whole and ragged tiles, and the analysis of its formats."""
    root = tmp_path_factory.mktemp("mixed")
    sizes = {"hidden_size": 160, "head_dim": 40, "intermediate_size": 224, "num_hidden_layers": 1}
    write_model_folder(root / "model", "llama", **sizes)
    write_text_file(root / "text.jsonl")
    analyse(request_for(root, root / "harm"))
    return root


def config_for(measured: Path, **sections: dict[str, Any]) -> Config:
    base = {
        "model": {"path": str(measured / "model")},
        "data": {"path": str(measured / "text.jsonl"), "sequence_length": 64, "cache_dir": str(measured / "cache")},
        "quant": {"method": "mixed", "budget": 9.0, "harm": str(measured / "harm")},
        "train": {"dtype": "bf16"},
        "run_dir": "none",
    }
    return build(Config, base | sections)


def best_of_all(harms: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], spare: int) -> float:
    choices = itertools.product(*(range(len(each)) for each in harms))
    fitting = (c for c in choices if sum(each[i] for each, i in zip(sizes, c, strict=True)) <= spare)
    return min(sum(each[i] for each, i in zip(harms, c, strict=True)) for c in fitting)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    """Six weights in four formats: all 4,096 choices are tried. Larger formats may harm more than smaller ones."""
    draw = random.Random(seed)
    sizes = [[0, *(draw.randrange(1, 40) * 512 for _ in range(3))] for _ in range(6)]
    harms = [[draw.expovariate(1.0), *(draw.expovariate(5.0) for _ in range(3))] for _ in range(6)]
    spare = draw.randrange(sum(map(max, sizes)))
    chosen = least_harm(harms, sizes, spare)
    assert sum(each[index] for each, index in zip(sizes, chosen, strict=True)) <= spare
    assert sum(h[i] for h, i in zip(harms, chosen, strict=True)) == pytest.approx(best_of_all(harms, sizes, spare))


@pytest.mark.parametrize("name", ["llama", ci("mixtral")])
def test_the_estimate_is_the_divergence_of_small_errors(measured: Path, tmp_path: Path, name: str) -> None:
    """Random errors of one weight: the mean of their measured divergences.

    Errors before a router change its choices too, at first order; so of the model with experts only the last are tried.
    """
    folder = measured / "model"
    if name == "mixtral":
        folder = tmp_path / name
        write_family_folder(folder, name)
        tokenizer().save_pretrained(folder)
    request = request_for(measured, tmp_path / "out", model=str(folder))
    rows = evenly(read_rows(request), 24)
    model, _, _ = start_model(request.spec("none"), ONE)
    found = measure_sensitivity(model, rows, ONE, print)
    assert found.keys() == {weight.name for weight in find_weights(request.spec("nf4"))[0]}
    dense = Readings(rows, ONE, print)
    dense.take(model, "dense")
    weights = dict(block_weights(model))
    tried = (
        ("v_proj.weight", "down_proj.weight")
        if name == "llama"
        else ("2.mlp.experts.gate_up_proj", "2.mlp.experts.down_proj")
    )
    for weight in (name for name in found if name.endswith(tried)):
        module, kept = weights[weight], weights[weight].weight.detach().clone()
        estimated, divergence = 0.0, 0.0
        for seed in range(3):
            error = 0.02 * kept.std() * torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed))
            estimated += float((found[weight].of(0, kept.numel()) * error.view(-1).square()).sum()) / 2
            module.weight.copy_(kept + error)
            readings = Readings(rows, ONE, print, dense)
            readings.take(model, weight)
            divergence += float(readings.divergences.sum()) / int(rows.targets.sum())
        module.weight.copy_(kept)
        assert divergence == pytest.approx(estimated, rel=0.3), weight


def test_the_analysis_has_the_harm_of_each_format_to_each_weight(measured: Path) -> None:
    found = json.loads((measured / "harm" / "quantization.json").read_text())
    assert found["formats"] == list(MIXED_FORMATS)
    assert len(found["tensors"]) == 7
    for tensor in found["tensors"]:
        harm = {name: values["harm"] for name, values in tensor["formats"].items()}
        assert harm["nf4"] > 8 * harm["fp8_block"] > 16 * harm["int8"] > 64 * harm["bf16"] > 0, tensor["name"]
    losses = found["perplexity"]["formats"]
    assert losses["nf4"]["divergence"] > 20 * losses["int8"]["divergence"]
    estimated = found["overall"]["formats"]["nf4"]["harm"]
    assert losses["nf4"]["divergence"] == pytest.approx(estimated, rel=0.5)
    report = (measured / "harm" / "report.md").read_text()
    assert "Harm by layer" in report
    assert "model.layers.0.mlp.down_proj.weight" in report


@functools.cache
def _rows(measured: Path) -> Any:
    request = request_for(measured, measured / "rows")
    return evenly(read_rows(request), 6)


def test_the_choice_is_among_the_best_by_measured_divergence(measured: Path) -> None:
    """All 3^7 choices of three formats, those within the size measured: ours loses a tenth more than the best at most.

    To second order the divergences of weights add up, which is what makes 2,187 models out of 21 measurements here.
    """
    request, weights = request_for(measured, measured / "rows"), read_harm(measured / "harm")
    formats, budget = ("nf4", "int8", "bf16"), 9.0
    rows = _rows(measured)
    model, _, _ = start_model(request.spec("none"), ONE)
    dense = Readings(rows, ONE, lambda text: None)
    dense.take(model, "dense")
    on_disk = {weight.name: weight for weight in find_weights(request.spec("nf4"))[0]}
    modules, values = dict(block_weights(model)), {}
    with Reader() as reader:
        for weight, format in itertools.product(weights, formats):
            put_through(on_disk[weight.name], format, modules[weight.name].weight, reader)
            values[weight.name, format] = modules[weight.name].weight.detach().clone()

    def divergence(choice: dict[str, str]) -> float:
        for name, format in choice.items():
            modules[name].weight.copy_(values[name, format])
        readings = Readings(rows, ONE, lambda text: None, dense)
        readings.take(model, "choice")
        return float(readings.divergences.sum())

    numel = sum(math.prod(weight.shape) for weight in weights)
    measured_choices = []
    by_size = [[(f, weight.num_bytes(f, 2)) for f in formats] for weight in weights]
    harm = {weight.name: weight.harm for weight in weights}
    for options in itertools.product(*by_size):
        size = 8 * sum(size for _, size in options) / numel
        if budget - 0.6 < size <= budget:  # Smaller ones are worse than one of these with a weight enlarged.
            choice = {weight.name: format for weight, (format, _) in zip(weights, options, strict=True)}
            measured_choices.append((sum(harm[name][format] for name, format in choice.items()), choice))
    measured_choices.sort(key=lambda pair: pair[0])
    three = [type(w)(name=w.name, shape=w.shape, harm={f: w.harm[f] for f in formats}) for w in weights]
    ours = choose_formats(three, budget)
    assert sum(harm[name][format] for name, format in ours.items()) == pytest.approx(measured_choices[0][0])
    every = measured_choices[:: max(1, len(measured_choices) // 40)]
    assert divergence(ours) <= 1.1 * min(divergence(choice) for _, choice in [*every, *measured_choices[:20]])


def own_parts(ranks: Ranks, *, values: dict[str, Any]) -> dict[str, list[Tensor]]:
    config = build(Config, values)
    model = build_run_model(config)
    backend = parallelize_run(model, ranks, config)
    load_base(model, CheckpointFiles(config.spec.path), backend)
    return {
        path: [backend.local_rows(module.get_parameter(part))[0].clone() for part in module.part_names]
        for path, module in model.named_modules()
        if isinstance(module, FrozenTensor) and module.quantized
    }


@pytest.mark.parametrize("size", [3, *(pytest.param(n, marks=pytest.mark.ci) for n in (2, 4))])
def test_ranks_quantize_their_groups_of_every_format(world: World, measured: Path, size: int) -> None:
    names = [weight.name for weight in read_harm(measured / "harm")]
    # Weights of two rows of tiles, whose groups ranks share.
    chosen = {"fp8_block": names[0::3], "int8": names[1::3]}
    config = config_for(measured, quant={"method": "mixed", "formats": chosen}, train={"dtype": "fp32"})
    by_rank = world.run(size, own_parts, values=as_mapping(config))
    source = {name: weight for name, weight in tensors_of(measured).items() if name in names}
    for path, parts in by_rank[0].items():
        name = path.replace("decoder.layers.0.inner", "model.layers.0") + ".weight"
        format = next((format for format, own in chosen.items() if name in own), "nf4")
        whole = source[name]
        if format == "nf4":
            expected = nf4.nf4_quantize(whole)[:3]
        else:
            expected = FORMATS[format].quantize(in_tiles(whole) if format == "fp8_block" else whole.view(-1))
        for number in range(len(parts)):
            together = torch.cat([of_rank[path][number] for of_rank in by_rank])
            assert torch.equal(together, expected[number]), (name, format)


def tensors_of(measured: Path) -> dict[str, Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(measured / "model" / "model.safetensors")


def test_a_run_records_its_formats_and_is_planned_trained_and_read_by_them(measured: Path, tmp_path: Path) -> None:
    given = config_for(measured)
    config = replace(given, quant=with_formats(given.quant, given.train.dtype))
    formats = config.quant.formats
    assert set(formats) <= set(MIXED_FORMATS[1:])
    assert 1 <= len(config.quant.exceptions) < 7
    assert with_formats(config.quant, config.train.dtype) is config.quant
    assert build(Config, as_mapping(config)) == config
    model = build_run_model(config)
    found = load_base(model, CheckpointFiles(config.spec.path), parallelize_run(model, ONE, config))
    held = dict(block_weights(model))
    dense = [module for module in held.values() if not module.quantized]
    stored = found.quantized_bytes + sum(2 * module.numel for module in dense)
    numel = sum(module.numel for module in held.values())
    assert 8.5 < 8 * stored / numel <= 9.0
    plan = plan_of(config, find_model(config), machine_of(config.gpu, config.cluster))
    planned = {
        f"model.layers.0.{weight.path}": format
        for weight, format in zip(
            plan.model.shapes.architecture.layer(0).weights, plan.model.shapes.layer_formats("nf4")[0][1], strict=True
        )
        if weight.packs
    }
    assert planned == {name: None if m.format is None else m.format.name for name, m in held.items()}
    base = open_base(config.spec)
    with Reader() as reader:
        for name, module in held.items():
            trained_on = base.weights[name].whole(reader)
            assert torch.equal(trained_on.bfloat16(), module.frozen_weight.dense(torch.bfloat16)), name
            assert relative_error(trained_on, tensors_of(measured)[name]) < 0.12


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["quant=mixed"], "not measured yet: run `distlora analyze quantization MODEL --formats"),
        (["quant=mixed", "quant.harm=nowhere"], "has no quantization.json; write it again"),
        (["quant=mixed", "quant.harm={harm}", "quant.budget=4.2"], "quant.budget=4.2 is less than the"),
        (["quant=mixed", "quant.harm={harm}", "quant.budget=null"], "set quant.budget=4.5"),
        (["quant=mixed", "quant.harm={harm}", "quant.budget=40"], "quant.budget=40.0 is not a number of bits"),
        (["quant=nf4", "quant.budget=4.5"], "quant.budget has no effect with quant=nf4"),
        (["quant=mixed", "quant.formats={{int4: [a]}}"], "quant.formats' key='int4' is not one of int8, fp8_block"),
        (["quant=mixed", "quant.formats={{int8: [a], bf16: [a]}}"], "quant.formats has a twice"),
        (["quant=mixed", "quant.formats={{int8: [model.layers.0.mlp.weight]}}"], "names model.layers.0.mlp.weight"),
        (["quant=mixed", "quant.formats={{}}", "adapter.init=loftq"], "quant=mixed has those of other formats too"),
        (["quant=mixed", "quant.formats={{}}", "adapter=full"], "cannot store; add quant=none"),
    ],
)
def test_what_cannot_be_chosen_is_refused(measured: Path, words: list[str], says: str) -> None:
    paths = [f"model.path={measured / 'model'}", f"data.path={measured / 'text.jsonl'}", "data.sequence_length=64"]
    with pytest.raises(UserError) as error:
        check_composed([*paths, *(word.format(harm=measured / "harm") for word in words)])
    assert says in str(error.value)


def check_composed(words: list[str]) -> None:
    config = compose_config(words)
    assert config.quant.default_format == "nf4"
    find_model(config)


def test_harm_of_an_analysis_without_formats_is_refused(tmp_path: Path) -> None:
    (tmp_path / "quantization.json").write_text(
        json.dumps({"tensors": [{"name": "a", "shape": [1], "formats": {"nf4": {}}}]})
    )
    with pytest.raises(UserError, match="has no harm by format, so --formats was not given"):
        read_harm(tmp_path)
