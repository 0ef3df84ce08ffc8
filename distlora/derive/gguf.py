"""Describe a GGUF file as a folder in Hugging Face format without weights.

transformers rebuilds config.json and the tokenizer from the file's metadata, names its tensors, and undoes what
llama.cpp's converter does to them. Its functions for that run here on the positions of rows instead of on weights, so
gguf.json can tell where the rows of each parameter lie in the file, and weights are read from there when they are
needed. Refused by name: an operation that does more than move rows or subtract one, a tensor without a parameter, a
parameter without a tensor, and metadata that config.json contradicts.

The header is read here: the gguf package's reader makes a numpy array of every token, which takes seconds, and tells of
damage by whatever numpy raises. Its table of types is used.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distlora.architecture.checkpoint_files import refused_by_transformers
from distlora.architecture.gguf_folder import header_digest
from distlora.config import UserError, require
from distlora.config.errors import short
from distlora.model.hf_model import auto_class_of, transformers_model

_INSTEAD = "set {model.path} to the model's safetensors"
ROPE_FACTORS = "rope_freqs.weight"

_ATTRIBUTES = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "rotary_dim",
    "rope.freq_base": "rope_theta",
}
"""config.json's names for metadata of an architecture, where transformers' own table has none."""

_LARGE_GEMMA = {("gemma2", 46), ("gemma3_text", 62)}
"""Models of 27B, whose scale of attention stands neither in the file nor in transformers' table."""

_DIGITS = ("smollm", "starcoder", "refact", "command-r")
"""Values of tokenizer.ggml.pre by which each digit is a token, which transformers does not know."""


def describe(file: Path, folder: Path) -> str:
    """Write config.json and the tokenizer, and return the content of gguf.json.

    Raises UserError for what cannot be read exactly.
    """
    header = read_gguf_header(file)
    settings, known = settings_of(file, header)
    with refused_by_transformers(file):
        from transformers import AutoConfig

        config = AutoConfig.for_model(**settings)
        if ROPE_FACTORS in header.tensors:
            config.rope_parameters = llama3_rope(file, header.tensors[ROPE_FACTORS], config)
    auto_class = auto_class_of(config, file)
    model = transformers_model(config, file, auto_class=auto_class, attention="eager", dtype=torch.float32)
    config.architectures = [type(model).__name__]
    check_metadata(file, header, config, known)
    with refused_by_transformers(file):
        parameters, orders = find_parameters(file, header, model, settings)
        tokenizer = tokenizer_of(file, header)
    tokenizer.model_max_length = config.max_position_embeddings
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _keep_rules(tokenizer, folder)
    note = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "header_bytes": header.size,
        "header_sha256": header_digest(file, header.size),
        "orders": orders,
        "parameters": parameters,
    }
    return json.dumps(note)


def settings_of(file: Path, header: GgufHeader) -> tuple[dict[str, Any], Mapping[str, str | None]]:
    """Return (settings of config.json, transformers' table from the architecture's metadata to their names)."""
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    architecture, parts = header.metadata.get("general.architecture"), header.metadata.get("split.count", 0)
    require(
        parts < 2,
        f"{file} is one of {parts} parts; merge them with `llama-gguf-split --merge FIRST_PART OUT.gguf`, and set "
        "{model.path}=OUT.gguf",
    )
    blocks = header.metadata.get(f"{architecture}.block_count")
    require(  # gguf makes a dozen names for each.
        not isinstance(blocks, int) or blocks <= len(header.tensors),
        f"{file} is damaged: {architecture}.block_count={blocks} is more than its {len(header.tensors)} tensors; "
        "download it again",
    )
    try:
        settings: dict[str, Any] = load_gguf_checkpoint(str(file))["config"]
        settings.pop("_model_name_or_path", None)
        tables: Any = GGUF_CONFIG_MAPPING
        known: Mapping[str, str | None] = tables[str(settings["model_type"]).removesuffix("_text")]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{file}: transformers does not read general.architecture={short(architecture)} ({error}); {_INSTEAD}"
        ) from error
    require(
        (settings["model_type"], settings.get("num_hidden_layers")) not in _LARGE_GEMMA,
        f"{file}: the file does not state the scale of attention of {architecture} 27B; {_INSTEAD}",
    )
    for key, name in _ATTRIBUTES.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if value is not None and known.get(key) is None and not name.startswith("ro"):
            settings.setdefault(name, value)
    return settings, known


def _keep_rules(tokenizer: Any, folder: Path) -> None:
    """Have a saved tokenizer read by transformers' general class where its own class would replace its rules.

    For some types, such as qwen2, transformers takes their own class all the same, as it does for any folder.
    """
    from transformers import AutoTokenizer

    reread = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if reread.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        path, general = folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(json.loads(path.read_text()) | general, indent=2))


def llama3_rope(file: Path, tensor: StoredTensor, config: Any) -> dict[str, Any]:
    """Return the rope_parameters of Llama 3.1 and later. The file holds only what they divide each frequency by.

    Raises UserError if those are other divisors.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with file.open("rb") as stream:
        stream.seek(tensor.offset)
        stored = torch.frombuffer(bytearray(stream.read(4 * math.prod(tensor.shape))), dtype=torch.float32)
    plain, theta = dict(config.rope_parameters), config.rope_parameters["rope_theta"]
    config.rope_parameters = plain | {
        "rope_type": "llama3",
        "factor": round(float(stored.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _attribute(config, "head_dim")
    divisors = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size) / frequencies.double()
    if divisors.shape != stored.shape or not torch.allclose(divisors.float(), stored, rtol=1e-5, atol=0):
        raise UserError(f"{file}: {ROPE_FACTORS} is not what Llama 3.1 and later have; {_INSTEAD}")
    return dict(config.rope_parameters)


def check_metadata(file: Path, header: GgufHeader, config: Any, known: Mapping[str, str | None]) -> None:
    """Raise UserError for metadata of the architecture that config.json contradicts, or has no setting for."""
    prefix = f"{header.metadata['general.architecture']}."
    for full, value in header.metadata.items():
        key = full.removeprefix(prefix)
        if key == full or (key, value) == ("rope.scaling.type", "none"):
            continue
        name = known.get(key) or _ATTRIBUTES.get(key)
        actual = None if name is None else _attribute(config, name)
        if name is None:
            raise UserError(
                f"{file}: transformers ignores {full}={short(value)}, so the model could compute something else; "
                f"{_INSTEAD}"
            )
        same = actual == value or (isinstance(actual, float) and math.isclose(actual, value, rel_tol=1e-6))
        require(
            same,
            f"{file}: the file has {full}={short(value)}, but "
            f"transformers' config has {name}={short(actual)}; {_INSTEAD}",
        )


def _attribute(config: Any, name: str) -> Any:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    match name:
        case "rope_theta":
            return rope.get(name)
        case "head_dim":
            return getattr(config, name, None) or config.hidden_size // config.num_attention_heads
        case "rotary_dim":
            return int(_attribute(config, "head_dim") * (rope.get("partial_rotary_factor") or 1.0))
    return getattr(config, name, None)


def find_parameters(
    file: Path, header: GgufHeader, model: Any, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[list[list[int]]]]:
    """Return (gguf.json's entry of each parameter, the orders of rows that they name by number)."""
    from transformers import modeling_gguf_pytorch_utils as reading

    architecture = header.metadata["general.architecture"]
    processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(config=settings)
    names = reading.get_gguf_hf_weights_map(model, processor)
    parsed: dict[str, dict[str, Any]] = {"tensors": {}}
    starts, tensors = list[int](), list[StoredTensor]()
    following = 1  # Row 0 is no tensor's: transformers fills with zeros.
    for name, tensor in header.tensors.items():
        if name == ROPE_FACTORS:
            continue
        probe = 4.0 * (following + np.arange(tensor.rows))
        if len(tensor.shape) > 1:  # Two columns tell whether rows stay whole.
            probe = (probe[:, None] + np.arange(2)).reshape(*tensor.shape[:-1], 2)
        starts.append(following)
        tensors.append(tensor)
        following += tensor.rows + 1  # A gap, so that no run of rows goes on in the next tensor.
        result = processor.process(weights=probe, name=name, tensor_key_mapping=names, parsed_parameters=parsed)
        if result.name is None:
            continue
        require(result.name in names, f"{file}: transformers has no parameter for the tensor {name}; {_INSTEAD}")
        parsed["tensors"][names[result.name]] = torch.from_numpy(np.array(result.weights))
    tied, placed = set(model.all_tied_weights_keys), parsed["tensors"]
    parameters, orders = dict[str, Any](), dict[tuple[tuple[int, int], ...], int]()
    for name, parameter in model.state_dict().items():
        if name in tied and name not in placed:
            continue
        if name not in placed:
            raise UserError(f"{file}: no tensor of it is transformers' parameter {name}; {_INSTEAD}")
        entry = _entry(placed.pop(name).double().numpy(), tuple(parameter.shape), starts, tensors)
        if entry is None:
            raise UserError(
                f"{file}: transformers makes {name} by more than moving rows and subtracting one, or in another "
                f"shape than {list(parameter.shape)}; {_INSTEAD}"
            )
        order = entry.pop("order")
        entry["order"] = None if order is None else orders.setdefault(order, len(orders))
        parameters[name] = entry
    require(
        not placed, f"{file}: transformers reads {next(iter(placed), '')}, which its model does not have; {_INSTEAD}"
    )
    return parameters, [[list(run) for run in order] for order in orders]


def _entry(
    values: np.ndarray[Any, Any], shape: tuple[int, ...], starts: list[int], tensors: list[StoredTensor]
) -> dict[str, Any] | None:
    """Return a parameter's entry in gguf.json from the probe's values in it; None if they are more than whole rows.

    `starts`: number of the first row of each tensor.
    """
    flat = values.reshape(-1)
    if not np.isfinite(flat).all() or flat.min() < 3:
        return None
    first = tensors[bisect.bisect_right(starts, math.ceil(flat[0] / 4)) - 1]
    if len(first.shape) > 1:
        if values.shape[-1] != 2 or not (values[..., 1] == values[..., 0] + 1).all() or shape[-1] != first.width:
            return None
        flat = values[..., 0].reshape(-1)
    minus_one = bool(flat[0] % 4 == 3)
    rows, rest = np.divmod(flat + minus_one, 4)
    used, member_of = np.unique(np.searchsorted(starts, rows, side="right") - 1, return_inverse=True)
    members = [tensors[index] for index in used]
    if rest.any() or {each.width for each in members} != {first.width} or len(rows) * first.width != math.prod(shape):
        return None
    before = [0, *itertools.accumulate(each.rows for each in members)]
    in_parts = rows - np.take(np.take(starts, used) - before[:-1], member_of)
    breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    runs = tuple((int(in_parts[start]), stop - start) for start, stop in itertools.pairwise(breaks))
    return {
        "shape": list(shape),
        "width": first.width,
        "minus_one": minus_one,
        "sources": [[each.type, each.offset, each.num_bytes, each.block, each.block_bytes] for each in members],
        "order": None if runs == ((0, before[-1]),) else runs,
    }


def tokenizer_of(file: Path, header: GgufHeader) -> Any:
    """Return the tokenizer that a file describes. Raises UserError if transformers would split texts otherwise."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, split = (header.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    require(
        kind != "gpt2" or split in ("gpt-2", *_DIGITS, *GGUF_PRE_TOKENIZER_SPLITS),
        f"{file}: tokenizer.ggml.pre={short(split)} is not one that transformers splits texts by; {_INSTEAD}",
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    within = [token for token in spec["added_tokens"] if token["id"] < header.metadata["tokenizer.ggml.tokens"]]
    if len(within) < len(spec["added_tokens"]):  # transformers adds GPT-2's <|endoftext|> behind the last token.
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec | {"added_tokens": within}))
    if kind == "gpt2" and split in _DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


_AGAIN = "download it again"
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's format of each type of a number."""
_STRING, _ARRAY = 8, 9


class StoredTensor(NamedTuple):
    """A tensor of the file."""

    shape: tuple[int, ...]
    """As in torch: the last dimension is a row."""
    type: str
    """ggml's name of the type: Q4_K."""
    offset: int
    """Position of the first byte in the file."""
    num_bytes: int
    block: int
    """Weights of a block, which is decoded as a whole."""
    block_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows; of a vector, its elements."""
        return math.prod(self.shape) // self.width

    @property
    def width(self) -> int:
        """Weights of a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1


class GgufHeader(NamedTuple):
    """The header of a GGUF file."""

    metadata: dict[str, Any]
    """Values by key; of an array of strings its length."""
    tensors: dict[str, StoredTensor]
    size: int
    """Bytes of the header: where the data begins."""


def read_gguf_header(file: Path) -> GgufHeader:
    """Return the header. Raises UserError, with the tensor's name, for a damaged or truncated file."""
    require(file.stat().st_size >= 24, f"{file} is truncated: it has no header; {_AGAIN}")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parser = _Parser(file, data)
        try:
            return parser.header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise parser.damage(f"{parser.reading} ends beyond the file or is not text ({error})") from error


class _Parser:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.place, self.reading = file, data, 0, "its header"

    def damage(self, what: str) -> UserError:
        return UserError(f"{self.file} is damaged: {what}; {_AGAIN}")

    def unpack(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{format}", self.data, self.place)
        self.place += struct.calcsize(f"<{format}")
        return values

    def string(self) -> bytes:
        (length,) = self.unpack("Q")
        if length > len(self.data) - self.place:
            raise self.damage(f"{self.reading} has a text of {length:,} bytes")
        self.place += length
        return self.data[self.place - length : self.place]

    def value(self) -> Any:
        (kind,), inner, count = self.unpack("I"), None, 0
        if kind == _ARRAY:
            inner, count = self.unpack("IQ")
        if inner == _STRING:
            return len([self.string() for _ in range(count)])
        if kind == _STRING:
            return self.string().decode()
        if (format := _FORMATS.get(kind if inner is None else inner)) is None or count > len(self.data):
            raise self.damage(f"{self.reading} is of the unknown type {kind}, {inner}")
        values = self.unpack(format if inner is None else f"{count}{format}")
        return values[0] if inner is None else list(values)

    def header(self) -> GgufHeader:
        magic, version, tensors, keys = self.unpack("4sIQQ")
        require(magic == b"GGUF", f"{self.file} is not a GGUF file; set {{model.path}} to one")
        require(version in (2, 3), f"{self.file} is GGUF version {version}; convert it again to version 3")
        metadata = dict[str, Any]()
        for number in range(keys):
            self.reading = f"key {number + 1}"
            self.reading = self.string().decode()
            if self.reading in metadata:
                raise self.damage(f"it has {short(self.reading)} twice")
            metadata[self.reading] = self.value()
        entries = dict[str, tuple[tuple[int, ...], int, int]]()
        for _ in range(tensors):
            self.reading = f"the tensor behind {self.reading}"
            name = self.reading = self.string().decode()
            (dimensions,) = self.unpack("I")
            if not 1 <= dimensions <= 4 or name in entries:
                raise self.damage(f"{short(name)} is there twice or has {dimensions} dimensions")
            entries[name] = (self.unpack(f"{dimensions}Q")[::-1], *self.unpack("IQ"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self.damage(f"general.alignment={alignment}")
        end = start = -(-self.place // alignment) * alignment
        described, last = dict[str, StoredTensor](), "the header"
        for name, entry in sorted(entries.items(), key=lambda item: item[1][2]):
            described[name] = tensor = self.tensor(name, *entry, start)
            if tensor.offset != end:
                raise self.damage(f"{name} begins at byte {tensor.offset:,}, not behind {last} at {end:,}")
            if (stop := tensor.offset + tensor.num_bytes) > (size := len(self.data)):
                raise UserError(f"{self.file} is truncated: {name} ends at byte {stop:,} of {size:,}; {_AGAIN}")
            end, last = -(-(stop - start) // alignment) * alignment + start, name
        return GgufHeader(metadata, {name: described[name] for name in entries}, start)

    def tensor(self, name: str, shape: tuple[int, ...], number: int, offset: int, start: int) -> StoredTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if number not in set(GGMLQuantizationType):
            raise self.damage(f"{name} has the unknown type {number}")
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        require(
            block > 1 or kind.name in ("F32", "F16", "BF16"),
            f"{self.file}: {name} is stored as {kind.name}; set {{model.path}} to a file of another type",
        )
        if not all(shape) or shape[-1] % block:
            raise self.damage(f"{name} has rows of {shape[-1]:,} weights, and {kind.name} blocks of {block}")
        return StoredTensor(
            shape, kind.name, start + offset, math.prod(shape) // block * block_bytes, block, block_bytes
        )
