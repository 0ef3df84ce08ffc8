"""`distlora eval`: the losses of a run's own evaluation, divergences as from whole logits, any number of ranks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distlora.config import UserError
from distlora.config.file import build
from distlora.data.loader import StepLoader
from distlora.model.lm_head import IGNORED_LABEL
from distlora.parallel import Ranks
from distlora.post import evaluate_worker as worker
from distlora.post.evaluate import EvaluateRequest, Subject, Text, held_out, measured_table
from distlora.post.evaluate_worker import load, open_rows
from distlora.post.merge import MergeRequest, Receipt
from distlora.post.merge_worker import merge_to
from distlora.post.trained import Name
from distlora.training import worker as train
from distlora_launcher.cli import merge as merging
from distlora_launcher.cli.main import main as command
from support.family_models import SINGLE, write_family_folder
from support.small_models import make_run, read_metrics, tokenizer, write_model_folder, write_text_file
from support.tiers import ci
from support.worlds import World


@pytest.fixture(scope="module")
def run_dir(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, with a row of the vocabulary and the head trained beside an adapter."""
    place = tmp_path_factory.mktemp("evaluation") / "run"
    adapter = {"target_modules": "all-linear", "r": 4, "modules_to_save": ["lm_head"]}
    make_run(place, folders, adapter=adapter, train={"max_steps": 4, "global_batch": 12, "dtype": "fp32"})
    train.run(place, SINGLE)
    return place


def request_for(run_dir: Path, *more: Subject, **settings: Any) -> EvaluateRequest:
    name = Name(place=str(run_dir))
    text = held_out(name.read(), "the run")
    adapted = Subject(label="adapted", kind="adapted", name=name)
    base = Subject(label="base", kind="base", name=replace(name, adapter="base"))
    return EvaluateRequest(places=[], subjects=(adapted, base, *more), source=text, dtype="fp32", **settings)


def whole_logits(subject: Subject, request: EvaluateRequest) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (targets, V) in fp64, targets, the row of each): what no evaluation ever holds."""
    model, _ = load(subject, "fp32", SINGLE)
    rows, _ = open_rows(request.source, subject.read(), SINGLE)
    loader = StepLoader(rows, global_batch=len(rows), micro_batch=len(rows), rank=0, world=1, seed=0, shuffle=False)
    (batch,) = loader.batch(0).micro_batches
    at = batch.labels != IGNORED_LABEL
    with torch.no_grad():
        hidden = model.hidden_states(batch.input_ids, batch.position_ids)
        logits = model.head.logits(hidden[at]).double()
    return logits, batch.labels[at], batch.rows[:, None].expand_as(batch.labels)[at]


def test_the_figures_are_those_of_whole_logits_and_of_the_runs_own_evaluation(run_dir: Path) -> None:
    """Heads differ here: what the others are compared with brings its own."""
    request = request_for(run_dir)
    found = worker.run(request, SINGLE)
    adapted, base = found["models"]
    assert adapted["loss"] == pytest.approx(read_metrics(run_dir)[-1]["eval_loss"], rel=1e-6)
    ours, targets, row_of = whole_logits(request.subjects[0], request)
    theirs, _, _ = whole_logits(request.subjects[1], request)
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    losses = [-log.gather(1, targets[:, None]).squeeze(1) for log in (log_p, log_q)]
    assert base["loss_difference"] == pytest.approx(float((losses[1] - losses[0]).mean()), rel=1e-6)
    assert base["divergence"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-6)
    assert base["largest_logit_difference"] == pytest.approx(float((ours - theirs).abs().max()), rel=1e-5)
    assert base["changed_tokens"] == pytest.approx(float((ours.argmax(1) != theirs.argmax(1)).double().mean()))
    assert base["loss_standard_error"] > 0
    assert (adapted["loss_difference"], adapted["divergence"], adapted["largest_logit_difference"]) == (0, 0, 0)
    assert found["text"]["targets"] == len(targets)
    assert len(row_of.unique()) == found["text"]["rows"]
    table = measured_table(found).text()
    assert "adapted" in table
    assert f"{base['perplexity']:,.3f}" in table


def evaluate(ranks: Ranks, run_dir: Path, model: Path) -> dict[str, Any]:
    """One that is rounded too, whose weights change after they were loaded."""
    rounded = Subject(label="rounded", kind="model", model=str(model), rounded="fp16")
    request = request_for(run_dir, rounded)
    return worker.run(replace(request, source=replace(request.source, most_rows=4)), ranks)


@pytest.mark.ci
def test_sharded_ranks_find_what_one_finds(world: World, run_dir: Path, folders: Path) -> None:
    alone = evaluate(SINGLE, run_dir, folders / "llama")["models"]
    for found in world.run(2, evaluate, run_dir=run_dir, model=folders / "llama"):
        for ours, theirs in zip(found["models"], alone, strict=True):
            for key in ("loss", "perplexity", "loss_difference", "divergence"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-9), key
            assert ours["largest_logit_difference"] == pytest.approx(theirs["largest_logit_difference"], rel=1e-4)
            assert ours["changed_tokens"] == theirs["changed_tokens"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[EvaluateRequest]:
    """Return the requests of the processes that a command would become."""
    requests: list[EvaluateRequest] = []

    def become(executable: str, arguments: list[str], environment: dict[str, str]) -> None:
        requests.append(build(EvaluateRequest, json.loads(arguments[-1])["request"]))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", become)
    return requests


def ask(requests: list[EvaluateRequest], *words: str) -> EvaluateRequest:
    with pytest.raises(SystemExit):
        command(["eval", *words])
    return requests.pop()


def test_the_command_asks_for_a_run_its_base_and_models(
    asked: list[EvaluateRequest], run_dir: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_dir.parent)
    request = ask(asked, "run", str(folders / "llama"), "--rows", "7")
    labels = [subject.label for subject in request.subjects]
    assert labels == ["run", str(folders / "llama"), "base llama in nf4"]
    assert [subject.kind for subject in request.subjects] == ["adapted", "model", "base"]
    assert (request.source.run, request.source.most_rows, request.dtype) == (str(run_dir), 7, "fp32")
    adapter = run_dir.parent / "elsewhere"
    adapter.symlink_to(run_dir / "adapter")
    request = ask(
        asked,
        *("elsewhere", "--model", str(folders / "llama"), "--quant", "none", "--no-base"),
        *("--text", str(folders / "text.jsonl"), "--dtype", "bf16"),
    )
    assert [subject.label for subject in request.subjects] == ["elsewhere"]
    assert (request.source.sequence_length, request.dtype) == (512, "bf16")
    trained = request.subjects[0].read()
    assert (trained.spec.quant.method, trained.weights, trained.foreign) == ("none", adapter, True)


def test_a_text_is_read_once_for_all_and_written_down(
    asked: list[EvaluateRequest], folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model against itself: no difference; in NF4: some."""
    words = [str(folders / "qwen3"), "--text", str(folders / "text.jsonl"), "--sequence-length", "64", "--rows", "6"]
    request = ask(asked, *words, "--out", str(tmp_path / "figures.json"), "--dtype", "fp32")
    plain = request.subjects[0]
    others = (replace(plain, label="again"), replace(plain, label="nf4", quant="nf4"))
    request = replace(
        request, subjects=(plain, *others), source=replace(request.source, cache_dir=str(tmp_path / "cache"))
    )
    worker.deliver(request, worker.run(request, SINGLE))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["text"]["rows"] == 6 < found["text"]["rows_in_all"]
    again, nf4 = found["models"][1:]
    assert (again["divergence"], again["changed_tokens"], again["loss_difference"]) == (0, 0, 0)
    assert nf4["divergence"] > 1e-6
    assert "6 of" in capsys.readouterr().out


def test_another_tokenizer_is_refused(folders: Path, tmp_path: Path) -> None:
    """Bytes alone are tokens of the other: the same ids would mean something else."""
    write_model_folder(tmp_path / "other", "llama")
    place = tmp_path / "other" / "tokenizer.json"
    values = json.loads(place.read_text())
    values["model"]["merges"] = values["model"]["merges"][:100]
    place.write_text(json.dumps(values))
    write_text_file(tmp_path / "text.jsonl", 12)
    text = Text(name="text", path=str(tmp_path / "text.jsonl"), sequence_length=64, cache_dir=str(tmp_path / "cache"))
    subjects = tuple(Subject(label=str(p), kind="model", model=str(p)) for p in (folders / "llama", tmp_path / "other"))
    with pytest.raises(UserError, match="another tokenizer"):
        worker.run(EvaluateRequest(places=[], subjects=subjects, source=text, dtype="fp32"), SINGLE)


MERGED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3-moe", {}),
    "dora": ("qwen3", {"use_dora": True}),
    "bf16": ("llama", {}),
}
"""name -> (family_models.VARIANTS, of the adapter). Bases are in fp32; "bf16" trains in that on one."""


DTYPE = {"bf16": {"dtype": "bf16"}}


def merge(run: Path, out: Path, **settings: Any) -> EvaluateRequest:
    """Write what `distlora merge` writes, and return the measurement that it then requests."""
    name = Name(place=str(run))
    trained = name.read()
    merge_to(trained, out, **{"onto": "trained", "dtype": torch.float32, "say": print, **settings})
    request = merging.to_measure(MergeRequest(run=str(run), name=name, out=str(out), dtype="fp32"), trained)
    assert request is not None
    return request


@pytest.mark.parametrize("name", ["dora", ci("qwen3-moe"), ci("bf16")])
def test_no_logit_of_an_exact_merge_is_further_than_1e_4_from_the_adapted_model(name: str, tmp_path: Path) -> None:
    variant, adapter = MERGED[name]
    write_family_folder(tmp_path / "base", variant)
    tokenizer().save_pretrained(tmp_path / "base")
    write_text_file(tmp_path / "text.jsonl")
    run, out = tmp_path / "run", tmp_path / "merged"
    make_run(run, tmp_path, "base", adapter=adapter, train={"max_steps": 2, "global_batch": 6} | DTYPE.get(name, {}))
    train.run(run, SINGLE)
    request = merge(run, out)
    worker.deliver(request, worker.run(request, SINGLE))
    measured = Receipt.read(out).measured
    merged, base = measured["models"][1:]
    assert (merged["kind"], base["kind"]) == ("merged", "base")
    assert 0 < merged["largest_logit_difference"] <= 1e-4
    assert 0 <= merged["divergence"] < 1e-9 < base["divergence"]
    assert "no logit is further than" in (out / "merge.md").read_text()


@pytest.mark.ci
def test_the_other_forms_are_measured_and_leave_nothing_behind(run_dir: Path, tmp_path: Path) -> None:
    """Check that a bf16 merge is not measured twice, and that a coarser rounding is further off."""
    request = merge(run_dir, tmp_path / "merged", dtype=torch.bfloat16)
    assert request.merged is not None
    request = replace(request, merged=replace(request.merged, compares=True))
    found = worker.run(request, SINGLE)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    models = {model["label"]: model for model in found["models"]}
    assert list(models) == [
        "as trained",
        "merged (fp32)",
        "base llama in nf4",
        "exact sum in fp32",
        "exact sum in fp16",
        "exact sum in NF4 again",
        "sum on the base on disk, fp32",
        "as trained, computed in bf16",
    ]
    order = ["exact sum in fp32", "exact sum in fp16", "merged (fp32)", "exact sum in NF4 again"]
    divergences = [models[label]["divergence"] for label in order]
    assert divergences == sorted(divergences)
    assert divergences[1] * 10 < divergences[2]
    assert models["sum on the base on disk, fp32"]["divergence"] > divergences[2]
