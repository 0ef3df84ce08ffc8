"""Start from an adapter saved by PEFT or by an earlier run (adapter.init_from), or refuse it by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor

from distlora.config import Config, UserError
from distlora.config.file import load_config
from distlora.loading.peft_format import adapter_config, adapter_tensors, load_peft_adapter
from distlora.training import worker
from distlora.training.setup import start_run_model
from distlora.weights.peft_folder import read_peft_adapter
from distlora_launcher.compose.checks import check_model
from distlora_launcher.compose.compose import compose_config
from support.closeness import adapter_of
from support.family_models import SINGLE, dequantized, our_logits
from support.peft_models import write_adapter
from support.runs import build_run_model, parallelize_run, run_until
from support.small_models import make_run

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an adapter of rank 8 on q_proj and v_proj."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    return write_adapter(folder, folders / "llama", r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """Copy the adapter, to damage it."""
    return Path(shutil.copytree(adapter, tmp_path / "lora"))


def overrides(folders: Path, adapter: Path, *more: str) -> list[str]:
    paths = [f"model.path={folders / 'llama'}", f"data.path={folders / 'text.jsonl'}", "data.sequence_length=64"]
    return [*paths, f"adapter.init_from={adapter}", "train.dtype=fp32", *more]


def starting(folders: Path, adapter: Path, *more: str) -> Config:
    config = compose_config(overrides(folders, adapter, *more))
    check_model(config)
    return config


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def of_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Return what changes the tensors of a folder."""

    def edit(folder: Path) -> None:
        safetensors.torch.save_file(change(safetensors.torch.load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return edit


PATTERNS = {"rank_pattern": {"q_proj": 3, "model.layers.1.mlp.down_proj": 5}, "alpha_pattern": {r".*\.2\.mlp\..*": 7}}
LORAS: list[dict[str, Any]] = [
    {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear", **PATTERNS},
    {"r": 4, "lora_alpha": 4, "target_modules": r"model\.layers\.[02]\..*(up|gate)_proj", "dtype": torch.bfloat16},
    {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "model.embed_tokens"]},
    {"r": 4, "lora_alpha": 6, "target_modules": ["k_proj", "down_proj"], "use_dora": True},
]


@pytest.mark.parametrize("fields", LORAS, ids=str)
def test_peft_lora_becomes_the_initial_adapter_with_its_logits(folders: Path, tmp_path: Path, fields: dict) -> None:
    folder = write_adapter(tmp_path / "lora", folders / "llama", **fields)
    config = starting(folders, folder)
    assert (config.adapter.r, config.adapter.lora_alpha) == (fields["r"], fields["lora_alpha"])
    assert config.adapter.use_rslora == fields.get("use_rslora", False)
    assert config.adapter.use_dora == fields.get("use_dora", False)
    model, backend, _ = start_run_model(config, SINGLE)
    load_peft_adapter(model, config.adapter, config.quant.method, backend)
    base = dequantized(folders / "llama", model)
    tokens = torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = base(tokens).logits
        theirs = peft.PeftModel.from_pretrained(base, folder)(tokens).logits
        difference = (theirs - our_logits(model, tokens)).abs().max()
        assert difference <= 1e-4, f"logits are {difference:.1e} apart"
        assert (theirs - plain).abs().max() > 1e-2, "the adapter does nothing, so this says nothing"

    # And what we save of it is what PEFT reads again, patterns included.
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "adapter_config.json").write_text(json.dumps(adapter_config(config.spec, model)))
    tensors = {name: tensor.detach() for name, tensor in adapter_tensors(model).items()}
    safetensors.torch.save_file(tensors, saved / WEIGHTS)
    base = dequantized(folders / "llama", model)
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(base, saved)(tokens).logits
    assert (again - theirs).abs().max() <= 1e-5


@pytest.mark.ci
def test_resume_needs_init_from_until_the_first_checkpoint(folders: Path, tmp_path: Path, copy: Path) -> None:
    settings = {"max_steps": 4, "save_every": 2, "log_every": 1}
    start = {**read_peft_adapter(copy).settings, "init_from": str(copy)}
    for name in ("whole", "stopped"):
        make_run(tmp_path / name, folders, adapter=start, train=settings)
    run_until(SINGLE, run_dir=tmp_path / "whole", stop_before=None)
    run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=1)
    copy.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"init_from=.*lora does not exist"):
        worker.run(tmp_path / "stopped", SINGLE)
    with pytest.raises(UserError, match=r"init_from=.*lora does not exist"):
        check_model(load_config(tmp_path / "stopped"))
    (tmp_path / "away").rename(copy)
    run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=3)
    copy.rename(tmp_path / "away")
    check_model(load_config(tmp_path / "stopped"))
    run_until(SINGLE, run_dir=tmp_path / "stopped", stop_before=None)
    whole, resumed = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_adapter_settings_become_the_runs_except_dropout(folders: Path, adapter: Path) -> None:
    config = starting(folders, adapter, "adapter.lora_dropout=0.1", "recipe=qlora", "adapter.target_modules=qv")
    ours = config.adapter
    assert (ours.r, ours.lora_alpha, ours.use_rslora, ours.lora_dropout) == (8, 12.0, False, 0.1)
    assert ours.target_modules == ("q_proj", "v_proj"), "which is what qv, typed, means, and not what the recipe says"


def test_fields_without_effect_are_accepted(folders: Path, copy: Path) -> None:
    edit(copy, of_a_later_peft=None, another=False, modules_to_save=[], lora_dropout=0.2, eva_config={"rho": 2.0})
    assert starting(folders, copy).adapter.lora_dropout == 0.0


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return of_tensors(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def without(part: str) -> Callable[[Path], None]:
    return of_tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def plus(name: str, *shape: int) -> Callable[[Path], None]:
    return of_tensors(lambda tensors: tensors | {f"base_model.model.{name}": torch.ones(shape)})


def test_names_with_an_adapter_name_are_read(folders: Path, adapter: Path, copy: Path) -> None:
    renamed(".weight", ".default.weight")(copy)
    assert starting(folders, copy).adapter.r == 8
    assert read_peft_adapter(copy).tensors.keys() == read_peft_adapter(adapter).tensors.keys()


def test_non_finite_adapter_is_refused(folders: Path, copy: Path) -> None:
    def poison(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 2] = torch.inf
        return tensors

    of_tensors(poison)(copy)
    config = starting(folders, copy)
    model = build_run_model(config)
    backend = parallelize_run(model, SINGLE, config)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.weight holds NaN or Inf"):
        load_peft_adapter(model, config.adapter, config.quant.method, backend)


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def a_run(folder: Path) -> None:
    shutil.copytree(folder, folder / "adapter")
    (folder / "adapter_config.json").unlink()


REFUSED: list[tuple[Callable[[Path], Any] | dict[str, Any], str]] = [
    # (a change of the folder, or of its adapter_config.json, what the message says)
    ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ({"use_dora": True}, "has a lora_A and no lora_magnitude_vector"),
    ({"use_dora": "yes"}, "use_dora is 'yes', not true or false"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, which the file does not hold"),
    ({"modules_to_save": ["norm"]}, "modules_to_save has 'norm'; only embed_tokens and lm_head"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', not a list"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying=True is not supported"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"trainable_token_indices": [3]}, "names embed_tokens, whose rows are missing in the file"),
    ({"trainable_token_indices": {"lm_head": [3, 3]}}, "which are not distinct token ids"),
    ({"trainable_token_indices": {"q_proj": [3]}}, "only rows of embed_tokens and lm_head"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base"),
    ({"of_a_later_peft": 3}, "of_a_later_peft=3 is not supported"),
    ({"r": "8"}, "r is '8', not an integer"),
    ({"lora_alpha": None}, "lora_alpha is null, not a number"),
    ({"rank_pattern": {"q_proj(": 2}}, r"q_proj\(.* is not a valid regular expression"),
    ({"target_modules": None}, "target_modules=None names nothing"),
    ({"target_modules": ["k_proj"]}, r"target_modules=\['k_proj'\] names nothing"),
    (without("layers.1.self_attn.q_proj"), "holds no tensors for model.layers.1.self_attn.q_proj"),
    (without("layers.1.self_attn.q_proj.lora_B"), "has a lora_A and no lora_B"),
    (renamed("layers.2.", "layers.7."), r"layers.7.self_attn.q_proj \(2 linears in all\), which is not a linear"),
    (renamed("layers.2.self_attn.q_proj", "layers.2.self_attn.k_proj"), "target_modules"),
    (renamed("model.layers", "layers"), "adapts layers.0.self_attn.q_proj"),
    (
        of_tensors(lambda t: {n: (v[:4] if "lora_A" in n else v[:, :4]).contiguous() for n, v in t.items()}),
        r"has shape \[4, 96\], .* needs \[8, 96\]",
    ),
    (of_tensors(lambda t: {n: v.half().to(torch.float64) for n, v in t.items()}), "is stored as F64"),
    (
        plus("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 96),
        "which is DoRA's, but adapter_config.json has no use_dora=true",
    ),
    (plus("model.embed_tokens.weight", 1001, 96), "embed_tokens.weight is not a lora_A"),
    (plus("model.layers.0.self_attn.q_proj.lora_A.default.weight", 8, 96), "the same tensor of two adapters"),
    (of_tensors(lambda t: {}), "holds no tensors"),
    (shutil.rmtree, "does not exist"),
    (only_pickle, r"adapter_model.bin is a pickle.*save it again"),
    (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    (a_run, r"holds no adapter_config.json; set adapter.init_from=.*/lora/adapter"),
    (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 50), "damaged"),
]
CONTRADICTED = [
    ("adapter.r=16", "adapter.r=16 contradicts .*lora, whose r is 8"),
    ("adapter.use_dora=true", "adapter.use_dora=true contradicts .* whose use_dora is false"),
    ("adapter=dora", "adapter=dora contradicts .* whose use_dora is false"),
    ("adapter.target_modules=all-linear", r"target_modules=all-linear contradicts .* is \[q_proj,v_proj\]"),
    ("+adapter.rank_pattern.q_proj=4", r"rank_pattern.q_proj=4 contradicts .* whose rank_pattern is {}"),
    ("adapter.init=gaussian", "adapter.init=gaussian has no effect"),
    ("adapter.init_from=org/some-lora", "hf download org/some-lora --local-dir FOLDER"),
]
"""Words of the command line that do not go with the adapter."""


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_another_folder_is_refused_by_field_tensor_or_file(
    folders: Path, copy: Path, change: Callable[[Path], Any] | dict[str, Any], reason: str
) -> None:
    edit(copy, **change) if isinstance(change, dict) else change(copy)
    with pytest.raises(UserError, match=reason):
        starting(folders, copy)


@pytest.mark.parametrize(("word", "reason"), CONTRADICTED)
def test_contradicting_override_is_refused(folders: Path, adapter: Path, word: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        compose_config(overrides(folders, adapter, word))


def test_adapter_of_another_model_is_refused(folders: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    starting(folders, copy)
    assert "note:" not in capsys.readouterr().out
    edit(copy, base_model_name_or_path="org/some-base")
    starting(folders, copy)
    assert capsys.readouterr().out.count("says that its base is org/some-base") == 1
    wider = [word.replace("/llama", "/qwen3") for word in overrides(folders, copy)]
    of_tensors(lambda t: {n: torch.cat([v, v], dim=1) if "lora_A" in n else v for n, v in t.items()})(copy)
    with pytest.raises(UserError, match=r"shape \[8, 192\].*needs \[8, 96\] \(it was trained on org/some-base\)"):
        check_model(compose_config(wider))


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"rank_pattern": {"q_prj": 4}}, r"rank_pattern.q_prj=4 changes no linear .*\(did you mean 'q_proj'\?\)"),
        ({"alpha_pattern": {"down_proj": 4.0}}, "alpha_pattern.down_proj=4.0 changes no linear with an adapter"),
        (
            {"rank_pattern": {"q_proj": 4, r".*layers\.1.*q_proj": 2}},
            r"layers\\.1.*q_proj=2 changes no linear .* an earlier key matches",
        ),
    ],
)
def test_pattern_without_match_is_refused(folders: Path, patterns: dict, reason: str) -> None:
    words = [word for word in overrides(folders, Path()) if "init_from" not in word]
    config = compose_config([*words, "adapter.target_modules=attention"])
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **patterns))
    for check in (check_model, build_run_model):
        with pytest.raises(UserError, match=reason):
            check(config)
