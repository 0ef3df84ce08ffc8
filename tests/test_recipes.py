"""Recipes compose, fit the architecture that they name, and fit the card that they claim, by calculation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from distlora.activations import Activations, AdaptedRanks, Costs, Decoder
from distlora.config import Config
from distlora.families import FAMILIES, check_config
from distlora.targets import select_targets
from distlora_kernels import nf4
from distlora_launcher.compose import compose_config

RECIPES = Path(__file__).parent.parent / "conf" / "recipe"
GB = 1e9
MODEL_FREE = {"dpo", "qlora"}
"""Recipes that name no model, and so claim no card."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder as its config.json has it."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def kv_size(self) -> int:
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a block's linears by their paths in it."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, self.kv_size),
            "self_attn.v_proj": (hidden, self.kv_size),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }

    @property
    def paths(self) -> list[str]:
        return [f"model.layers.{layer}.{path}" for layer in range(self.num_hidden_layers) for path in self.linears]


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, positions: int) -> Shape:
    return Shape(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
    )


def qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Shape:
    return Shape(
        model_type="qwen2",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=152_064,
        max_position_embeddings=32_768,
    )


LLAMA3_8B = llama(4096, 14_336, 32, 32, 8, 128_256, 131_072)
LLAMA3_70B = llama(8192, 28_672, 80, 64, 8, 128_256, 131_072)
LLAMA2_70B = llama(8192, 28_672, 80, 64, 8, 32_000, 4096)
SHAPES = {
    "NousResearch/Meta-Llama-3.1-8B-Instruct": LLAMA3_8B,
    "NousResearch/Meta-Llama-3.1-8B": LLAMA3_8B,
    "unsloth/Llama-3.3-70B-Instruct": LLAMA3_70B,
    "NousResearch/Llama-2-70b-hf": LLAMA2_70B,
    "huggyllama/llama-65b": llama(8192, 22_016, 80, 64, 64, 32_000, 2048),
    "Qwen/Qwen2.5-32B-Instruct": qwen2(5120, 27_648, 64, 40, 8),
    "Qwen/Qwen2.5-7B-Instruct": qwen2(3584, 18_944, 28, 28, 4),
}
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
NAMED = [name for name in NAMES if name not in MODEL_FREE]


def composed(name: str, *overrides: str) -> Config:
    return compose_config([f"recipe={name}", "data.path=/documents.jsonl", *overrides])


def usable_bytes(card_gib: float) -> float:
    """What a card leaves to a process beside the CUDA context."""
    return (card_gib - 0.6) * 2**30


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Most memory that a rank takes on its GPU, in bytes."""

    resident: float
    """Its rows of the base, adapters, their gradients and the optimizer."""
    gathered: float
    """Units of FSDP2 that are whole while a block is at work."""
    gathered_head: float
    dequantized: float
    activations: Activations

    @property
    def total(self) -> float:
        kept = self.activations
        block = self.gathered + self.dequantized + kept.working
        return self.resident + kept.kept + max(block, self.gathered_head + kept.head_forward, kept.head_backward)


def rank_bytes(config: Config, shape: Shape) -> RankBytes:
    """Of this run, calculated from the shapes.

    What activations take is calculated by distlora.activations, without liger-kernel, which takes less. Transient sizes
    follow the code: FSDP2 holds a gathered unit, the buffer it was received in and, with prefetch, the next one's; the
    largest weight is dequantized into the scratch, and an adapter's gradients are summed from one fp32 part for 256
    tokens (skinny_triton.py).
    """
    assert config.train.dtype == "bf16"
    ranks = config.cluster.gpus_per_node
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    block = sum(nf4.num_groups(i * o) for i, o in shape.linears.values()) * nf4.GROUP_RECORD_BYTES
    vocabulary = 2 * shape.vocab_size * hidden
    base = layers * block / ranks + 2 * vocabulary / ranks

    sizes = {path: shape.linears[path.split(".", 3)[3]] for path in shape.paths}
    targets = select_targets(config.adapter.target_modules, shape.paths)
    trained = sum(config.adapter.rank_of(path) * sum(sizes[path]) for path in targets)
    # Paged moments move to the host while the GPU is short.
    moments = {"adamw": 8, "adamw_8bit": 2, "paged_adamw": 0, "paged_adamw_8bit": 0}[config.optim.name]

    train = config.train
    at_once = config.data.sequence_length * train.micro_batch
    accumulation = -(-train.global_batch // (ranks * train.micro_batch)) if train.accumulate == "block" else 1
    adapted = {path: config.adapter.rank_of(path) for path in targets if path.startswith("model.layers.0.")}
    decoder = Decoder.of(vars(shape), FAMILIES[shape.model_type])
    costs = Costs(decoder=decoder, ranks=AdaptedRanks.of(adapted))
    activations = costs.step(
        train.checkpointing, at_once=at_once, kept_tokens=accumulation * at_once, tile=train.mlp_tile
    )
    parts = 4 * at_once / 256 * min(config.adapter.r, 32) * shape.intermediate_size
    return RankBytes(
        resident=base + trained * (4 + 4 + moments),
        gathered=0 if ranks == 1 else (3 if config.parallel.prefetch else 2) * block,
        gathered_head=0 if ranks == 1 else 2 * vocabulary,
        dequantized=2 * max(i * o for i, o in shape.linears.values()) + parts,
        activations=activations,
    )


def claim(name: str) -> tuple[float, float, float]:
    """(GB of each line added up, GB of the total, GB of the card) in the recipe's header."""
    text = (RECIPES / f"{name}.yaml").read_text()
    lines = re.findall(r"^#  +(\d+\.\d)  (?!total)", text, re.MULTILINE)
    found = re.search(r"^#  +(\d+\.\d)  total of (\d+\.\d) GB$", text, re.MULTILINE)
    assert found is not None, f"{name} states no memory"
    return sum(map(float, lines)), float(found[1]), float(found[2])


def card_gib(name: str) -> int:
    """The card that the header names."""
    found = re.search(r"a (\d+) GB card has", (RECIPES / f"{name}.yaml").read_text())
    assert found is not None
    return int(found[1])


def test_the_recipes_that_are_promised_exist() -> None:
    assert set(NAMES) == {
        "continued_pretraining",
        "guanaco_65b",
        "guanaco_70b",
        "llama2_70b_2x24gb",
        "llama3_70b_8x80gb",
        "llama3_8b_24gb",
        "dpo",
        "qlora",
        "qwen_32b_2x48gb",
        "tool_calls",
    }


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_fits_the_architecture_that_it_names(name: str) -> None:
    config = composed(name)
    shape = SHAPES[config.model.path]
    check_config(vars(shape), config.model.path, sequence_length=config.data.sequence_length)
    targets = select_targets(config.adapter.target_modules, shape.paths)
    assert len(targets) == 7 * shape.num_hidden_layers


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_fits_its_card_by_calculation(name: str) -> None:
    config = composed(name)
    needed, usable = rank_bytes(config, SHAPES[config.model.path]).total, usable_bytes(card_gib(name))
    parts, total, card = claim(name)
    assert total == pytest.approx(needed / GB, abs=0.06)
    assert parts == pytest.approx(total, abs=0.05 * 8)  # Each line is rounded.
    assert card == pytest.approx(usable / GB, abs=0.06)
    # What fragments and NCCL's buffers may take.
    assert needed + 0.6 * GB < usable


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_a_recipe_composes(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    found = re.search(r"^#   distlora train (.+)$", text, re.MULTILINE)
    assert found is not None, f"{name} states no command"
    words = found[1].split()
    assert words[0] == f"recipe={name}"
    assert isinstance(compose_config(words), Config)


def test_llama3_70b_does_not_fit_two_24_gb_cards_and_fits_two_of_32() -> None:
    model = "model.path=unsloth/Llama-3.3-70B-Instruct"
    whole = rank_bytes(composed("llama2_70b_2x24gb", model), LLAMA3_70B).total
    least = rank_bytes(composed("llama2_70b_2x24gb", model, "adapter.target_modules=attention"), LLAMA3_70B).total
    assert usable_bytes(24) < least < whole < usable_bytes(32) - 0.6 * GB


def test_block_accumulation_is_used_where_it_saves_gathers() -> None:
    for name in NAMED:
        config = composed(name)
        ranks = config.cluster.gpus_per_node
        assert config.train.global_batch % (ranks * config.train.micro_batch) == 0, name
        assert ranks > 1 or config.train.accumulate == "step", f"{name} gathers nothing"
    assert composed("qwen_32b_2x48gb").train.accumulate == "block"
    assert composed("llama3_70b_8x80gb").train.accumulate == "block"


@pytest.mark.parametrize("name", ["guanaco_65b", "guanaco_70b"])
def test_guanaco_has_the_settings_of_the_qlora_paper(name: str) -> None:
    config = composed(name)
    adapter, optim, train = config.adapter, config.optim, config.train
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.scaling_of("q_proj")) == (64, 16.0, 0.05, 0.25)
    assert (optim.name, optim.lr, optim.schedule, optim.warmup_ratio) == ("paged_adamw", 1e-4, "constant", 0.0)
    assert (optim.max_grad_norm, optim.betas, optim.weight_decay) == (0.3, (0.9, 0.999), 0.0)
    assert (train.max_steps, train.global_batch, config.data.sequence_length) == (1875, 16, 512)
    assert (config.quant.method, adapter.target_modules) == ("nf4", "all-linear")


def test_what_the_command_line_says_wins_over_a_recipe() -> None:
    config = composed("guanaco_70b", "adapter.r=16", "optim=adamw", "optim.lr=1e-5")
    assert (config.adapter.r, config.optim.name, config.optim.lr) == (16, "adamw", 1e-5)
