"""Raw files to clean documents: read, measure, select by rules and duplicates, hold out a part."""

from groundup.corpus.curate import curate, input_fingerprint, stream_documents
from groundup.corpus.document import Document, Reason, Record, SetAside
from groundup.corpus.engine import engine_for
from groundup.corpus.passes import DOCUMENTS
from groundup.corpus.reading.read import read

__all__ = [
    "DOCUMENTS", "Document", "Reason", "Record", "SetAside", "curate", "engine_for",
    "input_fingerprint", "read", "stream_documents",
]  # fmt: skip
