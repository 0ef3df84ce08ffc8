"""`distlora train` where an agent of wandb starts it, for one run of its sweep: its run folder, whether it is begun or
goes on, and that it has the values which wandb records for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from distlora.config import Config, UserError, require
from distlora.config.file import as_mapping
from distlora.run_folder.sweep import words_of
from distlora.system.exit_codes import STOPPED
from distlora.training.reporting.wandb_agent import ASKED, AgentRun
from distlora_launcher.compose.compose import parse_overrides
from distlora_launcher.jobs.step import in_job
from distlora_launcher.launch.lock import CONFIG_NAME

FOLDER = "DISTLORA_SWEEP_FOLDER"
"""Environment variable: where `distlora sweep agent` has the runs of its sweep; by default runs/<id of the sweep>."""

_ENDED_EARLY = Path("wandb") / "ended_early"
"""In RUN."""


def words_under_agent(words: Sequence[str]) -> list[str]:
    """The words of a command line with a run folder of the run's own: two agents may start one in the same second, and
    the default's name is the second."""
    agent = AgentRun.started()
    if agent is None or any(word.lstrip("+").startswith(("run_dir=", "hydra.run.dir=")) for word in words):
        return list(words)
    return [*words, *words_of({"run_dir": str(folder_of(agent.sweep_id) / agent.run_id)})]


def folder_of(sweep_id: str) -> Path:
    """Where the runs of a sweep lie by default."""
    return Path(os.environ.get(FOLDER) or Path("runs") / sweep_id)


def begun(config: Config) -> Path | None:
    """The run folder where the agent's run has been begun already: an agent is given a run again that was preempted."""
    agent, run_dir = AgentRun.started(), Path(config.run_dir)
    if agent is None or not (run_dir / CONFIG_NAME).is_file():
        return None
    kept = AgentRun.of_run(run_dir)
    return run_dir if kept is not None and kept.run_id == agent.run_id else None


def check_agent(configs: Sequence[Config]) -> None:
    """Refuse settings that are not what the sweep asks for: wandb would record what the run does not have."""
    agent = AgentRun.started()
    if agent is None:
        return
    require(
        len(configs) == 1,
        f"-m starts {len(configs)} runs, and an agent's run of the sweep {agent.sweep_id} is one; leave -m out of the "
        "sweep's command, and search those settings in its parameters",
    )
    require(
        configs[0].cluster.launcher != "slurm" or in_job(),
        f"cluster=slurm would submit a run of the sweep {agent.sweep_id}, which its agent would take for done at once; "
        "start the agents themselves in SLURM: distlora sweep agent ENTITY/PROJECT/ID cluster=slurm",
    )
    agent = dataclasses.replace(agent, values={name: read(name, value) for name, value in agent.values.items()})
    refused = agent.disagreements(as_mapping(configs[0]))
    if refused:
        raise UserError(*refused)


def note_end(config: Config, code: int) -> None:
    """Leave in a run that was asked to stop of which sweep it is, which its workers may not have come to; and a mark
    where it was wandb who asked (early termination): then it is over, and does not go on with the others."""
    run_dir, agent, asked = Path(config.run_dir), AgentRun.started(), os.environ.get(ASKED)
    if code != STOPPED or agent is None or not run_dir.is_dir():
        return
    if AgentRun.of_run(run_dir) is None:
        agent.keep(run_dir)
    if asked is not None and not Path(asked).exists():
        (run_dir / _ENDED_EARLY).touch()


def was_ended_early(run_dir: Path) -> bool:
    """Whether wandb has ended a run before its last step."""
    return (run_dir / _ENDED_EARLY).exists()


def read(name: str, value: Any) -> Any:
    """A value as Hydra reads it: an agent writes it on the command line by Python's str."""
    if not isinstance(value, str):
        return value
    try:
        (override,) = parse_overrides([f"{name}={value}"])
    except UserError:
        return value  # As it stands; the run was composed without it.
    found: Any = override.value()
    return value if override.is_sweep_override() else Override._convert_value(found)
