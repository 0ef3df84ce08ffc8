"""Count the launches of a decoder layer on the GPU path, its kernels in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from distlora.model import fused_modules
from distlora.model.adapters import AdaptedLinear, AdapterCopies
from distlora.model.build import CausalLM
from distlora.planner.memory.device import copied_adapters
from distlora.planner.model import model_in
from distlora.planner.workload import Workload
from distlora.training.objectives import objective
from distlora_kernels import fused, nf4_triton
from support.family_models import config_for, load_ours, positions_of, tokens
from support.plan_inputs import machine_of
from support.small_models import write_model_folder

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}


class Launches(TorchDispatchMode):
    """Count kernels of Triton, and operations that write memory: views and allocations launch nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self._depth = 0
        launch = interpreter.GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.by_name[executor.fn.__name__] += 1
            self._depth += 1  # The interpreter's own copies are none of a GPU.
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self._depth -= 1

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._depth:
            return result
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = all(tensor.untyped_storage()._cdata in storages for tensor in outputs)
        name = func.overloadpacket.__name__
        if name == "ones_like":  # The test's own gradient.
            return result
        if (func._schema.is_mutable or not is_view) and "empty" not in name:
            self.by_name[name] += 1
        return result


def layer_launches(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], list[Tensor]]:
    """Return the launches of the only layer's forward, recomputation and backward, and the adapters' gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    (block,) = model.blocks
    calls: list[tuple[Any, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(type(block), "forward", lambda self, *args, **kwargs: calls.append((args, kwargs)) or args[0])
        with torch.no_grad():
            model.hidden_states(tokens(1, 16), positions_of(tokens(1, 16)))
    ((args, kwargs),) = calls
    states = args[0].detach().requires_grad_()
    with monkeypatch.context() as patch, Launches(patch) as launches:
        output = block(states, *args[1:], **kwargs)
        gradients = torch.autograd.grad(output, [states, *parameters], torch.ones_like(output))
    return launches.by_name, list(gradients)


SECTIONS: dict[str, Any] = {
    "adapter": {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.25},
    "train": {"dtype": "bf16", "checkpointing": "block", "global_batch": 1},
}


def linears_of(model: CausalLM) -> list[AdaptedLinear]:
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def test_copies_are_rounded_once_and_neighbours_and_as_large_as_planned(tmp_path: Path) -> None:
    write_model_folder(tmp_path, "llama", **SIZES)
    model, _ = load_ours(tmp_path, **SECTIONS)
    linears = linears_of(model)
    copies = AdapterCopies(linears)
    assert linears[0].operand().adapter.copies is None
    with copies.fresh():
        ends = []
        for linear in linears:
            (pair,), made = linear.pairs, linear.operand().adapter.copies
            assert made.factor == pair.scaling * pair.dropout.scale != pair.scaling
            assert torch.equal(made.a, pair.A.bfloat16())
            assert torch.equal(made.b, (pair.B * made.factor).bfloat16())
            ends.append((made.a.data_ptr(), made.a.data_ptr() + made.a.nbytes))
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(ends))
        linears[0].context.uses_start = True
        assert linears[0].operand().adapter.copies is None, "DPO's reference has other adapters"
        linears[0].context.uses_start = False
        storage = linears[1].operand().adapter.copies.a.untyped_storage()
    work = Workload.of(config_for(tmp_path, **SECTIONS))
    assert copied_adapters(work, model_in(tmp_path), machine_of()) == (len(linears), storage.nbytes())
    assert copied_adapters(work, model_in(tmp_path), machine_of(is_gpu=False)) == (0, 0)
    assert linears[1].operand().adapter.copies is None


def test_batches_go_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **kwargs: calls.append((args, kwargs)) or tensor)
    gpu = torch.device("cuda")
    objective._to_device(torch.ones(2), gpu)
    assert calls == ["pinned", ((gpu,), {"non_blocking": True})]
    objective._to_device(torch.ones(2), torch.device("cpu"))
    assert calls[2:] == [((torch.device("cpu"),), {"non_blocking": True})]


@pytest.mark.ci
def test_copies_of_the_adapters_save_the_casts_of_each_pass(
    triton_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton_device.type == "cuda":
        pytest.skip("counts launches in Triton's interpreter")
    write_model_folder(tmp_path, "llama", **SIZES)
    sections = SECTIONS | {"adapter": SECTIONS["adapter"] | {"lora_dropout": 0.0}}
    model, _ = load_ours(tmp_path, **sections)
    fused_modules.use_own(model.decoder, model.architecture, model.head, is_gpu=True, outputs_are_kept=False)
    nf4_triton.dynamic_map(triton_device)  # Made once per device.
    with fused.force_variant("scratch"):
        before, expected = layer_launches(model, monkeypatch)
        with AdapterCopies(linears_of(model)).fresh():
            after, gradients = layer_launches(model, monkeypatch)
    assert all(map(torch.equal, gradients, expected))
    # A of 7 linears in forward and recomputation (dX takes them as rows of the weights), B in all but the last product,
    # and the A of two groups that are put side by side. Autograd's sums into .grad, 14 more, are not counted here.
    assert before - after == {"_to_copy": 14, "mul": 20, "cat": 4}
    assert (sum(before.values()), sum(after.values())) == (146, 108), after
