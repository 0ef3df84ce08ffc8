"""Checks of a shrunk model before training: planted faults are caught by name, and a model type of our own trains."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.architecture.config_checks import CheckRequest, check_train
from distlora.architecture.shapes import ARCHITECTURES
from distlora.architecture.spec import Architecture, kept_text
from distlora.config import TrainConfig, UserError
from distlora.derive import check
from distlora.derive.probes import probe
from distlora.derive.prove import (
    BOUNDS,
    failed,
    load_ours,
    load_theirs,
    measure,
    proved,
    save_random,
    weights_difference,
)
from distlora.derive.shrink import shrink
from distlora.training import worker
from support.family_models import SINGLE
from support.own_model import TandemConfig, TandemForCausalLM
from support.plan_inputs import OF_EACH_TYPE
from support.small_models import make_run, read_metrics, tokenizer, write_text_file
from support.tiers import ci


def settings(**values: Any) -> dict[str, Any]:
    return json.loads(json.dumps(shrink({"model_type": "tandem", **values})))


@pytest.fixture(scope="module")
def sound() -> Architecture:
    return probe(settings(), "config.json")


def test_a_sound_model_passes_every_check(sound: Architecture) -> None:
    checks = dict(proved(sound, settings(), "config.json").checks)
    skipped = {"forward", "gradients", "one document per sequence"}  # Of models without experts, mixers and packing.
    assert checks.keys() == {n for n in BOUNDS if "PEFT" not in n and "each rank" not in n} - skipped
    assert all(difference <= BOUNDS[name][0] for name, difference in checks.items())
    assert sound.head_form.kind == "scale"
    assert [kind.apart for kind in sound.kinds] == [(), ("mixer",)]
    assert sound.notes == ["packed documents run one by one in mixer, which would mix them"]


@pytest.mark.parametrize(("model_type", "ranks"), [("tandem", 1), ci("llama", 2)])
def test_the_command_checks_with_peft_and_on_ranks(
    capsys: pytest.CaptureFixture[str], model_type: str, ranks: int
) -> None:
    request = CheckRequest(config=json.dumps({"model_type": model_type}), place=model_type, ranks=ranks)
    assert check.run(request) == 0
    rows = [line.rsplit(maxsplit=2) for line in capsys.readouterr().out.splitlines() if "e-" in line or "e+" in line]
    expected = ["PEFT logits", *(f"adapter of rank {rank}" for rank in range(ranks) if ranks > 1)]
    assert {name.strip() for name, _, _ in rows} >= set(expected)
    falls = {name.strip(): (found, bound) for name, found, bound in rows if bound.startswith(">=")}
    assert falls.keys() == {"loss falls in three steps"}
    assert float(falls["loss falls in three steps"][0]) >= 1e-4
    others = [(difference, allowed) for _, difference, allowed in rows if not allowed.startswith(">=")]
    assert all(float(difference) <= float(allowed) for difference, allowed in others)


def test_a_loss_that_does_not_fall_is_named_as_such() -> None:
    error = str(failed("llama", "loss falls in three steps", -2e-5))
    assert "the loss falls by 2.0e-05 of itself, and must fall by >=1.0e-04, because the loss of a batch falls" in error
    assert "the difference is 3.0e-05, and at most 2.0e-05 is allowed" in str(failed("llama", "logits", 3e-5))


@pytest.mark.ci
@pytest.mark.parametrize("name", OF_EACH_TYPE.values())
def test_a_known_model_passes_every_check(name: str) -> None:
    """Other tests derive models without this proof (conftest.py)."""
    config = json.loads(json.dumps(shrink(ARCHITECTURES[name])))
    assert proved(probe(config, name), config, name).checks


CAUGHT = {"leak": "packed documents", "head": "logits", "state": "repeated forward"}


@pytest.mark.parametrize("fault", CAUGHT)
def test_a_check_catches_a_fault_that_no_probe_has_seen(sound: Architecture, fault: str) -> None:
    """The architecture is that of the sound model."""
    found = dict(measure(sound, settings(fault=fault), "config.json", 1))
    assert found[CAUGHT[fault]] > 10 * BOUNDS[CAUGHT[fault]][0]


def test_documents_are_not_packed_where_nothing_keeps_them_apart(sound: Architecture) -> None:
    for found in (sound, probe(settings(fault="leak"), "config.json")):
        result = proved(found, settings(fault="leak"), "config.json")
        assert result.documents == "single"
        assert "one document per sequence" in dict(result.checks)
    assert result.notes == ["one document per sequence, as packed ones would be mixed"]
    with pytest.raises(UserError, match=r"train.objective=dpo puts several answers into one sequence"):
        check_train(TrainConfig(objective="dpo"), result)


REFUSED = {"head": "computes the logits of a token from several", "state": "keeps something from one batch to the next"}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_probe_refuses_a_fault_by_its_name(fault: str) -> None:
    with pytest.raises(UserError, match=REFUSED[fault]):
        probe(settings(fault=fault), "config.json")


def test_a_linear_that_is_read_by_its_weight_has_no_adapter(sound: Architecture) -> None:
    with pytest.raises(UserError, match=r"tandem cannot run the checks .* after 'weights' \(AttributeError"):
        list(measure(sound, settings(fault="read"), "config.json", 1))
    found = proved(probe(settings(fault="read"), "config.json"), settings(fault="read"), "config.json")
    assert "no adapter on mixer.out_proj (the model's code reads its weight)" in found.notes


def test_a_tensor_that_is_not_loaded_is_caught(sound: Architecture, tmp_path: Path) -> None:
    save_random(sound, settings(), "config.json", tmp_path, 1)
    ours, theirs = load_ours(sound, tmp_path, method="none")[0], load_theirs(sound, tmp_path)
    assert weights_difference(ours, theirs) == 0
    ours.decoder.get_parameter("norm.weight").data[3] += 1e-6
    assert weights_difference(ours, theirs) > 0
    theirs.model.layers[1].scale = torch.nn.Parameter(torch.ones(1))
    assert weights_difference(ours, theirs) == float("inf")


@pytest.mark.usefixtures("proof")
@pytest.mark.parametrize("fault", [None, ci("leak")])
def test_a_model_type_that_transformers_does_not_have_trains(tmp_path: Path, fault: str | None) -> None:
    torch.manual_seed(0)
    TandemForCausalLM(TandemConfig(fault=fault)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    write_text_file(tmp_path / "text.jsonl")
    make_run(tmp_path / "run", tmp_path, "model", train={"max_steps": 4})
    worker.run(tmp_path / "run", SINGLE)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]
    counts = json.loads((tmp_path / "run" / "data.json").read_text())["splits"]["train"]
    assert (counts["rows"] == counts["pieces"]) == (fault == "leak")


def test_processes_that_need_one_architecture_make_it_once(tmp_path: Path) -> None:
    made = []

    def make() -> str:
        made.append(1)
        time.sleep(0.2)
        return "text"

    threads = [threading.Thread(target=kept_text, args=(tmp_path / "a" / "b.json", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


@pytest.mark.parametrize("damage", [b"", b'{"kinds": [', b'{"rows": 8}', b"\xff\x00"])
def test_a_damaged_text_of_the_cache_is_made_again(tmp_path: Path, damage: bytes) -> None:
    path, text = tmp_path / "a" / "b.json", '{"rows": 4}'
    assert kept_text(path, lambda: text) == text
    path.write_bytes(damage)
    assert kept_text(path, lambda: text) == text
    assert path.read_text() == text
    assert kept_text(path, lambda: "not made again") == text
