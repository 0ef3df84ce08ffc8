"""Convert PiSSA's adapter into a plain LoRA of twice the rank for the unchanged base, and back.

Training runs on W_res = W - s B0 A0 and gives W_res + s B A = W + s (B A - B0 A0) = W + s B' A' with A' = [A; A0] (2r,
in) and B' = [B, -B0] (out, 2r) (Meng et al. 2024, arXiv 2404.02948). The rank doubles, and lora_alpha grows so that s
stays the same, for every entry of rank_pattern and alpha_pattern too.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distlora.config import AdapterConfig, UserError
from distlora.config.base import is_pissa
from distlora.config.json_files import read_object
from distlora.loading.tensor_files import DeferredTensor
from distlora.system import atomic_io
from distlora.weights.initial_adapter_file import initial_adapter_path
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME


def plain_config(trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json of the plain LoRA from that of the trained adapter."""
    growth = 2**0.5 if trained["use_rslora"] else 2.0
    return {
        **trained,
        "r": 2 * trained["r"],
        "lora_alpha": growth * trained["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in trained["rank_pattern"].items()},
        "alpha_pattern": {key: growth * alpha for key, alpha in trained["alpha_pattern"].items()},
        "init_lora_weights": True,
    }


def trained_config(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json of the trained adapter from that of the plain LoRA."""
    growth = 2**0.5 if plain["use_rslora"] else 2.0
    return {
        **plain,
        "r": plain["r"] // 2,
        "lora_alpha": plain["lora_alpha"] / growth,
        "rank_pattern": {key: rank // 2 for key, rank in plain["rank_pattern"].items()},
        "alpha_pattern": {key: alpha / growth for key, alpha in plain["alpha_pattern"].items()},
    }


def plain_tensors(trained: Mapping[str, Tensor], start_file: Path) -> dict[str, Tensor | DeferredTensor]:
    """Return A' and B' by PEFT's names; A0 and B0 are read from `start_file` when each tensor is made.

    Tensors trained beside A and B stay the same. Nothing is read here: every rank calls this, and a rank that alone
    failed to read the file would leave the others waiting in a collective.
    """

    def unmade(name: str, tensor: Tensor) -> DeferredTensor:
        shape = list(tensor.shape)
        shape[_dim(name)] *= 2

        def make() -> Tensor:
            with safe_open(start_file, framework="pt") as file:
                return _joined(name, tensor.detach().cpu(), file.get_tensor(name))

        return DeferredTensor(shape=torch.Size(shape), dtype=tensor.dtype, make=make)

    return {name: unmade(name, tensor) if is_pair(name) else tensor for name, tensor in trained.items()}


def is_pair(name: str) -> bool:
    """Return whether PEFT's name is that of an A or B."""
    return ".lora_" in name


def write_plain(checkpoint: Path, start_file: Path, target: Path) -> None:
    """Write the plain LoRA of a saved PiSSA step into the folder `target`."""
    plain = plain_tensors(load_file(checkpoint / WEIGHTS_NAME), start_file)
    tensors = {name: tensor.make() if isinstance(tensor, DeferredTensor) else tensor for name, tensor in plain.items()}
    save_file(tensors, target / WEIGHTS_NAME, metadata={"format": "pt"})
    atomic_io.write_json(target / CONFIG_NAME, plain_config(json.loads((checkpoint / CONFIG_NAME).read_text("utf-8"))))


@contextlib.contextmanager
def plain_form(folder: Path, adapter: AdapterConfig, run_dir: str | Path) -> Iterator[Path]:
    """Yield the folder of an adapter for the unchanged base.

    That is `folder` itself; for a saved PiSSA step it is a temporary folder with the plain LoRA.
    """
    says = read_object(folder / CONFIG_NAME, "save the adapter again") if adapter.pissa else {}
    if not is_pissa(str(says.get("init_lora_weights"))):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="distlora-plain-") as place:
        write_plain(folder, initial_adapter_path(run_dir), Path(place))
        yield Path(place)


def trained_part(name: str, plain: Tensor, start: Tensor, folder: Path) -> Tensor:
    """Return A or B from A' or B' in `folder`. Raises UserError if the adapter had other initial values."""
    dim = _dim(name)
    trained = plain.narrow(dim, 0, plain.shape[dim] // 2)
    if plain.shape[dim] != 2 * start.shape[dim] or not torch.equal(plain, _joined(name, trained, start)):
        raise UserError(
            f"{folder} was trained from another start: {name} does not end with that of this run; put back the folder "
            "that this run made"
        )
    return trained


def _dim(name: str) -> int:
    """Return the dimension of A or B that is as wide as the rank."""
    return 0 if ".lora_A." in name else 1


def _joined(name: str, trained: Tensor, start: Tensor) -> Tensor:
    return torch.cat([trained, start if _dim(name) == 0 else -start], dim=_dim(name))
