"""Runs on a real SLURM of two nodes, which this file starts on loopback and ends (tests/slurm_cluster.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import slurm_cluster
from slurm_cluster import SlurmCluster, running_cluster

MISSING = slurm_cluster.missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no SLURM: {MISSING}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Nodes n1 and n2 with two GPUs each."""
    with running_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


def test_the_cluster_is_two_machines_with_their_own_names_addresses_and_gpus(cluster: SlurmCluster) -> None:
    said = cluster.call(
        "srun", "-N2", "--gpus-per-node=2", "bash", "-c", "echo $(hostname) $(hostname -i) $CUDA_VISIBLE_DEVICES"
    )
    first, second = sorted(line.split() for line in said.splitlines())
    assert (first[0], first[2], second[0], second[2]) == ("n1", "0,1", "n2", "0,1")
    assert first[1] != second[1]
