"""Cards: known by a device's whole name, with figures that belong together, and each with its file in conf/."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distlora.config import CardConfig, UserError
from distlora.config.gpus import (
    CARDS,
    PCIE_4,
    PCIE_5,
    card_named,
)
from distlora_launcher.compose.compose import compose_config

CONF = Path(__file__).parent.parent / "conf" / "card"
DEVICES = {
    "NVIDIA B200": "b200",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200_nvl",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100_pcie",
    "NVIDIA H100 NVL": "h100_nvl",
    "NVIDIA H800": "h800",
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "A100-SXM4-80GB": "a100_80gb",
    "NVIDIA A100-PCIE-40GB": "a100_pcie_40gb",
    "NVIDIA A100 80GB PCIe": "a100_pcie_80gb",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA L40S": "l40s",
    "NVIDIA L40": "l40",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000_ada",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA A40": "a40",
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA L4": "l4",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 3090": "rtx3090",
}
OTHERS = (
    *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti"),
    *("NVIDIA RTX A1000", "NVIDIA RTX A4000", "Tesla T4", "NVIDIA A10-24Q", "GRID A100-10C", "NVIDIA A100-SXM-64GB"),
    *("NVIDIA GH200 144G HBM3e", "NVIDIA GB200", "NVIDIA H20"),
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
)


def test_a_card_is_known_by_its_whole_name() -> None:
    for device, name in DEVICES.items():
        card = card_named(device)
        assert card is not None, device
        assert card.name == name
    assert set(DEVICES.values()) == set(CARDS)
    assert not [device for device in OTHERS if card_named(device) is not None]


def test_the_figures_of_a_card_belong_together() -> None:
    for name, card in CARDS.items():
        assert card.name == name
        gigabytes = int(card.title.split()[-2])
        # A little is kept from CUDA (ECC in GDDR6 keeps a sixteenth), and makers' GB are GiB but for H200's and B200's.
        assert 0.91 * gigabytes <= card.memory_bytes / 2**30 < gigabytes
        assert card.usable_bytes < card.memory_bytes
        assert card.link > card.host_link if card.has_nvlink and name != "gh200" else card.link <= 450e9
        assert card.has_nvlink or card.link in (PCIE_4, PCIE_5)
        # No card does less than 100 or more than 450 operations a byte of its memory: a slip in either would show.
        assert 75 < card.flops / card.bandwidth < 450, name


def test_every_card_has_its_file_and_every_file_its_card() -> None:
    files = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    assert set(files) == {"auto", *CARDS}
    assert all(files[name] == {"defaults": ["auto"], "name": name} for name in CARDS), (
        "figures stand in the table alone"
    )
    config = compose_config(["card=rtx4090", "card.memory_gib=48"], may_lack_paths=True)
    assert (config.card.name, config.card.memory_gib) == ("rtx4090", 48.0)


def test_a_card_that_is_not_known_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"card=rtx4900: the options of card are .*did you mean 'rtx4090'\?"):
        compose_config(["card=rtx4900"], may_lack_paths=True)
    with pytest.raises(UserError, match=r"card.name='h10' is not one of auto, .*did you mean 'h100'\?"):
        CardConfig(name="h10")
