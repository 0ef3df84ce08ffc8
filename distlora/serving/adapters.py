"""Hold the adapters of a service: parameters, gradients and optimizer states of one each.

An adapter is in a slot of the model only while a round uses it, so a round costs what its own adapters cost. An idle
one goes to host memory, then to a folder, and comes back with the same bits. Every rank holds all adapters whole; a
rank's gradients are of its own rows until the optimizer step sums them. A saved folder is laid out like a checkpoint of
a run, and its state.json is `{adapter, steps}`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distlora.checkpoint.saver import checkpoint_files
from distlora.config import AdapterConfig, ModelSpec, OptimConfig, UserError
from distlora.config.json_files import Shape, read_object
from distlora.loading.peft_format import weight_files
from distlora.loading.tensor_files import atomic_folder, write_files
from distlora.model.adapters import slot_name
from distlora.model.build import CausalLM
from distlora.model.trial_slots import insert_trial, put_trial, remove_trial
from distlora.parallel import Backend, from_rank_0
from distlora.parallel.gradients import GradientReducer, Gradients, Launches
from distlora.run_folder.layout import MANIFEST_NAME, STATE_NAME, TRAINER_NAME, fault
from distlora.serving.operations import Adapter, OptimStep
from distlora.system import atomic_io
from distlora.training.optimizers import Optimizer, build_optimizer
from distlora.training.publish import load_weights, restore
from distlora.weights.peft_folder import WEIGHTS_NAME

ALPHA = 32.0
"""lora_alpha of every adapter; the scale is alpha / rank, as in the Tinker API."""
BUCKET_BYTES = 64 * 2**20
_SHAPE: Shape = {"adapter": {"rank": int, "attention": bool, "mlp": bool, "unembed": bool}, "steps": int}


def adapter_config(adapter: Adapter) -> AdapterConfig:
    """Return the settings of an adapter as a run has them. Raises UserError for one that this server cannot train."""
    if adapter.rank < 1:
        raise UserError(f"rank={adapter.rank} is not a valid rank; set 1 or more")
    if adapter.seed is not None and not 0 <= adapter.seed < 2**63:
        raise UserError(f"seed={adapter.seed} is not within 0 and 2^63 - 1")
    if not (adapter.attention or adapter.mlp or adapter.unembed):
        raise UserError("a LoRA needs train_attn, train_mlp or train_unembed; set one of them")
    targets = "all-linear" if adapter.attention == adapter.mlp else "attention" if adapter.attention else "mlp"
    return AdapterConfig(r=adapter.rank, lora_alpha=ALPHA, use_rslora=False, target_modules=targets)


class ServedAdapter:
    """One adapter, in the memory of the device or of the host. Every rank makes it and calls it alike."""

    def __init__(self, model: CausalLM, backend: Backend, spec: ModelSpec, adapter: Adapter) -> None:
        """Make it with its first values, without gradients and optimizer states."""
        assert adapter.seed is not None, "the engine chooses a seed"
        self.adapter, self.steps = adapter, 0
        self.has_gradients = False
        """True after a backward whose gradients no optimizer step has taken."""
        self._model, self._backend = model, backend
        self._spec = replace(spec, adapter=adapter_config(adapter))
        device = backend.ranks.device
        self.parameters: Mapping[str, nn.Parameter] = put_trial(
            model,
            0,
            self._spec.adapter,
            seed=adapter.seed,
            device=device,
            layers=adapter.attention or adapter.mlp,
            head=adapter.unembed,
        )
        self._adapters = remove_trial(model, 0)
        self._gradients: Gradients | None = None
        self._optimizer: Optimizer | None = None

    @contextlib.contextmanager
    def in_slot(self, slot: int) -> Iterator[None]:
        """Put the adapter into a free slot of the model within this context."""
        self.move(self._backend.ranks.device)
        insert_trial(self._adapters, slot)
        try:
            yield
        finally:
            remove_trial(self._model, slot)

    @property
    def gradients(self) -> Gradients:
        """Return the sums of the gradients, on this rank; zeros at first."""
        if self._gradients is None:
            ranks, shards = self._backend.ranks, self._backend.shards
            between = ranks.group is not None and shards.crosses(ranks.group)
            self._launches = Launches(ranks.group, self._backend.traffic, between_replicas=between)
            parameters = list(self.parameters.values())
            reducer = GradientReducer(parameters, bucket_bytes=BUCKET_BYTES, launches=self._launches)
            self._gradients = Gradients([reducer])
        return self._gradients

    @property
    def optimizer(self) -> Optimizer:
        """Return AdamW of the parameters, without states at first."""
        if self._optimizer is None:
            self._optimizer = build_optimizer(dict(self.parameters), OptimConfig())
        return self._optimizer

    def step(self, settings: OptimStep) -> float:
        """Sum the gradients over ranks, update, and drop them. Returns the norm before clipping.

        Raises UserError, with parameters and optimizer states unchanged, if a gradient is not finite.
        """
        self.move(self._backend.ranks.device)
        gradients, optimizer = self.gradients, self.optimizer
        self._launches.finish()
        norm = gradients.clip(settings.grad_clip_norm)
        for inner in optimizer.inners:
            for group in inner.param_groups:
                group |= {
                    "betas": (settings.beta1, settings.beta2),
                    "eps": settings.eps,
                    "weight_decay": settings.weight_decay,
                }
        is_finite = torch.isfinite(norm)
        optimizer.step(settings.learning_rate, is_finite)
        gradients.zero()
        self.has_gradients = False
        if not bool(is_finite):
            raise UserError(
                "optim_step: a loss or gradient since the last step is NaN or infinite. Nothing was updated, and these "
                "gradients are dropped; lower the learning rate, or look at the data of the last forward_backward"
            )
        self.steps += 1
        return float(norm)

    def move(self, device: torch.device) -> None:
        """Keep parameters and optimizer states on this device from now on. Gradients are on the ranks' device alone."""
        first = next(iter(self.parameters.values()))
        if device != self._backend.ranks.device and self._gradients is not None:
            assert not self.has_gradients, "gradients that no optimizer step has taken stay"
            self._gradients.release()
            self._gradients = None
        if first.device.type == device.type:
            return
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
        for inner in [] if self._optimizer is None else self._optimizer.inners:
            for state in inner.state.values():
                state |= {name: value.to(device) for name, value in state.items() if isinstance(value, torch.Tensor)}

    def drop_gradients(self) -> None:
        """Free the memory of gradients that an optimizer step has taken."""
        if self._gradients is not None and not self.has_gradients:
            self._gradients.release()
            self._gradients = None

    def save(self, folder: Path, *, optimizer: bool) -> None:
        """Write the adapter in PEFT's format, and with `optimizer` its states, into a folder that appears whole.

        It is on the disk when this returns. Every rank must call it; raises OSError on rank 0 alone.
        """
        backend, record = self._backend, {"adapter": asdict(self.adapter), "steps": self.steps}
        with self.in_slot(0), atomic_folder(folder, backend) as temporary:
            name = slot_name(0)
            if optimizer:
                files = checkpoint_files(
                    self._model, self._spec, self.optimizer, self.parameters, backend, adapter=name
                )
            else:
                files = weight_files(self._model, self._spec, name)
            sums = write_files(temporary, {**files, STATE_NAME: record}, backend)
            if backend.writes:
                atomic_io.write_json(temporary / MANIFEST_NAME, {"files": dict(sorted(sums.items()))})

    def load(self, folder: Path, *, optimizer: bool) -> None:
        """Read what `save` wrote, from a folder that is whole.

        Raises UserError, before anything changes, if it is of another rank or targets, or lacks states that are wanted.
        """
        saved, steps = read_saved(folder)
        if replace(saved, seed=self.adapter.seed) != self.adapter:
            raise UserError(f"the checkpoint is of a LoRA with {_described(saved)}, and this model's has "
                            f"{_described(self.adapter)}; create a model like the checkpoint's")  # fmt: skip
        if optimizer and not (folder / TRAINER_NAME).is_file():
            raise UserError("the checkpoint has weights without optimizer states; load it without them")
        with self.in_slot(0):
            name, self._optimizer = slot_name(0), None
            if optimizer:
                restore(folder, self._model, self.optimizer, self.parameters, self._backend, name)
            else:
                load_weights(folder, self._model, self._backend, adapter=name)
        self.steps = steps if optimizer else 0
        if self._gradients is not None:
            self._gradients.zero()
        self.has_gradients = False

    def nbytes(self) -> int:
        """Return the bytes of parameters, gradients and optimizer states on this rank."""
        own = sum(parameter.nbytes for parameter in self.parameters.values())
        states = 0 if self._optimizer is None else 2 * bool(self.optimizer.inner.state)
        return own * (1 + (self._gradients is not None) + states)


def _described(adapter: Adapter) -> str:
    targets = {"train_attn": adapter.attention, "train_mlp": adapter.mlp, "train_unembed": adapter.unembed}
    return ", ".join([f"rank={adapter.rank}", *(f"{name}={str(value).lower()}" for name, value in targets.items())])


def check_whole(folder: Path, backend: Backend) -> None:
    """Raise UserError, on every rank, if a saved folder is not whole. Rank 0 reads every byte."""
    reason = fault(folder, (STATE_NAME, WEIGHTS_NAME)) if backend.writes else None
    if from_rank_0(int(reason is not None), backend.ranks):
        raise UserError(f"the checkpoint is damaged ({reason or 'rank 0 reports how'}); use another one")


def read_saved(folder: Path) -> tuple[Adapter, int]:
    """Return the adapter of a saved folder, and its optimizer steps."""
    values: dict[str, Any] = read_object(folder / STATE_NAME, "save the model again", _SHAPE)
    return Adapter(**values["adapter"]), values["steps"]


@contextlib.contextmanager
def in_slots(adapters: Sequence[ServedAdapter]) -> Iterator[None]:
    """Put adapters into the slots 0, 1, ... within this context."""
    with contextlib.ExitStack() as stack:
        for slot, adapter in enumerate(adapters):
            stack.enter_context(adapter.in_slot(slot))
        yield
