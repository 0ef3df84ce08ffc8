"""`distlora train`: compose, check, then start, submit or print.

Settings are composed here, since Hydra itself ends with code 1 and pages of text for a mistyped word. Hydra's own
application runs for its flags (-m, --cfg, --info, --hydra-help), so that they and the grammar are the real ones.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distlora.config import ClusterConfig, UserError, require
from distlora.config.peer_names import peer_hint
from distlora.planner.choose import Choice
from distlora.planner.mixed import with_formats
from distlora.system.atomic_io import private_folder
from distlora.system.exit_codes import BAD_INPUT, DONE, FAILED
from distlora_launcher.cli.resume import resume
from distlora_launcher.cli.train_help import help_text
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import (
    VERSION_BASE,
    Composed,
    compose_run,
    compose_sweep,
    config_from_hydra,
    expand_home,
    with_initial_adapter,
    with_new_keys,
    with_typed_options,
)
from distlora_launcher.compose.options import CONF_MODULE, restore_options, user_settings
from distlora_launcher.compose.planning import decide, say_choice
from distlora_launcher.importing.settings_file import SUFFIXES, with_file
from distlora_launcher.jobs.submit import (
    ArrayRuns,
    check_with_slurm,
    in_job,
    is_job,
    make_script,
    start_in_job,
    submit_run,
)
from distlora_launcher.launch.local import remove_if_empty, start_run
from distlora_launcher.launch.node import start_multi_node
from distlora_launcher.studies.wandb_sweep import add_run_dir, check_agent, find_begun_run, note_end
from distlora_launcher.terminal.arguments import nearest_option
from distlora_launcher.terminal.output import say, shown

PROGRAM = "distlora train"
DRY_RUN = "--dry-run"
"""Option: print the script that cluster=slurm would submit, and do nothing else."""


def main(arguments: list[str]) -> int:
    """Compose, check, and run what the overrides describe. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):  # A word after another option is that option's value.
        pairs = zip(["", *arguments], arguments, strict=False)
        words = [word for before, word in pairs if not re.match(r"-(?!h$|-help$)", before)]
        topics = [word for word in words if not word.startswith("-") and "=" not in word]
        print(help_text([word for word in topics if not word.endswith(SUFFIXES)]), end="")
        return DONE
    arguments = [expand_home(word) for word in arguments]
    dry_run = DRY_RUN in arguments
    arguments = add_run_dir([word for word in arguments if word != DRY_RUN])
    flags = read_flags(arguments)
    options = [word for word in arguments if word not in (*flags.overrides, "--")]
    typed, is_sweep = flags.overrides, re.compile(r"[+~]*sweep[.=@]").match
    flags.overrides = list(map(with_new_keys, with_file(typed, PROGRAM, config_dir=flags.config_dir)))
    word = next(filter(is_sweep, flags.overrides), None)
    where = "" if any(map(is_sweep, typed)) else " in the settings file"
    cure = "write `distlora sweep` instead of `distlora train`"
    require(word is None, f"{word}{where} is a setting of `distlora sweep`; {cure}")
    if dry_run or is_run(flags):
        runs = composed(flags)
        first = runs[0].config
        check_agent([run.config for run in runs])
        if find_begun_run(Path(first.run_dir)) is not None:
            return resume(Path(first.run_dir))
        require(  # Nothing would keep the nodes in step.
            not (first.cluster.on_each_node and is_multirun(flags)),
            f"-m with cluster=torchrun over {first.cluster.nodes} nodes (cluster.nodes): the nodes would not "
            "run the same job; leave -m out and start one run after the other, or set cluster=slurm",
        )
        refuse_dry_run(first.cluster, flags, dry_run)
        for run in runs:
            check(run.config, new_run=True)
        # A job of a local sweep is refused alone, when it starts.
        choices = choose_each(runs) if is_job(first.cluster) or not is_multirun(flags) else []
        if is_job(first.cluster) and not in_job():
            script = make_script([choice.config for choice in choices], sweeps=is_multirun(flags))
            if dry_run:
                print(script, end="", flush=True)  # Before SLURM's check: the script may show why it fails.
            check_with_slurm(script)
            if dry_run:
                return DONE
        if not is_multirun(flags):
            return start_composed(choices[0])
        private_folder(Path(first.run_dir))  # Hydra would let everybody in.
        return run_hydra([*options, "--", *flags.overrides])
    if not flags.shell_completion:
        composed(flags, may_lack_paths=True)
    overrides = flags.overrides
    if not is_multirun(flags):
        overrides = with_typed_options(overrides, config_dir=flags.config_dir)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # Hydra prints a traceback if its reader leaves.
            run_hydra([*options, "--", *overrides])
    except SystemExit as stop:  # Hydra refused what it should print (--package), and has said why.
        return BAD_INPUT if stop.code else DONE
    print(printed.getvalue(), end="")
    return DONE


def choose_each(runs: Sequence[Composed]) -> list[Choice]:
    """Return the planned settings of each run. Raises UserError for one that does not fit, naming its job."""
    choices = []
    for number, run in enumerate(runs):
        try:
            choices.append(decide(run.config, run.fixed))
        except UserError as error:
            job = f"job {number} ({' '.join(run.job_overrides)}): " if run.job_overrides else ""
            raise UserError(f"{job}{error}") from error
    return choices


def refuse_dry_run(cluster: ClusterConfig, flags: argparse.Namespace, dry_run: bool) -> None:
    """Refuse --dry-run of a command that submits nothing, and sweeps that an array cannot hold."""
    if dry_run and not is_run(flags):
        raise UserError(
            f"{DRY_RUN} prints a job script, and another option prints something else; leave one of them out"
        )
    if dry_run and not is_job(cluster):
        raise UserError(
            f"{DRY_RUN} prints what would be submitted, and cluster={cluster.launcher} submits nothing; add "
            "cluster=slurm, or print the settings with --cfg job"
        )
    if is_job(cluster) and any(word.partition("=")[0] == "hydra/sweeper" for word in flags.overrides):
        raise UserError(
            "a sweeper that uses results cannot choose the jobs of an array; leave hydra/sweeper out, or set "
            "cluster=local in a job of its own"
        )


def read_flags(arguments: list[str]) -> argparse.Namespace:
    """Return Hydra's flags and the overrides. Raises UserError for an unknown flag."""
    parser = get_args_parser()
    parser.prog = PROGRAM
    parser.exit_on_error = False  # A page of usage would hide the reason.
    parser.allow_abbrev = False
    names = [word.rpartition("=")[2] for word in arguments if word.endswith(SUFFIXES)]
    file = next((name for name in names if not name.startswith("-")), None)
    try:
        flags, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        cure = f"`{PROGRAM} {file}` reads a settings file" if file else f"`{PROGRAM} --help` lists the options"
        raise UserError(f"{error}; {cure}") from error
    if unknown:
        raise unknown_option(unknown[0], [name for action in parser._actions for name in action.option_strings], file)
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
                f"{option} would replace distlora's settings; write {PROGRAM} FILE.yaml for a settings file, or "
                "--config-dir FOLDER for your own groups"
            )
    return flags


def unknown_option(word: str, options: Sequence[str], file: str | None) -> UserError:
    """Return the error for an option that does not exist. `file`: a settings file among the arguments."""
    setting = word.lstrip("-").partition("=")[0].replace("-", "_")
    if "config" in setting and file is not None:
        return UserError(f"there is no option {word}; a settings file needs none: {PROGRAM} {file}")
    if peer := peer_hint(setting):
        return UserError(f"there is no option {word}{peer}; settings have no dashes: setting=value")
    hint = f"settings have no dashes: {word.lstrip('-')}" if "=" in word or "." in word else "--help lists the options"
    return UserError(f"there is no option {word}{nearest_option(word, [*options, DRY_RUN])}; {hint}")


def is_run(flags: argparse.Namespace) -> bool:
    """Return whether the command starts something, rather than printing it."""
    prints = (flags.help, flags.hydra_help, flags.cfg, flags.info, flags.shell_completion)
    return not any(prints)


def is_multirun(flags: argparse.Namespace) -> bool:
    """Return whether -m is set."""
    return flags.multirun or "hydra.mode=MULTIRUN" in flags.overrides


def composed(flags: argparse.Namespace, *, may_lack_paths: bool = False) -> list[Composed]:
    """Return the settings of every run of the command line; --cfg may print incomplete ones."""
    options = {"config_dir": flags.config_dir, "may_lack_paths": may_lack_paths}
    if not is_multirun(flags):
        return [compose_run(flags.overrides, **options)]
    runs = compose_sweep(flags.overrides, **options)
    if is_job(runs[0].config.cluster):  # They are submitted together, so all of them are checked.
        runs = compose_sweep(flags.overrides, **options, most=None)
    return runs


def run_hydra(arguments: list[str], *, program: str = PROGRAM) -> int:
    """Run Hydra's application, with -m one job after the other. Returns the first exit code that is not 0."""
    codes: list[int] = []
    runs = ArrayRuns()

    def task(settings: DictConfig) -> None:
        code = run_job(settings, len(codes), runs)
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
        runs.close(submits=submits)
    return next((code for code in codes if code != DONE), DONE)


def run_job(settings: DictConfig, number: int, runs: ArrayRuns) -> int:
    """Run one job of a sweep that Hydra composed. Returns the exit code.

    A job that fails does not end the others, unless they are submitted together: `runs` collects those.
    """
    hydra_settings = HydraConfig.get()
    overrides = hydra_settings.overrides.task
    print(f"\njob {number}: {' '.join(overrides)}", flush=True)
    try:
        restore_options(settings, overrides)
        config = config_from_hydra(settings, run_dir=str(hydra_settings.runtime.output_dir))
        config = with_formats(with_initial_adapter(config, overrides))
        return start_composed(decide(config, user_settings(config.plan, overrides)), number, runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    finally:
        remove_if_empty(Path(hydra_settings.runtime.output_dir))


def start_composed(choice: Choice, number: int = 0, runs: ArrayRuns | None = None) -> int:
    """Start or submit a run whose settings are complete. Returns the exit code."""
    say_choice(choice)
    config = choice.config
    if is_job(config.cluster) and not in_job():
        return submit_run(choice.plan) if runs is None else runs.add(choice.plan, number)
    if is_job(config.cluster):
        code = start_in_job(choice.plan)
    else:
        code = start_multi_node(config) if config.cluster.on_each_node else start_run(choice.plan)
    note_end(Path(config.run_dir), code)
    if code == DONE and runs is None:
        say(f"try it with: distlora generate {shown(Path(config.run_dir))}")
    return code
