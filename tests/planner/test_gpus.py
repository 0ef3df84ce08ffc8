"""GPUs: known by a device's whole name, with figures that belong together, and chosen by `gpu=`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from distlora.config import UserError
from distlora.config.file import as_mapping, load_config
from distlora.config.plan import GPUS, PCIE_4, PCIE_5, find_gpu
from distlora.parallel import join_ranks
from distlora_launcher.compose.compose import compose_config

DEVICES: dict[str, str] = json.loads((Path(__file__).parents[1] / "golden" / "gpus.json").read_text())
"""Names of the table by those that drivers say."""
OTHERS = (
    *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti"),
    *("NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 4070 SUPER", "NVIDIA GeForce RTX 5070 Ti"),
    *(
        "NVIDIA RTX A1000",
        "NVIDIA RTX 4000 Ada Generation",
        "Tesla T4",
        "NVIDIA A10-24Q",
        "GRID A100-10C",
        "NVIDIA A100-SXM-64GB",
    ),
    *("NVIDIA GH200 144G HBM3e", "NVIDIA GB200", "NVIDIA H20"),
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
)


def test_a_gpu_is_known_by_its_whole_name() -> None:
    for device, name in DEVICES.items():
        gpu = find_gpu(device)
        assert gpu is not None, device
        assert gpu.name == name
    assert set(DEVICES.values()) == set(GPUS)
    assert not [device for device in OTHERS if find_gpu(device) is not None]


def test_the_figures_of_a_gpu_belong_together() -> None:
    for name, gpu in GPUS.items():
        assert gpu.name == name
        gigabytes = int(gpu.title.split()[-2])
        # A little is kept from CUDA (ECC in GDDR6 keeps a sixteenth), and makers' GB are GiB but for H200's and B200's.
        assert 0.91 * gigabytes <= gpu.memory_bytes / 2**30 < gigabytes
        assert gpu.usable_bytes < gpu.memory_bytes
        assert gpu.link > gpu.host_link if gpu.has_nvlink and name != "gh200" else gpu.link <= 450e9
        # Of 16 lanes, or of 8 of small GPUs. Peers without NVLink are reached as the host is.
        assert gpu.has_nvlink or gpu.link in (PCIE_4 / 2, PCIE_4, PCIE_5)
        # No GPU does less than 70 (RTX 3060) or more than 450 operations per byte of its memory: a slip would show.
        assert 70 < gpu.flops / gpu.bandwidth < 450, name


def test_a_gpu_is_chosen_by_name_and_corrected_by_its_settings() -> None:
    config = compose_config(["gpu=rtx4090", "gpu.memory_gib=48"], may_lack_paths=True)
    assert (config.gpu.name, config.gpu.memory_gib) == ("rtx4090", 48.0)
    assert {compose_config([f"gpu={name}"], may_lack_paths=True).gpu.name for name in ("auto", "h100")} == {
        "auto",
        "h100",
    }


def test_a_gpu_without_bf16_is_refused_by_name_and_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gpu=t4 is not an option of gpu; it is older than Ampere .* without bf16"):
        compose_config(["gpu=t4"], may_lack_paths=True)
    for name, value in {"is_available": True, "set_device": None, "get_device_name": "Tesla T4"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(UserError, match=r"Tesla T4 has compute capability 7\.5, and GPU kernels need bf16"):
        join_ranks()


def test_the_old_setting_card_is_answered_with_gpu() -> None:
    for word in ("card=h100", "card.memory_gib=48", "+card.name=h100"):
        with pytest.raises(UserError, match=f"write {re.escape(word.replace('card', 'gpu'))}$"):
            compose_config([word], may_lack_paths=True)


def test_a_run_folder_with_old_names_still_loads(tmp_path: Path) -> None:
    config = compose_config(["gpu=h100", "gpu.tflops=800", "train.fused_kernels=none"], may_lack_paths=True)
    text = yaml.safe_dump(as_mapping(config))
    assert "\ngpu:\n" in text
    text = text.replace("\ngpu:\n", "\ncard:\n").replace("fused_kernels: none", "liger: false")
    (tmp_path / "config.yaml").write_text(text)
    loaded = load_config(tmp_path)
    assert (loaded.gpu, loaded.train) == (config.gpu, config.train)
