"""torch.compile for the blocks, in a cache folder of our own, with a way back.

A compiler that is killed can leave a truncated object in its cache, and every later compile of that graph then fails
("file too short"). Such a cache is cleared and the compile tried once more; what fails again, or for another reason,
costs one line and the speed, not the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groundup.console import Console
from groundup.model import Transformer

TRUNCATED = ("file too short", "invalid ELF header", "EOFError", "unexpected end of data")


def cache_folder() -> Path:
    """Where compiled code is kept: `groundup/compiled` in the user's cache, by version of torch."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "groundup" / "compiled" / torch.__version__


def compile_blocks(model: Transformer, console: Console) -> None:
    """Compile every block at its first use; a block whose compiler fails runs as it is, and one line says so."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    told: list[str] = []
    for block in model.blocks:
        block.compute = _with_a_way_back(block.compute, told, console)


def _with_a_way_back(function: Callable[..., Any], told: list[str], console: Console) -> Callable[..., Any]:
    compiled: Callable[..., Any] | None = torch.compile(function)

    def run(*arguments: Any) -> Any:
        nonlocal compiled
        for attempt in range(2):
            if compiled is None:
                break
            try:
                return compiled(*arguments)
            except Exception as error:  # whatever a compiler may raise
                if not _is_compilers(error):
                    raise
                if attempt == 0 and any(sign in str(error) for sign in TRUNCATED):
                    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
                    torch._dynamo.reset()
                    compiled = torch.compile(function)
                    continue
                compiled = None
                if not told:
                    told.append(str(error))
                    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    console.warn(f"torch.compile failed ({first:.200}); training goes on without it.")
        return function(*arguments)

    return run


def _is_compilers(error: Exception) -> bool:
    """Whether the compiler raised it, and not the model."""
    kind = type(error)
    return kind.__module__.startswith(("torch._dynamo", "torch._inductor")) or isinstance(error, ImportError)
