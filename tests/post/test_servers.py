"""Serve adapters by a real vLLM on this machine's CPU, and compare its log-probabilities with ours, in fp32."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from distlora.model.adapters import adapter_parameters
from distlora.post.export import worker
from distlora.post.export.consumers import CONSUMERS
from distlora.post.export.formats import ExportRequest, refuse
from distlora.post.trained import Name
from distlora.training.publish import publish_result
from support.family_models import config_for, load_ours, our_logits, tokens, write_family_folder
from support.real_server import VLLM, answered, ask, vllm_server
from support.small_models import read_metrics, tokenizer

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(not VLLM.is_file(), reason="no vLLM in .servers; `make test-servers` installs it"),
]
HEADS = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
"""vLLM's attention on a CPU takes heads of 32."""
TYPES = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "glm4")
COMPOSITES = ("gemma3", "qwen3_vl")
CONVERTED = ("glm4",)
"""Types whose RUN/adapter vLLM does not read as it is (docs/merging.md)."""
DISTLORA = Path(sys.executable).with_name("distlora")
TEXT_ALONE = '--limit-mm-per-prompt={"image":0,"video":0}'
PLAIN = {"r": 4}
"""A run whose adapter vLLM reads as it is where docs/merging.md says so."""
PATTERNS = {"r": 6, "use_rslora": True, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 7.0}}
"""A run whose export is folded into one rank and one scale."""
BOUND = 1e-4
(RELEASE,) = CONSUMERS["vllm"].run


def our_logprobs(logits: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token of a prompt (1, T) but the first: (T - 1)."""
    return logits[0, :-1].log_softmax(-1).gather(-1, prompt[0, 1:, None])[:, 0]


def trained(folder: Path, base: Path, seed: int, prompt: torch.Tensor, **adapter: Any) -> torch.Tensor:
    """Write an adapter as a run does and its export for vLLM; return our log-probabilities with it."""
    sections = {"adapter": {"target_modules": "all-linear", **adapter}, "quant": {"method": "none"}}
    model, backend = load_ours(base, **sections)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(0, 0.1, generator=generator)
    publish_result(folder / "adapter", model, config_for(base, **sections).spec, None, backend)
    name = Name(place=str(folder / "adapter"), base=str(base), quant="none")
    request = ExportRequest(run="", name=name, format="vllm", out=str(folder / "export"), version=RELEASE)
    refuse(name.read(), request)
    assert worker.run(request) == 0
    return our_logprobs(our_logits(model, prompt), prompt)


@pytest.mark.parametrize("variant", [*TYPES, *COMPOSITES])
def test_vllm_computes_what_was_trained(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs on one server at once, by RUN/adapter and by their exports: each within 1e-4 of ours, the base too."""
    base, prompt = tmp_path / "base", tokens(1, 48)
    write_family_folder(base, variant, **HEADS)
    tokenizer().save_pretrained(base)
    plain = trained(tmp_path / "plain", base, 1, prompt, **PLAIN)
    patterns = trained(tmp_path / "patterns", base, 2, prompt, **PATTERNS)
    model, _ = load_ours(base, quant={"method": "none"})
    for parameter in adapter_parameters(model).values():
        parameter.data.zero_()
    alone = our_logprobs(our_logits(model, prompt), prompt)
    folders = {name: tmp_path / name for name in ("plain/adapter", "plain/export", "patterns/export")}
    if variant in CONVERTED:
        del folders["plain/adapter"]
    expected = {"base": alone, **{name: patterns if "patterns" in name else plain for name in folders}}
    flags = [TEXT_ALONE] if variant in COMPOSITES else []
    with vllm_server(base, tmp_path / "vllm.log", "--served-model-name=base", *flags) as url:
        for name, folder in folders.items():
            ask(url, "/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))
        ids = prompt[0].tolist()
        # vLLM's LoRA on a CPU fails for log-probabilities of prompts in a batch of several, and a request for the base
        # in one batch with adapters is answered with one of them (bgmv_shrink reads its slot -1).
        answers = {name: answered(url, name, ids, prompt_logprobs=0) for name in expected}
        with ThreadPoolExecutor(8) as pool:
            batch = dict(zip(folders, pool.map(lambda name: answered(url, name, ids), folders), strict=True))
    theirs = {name: torch.tensor(answer[2]) for name, answer in answers.items()}
    far = {name: float((theirs[name] - ours).abs().max()) for name, ours in expected.items()}
    moved = {name: float((ours - alone).abs().max()) for name, ours in expected.items() if name != "base"}
    with capsys.disabled():
        print(f"\n| {variant} | " + " | ".join(f"{far[name]:.1e}" for name in far) + f" | {min(moved.values()):.2f} |")
    assert max(far.values()) <= BOUND, far
    assert min(moved.values()) > 1000 * BOUND, moved
    for name, (tokens_in_batch, logprobs, _) in batch.items():
        assert tokens_in_batch == answers[name][0], name
        assert logprobs == pytest.approx(answers[name][1], abs=BOUND), name
    assert len({tuple(answer[1]) for answer in answers.values()}) >= 3, "two runs and the base"


def test_two_grpo_runs_sample_on_one_server(tmp_path: Path) -> None:
    """Each with its own adapters: sampled log-probabilities are the trainer's, within 1e-4 at every step."""
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    write_family_folder(base, "llama", **HEADS)
    tokenizer().save_pretrained(base)
    data.write_text("".join(json.dumps({"prompt": f"{word}:"}) + "\n" for word in ("alpha", "beta", "gamma", "delta")))
    settings = ["recipe=grpo", f"model.path={base}", f"data.path={data}", "quant=none", "train.dtype=fp32"]
    settings += ["data.rewards=[regex]", "data.reward_constants={pattern: '[aeiou]{2}'}", "data.sequence_length=64"]
    settings += ["train.global_batch=16", "train.max_steps=4", "optim.lr=1e-2", "data.eval_fraction=0"]
    settings += ["rollout.num_generations=4", "rollout.max_new_tokens=12"]
    with vllm_server(base, tmp_path / "vllm.log") as url:
        train = [str(DISTLORA), "train", *settings, f"rollout.url={url}"]
        runs = {
            seed: subprocess.Popen([*train, f"run_dir={tmp_path / seed}", f"train.seed={seed}"]) for seed in ("1", "2")
        }
        assert [process.wait(400) for process in runs.values()] == [0, 0]
        left = [model["id"] for model in ask(url, "/v1/models")["data"]]
    assert left == [str(base)], "adapters stay on the server"
    for seed in runs:
        steps = [line for line in read_metrics(tmp_path / seed) if "rollout/logprob_difference_max" in line]
        print([(line["rollout/logprob_difference_max"], line["grad_norm"]) for line in steps])
        assert len(steps) == 4
        assert max(line["rollout/logprob_difference_max"] for line in steps) <= BOUND
        assert any(line["grad_norm"] > 0 for line in steps[:-1])
