"""Read what a wandb agent passes to the run that it starts. Needs neither wandb nor torch.

A run of a wandb sweep is started by an agent, which passes its values in variables (`AgentRun`). The launcher checks
that the run has the values that the sweep asks for.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.config.file import parse_yaml
from distlora.config.json_files import object_or_empty
from distlora.system import atomic_io

SWEEP_ID, RUN_ID, VALUES_PATH = "WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"
VARIABLES = (SWEEP_ID, RUN_ID, VALUES_PATH)
"""Variables that an agent sets for one run. A process that starts many runs removes them from their environment."""

ASKED = "DISTLORA_AGENTS_ASKED"
"""Environment variable: path of a file that exists if the request to stop a run did not come from wandb."""

_RECORD = Path("wandb") / "sweep.json"
"""File in RUN that records its sweep, for a resume without an agent."""

UNRECORDED = ("recipe", "hydra")
"""Arguments on a command line that are not settings: no section of a run has that name."""
_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class AgentRun:
    """A run that an agent has started."""

    sweep_id: str
    run_id: str
    values: Mapping[str, Any]
    """Setting -> value of the sweep."""
    project: str | None = None
    """Project of the sweep, if its agents set it; None: the run's setting applies."""
    entity: str | None = None

    @staticmethod
    def started(environment: Mapping[str, str] | None = None) -> AgentRun | None:
        """Read this process's variables; None if no agent has started it. Raises UserError for invalid values."""
        environment = os.environ if environment is None else environment
        sweep_id, run_id = environment.get(SWEEP_ID), environment.get(RUN_ID)
        if not sweep_id or not run_id:
            return None
        path = environment.get(VALUES_PATH)
        return AgentRun(
            sweep_id=sweep_id,
            run_id=run_id,
            values={} if not path else _read_values(Path(path)),
            project=environment.get("WANDB_PROJECT") or None,
            entity=environment.get("WANDB_ENTITY") or None,
        )

    @staticmethod
    def of_run(run_dir: Path) -> AgentRun | None:
        """Read the record that an agent's run keeps."""
        record = object_or_empty(run_dir / _RECORD)
        sweep_id, run_id, values = record.get("sweep_id"), record.get("run_id"), record.get("values")
        if not isinstance(sweep_id, str) or not isinstance(run_id, str) or not isinstance(values, dict):
            return None
        project, entity = record.get("project"), record.get("entity")
        return AgentRun(
            sweep_id=sweep_id,
            run_id=run_id,
            values=values,
            project=project if isinstance(project, str) else None,
            entity=entity if isinstance(entity, str) else None,
        )

    def keep(self, run_dir: Path) -> None:
        """Write the record to RUN."""
        path = run_dir / _RECORD
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_io.write_json(path, {**dataclasses.asdict(self), "values": dict(self.values)})

    def recorded(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values by dotted names, as wandb's pages and search expect them beside the nested settings.

        They are the run's values, and never replace a section.
        """
        merged = {}
        for name in self.values:
            has = _setting(settings, name)
            if name not in settings and has is not _ABSENT:
                merged[name] = has
        return merged

    def disagreements(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield a sentence for each value that the run's settings do not have, with what to do."""
        source = f"the sweep {self.sweep_id}"
        for name, value in self.values.items():
            has = _setting(settings, name)
            if name.partition(".")[0] in UNRECORDED:
                continue
            if has is _ABSENT:
                yield f"{name}={value!r} of {source} is not a setting; remove it from the sweep's parameters"
            elif name in settings and isinstance(has, Mapping):
                yield (
                    f"{name}={value!r} of {source} would stand in place of the whole section {name} in wandb's record; "
                    f"search settings instead, such as {name}.{next(iter(has), 'name')}"
                )
            elif not agrees(value, has):
                yield (
                    f"{name} is {_shown(has)} by this command, and {source} requests {_shown(value)}; let the sweep's "
                    f"command end in ${{args_no_hyphens}}, and leave {name} out of the rest of it"
                )


def agrees(requested: Any, has: Any) -> bool:
    """Return whether a setting has the value that a sweep asks for, as Hydra has parsed it."""
    if isinstance(requested, str) and isinstance(has, str):
        if len(requested) > 1 and requested[0] == requested[-1] == "'":
            requested = requested[1:-1].replace("\\'", "'")
        return requested == has or (has.startswith("/") and str(Path(requested).expanduser().absolute()) == has)
    if isinstance(requested, bool) or isinstance(has, bool):
        return requested is has
    if isinstance(requested, (list, tuple)) and isinstance(has, (list, tuple)):
        return len(requested) == len(has) and all(map(agrees, requested, has))
    if isinstance(requested, Mapping) and isinstance(has, Mapping):
        return requested.keys() == has.keys() and all(agrees(requested[key], has[key]) for key in requested)
    return bool(requested == has)


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    """Return the value at a dotted name, which may have Hydra's + prefix."""
    value: Any = settings
    for key in name.lstrip("+").split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _ABSENT
        value = value[key]
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _read_values(path: Path) -> dict[str, Any]:
    """Read `{name: {value: ...}}`, as an agent writes it."""
    try:
        content = parse_yaml(path.read_bytes())
        pairs = {} if content is None else dict(content.items())
        return {str(name): entry["value"] for name, entry in pairs.items() if name != "wandb_version"}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{VALUES_PATH}={path} is not a values file of a wandb agent ({type(error).__name__}: {error}); "
            f"unset {SWEEP_ID}, {RUN_ID} and {VALUES_PATH} for a run that is of no sweep"
        ) from error
