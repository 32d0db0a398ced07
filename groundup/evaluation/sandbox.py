"""Run a program that a model wrote, where it can do no harm.

The program runs in the kernel's own isolation: its own mount, network, process, host-name and IPC namespaces, a root
that holds a read-only Python and an empty `/tmp` in memory, no `/proc`, no environment, not the machine's root, no
capabilities, limits on time, memory, processes, files and output, and a system-call filter. `unshare`, `mount` and
`setpriv` of util-linux and `timeout` of coreutils set it up; they need no installation on Linux.

A program has passed when it ran to its end: then the process that holds it sends a random word, which neither an exit
code of 0 nor anything printed can replace. A program that is written to attack its own process may find that word; what
it cannot do is to reach anything outside. One that turns its alarm off is ended from outside, 20 seconds later. Where
the namespaces cannot be had, nothing runs unless the caller says so, and then never as root.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from groundup.errors import DataError

_MIB = 1024 * 1024
_START_SECONDS = 20  # for namespaces and interpreter on a busy machine, beside the program's own time
_USERS = (200_000, 1_000_000_000)  # nobody has these numbers, so nobody's processes count towards the limit


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0  # of wall clock, and of CPU in each process
    memory_bytes: int = 512 * _MIB  # of address space in each process
    processes: int = 4  # at once, threads counted
    disk_bytes: int = 16 * _MIB  # in its `/tmp`, which is memory
    output_bytes: int = _MIB  # printed, and in one file


USUAL = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool  # it ran to its end
    reason: str  # "passed", "timeout", or the last line that it printed or how it ended
    output: str  # the beginning of what it printed
    seconds: float  # of wall clock, the start of the interpreter included


def run_program(program: str, limits: Limits = USUAL, *, allow_unisolated: bool = False) -> Outcome:
    """Run Python source in the sandbox; only the standard library is there.

    Args:
        program: the source. It passes if it runs to its end without an exception.
        limits: what it may use.
        allow_unisolated: run it with limits only where there are no namespaces, as the user of this process; in place
            of root, as nobody's.

    Raises:
        DataError: as `check_sandbox`; or this process is root, and can start nothing as another user.
    """
    isolation = check_sandbox(allow_unisolated=allow_unisolated)
    user = _nobodys() if isolation == "none" and os.geteuid() == 0 else None
    word = secrets.token_hex(16)
    order = {"program": program, "word": word, **asdict(limits)}
    reader, writer = os.pipe()
    start = time.perf_counter()
    with tempfile.TemporaryFile() as printed, os.fdopen(reader, "rb") as answer, tempfile.TemporaryDirectory() as home:
        order |= {"answer": writer, "isolated": isolation != "none"}
        command = [_python(), "-I", "-S", "-c", _DRIVER] if isolation == "none" else _isolated(home, limits)
        try:
            if user is not None:
                os.chown(home, user, user)
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                cwd=home,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        except OSError as error:
            if user is None:
                raise
            what = f"a program written by a model is not run as root, and not as another user either ({error})."
            raise DataError(what, "Run groundup as an ordinary user.") from error
        finally:
            os.close(writer)
        with process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(order).encode(), timeout=limits.seconds + 2 * _START_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of it; in a namespace nothing is
        os.set_blocking(reader, False)  # a process that got away may hold the other end
        said = (answer.read(1024) or b"").decode(errors="replace")
        printed.seek(0)
        output = printed.read(64 * 1024).decode(errors="replace")
    seconds, passed = time.perf_counter() - start, said == word
    if passed or said == "timeout" or seconds > limits.seconds + 1:
        reason = "passed" if passed else "timeout"
    elif process.returncode == 0:
        reason = "left before its end"
    else:
        reason = (output.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:200]
    return Outcome(passed, reason, output, seconds)


def check_sandbox(*, allow_unisolated: bool) -> str:
    """`sandbox_level`. Raises DataError: there are no namespaces on this machine, and nothing allows to do without."""
    if (isolation := sandbox_level()) == "none" and not allow_unisolated:
        raise DataError(
            "a program written by a model is not run: this machine gives no namespaces to isolate it.",
            "Run it on Linux with util-linux and user namespaces (in a container: --privileged), or allow it to run "
            "as yourself, with limits only: allow_unisolated=True, on the command line --unisolated-code.",
        )
    return isolation


@functools.cache
def sandbox_level() -> str:
    """What protects this machine from a program: "namespaces and seccomp", "namespaces", or "none"."""
    if not sys.platform.startswith("linux"):
        return "none"
    with tempfile.TemporaryDirectory() as home:
        order = {"program": "", "word": "", "answer": 2, "isolated": True, **asdict(Limits())}
        try:
            tried = subprocess.run(
                _isolated(home, Limits()), input=json.dumps(order).encode(), capture_output=True, timeout=60, cwd=home
            )
        except (OSError, subprocess.TimeoutExpired):
            return "none"
    if tried.returncode != 0:
        return "none"
    return "namespaces" if b"no seccomp" in tried.stdout else "namespaces and seccomp"


def _python() -> str:
    """The interpreter behind a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _nobodys() -> int:
    """The number of a user and group that nobody has."""
    return secrets.randbelow(_USERS[1] - _USERS[0]) + _USERS[0]


def _isolated(home: str, limits: Limits) -> list[str]:
    """The command that makes a new root at `home`, gives up every privilege and starts the driver in it.

    Root becomes another user at the end. Anybody else is root in a user namespace, still the same user outside of it,
    and gives up that root's capabilities.
    """
    prefix = os.path.realpath(sys.base_prefix)
    shown = {Path(path) for path in ("/usr", "/bin", "/lib", "/lib64", prefix, _python())}
    folders = sorted(
        path if path.is_dir() else path.parent
        for path in shown
        if path.exists() and not any(path != other and path.is_relative_to(other) for other in shown)
    )
    root = shlex.quote(home)
    lines = [
        "set -e",
        f"mount -t tmpfs -o mode=755,nosuid,nodev,size=1m none {root}",
        f"cd {root}",
        "mkdir tmp",
        f"mount -t tmpfs -o mode=1777,nosuid,nodev,size={limits.disk_bytes},nr_inodes=1000 none tmp",
    ]
    for folder in folders:  # one of them may be below /tmp
        inside = shlex.quote(f".{folder}")
        lines += [
            f"mkdir -p {inside}",
            f"mount --bind {shlex.quote(str(folder))} {inside}",
            f"mount -o remount,bind,ro,nosuid,nodev {inside}",
        ]
    is_root = os.geteuid() == 0
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    if is_root:
        user = _nobodys()
        drop += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    driver = shlex.join([*drop, _python(), "-I", "-S", "-c", _DRIVER])
    lines += [
        "mkdir dev",
        "for device in null urandom; do touch dev/$device; mount --bind /dev/$device dev/$device; done",
        "mkdir old proc",
        "mount --rbind /proc proc",  # umount reads it; it goes last
        "mount -o remount,bind,ro,nosuid,nodev .",
        "pivot_root . old",
        "umount -l old",
        "umount -l proc",
        "cd /tmp",
        # The first process is not the program, which could survive its own alarm, but one that it cannot signal.
        f"exec env -i timeout -s KILL {math.ceil(limits.seconds) + _START_SECONDS} {driver}",
    ]
    namespaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    user_namespace = [] if is_root else ["--user", "--map-root-user"]
    return ["unshare", *user_namespace, *namespaces, "sh", "-c", "\n".join(lines)]


_DRIVER = r'''
import ctypes, json, os, platform, resource, signal, struct, sys

order = json.loads(sys.stdin.buffer.read())
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

# System calls that a program has no use for: sockets, tracing, namespaces, mounts, keys, kernel interfaces, and memory
# that no limit counts: System V's, memfd_create, and fallocate of a file's disk beyond its end.
CALLS = {  # architecture, clone, ioctl, forbidden ones
    "x86_64": (0xC000003E, 56, 16, (
        29, 30, 41, 53, 64, 68, 101, 155, 161, 165, 166, 169, 175, 246, 248, 249, 250, 272, 285, 298, 304, 308, 310,
        311, 313, 319, 321, 323, 425, 426, 427, 428, 429, 430, 431, 432, 433, 435, 438, 442,
    )),
    "aarch64": (0xC00000B7, 220, 29, (
        39, 40, 41, 47, 51, 97, 104, 105, 106, 117, 142, 186, 190, 194, 196, 198, 199, 217, 218, 219, 241, 265, 268,
        270, 271, 273, 279, 280, 282, 425, 426, 427, 428, 429, 430, 431, 432, 433, 435, 438, 442,
    )),
}
EPERM, ENOSYS, ENOTTY = 1, 38, 25


def forbid():
    """A seccomp filter (BPF): these calls fail with EPERM, those of another architecture end the process."""
    arch, clone, ioctl, calls = CALLS[platform.machine()]
    number = (0x20, 0, 0, 0)  # load it
    ops = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), number]
    # clone of a thread or a process passes, with a flag of a new namespace it does not.
    ops += [(0x15, 0, 4, clone), (0x20, 0, 0, 16), (0x45, 0, 1, 0x7E020000), (0x06, 0, 0, 0x00050000 | EPERM), number]
    # clone3, whose flags cannot be seen, is "not there", so that clone is used; no file answers an ioctl.
    errors = dict.fromkeys(calls, EPERM) | {435: ENOSYS, ioctl: ENOTTY}
    for call, error in errors.items():
        ops += [(0x15, 0, 1, call), (0x06, 0, 0, 0x00050000 | error)]
    ops += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x00050000 | EPERM), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *op) for op in ops))
    program = ctypes.create_string_buffer(struct.pack("HL", len(ops), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


level = ""
if order["isolated"]:
    try:
        forbid()
    except (KeyError, OSError, AttributeError):
        level = "no seccomp"
seconds = int(order["seconds"]) + 1
for name, most in {
    "CPU": seconds, "AS": order["memory_bytes"], "NPROC": order["processes"], "FSIZE": order["output_bytes"],
    "NOFILE": 64, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "STACK": 8 << 20,
}.items():
    kind = getattr(resource, "RLIMIT_" + name, None)
    if kind is not None and (order["isolated"] or name != "NPROC"):
        resource.setrlimit(kind, (most, most))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that is full is an OSError
answer, word, program = order["answer"], order["word"], order["program"]
if not program and not word:
    print(level)
    sys.exit(0)


def too_long(*_):
    os.write(answer, b"timeout")
    os._exit(1)


signal.signal(signal.SIGALRM, too_long)
signal.setitimer(signal.ITIMER_REAL, order["seconds"])
del order
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
sys.stdout.flush()
os.write(answer, word.encode())
os._exit(0)
'''
