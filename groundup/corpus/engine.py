"""Where the pieces of the corpus stage's work run: this process, a pool of local ones, or a Ray cluster.

A piece is a module-level function and one picklable argument; it reads files, writes files and returns a small record.
Text never travels between processes, only names of files and counts. Results come in the order of the arguments, so
nothing depends on the number of workers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from groundup.environment import usable_cores
from groundup.errors import GroundupError

Argument = TypeVar("Argument")
Result = TypeVar("Result")

RAY_RETRIES = 5
SMALL_BYTES = 16 << 20
"""Less input than this is done faster by one process than by several that have to start first."""


class Engine:
    """Runs pieces of work in this process, one after the other; the others do the same elsewhere.

    Use it in a `with` statement: leaving it ends the workers.
    """

    n_workers = 1

    def map(self, function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Iterator[Result]:
        """`function` of each argument, in their order, as each becomes ready."""
        return map(function, arguments)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers."""


class LocalPool(Engine):
    """So many processes on this machine."""

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        # Forked from this process they would inherit its threads' locks (torch's among them) in whatever state.
        with _safe_path():  # its semaphores begin Python's own helper
            self._pool = concurrent.futures.ProcessPoolExecutor(
                n_workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
            )

    def map(self, function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Iterator[Result]:
        """As `Engine.map`. GroundupError: a worker was killed (most often: memory ran out)."""
        with _interrupts_held_back(), _safe_path():
            futures = [self._pool.submit(function, argument) for argument in arguments]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise GroundupError(
                "corpus: a worker process was killed; most often the machine ran out of memory.",
                "Give the same command again: finished pieces are kept. Lower [corpus] workers or memory_mib.",
            ) from error

    def __exit__(self, *error: object) -> None:
        """End the workers; after an error (or Ctrl-C) at once, for a piece of work can take many minutes."""
        processes = list(self._pool._processes.values())
        self._pool.shutdown(wait=error[0] is None, cancel_futures=True)
        if error[0] is not None:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()


class RayCluster(Engine):
    """Tasks of a Ray cluster: the one that RAY_ADDRESS names, else one started on this machine.

    All machines must see the same files under the same names. A task whose worker dies is run again elsewhere.
    """

    def __init__(self, n_workers: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise GroundupError(
                "[corpus] engine = 'ray': Ray is not installed.", "Run: pip install 'groundup[ray]'"
            ) from error
        self._ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            address = os.environ.get("RAY_ADDRESS")
            options: dict[str, Any] = {} if address else {"num_cpus": n_workers, "include_dashboard": False}
            try:  # "local": never one that runs on this machine for somebody else
                ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # Ray raises nothing more precise when a node does not start in time
                where = f"join the Ray cluster at {address}" if address else "start Ray on this machine"
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise GroundupError(
                    f"[corpus] engine = 'ray': could not {where} ({why}).",
                    "Check RAY_ADDRESS and RAY_AUTH_TOKEN, or use engine = 'local'.",
                ) from error
        self.n_workers = n_workers or int(self._ray.cluster_resources().get("CPU", 1))

    def map(self, function: Callable[[Argument], Result], arguments: Sequence[Argument]) -> Iterator[Result]:
        """As `Engine.map`. GroundupError: a task's workers died again and again."""
        task = self._ray.remote(max_retries=RAY_RETRIES, num_cpus=1)(_call)
        waiting = [task.remote(function, argument) for argument in arguments]
        try:
            # Nothing is cancelled on the way out: Ray 2.60 aborts the process when a finished task is cancelled.
            for reference in waiting:
                yield self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            raise GroundupError(
                f"corpus: Ray gave a piece of work up after {RAY_RETRIES} tries ({type(error).__name__}).",
                "Give the same command again: finished pieces are kept.",
            ) from error

    def __exit__(self, *error: object) -> None:
        """Leave the cluster, if this object joined it."""
        if self._ours:
            self._ray.shutdown()


def _call(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """What Ray runs: it takes no `functools.partial` for a task itself."""
    return function(argument)


def engine_for(kind: str, workers: int | None, input_bytes: int, small_bytes: int = SMALL_BYTES) -> Engine:
    """The engine that a recipe asks for: "local" or "ray", with so many workers.

    Without `workers`, one a core; or only this process, below `small_bytes`: it is done before others have begun.
    """
    if kind == "ray":
        return RayCluster(workers)
    n_workers = workers or (1 if input_bytes < small_bytes else usable_cores())
    return LocalPool(n_workers) if n_workers > 1 else Engine()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes begun within never see the Ctrl-C that a terminal sends to all of them; this one sees it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Processes begun within look for no module in the working folder, where a `random.py` would hide Python's."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ["PYTHONSAFEPATH"] = before or ""  # which is as good as unset


def _begin_worker() -> None:
    """Make a worker end with its parent, however that ends, and use one thread, since a core has one worker."""
    # Set before any library with threads is loaded.
    for name, value in (("OMP_NUM_THREADS", "1"), ("RAYON_NUM_THREADS", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
