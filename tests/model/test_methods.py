"""Every method is what PEFT trains: the table of distlora/model/README.md, a cell each.

A cell is a real run on some ranks, over a base in NF4 or unquantized, in fp32. PEFT gets our dequantized base and the
adapter that we start from, trains on the same packed rows with its own modules and optimizer, and must come to the same
losses and the same adapter; PEFT must load what the run published and have its logits and its gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distlora.config import Config
from distlora.config.file import load_config
from distlora.data.loader import StepBatch, open_data
from distlora.loading.peft_format import weight_files
from distlora.loading.tensor_files import write_files
from distlora.model.build import CausalLM
from distlora.parallel import Backend, Ranks
from distlora.training import worker
from distlora.training.publish import load_weights
from distlora.training.setup import StartOptions, start_run_model
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from support.closeness import assert_adapters_close, assert_losses_close, relative_error
from support.family_models import SINGLE, dequantized, positions_of, tokens
from support.small_models import NEW_TOKENS, make_run, read_metrics
from support.worlds import World

STEPS, LR = 2, 5e-3
PROBES = tokens(4, 24)
"""Rows whose last position's logits are compared."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table: the settings of its runs."""

    adapter: dict[str, Any]
    optim: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    new_tokens: tuple[str, ...] = ()
    bases: tuple[str, ...] = ("nf4", "none")


_PLAIN = {"use_rslora": False, "lora_alpha": 8.0}
METHODS = {
    "LoRA": Method(adapter=_PLAIN),
    "rsLoRA": Method(adapter={"use_rslora": True}),
    "experts": Method(adapter=_PLAIN, model="mixtral"),
    "LoRA+": Method(adapter=_PLAIN, optim={"loraplus_lr_ratio": 4.0}),
    "embeddings and head": Method(adapter=_PLAIN | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embeddings": Method(adapter=_PLAIN | {"modules_to_save": ["embed_tokens"]}, model="llama-tied"),
    "new tokens": Method(adapter=_PLAIN, optim={"loraplus_lr_ratio": 4.0}, new_tokens=NEW_TOKENS),
    "new tokens, tied": Method(
        adapter=_PLAIN | {"trainable_token_indices": [11, 7]}, model="llama-tied", new_tokens=NEW_TOKENS
    ),
    "PiSSA": Method(adapter={"init": "pissa", "rank_pattern": {"v_proj": 3}}),
    "new tokens, whole and tied": Method(
        adapter=_PLAIN | {"modules_to_save": ["embed_tokens", "lm_head"]},
        model="llama-tied",
        new_tokens=NEW_TOKENS,
        bases=("nf4",),
    ),
    "DoRA": Method(adapter={"use_dora": True}),
}
FEW = ("experts", "new tokens, tied", "PiSSA", "DoRA")
BASES = [(name, base) for name, method in METHODS.items() for base in method.bases]
CELLS = [
    pytest.param(
        name,
        base,
        size,
        marks=pytest.mark.slow if 1 < size != 2 + number % 2 else () if size == 1 and name in FEW else pytest.mark.ci,
    )
    for number, (name, base) in enumerate(BASES)
    for size in ((1, 2, 3) if base == METHODS[name].bases[0] else (2, 3))
]
"""FEW on one base and one rank in `make test`; each method, on each base and on several ranks, in `make test-ci`."""


def prepare(run_dir: Path, folders: Path, method: Method, base: str) -> Config:
    return make_run(
        run_dir,
        folders,
        method.model,
        method.new_tokens,
        adapter={"target_modules": "all-linear", "r": 4} | method.adapter,
        quant={"method": base},
        data={"eval_fraction": 0.0},
        optim={"lr": LR, "schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0} | method.optim,
        train={"max_steps": STEPS, "micro_batch": 4},
    )


@dataclass(frozen=True)
class Outcome:
    """The results of training, and the trained model's losses on the next step's rows and the probes."""

    losses: list[float]
    adapter: dict[str, Tensor]
    """As trained, in PEFT's format."""
    gradients: dict[str, Tensor]
    """By the same names."""
    logits: Tensor


def our_outcome(ranks: Ranks, *, run_dir: Path) -> Outcome:
    """Train on these ranks, start again from what was saved, and take one more step's gradients."""
    worker.run(run_dir, ranks)
    config = load_config(run_dir)
    loader, _ = open_data(run_dir, config.train, ranks)
    model, backend, _ = start_run_model(config, ranks, StartOptions(restores=True))
    load_weights(run_dir / "checkpoints" / f"step_{STEPS:08d}", model, backend)
    backend.reduce_gradients_of(list(worker.trained_parameters(model).values()), config.parallel.bucket_mb)
    _accumulate(model, backend, loader.batch(STEPS))
    gradients = {name: whole(p.grad).clone() for name, p in weight_files(model, config.spec)[WEIGHTS_NAME].items()}
    with torch.no_grad():
        logits = model(PROBES, positions_of(PROBES), None)
    backend.barrier()  # The others may still read this rank's rows.
    adapter = safetensors.torch.load_file(run_dir / "checkpoints" / f"step_{STEPS:08d}" / WEIGHTS_NAME)
    return Outcome([line["loss"] for line in read_metrics(run_dir)], adapter, gradients, logits[:, -1])


def _accumulate(model: Any, backend: Backend, batch: StepBatch) -> None:
    """Accumulate the gradients of a step, summed over the ranks."""
    backend.zero_gradients()
    for index, micro in enumerate(batch.micro_batches):
        loss = model(micro.input_ids, micro.position_ids, micro.labels).sum() / batch.global_targets
        backend.backward(loss, last=index == len(batch.micro_batches) - 1)
    backend.finish_gradients()


def whole(gradient: Tensor) -> Tensor:
    """Return the whole of a module that is sharded over the ranks."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


@torch.no_grad()
def add_start(base: nn.Module, ours: CausalLM) -> None:
    """Give a Hugging Face model with our residual weights back what our adapters compute now."""
    for path, linear in ours.adapted_linears():
        (pair,) = linear.pairs
        base.get_parameter(f"{path}.weight").add_(pair.scaling * pair.B @ pair.A)


def saved_by_peft(tuned: Any, **options: Any) -> dict[str, Tensor]:
    """By the names that it saves, without the whole of a resized embedding, of which the trained rows are enough."""
    return peft.get_peft_model_state_dict(tuned, save_embedding_layers=False, **options)


class Peer:
    """PEFT's model over our dequantized base, from the adapter that our runs of a method start with."""

    def __init__(self, folder: Path, folders: Path, method: Method, base: str) -> None:
        self.config = prepare(folder, folders, method, base)
        ours, backend, _ = start_run_model(self.config, SINGLE)
        self.start = folder / "start"
        self.start.mkdir()
        files = weight_files(ours, self.config.spec)
        files[CONFIG_NAME]["init_lora_weights"] = True  # The base below has no start of PiSSA in it already.
        write_files(self.start, files, backend)
        self.base = dequantized(folders / method.model, ours)
        if ours.vocabulary.has_grown:
            self.base.resize_token_embeddings(ours.vocabulary.rows, mean_resizing=False)
        self.loader, _ = open_data(folder, self.config.train, SINGLE)
        tuned = self.load(self.start)
        optimizer = self._optimizer(tuned)
        self.losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            self.losses.append(self._backward(tuned, step))
            optimizer.step()
        self.adapter = {name: tensor.clone() for name, tensor in saved_by_peft(tuned).items()}
        tuned.unload()
        if self.config.adapter.pissa:  # What is published belongs to the base with it.
            add_start(self.base, ours)

    def load(self, adapter: Path) -> Any:
        """Load an adapter's folder with PEFT."""
        return peft.PeftModel.from_pretrained(self.base, adapter, is_trainable=True)

    def outcome(self, adapter: Path) -> tuple[dict[str, Tensor], Tensor]:
        """(gradients by the names that PEFT saves, logits) of a published adapter."""
        tuned = self.load(adapter)
        self._backward(tuned, STEPS)
        by_parameter = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
        gradients = saved_by_peft(tuned, state_dict=by_parameter)
        with torch.no_grad():
            logits = tuned(input_ids=PROBES, use_cache=False).logits[:, -1]
        tuned.unload()
        return gradients, logits

    def _optimizer(self, tuned: nn.Module) -> torch.optim.Optimizer:
        settings = self.config.optim
        arguments = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0}
        if settings.loraplus_lr_ratio == 1:
            return torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], **arguments)
        ratio = settings.loraplus_lr_ratio
        return create_loraplus_optimizer(
            tuned, torch.optim.AdamW, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.0, **arguments
        )

    def _backward(self, tuned: Any, step: int) -> float:
        """Add a step's gradients; its loss."""
        batch, total = self.loader.batch(step), 0.0
        for micro in batch.micro_batches:
            logits = tuned(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1), micro.labels.flatten(), ignore_index=-100, reduction="sum"
            )
            loss = losses / batch.global_targets
            loss.backward()
            total += loss.item()
        return total


@pytest.fixture(scope="module")
def peer(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Peer]:
    """PEFT's side of a method on a base, made at the first use."""

    @functools.cache
    def make(name: str, base: str) -> Peer:
        return Peer(tmp_path_factory.mktemp("peer") / "run", folders, METHODS[name], base)

    return make


@pytest.mark.parametrize(("name", "base", "size"), CELLS, ids=lambda value: str(value))
def test_a_method_is_pefts_on_any_base_and_ranks(
    world: World, folders: Path, tmp_path: Path, peer: Callable[[str, str], Peer], name: str, base: str, size: int
) -> None:
    run_dir = tmp_path / "run"
    prepare(run_dir, folders, METHODS[name], base)
    ours, theirs = world.run(size, our_outcome, run_dir=run_dir)[0], peer(name, base)
    assert_losses_close(ours.losses, theirs.losses)
    # PEFT adds the change of trained token rows in another order, and AdamW enlarges the rounding of small gradients.
    assert_adapters_close(ours.adapter, theirs.adapter, factor=3.0 if METHODS[name].new_tokens else 1.0)

    gradients, logits = theirs.outcome(run_dir / "adapter")
    assert gradients.keys() == ours.gradients.keys() == ours.adapter.keys()
    for tensor, gradient in ours.gradients.items():
        trained = gradients[tensor]
        if theirs.config.adapter.pissa:  # It publishes A and B, and behind them its start.
            trained = trained[tuple(map(slice, gradient.shape))]
        assert gradient.shape == trained.shape, tensor
        assert relative_error(gradient, trained) <= 1e-5, tensor
    difference = (ours.logits - logits).abs().max()
    assert difference <= 1e-4, f"logits are {difference:.1e} apart"
    start = safetensors.torch.load_file(theirs.start / WEIGHTS_NAME)
    assert all(relative_error(tensor, start[key]) > 1e-4 for key, tensor in ours.adapter.items()), "nothing was trained"
