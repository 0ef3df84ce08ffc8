"""Settings of a run's processes: nodes, launcher, scheduler, timeouts, and the sharding of the base over ranks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from distlora.config.errors import UserError, require, require_choices, require_positive

_ENDPOINT = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
_TIME_LIMIT = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})")
"""Time limits of sbatch: minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CREDENTIAL = re.compile(
    r"((^|[_\s,])(API)?(KEY|TOKEN|SECRET|PAT|PWD|CREDENTIALS?)|PASS(WORD|WD|PHRASE)?)=|://[^/\s]+@", re.IGNORECASE
)
"""Assignments to variables like WANDB_API_KEY and HF_TOKEN, not NCCL_IB_PKEY; URLs with a user."""

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

OPTION_SETTINGS = {
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
FIXED_OPTIONS = (
    "--ntasks",
    "-n",
    "--ntasks-per-node",
    "--chdir",
    "-D",
    "--output",
    "-o",
    "--error",
    "-e",
    "--open-mode",
)
"""Options of sbatch that the script needs as it has them."""

LEAST_RUNNING_SECONDS = 60
"""SLURM may warn of the time limit up to a minute early."""


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

    def __post_init__(self) -> None:
        require_choices("cluster", self)
        require_positive("cluster", self, "nodes", "gpus_per_node", "timeout_seconds", "signal_seconds")
        for name in ("cpus_per_task", "max_parallel"):
            require_positive("cluster", self, name)
        require(
            self.max_restarts >= 0,
            f"cluster.max_restarts={self.max_restarts} is not a valid count; set it to 0 for no restart, or more",
        )
        self._check_launcher()
        require(
            self.port is None or 1024 <= self.port < 65536,
            f"cluster.port={self.port} is not a valid port for users; set cluster.port=29500 or leave it out",
        )
        require(
            self.time_limit is None or _TIME_LIMIT.fullmatch(self.time_limit) is not None,
            f"cluster.time_limit={self.time_limit} is not a valid time for sbatch; write cluster.time_limit=12:00:00 "
            "(hours, minutes, seconds) or 2-00:00:00 (days first)",
        )
        if self.time_limit is not None:
            seconds = sbatch_seconds(self.time_limit)
            require(
                seconds > self.signal_seconds + LEAST_RUNNING_SECONDS,
                f"cluster.time_limit={self.time_limit} is {seconds} s, and the run gets the signal to stop up to "
                f"{self.signal_seconds + LEAST_RUNNING_SECONDS} s before (cluster.signal_seconds={self.signal_seconds} "
                "and SLURM's minute), so no time is left to train; set a longer cluster.time_limit",
            )
        self._check_options()
        for name in ("setup", "sbatch"):
            require(
                not any(_CREDENTIAL.search(word) for word in getattr(self, name)),
                f"cluster.{name} has a credential, and RUN and trackers would show it; leave it out and export it "
                "before the command: jobs get your environment",
            )
        for name in self.environment:
            require(
                _VARIABLE.fullmatch(name) is not None,
                f"cluster.environment.{name} is not a valid name of an environment variable; write letters, digits and "
                "_",
            )
            require(
                _CREDENTIAL.search(f"{name}={self.environment[name]}") is None,
                f"cluster.environment.{name} is a credential by its name or value, and RUN and trackers would show it; "
                f"leave it out and run `export {name}=...` before the command: jobs get your environment",
            )

    def _check_options(self) -> None:
        """Refuse options of sbatch that the script has from another setting, or needs as they are."""
        for option in self.sbatch:
            require(
                option.startswith("-") and "\n" not in option,
                f"cluster.sbatch has {option!r}, which is not an option of sbatch; write it as --name=value",
            )
            name = re.split(r"[=\s]", option, maxsplit=1)[0] if option.startswith("--") else option[:2]
            for names, setting in OPTION_SETTINGS.items():
                require(name not in names, f"cluster.sbatch has {option}, which is written from {setting}; set that")
            require(
                name not in FIXED_OPTIONS,
                f"cluster.sbatch has {option}, which the script must set itself (slurm/README.md); leave it out",
            )

    def _check_launcher(self) -> None:
        """Refuse nodes that the launcher cannot start, and settings that it does not read."""
        require(
            self.nodes == 1 or self.launcher != "local",
            f"cluster.nodes={self.nodes} with cluster=local, which starts workers on this node only; set "
            "cluster=slurm, or cluster=torchrun and cluster.rdzv_endpoint=host:port on each node",
        )
        require(
            self.launcher != "torchrun" or self.nodes == 1 or self.rdzv_endpoint is not None,
            f"cluster=torchrun with cluster.nodes={self.nodes} needs a rendezvous endpoint; set "
            "cluster.rdzv_endpoint=host:29500 with the name of one of the nodes, the same on each",
        )
        require(
            self.rdzv_endpoint is None or self.launcher == "torchrun",
            f"cluster.rdzv_endpoint={self.rdzv_endpoint} has no effect with cluster={self.launcher}; leave it out, or "
            "set cluster=torchrun",
        )
        for name in SLURM_ONLY:
            value = getattr(self, name)
            require(
                self.launcher == "slurm" or value is None or value == (),
                f"cluster.{name}={value} has no effect with cluster={self.launcher}; leave it out, or set "
                "cluster=slurm",
            )
        require(
            self.rdzv_endpoint is None or _ENDPOINT.fullmatch(self.rdzv_endpoint) is not None,
            f"cluster.rdzv_endpoint={self.rdzv_endpoint} is not host:port; write the name of one node and a free "
            "port of it, as in node01:29500",
        )

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

    def __post_init__(self) -> None:
        require_choices("parallel", self)
        require(
            self.backend == "zero3" or not self.offload_base,
            "parallel.offload_base=true is DeepSpeed's: FSDP2 keeps its shards where they are computed with; add "
            "parallel=zero3",
        )
        require(
            self.backend == "zero3" or self.deepspeed_config is None,
            f"parallel.deepspeed_config={self.deepspeed_config} has no effect with parallel.backend={self.backend}; "
            "add parallel=zero3, or leave it out",
        )
        require(
            self.shard_degree in (None, "node") or (isinstance(self.shard_degree, int) and self.shard_degree > 0),
            f"parallel.shard_degree={self.shard_degree} is not a valid number of ranks; set it to 1 or more, to node "
            "(the ranks of one node), or to null (all ranks)",
        )
        require(
            self.resident_blocks == "auto" or (isinstance(self.resident_blocks, int) and self.resident_blocks >= 0),
            f"parallel.resident_blocks={self.resident_blocks} is not a valid number of blocks; set it to 0 or more, or "
            "to auto (as many as fit)",
        )
        require(
            self.backend == "fsdp2" or self.resident_blocks == 0,
            f"parallel.resident_blocks={self.resident_blocks} is FSDP2's: DeepSpeed keeps small tensors "
            "gathered, by stage3_param_persistence_threshold of parallel.deepspeed_config; leave it out, or set "
            "parallel=fsdp2",
        )
        require_positive("parallel", self, "bucket_mb")
        require(
            self.expert_degree == "replica" or (isinstance(self.expert_degree, int) and self.expert_degree > 0),
            f"parallel.expert_degree={self.expert_degree} is not a valid number of ranks; set it to 1 (every rank "
            "gathers all experts), or to replica (the ranks that shard a replica)",
        )
        require(
            self.backend == "fsdp2" or self.expert_degree == 1,
            f"parallel.expert_degree={self.expert_degree} is FSDP2's: DeepSpeed gathers whole layers; leave it out, or "
            "set parallel=fsdp2",
        )
        require(
            self.backend == "zero3" or self.experts == "gathered",
            f"parallel.experts={self.experts} needs parallel=zero3: FSDP2 gathers whole layers; add parallel=zero3, or "
            "leave it out",
        )

    def check_blocks(self, num_blocks: int) -> None:
        """Refuse what a model of so many decoder blocks has not."""
        count = self.resident_blocks
        require(
            isinstance(count, str) or count <= num_blocks,
            f"parallel.resident_blocks={count} is more than the {num_blocks:,} blocks of this model; set "
            f"parallel.resident_blocks={num_blocks}, or auto (as many as fit)",
        )


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
