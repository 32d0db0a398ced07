"""Work on a disk that fails at the n-th operation: a process with `faulty_disk.c` in it, and one fork of it a piece.

The work is either a whole small training run (`train`) or nothing but what it writes (`save`). Run as a program it is
that process: it reads one order a line and answers each with one line, both JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES = {"count": 0, "kill": 1, "full": 2, "full once": 3}


@dataclass(frozen=True)
class Outcome:
    """How one piece of work on the disk ended.

    Attributes:
        status: its exit code, or minus the signal that ended it.
        told: what it told on its way; at its end, unless it was killed, how many file operations it made, of which
            kinds, and the message of the error that ended it.
    """

    status: int
    told: list[dict[str, Any]]

    def all(self, name: str) -> list[Any]:
        """The values it told under this name."""
        return [line[name] for line in self.told if name in line]

    @property
    def operations(self) -> int:
        """Its file operations; it must have come to an end."""
        return int(self.all("operations")[0])

    @property
    def kinds(self) -> str:
        """The first letters of open, write, truncate, sync, mkdir, rename and unlink; it must have come to an end."""
        return str(self.all("kinds")[0])

    @property
    def error(self) -> str | None:
        """What ended it; it must have come to an end."""
        found: str | None = self.all("error")[0]
        return found


class FaultyDisk:
    """A process that works in forks of itself. Use it in a `with` statement.

    Args:
        folder: where the shim is built.
    """

    def __init__(self, folder: Path) -> None:
        self._shim = folder / "faulty_disk.so"
        source = Path(__file__).with_name("faulty_disk.c")
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        assert compiler is not None
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", self._shim, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(self._shim), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._shim)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def do(self, work: str, folder: Path, mode: str = "count", at: int = -1, **options: Any) -> Outcome:
        """Do a piece of work in a folder, whose disk is as `mode` says from operation `at` on."""
        order = {"work": work, "folder": str(folder), "mode": mode, "at": at, "options": options}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> FaultyDisk:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve(shim: str) -> None:
    """Answer orders until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints goes elsewhere
    import test_training_loop  # noqa: F401  imported once, for all forks

    gc.freeze()  # training collects garbage: in the forks only theirs
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            run(ctypes.CDLL(shim), json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading) as lines:
            told = [json.loads(one) for one in lines]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(json.dumps({"status": status, "told": told}) + "\n")
        answers.flush()


def run(shim: ctypes.CDLL, order: dict[str, Any], writing: int) -> None:
    """Do one piece of work and leave this process."""
    import torch

    from groundup.errors import GroundupError

    def tell(**values: Any) -> None:
        os.write(writing, json.dumps(values).encode() + b"\n")

    status, error = 0, None
    try:
        torch.set_num_threads(1)
        works = {"train": train_a_little, "save": save_a_little}
        work = works[order["work"]](Path(order["folder"]), tell, **order["options"])
        shim.disk_arm(order["folder"].encode(), ctypes.c_long(order["at"]), MODES[order["mode"]])
        work()
    except GroundupError as refused:
        status, error = 1, str(refused)
    except BaseException as unexpected:
        status, error = 2, repr(unexpected)
    shim.disk_kinds.restype = ctypes.c_char_p
    tell(operations=shim.disk_operations(), kinds=shim.disk_kinds().decode(), error=error)
    os._exit(status)


def train_a_little(folder: Path, tell: Callable[..., None], **options: Any) -> Callable[[], object]:
    """A run of the tests' small job, which tells each step as it begins it."""
    from test_training_loop import QUIET, make_job

    from groundup.distributed import current_world
    from groundup.training import train

    job = make_job(folder, **options)
    job.model.register_forward_pre_hook(lambda model, arguments: tell(step=True) if model.training else None)
    return lambda: train(job, current_world(), QUIET)


def save_a_little(folder: Path, tell: Callable[..., None], keep: int = 1) -> Callable[[], object]:
    """What a run of two steps writes, and that its last checkpoint is written again with another shift.

    Tells each step that is in the log, in a checkpoint, and in the best model.
    """
    import torch

    from groundup.distributed import current_world
    from groundup.files import own_folder
    from groundup.model import preset
    from groundup.training.checkpoint import CheckpointWriter, Progress
    from groundup.training.metrics import MetricLog

    world = current_world()

    def work() -> None:
        own_folder(folder)
        own_folder(folder / "checkpoints")
        writer = CheckpointWriter(folder / "checkpoints", world, preset("ground-nano"), keep, beside=False)
        log = MetricLog(folder, 0)
        for step, shift in ((1, 0), (2, 0), (2, 7)):
            weights = {"w": torch.full((100,), float(step))}
            progress = Progress(step, 10 * step, 0.0, "print", 1, 1, shift, best_loss=1 / step)
            log.add("metrics", {"step": step, "loss": 1.0})
            log.flush()
            tell(logged=step)
            writer.save({"weights": lambda weights=weights: weights}, progress)  # type: ignore[misc]
            tell(saved=step)
            writer.save_best(weights, progress)
            tell(best=step)
        log.close()

    return work


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(sys.argv[1])
