"""Check the arithmetic of adapters.

A sum is exact, PEFT's methods give PEFT's numbers, and truncation states its error. Real PEFT loads the results;
combinations without a meaning are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from distlora.config import UserError
from distlora.parallel import Ranks
from distlora.post import combine_worker as worker
from distlora.post.combine import METHODS, CombineRequest
from distlora.post.merge import check_mergeable
from distlora.post.trained import Name, base_spec
from distlora.post.weights import adapted_rows, open_base, read_factors
from distlora.system.command_worker import from_json, to_json
from distlora.system.randomness import key_of
from distlora.training import worker as training_worker
from distlora.weights.peft_folder import NF4_MARK, read_peft_adapter
from distlora.weights.reader import Reader
from distlora_launcher.cli.combine import checked
from distlora_launcher.cli.main import main
from distlora_launcher.terminal.arguments import read
from support.closeness import relative_error
from support.family_models import write_family_folder
from support.peft_models import write_adapter
from support.small_models import make_run

SINGLE = Ranks(0, 1, torch.device("cpu"), None)
WEIGHTS = "adapter_model.safetensors"
EXACT = 1e-6
"""Relative, of sums in fp32."""


def combine(*words: str | Path) -> tuple[Path, dict[str, Any]]:
    """Run the command's two halves in this process. Return (folder, record)."""
    options = read(CombineRequest, "distlora combine", [str(word) for word in words])
    request = checked(options, "distlora combine ...")
    return Path(request.out), worker.run(from_json(CombineRequest, to_json(request)))


def delta(folder: Path, path: str) -> Tensor:
    """S B A of one weight, fp64; 0 where the adapter has none."""
    file = read_peft_adapter(folder)
    if path not in file.paths:
        return torch.tensor(0.0)
    with Reader() as reader:
        factors = read_factors(file, path, reader)
    return factors.scaling * factors.B.double() @ factors.A.double()


def paths_of(folder: Path) -> list[str]:
    return read_peft_adapter(folder).paths


@pytest.fixture(scope="module")
def one(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4 on q_proj and up_proj, of another scale in one layer."""
    folder = tmp_path_factory.mktemp("one") / "a"
    targets = {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
    return write_adapter(folder, folders / "llama", r=4, lora_alpha=12, **targets)


@pytest.fixture(scope="module")
def two(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RsLoRA of rank 6 and 3 on other linears, one of them shared."""
    folder = tmp_path_factory.mktemp("two") / "b"
    fields = {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 3}, "use_rslora": True}
    write_adapter(folder, folders / "llama", r=6, lora_alpha=5, **fields)
    return shuffled(folder)


def shuffled(folder: Path) -> Path:
    """`write_adapter` draws the same numbers for every adapter."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors = {name: tensor.flip(0).contiguous() * 1.3 for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def in_peft(folder: Path, base: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    return peft.PeftModel.from_pretrained(model, folder)


def test_a_sum_of_other_ranks_scales_and_targets_is_exact(folders: Path, one: Path, two: Path, tmp_path: Path) -> None:
    out, record = combine(f"{one}=0.6", f"{two}=-0.4", "--out", tmp_path / "sum")
    assert set(paths_of(out)) == set(paths_of(one)) | set(paths_of(two))
    for path in paths_of(out):
        expected = 0.6 * delta(one, path) - 0.4 * delta(two, path)
        assert relative_error(delta(out, path), expected) < EXACT
    assert record["ranks"] == {"smallest": 3, "largest": 10}
    assert record["truncation"] is None
    # Real PEFT: its merged weight is the base's and the sum.
    tuned = in_peft(out, folders / "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(folders / "llama", dtype=torch.float32)
    merged = tuned.merge_and_unload()
    for path in paths_of(out):
        added = merged.get_parameter(f"{path}.weight").double() - base.get_parameter(f"{path}.weight").double()
        assert relative_error(added, delta(out, path)) < 1e-5


def test_what_a_rank_drops_is_said_exactly(one: Path, two: Path, tmp_path: Path) -> None:
    """The dropped singular values, as a dense SVD finds them."""
    out, record = combine(f"{one}=0.6", f"{two}=0.4", "--out", tmp_path / "o", "--method", "svd", "--rank", "5")
    kept = lost = 0.0
    for path in paths_of(out):
        exact = 0.6 * delta(one, path) + 0.4 * delta(two, path)
        values = torch.linalg.svdvals(exact)
        error = float((exact - delta(out, path)).square().sum())
        assert error == pytest.approx(float(values[5:].square().sum()), rel=1e-4, abs=1e-10)
        kept, lost = kept + float(values.square().sum()), lost + error
    assert record["truncation"]["norm"] == pytest.approx(math.sqrt(kept), rel=1e-5)
    assert record["truncation"]["share"] == pytest.approx(math.sqrt(lost / kept), rel=1e-4)
    assert record["truncation"]["worst"]["path"].endswith("q_proj")


@pytest.fixture(scope="module")
def pair(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of rank 4 on the same linears, as A and B can be combined apart."""
    root = tmp_path_factory.mktemp("pair")
    for name, alpha, rslora in (("a", 12, False), ("b", 5, True)):
        fields: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "use_rslora": rslora}
        write_adapter(root / name, folders / "llama", r=4, lora_alpha=alpha, **fields)
    return root / "a", shuffled(root / "b")


@pytest.fixture(scope="module")
def tuned_pair(folders: Path, pair: tuple[Path, Path]) -> Any:
    tuned = in_peft(pair[0], folders / "llama", attn_implementation="eager")
    tuned.load_adapter(pair[1], "b")
    return tuned


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_pefts(method: str, tuned_pair: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Compare with add_weighted_adapter, bit for bit where nothing is decomposed.

    DARE is compared by the functions that PEFT calls for each linear, with our draws.
    """
    how, weights, density = METHODS[method], [0.7, -0.5], 0.4 if "density" in METHODS[method].options else None
    words = [f"{pair[0]}=0.7", f"{pair[1]}=-0.5", "--out", tmp_path / "out", "--method", method]
    words += ["--density", "0.4"] if density else []
    words += ["--majority-sign-method", "frequency"] if "majority_sign_method" in how.options else []
    words += ["--seed", "3"] if "seed" in how.options else []
    out, _ = combine(*words)
    tuner, sign = tuned_pair.base_model, "frequency" if "majority_sign_method" in how.options else "total"
    names = ["default", "b"]
    if "seed" not in how.options:
        tuned_pair.add_weighted_adapter(
            names, weights, method, combination_type=method, density=density, majority_sign_method=sign
        )
    ours = safetensors.torch.load_file(out / WEIGHTS)
    for path in paths_of(out):
        target = tuned_pair.get_submodule(f"base_model.model.{path}")
        if "seed" in how.options:
            torch.manual_seed(key_of(3, path)[0])
            if how.on == "factors":
                a, b = tuner._generalized_task_arithmetic_weighted_adapter(
                    method, names, weights, target, density, sign
                )
            else:
                a, b = tuner._svd_generalized_task_arithmetic_weighted_adapter(
                    method, names, weights, 4, target, None, None, density, sign
                )
        else:
            a, b = target.lora_A[method].weight, target.lora_B[method].weight
        our_a, our_b = (ours[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
        if how.on == "weights":
            # Singular vectors have no sign of their own: the products are compared.
            assert relative_error(our_b @ our_a, b @ a) < 1e-4
        else:
            assert torch.equal(our_a, a)
            assert torch.equal(our_b, b)


def test_experts_are_summed_each(tmp_path: Path) -> None:
    """Ranks 2 and 3 of fused weights; real PEFT loads the sum, which is per expert."""
    base = tmp_path / "moe"
    write_family_folder(base, "qwen3-moe")
    short = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for name, rank, parameters in (("a", 2, short), ("b", 3, short[:1])):
        fields: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": parameters}
        write_adapter(tmp_path / name, base, r=rank, lora_alpha=4, **fields)
    shuffled(tmp_path / "b")
    words = (f"{tmp_path / 'a'}=0.6", f"{tmp_path / 'b'}=-1.5", "--out")
    for method, rank in (("cat", 5), ("svd", 4)):
        out, record = combine(*words, tmp_path / method, "--method", method, *(["--rank", "4"] if rank == 4 else []))
        path = "model.layers.1.mlp.experts.gate_up_proj"
        with Reader() as reader:
            mine, a, b = (
                read_factors(read_peft_adapter(folder), path, reader, experts=5)
                for folder in (out, tmp_path / "a", tmp_path / "b")
            )
        assert mine.rank == rank
        for expert in range(5):
            exact = 0.6 * a.delta()[expert].double() - 1.5 * b.delta()[expert].double()
            error = relative_error(mine.delta()[expert], exact)
            assert error < EXACT if method == "cat" else error <= record["truncation"]["worst"]["share"] * 2
        tuned = in_peft(out, base, experts_implementation="eager")
        added = tuned.base_model.model.get_submodule("model.layers.1.mlp.experts")
        assert type(added).__name__ == "ParamWrapper"
        stored = safetensors.torch.load_file(out / WEIGHTS)
        state = peft.get_peft_model_state_dict(tuned)
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], state[name]) for name in stored)


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_dora_is_summed_as_what_it_makes_of_the_weight(folders: Path, two: Path, tmp_path: Path, quant: str) -> None:
    """M (W + s B A) / ||.|| - W, of the base as it is held; at full rank nothing is lost."""
    dora = write_adapter(
        tmp_path / "dora", folders / "llama", r=2, lora_alpha=4, use_dora=True, target_modules=["q_proj", "v_proj"]
    )
    words = (f"{dora}=0.5", f"{two}=0.5", "--method", "svd", "--rank", "96", "--quant", quant, "--out")
    out, record = combine(*words, tmp_path / "out")
    assert record["truncation"]["share"] < 1e-6
    base = open_base(base_spec(str(folders / "llama"), "nf4" if quant == "nf4" else "none"))
    file = read_peft_adapter(dora)
    with Reader() as reader:
        for path in file.paths:
            weight = base.weights[f"{path}.weight"].whole(reader, original=quant == "none")
            mine = adapted_rows(weight, 0, read_factors(file, path, reader)) - weight
            assert relative_error(delta(out, path), 0.5 * mine.double() + 0.5 * delta(two, path)) < 1e-5


def test_rows_and_whole_matrices_are_summed_as_changes_of_the_base(folders: Path, tmp_path: Path) -> None:
    base = folders / "llama"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    embedding, head = model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach()
    common: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    write_adapter(tmp_path / "a", base, trainable_token_indices=[7, 3], **common)
    write_adapter(tmp_path / "b", base, trainable_token_indices=[3, 900], **common)
    shuffled(tmp_path / "b")
    out, _ = combine(f"{tmp_path / 'a'}=0.5", f"{tmp_path / 'b'}=2", "--out", tmp_path / "out")
    stored = [safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("a", "b", "out")]
    rows = [next(t for name, t in of.items() if name.endswith("trainable_tokens_delta")) for of in stored]
    a, b, made = rows
    assert torch.allclose(made[0], embedding[3] + 0.5 * (a[1] - embedding[3]) + 2 * (b[0] - embedding[3]), atol=1e-6)
    assert torch.allclose(made[1], embedding[7] + 0.5 * (a[0] - embedding[7]), atol=1e-6)
    assert torch.allclose(made[2], embedding[900] + 2 * (b[1] - embedding[900]), atol=1e-6)
    heads = [of["base_model.model.lm_head.weight"] for of in stored]
    assert torch.allclose(heads[2], head + 0.5 * (heads[0] - head) + 2 * (heads[1] - head), atol=1e-5)
    tuned = in_peft(out, base)
    with torch.no_grad():
        assert torch.allclose(tuned.get_input_embeddings()(torch.tensor([900])), made[2], atol=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["trainable_token_indices"], config["modules_to_save"]) == ([3, 7, 900], ["lm_head"])
    with pytest.raises(UserError, match=r"embed_tokens holds NaN or Inf in the base or in .*/a, "):
        combine(f"{tmp_path / 'a'}=1e39", f"{tmp_path / 'b'}=2", "--out", tmp_path / "infinite")


def test_runs_name_their_base(folders: Path, tmp_path: Path) -> None:
    """A run of PiSSA, whose checkpoints belong to another base than its result, and one of LoRA."""
    for name, init in (("pissa", "pissa"), ("lora", "kaiming")):
        adapter = {"target_modules": ["q_proj"], "r": 4, "init": init}
        make_run(
            tmp_path / name, folders, adapter=adapter, train={"max_steps": 2, "save_every": 2}, quant={"method": "none"}
        )
        training_worker.run(tmp_path / name, SINGLE)
    out, record = combine(
        f"{tmp_path / 'pissa'}=0.5", f"{tmp_path / 'lora' / 'adapter'}=0.5", "--out", tmp_path / "out"
    )
    for path in paths_of(out):
        mine = 0.5 * delta(tmp_path / "pissa" / "adapter", path) + 0.5 * delta(tmp_path / "lora" / "adapter", path)
        assert relative_error(delta(out, path), mine) < EXACT
    assert record["ranks"] == {"smallest": 12, "largest": 12}
    assert [(member["quant"], member["pissa"]) for member in record["members"]] == [("none", True), ("none", False)]
    name = Name(place=str(out), base=str(folders / "llama"))
    check_mergeable(name.read(), "trained")
    assert name.read().spec.quant.method == "none"
    _, nested = combine(f"{out}=0.5", "--out", tmp_path / "nested")
    assert [(member["quant"], member["pissa"]) for member in nested["members"]] == [("none", True)]
    # Without the run, combine.json alone knows the form of the base.
    for quants, said in ((("nf4", "nf4"), "PiSSA .* write --onto original"), (("nf4", "none"), "as nf4 and as none")):
        members = [{**member, "quant": quant} for member, quant in zip(record["members"], quants, strict=True)]
        (out / "combine.json").write_text(json.dumps(record | {"members": members}))
        with pytest.raises(UserError, match=said):
            check_mergeable(name.read(), "trained")
    check_mergeable(dataclasses.replace(name, quant="nf4").read(), "original")
    for place in (tmp_path / "lora" / "checkpoints").glob("step_*"):
        again, _ = combine(f"{place}=1", "--out", tmp_path / "again")
        assert relative_error(delta(again, path), delta(tmp_path / "lora" / "adapter", path)) < EXACT
    shutil.rmtree(tmp_path / "lora" / "adapter")
    with pytest.raises(UserError, match=r"checkpoints/step_0+2=0\.5"):
        combine(f"{tmp_path / 'lora'}=0.5", "--out", tmp_path / "unfinished")


def test_what_belongs_to_nf4_says_so_in_the_sum(folders: Path, one: Path, two: Path, tmp_path: Path) -> None:
    """LoftQ's A and B hold a correction of what NF4 loses, which goes into the sum with the adapter's weight."""
    loftq = shutil.copytree(one, tmp_path / "loftq")
    tensors = safetensors.torch.load_file(loftq / WEIGHTS)
    safetensors.torch.save_file(tensors, loftq / WEIGHTS, metadata={"format": "pt"} | NF4_MARK)
    out, _ = combine(f"{loftq}=0.5", f"{two}=0.5", "--out", tmp_path / "out")
    assert read_peft_adapter(out).settings["init_from_loftq"]
    for path in paths_of(out):
        assert relative_error(delta(out, path), 0.5 * delta(loftq, path) + 0.5 * delta(two, path)) < EXACT


def test_rows_of_a_tied_matrix_and_the_whole_of_the_other_are_refused(folders: Path, tmp_path: Path) -> None:
    """Rows of a tied embedding are the head's as well, so a head trained whole would lose them."""
    base, common = folders / "llama-tied", {"r": 2, "target_modules": ["q_proj"]}
    head = write_adapter(tmp_path / "head", base, modules_to_save=["lm_head"], **common)
    rows = write_adapter(tmp_path / "rows", base, trainable_token_indices=[7], **common)
    with pytest.raises(UserError, match="as the base ties them"):
        combine(f"{head}=0.5", f"{rows}=0.5", "--out", tmp_path / "out")


def test_what_has_no_meaning_is_refused(
    folders: Path, one: Path, two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_adapter(tmp_path / "other", folders / "qwen3", r=4, target_modules=["q_proj"])
    nowhere = shutil.copytree(one, tmp_path / "nowhere")
    config = json.loads((nowhere / "adapter_config.json").read_text())
    (nowhere / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/gone"}))
    dora = write_adapter(tmp_path / "dora", folders / "llama", r=4, use_dora=True, target_modules=["q_proj"])
    out = tmp_path / "out"
    cases: list[tuple[list[Any], str]] = [
        ([f"{one}=1", f"{other}=1"], "different bases"),
        ([f"{one}=1", f"{nowhere}=1"], "--same-base"),
        ([f"{one}=0", f"{two}=1"], "other than 0"),
        ([f"{one}=x"], "not a number"),
        ([one], "names no weight"),
        ([f"{one}=1", f"{one}=2"], "named twice"),
        ([f"{one}=1", f"{two}=1", "--method", "ties", "--density", "0.5"], "ties_svd"),
        ([f"{one}=1", f"{two}=1", "--method", "ties_svd"], "add --density"),
        ([f"{one}=1", f"{two}=1", "--method", "tie"], "'ties'"),
        ([f"{one}=1", f"{two}=1", "--rank", "4"], "--method svd"),
        ([f"{one}=1", f"{two}=1", "--seed", "4"], "no effect"),
        ([f"{one}=1", f"{two}=1", "--density", "0.5"], "no effect"),
        ([f"{one}=1", f"{two}=1", "--quant", "nf4"], "no effect"),
        ([f"{one}=1", f"{dora}=1"], "--method svd"),
        ([f"{tmp_path / 'gone'}=1"], "does not exist"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            combine(*words, "--out", out)
    assert main(["combine", f"{one}=1", f"{other}=1", "--out", str(out)]) == 2
    assert "different bases" in capsys.readouterr().err
    for gone in ("--merged", "--onto=original", "--dtype"):
        assert main(["combine", f"{one}=1", "--out", str(out), gone]) == 2
        assert (
            f"{gone} is gone; write `distlora combine ... --out SUM`, then `distlora merge" in capsys.readouterr().err
        )
    assert not out.exists()
    made, _ = combine(f"{one}=1", f"{nowhere}=1", "--same-base", "--out", out)
    assert made.is_dir()
