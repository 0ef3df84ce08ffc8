"""The structure of the code: who imports whom, where third parties live, and that READMEs name what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "distlora_kernels": ROOT / "kernels" / "distlora_kernels",
    "distlora_kernels.bench": ROOT / "kernels" / "bench",
    "distlora": ROOT / "distlora",
    "distlora_launcher": ROOT / "launcher" / "distlora_launcher",
}

# A module may import those of lower layers, and of its own.
LAYERS = [
    {"distlora_kernels"},
    {
        "distlora.architecture.known",
        "distlora.cards",
        "distlora.checkpoints.folder",
        "distlora.checkpoints.keeping",
        "distlora.checkpoints.state",
        "distlora.commands",
        "distlora.config",
        "distlora.durable",
        "distlora.folders.error_file",
        "distlora.host_memory",
        "distlora.hub_errors",
        "distlora.json_files",
        "distlora.model.attention_tiles",
        "distlora.pages",
        "distlora.randomness",
        "distlora.reporting.progress",
        "distlora.stopping",
    },
    {
        "distlora.architecture.families",
        "distlora.architecture.hf_config",
        "distlora.folders.eval_documents",
        "distlora.loading.cache_folder",
        "distlora.loading.piece_header",
        "distlora.loading.segments",
        "distlora.loading.source_digest",
        "distlora.model.attention_cpu",
        "distlora.model.quant",
        "distlora.model.token_rows",
        "distlora.reporting",
    },
    {
        "distlora.architecture",
        "distlora.loading.conversion",
        "distlora.loading.prequantized",
        "distlora.loading.start_file",
        "distlora.model.trained_modules",
    },
    {"distlora.model.adapters", "distlora.model.experts", "distlora.peft_files", "distlora.plan"},
    {"distlora.folders", "distlora.model.offload", "distlora.model_card"},
    {"distlora.trained"},
    {"distlora.packed.protocol", "distlora.packed.settings", "distlora.report"},
    {
        "distlora.model.attention",
        "distlora.model.balance",
        "distlora.model.blocks",
        "distlora.model.fused_modules",
        "distlora.model.head",
        "distlora.model.mlp",
    },
    {"distlora.model.compiled", "distlora.model.liger"},
    {"distlora.model"},
    {"distlora.parallel", "distlora.peft_files.format", "distlora.training.flops"},
    {"distlora.loading"},
    {
        "distlora.checkpoints",
        "distlora.data",
        "distlora.peft_files.pissa",
        "distlora.tensor_files",
        "distlora.training.optim",
    },
    {
        "distlora.results",
        "distlora.startup",
        "distlora.training.objectives",
        "distlora.training.reached",
        "distlora.verification",
    },
    {"distlora.training.document_losses"},
    {"distlora.training.memory_meter"},
    {"distlora.training.memory_check"},
    {"distlora.commands.work", "distlora.deltas", "distlora.readings", "distlora.trained_model"},
    {"distlora.generation"},
    {"distlora.merging"},
    {"distlora.analysis", "distlora.combining", "distlora.evaluation", "distlora.exporting"},
    {"distlora.training"},
    {"distlora.train"},
    {"distlora.packed"},
    {"distlora.bench"},
]

HOMES = {
    "triton": ("distlora_kernels",),
    "deepspeed": ("distlora.parallel.zero3",),
    "wandb": ("distlora.reporting.tracker",),
    "hydra": ("distlora_launcher",),
    "omegaconf": ("distlora_launcher",),
    "bitsandbytes": ("distlora_kernels.nf4_cpu", "distlora_kernels.bench", "distlora.training.optim"),
    "datasets": ("distlora.data",),
    "huggingface_hub": (
        "distlora_launcher",
        "distlora.hub_errors",
        "distlora.data.hub",
        "distlora.architecture.hf_config",
    ),
    "peft": (
        "distlora.bench",
        "distlora.combining",
        "distlora.exporting",
        "distlora_kernels.bench",
        "distlora_launcher.demo",
    ),
    "accelerate": ("distlora.bench",),
    "lm_eval": ("distlora.evaluation",),
    "liger_kernel": ("distlora.model.liger",),
    "gguf": ("distlora.exporting.gguf",),
    "llama_cpp": ("distlora.exporting.gguf.clients",),
    "flash_attn": ("distlora.model.attention",),
    "matplotlib": (
        "distlora.pages.drawing",
        "distlora.analysis",
        "distlora.plan.pages.memory_plot",
        "distlora_launcher.sweeps.plots",
    ),
    "optuna": (
        "distlora_launcher.sweeps.study",
        "distlora_launcher.sweeps.drawing",
        "distlora_launcher.sweeps.journal",
    ),
}

AT_THE_ROOT = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "conf",
    "distlora",
    "docs",
    "kernels",
    "launcher",
    "pyproject.toml",
    "slurm",
    "tests",
}

WORKER_HEAVY = {"datasets", "wandb", "deepspeed", "liger_kernel", "bitsandbytes", "matplotlib"}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Every absolute module that a file imports; only those at import time with top_level."""
    tree = ast.parse(path.read_text())
    found = set()
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # Modules of a package are meant, not the package.
            found |= names if names <= MODULES.keys() else {node.module} | names
    return found


def layer(module: str) -> int | None:
    """The layer of the longest entry that is a prefix of `module`."""
    entries = [(name, index) for index, names in enumerate(LAYERS) for name in names]
    matches = [(len(name), index) for name, index in entries if module == name or module.startswith(name + ".")]
    return max(matches)[1] if matches else None


MODULES = dict(modules())


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("distlora_launcher")])
def test_imports_point_one_way(module: str) -> None:
    own = layer(module)
    if module == "distlora":
        assert imports(MODULES[module]) == set()
        return
    assert own is not None, f"{module} is in no layer: add it to LAYERS"
    for imported in imports(MODULES[module]):
        assert not imported.startswith("distlora_launcher"), f"{module} imports the launcher"
        other = layer(imported)
        assert other is None or other <= own, f"{module} (layer {own}) imports {imported} (layer {other})"


@pytest.mark.parametrize("module", MODULES)
def test_third_parties_stay_in_their_homes(module: str) -> None:
    for imported in imports(MODULES[module]):
        homes = HOMES.get(imported.partition(".")[0])
        assert homes is None or any(module == home or module.startswith(home + ".") for home in homes), (
            f"{module} imports {imported}"
        )


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("distlora_launcher")])
def test_what_a_bare_gpu_machine_lacks_is_imported_late(module: str) -> None:
    at_import = {name.partition(".")[0] for name in imports(MODULES[module], top_level=True)}
    assert not at_import & WORKER_HEAVY


def test_kernels_need_torch_and_triton_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "distlora_kernels", "bitsandbytes"}
    for module, path in MODULES.items():
        if module.startswith("distlora_kernels"):
            peers = {"peft"} if module.startswith("distlora_kernels.bench") else set()
            assert {name.partition(".")[0] for name in imports(path)} <= allowed | peers, module


def test_every_package_is_in_the_wheel() -> None:
    """An editable install finds the others all the same, so nothing else would tell."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    own = {name for name, path in MODULES.items() if path.name == "__init__.py"} | {"distlora_kernels.bench"}
    assert own <= set(listed)


def test_top_level_folders_are_not_packages() -> None:
    """`import kernels` must find the PyPI package of that name (transformers uses it), never our folder."""
    for folder in ("kernels", "launcher", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_root_holds_what_belongs_there() -> None:
    """A note or a result that someone left there would be the first thing that a stranger sees."""
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode:
        pytest.skip("not a git repository")
    assert {path.partition("/")[0] for path in listing.stdout.splitlines()} == AT_THE_ROOT


def texts_with_imports() -> Iterator[tuple[Path, str, str]]:
    """The imports of ours in strings (programs that tests hand to a Python of their own): file, module, name or ""."""
    for folder in (*PACKAGES.values(), ROOT / "tests"):
        for path in folder.rglob("*.py"):
            if folder.name != "tests" and not re.search(r"(?m)^ *[^ \n].*(?:from|import) distlora", path.read_text()):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
                for module, names in re.findall(r"\bfrom (distlora[\w.]*) import ((?:\w+(?:, )?)+)", text):
                    yield from ((path, module, name) for name in names.split(", "))
                for module in re.findall(r"(?<!from )\bimport (distlora[\w.]*\w)", text):
                    yield path, module, ""


def test_imports_in_strings_name_what_exists() -> None:
    """No linter and no import sees them: a module that moved would be missed when the program runs."""
    found = set(texts_with_imports())
    assert len(found) > 20
    for path, module, name in found:
        assert module in MODULES, f"{path.name} has a text that imports {module}"
        known = not name or f"{module}.{name}" in MODULES or re.search(rf"\b{name}\b", MODULES[module].read_text())
        assert known, f"{path.name} has a text that imports {name} from {module}"


def test_importing_the_worker_starts_nothing_and_pulls_no_heavy_package() -> None:
    code = (
        "import sys, distlora.train, torch; "
        f"assert not set({sorted(WORKER_HEAVY)}) & set(sys.modules), set(sys.modules) & set({sorted(WORKER_HEAVY)}); "
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized(); "
        "import distlora_kernels.nf4_cpu as cpu; cpu.has_bitsandbytes(); "
        "assert 'torch._inductor.compile_fx' not in sys.modules, 'a compiler that no step needs'; "
        "assert torch.compiler.get_default_backend() == 'inductor'"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""


@pytest.mark.parametrize(
    "readme", sorted(p.relative_to(ROOT) for p in ROOT.rglob("README.md") if ".venv" not in p.parts), ids=str
)
def test_readmes_name_what_exists(readme: Path) -> None:
    pattern = r"`((?:distlora|kernels|launcher|conf|tests|slurm)/[\w./-]*)`"
    for path in re.findall(pattern, (ROOT / readme).read_text()):
        assert (ROOT / path).exists(), f"{readme} names {path}"


def test_files_and_functions_stay_small() -> None:
    """A file is about one subject and a function fits on a screen or two; split what grows beyond."""
    for module, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{module} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 80, f"{module}.{node.name}"
