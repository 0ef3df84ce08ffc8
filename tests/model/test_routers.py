"""Every way in which transformers' mixtures of experts choose and balance: ours is transformers', with adapted experts.

Small models with random weights, whose routers are scaled up so that tokens choose different experts. `prove.measure`
compares forward, losses, gradients and adapters with transformers' own modules, whose weights contain s B A.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch.func import functional_call
from torch.nn import functional as F

from distlora.architecture.spec import Architecture
from distlora.architecture.targets import check_router_loss, select_adapted
from distlora.config import AdapterConfig, TrainConfig, UserError
from distlora.derive.probes import probe, random_tokens
from distlora.derive.prove import (
    bound_of,
    dense_weights,
    differences,
    gradients_of,
    largest_error,
    load_ours,
    load_theirs,
    next_tokens,
    positions_of,
    relative_error,
    save_random,
)
from distlora.derive.shrink import shrink
from distlora.model.adapters import adapter_parameters
from distlora.training.expert_load import ExpertLoad
from support.closeness import assert_close
from support.family_models import edit_config
from support.model_types import CAUSAL, COMPOSITES, config_of, on_page
from support.tiers import ci


class Choice(NamedTuple):
    """One way to choose experts."""

    model_type: str
    settings: dict[str, Any]
    """Settings of the small model beside those of the type."""
    felt: list[dict[str, Any] | str]
    """Other settings, or tensors set to zero, by which the logits change: the comparison says something about them."""
    layers: str = ""
    """D for a layer with a dense MLP, E for one with experts; empty: all have experts."""


_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
_BIAS = "e_score_correction_bias"
CHOICES = {
    "softmax": Choice("qwen3_moe", {"norm_topk_prob": False}, [{"norm_topk_prob": True}]),
    "softmax, normalized; a gate on the shared expert": Choice(
        "qwen2_moe", {"norm_topk_prob": True}, [{"norm_topk_prob": False}, "shared_expert_gate", r"shared_expert\.down"]
    ),
    "softmax in some layers": Choice("qwen3_moe", {"num_hidden_layers": 2, "mlp_only_layers": [1]}, [], "ED"),
    "softmax of the chosen, a shared MLP": Choice(
        "granitemoeshared", {"shared_intermediate_size": 32}, [r"shared_mlp\.output"]
    ),
    "softmax of the chosen, with biases": Choice("gpt_oss", {}, [r"router\.bias"]),
    "softmax, group-limited": Choice(
        "deepseek_v2",
        _GROUPS | {"topk_method": "group_limited_greedy"},
        [{"topk_method": "greedy"}, {"topk_group": 4}, {"routed_scaling_factor": 2.0}, r"shared_experts\.down"],
        "DE",
    ),
    "sigmoid, group-limited, bias-corrected": Choice(
        "deepseek_v3",
        _GROUPS,
        [{"topk_group": 4}, {"norm_topk_prob": False}, {"routed_scaling_factor": 1.0}, _BIAS, r"shared_experts\.down"],
        "DE",
    ),
    "sigmoid, bias-corrected": Choice("glm4_moe", {}, [_BIAS, {"norm_topk_prob": False}], "DE"),
    "sigmoid, group-limited, without a dense layer": Choice(
        "dots1", _GROUPS | {"first_k_dense_replace": 0}, [_BIAS, {"topk_group": 4}]
    ),
    "sigmoid, bias beside the router": Choice("afmoe", {}, [r"\.expert_bias", {"route_scale": 2.0}], "DEE"),
    "sigmoid, bias of the block": Choice("lfm2_moe", {}, [r"\.expert_bias", {"use_expert_bias": False}]),
    "softmax with a bias for the choice alone": Choice("ernie4_5_moe", {}, [_BIAS], "DE"),
    "sigmoid, no shared expert": Choice("minimax_m2", {}, [_BIAS]),
    "two softmaxes with thresholds": Choice("phimoe", {}, [{"router_jitter_noise": 0.3}]),
    "experts without a gate": Choice("nemotron_h", {}, [_BIAS]),
    "square root of softplus": Choice("deepseek_v4", {}, []),
    "softmax with a scale per expert": Choice("gemma4_text@moe", {}, [r"per_expert_scale"]),
}
BY_DEFAULT = ("sigmoid, group-limited, bias-corrected", "softmax, normalized; a gate on the shared expert")


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(shrink(config_of(name))))
    return config | changes


def save_spread(small: Architecture, config: dict[str, Any], folder: Path) -> None:
    """Save a random model whose routers prefer different experts for different tokens.

    Routers, biases and DeepSeek-V4's table of experts by token start as zero in some types.
    """
    save_random(small, config, "test", folder, 1)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if re.search(r"\.(gate|router)\.(\w+\.)*weight$", name) and "attn" not in name and tensor.std() < 0.1:
            tensors[name] = 0.6 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith(_BIAS) and not tensor.any():
            tensors[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
        elif name.endswith("tid2eid"):
            experts = torch.rand(len(tensor), 4, generator=generator).argsort(dim=1)
            tensors[name] = experts[:, : tensor.shape[1]].to(tensor.dtype).contiguous()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe"])
def test_the_preset_linears_is_pefts_all_linear(tmp_path: Path, name: str) -> None:
    """Axolotl trains those with lora_target_linear: no fused weights of experts, gates of shared experts."""
    config = settings_of(name)
    small = probe(config, name)
    save_random(small, config, "test", tmp_path, 1)
    theirs = peft.get_peft_model(
        load_theirs(small, tmp_path).get_submodule(small.causal), peft.LoraConfig(target_modules="all-linear")
    )
    adapted = {
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {*select_adapted(AdapterConfig(target_modules="linears"), small)} == adapted
    assert adapted < {*select_adapted(AdapterConfig(target_modules="all-linear"), small)} | adapted


@pytest.mark.parametrize("name", [name if name in BY_DEFAULT else ci(name) for name in CHOICES])
def test_experts_are_chosen_weighted_and_adapted_as_in_transformers(tmp_path: Path, name: str) -> None:
    model_type, changes, felt, layers = CHOICES[name]
    config = settings_of(model_type, **changes)
    small = probe(config, name)
    kinds = ["DE"[small.layer(index).experts is not None] for index in range(small.num_layers)]
    assert "".join(kinds) == layers or (not layers and "E" in kinds)
    experts = [weight for kind in small.kinds for weight in kind.weights if weight.kind == "experts"]
    assert experts
    assert not any(weight.no_adapter for weight in experts)
    folder = tmp_path / "model"
    save_spread(small, config, folder)
    found = dict(differences(small, folder))
    assert {key: value for key, value in found.items() if value > bound_of(key)} == {}
    assert {"forward of experts or mixers", "adapters", "adapters without a gradient"} <= found.keys()

    input_ids = random_tokens(48, small.vocabulary, rows=2)
    ours, _ = load_ours(small, folder)
    load = ExpertLoad(ours, torch.device("cpu"), None)
    ours(input_ids, positions_of(input_ids), next_tokens(input_ids))
    load.note_step()
    load.read(load_ours(small, folder)[1])
    chosen = next(kind.experts.chosen for kind in small.kinds if kind.experts is not None)
    for tokens in load.tokens.values():
        assert sum(tokens) == 2 * 48 * chosen
        assert sum(map(bool, tokens)) > chosen, "all tokens choose the same experts"

    def logits(place: Path, zeroed: str = "") -> torch.Tensor:
        model = load_theirs(small, place)
        tensors = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if zeroed}
        matching = [tensor for n, tensor in tensors.items() if re.search(zeroed, n)]
        assert matching or not zeroed
        with torch.no_grad():
            for tensor in matching:
                tensor.zero_()
            output: torch.Tensor = model.get_submodule(small.causal)(input_ids=input_ids, use_cache=False).logits
        return output

    plain = logits(folder)
    for change in felt:
        if isinstance(change, str):
            other = logits(folder, change)
        else:
            shutil.copytree(folder, tmp_path / "other", dirs_exist_ok=True)
            edit_config(tmp_path / "other", **change)
            other = logits(tmp_path / "other")
        assert relative_error(other, plain) > 1e-3, f"{change} changes nothing"

    bf16, _ = load_ours(small, folder, method="none", dtype="bf16")
    theirs = getattr(transformers, small.auto_class).from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
    )
    theirs.get_submodule(small.decoder).set_attn_implementation(small.attention)
    dtypes = {n: t.dtype for n, t in (*theirs.named_parameters(), *theirs.named_buffers())}
    own = {bf16.hf_name(n): t.dtype for n, t in (*bf16.named_parameters(), *bf16.named_buffers())}
    routing = {n: own[n] for n in own.keys() & dtypes.keys()}
    assert routing == {n: dtypes[n] for n in routing}, "a router's weight or bias is rounded"
    with torch.no_grad():
        hidden = bf16.hidden_states(input_ids, positions_of(input_ids), torch.full((2,), -1))
        expected = theirs.get_submodule(small.decoder)(input_ids=input_ids, use_cache=False).last_hidden_state
    assert_close(hidden, expected, ulps=4)


BALANCED = [
    *("deepseek_v4", "ernie4_5_moe", "flex_olmo", "flint", "glm5_next", "gpt_oss", "granitemoe", "granitemoe_swa"),
    *("granitemoehybrid", "granitemoeshared", "jamba", "laguna", "lara_mini", "mellum", "minimax", "minimax_m2"),
    *("minimax_m3_vl_text", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("qwen3_moe", "qwen3_next", "qwen4_exp", "qwen4_exp_text"),
]
"""Types whose class in transformers adds a load-balancing loss, and whose experts distlora runs."""
UNBALANCED = ("dbrx", "doge", "jetmoe")
"""Types whose class adds such a loss to experts in code of their own."""
IN_CI = ("ernie4_5_moe", "glm5_next", "minimax", "qwen3_5_moe", "granitemoehybrid")


def test_every_type_with_a_balancing_loss_is_in_the_table() -> None:
    def has_loss(name: str) -> bool:
        module = transformers.CONFIG_MAPPING[name].__module__.replace("configuration_", "modeling_")
        spec = importlib.util.find_spec(module)
        return spec is not None and "load_balancing_loss_func(" in Path(str(spec.origin)).read_text()

    assert {name for name in on_page([*CAUSAL, *COMPOSITES]) if has_loss(name)} == {*BALANCED, *UNBALANCED}


@pytest.mark.parametrize(
    "name",
    [n if n == "qwen2_moe" else ci(n) if n in IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in BALANCED],
)
def test_the_balancing_loss_and_its_gradients_are_transformers(tmp_path: Path, name: str) -> None:
    config, weight = settings_of(name), 0.5
    small = probe(config, name)
    save_spread(small, config, tmp_path / "model")
    ours, _ = load_ours(small, tmp_path / "model", train=TrainConfig(router_aux_loss=weight))
    assert ours.router_aux_loss == weight
    row, parameters = random_tokens(48, small.vocabulary), adapter_parameters(ours)
    loss = ours(row, positions_of(row), next_tokens(row)).sum()

    causal = load_theirs(small, tmp_path / "model").get_submodule(small.causal)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the targets and that of the routers, with our weights and adapters."""
        prefix = f"{small.causal}."
        weights = {name.removeprefix(prefix): dense for name, dense in dense_weights(ours, adapted=True)}
        inputs = {"input_ids": row, "use_cache": False, "output_router_logits": True}
        output = functional_call(causal, weights, kwargs=inputs)
        return F.cross_entropy(output.logits[0, :-1].float(), row[0, 1:], reduction="sum"), output.aux_loss

    plain, balancing = losses()
    expected = plain + weight * 47 * balancing
    assert weight * balancing > 0.2, "the loss of the routers is not felt"
    assert abs(loss / expected - 1) <= 1e-6
    gradients = gradients_of(loss, parameters)
    assert largest_error(gradients, gradients_of(expected, parameters)) <= bound_of("gradients")
    assert largest_error(gradients, gradients_of(losses()[0], parameters)) > 1e-2, "its gradients are not felt"


@pytest.mark.parametrize("name", ["deepseek_v3", *map(ci, UNBALANCED)])
def test_a_balancing_loss_that_a_type_does_not_have_is_refused(name: str) -> None:
    """As a setting, and if config.json asks for it, unless the setting says to train without it."""
    config = settings_of(name)
    small, asked = probe(config, name), config | {"output_router_logits": True, "router_aux_loss_coef": 0.1}
    for weight in (0.1, 0.0):
        with pytest.raises(UserError, match=rf"router_aux_loss={weight} balances routers, and {name} has no"):
            check_router_loss(TrainConfig(router_aux_loss=weight), small, config)
    with pytest.raises(UserError, match=rf"and {name} has no.* set train.router_aux_loss=0 to train without it"):
        check_router_loss(TrainConfig(), small, asked)
    check_router_loss(TrainConfig(router_aux_loss=0.0), small, asked)
    check_router_loss(TrainConfig(), small, asked | {"router_aux_loss_coef": 0.0})
