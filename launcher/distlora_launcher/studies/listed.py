"""A study of listed settings without a comparison (`distlora train -m`): one run after the other, or a SLURM array."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from distlora.config import Config, UserError
from distlora.config.file import load_config
from distlora.planner.choose import Choice
from distlora.run_folder.layout import find_result
from distlora.run_folder.submission import write_submission
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED
from distlora_launcher.compose.planning import say_choice
from distlora_launcher.jobs import scheduler
from distlora_launcher.jobs.script import SCRIPT_NAME, array_option, render, write_script
from distlora_launcher.jobs.submit import is_job, live_job, make_cache, make_ready, submit_script
from distlora_launcher.launch.local import forget_run, make_run, remove_if_empty
from distlora_launcher.launch.lock import CONFIG_NAME
from distlora_launcher.terminal.output import say, shown


def run_each(jobs: Iterable[Sequence[str]], start: Callable[[int], int]) -> int:
    """Start job after job by its number. Returns the first exit code that is not 0.

    A job that fails does not end the others; a signal or a stop does.
    """
    codes = []
    for number, words in enumerate(jobs):
        print(f"\njob {number}: {' '.join(words)}", flush=True)
        try:
            codes.append(start(number))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            codes.append(BAD_INPUT)
        if codes[-1] not in (DONE, FAILED, BAD_INPUT):
            return codes[-1]
    return next((code for code in codes if code != DONE), DONE)


def submit_all(jobs: Iterable[Sequence[str]], choices: Sequence[Choice]) -> int:
    """Make the runs and prepare their data, then submit all as one array, or none. Returns the exit code."""
    begun: list[Path] = []
    made: list[Config] = []

    def make(number: int) -> int:
        say_choice(choices[number])
        begun.append(Path(choices[number].config.run_dir))
        try:
            code, config = make_run(choices[number].plan)
        except UserError:
            begun.pop()  # Nothing was made: the folder may hold another run.
            raise
        if code == DONE:
            made.append(config)
        return code

    code = FAILED
    try:
        code = run_each(jobs, make)
    finally:
        if code != DONE:
            _forget(begun)
            if made:
                print("error: not every run could be prepared, so nothing is submitted", file=sys.stderr)
    if code == DONE:
        submit_array(Path(made[0].run_dir).parent, made)
    return code


def _forget(runs: Iterable[Path]) -> None:
    """Remove runs that were begun, so that their folder can be used again."""
    for run in runs:
        if (run / CONFIG_NAME).exists():
            forget_run(run)
        remove_if_empty(run)
        remove_if_empty(run.parent)


def submit_array(folder: Path, runs: Sequence[Config]) -> None:
    """Write the array's script and submit it. Raises UserError as `submit_script` does.

    A script changed by hand is kept and gets the tasks as an option.
    """
    config = dataclasses.replace(runs[0], run_dir=str(folder))
    options = []
    if not write_script(folder, render(config, gpus=scheduler.has_gpus(config.cluster.partition), tasks=runs)):
        numbers = [int(Path(run.run_dir).name) for run in runs]
        options = [array_option((folder / SCRIPT_NAME).read_text(encoding="utf-8"), numbers)]
    for run in runs:
        (Path(run.run_dir) / "logs").mkdir(exist_ok=True)
        make_cache(run.cluster, run.quant)
    submission = submit_script(folder, *options)
    for run in runs:
        task = f"{submission.job_id}_{Path(run.run_dir).name}"
        write_submission(Path(run.run_dir), dataclasses.replace(submission, job_id=task))
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    say(f"submitted {count} in {shown(folder)} as SLURM job array {submission.job_id}")
    say(f"watch with: distlora status {shown(folder)}")
    say(f"stop with: distlora cancel {shown(folder)}   (one alone: {shown(Path(runs[0].run_dir))})")


def is_array(folder: Path) -> bool:
    """Return whether a folder is that of a list of runs in SLURM."""
    return (folder / SCRIPT_NAME).is_file() and not (folder / CONFIG_NAME).exists()


def resume_array(folder: Path) -> int:
    """Submit the runs of a list that are neither done nor in a live job, as one array. Returns the exit code."""
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
            f"{other.run_dir} is not a run of cluster=slurm; resume it alone: `distlora resume {other.run_dir}`"
        )
    for run in runs:
        code = make_ready(Path(run.run_dir))
        if code != DONE:
            return code
    submit_array(folder, runs)
    return DONE
