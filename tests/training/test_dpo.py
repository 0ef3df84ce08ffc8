"""DPO is what two models would compute, from one: losses, gradients, memory, bytes on the wire, ranks, resume."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from distlora.config import UserError
from distlora.config.file import load_config
from distlora.data.loader import MicroBatch
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model.adapters import StepRows, adapter_parameters
from distlora.model.build import CausalLM
from distlora.post.load_trained import load_trained
from distlora.post.trained import of_run
from distlora.training import worker
from distlora.training.objectives import DPO
from distlora.training.open_run import open_data
from distlora.training.setup import start_run_model
from distlora.weights.initial_adapter_file import INITIAL_ADAPTER_NAME
from distlora_launcher.compose.checks import check, check_model
from support.closeness import adapter_of, assert_adapters_close, assert_close, assert_losses_close, figures_of
from support.family_models import SINGLE, config_for, dequantized, load_ours, tokens, write_family_folder
from support.planned import traffic_of
from support.preference_data import documents_of, prepare
from support.runs import run_once, run_until
from support.small_models import config_with, make_run, read_metrics
from support.tiers import ci
from support.worlds import World

LN2 = math.log(2)


def model_with_adapters(folder: Path) -> CausalLM:
    return load_ours(folder, adapter={"target_modules": "all-linear"})[0]


def summed_logp(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """In fp64, since two of these sums are subtracted from each other."""
    logp = model(ids[None]).logits[0].log_softmax(dim=-1)
    return logp.gather(1, labels.clamp(min=0)[:, None])[:, 0][labels >= 0].double().sum()


@torch.no_grad()
def move_adapters(model: CausalLM, *, seed: int) -> None:
    """Away from where they are, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_tensors(model).items():
        parameter += (0.05 if "lora_B" in name else 0.02) * torch.randn(parameter.shape, generator=generator)


def fill(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


@pytest.mark.parametrize(
    ("model", "checkpointing", "starts_moved"),
    [
        *(ci("llama", "block", False), ("llama", "none", False), ("llama", "block", True)),
        ci("qwen3_5", "block", False),
    ],
)
def test_losses_and_gradients_equal_two_models_of_transformers_and_peft(
    folders: Path, preferences: Path, tmp_path: Path, model: str, checkpointing: str, starts_moved: bool
) -> None:
    """The second model is the base, or has the adapter that training started from."""
    beta = 0.3
    settings = {"beta": beta, "checkpointing": checkpointing, "micro_batch": 3, "accumulate": "block"}
    config = prepare(tmp_path / "run", folders, preferences, model, train=settings)
    ours, _, _ = start_run_model(config, SINGLE)
    if starts_moved:
        move_adapters(ours, seed=1)
        ours.keep_start()
    start = {name: parameter.detach().clone() for name, parameter in adapter_tensors(ours).items()}
    move_adapters(ours, seed=0)
    step = open_data(tmp_path / "run", config.train, SINGLE)[0].batch(0)
    assert step.global_pairs > step.global_rows, "no row holds several pairs"
    ours.set_num_micro(2)
    whole = MicroBatch(*(torch.cat(parts) for parts in zip(*(part[:4] for part in step.micro_batches), strict=True)))
    losses = DPO(config.train, config.rollout).losses(ours, whole, SINGLE.device, 0)
    loss = losses.rows.sum() / step.global_pairs
    loss.backward()

    weights = {name: parameter.detach().clone() for name, parameter in adapter_tensors(ours).items()}
    base = dequantized(folders / model, ours)
    targets = adapter_config(config.spec, ours)["target_modules"]
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=targets, lora_dropout=0.0)
    )
    parameters = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if ".lora_" in n}
    assert parameters.keys() == weights.keys()
    documents = documents_of(whole)
    assert len(documents) == 2 * step.global_pairs
    fill(parameters, start)  # B is zero, unless the start moved it.
    with torch.no_grad(), contextlib.nullcontext() if starts_moved else tuned.disable_adapter():
        references = [summed_logp(tuned, *document) for document in documents]
    fill(parameters, weights)
    total = torch.zeros((), dtype=torch.float64)
    rewards = []
    for index in range(0, len(documents), 2):
        policy = [summed_logp(tuned, *document) for document in documents[index : index + 2]]
        of_pair = [beta * (a - b) for a, b in zip(policy, references[index : index + 2], strict=True)]
        total = total - F.logsigmoid(of_pair[0] - of_pair[1])
        rewards.append((of_pair[0].item(), of_pair[1].item(), policy[0].item()))
    expected = total / step.global_pairs
    expected.backward()

    assert abs(loss - LN2) > 1e-2, "the policy is the reference, so this says little"
    assert_losses_close([loss.item()], [expected.item()])
    for name, parameter in adapter_tensors(ours).items():
        # Sums over documents and pairs in another order: some tens of ulps (1e-5 is 84); thrice that in recurrences.
        assert_close(parameter.grad, parameters[name].grad, ulps=84 if model == "llama" else 252)  # type: ignore[arg-type]
    means = dict(zip(config.train.needs.figures, (losses.figures / step.global_pairs).tolist(), strict=True))
    for index, name in enumerate(("rewards/chosen", "rewards/rejected", "logps/chosen")):
        assert means[name] == pytest.approx(sum(r[index] for r in rewards) / len(rewards), rel=1e-4)
    assert means["rewards/accuracies"] == pytest.approx(sum(r[0] > r[1] for r in rewards) / len(rewards))


@pytest.fixture(scope="module")
def alone(
    world: World, folders: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return metrics and adapter of one rank with all rows of a step at once and nothing recomputed."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    prepare(run_dir, folders, preferences, train={"micro_batch": 6, "checkpointing": "none"})
    return world.run(1, run_once, run_dir=run_dir)[0], adapter_of(run_dir)


def test_a_run_starts_at_ln_2_and_raises_the_held_out_margin(alone: Any) -> None:
    metrics, _ = alone
    before, after = (line for line in metrics if "eval_loss" in line)
    first = next(line for line in metrics if "loss" in line)
    for line, prefix in ((before, "eval_"), (first, "")):
        assert abs(line[f"{prefix}loss"] - LN2) <= 1e-6
        assert line[f"{prefix}rewards/margins"] == 0, "the adapter adds nothing yet: the two models are one"
    assert after["eval_rewards/margins"] > 0.02
    assert after["eval_loss"] < LN2 - 0.01
    assert after["eval_rewards/accuracies"] > 0.6


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (2, {"micro_batch": 3, "accumulate": "block"}),
        ci(3, {"micro_batch": 1, "accumulate": "block", "checkpointing": "offload"}),
        ci(2, {"micro_batch": 1}),
    ],
    ids=str,
)
def test_ranks_and_micro_batches_change_nothing_and_gather_the_base_as_often_as_sft(
    world: World, folders: Path, preferences: Path, tmp_path: Path, alone: Any, size: int, settings: dict[str, Any]
) -> None:
    config = prepare(tmp_path / "run", folders, preferences, train=settings)
    metrics = world.run(size, run_once, run_dir=tmp_path / "run")[0]
    expected, adapter = alone
    for name in ("loss", "eval_loss"):
        assert_losses_close(*([line[name] for line in lines if name in line] for lines in (metrics, expected)))
    assert_adapters_close(adapter_of(tmp_path / "run"), adapter)
    assert metrics[-1]["eval_rewards/margins"] == pytest.approx(expected[-1]["eval_rewards/margins"], rel=1e-4)
    gathered = traffic_of(config, world=size).gathered
    assert metrics[-2]["gathered_bytes"] == gathered, "what SFT gathers (test_wire.py)"


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
    assert saved_bytes(model, with_reference=True) == plain > 4 * 40 * 96 * 4 * 3
    assert all(block.reference is None or block.reference.hidden is None for block in model.blocks)


def test_the_reference_is_the_base_whatever_the_adapter_and_the_dropout(folders: Path) -> None:
    model = model_with_adapters(folders / "llama")
    rows, positions, none = tokens(3, 40), torch.arange(40).repeat(3, 1), torch.full((3,), -1)
    for _, linear in model.adapted_linears():
        linear.pairs[0].dropout = linear.pairs[0].dropout._replace(threshold=1 << 14)  # A quarter.
    places = StepRows(3, torch.tensor([5, 6, 7]))
    policy, reference = model(rows, positions, rows, step_rows=places, with_reference=True)
    assert torch.equal(reference.sum(dim=1), model(rows, positions, rows, adapter_rows=none))
    assert torch.equal(policy.sum(dim=1), model(rows, positions, rows, step_rows=places))
    assert not torch.equal(policy.sum(dim=1), model(rows, positions, rows)), "nothing was dropped"


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
    policy, reference = model(rows, positions, rows, with_reference=True)
    assert torch.equal(policy, reference)
    generator = torch.Generator().manual_seed(0)
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    moved, still = model(rows, positions, rows, with_reference=True)
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


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"method": "full"}, "quant": {"method": "none"}}, "adapter=full trains the base itself"),
        ({"model": {"new_tokens": ("<x>",)}}, "model.new_tokens trains rows of the embedding or the head"),
        (
            {"adapter": {"trainable_token_indices": (3,)}},
            "trainable_token_indices trains rows of the embedding or the head",
        ),
        ({"train": {"router_aux_loss": 0.1}}, "belongs to a per-token loss, not to train.objective=dpo"),
        ({"data": {"format": "chat"}}, "data.format=chat is data for train.objective=sft"),
        ({"data": {"train_on": "all"}}, "data.train_on=all has no effect"),
        ({"data": {"too_long": "split"}}, "set data.too_long=truncate or drop"),
        ({"train": {"beta": 0.0}}, "train.beta=0"),
        ({"train": {"objective": "sft", "beta": 0.2}}, "train.beta=0.2 has no effect"),
        ({"train": {"objective": "sft"}, "data": {"format": "preference"}}, "is data for train.objective=dpo"),
        ({"train": {"objective": "rlhf"}}, "train.objective"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(sections: dict[str, Any], message: str) -> None:
    base: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"objective": "dpo"}}
    with pytest.raises(UserError, match=message):
        config_with(base, sections)
