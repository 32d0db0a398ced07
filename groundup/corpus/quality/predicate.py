"""A rule of the user's own: a Python function in a file of theirs that keeps a document or not.

In: `file.py:function` as the recipe says. Out: that function, wrapped so that its failure names the document.
"""

from __future__ import annotations

from collections.abc import Callable

from groundup.corpus.document import Document
from groundup.errors import DataError
from groundup.user_code import function_fingerprint, in_words, load_function

Predicate = Callable[[Document], bool]


def load_predicate(spec: str) -> Predicate:
    """The function that `file.py:function` names.

    Args:
        spec: a path, a colon, a name; the function takes a `Document` and returns whether to keep it.

    Raises:
        DataError: at once, if the file or the function is missing, the file is not trusted or fails; later, if the
            function raises on a document or returns something that is neither true nor false.
    """
    where = _where(spec)
    function = load_function(spec, where, "def {name}(document): return len(document.text) > 100")

    def keep(document: Document) -> bool:
        which = f"document {document.id} of {document.source}"
        try:
            answer = function(document)
        except (Exception, SystemExit) as error:
            fix = "Make it accept every document, or catch the error inside it."
            raise DataError(f"{where}: it fails on {which} ({in_words(error)}).", fix) from error
        if answer is None or not (isinstance(answer, bool) or hasattr(answer, "__bool__")):
            fix = "Return True to keep a document, False to drop it."
            raise DataError(f"{where}: it returns {answer!r} for {which}.", fix)
        return bool(answer)

    return keep


def predicate_fingerprint(spec: str) -> str:
    """Digest of the predicate's file and name: another one means that documents are judged again.

    Raises:
        DataError: there is no such file.
    """
    return function_fingerprint(spec, _where(spec))


def _where(spec: str) -> str:
    return f"[corpus] predicate = {spec!r}"
