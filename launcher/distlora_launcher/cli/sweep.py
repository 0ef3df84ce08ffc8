"""Run `distlora sweep`: check the sweep, make its folder, start its workers, print the results."""

from __future__ import annotations

import importlib
from pathlib import Path

from distlora.config import Config, require
from distlora.system.exit_codes import DONE
from distlora_launcher.launch.lock import holders
from distlora_launcher.sweeps.folder import Sweep, load_sweep, make_sweep
from distlora_launcher.sweeps.local_workers import run_workers_here, show_results
from distlora_launcher.sweeps.parse import (
    check_place,
    check_trials,
    parse_sweep,
    pinned,
)
from distlora_launcher.sweeps.search import make_search
from distlora_launcher.sweeps.space import first_cell
from distlora_launcher.sweeps.study import Study
from distlora_launcher.sweeps.worker import conclude
from distlora_launcher.terminal.output import say, shown

USAGE = """usage: distlora sweep [sweep=grid|random|optuna|rank_search] [setting=a,b ...] [setting=value ...]
       distlora sweep create [...] | agent ENTITY/PROJECT/ID      (sweeps of wandb; `distlora sweep create --help`)

Many runs that are compared by their held-out loss. Settings with several values are searched, in Hydra's grammar:

  optim.lr=1e-4,2e-4 adapter.r=8,16                   a grid: all four
  sweep=random optim.lr='tag(log,interval(1e-5,1e-3))'   drawn, by its logarithm
  sweep=optuna adapter.r='range(8,65,step=8)' ...     proposed by Optuna; those that fall behind are ended
  sweep=rank_search                                   adapter.r doubled while that gains more than noise

All else is as with `distlora train`. run_dir is the folder of the sweep, SWEEP: its trials' run folders are
SWEEP/trials/0000 and on. sweep.workers=N trains N trials at once, sweep.packed=N N trials on one copy of the base,
sweep.trials=N ends after N; conf/README.md lists the rest of section sweep.

`distlora resume SWEEP` goes on with one that was stopped or killed, `distlora status SWEEP` and `distlora cancel SWEEP`
know it, `distlora report SWEEP` makes one page of it.

--config-dir FOLDER    with groups of your own beside distlora's, as of `distlora train`"""

WANDB = ("create", "agent")


def main(arguments: list[str]) -> int:
    """Make a sweep and run it. Returns the exit code."""
    if arguments and arguments[0] in WANDB:
        code: int = importlib.import_module("distlora_launcher.sweeps.wandb_sweep").main(arguments)
        return code
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    sweep, first = parse_sweep(arguments)
    search = make_search(sweep)
    check_place(sweep, first.config)
    check_trials(sweep, search, first)
    sweep = pinned(sweep, first.config)
    if first.config.cluster.launcher == "slurm":
        importlib.import_module("distlora_launcher.sweeps.slurm_array").judge(sweep, first.config)
    make_sweep(sweep)
    Study(sweep, search).enqueue()
    say(f"sweep folder {shown(sweep.folder)}")
    return start(sweep, first.config)


def resume_trials(folder: Path) -> int:
    """Continue a sweep that was stopped or killed. Returns the exit code."""
    sweep = load_sweep(folder)
    alive = holders(folder)
    where = ", ".join(f"{process.host} (pid {process.pid})" for process in alive)
    require(
        not alive,
        f"{shown(folder)} runs on {where}; wait for it, or stop it with `distlora cancel {shown(folder)}`",
    )
    search = make_search(sweep)
    study = Study(sweep, search)
    study.enqueue()
    if study.is_over():
        conclude(sweep, study, search)
        return show_results(sweep, study, search)
    say(f"sweep folder {shown(folder)}")
    return start(sweep, sweep.compose(0, first_cell(sweep.space), search.overrides).config)


def start(sweep: Sweep, config: Config) -> int:
    """Start the workers of a sweep on this node, or as a SLURM array. Returns the exit code."""
    if config.cluster.launcher == "slurm":
        code: int = importlib.import_module("distlora_launcher.sweeps.slurm_array").submit(sweep, config)
        return code
    return run_workers_here(sweep, config)
