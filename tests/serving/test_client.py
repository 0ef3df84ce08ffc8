"""The official client of the Tinker API, unchanged, does its work on our server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from distlora.serving.operations import CreateModel, ForwardBackward, OptimStep, Sample
from support.service import Started, started

tinker = pytest.importorskip("tinker", reason="the official client is not installed: pip install 'tinker>=0.38,<0.39'")
types = tinker.types


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with started(tmp_path) as service:
        yield service


def client_of(service: Started, user: str) -> Any:
    return tinker.ServiceClient(base_url=service.url, api_key=service.keys[user])


def datum(tokens: list[int], weights: list[float]) -> Any:
    inputs = {"target_tokens": [token + 1 for token in tokens], "weights": weights}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def test_losses_steps_and_samples_come_back_as_the_engine_gives_them(service: Started) -> None:
    client = client_of(service, "ann")
    rest = tinker.RestClient(base_url=service.url, api_key=service.keys["ann"])
    assert rest.get_server_capabilities().result().supported_models[0].model_name == "Qwen/Qwen3-8B"
    training = client.create_lora_training_client("Qwen/Qwen3-8B", rank=4, seed=9, train_unembed=False).result()
    assert training.get_info().lora_rank == 4
    data = [datum([1, 2, 3], [0.0, 1.0, 0.5]), datum([4], [2.0]), datum([5, 6], [1.0, -1.0])]
    forward = training.forward(data, "cross_entropy")
    future, stepped = (
        training.forward_backward(data, "cross_entropy"),
        training.optim_step(types.AdamParams(learning_rate=0.5)),
    )
    output = future.result()
    for result in (forward.result(), output):
        assert [list(row["logprobs"].to_numpy()) for row in result.loss_fn_outputs] == [[-1, -2, -3], [-4], [-5, -6]]
    assert [list(row["elementwise_loss"].to_numpy()) for row in output.loss_fn_outputs] == [[0, 2, 1.5], [8], [5, -6]]
    assert output.metrics == {"loss:sum": 10.5}
    assert stepped.result().metrics == {"value": 4 + 0.5 * 3.5}  # The forward alone had no gradients.

    path = training.save_weights_for_sampler("w").result().path
    sampling = client.create_sampling_client(model_path=path).result()
    prompt, params = types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(max_tokens=4)
    answer = sampling.sample(prompt, 2, params, include_prompt_logprobs=True).result()
    assert [sequence.tokens for sequence in answer.sequences] == [[1, 7]] * 2
    assert [sequence.logprobs for sequence in answer.sequences] == [[5.75, -1.0]] * 2
    assert answer.sequences[0].stop_reason == "stop"
    assert answer.prompt_logprobs == [None, -0.5, -0.5]
    with pytest.raises(tinker.APIStatusError, match="topk_prompt_logprobs is not supported"):
        sampling.sample(prompt, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
    assert sampling.compute_logprobs(prompt, prompt_logprobs_last_n=1).result() == [None, None, -0.5]
    own = training.save_weights_and_get_sampling_client().result()
    assert own.sample(prompt, 1, types.SamplingParams(max_tokens=4, stop=[])).result().sequences[0].tokens == [1]

    created, *_, sample = [op for op in service.engine.done if isinstance(op, CreateModel | OptimStep | Sample)]
    assert isinstance(created, CreateModel)
    assert (created.adapter.rank, created.adapter.seed, created.adapter.unembed) == (4, 9, False)
    assert isinstance(sample, Sample)
    assert sample.stop_tokens == ()


def test_a_custom_loss_gets_its_gradients_in_two_calls(service: Started) -> None:
    training = client_of(service, "ann").create_lora_training_client("base", rank=4).result()

    def loss(data: Any, logprobs: Any) -> Any:
        return sum((row**2).sum() for row in logprobs), {}

    result = training.forward_backward_custom([datum([1, 2], [1.0, 1.0]), datum([3], [1.0])], loss).result()
    assert result.metrics["loss:sum"] == 1 + 4 + 9
    forward, backward = [op for op in service.engine.done if isinstance(op, ForwardBackward)]
    assert (forward.backward, backward.backward) == (False, True)
    # cross_entropy is -weight * logprob, so the weights are -d loss / d logprob = -2 logprob.
    assert [list(row.inputs["weights"]) for row in backward.rows] == [[2, 4], [6]]


def test_states_are_saved_listed_loaded_and_deleted(service: Started) -> None:
    client = client_of(service, "ann")
    training = client.create_lora_training_client("base", rank=4).result()
    training.forward_backward([datum([1], [1.0])], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1.0)).result()
    saved = training.save_state("first").result().path
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        training.save_state("first").result()
    training.save_state("first", overwrite=True).result()
    again = client.create_training_client_from_state_with_optimizer(saved).result()
    again.forward_backward([datum([1], [1.0])], "cross_entropy").result()
    assert again.optim_step(types.AdamParams(learning_rate=1.0)).result().metrics == {"value": 6.0}
    rest = tinker.RestClient(base_url=service.url, api_key=service.keys["ann"])
    assert [run.training_run_id for run in rest.list_training_runs().result().training_runs] == [
        again.model_id,
        training.model_id,
    ]
    listed = rest.list_checkpoints(training.model_id).result().checkpoints
    assert [(item.checkpoint_id, item.tinker_path) for item in listed] == [("weights/first", saved)]
    assert rest.get_weights_info_by_tinker_path(saved).result().lora_rank == 4
    rest.delete_checkpoint(training.model_id, "weights/first").result()
    assert rest.list_user_checkpoints().result().checkpoints == []
    with pytest.raises(tinker.APIStatusError, match="you have no checkpoint"):
        client.create_training_client_from_state(saved).result()


def test_a_fault_of_the_caller_comes_back_with_its_reason(service: Started) -> None:
    training = client_of(service, "ann").create_lora_training_client("base", rank=4).result()
    with pytest.raises(tinker.RequestFailedError, match="lacks advantages"):
        training.forward_backward([datum([1], [1.0])], "ppo").result()
    with pytest.raises(tinker.RequestFailedError, match="holds token 100, and the vocabulary has ids 0 to 99"):
        training.forward_backward([datum([100], [1.0])], "cross_entropy").result()
    with pytest.raises(tinker.AuthenticationError):
        tinker.RestClient(base_url=service.url, api_key="tml-wrong").get_server_capabilities().result()


def test_arrays_of_a_thousand_rows_keep_their_rows(service: Started) -> None:
    training = client_of(service, "ann").create_lora_training_client("base", rank=4).result()
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 99, size=generator.integers(1, 60)).tolist() for _ in range(1500)]
    output = training.forward([datum(row, [1.0] * len(row)) for row in rows], "cross_entropy").result()
    assert [(-out["logprobs"].to_numpy()).astype(int).tolist() for out in output.loss_fn_outputs] == rows
    text = httpx.get(f"{service.url}/metrics").text
    assert 'distlora_serve_requests_total{route="/api/v1/forward_backward",status="200"} 2' in text  # 1,024 a chunk.
    assert "distlora_serve_models 1" in text
