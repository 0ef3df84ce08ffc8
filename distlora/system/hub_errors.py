"""Turn errors of huggingface_hub into UserErrors: the name, the reason, and the cure."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from distlora.config import UserError


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
    """Other value that the setting may have."""


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
            raise UserError(_explain_absence(error, name, kind)) from error
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
    if any(file.endswith(".bin") for file in present):
        return UserError(
            f"{{model.path}}={name} has its weights as .bin files alone, which can hold code; convert them at "
            f"{endpoint()}/spaces/safetensors/convert and set model.revision=refs/pr/N to the pull request"
        )
    if files := [file for file in present if file.endswith(".gguf")]:
        return UserError(
            f"{{model.path}}={name} has its weights as GGUF alone; `hf download {name} {files[0]} --local-dir FOLDER`, "
            f"and set {{model.path}}=FOLDER/{files[0]}"
        )
    return UserError(
        f"{{model.path}}={name} holds neither model.safetensors nor model.safetensors.index.json; set "
        "{model.path} to a causal language model with safetensors weights"
    )


def endpoint() -> str:
    """Return the hub's address."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _explain_refusal(error: Exception, name: str, revision: str | None, kind: HubKind) -> str:
    """Describe an HTTP error of the hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
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
            f"{kind.revision_setting}={revision}: {name} has no such branch, tag or commit; {page}/tree/main lists them"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{kind.setting}={name} is neither {kind.instead} nor a {kind.what} on the hub; check the name, and for a "
            f"private {kind.what} log in with `hf auth login` or set HF_TOKEN"
        )
    status = error.response.status_code
    if status == 401 and get_token() is None:
        return f"{kind.setting}={name}: the hub answers strangers with 401; log in with `hf auth login` or set HF_TOKEN"
    if status == 401:
        where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"the hub refuses the token of this node (from {where}); log in again with `hf auth login`"
    reason = (error.server_message or str(error)).strip().partition("\n")[0]
    advice = f"use a token that may read {page}" if status == 403 else "try again later"
    return f"{kind.setting}={name}: the hub answered {status} ({reason}); {advice}"


def explain_gate(name: str, kind: HubKind) -> str:
    """Describe how to get access to a gated repository."""
    return (
        f"{kind.setting}={name} is gated: accept its licence at {endpoint()}/{kind.page}{name}, and log in with that "
        "account (`hf auth login` or HF_TOKEN)"
    )


def _explain_absence(error: BaseException, name: str, kind: HubKind) -> str:
    """Describe an unreachable hub when the cache has no whole copy."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        reason, advice = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it"
    else:
        # Not the last cause: huggingface_hub ends with advice on a flag of its own.
        first = str(causes(error)[-1]).strip().partition("\n")[0]
        detail = f" ({first})" if first and "local_files_only" not in first else ""
        reason, advice = f"{constants.ENDPOINT} cannot be reached{detail}", "connect, and start again"
    return (
        f"{kind.setting}={name} is neither {kind.instead} nor whole in the cache ({constants.HF_HUB_CACHE}), and "
        f"{reason}; {advice}, or set {kind.setting} to {kind.instead}"
    )
