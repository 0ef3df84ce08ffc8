"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, without importing PEFT."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from distlora.architecture.safetensors_headers import SINGLE_NAME
from distlora.architecture.targets import match_ending, peft_paths, peft_pattern, select_targets
from distlora.architecture.tokens import EMBEDDING
from distlora.config import AdapterConfig, ModelSpec, UserError
from distlora.loading.tensor_files import DeferredTensor
from distlora.model.adapters import DEFAULT_ADAPTER, LoRAPair, TokenRows
from distlora.model.build import CausalLM
from distlora.model.experts import ExpertPair
from distlora.model.frozen_linear import FrozenLinear
from distlora.model.lm_head import SCORE, RewardHead
from distlora.parallel import Backend, whole_shape
from distlora.weights.peft_folder import (
    CONFIG_NAME,
    NF4_MARK,
    WEIGHTS_NAME,
    PeftAdapter,
    check_fits,
    check_quantization,
    copies_differ,
    read_peft_adapter,
)
from distlora.weights.peft_modules import check_modules, check_rows

_PREFIX = "base_model.model."


def weight_files(model: CausalLM, spec: ModelSpec, adapter: str = DEFAULT_ADAPTER) -> dict[str, Any]:
    """Return the files of a checkpoint with trained weights: an adapter in PEFT's format, or the whole model.

    PiSSA's adapter belongs to the base without the run's initial adapter.
    """
    if spec.adapter.method == "full":
        return {SINGLE_NAME: model.hf_state_dict()}
    return {CONFIG_NAME: adapter_config(spec, model, adapter), WEIGHTS_NAME: stored_tensors(model, adapter)}


def header_marks(adapter: AdapterConfig) -> dict[str, str]:
    """Return the header metadata of a run's adapter: a mark if it belongs to the NF4 base only."""
    return NF4_MARK if adapter.for_nf4 else {}


def adapter_tensors(model: CausalLM, adapter: str = DEFAULT_ADAPTER) -> dict[str, nn.Parameter]:
    """Return one adapter's parameters by PEFT's names.

    The names are base_model.model.<path>.lora_A.weight (r, in), lora_B.weight (out, r) and with DoRA
    lora_magnitude_vector (out,). A fused weight of E experts has (E * r, in) and (out, E * r), under the path of its
    module. Trained token rows are <path>.token_adapter.trainable_tokens_delta (tokens, hidden), the rows themselves.
    Modules trained whole are <path>.weight, and a reward model's head is score.weight.
    """
    tensors: dict[str, nn.Parameter] = {}
    paths = peft_paths([path for path, _ in model.adapted_experts(adapter)])
    for path, weight in model.adapted_modules(adapter):
        pair = weight.adapters[adapter]
        assert isinstance(pair, LoRAPair)
        place = paths.get(path, path)
        tensors[f"{_PREFIX}{place}.lora_A.weight"] = pair.A
        tensors[f"{_PREFIX}{place}.lora_B.weight"] = pair.B
        if pair.magnitude is not None:
            tensors[f"{_PREFIX}{place}.lora_magnitude_vector"] = pair.magnitude
    for matrix, rows in model.token_rows.items():
        assert isinstance(rows, TokenRows)
        path = model.architecture.embedding_path if matrix == EMBEDDING else model.architecture.head
        tensors[f"{_PREFIX}{path}.token_adapter.trainable_tokens_delta"] = rows.rows
    for path, parameter in whole_modules(model).items():
        tensors[f"{_PREFIX}{path}.weight"] = parameter
    if isinstance(model.head, RewardHead):
        tensors |= {f"{_PREFIX}{SCORE}.{name}": parameter for name, parameter in model.head.named_parameters()}
    return tensors


def shared_factors(model: CausalLM, adapter: str = DEFAULT_ADAPTER) -> dict[str, ExpertPair]:
    """Return the adapters whose experts share a factor, by its name in `adapter_tensors`."""
    paths = peft_paths([path for path, _ in model.adapted_experts(adapter)])
    pairs = ((paths[path], weight.adapters[adapter]) for path, weight in model.adapted_experts(adapter))
    return {
        f"{_PREFIX}{place}.lora_{pair.shared}.weight": pair
        for place, pair in pairs
        if isinstance(pair, ExpertPair) and pair.shared is not None
    }


def stored_tensors(model: CausalLM, adapter: str = DEFAULT_ADAPTER) -> dict[str, Tensor | DeferredTensor]:
    """Return `adapter_tensors` in PEFT's layout, which has no shared factors: of one, a copy per expert.

    The copies are those of its present value, and made when they are written.
    """
    tensors: dict[str, Tensor | DeferredTensor] = dict(adapter_tensors(model, adapter))
    for name, pair in shared_factors(model, adapter).items():
        value = pair.get_parameter(str(pair.shared)).detach().clone()
        make = functools.partial(_copies, pair, value)
        tensors[name] = DeferredTensor(shape=torch.Size(pair.shape_of_copies), dtype=value.dtype, make=make)
    return tensors


def _copies(pair: ExpertPair, value: Tensor) -> Tensor:
    return pair.copies_of(value.cpu())


def shared_value(pair: ExpertPair, copies: Tensor, place: str) -> Tensor:
    """Return the shared factor from its copies in a file. Raises UserError with `place` if they differ."""
    value = pair.one_of(copies)
    if value is None:
        raise copies_differ(place)
    return value


def whole_modules(model: CausalLM) -> dict[str, nn.Parameter]:
    """Return the weights that are trained whole, by the Hugging Face paths of their modules."""
    if not model.modules_to_save:
        return {}
    weights = {
        model.architecture.embedding_path: model.embedding.get_parameter("weight"),
        model.architecture.head: model.head.weight,
    }
    return {path: weight for path, weight in weights.items() if path.rpartition(".")[2] in model.modules_to_save}


@torch.no_grad()
def load_peft_adapter(
    model: CausalLM, settings: AdapterConfig, quant_method: str, backend: Backend, adapter: str = DEFAULT_ADAPTER
) -> None:
    """Fill one adapter from the folder `settings.init_from`, widened to fp32.

    Raises UserError for a folder that is missing, an adapter that is not exactly the model's, and NaN or Inf.
    """
    assert settings.init_from is not None
    head = model.head if isinstance(model.head, RewardHead) else None
    initial = read_peft_adapter(settings.init_from, labels=0 if head is None else len(head.weight))
    check_quantization(initial, quant_method)
    initial = check_fits(initial, settings, model.architecture)
    file = initial.folder / WEIGHTS_NAME
    with safetensors.safe_open(file, framework="pt") as tensors:
        whole = {of.name for of in (*initial.modules.values(), *([initial.score] if initial.score else ()))}
        stored = {name: tensors.get_tensor(name) for name in tensors.keys() if name not in whole}  # noqa: SIM118
    for name, tensor in stored.items():
        _check_finite(file, name, tensor)
    experts = model.architecture.experts_by_path
    for path in initial.transposed:
        a, b = (initial.names[path, part] for part in "AB")
        stored[a], stored[b] = transposed_factors(stored[a], stored[b], experts[path])
    for path, weight in model.adapted_weights(adapter):
        pair = weight.adapters[adapter]
        assert isinstance(pair, LoRAPair)
        for part, parameter in pair.named_parameters():
            name = initial.names[path, part]
            value = stored[name]
            if isinstance(pair, ExpertPair) and pair.shared == part:
                value = shared_value(pair, value, f"{file}: {name}")
            parameter.copy_(value)
    check_rows(initial.token_rows, file, stored=model.vocabulary.stored, hidden=whole_shape(model.head.weight)[1])
    for matrix, from_file in initial.token_rows.items():
        rows = model.rows_of(matrix)
        if rows is None:  # Of a tied head, which has the embedding's.
            continue
        # Rows of this run's new tokens keep their initial values.
        rows.rows[[rows.ids.index(id) for id in from_file.ids]] = stored[from_file.name].to(rows.rows)
    vocabulary, modules = model.vocabulary, whole_modules(model)
    heights = (vocabulary.stored, vocabulary.rows)
    check_modules(initial.modules, file, rows=heights, hidden=whole_shape(model.head.weight)[1])
    by_name = {path.rpartition(".")[2]: weight for path, weight in modules.items()}
    with safetensors.safe_open(file, framework="pt") as tensors:
        parts = () if head is None or initial.score is None else head.named_parameters()
        for name, parameter in ((f"{_PREFIX}{SCORE}.{part}", parameter) for part, parameter in parts):
            value = tensors.get_tensor(name) if name in tensors.keys() else parameter.new_empty(0)  # noqa: SIM118
            _check_finite(file, name, value)
            if value.shape != parameter.shape:
                shapes = f"{list(value.shape)}, and the model's has {list(parameter.shape)}"
                raise UserError(f"{file}: {name} has shape {shapes}; set another {{adapter.init_from}}")
            parameter.copy_(value)
        for module, of in initial.modules.items():
            local, first = backend.local_rows(by_name[module])
            rank_rows = tensors.get_slice(of.name)[first : min(first + len(local), of.shape[0])]
            _check_finite(file, of.name, rank_rows)
            local[: len(rank_rows)] = rank_rows  # Rows of the run's new tokens keep their initial values.


@torch.no_grad()
def values_beside(model: CausalLM, beside: PeftAdapter) -> dict[nn.Parameter, Tensor]:
    """Return A and B of a teacher or a reward model (`read_adapter_beside`), to compute with instead of the run's.

    They may have any rank; B takes the ratio of the two scales. What the folder does not adapt has zeros.
    """
    settings, file = beside.adapter_config, beside.folder / WEIGHTS_NAME
    values: dict[nn.Parameter, Tensor] = {}
    with safetensors.safe_open(file, framework="pt") as tensors:
        for path, weight in model.adapted_weights():
            pair = weight.adapters[DEFAULT_ADAPTER]
            assert isinstance(pair, LoRAPair)
            for part, parameter in (("A", pair.A), ("B", pair.B)):
                if (name := beside.names.get((path, part))) is None:
                    values[parameter] = torch.zeros_like(parameter)
                    continue
                _check_finite(file, name, stored := tensors.get_tensor(name))
                factor = settings.scaling_of(path) / pair.scaling if part == "B" else 1
                values[parameter] = stored.to(parameter) * factor
    return values


def _check_finite(file: Path, name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{file}: {name} holds NaN or Inf; set {{adapter.init_from}} to another adapter")


def transposed_factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return A and B of a fused weight's transpose, in PEFT's layout: from before 0.19 to later ones, and back.

    A (E R, I) and B (O, R E), column r * E + e, become (E R, O) and (I, R E).
    """
    (out, columns), width, rank = b.shape, a.shape[1], a.shape[0] // experts
    turned_a = b.reshape(out, rank, experts).permute(2, 1, 0).reshape(columns, out)
    turned_b = a.reshape(experts, rank, width).permute(2, 1, 0).reshape(width, columns)
    return turned_a.contiguous(), turned_b.contiguous()


def adapter_config(spec: ModelSpec, model: CausalLM, adapter: str = DEFAULT_ADAPTER) -> dict[str, Any]:
    """Return adapter_config.json of one adapter, as PEFT's LoraConfig reads it."""
    indices = {matrix: list(ids) for matrix, ids in model.vocabulary.trained.items()}
    head = model.head if isinstance(model.head, RewardHead) else None
    parameters = _peft_parameters(model, adapter)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else head.task_type,
        "base_model_name_or_path": spec.model.name or spec.model.gguf_file or spec.model.path,
        "revision": spec.model.revision,
        "r": spec.adapter.r,
        "lora_alpha": spec.adapter.lora_alpha,
        "use_rslora": spec.adapter.use_rslora,
        "use_dora": spec.adapter.use_dora,
        "rank_pattern": peft_pattern(spec.adapter.rank_pattern, parameters),
        "alpha_pattern": peft_pattern(spec.adapter.alpha_pattern, parameters),
        "lora_dropout": spec.adapter.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # "pissa" tells PEFT that A and B belong to W_res (decomposed_adapters.py).
        "init_lora_weights": init if (init := spec.adapter.init) == "gaussian" or spec.adapter.pissa else True,
        "target_modules": _target_modules(model, adapter, parameters),
        # A list for the embedding (and a tied LM head), else a dictionary by matrix.
        "trainable_token_indices": indices[EMBEDDING] if indices.keys() == {EMBEDDING} else (indices or None),
        "modules_to_save": list(model.modules_to_save) or (None if head is None else [SCORE]),
    } | _target_parameters(model, adapter, parameters)


def _peft_parameters(model: CausalLM, adapter: str) -> set[str]:
    """Return the paths of the adapted linears that PEFT adapts as parameters."""
    known = {path for path, weight in model.architecture.adaptable() if weight.peft_parameter}
    return known.intersection(path for path, _ in model.adapted_linears(adapter))


def _target_modules(model: CausalLM, adapter: str, parameters: Collection[str]) -> list[str]:
    """Return last names, as PEFT's users write them, if they select exactly the adapted linears; else whole paths."""
    adapted = sorted({path for path, _ in model.adapted_linears(adapter)}.difference(parameters))
    linears = [model.hf_name(name) for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    # PEFT would adapt a vision tower's q_proj, too, or refuse it where it is a module around a linear (Gemma 4's).
    linears += {*model.outside_linears, *(path.rpartition(".")[0] for path in model.outside_linears)}
    if adapter in model.head.adapters:
        adapted, linears = sorted([*adapted, model.architecture.head]), [*linears, model.architecture.head]
    short = sorted({path.rpartition(".")[2] for path in adapted})
    if not short:  # Experts alone.
        return []
    is_number = any(name.isdigit() for name in short)  # Of a linear in a list; PEFT would take layer 0 for it.
    return short if not is_number and sorted(select_targets(tuple(short), linears)) == adapted else adapted


def _target_parameters(model: CausalLM, adapter: str, parameters: Collection[str]) -> dict[str, list[str]]:
    """Return target_parameters: the adapted weights of experts and of `parameters`; empty if there are none."""
    linears = [f"{path}.weight" for path in parameters]
    adapted = sorted([*linears, *(name for name, _ in model.adapted_experts(adapter))])
    if not adapted:
        return {}
    prefix, weights = model.architecture.layer_prefix, model.architecture.adaptable()
    every = [f"{path}.weight" if weight.kind == "linear" else path for path, weight in weights]
    every += [f"{path}.weight" for path in model.outside_linears]
    short = sorted({name.removeprefix(prefix).partition(".")[2] for name in adapted})
    return {"target_parameters": short if sorted(match_ending(short, every)) == adapted else adapted}
