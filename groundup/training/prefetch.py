"""The next batch is made and moved to the device while this one is computed; Python's garbage collector waits its turn.

A batch is a pure function of its place, so making it early changes nothing. A collection in the midst of a step stops
every process that waits for this one; between steps, now and then, it costs nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")

STEPS_BETWEEN_COLLECTIONS = 200


class Prefetcher(Generic[Batch]):
    """Makes one batch ahead, in a thread. Use it in a `with` statement.

    Args:
        make: the batch of a place.
    """

    def __init__(self, make: Callable[[int], Batch]) -> None:
        self._make = make
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="next batch")
        self._next: tuple[int, concurrent.futures.Future[Batch]] | None = None

    def take(self, place: int, following: int | None) -> Batch:
        """The batch of `place`; that of `following` is begun (None: there is none)."""
        is_ahead = self._next is not None and self._next[0] == place
        batch = self._next[1].result() if is_ahead and self._next is not None else self._make(place)
        self._next = None if following is None else (following, self._thread.submit(self._make, following))
        return batch

    def __enter__(self) -> Prefetcher[Batch]:
        return self

    def __exit__(self, *error: object) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a batch, on CUDA through pinned memory, so that the copy runs beside the arithmetic."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextlib.contextmanager
def collections_between_steps() -> Iterator[Callable[[int], None]]:
    """Within this block garbage is collected only when the function that is given says so: once every some steps."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % STEPS_BETWEEN_COLLECTIONS == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
