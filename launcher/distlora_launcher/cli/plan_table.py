"""Plan many models on many kinds of nodes, each with the fastest settings that fit (`distlora plan --table`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from distlora.config import UserError, nearest
from distlora.config.places import is_hub_name
from distlora.config.plan import GPUS
from distlora.planner import Plan
from distlora.planner.choose import Search, choose
from distlora.planner.machine import machine_of
from distlora_launcher.compose.checks import check_parallel
from distlora_launcher.compose.compose import compose_run, known_models
from distlora_launcher.compose.planning import check_planned, planned_model

MODELS = (
    "mistral_7b",
    "llama3_8b",
    "phi4_14b",
    "gemma3_27b",
    "qwen25_32b",
    "mixtral_8x7b",
    "llama_65b",
    "llama2_70b",
    "llama3_70b",
    "gpt_oss_120b",
    "qwen3_235b_a22b",
    "llama3_405b",
)
MACHINES = ("rtx4090", "rtx3090x2", "rtx5090x2", "a10x4", "l40sx4", "a100_80gbx8", "h100x8", "b200x8")
"""What is shown where nothing is named."""
OF_A_MACHINE = 8
"""GPUs of one machine, where there are more."""


def plans(
    models: Sequence[str], machines: Sequence[str], words: Sequence[str], *, config_dir: str | None = None
) -> dict[tuple[str, str], Plan | None]:
    """Return plans by (model, machine), with free settings chosen; None where `distlora train` would refuse.

    Raises UserError for an unknown name, and for settings that are possible nowhere.
    """
    words_of = {machine: machine_words(machine) for machine in machines}
    paths = {model: path_named(model) for model in models}
    named = {word.lstrip("+").partition("=")[0] for word in words}
    auto = [] if named & {"quant", "quant.method", "recipe", "adapter"} else ["quant=auto"]
    found: dict[tuple[str, str], Plan | None] = {}
    refused: UserError | None = None
    for machine in machines:
        settings = ["plan=auto", *auto, *words_of[machine], *words]
        composed = compose_run(settings, config_dir=config_dir, may_lack_paths=True)
        for model in models:
            config = composed.config.with_settings({"model.path": paths[model]})
            found[model, machine] = None
            try:
                check_parallel(config.parallel, config.cluster.ranks)
                planned = planned_model(config)
                check_planned(config.spec, config.train, config.parallel, planned)
                nodes = machine_of(config.gpu, config.cluster)
                search = Search(config=config, model=planned, machine=nodes, fixed=composed.fixed)
                found[model, machine] = choose(search).plan
            except UserError as error:
                if is_hub_name(model):  # Which may not be there at all.
                    raise
                refused = error
    if refused is not None and not any(found.values()):
        raise refused
    return {(model, machine): found[model, machine] for model in models for machine in machines}


def machine_words(machine: str) -> list[str]:
    """Return `h100x8` as overrides; more than eight GPUs are nodes of eight. Raises UserError for an unknown GPU."""
    match = re.fullmatch(r"(.+)x(\d+)", machine)
    gpu, number = (match[1], int(match[2])) if match and machine not in GPUS else (machine, 1)
    if gpu not in GPUS:
        raise UserError(
            f"--gpus {machine}: there is no GPU {gpu!r}{nearest(gpu, GPUS)}; write --gpus rtx4090,h100x8 with of "
            f"{', '.join(GPUS)}"
        )
    if number < 1 or (number > OF_A_MACHINE and number % OF_A_MACHINE):
        raise UserError(
            f"--gpus {machine}: {number} GPUs are no number of machines of {OF_A_MACHINE}; write "
            f"{gpu}x{max(1, number // OF_A_MACHINE * OF_A_MACHINE)}"
        )
    if number <= OF_A_MACHINE:
        return [f"gpu={gpu}", f"cluster.gpus_per_node={number}"]
    nodes = number // OF_A_MACHINE
    return [f"gpu={gpu}", "cluster=slurm", f"cluster.gpus_per_node={OF_A_MACHINE}", f"cluster.nodes={nodes}"]


def path_named(name: str) -> str:
    """Return a model's name on the hub, by that name or by its name for model=. Raises UserError for neither."""
    known = known_models()
    if name not in known and not is_hub_name(name):
        raise UserError(
            f"--models {name}: there is no model of that name{nearest(name, known)}; write names for model=, or "
            "ORG/NAME of the hub"
        )
    return known.get(name, name)
