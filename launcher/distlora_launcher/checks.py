"""What can be refused without torch, before any process starts: the model's folder, the data's head, the machine.

Every refusal is a UserError with the value, the reason and what to type instead. Ranges and names of single settings
are checked where they are declared, in distlora.config.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from distlora.config import MODEL_FAMILIES, Config, UserError, nearest
from distlora.loading.segments import SOURCE_DTYPES, Segment, read_headers
from distlora.targets import select_targets

HEAD_LINES = 1000
"""Lines of a data file that are read here; the preparation process reads them all."""

_BLOCK_WEIGHT = re.compile(r"(model\.layers\.(\d+)\..+)\.weight")


def check(config: Config, *, new_run: bool) -> None:
    """Refuse what cannot run. `new_run`: the run folder must not hold a run yet."""
    try:
        if new_run:
            check_run_dir(Path(config.run_dir))
        check_machine(config)
        check_model(config)
        check_data(config)
        check_writable(Path(config.data.cache_dir), "data.cache_dir")
    except OSError as error:  # No permission, a name too long, a broken disk: the system's reason says enough.
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def check_run_dir(run_dir: Path) -> None:
    """Refuse a folder that holds another run, and a place where no folder can be made."""
    if (run_dir / "config.yaml").is_file():
        raise UserError(
            f"run_dir={run_dir} already holds a run; continue it with `distlora resume {run_dir}`, "
            "or set another run_dir"
        )
    check_writable(run_dir, "run_dir")


def check_writable(place: Path, setting: str) -> None:
    """Refuse a folder that cannot be made or written, by trying: permissions do not tell all (root, /proc)."""
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"{setting}={place}: {existing} is a file; set another {setting}")
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{setting}={place}: cannot write in {existing} ({error.strerror}); set another {setting}"
        ) from error


def gpu_count() -> int:
    """NVIDIA GPUs that processes of this shell may use: CUDA_VISIBLE_DEVICES where it is set, else the device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[len("nvidia") :].isdigit()])


def check_machine(config: Config) -> None:
    """Refuse more processes than GPUs; a machine without one runs as many CPU processes as it is told to."""
    wanted, available = config.cluster.gpus_per_node, gpu_count()
    if 0 < available < wanted:
        raise UserError(
            f"cluster.gpus_per_node={wanted}, but this machine shows {available} GPU{'s' if available > 1 else ''}; "
            f"set cluster.gpus_per_node={available}"
        )


def check_model(config: Config) -> None:
    """Refuse a folder that is no model of a known family, damaged weights, and what this model cannot do."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        raise UserError(_no_folder(folder))
    model = read_model_config(folder)
    limit = model.get("max_position_embeddings")
    if isinstance(limit, int) and config.data.sequence_length > limit:
        raise UserError(
            f"data.sequence_length={config.data.sequence_length:,} is beyond the model's {limit:,} positions "
            f"(max_position_embeddings in {folder / 'config.json'}); set data.sequence_length={limit} or less"
        )
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} holds no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt); "
            "copy the tokenizer's files into it (tokenizer.save_pretrained writes them)"
        )
    tensors = read_headers(folder)
    check_tensors(folder, model, tensors)
    if config.adapter.method == "lora":
        select_targets(config.adapter.target_modules, linear_names(tensors))


def _no_folder(folder: Path) -> str:
    if folder.exists():
        return f"model.path={folder} is a file; point it at the folder that holds config.json and the safetensors"
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, siblings)
    if not hint and not folder.parent.exists():
        hint = (
            "; is it a name on the Hugging Face hub? Download it first, with "
            "`hf download NAME --local-dir FOLDER`, and set model.path=FOLDER"
        )
    return f"model.path={folder} does not exist{hint}"


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a supported, unquantized model. Raises UserError for anything else."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; point model.path at a model's folder in Hugging Face format")
    try:
        model = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(model, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    model_type = model.get("model_type")
    if model_type not in MODEL_FAMILIES:
        families = ", ".join(MODEL_FAMILIES) + nearest(str(model_type), MODEL_FAMILIES)
        raise UserError(f"{path}: model_type={model_type!r} is not supported; the supported families are {families}")
    if "quantization_config" in model:
        raise UserError(
            f"{path} has a quantization_config: a base that is already quantized cannot be read yet; "
            "set model.path to the 16-bit checkpoint (quant=nf4 quantizes it while it is read)"
        )
    return model


def has_tokenizer(folder: Path) -> bool:
    alternatives = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).is_file() for name in names) for names in alternatives)


def check_tensors(folder: Path, model: dict[str, Any], tensors: dict[str, Segment]) -> None:
    """Refuse a checkpoint that lacks a block, the embedding, the last norm or the head, or has odd dtypes."""
    num_layers = model.get("num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers={num_layers!r} is not a number of layers")
    needed = ["model.embed_tokens.weight", "model.norm.weight"]
    needed += [] if model.get("tie_word_embeddings", False) else ["lm_head.weight"]
    suffixes = {name.split(".", 3)[3] for name in tensors if _BLOCK_WEIGHT.fullmatch(name)}
    needed += [f"model.layers.{layer}.{suffix}" for layer in range(num_layers) for suffix in sorted(suffixes)]
    absent = [name for name in needed if name not in tensors]
    if absent or not suffixes:
        first = absent[0] if absent else "model.layers.0"
        count = f" ({len(absent)} tensors are missing in all)" if len(absent) > 1 else ""
        raise UserError(f"{folder}: no tensor {first} in its safetensors{count}; download the checkpoint again")
    for name in needed:
        if tensors[name].dtype not in SOURCE_DTYPES:
            raise UserError(
                f"{tensors[name].file}: {name} is stored as {tensors[name].dtype}; a base must be "
                f"{', '.join(SOURCE_DTYPES)}, so set model.path to such a checkpoint"
            )


def linear_names(tensors: dict[str, Segment]) -> list[str]:
    """Paths of the linears in the decoder blocks: the two-dimensional weights under model.layers.N."""
    matches = ((_BLOCK_WEIGHT.fullmatch(name), segment) for name, segment in tensors.items())
    return [match[1] for match, segment in matches if match and len(segment.shape) == 2]


def check_data(config: Config) -> None:
    """Refuse data files that are absent, empty or broken within their first lines."""
    from distlora.data.formats import check_head

    check_head(Path(config.data.path), config.data.format, limit=HEAD_LINES)
    if config.data.eval_path is not None:
        check_head(Path(config.data.eval_path), config.data.format, limit=HEAD_LINES)
