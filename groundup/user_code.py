"""Code of the user's own that a recipe names, `file.py:function`: a predicate, a reward.

A recipe may come from a stranger, and the file it names is run. So a file is refused until it is trusted, by
`groundup trust FILE` (its digest is remembered: a changed file is asked for again) or, in scripts, by `--trust`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from groundup.errors import DataError, GroundupError
from groundup.files import file_digest, read_json, write_json

TRUST_ALL = "GROUNDUP_TRUST"
"""Set to 1 in the environment by `--trust`, for this process and those that it starts."""


def load_function(spec: str, where: str, example: str = "") -> Callable[..., Any]:
    """The function that `file.py:function` names; the file is run.

    Args:
        spec: a path, a colon, a name.
        where: in the recipe, for messages.
        example: how such a function is written.

    Raises:
        DataError: the file or the function is missing, the file is not trusted, or it fails.
    """
    path, name = _parts(spec, where)
    if not is_trusted(path):
        raise DataError(
            f"{where}: {path} is code, and it would be run.", f"Read it. If you trust it:  groundup trust {path}"
        )
    # A name of its own for every path: two files called filter.py must not become one module.
    module_name = f"groundup_user_{xxhash.xxh3_64_hexdigest(str(path.resolve()).encode())}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise DataError(f"{where}: {path} fails ({in_words(error)}).", "Run it by itself to see where.") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        fix = f"It has: {', '.join(there)}." if there else f"Write: {example.format(name=name)}" if example else None
        raise DataError(f"{where}: {path} has no function {name!r}.", fix)
    return function


def answer_calls(spec: str, where: str, pipe: Any) -> None:
    """The work of a process that calls a function for another one: tuples of arguments in, (failed, result) out.

    It begins with "ready", and ends when the other end of the pipe is gone. Results are numbers or texts.
    """
    function = load_function(spec, where)
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            arguments = pipe.recv()
            try:
                value = function(*arguments)
                pipe.send((False, value if isinstance(value, int | float | str) else float(value)))
            except (Exception, SystemExit) as error:
                pipe.send((True, in_words(error)))


def function_fingerprint(spec: str, where: str) -> str:
    """Digest of the function's file, and its name; what the file imports is not looked at.

    Raises:
        DataError: there is no such file.
    """
    path, name = _parts(spec, where)
    return f"{file_digest(path)}:{name}"


def trust(path: Path) -> str:
    """Remember that the code in this file may be run as it is now; its digest.

    Raises:
        DataError: no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    digest = file_digest(path)
    place = _trusted_file()
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, {**_trusted(), digest: str(path.resolve())})
    return digest


def is_trusted(path: Path) -> bool:
    """Whether the code in this file may be run as it is now."""
    return os.environ.get(TRUST_ALL) == "1" or file_digest(path) in _trusted()


def in_words(error: BaseException) -> str:
    """An exception of the user's code, for a message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _trusted_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "groundup" / "trusted.json"


def _trusted() -> dict[str, str]:
    with contextlib.suppress(GroundupError, OSError):
        found = read_json(_trusted_file())
        return found if isinstance(found, dict) else {}
    return {}


def _parts(spec: str, where: str) -> tuple[Path, str]:
    place, _, name = spec.rpartition(":")
    path = Path(place).expanduser()
    if not place or not name.isidentifier():
        wrong = "not a file and a function"
    elif not path.is_file():
        wrong = f"there is no file {place}"
    elif path.suffix != ".py":
        wrong = f"{place} is not a Python file (.py)"
    else:
        return path, name
    raise DataError(f"{where}: {wrong}.", 'Write "file.py:function".')
