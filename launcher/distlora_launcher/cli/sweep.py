"""Run `distlora sweep`: check the sweep, make its folder, start its workers, print the results."""

from pathlib import Path

from distlora.config import require
from distlora.system.exit_codes import DONE
from distlora_launcher.launch.lock import holders
from distlora_launcher.studies.sources import check_optuna, make_source
from distlora_launcher.studies.start import (
    check_place,
    check_trials,
    parse_sweep,
    pinned,
    render_script,
    show_results,
    start_workers,
)
from distlora_launcher.studies.sweep import first_cell, load_sweep, make_sweep
from distlora_launcher.studies.table import TrialTable
from distlora_launcher.studies.worker import conclude
from distlora_launcher.terminal.output import say, shown

USAGE = """usage: distlora sweep [FILE.yaml] [sweep=METHOD] [setting=a,b ...] [setting=value ...]
       distlora sweep create [...] | agent ENTITY/PROJECT/ID      (wandb sweeps; `distlora sweep create --help`)

Train several runs and compare them by their held-out loss. METHOD is grid, random, optuna or rank_search. Settings
with several values are searched, in Hydra's grammar:

  optim.lr=1e-4,2e-4 adapter.r=8,16                      a grid of four runs
  sweep=random optim.lr='tag(log,interval(1e-5,1e-3))'   values drawn, uniform in the logarithm
  sweep=optuna adapter.r='range(8,65,step=8)' ...        proposed by Optuna; runs that fall behind are pruned
  sweep=rank_search                                      double adapter.r while the gain exceeds the noise

All other options are those of `distlora train`. run_dir is the folder of the sweep, SWEEP; the run folders of its
trials are SWEEP/trials/0000 and so on. sweep.workers=N trains N trials at once, sweep.packed=N trains N trials together
on one base, sweep.trials=N ends after N trials; conf/README.md lists the other settings of the section sweep.

`distlora resume SWEEP` continues a sweep that was stopped or killed; `distlora status SWEEP`, `distlora cancel SWEEP`
and `distlora report SWEEP` work as for a run. random, optuna and pruners need Optuna: pip install 'distlora[sweep]'.

examples:
  distlora sweep model.path=MODEL data.path=chats.jsonl optim.lr=1e-4,2e-4 adapter.r=8,16
  distlora sweep mine.yaml optim.lr=1e-4,2e-4

--config-dir FOLDER    folder with your own recipes and config groups, as in `distlora train`"""


def main(arguments: list[str]) -> int:
    """Make a sweep and run it. Returns the exit code."""
    if arguments and arguments[0] == "create":
        from distlora_launcher.studies.wandb_sweep import create

        return create(arguments[1:])
    if arguments and arguments[0] == "agent":
        from distlora_launcher.studies.wandb_sweep import start_agents

        return start_agents(arguments[1:])
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return DONE
    sweep, first = parse_sweep(arguments)
    source = make_source(sweep)
    check_optuna(sweep.settings, source)
    check_place(sweep, first.config.cluster)
    check_trials(sweep, source, first)
    sweep = pinned(sweep, first.config.model)
    if first.config.cluster.launcher == "slurm":
        from distlora_launcher.jobs.submit import check_with_slurm

        check_with_slurm(render_script(sweep, first.config))
    make_sweep(sweep)
    TrialTable(sweep, source).enqueue()
    say(f"sweep folder {shown(sweep.folder)}")
    return start_workers(sweep, first.config)


def resume_trials(folder: Path) -> int:
    """Continue a sweep that was stopped or killed. Returns the exit code."""
    sweep = load_sweep(folder)
    alive = holders(folder)
    where = ", ".join(f"{process.host} (pid {process.pid})" for process in alive)
    require(
        not alive,
        f"{shown(folder)} runs on {where}; wait for it, or stop it with `distlora cancel {shown(folder)}`",
    )
    source = make_source(sweep)
    check_optuna(sweep.settings, source)
    table = TrialTable(sweep, source)
    table.enqueue()
    if table.is_over():
        conclude(sweep, table, source)
        return show_results(sweep, table.records(), source)
    say(f"sweep folder {shown(folder)}")
    return start_workers(sweep, sweep.compose(0, first_cell(sweep.space), source.overrides).config)
