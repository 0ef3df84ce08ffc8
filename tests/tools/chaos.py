"""Runs that are killed at random moments and resumed until they end: what must be whole then, and what a kill costs.

    PYTHONPATH=tests python tests/tools/chaos.py --kills 50 --seed 1      (`make chaos`)

A campaign is one run of `distlora train` on two ranks that takes several kills, on documents or on answers that it
samples (GRPO). Each kill has a kind (-9 of one rank, of the launcher, of every process; SIGTERM or SIGUSR1, to the
launcher or to one rank, once or twice) and a phase (start, loading, a rollout, a step, an evaluation, a save, the end),
drawn by a seeded generator. Where the command ends, it is resumed at once. After every kill that ends it nothing may
run on and every checkpoint must be what its manifest says; in the end the adapter must be that of an uninterrupted run
bit for bit, metrics.jsonl must have every step once and with the same figures, and nothing temporary may lie in the run
folder.
`distlora merge` of the uninterrupted run is killed too: its folder is there as a whole, or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from distlora.run_folder.layout import fault

DISTLORA = Path(sys.executable).with_name("distlora")
STOPPED = 75

KINDS = ("-9 of one rank", "-9 of the launcher", "-9 of all", "SIGTERM", "SIGUSR1")
MANNERS = ("to the launcher", "to one rank", "twice")
"""Of a signal; `twice` is to the launcher."""
PHASES = {
    "sft": {"start": 15, "loading": 15, "step": 30, "evaluation": 15, "saving": 20, "end": 5},
    "grpo": {"start": 10, "loading": 5, "rollout": 40, "step": 10, "evaluation": 15, "saving": 15, "end": 5},
    "merge": {"start": 20, "writing": 50, "measuring": 30},
}
"""How often a kill of each campaign falls into each phase, in percent."""
LONGEST_DELAY = {"start": 5.0, "loading": 1.0, "rollout": 0.4, "step": 0.4, "evaluation": 0.1, "saving": 0.03}
LONGEST_DELAY |= {"end": 0.3, "writing": 0.05, "measuring": 3.0}
"""Seconds after the phase was seen to begin."""
STEPS_PER_KILL = 4
EVAL_EVERY, ROLLOUT_EVERY = 3, 2
PATIENCE_SECONDS = 240.0
"""For whatever must happen soon: beyond it a run hangs."""


@dataclass(slots=True)
class Kill:
    """One kill, and what it cost."""

    kind: str
    phase: str
    delay: float
    """Seconds."""
    rank: int
    """The worker that is killed, or gets the signal."""
    manner: str
    at: float = 0.0
    """Seconds since 1970."""
    step: int = 0
    """The last step that was logged before."""
    seconds_lost: float | None = None
    """To the first step that had not been done before; None where there was none, or another kill came first."""
    steps_repeated: int | None = None
    ended: str = ""
    """`restarted`, or the command's exit code."""

    def __str__(self) -> str:
        manner = f" {self.manner}" if self.kind.startswith("SIG") else ""
        return f"{self.kind}{manner} in {self.phase} +{self.delay:.2f} s, after step {self.step}"


def draw(number: int, generator: random.Random, work: str = "sft") -> list[Kill]:
    """Kills of all kinds alike, in a random order; one process merges, so it takes no kill of a rank."""
    given = KINDS if work != "merge" else KINDS[2:4]
    kinds = [given[index % len(given)] for index in range(number)]
    generator.shuffle(kinds)
    phases = generator.choices(list(PHASES[work]), weights=list(PHASES[work].values()), k=number)
    return [
        Kill(
            kind,
            phase,
            delay=generator.uniform(0.0, LONGEST_DELAY[phase]),
            rank=generator.randrange(2),
            manner=generator.choice(MANNERS) if work != "merge" else MANNERS[0],
        )
        for kind, phase in zip(kinds, phases, strict=True)
    ]


class Life:
    """One command, from its start to its end, and the processes under it."""

    def __init__(self, command: Sequence[str], output: Path, scratch: Path) -> None:
        self._output = output
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
        with output.open("wb") as file:
            self.process = psutil.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        self._family: set[psutil.Process] = set()

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Return the launcher and all processes under it, parents first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family.update(self.process.children(recursive=True))
        return [self.process, *(process for process in self._family if is_alive(process))]

    def workers(self) -> dict[int, psutil.Process]:
        """Return the workers by rank, once they write their logs."""
        found = {}
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                names = [Path(file.path).name for file in process.open_files() if process.ppid() == self.process.pid]
                ranks = [match for name in names if (match := re.fullmatch(r"rank_(\d+)\.log", name))]
                found |= {int(match[1]): process for match in ranks}
        return found

    def ended(self) -> bool:
        return self.process.poll() is not None

    def code(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the exit code and return it."""
        try:
            return self.process.wait(seconds)
        except psutil.TimeoutExpired:
            raise TimeoutError("the command did not end") from None

    def wait_until(self, condition: Callable[[], Any], every: float = 0.004) -> bool:
        """Return True if it came true before the command ended. TimeoutError where neither happens."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if self.ended():
                return bool(condition())
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {PATIENCE_SECONDS:.0f} s")
            time.sleep(every)
        return True

    def gone(self) -> list[psutil.Process]:
        """Return the processes that still run some seconds after the end: there should be none."""
        deadline = time.monotonic() + 20
        while (left := [process for process in self._family if is_alive(process)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def send(process: psutil.Process | None, signum: signal.Signals) -> None:
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def kill_all(family: Sequence[psutil.Process]) -> None:
    for signum in (signal.SIGSTOP, signal.SIGKILL):  # Stopped first, so that none can tidy up after another.
        for process in family:
            send(process, signum)


@dataclass(slots=True)
class Campaign:
    """One run folder, the kills that it takes, and what was found wrong."""

    run_dir: Path
    reference: Path
    command: Sequence[str]
    kills: Sequence[Kill]
    say: Callable[[str], None] = print
    problems: list[str] = field(default_factory=list)
    _lives: list[Life] = field(default_factory=list)
    _struck: list[Kill] = field(default_factory=list)
    """The kills since the last new step."""

    def run(self) -> None:
        """Start, kill and resume until the run ends; then compare it with the reference."""
        try:
            self._run()
        except TimeoutError as error:
            self._problem(str(error))
        finally:
            for process in self._lives[-1].family():
                send(process, signal.SIGKILL)

    def _run(self) -> None:
        life = self._start()
        for kill in self.kills:
            if not self._reaches(life, kill):
                break  # The run came to its end before that.
            self._strike(life, kill)
            self._struck.append(kill)
            if not self._goes_on(life, kill):
                life = self._start()
        if (code := life.code(4 * PATIENCE_SECONDS)) != 0:
            self._problem(f"a command that nobody stopped ended with code {code}")
            return
        self._account()
        self._check_end(life)
        self._check_result()

    def output_of_start(self, number: int) -> str:
        """Return the output of the n-th command that was started."""
        return self._lives[number - 1].output()

    def _start(self) -> Life:
        begun = (self.run_dir / "config.yaml").exists()
        command = [str(DISTLORA), "resume", str(self.run_dir)] if begun else self.command
        scratch = self.run_dir.parent / "tmp"
        scratch.mkdir(exist_ok=True)
        output = self.run_dir.with_name(f"{self.run_dir.name}.start_{len(self._lives) + 1}.txt")
        self._lives.append(Life(command, output, scratch))
        return self._lives[-1]

    def _reaches(self, life: Life, kill: Kill) -> bool:
        """Wait for the moment of a kill; False where the command ends before."""
        if kill.phase not in ("start", "loading"):
            begun = life.wait_until(lambda: any(self._new_steps()))
            self._account()
            if not begun:
                return False
        seen = self._last_step()
        reached = {
            "start": lambda: True,
            "loading": lambda: "reading " in life.output(),
            "step": lambda: self._last_step() > seen,
            "evaluation": lambda: self._is_at(EVAL_EVERY),
            "rollout": lambda: self._is_at(ROLLOUT_EVERY),
            "saving": lambda: any(self.run_dir.glob("checkpoints/.step_*")),
            "end": lambda: self._last_step() == self._last_step_of(self.reference),
        }[kill.phase]
        if not life.wait_until(reached, every=0.001):
            return False
        time.sleep(kill.delay)
        if kill.kind == "-9 of one rank" or kill.manner == "to one rank":
            return life.wait_until(lambda: kill.rank in life.workers())
        return not life.ended()

    def _strike(self, life: Life, kill: Kill) -> None:
        family, workers = life.family(), life.workers()
        kill.step, kill.at = self._last_step(), time.time()
        if kill.kind == "-9 of one rank":
            send(workers.get(kill.rank), signal.SIGKILL)
        elif kill.kind == "-9 of the launcher":
            send(life.process, signal.SIGKILL)
        elif kill.kind == "-9 of all":
            kill_all(family)
        else:
            target = workers.get(kill.rank) if kill.manner == "to one rank" else life.process
            for _ in range(2 if kill.manner == "twice" else 1):
                send(target, signal.Signals[kill.kind])

    def _goes_on(self, life: Life, kill: Kill) -> bool:
        """Return True if the command continues by itself or is done. Reports what is wrong about its end."""
        before = life.output()
        if kill.kind == "-9 of one rank":
            life.wait_until(lambda: any(line in life.output()[len(before) :] for line in ("reading ", "done in ")))
            if not life.ended():
                kill.ended = "restarted"
                self.say(f"  {kill}: restarted")
                return True
        code = life.code()
        kill.ended = str(code)
        self.say(f"  {kill}: ended with {code} after {time.time() - kill.at:.1f} s")
        self._check_end(life)
        if code == 0:
            return True
        if kill.kind == "-9 of one rank":
            self._problem(f"{kill}: was not restarted, ended with {code}")
        # Earlier, a signal ends a Python that only imports.
        elif kill.kind.startswith("SIG") and code != STOPPED and "run folder" in before:
            self._problem(f"{kill}: ended with {code}, not {STOPPED}")
        return False

    def _account(self) -> None:
        """Record the cost of the newest kill once the run has passed it; of several kills the first counts."""
        new = next(self._new_steps(), None)
        if new is None or not self._struck:
            return
        first, last = self._struck[0], self._struck[-1]
        since = [line["step"] for line in self._lines() if "loss" in line and line["time"] > last.at]
        last.steps_repeated = 0
        first.steps_repeated = first.step + 1 - min(since)
        last.seconds_lost = new["time"] - last.at
        self._struck = []

    def _check_end(self, life: Life) -> None:
        """Nothing of a command runs on after it, and every checkpoint is whole."""
        for process in life.gone():
            self._problem(f"{process} runs on")
            send(process, signal.SIGKILL)
        if "is damaged" in life.output():
            self._problem("a damaged checkpoint was met")
        for folder in sorted(self.run_dir.glob("checkpoints/step_*")):
            if (reason := fault(folder)) is not None:
                self._problem(f"{folder.name}: {reason}")

    def _check_result(self) -> None:
        """Check that the run equals the uninterrupted one."""
        name = Path("adapter") / "adapter_model.safetensors"
        if (self.run_dir / name).read_bytes() != (self.reference / name).read_bytes():
            self._problem("the adapter differs from the uninterrupted run's")
        names = ("step", "loss", "grad_norm", "lr", "eval_loss", "reward", "kl", "eval_reward")
        own, other = (
            [[line.get(name) for name in names] for line in read_lines(folder / "metrics.jsonl")]
            for folder in (self.run_dir, self.reference)
        )
        if own != other:
            self._problem(f"metrics.jsonl differs from the uninterrupted run's: {len(own)}, {len(other)} lines")
        left = [path for path in self.run_dir.rglob("*") if re.search(r"^\.|\.(tmp|old)\b", path.name)]
        left += {*self.run_dir.iterdir()} - {self.run_dir / path.name for path in self.reference.iterdir()}
        left = [path for path in left if path.name != "stopped.json"]
        if left:
            self._problem(f"left in the run folder: {left}")

    def _problem(self, text: str) -> None:
        self.problems.append(f"{self.run_dir.name}: {text}")
        self.say(f"  PROBLEM {text}")

    def _lines(self) -> list[dict[str, Any]]:
        return read_lines(self.run_dir / "metrics.jsonl")

    def _last_step(self) -> int:
        return max((line["step"] for line in self._lines() if "loss" in line), default=0)

    def _last_step_of(self, run_dir: Path) -> int:
        return max(line["step"] for line in read_lines(run_dir / "metrics.jsonl"))

    def _new_steps(self) -> Iterator[dict[str, Any]]:
        """Yield the steps that had not been done at the newest kill."""
        step, at = (self._struck[-1].step, self._struck[-1].at) if self._struck else (0, 0.0)
        return (line for line in self._lines() if "loss" in line and line["step"] > step and line["time"] > at)

    def _is_at(self, every: int) -> bool:
        """Return True behind a step whose number `every` divides: an evaluation or a rollout comes next."""
        lines = self._lines()
        return bool(lines) and "loss" in lines[-1] and lines[-1]["step"] % every == 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl while it is written."""
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in path.read_text().split("\n") if line.endswith("}")]
    return []


def train_command(
    run_dir: Path,
    folders: Path,
    num_kills: int,
    *,
    data: Path | None = None,
    global_batch: int = 24,
    tracker: str = "none",
    work: str = "sft",
) -> list[str]:
    """Return the command of a run with room for so many kills, on plain text by default."""
    data = data or folders / ("text.jsonl" if work == "sft" else "prompts.jsonl")
    sampled = [
        *("train.objective=grpo", "data.rewards=[regex]", "data.reward_constants={pattern: '[aeiou]{2}'}"),
        *("rollout.num_generations=4", "rollout.max_new_tokens=12", f"rollout.num_iterations={ROLLOUT_EVERY}"),
        "train.beta=0.05",
    ]
    return [
        str(DISTLORA),
        "train",
        f"model.path={folders / 'llama'}",
        f"data.path={data}",
        f"data.cache_dir={data.parent / 'cache'}",
        f"quant.cache_dir={data.parent / 'cache' / 'quantized'}",
        "data.sequence_length=128",
        "data.eval_fraction=0.2",
        "recipe=qlora",
        "cluster.gpus_per_node=2",
        f"cluster.max_restarts={num_kills}",
        f"tracker={tracker}",
        f"train.max_steps={STEPS_PER_KILL * (num_kills + 1)}",
        f"train.global_batch={global_batch if work == 'sft' else 12}",
        "train.micro_batch=3",
        "train.save_every=1",
        f"train.eval_every={EVAL_EVERY}",
        "train.keep=3",
        "optim.lr=1e-2",
        *(sampled if work == "grpo" else []),
        f"run_dir={run_dir}",
    ]


def uninterrupted(run_dir: Path, folders: Path, num_kills: int, *, work: str = "sft") -> None:
    """Make the run that all campaigns of so many kills must equal."""
    scratch = run_dir.parent / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    command = train_command(run_dir, folders, num_kills, work=work)
    life = Life(command, run_dir.with_name(f"{run_dir.name}.txt"), scratch)
    assert life.code(4 * PATIENCE_SECONDS) == 0, life.output()  # Of a whole run.


def interrupt_merges(run_dir: Path, out: Path, kills: Sequence[Kill], say: Callable[[str], None]) -> list[str]:
    """Merge a run once for each kill, which it takes, and once to the end. Return what was found wrong."""
    problems, wholes = [], []
    written = {"start": lambda: True, "writing": lambda: any(out.parent.glob(f".{out.name}*")), "measuring": out.exists}
    for number, kill in enumerate([*kills, None]):
        command = [str(DISTLORA), "merge", str(run_dir), "--out", str(out), "--rows", "8"]
        life = Life(command, out.with_name(f"{out.name}.start_{number}.txt"), out.parent / "tmp")
        if kill is not None and life.wait_until(written[kill.phase], every=0.001):
            time.sleep(kill.delay)
            kill.at, family = time.time(), life.family()
            kill_all(family) if kill.kind == "-9 of all" else send(life.process, signal.Signals[kill.kind])
        code = life.code()
        kill_name = "no kill" if kill is None else f"{kill.kind} in {kill.phase} +{kill.delay:.2f} s"
        say(f"  {kill_name}: ended with {code}, the folder is {'there' if out.exists() else 'not there'}")
        problems += [f"merge: {process} runs on after {kill_name}" for process in life.gone()]
        problems += [f"merge: {kill_name} ended with 0"] if kill is not None and kill.at and code == 0 else []
        problems += [f"merge: ended with {code}: {life.output()}"] if kill is None and code != 0 else []
        if out.exists():
            wholes.append({path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".md"})
            shutil.rmtree(out)
    *others, last = [{name: bytes for name, bytes in whole.items() if name != "merge.json"} for whole in wholes or [{}]]
    problems += ["merge: a folder differs from the last one's"] if any(other != last for other in others) else []
    problems += [f"merge: left {path}" for path in out.parent.glob(f".{out.name}*")]
    return problems


def table(kills: Sequence[Kill]) -> str:
    """Return the cost of each kind of kill as a Markdown table."""
    rows = [
        "| kill | times | went on by itself | seconds lost: median, max | steps repeated: median, max |",
        "|--|--|--|--|--|",
    ]
    for kind in KINDS:
        done = [kill for kill in kills if kill.kind == kind and kill.at]
        lost = [kill.seconds_lost for kill in done if kill.seconds_lost is not None]
        repeated = [kill.steps_repeated for kill in done if kill.steps_repeated is not None]
        restarted = sum(kill.ended == "restarted" for kill in done)
        seconds = f"{statistics.median(lost):.1f}, {max(lost):.1f} ({len(lost)} measured)" if lost else "-"
        steps = f"{statistics.median(repeated):g}, {max(repeated)}" if repeated else "-"
        rows.append(f"| {kind} | {len(done)} | {restarted} | {seconds} | {steps} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=10, help="kills that one run takes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no campaign after so many")
    parser.add_argument("--folder", type=Path, help="where the runs are made, and stay (a temporary folder)")
    arguments = parser.parse_args()
    root = (arguments.folder or Path(tempfile.mkdtemp(prefix="distlora-chaos-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    from support.small_models import write_model_folder, write_text_file

    write_model_folder(root / "llama", "llama")
    write_text_file(root / "text.jsonl")
    prompts = [{"prompt": f"{word} {'very ' * number}:"} for number in range(6) for word in ("alpha", "beta", "gamma")]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    began, generator, drawn, problems = time.monotonic(), random.Random(arguments.seed), [], []
    print(f"runs are in {root}", flush=True)
    for number, first in enumerate(range(0, arguments.kills, arguments.per_run), start=1):
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        work = ("grpo", "merge", "sft")[(number - 1) % 3]
        kills = draw(min(arguments.per_run, arguments.kills - first), generator, work)
        drawn += kills
        trained = "grpo" if work == "grpo" else "sft"
        whole, run_dir = root / f"whole_{trained}", root / f"run_{number}"
        if not whole.exists():
            uninterrupted(whole, root, arguments.per_run, work=trained)
        print(f"run {number}: {work}", flush=True)
        if work == "merge":
            problems += interrupt_merges(whole, root / f"merged_{number}", kills, lambda text: print(text, flush=True))
        else:
            command = train_command(run_dir, root, arguments.per_run, work=work)
            kills = sorted(kills, key=lambda kill: kill.phase == "end")
            campaign = Campaign(run_dir, whole, command, kills, lambda text: print(text, flush=True))
            campaign.run()
            problems += campaign.problems
        print(table(drawn), flush=True)
    minutes, done = (time.monotonic() - began) / 60, [kill for kill in drawn if kill.at]
    print(f"{len(done)} kills of seed {arguments.seed} in {minutes:.1f} minutes, {len(problems)} problems")
    print(", ".join(f"{phase} {sum(kill.phase == phase for kill in done)}" for phase in LONGEST_DELAY))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
