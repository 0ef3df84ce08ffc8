"""Run a training service: the worker of `distlora serve`, started once per rank by the launcher.

Every rank builds the base, sharded over the ranks, and follows the engine's rounds. Rank 0 also listens for clients.
After a request to stop the calls in flight end, and the worker exits with code 0; after a failure the launcher starts
the workers again, and the store's snapshots bring the adapters back.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from dataclasses import replace
from pathlib import Path

from distlora.architecture.checkpoint_files import CheckpointFiles
from distlora.generation.prompts import PromptEncoder, context_limit
from distlora.parallel import Backend, Ranks, join_ranks, leave_ranks
from distlora.parallel.watch import Control
from distlora.serving.app import start_http
from distlora.serving.engine import Engine
from distlora.serving.request import ServeRequest
from distlora.serving.service import ServedBase
from distlora.system.exit_codes import DONE
from distlora.system.stop_signals import Stopped
from distlora.training.setup import StartOptions, start_model

SPILL = "idle_adapters"
"""Folder of idle adapters in serve.folder. A start empties it: the store has the last snapshot of each."""
ROUND_SECONDS = 1800.0
"""Seconds after which ranks that wait for one another within a round are ended."""


def main(request: ServeRequest) -> int:
    """Serve on this rank until a request to stop. Returns the exit code."""
    ranks = join_ranks(ROUND_SECONDS)
    control = Control(ranks.control, save_minutes=None)
    with contextlib.suppress(Stopped):  # While the base is read; nobody was served yet.
        _serve(request, ranks, control)
    control.end()
    leave_ranks(ranks)
    return DONE


def _serve(request: ServeRequest, ranks: Ranks, control: Control) -> None:
    # The losses are the clients' own: routers of a mixture of experts add none.
    train = replace(request.train, router_aux_loss=0.0)
    _say(f"reading {request.spec.path}")
    model, backend, _ = start_model(
        request.spec,
        ranks,
        StartOptions(log=_say, boundary=control.boundary, for_slots=True),
        train=train,
        parallel=request.parallel,
        shard_degree=request.shard_degree,
        sequence_length=request.context,
        base=CheckpointFiles(request.spec.path),
    )
    for note in model.notes:
        _say(note)
    encoder = PromptEncoder(model, request.spec.model, {}, as_chat=False)
    ends, context = encoder.stop_tokens(request.spec.path), min(request.context, context_limit(model))
    folder, server = Path(request.serve.folder), None

    def drain() -> None:
        assert server is not None, "only rank 0 drains"
        server.stop()
        engine.close()

    engine = Engine(
        model,
        backend,
        request.spec,
        end_tokens=ends,
        tokenizer=encoder.tokenizer,
        context=context,
        spill_folder=_emptied(folder / SPILL, backend),
        boundary=control.boundary,
        on_stop=lambda: None if server is None else threading.Thread(target=drain, name="drain").start(),
    )
    if backend.writes:
        names, tokenizer = request.serve.names, request.serve.tokenizer or request.spec.model.path
        server = start_http(engine, request.serve, ServedBase(names, tokenizer, context), folder)
        address = f"http://{request.serve.host}:{server.port}"
        _say(f"serving {', '.join(names)} at {address}; requests are logged in {folder / 'logs'}")
    try:
        engine.run()
    finally:
        if server is not None:
            server.stop()


def _emptied(folder: Path, backend: Backend) -> Path:
    """Return an empty folder, on every rank once rank 0 has made it."""
    if backend.writes:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    backend.barrier()
    return folder


def _say(text: str) -> None:
    """Print a line; rank 0's are shown, the others' go to their logs."""
    print(text, flush=True)
