"""RUN/slurm.json: the job that a run, or a sweep, was last submitted as."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from distlora.config.json_files import object_or_empty
from distlora.system import atomic_io

RECORD_NAME = "slurm.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job that SLURM took. Of one that was submitted by hand the id alone is known."""

    job_id: str
    """12, or 12_3 for a run of a sweep, which is a task of the array 12."""
    command: tuple[str, ...] = ()
    """What submitted it."""
    submitted: float | None = None
    """Seconds since 1970."""
    host: str | None = None
    """Where it was submitted."""

    @property
    def array(self) -> str:
        """The id of the whole: of the array that a task belongs to, or of the job itself."""
        return self.job_id.partition("_")[0]


def write_submission(folder: Path, submission: Submission) -> None:
    atomic_io.write_json(folder / RECORD_NAME, asdict(submission))


def read_submission(folder: Path) -> Submission | None:
    """The last submission; None where there is none, or a record that cannot be read."""
    values = object_or_empty(folder / RECORD_NAME)
    job_id = values.get("job_id")
    if not isinstance(job_id, str) or not job_id.replace("_", "").isdigit():
        return None
    command, submitted = values.get("command"), values.get("submitted")
    return Submission(
        job_id=job_id,
        command=tuple(map(str, command)) if isinstance(command, list) else (),
        submitted=submitted if isinstance(submitted, (int, float)) else None,
        host=values.get("host") if isinstance(values.get("host"), str) else None,
    )


def note_job(folder: Path, job_id: str) -> None:
    """Record the job that runs now, unless it is the last submission: it was submitted by hand."""
    last = read_submission(folder)
    if last is None or last.job_id != job_id:
        write_submission(folder, Submission(job_id=job_id))
