"""Load the peers' models as their users do, and run accelerate's FSDP2 on a CPU."""

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

Storage = Literal["nf4 in bf16", "nf4 in uint8", "bf16"]
"""How a peer keeps its base: bnb_4bit_quant_storage=bfloat16, bitsandbytes' default uint8, or not quantized."""


def load_base(
    folder: Path | str,
    storage: Storage = "nf4 in uint8",
    *,
    device: torch.device | None = None,
    auto_class: str = "AutoModelForCausalLM",
    dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """Load transformers' model of a folder in NF4 with double quantization, onto `device` if it is given."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.bfloat16 if storage == "nf4 in bf16" else torch.uint8,
    )
    return getattr(transformers, auto_class).from_pretrained(
        folder,
        quantization_config=config,
        device_map=None if device is None else {"": device},
        dtype=dtype,
        trust_remote_code=False,
    )


def fsdp2_accelerator(*, forced: bool) -> Any:
    """Return an Accelerator in bf16 with the FSDP2 plugin.

    On a CPU accelerate silently replaces its FSDP2 plugin by DistributedDataParallel. With `forced` the state that its
    device check would set on a GPU is set here; all else is accelerate's own code.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16", fsdp_plugin=plugin)
    if forced:
        # accelerate/state.py does this for a GPU or another accelerator that it knows.
        plugin.set_mixed_precision("bf16")
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def trained(model: Any) -> list[torch.Tensor]:
    """Return the parameters that have gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe(model: Any) -> str:
    """Return the model's class and how many of its tensors are sharded."""
    parameters = list(model.parameters())
    sharded = sum(isinstance(parameter, DTensor) for parameter in parameters)
    return f"{type(model).__name__}, {sharded} of {len(parameters)} tensors sharded"
