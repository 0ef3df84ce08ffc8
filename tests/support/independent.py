"""Train a small adapter with transformers and PEFT alone, one document at a time in fp32: the audit's other side.

Nothing of distlora is imported: records, masks, quantization, losses, clipping, schedule and AdamW are written here
from the papers and docs/objectives.md. A step is all of the data, so no order of documents is needed but KTO's.

Letters: T tokens of a document, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes.functional as bnb
import peft
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

LINEARS = re.compile(r"\.layers\.\d+\..*_proj(\.weight)?$")
"""Weights that `nf4` and `int8` quantize: linears and fused experts of the decoder layers, not routers."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training to compute; the names of `train`, `optim` and `rollout` are those of the settings."""

    base: Path
    """Folder of the model."""
    start: Path | None
    """Adapter to start from, in PEFT's format; None trains every parameter."""
    quant: str
    """What the base is put through (`nf4`, `int8`), or the low bits that it is shipped in (a key of SHIPPED)."""
    pissa: bool
    """True if the base lacks what the adapter adds at the start."""
    objective: str
    data: Path
    held_out: Path
    steps: int
    train: dict[str, Any]
    optim: dict[str, Any]
    teacher: Path | None = None
    """Adapter of a teacher on the same base; None: the model at the start."""
    order: Sequence[Sequence[Sequence[int]]] = ()
    """Tokens of the judged answers in the order of each step, one after the other (KTO)."""
    rollouts: Sequence[Path] = ()
    """Files of the sampled answers, one for each two steps (GRPO)."""


@dataclass
class Result:
    """Figures by step, and the trained tensors by PEFT's names (or transformers')."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    """Before the first step and after the last."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Document(NamedTuple):
    """Tokens, and which of them are trained."""

    ids: Tensor
    """(T,) int64."""
    trained: Tensor
    """(T,) bool."""
    record: dict[str, Any]

    def targets(self) -> int:
        return int(self.trained[1:].sum())


def document(parts: Sequence[tuple[Sequence[int], bool]], record: dict[str, Any]) -> Document:
    """Join (tokens, are they trained)."""
    ids = [token for tokens, _ in parts for token in tokens]
    trained = [flag for tokens, flag in parts for _ in tokens]
    return Document(torch.tensor(ids), torch.tensor(trained), record)


def read(path: Path, tokenizer: Any) -> list[list[Document]]:
    """Read each record of a file as its documents: one, or the chosen and the rejected side of a pair."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]

    def render(messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return encode(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    end, found = [tokenizer.eos_token_id], []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if "text" in record:
            found.append([document([(encode(record["text"]) + end, True)], record)])
        elif "messages" in record:
            parts, written = [], 0
            for number, message in enumerate(record["messages"]):
                is_trained = message["role"] == "assistant" and message.get("train", True)
                after, start = render(record["messages"][: number + 1]), written
                if message["role"] == "assistant":
                    start = len(render(record["messages"][:number], add_generation_prompt=True))
                parts += [(after[written:start], False), (after[start:], is_trained)]
                written = len(after)
            found.append([document(parts, record)])
        else:
            keys = ("chosen", "rejected") if "chosen" in record else ("completion",)
            prompt = (encode(record["prompt"]), False)
            answers = [(encode(record[key]) + end, True) for key in keys if key in record]
            found.append([document([prompt, answer], record) for answer in answers])
    return found


def through(weight: Tensor, quant: str) -> Tensor:
    """Return a weight as it is after quantization, in fp32."""
    if quant == "nf4":  # As rows of one block: bitsandbytes' CPU kernel is wrong for rows of 96 (test_nf4.py).
        packed, state = bnb.quantize_4bit(weight.reshape(-1, 64), blocksize=64, quant_type="nf4")
        # QLoRA's second level, to the nearest entry: bitsandbytes' CPU kernel takes a neighbour in one block of 150.
        mean, entries = state.absmax.double().mean().float(), bnb.create_dynamic_map()
        groups = F.pad(state.absmax - mean, (0, -len(state.absmax) % 256)).view(-1, 256)
        largest = groups.abs().amax(dim=1, keepdim=True)
        codes = (groups / largest)[..., None].sub(entries).abs().argmin(dim=-1)
        state.absmax = (entries[codes] * largest).flatten()[: len(state.absmax)] + mean
        return bnb.dequantize_4bit(packed, state).view(weight.shape)
    if quant == "int8":  # One scale for 128 weights.
        flat = F.pad(weight.flatten(), (0, -weight.numel() % 128)).view(-1, 128)
        scales = flat.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
        return ((flat / scales).round() * scales).flatten()[: weight.numel()].view(weight.shape)
    return weight


def nibbles(words: Tensor, order: Sequence[int] = range(8)) -> Tensor:
    """Return the eight 4-bit integers of each int32, side by side along the last dimension."""
    shifts = torch.tensor([4 * list(order).index(place) for place in range(8)])
    return (words[..., None] >> shifts & 15).flatten(-2)


def gptq(part: Callable[[str], Tensor]) -> Tensor:
    groups = part("g_idx").long()
    return (part("scales").float()[groups] * (nibbles(part("qweight").T).T - nibbles(part("qzeros"))[groups])).T


def awq(part: Callable[[str], Tensor]) -> Tensor:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros, scales = nibbles(part("qweight"), order), nibbles(part("qzeros"), order), part("scales").float()
    size = len(codes) // len(scales)
    return (scales.repeat_interleave(size, 0) * (codes - zeros.repeat_interleave(size, 0))).T


def int4(part: Callable[[str], Tensor]) -> Tensor:
    codes, scales = nibbles(part("weight_packed")) - 8, part("weight_scale").float()
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def nvfp4(part: Callable[[str], Tensor]) -> Tensor:
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    packed = part("weight_packed")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).long()
    scales = part("weight_scale").float() / part("weight_global_scale")
    return torch.cat([levels, -levels])[codes] * scales.repeat_interleave(16, 1)


def bnb_nf4(part: Callable[[str], Tensor]) -> Tensor:
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    state = bnb.QuantState.from_dict({name: part(f"weight.{name}") for name in names}, torch.device("cpu"))
    shape, state.shape = state.shape, torch.Size((math.prod(state.shape) // 64, 64))
    return bnb.dequantize_4bit(part("weight"), state).view(shape)


SHIPPED = {"gptq": gptq, "awq": awq, "int4": int4, "nvfp4": nvfp4, "bnb-nf4": bnb_nf4}
"""Low bits of checkpoints to values in fp32 (out, in), by the formulas of the formats."""


def values_of(folder: Path, quant: str) -> dict[str, Tensor]:
    """Return the tensors of a folder that ships low bits, by name and in fp32."""
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    linears = {match[0] for name in stored if (match := re.match(r".*_proj(?=\.)", name))}
    dense = {name: tensor.float() for name, tensor in stored.items() if "_proj." not in name or name.endswith("bias")}
    return dense | {
        f"{path}.weight": SHIPPED[quant](lambda part, path=path: stored[f"{path}.{part}"]) for path in linears
    }


@torch.no_grad()
def build(job: Job) -> tuple[Any, Any]:
    """Return (the model to train, its teacher or None)."""
    name = "AutoModelForSequenceClassification" if job.objective == "reward" else "AutoModelForCausalLM"
    labels = {"num_labels": 1} if job.objective == "reward" else {}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    if job.quant in SHIPPED:
        config = transformers.AutoConfig.from_pretrained(job.base, **labels)
        config.quantization_config = None
        base = getattr(transformers, name).from_config(config, **eager)
        names = base.load_state_dict(values_of(job.base, job.quant), strict=False)
        assert set(names.missing_keys) <= {"score.weight", "lm_head.weight"}, names
    else:
        base = getattr(transformers, name).from_pretrained(job.base, **eager, **labels)
    if job.pissa:
        assert job.start is not None
        for path, (a, b, scale) in factors(job.start).items():
            base.get_parameter(f"{path}.weight").sub_(scale * b @ a)
    for path, parameter in base.named_parameters():
        if parameter.dim() > 1 and LINEARS.search(path):
            parameter.copy_(through(parameter, job.quant))
    base.eval()
    teacher = None if job.teacher is None else peft.PeftModel.from_pretrained(copy.deepcopy(base), job.teacher)
    if job.start is None:
        return base, teacher
    return peft.PeftModel.from_pretrained(base, job.start, is_trainable=True).eval(), teacher


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return (A, B, scale) of an adapter of one rank by the path of its linear."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"])
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    paths = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        path.removeprefix("base_model.model."): (
            tensors[f"{path}.lora_A.weight"],
            tensors[f"{path}.lora_B.weight"],
            scale,
        )
        for path in paths
    }


def log_probabilities(model: Any, doc: Document) -> Tensor:
    """Return the next-token log-probabilities of a document, (T - 1, V)."""
    return model(input_ids=doc.ids[None], use_cache=False).logits[0, :-1].log_softmax(dim=-1)  # type: ignore[no-any-return]


def of_targets(logp: Tensor, doc: Document) -> Tensor:
    """Return the log-probabilities of the trained tokens, (targets,)."""
    return logp.gather(1, doc.ids[1:, None])[:, 0][doc.trained[1:]]


class Objective:
    """The loss of a record, and the number that a step's sum of losses is divided by."""

    def __init__(self, job: Job, teacher: Any) -> None:
        self.job, self.teacher = job, teacher
        self.kl = 0.0

    def units(self, records: list[list[Document]]) -> int:
        if self.job.objective in ("sft", "distill"):
            return sum(doc.targets() for docs in records for doc in docs)
        return len(records)

    @torch.no_grad()
    def remember(self, model: Any, records: list[list[Document]]) -> list[Any]:
        """Return what the reference says of each record, which is the model at the start."""
        if self.job.objective == "distill":
            reference = self.teacher or model
            return [[log_probabilities(reference, doc) for doc in docs] for docs in records]
        return [[of_targets(log_probabilities(model, doc), doc).double().sum() for doc in docs] for docs in records]

    @torch.no_grad()
    def before_step(
        self, step: int, model: Any, reference: Callable[[Document], Tensor], records: list[list[Document]]
    ) -> None:
        """Estimate KTO's KL: each prompt with the answer before it, the first with the last one's."""
        if self.job.objective != "kto":
            return
        by_tokens = {tuple(doc.ids.tolist()): doc for docs in records for doc in docs}
        docs = [by_tokens[tuple(ids)] for ids in self.job.order[step]]
        assert len(docs) == len(records)
        total = 0.0
        for doc, other in zip(docs, [docs[-1], *docs[:-1]], strict=True):
            mixed = document(
                [(doc.ids[~doc.trained].tolist(), False), (other.ids[other.trained].tolist(), True)], doc.record
            )
            total += float(of_targets(log_probabilities(model, mixed), mixed).double().sum() - reference(mixed))
        self.kl = max(0.0, total / len(docs))

    def loss(self, model: Any, docs: list[Document], kept: Any) -> Tensor:
        """Return the loss of one record."""
        job, train = self.job, self.job.train
        beta = train.get("beta", {"simpo": 2.0, "distill": 0.0}.get(job.objective, 0.1))
        if job.objective == "reward":
            chosen, rejected = (model(input_ids=doc.ids[None], use_cache=False).logits[0, 0] for doc in docs)
            center = train.get("center_rewards", 0.0) * (chosen + rejected) ** 2
            return -F.logsigmoid(chosen - rejected - docs[0].record.get("margin", 0.0)) + center
        logps = [log_probabilities(model, doc) for doc in docs]
        targets = [of_targets(logp, doc) for logp, doc in zip(logps, docs, strict=True)]
        if job.objective == "sft":
            return -targets[0].sum()
        if job.objective == "distill":
            ratio, temperature = train.get("kd_ratio", 0.5), train.get("kd_temperature", 1.0)
            trained = docs[0].trained[1:]
            student, teacher = ((logp[trained] / temperature).log_softmax(-1) for logp in (logps[0], kept[0]))
            divergence = jensen_shannon(teacher, student, beta)
            return (1 - ratio) * -targets[0].sum() + ratio * temperature**2 * divergence
        sums = [logp.double().sum() for logp in targets]
        means = [logp.double().mean() for logp in targets]
        if job.objective == "kto":
            is_good, drift = docs[0].record["label"], sums[0] - kept[0]
            weight = train.get("desirable_weight" if is_good else "undesirable_weight", 1.0)
            return weight * (1 - torch.sigmoid(beta * (drift - self.kl) * (1 if is_good else -1)))
        extra = train.get("sft_weight", 0.0) * -means[0]
        smoothing = train.get("label_smoothing", 0.0)
        if job.objective == "orpo":
            odds = [mean - torch.log1p(-mean.exp()) for mean in means]
            return -means[0] - beta * F.logsigmoid(odds[0] - odds[1])
        if job.objective == "ipo":
            sides = [(s - k) / len(t) for s, k, t in zip(sums, kept, targets, strict=True)]
            return (sides[0] - sides[1] - 1 / (2 * beta)) ** 2 + extra
        if job.objective == "simpo":
            margin = beta * (means[0] - means[1]) - train.get("target_margin", 0.5)
        else:
            margin = beta * ((sums[0] - kept[0]) - (sums[1] - kept[1]))
        return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin) + extra


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Return the sum over tokens of GKD's divergence of two (T, V) log-probabilities (arXiv 2306.13649)."""
    teacher, student = teacher.double(), student.double()

    def divergence(first: Tensor, second: Tensor) -> Tensor:
        return (first.exp() * (first - second)).sum()

    if beta in (0.0, 1.0):
        return divergence(teacher, student) if beta == 0.0 else divergence(student, teacher)
    mixed = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * divergence(teacher, mixed) + (1 - beta) * divergence(student, mixed)


def sampled_step(job: Job, model: Any, first: Any, step: int, cache: dict[Any, Any]) -> float:
    """Add the gradients of a GRPO step (DAPO's mean over tokens, a KL term with bias correction); return its loss."""
    number = step // 2
    if number not in cache:
        stored = safetensors.torch.load_file(job.rollouts[number])
        sizes = (stored["prompt_lengths"] + stored["lengths"]).tolist()
        docs = [
            document([(ids[:prompt].tolist(), False), (ids[prompt:].tolist(), True)], {})
            for ids, prompt in zip(stored["tokens"].split(sizes), stored["prompt_lengths"].tolist(), strict=True)
        ]
        rewards = stored["rewards"].view(torch.float64).view(-1, job.train["group"])
        spread = rewards.std(dim=1, keepdim=True) + 1e-4
        advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / spread).flatten()
        with torch.no_grad():
            old = [of_targets(log_probabilities(model, doc), doc) for doc in docs]
            reference = [of_targets(log_probabilities(first, doc), doc) for doc in docs]
        sampler = torch.cat(old) - stored["logps"]
        assert sampler.abs().max() < 1e-4, "the sampler's log-probabilities are others"
        cache[number] = list(zip(docs, advantages.tolist(), old, reference, strict=True))
    total, units = 0.0, sum(doc.targets() for doc, *_ in cache[number])
    for doc, advantage, old, reference in cache[number]:
        logp = of_targets(log_probabilities(model, doc), doc)
        ratio, drift = (logp - old).exp(), reference - logp
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = (-gain + job.train["beta"] * ratio * (drift.exp() - drift - 1)).sum() / units
        loss.backward()
        total += loss.item()
    return total


def learning_rate(step: int, job: Job) -> float:
    """Return the rate of a step by the rule of the settings' reference: linear up, then constant, cosine or linear."""
    warmup = round(job.optim["warmup_ratio"] * job.steps)
    if step < warmup:
        return job.optim["lr"] * (step + 1) / warmup  # type: ignore[no-any-return]
    done = (step - warmup) / max(job.steps - warmup, 1)
    shape = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}
    return job.optim["lr"] * shape[job.optim["schedule"]]  # type: ignore[no-any-return]


def trained_by(model: Any, job: Job) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad or job.start is None}


def run(job: Job) -> Result:
    """Train, and return what a run of the same settings must have."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.base)
    model, teacher = build(job)
    records, held_out = ([] if job.objective == "grpo" else read(path, tokenizer) for path in (job.data, job.held_out))
    parameters = trained_by(model, job)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    ratio = job.optim.get("loraplus_lr_ratio", 1.0)
    fast = {p for name, p in parameters.items() if "lora_B" in name or p.dim() == 1}  # As in PEFT's LoRA+.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if (p in fast) == is_fast], "ratio": ratio if is_fast else 1.0}
        for is_fast in (False, True)
    ]
    decay, eps = job.optim.get("weight_decay", 0.0), job.optim["eps"]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, eps=eps, weight_decay=decay)
    objective, result, cache = Objective(job, teacher), Result(), {}
    first = copy.deepcopy(model) if job.objective in ("kto", "grpo") else None
    kept, kept_held_out = ([None] * len(part) for part in (records, held_out))
    if job.objective in ("dpo", "ipo", "kto", "distill"):
        kept, kept_held_out = (objective.remember(model, part) for part in (records, held_out))

    def reference(doc: Document) -> Tensor:
        return of_targets(log_probabilities(first, doc), doc).double().sum()

    @torch.no_grad()
    def evaluate() -> None:
        if held_out and job.objective != "kto":  # The order of its held-out answers is not given.
            losses = [float(objective.loss(model, docs, k)) for docs, k in zip(held_out, kept_held_out, strict=True)]
            result.held_out.append(sum(losses) / objective.units(held_out))

    evaluate()
    for step in range(job.steps):
        optimizer.zero_grad()
        if job.objective == "grpo":
            result.losses.append(sampled_step(job, model, first, step, cache))
        else:
            objective.before_step(step, model, reference, records)
            total, units = 0.0, objective.units(records)
            for docs, k in zip(records, kept, strict=True):
                loss = objective.loss(model, docs, k) / units
                loss.backward()
                total += loss.item()
            result.losses.append(total)
        bound = job.optim["max_grad_norm"] or math.inf
        result.norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), bound)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, job) * group["ratio"]
        optimizer.step()
    evaluate()
    state = (
        model.state_dict() if job.start is None else peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    )
    tied = {"lm_head.weight"} if job.start is None and model.config.tie_word_embeddings else set()
    result.tensors = {name: tensor.detach().clone() for name, tensor in state.items() if name not in tied}
    return result
