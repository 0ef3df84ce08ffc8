"""API keys of a service: made once, kept as SHA-256, compared in constant time.

A key has 32 random bytes, so a plain hash of it cannot be searched. FOLDER/keys.json has the hash of each user.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from distlora.config.json_files import read_object
from distlora.system.atomic_io import private_folder, write_text

NAME = "keys.json"
PREFIX = "tml-"
"""The SDK refuses a key without it."""


def add_users(folder: Path, users: Sequence[str]) -> dict[str, str]:
    """Make a key for each user who has none, and return the new keys. Users who are not named lose theirs."""
    private_folder(folder)
    hashes = read_hashes(folder)
    new = {user: PREFIX + secrets.token_urlsafe(32) for user in users if user not in hashes}
    kept = {user: hashes[user] for user in users if user in hashes} | {user: digest(key) for user, key in new.items()}
    write_text(folder / NAME, json.dumps(kept, indent=1) + "\n")
    return new


def read_hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each user's key; empty before the first start. Raises UserError for a damaged file."""
    if not (folder / NAME).exists():
        return {}
    return read_object(folder / NAME, "remove it, and the next start prints new keys", {"*": str})


def digest(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def find_user(hashes: Mapping[str, str], key: str) -> str | None:
    """Return the user of a key, or None. Compares with every user's, so that the time says nothing."""
    given, found = digest(key), None
    for user, expected in hashes.items():
        if hmac.compare_digest(given, expected):
            found = user
    return found
