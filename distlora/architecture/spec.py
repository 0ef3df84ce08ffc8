"""The architecture of a model: paths, kinds of layers, weights, and how it is run. Imports no torch.

`distlora.derive` makes it from the module that transformers builds for a config.json, in a process of its own, and this
module keeps it as JSON in the cache. The launcher, the planner and the worker read it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distlora.architecture.disk_names import DiskNames, model_names
from distlora.config import UserError
from distlora.config.base import cache_root
from distlora.system.atomic_io import private_folder, write_text
from distlora.system.exit_codes import BAD_INPUT
from distlora.system.progress import still

WeightKind = Literal["linear", "experts", "fused", "dense"]
"""`linear`: of an nn.Linear that is called as one. `experts`: all experts of a layer, which transformers calls through
its interface. `fused`: any other large weight, which the module's own code reads. `dense`: stays in 16 bits."""

Role = Literal["", "attention", "mlp", "experts", "mixer"]
"""What a linear or the weight of experts belongs to. `mixer`: mixes tokens by other means than softmax attention."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of a decoder layer, or of the decoder outside of its layers."""

    path: str
    """Its path in the layer, or in the model."""
    shape: tuple[int, ...]
    kind: WeightKind = "dense"
    role: Role = ""
    no_adapter: str = ""
    """Reason why a linear or the weight of experts has no adapter; empty if it can have one."""
    peft_parameter: bool = False
    """True for a linear whose name PEFT takes for experts (EXPERT_NAMES): PEFT adapts its weight as a parameter."""

    @property
    def packs(self) -> bool:
        """True if quant=nf4 keeps it in 4 bits."""
        return self.kind != "dense"

    @property
    def is_gate(self) -> bool:
        """True for a linear with one output, which gates a shared expert. Presets leave it out, as they do routers."""
        return self.kind == "linear" and self.shape[0] == 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """Names of a mixture of experts in a decoder layer."""

    module: str
    """Path of the experts in the layer."""
    weights: tuple[str, ...]
    """The 3-D weights of the module, in the order of its parameters, which is the order in which PEFT wraps them."""
    router: str = ""
    """Path of the router in the layer; empty if its output is not router logits first, so that no loss can balance it.
    """
    num_experts: int = 0
    chosen: int = 0
    """Experts that a token chooses."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths in the layer of the fused weights."""
        return tuple(f"{self.module}.{weight}" for weight in self.weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class HalfMemory:
    """Activation memory of a half of a layer of a shrunk model, in bytes per token of a bf16 run with frozen linears.

    Pairs are (bytes, further bytes for each token of the sequence), by which scores grow.
    """

    columns: int
    """Input and output columns of its matrices, of experts the chosen ones (`LayerKind.columns`)."""
    keeps: tuple[float, float]
    """Kept from forward to backward."""
    inputs: float
    """Share of the inputs of its linears that nothing else keeps, which their adapters keep."""
    forward: tuple[float, float]
    """Most beside it in forward."""
    backward: tuple[float, float]
    """Most beside it and the incoming gradient in backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Decoder layers that are alike but for their weights' values."""

    weights: tuple[Weight, ...]
    experts: ExpertLayout | None = None
    key: str = ""
    """What layers of this kind have in common, also in a shrunk model."""
    mlp: tuple[str, str | None, str | None] | None = None
    """Paths of the MLP, the norm before it and the norm after it, if a half of the layer is x + norm(mlp(norm(x)));
    None otherwise."""
    window: int | None = None
    """Tokens that attention sees, itself included; None: all before it."""
    apart: tuple[str, ...] = ()
    """Modules that mix packed documents, and therefore run each by itself."""
    batch_dims: tuple[tuple[str, int | None], ...] = ()
    """Batch dimension of each argument of the layer where it is not dim 0; None: it has none."""
    heads: tuple[int, int, int] | None = None
    """Query heads, key heads and columns of a head of softmax attention; None without it."""
    memory: tuple[HalfMemory | None, HalfMemory | None] = (None, None)
    """Measured memory of (attention or mixer and all else, the half `mlp`); None: the planner's formulas hold."""
    unread: tuple[str, ...] = ()
    """Paths of linears whose output backward does not need: only sums take it, or nothing after it in the layer saves a
    tensor. Recomputation leaves their products out."""

    def half_of(self, path: str) -> int:
        """Return which half of the layer a weight is in: 1 for the one of `mlp`, 0 otherwise."""
        return int(any(path.startswith(f"{module}.") for module in self.mlp or () if module))

    def columns(self, half: int) -> int:
        """Return the input and output columns of the matrices of a half, of experts the chosen ones."""
        own = [weight for weight in self.weights if self.half_of(weight.path) == half and len(weight.shape) > 1]
        counts = {"experts": self.experts.chosen if self.experts else 1}
        return sum(
            sum(w.shape[-2:]) * (math.prod(w.shape[:-2]) if w.kind == "fused" else counts.get(w.kind, 1)) for w in own
        )

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(weight.numel for weight in self.weights)

    @property
    def paths(self) -> list[str]:
        """Paths of the weights in the layer."""
        return [weight.path for weight in self.weights]


@dataclass(frozen=True, slots=True)
class HeadForm:
    """The computation of logits from the decoder's hidden states."""

    kind: Literal["plain", "softcap", "scale", "own"] = "plain"
    """plain: the product with the head's weight, plus its bias. softcap, scale: the same, then value * tanh(. / value)
    or value times it. own: whatever the model's forward does."""
    value: float = 1.0
    """The cap, or the scale."""
    beside: tuple[str, ...] = ()
    """Names of the model's modules that an `own` forward runs beside decoder and head (modernbert-decoder's MLP)."""


NormForm = Literal["llama", "gemma", ""]
"""RMSNorm: times the scale after rounding (llama), times 1 + scale in fp32 (gemma), or another one."""
FusiblePart = Literal["norms", "mlps", "rotary"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Everything about a model that config.json decides, as far as building, naming and planning need it."""

    model_type: str
    model_class: str
    """The transformers class of the whole model, which PEFT loads an adapter onto."""
    auto_class: str = "AutoModelForCausalLM"
    """The Auto class of transformers that makes it."""
    text_config: str | None = None
    """Key of config.json that holds the decoder's settings; None: the top level."""
    decoder: str
    """Path of the decoder."""
    layers: str
    """Path in the decoder of the list of its layers."""
    embedding: str
    """Path in the decoder of the input embedding."""
    norm: str | None
    """Path in the decoder of the norm that alone follows the last layer; None if something else does."""
    head: str
    """Path of the LM head."""
    vocabulary: int
    """Rows of the embedding."""
    hidden: int
    tied: bool
    """True if the LM head's weight is the embedding's."""
    kinds: tuple[LayerKind, ...]
    kind_of_layer: tuple[int, ...]
    """Index in `kinds` of each layer."""
    outside: tuple[Weight, ...] = ()
    """The decoder's weights outside of its layers and embedding: the last norm, by paths in the model."""
    buffers: tuple[tuple[str, int], ...] = ()
    """(`fp32` or `dtype`, the dtype of the run; number of elements) of the decoder's buffers."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation; `eager` where SDPA computes something else (caps of scores, sinks)."""
    varlen: bool = True
    """True if variable-length attention gives the same result for packed documents."""
    documents: Literal["positions", "masks", "single"] = "positions"
    """How packed documents are kept apart besides `LayerKind.apart`: by position_ids alone, by masks that are made from
    them, or by one document per sequence."""
    takes_embeddings: bool = True
    """True if the decoder computes the same from embeddings as from token ids, which it then reads nowhere else."""
    looks_up: bool = True
    """True if the embedding gives the rows of token ids as a checkpoint has them, and nothing else reads its matrix."""
    takes_cache: bool = True
    """True if transformers' cache continues left-padded prompts as if each was computed whole."""
    pages_cache: bool = False
    """True if `distlora.model.paged_cache` continues rows as if each was computed whole."""
    head_form: HeadForm = HeadForm()
    scored_by: tuple[str, ...] = ()
    """Task types of PEFT (`SEQ_CLS`, `TOKEN_CLS`) for which transformers has a class that computes a linear `score` of
    the same decoder's output, by the same paths."""
    norm_forms: tuple[tuple[str, NormForm], ...] = ()
    """Each class of RMSNorm in the decoder, and what it computes."""
    gated_mlps: tuple[str, ...] = ()
    """Classes of MLPs in the decoder that compute down(act(gate) * up), with a fused act."""
    rotated: tuple[str, ...] = ()
    """Classes of modules in the decoder that rotate queries and keys as the fused rotary embedding does."""
    fusible: tuple[FusiblePart, ...] = ()
    """Parts of the decoder that can be replaced by fused ones in every layer."""
    disk: DiskNames
    """How transformers names the tensors of a checkpoint."""
    checks: tuple[tuple[str, float], ...] = ()
    """Name and largest difference of each check on a shrunk model with random weights."""
    seconds: float = 0.0
    """Time that deriving and checking took."""

    @property
    def notes(self) -> list[str]:
        """Lines for the user: which linears have no adapter, and how packed documents are kept apart."""
        without: dict[str, dict[str, None]] = {}
        for weight in (weight for kind in self.kinds for weight in kind.weights if weight.no_adapter):
            path = weight.path.removesuffix(".weight")
            without.setdefault(weight.no_adapter.replace(path.rpartition(".")[2], "them"), {})[path] = None
        notes = [f"no adapter on {', '.join(paths)} ({reason})" for reason, paths in without.items()]
        if self.documents == "single":
            notes.append("one document per sequence, as packed ones would be mixed")
        elif apart := sorted({path for kind in self.kinds for path in kind.apart}):
            notes.append(f"packed documents run one by one in {', '.join(apart)}, which would mix them")
        return notes

    @property
    def norm_form(self) -> NormForm:
        """Form of all RMSNorms of the decoder; empty if they differ or are others."""
        forms = {form for _, form in self.norm_forms}
        return forms.pop() if len(forms) == 1 else ""

    @property
    def compilable(self) -> bool:
        """True if layers are attention and a gated MLP, all of whose parts can be replaced by compiled ones."""
        whole = bool(self.norm_form) and {"mlps", "rotary"} <= set(self.fusible)
        return whole and not self.has_experts and not any(kind.apart for kind in self.kinds)

    @property
    def composite(self) -> bool:
        """True if the folder holds more than the text model (a vision tower), which stays unchanged."""
        return self.text_config is not None

    @property
    def causal(self) -> str:
        """Path of the innermost model with the decoder and the LM head; empty for the whole model."""
        names = zip(self.decoder.split("."), self.head.split("."), strict=False)
        return ".".join(name for name, other in itertools.takewhile(lambda both: both[0] == both[1], names))

    @property
    def decoder_in_causal(self) -> str:
        """Path of the decoder in the model at `causal`."""
        return self.decoder.removeprefix(f"{self.causal}.")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.kind_of_layer)

    @property
    def layer_prefix(self) -> str:
        """Hugging Face path of the layers, before the index of one."""
        return f"{self.decoder}.{self.layers}."

    @property
    def embedding_path(self) -> str:
        """Hugging Face path of the embedding."""
        return f"{self.decoder}.{self.embedding}"

    @property
    def has_experts(self) -> bool:
        """True if a layer has a mixture of experts that transformers calls through its interface."""
        return any(kind.experts is not None for kind in self.kinds)

    @property
    def numel(self) -> int:
        """Number of parameters of the text model, a tied matrix once."""
        matrices = (1 if self.tied else 2) * self.vocabulary * self.hidden
        layers = sum(self.kinds[kind].numel for kind in self.kind_of_layer)
        return matrices + layers + sum(weight.numel for weight in self.outside)

    @property
    def largest(self) -> LayerKind:
        """The kind of layer with most parameters."""
        return max(self.kinds, key=lambda kind: kind.numel)

    def counted(self) -> Iterator[tuple[LayerKind, int]]:
        """Yield each kind of layer and the number of layers of it."""
        for number, kind in enumerate(self.kinds):
            yield kind, self.kind_of_layer.count(number)

    def on_disk(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the names on disk of each parameter of the text model, by transformers' name.

        `names`: all tensors of a checkpoint. A parameter that is merged from several has several.
        """
        return model_names(self.disk, names, frozenset(self.parameters()))

    def parameters(self) -> dict[str, Weight]:
        """Return the text model's parameters by transformers' names."""
        matrix = Weight("", (self.vocabulary, self.hidden))
        weights = dict.fromkeys((f"{self.embedding_path}.weight", f"{self.head}.weight"), matrix)
        weights |= {weight.path: weight for weight in self.outside}
        for index in range(self.num_layers):
            weights |= {f"{self.layer_prefix}{index}.{weight.path}": weight for weight in self.layer(index).weights}
        return weights

    def layer(self, index: int) -> LayerKind:
        """Return the kind of one layer."""
        return self.kinds[self.kind_of_layer[index]]

    def adaptable(self) -> Iterator[tuple[str, Weight]]:
        """Yield (Hugging Face path, weight) of each linear and fused weight of experts, layer by layer.

        The path of a linear is its module's. Weights that no adapter can have (`Weight.no_adapter`) are included.
        """
        for index in range(self.num_layers):
            for weight in self.layer(index).weights:
                if weight.kind in ("linear", "experts"):
                    yield f"{self.layer_prefix}{index}.{weight.path.removesuffix('.weight')}", weight

    @property
    def experts_by_path(self) -> dict[str, int]:
        """Number of experts of each fused weight, by its Hugging Face path."""
        return {path: weight.shape[0] for path, weight in self.adaptable() if weight.kind == "experts"}

    def text(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the decoder's part of the content of config.json."""
        return model if self.text_config is None else model.get(self.text_config) or {}

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Return the architecture in a text of `to_json`."""
        values = json.loads(text, object_pairs_hook=_with_tuples)
        values["kinds"] = tuple(map(_kind_from, values["kinds"]))
        values["outside"] = tuple(Weight(**weight) for weight in values["outside"])
        values["head_form"] = HeadForm(**values["head_form"])
        values["disk"] = DiskNames.from_json(values["disk"])
        return cls(**values)

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(dataclasses.asdict(self))


def _with_tuples(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: _as_tuple(value) for name, value in pairs}


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _kind_from(values: dict[str, Any]) -> LayerKind:
    experts = values.pop("experts")
    weights = tuple(Weight(**weight) for weight in values.pop("weights"))
    first, second = (None if half is None else HalfMemory(**half) for half in values.pop("memory"))
    experts = None if experts is None else ExpertLayout(**experts)
    return LayerKind(**values, weights=weights, experts=experts, memory=(first, second))


_IRRELEVANT = ("_name_or_path", "dtype", "quantization_config", "torch_dtype", "transformers_version", "use_cache")
"""Keys of config.json that change no structure."""


def architecture_of(model: Mapping[str, Any], place: Path | str) -> Architecture:
    """Return the architecture of a model from the content of its config.json. `place` is the file, for messages.

    The first call for a config starts a process that builds, shrinks and checks the model without weights
    (`distlora.derive`); its result is kept in the cache. Raises UserError with the reason for a model that is not
    supported.
    """
    content = json.dumps({k: v for k, v in model.items() if k not in _IRRELEVANT}, sort_keys=True)
    return _architecture_of(content, str(place))


@functools.lru_cache(maxsize=64)
def _architecture_of(content: str, place: str) -> Architecture:
    return Architecture.from_json(kept_text(cached_path(content), lambda: derive(content, place)))


_DIGEST = ".sha256"
"""Suffix of the file beside a kept text with the SHA-256 of that text."""


def kept_text(path: Path, make: Callable[[], str]) -> str:
    """Return the text of a file of the cache, made if it is missing or damaged, while other processes wait for it."""
    text = _whole_text(path)
    if text is not None:
        return text
    try:
        private_folder(path.parent)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        print(
            f"{path.parent} cannot be written ({error.strerror}), so what the check of the model finds is not kept",
            file=sys.stderr,
        )
        return make()
    with lock:
        with still("waiting for another process that checks the model"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        text = _whole_text(path)
        if text is None:
            text = make()
            write_text(path.with_suffix(_DIGEST), hashlib.sha256(text.encode()).hexdigest())
            write_text(path, text)
    return text


def _whole_text(path: Path) -> str | None:
    """Return a text that `kept_text` wrote; None if it is missing or not what was written."""
    record = path.with_suffix(_DIGEST)
    if not (path.is_file() and record.is_file()):
        return None
    content = path.read_bytes()
    return content.decode() if hashlib.sha256(content).hexdigest().encode() == record.read_bytes() else None


def cached_path(content: str) -> Path:
    """Return the place in the cache of the architecture of a config.json's content.

    It depends on the versions of transformers and torch and on the code that derives it.
    """
    digest = hashlib.sha256(f"{content} {versions()}".encode()).hexdigest()
    return cache_root() / "architectures" / f"{digest[:32]}.json"


_PACKAGE = Path(__file__).parents[1]
_SOURCES = ("architecture", "derive", "model", "planner", "planner/memory", "loading", "weights")
"""Folders of the code that derives and proves an architecture."""


@functools.cache
def versions() -> str:
    """Return the versions of transformers and torch, and a digest of the code that derives and builds models."""
    sources = sorted(path for folder in _SOURCES for path in (_PACKAGE / folder).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    packages = (f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    return f"{' '.join(packages)} {digest}"


def derive(content: str, place: str) -> str:
    """Return the JSON of the architecture that a process with torch derives. Raises UserError with its reason."""
    answer = derived("checking how transformers builds the model", place, content=content)
    architecture = Architecture.from_json(answer)
    print(
        f"{place} ({architecture.model_type}): checked in {architecture.seconds:.0f} s on a small model: forward, "
        f"gradients, packing and adapters equal transformers'{''.join(f'; {note}' for note in architecture.notes)}",
        file=sys.stderr,
    )
    return answer


def derived(doing: str, *arguments: str, content: str = "") -> str:
    """Return what `python -m distlora.derive` answers. Raises UserError with its reason.

    `doing` is printed while it runs for long; `content` is its standard input.
    """
    with still(doing):
        command = [sys.executable, "-m", "distlora.derive", *arguments]
        finished = subprocess.run(command, input=content, capture_output=True, text=True, check=False)
    if finished.returncode == BAD_INPUT:
        raise UserError(finished.stdout.strip())
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stderr}")
    return finished.stdout
