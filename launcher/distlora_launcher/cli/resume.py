"""`distlora resume RUN`: continue a run from its folder, which has all of its settings."""

from dataclasses import dataclass, field
from pathlib import Path

from distlora.config import UserError
from distlora_launcher.terminal.arguments import read


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeRequest:
    """Continue a run from its newest complete checkpoint, with the settings in RUN/config.yaml.

    With the same number of processes the result equals that of an uninterrupted run, bit for bit. A run with
    cluster=slurm is submitted again. For a run on several nodes (cluster=torchrun), type this command on each node.

    example: distlora resume runs/first
    """

    run: list[str] = field(default_factory=list)
    """RUN: folder of a run, or of a sweep, whose stopped trials continue before new ones start."""


def main(arguments: list[str]) -> int:
    """Continue the run that the only argument names."""
    options = read(ResumeRequest, "distlora resume", arguments)
    if len(options.run) != 1:
        extra = next(
            (f": the settings of a run are fixed, {word} cannot change them" for word in options.run if "=" in word), ""
        )
        raise UserError(f"distlora resume takes exactly one run folder{extra}; write `distlora resume RUN`")
    return resume(Path(options.run[0]))


def resume(folder: Path) -> int:
    """Continue a run, or what is not done of a sweep, as it was started. Returns the exit code."""
    from distlora.config.file import load_config
    from distlora.run_folder.sweep import is_sweep_folder
    from distlora.system.exit_codes import DONE
    from distlora_launcher.jobs.submit import in_job, is_job, resubmit_run, resume_in_job
    from distlora_launcher.launch.local import is_complete, resume_run
    from distlora_launcher.studies.listed import is_array, resume_array
    from distlora_launcher.studies.wandb_sweep import is_agents_folder, recorded_words, start_agents

    folder = folder.expanduser().absolute()
    if is_sweep_folder(folder):
        from distlora_launcher.cli.sweep import resume_trials

        return resume_trials(folder)
    if is_agents_folder(folder):
        return start_agents(recorded_words(folder))
    if is_array(folder):
        return resume_array(folder)
    config = load_config(folder)
    if is_complete(folder):
        return DONE
    if is_job(config.cluster):
        return resume_in_job(folder) if in_job() else resubmit_run(folder)
    return resume_run(folder)
