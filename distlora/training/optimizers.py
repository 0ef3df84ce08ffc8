"""Optimizers of the trained parameters, and the learning-rate schedule.

Three implementations share an interface: torch's fused AdamW, torch's Muon, and bitsandbytes' 8-bit and paged AdamW.
All skip a step that is not `ok`, a flag on the device: an update with NaN would destroy the state that is saved later.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distlora.config import OptimConfig
from distlora.planner.storage import is_matrix
from distlora.system.exit_codes import require_package
from distlora_kernels.nf4_cpu import has_bitsandbytes


class Optimizer(ABC):
    """Optimizer of named parameters whose state goes to checkpoints as flat tensors."""

    constants: tuple[str, ...] = ()
    """Entries of a parameter's state that never change and are not saved."""
    per_element: tuple[str, ...]
    """Entries of a parameter's state that have its shape: its optimizer states."""

    def __init__(self, parameters: dict[str, nn.Parameter], *inners: torch.optim.Optimizer) -> None:
        """Take the optimizers that hold the state, in the order of their updates."""
        self.parameters, self.inners, self.inner = parameters, inners, inners[0]
        self._inner_of = {each: inner for inner in inners for group in inner.param_groups for each in group["params"]}

    def step(self, lr: float, ok: Tensor) -> None:
        """Update at learning rate `lr` (times each group's ratio), unless `ok` (() bool) is false."""
        for group in (group for inner in self.inners for group in inner.param_groups):
            group["lr"] = lr * group["lr_ratio"]
        self._update(ok)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state as `<state>/<parameter>`; numbers as () tensors."""
        return {
            f"{key}/{name}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for key, value in self._inner_of[parameter].state.get(parameter, {}).items()
            if key not in self.constants
        }

    def load_state_tensors(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load the result of `state_tensors` before the first step, one tensor at a time, from any device."""
        prepared = set()
        for path, tensor in tensors:
            key, _, name = path.partition("/")
            parameter = self.parameters[name]
            if name not in prepared:
                self._prepare(parameter)
                prepared.add(name)
            self._load(self._inner_of[parameter].state[parameter], key, tensor, parameter.device)

    def states_of(self, name: str) -> set[str]:
        """Return the states that a checkpoint must have of a parameter."""
        return {"step", *self.per_element}

    @abstractmethod
    def _update(self, ok: Tensor) -> None: ...

    def _prepare(self, parameter: nn.Parameter) -> None:  # noqa: B027
        """Create the state of a parameter that `_load` fills, if it must exist before."""

    def _load(self, state: dict[str, Any], key: str, tensor: Tensor, device: torch.device) -> None:
        state[key] = tensor.to(device)


class FusedAdamW(Optimizer):
    """torch.optim.AdamW(fused=True), on CPUs and GPUs."""

    per_element = ("exp_avg", "exp_avg_sq")

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        groups = parameter_groups(parameters, config)
        inner = torch.optim.AdamW(
            groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        super().__init__(parameters, inner)
        # The kernel's switch for loss scaling: 1 leaves parameters, optimizer states and step counts unchanged.
        self._skips = torch.zeros((), device=next(iter(parameters.values())).device)
        inner.found_inf = self._skips  # type: ignore[attr-defined]

    def _update(self, ok: Tensor) -> None:
        self._skips.copy_(~ok)
        self.inner.step()


class BitsAndBytesAdamW(Optimizer):
    """bitsandbytes' AdamW: states in 8 bits in blocks of 256 (arXiv 2110.02861), paged, or both.

    Tensors below 4,096 elements stay fp32. The host reads `ok` in every step, because its kernels have no such switch.
    """

    constants = ("qmap1", "qmap2")  # The 8-bit levels, which all parameters share.
    per_element = ("state1", "state2")

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        require_package("bitsandbytes", f"optim.name={config.name}", otherwise=", or set optim.name=adamw")
        has_bitsandbytes()
        from bitsandbytes import optim

        classes = {
            "adamw_8bit": optim.AdamW8bit,
            "paged_adamw": optim.PagedAdamW32bit,
            "paged_adamw_8bit": optim.PagedAdamW8bit,
        }
        inner = classes[config.name](
            parameter_groups(parameters, config),
            lr=config.peak_lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        super().__init__(parameters, inner)

    def _update(self, ok: Tensor) -> None:
        if bool(ok):
            self.inner.step()

    def _prepare(self, parameter: nn.Parameter) -> None:
        # bitsandbytes' constructor of states, so that a paged state is paged again.
        for group_index, group in enumerate(self.inner.param_groups):
            for index, member in enumerate(group["params"]):
                if member is parameter:
                    self.inner.init_state(group, parameter, group_index, index)  # type: ignore[attr-defined]

    def _load(self, state: dict[str, Any], key: str, tensor: Tensor, device: torch.device) -> None:
        if isinstance(state[key], Tensor):
            state[key].copy_(tensor)
        else:
            state[key] = int(tensor)


class Muon(Optimizer):
    """torch.optim.Muon for matrices (arXiv 2502.16982), and fused AdamW for all other parameters.

    The size of an update is matched to AdamW's (0.2 sqrt(max(rows, columns)) x lr). torch's Muon has no switch for
    `ok`, so each matrix and its state are copied first, and put back on the device if it is false. A matrix has an
    optimizer of its own, so that one is copied at a time.
    """

    per_element = ("momentum_buffer", *FusedAdamW.per_element)

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self._matrices = {name: each for name, each in parameters.items() if is_matrix(name, each.ndim)}
        others = {name: each for name, each in parameters.items() if name not in self._matrices}
        self._others = FusedAdamW(others, config) if others else None
        self._muons = [
            torch.optim.Muon(
                parameter_groups({name: matrix}, config),
                lr=config.peak_lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            for name, matrix in self._matrices.items()
        ]
        super().__init__(parameters, *self._muons, *(self._others.inners if self._others is not None else ()))

    def states_of(self, name: str) -> set[str]:
        """Return Muon's one state of a matrix, or AdamW's."""
        return {"momentum_buffer"} if name in self._matrices else {"step", *FusedAdamW.per_element}

    @torch.no_grad()
    def _update(self, ok: Tensor) -> None:
        for muon, matrix in zip(self._muons, self._matrices.values(), strict=True):
            state = muon.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
            before = matrix.clone(), state.clone()
            muon.step()
            for tensor, old in zip((matrix, state), before, strict=True):
                torch.where(ok, tensor, old, out=tensor)
        if self._others is not None:
            self._others._update(ok)


def build_optimizer(parameters: dict[str, nn.Parameter], config: OptimConfig) -> Optimizer:
    """Build the optimizer named by `config.name` over parameters by name."""
    classes = {"adamw": FusedAdamW, "muon": Muon}
    return classes.get(config.name, BitsAndBytesAdamW)(parameters, config)


def parameter_groups(parameters: dict[str, nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """Return one group, or with LoRA+ (arXiv 2402.12354) a second one of B matrices at a higher learning rate.

    With DoRA the magnitudes join the second group, like all one-dimensional parameters in PEFT's
    create_loraplus_optimizer.
    """
    ratio = config.loraplus_lr_ratio
    faster = {name for name in parameters if ratio != 1 and name.endswith((".B", ".magnitude"))}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in faster], "lr_ratio": 1.0},
        {"params": [p for name, p in parameters.items() if name in faster], "lr_ratio": ratio},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of the update that ends step `step` (from 0 to total_steps - 1).

    Linear from lr/warm-up to lr over the warm-up steps; then cosine or linear down to min_lr_ratio * lr at total_steps,
    constant, or constant with a linear fall over the last decay steps (warmup_stable_decay, arXiv 2404.06395).
    """
    warmup = config.warmup(total_steps)
    if step < warmup:
        return config.peak_lr * (step + 1) / warmup
    if config.schedule == "warmup_stable_decay":
        start = max(warmup, total_steps - round(config.decay_ratio * total_steps))
    else:
        start = warmup
    progress = max(step - start, 0) / max(total_steps - start, 1)
    shape = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "warmup_stable_decay": 1 - progress,
    }[config.schedule]
    return config.peak_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
