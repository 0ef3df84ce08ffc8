"""A model type that transformers does not have: a hybrid with experts and a scaled head, and faults to plant in it.

Layers alternate Llama's attention and a gated recurrence of its own. `fault` in config.json plants one fault.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

FAULTS = ("leak", "head", "state", "read")


class TandemConfig(PretrainedConfig):
    """Settings of config.json. `fault`: leak, head, state or read."""

    model_type = "tandem"
    vocab_size: int = 1001
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 96
    moe_intermediate_size: int = 48
    num_experts: int = 4
    num_experts_per_tok: int = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    logits_scale: float = 0.25
    rope_parameters: dict | None = None
    fault: str | None = None
    layer_types: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.layer_types = self.layer_types or ["full_attention", "linear_attention"] * (self.num_hidden_layers // 2)
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)


class TandemRecurrence(nn.Module):
    """h_t = g_t h_(t-1) + (1 - g_t) x_t per channel."""

    def __init__(self, config: TandemConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.in_proj, self.gate = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.out_proj, self.reads = nn.Linear(size, size, bias=False), config.fault == "read"

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, gates = self.in_proj(hidden_states), torch.sigmoid(self.gate(hidden_states) + 2)
        state, states = torch.zeros_like(x[:, 0]), []
        for value, gate in zip(x.unbind(1), gates.unbind(1), strict=True):
            state = gate * state + (1 - gate) * value
            states.append(state)
        mixed = torch.stack(states, dim=1)
        return F.linear(mixed, getattr(self, "out_proj").weight) if self.reads else self.out_proj(mixed)  # noqa: B009


@use_experts_implementation
class TandemExperts(nn.Module):
    def __init__(self, config: TandemConfig) -> None:
        super().__init__()
        number, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.act_fn = number, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.empty(number, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(number, hidden, inner))

    def forward(self, flat: Tensor, choices: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(flat)
        for expert in range(self.num_experts):
            tokens, places = torch.where(choices == expert)
            gate, up = F.linear(flat[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * weights[tokens, places, None]
            total = total.index_add(0, tokens, output)
        return total


class TandemRouter(nn.Module):
    def __init__(self, config: TandemConfig) -> None:
        super().__init__()
        self.chosen = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        weights, choices = F.linear(flat, self.weight).softmax(dim=-1).topk(self.chosen, dim=-1)
        return choices, weights


class TandemLayer(nn.Module):
    def __init__(self, config: TandemConfig, index: int) -> None:
        super().__init__()
        attends = config.layer_types[index] == "full_attention"
        self.mixer = LlamaAttention(config, index) if attends else TandemRecurrence(config)
        self.attends, self.keeps, self.last = attends, config.fault == "state", None
        self.norm, self.mlp_norm = LlamaRMSNorm(config.hidden_size), LlamaRMSNorm(config.hidden_size)
        self.router, self.experts = TandemRouter(config), TandemExperts(config)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None) -> Tensor:
        x = self.norm(hidden_states)
        if self.attends:
            mixed, _ = self.mixer(x, position_embeddings=position_embeddings, attention_mask=attention_mask)
        else:
            mixed = self.mixer(x)
        hidden_states = hidden_states + mixed
        if self.keeps:
            hidden_states, self.last = hidden_states + (self.last or 0.0), 0.1 * float(mixed.detach().mean()) + 0.01
        flat = self.mlp_norm(hidden_states).flatten(0, 1)
        return hidden_states + self.experts(flat, *self.router(flat)).view_as(hidden_states)


class TandemPreTrainedModel(PreTrainedModel):
    config_class = TandemConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (TandemRouter, TandemExperts)) and not getattr(
                parameter, "_is_hf_initialized", False
            ):
                nn.init.normal_(module.get_parameter(name), std=0.02)


class TandemModel(TandemPreTrainedModel):
    def __init__(self, config: TandemConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TandemLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm, self.rotary_emb = LlamaRMSNorm(config.hidden_size), LlamaRotaryEmbedding(config)
        self.post_init()

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        if self.config.fault == "leak":  # Outside of the layers, where documents cannot be run apart.
            hidden = hidden + hidden.cumsum(dim=1) / 8
        # The fourth argument is a cache, whose name depends on transformers' version.
        mask = create_causal_mask(self.config, hidden, attention_mask, None, position_ids=position_ids)
        embeddings = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=embeddings)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class TandemForCausalLM(TandemPreTrainedModel, GenerationMixin):
    def __init__(self, config: TandemConfig) -> None:
        super().__init__(config)
        self.model = TandemModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden) * self.config.logits_scale
        if self.config.fault == "head":
            logits = logits * hidden.shape[1] ** 0.5
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


AutoConfig.register("tandem", TandemConfig)
AutoModelForCausalLM.register(TandemConfig, TandemForCausalLM)
