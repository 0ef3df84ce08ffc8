"""Enter the sandbox and become the program in it: `python -I -S sandbox_entry.py PARENT < REQUEST`.

Run by path, with the standard library alone, so that it starts in milliseconds. REQUEST is JSON: the isolation, the
folder of the program, its files, its command, its environment, its limits, and the folders that it may read. A fault on
the way is written to stderr, which the program does not inherit.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 0x1000, 0x4000, 0x40000, 2
_PDEATHSIG, _FILTER_CALLS, _NO_NEW_PRIVILEGES = 1, 22, 38
_MOUNT_SETATTR, _HERE, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_FIRST_TRANSIENT_USER, _TRANSIENT_USERS = 61184, 4096
"""Ids that systemd keeps for users of one service alone (DynamicUser)."""
WORK = "/answer"
"""Folder of the program inside the namespaces."""
CALLS = {
    "x86_64": (0xC000003E, "56 41 250 248 249 319 447 29 64 68 278 275 276 40 272 308 109 112 425 321 57 58"),
    "aarch64": (0xC00000B7, "220 198 219 217 218 279 447 194 190 186 75 76 77 71 97 268 154 157 425 280"),
}
"""AUDIT_ARCH, the numbers of clone and socket, and of refused calls: keyctl, add_key, request_key (keys of the user);
memfd_create, memfd_secret, shmget, semget, msgget, vmsplice, splice, tee, sendfile (memory that no limit counts: a pipe
keeps pages without addresses); unshare, setns (a user namespace may mount memory); setpgid, setsid (the program is
killed by its group); io_uring_setup, bpf; fork, vfork."""


def main() -> None:
    """Become the program, or its parent, which ends with it."""
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
    request = json.load(sys.stdin)
    os.ftruncate(0, 0)  # The program may see the files that its parent has open.
    user, folder = None, request["folder"]
    if request["isolation"] == "namespaces":
        # The kernel holds no limit on the processes of root. Every run has a user of its own, who shares none with it.
        user = _FIRST_TRANSIENT_USER + os.getpid() % _TRANSIENT_USERS if os.geteuid() == 0 else None
        _leave_namespaces(as_user=user is None)
        if os.fork() > 0:  # The child is the first process of its namespace: all others in it end with it.
            os.wait()
            return
        _enter_root(folder, request["visible"], request["disk_bytes"])
        folder = WORK
    for name, content in request["files"].items():
        with open(os.path.join(folder, name), "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(content)
    os.chdir(folder)
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _refuse_calls()
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # Again: a change of the user clears it, and a fork does.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    environment = {**request["environment"], "HOME": folder, "TMPDIR": folder}
    os.execve(request["command"][0], request["command"], environment)


def _leave_namespaces(*, as_user: bool) -> None:
    user, group = os.getuid(), os.getgid()
    _call("unshare", _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK | (_NEW_USER if as_user else 0))
    if as_user:  # The same ids: the program has no other rights, and loses those of the namespace by execve.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _enter_root(root: str, visible: list[str], disk_bytes: int) -> None:
    """Make a file system of what is visible, read-only, and of an empty folder WORK, and leave the other one."""
    _call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    _mount("tmpfs", root, "tmpfs", 0, f"size={disk_bytes},mode=755")
    for path in visible:
        place = root + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), place)
            continue
        if os.path.isdir(path):
            os.makedirs(place, exist_ok=True)
        else:
            os.close(os.open(place, os.O_CREAT, 0o644))
        _mount(path, place, None, _BIND | _RECURSIVE)
    for name in ("/proc", WORK):
        os.mkdir(root + name)
    with contextlib.suppress(OSError):  # A container that hides parts of /proc lets none be mounted; Python needs none.
        _mount("proc", root + "/proc", "proc")
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    _call("syscall", _MOUNT_SETATTR, _HERE, root.encode(), _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _mount("tmpfs", root + WORK, "tmpfs", 0, f"size={disk_bytes},nr_inodes=4096,mode=777")
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _DETACH)


def _refuse_calls() -> None:
    """Refuse CALLS and new processes, but not threads: the limits of one process are those of the program."""
    machine = os.uname().machine
    if machine not in CALLS:
        raise OSError(f"the system calls of {machine} are not known")
    architecture, numbers = CALLS[machine]
    clone, socket, *refused = map(int, numbers.split())
    _LIBC.syscall(refused[0], 1, None)  # An empty keyring of the session. Where this is refused, /proc/keys is hidden.
    load, mask, is_equal, is_above, answer = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x50001, 0x50026  # EPERM, ENOSYS
    thread, clone3 = 0x10400, 435  # CLONE_THREAD | CLONE_FILES. The flags of clone3 are not visible: glibc calls clone.
    steps = [(load, 0, 0, 4), (is_equal, 1, 0, architecture), (answer, 0, 0, refuse), (load, 0, 0, 0)]
    for number in refused:
        steps += [(is_equal, 0, 1, number), (answer, 0, 0, refuse)]
    steps += [(is_above, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # x32: the same calls by other numbers.
    steps += [(is_equal, 0, 1, clone3), (answer, 0, 0, unknown)]
    steps += [(is_equal, 0, 4, socket), (load, 0, 0, 16), (is_above, 0, 1, 17), (answer, 0, 0, refuse)]
    steps += [(answer, 0, 0, allow)]  # Families above: AF_VSOCK reaches the hypervisor from each network namespace.
    steps += [(is_equal, 1, 0, clone), (answer, 0, 0, allow), (load, 0, 0, 16), (mask, 0, 0, thread)]
    steps += [(is_equal, 0, 1, thread), (answer, 0, 0, allow), (answer, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    _call("prctl", _FILTER_CALLS, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0)


def _mount(source: str, place: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    _call("mount", os.fsencode(source), os.fsencode(place), kind and kind.encode(), flags, options.encode() or None)


def _call(name: str, *arguments: object) -> None:
    """Call a function of C. Raises OSError with its name."""
    if getattr(_LIBC, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


if __name__ == "__main__":
    faults = os.dup(2)
    try:
        main()
    except Exception as error:
        os.write(faults, str(getattr(error, "strerror", None) or error).encode())
        os._exit(1)
