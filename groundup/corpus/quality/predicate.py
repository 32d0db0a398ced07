"""A rule of the user's own: a Python function in a file of theirs that keeps a document or not.

In: `file.py:function` as the recipe says. Out: that function, wrapped so that its failure names the document. The
file is code, and it is run: name only files that you trust.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import xxhash

from groundup.corpus.document import Document
from groundup.errors import DataError
from groundup.files import file_digest

Predicate = Callable[[Document], bool]


def load_predicate(spec: str) -> Predicate:
    """The function that `file.py:function` names; it takes a `Document` and returns whether to keep it.

    Raises:
        DataError: at once, if the file or the function is missing or the file fails; later, if the function raises
            on a document or returns something that is neither true nor false.
    """
    path, name = _parts(spec)
    where = f"[corpus] predicate = {spec!r}"
    # A name of its own for every path: two files called filter.py must not become one module.
    module_name = f"groundup_predicate_{xxhash.xxh3_64_hexdigest(str(path.resolve()).encode())}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise DataError(f"{where}: {path} fails ({_in_words(error)}).", "Run it by itself to see where.") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        example = f"Write: def {name}(document): return len(document.text) > 100"
        fix = f"It has: {', '.join(there)}." if there else example
        raise DataError(f"{where}: {path} has no function {name!r}.", fix)

    def keep(document: Document) -> bool:
        which = f"document {document.id} of {document.source}"
        try:
            answer = function(document)
        except (Exception, SystemExit) as error:
            fix = "Make it accept every document, or catch the error inside it."
            raise DataError(f"{where}: it fails on {which} ({_in_words(error)}).", fix) from error
        if answer is None or not (isinstance(answer, bool) or hasattr(answer, "__bool__")):
            fix = "Return True to keep a document, False to drop it."
            raise DataError(f"{where}: it returns {answer!r} for {which}.", fix)
        return bool(answer)

    return keep


def predicate_fingerprint(spec: str) -> str:
    """Digest of the predicate's file (not of what it imports) and name. DataError: there is no such file."""
    path, name = _parts(spec)
    return f"{file_digest(path)}:{name}"


def _parts(spec: str) -> tuple[Path, str]:
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
    raise DataError(f"[corpus] predicate = {spec!r}: {wrong}.", 'Write "file.py:function".')


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
