"""Stand-ins for SLURM's commands on the PATH, for tests of what we ask and how we take the answers.

A real SLURM is in `slurm_cluster.py`; these answer at once, and with what a real one says rarely.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_COMMAND = """#!/bin/bash
# Notes its words; answers with the file of its name, with refusal.NAME instead where there is one.
cd {folder}
name=$(basename "$0")
printf '%s\\n' "$name $*" >> asked
case "$*" in *--test-only*) cat > judged.sbatch ;; esac
if [ -e "refusal.$name" ]; then cat "refusal.$name" >&2; exit 1; fi
if [ -e "answer.$name" ]; then cat "answer.$name"; fi
"""


class FakeSlurm:
    """sbatch takes everything as job 41, and nobody knows a job, until told otherwise."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in ("sbatch", "scontrol", "scancel", "sinfo", "sacct"):
            command = folder / "bin" / name
            command.write_text(_COMMAND.format(folder=folder))
            command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        self.answers("sbatch", "41")
        self.answers("sinfo", "debug* gpu:8")
        self.forgets()

    def answers(self, command: str, text: str) -> None:
        """Set what the command prints."""
        (self.folder / f"refusal.{command}").unlink(missing_ok=True)
        (self.folder / f"answer.{command}").write_text(text + "\n")

    def refuses(self, command: str, text: str) -> None:
        """Have the command fail with this message."""
        (self.folder / f"refusal.{command}").write_text(text + "\n")

    def does(self, command: str, text: str) -> None:
        """Set the bash code that the command runs."""
        path = self.folder / "bin" / command
        path.write_text(f"#!/bin/bash\ncd {self.folder}\nprintf '%s\\n' \"{command} $*\" >> asked\n{text}\n")
        path.chmod(0o755)

    def forgets(self) -> None:
        """Nobody knows of any job."""
        self.refuses("scontrol", "slurm_load_jobs error: Invalid job id specified")
        self.refuses("sacct", "Slurm accounting storage is disabled")

    def has_job(self, job_id: str, state: str, **values: str) -> None:
        """Set the job that scontrol shows."""
        self.has_jobs(job_record(job_id, state, **values))

    def has_jobs(self, *records: str) -> None:
        self.answers("scontrol", "\n".join(records))

    @property
    def asked(self) -> list[str]:
        """The commands so far, with their words."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def judged(self) -> str:
        """The script that `sbatch --test-only` was given."""
        return (self.folder / "judged.sbatch").read_text()


def job_record(job_id: str, state: str, **values: str) -> str:
    """Return a line of `scontrol show job --oneliner`, as SLURM 24.11 prints it."""
    array, _, task = job_id.partition("_")
    ids = f"ArrayJobId={array} ArrayTaskId={task} " if task else ""
    reason, nodes = values.get("reason", "None"), values.get("nodes", "(null)")
    script = values.get("script")
    place = "" if script is None else f" Command={script} WorkDir=/home/two words StdErr= StdIn=/dev/null "
    return (
        f"JobId={array} {ids}JobName=two words UserId=root(0) JobState={state} Reason={reason} Dependency=(null) "
        f"Requeue=1 Restarts={values.get('restarts', '0')} ExitCode={values.get('exit_code', '0:0')} "
        f"Partition=debug ReqNodeList=(null) ExcNodeList=(null) NodeList={nodes} NumNodes=2{place}"
    )
