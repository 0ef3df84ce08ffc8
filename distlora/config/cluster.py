"""Settings of a run's processes: nodes, launcher, scheduler, timeouts, and the sharding of the base over ranks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distlora.config.errors import Refusals, UserError, count_from, positive

SLURM_ONLY = (
    "partition",
    "account",
    "qos",
    "time_limit",
    "cpus_per_task",
    "memory",
    "sbatch",
    "setup",
    "container",
    "container_mounts",
    "port",
    "max_parallel",
)
"""Fields that say something to SLURM alone."""
OWN_OPTION = dict.fromkeys((*SLURM_ONLY, "signal_seconds", "requeue", "environment"), "slurm") | {
    "rdzv_endpoint": "torchrun"
}
"""The option of the group that has a field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Processes, nodes and the scheduler."""

    launcher: Literal["local", "torchrun", "slurm"] = "local"
    """Launcher of the workers. `local`: this command, on this node. `torchrun`: this command, run on each of `nodes`
    nodes that share the run folder. `slurm`: an sbatch script in the run folder."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 1
    """Worker processes per node: one per GPU, or that many CPU processes on a node without GPUs."""
    max_restarts: int = 3
    """Restarts of failed workers from the newest checkpoint, per start of the run."""
    timeout_seconds: float = 600.0
    """Time that a rank of a run may wait for the others in a step before the run ends, naming the rank and the step
    that hung. Loading and saving have longer. Nodes have as long to appear, at the start and after a loss."""

    rdzv_endpoint: str | None = None
    """Rendezvous endpoint host:port of cluster=torchrun. The host is one of the nodes and must be able to listen on
    that port. The same on each node."""

    partition: str | None = None
    """SLURM's partition; null: the cluster's default."""
    account: str | None = None
    """SLURM's account."""
    qos: str | None = None
    """SLURM's quality of service."""
    time_limit: str | None = None
    """SLURM's time limit, as sbatch takes it (12:00:00, 2-00:00:00); null: the partition's."""
    signal_seconds: int = 180
    """Seconds before the time limit at which the run receives the signal to save and stop. SLURM may be up to a minute
    early. Allow for a step and two saves: one may be under way."""
    requeue: bool = True
    """Requeue a job that was stopped after a save (time limit, preemption), or whose node failed; it then
    continues. One that was stopped before it had saved anything does once."""
    cpus_per_task: int | None = None
    """CPUs per node for its workers together; null: the cluster's default."""
    memory: str | None = None
    """Host memory per node, as sbatch's --mem takes it (0: all); null: the cluster's default."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch, one an entry: [--exclusive, --constraint=h100]."""
    setup: tuple[str, ...] = ()
    """Shell lines on every node before the workers start: [module load cuda, source .venv/bin/activate]."""
    container: str | None = None
    """Container image that the workers run in (srun --container-image, which needs pyxis); it must hold distlora."""
    container_mounts: tuple[str, ...] = ()
    """Folders that the container sees besides those of the run, its model and its data, as pyxis writes them:
    [/scratch:/scratch]."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the workers: {NCCL_SOCKET_IFNAME: ib0}. Credentials are refused: jobs get the
    environment of the command that submits them."""
    port: int | None = None
    """Rendezvous port on the first node of a SLURM job; of an array that of task 0, and the others
    have the next ones. null: one made from the job's id."""
    max_parallel: int | None = None
    """Jobs of a sweep (-m) that run at the same time; null: as many as SLURM gives."""

    @property
    def on_each_node(self) -> bool:
        """Return whether the user types the command on each of several nodes."""
        return self.launcher == "torchrun" and self.nodes > 1

    @property
    def ranks(self) -> int:
        """Worker processes in all."""
        return self.nodes * self.gpus_per_node


def sbatch_seconds(limit: str) -> int:
    """Return sbatch's time limit in seconds: `90` (minutes), `90:00`, `1:30:00`, `2-12`, `2-12:30`, `2-12:30:00`."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


RESIDENCY_RESERVE = {"cuda": 0.1, "cpu": 0.5}
"""Reserve with resident_blocks=auto: of a device's memory (a GPU's all, the CPU's free), what stays free for what a
first step does not show, evaluations' and samples' memory, fragments, other processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sharding of the base and reduction of gradients."""

    backend: Literal["fsdp2", "zero3"] = "fsdp2"
    """Backend that shards the frozen base over the ranks: PyTorch's FSDP2, or DeepSpeed's ZeRO-3, which can also keep
    it in host memory. The numbers are the same. One process needs no sharding and gets none."""
    shard_degree: int | Literal["node"] | None = None
    """Ranks per replica of the base. Each group of this many ranks shards one full replica; only gradients cross groups
    (HSDP). null: one replica over all ranks. `node`: one per node (cluster.gpus_per_node). 1: no sharding. A rank's
    memory for the base is 1/shard_degree of it."""
    expert_degree: int | Literal["replica"] = 1
    """Ranks that divide the experts of each layer: those of one replica (shard_degree), or 1. Each rank then computes
    its own experts with the tokens of all ranks, which are exchanged, instead of gathering the weights of all experts.
    That moves fewer bytes for few tokens. 1: every rank gathers all experts. `replica`: as many as a replica has, so
    that a resume may be on another number of ranks; where these cannot divide the experts, it gathers them as with 1.
    FSDP2 only."""
    experts: Literal["gathered", "on_demand"] = "gathered"
    """Gathering of a layer's experts. `gathered`: all, with the layer. `on_demand`: only those that some token of some
    rank chose, when they run; the host then waits for the router of each layer, and no gather runs ahead. That moves
    fewer bytes for few tokens; the numbers are the same. Needs parallel=zero3."""
    offload_base: bool = False
    """Keep each rank's shard of the base in pinned host memory; needs parallel=zero3. A GPU then holds up to three
    layers' weights, or two and the LM head's. Each gather copies the rank's shard over PCIe while the layer before
    computes."""
    deepspeed_config: str | None = None
    """JSON file of DeepSpeed's own settings for parallel=zero3: how far ahead it gathers, what it keeps gathered."""
    prefetch: bool = True
    """Gather the next decoder layer while this one computes. Two layers are then resident instead of one."""
    resident_blocks: int | Literal["auto"] = 0
    """Number of first decoder layers that stay gathered after their first gather. Each takes a whole layer's bytes on
    every rank and causes no more traffic. `auto`: as many as fit into the memory that the first step leaves free, less
    a reserve. Results do not depend on it."""
    bucket_mb: float = 4.0
    """MiB of adapter gradients in one all-reduce. Smaller buckets overlap earlier and cost more launches."""


FIRST_TORCH = (2, 12)
"""First torch whose FSDP2 shards frozen uint8 parameters; torch 2.11 makes every sharded parameter require a gradient.
"""


def check_torch(version: str) -> None:
    """Raise UserError for a torch whose FSDP2 cannot hold frozen uint8 parameters."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or tuple(map(int, match.groups())) < FIRST_TORCH:
        raise UserError(
            f"torch {version} cannot shard 4-bit weights (its FSDP2 refuses frozen uint8 parameters); "
            "install torch >= 2.12, or keep the base whole on every process with parallel.shard_degree=1"
        )


_ENDPOINT = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
_TIME_LIMIT = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})")
"""Time limits of sbatch: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CREDENTIAL = re.compile(
    r"((^|[_\s,])(API)?(KEY|TOKEN|SECRET|PAT|PWD|CREDENTIALS?)|PASS(WORD|WD|PHRASE)?)=|://[^/\s]+@", re.IGNORECASE
)
"""Assignments to variables like WANDB_API_KEY and HF_TOKEN, not NCCL_IB_PKEY; URLs with a user."""
SBATCH_SETTINGS = {
    ("--nodes", "-N"): "cluster.nodes",
    ("--partition", "-p"): "cluster.partition",
    ("--account", "-A"): "cluster.account",
    ("--qos", "-q"): "cluster.qos",
    ("--time", "-t"): "cluster.time_limit",
    ("--cpus-per-task", "-c"): "cluster.cpus_per_task",
    ("--mem",): "cluster.memory",
    ("--signal",): "cluster.signal_seconds",
    ("--requeue", "--no-requeue"): "cluster.requeue",
    ("--job-name", "-J"): "name",
    ("--array", "-a"): "-m, which makes an array",
    ("--container-image", "--container-mounts"): "cluster.container and cluster.container_mounts",
}
"""Options of sbatch that settings of ours stand for."""
SCRIPT_OPTIONS = "--ntasks -n --ntasks-per-node --chdir -D --output -o --error -e --open-mode".split()  # noqa: SIM905
"""Options of sbatch that the script needs as it has them."""
LEAST_RUNNING_SECONDS = 60
"""SLURM may warn of the time limit up to a minute early."""


def refused_in_cluster(cluster: ClusterConfig) -> Refusals:
    """Check nodes, processes and what the scheduler gets."""
    yield from positive(cluster, "nodes gpus_per_node timeout_seconds signal_seconds cpus_per_task max_parallel")
    if cluster.max_restarts < 0:
        yield "max_restarts= is not a valid count; set it to 0 for no restart, or more"
    yield from _launcher(cluster)
    if cluster.port is not None and not 1024 <= cluster.port < 65536:
        yield "port= is not a valid port for users; set {field}=29500 or leave it out"
    limit = cluster.time_limit
    if limit is not None and _TIME_LIMIT.fullmatch(limit) is None:
        yield (
            "time_limit= is not a valid time for sbatch; write {field}=12:00:00 (hours, minutes, seconds) or "
            "2-00:00:00 (days first)"
        )
    elif limit is not None and sbatch_seconds(limit) <= cluster.signal_seconds + LEAST_RUNNING_SECONDS:
        yield (
            f"time_limit= is {sbatch_seconds(limit)} s, and the run gets the signal to stop up to "
            f"{cluster.signal_seconds + LEAST_RUNNING_SECONDS} s before "
            f"(cluster.signal_seconds={cluster.signal_seconds} and SLURM's minute), so no time is left to train; set a "
            "longer cluster.time_limit"
        )
    for option in cluster.sbatch:
        if not option.startswith("-") or "\n" in option:
            yield f"cluster.sbatch has {option!r}, which is not an option of sbatch; write it as --name=value"
        name = re.split(r"[=\s]", option, maxsplit=1)[0] if option.startswith("--") else option[:2]
        if setting := next((setting for names, setting in SBATCH_SETTINGS.items() if name in names), None):
            yield f"cluster.sbatch has {option}, which is written from {setting}; set that"
        if name in SCRIPT_OPTIONS:
            what = "which the script must set itself (slurm/README.md)"
            yield f"cluster.sbatch has {option}, {what}; leave it out"
    shown = "and RUN and trackers would show it"
    for name in ("setup", "sbatch"):
        if any(map(_CREDENTIAL.search, getattr(cluster, name))):
            cure = "leave it out and export it before the command: jobs get your environment"
            yield f"cluster.{name} has a credential, {shown}; {cure}"
    for name, value in cluster.environment.items():
        if _VARIABLE.fullmatch(name) is None:
            cure = "write letters, digits and _"
            yield f"cluster.environment.{name} is not a valid name of an environment variable; {cure}"
        if _CREDENTIAL.search(f"{name}={value}"):
            cure = f"leave it out and run `export {name}=...` before the command: jobs get your environment"
            yield f"cluster.environment.{name} is a credential by its name or value, {shown}; {cure}"


def _launcher(cluster: ClusterConfig) -> Refusals:
    """Check that the launcher can start the nodes, and reads what is set."""
    launcher, endpoint = cluster.launcher, cluster.rdzv_endpoint
    if cluster.nodes > 1 and launcher == "local":
        yield (
            f"cluster.nodes={cluster.nodes} with cluster=local, which starts workers on this node only; set "
            "cluster=slurm, or cluster=torchrun and cluster.rdzv_endpoint=host:port on each node"
        )
    if cluster.on_each_node and endpoint is None:
        yield (
            f"cluster=torchrun with cluster.nodes={cluster.nodes} needs a rendezvous endpoint; set "
            "cluster.rdzv_endpoint=host:29500 with the name of one of the nodes, the same on each"
        )
    if endpoint is not None and launcher != "torchrun":
        yield f"rdzv_endpoint= has no effect with cluster={launcher}; leave it out, or set cluster=torchrun"
    for name in SLURM_ONLY if launcher != "slurm" else ():
        if getattr(cluster, name) not in (None, ()):
            yield f"{name}= has no effect with cluster={launcher}; leave it out, or set cluster=slurm"
    if endpoint is not None and _ENDPOINT.fullmatch(endpoint) is None:
        yield "rdzv_endpoint= is not host:port; write the name of one node and a free port of it, as in node01:29500"


def refused_in_parallel(parallel: ParallelConfig) -> Refusals:
    """Check how the base is sharded."""
    is_zero3, degree, blocks = parallel.backend == "zero3", parallel.shard_degree, parallel.resident_blocks
    if parallel.offload_base and not is_zero3:
        why = "FSDP2 keeps its shards where they are computed with"
        yield f"parallel.offload_base=true is DeepSpeed's: {why}; add parallel=zero3"
    if parallel.deepspeed_config is not None and not is_zero3:
        cure = "add parallel=zero3, or leave it out"
        yield f"deepspeed_config= has no effect with parallel.backend={parallel.backend}; {cure}"
    if degree not in (None, "node") and not count_from(degree, least=1):
        cure = "set it to 1 or more, to node (the ranks of one node), or to null (all ranks)"
        yield f"shard_degree= is not a valid number of ranks; {cure}"
    if blocks != "auto" and not count_from(blocks, least=0):
        yield "resident_blocks= is not a valid number of blocks; set it to 0 or more, or to auto (as many as fit)"
    if blocks != 0 and is_zero3:
        yield (
            "resident_blocks= is FSDP2's: DeepSpeed keeps small tensors gathered, by "
            "stage3_param_persistence_threshold of parallel.deepspeed_config; leave it out, or set parallel=fsdp2"
        )
    yield from positive(parallel, "bucket_mb")
    if parallel.expert_degree != "replica" and not count_from(parallel.expert_degree, least=1):
        cure = "set it to 1 (every rank gathers all experts), or to replica (the ranks that shard a replica)"
        yield f"expert_degree= is not a valid number of ranks; {cure}"
    if parallel.expert_degree != 1 and is_zero3:
        yield "expert_degree= is FSDP2's: DeepSpeed gathers whole layers; leave it out, or set parallel=fsdp2"
    if parallel.experts != "gathered" and not is_zero3:
        cure = "add parallel=zero3, or leave it out"
        yield f"experts= needs parallel=zero3: FSDP2 gathers whole layers; {cure}"
