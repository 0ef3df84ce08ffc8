"""Write docs/models.md: `PYTHONPATH=tests python tests/tools/conformance_page.py > docs/models.md`.

It takes 20 minutes the first time.
After an upgrade of transformers, its difference says which models changed, came or are refused now.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from distlora.architecture import spec
from distlora.architecture.spec import Architecture, LayerKind, architecture_of
from distlora.config import UserError
from support.model_types import CAUSAL, COMPOSITES, VARIANTS, config_of

HEAD = """# Supported models

`model.path` is a folder in Hugging Face format or a name on the hub. `model=NAME` is a short name for a well-known one.
Any text decoder that transformers builds is taken: `distlora` derives its structure from transformers' module, shrinks
it, and compares the small model with transformers' before the first training (some seconds, then cached). A model
that fails a check is refused before anything is started, with the name of the check and the difference (`distlora check MODEL` prints all of them).

## Formats of the base
| format | supported |
|---|---|
| safetensors in bf16, fp16 or fp32 | yes: quantized to NF4 shard by shard while it is read, or used as it is (`quant=none`) |
| bitsandbytes NF4, with or without double quantization | yes: loaded byte for byte |
| MXFP4 (gpt-oss), FP8 (blocks, tensors, channels), NVFP4 and int4 of compressed-tensors and ModelOpt, AWQ, GPTQ (with and without activation order), bitsandbytes 8-bit | yes: kept in their own codes and scales (`quant=keep`, but for FP8 per channel, 8-bit integers and activation order), quantized to NF4, or used dense (`quant=none`) |
| GGUF: a file, or a folder with one | Q4_0 to Q8_0 and Q2_K to Q6_K with `quant=keep`; other types with `quant=nf4` or `none`. The architectures that transformers maps |
| .bin files, other methods | not yet: refused by name |

## Train on what is served
`quant=keep` trains on the bytes of the checkpoint. Large weights of the decoder layers that are shipped in low bits stay so on each rank and
on the network, and a product sees the values that the format's reference library computes. What is dense on disk stays dense: gpt-oss'
attention, routers, norms. Nothing is quantized, so nothing is cached, and the result does not depend on the number of ranks.
```bash
distlora train recipe=gpt_oss_20b_80gb data.path=chats.jsonl   # GPU: 1 x h100
distlora plan model=qwen3_30b_a3b_fp8 quant=keep gpu=h100
```
A plan needs no weights: without them quantization_config tells the format of each weight, for MXFP4, FP8 and int4 of compressed-tensors.
`gpt_oss_20b`, `gpt_oss_120b`, `qwen3_30b_a3b_fp8` and `deepseek_v3` are names of checkpoints in low bits; Kimi-K2's model_type is
unknown to transformers; with deepseek_v3 in its config.json, as its authors advise, it is planned (its weights were not tried).

A GGUF file needs an extra:
```text
pip install 'distlora[gguf]'
distlora train model.path=SmolLM2.Q4_1.gguf quant=keep data.path=chats.jsonl
```
`quant=nf4` reads the same checkpoint and rounds its weights a second time, which the run says when it starts.

`adapter.init=pissa` and `loftq` change the base or correct a rounding, and are refused. A weight that cannot be kept is refused by its name
before the run starts, with the settings that read it. `quant=auto` is `keep` for a checkpoint that can be kept. The model card names the formats.

## Short names
`model=` takes these; the planner knows their sizes without a download.

| | |
|---|---|
| Llama | `llama3_1b`, `llama3_3b`, `llama3_8b`, `llama3_70b`, `llama3_405b`, `llama2_7b`, `llama2_13b`, `llama2_70b`, `llama_7b`, `llama_13b`, `llama_33b`, `llama_65b` |
| Qwen 3 | `qwen3_0b6`, `qwen3_1b7`, `qwen3_4b`, `qwen3_8b`, `qwen3_14b`, `qwen3_32b`, `qwen3_30b_a3b`, `qwen3_30b_a3b_fp8`, `qwen3_235b_a22b` |
| Qwen 2.5 | `qwen25_0b5`, `qwen25_1b5`, `qwen25_3b`, `qwen25_7b`, `qwen25_14b`, `qwen25_32b`, `qwen25_72b` |
| Gemma 3 | `gemma3_1b`, `gemma3_4b`, `gemma3_12b`, `gemma3_27b` |
| Mistral | `mistral_7b`, `mistral_nemo_12b`, `mistral_small_24b`, `mixtral_8x7b`, `mixtral_8x22b` |
| Qwen 3.5, Qwen3-Next | `qwen35_4b`, `qwen35_9b`, `qwen35_27b`, `qwen35_35b_a3b`, `qwen35_122b_a10b`, `qwen3_next_80b_a3b` |
| Gemma 4 | `gemma4_e2b`, `gemma4_e4b`, `gemma4_26b_a4b`, `gemma4_31b` |
| GLM, DeepSeek | `glm47_flash`, `glm45_air`, `deepseek_v3` |
| Ministral 3, Llama 4 | `ministral3_3b`, `ministral3_8b`, `ministral3_14b`, `llama4_scout` |
| OLMo 3, SmolLM3 | `olmo3_7b`, `olmo3_32b`, `smollm3_3b` |
| Granite 4, Nemotron, LFM2 | `granite4_h_tiny`, `granite4_h_small`, `nemotron_nano_9b`, `nemotron3_nano_30b_a3b`, `nemotron_h_56b`, `lfm2_1b2`, `lfm2_2b6`, `lfm2_8b_a1b` |
| Phi, gpt-oss | `phi4_mini`, `phi4_14b`, `gpt_oss_20b`, `gpt_oss_120b` |

Several names load an open copy where the original is gated; `conf/model/` has each one's hub name. For a gated model,
run `hf auth login` once and set `model.path=org/name`.

## Model types
The `model_type` of a config.json, at the settings of its class, or with those of a variant (`type@variant`).

- layers: softmax attention, attention in windows, other mixers (Mamba, gated delta rule, short convolutions).
- packed documents: kept apart by positions, by masks, or by running a module on each alone; otherwise each sequence
  has one document. `+ varlen`: variable-length attention, without masks.
- experts: fused weights in 4 bits with adapters; or the model's own code, in 4 bits without adapters.
- adapters: number of linears and fused weights of a layer that `all-linear` adapts, and those that have none.
- formats: what `distlora export` and `distlora merge` write.
- full: adapter=full is supported.
- plan: memory by formulas, or measured on the shrunk model.

"""  # noqa: E501
COLUMNS = ("type", "layers", "packed documents", "LM head", "experts", "adapters", "formats", "full", "plan")
NAMES = [*CAUSAL, *COMPOSITES, *VARIANTS]
"""All rows of the page."""


def page() -> str:
    """Return the page: a table of the types that train, and one of those that are refused."""
    rows = {name: row(name) for name in sorted(NAMES)}
    trained = [text for text in rows.values() if text.count("|") > 3]
    refused = [text for text in rows.values() if text.count("|") == 3]
    table = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *trained]
    return HEAD + "\n".join([*table, "", "## Refused", "| type | reason |", "|---|---|", *refused]) + "\n"


def row(name: str) -> str:
    """Return the line of a type or variant."""
    print(f"\r{name:40}", end="", file=sys.stderr)
    try:
        architecture = architecture_of(config_of(name), name)
    except UserError as error:
        cells = [reason_of(error)]
    else:
        cells = cells_of(architecture)
    return f"| {' | '.join([f'`{name}`', *(cell.replace('|', chr(92) + '|') for cell in cells)])} |"


def reason_of(error: UserError) -> str:
    """Return a refusal without what to type and numbers of one machine."""
    return re.sub(r"\d\.\de[+-]\d\d", "more", str(error).partition("; ")[0])


def cells_of(architecture: Architecture) -> list[str]:
    """Return the cells of a type that trains, after its name."""
    kinds = architecture.kinds
    weights = [weight for kind in kinds for weight in kind.weights]
    own = any(weight.kind == "fused" for weight in weights)
    formats = ["hf", "peft", *([] if architecture.has_experts else ["bnb"])]
    full = not architecture.composite and not architecture.has_experts
    measured = any(half is not None for kind in kinds for half in kind.memory)
    return [
        listed(map(layer_of, kinds)),
        packed(architecture),
        architecture.head_form.kind,
        "adapters" if architecture.has_experts else "own code" if own else "",
        adapters(kinds),
        listed(formats),
        "yes" if full else "",
        "measured" if measured else "formulas",
    ]


def listed(words: Iterable[str]) -> str:
    """Return different words, in order."""
    return ", ".join(dict.fromkeys(words))


def layer_of(kind: LayerKind) -> str:
    """Return how a layer mixes tokens."""
    roles = {weight.role for weight in kind.weights}
    windowed = "windows" if kind.window is not None else "attention"
    return " + ".join([windowed] * ("attention" in roles) + ["mixer"] * ("mixer" in roles)) or "no linear mixes"


def packed(architecture: Architecture) -> str:
    """Return how packed documents are kept apart."""
    if architecture.documents == "single":
        return "one per sequence"
    apart = listed(path for kind in architecture.kinds for path in kind.apart)
    return architecture.documents + (f" + each alone in {apart}" if apart else "") + " + varlen" * architecture.varlen


def adapters(kinds: Iterable[LayerKind]) -> str:
    """Return how many weights of a layer have adapters, and the reasons why others have none."""
    adapted: set[str] = set()
    reasons: dict[str, set[str]] = {}
    for weight in (weight for kind in kinds for weight in kind.weights):
        if weight.no_adapter or weight.is_gate:
            reason = re.sub(
                r"PEFT takes .*",
                "PEFT takes their names for experts",
                weight.no_adapter or "a gate, adapted by name alone",
            )
            reasons.setdefault(reason, set()).add(weight.path.removesuffix(".weight"))
        elif weight.kind in ("linear", "experts"):
            adapted.add(weight.path)
    return "; ".join([str(len(adapted)), *(f"none on {listed(sorted(p))} ({why})" for why, p in reasons.items())])


if __name__ == "__main__":
    from distlora import derive

    spec.derive = derive.derive  # In this process: one for each type would import torch each time.
    print(page(), end="")
