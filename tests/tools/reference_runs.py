"""Record what training runs and command lines produce, and compare a later version of the code with the record.

    python reference_runs.py {record,compare,record-configs,compare-configs} FILE.json [--only NAME ...]

A run is started with the `distlora` command beside this Python. Its record holds the SHA-256 of the published tensors
and every logged loss. A config is the composed settings of one command line. This file imports nothing of distlora, so
it works on two versions whose modules differ. The exit code is 1 if anything differs or fails.

Floating-point results depend on the CPU model, on torch and on transformers. Record and compare with the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]

COMMON = """
model.new_tokens=[]
data.format=auto data.columns={} data.sample_by=auto data.stopping_strategy=first_exhausted data.streaming=false
data.template=null data.train_on=assistant data.sequence_length=64 data.too_long=auto data.eval_fraction=0.1
data.eval_path=null data.eval_split=null
adapter=lora adapter.method=lora adapter.r=5 adapter.lora_alpha=16 adapter.use_rslora=true adapter.use_dora=false
adapter.target_modules=all-linear adapter.target_parameters=[] adapter.rank_pattern={} adapter.alpha_pattern={}
adapter.lora_dropout=0 adapter.init=kaiming adapter.init_from=null adapter.trainable_token_indices=null
adapter.modules_to_save=[]
quant=nf4 quant.method=nf4 quant.dense_layers=0 quant.cache=false
parallel=fsdp2 parallel.backend=fsdp2 parallel.shard_degree=null parallel.offload_base=false
parallel.deepspeed_config=null parallel.prefetch=true parallel.resident_blocks=0 parallel.bucket_mb=4
optim=adamw optim.name=adamw optim.lr=2e-3 optim.loraplus_lr_ratio=1 optim.betas=[0.9,0.999] optim.eps=1e-8
optim.weight_decay=0 optim.max_grad_norm=1 optim.schedule=cosine optim.warmup_ratio=0.2
optim.min_lr_ratio=0
train.objective=sft train.epochs=1 train.max_steps=6 train.global_batch=6 train.micro_batch=1 train.accumulate=step
train.checkpointing=block train.mlp_tile=null train.dtype=bf16 train.attention=auto
train.deterministic_attention=true train.fused_kernels=none train.compile=false train.router_aux_loss=null train.seed=7
train.log_every=1 train.eval_every=3 train.eval_documents=false train.early_stopping_patience=null
train.early_stopping_threshold=0 train.load_best_at_end=false train.save_every=4 train.save_minutes=null
train.save_in_background=true train.keep=2 train.verify=false train.sample_every=null train.sample_prompts=[]
tracker=none cluster=local cluster.launcher=local cluster.nodes=1 cluster.gpus_per_node=1
cluster.max_restarts=0 cluster.timeout_seconds=600 plan=given plan.mode=given plan.refuse=false plan.measure=false
"""
"""Settings of every run, all explicit, so that a changed default changes no result."""

RUNS = {
    # The settings of `distlora demo` in its QLoRA step, on a smaller model and fewer steps.
    "demo": """recipe=qlora model.path=demo data.path=chats.jsonl data.eval_path=held_out.jsonl data.sequence_length=256
        data.eval_fraction=0.05 cluster.gpus_per_node=2 adapter.r=16 train.global_batch=8 train.micro_batch=4
        train.checkpointing=none train.log_every=5 train.eval_every=null train.save_every=null train.save_minutes=10
        train.seed=0 optim.lr=4e-3 optim.warmup_ratio=0.03 quant.cache=true plan.measure=true""",
    "lora_nf4": """model.path=llama data.path=text.jsonl model.new_tokens=[zu,tansu] train.compile=true
        train.verify=true adapter.rank_pattern={down_proj:3} optim.loraplus_lr_ratio=4""",
    "lora_unquantized": """model.path=llama cluster.gpus_per_node=2 quant.method=none train.dtype=fp32
        data.sources=[{path:text.jsonl,weight:0.7},{path:chats.jsonl,weight:0.3}] train.accumulate=block
        train.checkpointing=offload train.mlp_tile=24 parallel.resident_blocks=1 adapter.lora_dropout=0.1
        adapter.modules_to_save=[lm_head]""",
    "dora": """model.path=llama data.path=text.jsonl cluster.gpus_per_node=2 adapter.use_dora=true
        quant.dense_layers=2 train.checkpointing=selective parallel.prefetch=false optim.schedule=linear
        optim.min_lr_ratio=0.1""",
    "pissa": """model.path=llama data.path=chats.jsonl adapter.init=pissa train.dtype=fp32 train.micro_batch=3
        optim.schedule=constant""",
    "full": """model.path=llama data.path=text.jsonl cluster.gpus_per_node=2 adapter.method=full quant.method=none
        train.micro_batch=3 optim.weight_decay=0.1 optim.schedule=warmup_stable_decay
        optim.decay_ratio=0.3""",
    "zero3": """model.path=llama data.path=text.jsonl cluster.gpus_per_node=2 parallel.backend=zero3
        train.attention=sdpa train.accumulate=block""",
    "experts": """model.path=experts data.path=text.jsonl cluster.gpus_per_node=2 quant.dense_layers=1
        train.accumulate=block train.router_aux_loss=0.01""",
    "dpo": """model.path=llama data.path=pairs.jsonl data.format=preference data.sequence_length=160
        train.objective=dpo train.beta=0.3 train.micro_batch=2 adapter.target_modules=attention""",
}
"""Settings of each run beside COMMON; they win over it."""

TINY = "model.path=llama data.path=text.jsonl"
PRINT = "--cfg job --resolve"
"""Options that print the settings and start nothing. They need neither the model nor a GPU."""

CONFIGS = {
    "plain": TINY,
    "demo": """recipe=qlora model.path=demo data.path=chats.jsonl data.eval_path=held_out.jsonl
        cluster.gpus_per_node=2 name=demo adapter.r=16 data.sequence_length=256 train.global_batch=8
        train.micro_batch=4 train.checkpointing=none train.max_steps=160 train.log_every=5 optim.lr=4e-3""",
    "lists": f"""{TINY} optim.betas=[0.8,0.95] adapter.target_modules=[q_proj,down_proj] model.new_tokens=[zu,tansu]
        adapter.modules_to_save=[lm_head] train.sample_every=2 train.sample_prompts=[ba,zu] tracker.tags=[a,b]""",
    "patterns": TINY
    + """ adapter.rank_pattern={down_proj:3} adapter.alpha_pattern={q_proj:8}
        adapter.target_modules="'.*\\.(q|down)_proj'" adapter.trainable_token_indices={embed_tokens:[5],lm_head:[7]}""",
    "quant_none": f"{TINY} quant=none train.dtype=fp32 train.checkpointing=none",
    "quant_auto": f"{TINY} quant=auto train.epochs=3 data.eval_fraction=0 data.too_long=drop",
    "full": f"{TINY} adapter=full quant=none optim.weight_decay=0.1 optim.schedule=warmup_stable_decay",
    "dora": f"{TINY} adapter=dora adapter.lora_dropout=0.05 optim=adamw_8bit optim.loraplus_lr_ratio=16",
    "loftq": f"{TINY} adapter.init=loftq adapter.use_rslora=false quant.cache_gb=1 train.eval_documents=true",
    "zero3": f"""{TINY} parallel=zero3 parallel.offload_base=true parallel.deepspeed_config=zero3.json
        cluster.gpus_per_node=2""",
    "hsdp": f"{TINY} parallel=hsdp cluster.gpus_per_node=2 parallel.bucket_mb=1 train.save_minutes=null",
    "dpo": "recipe=dpo model.path=llama data.path=pairs.jsonl data.sequence_length=160 train.beta=0.3",
    "mixture": """model.path=experts data.sources=[{path:text.jsonl,weight:0.7},{path:chats.jsonl,weight:0.3}]
        data.stopping_strategy=all_exhausted data.eval_path=held_out.jsonl adapter.target_modules=qv""",
    "plan_auto": f"{TINY} plan=auto cluster.gpus_per_node=2 train.global_batch=12",
    "tokens": f"{TINY} plan.tokens=10000000 tracker=none train.eval_every=5 train.load_best_at_end=true",
    "own_recipe": f"--config-dir own recipe=mine {TINY}",
    "guanaco_70b": f"{PRINT} recipe=guanaco_70b data.path=timdettmers/openassistant-guanaco",
    "continued_pretraining": f"{PRINT} recipe=continued_pretraining data.path=text.jsonl optim=paged_adamw_8bit",
    "tool_calls": f"{PRINT} recipe=tool_calls model=qwen25_14b data.path=chats.jsonl data.columns={{messages:turns}}",
    "slurm": f"""{PRINT} recipe=llama3_70b_8x80gb data.path=chats.jsonl parallel=hsdp cluster=slurm cluster.nodes=4
        cluster.time_limit=12:00:00 cluster.sbatch=[--exclusive] cluster.environment={{NCCL_DEBUG:INFO}} plan=auto""",
}
"""Command lines of `distlora train` whose settings are recorded."""

RENAMED = {"card": "gpu"}
"""Sections of the settings by their old and new names; both count as the new one."""

SIZES = """
vocab_size=1009 hidden_size=96 intermediate_size=199 num_hidden_layers=3 num_attention_heads=3 num_key_value_heads=1
head_dim=32 max_position_embeddings=4096 bos_token_id=null eos_token_id=1 pad_token_id=0 tie_word_embeddings=false
"""
"""Sizes of every model. The vocabulary and the MLP have prime sizes, so no number of ranks divides them."""

MODELS = {
    "llama": ("Llama", ""),
    "demo": ("Llama", 'num_hidden_layers=2 head_dim=64 tie_word_embeddings=true dtype="bfloat16"'),
    "experts": ("Qwen3Moe", "num_experts=5 num_experts_per_tok=2 moe_intermediate_size=39"),
}
"""Class of transformers and sizes beside SIZES, by folder name."""

WORDS = ("ba", "zu", "kelo", "mirat", "o", "tansu", "verin", "lo", "pe", "dugan")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_models(folder: Path) -> None:
    """Write a random model and a byte-level tokenizer to FOLDER/NAME for every name in MODELS."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers.utils.logging.disable_progress_bar()
    special = ["<pad>", "<eos>", "<|user|>", "<|assistant|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )
    for name, (family, sizes) in MODELS.items():
        values = {key: json.loads(value) for key, value in as_settings(f"{SIZES} {sizes}").items()}
        config = getattr(transformers, f"{family}Config")(**values)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        generator = torch.Generator().manual_seed(0)
        for _, weight in sorted(model.named_parameters()):
            mean, deviation = (1.0, 0.2) if weight.dim() == 1 else (0.0, 0.08)
            weight.data = torch.normal(mean, deviation, weight.shape, generator=generator)
        model.to(getattr(torch, values.get("dtype", "float32"))).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_data(folder: Path) -> None:
    """Write documents of random words, a DeepSpeed file and a recipe."""
    generator = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(low, high)))

    def write(name: str, documents: Iterable[Record]) -> None:
        (folder / name).write_text("".join(json.dumps(document) + "\n" for document in documents))

    def chat() -> Record:
        return {"messages": [{"role": role, "content": words(1, 12)} for role in ("user", "assistant")]}

    def pair() -> Record:
        answer = words(2, 8)
        return {"prompt": words(1, 6), "chosen": f" {answer}", "rejected": f" {answer.upper()}"}

    write("text.jsonl", ({"text": words(3, 40)} for _ in range(120)))
    write("chats.jsonl", (chat() for _ in range(160)))
    write("held_out.jsonl", (chat() for _ in range(9)))
    write("pairs.jsonl", (pair() for _ in range(60)))
    (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 1000}}')
    (folder / "own" / "recipe").mkdir(parents=True)
    (folder / "own" / "recipe" / "mine.yaml").write_text("# @package _global_\nadapter:\n  r: 3\noptim:\n  lr: 1e-3\n")


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Yield a temporary folder that holds the models and the data."""
    folder = Path(tempfile.mkdtemp(prefix="reference-")).resolve()
    try:
        write_models(folder)
        write_data(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(folder: Path, name: str) -> dict[str, str]:
    """Return the environment of one command: one thread, no GPU, no network, and caches of its own."""
    removed = ("WANDB", "DISTLORA", "HF_", "SLURM")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(removed)}
    cache = str(folder / f"{name}.cache")
    private = {"DISTLORA_CACHE": cache, "XDG_CACHE_HOME": cache, "HF_HOME": cache, "TMPDIR": str(folder)}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return kept | private | threads | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def start(folder: Path, name: str, arguments: Iterable[str]) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """Start `distlora train` in FOLDER. Return the process, the run folder and the file with its output."""
    run_dir, log = folder / f"{name}.run", folder / f"{name}.log"
    command = [str(Path(sys.executable).with_name("distlora")), "train", *arguments, f"run_dir={run_dir}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder, name), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    return process, run_dir, log


def as_settings(text: str) -> dict[str, str]:
    """Return `a=1 b.c=2` as a mapping of names to values."""
    return dict(word.split("=", 1) for word in text.split())


def hash_tensors(folder: Path) -> str:
    """Return the SHA-256 of the sorted (name, dtype, shape, bytes) of all tensors in FOLDER/*.safetensors."""
    tensors = []
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                first, last = (8 + size + offset for offset in entry["data_offsets"])
                tensors.append((name, entry["dtype"], str(entry["shape"]), content[first:last]))
    if not tensors:
        raise FileNotFoundError(f"no tensors in {folder}")
    digest = hashlib.sha256()
    for name, dtype, shape, values in sorted(tensors):
        digest.update(f"{name} {dtype} {shape} {len(values)}\n".encode() + values)
    return digest.hexdigest()


def train(folder: Path, name: str) -> Record:
    """Run one entry of RUNS to its end. Return its hash, its training and held-out losses in order, and its seconds."""
    settings = as_settings(COMMON) | as_settings(RUNS[name])
    started = time.monotonic()
    process, run_dir, log = start(folder, name, map("=".join, settings.items()))
    if process.wait() != 0:
        raise RuntimeError(f"run {name} ended with code {process.returncode}:\n{log.read_text(errors='replace')}")
    seconds = round(time.monotonic() - started, 1)
    result = run_dir / ("model" if settings["adapter.method"] == "full" else "adapter")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [float(line[key]) for line in lines for key in ("loss", "eval_loss") if key in line]
    return {"hash": hash_tensors(result), "losses": losses, "seconds": seconds}


def compose(folder: Path, name: str) -> list[str]:
    """Return the settings of one entry of CONFIGS, as sorted lines `section.name: value`.

    They come from what `--cfg job` prints, or from RUN/config.yaml; then the run is stopped once that file exists.
    """
    process, run_dir, log = start(folder, name, shlex.split(CONFIGS[name]))
    source = log if (prints := PRINT in CONFIGS[name]) else run_dir / "config.yaml"
    while process.poll() is None and (prints or not source.is_file()):
        time.sleep(0.01)
    process.terminate()
    if (process.wait() != 0 and prints) or not source.is_file():
        raise RuntimeError(f"no settings from {CONFIGS[name]}:\n{log.read_text(errors='replace')}")
    entries, section = [], ""
    for line in source.read_text().replace(str(folder), "FOLDER").splitlines():
        if top := re.match(r"(\w+):(.*)", line):
            section = RENAMED.get(top[1], top[1])
            entries += [f"{section}:{top[2]}"] if top[2] else []
        elif field := re.match(r"  (\w.*)", line):
            entries.append(f"{section}.{field[1]}")
        elif entries:
            entries[-1] += f" {line.strip()}"
    return sorted(entries)


def describe_run(name: str, old: Record, new: Record) -> str | None:
    """Return how two records of a run differ, or None if they are equal."""
    if (old["hash"], old["losses"]) == (new["hash"], new["losses"]):
        return None
    return f"{old['hash']} -> {new['hash']}\n  losses {old['losses']}\n      -> {new['losses']}"


def describe_config(name: str, old: list[str], new: list[str]) -> str | None:
    """Return a diff of two configs, or None if they are equal."""
    return "\n".join(difflib.unified_diff(old, new, "recorded", name, n=0, lineterm="")) or None


KINDS: dict[str, tuple[Iterable[str], Callable[[Path, str], Any], Callable[[str, Any, Any], str | None]]] = {
    "": (RUNS, train, describe_run),
    "-configs": (CONFIGS, compose, describe_config),
}


def main() -> int:
    """Run one command of the docstring above. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[verb + kind for kind in KINDS for verb in ("record", "compare")])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names in RUNS or CONFIGS; all others are left out")
    options = parser.parse_args()
    verb = options.command.removesuffix("-configs")
    names, make, describe = KINDS[options.command.removeprefix(verb)]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"unknown names: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    keeps = verb == "compare" or (options.only and options.file.exists())
    records = json.loads(options.file.read_text()) if keeps else {}
    differs = False
    with workspace() as folder:
        for name in options.only or names:
            try:
                new = make(folder, name)
            except (OSError, RuntimeError) as error:
                print(f"{name}: FAILED {error}", flush=True)
                differs = True
                continue
            if verb == "record":
                records[name] = new
                options.file.write_text(json.dumps(records, indent=1) + "\n")
                print(f"{name}: recorded", flush=True)
            else:
                difference = describe(name, records[name], new) if name in records else "not recorded"
                print(f"{name}: {'equal' if difference is None else f'DIFFERENT {difference}'}", flush=True)
                differs = differs or difference is not None
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
