"""Items in groups of a certain size, whatever they are."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def batches(items: Iterable[Item], most: int, size: Callable[[Any], int] = len) -> Iterator[list[Item]]:
    """Items (texts, if no `size` is given) in groups; each ends with the item that brings its size to `most`."""
    batch: list[Item] = []
    so_far = 0
    for item in items:
        batch.append(item)
        so_far += size(item)
        if so_far >= most:
            yield batch
            batch, so_far = [], 0
    if batch:
        yield batch
