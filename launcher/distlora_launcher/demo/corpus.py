"""Real English that every CPython has: the language reference in `pydoc_data` and the docstrings of its own library.

Three sets of documents come of it. *Pretraining text* (the reference, and some of the docstrings) teaches the demo's
base what such English looks like. Other docstrings become *question/answer pairs*, which the base never saw: most to
fine-tune on, some *held out*. A docstring is on one side only, with every copy of itself. Nothing is imported to read
it (syntax trees only), and nothing is random: what goes where is decided by a hash of the name, so one Python gives one
corpus.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test", "__pycache__"}

PAIR_SHARE = 0.4
"""Share of the public functions and classes whose docstrings become pairs instead of pretraining text."""
HELD_OUT_SHARE = 0.1
"""Share of the pairs that is held out."""
ANSWER_CHARACTERS = (24, 400)
"""Bounds of an answer: shorter ones say nothing, longer ones are seldom one thought."""


@dataclass(frozen=True, slots=True)
class Docstring:
    """A docstring of the standard library."""

    name: str
    """Dotted path from the module: `shutil.copytree`, `threading.Thread.join`."""
    signature: str | None
    """`(src, dst, symlinks=False)` of a function, without `self`; None of a class or module."""
    text: str
    """Cleaned of markup and of examples at the prompt."""

    @property
    def is_public(self) -> bool:
        """Return whether no part of the name starts with an underscore."""
        return not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training data of the demo."""

    pretraining: list[str]
    pairs: list[list[dict[str, str]]]
    """Chat messages: one question, one answer."""
    held_out: list[list[dict[str, str]]]

    @property
    def digest(self) -> str:
        """Names the pretraining text: another Python has other docstrings and so another base."""
        return hashlib.sha256("\x00".join(self.pretraining).encode()).hexdigest()[:12]

    def write(self, folder: Path) -> None:
        """FOLDER/{pretraining,pairs,held_out}.jsonl in the formats that `distlora train` reads."""
        write_jsonl(folder / "pretraining.jsonl", ({"text": text} for text in self.pretraining))
        write_jsonl(folder / "pairs.jsonl", ({"messages": messages} for messages in self.pairs))
        write_jsonl(folder / "held_out.jsonl", ({"messages": messages} for messages in self.held_out))


def write_jsonl(path: Path, documents: Iterable[dict]) -> None:
    """Write documents as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)


def build_corpus() -> Corpus:
    """Read the library of the running Python; a few seconds."""
    texts = list(reference_sections())
    pairs: list[list[dict[str, str]]] = []
    held_out: list[list[dict[str, str]]] = []
    answers: set[str] = set()
    for docstring in read_docstrings(Path(sysconfig.get_path("stdlib"))):
        answer = first_paragraph(docstring.text)
        if not is_answer(docstring, answer) or share(docstring.name, "side") >= PAIR_SHARE:
            texts.append(docstring.text)
        elif fingerprint(answer) not in answers:
            answers.add(fingerprint(answer))
            messages = [{"role": "user", "content": question(docstring)}, {"role": "assistant", "content": answer}]
            (held_out if share(docstring.name, "held out") < HELD_OUT_SHARE else pairs).append(messages)
    return Corpus(without(texts, answers), pairs, held_out)


def without(texts: list[str], answers: set[str]) -> list[str]:
    """Remove duplicates and texts that begin with an answer: subclasses repeat the docstrings they override."""
    once = {fingerprint(text): text for text in texts if fingerprint(first_paragraph(text)) not in answers}
    return list(once.values())


def fingerprint(text: str) -> str:
    """Return the words of a text in lower case, without punctuation and line breaks."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_docstrings(root: Path) -> Iterator[Docstring]:
    """Docstrings of modules, classes and functions under `root`, in the order of their paths, tests left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # lib2to3 and its like keep files that are broken on purpose.
                continue
            module = ".".join(part for part in parts if part != "__init__")
            yield from docstrings_of(tree, module)


def docstrings_of(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[Docstring]:
    """Yield the docstrings of a module, class or function and of its members."""
    text = clean(ast.get_docstring(node) or "")
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    if text:
        yield Docstring(name, signature_of(node.args) if is_function else None, text)  # type: ignore[union-attr]
    if not is_function:
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from docstrings_of(child, f"{name}.{child.name}")


def signature_of(arguments: ast.arguments) -> str:
    """`(src, dst, symlinks=False)`: as written, without annotations and without self or cls."""
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        argument.annotation = None
    for star in (arguments.vararg, arguments.kwarg):
        if star is not None:
            star.annotation = None
    return "(" + re.sub(r"^(self|cls)\b(, )?", "", ast.unparse(arguments)) + ")"


def reference_sections() -> Iterator[str]:
    """Yield the sections of the language reference, documents of a page or less."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        # A heading is a line with as many of one punctuation mark under it.
        for section in re.split(r"\n(?=[^\n]+\n([*=\-~^])\1{3,}\n)", topics[name]):
            text = clean(section or "")
            if len(text) > ANSWER_CHARACTERS[0]:
                yield text


def clean(text: str) -> str:
    """Plain English with `code` in backticks: no reST markup, no examples at the prompt, one blank line at a time."""
    text = re.sub(r"(?m)^ *>>>.*(\n(?! *\n)(?! *>>>).*)*\n?", "", text)
    text = re.sub(r"(?m)^ *([*=\-~^#])\1{3,} *$\n?", "", text)
    text = re.sub(r":[a-z:]+:`~?\.?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"\*\*(\w[^*\n]*)\*\*|(?<![\w*])\*(\w[^*\n]*)\*(?![\w*])", lambda m: m[1] or m[2], text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def first_paragraph(text: str) -> str:
    """Return the first paragraph as one line."""
    return " ".join(text.split("\n\n", 1)[0].split())


def is_answer(docstring: Docstring, answer: str) -> bool:
    """Return whether the first paragraph reads as an answer to what a public function or class does."""
    shortest, longest = ANSWER_CHARACTERS
    return (
        docstring.is_public
        and docstring.name.count(".") > 0
        and shortest <= len(answer) <= longest
        and answer[0].isupper()
        and answer[-1] in ".!"
    )


def question(docstring: Docstring) -> str:
    """Return one of a few questions, the same for the same name."""
    name, signature = docstring.name, docstring.signature
    if signature is None:
        ways = [f"What is `{name}`?", f"What is `{name}` for?", f"Explain the class `{name}`."]
    else:
        ways = [f"What does `{name}` do?", f"What does `{name}{signature}` do?", f"Explain `{name}{signature}`."]
    return ways[int(share(name, "question") * len(ways))]


def share(name: str, purpose: str) -> float:
    """Return a number in [0, 1) that depends on the name and the purpose alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\x00{name}".encode()).digest()[:6], "big") / 2**48
