"""The last submission of a run or a sweep to SLURM: the record slurm.json in its folder."""

from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.config.json_files import object_or_empty
from distlora.system import atomic_io

RECORD_NAME = "slurm.json"
SLURM = "slurm_"
"""Prefix of a SLURM job's log, slurm_<job>.log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A submitted job. If it was submitted by hand, only its id is known."""

    job_id: str
    """Job id: 12, or 12_3 for task 3 of array 12."""
    command: tuple[str, ...] = ()
    """Command line of sbatch."""
    submitted: float | None = None
    """Time of the submission, in seconds since 1970."""
    host: str | None = None
    """Host on which it was submitted."""

    @property
    def array(self) -> str:
        """Id of the array that a task belongs to, or of the job itself."""
        return self.job_id.partition("_")[0]


def write_submission(folder: Path, submission: Submission) -> None:
    """Write the record of a run or sweep folder."""
    atomic_io.write_json(folder / RECORD_NAME, asdict(submission))


def read_submission(folder: Path) -> Submission | None:
    """Return the last submission; None if there is none, or the record is damaged."""
    values = object_or_empty(folder / RECORD_NAME)
    job_id = values.get("job_id")
    if not isinstance(job_id, str) or not job_id.replace("_", "").isdigit():
        return None
    return Submission(job_id=job_id)


def note_job(folder: Path, job_id: str) -> None:
    """Record the job that runs now, if it is not the last submission: then it was submitted by hand."""
    last = read_submission(folder)
    if last is None or last.job_id != job_id:
        write_submission(folder, Submission(job_id=job_id))
