"""Paths of a GPU end on the pretended one, and the host waits in their steps only where it is listed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretend_cuda import groups, paths
from support.tiers import ci
from tools.kernel_cases import all_cases

GENERATION = r"grpo.*|generate (llama|qwen3_moe|kept-fp8)|captured .*"
"""Paths that sample with the paged engine."""
WAITS: dict[str, tuple[str, str]] = {
    "distlora/model/build.py CausalLM.hidden_states: item": (
        "variant llama-dynamic",
        "rope_type=dynamic reads the largest position",
    ),
    "distlora_kernels/operands.py Routing.of: copy to the host": (
        "variant qwen3-moe",
        "grouped products need sizes that 8 divides; other experts are computed one by one",
    ),
    **dict.fromkeys(
        (f"distlora/training/rollouts.py RolloutLoader._scored: copy {way} the host" for way in ("to", "from")),
        ("grpo.*", "rewards come from the host and are summed over ranks, once per rollout"),
    ),
    "distlora/generation/engine.py _Batch._append: copy to the host": (
        GENERATION,
        "chosen tokens and their log-probabilities come back, in one copy per token",
    ),
    **dict.fromkeys(
        (
            "distlora/generation/writer.py generate: copy from the host",
            "distlora/generation/writer.py generate: copy to the host",
            "distlora/generation/writer.py generate: item",
            "distlora/model/layer_wrapper.py Block._run.<locals>.layer: copy from the host",
        ),
        ("generate gpt_oss", "transformers' own loop generates for models without the paged engine"),
    ),
}
"""Where the host waits for the device, with the paths that do (a pattern) and the reason. Each such path must: a wait
that is gone leaves this table."""

ONLY_CI = (
    r"variant .*|ipo|simpo|grpo, temperature|(generate|captured) (qwen3_moe|kept-fp8)|"
    r"keep (fp8-compressed|(nvfp4|int4)-experts)"
)
FUSED = {
    "type qwen3": {"norm_forward_kernel", "gate_forward_kernel", "rotate_kernel"},
    "type qwen3_moe": {"norm_forward_kernel", "rotate_kernel"},
    "type qwen3_next": {"norm_forward_kernel", "gate_forward_kernel", "rotate_kernel"},
}
"""Fused kernels of types after the first in a process, beside experts and in a hybrid."""
SLOW = "layers with a state run transformers' slow reference code: causal_conv1d"
"""Start of the event of types whose fast packages are not installed."""
SLOW_TYPES = "type (granitemoehybrid|qwen3_next|lfm2)"
FOREIGN = ("liger kernels",)
"""Paths that launch kernels of other packages."""
DEFAULT = [name for name in paths.PATHS if not re.fullmatch(ONLY_CI, name)]
OTHERS = [name for name in paths.PATHS if name not in DEFAULT]


@pytest.mark.parametrize("names", [*groups.split(DEFAULT, 18), *map(ci, groups.split(OTHERS, 18))], ids=lambda g: g[0])
def test_paths_of_one_rank(names: Sequence[str], tmp_path: Path, subtests: pytest.Subtests) -> None:
    """Kernels do not run here: they are checked and recorded, and values are without meaning."""
    compiled = {case.kernel.__name__ for case in all_cases()}
    found = groups.in_process("run_paths", tmp_path / "seen.json", *names, mode="skip")
    for name, seen in found.items():
        with subtests.test(name):
            assert seen["error"] is None, seen["error"]
            assert set(seen["waits"]) == {place for place, (which, _) in WAITS.items() if re.fullmatch(which, name)}
            assert seen["empty"] == [], "these launches have no program"
            assert bool(seen["launches"]) == (name != "full"), "the kernels are not used"
            assert FUSED.get(name, set()) <= seen["launches"].keys()
            is_slow = any(event.startswith(SLOW) for event in seen["events"])
            assert is_slow == bool(re.fullmatch(SLOW_TYPES, name)), seen["events"]
            if name not in FOREIGN:
                assert seen["launches"].keys() <= compiled, "kernel_cases.py does not compile these for GPUs"


def test_without_a_compiler_it_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "COMPILER", "none-in-tests")
    with pytest.raises(pytest.skip.Exception, match="needs a C\\+\\+ compiler; there is no none-in-tests"):
        groups.in_process("run_paths", tmp_path / "seen.json", "qlora", mode="skip")
