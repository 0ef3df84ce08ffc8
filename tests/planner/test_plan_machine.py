"""The machine and the model that a run is planned for: by name, by what is here, by what the user knows better."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distlora.config import Config, UserError
from distlora.config.plan import CONTEXT_BYTES, GPUS
from distlora.planner.machine import LocalHardware, Machine, machine_of
from distlora.planner.model import find_model
from distlora.system import host_memory
from distlora_launcher.compose import planning
from support.launcher_fakes import write_model
from support.plan_inputs import composed

MIB, GIB = 2**20, 2**30
TWO_4090S = LocalHardware(devices=(("NVIDIA GeForce RTX 4090", 24_564 * MIB),) * 2, host_bytes=64 * GIB)


def config_of(*words: str) -> Config:
    return composed(*words, model={"path": "/model"}, data={"path": "/data.jsonl"})


def machine(found: LocalHardware | None, *words: str) -> Machine:
    config = config_of(*words)
    return machine_of(config.gpu, config.cluster, found=found)


def test_a_named_gpu_is_planned_for_wherever_one_is() -> None:
    named = machine(LocalHardware(host_bytes=8 * GIB), "gpu.name=h100", "cluster.gpus_per_node=8", "cluster.nodes=1")
    gpu = GPUS["h100"]
    assert (named.name, named.gpu, named.is_gpu) == ("H100 SXM 80 GB", gpu, True)
    assert named.usable_bytes == gpu.memory_bytes - CONTEXT_BYTES
    assert (named.flops, named.bandwidth, named.link) == (gpu.flops, gpu.bandwidth, gpu.link)
    assert (named.host_link, named.network) == (gpu.host_link, gpu.network)
    assert (named.ranks, named.ranks_per_machine) == (8, 8)
    assert named.host_bytes is None, "this machine has no such GPU: its memory says nothing of that one's"
    assert machine(TWO_4090S, "gpu.name=rtx4090").host_bytes == 64 * GIB


def test_what_the_user_knows_better_wins_over_the_table() -> None:
    words = ("gpu.memory_gib=48", "gpu.tflops=100", "gpu.memory_gb_per_second=900", "gpu.link_gb_per_second=56")
    rest = ("gpu.host_gb_per_second=12", "gpu.network_gb_per_second=3", "gpu.price_per_hour=0.4")
    for gpu in ((), ("gpu.name=rtx4090",)):
        found = machine(LocalHardware(), *gpu, *words, *rest)
        assert found.usable_bytes == 48 * GIB - CONTEXT_BYTES
        assert (found.flops, found.bandwidth, found.link) == (100e12, 900e9, 56e9)
        assert (found.host_link, found.network, found.price_per_hour) == (12e9, 3e9, 0.4)
        assert found.is_gpu
    assert machine(LocalHardware(), "gpu.memory_gib=48").name == "a GPU of 48 GiB"
    assert machine(LocalHardware(), "gpu.name=h100", "gpu.memory_gib=40").name == "H100 SXM, 40 GiB"
    assert machine(LocalHardware(), "gpu.name=h100", "gpu.memory_gib=79").name == "H100 SXM 80 GB"


def test_an_unnamed_gpu_is_what_this_machine_has() -> None:
    found = machine(TWO_4090S, "cluster.gpus_per_node=2")
    assert (found.gpu, found.name, found.host_bytes) == (GPUS["rtx4090"], "RTX 4090 24 GB", 64 * GIB)
    assert found.usable_bytes == GPUS["rtx4090"].usable_bytes
    mixed = LocalHardware(devices=(("NVIDIA L40S", 46_068 * MIB), ("NVIDIA RTX 4000 SFF Ada", 20_475 * MIB)))
    unknown = machine(mixed, "cluster.gpus_per_node=2")
    assert (unknown.gpu, unknown.name) == (None, "NVIDIA RTX 4000 SFF Ada, 20 GiB")
    assert (unknown.usable_bytes, unknown.flops) == (20_475 * MIB - CONTEXT_BYTES, None)
    assert machine(mixed).gpu == GPUS["l40s"], "one process uses the first"
    slice_of_one = machine(LocalHardware(devices=None, host_bytes=GIB))
    assert (slice_of_one.is_gpu, slice_of_one.usable_bytes, slice_of_one.name) == (True, None, "a GPU")


def test_a_machine_without_a_gpu_has_its_memory_for_its_processes() -> None:
    cpu = machine(LocalHardware(host_bytes=12 * GIB), "cluster.gpus_per_node=3")
    assert (cpu.name, cpu.is_gpu, cpu.usable_bytes, cpu.host_bytes) == ("CPU", False, 4 * GIB, 12 * GIB)
    assert cpu.flops is None
    assert machine(None).usable_bytes is None
    assert machine(LocalHardware(host_bytes=1), "gpu.tflops=0.5").flops == 0.5e12


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_of_machines_that_are_elsewhere_nothing_is_claimed(launcher: str) -> None:
    cluster = (f"cluster.launcher={launcher}", "cluster.nodes=2", "cluster.rdzv_endpoint=a:29500")[
        : 3 if launcher == "torchrun" else 2
    ]
    unknown = machine(None, *cluster, "cluster.gpus_per_node=4")
    assert (unknown.gpu, unknown.usable_bytes, unknown.host_bytes) == (None, None, None)
    assert (unknown.flops, unknown.network, unknown.ranks, unknown.is_gpu) == (None, None, 8, True)
    assert machine(None, *cluster, "cluster.gpus_per_node=4", "gpu.name=a100_40gb").gpu == GPUS["a100_40gb"]
    assert machine(TWO_4090S, *cluster, "cluster.gpus_per_node=2").gpu == GPUS["rtx4090"], "asked on one of them"


QUERY = "--query-gpu=name,memory.total,uuid,mig.mode.current --format=csv,noheader,nounits"
H100 = "NVIDIA H100 80GB HBM3, 81559, GPU-1c, Disabled"
GEFORCE = "NVIDIA GeForce RTX 4090, 24564, GPU-8f, [N/A]"
SMALL = "NVIDIA T400 4GB, 4096, GPU-8e, [N/A]"


class Driver:
    """An nvidia-smi that says what it is told to, beside as many device files."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.monkeypatch = place, monkeypatch
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")

    def devices(self, *gpus: str, files: int | None = None, **environment: str) -> tuple[tuple[str, int], ...] | None:
        """here.devices() of a machine with these GPUs; of none the program fails."""
        said = "".join(f"echo '{gpu}'\n" for gpu in gpus) or "echo 'it could not reach the driver'; exit 9\n"
        (self.place / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$*" = "{QUERY}" ] || exit 6\n{said}')
        (self.place / "nvidia-smi").chmod(0o755)
        planning.devices.cache_clear()
        with self.monkeypatch.context() as within:
            for name, value in environment.items():
                within.setenv(name, value)
            count = len(gpus) if files is None else files
            within.setattr(planning, "gpu_count", lambda: count)
            try:
                return planning.devices()
            finally:
                planning.devices.cache_clear()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


BIG, MIDDLE, LEAST = (
    ("NVIDIA H100 80GB HBM3", 81_559 * MIB),
    ("NVIDIA GeForce RTX 4090", 24_564 * MIB),
    ("NVIDIA T400 4GB", 4096 * MIB),
)


def test_gpus_are_asked_of_the_driver_s_own_program(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver.devices(GEFORCE, GEFORCE) == (MIDDLE, MIDDLE)
    assert driver.devices(GEFORCE, files=0) == (MIDDLE,), "WSL has no device files"
    assert driver.devices(GEFORCE, CUDA_VISIBLE_DEVICES="") == ()
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 7 * GIB)
    monkeypatch.setattr(planning, "devices", lambda: (MIDDLE,))
    assert (planning.found_here().devices, planning.found_here().host_bytes) == ((MIDDLE,), 7 * GIB)
    assert planning.found_here(asks_driver=False).devices == ()


def test_of_gpus_that_differ_those_that_cuda_may_mean_are_taken(driver: Driver) -> None:
    """By its default it numbers the fastest first, whatever the bus says; the largest stand for those."""
    assert driver.devices(SMALL, GEFORCE, H100) == (BIG, MIDDLE, LEAST)
    assert driver.devices(SMALL, GEFORCE, H100, CUDA_VISIBLE_DEVICES="0") == (BIG,)
    assert driver.devices(SMALL, GEFORCE, CUDA_VISIBLE_DEVICES="0,1,2") is None, "there is no third"
    by_bus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert driver.devices(SMALL, GEFORCE, H100, **by_bus) == (LEAST, MIDDLE, BIG)
    assert driver.devices(SMALL, GEFORCE, H100, **by_bus, CUDA_VISIBLE_DEVICES="2, GPU-8f,-1,0") == (BIG, MIDDLE)
    assert driver.devices(SMALL, GEFORCE, CUDA_VISIBLE_DEVICES="GPU-8f,GPU-8e") == (MIDDLE, LEAST)
    assert driver.devices(SMALL, GEFORCE, CUDA_VISIBLE_DEVICES="GPU-8") is None, "of both"


def test_of_gpus_that_the_driver_does_not_describe_nothing_is_claimed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may have GPUs and no such program: they are used all the same, so this is no CPU."""
    sliced = H100.replace("Disabled", "Enabled")
    assert driver.devices(sliced) is None
    assert driver.devices(sliced, GEFORCE, CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES="1") == (MIDDLE,)
    assert driver.devices(H100, CUDA_VISIBLE_DEVICES="MIG-7d") is None
    assert driver.devices("NVIDIA GB10, [N/A], GPU-0a, [N/A]") is None
    assert driver.devices(files=2) is None
    assert driver.devices(files=0) == ()
    monkeypatch.setenv("PATH", "")
    assert driver.devices(GEFORCE) is None
    assert driver.devices(files=0) == ()


def test_a_model_that_is_built_in_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    found = planning.planned_model(
        config_of("model.path=unsloth/Llama-3.3-70B-Instruct", "model.new_tokens=['<|a|>','<|b|>']")
    )
    assert (found.name, found.source, found.note) == ("unsloth/Llama-3.3-70B-Instruct", "built in", None)
    assert (found.shapes.vocabulary, found.shapes.num_layers) == (128_258, 80)
    assert found.stored_bytes == 2 * 70_553_706_496
    with pytest.raises(UserError, match=r"nor built in \(did you mean 'Qwen/Qwen2.5-7B'\?\)"):
        find_model(config_of("model.path=Qwen/Qwen2.5-8B"))
    with pytest.raises(UserError, match=r"data.sequence_length=8,192 is beyond the model's 4,096 positions"):
        find_model(config_of("model.path=NousResearch/Llama-2-7b-hf", "data.sequence_length=8192"))


def test_what_the_hub_s_cache_has_is_planned_for_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the name is one that is built in: a model of one's own may lie there under it."""
    repository = tmp_path / "models--Qwen--Qwen2.5-7B"
    write_model(repository / "snapshots" / "0a1b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    words = ("model.path=Qwen/Qwen2.5-7B", "data.sequence_length=64")
    found = planning.planned_model(config_of(*words))
    assert (found.name, found.source) == ("Qwen/Qwen2.5-7B", "hub cache")
    assert found.settings == json.loads((repository / "snapshots" / "0a1b" / "config.json").read_text())
    (repository / "snapshots" / "0a1b" / "config.json").unlink()
    assert planning.planned_model(config_of(*words)).source == "built in"
