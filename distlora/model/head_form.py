"""Find out what a model does after its last layer: the form of its LM head, and its final norm.

Both run the model itself, small and in fp32 on the CPU, with weights away from their start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.architecture.spec import HeadForm
from distlora.config import UserError
from distlora.model.hf_model import calls_of
from distlora.model.lm_head import LossHead
from distlora.model.own_forward import OwnForward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = 1e-5
"""Largest difference of two logits, relative to the largest product."""
_LARGEST_PRODUCTS = torch.tensor([1.0, 50.0])[:, None, None]
"""Largest products of two probes, so that a cap is seen."""


@torch.no_grad()
def head_form(hf_model: PreTrainedModel, decoder: str, is_size: Callable[[str], bool] = lambda name: False) -> HeadForm:
    """Return the form of the head of a small fp32 model on the CPU, whose decoder is at the path `decoder`.

    `is_size`: whether a setting is a size, which a model of another size has not: no cap and no scale is read from it.

    Raises UserError if the logits of a token depend on other tokens' hidden states.
    """
    head: Any = hf_model.get_output_embeddings()
    own = OwnForward(hf_model, decoder, [name for name, _ in hf_model.named_children()])
    ran: set[str] = set()
    inputs: list[Tensor] = []

    def product(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return F.linear(hidden, head.weight, head.bias)

    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, module in own.model.named_children()
    ]
    hidden = torch.randn(2, 5, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden *= _LARGEST_PRODUCTS / F.linear(hidden, head.weight).abs().amax(dim=(1, 2), keepdim=True)
    logits = own(hidden, product).clone()
    in_parts = torch.cat([own(half, product) for half in hidden.split(2, dim=1)], dim=1)
    for hook in hooks:
        hook.remove()
    if not _close(in_parts, logits):
        raise UserError(
            f"{hf_model.config.model_type} computes the logits of a token from several tokens' hidden states, and "
            "distlora computes them token by token; set {model.path} to another model"
        )
    products = F.linear(hidden, head.weight, head.bias)
    if torch.equal(inputs[0], hidden) and products.shape == logits.shape and not ran:
        if _close(products, logits):
            return HeadForm("plain")
        numbers = sorted(set(_numbers(hf_model.config.to_dict(), is_size)))
        for number in numbers:
            if _close(number * torch.tanh(products / number), logits):
                return HeadForm("softcap", number)
        for number in (*numbers, *(1 / number for number in numbers)):
            if _close(number * products, logits):
                return HeadForm("scale", number)
    return HeadForm("own", beside=tuple(sorted(ran)))


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether two logits (2, T, V) differ by less than the tolerance in both probes."""
    error, largest = (actual - expected).abs().amax(dim=(1, 2)), expected.abs().amax(dim=(1, 2))
    return bool((error <= _TOLERANCE * largest).all())


def _numbers(settings: Any, is_size: Callable[[str], bool]) -> Iterator[float]:
    """Yield the positive numbers of a config that are no sizes."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, is_size)
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and not is_size(name):
            yield float(value)


def loss_head(
    hf_model: PreTrainedModel, decoder: str, form: HeadForm, *, trained: bool = False, grown: bool = False
) -> LossHead:
    """Return the loss head of a model with this form.

    `trained`: the whole head is trained. `grown`: it gets rows for new tokens. Raises UserError where that is not
    supported.
    """
    head: Any = hf_model.get_output_embeddings()
    more = "a bias" if head.bias is not None else ", ".join(form.beside)
    if (trained and more) or (grown and head.bias is not None):
        what, cure = "adding tokens", "leave model.new_tokens out"
        if trained:
            what, cure = "training it whole", "use an adapter that is not adapter=full, without lm_head whole"
        raise UserError(f"{hf_model.config.model_type}'s LM head is more than a weight ({more}): no {what}; {cure}")
    return LossHead(
        head.weight,
        bias=head.bias,
        logit_softcap=form.value if form.kind == "softcap" else None,
        logit_scale=form.value if form.kind == "scale" else 1.0,
        own=OwnForward(hf_model, decoder, form.beside) if form.kind == "own" else None,
    )


@torch.no_grad()
def tail_of(decoder: Any, layers: str, inputs: Mapping[str, Any]) -> str | None:
    """Return the path of the one module that a decoder runs after its last layer, its final norm; None if it runs more.

    None also if a layer gets more than the hidden states that the layer before it returns, or runs more than once.
    `layers`: path of its list of layers. `inputs`: arguments of its forward.
    """
    chain = list(decoder.get_submodule(layers))
    paths = {module: path for path, module in decoder.named_modules() if not f"{path}.".startswith(f"{layers}.")}
    *calls, whole = calls_of([*chain, *paths], lambda: decoder(**inputs))
    result = whole.output.last_hidden_state
    states, expected = None, iter(chain)
    for module, args, kwargs, output in calls:
        given = next(iter((*args, *kwargs.values())), None)
        if module in chain:
            if module is not next(expected, None) or (states is not None and given is not states):
                return None
            states, *more = output if isinstance(output, tuple) else (output,)
            if any(item is not None for item in more):
                return None
        elif given is states and isinstance(output, Tensor) and output is not states and torch.equal(output, result):
            return paths[module]
    return None
