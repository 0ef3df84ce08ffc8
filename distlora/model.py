"""From a Hugging Face config to our model on the meta device: surgery on transformers' own classes, no ranks, no
weights.

The decoder is the family's own module with three changes: the linears of its blocks are frozen (and adapted) ones, each
block sits in a `Block`, and the head is a `LossHead`. What a family does beyond that is refused here, by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distlora.adapters import DEFAULT_ADAPTER, AdaptedLinear, RowChoice, link_shared_inputs
from distlora.blocks import Block
from distlora.config import MODEL_FAMILIES, Config, UserError
from distlora.head import LossHead
from distlora.quant import FrozenLinear
from distlora.targets import select_targets

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class CausalLM(nn.Module):
    """A decoder and its loss head. forward(...) -> (B,) fp32 loss sums per row."""

    def __init__(self, decoder: nn.Module, head: LossHead, hf_config: PretrainedConfig, blocks: list[Block]) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head
        self.hf_config = hf_config
        self.blocks = blocks
        """The blocks of the decoder, in order (the decoder owns them)."""
        self.autocast_dtype: torch.dtype | None = None
        """Compute dtype where it is not the parameters' own: full fine-tuning in bf16 from fp32 masters."""

    @property
    def embedding(self) -> nn.Module:
        return self.decoder.get_input_embeddings()  # type: ignore[operator]

    @property
    def tied(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return bool(self.hf_config.tie_word_embeddings)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, adapter_rows: Tensor | None = None
    ) -> Tensor:
        """input_ids, position_ids, labels (B, T) int64; adapter_rows (B,) int64 or None -> (B,) fp32 loss sums.

        Positions restart at 0 with each packed document, which is how the decoder tells them apart; labels[t] is the
        target at position t, -100 for none.
        """
        with torch.autocast(input_ids.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.head(self.hidden_states(input_ids, position_ids, adapter_rows), labels)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, adapter_rows: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, H): what the head reads."""
        for block in self.blocks:
            block.adapter_rows = adapter_rows
        # With a cache transformers does not look for packed documents in the positions, and they leak into each other.
        output = self.decoder(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
        return output.last_hidden_state

    def tie(self) -> None:
        """Make the head's weight the embedding's Parameter again, after the model has been given memory."""
        if self.tied:
            self.head.weight = self.embedding.get_parameter("weight")

    def hf_state_dict(self) -> dict[str, nn.Parameter]:
        """Every parameter of an unquantized, unadapted model by its Hugging Face name, a tied one once."""
        return {hf_name(name): parameter for name, parameter in self.named_parameters()}

    def set_num_micro(self, num_micro: int) -> None:
        """Run every block's batch in this many slices from now on."""
        for block in self.blocks:
            block.num_micro = num_micro

    def adapted_linears(self) -> Iterator[tuple[str, AdaptedLinear]]:
        """(Hugging Face path, linear), in forward order."""
        for name, module in self.named_modules():
            if isinstance(module, AdaptedLinear):
                yield hf_name(name), module


def hf_name(name: str) -> str:
    """Our path of a module or parameter as Hugging Face names it: decoder.layers.0.inner.x -> model.layers.0.x."""
    if name == "head.weight":
        return "lm_head.weight"
    return re.sub(r"^decoder\.", "model.", name).replace(".inner.", ".")


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """The model's config.json through transformers. Raises UserError for a family that is not supported."""
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hf_config.model_type not in MODEL_FAMILIES:
        raise UserError(
            f"model_type {hf_config.model_type!r} of {folder} is not supported; "
            f"this version takes {', '.join(MODEL_FAMILIES)}"
        )
    return hf_config


def build_model(config: Config) -> CausalLM:
    """The whole model on the meta device, adapters included. Raises UserError when target_modules match nothing."""
    from transformers import AutoModelForCausalLM

    hf_config = read_hf_config(config.model.path)
    full = config.adapter.method == "full"
    # Full fine-tuning keeps fp32 masters and computes under autocast; frozen weights are in the run's dtype.
    dtype = torch.float32 if full else DTYPES[config.train.dtype]
    with torch.device("meta"):
        # A copy, because from_config writes the dtype into the config that it is given.
        hf_model = AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), dtype=dtype, attn_implementation="sdpa")
    # No module may draw from torch's generators (attention_dropout): recomputation and a resume would draw otherwise.
    hf_model.eval()
    decoder = hf_model.get_decoder()
    if not full:
        hf_model.requires_grad_(False)
    layers = decoder.layers
    choices = [RowChoice() for _ in layers]
    if not full:
        _replace_linears(layers, choices, config, dtype)
    blocks = [Block(layer, choice) for layer, choice in zip(layers, choices, strict=True)]
    for block in blocks:
        block.checkpointing = config.train.checkpointing == "block"
    decoder.layers = nn.ModuleList(blocks)
    model = CausalLM(decoder, LossHead(hf_model.get_output_embeddings().weight), hf_config, blocks)
    if full and config.train.dtype != "fp32":
        model.autocast_dtype = DTYPES[config.train.dtype]
    return model


def _replace_linears(layers: nn.ModuleList, choices: list[RowChoice], config: Config, dtype: torch.dtype) -> None:
    """Put a frozen or adapted linear in place of every nn.Linear of the blocks."""
    paths = [f"model.layers.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    targets = set(select_targets(config.adapter.target_modules, paths))
    for index, (layer, rows) in enumerate(zip(layers, choices, strict=True)):
        adapted: dict[str, AdaptedLinear] = {}
        for path, linear in [(p, m) for p, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            sizes = (linear.in_features, linear.out_features)
            bias, quantized = linear.bias is not None, config.quant.method == "nf4"
            new: FrozenLinear
            if f"model.layers.{index}.{path}" in targets:
                new = adapted[path] = AdaptedLinear(*sizes, bias=bias, quantized=quantized, dtype=dtype, rows=rows)
                adapted[path].add_adapter(DEFAULT_ADAPTER, config.adapter)
            else:
                new = FrozenLinear(*sizes, bias=bias, quantized=quantized, dtype=dtype)
            layer.set_submodule(path, new)
        link_shared_inputs(adapted)


def materialize_buffers(model: CausalLM, device: torch.device) -> None:
    """Compute what the meta skeleton could not hold: the rotary embedding's frequencies, from the config.

    Raises UserError for any other buffer that no checkpoint fills: it would hold whatever the memory held.
    """
    for name, _ in model.named_buffers():
        if not (name.endswith(".offset") or ".rotary_emb." in name):
            raise UserError(
                f"{model.hf_config.model_type} has a buffer {name}, which distlora does not know how to fill"
            )
    for name, module in list(model.decoder.named_modules()):
        if name.rpartition(".")[2] == "rotary_emb":
            model.decoder.set_submodule(name, type(module)(config=model.hf_config).to(device))


def count_parameters(model: CausalLM) -> tuple[int, int]:
    """(weights of the model without adapters, trained parameters), NF4 weights counted as what they stand for."""
    packed = {"codes", "scales", "group_scale"}
    base = {name: p for name, p in model.named_parameters() if ".adapters." not in name}
    dense = sum(p.numel() for name, p in base.items() if name.rpartition(".")[2] not in packed)
    quantized = sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear) and m.quantized
    )
    return dense + quantized, sum(p.numel() for p in model.parameters() if p.requires_grad)
