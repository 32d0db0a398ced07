"""How fast shards are written and read: batches of the three loaders, random access, validation, raw writing.

Figures are for one process, in tokens or bytes per second of CPU time; each is the best and the spread of several
rounds. The shards are generated: random ids, documents of about 500 tokens, so that only the loader is measured.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import spread, write_result

from groundup.shards import MixtureLoader, PackedLoader, TokenShards, WindowLoader, validation_windows
from groundup.shards.format import ShardsManifest, Split
from groundup.shards.stream import StreamWriter

VOCABULARY = 32_768
END_OF_TEXT = 0
SEQUENCE_LENGTH = 1024
BATCH_SIZE = 64
SHARD_TOKENS = 10_000_000


def main() -> None:
    """Measure everything, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="groundup-loader-"))
    try:
        write_seconds = [timed(lambda: write(folder / "a", arguments.tokens, 1)) for _ in range(arguments.rounds)]
        write(folder / "b", arguments.tokens // 4, 2)
        rows = measure(folder, arguments.batches, arguments.rounds)
        n_bytes = 2 * arguments.tokens
        writing = spread([n_bytes / 1e6 / seconds for seconds in write_seconds])
    finally:
        shutil.rmtree(folder)
    for name, row in rows.items():
        print(f"| {name} | {row['million_tokens_per_cpu_second']['median']:,.0f} M tokens/s |")
    print(f"| writing, checksums included | {writing['median']:,.0f} MB/s |")
    write_result(
        "loader",
        {
            "target": "100 M tokens/s",
            "tokens": arguments.tokens,
            "sequence_length": SEQUENCE_LENGTH,
            "batch_size": BATCH_SIZE,
            "batches_a_round": arguments.batches,
            "rows": rows,
            "writing_mb_per_cpu_second": writing,
        },
    )


def write(folder: Path, n_tokens: int, seed: int) -> None:
    """Shards of random ids."""
    block, ends = blocks(seed)
    with StreamWriter(folder, "train", np.dtype("<u2"), SHARD_TOKENS) as writer:
        for _ in range(n_tokens // len(block)):
            writer.append(block, ends)
        files = writer.finish()
    splits = {
        "train": Split(sum(one.tokens for one in files), sum(one.documents for one in files), 0, files),
        "validation": Split(0, 0, 0, ()),
    }
    ShardsManifest(VOCABULARY, "0" * 32, END_OF_TEXT, splits).write(folder)


def blocks(seed: int, n_tokens: int = 1_000_000) -> tuple[np.ndarray, np.ndarray]:
    """A million ids, and where documents end in them."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(1, VOCABULARY, n_tokens).astype("<u2")
    ends = np.unique(np.append(draw.integers(1, n_tokens, n_tokens // 500), n_tokens))
    ids[ends - 1] = END_OF_TEXT
    return ids, ends


def measure(folder: Path, n_batches: int, rounds: int) -> dict[str, dict[str, object]]:
    """Tokens per second of each way to read."""
    shards, more = (TokenShards.open(folder / name, "train") for name in "ab")
    windows = WindowLoader(shards, SEQUENCE_LENGTH, BATCH_SIZE, seed=1)
    mixture = MixtureLoader([(shards, 3), (more, 1)], SEQUENCE_LENGTH, BATCH_SIZE, seed=1)
    places = np.random.default_rng(0).integers(0, 10**9, n_batches).tolist()
    steps = list(range(n_batches))

    def batches(loader: WindowLoader | MixtureLoader | PackedLoader, order: list[int]) -> Callable[[], None]:
        def way() -> None:
            for step in order:
                loader.batch(step)

        return way

    def in_order() -> None:
        for _ in validation_windows(shards, SEQUENCE_LENGTH, n_batches * BATCH_SIZE * SEQUENCE_LENGTH):
            pass

    ways = {
        "windows, batch after batch": batches(windows, steps),
        "windows, any batch at once": batches(windows, places),
        "mixture of two": batches(mixture, steps),
        "windows with documents (packing)": batches(PackedLoader(windows), steps),
        "validation, in order": in_order,
    }
    n_tokens = n_batches * BATCH_SIZE * SEQUENCE_LENGTH
    rows: dict[str, dict[str, object]] = {}
    for name, way in ways.items():
        way()  # the files are in the page cache from now on
        rates = [n_tokens / 1e6 / timed(way) for _ in range(rounds)]
        rows[name] = {"million_tokens_per_cpu_second": spread(rates)}
    return rows


def timed(work: Callable[[], None]) -> float:
    """CPU seconds of the process."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
