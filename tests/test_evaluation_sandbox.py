"""Programs that a model wrote can do no harm: every way out fails, and only one that runs to its end has passed."""

import os
import shlex
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

import pytest

from groundup.errors import DataError
from groundup.evaluation import sandbox
from groundup.evaluation.sandbox import Limits, run_program, sandbox_level

isolated = pytest.mark.skipif(
    "CI" not in os.environ and sandbox_level() == "none", reason="this machine gives no namespaces"
)
MIB = 1024 * 1024
LIBC = """import ctypes, os, struct
libc, L = ctypes.CDLL(None), ctypes.c_long
CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
RESERVE = struct.pack("=hhiqqiIiiii", 0, 0, 0, 0, 1 << 30, 0, 0, 0, 0, 0, 0)
"""


def test_continuous_integration_has_the_sandbox() -> None:
    if "CI" not in os.environ:
        pytest.skip("not in continuous integration")
    assert sandbox_level() == "namespaces and seccomp"


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="nobody but root is anybody else here")
@isolated
def test_all_of_it_holds_for_an_ordinary_user() -> None:
    """Root runs this file once more as a user without privileges, to whom it shows Python, packages and checkout."""
    shown = {
        "python": sys.base_prefix,
        "packages": sysconfig.get_path("purelib"),
        "checkout": Path(__file__).parents[1],
    }
    with tempfile.TemporaryDirectory(dir="/var") as place:
        binds = [f"mkdir {place}/{name}; mount --bind '{path}' {place}/{name}" for name, path in shown.items()]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        run = [
            "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--inh-caps=-all",
            "env", f"HOME={place}/home", f"PYTHONPATH={place}/checkout:{place}/packages",
            f"{place}/python/bin/{version}", "-m", "pytest", "-q",
            "-p", "no:cacheprovider", f"{place}/checkout/tests/{Path(__file__).name}",
        ]  # fmt: skip
        lines = ["set -e", f"mount -t tmpfs -o mode=755 none {place}", *binds, f"cd {place}", f"exec {shlex.join(run)}"]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    n_skipped = 2 + ("CI" not in os.environ)  # this one, what is about root, what is about continuous integration
    assert f"{n_skipped} skipped" in done.stdout


@isolated
def test_a_program_passes_when_it_runs_to_its_end() -> None:
    outcome = run_program("import math, threading\nassert math.comb(4, 2) == 6\nprint('said')\n")
    assert (outcome.passed, outcome.reason, outcome.output) == (True, "passed", "said\n")


@isolated
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'not equal'", "AssertionError: not equal"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import os; os._exit(0)", "left before its end"),
        ("print('passed'); raise SystemExit(0)", "left before its end"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code 137"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
    ],
)
def test_what_does_not_run_to_its_end_has_not_passed(program: str, reason: str) -> None:
    outcome = run_program(program, Limits(seconds=0.5))
    assert (outcome.passed, outcome.reason) == (False, reason)


@isolated
@pytest.mark.parametrize(
    "program",
    [
        pytest.param("open('/etc/passwd').read()", id="a-file-of-the-machine"),
        pytest.param(f"open({os.fspath(Path(__file__))!r}).read()", id="a-file-of-the-project"),
        pytest.param("open('/proc/1/environ').read()", id="the-environment-of-a-process"),
        pytest.param("import os; os.listdir('/proc/self')", id="its-own-process-from-outside"),
        pytest.param("import os; os.symlink('/etc/passwd', '/tmp/l'); open('/tmp/l').read()", id="a-link-out"),
        pytest.param("import os; os.link('/usr/bin/env', '/tmp/l')", id="a-hard-link"),
        pytest.param("open('/usr/bin/mine', 'w')", id="writing-to-the-system"),
        pytest.param("open('/mine', 'w')", id="writing-to-the-root"),
        pytest.param("import os; os.chmod('/tmp/..', 0o777)", id="changing-the-root"),
        pytest.param("import socket; socket.create_connection(('127.0.0.1', PORT), 1)", id="a-socket"),
        pytest.param("import socket; socket.socket(socket.AF_UNIX)", id="a-local-socket"),
        pytest.param("import os; os.kill(PARENT, 9)", id="killing-the-parent"),
        pytest.param("import os; os.kill(os.getppid(), 9); os.kill(-1, 9); assert 0", id="killing-whoever-is-there"),
        pytest.param("import os; os.symlink('/', '/tmp/r'); open('/tmp/r/usr/mine', 'w')", id="writing-through-a-link"),
        pytest.param(
            "import os; os.symlink('../../../../etc', '/tmp/e'); print(os.listdir('/tmp/e'))", id="a-relative-link-out"
        ),
        pytest.param("import os; os.chroot('/tmp')", id="another-root"),
        pytest.param("import os; assert os.environ.get('GROUNDUP_SECRET')", id="the-parents-environment"),
        pytest.param("import os\nfor n in range(3, 64): os.listdir(n)", id="folders-that-were-left-open"),
        pytest.param("import os\nwhile True: os.write(1, bytes(1 << 20))", id="gigabytes-past-the-buffer"),
        pytest.param("import os; os.truncate('/tmp/f', 1 << 40) if open('/tmp/f', 'w') else 0", id="a-file-of-holes"),
        pytest.param("import os; os.setuid(0); os.chown('/tmp', 1, 1)", id="becoming-root"),
        pytest.param("import ctypes; assert ctypes.CDLL(None).unshare(0x10020000) == 0", id="new-namespaces"),
        pytest.param(
            "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0", id="a-mount"
        ),
        pytest.param("import ctypes; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0", id="tracing"),
        pytest.param("import os\nfor n in range(100): os.fork()", id="a-fork-bomb"),
        pytest.param("x = []\nwhile True: x.append(bytearray(1 << 24))", id="a-memory-bomb"),
        pytest.param("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", id="a-deep-stack"),
        pytest.param(
            "for n in range(100):\n    with open(f'/tmp/{n}', 'wb') as f: f.write(bytes(1 << 20))", id="a-full-disk"
        ),
        pytest.param("for n in range(10**6): open(f'/tmp/{n}', 'w')", id="a-million-files"),
        pytest.param("import sys\nfor n in range(10**5): sys.stdout.write('x' * 10**4)", id="a-gigabyte-printed"),
        pytest.param(LIBC + "assert libc.shmget(0, 1 << 20, 0o1600) >= 0", id="memory-that-nobody-counts"),
        pytest.param(LIBC + "assert libc.msgget(0, 0o1600) >= 0", id="messages-that-nobody-counts"),
        pytest.param("import os; os.memfd_create('x')", id="a-file-in-memory"),
        pytest.param(LIBC + "assert libc.fallocate(1, 1, L(0), L(1 << 30)) == 0", id="disk-behind-the-output"),
        pytest.param(LIBC + "assert libc.ioctl(1, 0x40305828, RESERVE) == 0", id="the-same-by-ioctl"),
        pytest.param(LIBC + "assert libc.syscall(CLONE, 0x10000011, 0, 0, 0, 0) >= 0", id="a-new-user-namespace"),
        pytest.param("import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))", id="raising-a-limit"),
    ],
)
def test_every_way_out_fails(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDUP_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        outcome = run_program(
            program.replace("PORT", port).replace("PARENT", str(os.getpid())),
            Limits(seconds=5, memory_bytes=256 * MIB, disk_bytes=8 * MIB),
        )
    assert not outcome.passed
    assert outcome.seconds < 60
    assert len(outcome.output) <= 64 * 1024
    assert "/etc" not in outcome.reason or "No such file" in outcome.reason


@isolated
def test_a_program_sees_no_environment_and_is_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDUP_SECRET", "secret")
    inside = run_program(
        "import os\nprint(sorted(set(os.environ) - {'LC_CTYPE'}), os.listdir('/tmp'), os.getppid())\n"
        "print(open('/proc/self/status').read() if os.path.exists('/proc/self/status') else 'no /proc')\n"
        "print(os.getuid() == 0 and os.geteuid() == 0)"
    )
    said = inside.output.splitlines()
    assert said[:2] == ["[] [] 1", "no /proc"]
    if os.getuid() == 0:
        assert said[2] == "False"


@pytest.mark.skipif(
    os.getuid() != 0 or not os.path.exists("/usr/bin/python3"), reason="about root, and anybody's Python"
)
def test_without_isolation_root_runs_nothing_as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "sandbox_level", lambda: "none")
    monkeypatch.setattr(sandbox, "_python", lambda: "/usr/bin/python3")  # this one may lie in root's own folder
    program = "import os; assert 0 not in (os.getuid(), os.getegid(), *os.getgroups()); open('mine', 'w')"
    outcome = run_program(program, allow_unisolated=True)
    assert outcome.passed, outcome.output

    def refused(*given: object, **more: object) -> None:
        raise PermissionError

    monkeypatch.setattr("subprocess.Popen", refused)
    with pytest.raises(DataError, match="not run as root"):
        run_program(program, allow_unisolated=True)


@isolated
def test_nothing_is_left_behind_by_a_program_that_starts_others() -> None:
    mark = f"groundup-left-{os.getpid()}"
    child = f"os.execv(sys.executable, ['python', '-c', 'import time; time.sleep(60)', {mark!r}])"
    assert run_program(f"import os, sys\nif os.fork() == 0: {child}", Limits(seconds=2)).passed
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _bytes(path)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@isolated
def test_a_program_that_turns_its_alarm_off_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START_SECONDS", 1)
    program = "import signal, time; signal.setitimer(signal.ITIMER_REAL, 0); time.sleep(60)"
    outcome = run_program(program, Limits(seconds=1))
    assert (outcome.passed, outcome.reason) == (False, "timeout")
    assert outcome.seconds < 20


@isolated
def test_a_link_to_the_interpreters_folder_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").symlink_to(sys.base_prefix)
    monkeypatch.setattr(sys, "base_prefix", os.fspath(tmp_path / "python"))
    assert run_program("import json").passed


@isolated
def test_nobody_outside_is_killed() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        everyone = f"for victim in (os.getppid(), {other.pid}, -1, 0):\n    with suppress(OSError): os.kill(victim, 9)"
        outcome = run_program(f"import os\nfrom contextlib import suppress\n{everyone}")
        assert other.poll() is None
        other.kill()
    assert not outcome.passed


@isolated
def test_an_interpreter_below_tmp_is_seen_and_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        (Path(place) / "mine.txt").write_text("seen")
        monkeypatch.setattr(sys, "base_prefix", place)
        monkeypatch.setattr(sandbox, "_python", lambda: os.path.realpath(sys.executable))
        assert run_program(f"assert open('{place}/mine.txt').read() == 'seen'").passed
        assert not run_program(f"open('{place}/mine.txt', 'w')").passed
        assert (Path(place) / "mine.txt").read_text() == "seen"


@isolated
def test_programs_run_side_by_side() -> None:
    outcomes: dict[int, bool] = {}
    threads = [
        threading.Thread(target=lambda n=n: outcomes.update({n: run_program(f"assert {n} % 2 == 0").passed}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {0: True, 1: False, 2: True, 3: False}


def test_without_namespaces_nothing_runs_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "sandbox_level", lambda: "none")
    with pytest.raises(DataError, match="allow_unisolated"):
        run_program("pass")
    if os.getuid() == 0:  # then it runs as somebody else, who may not have root's own Python
        if not os.path.exists("/usr/bin/python3"):
            pytest.skip("needs a Python that anybody may run")
        monkeypatch.setattr(sandbox, "_python", lambda: "/usr/bin/python3")
    assert run_program("pass", allow_unisolated=True).passed
    assert run_program("while True: pass", Limits(seconds=0.5), allow_unisolated=True).reason == "timeout"
    left = "import os, time\nif os.fork() == 0: os.setsid(); time.sleep(15); os._exit(0)"
    outcome = run_program(left, allow_unisolated=True)
    assert outcome.passed
    assert outcome.seconds < 10  # it is not waited for
