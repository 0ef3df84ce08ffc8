"""Turn errors of huggingface_hub into UserErrors: the name, the library's reason, and the cure."""

import contextlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from distlora.config import UserError


class HubKind(NamedTuple):
    """A type of repository: its name, the section of its settings, the prefix of its page, and another value."""

    what: str
    section: str
    page: str
    instead: str


MODEL = HubKind("model", "model", "", "a folder here")
DATASET = HubKind("data set", "data", "datasets/", "a file or folder here")


@contextlib.contextmanager
def explained(name: str, revision: str | None, kind: HubKind = MODEL) -> Iterator[None]:
    """Turn errors of the hub about one repository into UserErrors, even if a library wrapped them.

    Raises UserError for what the hub refuses, for an unreachable hub, and for a disk that refuses a download. Other
    errors pass unchanged.
    """
    from huggingface_hub import constants, errors

    setting, page = f"{{{kind.section}.path}}={name}", f"{constants.ENDPOINT}/{kind.page}{name}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    refusals: dict[type[Exception], tuple[str, str]] = {  # A kind of another error stands before it.
        errors.GatedRepoError: (f"{setting} is gated", f"accept its licence at {page}, and {login}"),
        errors.RevisionNotFoundError: (
            f"{kind.section}.revision={revision}: {name} has no such branch, tag or commit",
            f"{page}/tree/main lists them",
        ),
        errors.RepositoryNotFoundError: (
            f"{setting} is neither {kind.instead} nor a {kind.what} on the hub",
            f"check the name, and for a private {kind.what} {login}",
        ),
        errors.HfHubHTTPError: (f"{setting} cannot be read from the hub", f"{login}, or try again later"),
        errors.HFValidationError: (f"{setting} cannot be a name on the hub", "write it as org/name"),
    }
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = causes(error)
        for link in chain:
            # An optional file that is absent comes before many another error; datasets keeps no more than the sentence.
            is_aside = unreachable(link) or (isinstance(link, errors.EntryNotFoundError) and link is not error)
            for refusal, (reason, cure) in refusals.items():
                is_gate = refusal is errors.GatedRepoError and "is a gated dataset" in str(link)
                if is_gate or (isinstance(link, refusal) and not is_aside):
                    raise UserError(f"{reason} ({_in_one_line(link)}); {cure}") from error
        if any(unreachable(link) for link in chain):
            away = f"{constants.ENDPOINT} cannot be reached ({_in_one_line(chain[-1])}); connect, and start again"
            if constants.is_offline_mode():
                away = "HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE to download it"
            raise UserError(
                f"{setting} is neither {kind.instead} nor whole in the cache ({constants.HF_HUB_CACHE}), and {away}, "
                f"or set {{{kind.section}.path}} to {kind.instead}"
            ) from error
        if not isinstance(error, OSError) or kind is not MODEL:
            raise
        raise UserError(
            f"{name} could not be downloaded ({_in_one_line(error)}); start again, with HF_HOME set to another folder "
            "if that is the reason"
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


def _in_one_line(error: BaseException) -> str:
    """Return an error's message, without the status and the request's number that huggingface_hub puts first."""
    text = str(error).partition("\n\n")[2] or str(error)
    return re.sub(r"\s+", " ", text).strip() or type(error).__name__
