"""Stages of a run: what its settings were before `distlora resume RUN setting=value` changed them. Needs no torch.

RUN/stages/step_00000100/config.yaml    the settings until that step
RUN/stages/step_00000100/adapter        the result (adapter or model) of a run that had ended there
RUN/stages/step_00000100/summary.json   the final metrics of such a run

A stage in which no step was saved has no folder: the next one replaces it.
"""

from collections.abc import Collection
from pathlib import Path

from distlora.config import Config
from distlora.config.errors import as_typed
from distlora.config.file import load_config, settings_by_name
from distlora.run_folder.layout import set_aside, step_folder, step_of, steps
from distlora.system import atomic_io

STAGES_NAME, CONFIG_NAME = "stages", "config.yaml"


def earlier_stages(run_dir: Path) -> dict[int, Config]:
    """Return the settings of a run's earlier stages by their last step, oldest first; empty for a run of one stage.

    Raises UserError if one is damaged.
    """
    return {step_of(folder): load_config(folder) for folder in steps(run_dir / STAGES_NAME)}


def end_stages_at(run_dir: Path, step: int) -> None:
    """Correct the records of a run that falls back to an older checkpoint: no earlier stage ends after `step`.

    The first stage that did ends at `step`. The folders of those stages, which may hold results, are set aside.
    """
    stages = run_dir / STAGES_NAME
    for folder in [folder for folder in steps(stages) if step_of(folder) > step]:
        kept = step_folder(stages, step)
        if not (kept / CONFIG_NAME).is_file():
            atomic_io.private_folder(kept)
            atomic_io.write_text(kept / CONFIG_NAME, (folder / CONFIG_NAME).read_text(encoding="utf-8"))
        set_aside(folder)


def stage_rows(config: Config, among: Collection[str] | None = None) -> list[tuple[str, str]]:
    """Return each stage of a run with the settings that not all stages share; empty if all of them are shared.

    `config`: the present settings. `among`: the settings to look at; None: all of them.
    """
    earlier = earlier_stages(Path(config.run_dir))
    stages = [settings_by_name(each) for each in (*earlier.values(), config)]
    names = [name for name in stages[0] if name != "run_dir" and (among is None or name in among)]
    names = [name for name in names if any(each[name] != stages[0][name] for each in stages)]
    rows = []
    for number, (begin, stage) in enumerate(zip((0, *earlier), stages, strict=True), 1):
        settings = ", ".join(f"{name}={as_typed(stage[name])}" for name in names)
        rows.append((f"stage {number}, from step {begin + 1:,}", settings))
    return rows if names else []
