"""Raw files to clean documents: read, normalize, filter by language, remove duplicates, hold out a part."""

from groundup.corpus.curate import curate, stream_documents
from groundup.corpus.document import Document, Reason, SetAside
from groundup.corpus.read import read
from groundup.corpus.sources import input_fingerprint

VERSION = 1
"""Raised when the code's results change; part of the stage's fingerprint."""

__all__ = ["VERSION", "Document", "Reason", "SetAside", "curate", "input_fingerprint", "read", "stream_documents"]
