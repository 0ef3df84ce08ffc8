"""Objectives equal TRL 1.16.0's trainers: losses and adapter gradients on the same model, data and seed.

A case of CASES is an objective's settings and the loss of TRL's trainer for it. Each is compared on NF4 (TRL gets the
dequantized base) and on the base itself, and on one rank with three.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.architecture.spec import architecture_of
from distlora.checkpoint.state import Identity, RunProgress, TrainState, check_matches, identity_of
from distlora.config import AdapterConfig, Config, UserError
from distlora.config.file import load_config
from distlora.data.loader import joined, open_data
from distlora.loading.peft_format import adapter_tensors
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.training.loop import prepare as prepare_objective
from distlora.training.objectives import objective_of
from distlora.training.setup import start_adapters, start_run_model
from distlora.training.worker import trained_parameters
from distlora.weights.peft_folder import read_adapter_beside
from support.closeness import assert_close, assert_losses_close
from support.family_models import SINGLE
from support.peft_models import write_adapter
from support.small_models import make_run, tokenizer
from support.tiers import ci
from support.trl_models import Theirs, documents_of, move_adapters, pairs, their_model
from support.worlds import World


def loss_of(trainer: Any, *, batch: int | None = None) -> Tensor:
    """Return the mean of TRL's loss over the batches of `batch` records; None: of all records."""
    examples = list(trainer.train_dataset)
    parts = [examples[first : first + (batch or len(examples))] for first in range(0, len(examples), batch or 10**6)]
    losses = [trainer.compute_loss(trainer.model, trainer.data_collator(part)) for part in parts]
    return torch.stack(losses).mean()


def dpo(theirs: Theirs, *, batch: int | None = None, **settings: Any) -> Tensor:
    from trl import DPOConfig, DPOTrainer

    # The start's adapter adds nothing: without it, the base is the reference, as with peft_config=.
    trainer = theirs.trainer(DPOTrainer, DPOConfig, **settings)
    trainer.model.delete_adapter("ref")
    return loss_of(trainer, batch=batch)


def orpo(theirs: Theirs, **settings: Any) -> Tensor:
    """Return TRL's loss where it is the paper's: its first term is of prompts too, and a mean over a batch's tokens.

    So prompts have one token, which is predicted from nothing, and batches have one pair.
    """
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = theirs.trainer(ORPOTrainer, ORPOConfig, **settings)
    assert all(len(ids) == 1 for ids in trainer.train_dataset["prompt_input_ids"])
    return loss_of(trainer, batch=1)


def simpo(theirs: Theirs, *, batch: int | None = None, **settings: Any) -> Tensor:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return loss_of(theirs.trainer(CPOTrainer, CPOConfig, loss_type="simpo", **settings), batch=batch)


def distill(theirs: Theirs, *, ratio: float, beta: float, temperature: float, adapter: Path | None = None) -> Tensor:
    """Return TRL's divergence, with transformers' loss of the labels beside it. Its trainer knows no temperature."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher = copy.deepcopy(theirs.model).unload()
    if adapter is not None:
        teacher = peft.PeftModel.from_pretrained(teacher, adapter)
    trainer = theirs.trainer(GKDTrainer, GKDConfig, teacher_model=teacher, beta=beta)
    batch = trainer.data_collator(list(trainer.train_dataset))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    if ratio == 1:
        return trainer.compute_loss(trainer.model, inputs)  # type: ignore[no-any-return]
    output = trainer.model(**inputs)
    with torch.no_grad():
        logits = teacher(**inputs).logits
    divergence = trainer.generalized_jsd_loss(
        output.logits[:, :-1], logits[:, :-1], inputs["labels"][:, 1:], beta=beta, temperature=temperature
    )
    return (1 - ratio) * output.loss + ratio * temperature**2 * divergence  # type: ignore[no-any-return]


def reward(theirs: Theirs, **settings: Any) -> Tensor:
    from trl import RewardConfig, RewardTrainer

    return loss_of(theirs.trainer(RewardTrainer, RewardConfig, **settings))


def kto(theirs: Theirs, **settings: Any) -> Tensor:
    """Give TRL the step as one batch in our order, by which it pairs prompts with other answers too."""
    from trl import KTOConfig, KTOTrainer

    settings["per_device_train_batch_size"] = len(theirs.records)
    tokenized = theirs.trainer(KTOTrainer, KTOConfig, **settings).train_dataset
    theirs.model.delete_adapter("ref")
    places = [theirs.documents.index(line["prompt_ids"] + line["completion_ids"]) for line in tokenized]
    theirs.records = [theirs.records[index] for index in sorted(range(len(places)), key=places.__getitem__)]
    trainer = theirs.trainer(KTOTrainer, KTOConfig, **settings)
    theirs.model.delete_adapter("ref")
    loss = loss_of(trainer)
    assert trainer._metrics["train"]["kl"][0] > 0.05, "an estimate of 0 says little"
    return loss


def process_reward(theirs: Theirs) -> Tensor:
    """Return transformers' loss of the labels of all steps, at the tokens where TRL's PRMTrainer had them.

    TRL 1.16.0 has that trainer no more: this is its `tokenize_row`, with its line break as the separator.
    """
    encode, rows = tokenizer(), []
    for record in theirs.records:
        ids = encode(record["prompt"], add_special_tokens=False).input_ids
        labels = [-100] * len(ids)
        for step, is_right in zip(record["completions"], record["labels"], strict=True):
            parts = (encode(text, add_special_tokens=False).input_ids for text in (step, "\n"))
            tokens = [token for part in parts for token in part]
            ids, labels = [*ids, *tokens], [*labels, *[-100] * (len(tokens) - 1), int(is_right)]
        rows.append((torch.tensor([ids]), torch.tensor([labels])))
    outputs = [(theirs.model(ids).logits[0], labels[0]) for ids, labels in rows]
    logits, targets = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return torch.nn.functional.cross_entropy(logits, targets)


class Case(NamedTuple):
    """An objective, and TRL's loss for it."""

    train: dict[str, Any]
    """Our settings."""
    trl: Callable[[Theirs], Tensor]
    """TRL's loss of all records."""
    first: float | None = None
    """Loss of a step whose adapter adds nothing, if it does not depend on the model."""
    write: Callable[[], list[dict[str, Any]]] = lambda: pairs()
    """Records of the data."""


def chats() -> list[dict[str, Any]]:
    """Return the prompts and the chosen answers of `pairs` as chats."""
    roles = (("user", "prompt"), ("assistant", "chosen"))
    return [{"messages": [{"role": role, "content": pair[key]} for role, key in roles]} for pair in pairs()]


def pairs_with_margins() -> list[dict[str, Any]]:
    """Return the pairs with a margin each."""
    return [pair | {"margin": 0.25 * (number % 4)} for number, pair in enumerate(pairs())]


def judged() -> list[dict[str, Any]]:
    """Return 12 answers of uneven length to prompts of uneven length, 5 of them good."""
    records = []
    for number, pair in enumerate(pairs()):
        prompt, is_good = " ".join(pair["prompt"].split()[: 2 + number % 4]), number % 5 in (0, 3)
        records.append({"prompt": prompt, "completion": pair["chosen" if is_good else "rejected"], "label": is_good})
    return records


_WEIGHTS = {"desirable_weight": 1.4, "undesirable_weight": 0.8}


def steps() -> list[dict[str, Any]]:
    """Return 12 answers of one to four steps, some of them right."""
    records = []
    for number, pair in enumerate(pairs()):
        words = f"{pair['chosen']} {pair['rejected']}".split()
        parts = [" ".join(words[first : first + 2]) for first in range(0, 2 + 2 * (number % 3), 2)]
        labels = [(number + place) % 3 > 0 for place in range(len(parts))]
        records.append({"prompt": pair["prompt"], "completions": parts, "labels": labels})
    return records


CASES = {
    "dpo": Case({"objective": "dpo", "beta": 0.3}, lambda theirs: dpo(theirs, beta=0.3), math.log(2)),
    # TRL's `robust` is ((1 - e) f(m) - e f(-m)) / (1 - 2 e), f(m) = -log sigmoid(m); cDPO is (1 - e) f(m) + e f(-m).
    "cdpo": Case(
        {"objective": "dpo", "beta": 0.3, "label_smoothing": 0.2},
        lambda theirs: dpo(
            theirs, beta=0.3, label_smoothing=0.2, loss_type=["sigmoid", "robust"], loss_weights=[1.6, -0.6]
        ),
        math.log(2),
    ),
    "dpo and sft": Case(
        {"objective": "dpo", "sft_weight": 0.5},
        lambda theirs: dpo(theirs, batch=1, beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    ),
    "ipo": Case(
        {"objective": "ipo", "beta": 0.2}, lambda theirs: dpo(theirs, beta=0.2, loss_type="ipo"), 1 / (4 * 0.2**2)
    ),
    "orpo": Case({"objective": "orpo", "beta": 0.3}, lambda theirs: orpo(theirs, beta=0.3), write=lambda: pairs("the")),
    "simpo": Case({"objective": "simpo"}, lambda theirs: simpo(theirs, beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)),
    "distill": Case(
        {"objective": "distill", "kd_ratio": 0.3, "kd_temperature": 2.0},
        lambda theirs: distill(theirs, ratio=0.3, beta=0, temperature=2),
        write=chats,
    ),
    "reverse": Case(
        {"objective": "distill", "beta": 1.0, "kd_ratio": 1.0},
        lambda theirs: distill(theirs, ratio=1, beta=1, temperature=1),
        0.0,
        write=chats,
    ),
    "jensen-shannon": Case(
        {"objective": "distill", "beta": 0.4, "kd_ratio": 1.0},
        lambda theirs: distill(theirs, ratio=1, beta=0.4, temperature=1),
        0.0,
        write=chats,
    ),
    "simpo and sft": Case(
        {"objective": "simpo", "beta": 2.5, "target_margin": 1.0, "label_smoothing": 0.1, "sft_weight": 0.3},
        lambda theirs: simpo(theirs, batch=1, beta=2.5, simpo_gamma=1.0, label_smoothing=0.1, cpo_alpha=0.3),
    ),
    "reward": Case(
        {"objective": "reward", "center_rewards": 0.1},
        lambda theirs: reward(theirs, center_rewards_coefficient=0.1),
        write=pairs_with_margins,
    ),
    "kto": Case(
        {"objective": "kto", "beta": 0.3, **_WEIGHTS},
        lambda theirs: kto(theirs, beta=0.3, **_WEIGHTS),
        0.5 * (5 * 1.4 + 7 * 0.8) / 12,
        judged,
    ),
    "process reward": Case({"objective": "process_reward"}, process_reward, write=steps),
}


SECOND = ("cdpo", "dpo and sft", "reverse", "jensen-shannon", "simpo and sft")
"""Other settings of an objective that `make test` has already."""


class Ours(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]
    """By PEFT's names."""
    first: float
    """Loss before the adapter was moved."""


def prepare(folders: Path, run_dir: Path, case: Case, quant: str, **adapter: Any) -> None:
    """Prepare a run whose one step has all records."""
    data = run_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(record) + "\n" for record in case.write()))
    make_run(
        run_dir,
        folders,
        data={"path": str(data), "sequence_length": 160, "eval_fraction": 0.0},
        quant={"method": quant},
        adapter=adapter,
        train={**case.train, "max_steps": 1, "global_batch": 12, "micro_batch": 2, "accumulate": "block"},
    )


def our_step(ranks: Ranks, *, run_dir: Path) -> tuple[Ours, CausalLM]:
    """Compute the step's loss and gradients, of adapters that were moved from their start."""
    config = load_config(run_dir)
    model, backend, _ = start_run_model(config, ranks)
    backend.reduce_gradients_of(trained_parameters(model).values(), config.parallel.bucket_mb)
    start_adapters(model, config.spec, backend, config.train, restores=False)
    objective, batch = objective_of(config.train, config.rollout), open_data(run_dir, config.train, ranks)[0].batch(0)
    units = objective.units(batch)
    losses = []
    for moves in (False, True):
        if moves:
            move_adapters(model, seed=int(config.train.objective == "kto"))  # By which KTO's estimate is above 0.
        backend.zero_gradients()
        prepare_objective(objective, model, batch, units, backend, whole=True)
        model.set_num_micro(len(batch.micro_batches))
        with torch.set_grad_enabled(moves):
            rows = objective.losses(model, joined(batch.micro_batches), ranks.device, 0).rows
        if moves:
            backend.backward(rows.sum() / units, last=True)
            backend.finish_gradients()
        losses.append(float(backend.sum_over_ranks(rows.detach().sum())) / units)
    gradients = {name: parameter.grad.clone() for name, parameter in ours_by_name(model).items()}  # type: ignore[union-attr]
    return Ours(losses[1], gradients, losses[0]), model


def ours_by_name(model: CausalLM) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by their names in PEFT, or in transformers with adapter=full."""
    trained = adapter_tensors(model)
    return trained or {model.hf_name(name): parameter for name, parameter in trained_parameters(model).items()}


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        *((name, "nf4") for name in CASES if name not in SECOND),
        *(ci(name, "nf4") for name in SECOND),
        *(ci(name, "none") for name in CASES),
    ],
    ids=str,
)
def test_losses_and_gradients_equal_trls(folders: Path, tmp_path: Path, name: str, quant: str) -> None:
    compare(folders, tmp_path, CASES[name], quant)


@pytest.mark.parametrize(
    ("quant", "adapter"),
    [
        ("nf4", {"trainable_token_indices": {"embed_tokens": [7, 300], "lm_head": [1, 300, 999]}}),
        ("none", {"method": "full", "r": AdapterConfig().r, "target_modules": AdapterConfig().target_modules}),
    ],
    ids=["token rows", "full"],
)
def test_without_a_reference_token_rows_and_whole_models_train_too(
    folders: Path, tmp_path: Path, quant: str, adapter: dict[str, Any]
) -> None:
    compare(folders, tmp_path, CASES["orpo"], quant, **adapter)


def compare(folders: Path, tmp_path: Path, case: Case, quant: str, **adapter: Any) -> None:
    """Require TRL's loss and gradients."""
    prepare(folders, tmp_path / "run", case, quant, **adapter)
    ours, model = our_step(SINGLE, run_dir=tmp_path / "run")
    config = load_config(tmp_path / "run")
    tuned, parameters = their_model(folders / "llama", model, config.spec)
    documents = documents_of(open_data(tmp_path / "run", config.train, SINGLE)[0].batch(0))
    expected = case.trl(Theirs(tuned, case.write(), tmp_path / "trl", documents))
    expected.backward()
    if case.first is not None:
        assert math.isclose(ours.first, case.first, rel_tol=1e-6, abs_tol=1e-6)
    moved = abs(ours.loss - ours.first) > 1e-2 * ours.first
    assert moved or config.adapter.method == "full", "the adapter hardly moved, so this says little"
    assert_losses_close([ours.loss], [expected.item()], relative=1e-5)
    assert ours.gradients.keys() == parameters.keys()
    for parameter, gradient in ours.gradients.items():
        assert_close(gradient, parameters[parameter].grad, ulps=84)  # type: ignore[arg-type]  # 1e-5


@pytest.fixture
def teacher(folders: Path, tmp_path: Path) -> Path:
    """Write a PEFT adapter of another rank, scale and fewer linears than the student's."""
    lora = {"r": 20, "lora_alpha": 50, "target_modules": ["q_proj", "down_proj"]}
    return write_adapter(tmp_path / "teacher", folders / "llama", std=0.2, **lora)


def test_a_teacher_is_the_base_with_another_adapter_of_any_rank(folders: Path, tmp_path: Path, teacher: Path) -> None:
    settings = {"objective": "distill", "beta": 1.0, "kd_ratio": 0.8, "teacher": str(teacher)}
    case = Case(
        settings, lambda theirs: distill(theirs, ratio=0.8, beta=1, temperature=1, adapter=teacher), write=chats
    )
    compare(folders, tmp_path, case, "nf4")
    config = load_config(tmp_path / "run")
    saved = identity(config)
    change_weights(teacher)
    state = TrainState(progress=RunProgress(), identity=saved, environment={})
    check_matches(state, tmp_path, saved, reference=config.reference_setting)
    with pytest.raises(UserError, match=rf"another reference .* the adapter at train.teacher={teacher} has changed"):
        check_matches(state, tmp_path, identity(config), reference=config.reference_setting)
    qv = dataclasses.replace(config.adapter, target_modules="qv")
    architecture = architecture_of(json.loads((folders / "llama/config.json").read_text()), "llama")
    with pytest.raises(UserError, match=r"train.teacher=.* adapts model.layers.0.mlp.down_proj .*=qv does not"):
        read_adapter_beside("train.teacher", teacher, qv, "nf4", architecture)
    with pytest.raises(UserError, match=r"train\.teacher"):
        read_adapter_beside("train.teacher", tmp_path / "none", config.adapter, "nf4", architecture)


def identity(config: Config) -> Identity:
    return identity_of(config, data_digest="data", base_identity="base")


def change_weights(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load(weights.read_bytes())
    safetensors.torch.save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights)


def our_steps(ranks: Ranks, *, run_dirs: Sequence[Path]) -> list[Ours]:
    return [our_step(ranks, run_dir=run_dir)[0] for run_dir in run_dirs]


@pytest.mark.ci
def test_three_ranks_have_the_losses_and_gradients_of_one(world: World, folders: Path, tmp_path: Path) -> None:
    for name, case in CASES.items():
        prepare(folders, tmp_path / name, case, "nf4")
    run_dirs = [tmp_path / name for name in CASES]
    alone, spread = (world.run(size, our_steps, run_dirs=run_dirs)[0] for size in (1, 3))
    for one, three in zip(alone, spread, strict=True):
        assert_losses_close([three.loss], [one.loss])
        for name, gradient in one.gradients.items():
            assert_close(three.gradients[name], gradient, ulps=84)
