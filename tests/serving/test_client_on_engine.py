"""What the official client gets through HTTP is what the engine computes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distlora.config import ModelConfig, ModelSpec, QuantConfig, TrainConfig
from distlora.config.serve import ServeConfig
from distlora.parallel import Ranks
from distlora.serving.app import start_http
from distlora.serving.engine import Engine
from distlora.serving.keys import add_users
from distlora.serving.operations import Adapter, CreateModel, ForwardBackward, OptimStep, Row, Sample
from distlora.serving.service import ServedBase
from distlora.training.setup import StartOptions, start_model
from support.small_models import VOCABULARY

tinker = pytest.importorskip("tinker", reason="the official client is not installed: pip install 'tinker>=0.38,<0.39'")
types = tinker.types
STEPS = 3


def started(folder: Path) -> Engine:
    """Return an engine on the tiny model, on one rank."""
    spec = ModelSpec(model=ModelConfig(path=str(folder)), quant=QuantConfig(cache=False), dtype="fp32")
    train = TrainConfig(router_aux_loss=0.0, dtype="fp32")
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    model, backend, _ = start_model(spec, ranks, StartOptions(for_slots=True), train=train)
    return Engine(model, backend, spec, end_tokens=[1])


def test_the_client_trains_and_samples_as_the_engine_does(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    engine = started(folders / "llama")
    generator = np.random.default_rng(0)
    rows = [generator.integers(5, VOCABULARY, size=length).tolist() for length in (9, 21, 14)]
    weights = [generator.random(len(row) - 1).astype(np.float32) for row in rows]
    thread = threading.Thread(target=engine.run)
    thread.start()
    keys = add_users(tmp_path, ["ann"])
    base = ServedBase(("base",), "tokenizer", context=64)
    server = start_http(engine, ServeConfig(port=0), base, tmp_path)
    try:
        client = tinker.ServiceClient(base_url=f"http://127.0.0.1:{server.port}", api_key=keys["ann"])
        training = client.create_lora_training_client("base", rank=4, seed=7, train_unembed=False).result()
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(row[:-1]),
                loss_fn_inputs={"target_tokens": row[1:], "weights": weight.tolist()},
            )
            for row, weight in zip(rows, weights, strict=True)
        ]
        ours = []
        for _ in range(STEPS):
            future = training.forward_backward(data, "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            ours.append(future.result())
        sampling = training.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints(rows[0][:5])
        answer = sampling.sample(prompt, 1, types.SamplingParams(max_tokens=6, temperature=0.0)).result()
    finally:
        server.stop()
    direct: Any = [
        Row(np.array(row[:-1]), {"target_tokens": np.array(row[1:]), "weights": weight})
        for row, weight in zip(rows, weights, strict=True)
    ]
    engine.submit(CreateModel("direct", Adapter(rank=4, seed=7, unembed=False)))
    for output in ours:
        expected = engine.submit(ForwardBackward("direct", direct, "cross_entropy")).result()
        engine.submit(OptimStep("direct", learning_rate=1e-2)).result()
        assert output.metrics["loss:sum"] == expected.metrics["loss:sum"]
        for found, logprobs in zip(output.loss_fn_outputs, expected.logprobs, strict=True):
            assert np.array_equal(found["logprobs"].to_numpy(), logprobs)
    [expected] = (
        engine.submit(Sample(rows[0][:5], model_id="direct", max_tokens=6, temperature=0.0, stop_tokens=(1,)))
        .result()
        .sequences
    )
    engine.close()
    thread.join()
    assert ours[-1].metrics["loss:sum"] < ours[0].metrics["loss:sum"]
    assert answer.sequences[0].tokens == expected.tokens
    assert np.array_equal(np.float32(answer.sequences[0].logprobs), np.float32(expected.logprobs))
