"""Run a shrunk model on the CPU to learn what its modules do not tell: what is called, what mixes tokens, what leaks.

Letters: T tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from distlora.architecture.checkpoint_files import hf_config_of, refused_by_transformers
from distlora.architecture.spec import Architecture, LayerKind, Weight
from distlora.config import UserError
from distlora.derive.fusible import fusible
from distlora.derive.linears import (
    LinearUse,
    Mixing,
    is_peft_parameter,
    linear_calls,
    peft_reasons,
    role_of,
    router_linears,
    token_mixers,
)
from distlora.derive.memory import with_memory
from distlora.derive.shrink import is_size
from distlora.derive.structure import structure
from distlora.model.adapters import BlockContext, Rows
from distlora.model.attention import LONGEST, Documents, reference, use
from distlora.model.by_document import ByDocument, DocumentRows
from distlora.model.experts import find_routers
from distlora.model.head_form import head_form, tail_of
from distlora.model.hf_model import auto_class_of, calls_of, transformers_model
from distlora.model.layer_wrapper import argument_names, batch_dims
from distlora.model.packed_masks import masks_of_documents
from distlora.model.paged_cache import BLOCK, CacheStep, PagedCache, cache_name

LENGTHS = (11, 1, 19)
"""Documents of a packed sequence. Two are longer than the windows of a shrunk model."""
_TOKENS = 53
"""Tokens of a sequence: more than any window of a shrunk model, and no other size of it."""
_CLOSE = 1e-5
"""Largest difference of two results that a different order of sums explains, relative to the largest value in fp32."""

_UNFIT = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)
"""Exceptions by which a model's code shows that it cannot run in the way that was tried."""


def probe(config: Mapping[str, Any], place: str, *, seed: int = 0) -> Architecture:
    """Return the architecture of a shrunk model from the content of its config.json, with what running it tells.

    `seed`: of its random weights.

    Raises UserError if the model is not causal, or a property of it is not supported.
    """
    hf_config = hf_config_of(config, place)
    auto_class = auto_class_of(hf_config, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers_model(
            hf_config, place, auto_class=auto_class, attention="eager", dtype=torch.float32, device="cpu"
        )
        move_off_start(model)
    architecture = structure(model, auto_class=auto_class, kinds={})
    decoder, causal = model.get_submodule(architecture.decoder), model.get_submodule(architecture.causal)
    layers = decoder.get_submodule(architecture.layers)
    input_ids = random_tokens(_TOKENS, architecture.vocabulary)
    with refused_by_transformers(place):  # What a model does at its first call counts.
        uses = linear_calls(model, lambda: causal(input_ids=input_ids, use_cache=False).logits.float().square().mean())
        _check_causal(decoder, input_ids, architecture)
    with torch.no_grad():
        mixers = token_mixers(layers, lambda: decoder(input_ids=input_ids, use_cache=False), _TOKENS)
        attention = _attention(decoder, input_ids)
        kinds = [
            _with_uses(kind, architecture, model, architecture.kind_of_layer.index(number), uses, mixers)
            for number, kind in enumerate(architecture.kinds)
        ]
        kinds = _with_mlp_halves(kinds, architecture, decoder, input_ids, mixers)
        kinds = _with_batch_dims(kinds, architecture, decoder)
        documents, apart = _documents(architecture, decoder)
        kinds = [dataclasses.replace(kind, apart=apart[number]) for number, kind in enumerate(kinds)]
        architecture = dataclasses.replace(
            architecture,
            kinds=tuple(kinds),
            norm=tail_of(decoder, architecture.layers, {"input_ids": input_ids, "use_cache": False}),
            attention=attention,
            documents=documents,
            varlen=attention == "sdpa" and not _attends_apart(kinds) and _takes_varlen(architecture, decoder),
            takes_embeddings=_takes_embeddings(decoder, input_ids),
            looks_up=architecture.looks_up and _looks_up(decoder, input_ids),
            takes_cache=_takes_cache(decoder, architecture.vocabulary),
            pages_cache=attention == "sdpa" and _pages_cache(decoder, architecture.vocabulary),
            head_form=head_form(causal, architecture.decoder_in_causal, is_size),
        )
        model = transformers_model(
            hf_config, place, auto_class=auto_class, attention=attention, dtype=torch.bfloat16, device="cpu"
        )
        decoder = model.get_submodule(architecture.decoder)
        architecture = _without_fp32_linears(architecture, model)
        architecture = dataclasses.replace(architecture, **fusible(decoder, input_ids))
    try:
        return dataclasses.replace(architecture, kinds=with_memory(architecture, decoder))
    except _UNFIT as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{architecture.model_type} has layers that cannot run in bf16 ({reason}); set {{model.path}} to "
            "another model"
        ) from error


def _without_fp32_linears(architecture: Architecture, model: Any) -> Architecture:
    """Return the architecture with linears dense that transformers keeps in fp32 in a bf16 model."""

    def in_its_dtype(number: int, weight: Weight) -> Weight:
        path = f"{architecture.layer_prefix}{architecture.kind_of_layer.index(number)}.{weight.path}"
        keeps = weight.kind == "linear" and model.get_parameter(path).dtype == torch.float32
        return dataclasses.replace(weight, kind="dense", role="") if keeps else weight

    return dataclasses.replace(
        architecture,
        kinds=tuple(
            dataclasses.replace(kind, weights=tuple(in_its_dtype(number, weight) for weight in kind.weights))
            for number, kind in enumerate(architecture.kinds)
        ),
    )


def _attends_apart(kinds: Sequence[LayerKind]) -> bool:
    """Return whether a module that runs documents apart has softmax attention, to which whole rows mean nothing."""
    return any(
        weight.role == "attention" and f"{weight.path}.".startswith(tuple(f"{path}." for path in kind.apart))
        for kind in kinds
        for weight in kind.weights
        if kind.apart
    )


@torch.no_grad()
def move_off_start(model: nn.Module) -> None:
    """Change every parameter and stored buffer, so that a missing one is seen."""
    names = set(model.state_dict())
    tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if name in names}
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dim() < 2:
            tensor.copy_(tensor * (1 + 0.2 * torch.randn_like(tensor)) + 0.1 * torch.randn_like(tensor))


def random_tokens(length: int, vocabulary: int, *, rows: int = 1, seed: int = 1) -> Tensor:
    """Return (rows, length) int64 random tokens, without the special ones."""
    return torch.randint(5, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def _differ(actual: Tensor, expected: Tensor, tolerance: float = _CLOSE) -> bool:
    return bool((actual - expected).abs().max() > tolerance * expected.abs().max())


@torch.no_grad()
def _check_causal(decoder: Any, input_ids: Tensor, architecture: Architecture) -> None:
    model_type = architecture.model_type
    whole = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    changed = torch.cat([input_ids[:, :-1], (input_ids[:, -1:] + 1) % architecture.vocabulary], dim=1)
    other = decoder(input_ids=changed, use_cache=False).last_hidden_state
    if _differ(decoder(input_ids=input_ids, use_cache=False).last_hidden_state, whole):
        raise UserError(
            f"{model_type} keeps something from one batch to the next, so its results depend on the batches before; "
            "set {model.path} to another model"
        )
    if _differ(other[:, :-1], whole[:, :-1]):
        raise UserError(
            f"{model_type} is not causal with this config.json: a token's output changes with the tokens after it; set "
            "{model.path} to a causal model"
        )


def _attention(decoder: Any, input_ids: Tensor) -> Literal["sdpa", "eager"]:
    """Return the fastest of transformers' attention implementations that computes what the eager one does."""
    expected = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    try:
        decoder.set_attn_implementation("sdpa")
        same = decoder.config._attn_implementation == "sdpa"  # Otherwise transformers has only warned.
        same = same and not _differ(decoder(input_ids=input_ids, use_cache=False).last_hidden_state, expected)
    except (ValueError, ImportError):  # transformers' word for a model without it.
        same = False
    if not same:
        decoder.set_attn_implementation("eager")
    return "sdpa" if same else "eager"


def _with_uses(
    kind: LayerKind,
    architecture: Architecture,
    model: Any,
    index: int,
    uses: Mapping[str, LinearUse],
    mixers: Sequence[Mapping[str, Mixing]],
) -> LayerKind:
    """Return a kind of layer with the use and the role of each weight. `index` is that of the first such layer."""
    prefix = f"{architecture.layer_prefix}{index}."
    modules = [weight.path.rpartition(".")[0] for weight in kind.weights if weight.kind in ("linear", "experts")]
    peft = peft_reasons(model, [prefix + path for path in modules])
    routers = router_linears(model)

    def with_use(weight: Weight) -> Weight:
        path = prefix + weight.path.rpartition(".")[0]
        if weight.kind == "experts":
            return dataclasses.replace(weight, role="experts", no_adapter=peft.get(path, ""))
        if weight.kind != "linear":
            return weight
        if uses[path].stays or path in routers:
            return dataclasses.replace(weight, kind="dense", no_adapter=uses[path].stays)
        return dataclasses.replace(
            weight,
            role=role_of(weight.path, mixers[index]),
            no_adapter=uses[path].no_adapter or peft.get(path, ""),
            peft_parameter=is_peft_parameter(model.config.model_type, path),
        )

    experts = kind.experts
    if experts is not None:
        router = next(iter(find_routers(model, model.get_submodule(prefix.removesuffix(".")))), "")
        experts = dataclasses.replace(experts, router=router)
    weights = tuple(map(with_use, kind.weights))
    attends = not any(weight.role == "mixer" for weight in weights) or any(w.role == "attention" for w in weights)
    return dataclasses.replace(kind, weights=weights, experts=experts, heads=kind.heads if attends else None)


def _with_mlp_halves(
    kinds: Sequence[LayerKind],
    architecture: Architecture,
    decoder: Any,
    input_ids: Tensor,
    mixers: Sequence[Mapping[str, Mixing]],
) -> list[LayerKind]:
    """Return the kinds with the paths of their MLPs and the norms around them.

    A half qualifies if the layer calls a norm, the MLP on the norm's output, possibly a norm on the MLP's output, and
    adds the result to the first norm's input.
    """
    layers = decoder.get_submodule(architecture.layers)
    names = {
        module: (index, name)
        for index, layer in enumerate(layers)
        for name, module in (("", layer), *layer.named_children())
        if not isinstance(module, nn.Dropout)  # It returns its input, as no gradient is computed.
    }
    calls: dict[tuple[int, str], tuple[Any, Any]] = {}
    for call in calls_of(names, lambda: decoder(input_ids=input_ids, use_cache=False)):
        calls.setdefault(names[call.module], (call.args[:1], call.output))
    result = []
    for number, kind in enumerate(kinds):
        index = architecture.kind_of_layer.index(number)
        called = {name: call for (at, name), call in calls.items() if at == index}
        _, output = called.pop("", (None, None))
        result.append(dataclasses.replace(kind, mlp=_mlp_half(called, output, kind, mixers[index])))
    return result


def _with_batch_dims(kinds: Sequence[LayerKind], architecture: Architecture, decoder: Any) -> list[LayerKind]:
    """Return the kinds with the arguments of a layer whose batch is not their first dimension."""
    layers = decoder.get_submodule(architecture.layers)
    calls: dict[nn.Module, list[tuple[int, dict[str, Any]]]] = {layer: [] for layer in layers}
    for rows in (2, 3):
        input_ids = random_tokens(_TOKENS, architecture.vocabulary, rows=rows)
        for call in calls_of(layers, functools.partial(decoder, input_ids=input_ids, use_cache=False)):
            arguments = dict(zip(argument_names(call.module), call.args, strict=False)) | call.kwargs
            calls[call.module].append((rows, arguments))
    try:
        dims = [batch_dims(calls[layers[architecture.kind_of_layer.index(number)]]) for number in range(len(kinds))]
    except TypeError as error:
        raise UserError(f"{architecture.model_type} has layers whose batch cannot be sliced: {error}") from error
    return [dataclasses.replace(kind, batch_dims=tuple(own.items())) for kind, own in zip(kinds, dims, strict=True)]


def _mlp_half(
    calls: Mapping[str, tuple[Any, Any]], output: Any, kind: LayerKind, mixers: Mapping[str, Mixing]
) -> tuple[str, str | None, str | None] | None:
    roles = {weight.path.partition(".")[0]: weight.role for weight in kind.weights if weight.role}
    output = output[0] if isinstance(output, tuple) else output
    for name, (arguments, product) in calls.items():
        if roles.get(name) not in ("mlp", "experts") or not arguments:
            continue
        product = product[0] if isinstance(product, tuple) else product
        if sum(bool(given) and given[0] is arguments[0] for given, _ in calls.values()) > 1:
            continue  # Attention reads the same norm, and its output may be added to the MLP's in place (Falcon).
        before = [n for n, (_, made) in calls.items() if made is arguments[0]]
        after = [n for n, (given, _) in calls.items() if given and given[0] is product]
        if len(before) != 1 or len(after) > 1 or {*before, *after} & {*roles, *mixers}:  # More than norms.
            continue
        (states,) = calls[before[0]][0]
        half = calls[after[0]][1] if after else product
        if isinstance(output, Tensor) and half.shape == states.shape and torch.equal(states + half, output):
            return name, before[0], after[0] if after else None
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """A packed sequence, and its documents alone."""

    input_ids: Tensor
    """(1, T)."""
    position_ids: Tensor

    @classmethod
    def of(cls, vocabulary: int) -> _Packed:
        """Return random documents of LENGTHS."""
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        return cls(random_tokens(sum(LENGTHS), vocabulary, seed=2), positions[None])

    def alone(self) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Yield (place in the sequence, arguments of a decoder) of each document."""
        for start, end in itertools.pairwise(itertools.accumulate(LENGTHS, initial=0)):
            span = slice(start, end)
            yield span, {"input_ids": self.input_ids[:, span], "position_ids": self.position_ids[:, span]}


def _documents(
    architecture: Architecture, decoder: Any
) -> tuple[Literal["positions", "masks", "single"], list[tuple[str, ...]]]:
    """Return how packed documents are kept apart, and by kind of layer the modules that must run each by itself."""
    packed = _Packed.of(architecture.vocabulary)
    inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    layers = decoder.get_submodule(architecture.layers)
    alone = [decoder(**arguments, use_cache=False).last_hidden_state for _, arguments in packed.alone()]
    expected = torch.cat(alone, dim=1)

    def leaks(**masks: Any) -> bool | None:
        try:
            return _differ(decoder(**inputs, **masks, use_cache=False).last_hidden_state, expected)
        except _UNFIT:
            return None  # It takes no such mask, or a module's arguments or outputs cannot be cut.

    nothing: list[tuple[str, ...]] = [()] * len(architecture.kinds)
    by_positions = leaks()
    if by_positions is False:
        return "positions", nothing
    masks = masks_of_documents(decoder, packed.position_ids)
    if masks is not None and leaks(attention_mask=masks) is False:
        return "masks", nothing
    if by_positions is None:
        return "single", nothing
    context = BlockContext()
    context.rows = Rows(packed=DocumentRows.of(packed.position_ids))
    singles = [(span, _record(decoder, layers, arguments)) for span, arguments in packed.alone()]
    apart: list[list[str]] = [[] for _ in architecture.kinds]
    whole: set[tuple[int, str]] = set()
    """(Kind, path) of modules that cannot run on a part of a sequence."""
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        while leaks():
            leaking = _leaking(layers, _record(decoder, layers, inputs), singles)
            chosen = next(
                (at for i, path in leaking if (at := (architecture.kind_of_layer[i], path)) not in whole), None
            )
            if chosen is None:
                return "single", nothing
            kind, path = chosen
            replaced = [
                (layer, path, layer.get_submodule(path))
                for index, layer in enumerate(layers)
                if architecture.kind_of_layer[index] == kind
            ]
            for layer, _, module in replaced:
                layer.set_submodule(path, ByDocument(module, context))
            if leaks() is None:  # The module around it may do.
                for layer, _, module in replaced:
                    layer.set_submodule(path, module)
                whole.add(chosen)
            else:
                apart[kind] = [*(inner for inner in apart[kind] if not inner.startswith(f"{path}.")), path]
                originals += replaced
    finally:
        for layer, path, module in reversed(originals):
            layer.set_submodule(path, module)
    return "positions", [tuple(paths) for paths in apart]


_Calls = dict[nn.Module, tuple[Tensor, Tensor]]
"""First input and output of each module that takes and returns states."""


def _record(decoder: Any, layers: nn.Module, arguments: Mapping[str, Any]) -> _Calls:
    seen: _Calls = {}
    for call in calls_of(layers.modules(), functools.partial(decoder, **arguments, use_cache=False)):
        values = (*call.args, *call.kwargs.values())
        given = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
        made = call.output[0] if isinstance(call.output, tuple) else call.output
        if given is not None and isinstance(made, Tensor):
            seen.setdefault(call.module, (given, made))
    return seen


def _leaking(layers: nn.ModuleList, together: _Calls, alone: Sequence[tuple[slice, _Calls]]) -> list[tuple[int, str]]:
    """Return (layer, path in it) of the modules that first make documents differ from them alone, inner ones first.

    Their input is that of each document alone, and their output is not.
    """

    def same(module: nn.Module, which: int) -> bool | None:
        if module not in together:
            return None
        whole = together[module][which]
        at = next((d for d in range(whole.dim()) if whole.shape[d] == sum(LENGTHS)), None)
        for span, single in alone:
            if at is None or module not in single:
                return None
            single_value, place = single[module][which], whole.narrow(at, span.start, span.stop - span.start)
            if single_value.shape != place.shape:
                return None
            if _differ(place, single_value):
                return False
        return True

    leaking = [
        (index, path)
        for index, layer in enumerate(layers)
        for path, module in layer.named_modules()
        if path and not isinstance(module, ByDocument) and same(module, 0) and same(module, 1) is False
    ]
    return sorted(leaking, key=lambda module_at: (module_at[0], -module_at[1].count("."), module_at[1]))


def _takes_varlen(architecture: Architecture, decoder: Any) -> bool:
    """Return whether variable-length attention computes what the decoder's own does on packed documents."""
    if architecture.documents != "positions":
        return False
    packed = _Packed.of(architecture.vocabulary)
    inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
    expected = decoder(**inputs).last_hidden_state
    documents = Documents.of(packed.position_ids)
    try:
        use(decoder, reference, name="distlora_probe")
        output = decoder(**inputs, attention_mask=documents.starts, **{LONGEST: documents.longest}).last_hidden_state
        return not _differ(output, expected)
    except _UNFIT:
        return False  # Its masks are more than what attention passes on.
    finally:
        decoder.set_attn_implementation("sdpa")


def _takes_embeddings(decoder: Any, input_ids: Tensor) -> bool:
    """Return whether changed embeddings give what they give if the decoder makes them from token ids itself."""
    embedding = decoder.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, arguments, output: 1.5 * output)
    try:
        expected = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        output = decoder(inputs_embeds=embedding(input_ids), use_cache=False).last_hidden_state
        return not _differ(output, expected)
    except _UNFIT:
        return False  # It looks for the tokens of the embeddings, or takes none.
    finally:
        hook.remove()


def _looks_up(decoder: Any, input_ids: Tensor) -> bool:
    """Return whether looking rows up gives what the embedding gives, and the decoder reads its matrix nowhere else."""
    embedding = decoder.get_input_embeddings()
    expected = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    matrix = embedding.weight.clone()
    hook = embedding.register_forward_hook(
        lambda module, arguments, output: nn.functional.embedding(arguments[0], matrix)
    )
    embedding.weight.neg_()
    try:
        return not _differ(decoder(input_ids=input_ids, use_cache=False).last_hidden_state, expected)
    except _UNFIT:
        return False
    finally:
        hook.remove()
        embedding.weight.copy_(matrix)


def _takes_cache(decoder: Any, vocabulary: int) -> bool:
    """Return whether tokens that follow a left-padded batch in transformers' cache equal those of whole sequences."""
    rows, padding = random_tokens(_TOKENS, vocabulary, rows=2), 7
    mask = torch.ones_like(rows)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = [decoder(input_ids=row, use_cache=False).last_hidden_state for row in (rows[:1], rows[1:, padding:])]
    cached = {cache_name(decoder): DynamicCache(config=decoder.config), "use_cache": True}
    try:
        for start, end in itertools.pairwise((0, *range(_TOKENS - 3, _TOKENS + 1))):
            known = {"position_ids": positions[:, start:end], "attention_mask": mask[:, :end], **cached}
            output = decoder(input_ids=rows[:, start:end], **known).last_hidden_state
        return not _differ(output[:, -1], torch.cat([row[:, -1] for row in whole]))
    except _UNFIT:
        return False  # It has a cache of its own, or none.


def _pages_cache(decoder: Any, vocabulary: int) -> bool:
    """Return whether tokens that follow rows of two lengths in a paged cache equal those of whole sequences."""
    rows, lengths, end = random_tokens(_TOKENS, vocabulary, rows=2), (_TOKENS - 3, _TOKENS - 8), _TOKENS - 3
    blocks = -(-_TOKENS // BLOCK)
    tables = torch.arange(2 * blocks).flip(0).view(2, blocks)

    def places(row: int, at: Tensor) -> Tensor:
        return tables[row, at // BLOCK] * BLOCK + at % BLOCK

    cache, name = PagedCache(2 * blocks), cache_name(decoder)
    known = {name: cache, "use_cache": True}
    started = [torch.arange(length) for length in lengths]
    prompts = CacheStep(
        torch.cat([places(*each) for each in enumerate(started)]), torch.cat([started[0], end + started[1]])
    )
    try:
        with cache.attending(decoder):
            with cache.step(prompts):
                decoder(input_ids=rows[:, :end], position_ids=torch.arange(end).expand(2, -1), **known)
            for number in range(3):
                at = torch.tensor(lengths) + number
                step = CacheStep(
                    torch.cat([places(row, at[row : row + 1]) for row in range(2)]), at[:0], tables, at + 1, end + 3
                )
                given = {"input_ids": rows.gather(1, at[:, None]), "position_ids": at[:, None]}
                with cache.step(step):
                    output = decoder(**given, **known).last_hidden_state
        whole = [
            decoder(input_ids=row[None, : length + 3], use_cache=False).last_hidden_state[:, -1:]
            for row, length in zip(rows, lengths, strict=True)
        ]
        return not _differ(output, torch.cat(whole))
    except _UNFIT:
        return False  # Its layers share keys, cap scores, keep states, or have a cache of their own.
