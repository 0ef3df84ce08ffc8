"""`distlora train`: compose, check, then start, submit or print."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from distlora.config import ClusterConfig, UserError, require
from distlora.config.peer_names import peer_hint
from distlora.planner.choose import Choice
from distlora.system.exit_codes import BAD_INPUT, DONE
from distlora_launcher.cli.resume import resume
from distlora_launcher.cli.train_help import help_text
from distlora_launcher.compose.checks import check, check_run_dir
from distlora_launcher.compose.compose import (
    MOST_JOBS_CHECKED,
    Composed,
    compose_run,
    compose_sweep,
    expand_home,
    expand_sweep,
    print_settings,
)
from distlora_launcher.compose.planning import decide, say_choice
from distlora_launcher.importing.settings_file import SUFFIXES, with_file
from distlora_launcher.jobs.submit import (
    check_with_slurm,
    in_job,
    is_job,
    make_script,
    start_in_job,
    submit_run,
)
from distlora_launcher.launch.local import start_run
from distlora_launcher.studies.listed import run_each, submit_all
from distlora_launcher.studies.wandb_sweep import add_run_dir, check_agent, find_begun_run, note_end
from distlora_launcher.terminal.arguments import nearest_option
from distlora_launcher.terminal.output import say, shown

PROGRAM = "distlora train"
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""Values of --info."""
GONE = {
    "--hydra-help": "`distlora train --help` lists the settings; their values are written in Hydra's override grammar",
    "--run": "leave it out: a run starts unless -m, --cfg or --info is given",
}
"""Options of earlier versions, and what to do instead."""


def main(arguments: list[str]) -> int:
    """Compose, check, and run what the overrides describe. Returns the exit code."""
    if {"-h", "--help"} & set(arguments):  # A word after another option is that option's value.
        pairs = zip(["", *arguments], arguments, strict=False)
        words = [word for before, word in pairs if not re.match(r"-(?!h$|-help$)", before)]
        topics = [word for word in words if not word.startswith("-") and "=" not in word]
        print(help_text([word for word in topics if not word.endswith(SUFFIXES)]), end="")
        return DONE
    options = read_options(add_run_dir([expand_home(word) for word in arguments]))
    words = with_file(options.overrides, PROGRAM, config_dir=options.config_dir)
    refuse_sweep_settings(options.overrides, words)
    prints = options.cfg is not None or options.info is not None
    jobs = expand_sweep(words, config_dir=options.config_dir) if options.multirun else [words]
    if options.multirun:
        runs = compose_sweep(jobs, range(len(jobs))[:MOST_JOBS_CHECKED], config_dir=options.config_dir)
    else:
        runs = [compose_run(words, config_dir=options.config_dir, may_lack_paths=prints)]
    first, multirun = runs[0].config, options.multirun
    if prints:
        refuse_dry_run(first.cluster, options)
        try:
            shown_settings = {name: getattr(options, name) for name in ("cfg", "package", "resolve", "config_dir")}
            print_settings(words, info=options.info or "all", **shown_settings)
        except SystemExit:  # Hydra refused what it should print (--package), and has said why.
            return BAD_INPUT
        return DONE
    check_agent([run.config for run in runs])
    if find_begun_run(Path(first.run_dir)) is not None:
        return resume(Path(first.run_dir))
    require(  # Nothing would keep the nodes in step.
        not (first.cluster.on_each_node and multirun),
        f"-m with cluster=torchrun over {first.cluster.nodes} nodes (cluster.nodes): the nodes would not "
        "run the same job; leave -m out and start one run after the other, or set cluster=slurm",
    )
    refuse_dry_run(first.cluster, options)
    folder = Path(first.run_dir).parent
    if multirun:
        check_run_dir(folder)
    if is_job(first.cluster):  # Jobs of an array are submitted together, so all of them are checked.
        runs += compose_sweep(jobs, range(len(runs), len(jobs)), folder=folder, config_dir=options.config_dir)
    for run in runs:
        check(run.config, new_run=True)
    # A job of a local sweep is refused alone, when it starts.
    choices = choose_each(runs) if is_job(first.cluster) or not multirun else []
    if is_job(first.cluster) and not in_job():
        script = make_script([choice.config for choice in choices], sweeps=multirun)
        if options.dry_run:
            print(script, end="", flush=True)  # Before SLURM's check: the script may show why it fails.
        check_with_slurm(script)
        if options.dry_run:
            return DONE
    if not multirun:
        return start_composed(choices[0])
    if is_job(first.cluster) and not in_job():
        return submit_all(jobs, choices)

    def start(number: int) -> int:
        composes = number >= len(runs)
        run = (
            compose_sweep(jobs, [number], folder=folder, config_dir=options.config_dir)[0] if composes else runs[number]
        )
        return start_composed(choices[number] if choices else decide(run), is_alone=False)

    return run_each(jobs, start)


def refuse_sweep_settings(typed: Sequence[str], words: Sequence[str]) -> None:
    """Refuse settings of `distlora sweep`. typed: the command line; words: with those of a settings file."""
    is_sweep = re.compile(r"[+~]*sweep[.=@]").match
    word = next(filter(is_sweep, words), None)
    where = "" if any(map(is_sweep, typed)) else " in the settings file"
    cure = "write `distlora sweep` instead of `distlora train`"
    require(word is None, f"{word}{where} is a setting of `distlora sweep`; {cure}")


def choose_each(runs: Sequence[Composed]) -> list[Choice]:
    """Return the planned settings of each run. Raises UserError for one that does not fit, naming its job."""
    choices = []
    for number, run in enumerate(runs):
        try:
            choices.append(decide(run))
        except UserError as error:
            job = f"job {number} ({' '.join(run.job_overrides)}): " if run.job_overrides else ""
            raise UserError(f"{job}{error}") from error
    return choices


def refuse_dry_run(cluster: ClusterConfig, options: argparse.Namespace) -> None:
    """Refuse --dry-run of a command that submits nothing."""
    if options.dry_run and (options.cfg or options.info):
        raise UserError(
            "--dry-run prints a job script, and another option prints something else; leave one of them out"
        )
    if options.dry_run and not is_job(cluster):
        raise UserError(
            f"--dry-run prints what would be submitted, and cluster={cluster.launcher} submits nothing; add "
            "cluster=slurm, or print the settings with --cfg job"
        )


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options, by Hydra's names, and the overrides. Raises UserError for an unknown option."""
    # A page of usage would hide the reason of an error.
    parser = argparse.ArgumentParser(PROGRAM, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=INFO)
    parser.add_argument("--package", "-p")
    for switch in (("--resolve",), ("--multirun", "-m"), ("--dry-run",)):
        parser.add_argument(*switch, action="store_true")
    for option in (("--config-dir", "-cd"), ("--config-name", "-cn"), ("--config-path", "-cp")):
        parser.add_argument(*option)
    names = [word.rpartition("=")[2] for word in arguments if word.endswith(SUFFIXES)]
    file = next((name for name in names if not name.startswith("-")), None)
    try:
        options, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        cure = f"`{PROGRAM} {file}` reads a settings file" if file else f"`{PROGRAM} --help` lists the options"
        raise UserError(f"{error}; {cure}") from error
    if unknown:
        raise unknown_option(unknown[0], [name for action in parser._actions for name in action.option_strings], file)
    modes = {"--multirun": options.multirun, "--cfg": options.cfg, "--info": options.info}
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; leave one of them out")
    for name, is_set in (("--resolve", options.resolve), ("--package", options.package)):
        require(not is_set or options.cfg, f"{name} belongs to --cfg; write --cfg job {name}")
    for name in ("config_path", "config_name"):
        if getattr(options, name) is not None:
            word = "--" + name.replace("_", "-")
            raise UserError(
                f"{word} would replace distlora's settings; write {PROGRAM} FILE.yaml for a settings file, or "
                "--config-dir FOLDER for your own groups"
            )
    return options


def unknown_option(word: str, options: Sequence[str], file: str | None) -> UserError:
    """Return the error for an option that does not exist. `file`: a settings file among the arguments."""
    setting = word.lstrip("-").partition("=")[0].replace("-", "_")
    if "config" in setting and file is not None:
        return UserError(f"there is no option {word}; a settings file needs none: {PROGRAM} {file}")
    if word in GONE:
        return UserError(f"there is no option {word} any more; {GONE[word]}")
    if peer := peer_hint(setting):
        return UserError(f"there is no option {word}{peer}; settings have no dashes: setting=value")
    hint = f"settings have no dashes: {word.lstrip('-')}" if "=" in word or "." in word else "--help lists the options"
    return UserError(f"there is no option {word}{nearest_option(word, [*options, '--help'])}; {hint}")


def start_composed(choice: Choice, *, is_alone: bool = True) -> int:
    """Start or submit a run whose settings are complete; `is_alone`: no others follow. Returns the exit code."""
    say_choice(choice)
    config = choice.config
    if is_job(config.cluster) and not in_job():
        return submit_run(choice.plan)
    code = start_in_job(choice.plan) if is_job(config.cluster) else start_run(choice.plan)
    note_end(Path(config.run_dir), code)
    if code == DONE and is_alone:
        run = shown(Path(config.run_dir))
        scores = config.train.needs.labels != 0  # A reward model has no LM head to sample from.
        say(f"see how it learned with: distlora report {run}" if scores else f"try it with: distlora generate {run}")
    return code
