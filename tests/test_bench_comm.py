"""`distlora bench comm`: what is calculated for any model, what is refused, and, counted on real ranks, the peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distlora.architecture.known import ARCHITECTURES
from distlora.architecture.shapes import shapes_of
from distlora.bench.comm import MODELS, Counted, StepBytes, agreement, counted_table, size
from distlora.config import AdapterConfig
from distlora.planner import traffic
from distlora_launcher.cli import main
from distlora_launcher.cli.bench import comm
from family_models import edit_config


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main.main(["bench", "comm", *words]) == 0
    return capsys.readouterr().out


def calculated(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(printed(capsys, *words, "--json"))["calculated"]
    return rows


def test_gathers_do_not_grow_with_accumulation_in_blocks_and_the_peers_do(capsys: pytest.CaptureFixture[str]) -> None:
    rows = calculated(capsys, "--ranks", "8", "--accumulation", "1,8")
    of = {(row["model"], row["who"], row["accumulation"]): row for row in rows}
    for model in MODELS:
        for who in {row["who"] for row in rows}:
            once, eight = (of[model, who, n]["step"]["gathered"] for n in (1, 8))
            assert eight == once * (1 if "accumulate=block" in who else 8), who
    copies = calculated(capsys, "--ranks", "64", "--accumulation", "1")
    into = {row["who"]: row["into_a_machine"] for row in copies if row["model"] == "Llama 3.1 70B"}
    reduced = next(row["step"]["reduced"] for row in copies if row["model"] == "Llama 3.1 70B")
    assert into["distlora, NF4, accumulate=block, shard_degree=8"] == 2 * reduced * 7 // 8, "nothing of the base"
    assert into["distlora, NF4, accumulate=block"] > 40 * reduced
    seventy = of["Llama 3.1 70B", "distlora, NF4, accumulate=block", 8]
    # 68.5e9 weights in blocks at 4.127 bits, twice; embedding and head of 1.05e9 numbers in bf16, once.
    assert seventy["step"]["gathered"] == pytest.approx(2 * 68.45e9 * 4.127 / 8 + 2 * 2.1e9, rel=2e-3)
    assert seventy["received"] == seventy["step"]["gathered"] * 7 // 8 + 2 * seventy["step"]["reduced"] * 7 // 8
    shapes = shapes_of(ARCHITECTURES[MODELS["Llama 3.1 70B"]], "70B")
    packed = 2 * traffic.block_bytes(shapes.block, 8, quantized=True, itemsize=2)
    assert packed / (2 * sum(w.numel for w in shapes.block) * 4.127 / 8) < 1.02, "padding is nothing on such shapes"


def test_settings_and_the_model_in_a_folder_are_those_of_a_run(
    capsys: pytest.CaptureFixture[str], folders: Path
) -> None:
    words = (f"model.path={folders / 'qwen3'}", "--ranks", "3", "--accumulation", "2")
    shapes = shapes_of(json.loads((folders / "qwen3" / "config.json").read_text()), "qwen3")
    for setting, adapter in (
        ("adapter.target_modules=qv", AdapterConfig(target_modules="qv")),
        ("adapter=dora", AdapterConfig(use_dora=True)),
        ("optim.lr=1e-3", AdapterConfig(target_modules="all-linear")),
    ):
        ours = calculated(capsys, *words, setting)[0]
        assert ours["step"]["reduced"] == 4 * sum(a.numel for block in shapes.adapters(adapter) for a in block)
    step, resident = (
        calculated(capsys, *words, f"parallel.resident_blocks={count}", "train.dtype=fp32")[0] for count in (0, 2)
    )
    block = traffic.block_bytes(shapes.block, 3, quantized=True, itemsize=4)
    assert step["step"]["gathered"] - resident["step"]["gathered"] == 2 * 2 * 2 * block, "two passes, there and back"
    assert resident["held"] - step["held"] == 2 * block
    zero3 = calculated(capsys, *words, "parallel=zero3")
    assert zero3[0]["who"] == "distlora, NF4, ZeRO-3, accumulate=step"
    full = calculated(capsys, *words, "adapter=full", "quant=none")
    assert [row["who"] for row in full] == [f"distlora, everything trained, accumulate={a}" for a in ("step", "block")]
    assert full[0]["step"]["scattered"] > 0
    text = printed(capsys, *words)
    assert "| qwen3, 3 ranks |" in text
    assert text.count("\n| distlora, NF4") == 2


def test_a_copy_on_each_machine_is_cut_by_those_that_the_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    once = ("--accumulation", "1")
    for words, degrees in (
        (("parallel=hsdp", "--ranks", "4,8,16"), {4: 4, 8: 8, 16: 8}),
        (("parallel=hsdp", "--ranks", "4,8", "cluster.gpus_per_node=4"), {4: 4, 8: 4}),
    ):
        rows = [row for row in calculated(capsys, *words, *once) if "distlora" in row["who"]]
        assert {row["ranks"]: row["step"]["shards"] for row in rows} == degrees
        assert all(row["step"]["shards"] == degrees[row["ranks"]] for row in rows)
        for row in rows:
            several = row["ranks"] > degrees[row["ranks"]]
            assert row["into_a_machine"] == (row["step"]["reduced"] if several else 0), "the gradients of two machines"
    text = printed(capsys, "--ranks", "8", "cluster.gpus_per_node=4", *once)
    assert "| into a machine of 4 |" in text
    assert "| distlora, NF4, accumulate=block, shard_degree=4 |" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["parallel=hsdp", "--ranks", "8,12"], "parallel.shard_degree=node is a copy of the base on each machine, and"),
        (["--ranks", "eight"], "--ranks=eight are no positive numbers; write --ranks 8,64"),
        (["--accumulation", "0"], "--accumulation=0"),
        (["--rank", "8"], "--ranks"),
        (["Llama-8B"], "'Llama-8B' is no setting; write setting=value"),
        (["adapter.rr=8"], "adapter.rr"),
        (["model.path=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "comm", *words]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert named in output.err


def test_a_config_that_lacks_a_size_is_refused_by_its_name(
    capsys: pytest.CaptureFixture[str], folders: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((folders / "llama" / "config.json").read_text())
    edit_config(tmp_path, num_attention_heads=None)
    assert main.main(["bench", "comm", f"model.path={tmp_path}"]) == 2
    assert "num_attention_heads" in capsys.readouterr().err


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys, distlora_launcher.cli.bench.comm as c; c.main(['--ranks', '8']); "
        "print({'torch', 'transformers', 'accelerate'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("set()\n")


def test_what_differs_is_shown() -> None:
    assert agreement((10, 0, 2), (10, 0, 2)) == "equal"
    assert agreement((100, 0, 0), (101, 0, 0)) == "+1.00% (differs: 101, 0, 0)"
    assert [size(n) for n in (0, 999, 1000, 1_234_567, 74_800_000_000, 2_250_000_000_000)] == [
        *("0", "999 B", "1 kB", "1.23 MB", "74.8 GB", "2.25 TB")
    ]
    row = comm.small_rows([1])[0]
    step = row.step
    carried = {"gathered": step.gathered, "scattered": 0, "reduced": step.reduced}
    counted = Counted(who=row.who, accumulation=1, by_backend=carried, loopback=None, **carried)
    assert list(counted_table([row], [counted]))[-1].count("equal") == 2
    off = Counted(who=row.who, accumulation=1, by_backend=carried, loopback=None, **{**carried, "gathered": 1})
    assert "differs" in list(counted_table([row], [off]))[-1]
    assert StepBytes(gathered=0, shards=1, world=1).received == 0


@pytest.mark.slow
@pytest.mark.parametrize(("accumulations", "tied"), [([1, 3], False), ([2], True)])
def test_the_peers_carry_what_is_calculated_where_they_shard_and_the_network_what_the_rings_need(
    accumulations: list[int], tied: bool
) -> None:
    """accelerate and bitsandbytes on two ranks of their own; what comes in over loopback is ours and theirs to 5 %."""
    rows, counted = comm.small_rows(accumulations, tied=tied), comm.measure(accumulations, tied=tied)
    assert counted is not None
    assert [row.who for row in rows] == [each["who"] for each in counted]
    for row, each in zip(rows, counted, strict=True):
        carried = {kind: each[kind] for kind in ("gathered", "scattered", "reduced")}
        assert carried == {kind: getattr(row.step, kind) for kind in carried}, row.who
        assert each["by_backend"] in (None, carried)
        if each["loopback"] is not None:
            # gloo sums a reduce-scatter as an all-reduce. Besides: TCP's headers and acknowledgements, the barriers.
            needed = 2 * row.step.received + row.step.scattered
            assert needed < each["loopback"] < 1.05 * needed + 100e3, row.who
