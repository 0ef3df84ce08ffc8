"""Run paths of a GPU in this process, on the pretended one, and write what was seen.

    PRETEND_CUDA=skip python -m pretend_cuda.start run_paths OUT.json [--ranks] [--beside-cpu N] NAME...

OUT.json has what `seen` returns by path. With --ranks this is rank 3 of 8 of torch's fake process group, which moves
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distlora import derive
from distlora.architecture import spec
from distlora.data.prompts import Prompt
from distlora.generation.engine import Engine
from distlora.generation.prompts import PromptEncoder, sampling
from distlora.generation.sampling import Request
from distlora.generation.writer import Writer
from distlora.parallel import Ranks
from distlora.post import evaluate_worker
from distlora.post.evaluate import EvaluateRequest, Subject, held_out
from distlora.post.load_trained import load_trained
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Name
from distlora.run_folder.layout import DATA_NAME, read_record
from distlora.training import worker
from distlora.training.loop import Trainer
from distlora.training.reporter import Reporter
from pretend_cuda import device, launches, paths
from support.family_models import write_family_folder
from support.low_bit_models import write_kept_model
from support.preference_data import write_preferences
from support.small_models import make_run, read_metrics, tokenizer, write_model_folder, write_text_file


def write_model(folder: Path, name: str) -> None:
    """Write a small model: `kept-` with a name of low_bit_models.py, `variant-` of family_models.py, or a type."""
    kind, _, rest = name.partition("-")
    if kind == "kept":
        write_kept_model(folder, rest)
    elif name in paths.SMALL:
        write_model_folder(folder, name)
    else:
        write_family_folder(folder, rest if kind == "variant" else name)
        tokenizer().save_pretrained(folder)


def write_judged(path: Path) -> None:
    """Write KTO's answers, one of each pair and good or bad by turns."""
    pairs = [json.loads(line) for line in write_preferences(path).read_text().splitlines()]
    lines = []
    for number, pair in enumerate(pairs):
        is_good = bool(number % 2)
        completion = pair["chosen" if is_good else "rejected"]
        lines.append(json.dumps({"prompt": pair["prompt"], "completion": completion, "label": is_good}) + "\n")
    path.write_text("".join(lines))


def write_questions(path: Path) -> None:
    """Write GRPO's prompts."""
    words = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
    rows = [{"prompt": f"{words[n % 6]} {'very ' * (n // 6)}:", "answer": words[n % 6][0]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PAIRS = {"sequence_length": 160, "eval_fraction": 0.2}
DATA: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "sft": (lambda path: write_text_file(path, 20), {}),
    "kto": (write_judged, PAIRS),
    "grpo": (write_questions, {"eval_fraction": 0.2, "rewards": ["exact_match"]}),
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "reward"), (write_preferences, PAIRS)),
}
"""By objective: what writes its data, and settings of them."""


@dataclass
class Workplace:
    """A folder with models, data and runs, and the ranks that train."""

    root: Path
    ranks: Ranks
    runs: int = 0
    train: dict[str, int] = field(default_factory=lambda: {"max_steps": 3, "global_batch": 4, "micro_batch": 2})
    data: dict[str, float] = field(default_factory=dict)
    """Settings of every run."""

    def written(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Return ROOT/name, written at its first use."""
        if not (self.root / name).exists():
            write(self.root / name)
        return self.root / name

    def prepare(self, model: str, sections: paths.Sections) -> Path:
        """Prepare a run folder of three steps of four sequences."""
        self.runs += 1
        run_dir = self.root / f"run{self.runs}"
        self.written(model, functools.partial(write_model, name=model))
        objective = sections.get("train", {}).get("objective", "sft")
        write, data = DATA[objective]
        base: dict[str, dict[str, Any]] = {
            "data": {"path": str(self.written(f"{objective}.jsonl", write)), **data, **self.data},
            "train": {"dtype": "bf16", "log_every": 1, **self.train},
            "rollout": {"num_generations": 4, "max_new_tokens": 12} if objective == "grpo" else {},
            "cluster": {"gpus_per_node": self.ranks.world},
        }  # fmt: skip
        merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}
        make_run(run_dir, self.root, model, (), **merged)
        return run_dir

    def trained(self, model: str, sections: paths.Sections) -> Path:
        """Train, and return the run folder."""
        run_dir = self.prepare(model, sections)
        with recorded_steps():
            worker.run(run_dir, self.ranks)
        return run_dir


events: list[str] = []
"""Lines that the runs of a path print."""


@contextlib.contextmanager
def recorded_steps() -> Iterator[None]:
    """Record events, and launches and waits of training steps but a process' first, which allocates and compiles."""
    train_step, event = Trainer._train_step, Reporter.event

    def said(reporter: Reporter, text: str) -> None:
        events.append(text)
        event(reporter, text)

    def recorded(trainer: Trainer) -> None:
        with contextlib.nullcontext() if trainer.is_cold else device.recording():
            train_step(trainer)

    Trainer._train_step, Reporter.event = recorded, said  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Trainer._train_step, Reporter.event = train_step, event  # type: ignore[method-assign]


def generate(place: Workplace, run_dir: Path) -> None:
    """Complete three prompts greedily, then sampled. Host waits of all of it are recorded."""
    trained = Name(place=str(run_dir)).read()
    model, backend = load_trained(trained, place.ranks)
    encoder = PromptEncoder(model, trained.spec.model, read_record(run_dir / DATA_NAME), as_chat=False)
    tokens = [encoder.encode(Prompt(place="test", text=text)) for text in ("The statement", "A class is", "x" * 40)]
    for temperature, top_p, top_k in ((0.0, 1.0, 0), (1.0, 0.9, 20)):
        settings = sampling(
            encoder, trained.spec.model.path, 12, temperature=temperature, top_p=top_p, top_k=top_k
        )  # fmt: skip
        with device.recording():
            Writer(model, backend, encoder.tokenizer, compiled=False).complete(tokens, settings, seed=1)


def captured(place: Workplace, run_dir: Path) -> None:
    """Complete prompts by replayed graphs, as without them, then with a choice of adapters by row.

    With MODE=skip completions say nothing.
    """
    trained = Name(place=str(run_dir)).read()
    model, backend = load_trained(trained, place.ranks)
    requests = [
        Request([5 + number] * size, seed=number, max_new_tokens=tokens, temperature=number / 2, top_k=9 * (number % 2))
        for number, (size, tokens) in enumerate(((3, 5), (17, 5), (3, 3)))
    ]
    choosing = [dataclasses.replace(each, slot=-(number % 2), max_new_tokens=2) for number, each in enumerate(requests)]
    for group in (requests, choosing):
        plain = Engine(model, backend).run(group)
        with device.recording():
            assert Engine(model, backend, captured=True).run(group) == plain


def evaluate(place: Workplace, run_dir: Path) -> None:
    """Measure a run's held-out loss, as `distlora eval` does."""
    name = Name(place=str(run_dir))
    subject = Subject(label="adapted", kind="adapted", name=name)
    text = held_out(name.read(), "the run")
    evaluate_worker.run(EvaluateRequest(places=[], subjects=(subject,), source=text, dtype="bf16"), place.ranks)


def merge(place: Workplace, run_dir: Path) -> None:
    """Merge a run's adapter into its base."""
    merge_to(Name(place=str(run_dir)).read(), run_dir / "merged", onto="trained", dtype=torch.bfloat16, say=print)


def resume(place: Workplace, run_dir: Path) -> None:
    """Go on from a run's first checkpoint."""
    saved = place.prepare("llama", {"train": {"save_every": 1, "max_steps": 2}})
    worker.run(saved, place.ranks)
    shutil.rmtree(max((saved / "checkpoints").iterdir()))
    shutil.rmtree(saved / "adapter")
    with recorded_steps():
        worker.run(saved, place.ranks)


THEN: dict[str, Callable[[Workplace, Path], None]] = {
    "generate": generate,
    "captured": captured,
    "evaluate": evaluate,
    "merge": merge,
    "resume": resume,
}
"""What follows the training of a path, by the first word of its name."""


def run_path(place: Workplace, name: str) -> list[tuple[float, float]]:
    """Run a path of paths.py to its end; return (loss, gradient norm) of each step, which rank 0 writes."""
    model, sections = (paths.PATHS if place.ranks.world == 1 else paths.OF_EIGHT)[name]
    run_dir = place.trained(model, sections)
    if (then := THEN.get(name.partition(" ")[0])) is not None:
        then(place, run_dir)
    lines = read_metrics(run_dir) if place.ranks.rank == 0 else []
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


GPU = torch.device("cuda", 3)
"""Not the first, so that a wrong current device shows."""
CPU = Ranks(0, 1, torch.device("cpu"), None)


def fake_ranks() -> Ranks:
    """Return rank 3 of 8, whose collectives are torch's fakes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ["LOCAL_RANK"] = str(paths.RANK)
    dist.init_process_group("fake", store=FakeStore(), rank=paths.RANK, world_size=paths.WORLD)
    return Ranks(paths.RANK, paths.WORLD, GPU, dist.group.WORLD, control=dist.group.WORLD)


def skip_checks_of_deepspeed() -> None:
    """Skip DeepSpeed's checks that all ranks pass the same numbers: the fake group moves none."""
    import deepspeed  # noqa: F401

    for name, module in list(sys.modules.items()):
        for check in ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks"):
            if name.startswith("deepspeed") and hasattr(module, check):
                setattr(module, check, lambda *arguments, **options: None)


def seen(place: Workplace, name: str) -> dict[str, Any]:
    """Run a path; return its error or None, its steps, its events, and what was recorded in all but the first step."""
    began, error = time.monotonic(), None
    torch.cuda.set_device(GPU)
    launches.recorded.clear()
    device.host_waits.clear()
    events.clear()
    steps: list[tuple[float, float]] = []
    try:
        steps = run_path(place, name)
    except Exception:
        error = traceback.format_exc()
    return {
        "error": error,
        "steps": steps,
        "events": list(events),
        "waits": dict(device.host_waits),
        "launches": dict(Counter(each.kernel for each in launches.recorded)),
        "empty": sorted({f"{each.kernel} in {each.place}" for each in launches.recorded if each.is_empty}),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--ranks", action="store_true", help="as rank 3 of 8")
    parser.add_argument("--beside-cpu", type=int, metavar="N", help="two steps of N sequences, also on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec.derive = derive.derive  # In this process: one of its own takes seconds.
    with tempfile.TemporaryDirectory(prefix="pretend-cuda-") as root:
        place = Workplace(Path(root), Ranks(0, 1, GPU, None))
        if options.ranks:
            for model in {paths.OF_EIGHT[name][0] for name in options.names}:  # Only rank 0 of a group writes.
                place.written(model, functools.partial(write_model, name=model))
            place.ranks = fake_ranks()
            place.train |= {"global_batch": paths.WORLD, "micro_batch": 1}
        if options.beside_cpu:
            place.train = {"max_steps": 2} | dict.fromkeys(("global_batch", "micro_batch"), options.beside_cpu)
            place.data |= {"eval_fraction": 0}  # An interpreted evaluation takes as long as the steps.
        found = {}
        for name in options.names:
            if name.startswith("zero3"):
                skip_checks_of_deepspeed()
            found[name] = seen(place, name)
            if options.beside_cpu:
                found[name]["cpu_steps"] = run_path(dataclasses.replace(place, ranks=CPU, runs=place.runs + 100), name)
        options.out.write_text(json.dumps(found, indent=1))
