"""The demo's base model: really pretrained, by a full fine-tuning run over random weights, and kept in a cache.

CACHE/demo/base-<hash>/ holds model/ (an ordinary Hugging Face folder) and the corpus (pretraining.jsonl, pairs.jsonl,
held_out.jsonl). The hash is of the text and of everything that shapes the model, so another Python or another recipe
makes another base.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from distlora.config import UserError
from distlora_launcher.compose.checks import check
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.compose.planning import planned
from distlora_launcher.demo.corpus import Corpus
from distlora_launcher.launch import local


def run_settings(overrides: list[str]) -> int:
    """Print and run `distlora train <overrides>`. Returns its exit code."""
    print(command_line("train", overrides), flush=True)
    config = compose_config(overrides)
    check(config, new_run=True)
    return local.start_run(planned(config))


def continue_run(run_dir: Path) -> int:
    """Print and run `distlora resume`. Returns its exit code."""
    print(command_line("resume", [str(run_dir)]), flush=True)
    return local.resume_run(run_dir)


def command_line(command: str, arguments: list[str]) -> str:
    """`$ distlora COMMAND ...` as one could paste it into a shell, in lines of 100 characters where words allow."""
    text = f"distlora {command} {shlex.join(arguments)}"
    lines = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return "$ " + " \\\n    ".join(lines)


def run_module(module: str, *arguments: str) -> None:
    """Run `python -m module arguments`. Its output, mostly notices of libraries, is shown only where it fails.

    Raises RuntimeError with that output.
    """
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with code {result.returncode}:\n{result.stdout}")


PRETRAINING = (
    "adapter=full",
    "quant=none",
    "tracker=none",
    "data.sequence_length=256",
    "data.eval_fraction=0.01",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.checkpointing=none",
    "train.max_steps=1200",
    "train.log_every=10",
    "train.save_every=300",
    "optim.lr=3e-3",
    "optim.betas=[0.9,0.95]",
    "optim.weight_decay=0.1",
    "optim.warmup_ratio=0.05",
)
"""Settings that learn most in two minutes on two cores (README.md)."""
MAKER = "made_by"
"""File in a base's folder: the hash of its recipe."""


def cache_root() -> Path:
    """DISTLORA_CACHE, or distlora/ in XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("DISTLORA_CACHE"):
        return Path(os.environ["DISTLORA_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "distlora"


def base_folder(corpus: Corpus) -> Path:
    """Return the folder of the base for this corpus."""
    recipe = "\n".join([corpus.digest, *PRETRAINING, Path(__file__).with_name("initial_model.py").read_text()])
    return cache_root() / "demo" / f"base-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def base_made_here() -> Path | None:
    """Return the base that a demo of this Python and this recipe has made.

    None where only the text could tell, which takes seconds to read.
    """
    folders = sorted((cache_root() / "demo").glob("base-*"))
    return next((folder for folder in folders if _maker_of(folder) == _maker()), None)


def note_maker(folder: Path) -> None:
    """Have `base_made_here` find this base."""
    with contextlib.suppress(OSError):  # Another user's cache: it is found by its text.
        (folder / MAKER).write_text(_maker())


def _maker_of(folder: Path) -> str | None:
    try:
        return (folder / MAKER).read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _maker() -> str:
    """Return a hash of the Python version and of the code that makes the base from its documentation."""
    here = Path(__file__)
    code = [here.with_name(name).read_text() for name in ("corpus.py", "initial_model.py")]
    return hashlib.sha256("\n".join([sys.version, *PRETRAINING, *code]).encode()).hexdigest()


def make_base(corpus: Corpus, folder: Path, processes: int) -> int:
    """Pretrain the base and put it in `folder`, whole or not at all. Returns the exit code of the run.

    It is made in a folder beside `folder`. A demo that was stopped leaves its run there, and the next one continues it.
    """
    scratch = folder.with_name(f".{folder.name}.building")
    finished, run_dir = scratch / "base", scratch / "run"
    if (run_dir / "config.yaml").is_file():
        code = continue_run(run_dir)
    else:
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            finished.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot make {finished}: {error.strerror}; set DISTLORA_CACHE=FOLDER") from error
        corpus.write(finished)
        text = finished / "pretraining.jsonl"
        run_module(f"{__package__}.initial_model", str(scratch / "random"), str(text))
        settings = [f"model.path={scratch / 'random'}", f"data.path={text}", f"data.cache_dir={cache_root() / 'data'}"]
        settings += [f"cluster.gpus_per_node={processes}", f"run_dir={run_dir}", "name=demo-base"]
        code = run_settings([*settings, *PRETRAINING])
    if code == 0:
        (run_dir / "model").rename(finished / "model")
        note_maker(finished)
        finished.rename(folder)
        shutil.rmtree(scratch)
    return code
