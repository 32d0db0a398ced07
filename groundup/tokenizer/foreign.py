"""Somebody else's tokenizer, as Hugging Face keeps it, in the place of one of ours.

It encodes, decodes and is saved again with the same bytes; it cannot be trained or changed. Its control tokens are its
own: text never becomes one unless allowed, as with ours. What groundup's chats are laid out with (a token for each
role) it has not, so asking for that is an error: a chat template is a program of somebody else's.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import Tokenizer as Engine

from groundup.console import Console
from groundup.errors import ArtifactError, DataError
from groundup.files import value_digest, write_json
from groundup.tokenizer.letters import BYTE_OF_LETTER
from groundup.tokenizer.special import CONTROL_TOKENS
from groundup.tokenizer.split import replace_surrogates
from groundup.tokenizer.tokenizer import CONFIG_FILE, TOKENIZER_FILE, Tokenizer
from groundup.untrusted import file_inside, parse_object, read_bytes

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_LEAST_OURS = 3  # others begin with <|endoftext|>, too
ROLES = ("bos", "eos", "pad")
ROLES_FILE = "special_tokens_map.json"


TOKENIZER_FILES = (
    TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a tokenizer can consist of, as Hugging Face keeps it."""


class ForeignTokenizer(Tokenizer):
    """A tokenizer that groundup did not train; immutable.

    Args:
        files: contents of its files by name, `tokenizer.json` among them; `save` writes them as they are.
        source: what to call it in an error message.
        ids: what begins a text ("bos"), ends it ("eos") and fills up a batch ("pad"), as the model's configuration has
            them; `tokenizer_config.json` comes first.
        n_ids: of the model, which may have more than there are tokens: those beyond stand for nothing.

    Raises:
        ArtifactError: damaged, or neither a byte-level tokenizer nor one of SentencePiece's kind.
    """

    def __init__(self, files: Mapping[str, bytes], source: str, ids: Mapping[str, int | None], n_ids: int = 0) -> None:
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
        self.kind = "foreign"
        self.fingerprint = value_digest(spec)
        self._role_ids = self._find_roles(ids, str(Path(source).with_name(CONFIG_FILE)))

    @property
    def role_ids(self) -> dict[str, int | None]:
        """What begins ("bos") and ends a text ("eos") and fills up a batch ("pad"), where it has such tokens."""
        return dict(self._role_ids)

    def save(self, folder: str | Path) -> None:
        """Write its files as they were read; if only a model's configuration named its roles, one more that does."""
        for name, contents in self._files.items():
            (Path(folder) / name).write_bytes(contents)
        missing = self._role_ids != self._find_roles({}, CONFIG_FILE)
        if missing and ROLES_FILE not in self._files:
            names = {index: name for name, index in self._ids.items()}
            roles = {f"{role}_token": names[index] for role, index in self._role_ids.items() if index is not None}
            write_json(Path(folder) / ROLES_FILE, roles)

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
        """Always Hugging Face's: a faster one would have to prove itself on somebody else's rules."""
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
        """Fills a row of a batch; where it has no token for that, the one for the end, which nobody looks at."""
        return self._required("pad", "eos", "bos")

    @property
    def system_id(self) -> int:
        """Not to be had."""
        self._has_no_roles()

    @property
    def user_id(self) -> int:
        """Not to be had."""
        self._has_no_roles()

    @property
    def assistant_id(self) -> int:
        """Not to be had."""
        self._has_no_roles()

    @property
    def tool_id(self) -> int:
        """Not to be had."""
        self._has_no_roles()

    def _required(self, *roles: str) -> int:
        for role in roles:
            index = self._role_ids[role]
            if index is not None:
                return index
        raise DataError(
            f"this tokenizer names no token for {roles[0]}.", f"Name one in {CONFIG_FILE}: {roles[0]}_token."
        )

    def _has_no_roles(self) -> NoReturn:
        raise DataError(
            "this model's chats are laid out by a template of its own, which groundup does not run.",
            "Continue texts with it: groundup generate.",
        )

    def _find_roles(self, ids: Mapping[str, int | None], source: str) -> dict[str, int | None]:
        files = [parse_object(self._files[name], source) for name in (CONFIG_FILE, ROLES_FILE) if name in self._files]
        found: dict[str, int | None] = {}
        for role in ROLES:
            named = next((file[f"{role}_token"] for file in files if file.get(f"{role}_token") is not None), None)
            named = named.get("content") if isinstance(named, dict) else named
            index = self._ids.get(named) if isinstance(named, str) else ids.get(role)
            found[role] = index if index is not None and 0 <= index < len(self._bytes) else None
        return found

    def __repr__(self) -> str:
        return f"ForeignTokenizer(vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"


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
    if not is_foreign(files[TOKENIZER_FILE], source):
        return Tokenizer(files[TOKENIZER_FILE].decode(), source)
    ids: dict[str, int | None] = {}
    for role in ROLES:
        value = values.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        ids[role] = value if type(value) is int else None
    return ForeignTokenizer(files, source, ids, n_ids)


def is_foreign(contents: bytes, source: str) -> bool:
    """Whether a `tokenizer.json` is not groundup's, whole or damaged: hardly one of our control tokens has its id.

    Raises:
        ArtifactError: it is not JSON.
    """
    spec = parse_object(contents, f"{source}: damaged")
    model = spec.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram's: [token, score]
        first = vocabulary[: len(CONTROL_TOKENS)]
        vocabulary = {entry[0]: at for at, entry in enumerate(first) if isinstance(entry, list) and entry}
    if not isinstance(vocabulary, dict):
        return False
    n_ours = sum(vocabulary.get(token) == at for at, token in enumerate(CONTROL_TOKENS))
    return n_ours < _LEAST_OURS


def read_files(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """The contents of those files that are there.

    Raises:
        ArtifactError: one is no ordinary file of this folder, or too large.
    """
    found = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    return {name: read_bytes(file_inside(folder, name)) for name in found}


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
