"""`distlora resume RUN`: continue a run from its folder, which has all of its settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distlora.config import UserError, require
from distlora_launcher.terminal.arguments import read


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeRequest:
    """Continue a run from its newest complete checkpoint, with the settings in RUN/config.yaml.

    Settings after RUN begin a new stage: they extend a finished run (train.max_steps=2000) or change the steps that
    follow (optim.lr=5e-5). RUN/stages keeps the settings and the result of the stages before.

    With the same number of processes the result equals that of an uninterrupted run, bit for bit. A run with
    cluster=slurm is submitted again. For a run on several nodes (cluster=torchrun), type this command on each node.

    example: distlora resume runs/first
    example: distlora resume runs/first train.max_steps=2000 optim.lr=5e-5
    """

    run: list[str] = field(default_factory=list)
    """RUN: folder of a run, or of a sweep, whose stopped trials continue before new ones start. Then settings of the
    new stage, as setting=value."""


def main(arguments: list[str]) -> int:
    """Continue the run that the first argument names, with the settings of the others."""
    options = read(ResumeRequest, "distlora resume", arguments)
    if not options.run or any("=" not in word for word in options.run[1:]):
        raise UserError("distlora resume takes exactly one run folder; write `distlora resume RUN`")
    return resume(Path(options.run[0]), options.run[1:])


def resume(folder: Path, settings: Sequence[str] = ()) -> int:
    """Continue a run, or what is not done of a sweep, as it was started. Returns the exit code.

    settings: those of a new stage of a run, as setting=value.
    """
    from distlora.config.file import load_config
    from distlora.run_folder.sweep import is_sweep_folder
    from distlora.system.exit_codes import DONE
    from distlora_launcher.jobs.submit import in_job, is_job, require_no_job, resubmit_run, resume_in_job
    from distlora_launcher.launch.local import is_complete, resume_run
    from distlora_launcher.launch.stage import begin_stage
    from distlora_launcher.studies.listed import is_array, resume_array
    from distlora_launcher.studies.wandb_sweep import is_agents_folder, recorded_words, start_agents

    folder = folder.expanduser().absolute()
    of_many = is_sweep_folder(folder) or is_agents_folder(folder) or is_array(folder)
    require(
        not (of_many and settings),
        f"{folder} holds several runs, whose settings are fixed: {' '.join(settings)} changes those of one run alone; "
        "name the folder of one of them",
    )
    sweep = next((place for place in folder.parents[:2] if is_sweep_folder(place)), None)
    require(
        not settings or sweep is None,
        f"{folder} is a trial of the sweep {sweep}, which keeps its result as it is; train on in a run of its own with "
        f"adapter.init_from={folder}/adapter",
    )
    if is_sweep_folder(folder):
        from distlora_launcher.cli.sweep import resume_trials

        return resume_trials(folder)
    if is_agents_folder(folder):
        return start_agents(recorded_words(folder))
    if is_array(folder):
        return resume_array(folder)
    config = load_config(folder)
    if settings:
        if is_job(config.cluster):
            require_no_job(folder)
        begin_stage(folder, settings)
        config = load_config(folder)
    if is_complete(folder):
        return DONE
    if is_job(config.cluster):
        return resume_in_job(folder) if in_job() else resubmit_run(folder)
    return resume_run(folder)
