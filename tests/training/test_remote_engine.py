"""A vLLM server in the place of the engine: adapters by version, samples, retries and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distlora.config import UserError
from distlora.generation import remote
from distlora.generation.remote import RemoteEngine, ServerError
from distlora.generation.sampling import Request
from support import loopback
from support.family_models import write_family_folder
from support.peft_models import write_adapter
from support.vllm_server import Server, serving


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    write_family_folder(base, "llama")
    return base


@pytest.fixture
def server(folder: Path) -> Any:
    with serving(folder) as served:
        yield served


def adapter(base: Path, out: Path, seed: int) -> Path:
    return write_adapter(out, base, seed=seed, std=1.0, target_modules="all-linear")


def test_each_version_of_the_adapter_replaces_the_one_before(
    folder: Path, server: tuple[str, Server], tmp_path: Path
) -> None:
    url, served = server
    engine = RemoteEngine(url + "/v1/", stop_tokens=[0], run="run")
    requests = [Request([5, 6, 7], seed=seed, max_new_tokens=6) for seed in range(5)]
    samples = []
    for version in range(3):
        engine.load(adapter(folder, tmp_path / str(version), version), version)
        assert served.adapters == [f"run-{version}"]
        samples.append(engine.run(requests))
        assert samples[-1] == engine.run(requests), "the seeds decide"
    assert samples[0] != samples[1] != samples[2]
    for sample in samples[0]:
        assert 1 <= len(sample.tokens) == len(sample.logprobs) <= 6
        assert sample.ended == (sample.tokens[-1] == 0)
        assert all(logprob < 0 for logprob in sample.logprobs)
    engine.close()
    assert served.adapters == []


def test_a_version_left_by_a_killed_run_is_replaced(folder: Path, server: tuple[str, Server], tmp_path: Path) -> None:
    url, served = server
    RemoteEngine(url, stop_tokens=[0], run="run").load(adapter(folder, tmp_path / "old", 1), 3)
    again = RemoteEngine(url, stop_tokens=[0], run="run")
    again.load(adapter(folder, tmp_path / "new", 2), 3)
    assert served.adapters == ["run-3"]
    assert served.loaded == ["run-3", "run-3"]


def test_a_server_that_fails_for_a_while_costs_only_time(
    folder: Path, server: tuple[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    engine = RemoteEngine(url, stop_tokens=[0], run="run")
    engine.load(adapter(folder, tmp_path / "a", 1), 0)
    expected = engine.run([Request([5], max_new_tokens=3)])
    served.fail_next = remote.TRIES - 1
    assert engine.run([Request([5], max_new_tokens=3)]) == expected
    served.fail_next = remote.TRIES
    with pytest.raises(ServerError, match=r"answers /v1/completions with 500: EngineCore encountered an issue"):
        engine.run([Request([5], max_new_tokens=3)])


def test_the_servers_key_comes_from_the_environment(
    server: tuple[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    served.key = "hunter2"
    monkeypatch.setenv("VLLM_API_KEY", "another")
    with pytest.raises(UserError, match=r"answers /v1/models with 401: .*Unauthorized") as raised:
        RemoteEngine(url, stop_tokens=[], run="run").connect()
    assert "another" not in str(raised.value)
    monkeypatch.setenv("VLLM_API_KEY", "hunter2\n")
    assert RemoteEngine(url, stop_tokens=[], run="run").connect() == [served.base]


def test_an_answer_of_another_form_is_the_servers_fault(
    folder: Path, server: tuple[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    engine = RemoteEngine(url, stop_tokens=[0], run="run")
    engine.load(adapter(folder, tmp_path / "a", 1), 0)
    for answer, message in (("a proxy's page", "another form"), ({"choices": [{}]}, "another form")):
        monkeypatch.setattr(served, "answer", lambda *_, value=answer: (200, value))
        with pytest.raises(ServerError, match=message):
            engine.run([Request([5], max_new_tokens=3)])
    engine.close()
    assert engine.adapter is None, "the end of a run depends on the server"


def test_what_the_server_refuses_is_said_in_its_words(
    server: tuple[str, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    with pytest.raises(ServerError, match=r"answers /v1/load_lora_adapter with 404: Loading lora run-0 failed"):
        RemoteEngine(url, stop_tokens=[], run="run").load(tmp_path, 0)
    server[1].loads_adapters = False
    with pytest.raises(UserError, match=r"the server cannot load .*start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        RemoteEngine(url, stop_tokens=[], run="run").connect()
    with pytest.raises(UserError, match=r"rollout\.url=http://127\.0\.0\.1:9: .*does not answer /v1/models"):
        RemoteEngine("http://127.0.0.1:9", stop_tokens=[], run="run").connect()


@pytest.mark.parametrize(("owner", "name"), [("llamacpp", "llama-server"), ("me", "llama-cpp-python's server")])
def test_a_server_that_loads_adapters_at_its_start_alone_is_refused_by_name(owner: str, name: str) -> None:
    """Answers of llama.cpp's servers, as 0.3.36 of llama-cpp-python has both."""

    class LlamaHandler(loopback.Handler):
        def do_GET(self) -> None:
            model = {"id": "model.gguf", "object": "model", "owned_by": owner}
            found = (200, {"object": "list", "data": [model]}) if self.path == "/v1/models" else (404, {"detail": "no"})
            self.answer(*found)

    with loopback.serving(LlamaHandler) as url:
        refused = rf"rollout\.url={url}: .*{name} cannot load a run's adapters while it serves .*start vLLM"
        with pytest.raises(UserError, match=refused):
            RemoteEngine(url, stop_tokens=[], run="run").connect()
