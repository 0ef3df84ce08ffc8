"""Settings of the model: base, adapter and storage of the base; folders and hub names in settings."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from distlora.config.errors import (
    Refusals,
    count_from,
    nearest,
    positive,
    require,
    require_choice,
    twice,
)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FILE_SUFFIXES = (
    *(".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".jinja", ".gguf"),
)


def cache_root() -> Path:
    """Return the folder of all caches: DISTLORA_CACHE, else distlora/ in XDG_CACHE_HOME, else ~/.cache/distlora."""
    override, base = os.environ.get("DISTLORA_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(override) if override else Path(base) / "distlora").expanduser().absolute()


def means_hub(path: str) -> bool:
    """Return whether a typed path means org/name on the Hub rather than a local path.

    A path that exists, that ends like a file, or whose first part is a folder is local, so that a mistyped path is
    reported as one. Depends on the working folder: for composing settings only.
    """
    return is_hub_name(path) and not Path(path).exists() and not Path(path).parent.is_dir()


def place_of(path: str) -> str:
    """Return a typed path as an absolute path, or the name of a Hub repository unchanged."""
    return path if means_hub(path) else str(Path(path).expanduser().absolute())


def is_hub_name(path: str) -> bool:
    """Return whether a path of composed settings is org/name; local paths are absolute there."""
    return _HUB_NAME.fullmatch(path) is not None and not path.endswith(FILE_SUFFIXES)


PLAIN = ("kaiming", "gaussian")
"""Values of adapter.init for which A is random and B zero, independent of the base."""

_NITER = re.compile(r"pissa_niter_([1-9]\d*)")
_EXAMPLES = (*PLAIN, "pissa", "pissa_niter_4", "loftq")


def check_init(init: str) -> None:
    """Raise UserError for a name that is not one of the supported names of PEFT."""
    if init in (*PLAIN, "pissa", "loftq") or _NITER.fullmatch(init):
        return
    require(
        not init.startswith("pissa_niter"),
        f"adapter.init={init!r} needs one or more subspace iterations; set adapter.init=pissa_niter_4, or pissa for "
        "the exact decomposition",
    )
    require(
        False,
        f"adapter.init={init!r} is not one of {', '.join(PLAIN)}, pissa, pissa_niter_<n>, loftq"
        f"{nearest(init, _EXAMPLES)}",
    )


def is_pissa(init: str) -> bool:
    """Return whether the adapter's start is subtracted from the base's weights."""
    return init.startswith("pissa")


def subspace_iterations(init: str) -> int | None:
    """Return the iterations of a randomized decomposition; None for the exact one."""
    match = _NITER.fullmatch(init)
    return int(match[1]) if match else None


SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Keys of model.special_tokens."""

Number = TypeVar("Number", int, float)

PATTERN = r"(.*\.)?({})$"
"""Matches from the start of a path, or after a dot, to its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model and its tokenizer."""

    path: str
    """A local folder in Hugging Face format (config.json, safetensors, tokenizer), a GGUF file, or a name on the hub
    (org/name), which the launcher downloads once. RUN/config.yaml then holds a folder: of a GGUF file one in the cache
    that describes it."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; null: its main branch. RUN/config.yaml holds the commit."""
    name: str | None = None
    """The model's name on the hub, as adapters and model cards refer to it. The launcher fills it in."""
    gguf_file: str | None = None
    """The GGUF file that the folder in `path` describes. The launcher fills it in; change it in RUN/config.yaml if the
    file was moved."""
    new_tokens: tuple[str, ...] = ()
    """Texts that become tokens of their own: [<|im_start|>, <|im_end|>]. Those written <|...|> are special, so decoders
    leave them out of text. Their rows start as the mean of all others and are trained; embedding and head grow where
    they have no spare rows."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """Special tokens to replace: bos_token, eos_token, pad_token or unk_token, by texts of the vocabulary or of
    `new_tokens`: {eos_token: <|im_end|>}. eos_token ends documents, answers and generation."""

    @property
    def changes_tokenizer(self) -> bool:
        """Return whether the run's tokenizer differs from the base's, and so is saved beside the adapter."""
        return bool(self.new_tokens or self.special_tokens)


SAVED_MODULES = ("embed_tokens", "lm_head")
"""Modules that can be trained whole beside adapters."""

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all-linear": _LINEARS,
    "linears": _LINEARS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Settings of the adapter, with the names and meanings of PEFT's LoraConfig."""

    method: Literal["lora", "full"] = "lora"
    """`lora` trains low-rank adapters on a frozen base; `full` trains every parameter (the baseline; needs quant=none):
    16 bytes per parameter over all ranks (fp32 master, gradient, two optimizer states), and a unit's copy in
    `train.dtype`."""
    r: int = 16
    """Rank of the adapters: rows of A and columns of B. A larger one can learn more; memory grows linearly with it."""
    lora_alpha: float = 16.0
    """Numerator of the scale s: alpha/sqrt(r) with use_rslora, else alpha/r."""
    use_rslora: bool = True
    """Scale by alpha/sqrt(r) (Kalajdzievski 2023), which keeps the update's size independent of r."""
    use_dora: bool = False
    """Train the norms of the weights' rows apart from their directions (DoRA, arXiv 2402.09353): one more parameter per
    output. Takes more time, and memory for one more output per adapted linear of a layer."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Linears that get an adapter: a preset (qv, attention, mlp, all-linear, linears), a list of module names (the last
    parts of their paths), or a regular expression that matches whole paths. `linears` adapts no fused weights of
    experts, like PEFT's all-linear; `all-linear` adapts them too."""
    target_parameters: tuple[str, ...] = ()
    """Fused weights of a mixture of experts that get an adapter per expert, by the last parts of their names:
    [mlp.experts.gate_up_proj, mlp.experts.down_proj]. Empty: both if target_modules is mlp or all-linear, else none."""
    expert_sharing: Literal["none", "shared_a", "shared_b", "shared_outer"] = "none"
    """Factor that the adapters of all experts of a layer have in common: A, B, or the one of hidden size
    (`shared_outer`: A of gate and up, B of down, as SGLang's and Megatron-Bridge's experts_shared_outer_loras). Shared
    factors are trained once; files hold PEFT's layout, a copy per expert."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other ranks for some linears, by module name or regular expression: {down_proj: 32}. The first that matches the
    end of a path counts, as in PEFT."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Other lora_alpha for some linears, matched like rank_pattern."""
    lora_dropout: float = 0.0
    """Fraction of the adapter's inputs that is set to 0 in training (the rest is scaled up): the same elements on any
    number of ranks and after a resume."""
    init: str = "kaiming"
    """Initial values of A and B: kaiming, gaussian, pissa, pissa_niter_<n> or loftq. `kaiming` and `gaussian`: A
    uniform as in PEFT or normal of std 1/r, and B zero. `pissa`: the principal part of the base's weights, which the
    base then lacks (arXiv 2404.02948); `pissa_niter_<n>` finds it by n subspace iterations (n = 4: on large weights in
    a third of the time or less). `loftq`: the principal part of their quantization error (arXiv 2310.08659; needs
    quant=nf4). The last three decompose each weight once; the run keeps the initial values, as many bytes as the
    adapter in fp32."""
    init_from: str | None = None
    """A PEFT LoRA adapter's folder to start from instead. Its rank, alpha, scaling and targets become this run's."""
    init_from_loftq: bool = False
    """True if that adapter corrects the error of NF4, as its file says; the result does too, and needs quant=nf4. Set
    from init_from."""
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    """Ids of tokens whose rows are trained beside those of model.new_tokens, while the rest of the matrix is frozen: a
    list for the embedding (and the head that is tied to it), or {embed_tokens: [...], lm_head: [...]}. Each costs a row
    of fp32, with its gradient and optimizer states, on every rank."""

    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters, and saved with them: embed_tokens, lm_head or both. They take 16 bytes
    per parameter, sharded over the ranks: 34 GB for both of a 70B model. Tied ones are trained separately."""

    @property
    def decomposes(self) -> bool:
        """Return whether the start is computed from the base's weights."""
        return self.init not in PLAIN

    @property
    def pissa(self) -> bool:
        """Return whether the adapter's start is subtracted from the base for training."""
        return is_pissa(self.init)

    @property
    def for_nf4(self) -> bool:
        """Return whether A and B correct the error of NF4, and so are wrong on another form of the base."""
        return self.init == "loftq" or self.init_from_loftq

    @property
    def trains_base(self) -> str | None:
        """Return the setting that trains parameters of the base, as typed; None where the base is frozen.

        These parameters are sharded over ranks like the base. Single rows of tokens do not count.
        """
        if self.method == "full":
            return "adapter=full"
        return f"adapter.modules_to_save=[{','.join(self.modules_to_save)}]" if self.modules_to_save else None

    def token_settings(self, new_tokens: Sequence[str]) -> list[str]:
        """Return the settings that train the embedding, the LM head or rows of them, but for adapter=full."""
        settings = {
            "model.new_tokens": new_tokens,
            "adapter.trainable_token_indices": self.trainable_token_indices,
            "adapter.modules_to_save": self.modules_to_save,
        }
        return [setting for setting, value in settings.items() if value]

    @property
    def starts_as_base(self) -> bool:
        """Return whether the model equals the base before the first step."""
        return not self.decomposes and self.init_from is None

    def shared_factor(self, path: str) -> Literal["A", "B"] | None:
        """Return the factor that all experts of the fused weight at `path` share; None: each has its own."""
        if self.expert_sharing == "shared_outer":
            return "B" if path.endswith("down_proj") else "A"
        return "A" if self.expert_sharing == "shared_a" else "B" if self.expert_sharing == "shared_b" else None

    def rank_of(self, path: str) -> int:
        """Return the rank of the linear at `path`."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """Return lora_alpha of the linear at `path`."""
        return _by_pattern(self.alpha_pattern, path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """Return s in y = x W^T + s (x A^T) B^T: alpha/sqrt(r) (rsLoRA, arXiv 2312.03732) or alpha/r (LoRA)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (rank**0.5 if self.use_rslora else rank)


def _by_pattern(pattern: Mapping[str, Number], path: str, default: Number) -> Number:
    """Return the value of the first key that means `path`."""
    return next((value for key, value in pattern.items() if matches(key, path)), default)


def matches(key: str, path: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern means `path`, by PEFT's rule (get_pattern_key)."""
    return re.match(PATTERN.format(key), path) is not None


DENSE = "bf16"
"""Name of the format of dense weights, which are in the run's dtype."""
MIXED_FORMATS = ("nf4", "int8", "fp8_block", DENSE)
"""Formats that quant=mixed chooses from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """The low-bit format of the base weights."""

    method: Literal["nf4", "keep", "mixed", "none", "auto"] = "nf4"
    """`nf4` keeps the linears of the decoder layers in NF4 with double quantization, 4.127 bits per weight; `none`
    keeps them in the run's dtype. `keep` keeps those that a checkpoint ships in low bits (MXFP4, NVFP4, block FP8,
    4-bit integers, GGUF) with its own codes and scales, and the others dense: training sees the values that are served.
    A checkpoint that bitsandbytes has already quantized to NF4 is kept unchanged with `keep` and with `nf4`, which
    quantizes its fused experts too, and refused with the others. `auto` is `keep` for a checkpoint that can be kept,
    else `none` if that fits the GPUs by calculation (distlora/planner/), else `nf4`: the launcher decides, so
    RUN/config.yaml has one of those three. `mixed` chooses a format for each weight (NF4, int8, FP8 or the run's
    dtype), so that the harm measured in `harm` is least within `budget`."""
    budget: float | None = None
    """Most stored bits per weight with `mixed`, on average over the weights that `nf4` would quantize: 4.13 leaves all
    in NF4. Null if `formats` says which weight has which."""
    harm: str | None = None
    """Folder that `distlora analyze quantization MODEL --formats nf4,int8,fp8,bf16` wrote for this model, which `mixed`
    needs. The launcher reads it once, before the plan."""
    formats: Mapping[str, tuple[str, ...]] | None = None
    """With `mixed`, the weights of each format but NF4 (int8, fp8_block, bf16: the run's dtype), by Hugging Face name.
    The launcher chooses them, so RUN/config.yaml has them, and whatever reads the run."""
    dense_layers: int | Literal["auto"] = 0
    """Number of first decoder layers that keep a copy of their weights in train.dtype beside the quantized ones, for
    the whole run: they are dequantized once, and gathered once if the base is sharded (FSDP2 only). Each takes 2 bytes
    per weight in bf16 on every rank, with its gathered weights. `auto`: as many as fit, by the launcher's calculation.
    On a CPU results are equal; on a GPU they differ by rounding."""
    cache: bool = True
    """Keep the quantized shards, as many bytes as the base in NF4, so that the next start reads them instead of the
    checkpoint, on any number of ranks and bit for bit the same. A checkpoint that is already quantized is not cached. A
    full or read-only disk only prints a warning. This and the next two settings apply only to quant=nf4."""
    cache_dir: str = field(default_factory=lambda: str(cache_root() / "quantized"))
    """Folder of the cache, shared by all nodes or local to each; `distlora cache list` shows it. Use one per user: in a
    shared one, reading another user's entries does not mark them as used, and cache_gb does not remove them."""
    cache_gb: float | None = 200.0
    """Largest size of the cache in GB (1e9 bytes); the least recently used base is removed first. null: no limit."""

    @property
    def default_format(self) -> str | None:
        """Format of the large weights of the layers, unless `formats` has another; None: dense. UserError for `auto`.

        Raises UserError for `mixed` before the launcher has chosen the formats, too.
        """
        require(
            self.method != "mixed" or self.formats is not None,
            "quant=mixed chooses by the harm of each format to each weight, which is not measured yet: run `distlora "
            "analyze quantization MODEL --formats nf4,int8,fp8,bf16 --text DATA --out FOLDER` once, and set "
            "quant.harm=FOLDER",
        )
        return "nf4" if self.method == "mixed" or self.is_nf4 else None

    @property
    def exceptions(self) -> dict[str, str | None]:
        """Formats of the weights that do not have `default_format`, by name; None for the run's dtype."""
        chosen = (self.formats or {}).items()
        return {name: None if format == DENSE else format for format, names in chosen for name in names}

    @property
    def is_nf4(self) -> bool:
        """Return whether linears are kept in NF4. Raises UserError for `auto`, which must be resolved first."""
        require(
            self.method != "auto",
            "quant.method=auto stands for nf4, keep or none, and only `distlora train` and `distlora plan` choose one; "
            "set one of them here",
        )
        return self.method == "nf4"

    @property
    def num_dense(self) -> int:
        """Number of dense layers; 0 for `auto`, before it is resolved."""
        return self.dense_layers if isinstance(self.dense_layers, int) else 0

    @property
    def keeps_shards(self) -> bool:
        """Return whether quantized shards are kept between runs."""
        return self.cache and self.is_nf4


def refused_in_model(model: ModelConfig) -> Refusals:
    """Check the tokens."""
    for key, text in model.special_tokens.items():
        if key not in SPECIAL_TOKENS:
            yield (
                f"model.special_tokens has no {key!r}{nearest(key, SPECIAL_TOKENS)}; set {', '.join(SPECIAL_TOKENS)} "
                "there, and write texts that the vocabulary lacks in model.new_tokens"
            )
        if not text.strip():
            yield f"model.special_tokens.{key} is empty; write the token's text, or leave it out"
    for text in model.new_tokens:
        if not text.strip() == text != "":
            what = f"model.new_tokens has {text!r}, which is empty or has spaces around it"
            yield f"{what}; write the token's text alone"
    if (text := twice(model.new_tokens)) is not None:
        yield f"model.new_tokens names {text} twice; leave one out"


def refused_in_adapter(adapter: AdapterConfig) -> Refusals:
    """Check ranks, starts and trained rows."""
    if adapter.r <= 0:
        yield "r= is not a valid rank; set {field}=1 or more (16 is a common start)"
    yield from positive(adapter, "lora_alpha")
    check_init(adapter.init)
    if adapter.decomposes and adapter.init_from is not None:
        other = f"adapter.init_from={adapter.init_from}"
        yield f"init= has no effect with {other}, which holds A and B; leave one of them out"
    if adapter.init_from_loftq and adapter.init_from is None:
        yield "init_from_loftq= has no effect without adapter.init_from, whose file records it; leave it out"
    if adapter.decomposes and adapter.use_dora:
        cure = "set adapter.use_dora=false or adapter.init=kaiming"
        yield f"init= cannot be combined with adapter.use_dora=true; {cure}"
    if not adapter.target_modules and not adapter.target_parameters:
        yield "adapter.target_modules is empty; set adapter.target_modules=all-linear"
    if not 0 <= adapter.lora_dropout < 1:
        yield "lora_dropout= is not a fraction below 1; set {field}=0.05 or 0"
    yield from _trained_rows(adapter)
    for setting in ("rank_pattern", "alpha_pattern"):
        for key, value in getattr(adapter, setting).items():
            where = f"adapter.{setting}.{key}"
            if not 0 < value < math.inf:
                yield f"{where}={value} must be positive; set it to a number above 0"
            try:
                re.compile(PATTERN.format(key))
            except re.error as error:
                yield f"{where}: {key!r} is not a valid regular expression ({error}); write a module's name"


def _trained_rows(adapter: AdapterConfig) -> Refusals:
    """Check ids of tokens, and modules that are trained whole."""
    indices, setting = adapter.trainable_token_indices, "adapter.trainable_token_indices"
    for matrix, ids in indices.items() if isinstance(indices, Mapping) else [("", indices or ())]:
        where = f"{setting}.{matrix}" if matrix else setting
        if matrix:
            require_choice(f"{setting}'s matrix", matrix, SAVED_MODULES)
            if not ids:
                yield f"{where} is empty; leave {matrix} out"
        if (negative := next((id for id in ids if id < 0), None)) is not None:
            yield f"{where} has {negative}, and ids of tokens start at 0; write the token's id"
        if (repeated := twice(ids)) is not None:
            yield f"{where} has {repeated} twice; leave one out"
    whole = adapter.modules_to_save
    for name in whole:
        if name not in SAVED_MODULES:
            yield (
                f"adapter.modules_to_save has {name!r}{nearest(name, SAVED_MODULES)}; only "
                f"{' and '.join(SAVED_MODULES)} can be trained fully beside adapters, and adapter=full trains "
                "everything"
            )
    if (again := twice(whole)) is not None:
        yield f"adapter.modules_to_save names {again} twice; leave one out"
    rows = indices if isinstance(indices, Mapping) else {SAVED_MODULES[0]: indices or ()}
    for name in filter(rows.get, whole):
        what = f"{setting} trains rows of {name}, which adapter.modules_to_save trains fully"
        yield f"{what}; leave it out of one of them"


def refused_in_quant(quant: QuantConfig) -> Refusals:
    """Check the format of the base and its cache."""
    for name in ("budget", "harm", "formats"):
        if quant.method != "mixed" and getattr(quant, name) is not None:
            yield f"quant.{name} has no effect with quant={quant.method}; leave it out, or set quant=mixed"
    if quant.budget is not None and not 4 < quant.budget <= 32:
        bits = "a number of bits per weight that formats of 4.13 to 16 bits can meet"
        yield f"budget= is not {bits}; set {{field}}=4.5"
    for format in quant.formats or {}:
        require_choice("quant.formats' key", format, MIXED_FORMATS[1:])
    if (name := twice(name for names in (quant.formats or {}).values() for name in names)) is not None:
        yield f"quant.formats has {name} twice; leave one out"
    if quant.dense_layers != "auto" and not count_from(quant.dense_layers, least=0):
        yield "dense_layers= is not a valid number of layers; set it to 0 or more, or to auto (as many as fit)"
    if quant.dense_layers != 0 and quant.method == "none":
        cure = "leave it out, or set quant=nf4"
        yield f"dense_layers= has no effect with quant=none, which dequantizes nothing; {cure}"
    if quant.cache_gb is not None and not 0 < quant.cache_gb < math.inf:
        cure = "set quant.cache_gb=200, null for no limit, or quant.cache=false to keep nothing"
        yield f"cache_gb= is not a positive number of gigabytes; {cure}"
