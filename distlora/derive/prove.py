"""Prove on a shrunk model with random weights that distlora computes what transformers does. Runs on the CPU in fp32.

transformers' model has the weights of ours, dequantized. Every check compares two ways to the same numbers, and
`BOUNDS` holds the largest difference that rounding explains.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from distlora.architecture.checkpoint_files import CheckpointFiles, hf_config_of
from distlora.architecture.images import ImageLayout
from distlora.architecture.spec import Architecture
from distlora.config import AdapterConfig, ModelConfig, ModelSpec, ParallelConfig, QuantConfig, TrainConfig, UserError
from distlora.derive.probes import move_off_start, probe, random_tokens
from distlora.loading.load_base import load_base
from distlora.model.adapters import LoRAPair, adapter_parameters, reset_adapters
from distlora.model.build import CausalLM, build_model
from distlora.model.experts import ExpertPair
from distlora.model.frozen_linear import FrozenTensor
from distlora.model.hf_model import materialize_buffers, transformers_model
from distlora.model.lm_head import IGNORED_LABEL
from distlora.parallel import Backend, Ranks, parallelize

DRAWS = (1, 2)
"""Seeds of the random weights. One draw may hide a leak (a gate that it closes)."""
SINGLE = Ranks(0, 1, torch.device("cpu"), None)
_LENGTHS = (23, 1, 40)
"""Tokens of the documents. Two are longer than the windows of a shrunk model."""
_EPS = torch.finfo(torch.float32).eps
_TINY = 1e-30

BOUNDS = {
    "weights": (0.0, "a tensor is copied from the checkpoint"),
    "forward": (0.0, "the base runs the same operations in the same order"),
    "forward of experts or mixers": (4 * _EPS, "experts and mixers sum in another order, and torch's vectors differ"),
    "repeated forward": (0.0, "a layer keeps nothing from one batch to the next"),
    "logits": (2e-5, "the product with the vocabulary is summed in other blocks"),
    "head": (1e-5, "the loss of a chunk is summed in another order"),
    "causality": (1e-5, "a token's output does not depend on later tokens"),
    "rows alone": (2e-5, "a batch of another size is multiplied in other blocks"),
    "slices": (2e-5, "a layer that runs its batch in slices multiplies other blocks"),
    "sliced gradients": (1e-6, "slices and recomputation change the order of a gradient's sum alone"),
    "adapters": (2e-5, "W x + B A x is summed in another order than (W + B A) x"),
    "gradients": (3e-4, "so are the gradients of A and B; most types stay below 1e-5, Gemma 4 amplifies rounding"),
    "gradients of mixers": (3e-4, "so are the gradients of A and B, carried along the sequence"),
    "adapters without a gradient": (0.0, "training would leave them as they are"),
    "packed documents": (2e-5, "a document is multiplied in other blocks than alone"),
    "packed loss": (1e-6, "the losses of documents are added in another order"),
    "packed gradients": (2e-6, "so are their gradients"),
    "one document per sequence": (2e-5, "a padded document is multiplied in other blocks than alone"),
    "loss falls in three steps": (-1e-4, "the loss of a batch falls when it is trained on"),
    "PEFT adapter": (0.0, "PEFT finds each tensor of a saved adapter, and no other"),
    "PEFT logits": (2e-5, "PEFT sums in another order"),
    "PEFT gradients": (1e-5, "PEFT sums in another order"),
    "PEFT gradients of mixers": (2e-5, "PEFT sums in another order, carried along the sequence"),
    "losses of each rank": (1e-6, "ranks add the same losses in another order"),
    "adapter of each rank": (2e-6, "three steps carry the rounding of gradients"),
}
"""Largest difference of each check and its reason, relative to the norm of what is expected, in fp32."""


CANNOT_RUN = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
"""Errors of a model that cannot run a check."""


def bound_of(name: str) -> float:
    """Return the largest difference that a check allows."""
    return BOUNDS[re.sub(r"rank \d+", "each rank", name)][0]


def proved(small: Architecture, config: Mapping[str, Any], place: str) -> Architecture:
    """Return the architecture of a shrunk model with the results of all checks (`Architecture.checks`).

    `config` is the content of its config.json. If packed documents leak with the weights of one draw, they are kept
    apart as probing that draw finds, and if they leak then too, the result has documents="single". Raises UserError
    with the first check that fails.
    """
    worst: dict[str, float] = {}
    tried: set[int] = set()
    seeds = list(DRAWS)
    while seeds:
        seed = seeds.pop(0)
        for name, difference in measure(small, config, place, seed):
            if difference <= bound_of(name):
                worst[name] = max(worst.get(name, difference), difference)
            elif name.startswith("packed") and small.documents != "single":
                kinds = tuple(dataclasses.replace(kind, apart=()) for kind in small.kinds)
                small = dataclasses.replace(small, documents="single", kinds=kinds, varlen=False)
                small = probe(config, place, seed=seed) if seed not in tried else small
                tried, seeds, worst = {*tried, seed}, list(DRAWS), {}
                break
            else:
                raise failed(small.model_type, name, difference)
    return dataclasses.replace(small, checks=tuple(worst.items()))


def measure(small: Architecture, config: Mapping[str, Any], place: str, seed: int) -> Iterator[tuple[str, float]]:
    """Yield the results of all checks on one draw of weights. A check that a model cannot run is refused."""
    with tempfile.TemporaryDirectory(prefix="distlora-prove-") as folder:
        name = "weights"
        try:
            save_random(small, config, place, Path(folder), seed)
            for name, difference in differences(small, Path(folder)):
                yield name, difference
        except CANNOT_RUN as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{small.model_type} cannot run the checks on a small model with random weights after {name!r} "
                f"({type(error).__name__}: {error}); set {{model.path}} to another model"
            ) from error


def failed(model_type: str, name: str, difference: float) -> UserError:
    """Return the error for a check that fails."""
    reason = BOUNDS[re.sub(r"rank \d+", "each rank", name)][1]
    found, allowed = result_texts(name, difference)
    if bound_of(name) < 0:
        what = f"the loss falls by {found} of itself, and must fall by {allowed}"
    else:
        what = f"the difference is {found}, and at most {allowed} is allowed"
    return UserError(
        f"{model_type} fails the check {name!r} on a small model with random weights: {what}, because {reason}; set "
        "{model.path} to another model, or run `distlora check MODEL` for the results of all checks"
    )


def result_texts(name: str, difference: float) -> tuple[str, str]:
    """Return the result of a check and its bound as texts.

    A negative bound is one of the loss, which must fall by that much or more; `1.9e-02` and `>=1.0e-04` are falls. Any
    other difference is at most its bound.
    """
    bound = bound_of(name)
    return (f"{-difference:.1e}", f">={-bound:.1e}") if bound < 0 else (f"{difference:.1e}", f"{bound:.1e}")


def save_random(small: Architecture, config: Mapping[str, Any], place: str, folder: Path, seed: int) -> None:
    """Save a model with random weights, away from their start, as save_pretrained does.

    That itself imports DeepSpeed where it is installed, which takes seconds.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf_config, auto = hf_config_of(config, place), small.auto_class
        model = transformers_model(
            hf_config, place, auto_class=auto, attention="eager", dtype=torch.float32, device="cpu"
        )
        move_off_start(model)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()  # As after loading: zaya's sets an element to -1, whatever the checkpoint holds.
    state = {name: t for name, t in model.state_dict().items() if name not in (model._keys_to_ignore_on_save or ())}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def load_theirs(small: Architecture, folder: Path) -> Any:
    """Return transformers' model of a folder."""
    import transformers

    auto: Any = getattr(transformers, small.auto_class)
    model = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
    )
    model.get_submodule(small.decoder).set_attn_implementation(small.attention)
    return model


def spec_of(folder: Path, method: Any = "nf4", dtype: Any = "fp32", *, images: bool = False) -> ModelSpec:
    """Return the settings of distlora's model of a folder."""
    return ModelSpec(
        model=ModelConfig(path=str(folder)),
        quant=QuantConfig(method=method, cache=False),
        adapter=AdapterConfig(target_modules="all-linear", r=4),
        dtype=dtype,
        images=images,
    )


def load_ours(
    small: Architecture,
    folder: Path,
    *,
    method: Any = "nf4",
    ranks: Ranks = SINGLE,
    dtype: Any = "fp32",
    train: TrainConfig | None = None,
    images: ImageLayout | None = None,
    parallel: ParallelConfig | None = None,
    shard_degree: int | None = None,
) -> tuple[CausalLM, Backend]:
    """Return distlora's model of a folder, with adapters whose B is not zero; without `train` no router loss."""
    spec = spec_of(folder, method, dtype, images=images is not None)
    base = CheckpointFiles(folder)
    model = build_model(spec, train, base=base, architecture=small, images=images)
    if train is None:
        model.router_aux_loss = 0.0  # transformers' loss of the targets is what is compared.
    backend = parallelize(model, ranks, parallel, shard_degree=shard_degree)
    load_base(model, base, backend)
    materialize_buffers(model, ranks.device)
    reset_adapters(model.adapted_weights(), spec.adapter, seed=0)
    move_adapters_off_start(model)
    return model, backend


def move_adapters_off_start(model: CausalLM) -> None:
    """Give every B random values, so that the adapters are felt."""
    generator = torch.Generator().manual_seed(0)
    for _, weight in model.adapted_weights():
        for pair in weight.adapters.values():
            assert isinstance(pair, LoRAPair)
            pair.B.data.normal_(0, 0.05, generator=generator)


def differences(small: Architecture, folder: Path) -> Iterator[tuple[str, float]]:
    """Yield (name, difference) of every check of a saved model, in the order of `BOUNDS`."""
    theirs = load_theirs(small, folder)
    yield "weights", weights_difference(load_ours(small, folder, method="none")[0], theirs)
    ours, _ = load_ours(small, folder)
    weights = dict(dense_weights(ours, adapted=False))
    with torch.no_grad():
        for name, weight in weights.items():
            theirs.get_parameter(name).copy_(weight)
        yield from _forward_checks(ours, theirs)
    yield from _gradient_checks(ours, theirs)
    yield from _packing_checks(ours)
    yield "loss falls in three steps", _three_steps(ours)


def weights_difference(ours: CausalLM, theirs: Any) -> float:
    """Return the largest difference of a parameter or buffer of the text model; inf if one is missing."""
    adapters = adapter_parameters(ours)
    tensors = (*ours.named_parameters(), *ours.named_buffers())
    own = {ours.hf_name(name): tensor for name, tensor in tensors if name not in adapters}
    at, head = ours.architecture.decoder, ours.architecture.head
    inside = (f"{at}.", f"{head}.", *(f"{name}." for name in ours.architecture.head_form.beside))
    pairs = [
        (own.get(name), tensor)
        for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers())
        if name.startswith(inside)
    ]
    if any(given is None or given.shape != tensor.shape for given, tensor in pairs):
        return float("inf")
    return max(
        float((given.detach().double() - tensor.detach().double()).abs().max())
        for given, tensor in pairs
        if given is not None
    )


def dense_weights(ours: CausalLM, *, adapted: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the dequantized weights of the layers by transformers' names, with adapters' products if `adapted`."""
    for path, module in ours.named_modules():
        if not isinstance(module, FrozenTensor):
            continue
        weight = module.frozen_weight.dense(torch.float32)
        for pair in getattr(module, "pairs", ()) if adapted else ():
            if isinstance(pair, ExpertPair):
                product = pair.up() @ pair.down()
                product = product.mT if module.transposed else product
            else:
                product = pair.B @ pair.A
            weight = weight + pair.scaling * product
        yield ours.hf_name(f"{path}.weight"), weight


def relative_error(actual: Tensor, expected: Tensor, least: float = _TINY) -> float:
    """Return ||actual - expected|| / ||expected||, or over `least` where that is more."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(least))


def positions_of(input_ids: Tensor) -> Tensor:
    """Return the positions of rows of one document each."""
    return torch.arange(input_ids.shape[1]).expand_as(input_ids)


def logits_of(ours: CausalLM, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Return the logits (B, T, vocabulary) of rows with their adapters."""
    positions = positions_of(input_ids) if position_ids is None else position_ids
    return ours.head.logits(ours.hidden_states(input_ids, positions).flatten(0, 1)).view(*input_ids.shape, -1)


def mixes_tokens(small: Architecture) -> bool:
    """Return whether a layer mixes tokens by other means than softmax attention."""
    return any(weight.role == "mixer" for kind in small.kinds for weight in kind.weights)


def _forward_checks(ours: CausalLM, theirs: Any) -> Iterator[tuple[str, float]]:
    """Compare the base alone with transformers' model, and ours with itself."""
    small = ours.architecture
    tokens = functools.partial(random_tokens, 48, small.vocabulary)
    input_ids, none = tokens(rows=2), torch.full((2,), -1)
    decoder = theirs.get_submodule(small.decoder)
    hidden = ours.hidden_states(input_ids, positions_of(input_ids), none)
    expected = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    if small.has_experts or mixes_tokens(small):
        yield "forward of experts or mixers", relative_error(hidden, expected)
    else:
        yield "forward", float((hidden - expected).abs().max())
    ours.hidden_states(tokens(rows=2, seed=5), positions_of(input_ids), none)
    again = ours.hidden_states(input_ids, positions_of(input_ids), none)
    yield "repeated forward", float((hidden - again).abs().max())
    logits = theirs.get_submodule(small.causal)(input_ids=input_ids, use_cache=False).logits
    yield "logits", relative_error(ours.logits(input_ids, none), logits)
    labels = next_tokens(input_ids)
    chunks = zip(hidden.flatten(0, 1).split(7), labels.flatten().split(7), strict=True)
    losses = torch.cat([ours.head.token_losses(states, of_part) for states, of_part in chunks])
    yield (
        "head",
        relative_error(losses, F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")),
    )
    changed = torch.cat([input_ids[:, :-1], (input_ids[:, -1:] + 1) % small.vocabulary], dim=1)
    other = ours.hidden_states(changed, positions_of(input_ids), none)
    yield "causality", relative_error(other[:, :-1], again[:, :-1])
    alone = torch.cat([logits_of(ours, row[None]) for row in input_ids])
    yield "rows alone", relative_error(logits_of(ours, input_ids), alone)


def next_tokens(input_ids: Tensor) -> Tensor:
    """Return the labels of plain text."""
    return torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], IGNORED_LABEL)], dim=1)


def gradients_of(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each parameter, 0 where there is none."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    together = zip(parameters.items(), gradients, strict=True)
    return {name: torch.zeros_like(parameter) if g is None else g for (name, parameter), g in together}


def flat(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return all gradients in one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def _gradient_checks(ours: CausalLM, theirs: Any) -> Iterator[tuple[str, float]]:
    """Compare slices with the whole batch, and adapters with transformers' model whose weights contain them."""
    small = ours.architecture
    for seed in (3, 6, 9):
        input_ids = random_tokens(48, small.vocabulary, rows=4, seed=seed)
        output, expected = _of_theirs(ours, theirs, input_ids)
        with torch.no_grad():
            if relative_error(logits_of(ours, input_ids), output) <= 1e-3:
                break  # Otherwise rounding may have chosen another expert for a token.
    labels, parameters = next_tokens(input_ids), adapter_parameters(ours)

    def train(*, slices: int) -> tuple[Tensor, dict[str, Tensor]]:
        ours.set_num_micro(slices)
        for block in ours.blocks:
            block.checkpointing = slices > 1
        with torch.no_grad():
            logits = logits_of(ours, input_ids)
        gradients = gradients_of(ours(input_ids, positions_of(input_ids), labels).sum(), parameters)
        ours.set_num_micro(1)
        return logits, gradients

    sliced_logits, sliced = train(slices=2)
    logits, gradients = train(slices=1)
    yield "slices", relative_error(sliced_logits, logits)
    yield "sliced gradients", relative_error(flat(sliced), flat(gradients))
    name = "gradients of mixers" if mixes_tokens(small) else "gradients"
    of_logits, of_gradients = amplifications(ours, theirs, input_ids)
    yield "adapters", relative_error(logits, output) / of_logits
    yield name, largest_error(gradients, expected) / of_gradients
    yield "adapters without a gradient", float(sum(not gradient.any() for gradient in gradients.values()))


def _of_theirs(
    ours: CausalLM, theirs: Any, input_ids: Tensor, *, noise: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and adapters' gradients of transformers' model with our weights, moved by relative noise."""
    generator, prefix = torch.Generator().manual_seed(0), f"{ours.architecture.causal}."
    weights = {
        name.removeprefix(prefix): weight * (1 + noise * torch.randn(weight.shape, generator=generator))
        for name, weight in dense_weights(ours, adapted=True)
    }
    causal, inputs = theirs.get_submodule(ours.architecture.causal), {"input_ids": input_ids, "use_cache": False}
    output = functional_call(causal, weights, kwargs=inputs).logits.float()
    loss = F.cross_entropy(output.flatten(0, 1), next_tokens(input_ids).flatten(), reduction="sum")
    return output, gradients_of(loss, adapter_parameters(ours))


def amplifications(ours: CausalLM, theirs: Any, input_ids: Tensor) -> tuple[float, float]:
    """Return the `_amplification` of logits and of gradients in transformers' model with our weights."""
    name = "gradients of mixers" if mixes_tokens(ours.architecture) else "gradients"
    (logits, gradients), (moved, of_moved) = (_of_theirs(ours, theirs, input_ids, noise=n) for n in (0.0, _EPS))
    return (
        _amplification("adapters", relative_error(moved, logits)),
        _amplification(name, largest_error(of_moved, gradients)),
    )


def largest_error(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative error of a gradient; small ones, which are mostly rounding, count by the largest."""
    least = 1e-2 * max(float(gradient.norm()) for gradient in expected.values())
    return max(relative_error(gradients[name], expected[name], least) for name in expected)


def _amplification(name: str, rounding: float) -> float:
    """Return by how much a model amplifies rounding more than usual, at least 1; differences are divided by it.

    `rounding`: the difference that weights moved by their last bit make in one and the same model. It is within a
    quarter of the bound but where scores or norms are sharp (Gemma 4's are not scaled), and predicts ours within 2.
    """
    return max(1.0, rounding / (BOUNDS[name][0] / 4))


def _packing_checks(ours: CausalLM) -> Iterator[tuple[str, float]]:
    """Compare documents in one sequence, or each padded in a sequence of its own, with documents alone."""
    parameters, vocabulary = adapter_parameters(ours), ours.architecture.vocabulary
    documents = [random_tokens(length, vocabulary, seed=seed) for seed, length in enumerate(_LENGTHS, start=10)]
    labels = [document.flip(1) for document in documents]

    def loss(input_ids: Tensor, position_ids: Tensor, of: Tensor) -> Tensor:
        return ours(input_ids, position_ids, of).sum()

    if ours.architecture.documents == "single":
        rows = [F.pad(document, (0, 48 - document.shape[1]), value=7) for document in documents]
        places = [torch.cat([torch.arange(n), torch.arange(48 - n)])[None] for n in _LENGTHS]
        with torch.no_grad():
            padded = logits_of(ours, torch.cat(rows), torch.cat(places))
            one_by_one = [logits_of(ours, document)[0] for document in documents]
        parts = [row[:length] for row, length in zip(padded, _LENGTHS, strict=True)]
        yield "one document per sequence", relative_error(torch.cat(parts), torch.cat(one_by_one))
        return
    positions = torch.cat([positions_of(document) for document in documents], dim=1)
    together = torch.cat(documents, dim=1)
    with torch.no_grad():
        one_by_one = [logits_of(ours, document) for document in documents]
        yield "packed documents", relative_error(logits_of(ours, together, positions), torch.cat(one_by_one, dim=1))
    packed = loss(together, positions, torch.cat(labels, dim=1))

    def one_by_one_loss() -> Tensor:
        return torch.stack([loss(d, positions_of(d), of) for d, of in zip(documents, labels, strict=True)]).sum()

    alone = one_by_one_loss()
    yield "packed loss", relative_error(packed, alone)
    expected = flat(gradients_of(alone, parameters))
    difference = relative_error(flat(gradients_of(packed, parameters)), expected)
    if difference > BOUNDS["packed gradients"][0]:
        difference /= packed_amplification(one_by_one_loss, parameters, expected)
    yield "packed gradients", difference


def packed_amplification(loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], expected: Tensor) -> float:
    """Return the `_amplification` of packed gradients. `expected`: the gradient of `loss()`, flat."""
    generator, before = torch.Generator().manual_seed(0), [parameter.data for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.data = parameter * (1 + _EPS * torch.randn(parameter.shape, generator=generator))
    rounding = relative_error(flat(gradients_of(loss(), parameters)), expected)
    for parameter, data in zip(parameters.values(), before, strict=True):
        parameter.data = data
    return _amplification("packed gradients", rounding)


def _three_steps(ours: CausalLM) -> float:
    """Return the change of a batch's loss, relative to it, by three steps of AdamW."""
    input_ids = random_tokens(48, ours.architecture.vocabulary, rows=4, seed=4)
    optimizer = torch.optim.AdamW(adapter_parameters(ours).values(), lr=2e-3, eps=1e-5, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = ours(input_ids, positions_of(input_ids), next_tokens(input_ids)).sum() / input_ids.numel()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[-1] / losses[0] - 1
