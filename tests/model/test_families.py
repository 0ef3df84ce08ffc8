"""Every family and variant: our model is transformers', trains as PEFT would, packs, shards, and saves what PEFT loads.

distlora/model/README.md lists the families.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers

from distlora.architecture.config_checks import check_config, read_config
from distlora.architecture.targets import select_adapted
from distlora.config import UserError
from distlora.loading.peft_format import adapter_tensors
from distlora.model.adapters import adapter_parameters
from distlora.model.build import DTYPES
from distlora_launcher.compose.checks import check_model
from support.closeness import assert_adapters_close, assert_close, assert_losses_close, relative_error
from support.family_models import (
    SINGLE,
    VARIANTS,
    FolderOf,
    config_for,
    dequantized,
    edit_config,
    load_ours,
    our_logits,
    positions_of,
    save_adapter,
    shifted,
    three_steps,
    tokens,
)
from support.runs import build_run_model
from support.tiers import ci
from support.worlds import World

LENGTHS = (23, 1, 40)
"""Packed documents; two are longer than the windows of 16."""


SEAMS = ("llama-biases", "mistral-window", "qwen2-tied-window", "qwen3", "gemma2", "gemma3", "phi3-longrope-tied")
SEAMS += ("mixtral", "qwen3-moe", "gpt-oss")
"""The variant of each class with the most that is its own, for `make test`."""
EACH = [name if name in SEAMS else ci(name) for name in VARIANTS]


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *(("fp32", name) if name in SEAMS else ci("fp32", name) for name in VARIANTS),
        *(("bf16", name) if name in ("gemma2", "gpt-oss") else ci("bf16", name) for name in VARIANTS),
    ],
)
def test_forward_is_transformers_own_on_the_dequantized_weights(family_folder: FolderOf, dtype: str, name: str) -> None:
    """Compare the base alone (no row chooses the adapter): hidden states bit for bit.

    The loss differs by the order of its sum and, in bf16, by our fp32 logits.
    """
    ours, _ = load_ours(family_folder(name), train={"dtype": dtype})
    theirs = dequantized(family_folder(name), ours, DTYPES[dtype])
    input_ids = tokens(2, 48)
    none = torch.full((2,), -1)
    with torch.no_grad():
        expected = theirs(input_ids=input_ids, labels=input_ids)
        decoder = theirs.get_submodule(ours.architecture.decoder)
        hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        loss = ours(input_ids, positions_of(input_ids), shifted(input_ids), none).sum() / (2 * 47)
        own = ours.hidden_states(input_ids, positions_of(input_ids), none)
        if name == "gpt-oss":  # torch computes the last elements of a sigmoid without vectors: an expert's, or all's.
            assert_close(own, hidden, ulps=4)
        else:
            assert torch.equal(own, hidden)
        assert abs(loss / expected.loss - 1) <= (1e-6 if dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("name", [*EACH, ci("gemma4 with its tower")])
def test_peft_loads_the_saved_adapter_and_has_our_logits_and_gradients(
    family_folder: FolderOf, tmp_path: Path, recwarn: pytest.WarningsRecorder, name: str
) -> None:
    """On AutoModelForCausalLM of the same folder: every tensor has its place, no other linear is adapted."""
    ours, _ = load_ours(family_folder(name))
    save_adapter(tmp_path / "adapter", ours, family_folder(name))
    base = dequantized(family_folder(name), ours)
    input_ids = tokens(2, 48)
    with torch.no_grad():
        base_logits = base(input_ids).logits
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert not [str(warning.message) for warning in recwarn if "adapter keys" in str(warning.message)]
    parameters = {n.replace(".default", ""): p for n, p in tuned.named_parameters() if ".lora_" in n}
    own = adapter_tensors(ours)
    assert parameters.keys() == own.keys(), "PEFT adapts other linears than we did"
    assert all(torch.equal(parameters[n], own[n]) for n in own)

    with torch.no_grad():
        logits = tuned(input_ids).logits
        assert (logits - our_logits(ours, input_ids)).abs().max() <= 1e-4
        assert (logits - base_logits).abs().max() > 1e-2, "the adapter does nothing, so this says nothing"

    loss = ours(input_ids, positions_of(input_ids), shifted(input_ids)).sum() / (2 * 47)
    gradients = torch.autograd.grad(loss, list(own.values()))
    expected = tuned(input_ids=input_ids, labels=input_ids).loss
    references = torch.autograd.grad(expected, [parameters[n] for n in own])
    assert abs(loss / expected - 1) <= 1e-6
    errors = {n: relative_error(a, b) for n, a, b in zip(own, gradients, references, strict=True)}
    worst = max(errors, key=lambda n: errors[n])
    limit = 1e-5
    if errors[worst] > limit:  # Gradients of a random Gemma 4 move by 1e-4 and more with the last bit of its adapters.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for n in own:
                noise = torch.randn(parameters[n].shape, generator=generator)
                parameters[n].mul_(1 + torch.finfo(torch.float32).eps * noise)
        moved = torch.autograd.grad(tuned(input_ids=input_ids, labels=input_ids).loss, [parameters[n] for n in own])
        limit = 4 * max(relative_error(a, b) for a, b in zip(moved, references, strict=True))
    assert errors[worst] <= limit, f"the gradient of {worst} is {errors[worst]:.1e} apart"


@pytest.mark.parametrize("name", EACH)
def test_packed_documents_equal_documents_alone(family_folder: FolderOf, name: str) -> None:
    ours, _ = load_ours(family_folder(name))
    documents = [tokens(1, length, seed) for seed, length in enumerate(LENGTHS)]
    parameters = list(adapter_parameters(ours).values())

    positions = torch.cat([positions_of(document) for document in documents], dim=1)
    labels = torch.cat([document.flip(1) for document in documents], dim=1)
    packed = ours(torch.cat(documents, dim=1), positions, labels).sum()
    together = torch.autograd.grad(packed, parameters)
    alone = sum(ours(document, positions_of(document), document.flip(1)).sum() for document in documents)
    apart = torch.autograd.grad(alone, parameters)

    assert abs(packed / alone - 1) <= 1e-6
    assert relative_error(*(torch.cat([g.flatten() for g in gradients]) for gradients in (together, apart))) <= 2e-6


BY_DEFAULT = {"phi3-longrope-tied": 3, "mixtral": 2}
IN_CI = {"llama": 3, "gemma3-untied": 3, "qwen3-moe": 3, "mistral-window": 2, "qwen2-tied-window": 2, "qwen3": 2}
IN_CI |= {"gpt-oss": 2, "gemma2": 2}
SHARDED = [
    *BY_DEFAULT.items(),
    *(ci(name, size) for name, size in IN_CI.items()),
    *(pytest.param(name, 2, marks=pytest.mark.slow) for name in VARIANTS if name not in BY_DEFAULT | IN_CI),
]
"""(variant, ranks): two families in `make test`, each family in `make test-ci`, each variant in `make test-all`."""


@pytest.mark.parametrize(("name", "size"), SHARDED)
def test_sharded_ranks_train_like_one(world: World, family_folder: FolderOf, name: str, size: int) -> None:
    results = world.run(size, three_steps, folder=family_folder(name))
    expected_losses, expected = three_steps(SINGLE, folder=family_folder(name))
    for losses, adapter in results:
        assert_losses_close(losses, expected_losses)
        assert_adapters_close(adapter, expected)
        assert all(torch.equal(adapter[n], results[0][1][n]) for n in adapter), "ranks differ"
    assert expected_losses[-1] < expected_losses[0] - 0.02, "the run learned nothing, so the comparison says nothing"


@pytest.mark.parametrize("name", EACH)
def test_the_launcher_finds_what_the_worker_finds(family_folder: FolderOf, tmp_path: Path, name: str) -> None:
    """From config.json and the headers alone: a model that can be trained, and the same paths for target_modules."""
    folder = tmp_path / "model"
    shutil.copytree(family_folder(name), folder)
    check_model(config_for(folder))
    architecture = check_config(read_config(folder), folder / "config.json", sequence_length=64)
    model = build_run_model(config_for(folder))
    adapted = select_adapted(config_for(folder).adapter, architecture)
    assert sorted(adapted) == sorted(path for path, _ in model.adapted_weights())
    assert type(transformers.AutoModelForCausalLM.from_pretrained(folder)).__name__ == architecture.model_class


def test_the_launcher_names_a_missing_tensor_as_transformers_does(family_folder: FolderOf, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(family_folder("gemma3-untied"), folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"], tensors["language_model.lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor lm_head.weight .*\(2 tensors are missing in all\)"):
        check_model(config_for(folder))
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"no tensor model\.language_model\.layers\.1\.mlp\.up_proj\.weight"):
        check_model(config_for(folder))
