"""Sample rollouts with a vLLM server: the run's adapter as it is now, loaded under a new name before each use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from distlora.generation.engine import gathered
from distlora.generation.remote import RemoteEngine, ServerError
from distlora.generation.requests import Request, Sample
from distlora.parallel import Backend, from_rank_0


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
