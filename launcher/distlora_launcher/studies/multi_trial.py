"""Train several trials at once on one base (`sweep.packed`): how many fit, their run folders, their process.

The process (distlora/training/multi_trial/) reads and writes files in SWEEP/packs/N. Its launcher:

    python -m distlora_launcher.studies.multi_trial FOLDER

Trials whose settings may not differ wait for the next process. One that dies is started again with half as many trials
at once, each from its last checkpoint; a trial that was alone in one that died has failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distlora.config import Config, UserError, require
from distlora.config.file import load_config, settings_by_name
from distlora.config.json_files import object_or_empty, read_object
from distlora.config.plan import CHOSEN
from distlora.config.sweep import SweepConfig
from distlora.planner import Plan, plan_of
from distlora.planner.learning_rate import with_learning_rate
from distlora.planner.report import packed_trials
from distlora.planner.suggest import MAX_TRIALS, MultiTrialPlan, largest, multi_trial_plan
from distlora.run_folder.layout import DATA_NAME, PLAN_NAME, find_result
from distlora.run_folder.sweep import COMPLETE, FAILED, PACKS, PRUNED, SAVED, words_of
from distlora.system import atomic_io
from distlora.system.exit_codes import BAD_INPUT, DONE, STOPPED, run_to_exit_code
from distlora.system.stop_signals import Forwarder, block
from distlora.training.multi_trial.protocol import (
    CLOSED_NAME,
    INBOX,
    OUTCOMES,
    SETTINGS_NAME,
    SLOTS_NAME,
    VERDICTS,
    check_beside,
    check_trial,
    inbox_file,
    outcome_file,
    verdict_file,
)
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import Composed, compose_run, section_of
from distlora_launcher.compose.hub import localize, restore
from distlora_launcher.compose.planning import choices, machine_here, planned_model
from distlora_launcher.jobs.submit import in_job
from distlora_launcher.launch.local import create_run, forget_run, is_prepared
from distlora_launcher.launch.lock import CONFIG_NAME, lock_run
from distlora_launcher.launch.workers import run_workers
from distlora_launcher.studies.alone import POLL_SECONDS, LoggedProcess, trial_log, wait_until_free
from distlora_launcher.studies.placement import PlacedTrial, Placement, TrialOutcome
from distlora_launcher.studies.sweep import LOGS, Dimension, Sweep, Values, count_cells, is_finite, read_section
from distlora_launcher.terminal.output import say

MODULE = "distlora_launcher.studies.multi_trial"

_OF_SIZE = ("adapter", "recipe")
"""Sections whose values change a trial's memory and may differ between trials trained together."""
MOST_SIZES = 16
"""Most trials that are compared to find the largest."""
AT_ONCE = 2
"""Trials of a rank search that are due at once: its first two ranks."""


@dataclass(slots=True)
class _Running:
    """A trial from `begin` to its outcome."""

    trial: PlacedTrial
    config: Config
    hold: contextlib.ExitStack
    """Lock of its run folder, so that nobody resumes it meanwhile."""
    began: float = field(default_factory=time.monotonic)


class Together(Placement):
    """Trains the trials of one worker, in one multi-trial process after the other."""

    def __init__(self, sweep: Sweep, index: int, forwarder: Forwarder) -> None:
        """Take the worker's `forwarder`: a request to stop ends the preparation of data too."""
        self._sweep, self._index, self._forwarder = sweep, index, forwarder
        self._sizes = [trial.config.adapter for trial in largest_trials(sweep)]
        """Adapters of the trials that may need most memory."""
        self.slots = 1
        """Trials trained at once; decided with the first trial of each process."""
        self._trials: dict[int, _Running] = {}
        self._later: list[int] = []
        """Trials for a later process, in the order in which they came."""
        self._done: list[TrialOutcome] = []
        self._process: MultiTrialProcess | None = None
        self._processes = 0
        self._prepared: dict[str, Path] = {}
        """RUN/data.json by all settings that it depends on."""
        self._closed = self._stops = False

    @property
    def is_idle(self) -> bool:
        """Return whether its processes have ended."""
        return self._process is None or self._process.poll() is not None

    def begin(self, trial: PlacedTrial) -> None:
        """Start or resume a trial. Raises UserError if it cannot run."""
        wait_until_free(trial.run_dir)
        config, hold = self._config_of(trial), contextlib.ExitStack()
        hold.enter_context(lock_run(trial.run_dir))
        self._trials[trial.number] = _Running(trial, config, hold)
        if find_result(trial.run_dir) is not None:  # Its last worker was killed before it could record that.
            self._end(trial.number, COMPLETE)
        elif self._prepare(trial.number):
            self._join(trial.number)

    def verdict(self, number: int, step: int, *, prune: bool) -> None:
        """Pass on the pruner's decision on a trial."""
        if self._process is not None and self._sweep.settings.pruner != "none":
            atomic_io.write_json(verdict_file(self._process.folder, number, step), {"prune": prune})

    def poll(self) -> Sequence[TrialOutcome]:
        """Return the trials that have ended."""
        process = self._process
        if process is not None:
            code = process.poll()  # Before the outcomes: all that it wrote is then there to be read.
            for number, values in process.outcomes():
                reason, step, seconds = (values.get(name) for name in ("reason", "step", "seconds"))
                self._end(number, values["state"], reason=reason, step=step, seconds=seconds)
            if code is not None:
                self._handle_end(process, code)
            elif not process.closed and (self._closed or (self._later and not process.inside)):
                process.close()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Announce that no more trials come."""
        self._closed = True

    def stop(self) -> None:
        """Have every trial save and stop."""
        self._stops = True
        for number in self._later:
            self._end(number, SAVED)
        self._later = []
        if self._process is not None:
            self._process.ask_to_stop()

    def _config_of(self, trial: PlacedTrial) -> Config:
        """Return the settings of a trial; make its run folder if needed.

        The choices of plan=auto and quant=auto are those of the first trial for all. Raises UserError if it cannot run,
        or not with other trials.
        """
        if (trial.run_dir / CONFIG_NAME).is_file():
            config = load_config(trial.run_dir)
            restore(config.model)
            check(config, new_run=False)
            return config
        with contextlib.chdir(self._sweep.cwd):
            composed = compose_run(trial.overrides, config_dir=self._sweep.config_dir)
        config = composed.config
        check(config, new_run=True)
        if config.optim.lr is None:
            config, _ = with_learning_rate(config, planned_model(config))
        is_auto = config.plan.mode == "auto" or "auto" in (config.quant.method, config.quant.dense_layers)
        if is_auto and self._process is None:
            config = choices(dataclasses.replace(composed, config=config)).config
        elif is_auto and self._process is not None:
            names = [*(CHOSEN if config.plan.mode == "auto" else ()), "quant.method", "quant.dense_layers"]
            free = [name for name in names if name not in composed.fixed or config.value_of(name) == "auto"]
            config = config.with_settings({name: self._process.config.value_of(name) for name in free})
        config = dataclasses.replace(config, model=localize(config.model))
        check_trial(config)
        require(
            config.cluster.nodes == 1,
            f"sweep.packed={self._sweep.settings.packed} trains trials together on one node, and "
            f"cluster.nodes={config.cluster.nodes}; set cluster.nodes=1, or sweep.packed=1",
        )
        create_run(trial.run_dir, config)
        return config

    def _prepare(self, number: int) -> bool:
        """Prepare a trial's data unless another trial with the same data was; return False if the trial ended so."""
        config, run_dir = self._trials[number].config, self._trials[number].trial.run_dir
        key = repr((config.model, config.data, config.train.seed, config.train.objective))
        if not is_prepared(run_dir) and key in self._prepared:
            shutil.copyfile(self._prepared[key], run_dir / DATA_NAME)
        if not is_prepared(run_dir):
            process = LoggedProcess(["distlora.data.prepare", str(run_dir)], trial_log(self._sweep, number))
            while (code := process.poll()) is None:
                if self._forwarder.received is not None:
                    process.stop()
                time.sleep(POLL_SECONDS)
            if code != DONE:
                if self._forwarder.received is not None:
                    self._end(number, SAVED)
                    return False
                reason = process.last_error() or f"its preparation ended with code {code}"
                self._end(number, FAILED, reason=reason, is_refused=code == BAD_INPUT)
                forget_run(run_dir)
                return False
        self._prepared.setdefault(key, run_dir / DATA_NAME)
        return True

    def _join(self, number: int) -> None:
        """Put a prepared trial into the process, or keep it for the next one, which is set up for its first trial."""
        trial = self._trials[number]
        if self._process is None:
            self._process = self._make_process(number)
        elif self._process.closed or not _may_join(
            settings_by_name(trial.config), settings_by_name(self._process.config)
        ):
            self._later.append(number)
            return
        shutil.copyfile(self._process.folder / PLAN_NAME, trial.trial.run_dir / PLAN_NAME)
        self._process.put(number, trial.trial.run_dir)

    def _make_process(self, number: int) -> MultiTrialProcess:
        config = self._trials[number].config
        name = f"{self._index}" if self._processes == 0 else f"{self._index}_{self._processes}"
        self._processes += 1
        folder = self._sweep.folder / PACKS / name
        model, machine = planned_model(config), machine_here(config, runs_here=in_job())
        adapters = [
            config.adapter,
            *(adapter for adapter in self._sizes if adapter.use_dora == config.adapter.use_dora),
        ]
        different = {repr(adapter): dataclasses.replace(config, adapter=adapter) for adapter in adapters}
        plans = (plan_of(variant, model, machine) for variant in different.values())
        planned = plan_together(self._sweep.settings, plans, most=count_trials(self._sweep))
        self.slots = planned.trials
        return MultiTrialProcess(
            folder,
            self._sweep.folder / LOGS / f"pack_{name}.log",
            dataclasses.replace(config, run_dir=str(folder)),
            settings={"slots": self.slots, "verdicts": self._sweep.settings.pruner != "none"},
            plan=planned.plan.as_json(),
        )

    def _handle_end(self, process: MultiTrialProcess, code: int) -> None:
        """Handle the end of the process, once its outcomes are read."""
        if self._stops or code == STOPPED:
            for number in sorted(process.inside):
                self._end(number, SAVED)
            if not self._stops:
                # SLURM or systemd stops the processes of this node, but may not signal this one.
                os.kill(os.getpid(), signal.SIGTERM)
        elif code == BAD_INPUT:
            for number in sorted(process.inside):
                self._end(number, FAILED, reason=process.why(code), is_refused=True)
        elif process.inside:
            self._restart(process, process.why(code))
            if process.inside:
                return
        self._process, later, self._later = None, self._later, []
        for number in later:
            self._join(number)

    def _restart(self, process: MultiTrialProcess, reason: str) -> None:
        """Restart a process that has died with fewer trials at once, without a trial that was alone in it."""
        if process.slots > 1:
            slots = max(1, min(process.slots, len(process.inside)) // 2)
            say(f"{len(process.inside)} trials trained together ended ({reason}); restarting with {slots} at once")
        else:
            slots = self.slots
            for number in process.drop_suspects(reason):
                self._end(number, FAILED, reason=reason)
        if process.inside:
            process.start(slots)

    def _end(
        self,
        number: int,
        state: str,
        *,
        reason: str | None = None,
        step: int | None = None,
        seconds: float | None = None,
        is_refused: bool = False,
    ) -> None:
        """Record the outcome of a trial and release its folder."""
        trial = self._trials.pop(number)
        trial.hold.close()
        seconds = time.monotonic() - trial.began if seconds is None else seconds
        self._done.append(
            TrialOutcome(number=number, state=state, seconds=seconds, step=step, reason=reason, is_refused=is_refused)
        )


def _may_join(settings: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Return whether a trial can be trained together with the first trial of a process, by their settings."""
    try:
        check_beside(settings, first=first)
    except UserError:
        return False
    return True


class MultiTrialProcess:
    """A multi-trial process, its folder (distlora/training/multi_trial/protocol.py) and the trials in it."""

    def __init__(
        self, folder: Path, log: Path, config: Config, *, settings: Mapping[str, Any], plan: Mapping[str, Any]
    ) -> None:
        """Make the folder. `plan`: what the ranks check their memory against.

        Files of a killed worker's process are removed: its trials are complete in their run folders, and other workers
        may have taken them.
        """
        self.folder, self._log, self.config, self._settings = folder, log, config, settings
        self.slots: int = settings["slots"]
        self.closed = False
        self.inside: set[int] = set()
        """Trials that were put in and whose outcome was not read yet."""
        self._process: LoggedProcess | None = None
        wait_until_free(folder)
        for name in (INBOX, VERDICTS, OUTCOMES):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
        for name in (CLOSED_NAME, CONFIG_NAME):
            (folder / name).unlink(missing_ok=True)
        create_run(folder, config)
        atomic_io.write_json(folder / PLAN_NAME, plan)

    def put(self, number: int, run_dir: Path) -> None:
        """Put in a prepared trial; the first one starts the process."""
        self.inside.add(number)
        atomic_io.write_json(inbox_file(self.folder, number), {"number": number, "run_dir": str(run_dir)})
        if self._process is None:
            self.start(self.slots)

    def start(self, slots: int) -> None:
        """Start the process; after a death it continues with the trials without an outcome."""
        self.slots = slots
        (self.folder / SLOTS_NAME).unlink(missing_ok=True)
        atomic_io.write_json(self.folder / SETTINGS_NAME, {**self._settings, "slots": slots})
        self._process = LoggedProcess([MODULE, str(self.folder)], self._log)

    def close(self) -> None:
        """Announce that no more trials come: the process ends when those in the inbox are done."""
        self.closed = True
        atomic_io.write_text(self.folder / CLOSED_NAME, "")

    def outcomes(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield (number, outcome) of the trials that have ended since the last call."""
        for number in sorted(self.inside):
            path = outcome_file(self.folder, number)
            if path.is_file():
                self.inside.remove(number)
                values = object_or_empty(path)
                if values.get("state") not in (COMPLETE, PRUNED, FAILED):
                    values = {"state": FAILED, "reason": f"{path} is damaged, so its outcome is unknown"}
                yield number, values

    def drop_suspects(self, reason: str) -> Iterator[int]:
        """Yield the trial that was in the only slot when the process died, and write its outcome."""
        numbers = object_or_empty(self.folder / SLOTS_NAME).get("numbers") or []
        for number in self.inside.intersection(numbers) or {min(self.inside)}:
            self.inside.remove(number)
            outcome = {"state": FAILED, "reason": reason, "step": None, "seconds": None}
            atomic_io.write_json(outcome_file(self.folder, number), outcome)
            yield number

    def poll(self) -> int | None:
        """Return the exit code of the process; None while it runs."""
        return None if self._process is None else self._process.poll()

    def why(self, code: int) -> str:
        """Return why the process ended with `code`, in a sentence."""
        assert self._process is not None, "it has ended"
        return self._process.why(code, self.folder)

    def ask_to_stop(self) -> None:
        """Have the process save every trial and end."""
        if self._process is not None:
            self._process.stop()


def largest_values(space: Sequence[Dimension], settings: SweepConfig) -> Iterator[Mapping[str, Any]]:
    """Yield the combinations that may need most memory.

    Settings that affect memory take their largest number, or every value if they are not numbers; others take their
    first. In a rank search it is the larger of the two ranks that run at once; later ones run alone.
    """
    if settings.method == "rank_search":
        yield {"adapter.r": 2 * settings.rank_start}
        return
    lists: list[tuple[Any, ...]] = []
    for dimension in space:
        values = dimension.values if isinstance(dimension, Values) else (dimension.high,)
        is_of_size = dimension.setting.partition(".")[0] in _OF_SIZE
        are_numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        lists.append(values[:1] if not is_of_size else (max(values),) if are_numbers else values)
    names = [dimension.setting for dimension in space]
    for combination in itertools.product(*lists):
        yield dict(zip(names, combination, strict=True))


def plan_together(settings: SweepConfig, plans: Iterable[Plan], *, most: int = MAX_TRIALS) -> MultiTrialPlan:
    """Return the plan for trials that run together, sized by the largest of `plans`; `most` trials at most."""
    most = min(MAX_TRIALS, most, settings.trials or MAX_TRIALS)
    requested = settings.packed if settings.packed == "auto" else min(settings.packed, most)
    return multi_trial_plan(largest(plans), requested, most=most)


def largest_trials(sweep: Sweep) -> list[Composed]:
    """Return the trials that may need most memory and can be trained together. Raises UserError if none can."""
    trials = []
    refused: UserError | None = None
    for values in itertools.islice(largest_values(sweep.space, sweep.settings), MOST_SIZES):
        try:
            trial = sweep.compose(0, values)
            check_trial(trial.config)
            choices(trial)
            trials.append(trial)
        except UserError as error:  # It will be recorded as failed; the others run.
            refused = error
    if not trials:
        assert refused is not None, "a sweep has a trial"
        raise refused
    return trials


def count_trials(sweep: Sweep) -> int:
    """Return the most trials that can run together."""
    if sweep.settings.method == "rank_search":
        return AT_ONCE
    return count_cells(sweep.space) if is_finite(sweep.space) else MAX_TRIALS


def plan_first_run(sweep: Sweep) -> MultiTrialPlan:
    """Return the plan of the first trials that run together. Raises UserError if none can, or if so many do not fit."""
    plans = [choices(trial).plan for trial in largest_trials(sweep)]
    planned = plan_together(sweep.settings, plans, most=count_trials(sweep))
    if planned.trials > 1 and planned.most and planned.plan.fits is False and planned.plan.config.plan.refuse:
        raise UserError(
            f"sweep.packed={planned.requested}: {packed_trials(planned)}; set sweep.packed={planned.most}, or auto, "
            "which leaves some memory free; plan.refuse=false starts it anyway"
        )
    return planned


def compose_for_plan(
    overrides: Sequence[str], *, config_dir: str | None = None
) -> tuple[SweepConfig | None, list[Composed]]:
    """Return the section `sweep` (None without one) and the trials that may be largest, for `distlora plan`."""
    if all(section_of(word) != "sweep" for word in overrides):
        return None, [compose_run(overrides, config_dir=config_dir, may_lack_paths=True)]
    settings, space, shared = read_section(overrides, config_dir=config_dir)
    trials = [
        compose_run([*shared, *words_of(values)], config_dir=config_dir, may_lack_paths=True)
        for values in itertools.islice(largest_values(space, settings), MOST_SIZES)
    ]
    return settings, trials


def run(group: Path) -> int:
    """Run the ranks of a multi-trial process. Returns the exit code of `run_workers`.

    With one slot, ranks that die are restarted as a run's are; with more, the worker restarts it with fewer trials at
    once.
    """
    config = load_config(group)
    slots = read_object(group / SETTINGS_NAME, "start the sweep again with `distlora resume`").get("slots")
    with lock_run(group):
        return run_workers(
            group,
            processes=config.cluster.gpus_per_node,
            max_restarts=config.cluster.max_restarts if slots == 1 else 0,
        )


if __name__ == "__main__":
    block()
    sys.exit(run_to_exit_code(lambda: run(Path(sys.argv[1]))))
