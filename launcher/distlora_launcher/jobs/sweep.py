"""Submit the runs of a sweep (-m) as one SLURM array, and resubmit those that are not done."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from distlora.config import Config, UserError, require
from distlora.config.file import load_config
from distlora.run_folder.layout import find_result
from distlora.system.exit_codes import DONE
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.script import SCRIPT_NAME, array_option, render, write_script
from distlora_launcher.jobs.submit import is_job, live_job, make_cache, make_ready, print_script_kept, submit_script
from distlora_launcher.launch.job_record import write_submission
from distlora_launcher.launch.local import forget_run, make_run, remove_if_empty
from distlora_launcher.launch.lock import CONFIG_NAME
from distlora_launcher.terminal.output import say, shown


class Sweep:
    """The runs of a sweep while they are made; then all of them are submitted, or none."""

    def __init__(self) -> None:
        self.runs: list[Config] = []

    def add(self, config: Config, number: int) -> int:
        """Make one run and prepare its data. Returns the exit code."""
        require(
            Path(config.run_dir).name == str(number),
            f"{config.run_dir}: the run folders of an array are its tasks' numbers; leave hydra.sweep.subdir out",
        )
        code, config = make_run(config)
        if code == DONE:
            self.runs.append(config)
        return code

    def close(self, *, submits: bool) -> None:
        """Submit the runs, or remove them if one could not be made, so that the folder can be used again."""
        if not self.runs:
            return
        folder = Path(self.runs[0].run_dir).parent
        if submits:
            submit_array(folder, self.runs)
            return
        for run in self.runs:
            forget_run(Path(run.run_dir))
        remove_if_empty(folder)
        print("error: not every run could be prepared, so nothing is submitted", file=sys.stderr)


def submit_array(folder: Path, runs: Sequence[Config]) -> None:
    """Write the array's script and submit it. Raises UserError as `submit_script` does.

    A script changed by hand is kept and gets the tasks as an option.
    """
    config = dataclasses.replace(runs[0], run_dir=str(folder))
    options = []
    if not write_script(folder, render(config, gpus=scheduler.has_gpus(config.cluster.partition), tasks=runs)):
        print_script_kept(folder)
        numbers = [int(Path(run.run_dir).name) for run in runs]
        options = [array_option((folder / SCRIPT_NAME).read_text(encoding="utf-8"), numbers)]
    for run in runs:
        (Path(run.run_dir) / "logs").mkdir(exist_ok=True)
        make_cache(run.cluster, run.quant)
    submission = submit_script(folder, *options)
    write_submission(folder, submission)
    for run in runs:
        task = f"{submission.job_id}_{Path(run.run_dir).name}"
        write_submission(Path(run.run_dir), dataclasses.replace(submission, job_id=task))
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    say(f"submitted {count} in {shown(folder)} as SLURM job array {submission.job_id}")
    say(f"watch with: distlora status {shown(folder)}")
    say(f"stop with: distlora cancel {shown(folder)}   (one alone: {shown(Path(runs[0].run_dir))})")


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is that of a SLURM sweep."""
    return (folder / SCRIPT_NAME).is_file() and not (folder / CONFIG_NAME).exists()


def resume_sweep(folder: Path) -> int:
    """Submit the runs of a sweep that are neither done nor in a live job, as one array. Returns the exit code."""
    numbers = sorted(int(path.parent.name) for path in folder.glob(f"*/{CONFIG_NAME}") if path.parent.name.isdigit())
    unfinished = [folder / str(number) for number in numbers if find_result(folder / str(number)) is None]
    ended = [run for run in unfinished if live_job(run) is None]
    if not ended:
        state = "is complete" if not unfinished else "waits or runs; `distlora status` shows its runs"
        say(f"{shown(folder)} {state}")
        return DONE
    runs = [load_config(run) for run in ended]
    other = next((run for run in runs if not is_job(run.cluster)), None)
    if other is not None:
        raise UserError(
            f"{other.run_dir} is no run of cluster=slurm; resume it alone: `distlora resume {other.run_dir}`"
        )
    for run in runs:
        code = make_ready(Path(run.run_dir), run)
        if code != DONE:
            return code
    submit_array(folder, runs)
    return DONE
