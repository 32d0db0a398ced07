"""What a folder of shards holds, in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from groundup.shards.format import INDEX_DTYPE, ShardsManifest
from groundup.shards.read import TokenShards

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


def shard_stats(folder: str | Path) -> dict[str, Any]:
    """Count, from the manifest and the indexes; the tokens themselves are not read.

    Returns:
        folder, version, vocab_size, dtype, tokenizer, end_of_text_id, provenance, and `splits`: for each split
        tokens (`<|endoftext|>` included), documents, text_bytes (0: unknown), bytes_per_token (None: unknown),
        files, size_bytes (of all files on disk), lengths (of documents, closing id included: min, mean, max,
        `p1` … `p99`, and `histogram`: [from, below, documents] by powers of two), sources, languages.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    folder = Path(folder)
    manifest = ShardsManifest.read(folder)
    splits = {}
    for name, split in manifest.splits.items():
        text_tokens = split.tokens - split.documents
        splits[name] = {
            "tokens": split.tokens,
            "documents": split.documents,
            "text_bytes": split.text_bytes,
            "bytes_per_token": split.text_bytes / text_tokens if split.text_bytes and text_tokens else None,
            "files": len(split.files),
            "size_bytes": split.tokens * manifest.dtype.itemsize + split.documents * INDEX_DTYPE.itemsize,
            "lengths": _distribution(TokenShards(folder, name, manifest, verify=False).document_ends()),
            "sources": split.sources,
            "languages": split.languages,
        }
    return {
        "folder": str(folder),
        "version": manifest.version,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype.name,
        "tokenizer": manifest.tokenizer,
        "end_of_text_id": manifest.end_of_text_id,
        "provenance": manifest.provenance,
        "splits": splits,
    }


def _distribution(ends: np.ndarray) -> dict[str, Any]:
    if not len(ends):
        return {}
    lengths = np.diff(ends, prepend=0)
    found = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    # frexp's exponent: 1 for a length of 1, 2 for 2 and 3, 3 for 4 to 7, …
    classes = np.bincount(np.frexp(lengths.astype(np.float64))[1])
    return {
        "min": int(lengths.min()),
        "mean": float(lengths.mean()),
        "max": int(lengths.max()),
        **{f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)},
        "histogram": [[1 << (power - 1), 1 << power, int(n)] for power, n in enumerate(classes) if power and n],
    }
