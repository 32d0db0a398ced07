"""A stand-in tokenizer (one id a byte) and shards written with it, for the tests of shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from groundup.corpus import Document
from groundup.recipe import ShardsSettings
from groundup.shards import TokenShards, write_shards


class ByteTokenizer:
    """Id 0 is `<|endoftext|>`, id b + 1 the byte b."""

    end_of_text_id = 0

    def __init__(self, vocab_size: int = 257, fingerprint: str = "f" * 32) -> None:
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint

    def encode_to_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # In a large vocabulary the ids are the largest there are.
        encoded = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        ids = np.concatenate(encoded) if encoded else np.empty(0)
        return ids.astype(np.uint32) + self.vocab_size - 256, np.array([len(row) for row in encoded], dtype=np.int64)


def document(text: str, split: str = "train") -> Document:
    return Document(id=xxhash.xxh3_128_hexdigest(text.encode()), text=text, source="test", split=split)


def stream_of(texts: Sequence[str], shift: int = 1) -> list[int]:
    """What the shards of these texts must hold."""
    return [token for text in texts for token in [*(byte + shift for byte in text.encode()), 0]]


def written(
    out: Path,
    texts: Sequence[str],
    validation: Sequence[str] = ("held out",),
    shard_tokens: int = 1024,
    **vocabulary: Any,
) -> dict[str, Any]:
    documents = [*(document(text) for text in texts), *(document(text, "validation") for text in validation)]
    return write_shards(documents, ByteTokenizer(**vocabulary), out, ShardsSettings(shard_tokens=shard_tokens))  # type: ignore[arg-type]


def opened(out: Path, texts: Sequence[str], **rest: Any) -> TokenShards:
    written(out, texts, **rest)
    return TokenShards.open(out, "train")
