"""What a folder of token shards holds.

`train-00000.bin`, `train-00001.bin`, … : token ids, little-endian, 16 bits each if the vocabulary has at most
65,536 entries, else 32; no header. Every document is followed by `<|endoftext|>`. The files are one stream cut
every so many tokens: a document may run over a border. `train-00000.idx`: 64-bit little-endian ends (in tokens
from the .bin's beginning) of the documents that end in it. `validation-*` likewise. `manifest.json`: format,
vocabulary, tokenizer, where the documents came from, and for every file its counts and checksum; it carries a
checksum of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from groundup.errors import ArtifactError
from groundup.files import value_digest, write_json
from groundup.integrity import FileRecords
from groundup.untrusted import read_object, reading

FORMAT = "groundup-shards"
VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
INDEX_DTYPE = np.dtype("<u8")
LARGEST_16_BIT_VOCABULARY = 1 << 16
LARGEST_VOCABULARY = 1 << 28
AGAIN = "Make the shards again: with --from shards, or with groundup shards import."

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Counts = Mapping[str, Mapping[str, Count]]
"""By name of a source or a language: its `documents`, `bytes` (UTF-8 of the text) and `tokens`."""


@dataclass(frozen=True)
class ShardFile:
    """One pair of files, a .bin (`name`) and its .idx, with the number of ids in it, of documents that end in it, and
    the 128-bit xxh3 of the bytes of both.
    """

    name: str
    tokens: Count
    checksum: str
    index_name: str
    documents: Count
    index_checksum: str


@dataclass(frozen=True)
class Split:
    """The shards of one split.

    Attributes:
        tokens, documents: in all files, with the `<|endoftext|>` behind each document.
        text_bytes: UTF-8 bytes of the documents' text; 0 if they are unknown (converted from ids).
        files: in the order of the stream.
        sources: what came from where, the largest first (empty if unknown).
        languages: what is in which language, the largest first (empty if unknown).
    """

    tokens: Count
    documents: Count
    text_bytes: Count
    files: tuple[ShardFile, ...]
    sources: Counts = field(default_factory=dict)
    languages: Counts = field(default_factory=dict)


@dataclass(frozen=True)
class ShardsManifest:
    """What `manifest.json` says.

    Attributes:
        vocab_size: of the tokenizer.
        tokenizer: its fingerprint; "" if it is unknown (converted from ids).
        end_of_text_id: of `<|endoftext|>`; None if documents are not closed by one (converted from ids).
        splits: by name.
        provenance: what the shards were made from: `corpus`, the 128-bit xxh3 of `documents.jsonl` (null: the
            documents came from elsewhere), and `settings`; of converted ones the `format` and its `files`.
    """

    vocab_size: Annotated[int, Field(ge=1, le=LARGEST_VOCABULARY)]
    tokenizer: str
    end_of_text_id: Count | None
    splits: Mapping[str, Split]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def dtype(self) -> np.dtype[Any]:
        """How ids are stored."""
        return token_dtype(self.vocab_size)

    def records(self, split: str) -> FileRecords:
        """Size and digest of a split's files, by name."""
        found = {}
        for file in self.splits[split].files:
            found[file.name] = file.tokens * self.dtype.itemsize, file.checksum
            found[file.index_name] = file.documents * INDEX_DTYPE.itemsize, file.index_checksum
        return found

    def write(self, folder: Path) -> None:
        """Write it, which makes the folder's shards valid."""
        values = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype.name,
            "byte_order": "little",
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
            "end_of_text_id": self.end_of_text_id,
            "provenance": dict(self.provenance),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
        }
        write_json(folder / MANIFEST, {**values, "checksum": value_digest(values)})

    @classmethod
    def read(cls, folder: Path) -> ShardsManifest:
        """Read it.

        Raises:
            ArtifactError: missing, damaged, or of another version.
        """
        path = folder / MANIFEST
        with reading(str(path), fix=AGAIN):
            values = read_object(path)
            if values.pop("format", None) != FORMAT:
                raise ArtifactError(f"{path}: not a manifest of token shards, or damaged.", AGAIN)
            if values.get("version") != VERSION:
                raise ArtifactError(f"{path}: version {values.get('version')}; this groundup reads {VERSION}.", AGAIN)
            if values.pop("checksum", None) != value_digest({"format": FORMAT, **values}):
                raise ArtifactError(f"{path}: damaged, its checksum does not fit.", AGAIN)
            manifest = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        for name, split in manifest.splits.items():
            for what in ("tokens", "documents"):
                said, found = getattr(split, what), sum(getattr(file, what) for file in split.files)
                if said != found:
                    raise ArtifactError(f"{path}, splits.{name}: {said:,} {what}, but its files have {found:,}.", AGAIN)
        return manifest


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of 16 and 32 bits that holds every id."""
    return np.dtype("<u2" if vocab_size <= LARGEST_16_BIT_VOCABULARY else "<u4")
