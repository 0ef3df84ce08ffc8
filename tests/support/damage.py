"""Damaged copies of valid files, and a watch over whoever reads them: for tests/*/test_fuzz*.py.

A damage is drawn by hypothesis from the content of a valid file: cut, bits flipped, values of other types, and what is
no file at all in its place. `ending` then reads as a command would, and holds what every reader promises.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distlora.config import UserError
from distlora.system.exit_codes import run_to_exit_code

CPU_SECONDS, WALL_SECONDS = 2.0, 20.0
"""What reading one small damaged file may take. The wall's finds a reader that waits for ever: cores are shared."""
LONGEST_LINE = 3000
"""Characters of a complaint: a line for a person, not the file."""

EXAMPLES = os.environ.get("DISTLORA_FUZZ_EXAMPLES")
"""How many times as many cases, with new seeds (`make fuzz`)."""

ODD_VALUES: list[Any] = [
    *(None, True, 0, -1, 7, 2**63, 10**400, 0.5, 1e308, float("nan"), float("-inf")),
    *("", "x", "0", "../..", "/etc/passwd", "\x00", "\x1b[31mred\n\rline", "\U0001f600", "x" * 100_000, "(a+)+$", "["),
    *([], {}, [[]], [None], [0, "1"], {"": None}, {"a": {"b": []}}, list(range(2000))),
]
"""In place of a value, whatever its type is."""
DEEP = 100_000
"""Brackets in each other: more than any parser's stack."""
ODD_TEXTS = [
    *(b"", b"\n", b"null", b"[]", b"{}", b"NaN", b"{", b"\x00" * 64, b"\xff\xfe{\x00}\x00", b"[" * DEEP),
    *(b'{"a":' * DEEP, b"9" * 5000, b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}", b"\x80\x04K*.", b"<html>404</html>"),
]
"""In place of a whole file, the error page that a download leaves included."""
YAML_TRICKS = [
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
    b"!!python/object/apply:os.system ['touch owned']\n",
    b"a: &a {b: *a}\n",
    b"? [1, 2]\n: 2\n",
    b"1: 2\nnull: 3\n2020-01-01: x\n",
    b"a: 1\n---\nb: 2\n",
    b"<<: [1]\n",
    b"a: !!timestamp x\n",
    b"a: " + b"[" * 3000 + b"\n",
]
"""What a YAML parser can be led to: repeated references, Python's objects, values that look like dates, depth."""


def any_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw the file's start, as a full disk leaves it, flipped bits, another range of bytes, or another text."""
    last = max(len(content) - 1, 0)
    cut = (st.sampled_from([0, 1, 8, len(content) // 2, last]) | st.integers(0, last)).map(lambda end: content[:end])
    return cut | flipped(content) | spliced(content) | st.sampled_from(ODD_TEXTS)


@st.composite
def flipped(draw: st.DrawFn, content: bytes, within: int | None = None) -> bytes:
    """Flip up to eight bits in the first `within` bytes."""
    last = min(within or len(content), len(content)) * 8 - 1
    damaged = bytearray(content)
    for bit in draw(st.lists(st.integers(0, max(last, 0)), min_size=1, max_size=8)) if damaged else []:
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@st.composite
def spliced(draw: st.DrawFn, content: bytes) -> bytes:
    """Replace a range by nothing, zeros (a hole after a crash), noise, or another part of the file."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 200)))
    fixed = st.sampled_from([b"", bytes(end - start), content[-40:]])
    return content[:start] + draw(fixed | st.binary(max_size=20)) + content[end:]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


@st.composite
def other_value(draw: st.DrawFn, value: Any) -> Any:
    """Draw a JSON value with one to three changes: another type, a key removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        ways = list(places(value))
        if not ways:
            return draw(st.sampled_from(ODD_VALUES))
        way = draw(st.sampled_from(ways))
        holder = value
        for key in way[:-1]:
            holder = holder[key]
        odd = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove":
            del holder[way[-1]]
        elif change == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "../x", "__class__", "a" * 5000, "\x1b[0m\n"]))] = odd
        else:
            holder[way[-1]] = odd
    return value


def dumped(value: Any) -> bytes:
    """Return JSON of a value, even with half a surrogate pair or thousands of digits."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def any_json(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw a JSON file with another value, or with other bytes."""
    value = json.loads(content)
    return other_value(value).map(dumped) | other_value(value).map(dumped) | any_bytes(content)


def any_lines(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw JSON lines with one line changed."""
    lines = content.splitlines()
    number = st.integers(0, len(lines) - 1)
    one = number.flatmap(
        lambda at: other_value(json.loads(lines[at])).map(lambda v: b"\n".join([*lines[:at], dumped(v), *lines[at:]]))
    )
    return one | one | any_bytes(content)


def any_yaml(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw a YAML file with other settings, other text, or a trick instead or at its end."""
    tricks = st.sampled_from(YAML_TRICKS)
    other = other_value(yaml.safe_load(content)).map(
        lambda changed: yaml.safe_dump(changed, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    )
    return other | other | any_bytes(content) | tricks | tricks.map(lambda trick: content + trick)


def split_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return (header, data) of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def other_header(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a safetensors file whose header describes its tensors differently."""
    header, data = split_tensors(content)
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    entry = header[name]
    first, last = entry["data_offsets"]
    size = len(data)
    changes: list[dict[str, Any]] = [
        {"data_offsets": header[names[0]]["data_offsets"]},
        {"data_offsets": [last, first]},
        {"data_offsets": [first + 1, last + 1]},
        {"data_offsets": [first, 2**64 - 1]},
        {"data_offsets": [size, size + last - first]},
        {"shape": [0, *entry["shape"]], "data_offsets": [first, first]},
        {"shape": [2**62] * 1000},
        {"shape": [-size for size in entry["shape"]]},
        {"shape": [float(size) for size in entry["shape"]]},
        {"shape": []},
        *({"dtype": dtype} for dtype in ("f32", "F16", "F8_E4M3", "F128", "I32", "", 5, None)),
    ]
    change = draw(st.sampled_from(["entry", "entry", "name", "remove", "metadata"]))
    if change == "entry":
        entry.update(draw(st.sampled_from(changes)))
    elif change == "metadata":
        header["__metadata__"] = draw(st.sampled_from(ODD_VALUES))
    else:
        header.pop(name)
        if change == "name":
            header[f"../../{name}"] = entry
    return with_header(header, data)


def any_tensors(content: bytes) -> st.SearchStrategy[bytes]:
    """Draw a safetensors file with another header, other lengths or other bytes."""
    header, data = split_tensors(content)
    lengths = [0, 1, 2, len(content) - 8, len(content), 2**31, 2**63, 2**64 - 1]
    return (
        other_header(content)
        | other_header(content)
        | other_value(header).map(lambda changed: with_header(changed, data))
        | st.sampled_from([struct.pack("<Q", length) + content[8:] for length in lengths])
        | flipped(content, within=len(content) - len(data))
        | any_bytes(content)
        | st.sampled_from(ODD_TEXTS).map(lambda text: struct.pack("<Q", len(text)) + text + data)
    )


NO_FILES: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "gone": lambda path: None,
}
"""What may lie where a file should, by a word for it."""


@contextlib.contextmanager
def damaged(path: Path, damage: bytes | str) -> Iterator[None]:
    """Replace `path` by other bytes or one of NO_FILES in the block, then restore it."""
    whole = path.read_bytes()
    try:
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            path.unlink()
            NO_FILES[damage](path)
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(whole)


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DEEDS = (
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill", "subprocess.Popen", "socket.connect"),
)
_seen: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Record every write, process, connection and unpickling from Python's audit events, while `_seen` is a list."""
    if _seen is None or (arguments and f"{os.sep}architectures" in str(arguments[0])):  # The cache of `derive`.
        return
    if event == "open":
        if isinstance(arguments[2], int) and arguments[2] & _WRITES and arguments[0] != os.devnull:
            # A lock needs a file that could be written, too; whether it was, the folder's state tells.
            _seen.append(f"{'update' if arguments[2] & _WRITES == os.O_RDWR else 'open'} {arguments[0]}")
    elif event in _DEEDS or event == "pickle.find_class":
        _seen.append(f"{event} {arguments[0] if arguments else ''}")


sys.addaudithook(_note)


@dataclass(frozen=True)
class Reader:
    """A file that a command reads, how it is damaged, and how it is read."""

    file: str
    """Path in the folder that `read` takes."""
    damages: Callable[[bytes], st.SearchStrategy[bytes]]
    read: Callable[[Path], Any]
    names: tuple[str, ...] = ()
    """Of which a complaint has one; empty: the file's own."""
    check: Callable[[Any], object] = lambda value: None
    """Fails for what should not have been accepted."""
    examples: int = 20


def holds(reader: Reader, folder: Path) -> None:
    """Damage a reader's file, and check that it is refused by name or that the result is undamaged."""
    file, inputs = folder / reader.file, 0
    reader.check(reader.read(folder))  # Imports are made here, and the whole file is accepted.

    @settings(
        max_examples=reader.examples * int(EXAMPLES or 1),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,  # `ending` measures what is ours.
        suppress_health_check=list(HealthCheck),
    )
    @given(damage=reader.damages(file.read_bytes()))
    def run(damage: bytes) -> None:
        nonlocal inputs
        inputs += 1
        with damaged(file, damage):
            found = ending(lambda: reader.read(folder), folder, names=reader.names or (file.name,))
            if not isinstance(found, UserError):
                reader.check(found)

    run()
    print(f"{reader.file}: {inputs} damaged inputs")


def holds_without(reader: Reader, folder: Path) -> None:
    """Check that each of NO_FILES in the file's place is refused or treated as missing."""
    for kind in NO_FILES:
        with damaged(folder / reader.file, kind):
            ending(lambda: reader.read(folder), folder)


class Hangs(BaseException):
    """A reader that did not end; a BaseException, so that no `except Exception` stops it."""


def _ring(signum: int, frame: object) -> None:
    raise Hangs


def state_of(folder: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of all files in a folder: native writes raise no audit event."""
    return sorted((str(path), (s := path.lstat()).st_size, s.st_mtime_ns) for path in folder.rglob("*"))


def ending(read: Callable[[], Any], folder: Path, *, names: Sequence[str] = ()) -> Any:
    """Return what `read` returns, or the UserError or OSError with which a command ends."""
    global _seen
    found: list[Any] = []

    def work() -> int:
        found.append(read())
        return 0

    before, said = state_of(folder), io.StringIO()
    rings = signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    started, _seen = time.process_time(), []
    try:
        with contextlib.redirect_stderr(said):
            code = run_to_exit_code(work)
    finally:
        deeds, _seen = _seen, None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, rings)
    took = time.process_time() - started
    assert took < CPU_SECONDS, f"{took:.1f} s for a small file"
    deeds = [deed for deed in deeds if not deed.startswith(f"update {folder}")]
    assert not deeds, deeds
    assert state_of(folder) == before, "something was written"
    if code == 0:
        return found[0]
    line = said.getvalue()
    check_line(line, names)
    return UserError(line.removeprefix("error: ").rstrip("\n"))


def check_line(line: str, names: Sequence[str] = ()) -> None:
    """Check that a message is one line: what is wrong where, and after a semicolon what to do."""
    assert line.startswith("error: "), line[:500]
    assert line.endswith("\n"), line[:500]
    text = line[:-1]
    assert text.isprintable(), f"control characters or several lines: {text[:500]!r}"
    assert len(text) <= LONGEST_LINE, f"{len(text)} characters: {text[:300]} ..."
    assert not names or any(name in text for name in names), f"names none of {names}: {text[:500]}"
    assert any(word in text for word in (";", "did you mean", "is not one of", ", or ")), (
        f"says nothing to do: {text[:500]}"
    )
