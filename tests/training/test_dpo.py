"""DPO's reference from the same model: what it keeps in memory, that it does not move, what it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.config import UserError
from distlora.config.file import load_config
from distlora.loading.peft_format import adapter_tensors
from distlora.model.adapters import adapter_parameters
from distlora.model.build import CausalLM
from distlora.model.lm_head import LossForm
from distlora.post.load_trained import load_trained
from distlora.post.trained import of_run
from distlora.training import worker
from distlora.training.setup import start_run_model
from distlora.weights.initial_adapter_file import INITIAL_ADAPTER_NAME
from distlora_launcher.compose.checks import check, check_model
from support.closeness import adapter_of, figures_of
from support.family_models import SINGLE, config_for, load_ours, tokens, write_family_folder
from support.preference_data import prepare
from support.runs import run_until
from support.small_models import make_run, read_metrics


def model_with_adapters(folder: Path) -> CausalLM:
    return load_ours(folder, adapter={"target_modules": "all-linear"})[0]


def saved_bytes(model: CausalLM, **arguments: Any) -> int:
    """Bytes of all storages that a forward keeps for its backward."""
    rows, positions = tokens(4, 40), torch.arange(40).repeat(4, 1)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(rows, positions, rows, **arguments)
    assert output.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(("checkpointing", "num_micro"), [(True, 2), (False, 1)])
def test_the_reference_keeps_nothing_for_backward(folders: Path, checkpointing: bool, num_micro: int) -> None:
    model = model_with_adapters(folders / "llama-tied")
    for block in model.blocks:
        block.checkpointing = checkpointing
    model.set_num_micro(num_micro)
    plain = saved_bytes(model)
    assert saved_bytes(model, losses=LossForm(with_reference=True)) == plain > 4 * 40 * 96 * 4 * 3
    assert all(block.reference is None or block.reference.hidden is None for block in model.blocks)


@pytest.mark.parametrize(
    ("name", "adapter", "dtype"),
    [
        ("llama", {"use_dora": True}, "fp32"),
        ("llama", {"init": "loftq"}, "fp32"),
        ("llama", {"init": "pissa"}, "bf16"),
        ("gpt-oss", {}, "bf16"),
        ("gemma2", {}, "bf16"),
    ],
    ids=str,
)
def test_policy_and_reference_are_one_at_the_start_and_only_the_policy_moves(
    tmp_path: Path, name: str, adapter: dict[str, Any], dtype: str
) -> None:
    """In every family, with DoRA and with experts: bit for bit, which makes the loss of step 0 ln 2."""
    write_family_folder(tmp_path / "model", name)
    sections: dict[str, Any] = {"adapter": {"target_modules": "all-linear", "r": 4, **adapter}}
    (tmp_path / "run").mkdir()  # Decomposed starts are kept in it.
    sections |= {"train": {"dtype": dtype, "objective": "dpo"}, "run_dir": str(tmp_path / "run")}  # type: ignore[dict-item]
    config = config_for(tmp_path / "model", **sections)
    model, _, _ = start_run_model(config, SINGLE)
    model.set_num_micro(2)
    rows, positions = tokens(2, 48), torch.cat([torch.arange(20), torch.arange(28)]).repeat(2, 1)
    if "init" in adapter:
        model.keep_start()
    policy, reference = model(rows, positions, rows, losses=LossForm(with_reference=True))
    assert torch.equal(policy, reference)
    generator = torch.Generator().manual_seed(0)
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    moved, still = model(rows, positions, rows, losses=LossForm(with_reference=True))
    assert torch.equal(still, reference)
    assert not torch.allclose(moved, policy)
    moved.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())


@pytest.mark.ci
def test_a_run_that_starts_from_an_adapter_has_it_as_its_reference_after_a_resume_too(
    folders: Path, preferences: Path, tmp_path: Path
) -> None:
    """SFT, then DPO against what SFT came to; stopped and resumed bit for bit, with dropout."""
    make_run(tmp_path / "sft", folders, train={"max_steps": 2})
    worker.run(tmp_path / "sft", SINGLE)
    adapter = {"lora_dropout": 0.1, "init_from": str(tmp_path / "sft" / "adapter")}
    for name in ("whole", "stopped"):
        settings = {"save_every": 2, "max_steps": 4, "micro_batch": 6}
        prepare(tmp_path / name, folders, preferences, train=settings, adapter=adapter)
    run_until(SINGLE, run_dir=tmp_path / "whole", stop_before=None)
    for stop_before in (3, None):
        run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=stop_before)
    whole, resumed = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert figures_of(tmp_path / "stopped") == figures_of(tmp_path / "whole")
    assert read_metrics(tmp_path / "whole")[0]["eval_rewards/margins"] == 0
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["eval_rewards/margins"] == read_metrics(tmp_path / "whole")[-1]["eval_rewards/margins"]
    # The same folder, names and shapes, other numbers: another reference.
    weights = tmp_path / "sft" / "adapter" / "adapter_model.safetensors"
    original = weights.read_bytes()
    tensors = safetensors.torch.load(original)
    safetensors.torch.save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights)
    changed = (
        rf"against another reference \(.*\): the adapter at adapter\.init_from={tmp_path}/sft/adapter has changed since"
    )
    with pytest.raises(UserError, match=changed):
        run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=None)
    weights.unlink()
    run_dir, config = tmp_path / "stopped", load_config(tmp_path / "stopped")
    for refuse in (lambda: check_model(config), lambda: run_until(SINGLE, run_dir=run_dir, stop_before=None)):
        with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
            refuse()
    weights.write_bytes(original)
    run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=None)
    assert all(torch.equal(adapter_of(tmp_path / "stopped")[name], whole[name]) for name in whole)


def test_only_what_has_a_start_as_its_reference_needs_it_again(
    folders: Path, preferences: Path, tmp_path: Path
) -> None:
    """LoftQ's start is DPO's reference in training, and nothing to a model that generates."""
    run_dir, settings = tmp_path / "run", {"save_every": 1, "max_steps": 2}
    prepare(run_dir, folders, preferences, train=settings, adapter={"init": "loftq"})
    run_until(SINGLE, run_dir=run_dir, stop_before=2)
    config, weights = load_config(run_dir), str(run_dir / "checkpoints")
    before, _ = load_trained(of_run(config, weights), SINGLE)
    (run_dir / INITIAL_ADAPTER_NAME).unlink()
    after, _ = load_trained(of_run(config, weights), SINGLE)
    expected, stored = adapter_tensors(before), adapter_tensors(after)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    for start in (lambda: worker.run(run_dir, SINGLE), lambda: check(config, new_run=False)):
        with pytest.raises(UserError, match=f"{INITIAL_ADAPTER_NAME} is missing: train.objective compares with"):
            start()
