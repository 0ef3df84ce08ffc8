"""Rewards run in processes of their own: a bad function costs one answer; code of a model stays in its sandbox."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distlora.config import DataConfig, UserError
from distlora.config.file import load_config
from distlora.rewards import sandbox, sandbox_entry
from distlora.rewards.built_in import reward_function
from distlora.rewards.find import check_functions, import_functions
from distlora.rewards.pool import RewardInput, RewardPool
from distlora.rewards.sandbox import passes
from distlora.rewards.worker import compute
from distlora_launcher.compose.compose import compose_config
from distlora_launcher.launch.local import create_run

FUNCTIONS = """
import ctypes, math, os, random, re, subprocess, sys, time

KEPT = []

def length(completions, **columns):
    return [len(text) for text in completions]

def odd(prompts, completions, completion_ids, answer, **columns):
    (text,) = completions
    if text == "right": print("a word on stdout"); os.write(1, b'{"value": 7}\\n')
    if text == "hang":
        subprocess.Popen(["sleep", "1234.5"])
        time.sleep(1000)
    elif text == "hang in C": re.match(r"(a+)+$", "a" * 50 + "b")
    elif text == "raise": raise ValueError("an odd text")
    elif text == "exit": os._exit(0)
    elif text == "segfault": ctypes.string_at(0)
    elif text == "leave": sys.exit()
    elif text == "close":
        os.closerange(3, 100)
        time.sleep(1000)
    elif text == "fork": os.fork()
    elif text == "garbage": os.write(int(max(os.listdir("/proc/self/fd"), key=lambda name: (
        os.path.realpath("/proc/self/fd/" + name).rpartition("/")[2].startswith("pipe:"), int(name)))), b"garbage\\n")
    elif text == "nan": return [math.nan]
    elif text == "infinite": return [10**400]
    elif text == "word": return ["1"]
    elif text == "two": return [1.0, 2.0]
    elif text == "fill":
        while True: KEPT.append(bytearray(100_000_000))
    elif text == "nothing": return None
    elif text == "none": return [None]
    elif text == "random": return [random.random()]
    return [float(text == answer[0] and prompts == ["prompt"] and completion_ids == [[5]])]

async def later(completions, **columns):
    return [0.25]
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with reward functions, the working folder of this file's tests."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "mine.py").write_text(FUNCTIONS)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def data(*rewards: str, **settings: Any) -> DataConfig:
    return DataConfig(path="-", rewards=rewards, **settings)


def inputs(*completions: Any, **columns: Any) -> list[RewardInput]:
    columns = {"answer": "right", **columns}
    return [RewardInput(prompt="prompt", completion=c, columns=columns, completion_ids=[5]) for c in completions]


def running(groups: list[int]) -> list[str]:
    """Return the command lines of processes of these groups."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            found += [(folder / "cmdline").read_text()] if int(group) in groups and state != "Z" else []
    return found


def wait_until(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it has not come to it in 30 s")


def test_a_bad_function_costs_its_answer_and_is_counted(functions: Path) -> None:
    lines: list[str] = []
    faults = {
        "timeouts": ["hang", "hang in C"],
        "errors": ["raise", "raise", "exit", "segfault", "leave", "close", "nothing", "garbage"],
        "invalid": ["nan", "infinite", "word", "two"],
    }
    texts = ["right", *(text for texts in faults.values() for text in texts), "none", "random", "random", "fork"]
    settings = data("mine.odd", "mine.length", "mine.later", reward_timeout=3.0, reward_processes=3)
    with RewardPool(settings, log=lines.append) as pool:
        scores = pool.score(inputs(*texts))
        again = pool.score(list(reversed(inputs(*texts[3:]))))
        groups = [worker.process.pid for worker in pool._workers]
    wait_until(lambda: not running(groups))  # A killed process takes a moment to leave.
    assert [values[1:] for values in scores.values] == [[len(text), 0.25] for text in texts]
    assert scores.failed == [any(text in group for group in faults.values()) for text in texts]
    own = dict(zip(texts, (values[0] for values in scores.values), strict=True))
    assert (own["right"], own["fork"], own["none"]) == (1.0, 0.0, None)
    assert scores.values[-3] == scores.values[-2]  # Two draws of the same answer.
    assert all(own[text] is None for group in faults.values() for text in group)
    assert {name: count for name, count in scores.counts.items() if count} == {
        f"rewards/mine.odd/{reason}": len(group) for reason, group in faults.items()
    }
    assert set(scores.counts) >= {"rewards/mine.length/timeouts", "rewards/mine.later/errors"}
    # The same answers in another order, in processes that others have died in: the same rewards.
    assert list(reversed(again.values)) == scores.values[3:]
    assert len([line for line in lines if "ValueError: an odd text (mine.py:" in line]) == 1
    assert any(
        "ended its process by signal 11 (Segmentation fault): the answer 'segfault' to 'prompt' is left out" in line
        for line in lines
    )


def test_a_reward_that_fills_the_memory_fails_in_words_and_is_replaced(functions: Path) -> None:
    lines: list[str] = []
    with RewardPool(data("mine.odd", reward_memory_gb=0.5, reward_processes=1), log=lines.append) as pool:
        before = pool._workers[0].process.pid
        scores = pool.score(inputs("fill", "right", "fill", "right"))
        assert pool._workers[0].process.pid != before
    assert scores.values == [[None], [1.0], [None], [1.0]]
    assert (scores.failed, scores.counts["rewards/mine.odd/errors"]) == ([True, False, True, False], 2)
    assert len(lines) == 1
    assert "mine.odd needs more memory than data.reward_memory_gb allows (mine.py:" in lines[0]


@pytest.mark.ci
def test_functions_of_trl_run_unchanged() -> None:
    texts = ["<think>\n2 / 4\n</think>\n\\boxed{\\frac{1}{2}}", r"\boxed{\frac{1}{3}}"]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    with RewardPool(data("trl.rewards.think_format_reward", "trl.rewards.accuracy_reward", reward_processes=1)) as pool:
        scores = pool.score(inputs(*messages, solution="$0.5$"))
    from trl.rewards import accuracy_reward, think_format_reward

    expected = [think_format_reward(messages), accuracy_reward(messages, ["$0.5$", "$0.5$"])]
    assert scores.values == [list(pair) for pair in zip(*expected, strict=True)] == [[1.0, 1.0], [0.0, 0.0]]


def test_processes_end_with_a_killed_parent(functions: Path) -> None:
    code = f"""
        import dataclasses, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_rewards import *
        with RewardPool(data("mine.odd", reward_timeout=1000.0)) as pool:
            print(*(worker.process.pid for worker in pool._workers), flush=True)
            pool.score(inputs("hang", "hang in C"))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    groups = [*map(int, parent.stdout.readline().split())]
    wait_until(lambda: any("1234.5" in line for line in running(groups)))  # A function started it.
    assert len(running(groups)) == 5  # With two workers, each with the process that ends it.
    parent.kill()
    parent.wait()
    wait_until(lambda: not running(groups))


def test_functions_that_cannot_be_loaded_are_refused(functions: Path) -> None:
    (functions / "broken.py").write_text("def reward(): ...\nimport no_such_module\nlist_of_names = []\n")
    for name, message in {
        "mine.lenght": r"mine.lenght\]: its module has no function lenght \(did you mean 'length'\?\)",
        "mien.length": r"there is no module mien in .*; start from the folder that holds it",
        "mine.deep.length": r"there is no module mine.deep",
    }.items():
        with pytest.raises(UserError, match=message):
            check_functions(data(name))
    names = ("mine.length", "json.decoder.JSONDecodeError", "trl.rewards.accuracy_reward", "exact_match")
    check_functions(data(*names))
    import_functions(data(*names[:2]))
    assert "mine" not in sys.modules
    check_functions(data("broken.reward"))
    with pytest.raises(UserError, match=r"broken.reward: ModuleNotFoundError: No module named 'no_such_module'"):
        import_functions(data("broken.reward"))


def test_a_run_keeps_its_functions_wherever_it_is_resumed(
    functions: Path, tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (functions / "package").mkdir()
    (functions / "package" / "ours.py").write_text("from mine import length\n")
    rewards = "data.rewards=[mine.length,package.ours.length,exact_match]"
    words = ["recipe=grpo", f"model.path={folders / 'llama'}", f"data.path={folders / 'text.jsonl'}", rewards]
    config = compose_config([*words, f"run_dir={tmp_path / 'run'}"])
    assert config.data.reward_folder == str(functions)
    assert [*config.data.reward_digests] == ["mine", "package.ours"]
    create_run(tmp_path / "run", config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # As in a rank.
    (tmp_path / "mine.py").write_text("def length(): raise OSError('another function')\n")
    resumed = load_config(tmp_path / "run").data
    check_functions(resumed)
    with RewardPool(dataclasses.replace(resumed, reward_processes=1)) as pool:
        assert pool.score(inputs("right")).values == [[5.0, 5.0, 1.0]]
    with (functions / "mine.py").open("a") as file:
        file.write("# another\n")
    with pytest.raises(UserError, match=r"mine.py has changed since the run began .*; restore it, or start a new run"):
        import_functions(resumed)
    (functions / "package" / "ours.py").unlink()
    with pytest.raises(UserError, match=r"no module package.ours in .*the run began with it: restore it, or set"):
        check_functions(resumed)
    (functions / "mine.py").write_text(FUNCTIONS)


def reward(name: str, completion: Any, value: Any, **settings: Any) -> Any:
    reply = compute(reward_function(name, data(name, **settings)), {"completions": [completion], "column": [value]})
    return reply.get("value", reply)


@pytest.mark.parametrize(
    ("name", "completion", "value", "expected"),
    [
        ("exact_match", " 42\n", "42 ", 1.0),
        ("exact_match", "43", 42, 0.0),
        ("exact_match", [{"role": "assistant", "content": "42"}], 42, 1.0),
        ("exact_match", [{"role": "assistant", "content": [{"type": "text", "text": "42"}]}], "42", 1.0),
        ("exact_match", "42", None, None),
        ("regex", "x 12", r"\d+$", 1.0),
        ("regex", "x 12 y", r"\d+$", 0.0),
        ("regex", "x", "(", {"errors"}),
        ("math", r"so it is \boxed{\frac{2}{4}}", "0.5", 1.0),
        ("math", r"so it is $\frac{1}{3}$", r"$\frac{1}{2}$", 0.0),
        ("math", "no idea", "7", 0.0),
        ("math", "7", "no idea", {"errors"}),
        ("math", "9**9**9**9", "7", 0.0),
        ("math", "the answer is 10^(10^10)", "7", 0.0),
        ("math", r"\boxed{\frac{1}{10^{10^{10}}}}", "7", 0.0),
        ("math", r"\boxed{((10^{100000})^{100000})^{100000}}", "7", 0.0),
        ("math", r"\boxed{100000000!}", "7", 0.0),
        ("math", r"\boxed{(-1)!}", "7", 0.0),
        ("math", "7" * 10_000_000, "7", 0.0),
        ("math", r"\boxed{9^{9^{9}}}", "$9^{9^{9}}$", 1.0),
        ("math", r"\boxed{2 \cdot 2^{2023}}", "$2^{2024}$", 1.0),
        ("math", r"\boxed{(x+y+z+1)^{200}}", "7", 0.0),  # Slow.
        ("json_schema", '{"a": 1}', {"type": "object", "required": ["a"]}, 1.0),
        ("json_schema", 'Here:\n```json\n{"a": 1}\n```\n', '{"type": "object", "required": ["a"]}', 1.0),
        ("json_schema", '{"b": 1}', {"type": "object", "required": ["a"]}, 0.0),
        ("json_schema", "no JSON", {}, 0.0),
        ("json_schema", "NaN", {}, 0.0),
        ("json_schema", "[" * 100_000, {}, 0.0),
        ("json_schema", "1" + "0" * 400, {"multipleOf": 0.5}, 0.0),
        ("json_schema", "1e400", {"multipleOf": 0.5}, 0.0),
        ("json_schema", "[" * 900 + "]" * 900, {"type": "array", "items": {"$ref": "#"}}, 0.0),
        ("json_schema", "`" * 20_000 + "\n" + "x\n" * 20_000, {}, 0.0),
        ("json_schema", "1", {"$ref": "#"}, {"errors"}),
        ("json_schema", "1", {"type": "nothing"}, {"errors"}),
        ("json_schema", "1", {"$ref": "http://localhost:1/schema.json"}, {"errors"}),
    ],
)
def test_built_in_rewards(name: str, completion: Any, value: Any, expected: Any) -> None:
    column = {"exact_match": "answer", "regex": "pattern", "math": "answer", "json_schema": "schema"}[name]
    found = reward(name, completion, value, reward_columns={column: "column"}, reward_timeout=2.0)
    assert (set(found) if isinstance(expected, set) else found) == expected


def test_a_missing_column_is_named_and_constants_fill_it(functions: Path) -> None:
    assert "no column 'answer'" in reward("exact_match", "1", "1")["errors"]
    with RewardPool(data("regex", reward_constants={"pattern": "^[0-9]$"}, reward_processes=1)) as pool:
        scores = pool.score([*inputs("1", "x"), *inputs("x", pattern="x")])
    assert scores.values == [[1.0], [0.0], [1.0]]


# --- the sandbox ---

namespaces = pytest.mark.skipif(
    "not permitted" in (sandbox.reason_against("namespaces") or ""), reason="this kernel forbids namespaces"
)
ISOLATIONS = [pytest.param("namespaces", marks=namespaces), "limits"]


def outcome(code: str, isolation: str, seconds: float = 10.0) -> str:
    """Return what a program prints in the sandbox."""
    return sandbox.run([sys.executable, "-I", "-c", textwrap.dedent(code)], {}, isolation=isolation, seconds=seconds)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_tests_pass_and_fail(isolation: str) -> None:
    fine = "import dataclasses\ndef add(a, b):\n    return a + b\n_hidden = 3"
    cases = {
        (fine, "assert add(1, 2) == 3 and _hidden == 3"): True,
        (fine, "def test_add(): assert add(1, 2) == 4"): False,
        (
            fine,
            "import unittest\nclass T(unittest.TestCase):\n  def test_add(self): self.assertEqual(add(1, 2), 4)",
        ): False,
        ("import os; os._exit(0)", "assert False"): False,
        ("import sys\ndef add(a, b): sys.exit(0)", "assert add(1, 2) == 3"): False,
        ("this is no Python", ""): False,
    }
    found = [passes(code, tests, isolation=isolation, seconds=10) for code, tests in cases]
    assert found == [*cases.values()]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_limits_hold(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    facts = """
        import os, resource
        print(sorted(os.environ), os.getcwd() == os.environ["HOME"])
        try:
            with open("large", "wb") as file:
                for _ in range(100): file.write(bytes(1 << 20))
        except OSError as error: print("no disk")
    """
    names = sorted([*sandbox.SAFE_ENVIRONMENT, "HOME", "TMPDIR", "LC_CTYPE"])
    printed = outcome(facts, isolation).splitlines()
    assert {*eval(printed[0].rpartition(" ")[0])} <= {*names}  # LC_CTYPE: Python sets it.
    assert printed[0].endswith("True")
    assert printed[1:] == ["no disk"]
    before = time.monotonic()
    assert outcome("while True: pass", isolation, seconds=1.0) == ""
    assert outcome("import time; time.sleep(100)", isolation, seconds=0.5) == ""
    assert time.monotonic() - before < 20


@namespaces
def test_namespaces_hide_network_files_and_processes(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("token")
    facts = f"""
        import os, socket
        def tried(what):
            try: return what()
            except OSError: return "refused"
        print(tried(lambda: socket.create_connection(("127.0.0.1", 22), 1)))
        print(tried(lambda: socket.create_connection(("192.0.2.1", 80), 1)))
        print(tried(lambda: socket.socket(socket.AF_VSOCK)))
        print(tried(lambda: open({str(tmp_path / "secret")!r}).read()), os.path.exists({__file__!r}))
        print(tried(lambda: open({sys.prefix!r} + "/pyvenv.cfg", "a")), tried(lambda: open("/usr/x", "w")))
        print(os.getpid(), [name for name in tried(lambda: os.listdir("/proc")) if name.isdecimal()])
        print(tried(lambda: os.kill({os.getpid()}, 0)), os.getuid() != 0)
        open("mine", "w").write("fine"); print(os.listdir("."))
    """
    assert outcome(facts, "namespaces").splitlines() == [
        "refused",
        "refused",
        "refused",
        "refused False",
        "refused refused",
        "1 ['1']",
        "refused True",
        "['mine']",
    ]


@namespaces
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root and Debian's Python")
def test_users_who_are_not_root_have_namespaces_too() -> None:
    """This Python may lie where another user cannot go: Debian's runs the entry."""
    entry = Path(sandbox_entry.__file__).read_text()
    code = """if True:
        import os, socket, threading, time
        print(os.getuid(), os.getpid(), os.listdir("."), socket.if_nameindex(), open("/dev/null", "w").write("x"))
        try:
            while True: threading.Thread(target=time.sleep, args=[1], daemon=True).start()
        except RuntimeError: print(threading.active_count())
        print(*[line.split()[1] for line in open("/proc/self/status") if "CapEff" in line])
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 4321, 4321)
        request = {
            "isolation": "namespaces",
            "folder": folder,
            "disk_bytes": 1 << 20,
            "environment": {},
            "limits": {"RLIMIT_NPROC": 8},  # With the entry and the program.
            "files": {"a": "b"},
            "visible": [*filter(os.path.exists, sandbox._SYSTEM)],
            "command": ["/usr/bin/python3", "-c", code],
        }
        with tempfile.TemporaryFile("w+") as source:
            json.dump(request, source)
            source.seek(0)
            finished = subprocess.run(
                ["/usr/bin/python3", "-I", "-S", "-c", entry, str(os.getpid())],
                user=4321,
                group=4321,
                extra_groups=[],
                cwd="/",
                stdin=source,
                capture_output=True,
                text=True,
            )
    assert finished.stdout == "4321 1 ['a'] [(1, 'lo')] 1\n7\n0000000000000000\n", finished


@namespaces
def test_threads_end_at_the_limit_and_a_program_that_hides_is_killed() -> None:
    """Without a signal at its parent's death and in another session, it would outlive the run."""
    code = """
        import ctypes, os, threading, time
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        try: os.setsid()
        except OSError: print("refused")
        try:
            while True: threading.Thread(target=time.sleep, args=[1000]).start()
        except RuntimeError: print(threading.active_count(), flush=True)
    """
    assert outcome(code, "namespaces", seconds=4) == f"refused\n{sandbox.THREADS}\n"

    def left() -> set[int]:
        users = set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                users.add(path.stat().st_uid)
        return users & {*range(61184, 61184 + 4096)}

    wait_until(lambda: not left())


ALLOCATIONS = {
    "heap": "blocks.append(bytearray(step))",
    "private mapping": "blocks.append(mmap.mmap(-1, step, mmap.MAP_PRIVATE))",
    "shared mapping": "blocks.append(mmap.mmap(-1, step))",
    "thread": """run = threading.Thread(target=lambda: blocks.append(bytearray(step)))
        run.start(); run.join(); assert len(blocks) == total + 1""",
    "memfd": "os.truncate(os.memfd_create('m'), step)",
    "System V": "assert libc.shmget(0, step, 0o1600) != -1",
    "semaphores": "assert libc.semget(0, 32000, 0o1600) != -1",
    "messages": "assert libc.msgget(0, 0o1600) != -1",
    "POSIX": "os.ftruncate(os.open(f'/dev/shm/distlora-{total}', os.O_RDWR | os.O_CREAT), step)",
    "file": """os.ftruncate(os.open(str(total), os.O_RDWR | os.O_CREAT), step)
        os.posix_fallocate(os.open(str(total), os.O_RDWR), 0, step)""",
    "processes": "os.fork() or os._exit(0)",
    "spawned": "subprocess.Popen(['/bin/true'])",
    "pages in a pipe": """end = os.pipe()[1]  # A slot of 4 KiB keeps a huge page of 2 MiB.
        for _ in range(8):
            page = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE); page.madvise(mmap.MADV_HUGEPAGE)
            start = -ctypes.addressof(ctypes.c_char.from_buffer(page)) % (2 << 20)
            part = struct.pack("PN", ctypes.addressof(ctypes.c_char.from_buffer(page, start)), 4096)
            assert libc.vmsplice(end, part, 1, 0) == 4096""",
    "user namespace": """assert libc.unshare(0x10020000) == 0
        assert libc.mount(b'm', os.getcwd().encode(), b'tmpfs', 0, None) == 0""",
}
"""Statements that take 16 MiB each."""
BOUNDED_BY = {"heap": 64, "private mapping": 64, "shared mapping": 64, "thread": 64, "file": 4}
"""Statements that may succeed at most; others, none."""


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_memory_is_bounded_in_each_way_to_allocate(isolation: str) -> None:
    ways = {way: code for way, code in ALLOCATIONS.items() if isolation == "namespaces" or way not in ("POSIX", "file")}
    code = f"""if True:
        import ctypes, mmap, os, struct, subprocess, threading
        libc, step = ctypes.CDLL(None), 16 << 20
        for way, statement in {ways!r}.items():
            blocks, total = [], 0
            try:
                while total < 96:  # 1.5 GiB
                    exec(statement.replace("        ", ""))
                    total += 1
            except (OSError, MemoryError, AssertionError): pass
            print(way, total, sep=":", flush=True)
    """
    printed = dict(line.split(":") for line in outcome(code, isolation, seconds=60).splitlines())
    assert printed.keys() == ways.keys()
    assert {way: count for way, count in printed.items() if int(count) > BOUNDED_BY.get(way, 0)} == {}
    assert all(int(printed[way]) > 0 for way in printed.keys() & BOUNDED_BY.keys())


@namespaces
def test_pipes_sockets_and_names_take_little_memory() -> None:
    code = """
        import fcntl, os, socket
        total = names = 0
        pairs = [os.pipe() for _ in range(60)] + [socket.socketpair() for _ in range(60)]
        for ends in pairs:
            for end in ends if isinstance(ends[0], socket.socket) else ends[1:]:
                number = end if isinstance(end, int) else end.fileno()
                try: fcntl.fcntl(number, fcntl.F_SETPIPE_SZ, 1 << 20)
                except OSError: pass
                os.set_blocking(number, False)
                try:
                    while True: total += os.write(number, bytes(4096))
                except BlockingIOError: pass
        try:
            while names < 10000: os.mkdir(str(names)); names += 1
        except OSError: pass
        print(total >> 20, names)
    """
    total, names = map(int, outcome(code, "namespaces", seconds=60).split())
    assert 8 < total < 128
    assert 1000 < names < 4096


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_an_answer_cannot_report_by_what_it_reads_outside_its_memory(isolation: str) -> None:
    forged = """if True:
        import os, sys
        words = [*sys.orig_argv, *sys.argv, *os.environ.values()]
        for name in ("cmdline", "environ"):
            try: words += open(f"/proc/self/{name}").read().split(chr(0))
            except OSError: pass
        words += [open(name).read() for name in os.listdir(".") if os.path.isfile(name)]
        for number in range(256):
            try: os.lseek(number, 0, 0); words.append(os.read(number, 100).decode())
            except (OSError, ValueError): pass
        for name in range(256):
            try:
                file = os.open(f"/proc/{os.getppid()}/fd/{name}", os.O_NONBLOCK)
                words += os.read(file, 9999).decode().split(chr(34))
            except (OSError, ValueError): pass
        for number in range(1, 256):
            try: os.fstat(number)
            except OSError: continue
            try: os.truncate(number, 0)
            except OSError: pass
            for word in set(%s):
                try: os.pwrite(number, word.encode(), 0)
                except OSError: pass
        os._exit(0)
    """
    # A text that names a fault of the sandbox is a wrong answer too, not one to leave out.
    for words in ("words", "[word for word in words if len(word) == 32]", "['FAILED mount']"):
        assert passes(forged % words, "assert False", isolation=isolation, seconds=10) is False


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_keys_of_the_user_are_out_of_reach(isolation: str) -> None:
    number = sandbox_entry.CALLS[os.uname().machine][1].split()[2:]
    code = f"""
        import ctypes
        call = ctypes.CDLL(None).syscall
        print(call({number[0]}, 0, -3, 1), call({number[1]}, b"user", b"a", b"b", 1, -2))
        print(call({number[2]}, b"user", b"a", None, 0))
        try: print("distlora_secret" in open("/proc/keys").read())
        except OSError: print(False)
    """
    # In a process of its own: the key ends with its keyring.
    made = f"""if True:
        import ctypes, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_rewards import outcome
        call = ctypes.CDLL(None).syscall
        call({number[0]}, 1, None)
        assert call({number[1]}, b"user", b"distlora_secret", b"token", 5, -3) != -1 or {isolation == "limits"}
        print(outcome({code!r}, {isolation!r}), end="")
    """
    printed = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True).stdout.splitlines()
    assert printed[:2] == ["-1 -1", "-1"]
    assert isolation == "limits" or printed[2] == "False"


def test_unit_tests_in_the_pool(functions: Path) -> None:
    isolation = "limits" if namespaces.args[0] else "namespaces"
    settings = data(
        "unit_tests", rewards_execute_code=True, reward_timeout=5.0, reward_processes=1, rewards_isolation=isolation
    )
    block = "```python\ndef add(a, b):\n    return {}\n```\n"
    texts = (block.format("a - b") + block.format("a + b"), block.format("a - b"), "no code")
    with RewardPool(settings) as pool:
        scores = pool.score(inputs(*texts, tests=["assert add(1, 1) == 2", "assert add(2, 1) == 3"]))
    assert scores.values == [[1.0], [0.0], [0.0]]
    assert not any(scores.failed)


def test_a_node_that_cannot_isolate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bool:
        raise OSError("cannot isolate a process (unshare: Operation not permitted)")

    monkeypatch.setattr(sandbox, "passes", refuse)
    with pytest.raises(UserError, match=r"this node cannot isolate .*unshare: .*set data.rewards_isolation=limits"):
        check_functions(data("unit_tests", rewards_execute_code=True))
