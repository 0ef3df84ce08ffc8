r"""The documents of the repository: their blocks, the commands that they show, the links and files that they name.

A block between ``` is a command block unless its info string says otherwise (text, python, yaml ...). In it a line that
begins with one of PROGRAMS is a command; `\\` at its end continues it, three spaces and more before another command
part two on a line. What is behind ` # ` is for the reader, and a mark where it begins with one of MARKS: what the
command needs that a machine for tests lacks. `GPU: 8 x h100` says which cards, by the names of `distlora plan`.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("distlora", "make", "python", "pip", "source", "cd", "git", "sbatch", "export", "echo")
MARKS = ("GPU", "hub", "SLURM", "wandb", "machines", "vLLM")
SHOWN_AS_TEXT = ("text", "python", "yaml", "json", "mermaid")
"""Info strings of blocks without commands."""
GOLDEN = "tests/golden"

_FENCE = re.compile(r"^( *)```(\S*)(.*)$")
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$")
_BEGINS = re.compile(rf"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})(?: |$)")
_SPLIT = re.compile(rf" {{3,}}(?=(?:{'|'.join(PROGRAMS)}) )")
_COMMENT = re.compile(r"\s+#\s+(.*)$")
_MARK = re.compile(rf"^({'|'.join(MARKS)})\b(?:: (\d+) x (\w+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block between two fences."""

    document: str
    """Path from the repository's root."""
    line: int
    """Number of its first line."""
    info: str
    """Text after ```; `sh` and nothing are the same."""
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command that a document shows."""

    document: str
    line: int
    text: str
    """Without its comment, on one line."""
    mark: str | None = None
    """A name of MARKS that the command needs."""
    cards: tuple[int, str] | None = None
    """(how many, which) of the mark."""

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def documents() -> list[str]:
    """Return every tracked Markdown file but golden files; all files where this is not a clone."""
    asked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    names = asked.stdout.split() if asked.returncode == 0 else []
    if not names:
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
        names = [str(path) for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(name for name in names if not name.startswith(GOLDEN) and (ROOT / name).exists())


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    """Return the blocks of a document. AssertionError for one that does not end."""
    found, inside = [], None
    for number, line in enumerate(text_of(document).splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence is None:
            if inside is not None:
                inside[2].append(line)
        elif inside is None:
            inside = (number + 1, fence[2], [])
        else:
            found.append(Block(document=document, line=inside[0], info=inside[1], lines=tuple(inside[2])))
            inside = None
    assert inside is None, f"{document}:{inside and inside[0]}: a block has no end"
    return found


def named_files(document: str) -> dict[str, str]:
    """Return the files whose content the document shows: blocks that begin with a comment of a name alone, by name."""
    firsts = ((re.fullmatch(r"# ([\w-]+\.\w+)", block.lines[0]), block) for block in blocks(document) if block.lines)
    return {name[1]: "\n".join(block.lines) + "\n" for name, block in firsts if name}


def prose(document: str) -> Iterator[tuple[int, str]]:
    """Yield the lines outside of blocks, by their numbers."""
    inside = False
    for number, line in enumerate(text_of(document).splitlines(), start=1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def is_command(line: str) -> bool:
    return _BEGINS.match(line.strip()) is not None


def commands_of(block: Block) -> Iterator[Command]:
    """Yield the commands of a block, and assignments to shell variables."""
    if block.info in SHOWN_AS_TEXT:
        return
    pending, first = "", 0
    for number, raw in enumerate(block.lines, start=block.line):
        line = raw.strip()
        if not pending and not is_command(line) and not is_assignment(line):
            continue
        first = first if pending else number
        comment = _COMMENT.search(line)
        body = line[: comment.start()] if comment else line
        if body.endswith("\\") and comment is None:
            pending += body[:-1].strip() + " "
            continue
        mark = _MARK.match(comment[1]) if comment else None
        whole, pending = pending + body.strip(), ""
        for text in _SPLIT.split(whole):
            yield Command(
                document=block.document,
                line=first,
                text=text.strip(),
                mark=mark[1] if mark else None,
                cards=(int(mark[2]), mark[3]) if mark and mark[2] else None,
            )
    assert not pending, f"{block.document}:{first}: the line goes on, and the block ends"


def is_assignment(line: str) -> bool:
    """`base=$(distlora demo --base)`, on a line of its own."""
    return re.fullmatch(r"""[a-z_]+=(?:"[^"]*"|'[^']*'|\$\([^)]*\)|[^\s"'$]+)""", _COMMENT.sub("", line)) is not None


def commands(document: str) -> list[Command]:
    return [command for block in blocks(document) for command in commands_of(block)]


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Expand a shell's variables."""
    return re.sub(r"\$(\w+)", lambda found: variables.get(found[1], found[0]), text)


def assigned(text: str) -> tuple[str, str] | None:
    """(name, value) of an assignment."""
    found = _ASSIGNMENT.match(text)
    return None if found is None or is_command(text) else (found[1], found[2])


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(document: str) -> set[str]:
    headings = (re.match(r"^#+ (.*)$", line) for _, line in prose(document))
    return {slug(found[1]) for found in headings if found}


def links(document: str) -> Iterator[tuple[int, str]]:
    """(line, target) of each link and picture."""
    for number, line in prose(document):
        for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            yield number, target


def named(document: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what stands in `backticks`."""
    for number, line in prose(document):
        for text in re.findall(r"`([^`]+)`", line):
            yield number, text
