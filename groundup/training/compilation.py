"""torch.compile for the blocks, in a cache folder of our own, with a way back.

Only what is trained is compiled: validation, with rows of other lengths, and generation run as they are. A compiler
that is killed can leave a truncated object in its cache. Every later compile of that graph then fails ("file too
short"), or, if the object was the test of the machine's vector units, any compile. So truncated objects are looked for
and removed before the first compile, and after one that fails, which is then tried once more. What fails again costs
one line and the speed, not the run.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime import cache_dir_utils

from groundup.console import Console
from groundup.model import Transformer
from groundup.model.transformer import Block
from groundup.training.measured import cache_root

TRUNCATED = ("file too short", "invalid ELF header", "EOFError", "unexpected end of data")
_CACHE = "TORCHINDUCTOR_CACHE_DIR"

MEMORY_SHARE = 0.97
"""Of what the compiler would keep for the backward pass, what it may: casts of weights and activations are computed
again. From `WIDE` on that costs no time that can be measured, and saves a tenth of the peak."""
WIDE = 256


class CompiledBlocks:
    """A model whose blocks are compiled, each at its first use in training.

    Args:
        model: its blocks' `compute` is replaced.
        console: where a failure is told, once.

    Attributes:
        failure: what the compiler said, or None.
    """

    def __init__(self, model: Transformer, console: Console) -> None:
        _use_own_cache()
        self.failure: str | None = None
        self._console, self._blocks = console, model.blocks
        self._is_wide = model.config.d_model >= WIDE
        self._clear()
        for block in self._blocks:
            block.compute = self._with_a_way_back(block)

    def undo(self) -> None:
        """Have the blocks compute as they are."""
        for block in self._blocks:
            block.compute = block.eager

    def _with_a_way_back(self, block: Block) -> Callable[..., Any]:
        plain = block.eager
        compiled: Callable[..., Any] = torch.compile(plain)

        def run(x: Any, rotation: Any, sight: Any = None, cached: Any = None) -> Any:
            nonlocal compiled
            if self.failure is None and cached is None and torch.is_grad_enabled():
                for attempt in range(2):
                    try:
                        with self._memory_budget():
                            return compiled(x, rotation, sight)
                    except Exception as error:  # whatever a compiler may raise
                        if not _is_compilers(error):
                            raise
                        if attempt == 0 and self._clear():
                            torch._dynamo.reset()
                            compiled = torch.compile(plain)
                            continue
                        self._give_up(error)
                        break
            return plain(x, rotation, sight, cached)

        return run

    def _memory_budget(self) -> AbstractContextManager[Any]:
        config: Any = getattr(torch._functorch, "config", None)
        if not self._is_wide or not hasattr(config, "activation_memory_budget"):
            return nullcontext()
        budget: AbstractContextManager[Any] = config.patch(activation_memory_budget=MEMORY_SHARE)
        return budget

    def _clear(self) -> bool:
        """Remove what a killed compiler left in the cache, if it is ours; whether there was anything."""
        cache = cache_folder()
        removed = remove_truncated(cache) if os.environ[_CACHE] == str(cache) else []
        if removed:
            self._console.note(
                f"{len(removed)} truncated objects of a killed compiler are removed: {removed[0].parent}"
            )
        return bool(removed)

    def _give_up(self, error: Exception) -> None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self.failure = " ".join(lines[:2]) or type(error).__name__
        self._console.warn(f"torch.compile failed ({self.failure:.200}); training goes on without it.")


def cache_folder() -> Path:
    """Where compiled code is kept: `groundup/compiled` in the user's cache, by version of torch."""
    return cache_root() / "compiled" / str(torch.__version__)


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile would call for a CPU, or None."""
    return shutil.which(os.environ.get("CXX") or "") or next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def _use_own_cache() -> None:
    """Unless somebody has chosen another; torch notes its default in the same variable when it is first asked."""
    default = getattr(cache_dir_utils, "default_cache_dir", lambda: None)()
    if os.environ.get(_CACHE) in (None, default):
        os.environ[_CACHE] = str(cache_folder())


def remove_truncated(cache: Path) -> list[Path]:
    """Remove the shared objects (ELF) under a folder that end before their table of sections; return them."""
    found = [path for path in cache.rglob("*.so") if _is_truncated(path)]
    for path in found:
        path.unlink(missing_ok=True)
    return found


def _is_truncated(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            head, size = handle.read(64), os.fstat(handle.fileno()).st_size
    except OSError:
        return False
    if len(head) < 64:
        return True
    if head[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian: all others are left alone
        return False
    (table,) = struct.unpack_from("<Q", head, 40)
    entry_size, n_entries = struct.unpack_from("<HH", head, 58)
    return bool(size < table + entry_size * n_entries)


def _is_compilers(error: Exception) -> bool:
    """Whether the compiler raised it, and not the model."""
    kind = type(error)
    return kind.__module__.startswith(("torch._dynamo", "torch._inductor")) or isinstance(error, ImportError)
