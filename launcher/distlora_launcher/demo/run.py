"""`distlora demo`: pretrain a tiny base (once), fine-tune it with QLoRA on two ranks, show what came of it.

The base is really pretrained, by a full fine-tuning run over random weights. CACHE/demo/base-<hash>/ holds model/ (an
ordinary Hugging Face folder) and the corpus (pretraining.jsonl, pairs.jsonl, held_out.jsonl). The hash is of the text
and of everything that shapes the model, so another Python or another recipe makes another base.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from distlora.config import UserError
from distlora.config.base import cache_root
from distlora.system.exit_codes import require_package
from distlora.system.numbers import size
from distlora_launcher.compose.checks import check, gpu_count
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.compose.planning import planned
from distlora_launcher.demo.corpus import Corpus, build_corpus
from distlora_launcher.launch import local
from distlora_launcher.terminal.arguments import read


def run_settings(overrides: list[str]) -> int:
    """Print and run `distlora train <overrides>`. Returns its exit code."""
    print(command_line("train", overrides), flush=True)
    config = compose_config(overrides)
    check(config, new_run=True)
    return local.start_run(planned(config))


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
        print(command_line("resume", [str(run_dir)]), flush=True)
        code = local.resume_run(run_dir)
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


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out question and three answers."""

    question: str
    reference: str
    before: str
    after: str


def table(figures: Mapping[str, float], ranks: int, seconds: float) -> str:
    """Return the figures of the run, one per line; `seconds` is the time of the whole demo."""
    gathered, as_bf16 = figures["gathered_bytes_per_step"], figures["gathered_bytes_per_step_bf16"]
    # One process holds the whole base and gathers nothing.
    as_16_bit = (
        f"{size(as_bf16)} ({as_bf16 / gathered:.1f}x) if the blocks were bf16, as the embedding is" if gathered else ""
    )
    wire = f"{size(gathered)}; {as_16_bit}" if gathered else "none"
    rows = {
        "held-out loss, base": f"{figures['base_eval_loss']:.3f} nats per token",
        "held-out loss, tuned": f"{figures['eval_loss']:.3f} nats per token",
        "4-bit weights": f"{figures['bits_per_parameter']:.3f} bits per parameter (16 in bf16)",
        f"base gathered per step ({ranks} ranks)": wire,
        "adapter gradients reduced per step": size(figures["reduced_bytes_per_step"]),
        "peak memory of a rank": f"{size(figures['peak_memory_bytes'])} (most of it Python and torch themselves)",
        "adapter": f"{figures['trainable_parameters']:,.0f} parameters, {size(figures['adapter_bytes'])}",
        "fine-tuning": f"{figures['train_seconds']:.0f} s at {figures['tokens_per_second']:,.0f} tokens/s",
        "the whole demo": f"{seconds:.0f} s",
    }
    width = max(map(len, rows))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in rows.items())


def verdict(figures: Mapping[str, float]) -> str:
    """Describe in words what improved."""
    before, after = figures["base_eval_loss"], figures["eval_loss"]
    if after >= before:
        return "Fine-tuning did not lower the held-out loss; please report this."
    return (
        f"The held-out loss fell by {before - after:.2f} nats: the tuned model gives the words of the true answers\n"
        f"{math.exp(before - after):,.1f} times the probability, token by token, on documents it never saw.\n"
        "A base of 2.5 million parameters that read for two minutes still answers in broken English."
    )


def sample_text(sample: Sample) -> str:
    """Four lines; a long answer is cut, as a small model that has lost its thread repeats itself."""
    rows = {
        "question": sample.question,
        "docstring": sample.reference,
        "base": sample.before or "(nothing)",
        "tuned": sample.after or "(nothing)",
    }
    return "\n".join(f"  {name:9}  {textwrap.shorten(text, 160, placeholder=' ...')}" for name, text in rows.items())


def next_commands(base: Path, run_dir: Path) -> str:
    """Return the commands to type next."""
    return "\n".join(
        [
            f"  distlora train model.path={base}/model data.path={base}/pairs.jsonl recipe=qlora adapter.r=4",
            "  distlora train model.path=YOUR_MODEL data.path=YOUR.jsonl recipe=qlora cluster.gpus_per_node=2",
            f"  distlora generate {run_dir}",
            f"  less {run_dir}/metrics.jsonl",
            "  distlora train --help",
        ]
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoArguments:
    """Pretrain a tiny Llama on Python's documentation, fine-tune it with QLoRA, and print the result.

    Downloads nothing and needs no GPU. Pretraining takes about two minutes on two cores, once; the base is kept in
    ~/.cache/distlora or DISTLORA_CACHE.

    example: distlora demo
    """

    base: bool = False
    """Print only the folder of the base that an earlier demo made, for `distlora train model.path=$(distlora demo
    --base) data.path=FILE`."""


QLORA = (
    "recipe=qlora",
    "adapter.r=16",
    "data.sequence_length=256",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.checkpointing=none",
    "train.max_steps=160",
    "train.log_every=5",
    "optim.lr=4e-3",
)


def main(arguments: list[str]) -> int:
    """Run the demo and return the exit code."""
    if read(DemoArguments, "distlora demo", arguments).base:
        print(made_base())
        return 0
    require_package("peft", "distlora demo")
    started = time.monotonic()
    processes = min(2, gpu_count() or 2)

    say("1/3  Text: the language reference and the docstrings of this Python's standard library")
    corpus = build_corpus()
    megabytes = sum(map(len, corpus.pretraining)) / 1e6
    print(
        f"{megabytes:.1f} MB to pretrain on; {len(corpus.pairs)} questions and answers, {len(corpus.held_out)} held out"
    )

    base = base_folder(corpus)
    if base.is_dir():
        say(f"2/3  Base: kept from an earlier demo, {base}")
    else:
        say("2/3  Base: a Llama of 2.5 million parameters, pretrained from random weights (adapter=full)")
        code = make_base(corpus, base, processes)
        if code != 0:
            return code

    say(f"3/3  QLoRA: the base in 4 bits, sharded over {processes} ranks; an adapter on every linear")
    run_dir = Path(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-demo").absolute()
    code = run_settings(
        [
            f"model.path={base}/model",
            f"data.path={base}/pairs.jsonl",
            f"data.eval_path={base}/held_out.jsonl",
            f"data.cache_dir={cache_root() / 'data'}",
            f"quant.cache_dir={cache_root() / 'quantized'}",
            f"cluster.gpus_per_node={processes}",
            f"run_dir={run_dir}",
            "name=demo",
            *QLORA,
        ]
    )
    if code != 0:
        return code

    sample = ask(base / "model", run_dir, corpus.held_out[0])
    figures = json.loads((run_dir / "summary.json").read_text())
    say("Result")
    print(table(figures, processes, time.monotonic() - started))
    print(f"\n{verdict(figures)}")
    if sample is not None:
        print(f"\nThe first held-out question, answered through PEFT:\n{sample_text(sample)}")
    print(f"\nNext:\n{next_commands(base, run_dir)}")
    return 0


def made_base() -> Path:
    """Return the model folder of the base that a demo here has made. Raises UserError where there is none."""
    base = base_made_here()
    if base is None:
        base = base_folder(build_corpus())
        note_maker(base)
    model = base / "model"
    if not model.is_dir():
        raise UserError(f"the demo's base does not exist yet ({model} does not exist); run `distlora demo` first")
    return model


def ask(base: Path, run_dir: Path, messages: list[dict[str, str]]) -> Sample | None:
    """Generate an answer with PEFT without and with the adapter; None if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        print("peft is not installed, so there is no sample answer; `pip install peft` to load the adapter with it")
        return None
    question, reference = (message["content"] for message in messages)
    answers = run_dir / "answers.json"
    run_module(f"{__package__}.answers", str(base), str(run_dir / "adapter"), question, str(answers))
    return Sample(question, reference, **json.loads(answers.read_text(encoding="utf-8")))


def say(heading: str) -> None:
    """Print a heading."""
    print(f"\n{heading}", flush=True)
