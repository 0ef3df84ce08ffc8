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
from torch.utils.checkpoint import checkpoint

from distlora.architecture.targets import EXPERT_NAMES, MAMBA_TYPES, peft_paths, peft_refusal
from distlora.config import AdapterConfig
from distlora.derive.linears import conversion_of, is_peft_parameter, peft_reasons, router_linears
from distlora.derive.shrink import build, decoder_layers, shrink
from distlora.model.adapters import BlockContext
from distlora.model.experts import ExpertWeight, ReadWeight, find_routers, freeze_parameters, replace_experts
from distlora.model.frozen_linear import FrozenTensor
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME, read_peft_adapter
from distlora_kernels.formats import nf4
from support.closeness import relative_error
from support.model_types import config_of

TOKENS = 23
FUSED = ("mixtral", "gpt_oss", "nemotron_h", "ernie4_5_moe", "glm4_moe", "phimoe", "qwen3_next", "granitemoe", "laguna")
READ = {
    "llama4_text": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    "dbrx": ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"),
    "jetmoe": ("mlp.input_linear.weight", "mlp.output_linear.weight"),
    "nemotron_h": ("mixer.out_proj.weight",),
}


@functools.cache
def _model(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = build(shrink(config_of(name)))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.03))
    return model.eval().requires_grad_(False)


def model_of(name: str) -> Any:
    return copy.deepcopy(_model(name))


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def input_ids() -> Tensor:
    return torch.randint(8, 150, (2, TOKENS), generator=torch.Generator().manual_seed(1))


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
    for layer in decoder_layers(ours):
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
    for layer in decoder_layers(ours):
        values = dict(layer.named_parameters())
        prefix, paths = path_of(ours, layer), [path for path in READ[name] if path in values]
        for path, weight in freeze_parameters(layer, dict.fromkeys(paths, "nf4"), dtype=torch.float32).items():
            theirs.get_parameter(f"{prefix}.{path}").copy_(fill(weight, values[path]))
            frozen.append(weight)
        assert not paths or set(paths) <= {n for n, m in layer.named_modules() if isinstance(m, ReadWeight)}
    assert frozen
    results = []
    for model in (ours, theirs):
        layers = decoder_layers(model)
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


def test_routers_that_transformers_balances_are_found() -> None:
    models = {name: _model(name) for name in (*FUSED, "llama4_text", "dbrx", "jetmoe", "falcon")}
    found = {name: {p for layer in decoder_layers(m) for p in find_routers(m, layer)} for name, m in models.items()}
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
        assert "refuses out_proj" in peft_refusal(model_type, "layers.0.mixer.out_proj")

    refused = r"incompatible with Mamba"
    with pytest.raises(ValueError, match=refused):
        peft.get_peft_model(model_of("nemotron_h"), peft.LoraConfig(target_modules=["out_proj"]))
    for name in ("glm4_moe", "laguna", "ernie4_5_moe", "mixtral", "qwen3_next", "granitemoe", "falcon"):
        model = model_of(name)
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        linears.remove("lm_head")
        converted = {path for path in linears if is_peft_parameter(model.config.model_type, path)}
        lost = {*peft_reasons(model, linears), *converted}
        kept = sorted({path.rpartition(".")[2] for path in linears} - {path.rpartition(".")[2] for path in lost})
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=linears))
        paths = [path.removeprefix("base_model.model.") for path, _ in tuned.named_modules()]
        adapted = {path.removesuffix(".lora_A") for path in paths if path.endswith(".lora_A")}
        assert not converted & adapted, "PEFT does adapt them"
        assert {path for path in linears if path.rpartition(".")[2] in kept} <= adapted
