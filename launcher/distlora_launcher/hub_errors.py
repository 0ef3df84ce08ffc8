"""What huggingface_hub raises, said as: the name, the reason, what to type instead."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from distlora.config import UserError, nearest


@contextlib.contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub about one model into UserErrors."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(f"model.path={name} cannot be a name on the hub ({error}); write it as org/name") from error
    except HfHubHTTPError as error:
        raise UserError(_explain_refusal(error, name, revision)) from error
    except Exception as error:
        if unreachable(error):
            raise UserError(_explain_absence(error, name)) from error
        if not isinstance(error, OSError):
            raise
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error).splitlines()[0]
        raise UserError(
            f"{name} could not be downloaded ({reason}); start again, with HF_HOME set to another folder if that is "
            "the reason"
        ) from error


def unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer: offline, no network, down."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError))


def explain_absent_weights(name: str, files: Iterable[str]) -> UserError:
    """Why a repository without safetensors in the usual names is no base, and what could be one."""
    present = list(files)
    if "adapter_config.json" in present:
        return UserError(f"model.path={name} is an adapter, not a model; set model.path to the base it belongs to")
    for suffix, advice in (
        (".gguf", "is quantized for llama.cpp; set model.path to the safetensors checkpoint that it was made from"),
        (
            ".bin",
            f"has its weights as .bin files alone, which can hold code; convert them at {endpoint()}/spaces/"
            f"safetensors/convert and set model.revision=refs/pr/N to the pull request, or set model.path to a copy "
            "with safetensors",
        ),
    ):
        if any(file.endswith(suffix) for file in present):
            return UserError(f"model.path={name} {advice}")
    return UserError(
        f"model.path={name} holds neither model.safetensors nor model.safetensors.index.json; set model.path to a "
        "causal language model with safetensors weights"
    )


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def user_of_token() -> str | None:
    """Whose token this machine has; None without a valid one."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        return None
    try:
        return str(HfApi().whoami()["name"])
    except HfHubHTTPError:  # Expired or revoked, as good as none.
        return None


def _explain_refusal(error: Exception, name: str, revision: str | None) -> str:
    """What an answer of the hub that is no success means."""
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert isinstance(error, HfHubHTTPError)
    if isinstance(error, GatedRepoError):  # Before RepositoryNotFoundError, of which it is a kind.
        user = user_of_token()
        log_in = f"this machine is logged in as {user}" if user else "log in with `hf auth login` or set HF_TOKEN"
        return f"model.path={name} is gated: accept its licence at {endpoint()}/{name}; {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"model.revision={revision}: {name} has no such branch, tag or commit"
            f"{nearest(str(revision), _refs(name))}; {endpoint()}/{name}/tree/main lists them"
        )
    if isinstance(error, RepositoryNotFoundError):
        token = "" if user_of_token() else "; a private model needs `hf auth login` or HF_TOKEN"
        return (
            f"model.path={name} is neither a folder here nor a model on the hub{nearest(name, _similar(name))}{token}"
        )
    if isinstance(error, DisabledRepoError):
        return f"model.path={name} was disabled by the hub; set model.path to another model"
    if error.response.status_code == 401:
        where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"the hub refuses the token of this machine (from {where}); log in again with `hf auth login`"
    reason = (error.server_message or str(error)).strip().splitlines()[0]
    return f"model.path={name}: the hub answered {error.response.status_code} ({reason}); try again later"


def _explain_absence(error: Exception, name: str) -> str:
    """What to say when the hub gave no answer and the cache has no whole copy."""
    from huggingface_hub import constants

    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if constants.is_offline_mode():
        reason, advice = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it"
    else:
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        reason, advice = f"{constants.ENDPOINT} cannot be reached ({first})", "connect, and start again"
    cached = [model for model in _cached_models() if model != name]
    have = f" The cache has {', '.join(cached[:5])}{nearest(name, cached)}." if cached else ""
    return (
        f"model.path={name} is neither a folder here nor whole in the cache ({constants.HF_HUB_CACHE}), and {reason}; "
        f"{advice}, or set model.path to a folder.{have}"
    )


def _similar(name: str) -> list[str]:
    """Names on the hub that a mistyped one may have meant: of the same owner, else those that contain the last part."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    owner, _, last = name.partition("/")
    try:
        own = [model.id for model in HfApi().list_models(author=owner, limit=200)]
        return own or [model.id for model in HfApi().list_models(search=last, sort="downloads", limit=20)]
    except HfHubHTTPError:  # A hint is no reason for another error.
        return []


def _refs(name: str) -> list[str]:
    """Branches and tags of a model."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        refs = HfApi().list_repo_refs(name)
    except HfHubHTTPError:  # A hint is no reason for another error.
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _cached_models() -> list[str]:
    """Names of the models in the cache."""
    from huggingface_hub import constants

    folder = constants.HF_HUB_CACHE
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(entry.removeprefix("models--").replace("--", "/") for entry in names if entry.startswith("models--"))
