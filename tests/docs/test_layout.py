"""The structure of the code: packages import only the packages before them, third parties have one home each."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

from support.modules import MODULES, ROOT

PACKAGES = """
distlora_kernels distlora.config distlora.system distlora.results distlora.architecture
distlora.weights distlora.run_folder distlora.rewards distlora.planner distlora.model distlora.parallel distlora.data
distlora.loading distlora.checkpoint distlora.derive distlora.generation distlora.training distlora.post
distlora.analysis distlora.serving
distlora_launcher.terminal distlora_launcher.report distlora_launcher.compose distlora_launcher.importing
distlora_launcher.launch distlora_launcher.jobs distlora_launcher.studies distlora_launcher.demo distlora_launcher.cli
distlora_launcher.follow distlora_launcher.api
""".split()  # noqa: SIM905

HOMES = {
    "triton": "distlora_kernels",
    "deepspeed": "distlora.parallel.zero3 distlora.parallel.deepspeed_schema",
    "wandb": "distlora.training.trackers.wandb_run",
    "tensorboard": "distlora.training.trackers.tensorboard_run",
    "mlflow": "distlora.training.trackers.mlflow_run",
    "trackio": "distlora.training.trackers.trackio_run",
    "swanlab": "distlora.training.trackers.swanlab_run",
    "hydra": "distlora_launcher.compose distlora_launcher.studies",
    "omegaconf": "distlora_launcher",
    "bitsandbytes": "distlora_kernels distlora.training.optimizers",
    "datasets": "distlora.data",
    "huggingface_hub": "distlora_launcher distlora.system distlora.data distlora.architecture.checkpoint_files",
    "peft": "distlora.system.import_peft",
    "accelerate": "",
    "lm_eval": "distlora.post.evaluate_harness",
    "liger_kernel": "distlora.model.fused_modules",
    "gguf": "distlora.post.export distlora.derive.gguf distlora.weights.low_bit.codecs",
    "llama_cpp": "distlora.post.export",
    "math_verify": "distlora.rewards",
    "jsonschema": "distlora.rewards",
    "matplotlib": "distlora.results distlora_launcher.studies",
    "optuna": "distlora_launcher.studies",
    "starlette": "distlora.serving",
    "uvicorn": "distlora.serving",
    "tinker": "distlora.serving",
    "pydantic": "distlora.serving.wire distlora.parallel.deepspeed_schema",
    "google": "distlora.serving.wire",
}
ONLY_IN_WORKERS = {"datasets", "wandb", "deepspeed", "liger_kernel", "bitsandbytes", "matplotlib"} | {
    *("tensorboard", "mlflow", "trackio", "swanlab")
}


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@functools.cache
def imports(module: str, *, at_import: bool = False) -> set[str]:
    """Return what a module imports; with at_import only what it imports at its top level."""
    names: set[str] = set()
    for node in parsed(module).body if at_import else ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inside(module: str, packages: list[str]) -> list[int]:
    return [index for index, name in enumerate(packages) if f"{module}.".startswith(f"{name}.")]


def test_packages_import_only_the_packages_before_them() -> None:
    for module in MODULES:
        assert "." not in module or inside(module, PACKAGES), f"add the package of {module} to PACKAGES"
        own = max(inside(module, PACKAGES), default=0)
        for name in imports(module) if module != "distlora" else ():  # Its __getattr__ is the one lazy way up.
            assert max(inside(name, PACKAGES), default=0) <= own, f"{module} imports {name}"


def test_third_parties_stay_in_their_homes() -> None:
    for module in MODULES:
        for name in imports(module):
            homes = HOMES.get(name.partition(".")[0])
            assert homes is None or inside(module, homes.split()), f"{module} imports {name}"
        at_import = {name.partition(".")[0] for name in imports(module, at_import=True)}
        assert module.startswith("distlora_launcher") or not at_import & ONLY_IN_WORKERS, (
            f"{module}: import in a function"
        )


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name for name, path in MODULES.items() if path.name == "__init__.py"} <= set(listed)
    # A package `kernels` would hide the one that transformers uses.
    assert not {ROOT / name / "__init__.py" for name in ("kernels", "launcher", "tests")} & {*ROOT.glob("*/*.py")}


def test_no_test_file_imports_another() -> None:
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    assert not {path for path in files.values() if path.parent.name == "tests"}, "a test file belongs into a folder"
    for path in files.values():
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        found = {each.module or "" for each in nodes if isinstance(each, ast.ImportFrom)}
        found |= {name.name for each in nodes if isinstance(each, ast.Import) for name in each.names}
        assert not {name for name in found if name.split(".")[-1] in files}, (
            f"{path}: move what both need to tests/support"
        )


def test_importing_the_worker_starts_nothing_and_imports_no_heavy_package() -> None:
    code = f"import sys, distlora.training.worker, torch; assert not {ONLY_IN_WORKERS} & set(sys.modules); "
    code += "assert not torch.cuda.is_initialized() and 'torch._inductor.compile_fx' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (finished.returncode, finished.stdout) == (0, ""), finished.stderr


def test_pages_name_files_that_exist() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/README.md")):
        for path in re.findall(
            r"`((?:distlora|kernels|launcher|conf|tests|slurm|benchmarks)/[\w./-]*)`", page.read_text()
        ):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_files_and_functions_are_short_and_docstrings_in_plain_english() -> None:
    for module, path in MODULES.items():
        assert path.read_text().count("\n") <= 600, f"{module} is longer than 600 lines"
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{module}.{node.name} is longer than 80 lines"
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = str(ast.get_docstring(node))
                assert not re.match(r"(Of|And|What|Whether|Where|How|Those|That)\b", doc), module


PATCHES = {
    "distlora_kernels.nf4_cpu": "sys.modules['kernels']",
    "distlora.architecture.tokens": "sys.modules['torch']",
    "distlora.config.field_docs": "inspect.getsource",
    "distlora.data.sources": "datasets.config.HF_HUB_OFFLINE",
    "distlora.derive.linears": "inspect.getsource",
    "distlora.derive.fusible": "inspect.getsource module.forward",
    "distlora.model.by_document": "inspect.getsource",
    "distlora.model.fused_modules": "module.forward",
    "distlora.model.hf_model": "function.__code__ function.__closure__ function.__globals__ new.__kwdefaults__ "
    "new.__wrapped__",
    "distlora.model.packed_masks": "decoder.forward inspect.unwrap(forward).__globals__",
    "distlora.model.experts": "module.__class__",
    "distlora.parallel.zero3": "deepspeed.ops.__compatible_ops__",
    "distlora_launcher.compose.compose": "GlobalHydra.instance().hydra HydraConfig.instance().cfg",
}
"""What a module sets in the code of others, or reads of the code of functions. The reason stands beside it."""
SET = re.compile(r"sys\.modules|vars\(|.*\.(__\w+__|forward)$")
"""Targets that are a patch whoever they belong to: of classes, forwards and tables of names."""
READ = {"__code__", "__globals__", "__closure__", "__dict__", "getsource"}
SETTINGS = ("torch.backends.", "knobs.")
"""Documented settings of torch and triton."""


def patches(module: str) -> Iterator[str]:
    """Yield what a module sets in imports from elsewhere, and what it sets or reads as in SET and READ."""
    ours, foreign = sys.stdlib_module_names | {name.partition(".")[0] for name in MODULES}, set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                origin = (getattr(node, "module", None) or alias.name).partition(".")[0]
                foreign |= {(alias.asname or alias.name).partition(".")[0]} if origin not in ours else set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            text = ast.unparse(node)
            if re.split(r"\W", text)[0] in foreign or SET.match(text):
                yield text
        elif isinstance(node, ast.Attribute) and node.attr in READ:
            yield ast.unparse(node)


def test_no_module_patches_the_code_of_others() -> None:
    for module in MODULES:
        found = {text for text in patches(module) if not text.startswith(SETTINGS)}
        assert found == set(PATCHES.get(module, "").split()), f"{module}: another way, or a line of justification"
