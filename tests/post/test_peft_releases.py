"""Check adapters of experts in PEFT before and after it changed their layout, with both real releases.

Each release runs in an environment of its own: a folder of its package alone, ahead of the tests' other packages.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distlora.loading.peft_format import load_peft_adapter
from distlora.post.export import peft_folder
from distlora.post.export.formats import Export, ExportRequest
from distlora.post.trained import Name
from distlora.system.progress import ProgressLines
from distlora.training.setup import start_run_model
from support.family_models import SINGLE, config_for, our_logits, tokens, write_family_folder
from support.small_models import tokenizer

RELEASES = ("0.18.1", "0.21.2")
"""Releases of PEFT before and after the change that accept transformers 5.24; 0.19.1 saves with it, but cannot load."""
PROGRAM = """
import sys
import peft, torch, transformers
release, base, what, adapter, out = sys.argv[1:]
assert peft.__version__ == release, peft.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")
if what == "save":
    torch.manual_seed(1)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    chosen = {"target_modules": ["q_proj"], "target_parameters": targets}
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, **chosen)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(adapter)
else:
    model = peft.PeftModel.from_pretrained(model, adapter)
with torch.no_grad():
    rows = torch.load(f"{out}.tokens", weights_only=True)
    torch.save(model.eval()(input_ids=rows).logits, f"{out}.logits")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Install each release of PEFT alone into a folder of its own."""
    places = {}
    for release in RELEASES:
        places[release] = tmp_path_factory.mktemp(f"peft-{release}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(places[release])]
        installed = subprocess.run([*command, f"peft=={release}"], capture_output=True, text=True, check=False)
        if installed.returncode:
            pytest.skip(f"peft=={release} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    return places


def run_peft(place: Path, release: str, base: Path, what: str, adapter: Path, rows: torch.Tensor) -> torch.Tensor:
    """Return the logits of a release of PEFT with an adapter that it saves or loads."""
    out = adapter.with_name(f"{adapter.name}-{release}")
    torch.save(rows, f"{out}.tokens")
    env = os.environ | {"PYTHONPATH": str(place)}
    command = [sys.executable, "-c", PROGRAM, release, str(base), what, str(adapter), str(out)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    logits: torch.Tensor = torch.load(f"{out}.logits", weights_only=True)
    return logits


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("release", RELEASES)
def test_both_layouts_of_experts_are_read_and_written(
    environments: dict[str, Path], tmp_path: Path, release: str, family: str
) -> None:
    """Compare logits with the real release: of what it saves, and of what is written for it."""
    base, rows = tmp_path / "base", tokens(2, 24)
    write_family_folder(base, family)
    tokenizer().save_pretrained(base)
    theirs = run_peft(environments[release], release, base, "save", tmp_path / "theirs", rows)
    name = Name(place=str(tmp_path / "theirs"), base=str(base), quant="none")
    trained = name.read()
    config = dataclasses.replace(config_for(base, quant={"method": "none"}), adapter=trained.spec.adapter)
    model, backend, _ = start_run_model(config, SINGLE)
    load_peft_adapter(model, config.adapter, "none", backend)
    with torch.no_grad():
        assert (our_logits(model, rows) - theirs).abs().max() <= 1e-4
    for other in RELEASES:
        out = tmp_path / f"for-{other}"
        request = ExportRequest(run="", name=name, format="peft", out=str(out), dtype=None, version=other)
        peft_folder.write(
            Export(request=request, trained=trained, place=out, say=lambda _: None, progress=ProgressLines())
        )
        again = run_peft(environments[other], other, base, "load", out, rows)
        assert (again - theirs).abs().max() <= 1e-4, other
