"""SWEEP/journal.log, which all workers append to, and the lock that whoever reads or writes it holds."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from distlora.config import UserError
from distlora.run_folder.sweep import JOURNAL_NAME

LOCK_NAME = ".lock"


class Lock:
    """SWEEP/.lock, which a process may take again while it has it; in Optuna's form of a lock, too. Whoever takes it
    finds a journal of whole lines: what a kill or a full disk has cut off is taken off, as Optuna cannot read past it.
    """

    def __init__(self, sweep: Path) -> None:
        self._path, self._journal = sweep / LOCK_NAME, sweep / JOURNAL_NAME
        self._depth = 0
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        if self._depth == 0:
            with contextlib.ExitStack() as stack:  # Which lets go of the lock where the journal cannot be mended.
                file = stack.enter_context(self._path.open("ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError as error:
                    raise UserError(
                        f"{self._path.parent} is on a file system without locks ({error.strerror}), which the workers "
                        "of a sweep share its trials by; set run_dir to a folder on another"
                    ) from error
                mend(self._journal)
                stack.pop_all()
            self._file = file
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            self._file.close()
            self._file = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


def open_journal(sweep: Path, lock: Lock) -> JournalStorage:
    """The journal of a sweep, read to its end. Raises UserError for a damaged one."""
    journal = sweep / JOURNAL_NAME
    try:
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=lock))  # type: ignore[arg-type]
    # Optuna replays the lines as they are: of one that is no JSON, lacks a field or names another trial.
    except (ValueError, LookupError, TypeError, AssertionError, AttributeError, optuna.exceptions.OptunaError) as error:
        raise UserError(
            f"{journal} is damaged ({type(error).__name__}: {error}); put a whole copy in its place, or start the "
            "sweep again in another folder"
        ) from error


def mend(journal: Path) -> None:
    """Take off a last line that has no end."""
    if not journal.is_file():
        return
    with journal.open("r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
