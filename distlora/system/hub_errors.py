"""Turn errors of huggingface_hub into UserErrors: the name, the reason, and the cure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from distlora.config import UserError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class HubKind:
    """A type of repository, in the words of messages and of the hub's API."""

    what: str
    """`model` or `data set`."""
    page: str
    """Prefix of its name in the page's address."""
    setting: str
    revision_setting: str
    instead: str
    """What the setting may hold besides a name."""


MODEL = HubKind(
    what="model", page="", setting="{model.path}", revision_setting="model.revision", instead="a folder here"
)
DATASET = HubKind(
    what="data set",
    page="datasets/",
    setting="{data.path}",
    revision_setting="data.revision",
    instead="a file or folder here",
)


@contextlib.contextmanager
def explained(name: str, revision: str | None, kind: HubKind = MODEL) -> Iterator[None]:
    """Turn errors of the hub about one repository into UserErrors, even if a library wrapped them.

    Raises UserError for HTTP errors (401, 403, 404, 429 and others), for an unreachable hub, and for a disk that
    refuses a download. Other errors pass unchanged.
    """
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = causes(error)
        for link in chain:
            if isinstance(link, HFValidationError):
                raise UserError(
                    f"{kind.setting}={name} cannot be a name on the hub ({link}); write it as org/name"
                ) from error
            # A file that may be absent, and is, comes before many another error.
            aside = isinstance(link, EntryNotFoundError) and link is not error
            if isinstance(link, HfHubHTTPError) and not unreachable(link) and not aside:
                raise UserError(_explain_refusal(link, name, revision, kind)) from error
        if any(unreachable(link) for link in chain):
            raise UserError(explain_absence(error, name, kind)) from error
        if not isinstance(error, OSError) or kind is not MODEL:
            raise
        reason = (
            f"{error.filename}: {error.strerror}" if error.filename else (str(error).splitlines() or ["OSError"])[0]
        )
        raise UserError(
            f"{name} could not be downloaded ({reason}); start again, with HF_HOME set to another folder if that is "
            "the reason"
        ) from error


def causes(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes, the last one first."""
    links = [error]
    while (cause := links[-1].__cause__ or links[-1].__context__) is not None and cause not in links:
        links.append(cause)
    return links


def unreachable(error: BaseException) -> bool:
    """Return whether the hub gave no answer: offline, no network, or down."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    kinds = (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, kinds)


def explain_absent_weights(name: str, files: Iterable[str]) -> UserError:
    """Return the error for a repository without the usual safetensors files, with the cure."""
    present = list(files)
    if "adapter_config.json" in present:
        return UserError(
            field="model.path",
            value=name,
            reason="is an adapter, not a model",
            cure="set {field} to the base it belongs to",
        )
    for suffix, advice in (
        (".gguf", "is quantized for llama.cpp; set {model.path} to the safetensors checkpoint that it was made from"),
        (
            ".bin",
            f"has its weights as .bin files alone, which can hold code; convert them at {endpoint()}/spaces/"
            f"safetensors/convert and set model.revision=refs/pr/N to the pull request, or set {{model.path}} to a "
            "copy with safetensors",
        ),
    ):
        if any(file.endswith(suffix) for file in present):
            return UserError(f"{{model.path}}={name} {advice}")
    return UserError(
        f"{{model.path}}={name} holds neither model.safetensors nor model.safetensors.index.json; set "
        "{model.path} to a causal language model with safetensors weights"
    )


def endpoint() -> str:
    """Return the hub's address."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def user_of_token() -> str | None:
    """Return the user of this machine's token; None without a valid one."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError

    if get_token() is None:
        return None
    try:
        return str(HfApi().whoami()["name"])
    except HTTPError:  # Expired or revoked, as good as none; or no answer, and a hint is no reason for another error.
        return None


def _explain_refusal(error: Exception, name: str, revision: str | None, kind: HubKind) -> str:
    """Describe an HTTP error of the hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert isinstance(error, HfHubHTTPError)
    page = f"{endpoint()}/{kind.page}{name}"
    if isinstance(error, GatedRepoError):  # Before RepositoryNotFoundError, of which it is a kind.
        return explain_gate(name, kind)
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{kind.revision_setting}={revision}: {name} has no such branch, tag or commit"
            f"{nearest(str(revision), _refs(name, kind))}; {page}/tree/main lists them"
        )
    if isinstance(error, RepositoryNotFoundError):
        token = "" if user_of_token() else f"; a private {kind.what} needs `hf auth login` or HF_TOKEN"
        return (
            f"{kind.setting}={name} is neither {kind.instead} nor a {kind.what} on the hub"
            f"{nearest(name, _similar(name, kind))}{token}"
        )
    if isinstance(error, DisabledRepoError):
        return f"{kind.setting}={name} was disabled by the hub; set {kind.setting} to another {kind.what}"
    if error.response.status_code == 401 and get_token() is None:
        return f"{kind.setting}={name}: the hub answers strangers with 401; log in with `hf auth login` or set HF_TOKEN"
    if error.response.status_code == 401:
        where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"the hub refuses the token of this machine (from {where}); log in again with `hf auth login`"
    reason = (error.server_message or str(error)).strip().partition("\n")[0]
    status = error.response.status_code
    advice = f"use a token that may read {page}" if status == 403 else "try again later"
    return f"{kind.setting}={name}: the hub answered {status} ({reason}); {advice}"


def explain_gate(name: str, kind: HubKind) -> str:
    """Describe how to get access to a gated repository."""
    user = user_of_token()
    log_in = f"this machine is logged in as {user}" if user else "log in with `hf auth login` or set HF_TOKEN"
    return f"{kind.setting}={name} is gated: accept its licence at {endpoint()}/{kind.page}{name}; {log_in}"


def explain_absence(error: BaseException, name: str, kind: HubKind) -> str:
    """Describe an unreachable hub when the cache has no whole copy."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        reason, advice = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it"
    else:
        # Not the last cause: huggingface_hub ends with advice on a flag of its own.
        first = str(causes(error)[-1]).strip().partition("\n")[0]
        detail = f" ({first})" if first and "local_files_only" not in first else ""
        reason, advice = f"{constants.ENDPOINT} cannot be reached{detail}", "connect, and start again"
    cached = [repository for repository in _cached(kind) if repository != name]
    have = f" The cache has {', '.join(cached[:5])}{nearest(name, cached)}." if cached else ""
    return (
        f"{kind.setting}={name} is neither {kind.instead} nor whole in the cache ({constants.HF_HUB_CACHE}), and "
        f"{reason}; {advice}, or set {kind.setting} to {kind.instead}.{have}"
    )


def _similar(name: str, kind: HubKind) -> list[str]:
    """Return names on the hub that a mistyped one may mean: of the same owner, else those with the same last part."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    owner, _, last = name.partition("/")
    find: Callable[..., Iterable[Any]] = HfApi().list_models if kind is MODEL else HfApi().list_datasets
    try:
        same_owner = [repository.id for repository in find(author=owner, limit=200)]
        return same_owner or [repository.id for repository in find(search=last, sort="downloads", limit=20)]
    except HTTPError:  # A hint is no reason for another error.
        return []


def _refs(name: str, kind: HubKind) -> list[str]:
    """Return the branches and tags of a repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        refs = HfApi().list_repo_refs(name, repo_type="model" if kind is MODEL else "dataset")
    except HTTPError:  # A hint is no reason for another error.
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _cached(kind: HubKind) -> list[str]:
    """Return the names of the repositories in the cache."""
    from huggingface_hub import constants

    folder, start = constants.HF_HUB_CACHE, "models--" if kind is MODEL else "datasets--"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(entry.removeprefix(start).replace("--", "/") for entry in names if entry.startswith(start))
