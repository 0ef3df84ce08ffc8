"""Recipes compose, fit the architecture that they name, and fit the GPU that they claim, by the planner."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from distlora.config import Config
from distlora.config.plan import GPUS
from distlora.planner import Plan, plan_of, report
from distlora.planner.machine import machine_of
from distlora.planner.memory import KINDS, PHASES
from distlora.planner.model import find_model
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.compose.planning import check_planned

CONF = Path(__file__).parents[2] / "conf"
RECIPES = CONF / "recipe"
GB = 1e9
MODEL_FREE = {"dpo", "grpo", "kto", "orpo", "qlora", "reward", "simpo"}
"""Recipes that name no model, and so claim no GPU."""
# `serve` trains nothing itself: docs/service.md has its command.
NAMES = sorted({path.stem for path in RECIPES.glob("*.yaml")} - {"serve"})
NAMED = [name for name in NAMES if name not in MODEL_FREE]


@functools.cache
def planned(name: str, gpu: str, *overrides: str) -> Plan:
    return plan_on(compose_config([f"recipe={name}", "data.path=/documents.jsonl", f"gpu={gpu}", *overrides]))


def plan_on(config: Config) -> Plan:
    return plan_of(config, find_model(config), machine_of(config.gpu, config.cluster))


@functools.cache
def text_of(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text()


def gpu_of(name: str) -> str:
    """Return the GPU that the header names."""
    found = re.search(rf"^#   distlora plan recipe={name} gpu=(\w+)$", text_of(name), re.MULTILINE)
    assert found is not None, f"{name} states no plan"
    return found[1]


def header(name: str, plan: Plan) -> str:
    """Return a recipe's memory line, categories from a tenth of a gigabyte on."""
    usable = plan.machine.usable_bytes
    assert usable is not None
    by_kind = plan.device.by_kind
    lines = [
        f"#   distlora plan recipe={name} gpu={plan.config.gpu.name}",
        "#",
        f"# Peak memory per rank, {PHASES[plan.device.worst]}, calculated and not measured (GB = 1e9 B):",
        *(
            f"# {by_kind[kind] / GB:7.1f}  {words}"
            for kind, words in KINDS.items()
            if by_kind.get(kind, 0) >= 0.05 * GB
        ),
        f"# {plan.device.total / GB:7.1f}  total of {usable / GB:.1f} GB, {plan.machine.name}",
    ]
    return "\n".join(lines)


def claims(text: str) -> dict[str, float]:
    """GB by what they are of, in a header."""
    return {words: float(size) for size, words in re.findall(r"^# +(\d+\.\d)  (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_fits_its_architecture_and_its_gpu_by_the_plan_that_it_states(name: str) -> None:
    plan = planned(name, gpu_of(name))
    config, model = plan.config, find_model(plan.config)
    assert model.source == "built in"
    assert all(model.shapes.adapters(config.adapter)), "adapters in every layer"
    usable, needed = plan.machine.usable_bytes, plan.device.total
    assert usable is not None
    assert plan.fits
    wanted = f"{name}.yaml should say\n{header(name, plan)}"
    said = claims(text_of(name))
    total = said.pop(f"total of {usable / GB:.1f} GB, {plan.machine.name}", None)
    # Two hundredths: a formula that moves a sum by less moves no header.
    assert total == pytest.approx(needed / GB, abs=0.06, rel=0.02), wanted
    assert sum(said.values()) == pytest.approx(total, abs=0.05 * len(said)), wanted  # Each line is rounded.
    assert set(said) <= set(KINDS.values()), wanted
    row = re.search(
        rf"^\| [\w, ]*\b{name}\b.*\| \d x {GPUS[gpu_of(name)].title} \| (.+) of (\S+) \|$",
        (CONF / "README.md").read_text(),
        re.MULTILINE,
    )
    assert row is not None, f"conf/README.md has no row of {name} with its GPU"
    assert f"{total}" in row[1].split(", "), "as its own file says"
    assert row[2] == f"{usable / GB:.1f}"


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_a_recipe_composes_suits_its_model_and_plans(name: str) -> None:
    """One that names no model is planned for a well-known one."""
    text = (RECIPES / f"{name}.yaml").read_text()
    found = re.search(r"^#   distlora train (.+)$", text, re.MULTILINE)
    assert found is not None, f"{name} states no command"
    words = found[1].split()
    assert words[0] == f"recipe={name}"
    gpu = f"gpu={gpu_of(name)}" if name in NAMED else "gpu=rtx4090"
    if name in MODEL_FREE:
        words = [word if word != "model.path=FOLDER" else "model=llama3_8b" for word in words]
    config = compose_config([*words, gpu])
    model = find_model(config)
    check_planned(config, model)
    plan = plan_of(config, model, machine_of(config.gpu, config.cluster))
    assert plan.fits
    assert report.page(plan)


def test_llama3_70b_does_not_fit_two_24_gb_gpus_and_fits_two_of_32() -> None:
    model = "model=llama3_70b"
    path = "model.path=unsloth/Llama-3.3-70B-Instruct"
    least = planned("llama2_70b_2x24gb", "rtx4090", path, "adapter.target_modules=attention")
    assert not least.fits
    whole = planned("llama2_70b_2x24gb", "rtx5090", path)
    assert whole.fits
    assert least.device.total < whole.device.total
    assert planned("qlora", "rtx5090", model, "cluster.gpus_per_node=2").fits, (
        "by its short name where nothing else does"
    )


NODES = {"24 GB": "rtx4090", "48 GB": "l40s", "80 GB": "h100"}
"""GPU of each kind in the README's table."""
OFFLOADED = {"parallel.backend": "zero3", "parallel.offload_base": True}


def test_the_readmes_table_of_what_fits_is_the_plan() -> None:
    section = (CONF.parent / "README.md").read_text().partition("## Does 70B fit?")[2].partition("\n## ")[0]
    head, _, *rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    wrong = []
    for base, *cells in rows:
        model = re.search(r"`model=(\w+)`", base)
        assert model is not None
        for node, cell in zip(head[1:], cells, strict=True):
            count, _, kind = node.strip().partition(" x ")
            composed = planned("qlora", NODES[kind], f"model={model[1]}").config
            config = composed.with_settings({"cluster.gpus_per_node": int(count)})
            plan = plan_on(config)
            mark = "" if plan.fits else "*"
            if not plan.fits:
                plan = plan_on(config.with_settings(OFFLOADED))
            expected = f"{plan.device.total / GB:.1f}{mark}" if plan.fits else "no"
            if cell.strip() != expected:
                wrong.append(f"{model[1]}, {node.strip()}: {cell.strip()}, by the plan {expected}")
    assert rows
    assert not wrong, "\n".join(wrong)
