"""Run all checks of a model on its shrunk one, with PEFT and on several ranks too: the worker of `distlora check`."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from distlora.architecture.config_checks import CheckRequest
from distlora.architecture.images import PROCESSOR_FILE, ImageLayout, image_packages
from distlora.architecture.spec import Architecture
from distlora.config import UserError
from distlora.derive.images import IMAGE_BOUNDS, derive_images
from distlora.derive.probes import probe, random_tokens
from distlora.derive.prove import (
    SINGLE,
    amplifications,
    bound_of,
    dense_weights,
    failed,
    gradients_of,
    largest_error,
    load_ours,
    load_theirs,
    logits_of,
    mixes_tokens,
    next_tokens,
    positions_of,
    proved,
    relative_error,
    result_texts,
    save_random,
    spec_of,
)
from distlora.derive.shrink import shrink
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.adapters import adapter_parameters
from distlora.parallel import Ranks, join_ranks, leave_ranks
from distlora.system.exit_codes import DONE
from distlora.system.import_peft import import_peft
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME


def run(request: CheckRequest) -> int:
    """Print the table of checks. Raises UserError with the first that fails."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # PEFT's calls of transformers.
    torch.set_num_threads(1)
    config = shrink(json.loads(request.config))
    small = proved(probe(config, request.place), config, request.place)
    print(f"{small.model_type}: a model of {small.num_layers} layers with random weights, in fp32 on the CPU\n")
    print(f"{'check':30} difference   allowed")
    for name, difference in small.checks:
        _show(name, difference)
    with tempfile.TemporaryDirectory(prefix="distlora-check-") as name:
        folder = Path(name)
        save_random(small, config, request.place, folder / "model", 1)
        more = [] if importlib.util.find_spec("peft") is None else [*_with_peft(small, folder)]
        for check, difference in (*more, *(_on_ranks(small, folder, request.ranks) if request.ranks > 1 else ())):
            _show(check, difference)
            if not difference <= bound_of(check):
                raise failed(small.model_type, check, difference)
    print("\n".join(["", *small.notes]))
    if small.composite:
        _show_images(request)
    return DONE


def _show(name: str, difference: float) -> None:
    found, allowed = result_texts(name, difference)
    print(f"{name:30} {found:>10} {allowed:>9}", flush=True)


def _show_images(request: CheckRequest) -> None:
    """Print the checks with images, or the reason why the model trains on text alone."""
    processor = json.loads(request.processor)
    if not processor:
        print(f"images: not checked, because {PROCESSOR_FILE} is not on this node; name a folder that has it")
        return
    try:
        image_packages()
        content = json.dumps({"config": json.loads(request.config), "processor": processor})
        layout = ImageLayout.from_json(derive_images(content, request.place))
    except UserError as error:
        print(f"images: no; {error}")
        return
    print(f"images: yes; the vision tower and the projector have {layout.numel:,} parameters\n")
    for name, difference in layout.checks:
        print(f"{f'images: {name}':40} {difference:10.1e} {IMAGE_BOUNDS[name][0]:9.1e}")


def _with_peft(small: Architecture, folder: Path) -> Iterator[tuple[str, float]]:
    """Load an adapter of ours with PEFT onto transformers' model, and compare names, tensors, logits and gradients."""
    ours, _ = load_ours(small, folder / "model")
    own, place = adapter_tensors(ours), folder / "adapter"
    place.mkdir()
    (place / CONFIG_NAME).write_text(json.dumps(adapter_config(spec_of(folder / "model"), ours)))
    safetensors.torch.save_file({name: t.detach().clone() for name, t in own.items()}, place / WEIGHTS_NAME)
    theirs = load_theirs(small, folder / "model")
    with torch.no_grad():
        for name, weight in dense_weights(ours, adapted=False):
            theirs.get_parameter(name).copy_(weight)
    input_ids = random_tokens(48, small.vocabulary, rows=2, seed=6)
    of_logits, of_gradients = amplifications(ours, theirs, input_ids)
    tuned = import_peft().PeftModel.from_pretrained(theirs, place, is_trainable=True)
    by_name = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if ".lora_" in n}
    same = by_name.keys() == own.keys() and all(torch.equal(by_name[name], own[name]) for name in own)
    yield "PEFT adapter", 0.0 if same else float("inf")
    if not same:
        return
    causal = tuned.get_base_model().get_submodule(small.causal)
    labels, logits = next_tokens(input_ids), causal(input_ids=input_ids, use_cache=False).logits.float()
    yield "PEFT logits", relative_error(logits_of(ours, input_ids), logits) / of_logits
    expected = gradients_of(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), by_name)
    gradients = gradients_of(ours(input_ids, positions_of(input_ids), labels).sum(), own)
    name = "PEFT gradients of mixers" if mixes_tokens(small) else "PEFT gradients"
    yield name, largest_error(gradients, expected) / of_gradients


def _on_ranks(small: Architecture, folder: Path, world: int) -> Iterator[tuple[str, float]]:
    """Train three steps on `world` processes that share the base, and compare with one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    spawn(_rank, (small.to_json(), folder, world, port), nprocs=world)
    losses, adapter = _three_steps(small, folder / "model", SINGLE, rows=2 * world)
    for rank in range(world):
        result = safetensors.torch.load_file(folder / f"rank_{rank}.safetensors")
        yield f"losses of rank {rank}", relative_error(result["losses"], torch.tensor(losses))
        yield f"adapter of rank {rank}", relative_error(result["adapter"], adapter)


def _rank(rank: int, small: str, folder: Path, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = join_ranks()
    losses, adapter = _three_steps(Architecture.from_json(small), folder / "model", ranks, rows=2 * world)
    result = {"losses": torch.tensor(losses), "adapter": adapter.detach().clone()}
    safetensors.torch.save_file(result, folder / f"rank_{rank}.safetensors")
    leave_ranks(ranks)


def _three_steps(small: Architecture, folder: Path, ranks: Ranks, *, rows: int) -> tuple[list[float], Tensor]:
    """Return the losses and the adapter (flat) of three AdamW steps, whose rows are divided over the ranks."""
    ours, backend = load_ours(small, folder, ranks=ranks)
    parameters = adapter_parameters(ours)
    backend.reduce_gradients_of(list(parameters.values()), 4.0)
    # A small eps would turn the rounding of a gradient near zero into a step of full size.
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, eps=1e-5, weight_decay=0.0)
    input_ids, share = random_tokens(48, small.vocabulary, rows=rows, seed=7), rows // ranks.world
    own = input_ids[ranks.rank * share : (ranks.rank + 1) * share]
    ours.set_num_micro(share)
    losses = []
    for _ in range(3):
        loss = ours(own, positions_of(own), next_tokens(own)).sum() / input_ids.numel()
        backend.backward(loss, last=True)
        backend.finish_gradients()
        losses.append(float(backend.sum_over_ranks(loss.detach().clone())))
        optimizer.step()
        backend.zero_gradients()
    return losses, torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
