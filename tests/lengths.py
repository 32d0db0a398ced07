"""How much of what is tried at random or at every place is tried: a sample in `make test`, all in `make test-long`."""

import os

IS_LONG = "GROUNDUP_LONG" in os.environ
N_KILLS = 20 if IS_LONG else 5


def examples(n: int) -> int:
    """How many of `n` random examples of a law are tried."""
    return n if IS_LONG else max(4, n * 2 // 5)
