"""The shards stage: documents and a tokenizer in, binary token files out, whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.console import Console, format_count
from groundup.corpus.document import Document
from groundup.errors import DataError
from groundup.recipe import ShardsSettings
from groundup.shards.encode import Tally, encode_documents
from groundup.shards.format import SPLITS, ShardsManifest, Split, token_dtype
from groundup.shards.stream import StreamWriter, begin_shards

if TYPE_CHECKING:
    from groundup.tokenizer import Tokenizer


def write_shards(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: Path,
    settings: ShardsSettings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Encode documents into the folder `out`, each in the split it carries, in the order given, by this process.

    Text never becomes a control token; `<|endoftext|>` follows every document. Shards of an earlier call in
    the same folder are replaced. `write_shards_from_file` gives the same bytes with several processes.

    Returns:
        The stage's figures: tokens_train, tokens_validation (`<|endoftext|>` included), bytes_train,
        bytes_validation (UTF-8 of the text), documents_train, documents_validation, dtype, files (number of
        .bin files), bytes_per_token (text bytes by text tokens, over both splits).

    Raises:
        DataError: no document in the training split.
    """
    console = console or Console(quiet=True)
    settings = settings or ShardsSettings()
    out = Path(out)
    begin_shards(out)
    dtype = token_dtype(tokenizer.vocab_size)
    tallies = {name: Tally() for name in SPLITS}
    with console.bar("shards") as bar, contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(StreamWriter(out, name, dtype, settings.shard_tokens)) for name in SPLITS}
        for name, tokens, ends in encode_documents(documents, tokenizer, dtype, tallies):
            writers[name].append(tokens, ends)
            n_documents = sum(tally.documents for tally in tallies.values())
            bar.update(n_documents, note=f"{n_documents:,} docs")
        splits = {name: tallies[name].split(writer.finish()) for name, writer in writers.items()}
        summary = finish_shards(out, tokenizer, splits, None, settings)
        bar.finish(in_words(summary))
    return summary


def finish_shards(
    out: Path, tokenizer: Tokenizer, splits: Mapping[str, Split], corpus: str | None, settings: ShardsSettings
) -> dict[str, Any]:
    """Write the manifest, which makes the shards valid.

    Args:
        out: the folder with the splits' files.
        tokenizer: that made the ids.
        splits: by name.
        corpus: 128-bit xxh3 of the file that the documents came from, if they came from one.
        settings: of the stage.

    Returns:
        The stage's figures, as `write_shards` gives them.

    Raises:
        DataError: no document in the training split.
    """
    train, validation = (splits[name] for name in SPLITS)
    if not train.documents:
        raise DataError(f"{out}: there is no training document to write.", "Run the corpus stage first.")
    provenance = {"corpus": corpus, "settings": {"shard_tokens": settings.shard_tokens}}
    manifest = ShardsManifest(tokenizer.vocab_size, tokenizer.fingerprint, tokenizer.end_of_text_id, splits, provenance)
    manifest.write(out)
    text_tokens = sum(split.tokens - split.documents for split in splits.values())
    return {
        "tokens_train": train.tokens,
        "tokens_validation": validation.tokens,
        "bytes_train": train.text_bytes,
        "bytes_validation": validation.text_bytes,
        "documents_train": train.documents,
        "documents_validation": validation.documents,
        "dtype": np.dtype(manifest.dtype).name,
        "files": len(train.files) + len(validation.files),
        "bytes_per_token": (train.text_bytes + validation.text_bytes) / max(1, text_tokens),
    }


def in_words(summary: Mapping[str, Any]) -> str:
    """The stage's line: how many tokens."""
    train, validation = (format_count(summary[f"tokens_{name}"]) for name in SPLITS)
    return f"{train} tokens train, {validation} validation"
