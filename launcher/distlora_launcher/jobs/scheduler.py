"""SLURM's commands: run them, parse their output, and explain what sbatch refuses in terms of our settings."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distlora.config import UserError

ANSWER_SECONDS = 30.0
"""Timeout of a command: a busy controller must not block ours forever."""

LIVE_STATES = frozenset(
    {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"}
    | {"RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
"""States of a job that SLURM has not ended yet."""

_CURES = {
    "partition": "set cluster.partition to one of them",
    "account": "set cluster.account, and cluster.partition, to what you may use",
    "qos": "set cluster.qos to one that your account may use",
    "time limit": "set a shorter cluster.time_limit, or another cluster.partition",
    "node": "set fewer cluster.nodes, cluster.gpus_per_node or cluster.cpus_per_task, or another cluster.partition",
    "processors": "set fewer cluster.nodes or cluster.cpus_per_task, or another cluster.partition",
    "memory": "set a lower cluster.memory",
    "generic resource": """set cluster.gpus_per_node, or ask in another way: 'cluster.sbatch=["--gres=gpu:8"]'""",
    "configuration source": "this node's sbatch has no cluster; run the command on a node where `sinfo` works",
    "controller": "its controller does not answer; try again where `sinfo` does",
    "option": "correct cluster.sbatch",
}
"""Cure by a part of sbatch's message; the first part that it has counts."""


_VARIABLES = {
    "time": ("SBATCH_TIMELIMIT",),
    "array": ("SBATCH_ARRAY_INX",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "no-requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "output": ("SBATCH_OUTPUT", "SBATCH_ERROR"),
    "gpus-per-node": ("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS_PER_TASK", "SBATCH_GPUS_PER_SOCKET", "SBATCH_GPUS"),
}
"""Environment variables of an sbatch option, if they are not named for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A SLURM job, or one task of an array."""

    job_id: str
    """Job id: 12, or 12_3 for a task of an array."""
    state: str
    """SLURM's state: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED, NODE_FAIL and so on."""
    reason: str | None
    """Why the job waits or ended; None if SLURM gives no reason."""
    nodes: str | None
    """Its nodes in SLURM's notation, n[1-4]; None while it has none."""
    restarts: int | None
    """Number of restarts; None if it is not known."""
    exit_code: int | None
    """Exit code of the script; None while it has not ended."""
    places: tuple[str, ...] = ()
    """Absolute paths of its script and its log; empty if they are not known."""

    @property
    def is_live(self) -> bool:
        """Return True if the job waits, runs or is about to end."""
        return self.state in LIVE_STATES

    def is_of(self, run_dir: Path) -> bool:
        """Return whether the job's script or log is in the run's folder or its sweep's.

        Two clusters that share a file system may both have a job with the recorded number.
        """
        folders = [run_dir, run_dir.parent] if "_" in self.job_id else [run_dir]
        places = [Path(place).resolve() for place in self.places]
        return not places or any(place.is_relative_to(folder.resolve()) for place in places for folder in folders)


class SchedulerError(Exception):
    """A SLURM command is missing, failed or did not answer; the message is the command's."""


def is_here() -> bool:
    """Return whether jobs can be submitted from this node."""
    return shutil.which("sbatch") is not None


def ask(command: Sequence[str], *, stdin: str | None = None, script: str = "") -> str:
    """Return what a SLURM command prints on stdout; `script` is the script it submits. Raises SchedulerError."""
    # Within a job, SLURM's variables say what that job has; sbatch would take them over, and hand them on.
    known = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
    dropped = {name for name in os.environ if name.startswith("SLURM_") and name not in known} | _variables(script)
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    try:
        ended = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=environment
        )
    except FileNotFoundError as error:
        raise SchedulerError(f"{command[0]} is not installed on this node") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]} did not answer within {ANSWER_SECONDS:.0f} s") from error
    if ended.returncode != 0:
        lines = [line.removeprefix(f"{command[0]}: ") for line in ended.stderr.splitlines() if line.strip()]
        raise SchedulerError("; ".join(lines) or f"{command[0]} ended with code {ended.returncode}")
    return ended.stdout


def _variables(script: str) -> set[str]:
    """Return the variables that would override options of this script: sbatch prefers them to the script."""
    options = re.findall(r"^#SBATCH\s+--([\w-]+)", script, re.MULTILINE)
    named = {option: ("SBATCH_" + option.upper().replace("-", "_"),) for option in options}
    return {name for option in options for name in (named | _VARIABLES)[option]}


def submit(command: Sequence[str], script: str) -> str:
    """Submit `script` by `sbatch --parsable ... FILE`; return the job's id. Raises SchedulerError."""
    answer = ask(command, script=script).strip()
    job_id = answer.partition(";")[0]  # `12;cluster` where several clusters share one SLURM.
    if not job_id.isdigit():
        raise SchedulerError(f"it answered {answer!r} where a job's id should be")
    return job_id


def try_submission(script: str) -> None:
    """Have SLURM check a script without submitting it. Raises UserError with its reason and what to change."""
    try:
        ask(["sbatch", "--test-only"], stdin=script, script=script)
    except SchedulerError as error:
        raise refusal(error) from error


def refusal(error: SchedulerError) -> UserError:
    """Return sbatch's refusal as a UserError that says what to change."""
    text = re.sub(r"(?i)\b(error|allocation failure|batch job submission failed): ", "", str(error))
    cure = next((cure for message, cure in _CURES.items() if message in text.lower()), None)
    if cure is not None and "cluster.partition" in cure:
        try:
            names = dict.fromkeys(ask(["sinfo", "--noheader", "--format=%R"]).split())
        except SchedulerError:
            names = {}
        text += f"; the partitions are {', '.join(names) or 'unknown'}"
    return UserError(f"SLURM refuses the job: {text}; {cure or 'change the settings of cluster.* that this is about'}")


def has_gpus(partition: str | None) -> bool:
    """Return whether the nodes of a partition (None: the default one) have GPUs; True if SLURM does not tell."""
    try:
        lines = ask(["sinfo", "--noheader", "--format=%P %G"]).splitlines()
    except SchedulerError:
        return True
    rows = [line.split(maxsplit=1) for line in lines if line.strip()]
    # The default partition has a star, and a job may name several.
    wanted = [
        resources
        for name, resources in (row for row in rows if len(row) == 2)
        if (name.endswith("*") if partition is None else name.rstrip("*") in partition.split(","))
    ]
    return not wanted or any(re.search(r"\bgpu\b", resources) for resources in wanted)


def find_jobs(job_id: str) -> dict[str, Job]:
    """Return a job by id, or all tasks of an array; empty if SLURM does not know it.

    scontrol forgets a job some minutes after its end (MinJobAge); then accounting is asked, if the cluster keeps it.
    Raises SchedulerError if SLURM cannot be asked.
    """
    try:
        return _read_scontrol(ask(["scontrol", "show", "job", "--oneliner", job_id]))
    except SchedulerError as error:
        if "Invalid job id" not in str(error):
            raise
    try:
        fields = "--format=JobID,State,ExitCode,NodeList"
        return _read_sacct(ask(["sacct", "--allocations", "--noheader", "--parsable2", fields, f"--jobs={job_id}"]))
    except SchedulerError:
        return {}  # Accounting is off on many clusters; then nobody knows.


def _read_scontrol(text: str) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    for line in text.splitlines():
        values = dict(re.findall(r"(?:^| )([A-Za-z]+)=(\S*)", line))
        if "JobState" not in values or "JobId" not in values:
            continue
        state = values["JobState"]
        for job_id in _ids(values):
            jobs[job_id] = Job(
                job_id=job_id,
                state=state,
                reason=_unless_none(values.get("Reason")),
                nodes=_unless_none(values.get("NodeList")),
                restarts=int(values["Restarts"]) if values.get("Restarts", "").isdigit() else None,
                exit_code=None if state in LIVE_STATES else _exit_code(values.get("ExitCode")),
                # A path may have spaces, and ends where the next field begins.
                places=tuple(
                    path.replace("%%", "%") for path in re.findall(r" (?:Command|StdOut)=(/.*?)(?= \w+=|\s*$)", line)
                ),
            )
    return jobs


def _ids(values: Mapping[str, str]) -> list[str]:
    """Return the ids of one record of scontrol: array tasks that have not started share a record."""
    array, tasks = values.get("ArrayJobId"), values.get("ArrayTaskId")
    if array is None or tasks is None:
        return [values["JobId"]]
    ids = []
    for numbers in tasks.partition("%")[0].split(","):
        first, _, last = numbers.partition("-")
        if first.isdigit() and (not last or last.isdigit()):
            ids += [f"{array}_{task}" for task in range(int(first), int(last or first) + 1)]
    return ids


def _read_sacct(text: str) -> dict[str, Job]:
    jobs = {}
    for line in text.splitlines():
        job_id, state, code, nodes = (*line.split("|"), "", "", "")[:4]
        if re.fullmatch(r"\d+(_\d+)?", job_id) and state:
            state = state.split()[0]  # `CANCELLED by 1000`
            jobs[job_id] = Job(
                job_id=job_id,
                state=state,
                reason=None,
                nodes=_unless_none(nodes),
                restarts=None,
                exit_code=None if state in LIVE_STATES else _exit_code(code),
            )
    return jobs


def _unless_none(word: str | None) -> str | None:
    return None if word in (None, "", "None", "(null)", "None assigned") else word


def _exit_code(pair: str | None) -> int | None:
    """Return `code:signal` as one number, 128 + n for signal n."""
    code, _, signum = (pair or "").partition(":")
    if not code.isdigit():
        return None
    return int(code) or (128 + int(signum) if signum.isdigit() and int(signum) else 0)
