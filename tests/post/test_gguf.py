"""GGUF by llama.cpp's converter: where it comes from, what it says, and that clients compute the same from its files.

llama.cpp sums in another order, and its exp is its own: logits of up to 4 differ by 1e-5 in fp32.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import transformers

from distlora.config import UserError
from distlora.post.export import formats, gguf_adapter, llama_cpp
from distlora.post.export.gguf_adapter import check_file
from distlora.post.export.gguf_model import LlamaCpp, half_steps, has_llama_cpp, hold_to_config, transformers_model
from distlora.post.weights import Factors, open_base
from distlora.weights.reader import Reader
from support.converters import patched_converter  # noqa: F401  (a fixture)
from support.family_models import config_for, edit_config, tokens, write_family_folder
from support.gguf_files import described_here
from support.small_models import tokenizer

VARIANTS = ["llama-biases", "llama3-tied", "llama-yarn", "mistral-window", "qwen3", "qwen3-moe"]


def write_gguf(converter: Path, folder: Path, variant: str) -> Path:
    """Write a small model and its GGUF file in fp32."""
    write_family_folder(folder, variant)
    tokenizer().save_pretrained(folder)
    llama_cpp.convert(converter / llama_cpp.MODELS, folder, folder / "model.gguf", "--outtype", "f32")
    return folder / "model.gguf"


@torch.no_grad()
def logits_of(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    logits: torch.Tensor = model(input_ids).logits
    return logits


def checkout(folder: Path, script: str = "") -> Path:
    """Make a folder that looks like llama.cpp, whose converter is a script."""
    for part in ("conversion", "gguf-py/gguf"):
        (folder / part).mkdir(parents=True)
    for name in (llama_cpp.MODELS, llama_cpp.ADAPTERS):
        (folder / name).write_text(script)
    return folder


def source(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Put a source archive where the published one is looked for, and make it the published one."""
    inside = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
    parts = (llama_cpp.MODELS, llama_cpp.ADAPTERS, "conversion/base.py", "gguf-py/gguf/quants.py", "src/llama.cpp")
    file = cache / "llama.cpp" / llama_cpp.SOURCE.file
    file.parent.mkdir(parents=True)
    with tarfile.open(file, "w:gz") as archive:
        for name in [inside + part for part in parts] + ["llama_cpp_python-0.3.36/setup.py"]:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(llama_cpp, "SOURCE", llama_cpp.SOURCE._replace(sha256=digest))
    return file


def test_the_converter_is_unpacked_from_the_published_archive_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))
    file = source(monkeypatch, tmp_path)
    assert llama_cpp.converter(None) == file
    with llama_cpp.unpacked(file) as folder:
        found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert found == ["conversion/base.py", llama_cpp.MODELS, llama_cpp.ADAPTERS, "gguf-py/gguf/quants.py"]
    assert not folder.exists()
    file.write_bytes(file.read_bytes() + b"more")  # By another user of a shared cache, after the command's first look.
    with pytest.raises(UserError, match="is not the published"), llama_cpp.unpacked(file):
        pass


def test_a_download_is_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path / "cache"))
    published = source(monkeypatch, tmp_path)
    monkeypatch.setattr(
        "distlora.system.published.Archive._download",
        lambda self, folder, _: shutil.copy(published, folder / self.file),
    )
    kept = llama_cpp.converter(None)
    assert [*(tmp_path / "cache" / "llama.cpp").iterdir()] == [kept]
    monkeypatch.delattr("distlora.system.published.Archive._download")
    assert llama_cpp.converter(None) == kept


def test_without_a_network_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTLORA_CACHE", str(tmp_path))

    def run(command: list[str], **_: Any) -> Any:
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert "--require-hashes" in command, "pip runs nothing of another archive"
        assert wanted == f"llama-cpp-python==0.3.36 --hash=sha256:{llama_cpp.SOURCE.sha256}\n"
        return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution\n")

    monkeypatch.setattr("distlora.system.published.subprocess.run", run)
    with pytest.raises(UserError, match=r"No matching distribution.*tar.gz from PyPI into .*--llama-cpp FOLDER"):
        llama_cpp.converter(None)


def test_a_checkout_is_named_by_its_folder(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "llama.cpp")
    assert llama_cpp.converter(str(folder)) == folder
    with pytest.raises(UserError, match=r"--llama-cpp=.* is no checkout of llama\.cpp with convert_hf_to_gguf\.py"):
        llama_cpp.converter(str(tmp_path))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; sys.exit('ERROR:hf-to-gguf:Model Gpt3ForCausalLM is not supported')", "Gpt3.* is not supported"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "Error: BPE pre-tokenizer was not"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("", "exit code 0"),
        ("assert 'b' in 'a'", "assert 'b' in 'a': AssertionError"),
        ("import absent", "needs absent, which is not installed; `pip install 'distlora"),
    ],
)
def test_what_the_converter_cannot_do_is_one_line(tmp_path: Path, script: str, says: str) -> None:
    folder = checkout(tmp_path / "llama.cpp", script)
    with pytest.raises(UserError, match=rf"convert_hf_to_gguf.py .*{says}") as raised:
        llama_cpp.convert(folder / llama_cpp.MODELS, tmp_path, tmp_path / "out.gguf")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("says", ["[Errno 28] No space left on device", "4096 requested and 0 written"])
def test_a_full_disk_is_named_as_that(tmp_path: Path, says: str) -> None:
    folder = checkout(tmp_path / "llama.cpp", f"raise OSError({says!r})")
    with pytest.raises(OSError, match="No space left") as raised:
        llama_cpp.convert(folder / llama_cpp.MODELS, tmp_path, tmp_path / "out.gguf")
    assert raised.value.errno == errno.ENOSPC


WARNS = """
import sys
from pathlib import Path
print("INFO:hf-to-gguf:fine\\nWARNING:hf-to-gguf:falling back to F16", file=sys.stderr)
Path(sys.argv[3]).touch()
"""


def test_the_converter_s_warnings_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path / "llama.cpp", WARNS)
    llama_cpp.convert(folder / llama_cpp.MODELS, tmp_path, tmp_path / "out.gguf")
    assert capsys.readouterr().err == "llama.cpp's converter: WARNING:hf-to-gguf:falling back to F16\n"


TRUSTS = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
Path(sys.argv[3]).touch()
"""


def test_the_converter_runs_no_code_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trusts a base's code for some tokenizers; "evil" is a folder in the working folder."""
    model, evil = tmp_path / "model", tmp_path / "evil"
    tokenizer().save_pretrained(model)
    evil.mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass PreTrainedTokenizerFast: ..."
    for folder in (model, evil):
        (folder / "odd.py").write_text(code)
    entry = {"auto_map": {"AutoTokenizer": ["evil--odd.PreTrainedTokenizerFast", None]}}
    (model / "config.json").write_text(json.dumps({"model_type": "llama"} | entry))
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(values | entry))
    monkeypatch.chdir(tmp_path)
    folder = checkout(tmp_path / "llama.cpp", TRUSTS)
    llama_cpp.convert(folder / llama_cpp.MODELS, model, tmp_path / "out.gguf")
    assert not (tmp_path / "ran").exists()
    assert "auto_map" in (model / "config.json").read_text(), "the model itself is unchanged"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=false"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3}}, "attention_factor=1.3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=true"),
        ({"attention_bias": True}, None),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.1 * math.log(4) + 1}}, None),
        ({"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"}, None),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(values: dict[str, Any], says: str | None) -> None:
    model = {"model_type": "llama", "hidden_act": "silu"} | values
    if says is None:
        formats._refuse_unread(model, Path("config.json"))
        return
    with pytest.raises(UserError, match=f"--format=gguf: config.json has .*{says}, and llama.cpp computes"):
        formats._refuse_unread(model, Path("config.json"))


def model_file(path: Path, family: str, **keys: int | str) -> Path:
    writer = gguf.GGUFWriter(path, family)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{family}.{key.replace('__', '.')}", value)  # type: ignore[operator]
    writer.add_context_length(512)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("family", "config", "keys", "context"),
    [
        ("llama", transformers.MistralConfig(sliding_window=16, max_position_embeddings=512), {}, 16),
        ("llama", transformers.MistralConfig(sliding_window=1024, max_position_embeddings=512), {}, 512),
        ("qwen2", transformers.Qwen2Config(sliding_window=16, use_sliding_window=True, max_window_layers=1), {}, 16),
        ("qwen3", transformers.Qwen3Config(sliding_window=16, use_sliding_window=True, max_window_layers=1), {}, 16),
        ("qwen2", transformers.Qwen2Config(sliding_window=16), {}, 512),
        ("gemma2", transformers.Gemma2Config(sliding_window=16), {"attention__sliding_window": 16}, 512),
        ("phi3", transformers.Phi3Config(sliding_window=16), {"attention__sliding_window": 16}, 16),
    ],
)
def test_the_context_ends_where_llama_cpp_lacks_a_window(
    tmp_path: Path, family: str, config: Any, keys: dict[str, int], context: int
) -> None:
    file, said = model_file(tmp_path / "a.gguf", family, **keys), list[str]()
    hold_to_config(file, config, said.append)
    assert gguf.GGUFReader(file).fields[f"{family}.context_length"].contents() == context
    assert [*said] == [line for line in said if "up to 16 tokens" in line]
    assert len(said) == (context == 16)


def test_a_file_without_the_rotary_embedding_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    config = transformers.LlamaConfig(rope_parameters=rope)
    hold_to_config(model_file(tmp_path / "a.gguf", "llama", rope__scaling__type="linear"), config, print)
    config.rope_parameters = rope | {"rope_type": "llama3"}
    with pytest.raises(UserError, match=r"rope_type='llama3', and .* wrote no rope_freqs\.weight for llama"):
        hold_to_config(tmp_path / "a.gguf", config, print)


def adapter_file(path: Path, alpha: float, tensors: dict[str, torch.Tensor], kind: str = "lora") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_adapter_s_file_has_the_numbers_that_were_trained(tmp_path: Path) -> None:
    own = {"a": torch.randn(4, 32), "b": torch.randn(64, 4)}
    check_file(adapter_file(tmp_path / "a", 8.0, {"x": own["b"].flip(0), "y": own["a"]}), own, 8.0, "fp32")
    damaged = {
        "lora.alpha is 4.0, not 8.0": adapter_file(tmp_path / "b", 4.0, own),
        "adapter.type is 'alora'": adapter_file(tmp_path / "c", 8.0, own, "alora"),
        "other numbers": adapter_file(tmp_path / "d", 8.0, {"a": own["a"]}),
        "wrote other": adapter_file(tmp_path / "e", 8.0, own | {"a": own["a"] * (1 + 2**-20)}),
    }
    for says, file in damaged.items():
        with pytest.raises(UserError, match=says):
            check_file(file, own, 8.0, "fp32")


def test_each_matrix_on_disk_gets_its_part_of_an_adapter(tmp_path: Path) -> None:
    """Experts are one by one on disk, gate and up apart. A tied head is in no GGUF file."""
    write_family_folder(tmp_path, "qwen3-moe")
    base = open_base(config_for(tmp_path).spec)
    path = next(path for path in base.model.architecture.experts_by_path if path.endswith("gate_up_proj"))
    experts, rows, width = base.weights[path].shape
    own = Factors(A=torch.randn(experts, 4, width), B=torch.randn(experts, rows, 4), scaling=1.0)
    pairs = {name: (a, b) for name, a, b in gguf_adapter._pairs(base, path, own)}
    module = path.rpartition(".")[0]
    assert len(pairs) == 2 * experts
    a, b = pairs[f"{module}.1.up_proj"]
    assert torch.equal(b @ a, (own.B @ own.A)[1, rows // 2 :])
    with pytest.raises(UserError, match="lm_head2, which is not in the base's GGUF"):
        gguf_adapter._pairs(base, "lm_head2", own)


def test_rounding_is_measured_in_half_steps() -> None:
    exact = torch.randn(8, 64)
    assert half_steps(exact, exact, "fp32") == 0
    assert half_steps(exact, exact + 1e-6, "fp32") == float("inf")
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    q8 = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(exact.numpy(), q8_0), q8_0).copy())
    for dtype, read in (("bf16", exact.bfloat16().float()), ("fp16", exact.half().float()), ("q8_0", q8)):
        assert 0 < half_steps(exact, read, dtype) <= 1 < half_steps(exact, read * 1.02, dtype)
        for odd in (float("nan"), float("inf")):
            broken = exact.clone()
            broken[0, 0] = odd
            assert half_steps(exact, broken, dtype) == half_steps(broken, broken, dtype) == float("inf")


@pytest.mark.ci
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same_from_the_file(variant: str, tmp_path: Path, converter: Path) -> None:
    """Leave the rotary embedding to config.json, as transformers reads only the plain one from GGUF."""
    file = write_gguf(converter, tmp_path, variant)
    input_ids = tokens(1, 16 if "window" in variant else 40)  # GGUF has no windows for these.
    model = transformers_model(file, transformers.AutoConfig.from_pretrained(tmp_path))
    with torch.no_grad():
        assert (model(input_ids).logits - logits_of(tmp_path, input_ids)).abs().max() < 1e-5


@pytest.mark.ci
@pytest.mark.parametrize("variant", ["llama3-tied", "qwen3"])
def test_the_file_is_read_as_the_base_that_it_was_written_from(
    variant: str,
    tmp_path: Path,
    converter: Path,
) -> None:
    """Read back every tensor, Llama 3's rotary embedding, and the tokenizer."""
    write_family_folder(tmp_path, variant)
    if variant.startswith("llama3"):
        rope = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
        edit_config(tmp_path, rope_parameters=rope | {"original_max_position_embeddings": 8192})
    tokenizer().save_pretrained(tmp_path)
    llama_cpp.convert(converter / llama_cpp.MODELS, tmp_path, tmp_path / "model.gguf", "--outtype", "f32")
    folder = described_here(tmp_path / "model.gguf", tmp_path / "described")
    was, now = (transformers.AutoConfig.from_pretrained(place) for place in (tmp_path, folder))
    for name in ("rope_parameters", "head_dim", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        theirs, ours = (getattr(config, name, None) for config in (was, now))
        assert ours == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), name
    read = open_base(config_for(folder, quant={"method": "none"}).spec)
    exact = open_base(config_for(tmp_path, quant={"method": "none"}).spec)
    assert read.weights.keys() == exact.weights.keys()
    with Reader() as reader:
        for name, weight in exact.weights.items():
            assert torch.equal(read.weights[name].whole(reader), weight.whole(reader)), name
    text = "in 1969, 600 million people\n\n  watched; ça va? 東京タワー"
    assert transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer()(text).input_ids


@pytest.mark.llama_cpp
@pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed; `make test-llama-cpp`")
@pytest.mark.parametrize("variant", [*VARIANTS, "mixtral"])
def test_llama_cpp_computes_the_same(variant: str, tmp_path: Path, converter: Path) -> None:
    file, input_ids = (
        write_gguf(converter, tmp_path, variant),
        tokens(1, 16 if variant in ("mistral-window", "mixtral") else 96),
    )
    client = LlamaCpp(file, context=input_ids.shape[1])
    assert (client.logits(input_ids) - logits_of(tmp_path, input_ids)).abs().max() < 1e-4
    text = "the value of 1969 <|x|> is not in 東京"
    assert client.tokenize(text) == tokenizer()(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
