"""A real SLURM on this host: munged, slurmctld and one slurmd a node, on loopback, with GPUs that are device files.

Each node is a machine as far as one host can make it: its own host name, /etc/hosts and processes (UTS, mount and pid
namespaces), an address 127.a.b.i, a port. Its processes end with it, so `lose_node` is a power cut. All state is under
one folder; ports, addresses and job ids come from that folder's name, so that several clusters live side by side.

Nothing outlives its user: the daemons are our children, ended by pid, and with the first process of a node's namespace
the kernel kills the rest; should this process itself be killed, the kernel ends the daemons (PR_SET_PDEATHSIG).

By hand:  make slurm-shell     (python tests/support/slurm_cluster.py [--gpus 2]; sbatch, srun, squeue work)
Needs:    root on Linux, and  apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "sbatch", "srun", "unshare", "setpriv")
NODE_NAMESPACES = ("unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

NODE_INIT = """\
hostname "$1" && mount --bind "$2/hosts" /etc/hosts || exit 1
slurmd -D -f "$2/slurm.conf" -N "$1" &
while :; do wait; sleep 0.2; done  # The first process of a namespace: it reaps what a job leaves behind.
"""
"""A node's first process; $1 its name, $2 the folder of the configuration."""

SLURM_CONF = """\
ClusterName=c{tag:x}
SlurmctldHost={host}({network}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credential of its last start has expired: 120 s by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
# No cgroups: a container has none to give.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# More CPUs than the host has.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
# On a host whose cores are busy with other tests a daemon may need longer to answer than 10 s, 2 s and 10 s.
MessageTimeout=60
TCPTimeout=10
BatchStartTimeout=60
SlurmdTimeout={slurmd_timeout}
ReturnToService=2
KillWait=5
# There is no accounting: scontrol is the only record of a job that has ended.
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
# Ports made from job ids differ between clusters.
FirstJobId={first_job}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, with what to type where that helps; None if one can."""
    if sys.platform != "linux":
        return f"SLURM's nodes are Linux namespaces; this is {sys.platform}"
    if os.geteuid() != 0:
        return f"SLURM's daemons and namespaces need root; this is uid {os.geteuid()}"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed; type: apt-get update && {INSTALL}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            os.mknod(f"{scratch}/gpu", 0o020666, os.makedev(1, 3))
        except OSError as error:
            return f"a GPU's device file cannot be made here (mknod: {error.strerror})"
    refused = subprocess.run([*NODE_NAMESPACES, "hostname", "n1"], capture_output=True, text=True, timeout=30)
    if refused.returncode != 0:
        return f"namespaces are refused here ({refused.stderr.strip()}); a container needs CAP_SYS_ADMIN"
    return None


class SlurmCluster:
    """Nodes n1 ... n<nodes> with `gpus` GPUs each; configuration, state and logs are under `folder`.

    A node that does not answer for `slurmd_timeout` seconds is taken for lost. `settings` are more lines of slurm.conf.
    """

    def __init__(
        self, folder: Path, *, nodes: int = 2, gpus: int = 2, slurmd_timeout: int = 300, settings: Sequence[str] = ()
    ) -> None:
        self.folder = folder.absolute()
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.config = self.folder / "etc" / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._configure(gpus, slurmd_timeout, settings)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make sbatch, srun, squeue, scontrol and scancel speak to this cluster."""
        return {"SLURM_CONF": str(self.config)}

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle (0.4 s on two quiet cores)."""
        munge = self.folder / "munge"
        self._spawn(
            "munged",
            [
                *("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key"),
                *(f"--log-file={munge}/log", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed"),
            ],
        )
        self._wait_for((munge / "socket").is_socket, "munged made no socket")
        self._spawn("slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.config)])
        for name in self.names:
            self.start_node(name)
        self._wait_for(lambda: self.idle_nodes() == self.names, "not every node became idle")

    def start_node(self, name: str) -> None:
        """Start a node, also one that was lost."""
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        init = ["bash", "-c", NODE_INIT, "node", name, str(self.config.parent)]
        self._spawn(name, [*NODE_NAMESPACES, *init])

    def lose_node(self, name: str) -> None:
        """End a node at once with all that runs on it, as a power cut does; slurmctld is not told."""
        self._kill(name)

    def stop(self) -> None:
        """End everything: the nodes with their jobs first. What was never started needs no end."""
        for name in self.names:
            self._kill(name)
        for name in ("slurmctld", "munged"):  # In order: slurmctld has a child of its own.
            if name in self._daemons:
                self._daemons[name].terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._daemons[name].wait(timeout=10)
                self._kill(name)

    def call(self, *command: str, timeout: float = 90.0) -> str:
        """Return the output of a SLURM command. Raises CalledProcessError."""
        finished = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=timeout
        )
        if finished.returncode != 0:
            print(finished.stderr)  # Shown by pytest beside the exception, which does not hold it.
        finished.check_returncode()
        return finished.stdout

    def idle_nodes(self) -> list[str]:
        """Names of the nodes that wait for work; none while slurmctld does not answer."""
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        try:
            finished = subprocess.run(
                command, env=os.environ | self.environment, capture_output=True, text=True, timeout=10
            )
        except subprocess.TimeoutExpired:
            return []
        return sorted(set(finished.stdout.split()))

    def job(self, job_id: int | str) -> dict[str, str]:
        """Return scontrol's record of a job (`1`) or of one task of an array (`1_0`), ended ones too."""
        record = self.call("scontrol", "show", "job", "--oneliner", str(job_id))
        return dict(re.findall(r"(\S+?)=(\S*)", record))

    def wait(self, job_id: int | str, *states: str, seconds: float, reason: str | None = None) -> dict[str, str]:
        """Wait until a job is in one of `states` (and pends for `reason`), and return its record."""
        deadline = time.monotonic() + seconds
        while True:
            record = self.job(job_id)
            if record["JobState"] in states and reason in (None, record["Reason"]):
                return record
            assert time.monotonic() < deadline, (
                f"job {job_id} is {record['JobState']} ({record['Reason']}) after {seconds:.0f} s, not {states}\n"
                + self.logs()
            )
            time.sleep(0.5)

    def tell_to_stop(self, job_id: int | str) -> None:
        """Send the batch shell of a job SIGUSR1, as SLURM does before a time limit.

        Without --ctld scancel takes the answer for a task of an array of which others still wait for one to try again
        later, and sends the signal every 5 s, to the next start of the task as well (SLURM 24.11).
        """
        self.call("scancel", "--ctld", "--batch", "--signal=USR1", str(job_id))

    def logs(self) -> str:
        """Return the last lines of every daemon's log."""
        paths = sorted((self.folder / "log").iterdir())
        return "\n".join(f"--- {path}\n" + "\n".join(_last_lines(path, 15)) for path in paths)

    def _configure(self, gpus: int, slurmd_timeout: int, more: Sequence[str]) -> None:
        """Write what the daemons read: slurm.conf, gres.conf, cgroup.conf, hosts, a munge key, device files."""
        tag = zlib.crc32(str(self.folder).encode())
        network = f"127.{tag % 199 + 50}.{tag // 199 % 250}"
        port = _free_ports(28_000 + tag % 4_700, 1 + len(self.names))
        for name in ("etc", "munge", "state", "spool", "log", "dev"):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name).chmod(0o755)  # munged refuses a folder that others may write to.
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for index in range(gpus):  # A clone of /dev/null. With a plain file SLURM leaves CUDA_VISIBLE_DEVICES unset.
            os.mknod(self.folder / "dev" / f"gpu{index}", 0o020666, os.makedev(1, 3))
        host = socket.gethostname()
        nodes = "".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={network}.{index} Port={port + index} "
            f"CPUs=8 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN\n"
            for index, name in enumerate(self.names, start=1)
        )
        values = {"tag": tag, "host": host, "network": network, "port": port, "folder": self.folder}
        settings = SLURM_CONF.format(**values, slurmd_timeout=slurmd_timeout, first_job=tag % 50_000 + 1)
        self.config.write_text("\n".join([nodes + settings, *more]) + "\n")
        etc = self.config.parent
        device_files = f"Name=gpu File={self.folder}/dev/gpu[0-{gpus - 1}]\n"
        (etc / "gres.conf").write_text("AutoDetect=off\n" + (device_files if gpus else ""))
        (etc / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        addresses = [f"{network}.{index} {name}" for index, name in enumerate(self.names, start=1)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{network}.254 {host}", *addresses]) + "\n")

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,  # Ctrl-C is for the test run, which ends us in order.
            )

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(daemon.pid).children()
        for first in children:  # A node's: unshare waits for it, and it for its own.
            with contextlib.suppress(psutil.NoSuchProcess):
                first.kill()  # psutil compares the start time: a pid that was given out again is left alone.
        if name not in self.names or not children:  # A node that has only just been started has none yet.
            daemon.kill()
        try:
            daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemon.kill()  # unshare --kill-child: what is left of the namespace ends with it.
            daemon.wait()

    def _wait_for(self, condition: Callable[[], bool], message: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert not ended, f"{', '.join(ended)} ended\n{self.logs()}"
            assert time.monotonic() < deadline, f"{message} within {seconds:.0f} s\n{self.logs()}"
            time.sleep(0.05)


@contextlib.contextmanager
def running_cluster(
    folder: Path, *, nodes: int = 2, gpus: int = 2, slurmd_timeout: int = 300, settings: Sequence[str] = ()
) -> Iterator[SlurmCluster]:
    """Run a cluster for the duration; it is ended even if its start fails."""
    cluster = SlurmCluster(folder, nodes=nodes, gpus=gpus, slurmd_timeout=slurmd_timeout, settings=settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(first: int, count: int) -> int:
    """Return the first of `count` consecutive free ports from `first` on, above those of the jobs' rendezvous."""
    for _ in range(1_000):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
        first = first + count if first + 2 * count <= 32_768 else 28_000
    raise AssertionError(f"no {count} neighbouring ports from 28000 to 32767 are free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def _last_lines(path: Path, count: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-count:]


def main() -> None:
    """Run a shell in which this SLURM answers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="on each node")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        sys.exit(reason)
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as scratch,
        running_cluster(Path(scratch) / "slurm", nodes=options.nodes, gpus=options.gpus) as cluster,
    ):
        print(f"{' '.join(cluster.names)} with {options.gpus} GPUs each; logs in {cluster.folder}/log; exit ends it")
        print("srun -N2 --gpus-per-node=1 --ntasks-per-node=1 bash -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'")
        subprocess.run([os.environ.get("SHELL", "bash")], env=os.environ | cluster.environment)


if __name__ == "__main__":
    main()
