"""Compare lm-evaluation-harness on our model with its own model class on the same weights.

On any number of ranks, and for an offline task from a YAML file and a jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distlora.config import UserError
from distlora.model.adapters import LoRAPair
from distlora.model.build import CausalLM
from distlora.parallel import Ranks
from distlora.post import evaluate_worker as worker
from distlora.post.evaluate import EvaluateRequest, table_of
from distlora.system.command_worker import from_json, to_json
from distlora_launcher.cli.evaluate import checked
from distlora_launcher.terminal.arguments import read
from support.family_models import SINGLE, dequantized, load_ours
from support.peft_models import write_adapter
from support.small_models import tokenizer, write_model_folder
from support.worlds import World

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'distlora[eval]'")

CHOICES = ["the statement", "an object", "a long line of words that goes on", "of"]
QUESTIONS = ["A class is", "What is raised when a name is not found?", "import", "The value of an attribute"]
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Three kinds of task over one file of documents."""
    folder.mkdir(parents=True)
    documents = [
        {"question": question, "choices": CHOICES, "answer": number % 4, "text": f"{question} {' '.join(CHOICES * 9)}"}
        for number, question in enumerate(QUESTIONS)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in documents))
    for name, fields in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test",
            "doc_to_text": "{{question}}",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | fields))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def evaluate(model: Any, tasks: Path) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


@torch.no_grad()
def adapted_in_transformers(folder: Path, ours: CausalLM) -> Any:
    """Build the Hugging Face model of our weights with the adapters in them."""
    theirs = dequantized(folder, ours)
    for path, weight in ours.adapted_weights():
        (pair,) = weight.adapters.values()
        assert isinstance(pair, LoRAPair)
        theirs.get_parameter(f"{path}.weight").add_(pair.B @ pair.A, alpha=pair.scaling)
    return theirs


def test_figures_are_those_of_the_harness_own_model(folders: Path, tasks: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from distlora.post.evaluate_harness import HarnessModel

    ours, backend = load_ours(folders / "llama", SINGLE)
    theirs = adapted_in_transformers(folders / "llama", ours)
    mine = evaluate(HarnessModel(ours, backend, tokenizer()), tasks)
    reference = evaluate(HFLM(pretrained=theirs, tokenizer=tokenizer(), batch_size=3), tasks)
    for name in TASKS:
        for metric, value in reference["results"][name].items():
            if isinstance(value, float):
                assert mine["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
        for a, b in zip(mine["samples"][name], reference["samples"][name], strict=True):
            assert repr_of(a["resps"]) == pytest.approx(repr_of(b["resps"]), rel=1e-4), name
    answers = [sample["resps"][0][0] for sample in mine["samples"]["tiny_answer"]]
    assert any(answers), "the random model says something before it stops"


def repr_of(responses: Any) -> Any:
    """Nested answers as one flat list: texts by their bytes."""
    flat: list[float] = []
    for response in responses:
        for value in response:
            if isinstance(value, str):
                flat += list(value.encode())
            else:
                flat += [float(part) for part in (value if isinstance(value, (tuple, list)) else (value,))]
    return flat


@pytest.fixture(scope="module")
def adapter(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    return write_adapter(folder, folders / "llama", r=8, lora_alpha=1, target_modules=["q_proj", "v_proj", "up_proj"])


def request_of(*words: str | Path) -> EvaluateRequest:
    options = read(EvaluateRequest, "distlora eval", [str(word) for word in words])
    return from_json(EvaluateRequest, to_json(checked(options)))


def test_the_command_puts_models_beside_each_other_question_by_question(
    folders: Path, adapter: Path, tasks: Path
) -> None:
    names = ",".join(TASKS)
    words = (adapter, "--model", folders / "llama", "--tasks", names, "--tasks-folder", tasks, "--dtype", "fp32")
    found = worker.run(request_of(*words), SINGLE)
    adapted, base = found["models"]
    assert found["questions"] == dict.fromkeys(TASKS, 4)
    assert (adapted["kind"], base["kind"]) == ("adapted", "base")
    for metric in ("acc", "acc_norm"):
        ours, theirs = (model["tasks"]["tiny_choice"][metric] for model in (adapted, base))
        assert theirs["difference"] == pytest.approx(theirs["value"] - ours["value"])
    rolling = [model["tasks"]["tiny_rolling"]["word_perplexity"] for model in (adapted, base)]
    assert rolling[0]["value"] != rolling[1]["value"]
    assert rolling[1]["difference"] is None, "several questions make one perplexity"
    assert "tiny_choice, acc_norm" in table_of(found).text()
    assert json.loads(json.dumps(found)) == found


def on_ranks(ranks: Ranks, *, request: str) -> Any:
    torch.set_num_threads(1)
    return worker.run(from_json(EvaluateRequest, request), ranks).get("models")


@pytest.mark.ci
def test_two_ranks_score_their_own_batches_and_agree_with_one(
    world: World, folders: Path, adapter: Path, tasks: Path
) -> None:
    words = (adapter, "--model", folders / "llama", "--tasks", ",".join(TASKS), "--tasks-folder", tasks, "--no-base")
    request = request_of(*words, "--dtype", "fp32")
    one = worker.run(request, SINGLE)["models"]
    result = world.run(2, on_ranks, request=to_json(request))[0]
    for task, metrics in one[0]["tasks"].items():
        for metric, of in metrics.items():
            assert result[0]["tasks"][task][metric]["value"] == pytest.approx(of["value"], rel=1e-5)


def test_a_draft_changes_the_number_of_forwards_and_no_token(folders: Path, adapter: Path, tmp_path: Path) -> None:
    """The base proposes for what an adapter made of it; a model of another vocabulary is refused."""
    text = folders / "text.jsonl"
    words = (adapter, "--model", folders / "llama", "--text", text, "--rows", "3", "--max-new-tokens", "24")
    words = (*words, "--sequence-length", "64", "--dtype", "fp32")
    found = worker.run(request_of(*words, "--draft", folders / "llama"), SINGLE)
    assert found["equal"] == found["prompts"] > 0
    alone, helped = found["runs"]["alone"], found["runs"]["with draft"]
    assert alone["tokens"] == helped["tokens"] == alone["target_forwards"] == 24 * found["prompts"]
    assert alone["draft_forwards"] == 0 < helped["draft_forwards"]
    assert helped["target_forwards"] < alone["target_forwards"]
    assert f"{found['prompts']} of {found['prompts']} answers" in table_of(found).text()
    with pytest.raises(UserError, match="--max-new-tokens 480"):
        worker.run(request_of(*words, "--draft", folders / "llama", "--max-new-tokens", "481"), SINGLE)

    write_model_folder(tmp_path / "other", "llama")
    other = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    other["added_tokens"][2]["content"] = "<|other|>"
    other["model"]["vocab"]["<|other|>"] = other["model"]["vocab"].pop("<|system|>")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="another vocabulary"):
        worker.run(request_of(*words, "--draft", tmp_path / "other"), SINGLE)


def test_an_unknown_task_is_refused_with_the_nearest(folders: Path, tasks: Path) -> None:
    with pytest.raises(UserError, match="tiny_choice"):
        worker.run(request_of(folders / "llama", "--tasks", "tiny_choise", "--tasks-folder", tasks), SINGLE)
