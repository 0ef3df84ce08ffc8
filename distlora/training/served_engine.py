"""Answers that a vLLM server samples with the run's adapter (rollout.url), in the place of the trainer's engine."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from distlora.generation.engine import gathered
from distlora.generation.remote import RemoteEngine, ServerError
from distlora.generation.sampling import Request, Sample
from distlora.parallel import Backend, from_rank_0
from distlora.run_folder.layout import ROLLOUT_ADAPTER_NAME, ROLLOUT_ID_NAME
from distlora.system import atomic_io


class ServedEngine:
    """A server in the place of `Engine`. Rank 0 talks to it, and the others get its samples.

    `publish` writes the adapter as a PEFT folder; every rank calls it.
    """

    def __init__(self, remote: RemoteEngine, folder: Path, publish: Callable[[Path], None], backend: Backend) -> None:
        self._remote, self._folder, self._publish, self._backend = remote, folder, publish, backend
        self._version = 0

    def run(self, requests: Sequence[Request]) -> list[Sample]:
        """Return the samples of all requests, in their order. Every rank calls it. Raises ServerError, on all."""
        self._publish(self._folder)
        samples: dict[int, Sample] = {}
        error: ServerError | None = None
        if self._backend.ranks.rank == 0:
            try:
                self._remote.load(self._folder, self._version)
                samples = dict(enumerate(self._remote.run(requests)))
            except ServerError as raised:
                error = raised
        self._version += 1
        if from_rank_0(int(error is not None), self._backend.ranks):
            raise error or ServerError("the vLLM server failed; the log of rank 0 says how")
        return gathered(samples, len(requests), self._backend)

    def close(self) -> None:
        """Remove the adapter from the server."""
        if self._backend.ranks.rank == 0:
            self._remote.close()


def start_served_engine(
    url: str, run_dir: Path, ends: Sequence[int], publish: Callable[[Path], None], backend: Backend
) -> ServedEngine:
    """Return the server of rollout.url, given what writes the adapter. Raises UserError if it does not answer."""
    name = _name_on_server(run_dir) if backend.writes else ""  # Only the rank that writes talks to the server.
    remote = RemoteEngine(url, stop_tokens=ends, run=name)
    if backend.writes:
        remote.connect()
    return ServedEngine(remote, run_dir / ROLLOUT_ADAPTER_NAME, publish, backend)


def _name_on_server(run_dir: Path) -> str:
    """Return the prefix of the run's adapter names, which no other run has; a resume replaces those left by a kill."""
    path = run_dir / ROLLOUT_ID_NAME
    if not path.is_file():
        atomic_io.write_text(path, secrets.token_hex(8))
    return f"{run_dir.resolve().name}-{path.read_text(encoding='utf-8')}"
