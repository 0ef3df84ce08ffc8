"""Ways to divide a run over ranks that cannot be: each is refused before any worker starts, with what can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distlora.config import Config, UserError, check_ranks
from distlora.config.file import as_mapping
from distlora_launcher.compose.planning import check_planned, planned_model
from support.family_models import config_for
from support.runs import FULL
from support.small_models import write_model_folder

QWEN = "qwen3_moe-refused"
NODES = {"launcher": "torchrun", "nodes": 2, "rdzv_endpoint": "here:29500"}
WHOLE = r"has no effect with parallel.shard_degree=1, where every rank holds the full base"
CASES: list[tuple[str, int, dict[str, Any], str]] = [
    # (model, ranks, settings of `parallel`, what the message says)
    ("llama", 6, {"shard_degree": 4}, r"shard_degree=4 does not divide the 6 processes .*=3 \(of 1, 2, 3, 6\)"),
    ("llama", 4, {"shard_degree": 8}, r"shard_degree=8 does not divide the 4 processes .*=4 \(of 1, 2, 4\)"),
    ("llama", 1, {"shard_degree": 2}, r"shard_degree=2 does not divide the 1 process of this run"),
    ("llama", 2, {"shard_degree": 0}, r"shard_degree=0 is not a valid number of ranks"),
    ("llama", 2, {"shard_degree": "nodes"}, r"shard_degree=nodes is not a valid number of ranks; .* to node"),
    ("llama", 2, {"shard_degree": 1.5}, r"shard_degree=1.5 must be of type int"),
    ("llama", 2, {"shard_degree": 1, "backend": "zero3"}, WHOLE),
    ("llama", 2, {"shard_degree": 1, "resident_blocks": 2}, WHOLE),
    ("llama", 2, {"shard_degree": 1, "resident_blocks": "auto"}, WHOLE),
    ("llama", 2, {"resident_blocks": -1}, "resident_blocks=-1 is not a valid number of blocks; set it to 0 or more"),
    ("llama", 2, {"resident_blocks": 2, "backend": "zero3"}, "resident_blocks=2 is FSDP2's: DeepSpeed keeps"),
    (QWEN, 4, {"expert_degree": 3}, r"expert_degree=3 is not the number of ranks .* which is 4 \("),
    (QWEN, 4, {"expert_degree": 4, "shard_degree": 2}, r"set parallel.expert_degree=replica, or 1"),
    (QWEN, 1, {"expert_degree": 2}, r"which is 1 .* 1 process\); set parallel.expert_degree=1"),
    (QWEN, 2, {"expert_degree": 0}, r"parallel.expert_degree=0 is not a valid number"),
    (QWEN, 2, {"expert_degree": 2, "backend": "zero3"}, r"expert_degree=2 is FSDP2's"),
    (QWEN, 3, {"expert_degree": 3}, r"expert_degree=3 does not divide the experts"),
    ("mixtral", 2, {"expert_degree": 2}, r"expert_degree=2 does not divide the experts of mixtral"),
    ("llama", 1, {"expert_degree": "replica"}, r"expert_degree=replica has no effect on llama"),
    ("llama", 2, {"expert_degree": 2}, r"expert_degree=2 has no effect on llama"),
    (QWEN, 2, {"experts": "on_demand"}, r"experts=on_demand needs parallel=zero3: FSDP2 gathers whole layers"),
    ("llama", 2, {"experts": "on_demand", "backend": "zero3"}, r"experts=on_demand has no effect on llama"),
]


def check(folder: Path, ranks: int, parallel: dict[str, Any], **sections: Any) -> Config:
    config = config_for(folder, parallel=parallel, **{"cluster": {"gpus_per_node": ranks}} | sections)
    check_planned(config, planned_model(config))
    return config


@pytest.mark.parametrize(("model", "ranks", "parallel", "said"), CASES, ids=[said[:48] for *_, said in CASES])
def test_ranks_that_cannot_be_divided_so_are_refused(
    folders: Path, model: str, ranks: int, parallel: dict[str, Any], said: str
) -> None:
    if model == QWEN and not (folders / QWEN).exists():
        write_model_folder(folders / QWEN, QWEN, hidden_size=128, head_dim=32, moe_intermediate_size=64)
    with pytest.raises(UserError, match=said):
        check(folders / model, ranks, parallel)


def test_what_is_trained_is_neither_resident_nor_verified(folders: Path) -> None:
    for sections, said in (
        ({"parallel": {"resident_blocks": "auto"}}, "resident_blocks=auto keeps blocks as they were gathered once"),
        ({"train": {"verify": True}}, r"train\.verify has no effect with adapter=full"),
    ):
        with pytest.raises(UserError, match=said):
            config_for(folders / "llama", **FULL, **sections)


def test_a_machines_ranks_are_a_copy_and_a_resume_on_others_is_refused_by_the_worker(folders: Path) -> None:
    config = config_for(folders / "llama", cluster=NODES | {"gpus_per_node": 2}, parallel={"shard_degree": "node"})
    assert config.shard_degree(4) == config.shard_degree(6) == 2
    assert as_mapping(config)["parallel"]["shard_degree"] == "node"
    check_ranks(config, 6)
    with pytest.raises(UserError, match=r"node \(cluster.gpus_per_node=2\) does not divide the 3 processes"):
        check_ranks(config, 3)
    alone = {"cluster": NODES | {"gpus_per_node": 1}, "parallel": {"shard_degree": "node", "backend": "zero3"}}
    with pytest.raises(UserError, match=r"no effect with parallel.shard_degree=node \(cluster.gpus_per_node=1\), wh"):
        config_for(folders / "llama", **alone)
