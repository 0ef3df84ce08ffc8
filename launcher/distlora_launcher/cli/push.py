"""`distlora push RUN ORG/NAME`: upload what a run trained to the Hugging Face hub, with a model card, in one commit."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from distlora.config import UserError, nearest
from distlora.post.export.repository import Files, as_plain_adapter, collect, write_files
from distlora.run_folder.layout import read_result
from distlora_launcher.terminal.arguments import Parser

DESCRIPTION = """\
Upload what the run in the folder RUN trained to the Hugging Face hub as ORG/NAME, with a model card that states base,
data, settings and metrics. The repository is made if it does not exist."""


def main(arguments: list[str]) -> int:
    """Upload, or with --dry-run show, what the arguments name. Returns the exit code."""
    options = parse(arguments)
    if options is None:
        return 0
    run_dir = Path(options.run).expanduser().absolute()
    result = read_result(run_dir, options.checkpoint)
    base = options.base_model or result.config.model.name
    if base is None and result.adapter is not None:
        print(
            f"warning: the base is the folder {result.config.model.path}, which others do not have: neither the card "
            "nor adapter_config.json name a base; add --base-model ORG/NAME if it is on the hub",
            file=sys.stderr,
        )
    with as_plain_adapter(result) as plain:
        files = collect(plain, repository=options.name, base=base)
        if options.dry_run is not None:
            dry_run(files, options.dry_run)
        else:
            upload(options, files, f"{run_dir.name}: {result.folder.name}")
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PushRequest:
    """The arguments of `distlora push`."""

    run: str
    name: str
    private: bool
    revision: str | None
    checkpoint: str | None
    base_model: str | None
    dry_run: str | None
    """A folder, "" to print the card, None to upload."""


def parse(arguments: list[str]) -> PushRequest | None:
    """Return the request, or None after the help text. Raises UserError for names that are not on the hub."""
    parser = Parser("distlora push", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("name", metavar="ORG/NAME", help="repository on the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument(
        "--revision", metavar="BRANCH", help="commit to this branch instead of main; it is made if it does not exist"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="upload the best by held-out loss (best) or a saved step (step_100) instead of the final result",
    )
    parser.add_argument(
        "--base-model", metavar="ORG/NAME", help="name of the base on the hub, for a run whose model.path was a folder"
    )
    parser.add_argument(
        "--dry-run",
        metavar="FOLDER",
        nargs="?",
        const="",
        help="upload nothing: print the card, or write all files into FOLDER",
    )
    options = parser.read(PushRequest, arguments)
    if options is None:
        return None
    _check_name("ORG/NAME", options.name)
    if options.base_model is not None:
        _check_name("--base-model", options.base_model)
    return options


def dry_run(files: Files, folder: str) -> None:
    """Print the card and what would be uploaded beside it, or write everything into an empty or new folder."""
    if folder:
        place = Path(folder).expanduser()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"--dry-run {folder} is not an empty folder; name one that does not exist yet")
        place.mkdir(parents=True, exist_ok=True)
        write_files(files, place)
        print(f"wrote {len(files)} files to {folder}")
        return
    card = files["README.md"]
    assert isinstance(card, bytes)
    print(card.decode(), end="")
    for name, content in files.items():
        print(f"would upload {name} ({_size(content):,} bytes)", file=sys.stderr)


def upload(options: PushRequest, files: Files, message: str) -> None:
    """Make the repository and the branch where they are missing, and commit the files. Prints the address."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    from distlora.system.hub_errors import endpoint, unreachable

    if get_token() is None:
        raise UserError("uploading needs a token with write access: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    try:
        api.create_repo(options.name, private=options.private or None, exist_ok=True)
        if options.private and not api.model_info(options.name).private:
            raise UserError(
                f"{options.name} exists and is public; make it private at {endpoint()}/{options.name}/settings, "
                "or leave --private out"
            )
        if options.revision is not None:
            api.create_branch(options.name, branch=options.revision, exist_ok=True)
        with contextlib.nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            commit = api.create_commit(
                options.name, operations, commit_message=f"distlora: {message}", revision=options.revision
            )
    except HfHubHTTPError as error:
        raise UserError(_explain(error, options.name)) from error
    except Exception as error:
        if not unreachable(error):
            raise
        raise UserError(f"{endpoint()} cannot be reached ({error}); connect, and push again") from error
    branch = f"/tree/{options.revision}" if options.revision else ""
    print(f"pushed {len(files)} files ({sum(map(_size, files.values())) / 1e6:,.1f} MB) in commit {commit.oid[:12]}")
    print(f"{endpoint()}/{options.name}{branch}")


def _explain(error: Exception, name: str) -> str:
    """Why the hub refused, and what to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from distlora.system.hub_errors import unreachable

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if status == 401:
        where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"the hub refuses the token of this machine (from {where}); log in again with `hf auth login`"
    reason = (error.server_message or str(error)).strip().splitlines()[0]
    if status == 403:
        try:
            user = HfApi().whoami()
        except Exception as failure:
            if not isinstance(failure, HfHubHTTPError) and not unreachable(failure):
                raise
            return (
                f"the token of this machine may not write to {name} ({reason}), and the hub does not say whose it is; "
                "make one with write access and log in again with `hf auth login`"
            )
        own = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
        owner, _, last = name.partition("/")
        if owner not in own:
            return (
                f"{user['name']} may not write to {name} ({reason}){nearest(owner, own)}; write to "
                f"{' or '.join(f'{namespace}/{last}' for namespace in own)}"
            )
        return (
            f"the token of {user['name']} may not write to {name} ({reason}); make one with write access and log in "
            "again with `hf auth login`"
        )
    return f"{name}: the hub answered {status} ({reason}); nothing was committed, push again later"


def _check_name(option: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{option} {name} is no name on the hub ({str(error).splitlines()[0]}); write USER/NAME or ORG/NAME"
        ) from error
    if "/" not in name:
        raise UserError(f"{option} {name} has no owner; write USER/{name} or ORG/{name}")


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)
