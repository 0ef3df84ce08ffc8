"""What distlora can say, off its syntax trees: every text with "..." for its values, and those of errors by subject.

`python tests/messages.py` (`make messages`) writes docs/messages.md anew; tests/test_messages.py
holds it to the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "messages.md"
FOLDERS = {"distlora": ROOT / "distlora", "distlora_launcher": ROOT / "launcher" / "distlora_launcher"}
HOLE = "..."
FEWEST_LETTERS = 12
"""Of a message's own: one with fewer says what another one holds."""

REFUSING = {"require", "SystemExit", "Failure"}
"""Calls that end with a message besides those of exceptions, by name."""
NOT_SAID = {"AssertionError", "BaseDiffersError", "TypeError", "NotImplementedError"}
"""Exceptions of ours at ourselves."""

SUBJECTS = {
    "Giving a command": ["distlora.system.exit_codes", "distlora.config.errors", "distlora_launcher"],
    "Settings": [
        "distlora.config",
        "distlora.config.file",
        "distlora.config.deepspeed_file",
        "distlora_launcher.compose.compose",
        "distlora_launcher.compose.checks",
        "distlora_launcher.compose.explain",
    ],
    "Planning": [
        "distlora.planner",
        "distlora.architecture.shapes",
        "distlora_launcher.cli.plan",
        "distlora_launcher.compose.planning",
    ],
    "The model and its tokenizer": [
        "distlora.architecture.families",
        "distlora.architecture.hf_config",
        "distlora.system.hub_errors",
        "distlora.loading",
        "distlora.model.build",
        "distlora.model.buffers",
        "distlora.architecture.tokens",
        "distlora_launcher.compose.hub",
        "distlora_launcher.compose.hub_preview",
    ],
    "What is adapted, and how it starts": [
        "distlora.model.adapters",
        "distlora.architecture.targets",
        "distlora.architecture.expert_targets",
        "distlora.weights.peft.folder",
        "distlora.weights.peft.experts",
        "distlora.weights.peft.modules",
        "distlora.weights.peft.rows",
        "distlora.loading.peft_format",
        "distlora_launcher.compose.initial_adapter",
    ],
    "Data": ["distlora.data", "distlora_launcher.cli.data"],
    "Training": [
        "distlora",
        "distlora.parallel",
        "distlora_launcher.launch.local",
        "distlora_launcher.launch.failures",
        "distlora_launcher.launch.lock",
    ],
    "Several machines": ["distlora_launcher.launch.machines", "distlora_launcher.launch.rendezvous"],
    "SLURM": ["distlora_launcher.jobs"],
    "Checkpoints, resuming, run folders": [
        "distlora.checkpoint",
        "distlora.config.json_files",
        "distlora.run_folder.layout",
        "distlora.training.publish",
        "distlora.checkpoint.verify",
        "distlora_launcher.cli.resume",
        "distlora_launcher.cli.status",
        "distlora_launcher.cli.cancel",
    ],
    "Sweeps": [
        "distlora.training.multi_trial",
        "distlora.run_folder.sweep",
        "distlora.training.reporting.wandb_agent",
        "distlora_launcher.sweeps",
    ],
    "Evaluating and generating": [
        "distlora.post.evaluate",
        "distlora.post.generate",
        "distlora.training.document_losses",
        "distlora.run_folder.eval_documents",
        "distlora.post.trained",
        "distlora.post.load_trained",
        "distlora_launcher.cli.generate",
        "distlora_launcher.cli.evaluate",
    ],
    "Merging, combining, exporting, publishing": [
        "distlora.post.merge",
        "distlora.post.combine",
        "distlora.post.deltas",
        "distlora.post.export",
        "distlora.loading.pissa",
        "distlora.training.model_card",
        "distlora_launcher.cli",
        "distlora_launcher.cli.push",
    ],
    "Importing from Axolotl": ["distlora_launcher.importing"],
    "Analysing and measuring": [
        "distlora.analysis",
        "distlora.bench",
        "distlora_launcher.cli.analyze",
        "distlora_launcher.cli.bench",
    ],
}
"""Which modules' messages stand under which heading; of several that are prefixes of a module, the longest counts."""


@dataclass(frozen=True, slots=True)
class Source:
    """A module of ours as text and tree."""

    name: str
    tree: ast.Module
    constants: dict[str, str]
    """Its names at the top that are texts, and those of ours that it imports."""


@cache
def sources() -> dict[str, Source]:
    """All modules of distlora and its launcher, by name."""
    trees = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    own = {name: dict(_constants(tree)) for name, tree in trees.items()}
    return {name: Source(name, tree, own[name] | _imported(tree, own)) for name, tree in trees.items()}


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            for text in texts(node.value, {}):
                yield node.targets[0].id, text


def _imported(tree: ast.Module, constants: dict[str, dict[str, str]]) -> dict[str, str]:
    return {
        alias.asname or alias.name: constants[node.module][alias.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in constants
        for alias in node.names
        if alias.name in constants[node.module]
    }


def texts(node: ast.expr, constants: dict[str, str]) -> list[str]:
    """The texts that an expression can be, with HOLE for what is known when it is said; none where it is no text."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        pieces = [piece.value if isinstance(piece, ast.Constant) else _value(piece, constants) for piece in node.values]
        return ["".join(str(piece) for piece in pieces)]
    if isinstance(node, ast.IfExp):
        return texts(node.body, constants) + texts(node.orelse, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left = texts(node.left, constants) or [HOLE]
        return [one + other for one in left for other in texts(node.right, constants) or [HOLE]]
    if isinstance(node, ast.Name) and node.id in constants:
        return [constants[node.id]]
    return []


def _value(piece: ast.expr, constants: dict[str, str]) -> str:
    """What stands in a text for a value: itself where the source knows it, else a hole."""
    assert isinstance(piece, ast.FormattedValue)
    known = isinstance(piece.value, ast.Name) and piece.conversion == -1 and piece.value.id in constants
    return constants[piece.value.id] if known and isinstance(piece.value, ast.Name) else HOLE


def all_texts() -> set[str]:
    """Every text of the source that can be said, docstrings and names included."""
    found = set()
    for source in sources().values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found |= set(texts(node, source.constants))
    return {one_line(text) for text in found}


def one_line(text: str) -> str:
    """A text as a page quotes it: values that follow each other are one, and so are spaces."""
    while HOLE * 2 in text:
        text = text.replace(HOLE * 2, HOLE)
    return " ".join(text.split())


def errors(source: Source) -> set[str]:
    """The messages of what a module raises or requires, those that functions of its own make for it included."""
    scopes = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)]
    functions = {scope.name: scope for scope in scopes}
    found: set[str] = set()
    for scope in scopes:  # Of methods with one name, `functions` has the last.
        for call in ast.walk(scope):
            if isinstance(call, ast.Call) and _refuses(call):
                for argument in call.args:
                    found |= set(_made(argument, scope, functions, source.constants))
    said = {one_line(text) for text in found}
    return {text for text in said if sum(map(str.isalpha, text)) >= FEWEST_LETTERS}


def _made(
    node: ast.expr, scope: ast.FunctionDef, functions: dict[str, ast.FunctionDef], constants: dict[str, str]
) -> Iterator[str]:
    """The texts of an argument: its own, those of a name of `scope`, those that a function of the module returns."""
    yield from texts(node, constants)
    if isinstance(node, ast.IfExp):
        yield from _made(node.body, scope, functions, constants)
        yield from _made(node.orelse, scope, functions, constants)
    if isinstance(node, ast.Name):
        for assigned in ast.walk(scope):
            if isinstance(assigned, ast.Assign) and ast.unparse(assigned.targets[0]) == node.id:
                yield from texts(assigned.value, constants)
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if called in functions and functions[called] is not scope:
        for returned in ast.walk(functions[called]):
            if isinstance(returned, ast.Return) and returned.value is not None:
                yield from _made(returned.value, functions[called], functions, constants)


def _refuses(call: ast.Call) -> bool:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    return name in REFUSING or (name.endswith("Error") and name not in NOT_SAID)


def subject(module: str) -> str:
    """The heading that a module's messages stand under."""
    fitting = [
        (len(prefix), heading)
        for heading, prefixes in SUBJECTS.items()
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(fitting)[1]


def quoted(text: str) -> str:
    """A text as Markdown's code, whatever backticks are in it."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page() -> str:
    """docs/messages.md."""
    by_subject: dict[str, set[str]] = {heading: set() for heading in SUBJECTS}
    for source in sources().values():
        by_subject[subject(source.name)] |= errors(source)
    parts = [
        "# Every message of an error\n",
        "Made from the source by `make messages`; `...` stands for a value. A message says what is wrong, why, and\n"
        "what to type instead; [troubleshooting](troubleshooting.md) explains those that need more words.\n",
    ]
    for heading, messages in by_subject.items():
        lines = "\n".join(f"- {quoted(text)}" for text in sorted(messages, key=lambda text: text.strip(". ").lower()))
        parts.append(f"## {heading}\n{lines}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
