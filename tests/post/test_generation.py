"""Text from our models: the tokens of transformers, on any number of ranks; samples that change no run; the command."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from distlora.config import UserError
from distlora.config.file import load_config
from distlora.data.prompts import GenerateRequest, Prompt
from distlora.derive.prove import move_adapters_off_start
from distlora.generation import engine as engine_module
from distlora.generation.compiled_step import fits
from distlora.generation.engine import Engine, aside, serves
from distlora.generation.prompts import PromptEncoder, context_limit, greedy
from distlora.generation.sampling import Request, Sample
from distlora.generation.sampling import choose as choose_tokens
from distlora.generation.writer import Completion, Generator, Writer, generate, generate_all
from distlora.loading.peft_format import adapter_config, adapter_tensors
from distlora.model import paged_cache
from distlora.model.build import CausalLM
from distlora.model.trial_slots import put_trial
from distlora.parallel import Backend, Ranks, fsdp2
from distlora.parallel import backend as parallel_backend
from distlora.post import generate as worker
from distlora.post.load_trained import load_trained
from distlora.post.trained import of_run
from distlora.training import worker as training_worker
from distlora.weights.peft_folder import CONFIG_NAME, WEIGHTS_NAME
from distlora_kernels import decode, native
from support.family_models import SINGLE, config_for, dequantized, load_ours, tokens, write_family_folder
from support.peft_models import write_adapter
from support.runs import run_once
from support.small_models import SHAPES, make_run, tokenizer, write_model_folder
from support.tiers import ci
from support.worlds import World

DISTLORA = Path(sys.executable).parent / "distlora"
LENGTHS = (23, 5, 40)
"""Tokens of the prompts of one batch; the windows of the families are 16."""
CHATS = {"chats": True, "chat_template": None}
"""The entries in RUN/data.json for chats that the tokenizer's own template rendered."""


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a variant's folder with the tests' tokenizer, written at the first use."""

    @functools.cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("generation") / name
        write_family_folder(path, name)
        tokenizer().save_pretrained(path)
        return path

    return folder


def prompts() -> list[list[int]]:
    return [tokens(1, length, length)[0].tolist() for length in LENGTHS]


def choose(num_tokens: int = 16, **settings: Any) -> GenerationConfig:
    """Greedy, no token twice: random tied models repeat one for ever, and what repeats says little."""
    values = {"do_sample": False, "no_repeat_ngram_size": 1, "pad_token_id": 0, "eos_token_id": [1], **settings}
    return GenerationConfig(max_new_tokens=num_tokens, **values)


def completions(model: CausalLM, backend: Backend, settings: GenerationConfig) -> list[Completion]:
    batches = generate_all(Generator(model, backend), prompts(), settings)
    return [completion for batch in batches for completion in batch]


FAMILIES = ["llama3-tied", "gpt-oss", "qwen3_5"]
"""Pages; sinks and windows; recurrent states beside a vision tower."""
FAMILIES_IN_CI = ["qwen2-tied-window", "gemma3", "mistral-window", "qwen3", "gemma2", "phi3", "mixtral"]
FAMILIES_IN_CI += [
    "gemma4_text@shared",
    "minimax",
    "qwen3_next",
    "glm4_moe",
    "lfm2",
    "granite@scaled",
    "mistral3",
    "qwen3_vl",
]


WITHOUT_PAGES = {"gpt-oss", "gemma2", "gemma4_text@shared", "minimax", "qwen3_5", "qwen3_next", "lfm2"}
"""Families with sinks, caps, states or shared keys, which transformers' generate takes."""


@pytest.mark.parametrize("name", [*FAMILIES, *map(ci, FAMILIES_IN_CI)])
def test_greedy_tokens_are_those_of_transformers_with_peft(
    family_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """A padded batch of ours against one prompt at a time on the dequantized model with PEFT's adapter."""
    ours, backend = load_ours(family_folder(name))
    (tmp_path / CONFIG_NAME).write_text(json.dumps(adapter_config(config_for(family_folder(name)).spec, ours)))
    tensors = {name: parameter.detach().clone() for name, parameter in adapter_tensors(ours).items()}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_NAME)
    tuned = peft.PeftModel.from_pretrained(dequantized(family_folder(name), ours), tmp_path)
    written = completions(ours, backend, choose())
    assert [len(set(completion.tokens)) for completion in written] == [16, 16, 16]
    assert completions(ours, backend, choose(use_cache=False)) == written
    for prompt, completion in zip(prompts(), written, strict=True):
        ids = torch.tensor([prompt])
        theirs = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=choose())
        assert theirs[0, len(prompt) :].tolist() == completion.tokens
    assert serves(ours) == (name not in WITHOUT_PAGES)
    if serves(ours):
        samples = Engine(ours, backend, end_tokens=[1], most_rows=2).run(REQUESTS)
        for request, sample in zip(REQUESTS, samples, strict=True):
            assert_log_probs_are_those_of_a_forward(ours, request, sample)
        ids = torch.tensor([REQUESTS[0].tokens])
        greedily = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=[1], pad_token_id=0)
        theirs = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=greedily)
        assert theirs[0, ids.shape[1] :].tolist() == samples[0].tokens == samples[4].tokens


REQUESTS = [
    Request(prompts()[0], max_new_tokens=20, temperature=0.0),
    Request(prompts()[1], seed=1, max_new_tokens=20, temperature=1.5),
    Request(prompts()[2], seed=2, max_new_tokens=3, temperature=0.7, top_k=9),
    Request(prompts()[0], seed=3, max_new_tokens=18, temperature=2.0, top_p=0.9),
    Request(prompts()[0], seed=4, max_new_tokens=20, temperature=0.0),
    Request(tokens(1, 16)[0].tolist(), seed=1, max_new_tokens=33, temperature=1.0),
    Request(prompts()[1], seed=5, max_new_tokens=1),
]
"""Uneven lengths, at the end of a block too, and a prompt of three of them: with two rows at once they take turns."""


def assert_log_probs_are_those_of_a_forward(model: CausalLM, request: Request, sample: Sample) -> None:
    rows = None if request.slot is None else torch.tensor([request.slot])
    with torch.no_grad():
        logits = model.logits(torch.tensor([request.tokens + sample.tokens]), rows)[0, len(request.tokens) - 1 : -1]
    log_p = (logits / (request.temperature or 1.0)).log_softmax(-1)
    if request.temperature == 0:
        assert log_p.argmax(-1).tolist() == sample.tokens
    expected = log_p.gather(1, torch.tensor(sample.tokens)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, rtol=0, atol=1e-5)
    assert 0 < len(sample.tokens) <= request.max_new_tokens
    assert sample.ended == (1 in sample.tokens)


def test_tokens_are_drawn_by_their_probability_among_those_of_transformers() -> None:
    """top_k and top_p keep what transformers' keep; 4,000 positions draw each token as often as it is likely."""
    logits, count = 2 * torch.randn(1, 700, generator=torch.Generator().manual_seed(0)), 4000
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 40, 1.0), (1.5, 0, 0.8), (1.2, 90, 0.6)):
        warped = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
        for warper in ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else []):
            warped = warper(None, warped)
        expected = warped.softmax(-1)[0]
        request = Request([], 7, temperature=temperature, top_p=top_p, top_k=top_k)
        drawn, log_p = choose_tokens(logits.expand(count, -1), [request] * count, range(count))
        assert bool((expected[drawn] > 0).all())
        deviation = (torch.bincount(drawn, minlength=700) - count * expected) / (count * expected).clamp(min=1).sqrt()
        assert float(deviation.abs().max()) < 5
        torch.testing.assert_close(log_p, (logits[0] / temperature).log_softmax(-1)[drawn])


def test_a_sample_depends_on_its_request_alone(family_folder: Callable[[str], Path]) -> None:
    """On no other request, on no number of rows, on no order; and another seed gives another one."""
    model, backend = load_ours(family_folder("qwen3"))
    samples = Engine(model, backend).run(REQUESTS)
    done: list[int] = []
    few = Engine(model, backend, most_rows=3).run(REQUESTS[::-1], lambda index, sample: done.append(index))
    assert sorted(done) == list(range(len(REQUESTS)))
    assert [sample.tokens for sample in few[::-1]] == [sample.tokens for sample in samples]
    for request, sample in zip(REQUESTS, samples, strict=True):
        (alone,) = Engine(model, backend).run([request])
        assert alone.tokens == sample.tokens
        assert alone.logprobs == pytest.approx(sample.logprobs, abs=1e-5)
    (other,) = Engine(model, backend).run([dataclasses.replace(REQUESTS[5], seed=2)])
    assert other.tokens != samples[5].tokens
    with pytest.raises(UserError, match="a prompt of 512 tokens: the model has 512 positions"):
        Engine(model, backend).run([Request([7] * 512)])


def test_rows_of_a_batch_choose_their_adapters(family_folder: Callable[[str], Path]) -> None:
    model, backend = load_ours(family_folder("qwen3"))
    put_trial(model, 1, config_for(family_folder("qwen3")).adapter, seed=3, device=SINGLE.device)
    move_adapters_off_start(model)
    slots = (1, -1, 0, 1, 0, -1, 1)
    requests = [dataclasses.replace(request, slot=slot) for request, slot in zip(REQUESTS, slots, strict=True)]
    samples = Engine(model, backend, most_rows=4).run(requests)
    for request, sample in zip(requests, samples, strict=True):
        assert_log_probs_are_those_of_a_forward(model, request, sample)
    assert samples[0].tokens != samples[4].tokens, "two adapters continue one prompt alike"


def test_the_kernel_of_a_gpu_attends_to_the_rows_of_a_batch(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter, with windows; all else runs as on a CPU."""
    model, backend = load_ours(family_folder("mistral-window"))
    monkeypatch.setattr(paged_cache, "uses_triton", lambda tensor: True)
    requests = [dataclasses.replace(request, max_new_tokens=5) for request in REQUESTS[:3]]
    for request, sample in zip(requests, Engine(model, backend).run(requests), strict=True):
        assert_log_probs_are_those_of_a_forward(model, request, sample)


def test_a_stop_string_ends_a_completion_wherever_tokens_divide_it(family_folder: Callable[[str], Path]) -> None:
    model, backend = load_ours(family_folder("qwen3"))
    engine = Engine(model, backend, tokenizer=tokenizer())
    (whole,) = engine.run([REQUESTS[5]])
    texts = [tokenizer().decode(whole.tokens[:count]) for count in range(len(whole.tokens) + 1)]
    for count in (4, 9):
        across = texts[count][-1] + texts[count + 1][len(texts[count]) :][:1]  # The ends of two tokens.
        first = next(number for number, text in enumerate(texts) if across in text)
        (sample,) = engine.run([dataclasses.replace(REQUESTS[5], stop=("never", across))])
        assert (sample.tokens, sample.ended) == (whole.tokens[:first], True)


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with norms of heads, whose sizes the compiled step takes."""
    import transformers

    folder = tmp_path_factory.mktemp("wide") / "qwen3"
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **{**SHAPES, **sizes, "head_dim": 32, "vocab_size": 1024, "initializer_range": 0.1}
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("compiles", "slots"), [ci(False, False), ci(False, True), ci(True, False), (True, True)])
def test_one_compiled_call_decodes_as_the_modules_do(wide_folder: Path, compiles: bool, slots: bool) -> None:
    """In bf16, whose products the two round elsewhere: both are as near to the model in fp32."""
    if native.unavailable_reason() is not None or not decode.available():
        pytest.skip("no compiler, or a processor without AVX512-BF16 or with AMX")
    model, backend = load_ours(wide_folder, train={"dtype": "bf16", "compile": compiles})
    exact, _ = load_ours(wide_folder)
    requests = REQUESTS
    if slots:
        for each in (model, exact):
            put_trial(each, 1, config_for(wide_folder).adapter, seed=3, device=SINGLE.device)
            move_adapters_off_start(each)
        requests = [
            dataclasses.replace(each, slot=slot) for each, slot in zip(REQUESTS, (1, -1, 0, 1, 0, -1, 1), strict=True)
        ]
    assert fits(model)
    assert not fits(exact), "fp32"
    errors = []
    for compiled in (True, False):
        samples = Engine(model, backend, most_rows=4, compiled=compiled).run(requests)
        differences = []
        for request, sample in zip(requests, samples, strict=True):
            rows = None if request.slot is None else torch.tensor([request.slot])
            ids = torch.tensor([request.tokens + sample.tokens])
            with torch.no_grad():
                logits = exact.logits(ids, rows)[0, len(request.tokens) - 1 : -1] / (request.temperature or 1.0)
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None]).squeeze(1)
            differences.append((torch.tensor(sample.logprobs) - expected).abs())
        errors.append(float(torch.cat(differences).mean()))
    assert errors[0] < 1.3 * errors[1] < 0.1


def compiled_on(ranks: Ranks, *, folder: Path, compiler: str) -> list[Sample]:
    """Sample on this rank, in a process whose tests have no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", compiler)
        model, backend = load_ours(folder, ranks, train={"dtype": "bf16", "compile": True})
        assert fits(model)
        samples = Engine(model, backend).run(REQUESTS)
    native._library.cache_clear()
    return samples


@pytest.mark.usefixtures("compiler")
def test_ranks_with_a_sharded_base_decode_in_compiled_calls(world: World, wide_folder: Path) -> None:
    """Each rank gathers the base once and packs panels of its own."""
    if native.unavailable_reason() is not None or not decode.available():
        pytest.skip("no compiler, or a processor without AVX512-BF16 or with AMX")
    command = " ".join(native.compiler() or ())
    first, second = world.run(2, compiled_on, folder=wide_folder, compiler=command)
    assert first == second
    alone = compiled_on(SINGLE, folder=wide_folder, compiler=command)
    assert [len(sample.tokens) for sample in first] == [len(sample.tokens) for sample in alone]
    assert first[0].logprobs == pytest.approx(alone[0].logprobs, abs=0.05)


@pytest.mark.ci
def test_little_memory_makes_requests_wait(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, backend = load_ours(family_folder("qwen3"))
    samples = Engine(model, backend).run(REQUESTS)
    chosen = []
    for free in (1.0, -1e12, 0.0, 2e6, 1e9):
        monkeypatch.setattr(Backend, "free_bytes", lambda self, free=free: free)
        engine = Engine(model, backend)
        few = engine.run(REQUESTS)
        assert [sample.tokens for sample in few] == [sample.tokens for sample in samples]
        chosen.append(engine.chosen)
    assert [choice.blocks for choice in chosen[:3]] == [0, 0, sys.maxsize], "only 0 is an unknown amount"
    assert 0 < chosen[3].blocks < chosen[4].blocks
    again = Engine(model, backend, chosen=chosen[3])
    again.run(REQUESTS)
    assert again.chosen == chosen[3], "another amount of free memory gives a resumed run other rows"
    monkeypatch.setattr(Backend, "free_bytes", lambda self: 0.9e6)
    again.run(REQUESTS)
    assert 0 < again.chosen.blocks < chosen[3].blocks, "the cache takes more memory than there is"


def run_beside_whole_base(ranks: Ranks, *, folder: Path) -> tuple[list[Sample], list[Sample], tuple[int, ...]]:
    """Return samples with unlimited memory, with little beside the whole base, and two numbers of blocks."""
    model, backend = load_ours(folder, ranks)
    plain = Engine(model, backend).run(REQUESTS)
    free, whole = [1e9], fsdp2.Residency.all_gathered

    @contextlib.contextmanager
    def all_gathered(self: fsdp2.Residency, model: CausalLM) -> Iterator[None]:
        free[0] = 1e6
        with whole(self, model):
            yield

    with pytest.MonkeyPatch.context() as patch:
        for module in (fsdp2, parallel_backend):
            patch.setattr(module, "free_bytes", lambda device, with_cached=False: free[0])
        patch.setattr(fsdp2.Residency, "all_gathered", all_gathered)
        engine = Engine(model, backend)
        samples = engine.run(REQUESTS)
        assert engine.chosen is not None
        alone = Engine(model, backend, resident=False)
        alone.run(REQUESTS)
        assert alone.chosen is not None
    return plain, samples, (engine.chosen.blocks, alone.chosen.blocks)


def test_the_cache_gets_a_part_of_what_the_whole_base_leaves(
    world: World, family_folder: Callable[[str], Path]
) -> None:
    results = world.run(2, run_beside_whole_base, folder=family_folder("gemma3-untied"))
    assert results[0] == results[1]
    plain, samples, (blocks, again) = results[0]
    assert [sample.tokens for sample in samples] == [sample.tokens for sample in plain]
    assert 0 < blocks == again, "the base was counted as free"


def continue_all(ranks: Ranks, *, folder: Path) -> tuple[Any, ...]:
    """Greedy and sampled completions on this rank, and what it gathered."""
    model, backend = load_ours(folder, ranks)
    model.set_num_micro(3)
    backend.traffic.take()
    with aside(model, backend):
        plain = completions(model, backend, choose())
        torch.manual_seed(7)
        sampled = completions(model, backend, choose(do_sample=True, temperature=2.0, top_k=0))
    numbers: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "FORWARDS", 4)
        samples = [
            Engine(model, backend, most_rows=2, resident=resident).run(REQUESTS, boundary=numbers.append)
            for resident in (False, True)
        ]
    assert samples[0] == samples[1]
    count = numbers.index(1, 1)
    assert numbers == [*range(1, count + 1), *range(1, len(numbers) - count + 1)]
    assert len(numbers) > 10, "a long rollout has boundaries within it"
    assert all(block.num_micro == 3 for block in model.blocks)
    traffic = (backend.traffic.gathered_bytes, backend.traffic.reduced_bytes)
    return plain, sampled, traffic, samples[0], numbers


def test_sharded_ranks_write_what_one_writes(world: World, family_folder: Callable[[str], Path]) -> None:
    folder = family_folder("gemma3-untied")
    results = world.run(3, continue_all, folder=folder)
    assert results[0] == results[1] == results[2]
    alone = continue_all(SINGLE, folder=folder)
    assert results[0][:2] == alone[:2]
    for one, other in zip(results[0][3], alone[3], strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert results[0][0] != results[0][1], "sampling chose what greed chooses, so this says less than it could"
    assert results[0][2] == (0, 0), "samples are counted as a step's traffic"


def test_a_completion_ends_at_any_stop_token_and_leaves_it_out(family_folder: Callable[[str], Path]) -> None:
    model, backend = load_ours(family_folder("qwen3"))
    whole = completions(model, backend, choose())
    stops = [whole[0].tokens[4], whole[1].tokens[9]]
    written = completions(model, backend, choose(eos_token_id=stops))
    assert written[0] == (whole[0].tokens[:4], True)
    assert written[1] == (whole[1].tokens[:9], True)
    assert [len(completion.tokens) for completion in whole] == [16, 16, 16]
    assert not any(completion.ended for completion in whole)


def test_completions_end_where_the_positions_end_without_shortening_others(
    family_folder: Callable[[str], Path],
) -> None:
    model, backend = load_ours(family_folder("phi3-longrope-tied"))
    assert context_limit(model) == 128, "where its rotary factors change, of 512 positions"
    long = tokens(1, 120)[0].tolist()
    batches = list(generate_all(Generator(model, backend), [*prompts(), long], choose(12)))
    assert [[len(completion.tokens) for completion in batch] for batch in batches] == [[12, 12, 12], [8]]


def test_the_end_of_a_turn_comes_from_the_template_the_tokenizer_and_the_model(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A base that learned a template of others must stop at its marker, whatever its own files say."""
    folder = tmp_path / "base"
    shutil.copytree(family_folder("qwen3"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 17]}))
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>\n{% endfor %}<|assistant|>")
    config = config_for(folder, data={"path": "none", "template": str(template)})
    trained = {"chats": True, "chat_template": template.read_text()}
    template.unlink()  # What counts is what was trained, wherever it came from.
    model, _ = load_ours(folder)
    names = tokenizer().convert_tokens_to_ids(["<eos>", "<|system|>"])
    encoder = PromptEncoder(model, config.model, trained)
    assert encoder.stop_tokens(folder) == sorted({*names, 17})
    more = PromptEncoder(model, config.model, trained | {"settings": {"eot_tokens": ["<|user|>"]}})
    assert more.stop_tokens(folder) == sorted({*names, 17, tokenizer().convert_tokens_to_ids("<|user|>")})
    assert PromptEncoder(model, config.model, trained, as_chat=False).stop_tokens(folder) == sorted({names[0], 17})
    shown = encoder.tokenizer.decode(encoder.encode(Prompt(place="p", text="Hi"), system="Be brief."))
    assert shown == "<|system|>Be brief.<|system|>\n<|user|>Hi<|system|>\n<|assistant|>"
    chat = Prompt(place="p", messages=({"role": "system", "content": "A"}, {"role": "user", "content": "B"}))
    assert encoder.tokenizer.decode(encoder.encode(chat, system="C")).startswith("<|system|>A<|system|>\n<|user|>B")
    raw = PromptEncoder(model, config.model, trained, as_chat=False)
    assert raw.tokenizer.decode(raw.encode(Prompt(place="p", text="Hi"))) == "Hi"
    with pytest.raises(UserError, match=r"p holds messages.*no chat template"):
        raw.encode(chat)
    with pytest.raises(UserError, match=r"p: .* tokens, and the model has 512 positions"):
        raw.encode(Prompt(place="p", text="word " * 600))


# --- samples in training ---


SAMPLING = {"sample_every": 2, "sample_prompts": ["What is a list?", "Name a keyword."], "sample_tokens": 6}


def test_samples_change_nothing_of_a_run(world: World, folders: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 3, "micro_batch": 3, "accumulate": "block"}
    results, gathered = [], []
    for name, extra in (("with", SAMPLING), ("without", {})):
        make_run(tmp_path / name, folders, "llama-tied", train={**settings, **extra})
        world.run(2, run_once, run_dir=tmp_path / name)
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        kept = ("step", "loss", "grad_norm", "eval_loss", "reduced_bytes")
        figures = [{key: line[key] for key in kept if key in line} for line in metrics]
        gathered.append([line["gathered_bytes"] for line in metrics if "loss" in line])
        results.append((figures, safetensors.torch.load_file(tmp_path / name / "adapter" / WEIGHTS_NAME)))
    assert results[0][0] == results[1][0]
    # The step after a sample finds the last norm gathered already, as it does after an evaluation.
    saved = [without - with_ for with_, without in zip(*gathered, strict=True)]
    assert saved == [0, 0, 4 * 96]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
    lines = [json.loads(line) for line in (tmp_path / "with" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (2, prompt)
        for prompt in SAMPLING["sample_prompts"]  # type: ignore[attr-defined]
    ]
    assert all(isinstance(line["text"], str) for line in lines)
    assert not (tmp_path / "without" / "samples.jsonl").exists()


def test_a_sample_prompt_that_cannot_be_asked_ends_the_run_before_its_first_step(folders: Path, tmp_path: Path) -> None:
    long = SAMPLING | {"sample_prompts": ["word " * 600]}
    make_run(tmp_path / "run", folders, train={"max_steps": 3, **long})
    with pytest.raises(UserError, match=r"train.sample_prompts\[0\]: .* 512 positions"):
        training_worker.run(tmp_path / "run", SINGLE)
    assert not (tmp_path / "run" / "samples.jsonl").exists()


# --- distlora generate ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run with checkpoints of steps 2 and 4; its result is that of step 4."""
    root = tmp_path_factory.mktemp("generate")
    write_model_folder(root / "llama", "llama")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} is a number. " * 20}) + "\n" for n in range(30)))
    make_run(root / "run", root, train={"max_steps": 4, "save_every": 2}, optim={"lr": 2e-2})
    training_worker.run(root / "run", SINGLE)
    return root / "run"


def ask(run_dir: Path, text: str, weights: Path | None) -> str:
    """Return the raw continuation, in process."""
    config = load_config(run_dir)
    model, backend = load_trained(of_run(config, None if weights is None else str(weights)), SINGLE)
    encoder = PromptEncoder(model, config.model, CHATS, as_chat=False)
    settings = greedy(encoder, config.model.path, 12)
    (completion,) = generate(Generator(model, backend), [encoder.encode(Prompt(place="p", text=text))], settings)
    return encoder.decode(completion.tokens)


def run_command(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DISTLORA, "generate", *map(str, words)], capture_output=True, text=True, timeout=120, **options
    )


def test_prompts_of_a_file_become_json_lines_in_order(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"prompt": "A list"}, {"messages": [{"role": "user", "content": "The try statement"}]}, {"prompt": "5"}]
    asked *= 4  # More than a batch.
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    files = {"prompts": str(tmp_path / "asked.jsonl"), "out": str(tmp_path / "out.jsonl")}
    worker.run(GenerateRequest(run=str(trained), weights=str(trained / "adapter"), max_new_tokens=5, **files), SINGLE)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "through the chat template" in captured.err
    assert "12/12 prompts" in captured.err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in ("prompt", "messages") if key in line} for line in lines] == asked
    assert all(line["tokens"] <= 5 and isinstance(line["completion"], str) for line in lines)
    assert [line["completion"] for line in lines[:3]] == [line["completion"] for line in lines[9:]]


@pytest.mark.ci
def test_several_processes_share_the_model_and_write_the_same(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("A list\n\n7 is\n")
    words = (trained, "--raw", "--prompts", tmp_path / "asked.txt", "--max-new-tokens", 12)
    answered = run_command(*words, "--processes", 2, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert answered.returncode == 0, answered.stderr
    assert answered.stderr.startswith(f"loading {trained.parent / 'llama'} with ")
    lines = [json.loads(line) for line in answered.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["A list", "7 is"]
    assert [line["completion"] for line in lines] == [ask(trained, t, trained / "adapter") for t in ("A list", "7 is")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked.txt"], "nothing stays behind"


def test_lines_of_a_pipe_are_answered_as_text(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("7 is\n\nA list\n"))
    worker.run(
        GenerateRequest(run=str(trained), weights=str(trained / "adapter"), as_chat=False, max_new_tokens=12), SINGLE
    )
    captured = capsys.readouterr()
    expected = [ask(trained, text, trained / "adapter") for text in ("7 is", "A list")]
    assert captured.out == "".join(text + "\n" for text in expected)
    assert "prompts are continued as text; the likeliest token each time; up to 12 tokens" in captured.err


def test_each_option_chooses_its_weights(trained: Path, tmp_path: Path) -> None:
    """The result; the base; a step; the newest whole checkpoint of a run that is not finished."""
    from distlora.post.trained import find_weights

    config = load_config(trained)
    assert find_weights(trained, config, None, None) == trained / "adapter"
    assert find_weights(trained, config, "base", None) is None
    assert find_weights(trained, config, None, "step_2") == trained / "checkpoints" / "step_00000002"
    text = ask(trained, "7 is", trained / "adapter")
    assert ask(trained, "7 is", trained / "checkpoints") == text
    assert ask(trained, "7 is", trained / "checkpoints" / "step_00000002") != text
    assert ask(trained, "7 is", None) != text

    unfinished = tmp_path / "run"
    shutil.copytree(trained, unfinished)
    shutil.rmtree(unfinished / "adapter")
    assert find_weights(unfinished, config, None, None) == unfinished / "checkpoints"
    (unfinished / "checkpoints" / "step_00000004" / WEIGHTS_NAME).write_bytes(b"damaged")
    older = ask(trained, "7 is", trained / "checkpoints" / "step_00000002")
    assert ask(unfinished, "7 is", unfinished / "checkpoints") == older


def test_a_base_that_changed_since_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained.parent, tmp_path / "moved")
    write_model_folder(tmp_path / "moved" / "llama", "llama", initializer_range=0.09)
    config = load_config(tmp_path / "moved" / "run")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(tmp_path / "moved" / "llama"))
    )
    for weights in ("adapter", "checkpoints"):
        with pytest.raises(UserError, match="was trained on another base"):
            load_trained(of_run(config, str(tmp_path / "moved" / "run" / weights)), SINGLE)
    load_trained(of_run(config, None), SINGLE)


def test_an_adapter_of_others_brings_its_own_rank_and_targets(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made by PEFT on the run's base; the run itself has rank 8 and other targets."""
    lora = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    write_adapter(tmp_path / "other", Path(load_config(trained).model.path), std=0.2, **lora)
    (tmp_path / "asked.txt").write_text("A list\n7 is\n")
    other_model = {"weights": str(tmp_path / "other"), "foreign": True}
    shutil.copytree(trained, tmp_path / "run")
    write_model_folder(tmp_path / "llama", "llama", num_hidden_layers=2)
    config_file = tmp_path / "run" / "config.yaml"
    config_file.write_text(config_file.read_text().replace(str(trained.parent / "llama"), str(tmp_path / "llama")))
    with pytest.raises(UserError, match=r"adapts model.layers.2.*set another --adapter or model.path"):
        worker.run(GenerateRequest(run=str(tmp_path / "run"), **other_model), SINGLE)  # type: ignore[arg-type]
    texts = []
    for weights in ({"weights": str(tmp_path / "other"), "foreign": True}, {}):
        asked = {"as_chat": False, "prompts": str(tmp_path / "asked.txt"), "max_new_tokens": 12, **weights}
        worker.run(GenerateRequest(run=str(trained), **asked), SINGLE)  # type: ignore[arg-type]
        texts.append([json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()])
    assert texts[0] != texts[1] == [ask(trained, "A list", None), ask(trained, "7 is", None)]

    config = load_config(trained)
    ours, _ = load_trained(of_run(config, None), SINGLE)
    tuned = peft.PeftModel.from_pretrained(dequantized(Path(config.model.path), ours), tmp_path / "other")
    ids = torch.tensor([PromptEncoder(ours, config.model, CHATS, as_chat=False).encode(Prompt(place="p", text="7 is"))])
    theirs = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert tokenizer().decode(theirs[0, ids.shape[1] :], skip_special_tokens=True) == texts[0][1]


def test_a_chat_answers_reacts_to_commands_and_stops_on_ctrl_c(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Any] = ["/systm", "/help", "/system Be brief.", "What is a list?", "/reset", KeyboardInterrupt]
    lines += ["word " * 600, EOFError]

    def read(prompt: str) -> str:
        line: str | type[BaseException] = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    class Interrupted(worker.Printer):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if not self.next_tokens_are_prompt and len(self.token_cache) == 4:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(worker, "Printer", Interrupted)
    config = load_config(trained)
    model, backend = load_trained(of_run(config, str(trained / "adapter")), SINGLE)
    encoder = PromptEncoder(model, config.model, CHATS)
    settings = greedy(encoder, config.model.path, 450)
    worker.Chat(Writer(model, backend, encoder.tokenizer), encoder, settings, system=None).run()
    shown = capsys.readouterr().out
    for text in (
        "there is no /systm (did you mean '/system'?)",
        worker.HELP,
        "(a new conversation, with this system message)",
        "(stopped)",
        "(a new conversation)",
        "(Ctrl-D or /exit leaves)",
        "tokens, and the model has 512 positions",
    ):
        assert text in shown, shown
    assert not lines
