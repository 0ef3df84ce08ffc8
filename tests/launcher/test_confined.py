"""What the commands of one node reach, by strace: no address but loopback, and no file that is none of theirs."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.small_models import make_run, write_model_folder, write_text_file

STRACE = shutil.which("strace")
CALLS = (
    "open,openat,openat2,creat,truncate,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,"
    "unlinkat,rmdir,chmod,fchmodat,connect,bind,listen"
)
DISTLORA = [sys.executable, "-m", "distlora_launcher.cli.main"]
SECRETS = (
    ".ssh/id_rsa",
    ".netrc",
    ".aws/credentials",
    ".cache/huggingface/token",
    ".config/wandb/settings",
    "notes.txt",
)
"""Files of the user that no command of the table reads."""
CACHES = (".cache/distlora", ".cache/matplotlib", ".config/matplotlib", ".cache/huggingface", ".triton", ".cache/torch")
"""Folders of HOME where libraries keep what they can make again."""

pytestmark = [
    pytest.mark.skipif(STRACE is None, reason="strace is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="strace needs Linux"),
]


class Trace:
    """The system calls of a command and its children that reached a file or an address."""

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.written: set[Path] = set()
        self.read: set[Path] = set()
        self.addresses: set[tuple[str, str]] = set()
        """(call, address) of internet sockets; an address of a listener is the one that it is bound to."""
        self._cwd = cwd
        for path in folder.iterdir():
            for line in path.read_text(errors="replace").splitlines():
                if match := re.match(r"(\w+)\((.*)\) += (-?\d+)(.*)", line):
                    self._add(*match.groups())

    def _add(self, call: str, arguments: str, result: str, rest: str) -> None:
        if call == "listen" and (found := re.search(r"<TCP(?:v6)?:\[(?:(.*):)?\d+\]>", arguments)):
            self.addresses.add((call, found[1].strip("[]") if found[1] else "0.0.0.0"))  # Not bound: all interfaces.
        elif found := re.search(r'inet_addr\("([^"]*)"|inet_pton\(AF_INET6, "([^"]*)"', arguments):
            self.addresses |= {(call, found[1] or found[2])} if call == "connect" else set()
        elif result != "-1":
            paths = [self._place(*pair) for pair in re.findall(r'(?:(\w+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"', arguments)]
            opened = re.match(r"<([^>]*)>", rest)
            is_read = call.startswith("open") and not re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments)
            paths = [Path(re.sub("<(char|dir|block).*", "", opened[1]))] if opened else paths
            (self.read if is_read else self.written).update(paths)

    def _place(self, descriptor: str, folder: str, name: str) -> Path:
        return Path(os.path.normpath(Path(folder or self._cwd) / name))

    def written_outside(self, *allowed: Path) -> set[Path]:
        """Return what was written below none of these places; a folder on the way to one may be made.

        A result is written beside its place first, and a folder is probed with one that is removed at once.
        """
        beside = re.compile("|".join([r"tmp\w{8}", *(rf"\.{re.escape(place.name)}\b.*" for place in allowed)]))
        return {
            path
            for path in self.written
            if not any(path.is_relative_to(place) or place.is_relative_to(path) for place in allowed)
            and not any(beside.fullmatch(part) for part in path.parts[len(self._cwd.parts) :])
        }


class Place:
    """A home with secrets, a model and data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.number = folder.resolve(), folder.resolve() / "home", 0
        for name in SECRETS:
            (self.home / name).parent.mkdir(parents=True, exist_ok=True)
            (self.home / name).write_text("secret")
        (self.folder / "tmp").mkdir()
        write_model_folder(self.folder / "llama", "llama")
        write_text_file(self.folder / "text.jsonl")
        prompts = [{"prompt": f"{word}:"} for word in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")]
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))

    def trace(self, words: Sequence[str], command: Sequence[str] = DISTLORA) -> Trace:
        """Run a command under strace in the folder, and return what it reached."""
        self.number += 1
        calls = self.folder / f"calls_{self.number}"
        calls.mkdir()
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB", "XDG_", "MPL"))
        }
        environment = {"HOME": str(self.home), "TMPDIR": str(self.folder / "tmp"), "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
        assert STRACE is not None
        ended = subprocess.run(
            [
                STRACE,
                "-ff",
                "-yy",
                "--seccomp-bpf",
                "-s",
                "4096",
                "-o",
                calls / "of",
                "-e",
                f"trace={CALLS}",
                *command,
                *words,
            ],
            cwd=self.folder,
            env=kept | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=580,
        )
        assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
        return Trace(calls, self.folder)

    def check(self, trace: Trace, *results: str) -> None:
        """Require that a command reached loopback alone, wrote its results and caches alone, and read no secret."""
        far = {
            (call, text)
            for call, text in trace.addresses
            if not ipaddress.ip_address(text.removeprefix("::ffff:")).is_loopback
        }
        assert far == set()
        caches = [self.home / name for name in CACHES] + [Path(os.environ["DISTLORA_CACHE"]).resolve()]
        caches += [path.resolve() for path in caches[-1].iterdir() if path.is_symlink()]
        places = [self.folder / name for name in ("tmp", *results)] + caches
        assert (
            trace.written_outside(*places, Path("/dev/null"), Path("/dev/shm"), Path("/dev/tty"), Path("/proc/self"))
            == set()
        )
        secrets = {self.home / name for name in SECRETS}
        assert (trace.read | trace.written) & secrets == set()
        of_home = {path for path in trace.read if path.is_relative_to(self.home) and path != self.home}
        assert not {path for path in of_home if not any(path.is_relative_to(cache) for cache in caches)}


MODEL = ["model.path=llama", "data.path=text.jsonl", "data.sequence_length=64"]
TRAIN = [*MODEL, "tracker=none", "train.max_steps=2", "train.global_batch=4", "cluster.gpus_per_node=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("confined"))


@pytest.fixture(scope="module")
def trained(place: Place) -> Place:
    """Train a run of two ranks under strace."""
    place.check(place.trace(["train", *TRAIN, "run_dir=run"]), "run")
    return place


SAMPLED = [
    "data.path=prompts.jsonl",
    "train.objective=grpo",
    "data.rewards=[regex]",
    "data.reward_constants={pattern: a}",
]
SAMPLED += ["rollout.num_generations=2", "rollout.max_new_tokens=4", "train.beta=0.1", "data.eval_fraction=0.2"]
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    # words, and what they write.
    "train": (["status", "run"], []),  # The run of the fixture.
    "grpo": (["train", *TRAIN, *SAMPLED, "run_dir=sampled"], ["sampled"]),
    "resume": (["resume", "stopped"], ["stopped"]),
    "sweep": (["sweep", *TRAIN, "cluster.gpus_per_node=1", "optim.lr=1e-4,2e-4", "run_dir=sweep"], ["sweep"]),
    "eval": (["eval", "run", "--text", "text.jsonl", "--rows", "2", "--processes", "2"], []),
    "generate": (["generate", "run", "--prompts", "prompts.jsonl", "--out", "answers.jsonl"], ["answers.jsonl"]),
    "merge": (["merge", "run", "--out", "merged", "--rows", "2"], ["merged", "run"]),
    "export": (["export", "run", "--for", "peft", "--out", "exported"], ["exported"]),
    "data preview": (["data", "preview", *MODEL], []),
    "plan": (["plan", *MODEL], []),
    "verify": (["verify", "run"], ["run/config.yaml"]),  # Opened to read its lock.
    "report": (["report", "run", "--out", "page.html"], ["page.html"]),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.ci if name in ("train", "grpo") else pytest.mark.slow) for name in COMMANDS],
)
def test_a_command_reaches_loopback_and_its_own_files_alone(trained: Place, name: str) -> None:
    if name == "resume":
        make_run(trained.folder / "stopped", trained.folder, train={"max_steps": 2}, cluster={"gpus_per_node": 2})
    words, results = COMMANDS[name]
    trained.check(trained.trace(words), *results)


def test_the_check_finds_a_listener_a_secret_and_a_file_elsewhere(place: Place) -> None:
    for code in (
        "import socket; socket.create_server(('0.0.0.0', 0))",
        "import socket; socket.socket().listen()",
        "open('home/.ssh/id_rsa')",
        "open('elsewhere', 'w')",
        "import os; os.mkdir('home/.config/new')",
        "import os; os.rename('elsewhere', 'moved')",
    ):
        trace = place.trace([code], [sys.executable, "-c"])
        with pytest.raises(AssertionError):
            place.check(trace)
