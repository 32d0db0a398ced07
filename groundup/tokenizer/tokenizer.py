"""Text to token ids and back.

In: documents to train on, or a folder with `tokenizer.json`. Out: a `Tokenizer`, whose files transformers
loads as they stand. Two laws: text never becomes a control token unless its name is allowed by the
caller, and the tokens' bytes joined are the text's UTF-8 bytes (for every text; with one token per
character: for every text whose characters were seen in training).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.console import Console
from groundup.errors import DataError
from groundup.files import value_digest, write_json, write_text
from groundup.tokenizer import special
from groundup.tokenizer.engines import CharacterEncoder, Encoder, HuggingFaceEncoder, choose
from groundup.tokenizer.files import CONFIG_FILE, TOKENIZER_FILE, engine_of
from groundup.tokenizer.letters import LETTERS, unspelled
from groundup.tokenizer.split import PATTERNS, PIECE_CHARACTERS, cut_into_pieces, word_pre_tokenizer
from groundup.tokenizer.text_engine import text_spec
from groundup.untrusted import parse_object, reading

if TYPE_CHECKING:
    from groundup.corpus.document import Document

_TRAIN_AGAIN = "Train it again: groundup build --from tokenizer."
_KINDS = {"BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram", "WordLevel": "characters"}


class Tokenizer:
    """A trained tokenizer; immutable.

    Args:
        contents: of a `tokenizer.json` that groundup wrote.
        source: what to call it in an error message.

    Raises:
        ArtifactError: damaged, or not groundup's.
    """

    def __init__(self, contents: str, source: str = TOKENIZER_FILE) -> None:
        self._contents = contents
        with reading(f"{source}: damaged, or not a tokenizer that groundup trained", fix=_TRAIN_AGAIN):
            spec = parse_object(contents.encode(), source)
            self.kind: str = _KINDS[spec["model"]["type"]]
            self._ids: dict[str, int] = _ids_of_tokens(self.kind, spec["model"]["vocab"])
            control = [token["content"] for token in sorted(spec["added_tokens"], key=lambda token: token["id"])]
            _check_ids(self._ids, control)
            self._specials = {name: index for index, name in enumerate(control)}
            self._bytes = _bytes_of_tokens(self.kind, self._ids, control, spec["model"])
            if spec.get("normalizer") is not None:
                raise ValueError("it changes the text")
            self._plain = text_spec(spec, control)
            engine = engine_of(self._plain)
            cuts = {str(word_pre_tokenizer(split)) for split in PATTERNS}
            if self.kind == "wordpiece" and str(engine.pre_tokenizer) not in cuts:
                raise ValueError("it cuts words otherwise")  # a word too long would be an unknown one
            self._reference: Encoder = HuggingFaceEncoder(engine)
        if self.kind == "characters":
            texts = {token: index for token, index in self._ids.items() if token not in self._specials}
            self._reference = CharacterEncoder(texts, self._ids[special.REPLACEMENT])
        self.fingerprint: str = value_digest(spec)

    @classmethod
    def train(
        cls,
        documents: Iterable[Document | str] | str | Path,
        *,
        kind: str = "bpe",
        vocab_size: int = 2048,
        split: str | None = None,
        control_tokens: Sequence[str] = (),
        spare_tokens: int = 4,
        trainer: str = "huggingface",
        sample_bytes: int | None = None,
        console: Console | None = None,
    ) -> Tokenizer:
        """Train on documents; the same documents in any order give the same tokenizer, bit for bit.

        Args:
            documents: documents, or plain texts, read once; or the name of a file or folder to read them from.
            kind: "bpe", "wordpiece", "unigram" or "characters".
            vocab_size: tokens in all, control tokens included (characters: decided by the text).
            split: how text is cut before merging: "qwen2", "llama3" or "gpt2" (characters: not used); without it
                qwen2, or llama3 from 32,768 entries on.
            control_tokens: names of further control tokens, such as "<think>"; text never becomes one unless allowed.
            spare_tokens: control tokens kept for later.
            trainer: "huggingface", or "rustbpe" (BPE only; faster, breaks ties otherwise).
            sample_bytes: most text to learn from and to hold in memory; of more text every source gives its share.
                Without it as much as the trainers can count, which is 2 GiB. (characters: all text is looked at.)
            console: where it is reported that the text was sampled, or too small for `vocab_size`.

        Raises:
            RecipeError: a setting is unknown, `vocab_size` has no room, or a text could spell a control token.
            DataError: there is no text.
            GroundupError: rustbpe is not installed, or gave no byte-level BPE.
        """
        from groundup.tokenizer.train import train  # encoding alone does not need the trainers

        own = list(control_tokens)
        return cls(train(documents, kind, vocab_size, split, own, spare_tokens, trainer, sample_bytes, console))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template) for any Hugging Face tool."""
        write_text(Path(folder) / TOKENIZER_FILE, self._contents)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": special.END,
            "pad_token": special.PAD,
            "unk_token": None,  # U+FFFD is text; named here, transformers would leave it out when decoding
            "clean_up_tokenization_spaces": False,
            "chat_template": special.CHAT_TEMPLATE,
        }
        write_json(Path(folder) / CONFIG_FILE, config)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of a text, in which what looks like a control token is plain text. A lone surrogate counts as U+FFFD.

        Args:
            text: any text.
            allowed_special: names of control tokens that become their id where they stand in the text.
        """
        if not allowed_special:
            return self.encode_batch([text])[0]
        unknown = sorted(set(allowed_special) - self._specials.keys())
        if unknown:
            raise DataError(f"allowed_special = {unknown}: no such control token.", f"There are {[*self._specials]}.")
        names = sorted(allowed_special, key=len, reverse=True)  # where one begins another, the longer one is meant
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)  # text, name, text, …
        plain = iter(self.encode_batch(parts[::2]))
        return [
            index
            for place, part in enumerate(parts)
            for index in (next(plain) if place % 2 == 0 else [self._specials[part]])
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, on all cores.

        Raises:
            DataError: an engine fails at a text, which only tokenizers of others make happen.
        """
        with reading("a text for this tokenizer", DataError, "Check its tokenizer.json."):
            ids, lengths = self._reference.encode(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if texts else []

    def encode_iterable(self, parts: Iterable[str]) -> Iterator[int]:
        """Ids of a text that comes in parts, such as the lines of a file: those of the parts joined.

        They come as soon as they are certain, and memory is bounded while the text has places to cut it: spaces or
        line ends between letters.

        Args:
            parts: of one text, cut anywhere.

        Raises:
            DataError: this tokenizer knows no such place (a pretrained one that merges across spaces).
        """
        held: list[str] = []
        size, enough = 0, 2 * PIECE_CHARACTERS
        for part in parts:
            held.append(part)
            size += len(part)
            if size >= enough:
                *whole, rest = self._cut("".join(held))
                for ids in self.encode_batch(whole):
                    yield from ids
                held, size = [rest], len(rest)
                enough = 2 * max(PIECE_CHARACTERS, size)
        yield from self.encode("".join(held))

    def _cut(self, text: str) -> Iterator[str]:
        """A text in pieces that have the same ids one by one."""
        return cut_into_pieces(text)

    def encode_to_arrays(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of each text, as `encode` gives them, by the fastest engine at hand and without lists of Python numbers.

        The engine is chosen at the first call (see `choose_engine`); batches of some MiB serve it best. It takes as
        many threads as RAYON_NUM_THREADS says, else all cores, or one in a worker process.

        Returns:
            ids, (n_tokens,) uint32, one text after the other, and each text's number of tokens, (n_texts,) int64.
        """
        with reading("a text for this tokenizer", DataError, "Check its tokenizer.json."):
            return self._chosen[0].encode(texts)

    def choose_engine(self, console: Console | None = None) -> str:
        """Choose the engine of `encode_to_arrays`: gigatoken, tiktoken or huggingface, the first that passes a
        self-test.

        The test is equal ids on a thousand adversarial texts; it takes a fraction of a second, once. Why a faster one
        was passed over is told to `console`. For one token per character the engine is "groundup".
        """
        encoder, passed_over = self._chosen
        if console is not None and passed_over:
            console.note(f"tokenizer: encodes with {encoder.name}; {'; '.join(passed_over)}.")
        return encoder.name

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD, control tokens nothing (or their names)."""
        names = {} if skip_special else {index: name.encode() for name, index in self._specials.items()}
        return b"".join(names.get(index) or self.token_bytes(index) for index in ids).decode("utf-8", errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that a token stands for; nothing for a control token.

        Raises:
            DataError: an id that the vocabulary does not have.
        """
        if not 0 <= index < len(self._bytes):
            raise DataError(f"token id {index}: the vocabulary has ids 0 to {len(self._bytes) - 1}.")
        return self._bytes[index]

    def longest_tokens(self, n: int = 20) -> list[str]:
        """The longest tokens, longest first, as text."""
        order = sorted(range(self.vocab_size), key=lambda index: (-len(self._bytes[index]), index))
        return [self._bytes[index].decode("utf-8", errors="replace") for index in order[:n]]

    def vocab(self) -> dict[int, bytes | str]:
        """What each id stands for: the bytes of a token, or the name of a control token."""
        names = {index: name for name, index in self._specials.items()}
        return {index: names.get(index, value) for index, value in enumerate(self._bytes)}

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs that a BPE merges, the first learned first; other kinds have none."""
        pairs = json.loads(self._contents)["model"].get("merges") or []
        return [(self._bytes[self._ids[left]], self._bytes[self._ids[right]]) for left, right in pairs]

    @property
    def contents(self) -> str:
        """Of `tokenizer.json`."""
        return self._contents

    @property
    def vocab_size(self) -> int:
        """Number of tokens, control tokens included."""
        return len(self._bytes)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all control tokens."""
        return frozenset(self._specials.values())

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """All control tokens by name, with their ids."""
        return MappingProxyType(self._specials)

    @property
    def unknown_id(self) -> int | None:
        """Characters: the id of U+FFFD, which stands for any character that has no token."""
        return self._ids[special.REPLACEMENT] if self.kind == "characters" else None

    @property
    def end_of_text_id(self) -> int:
        """Ends a document."""
        return self._ids[special.END_OF_TEXT]

    @property
    def pad_id(self) -> int:
        """Fills a row of a batch; excluded from loss and attention."""
        return self._ids[special.PAD]

    @property
    def end_id(self) -> int:
        """Ends a message of a chat."""
        return self._ids[special.END]

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a message or a document."""
        return frozenset({self.end_id, self.end_of_text_id})

    def unused_ids(self, n_ids: int) -> list[int]:
        """Those ids of a model with `n_ids` rows that stand for no token; they are never drawn."""
        used = set(self._ids.values())
        return [index for index in range(n_ids) if index not in used]

    def role_id(self, role: str) -> int:
        """The token that opens a message of a role: "system", "user", "assistant" or "tool"."""
        return self._ids[special.ROLE_TOKENS[role]]

    @functools.cached_property
    def _chosen(self) -> tuple[Encoder, list[str]]:
        return choose(self._plain, self._reference)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(kind={self.kind!r}, vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"
        )


def _ids_of_tokens(kind: str, vocabulary: Any) -> dict[str, int]:
    if kind != "unigram":
        return dict(vocabulary)
    ids = {token: index for index, (token, _) in enumerate(vocabulary)}
    if len(ids) != len(vocabulary):
        raise ValueError("a token stands twice in the vocabulary")
    return ids


def _check_ids(ids: dict[str, int], control: list[str]) -> None:
    """Refuse a vocabulary with holes, or whose control tokens are not groundup's."""
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("the vocabulary's ids have holes")
    if tuple(control[: len(special.CONTROL_TOKENS)]) != special.CONTROL_TOKENS:
        raise ValueError(f"its control tokens are {control}")
    misplaced = [name for index, name in enumerate(control) if ids.get(name) != index]
    if misplaced:
        raise ValueError(f"control tokens {misplaced} are not at their ids")


def _bytes_of_tokens(kind: str, ids: dict[str, int], control: list[str], model: dict[str, Any]) -> list[bytes]:
    table = [b""] * len(ids)
    if kind == "characters":
        if special.REPLACEMENT not in ids or any(len(token) != 1 for token in ids.keys() - control):
            raise ValueError("its tokens are not single characters with U+FFFD among them")
        for token in ids.keys() - control:
            table[ids[token]] = token.encode()
        return table
    mark = model["continuing_subword_prefix"] if kind == "wordpiece" else ""
    if not {*LETTERS, *(mark + letter for letter in LETTERS)} <= ids.keys():
        raise ValueError("some bytes have no token")
    for token in ids.keys() - control:
        table[ids[token]] = unspelled(token.removeprefix(mark))
    return table
