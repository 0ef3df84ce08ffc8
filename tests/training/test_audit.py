"""The audit: runs beside an independent computation over a table of combinations (`make audit`).

A combination is one value of each axis below: objective, adapter, base, ranks, batches, activation checkpointing,
model, optimizer, length of the packed sequences. The table is drawn from DISTLORA_AUDIT_SEED, each row the one of many
valid draws with the most pairs of values that no row before it has. support/independent.py trains the same adapter with
transformers and PEFT, one document at a time; only the start of the adapter, the samples of GRPO and the order of KTO's
answers are taken from the run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pydoc_data.topics
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import transformers

from distlora.config import Config
from distlora.config.file import load_config
from distlora.data.loader import open_data
from distlora.loading.peft_format import weight_files
from distlora.loading.tensor_files import write_files
from distlora.run_folder.layout import ROLLOUT_NAME
from distlora.training.setup import start_adapters, start_run_model
from distlora.weights.peft_folder import WEIGHTS_NAME
from support import independent
from support.closeness import relative_error
from support.family_models import SINGLE
from support.low_bit_checkpoints import CHECKPOINTS, convert_folder
from support.peft_models import write_adapter
from support.runs import run_once
from support.small_models import make_run, read_metrics, write_model_folder
from support.trl_models import documents_of
from support.worlds import World, start_world

SEED = int(os.environ.get("DISTLORA_AUDIT_SEED", "1"))
COUNT, IN_CI = 60, 12
"""Combinations of the table; so many of them run in `make test-ci`, all in `make audit` and `make test-all`."""
STEPS, RECORDS, GROUP = 4, 10, 4

SFT = {"text": "text", "chat": "messages", "masked": "messages", "completion": "completion"}
OBJECTIVES: dict[str, dict[str, Any]] = {
    **{name: {} for name in SFT},
    "dpo": {"beta": 0.3},
    "cdpo": {"objective": "dpo", "beta": 0.3, "label_smoothing": 0.2, "sft_weight": 0.5},
    "ipo": {"beta": 0.2},
    "orpo": {"beta": 0.3},
    "simpo": {"target_margin": 1.0, "label_smoothing": 0.1},
    "kto": {"beta": 0.3, "desirable_weight": 1.4},
    "reward": {"center_rewards": 0.1},
    "distill": {"kd_ratio": 0.3, "kd_temperature": 2.0},
    "teacher": {"objective": "distill", "beta": 0.4, "kd_ratio": 1.0},
    "grpo": {"beta": 0.05},
}
PLAIN = {"use_rslora": False, "lora_alpha": 8.0}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": PLAIN,
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "attention": {"target_modules": "attention"},
    "ranks": PLAIN | {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 20}},
    "pissa": {"init": "pissa"},
    "from peft": {},
    "head": PLAIN | {"modules_to_save": ["lm_head"]},
    "tokens": PLAIN | {"trainable_token_indices": {"embed_tokens": [7, 300], "lm_head": [1, 300, 999]}},
    "full": {"method": "full"},
}
KEPT = {"gptq": "gptq-v2-32", "awq": "awq-32", "nvfp4": "ct-nvfp4", "int4": "ct-int4", "bnb-nf4": "bnb-nf4"}
"""Bases that ship low bits, by their entry in low_bit_checkpoints.py."""
AXES: dict[str, tuple[Any, ...]] = {
    "objective": tuple(OBJECTIVES),
    "adapter": tuple(ADAPTERS),
    "base": ("fp32", "bf16", "nf4", "int8", *KEPT),
    "ranks": ("1", "2 fsdp2", "2 zero3", "4 hsdp"),
    "batches": ("1", "3", "2 block", "whole"),
    "checkpointing": ("none", "block", "selective", "offload"),
    "model": ("llama", "llama-tied", "qwen3", "qwen2", "phi3", "mixtral"),
    "optim": ("constant", "cosine", "linear", "lora+"),
    "length": (160, 320),
}
OPTIM: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0},
    "cosine": {"schedule": "cosine", "warmup_ratio": 0.5, "max_grad_norm": 0.3},
    "linear": {"schedule": "linear", "warmup_ratio": 0.25, "max_grad_norm": 1.0, "weight_decay": 0.1},
    "lora+": {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.5, "loraplus_lr_ratio": 4.0},
}
VOCABULARY = ("head", "tokens")
REFERENCE = ("dpo", "cdpo", "ipo", "kto", "distill", "teacher", "grpo")
REFUSED: tuple[dict[str, tuple[str, ...]], ...] = (
    {"adapter": (*VOCABULARY, "full"), "objective": (*REFERENCE, "reward")},
    {"adapter": ("full",), "base": AXES["base"][1:]},
    {"adapter": ("full", "head"), "ranks": ("2 zero3",)},
    {"adapter": ("full",), "checkpointing": ("selective",)},
    {"adapter": ("pissa",), "base": ("int8", *KEPT)},
    {"model": ("mixtral",), "adapter": ("dora", "ranks", "pissa", "from peft", "tokens", "full")},
    # Not refused, but no part of the table: another rule of LoRA+, tied rows, other linears than the adapter's, fused
    # weights in the files of low bits.
    {"adapter": (*VOCABULARY, "full"), "optim": ("lora+",)},
    {"adapter": VOCABULARY, "model": ("llama-tied",)},
    {"objective": ("teacher",), "adapter": ("dora", "attention", "pissa")},
    {"objective": ("teacher", "reward"), "model": ("mixtral",)},
    {"model": ("mixtral", "phi3"), "base": ("int8", *KEPT)},
    {"model": ("phi3",), "adapter": ("ranks", "from peft")},
)
"""Values that do not go together, most since the settings refuse them by name."""


class Combination(NamedTuple):
    """A row of the table: a value of each axis."""

    objective: str
    adapter: str
    base: str
    ranks: str
    batches: str
    checkpointing: str
    model: str
    optim: str
    length: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    def is_valid(self) -> bool:
        return not any(all(getattr(self, axis) in of for axis, of in refused.items()) for refused in REFUSED)


def table(seed: int, count: int = COUNT) -> list[Combination]:
    """Draw the combinations, each with as many new pairs of values as a hundred draws have."""
    generator, rows, seen = random.Random(seed), [], set()

    def pairs(row: Combination) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    while len(rows) < count:
        draws = (Combination(*map(generator.choice, AXES.values())) for _ in itertools.count())
        row = max(itertools.islice(filter(Combination.is_valid, draws), 100), key=lambda row: len(pairs(row) - seen))
        seen |= pairs(row)
        rows.append(row)
    return rows


def records(form: str, count: int, generator: random.Random) -> list[dict[str, Any]]:
    """Return records of a form, of uneven lengths, no two alike."""
    words = sorted({word for topic in pydoc_data.topics.topics.values() for word in topic.split() if word.isalpha()})

    def text(low: int, high: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(low, high)))

    found: list[dict[str, Any]] = []
    for number in range(count):
        prompt, answer, other = text(2, 5), " " + text(1, 6), " " + text(1, 6).upper()
        messages = [{"role": role, "content": text(2, 6)} for role in ("user", "assistant") * 2]
        if form == "masked":
            messages[1 + 2 * (number % 2)]["train"] = False  # type: ignore[assignment]
        of_form: dict[str, dict[str, Any]] = {
            "text": {"text": text(3, 30)},
            "completion": {"prompt": prompt, "completion": answer},
            "kto": {"prompt": prompt, "completion": answer, "label": number % 3 > 0},
            "reward": {"prompt": prompt, "chosen": answer, "rejected": other, "margin": 0.25 * (number % 4)},
            "grpo": {"prompt": f"{prompt}:"},
        }
        if form in ("chat", "masked", "distill", "teacher"):
            found.append({"messages": messages})
        else:
            found.append(of_form.get(form, {"prompt": prompt, "chosen": answer, "rejected": other}))
    return found


class Material:
    """Models, adapters and data of the table, each made at its first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cache  # noqa: B019  (as long as the module's fixture)
    def base(self, model: str, base: str) -> Path:
        """Return the folder of a model."""
        if base in ("fp32", "nf4", "int8"):
            folder = self.folder / model
            write_model_folder(folder, model, **({} if model == "mixtral" else {"intermediate_size": 192}))
            return folder
        dense, target = self.base(model, "fp32"), self.folder / f"{model}-{base}"
        if base == "bf16":
            loaded = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
            loaded.save_pretrained(target)
            transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(target)
            return target
        convert_folder(dense, target, CHECKPOINTS[KEPT[base]][1])
        return target

    @functools.cache  # noqa: B019
    def adapter(self, model: str, rank: int) -> Path:
        """Return a folder of PEFT's with an adapter that is not zero."""
        folder, lora = self.folder / f"{model}-adapter-{rank}", {"r": rank, "lora_alpha": 2 * rank}
        modules = ["q_proj", "down_proj"]
        return write_adapter(folder, self.base(model, "fp32"), seed=SEED, std=0.1, target_modules=modules, **lora)

    @functools.cache  # noqa: B019
    def data(self, objective: str) -> tuple[Path, Path]:
        """Return the training data and the held-out data of an objective."""
        paths = self.folder / f"{objective}.jsonl", self.folder / f"{objective}-held-out.jsonl"
        for number, path in enumerate(paths):
            generator = random.Random(f"{SEED} {objective} {number}")
            lines = records(objective, RECORDS - 5 * number, generator)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return paths


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def zero3() -> Iterator[World]:
    """Start two ranks that DeepSpeed has for itself (tests/parallel/test_zero3.py says why)."""
    with start_world(2, regroups=True) as world:
        yield world


def prepare(run_dir: Path, material: Material, row: Combination) -> Config:
    """Prepare the run of a combination. A step has all records."""
    data, held_out = material.data(row.objective)
    train = {"objective": "sft" if row.objective in SFT else row.objective} | OBJECTIVES[row.objective]
    size, _, backend = row.ranks.partition(" ")
    micro, _, order = row.batches.partition(" ")
    sections: dict[str, dict[str, Any]] = {
        "data": {"path": str(data), "sequence_length": row.length, "eval_path": str(held_out), "eval_fraction": 0.0},
        "adapter": {"r": 4, "target_modules": "all-linear"} | ADAPTERS[row.adapter],
        "quant": {"method": {"nf4": "nf4", "int8": "mixed"}.get(row.base, "keep" if row.base in KEPT else "none")},
        "parallel": {"backend": "zero3" if backend == "zero3" else "fsdp2"},
        "cluster": {"gpus_per_node": int(size)},
        "optim": {"lr": 5e-3} | OPTIM[row.optim],
        "train": train | {"max_steps": STEPS, "global_batch": RECORDS, "eval_every": STEPS, "seed": SEED, "keep": 9},
    }
    sections["train"] |= {"micro_batch": RECORDS if micro == "whole" else int(micro), "accumulate": order or "step"}
    sections["train"] |= {"checkpointing": row.checkpointing, "save_every": 1}
    if backend == "hsdp":
        sections["parallel"]["shard_degree"] = 2
    if row.base == "int8":
        names = safetensors.torch.load_file(material.base(row.model, "fp32") / "model.safetensors")
        sections["quant"]["formats"] = {"int8": [name for name in names if independent.LINEARS.search(name)]}
    if row.adapter == "full":
        sections["adapter"] = {"method": "full"}
        sections["optim"]["lr"] = 1e-3
    if row.adapter == "from peft":
        # Which the launcher reads from the folder.
        of_folder = PLAIN | {"r": 6, "lora_alpha": 12.0, "target_modules": ["down_proj", "q_proj"]}
        sections["adapter"] = {"init_from": str(material.adapter(row.model, 6))} | of_folder
    if row.objective == "teacher":
        sections["train"]["teacher"] = str(material.adapter(row.model, 3))
    if row.objective == "grpo":
        sections["data"] |= {"rewards": ["regex"], "reward_constants": {"pattern": "[aeiou]{2}"}, "reward_processes": 1}
        sections["rollout"] = {"num_generations": GROUP, "max_new_tokens": 12, "num_iterations": 2}
        sections["train"]["global_batch"] = 3 * GROUP
    return make_run(run_dir, material.folder, str(material.base(row.model, row.base)), **sections)


def job_of(run_dir: Path, material: Material, row: Combination, config: Config) -> independent.Job:
    """Return what the independent side is told: the settings, and the start of the adapter."""
    start = None if row.adapter == "full" else run_dir / "start"
    if start is not None and row.adapter == "from peft" and row.objective != "reward":
        start = material.adapter(row.model, 6)
    elif start is not None:
        alone = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, shard_degree=None))
        model, backend, _ = start_run_model(alone, SINGLE)
        start_adapters(model, config.spec, backend, config.train, restores=False)
        files = weight_files(model, config.spec)
        files["adapter_config.json"]["init_lora_weights"] = True
        start.mkdir()
        write_files(start, files, backend)
    order: list[list[list[int]]] = []
    if row.objective == "kto":  # Of each step, without the documents of padding.
        loader = open_data(run_dir, config.train, SINGLE)[0]
        steps = [documents_of(loader.batch(step)) for step in range(STEPS)]
        order = [[ids for ids in documents if len(set(ids)) > 1] for documents in steps]
    return independent.Job(
        base=material.base(row.model, row.base),
        start=start,
        quant=row.base,
        pissa=row.adapter == "pissa",
        objective=config.train.objective,
        data=material.data(row.objective)[0],
        held_out=material.data(row.objective)[1],
        steps=STEPS,
        train=OBJECTIVES[row.objective] | {"group": GROUP},
        optim={"lr": config.optim.lr, "eps": config.optim.eps} | OPTIM[row.optim],
        teacher=material.adapter(row.model, 3) if row.objective == "teacher" else None,
        order=order,
        rollouts=[run_dir / "checkpoints" / f"step_{step:08d}" / ROLLOUT_NAME for step in range(1, STEPS, 2)],
    )


def furthest(ours: list[float], theirs: list[float]) -> float:
    """Return the largest difference of two lists of the same length, relative to theirs or to 0.1 if that is more."""
    return max((abs(a - b) / max(abs(b), 0.1) for a, b in zip(ours, theirs, strict=True)), default=0.0)


BOUNDS = {"loss": 1e-5, "gradient norm": 2e-5, "held-out loss": 1e-5, "trained": 2e-5}
"""Largest relative differences (of `trained`: Frobenius norm of all trained tensors together).

One document at a time adds the same fp32 numbers (eps 1.2e-7) in another order: some ulps of a mean, more
where it is a difference of large sums (log-probabilities of policy and reference, two distributions). AdamW divides by
the gradient's own size and so enlarges the rounding of small gradients, four times with LoRA+; each step adds its part.
"""
ROWS = [
    pytest.param(row, marks=pytest.mark.ci if number < IN_CI else pytest.mark.slow, id=str(row))
    for number, row in enumerate(table(SEED))
]


@pytest.mark.parametrize("row", ROWS)
def test_a_run_is_the_independent_computation(
    world: World, zero3: World, material: Material, tmp_path: Path, row: Combination
) -> None:
    run_dir = tmp_path / "run"
    prepare(run_dir, material, row)
    size, _, backend = row.ranks.partition(" ")
    (zero3 if backend == "zero3" else world).run(int(size), run_once, run_dir=run_dir)
    theirs = independent.run(job_of(run_dir, material, row, load_config(run_dir)))

    counts = json.loads((run_dir / "data.json").read_text())["splits"]["train"]
    assert (counts["documents"], counts["truncated"], counts["split"]) == (RECORDS, 0, 0), "other data was trained"
    lines = read_metrics(run_dir)
    steps = [line for line in lines if "loss" in line]
    name = "model.safetensors" if row.adapter == "full" else WEIGHTS_NAME
    ours = safetensors.torch.load_file(run_dir / "checkpoints" / f"step_{STEPS:08d}" / name)
    assert ours.keys() == theirs.tensors.keys()
    together = [torch.cat([tensors[name].flatten() for name in ours]) for tensors in (ours, theirs.tensors)]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line] if theirs.held_out else []
    differences = {
        "loss": furthest([line["loss"] for line in steps], theirs.losses),
        "gradient norm": furthest([line["grad_norm"] for line in steps], theirs.norms),
        "held-out loss": furthest(held_out, theirs.held_out),
        "trained": relative_error(*together),
    }
    print(f"\naudit: {row}:", ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items()))
    assert max(theirs.norms) > 1e-2, "hardly anything was trained, so this says little"
    assert all(differences[name] <= bound for name, bound in BOUNDS.items()), differences
