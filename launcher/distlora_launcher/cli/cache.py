"""`distlora cache list|clear`: the quantized weights that are kept for the next start."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from distlora.config import UserError, nearest, require
from distlora.config.base import cache_root
from distlora.config.errors import in_one_line
from distlora.system.exit_codes import DONE
from distlora.system.numbers import size
from distlora.weights.quantized_cache_folder import ABANDONED_SECONDS, Entry, entries, remove, remove_leftovers
from distlora_launcher.terminal.arguments import read, subject

SHOWN_DIGITS = 12
"""Digits of a key that are shown."""
FEWEST_DIGITS = 4
"""Fewest digits of a key that name an entry."""
DAY_SECONDS = 86_400.0

ACTIONS = {
    "list": "list the cached quantized bases: name, size, last use",
    "clear": "remove entries by their names, by their base, by age, or all",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ListRequest:
    """List the cached quantized bases: name, size, last use.

    example: distlora cache list
    """

    dir: str | None = None
    """FOLDER: cache folder (default: that of quant.cache_dir, which DISTLORA_CACHE moves)."""
    json: bool = False
    """Print one JSON object: {"folder", "bytes", "entries": [{"entry", "base", "bytes", "last_use": seconds since
    1970}]}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClearRequest:
    """Remove entries. A run that is reading a removed entry quantizes the base instead.

    example: distlora cache clear --older-than 30
    """

    entries: list[str] = field(default_factory=list)
    """ENTRY: first digits of an entry's name (at least four), or the name of its base."""
    dir: str | None = None
    """FOLDER: cache folder (default: that of quant.cache_dir, which DISTLORA_CACHE moves)."""
    older_than: float | None = None
    """DAYS: remove only entries that no run has used for this many days."""
    all: bool = False
    """Remove every entry, and incomplete ones."""


def main(arguments: list[str]) -> int:
    """List or remove entries. Returns the exit code; raises UserError for an entry that does not exist."""
    action = subject("cache", arguments, ACTIONS)
    if action == "list":
        listing = read(ListRequest, "distlora cache list", arguments[1:])
        show(_folder(listing.dir), as_json=listing.json)
    else:
        request = read(ClearRequest, "distlora cache clear", arguments[1:])
        days = request.older_than
        require(days is None or days >= 0, f"--older-than={days} is not a valid number of days; write 0 or more")
        is_part = bool(request.entries) or days is not None
        require(not (request.all and is_part), "--all removes every entry; leave out ENTRY and --older-than")
        require(
            request.all or is_part,
            "no entry is named; write an ENTRY of `distlora cache list`, --older-than DAYS, or --all",
        )
        clear(_folder(request.dir), request.entries, older_than=days, everything=request.all)
    return DONE


def _folder(place: str | None) -> Path:
    return Path(place or cache_root() / "quantized").expanduser().absolute()


def show(folder: Path, *, as_json: bool) -> None:
    """Print the entries, the most recently used first."""
    kept = entries(folder)
    total = sum(entry.num_bytes for entry in kept)
    if as_json:
        values = [
            {"entry": each.key, "base": each.base, "bytes": each.num_bytes, "last_use": each.last_use} for each in kept
        ]
        print(json.dumps({"folder": str(folder), "bytes": total, "entries": values}, indent=2))
        return
    if not kept:
        print(f"no quantized weights are cached in {folder}")
        return
    print(f"{'entry':{SHOWN_DIGITS}}  {'size':>10}  {'last use':16}  base")
    for entry in kept:
        print(line_of(entry))
    entry_word = "entry" if len(kept) == 1 else "entries"
    print(f"{len(kept)} {entry_word}, {size(total)} in {folder}")


def line_of(entry: Entry) -> str:
    """Return an entry's line in the table."""
    used = datetime.fromtimestamp(entry.last_use).strftime("%Y-%m-%d %H:%M")
    return f"{entry.key[:SHOWN_DIGITS]}  {size(entry.num_bytes):>10}  {used}  {in_one_line(entry.base)}"


def clear(folder: Path, names: Sequence[str], *, older_than: float | None, everything: bool) -> None:
    """Remove the named entries and print what that freed. Raises UserError for a name without an entry."""
    kept = entries(folder)
    chosen = {entry for name in names for entry in find(name, kept, folder)} if names else set(kept)
    limit = math.inf if older_than is None else time.time() - older_than * DAY_SECONDS
    freed = 0
    for entry in kept:
        if entry in chosen and entry.last_use <= limit:
            try:
                freed += remove(entry.path)
            except OSError as error:
                print(f"{entry.path} cannot be removed ({error.strerror})")
            else:
                print(f"removed {line_of(entry)}")
    freed += remove_leftovers(folder, older_than=0.0 if everything else ABANDONED_SECONDS)
    print(f"{size(freed)} freed in {folder}")


def find(name: str, kept: Sequence[Entry], folder: Path) -> list[Entry]:
    """Return the entries that a word names. Raises UserError if there is none or several, or digits are too few."""
    by_base = [entry for entry in kept if entry.base == name]
    if by_base:
        return by_base
    if len(name) < FEWEST_DIGITS:
        raise UserError(
            f"{name!r} is too short; write {FEWEST_DIGITS} digits or more of an entry's name, "
            "or its base's (`distlora cache list`)"
        )
    by_key = [entry for entry in kept if entry.key.startswith(name)]
    if len(by_key) > 1:
        raise UserError(f"{name} begins the names of {len(by_key)} entries; write more of the one you mean")
    if not by_key:
        known = [entry.key[:SHOWN_DIGITS] for entry in kept] + [entry.base for entry in kept]
        raise UserError(
            f"no entry in {folder} is named {name}{nearest(name, known)}; `distlora cache list` lists the entries"
        )
    return by_key
