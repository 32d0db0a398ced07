"""Raw files to clean documents: read, measure, select by rules and duplicates, hold out a part."""

from groundup.corpus.curate import curate, stream_documents
from groundup.corpus.document import Document, Reason, Record, SetAside
from groundup.corpus.engine import engine_for
from groundup.corpus.inputs import input_fingerprint
from groundup.corpus.passes import ANNOTATED, DOCUMENTS
from groundup.corpus.reading.read import read

VERSION = 2
"""Raised when the code's results change; part of the stage's fingerprint."""

KEEPS = (ANNOTATED,)
"""What stays of the stage's folder when the recipe changes: every piece in it is checked by its own fingerprint."""

__all__ = [
    "DOCUMENTS", "KEEPS", "VERSION", "Document", "Reason", "Record", "SetAside", "curate", "engine_for",
    "input_fingerprint", "read", "stream_documents",
]  # fmt: skip
