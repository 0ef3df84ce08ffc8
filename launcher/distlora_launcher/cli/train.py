"""`distlora train`: the Hydra application.

Everything is composed and checked first, since Hydra itself ends with code 1 and pages of text for a mistyped word;
then Hydra takes over, so its flags (-m, --cfg, --info, --help) and its grammar are the real ones.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from distlora.config import ClusterConfig, Config, UserError, require
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED
from distlora_launcher.cli.resume import resume
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import (
    CONF_MODULE,
    VERSION_BASE,
    Composed,
    compose_run,
    compose_sweep,
    config_from_hydra,
    expand_home,
    with_new_keys,
)
from distlora_launcher.compose.initial_adapter import with_initial_adapter
from distlora_launcher.compose.planning import decide, say_choice
from distlora_launcher.compose.user_overrides import user_settings
from distlora_launcher.jobs.step import in_job, start_in_job
from distlora_launcher.jobs.submit import check_with_slurm, is_job, make_script, submit_run
from distlora_launcher.jobs.sweep import Sweep
from distlora_launcher.launch.local import remove_if_empty, start_run
from distlora_launcher.launch.multi_node import start_multi_node
from distlora_launcher.sweeps.wandb_agents import add_run_dir, check_agent, find_begun_run, note_end
from distlora_launcher.terminal.output import say, shown

PROGRAM = "distlora train"
DRY_RUN = "--dry-run"
"""Of cluster=slurm: print the script that would be submitted, and make nothing."""


def main(arguments: list[str]) -> int:
    """Compose, check, and run what the overrides describe. Returns the exit code."""
    arguments = [with_new_keys(expand_home(word)) for word in arguments]
    refuse_sweep_section(arguments)
    dry_run = DRY_RUN in arguments
    arguments = add_run_dir([word for word in arguments if word != DRY_RUN])
    flags = read_flags(arguments)
    if dry_run or is_run(flags):
        runs = composed(flags)
        first = runs[0].config
        check_agent([run.config for run in runs])
        if find_begun_run(first) is not None:
            return resume(Path(first.run_dir))
        refuse_multi_node_sweep(first.cluster, flags)
        refuse_dry_run(first.cluster, flags, dry_run)
        for run in runs:
            check(run.config, new_run=True)
        # A job of a sweep that starts here says itself that it does not fit, and the others run.
        decided = decide_each(runs) if is_job(first.cluster) or not is_multirun(flags) else []
        if is_job(first.cluster) and not in_job():
            script = make_script(decided, sweeps=is_multirun(flags))
            if dry_run:
                print(script, end="", flush=True)  # Whatever SLURM says of it: that may be why one wants to read it.
            check_with_slurm(script)
            if dry_run:
                return DONE
        return run_hydra(ordered(arguments, flags.overrides))
    if not flags.shell_completion:
        composed(flags, may_lack_paths=True)
    try:
        return run_hydra(ordered(arguments, flags.overrides))
    except SystemExit as stop:  # Hydra refused what it should print (--package), and has said why.
        return BAD_INPUT if stop.code else DONE


def decide_each(runs: Sequence[Composed]) -> list[Config]:
    """The settings of runs that start together. UserError for one that cannot fit, with what of a sweep it is."""
    found = []
    for number, run in enumerate(runs):
        try:
            found.append(decide(run.config, run.fixed).config)
        except UserError as error:
            job = f"job {number} ({' '.join(run.job_overrides)}): " if run.job_overrides else ""
            raise UserError(f"{job}{error}") from error
    return found


def refuse_multi_node_sweep(cluster: ClusterConfig, flags: argparse.Namespace) -> None:
    """Refuse a sweep of runs that are each started by hand on several machines: nothing keeps them in step."""
    require(
        not (cluster.on_each_machine and is_multirun(flags)),
        f"-m with cluster=torchrun over {cluster.nodes} nodes (cluster.nodes): the nodes would not "
        "run the same job; leave -m out and start one run after the other, or set cluster=slurm",
    )


def refuse_sweep_section(words: Sequence[str]) -> None:
    """Refuse settings that make many runs: here they would say nothing."""
    word = next((word for word in words if re.match(r"[+~]*sweep[.=@]", word)), None)
    if word is not None:
        raise UserError(f"{word} is of `distlora sweep`, which takes the same settings as `distlora train`; write that")


def refuse_dry_run(cluster: ClusterConfig, flags: argparse.Namespace, dry_run: bool) -> None:
    """Refuse --dry-run of what submits nothing, and sweeps that an array cannot hold."""
    if dry_run and not is_run(flags):
        raise UserError(f"{DRY_RUN} prints a script, and the other options print something else; leave one of them out")
    if dry_run and not is_job(cluster):
        raise UserError(
            f"{DRY_RUN} prints what would be submitted, and cluster={cluster.launcher} submits nothing; add "
            "cluster=slurm, or print the settings with --cfg job"
        )
    if is_job(cluster) and any(word.partition("=")[0] == "hydra/sweeper" for word in flags.overrides):
        raise UserError(
            "a sweeper that waits for results cannot choose the jobs of an array; leave hydra/sweeper out, or set "
            "cluster=local in a job of its own"
        )


def ordered(arguments: list[str], overrides: list[str]) -> list[str]:
    """The flags, then the overrides: Hydra itself refuses a setting after a flag that follows a setting."""
    return [*(word for word in arguments if word not in overrides and word != "--"), "--", *overrides]


def read_flags(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own flags and the overrides. Raises UserError for an unknown flag."""
    parser = get_args_parser()
    parser.prog = PROGRAM
    parser.exit_on_error = False  # A page of usage would hide the reason.
    try:
        flags, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; `{PROGRAM} --help` lists the options") from error
    if unknown:
        word = unknown[0]
        setting = word.lstrip("-")
        hint = f"settings have no dashes: {setting}" if "=" in setting or "." in setting else "--help lists the options"
        raise UserError(f"there is no option {word}; {hint}")
    modes = {"--run": flags.run, "--multirun": flags.multirun, "--cfg": flags.cfg, "--info": flags.info}
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; leave one of them out")
    if flags.resolve and not (flags.cfg or flags.help):
        raise UserError("--resolve belongs to --cfg; write --cfg job --resolve")
    for name in ("config_path", "config_name", "experimental_rerun"):
        if getattr(flags, name) is not None:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} would replace distlora's settings; add your own groups to them with --config-dir FOLDER"
            )
    return flags


def is_run(flags: argparse.Namespace) -> bool:
    """Whether the command starts something, rather than printing it."""
    prints = (flags.help, flags.hydra_help, flags.cfg, flags.info, flags.shell_completion)
    return not any(prints)


def is_multirun(flags: argparse.Namespace) -> bool:
    return flags.multirun or "hydra.mode=MULTIRUN" in flags.overrides


def composed(flags: argparse.Namespace, *, may_lack_paths: bool = False) -> list[Composed]:
    """The settings of every run that the command line asks for; --cfg shows them before they are complete."""
    options = {"config_dir": flags.config_dir, "may_lack_paths": may_lack_paths}
    if not is_multirun(flags):
        return [compose_run(flags.overrides, **options)]
    runs = compose_sweep(flags.overrides, **options)
    if is_job(runs[0].config.cluster):  # They are submitted together, so all of them are checked.
        runs = compose_sweep(flags.overrides, **options, most=None)
    return runs


def run_hydra(arguments: list[str], *, program: str = PROGRAM) -> int:
    """Hand over to Hydra: one run, or with -m one after the other. Returns the first exit code that is not 0."""
    codes: list[int] = []
    sweep = Sweep()

    def task(settings: DictConfig) -> None:
        code = run_job(settings, len(codes), sweep)
        codes.append(code)
        if code not in (DONE, FAILED, BAD_INPUT):  # A signal or a stop ends the whole sweep.
            sys.exit(code)

    argv, submits = sys.argv, False
    sys.argv = [program, *arguments]  # The only way in to Hydra's own command line.
    try:
        hydra.main(config_path=f"pkg://{CONF_MODULE}", config_name="config", version_base=VERSION_BASE)(task)()
        submits = set(codes) <= {DONE}
    finally:
        sys.argv = argv
        sweep.close(submits=submits)
    return next((code for code in codes if code != DONE), DONE)


def run_job(settings: DictConfig, number: int, sweep: Sweep) -> int:
    """One run. A job of a sweep that cannot run says so and leaves the others alone, but for those that are submitted
    together, which `sweep` collects."""
    hydra_settings = HydraConfig.get()
    run_dir = Path(hydra_settings.runtime.output_dir)
    sweeps = hydra_settings.mode == RunMode.MULTIRUN
    if sweeps:
        print(f"\njob {number}: {' '.join(hydra_settings.overrides.task)}", flush=True)
    try:
        config = config_from_hydra(settings, run_dir=str(run_dir))
        words = hydra_settings.overrides.task
        config = with_initial_adapter(config, words)
        choice = decide(config, user_settings(config.plan, words))
        say_choice(choice)
        config = choice.config
        if is_job(config.cluster) and not in_job():
            return sweep.add(config, number) if sweeps else submit_run(config)
        if is_job(config.cluster):
            code = start_in_job(config)
        else:
            code = start_multi_node(config) if config.cluster.on_each_machine else start_run(config)
        note_end(config, code)
        if code == DONE and not sweeps:
            say(f"try it with: distlora generate {shown(run_dir)}")
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    finally:
        remove_if_empty(run_dir)
