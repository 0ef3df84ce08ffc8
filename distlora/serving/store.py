"""Keep sessions, models, checkpoints and replies of a service on disk: one SQLite database beside the weights' folders.

A client names things by ids and by tinker:// paths, which are looked up here by their owner: no text of a client is
ever a path. Folders have random names. What a client was told is done is committed before, and survives a kill; what
must survive a power cut too is flushed to the disk (`durable`). All methods are called on one thread.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distlora.config import UserError
from distlora.serving.operations import Adapter
from distlora.system.atomic_io import private_folder

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, owner TEXT, created REAL, seen REAL, about TEXT);
CREATE TABLE IF NOT EXISTS models (
    id TEXT PRIMARY KEY, owner TEXT, session TEXT, base TEXT, adapter TEXT, about TEXT, created REAL, seen REAL,
    done_seq INTEGER DEFAULT 0, pending_seq INTEGER, state TEXT, unloaded INTEGER DEFAULT 0);
CREATE TABLE IF NOT EXISTS checkpoints (
    folder TEXT PRIMARY KEY, owner TEXT, model TEXT, kind TEXT, name TEXT, base TEXT, adapter TEXT, about TEXT,
    bytes INTEGER, created REAL, expires REAL, session TEXT, UNIQUE (model, kind, name));
CREATE TABLE IF NOT EXISTS samplers (
    id TEXT PRIMARY KEY, owner TEXT, session TEXT, base TEXT, folder TEXT, path TEXT, created REAL);
CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, owner TEXT, body BLOB, created REAL);
CREATE INDEX IF NOT EXISTS owned_models ON models (owner);
CREATE INDEX IF NOT EXISTS owned_checkpoints ON checkpoints (owner);
"""
DATABASE = "service.sqlite3"
KEEP_REPLIES = 86400.0
"""Seconds that replies of saves and steps are kept."""
NEWEST_UNNAMED = 16
"""Checkpoints of a model that were saved for one sampling client and are kept; older ones are deleted."""

TRAINING, SAMPLER = "weights", "sampler_weights"
"""Kinds of checkpoints, as tinker:// paths have them: with optimizer states and without."""

Row = sqlite3.Row

_TABLES = {"session": "sessions", "model": "models", "training run": "models", "sampling session": "samplers"}


class RefusedError(Exception):
    """A call that gets an HTTP status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def missing(what: str, name: str) -> RefusedError:
    """Return the error for something that a user does not have, which says nothing of whether others do."""
    return RefusedError(404, f"you have no {what} {name!r:.160}")


class Store:
    """The database and the weights of one service, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        private_folder(folder)
        self.weights = folder / "weights"
        private_folder(self.weights)
        self.database = sqlite3.connect(folder / DATABASE, isolation_level=None, check_same_thread=False)
        self.database.row_factory = sqlite3.Row
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.executescript(SCHEMA)
        self._remove_lost_folders()

    def _remove_lost_folders(self) -> None:
        """Delete folders that a killed server had not finished."""
        known = {row[0] for row in self.all("SELECT folder FROM checkpoints UNION SELECT state FROM models")}
        for path in self.weights.iterdir():
            if path.name not in known:
                shutil.rmtree(path)

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Commit all changes of the block or none. durable: flush them to the disk."""
        self.database.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield self.database
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    def one(self, query: str, *values: object) -> Row | None:
        """Return the first row of a query, or None."""
        return self.database.execute(query, values).fetchone()

    def all(self, query: str, *values: object) -> list[Row]:
        """Return the rows of a query."""
        return self.database.execute(query, values).fetchall()

    def new_folder(self) -> Path:
        """Return a path for new weights, which does not exist yet."""
        return self.weights / secrets.token_hex(16)

    def remove(self, name: str | None) -> None:
        """Delete a folder of weights."""
        if name is not None:
            shutil.rmtree(self.weights / name, ignore_errors=True)

    def owned(self, what: str, owner: str, name: str) -> Row:
        """Return a user's session, model, training run or sampling session by its id. Raises RefusedError for none."""
        row = self.one(f"SELECT * FROM {_TABLES[what]} WHERE id = ? AND owner = ?", name, owner)
        if row is None:
            raise missing(what, name)
        return row

    # Sessions and sampling sessions.

    def add_session(self, owner: str, about: Any) -> str:
        """Keep a new session and return its id."""
        session, now = secrets.token_hex(12), time.time()
        with self.transaction() as database:
            row = (session, owner, now, now, json.dumps(about))
            database.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", row)
        return session

    def touch(self, session: str, seen: float | None = None) -> None:
        """Note that a session is alive; seen=0: that it has ended."""
        with self.transaction(durable=False) as database:
            values = (time.time() if seen is None else seen, session)
            database.execute("UPDATE sessions SET seen = ? WHERE id = ?", values)

    def add_sampler(self, owner: str, session: str, seq: int, base: str, folder: str | None, path: str | None) -> str:
        """Keep a sampling session of weights, or of the base alone, and return its id, which the session counts."""
        sampler = f"{session}:sample:{seq}"
        with self.transaction() as database:
            row = (sampler, owner, session, base, folder, path, time.time())
            database.execute("INSERT OR IGNORE INTO samplers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return sampler

    # Models.

    def add_model(
        self, owner: str, session: str, model: str, base: str, adapter: Adapter, about: Any, state: Path | None
    ) -> None:
        """Keep a new model. state: the folder of its first snapshot."""
        now = time.time()
        with self.transaction() as database:
            database.execute(
                "INSERT INTO models (id, owner, session, base, adapter, about, created, seen, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (model, owner, session, base, json.dumps(asdict(adapter)), json.dumps(about), now, now, _name(state)),
            )
            self._add_reply(owner, f"{model}:0", model_id=model, type="create_model")

    def note_pending(self, model: str, seq: int | None) -> None:
        """Note the first call that changed a model after its snapshot; None: that its owner knows of the loss."""
        with self.transaction(durable=False) as database:
            database.execute("UPDATE models SET pending_seq = ?, seen = ? WHERE id = ?", (seq, time.time(), model))

    def note_snapshot(self, row: Row, folder: Path, seq: int, **reply: object) -> None:
        """Keep a model's state after the call `seq`, with the reply to that call, and delete the state before it."""
        before = self.one("SELECT state FROM models WHERE id = ?", row["id"])
        with self.transaction() as database:
            database.execute(
                "UPDATE models SET state = ?, done_seq = ?, seen = ?, "
                "pending_seq = CASE WHEN pending_seq > ? THEN pending_seq END WHERE id = ?",
                (folder.name, seq, time.time(), seq, row["id"]),
            )
            self._add_reply(row["owner"], f"{row['id']}:{seq}", **reply)
        self.remove(before["state"] if before else None)

    def unload(self, model: str) -> None:
        """Note that a model has gone for good, and delete its state."""
        row = self.one("SELECT state FROM models WHERE id = ?", model)
        with self.transaction() as database:
            database.execute("UPDATE models SET unloaded = 1, state = NULL WHERE id = ?", (model,))
        self.remove(row["state"] if row else None)

    # Checkpoints.

    def add_checkpoint(
        self,
        model: Row,
        folder: Path,
        *,
        kind: str,
        name: str,
        seq: int,
        seconds: int | None,
        about: Any,
        overwrite: bool,
        sampler_seq: int | None,
    ) -> str:
        """Keep weights that the engine saved in `folder`, and the reply to the call. Returns their tinker:// path.

        kind: TRAINING or SAMPLER. sampler_seq: they belong to one sampling client alone, and go with it.
        Raises UserError if the name is taken.
        """
        old = self.one("SELECT * FROM checkpoints WHERE model = ? AND kind = ? AND name = ?", model["id"], kind, name)
        if old is not None and not overwrite:
            raise UserError(f"path={name} exists already; choose another name, or set overwrite=true")
        now, path, session = time.time(), f"tinker://{model['id']}/{kind}/{name}", model["session"]
        size = sum(item.stat().st_size for item in folder.rglob("*") if item.is_file())
        only = session if sampler_seq is not None else None
        expires = None if seconds is None else now + seconds
        with self.transaction() as database:
            database.execute("DELETE FROM checkpoints WHERE folder = ?", (old["folder"] if old else None,))
            row: tuple[object, ...] = (folder.name, model["owner"], model["id"], kind, name, model["base"])
            row += (model["adapter"], json.dumps(about), size, now, expires, only)
            database.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            reply: dict[str, object] = {"path": path}
            if sampler_seq is not None:
                reply = {"sampling_session_id": f"{session}:sample:{sampler_seq}"}
                sampler = (reply["sampling_session_id"], model["owner"], session, model["base"], folder.name, path, now)
                database.execute("INSERT OR REPLACE INTO samplers VALUES (?, ?, ?, ?, ?, ?, ?)", sampler)
            reply["type"] = "save_weights" if kind == TRAINING else "save_weights_for_sampler"
            self._add_reply(model["owner"], f"{model['id']}:{seq}", **reply)
        if old is not None:
            self.remove(old["folder"])
        if only is not None:
            unnamed = "SELECT folder FROM checkpoints WHERE model = ? AND session IS NOT NULL ORDER BY created DESC"
            self.delete_checkpoints([row[0] for row in self.all(unnamed, model["id"])][NEWEST_UNNAMED:])
        return path

    def checkpoint(self, owner: str, path: str) -> Row:
        """Return a user's checkpoint by its tinker:// path. Raises RefusedError for none."""
        parts, row = path.removeprefix("tinker://").split("/"), None
        if len(parts) == 3 and path.startswith("tinker://"):
            query = "SELECT * FROM checkpoints WHERE owner = ? AND model = ? AND kind = ? AND name = ?"
            row = self.one(query, owner, *parts)
        if row is None:
            raise missing("checkpoint", path)
        return row

    def delete_checkpoints(self, folders: list[str]) -> None:
        """Delete checkpoints by the names of their folders."""
        with self.transaction() as database:
            database.executemany("DELETE FROM checkpoints WHERE folder = ?", [(folder,) for folder in folders])
        for folder in folders:
            self.remove(folder)

    def disk_bytes(self, owner: str) -> int:
        """Return the bytes of a user's checkpoints."""
        row = self.one("SELECT COALESCE(SUM(bytes), 0) FROM checkpoints WHERE owner = ?", owner)
        return int(row[0]) if row else 0

    def clean(self, idle_seconds: float) -> list[str]:
        """Delete what has expired or belonged to an idle session; return the models of such sessions, to unload."""
        now = time.time()
        idle = "SELECT id FROM sessions WHERE seen < ?"
        gone = self.all(
            f"SELECT folder FROM checkpoints WHERE expires < ? OR session IN ({idle})", now, now - idle_seconds
        )
        self.delete_checkpoints([row[0] for row in gone])
        with self.transaction(durable=False) as database:
            database.execute("DELETE FROM replies WHERE created < ?", (now - KEEP_REPLIES,))
        query = f"SELECT id FROM models WHERE pending_seq IS NULL AND unloaded = 0 AND session IN ({idle})"
        return [row[0] for row in self.all(query, now - idle_seconds)]

    # Replies.

    def _add_reply(self, owner: str, request: str, **values: object) -> None:
        row = (request, owner, json.dumps(values).encode(), time.time())
        self.database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)

    def reply(self, owner: str, request: str) -> bytes | None:
        """Return the kept reply to a user's call, or None."""
        row = self.one("SELECT body FROM replies WHERE request = ? AND owner = ?", request, owner)
        return None if row is None else bytes(row["body"])


def read_counts(folder: Path) -> dict[str, int]:
    """Return how much a service's folder keeps; zeros before its first start."""
    names, query = (
        ("users", "adapters", "checkpoints", "checkpoint_bytes"),
        (
            "SELECT (SELECT COUNT(DISTINCT owner) FROM sessions), (SELECT COUNT(*) FROM models WHERE unloaded = 0), "
            "COUNT(*), COALESCE(SUM(bytes), 0) FROM checkpoints"
        ),
    )
    if not (folder / DATABASE).is_file():
        return dict.fromkeys(names, 0)
    with contextlib.closing(sqlite3.connect(f"{(folder / DATABASE).as_uri()}?mode=ro", uri=True)) as database:
        return dict(zip(names, database.execute(query).fetchone(), strict=True))


def adapter_of(row: Row) -> Adapter:
    """Return the adapter of a model or a checkpoint."""
    return Adapter(**json.loads(row["adapter"]))


def _name(folder: Path | None) -> str | None:
    return None if folder is None else folder.name
