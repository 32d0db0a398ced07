"""A pretrained tokenizer, as Hugging Face keeps it, with the methods of one that groundup trained.

It encodes, decodes and is saved again with the same bytes; it cannot be trained or changed. Its control tokens are its
own: text never becomes one unless allowed, as with ours. It has no tokens for the roles of groundup's chats: its chat
template is a program that groundup does not run.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from tokenizers import Tokenizer as Engine

from groundup.console import Console
from groundup.errors import ArtifactError, DataError
from groundup.files import value_digest, write_json
from groundup.tokenizer.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    read_files,
)
from groundup.tokenizer.letters import BYTE_OF_LETTER
from groundup.tokenizer.special import CONTROL_TOKENS, control_tokens
from groundup.tokenizer.split import replace_surrogates
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.untrusted import parse_object

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_LEAST_OURS = 3  # others begin with <|endoftext|>, too
SPECIAL_TOKENS = ("bos", "eos", "pad")
"""What begins a text, ends it and fills up a batch, by Hugging Face's names."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder or from its `tokenizer.json`: groundup's, or a pretrained one.

    Raises:
        ArtifactError: missing, damaged, or of a kind that cannot be read.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        contents = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{file}: cannot be read ({error}).", "Make it: groundup build --from tokenizer."
        ) from error
    try:
        return Tokenizer(contents, str(file))
    except ArtifactError:
        if file.name != TOKENIZER_FILE or not is_pretrained(contents.encode(), str(file)):
            raise
        return read_tokenizer(read_files(file.parent, TOKENIZER_FILES), str(file), {})


def read_tokenizer(files: Mapping[str, bytes], source: str, values: Mapping[str, Any], n_ids: int = 0) -> Tokenizer:
    """A tokenizer from its files.

    Args:
        files: their contents by name, `tokenizer.json` among them.
        source: what to call it in an error message.
        values: of the model's `config.json`, for what begins and ends a text.
        n_ids: of the model.

    Raises:
        ArtifactError: damaged, or of a kind that cannot be read.
    """
    if not is_pretrained(files[TOKENIZER_FILE], source):
        return Tokenizer(files[TOKENIZER_FILE].decode(), source)
    return PretrainedTokenizer(files, source, values, n_ids)


def is_pretrained(contents: bytes, source: str) -> bool:
    """Whether a `tokenizer.json` is not groundup's, whole or damaged: hardly one of our control tokens has its id.

    Nor is it ours if another program has added tokens to it: behind the vocabulary, or from it.

    Raises:
        ArtifactError: it is not JSON.
    """
    spec = parse_object(contents, f"{source}: damaged")
    model = spec.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram's: [token, score]
        entries = [entry if isinstance(entry, list) and entry else [""] for entry in vocabulary]
        vocabulary = {str(entry[0]): at for at, entry in enumerate(entries)}
    if not isinstance(vocabulary, dict):
        return False
    n_ours = sum(vocabulary.get(token) == at for at, token in enumerate(CONTROL_TOKENS))
    listed = spec.get("added_tokens")
    added = [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []
    outside = any(_is_id(token.get("id")) and token["id"] >= len(vocabulary) for token in added)
    names = {token["content"] for token in added if isinstance(token.get("content"), str)}
    return n_ours < _LEAST_OURS or outside or bool((names - set(control_tokens(len(added)))) & vocabulary.keys())


class PretrainedTokenizer(Tokenizer):
    """A tokenizer that groundup did not train; immutable.

    Args:
        files: contents of its files by name, `tokenizer.json` among them; `save` writes them as they are.
        source: what to call it in an error message.
        values: of the model's `config.json`: what begins a text ("bos_token_id"), ends it ("eos_token_id") and fills
            up a batch ("pad_token_id"), behind what the tokenizer's own files say.
        n_ids: of the model, which may have more than there are tokens: those beyond stand for nothing.

    Raises:
        ArtifactError: damaged, or neither a byte-level tokenizer nor one of SentencePiece's kind.
    """

    def __init__(self, files: Mapping[str, bytes], source: str, values: Mapping[str, Any], n_ids: int = 0) -> None:
        self._n_ids = n_ids
        self._files = dict(files)
        try:
            spec = parse_object(files[TOKENIZER_FILE], source)
            self._full = Engine.from_str(files[TOKENIZER_FILE].decode())
            added = [(int(token["id"]), str(token["content"]), token) for token in spec.get("added_tokens") or []]
            plain = [token for _, _, token in added if not token["special"]]
            # As with ours, the engine knows no control token, so that it cannot find one in a text.
            self._engine = Engine.from_str(json.dumps({**spec, "added_tokens": plain, "post_processor": None}))
            self._engine.no_padding()
            self._engine.no_truncation()
            self._ids = {**self._full.get_vocab(with_added_tokens=True)}
            self._specials = {name: index for index, name, token in added if token["special"]}
            self._control = list(self._specials)
            self._bytes = _bytes_of_tokens(spec, self._ids, set(self._specials))
        except ArtifactError:
            raise
        except Exception as error:  # the engine raises bare Exception
            raise ArtifactError(
                f"{source}: damaged, or not a tokenizer that can be read ({type(error).__name__}: {str(error)[:200]}).",
                "Move it away to load the model alone.",
            ) from error
        self.kind = "pretrained"
        self.fingerprint = value_digest(spec)
        self._special_token_ids = self._find_special(values, source)

    @property
    def special_token_ids(self) -> dict[str, list[int]]:
        """What begins ("bos") and ends a text ("eos") and fills up a batch ("pad"): all such tokens, the main first."""
        return dict(self._special_token_ids)

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a message or a document, of all files that name some."""
        return super().end_ids | set(self._special_token_ids["eos"])

    def unused_ids(self, n_ids: int) -> list[int]:
        """As `Tokenizer.unused_ids`; ids between the tokens may be unused, too."""
        used = set(self._ids.values())
        return [index for index in range(n_ids) if index not in used]

    def save(self, folder: str | Path) -> None:
        """Write its files as they were read; what only the model's configuration says of bos, eos and pad is added."""
        for name, contents in self._files.items():
            (Path(folder) / name).write_bytes(contents)
        if self._special_token_ids != self._find_special({}, GENERATION_FILE):
            theirs = parse_object(self._files.get(GENERATION_FILE, b"{}"), GENERATION_FILE)
            write_json(Path(folder) / GENERATION_FILE, theirs | token_ids(self))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the tokens that a model of it may expect at its beginning."""
        encodings = self._engine.encode_batch([replace_surrogates(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_to_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `Tokenizer.encode_to_arrays`, by Hugging Face's engine."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return np.fromiter((one for ids in encoded for one in ids), dtype=np.uint32, count=int(lengths.sum())), lengths

    def choose_engine(self, console: Console | None = None) -> str:
        """Always Hugging Face's: the self-test of faster ones covers groundup's own tokenizers only."""
        return "huggingface"

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, control tokens nothing (or their names).

        Raises:
            DataError: an id that the vocabulary does not have.
        """
        listed = list(ids)
        for index in listed:
            self.token_bytes(index)
        return self._full.decode(listed, skip_special_tokens=skip_special)

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that a token stands for; nothing for a control token or an id that no token has.

        Raises:
            DataError: an id that neither the tokenizer nor its model has.
        """
        return b"" if self.vocab_size <= index < self._n_ids else super().token_bytes(index)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        return frozenset(self._specials.values())

    @property
    def unknown_id(self) -> int | None:
        """None: no text is without tokens."""
        return None

    @property
    def end_of_text_id(self) -> int:
        """What stands before a text: its token for the beginning, else the one for the end."""
        return self._required("bos", "eos")

    @property
    def end_id(self) -> int:
        """Ends a text or a message."""
        return self._required("eos", "bos")

    @property
    def pad_id(self) -> int:
        """Fills a row of a batch; where it has no token for that, the one for the end, which no loss looks at."""
        return self._required("pad", "eos", "bos")

    def role_id(self, role: str) -> int:
        """Always an error: a pretrained tokenizer has no tokens for the roles of groundup's chats.

        Raises:
            DataError: at every call.
        """
        raise DataError(
            "this model's chats are laid out by a template of its own, which groundup does not run.",
            "Continue texts with it: groundup generate.",
        )

    def _required(self, *names: str) -> int:
        for name in names:
            for index in self._special_token_ids[name]:
                return index
        raise DataError(
            f"this tokenizer names no token for {names[0]}.", f"Name one in {CONFIG_FILE}: {names[0]}_token."
        )

    def _find_special(self, values: Mapping[str, Any], source: str) -> dict[str, list[int]]:
        """Ids of the tokens for bos, eos and pad, by any name, id or list of them in any file."""
        files = [
            *(
                parse_object(self._files[name], str(Path(source).with_name(name)))
                for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE, GENERATION_FILE)
                if name in self._files
            ),
            values,
        ]
        found = {}
        for name in SPECIAL_TOKENS:
            said = [file.get(key) for file in files for key in (f"{name}_token", f"{name}_token_id")]
            tokens = [one for value in said for one in (value if isinstance(value, list) else [value])]
            tokens = [one.get("content") if isinstance(one, dict) else one for one in tokens]
            ids = [self._ids.get(one) if isinstance(one, str) else one for one in tokens]
            found[name] = [*dict.fromkeys(one for one in ids if _is_id(one) and one < len(self._bytes))]
        return found

    def __repr__(self) -> str:
        return f"PretrainedTokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a `config.json` says of a tokenizer: the tokens that begin and end a text and fill up a batch."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        return {
            "bos_token_id": tokenizer.end_of_text_id,
            "eos_token_id": [tokenizer.end_id, tokenizer.end_of_text_id],
            "pad_token_id": tokenizer.pad_id,
        }
    found = tokenizer.special_token_ids
    several = {"eos_token_id": found["eos"]} if len(found["eos"]) > 1 else {}  # of others, programs expect one
    return {f"{name}_token_id": ids[0] if ids else None for name, ids in found.items()} | several


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _bytes_of_tokens(spec: dict[str, Any], ids: Mapping[str, int], specials: set[str]) -> list[bytes]:
    """The bytes that each token stands for, by its id; an id that nothing has stands for none."""
    parts = json.dumps([spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    is_byte_level = '"ByteLevel"' in parts
    if not is_byte_level and _SPACE not in parts:
        raise ValueError("neither byte-level nor with U+2581 for spaces")
    size = max(ids.values(), default=-1) + 1
    if size > 1 << 24:
        raise ValueError(f"the largest id is {size - 1:,}")
    added = {str(token["content"]) for token in spec.get("added_tokens") or []}
    table = [b""] * size
    for token, index in ids.items():
        if token in specials:
            continue
        byte = _BYTE.fullmatch(token)
        if token in added:
            table[index] = token.encode()
        elif is_byte_level and all(letter in BYTE_OF_LETTER for letter in token):
            table[index] = bytes(BYTE_OF_LETTER[letter] for letter in token)
        elif byte is not None and not is_byte_level:
            table[index] = bytes([int(byte[1], 16)])
        else:
            table[index] = token.replace(_SPACE, " ").encode()
    return table
