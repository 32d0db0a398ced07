"""Well-known tokenizers to compare with: GPT-2, cl100k and o200k, if tiktoken has them on this machine.

Nothing is ever downloaded: a vocabulary is used if its file lies in tiktoken's cache and is whole.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"


@dataclass(frozen=True)
class Known:
    """A tokenizer that others have published.

    Attributes:
        name: the usual one. encoding: tiktoken's name. sha256: of its file.
    """

    name: str
    encoding: str
    sha256: str

    def cached_file(self) -> Path | None:
        """Where tiktoken keeps its file, if it is there and whole."""
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
        if folder == "":  # tiktoken's way of saying: no cache
            return None
        name = hashlib.sha1(_ADDRESS.format(self.encoding).encode()).hexdigest()
        file = Path(folder or Path(tempfile.gettempdir()) / "data-gym-cache") / name
        try:
            is_whole = hashlib.sha256(file.read_bytes()).hexdigest() == self.sha256
        except OSError:
            return None
        return file if is_whole else None

    def counter(self) -> Callable[[Sequence[str]], list[int]] | None:
        """What counts the tokens of texts, or None where that would need the network."""
        try:
            import tiktoken
        except ImportError:
            return None
        if self.cached_file() is None:
            return None
        encoding = tiktoken.get_encoding(self.encoding)
        return lambda texts: [len(encoding.encode_ordinary(text)) for text in texts]


KNOWN = (
    Known("GPT-2", "r50k_base", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"),
    Known("cl100k", "cl100k_base", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
    Known("o200k", "o200k_base", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
)
"""GPT-2's own file is in another form; r50k_base has the same tokens."""
