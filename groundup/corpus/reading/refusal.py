"""Why something read is not used: the errors of reading, each with the reason under which it is counted."""

from __future__ import annotations

from groundup.corpus.document import Reason, SetAside


class RefusedError(Exception):
    """What cannot be used: a record, a page, a file from some place on that does not hold what its format promises.

    Attributes:
        reason, detail, size_bytes: as in `SetAside`.
        is_within: whether bytes of the same member were handed out before: they are not to be trusted either.
    """

    def __init__(self, reason: Reason, detail: str, size_bytes: int = 0, is_within: bool = False) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.size_bytes, self.is_within = reason, detail, size_bytes, is_within

    def of(
        self, label: str, place: str, number: int, excerpt: str = "", size_bytes: int = 0, position: int = 0
    ) -> SetAside:
        """What to list."""
        return SetAside(label, place, number, self.reason, self.detail, excerpt, size_bytes, position)


READ_ERRORS = (OSError, RefusedError)
"""What a stream of an `InputFile` raises while it is read."""


def fault_of(error: Exception) -> RefusedError:
    """One of `READ_ERRORS`, or UnicodeDecodeError, with its reason."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, UnicodeDecodeError):
        return RefusedError(Reason.INVALID_UTF8, f"byte {error.start} ({error.reason})")
    return RefusedError(Reason.UNREADABLE, getattr(error, "strerror", None) or str(error) or type(error).__name__)
