"""Settings of a training service (`distlora serve`): where it listens, whom it serves, and the limits of each user."""

from dataclasses import dataclass

from distlora.config.errors import Refusals, at_least_zero, positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The section `serve` of conf/, for `distlora serve` only.

    Limits are per user; a call beyond one gets a 4xx error.
    """

    folder: str = "service"
    """Folder of keys, adapters and checkpoints. A start with the folder of an earlier one continues it."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs a reverse proxy with TLS before it (docs/service.md)."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    users: tuple[str, ...] = ("default",)
    """Users. Each new one gets an API key, which the start prints once. A user who leaves the list is locked out."""
    names: tuple[str, ...] = ()
    """Names by which clients ask for the base, such as Qwen/Qwen3-8B, besides model.path itself."""
    tokenizer: str | None = None
    """Name or folder that clients load the tokenizer by; null: model.path."""
    max_rank: int = 128
    """Largest rank of an adapter."""
    max_adapters: int = 16
    """Adapters of a user that are loaded at once."""
    max_tokens_in_flight: int = 1_000_000
    """Tokens of a user's calls that wait or run: those of the rows, and prompt plus answers of samples."""
    max_calls_in_flight: int = 4096
    """Calls of a user that wait or run."""
    max_request_bytes: int = 64_000_000
    """Largest body of a request, in bytes."""
    max_disk_bytes: int = 100_000_000_000
    """Bytes of a user's checkpoints."""
    snapshot_steps: int = 1
    """Optimizer steps of an adapter between two snapshots, from which it comes back after a crash. 1: a step is on disk
    before it is acknowledged."""
    idle_minutes: float = 60.0
    """Minutes without a call after which a session's adapters leave memory and its unnamed checkpoints are deleted."""
    drain_seconds: float = 60.0
    """Seconds that calls in flight may take to end after SIGTERM."""


def refused_in_serve(serve: ServeConfig) -> Refusals:
    """Check the settings of a service."""
    yield from positive(
        serve,
        "max_rank max_adapters max_tokens_in_flight max_calls_in_flight max_request_bytes max_disk_bytes "
        "snapshot_steps idle_minutes",
    )
    yield from at_least_zero(serve, drain_seconds="is no time; set 0 (end at once) or more")
    if not 0 <= serve.port < 65536:
        yield "port= is not a port; set a number from 0 (any free one) to 65535"
    if not serve.users:
        yield "users= names nobody; set {field}=[default]"
    for user in serve.users:
        if not user.isidentifier():
            yield f"serve.users names {user!r}; use letters, digits and '_'"
