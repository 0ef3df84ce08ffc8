"""Seam 2: the chunked loss head equals the plain one, forward and gradients, frozen or trained."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distlora.architecture.config_checks import check_train
from distlora.config import TrainConfig, UserError
from distlora.model.adapters import TokenRows
from distlora.model.head_form import HeadForm, head_form, loss_head, tail_of
from distlora.model.lm_head import IGNORED_LABEL, LossHead
from distlora.model.own_forward import OwnForward
from distlora.parallel import Ranks, Shards
from support.family_models import architecture
from support.small_models import use_chunks_of
from support.worlds import World

VOCABULARY, HIDDEN = 1001, 24


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden (3, 37, 24), labels with some rows and positions ignored, weight."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 37, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (3, 37), generator=generator)
    labels[0, ::3] = -100
    labels[2] = -100
    return hidden, labels, torch.randn(VOCABULARY, HIDDEN, generator=generator)


_SIZES = {"vocab_size": 300, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
_LAYERS = {"num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 12, "pad_token_id": 0, "eos_token_id": 1}
_GPT = {"vocab_size": 300, "n_embd": 24, "n_head": 2, "n_layer": 1, "rotary_dim": 4}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FORMS: dict[str, tuple[dict[str, Any], str, HeadForm]] = {
    "Llama": ({}, "norm", HeadForm("plain")),
    "Gemma2": ({"final_logit_softcapping": 30.0}, "norm", HeadForm("softcap", 30.0)),
    "Granite": ({"logits_scaling": 8.0}, "norm", HeadForm("scale", 0.125)),
    "Cohere": ({"logit_scale": 0.0625}, "norm", HeadForm("scale", 0.0625)),
    "Phi": ({}, "final_layernorm", HeadForm("plain")),
    "GPTJ": (_GPT, "ln_f", HeadForm("plain")),
    "MiniCPM3": (_LATENT | {"dim_model_base": 8}, "norm", HeadForm("own")),
    "ModernBertDecoder": (
        {"decoder_bias": True, "classifier_bias": True, "norm_bias": True},
        "final_norm",
        HeadForm("own", beside=("lm_head",)),
    ),
}
"""transformers' class name without its ending, settings, final norm and form of the head."""


@functools.cache
def hf_model(name: str) -> Any:
    """Build a small fp32 model on the CPU, with weights and biases away from their start."""
    settings = FORMS[name][0]
    config = getattr(transformers, f"{name}Config")(**(_SIZES | _LAYERS if "n_embd" not in settings else {}) | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return model


def decoder_of(model: Any) -> str:
    return str(model.base_model_prefix)


@pytest.mark.parametrize("name", FORMS)
def test_form_and_final_norm_are_found_and_logits_in_chunks_equal_the_models_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, norm, form = FORMS[name]
    model = hf_model(name)
    decoder = model.get_submodule(decoder_of(model))
    input_ids = torch.randint(5, 290, (2, 19), generator=torch.Generator().manual_seed(1))
    layers = "h" if "n_embd" in FORMS[name][0] else "layers"
    assert tail_of(decoder, layers, {"input_ids": input_ids}) == norm
    assert head_form(model, decoder_of(model)) == form
    head = loss_head(model, decoder_of(model), form)
    hidden = decoder(input_ids).last_hidden_state
    expected = model(input_ids).logits
    torch.testing.assert_close(head(hidden, None), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.copied()(hidden, None), expected, atol=1e-5, rtol=1e-5)
    # Gradients of a loss, in chunks of 8 tokens, against autograd through the model itself.
    use_chunks_of(monkeypatch, 8)
    labels = torch.where(input_ids % 3 == 0, IGNORED_LABEL, input_ids)
    own = OwnForward(model, decoder_of(model), [name for name, _ in model.named_children()])
    output: Any = model.get_output_embeddings()

    def theirs(states: Tensor, targets: Tensor) -> Tensor:
        logits = own(states, lambda inputs: F.linear(inputs, output.weight, output.bias))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(1)

    results = []
    for loss in (head, theirs):
        leaf = hidden.clone().requires_grad_()
        sums = loss(leaf, labels)
        results.append((sums, *torch.autograd.grad((sums * torch.tensor([0.5, -2.0])).sum(), leaf)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Phi", "MiniCPM3", "ModernBertDecoder"])
def test_trained_token_rows_get_their_gradient_through_the_models_own_forward(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_chunks_of(monkeypatch, 8)
    model, form = hf_model(name), FORMS[name][2]
    head, output = loss_head(model, decoder_of(model), form), model.get_output_embeddings()
    own = OwnForward(model, decoder_of(model), [name for name, _ in model.named_children()])
    ids = (3, 40, 250)
    token_rows = TokenRows(ids, 24)
    token_rows.rows = nn.Parameter(torch.randn(3, 24, generator=torch.Generator().manual_seed(2)))
    head.train_rows(token_rows)
    hidden = torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(0, 300, (2, 19), generator=torch.Generator().manual_seed(4))

    def theirs(states: Tensor, targets: Tensor) -> Tensor:
        weight = output.weight.index_copy(0, torch.tensor(ids), token_rows.rows)
        logits = own(states, lambda inputs: F.linear(inputs, weight, output.bias))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).sum(1)

    results = []
    for loss in (head, theirs):
        leaf = hidden.clone().requires_grad_()
        sums = loss(leaf, labels)
        gradients = torch.autograd.grad((sums * torch.tensor([0.5, -2.0])).sum(), [leaf, token_rows.rows])
        results.append((sums, *gradients))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=1e-5)


def test_a_trained_weight_works_through_the_models_own_forward_and_more_than_a_weight_is_refused() -> None:
    model = hf_model("MiniCPM3")
    head = loss_head(model, "model", FORMS["MiniCPM3"][2], trained=True)
    head.weight = nn.Parameter(head.weight.clone())
    hidden = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(7)[None]
    (actual,) = torch.autograd.grad(head(hidden, labels).sum(), head.weight)
    logits = (hidden / model.config.logits_scaling) @ head.weight.T
    (expected,) = torch.autograd.grad(F.cross_entropy(logits[0], labels[0], reduction="sum"), head.weight)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for name, more in (("Phi", "a bias"), ("ModernBertDecoder", "bias")):
        with pytest.raises(UserError, match=f"more than a weight .*{more}.*training it whole"):
            loss_head(hf_model(name), "model", FORMS[name][2], trained=True)


class _MixingHead(transformers.LlamaForCausalLM):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        output = super().forward(*arguments, **keywords)
        output.logits = output.logits.cumsum(dim=1)
        return output


class _LongTail(transformers.LlamaModel):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        output = super().forward(*arguments, **keywords)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output


def test_a_head_that_mixes_tokens_is_refused_and_a_longer_tail_is_no_norm() -> None:
    config = hf_model("Llama").config
    with pytest.raises(UserError, match="logits of a token from several tokens"):
        head_form(_MixingHead(config).eval(), "model")
    inputs = {"input_ids": torch.ones(1, 5, dtype=torch.int64)}
    assert tail_of(_LongTail(config).eval(), "layers", inputs) is None


def test_a_decoder_that_changes_states_between_layers_has_no_norm_alone_and_no_dpo() -> None:
    config = copy.deepcopy(hf_model("Llama").config)
    config.num_hidden_layers = 2
    decoder, inputs = transformers.LlamaModel(config).eval(), {"input_ids": torch.ones(1, 5, dtype=torch.int64)}
    assert tail_of(decoder, "layers", inputs) == "norm"
    decoder.layers[1].register_forward_pre_hook(lambda layer, given: (2 * given[0], *given[1:]))
    assert tail_of(decoder, "layers", inputs) is None
    changed = dataclasses.replace(architecture("llama"), norm=None)
    check_train(TrainConfig(), changed)
    with pytest.raises(UserError, match=r"train.objective=dpo: llama changes the hidden states between its layers"):
        check_train(TrainConfig(objective="dpo"), changed)


def test_a_head_in_fp32_multiplies_states_in_16_bits_as_transformers_does() -> None:
    weight = nn.Parameter(torch.randn(40, 24, generator=torch.Generator().manual_seed(1)), requires_grad=False)
    hidden = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    head = LossHead(weight)
    assert torch.equal(head(hidden, None), F.linear(hidden.float(), weight))
    labels = torch.arange(5)[None]
    (gradient,) = torch.autograd.grad(head(hidden, labels).sum(), hidden)
    expected = F.cross_entropy(F.linear(hidden.float(), weight)[0], labels[0], reduction="sum")
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, hidden))


def _sharded_head(ranks: Ranks) -> tuple[list[Tensor], list[Tensor]]:
    """Return (losses, gradients of the hidden states and of trained rows) of a head that is whole, and sharded."""
    name = "ModernBertDecoder"
    head = loss_head(hf_model(name), "model", FORMS[name][2])
    rows = TokenRows((3, 250), 24)
    rows.rows = nn.Parameter(torch.randn(2, 24, generator=torch.Generator().manual_seed(2)))
    head.train_rows(rows)
    hidden = torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(3)).requires_grad_()
    labels = torch.randint(0, 300, (2, 19), generator=torch.Generator().manual_seed(4))
    results = []
    for sharded in (False, True):
        if sharded:
            fully_shard(head, mesh=Shards.over(ranks, ranks.world).mesh("cpu"))
            assert all(isinstance(parameter, DTensor) for parameter in head.parameters())
        sums = head(hidden, labels)
        results.append([sums.detach(), *torch.autograd.grad(sums.sum(), [hidden, rows.rows])])
    return results[0], results[1]


def test_the_models_own_forward_is_the_same_when_the_head_is_sharded(world: World) -> None:
    for whole, sharded in world.run(2, _sharded_head):
        for expected, actual in zip(whole, sharded, strict=True):
            assert torch.equal(actual, expected)
