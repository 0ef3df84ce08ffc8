"""Experts, other large weights, linears and mixers of any type's layers, against transformers' own model and PEFT.

Each type has a small random model of a few layers. Ours is the same model with its experts replaced or its large
weights in NF4; the other has the dequantized weights.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distlora.architecture.peft_names import EXPERT_NAMES, MAMBA_TYPES, peft_refusal
from distlora.architecture.targets import peft_paths
from distlora.config import AdapterConfig
from distlora.derive.linears import conversion_of, linear_calls, peft_reasons, role_of, router_linears, token_mixers
from distlora.model.adapters import BlockContext
from distlora.model.experts import ExpertWeight, find_experts, find_routers, replace_experts
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.quantized_parameters import ReadWeight, find_large_parameters, freeze_parameters
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME, read_peft_adapter
from distlora_kernels.formats import nf4
from support.closeness import relative_error

TOKENS = 23
SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"],
        "num_hidden_layers": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "phimoe": {"num_local_experts": 4},
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "laguna": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 8,
    },
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    "dbrx": {
        "vocab_size": 160,
        "max_seq_len": 64,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "falcon": {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
FUSED = [name for name in TYPES if name not in ("llama4_text", "dbrx", "jetmoe", "falcon")]
READ = {
    "llama4_text": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    "dbrx": ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"),
    "jetmoe": ("mlp.input_linear.weight", "mlp.output_linear.weight"),
    "nemotron_h": ("mixer.out_proj.weight",),
}


@functools.cache
def _model(name: str) -> Any:
    values = TYPES[name] if name in ("dbrx", "falcon") else SIZES | TYPES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **values)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.03))
    return model.eval().requires_grad_(False)


def model_of(name: str) -> Any:
    return copy.deepcopy(_model(name))


def layers_of(model: Any) -> Any:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next(module for module in lists if len(module) == model.config.num_hidden_layers)


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def input_ids() -> Tensor:
    return torch.randint(5, 150, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def fill(weight: FrozenTensor, value: Tensor) -> Tensor:
    """Quantize a value into a frozen weight, and return the dequantized one."""
    weight.to_empty(device="cpu")
    parts = nf4.nf4_quantize(value.float()) if weight.quantized else (value,)
    for own, part in zip(weight.frozen_weight.parts, parts, strict=True):
        own.data.copy_(part)
    return weight.frozen_weight.dense(torch.float32)


def with_experts(name: str, *, quantized: bool = True) -> tuple[Any, Any, dict[str, ExpertWeight]]:
    """Return ours, transformers' with the same weights, and our fused weights by Hugging Face name."""
    ours, theirs = model_of(name), model_of(name)
    found = {}
    for layer in layers_of(ours):
        prefix, values = path_of(ours, layer), dict(layer.named_parameters())
        options: dict[str, Any] = {"dtype": torch.float32, "context": BlockContext()}
        options["formats"] = dict.fromkeys(values, "nf4" if quantized else None)
        for path, weight in replace_experts(layer, **options).items():
            theirs.get_parameter(f"{prefix}.{path}").copy_(fill(weight, values[path]))
            found[f"{prefix}.{path}"] = weight
    return ours, theirs, found


@pytest.mark.parametrize("name", FUSED)
def test_replaced_experts_compute_what_transformers_do_wherever_they_are(name: str) -> None:
    ours, theirs, weights = with_experts(name)
    assert weights
    assert all(weight.quantized for weight in weights.values())
    own, expected = ours(input_ids()).logits, theirs(input_ids()).logits
    assert relative_error(own, expected) <= 1e-6
    assert relative_error(_model(name)(input_ids()).logits, expected) > 1e-3, "NF4 is not felt"


def test_experts_are_found_in_the_layers_that_have_them_with_or_without_a_gate() -> None:
    found = {name: [find_experts(layer) for layer in layers_of(_model(name))] for name in TYPES}
    gated, plain = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
    assert found["mixtral"] == found["phimoe"] == [{"mlp.experts": gated}] * 2
    assert found["nemotron_h"] == [{}, {"mixer.experts": plain}, {}]
    assert found["ernie4_5_moe"] == found["glm4_moe"] == found["laguna"] == [{}, {"mlp.experts": gated}]
    assert found["granitemoe"] == [{"block_sparse_moe.experts": gated}] * 2
    assert not any(found["llama4_text"] + found["dbrx"] + found["jetmoe"]), "these have code of their own"
    marked: Any = copy.deepcopy(layers_of(_model("mixtral"))[0])
    marked.mlp.experts.has_post_expert_norm = True
    assert not find_experts(marked), "a norm after each expert would be left out"


@pytest.mark.parametrize("name", ["nemotron_h", "glm4_moe", "granitemoe", "qwen3_next", "phimoe"])
def test_adapters_of_experts_are_pefts_in_a_folder_that_both_read(name: str, tmp_path: Path) -> None:
    ours, theirs, weights = with_experts(name, quantized=False)
    settings = AdapterConfig(r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(2)
    places, tensors, own = peft_paths(list(weights)), {}, {}
    for path, weight in weights.items():
        pair = weight.add_adapter("default", settings, path=path, seed=0, device="cpu")
        for part, parameter in pair.named_parameters():
            parameter.data.normal_(0, 0.1, generator=generator)
            key = f"base_model.model.{places[path]}.lora_{part}.weight"
            tensors[key], own[key] = parameter.data.clone(), parameter
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "use_rslora": True}
    values |= {"target_modules": [], "target_parameters": sorted(weights), "base_model_name_or_path": "none"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    assert set(read_peft_adapter(tmp_path).paths) == set(weights)

    tuned = peft.PeftModel.from_pretrained(theirs, str(tmp_path), is_trainable=True)
    loaded = {key.replace(".default", ""): p for key, p in tuned.named_parameters() if ".lora_" in key}
    assert loaded.keys() == tensors.keys()
    for key, parameter in loaded.items():
        assert torch.equal(parameter, tensors[key]), key
    losses = [model(input_ids(), labels=input_ids()).loss for model in (ours, tuned)]
    assert abs(losses[0] / losses[1] - 1) <= 1e-6
    gradients = [torch.autograd.grad(loss, list(of.values())) for loss, of in zip(losses, (own, loaded), strict=True)]
    for key, a, b in zip(own, gradients[0], gradients[1], strict=False):
        assert relative_error(a, gradients[1][list(loaded).index(key)]) <= 1e-5, (key, b.shape)


class _Checkpointed(nn.Module):
    """Runs a layer as our wrapper does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False, **kwargs)


def test_targets_that_peft_turns_into_experts_are_read_from_its_folder(tmp_path: Path) -> None:
    """PEFT writes last names alone then, and twice the rank for gate_up_proj, which holds two of the targets."""
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = peft.get_peft_model(model_of("qwen3_next"), peft.LoraConfig(r=4, target_modules=targets))
    tuned.save_pretrained(str(tmp_path))
    adapter = read_peft_adapter(tmp_path)
    experts = [path for path in adapter.paths if ".experts." in path]
    assert [path.rpartition(".")[2] for path in experts] == 2 * ["down_proj", "gate_up_proj"]
    assert [path for path in adapter.paths if path not in experts] == ["model.layers.1.self_attn.q_proj"]
    for path in experts:
        assert adapter.tensors[path, "A"].shape[0] == 4 * adapter.adapter_config.rank_of(path), path


@pytest.mark.parametrize("name", READ)
def test_the_familys_own_code_reads_quantized_weights(name: str) -> None:
    """Checkpointed, so that the code reads them again, and with the gradient of what comes before them."""
    ours, theirs = model_of(name), model_of(name)
    frozen = []
    for layer in layers_of(ours):
        values = dict(layer.named_parameters())
        prefix, paths = path_of(ours, layer), [path for path in READ[name] if path in values]
        for path, weight in freeze_parameters(layer, dict.fromkeys(paths, "nf4"), dtype=torch.float32).items():
            theirs.get_parameter(f"{prefix}.{path}").copy_(fill(weight, values[path]))
            frozen.append(weight)
        assert not paths or set(paths) <= {n for n, m in layer.named_modules() if isinstance(m, ReadWeight)}
    assert frozen
    results = []
    for model in (ours, theirs):
        layers = layers_of(model)
        for index, layer in enumerate(layers):
            layers[index] = _Checkpointed(layer)
        embedded = model.get_input_embeddings()(input_ids()).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.square().mean(), embedded)
        results.append((logits, gradient))
        assert all(weight.dense is None for weight in frozen), "a dequantized weight outlives its layer"
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert relative_error(_model(name)(input_ids()).logits, results[0][0]) > 1e-3, "NF4 is not felt"


def test_large_parameters_are_found_at_the_real_size_and_routers_are_not() -> None:
    def on_meta(config: Any) -> list[list[str]]:
        with torch.device("meta"):
            layers = layers_of(transformers.AutoModelForCausalLM.from_config(config))
        linears = [[p for p, m in layer.named_modules() if type(m) is nn.Linear] for layer in layers]
        return [find_large_parameters(layer, names) for layer, names in zip(layers, linears, strict=True)]

    def real(name: str) -> list[list[str]]:
        return on_meta(transformers.AutoConfig.for_model(name, num_hidden_layers=2))

    for name in ("llama4_text", "jetmoe"):
        for found in real(name):
            assert {*READ[name]} <= {*found}
            assert not any("router" in path for path in found)
    assert real("mixtral") == real("recurrent_gemma") == [[], []], "their routers and gates are small"
    assert real("gpt2")[0] == [f"{path}.weight" for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def uses_of(name: str) -> dict[str, str]:
    model = model_of(name)
    ids = input_ids()[:1]
    uses = linear_calls(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    assert all(type(m).__module__.startswith(("torch", "transformers")) for m in model.modules())
    assert not any(parameter.grad is not None for parameter in model.parameters())
    return {path: use.no_adapter for path, use in uses.items() if use.no_adapter}


def test_linears_that_the_code_reads_or_that_compute_more_are_named() -> None:
    read = "the model's code reads its weight"
    assert uses_of("nemotron_h") == {"model.layers.0.mixer.out_proj": read}
    assert {*uses_of("llama4_text").values()} == {"its class computes something else than a product"}
    assert uses_of("mixtral") == uses_of("falcon") == {}, "falcon's subclass of nn.Linear is one"


class _HandMade(nn.Module):
    """One layer: a linear read by weight, one never called, one without gradient, a leaking mean, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.by_weight, self.idle, self.index, self.plain = (nn.Linear(8, 8) for _ in range(4))
        self.mean = _Mean()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            order = self.index(x).argmax(dim=-1, keepdim=True)
        read = self.by_weight
        return self.plain(self.mean(x)) + F.linear(x, read.weight, read.bias) * order


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


def test_a_hand_made_layer_is_seen_through() -> None:
    torch.manual_seed(0)
    layer, x = _HandMade(), torch.randn(1, TOKENS, 8)
    uses = linear_calls(layer, lambda: layer(x).square().mean())
    assert {path: use.no_adapter for path, use in uses.items()} == {
        "by_weight": "the model's code reads its weight",
        "idle": "the model does not call it",
        "index": "the loss has no gradient for it",
        "plain": "",
    }
    assert not uses["index"].stays, "it can be quantized"
    assert token_mixers([layer], lambda: layer(x), TOKENS) == [{"mean": "mixer"}]
    assert [role_of(path, {"mean": "mixer"}) for path in ("mean.in_proj", "meaning.in_proj")] == ["mixer", "mlp"]


MIXERS = {
    "nemotron_h": [{"mixer": "mixer"}, {}, {"mixer": "attention"}],
    "qwen3_next": [{"linear_attn": "mixer"}, {"self_attn": "attention"}],
    "falcon": [{"self_attention": "attention"}] * 2,
    "dbrx": [{"norm_attn_norm": "attention"}] * 2,
}


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_of_tokens_are_told_from_the_rest_and_from_softmax_attention(name: str) -> None:
    model = model_of(name)
    ids = input_ids()[:1]
    assert token_mixers(layers_of(model), lambda: model(ids, use_cache=False), TOKENS) == MIXERS[name]


def test_routers_that_transformers_balances_are_found() -> None:
    models = {name: _model(name) for name in TYPES}
    found = {name: {p for layer in layers_of(m) for p in find_routers(m, layer)} for name, m in models.items()}
    balanced = {name: paths for name, paths in found.items() if paths}
    gates = {name: {"mlp.gate"} for name in ("mixtral", "ernie4_5_moe", "qwen3_next", "laguna")}
    others = {"gpt_oss": {"mlp.router"}, "granitemoe": {"block_sparse_moe.router"}, "dbrx": {"ffn.router"}}
    assert balanced == gates | others | {"phimoe": {"mlp.router"}}
    assert {path.rpartition(".layers.")[2] for path in router_linears(_model("jetmoe"))} >= {"0.mlp.router.layer"}


def test_what_peft_takes_for_experts_refuses_or_loses_is_what_it_does() -> None:
    """Our tables are those of the installed PEFT; laguna's shared experts are found by transformers' renamings."""
    from peft.utils import transformers_weight_conversion as conversion

    assert {name: {*mapping} for name, mapping in conversion._MOE_TARGET_MODULE_MAPPING.items()} == {
        name: {*names} for name, names in EXPERT_NAMES.items()
    }
    for model_type in transformers.CONFIG_MAPPING:
        known = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
        if conversion.get_checkpoint_conversion_mapping(model_type) is None or known not in EXPERT_NAMES:
            known = None
        assert (conversion_of(model_type) if conversion_of(model_type) in EXPERT_NAMES else None) == known, model_type
    for model_type in MAMBA_TYPES:
        assert "refuses out_proj" in peft_refusal(model_type, "layers.0.mixer.out_proj", None)

    refused = r"incompatible with Mamba"
    with pytest.raises(ValueError, match=refused):
        peft.get_peft_model(model_of("nemotron_h"), peft.LoraConfig(target_modules=["out_proj"]))
    for name in ("glm4_moe", "laguna", "ernie4_5_moe", "mixtral", "qwen3_next", "granitemoe", "falcon"):
        model = model_of(name)
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        linears.remove("lm_head")
        lost = peft_reasons(model, linears)
        kept = sorted({path.rpartition(".")[2] for path in linears} - {path.rpartition(".")[2] for path in lost})
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=linears))
        paths = [path.removeprefix("base_model.model.") for path, _ in tuned.named_modules()]
        adapted = {path.removesuffix(".lora_A") for path in paths if path.endswith(".lora_A")}
        converted = {path for path, reason in lost.items() if "for experts" in reason}
        assert not converted & adapted, "PEFT does adapt them"
        assert {path for path in linears if path.rpartition(".")[2] in kept} <= adapted
