"""`distlora push RUN ORG/NAME`: upload what a run trained to the Hugging Face hub, with a model card, in one commit."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distlora.config import UserError
from distlora.post.export.repository import Files, as_plain_adapter, collect, write_files
from distlora.run_folder.layout import read_result
from distlora_launcher.terminal.arguments import read

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


@dataclass(frozen=True, kw_only=True, slots=True)
class PushRequest:
    """Upload the model that a run trained to the Hugging Face hub as ORG/NAME.

    A model card lists base, data, settings and metrics. The repository is created if it does not exist.

    example: distlora push runs/first my-org/my-adapter --private
    """

    run: str
    """RUN: folder of a finished run."""
    name: str
    """ORG/NAME: name of the repository on the hub."""
    private: bool = False
    """Create the repository as private."""
    revision: str | None = None
    """BRANCH: branch to commit to; created if it does not exist (default: main)."""
    checkpoint: str | None = None
    """NAME: checkpoint to upload: step_100, or best (lowest held-out loss). Default: the result."""
    base_model: str | None = None
    """ORG/NAME: name of the base on the hub, for a run whose model.path is a folder."""
    dry_run: str | None = None
    """[FOLDER]: upload nothing; print the model card, or write all files into FOLDER."""


def main(arguments: list[str]) -> int:
    """Upload, or with --dry-run show, what the arguments name. Returns the exit code."""
    options = read(PushRequest, "distlora push", arguments)
    _check_name("ORG/NAME", options.name)
    if options.base_model is not None:
        _check_name("--base-model", options.base_model)
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
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    from distlora.system.hub_errors import unreachable

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
                f"{options.name} exists and is public; make it private at "
                f"{constants.ENDPOINT}/{options.name}/settings, or leave --private out"
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
        raise UserError(f"{constants.ENDPOINT} cannot be reached ({error}); connect, and push again") from error
    branch = f"/tree/{options.revision}" if options.revision else ""
    print(f"pushed {len(files)} files ({sum(map(_size, files.values())) / 1e6:,.1f} MB) in commit {commit.oid[:12]}")
    print(f"{constants.ENDPOINT}/{options.name}{branch}")


def _explain(error: HfHubHTTPError, name: str) -> str:
    """Return why the hub refused, and what to do."""
    status = error.response.status_code
    if status == 401:
        where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "`hf auth login`"
        return f"the hub refuses the token of this node (from {where}); log in again with `hf auth login`"
    reason = (error.server_message or str(error)).strip().splitlines()[0]
    if status == 403:
        return (
            f"the token of this node may not write to {name} ({reason}); name a repository of yours, or log in with "
            "a token with write access (`hf auth login`)"
        )
    return f"{name}: the hub answered {status} ({reason}); nothing was committed, push again later"


def _check_name(option: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{option} {name} is not a valid name on the hub ({str(error).splitlines()[0]}); write USER/NAME or "
            "ORG/NAME"
        ) from error
    if "/" not in name:
        raise UserError(f"{option} {name} has no owner; write USER/{name} or ORG/{name}")


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)
