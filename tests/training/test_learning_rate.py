"""optim.lr by the model: published rates, converted to the adapter's scale, with their source."""

from __future__ import annotations

import pytest

from distlora.architecture.shapes import ARCHITECTURES
from distlora.config.training import DEFAULT_LR
from distlora.planner.learning_rate import SWEPT, warning_of_rate, with_learning_rate
from distlora.planner.model import built_in
from support.plan_inputs import composed

BASE = {"model": {"path": "/m"}, "data": {"path": "/d"}}


@pytest.mark.parametrize(
    ("model", "words", "rate", "said"),
    [
        ("Qwen/Qwen3-8B", [], 5e-4, "on Qwen3 8B at r x scale = 32 (tinker-cookbook); here it is 64"),
        ("Qwen/Qwen3-8B", ["adapter.r=32", "adapter.lora_alpha=32", "adapter.use_rslora=false"], 1e-3, "0.001 is best"),
        ("Qwen/Qwen3-8B", ["adapter.rank_pattern={down_proj: 64}"], 2.5e-4, "here it is 128"),
        ("Qwen/Qwen3-8B", ["optim.loraplus_lr_ratio=10"], 5e-5, "A 1/10 of it (optim.loraplus_lr_ratio)"),
        ("Qwen/Qwen3-8B", ["adapter.r=8", "adapter.lora_alpha=8", "adapter.use_rslora=false"], 1e-3, "here it is 8"),
        ("Qwen/Qwen3-30B-A3B", ["adapter.r=64", "adapter.lora_alpha=64"], 6.25e-5, "here it is 512"),
        ("unsloth/Llama-3.3-70B-Instruct", [], 1.5e-4, "Llama 3 70B"),
        ("unsloth/Llama-3.3-70B-Instruct", ["adapter.method=full", "quant.method=none"], 3e-5, "takes a tenth"),
        ("NousResearch/Llama-2-70b-hf", [], 2e-4, "no published sweep has this model"),
        ("Qwen/Qwen2.5-32B", ["adapter.method=full", "quant.method=none"], 2e-5, "no published sweep"),
        ("Qwen/Qwen3-8B", ["train.objective=dpo"], 5e-6, "train.objective=dpo"),
    ],
)
def test_a_published_rate_is_converted_to_the_scale_of_the_adapter(
    model: str, words: list[str], rate: float, said: str
) -> None:
    config, change = with_learning_rate(composed(*words, **BASE), built_in(model, ARCHITECTURES[model]))
    assert config.optim.lr == pytest.approx(rate, rel=1e-3)
    assert change is not None
    assert said in str(change)
    assert float(str(change).split(":")[0].partition("=")[2]) == config.optim.lr


def test_a_rate_that_is_set_stays() -> None:
    config = composed("optim.lr=0.0003", **BASE)
    assert with_learning_rate(config, built_in("Qwen/Qwen3-8B", ARCHITECTURES["Qwen/Qwen3-8B"])) == (config, None)
    assert composed(**BASE).optim.peak_lr == DEFAULT_LR


def test_a_rate_a_thousand_times_too_high_is_warned_of_and_a_swept_one_is_not() -> None:
    model = built_in("Qwen/Qwen3-8B", ARCHITECTURES["Qwen/Qwen3-8B"])
    config = composed(**BASE)
    adapter, objective = config.adapter, config.train.objective
    assert warning_of_rate(0.003, adapter, objective, model) is None
    line = warning_of_rate(0.5, adapter, objective, model)
    assert line is not None
    assert line.startswith("WARNING: optim.lr=0.5 is 1,000 times the usual rate for this model and adapter (0.0005)")


def test_every_swept_model_that_has_a_short_name_is_found() -> None:
    keys = {
        (each["model_type"], each["hidden_size"], each["num_hidden_layers"], each["vocab_size"])
        for each in ARCHITECTURES.values()
        if "hidden_size" in each
    }
    assert SWEPT.keys() <= keys, SWEPT.keys() - keys
