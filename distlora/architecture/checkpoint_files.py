"""The folder of a base model: its config.json, its safetensors headers and its fingerprint, each read once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlora.architecture.config_checks import read_config
from distlora.architecture.gguf_folder import read_gguf_note, stored_parts
from distlora.architecture.low_bit_headers import meaning_of
from distlora.architecture.low_bit_methods import with_low_bit
from distlora.architecture.safetensors_headers import Segment, read_headers
from distlora.config import UserError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SAMPLE_BYTES = 4096


class CheckpointFiles:
    """Metadata of a checkpoint, without its weights. Make one per start and hand it on.

    Nothing is read before it is needed. `config` raises UserError without a valid config.json, `stored`, `headers` and
    `fingerprint` for missing or damaged safetensors files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_config(self.folder)

    @functools.cached_property
    def _in_gguf(self) -> Mapping[str, Segment] | None:
        """The parameters in the GGUF file that the folder describes, or None."""
        return read_gguf_note(self.folder)

    @functools.cached_property
    def stored(self) -> Mapping[str, Segment]:
        """Every tensor by its name on disk."""
        return read_headers(self.folder) if self._in_gguf is None else stored_parts(self._in_gguf)

    @functools.cached_property
    def headers(self) -> Mapping[str, Segment]:
        """Every weight by its name, one in low bits as a `LowBitSegment` that stands for its tensors."""
        return with_low_bit(self.stored, self.folder, self.config) if self._in_gguf is None else self._in_gguf

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of each tensor's name, dtype, shape and 4 KiB from its middle, and of how low bits are decoded.

        It tells two bases apart within a second, because training changes bytes everywhere. Checkpoints that differ
        only outside of the sampled bytes have the same fingerprint.
        """
        digest = hashlib.sha256()
        for name, segment in sorted(self.stored.items()):
            digest.update(f"{name} {segment.dtype} {segment.shape}\n".encode())
            with segment.file.open("rb") as stream:
                stream.seek(segment.offset + max(segment.num_bytes // 2 - _SAMPLE_BYTES // 2, 0))
                digest.update(stream.read(min(_SAMPLE_BYTES, segment.num_bytes)))
        digest.update(meaning_of(self.headers))
        return digest.hexdigest()


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """Read a model's config.json through transformers. Raises UserError for values that transformers refuses."""
    from transformers import AutoConfig

    with refused_by_transformers(Path(folder) / "config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for settings in (config, config.get_text_config()):
        if hasattr(settings, "quantization_config"):  # What is built and saved is dense.
            del settings.quantization_config
    return config


def hf_config_of(model: Mapping[str, Any], place: Path | str) -> PretrainedConfig:
    """Return transformers' config of the content of a config.json. Raises UserError if transformers refuses it."""
    from transformers import CONFIG_MAPPING

    settings = {name: value for name, value in model.items() if name != "quantization_config"}
    model_type = str(settings.pop("model_type", None))
    if model_type not in CONFIG_MAPPING:
        version = importlib.metadata.version("transformers")
        raise UserError(
            f"{place}: model_type={model_type!r} is not a model of transformers {version}"
            f"{nearest(model_type, CONFIG_MAPPING)}; upgrade transformers, or set {{model.path}} to another model"
        )
    with refused_by_transformers(place):
        return CONFIG_MAPPING[model_type].from_dict(settings)


@contextlib.contextmanager
def refused_by_transformers(place: Path | str) -> Iterator[None]:
    """Report any exception of transformers and torch as a UserError that names config.json.

    They check a value where they first compute with it, so the exception may be of any type.
    """
    from huggingface_hub.errors import StrictDataclassError

    kinds = (StrictDataclassError, ValueError, TypeError, ArithmeticError, RuntimeError, AttributeError, LookupError)
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"transformers cannot build {place}: {' '.join(str(error).split())}") from error
    except kinds as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        version = importlib.metadata.version("transformers")
        raise UserError(
            f"transformers cannot build {place}: {reason}; transformers {version} is installed: install the release "
            "that wrote the file, correct it, or set {model.path} to another model"
        ) from error
