"""Check the contracts of servers: every tensor of an export binds by the consumer's rules and means the trained dW."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.safetensors_headers import read_header
from distlora.architecture.spec import Architecture, Weight
from distlora.architecture.targets import peft_paths
from distlora.config import AdapterConfig, UserError
from distlora.derive.structure import structure
from distlora.loading.peft_format import transposed_factors
from distlora.model.hf_model import auto_class_of, transformers_model
from distlora.post.export import served_folder
from distlora.post.export.consumers import CONSUMERS, PREFIX, bind, served, targets, unserved
from distlora.post.weights import Factors, read_factors
from distlora.weights.peft_folder import read_peft_adapter, with_layout
from distlora.weights.reader import Reader
from support.family_models import hf_config

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "glm4", "cohere2")
EXPERTS = (
    *("qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe", "qwen3_next", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3"),
    *("olmoe", "granitemoe", "qwen2_moe"),
)
COMPOSITES = ("qwen3_vl", "gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl")
"""Types with a vision tower, whose decoder has no experts."""
REFUSED = {
    **{("sglang", name): f"model_type='{name}' is not among" for name in ("mistral3", "qwen2_vl", "qwen2_5_vl")},
    ("sglang", "qwen3_next"): "model_type='qwen3_next' is not among",
    ("sglang", "qwen3_5_moe_text"): "in_proj_b: SGLang wraps no module of this name",
    ("sglang", "qwen3_5_moe"): "in_proj_b: SGLang wraps no module of this name",
    ("vllm", "qwen3_next"): "in_proj_qkvz: vLLM loads an adapter here and does not apply it as trained",
    ("vllm", "deepseek_v3"): "kv_b_proj: vLLM loads an adapter here and does not apply it as trained: it folds",
}
"""Why all linears and experts of a type are not served, where they are not."""


@functools.cache
def model_of(model_type: str) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture of a small model by its modules alone, and its config.json."""
    config = hf_config(model_type)
    auto_class = auto_class_of(config, model_type)
    model = transformers_model(
        config, model_type, auto_class=auto_class, attention="eager", dtype=torch.float32, device="meta"
    )
    return structure(model, auto_class=auto_class, kinds={}), config.to_dict()


def adapted(architecture: Architecture) -> dict[str, Weight]:
    """Return what target_modules=all-linear means: all but routers and gates of shared experts."""
    names = (".gate", ".router")
    return {path: w for path, w in architecture.adaptable() if not (w.is_gate or path.endswith(names))}


class RandomFactors:
    """A random adapter: rank 3, 2 of o_proj, another scale of down_proj."""

    def __init__(self, weights: Mapping[str, Weight], *, use_rslora: bool = True, sharing: Any = "none") -> None:
        self.weights = weights
        self.paths = list(weights)
        self.config = AdapterConfig(
            r=3,
            lora_alpha=5.0,
            use_rslora=use_rslora,
            rank_pattern={"o_proj": 2},
            alpha_pattern={"down_proj": 7.0},
            expert_sharing=sharing,
        )

    def __getitem__(self, path: str) -> Factors:
        *experts, out, width = self.weights[path].shape
        made = torch.Generator().manual_seed(sum(path.encode()))
        rank = self.config.rank_of(path)
        shared = self.config.shared_factor(path) if experts else None
        a, b = torch.randn(*experts, rank, width, generator=made), torch.randn(*experts, out, rank, generator=made)
        a, b = (f[:1].expand_as(f).clone() if shared == part else f for part, f in (("A", a), ("B", b)))
        return Factors(A=a, B=b, scaling=self.config.scaling_of(path))


def write(
    folder: Path, name: str, model_type: str, paths: Callable[[str], bool] = lambda _: True, sharing: Any = "none"
) -> Any:
    """Write an adapter of the paths that the consumer serves; return what `check_folder` takes."""
    architecture, config = model_of(model_type)
    consumer = CONSUMERS[name]
    row = served(consumer, config)
    places = targets(consumer, row, architecture, shared_outer=sharing == "shared_outer")
    known = {target.path for target in places.values()}
    weights = {path: weight for path, weight in adapted(architecture).items() if path in known and paths(path)}
    factors = RandomFactors(weights, sharing=sharing)
    folder.mkdir(exist_ok=True)
    read = {path: functools.partial(factors.__getitem__, path) for path in factors.paths}
    settings = served_folder.write_adapter(folder, consumer, places, read)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return consumer, row, places, read


@pytest.mark.parametrize("name", CONSUMERS)
@pytest.mark.parametrize("model_type", [*DENSE, *COMPOSITES, *EXPERTS])
def test_every_tensor_binds_and_means_what_was_trained(tmp_path: Path, name: str, model_type: str) -> None:
    """Compare dW of rsLoRA with patterns of ranks and alphas, within 1e-6 by the consumer's formula, or the refusal."""
    architecture, config = model_of(model_type)
    consumer = CONSUMERS[name]
    reason = REFUSED.get((name, model_type), "")
    if model_type not in consumer.types:
        with pytest.raises(UserError, match=re.escape(reason)):
            served(consumer, config)
        assert reason
        return
    row = served(consumer, config)
    places = targets(consumer, row, architecture)
    why = unserved(consumer, row, places, list(adapted(architecture)))
    assert reason in why
    assert bool(why) is bool(reason)
    written = write(tmp_path, name, model_type)
    assert served_folder.check_folder(tmp_path, *written) <= 1e-6
    names = set(read_header(tmp_path / "adapter_model.safetensors"))
    assert all(key.startswith(f"{PREFIX}{architecture.layer_prefix}") for key in names)
    assert (".language_model.layers." in architecture.layer_prefix) is architecture.composite
    stacked = any(".experts.base_layer." in key for key in names)
    numbered = any(re.search(r"\.experts\.\d+\.", key) for key in names)
    assert (stacked, numbered) == (
        (False, False) if model_type in DENSE + COMPOSITES else (True, False) if not row.names else (False, True)
    )


OUTER = [
    *(("vllm", model_type) for model_type in ("qwen3_moe", "mixtral", "deepseek_v3")),
    *(("sglang", model_type) for model_type in ("qwen3_moe", "mixtral", "gpt_oss")),
]


@pytest.mark.parametrize(("name", "model_type"), OUTER)
def test_a_shared_factor_is_stored_once_and_means_what_was_trained(tmp_path: Path, name: str, model_type: str) -> None:
    """Also where one of the two weights of experts is not adapted; other layouts are refused."""
    written = write(tmp_path, name, model_type, sharing="shared_outer")
    assert served_folder.check_folder(tmp_path, *written) <= 1e-6
    architecture, _ = model_of(model_type)
    (count,) = set(architecture.experts_by_path.values())
    file = tmp_path / "adapter_model.safetensors"
    shapes = {key: s.shape for key, s in read_header(file).items() if re.search(r"(mlp|moe)\.experts\.", key)}
    gate, up, down = CONSUMERS[name].stacks
    outer = {f"{gate}.lora_A", f"{up}.lora_A", f"{down}.lora_B"}
    assert {key.rpartition("experts.")[2].removesuffix(".weight") for key in shapes} == {
        f"{module}.lora_{part}" for module in (gate, up, down) for part in "AB"
    }
    assert {key: shape[0] for key, shape in shapes.items()} == {
        key: 1 if key.rpartition("experts.")[2].removesuffix(".weight") in outer else count for key in shapes
    }
    consumer, row, _, factors = written
    other = targets(consumer, row, architecture)
    with pytest.raises(UserError, match="it holds all experts of a layer in one tensor"):
        served_folder.check_folder(tmp_path, consumer, row, other, factors)
    key = next(key for key in shapes if f"{gate}.lora_B" in key)
    for change, says in (
        (lambda t: t | {key: t[key][:1]}, "it has shape"),
        (lambda t: t | {key: t[key].mT}, "; it is transposed"),
        (lambda t: t | {key: t[key].flip(0)}, "another dW"),
        (lambda t: {k.replace("experts.", "experts.0."): v for k, v in t.items()}, "it is one expert's"),
    ):
        damaged(tmp_path, change)
        with pytest.raises(UserError, match=rf"^{re.escape(key)[:20]}.*{says}"):
            served_folder.check_folder(tmp_path, *written)
        write(tmp_path, name, model_type, sharing="shared_outer")
    written = write(tmp_path, name, model_type, lambda path: path.endswith("down_proj"), sharing="shared_outer")
    assert served_folder.check_folder(tmp_path, *written) <= 1e-6


@pytest.mark.parametrize("name", CONSUMERS)
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_5_moe_text"])
def test_an_adapter_of_a_shared_experts_gate_is_refused(name: str, model_type: str) -> None:
    architecture, config = model_of(model_type)
    consumer = CONSUMERS[name]
    row = served(consumer, config)
    gates = [path for path, weight in architecture.adaptable() if weight.is_gate]
    why = unserved(consumer, row, targets(consumer, row, architecture), gates)
    reason = {"vllm": "does not apply it as trained: the shared expert calls the gate", "sglang": "wraps no module"}
    assert "shared_expert_gate: " in why
    assert reason[name] in why


@pytest.mark.parametrize(("name", "adapts", "filled"), [
    ("sglang", "q_proj", {"q_proj", "k_proj", "v_proj"}),
    ("sglang", "gate_up_proj", {"gate_proj", "up_proj", "down_proj"}),
    ("vllm", "gate_up_proj", {"gate_proj", "up_proj", "down_proj"}),
    ("vllm", "q_proj", {"q_proj"}),
])  # fmt: skip
def test_what_a_server_needs_beside_an_adapter_is_written_as_zeros(
    tmp_path: Path, name: str, adapts: str, filled: set[str]
) -> None:
    consumer, row, places, factors = write(tmp_path, name, "qwen3_moe", lambda path: path.endswith(adapts))
    assert served_folder.check_folder(tmp_path, consumer, row, places, factors) <= 1e-6
    header = read_header(tmp_path / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in header} == filled
    shapes = {key: segment.shape for key, segment in header.items()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if name == "sglang" or len(filled) > 1:
        least = min(key for key in shapes if "lora_A" in key)
        few = {key: shape for key, shape in shapes.items() if not key.startswith(least.removesuffix(".lora_A.weight"))}
        with pytest.raises(UserError, match=f"^{re.escape(least)} is missing: {consumer.name} needs all modules of"):
            bind(consumer, row, places, config, few)


def damaged(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = {key: tensor.contiguous() for key, tensor in change(safetensors.torch.load_file(file)).items()}
    safetensors.torch.save_file(tensors, file)


GATE = f"{PREFIX}model.layers.0.mlp.experts.2.gate_proj.lora_A.weight"


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_transposed_renamed_or_stacked_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    written = write(tmp_path, name, "qwen3_moe")
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
    consumer = CONSUMERS[name].name
    cases: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
        (lambda t: t | {key: t[key].T}, rf"^{re.escape(key)}: it has shape .*; it is transposed"),
        (
            lambda t: {k.replace("1.self_attn.q_proj", "1.attention.wq"): v for k, v in t.items()},
            rf"^base_model.model.model.layers.1.attention.wq.lora_A.weight: {consumer} wraps no module of this name",
        ),
        (
            lambda t: {k: v for k, v in t.items() if k != key},
            rf"^{re.escape(key.replace('lora_B', 'lora_A'))}: {consumer} finds no lora_B beside it",
        ),
        (
            lambda t: t | {key.replace("lora_B", "lora_magnitude_vector"): torch.zeros(4)},
            r"lora_magnitude_vector.*reads",
        ),
        (
            lambda t: t | {f"{PREFIX}model.layers.0.mlp.experts.lora_A.weight": torch.zeros(15, 39)},
            rf"experts.lora_A.weight: it holds all experts of a layer in one tensor, and {consumer}",
        ),
        (lambda t: t | {GATE: t[GATE] * 1.001}, r"gate_proj.lora_B.weight: .* computes another dW than"),
        (lambda t: t | {GATE.replace("gate", "up"): t[GATE].flip(0)}, r"up_proj.lora_B.weight: .* another dW than"),
    ]
    saved = (tmp_path / "adapter_model.safetensors").read_bytes()
    for change, says in cases:
        (tmp_path / "adapter_model.safetensors").write_bytes(saved)
        damaged(tmp_path, change)
        with pytest.raises(UserError, match=says):
            served_folder.check_folder(tmp_path, *written)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("model_type", EXPERTS)
def test_pefts_layouts_of_experts_bind_and_mean_what_was_trained(tmp_path: Path, model_type: str, early: bool) -> None:
    """Compare dW by the formula of each release (ParamWrapper.get_delta_weight) and as we read the file."""
    architecture, _ = model_of(model_type)
    weights = {path: weight for path, weight in architecture.adaptable() if weight.kind == "experts"}
    factors, tensors, names = RandomFactors(weights), {}, peft_paths(list(weights))
    turned = early and model_type != "gpt_oss"
    for path, weight in weights.items():
        own, experts = factors[path], weight.shape[0]
        a, b = own.A.flatten(0, 1), own.B.permute(1, 2, 0).reshape(own.B.shape[1], -1)
        a, b = transposed_factors(a, b, experts) if turned else (a, b)
        theirs = torch.einsum(
            f"ore,eri->{'eio' if turned else 'eoi'}", b.view(len(b), -1, experts), a.view(experts, -1, a.shape[1])
        )
        assert (own.scaling * theirs - own.delta()).norm() <= 1e-6 * own.delta().norm()
        assert own.norm() == pytest.approx(float(own.delta().norm()), rel=1e-5)
        with pytest.raises(UserError, match=r"^it computes another dW .* relative error of 1.0e-04; please report it"):
            own.error("it", own.scaling * 1.0001, own.B, own.A)
        stem = f"{PREFIX}{names[path]}"
        tensors |= {f"{stem}.lora_A.weight": a.contiguous(), f"{stem}.lora_B.weight": b.contiguous()}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 5.0, "use_rslora": True, "target_modules": []}
    settings |= {"alpha_pattern": {"down_proj": 7.0}, "target_parameters": list(weights)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    read = with_layout(read_peft_adapter(tmp_path), architecture)
    assert read.transposed == (set(weights) if turned else set())
    with Reader() as reader:
        for path, weight in weights.items():
            ours = read_factors(read, path, reader, experts=weight.shape[0])
            assert torch.equal(ours.delta(), factors[path].delta()), path


@pytest.mark.parametrize(("name", "changes", "says"), [
    ("sglang", {"use_rslora": True}, "use_rslora=True, which SGLang does not support"),
    ("sglang", {"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ("sglang", {"target_modules": ["q_proj", "o_proj"]}, "drops it, as target_modules in adapter_config.json lacks"),
    ("sglang", {"target_modules": "all-linear"}, "reads a list of names"),
    ("vllm", {"use_dora": True}, "use_dora=True, which vLLM does not support"),
    ("vllm", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ("vllm", {"init_lora_weights": "pissa"}, "init_lora_weights"),
    ("vllm", {"rank_pattern": {"q_proj": 600}}, "rank 600, and vLLM serves at most 512"),
    ("vllm", {"alpha_pattern": {"k_proj": 1.0}}, "k_proj.lora_B.weight: vLLM computes another dW"),
])  # fmt: skip
def test_settings_that_the_server_ignores_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], says: str
) -> None:
    written = write(tmp_path, name, "llama")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=re.escape(says)):
        served_folder.check_folder(tmp_path, *written)


def as_it_is(name: str, model_type: str) -> str:
    """Return how a consumer takes RUN/adapter of target_modules=all-linear, for the table of docs/merging.md."""
    consumer, (architecture, config) = CONSUMERS[name], model_of(model_type)
    if model_type not in consumer.types:
        return "merge"
    row = served(consumer, config)
    places = targets(consumer, row, architecture)
    known = {target.path for target in places.values()}
    weights = adapted(architecture)
    beyond = sorted({path.rpartition(".")[2] for path in weights if path not in known})
    names = peft_paths([path for path in weights if weights[path].kind == "experts"])
    tensors = {}
    for path in weights.keys() & known:
        *experts, out, width = weights[path].shape
        rows = 4 * (experts[0] if experts else 1)
        tensors[f"{PREFIX}{names.get(path, path)}.lora_A.weight"] = (rows, width)
        tensors[f"{PREFIX}{names.get(path, path)}.lora_B.weight"] = (out, rows)
    settings = {"r": 4, "lora_alpha": 8.0, "target_modules": sorted({path.rpartition(".")[2] for path in weights})}
    try:
        bind(consumer, row, places, settings, tensors)
    except UserError:
        how = f"`--for {name}`"
    else:
        how = "as it is"
    return f"{how}, without {', '.join(beyond)}" if beyond else how


def test_the_documents_table_says_which_server_takes_an_adapter_as_it_is() -> None:
    types = sorted({model_type for consumer in CONSUMERS.values() for model_type in consumer.types})
    lines = ["| model_type | vLLM | SGLang |", "|---|---|---|"]
    lines += [f"| {name} | {as_it_is('vllm', name)} | {as_it_is('sglang', name)} |" for name in types]
    page = Path(__file__).parents[2] / "docs" / "merging.md"
    assert "\n".join(lines) in page.read_text(), "\n".join(lines)
