"""A pretrained tokenizer, as Hugging Face keeps it, with the methods of one that groundup trained.

It encodes, decodes and is saved again with the same bytes; it cannot be trained or changed. Its control tokens are its
own: text never becomes one unless allowed, as with ours. It has no tokens for the roles of groundup's chats: a program
of its own lays its chats out (`template.py`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from groundup.errors import ArtifactError, DataError
from groundup.files import value_digest, write_json
from groundup.tokenizer.adversarial import adversarial_texts
from groundup.tokenizer.engines import HuggingFaceEncoder
from groundup.tokenizer.files import (
    CONFIG_FILE,
    GENERATION_FILE,
    MODEL_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    engine_of,
    read_files,
)
from groundup.tokenizer.letters import BYTE_OF_LETTER, LETTERS
from groundup.tokenizer.special import CONTROL_TOKENS
from groundup.tokenizer.split import PIECE_CHARACTERS, cut_into_pieces, replace_surrogates
from groundup.tokenizer.template import ChatTemplate, LaidOut, Rendered
from groundup.tokenizer.text_engine import text_spec
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.untrusted import file_inside, parse_object, read_bytes, read_object, reading

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LOOKS_LIKE_CONTROL = re.compile(r"(?!<0x[0-9A-F]{2}>)[<\[].+[>\]]")
_ACROSS = re.compile(rb"[A-Za-z\x80-\xff][ \n]")
_MOVE_AWAY = "Move it away to load the model alone."
_SPACE = "\u2581"
_LEAST_OURS = 3  # others begin with <|endoftext|>, too
_SENTENCEPIECE_CONTROL = ("<s>", "</s>", "<unk>", "<pad>")
SPECIAL_TOKENS = ("bos", "eos", "pad")
"""What begins a text, ends it and fills up a batch, by Hugging Face's names."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder or from its `tokenizer.json`: groundup's, or a pretrained one.

    Raises:
        ArtifactError: missing, damaged, or of a kind that cannot be read.
    """
    path = Path(path)
    file = path / TOKENIZER_FILE if path.is_dir() else path
    is_alone = file.name != TOKENIZER_FILE
    files = {TOKENIZER_FILE: read_bytes(file)} if is_alone else read_files(file.parent, TOKENIZER_FILES)
    if TOKENIZER_FILE not in files:
        raise ArtifactError(f"{file}: not found.", "Make it: groundup build --from tokenizer.")
    has_model = not is_alone and (file.parent / MODEL_FILE).exists()
    return read_tokenizer(files, str(file), read_object(file_inside(file.parent, MODEL_FILE)) if has_model else {})


def tokenizer_beside(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a model: groundup's or a pretrained one; None without `tokenizer.json`.

    Raises:
        ArtifactError: damaged, or with more tokens than the model has.
    """
    files = read_files(folder, TOKENIZER_FILES)
    if TOKENIZER_FILE not in files:
        return None
    values = read_object(file_inside(folder, MODEL_FILE))
    ours = values.get("groundup")
    known = {**(ours if isinstance(ours, dict) else {}), **values}.get("vocab_size")
    path, n_ids = folder / TOKENIZER_FILE, known if type(known) is int else 0
    tokenizer = read_tokenizer(files, str(path), values, n_ids)
    if n_ids and tokenizer.vocab_size > n_ids:
        raise ArtifactError(
            f"{path}: has {tokenizer.vocab_size} tokens, the model beside it {n_ids}.",
            "Put the tokenizer there that the model was trained with.",
        )
    return tokenizer


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
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # Unigram's: [token, score]
        vocabulary = {str(entry[0]): at for at, entry in enumerate(found) if isinstance(entry, list) and entry}
    elif isinstance(found, dict):
        vocabulary = found
    else:
        return False
    n_ours = sum(vocabulary.get(token) == at for at, token in enumerate(CONTROL_TOKENS))
    listed = spec.get("added_tokens")
    added = [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []
    behind = any(_is_id(token.get("id")) and token["id"] >= len(added) for token in added)  # ours are the first ids
    return n_ours < _LEAST_OURS or behind


class PretrainedTokenizer(Tokenizer):
    """A tokenizer that groundup did not train; immutable.

    Args:
        files: contents of its files by name, `tokenizer.json` among them; `save` writes them as they are.
        source: what to call it in an error message.
        values: of the model's `config.json`: what begins a text ("bos_token_id"), ends it ("eos_token_id") and fills
            up a batch ("pad_token_id"), behind what the tokenizer's own files say.
        n_ids: of the model, which may have more than there are tokens: those beyond stand for nothing.

    Attributes:
        special_token_ids: what begins ("bos") and ends a text ("eos") and fills up a batch ("pad"): all such tokens,
            the main first.

    Raises:
        ArtifactError: damaged, or made to do harm: its parts make a text grow without bound, two tokens have one id,
            or an unknown character would end a text.
    """

    def __init__(self, files: Mapping[str, bytes], source: str, values: Mapping[str, Any], n_ids: int = 0) -> None:
        self._n_ids = n_ids
        self._files = dict(files)
        self.kind = "pretrained"
        self.fingerprint = value_digest(parse_object(files[TOKENIZER_FILE], source))
        said_in = [name for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE, GENERATION_FILE) if name in files]
        self._said = {name: parse_object(files[name], str(Path(source).with_name(name))) for name in said_in}
        with reading(f"{source}: damaged, or not a tokenizer that can be read", fix=_MOVE_AWAY):
            self._full = engine_of(parse_object(files[TOKENIZER_FILE], source))
            self._contents = self._full.to_str()  # one spelling of what several versions of the format say
            spec = json.loads(self._contents)
            self._ids = self._full.get_vocab(with_added_tokens=True)
            if len(set(self._ids.values())) != len(self._ids):
                raise ValueError("two of its tokens have one id")
            self._bytes = _bytes_of_tokens(spec, self._ids)
            self.special_token_ids = self._find_special(values)
            self._specials = self._find_control(spec)
            for index in self._specials.values():
                self._bytes[index] = b""
            self._unknown = _unknown_id(spec, self._ids, self._specials.keys())
            self._engine = engine_of(text_spec(spec, self._specials))
            added = {token["content"] for token in spec["added_tokens"]} - self._specials.keys()
            if any(self._engine.token_to_id(name) != self._ids[name] for name in added):
                raise ValueError("its added tokens do not have the ids that it says")
            self._reference = HuggingFaceEncoder(self._engine, self._cut)
            self._chosen = self._reference, []  # the self-test of faster engines covers groundup's own tokenizers only
        with contextlib.suppress(DataError):
            if self._unknown in self.end_ids:
                raise ArtifactError(f"{source}: whatever character it does not know would end a text.", _MOVE_AWAY)

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a message or a document, of all files that name some."""
        return super().end_ids | set(self.special_token_ids["eos"])

    def save(self, folder: str | Path) -> None:
        """Write its files as they were read; what only the model's configuration says of bos, eos and pad is added."""
        for name, contents in self._files.items():
            (Path(folder) / name).write_bytes(contents)
        if self.special_token_ids != self._find_special({}):
            write_json(Path(folder) / GENERATION_FILE, self._said.get(GENERATION_FILE, {}) | token_ids(self))

    @functools.cached_property
    def chat_templates(self) -> dict[str, str]:
        """The Jinja programs that lay out its chats, "default" and perhaps "tool_use"; none: it has no chats."""
        if (own := self._files.get(TEMPLATE_FILE)) is not None:
            return {"default": own.decode("utf-8", "replace")}
        said = self._said.get(CONFIG_FILE, {}).get("chat_template") or []
        named = [{"name": "default", "template": said}] if isinstance(said, str) else said
        found = [one for one in named if isinstance(one, dict)] if isinstance(named, list) else []
        return {str(one.get("name")): str(one.get("template")) for one in found}

    @functools.cached_property
    def named_tokens(self) -> dict[str, str]:
        """What its files call "bos_token", "eos_token" and so on, which a chat template may name."""
        said = [pair for file in (SPECIAL_TOKENS_FILE, CONFIG_FILE) for pair in self._said.get(file, {}).items()]
        tokens = {name: one.get("content") if isinstance(one, dict) else one for name, one in said}
        return {name: one for name, one in tokens.items() if name.endswith("_token") and isinstance(one, str)}

    def chat_template(self, *, with_tools: bool = False) -> ChatTemplate:
        """The program that lays out its chats; of two, the one for chats with tools or without.

        Raises:
            DataError: it has none.
        """
        found = self._programs.get("tool_use") if with_tools else None
        found = found or self._programs.get("default")
        if found is None:
            raise DataError(
                "this model has no chat template.",
                "Continue texts with it (groundup generate, /v1/completions), or put a chat_template.jinja beside it.",
            )
        return found

    @functools.cached_property
    def _programs(self) -> dict[str, ChatTemplate]:
        return {
            name: ChatTemplate(source, self._specials.keys(), self.named_tokens)
            for name, source in self.chat_templates.items()
        }

    def with_chat_end(self) -> PretrainedTokenizer:
        """The same, with what ends an answer of its chats among the tokens that end a text.

        A base model's files name the end of a document only. One that has learned to chat ends its answers with another
        token, and whoever writes with it has to stop there.
        """
        end, ids = self._specials.get(self.chat_template().end or ""), self.special_token_ids
        if end is None or end in self.end_ids:
            return self
        other = copy.copy(self)
        other.special_token_ids = {**ids, "eos": [*ids["eos"], end]}
        return other

    def encode_laid_out(self, laid_out: LaidOut) -> Rendered:
        """Ids of what a chat template wrote, as transformers has them; what was said has no control tokens.

        Raises:
            DataError: a text that the tokenizer cannot take.
        """
        text, mark = laid_out.text, laid_out.mark
        is_whole = mark not in text
        parts = [text] if is_whole else self.chat_template().names.split(text)  # text, name, text, …
        ids: list[int] = []
        spans: list[tuple[int, int]] = []  # characters of each token, in the text without marks
        start = 0
        with reading("a text for this tokenizer", DataError, "Check its tokenizer.json."):
            for place, part in enumerate(parts):
                plain = part.replace(mark, "")
                if place % 2:
                    ids.append(self._specials[part])
                    spans.append((start, start + len(part)))
                else:
                    found = (self._full if is_whole else self._engine).encode(plain, add_special_tokens=False)
                    ids += found.ids
                    spans += [(start + first, start + last) for first, last in found.offsets]
                start += len(plain)
        is_learned = [False] * len(ids)
        for span in laid_out.learned:
            first, last = (at - text.count(mark, 0, at) for at in span)
            inside = [place for place, (begin, end) in enumerate(spans) if begin < last and end > first]
            if inside:  # some tokenizers give white space no characters
                is_learned[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
        return Rendered(ids, is_learned)

    def encode_iterable(self, parts: Iterable[str]) -> Iterator[int]:
        """As `Tokenizer.encode_iterable`; DataError: it merges across spaces, or changes a text by what is far away."""
        if self._drops_space is None:
            raise DataError(
                "this tokenizer gives a piece of a text other ids than the whole.", "Encode the text as one: encode."
            )
        return super().encode_iterable(parts)

    def _cut(self, text: str) -> Iterator[str]:
        is_short = len(text) <= PIECE_CHARACTERS
        drops_space = None if is_short else self._drops_space
        return iter([text]) if drops_space is None else cut_into_pieces(text, drop_space=drops_space)

    @functools.cached_property
    def _drops_space(self) -> bool | None:
        """Whether a long text is cut behind its spaces, as each piece gets one in front; None: it must not be cut.

        No token may reach across a space between letters, and a self-test has to show that nothing else does.
        """
        if any(_ACROSS.search(token) for token in self._bytes):
            return None
        # A Unigram must see words one by one: the sums that decide its cuts would be rounded otherwise.
        text, cuts = "a b", self._full.pre_tokenizer
        if self._full.normalizer is not None:
            text = self._full.normalizer.normalize_str(text)
        is_unigram = json.loads(self._contents)["model"]["type"] == "Unigram"
        if is_unigram and (cuts is None or len(cuts.pre_tokenize_str(text)) < 2):
            return None
        parts = [replace_surrogates(f"{text}a b{text}\n") for text in adversarial_texts(200, seed=0)]
        texts = ["".join(parts[place : place + 10]) for place in range(0, len(parts), 10)]

        def ids_of(pieces: Iterable[str]) -> list[int]:
            found = self._engine.encode_batch_fast(list(pieces), add_special_tokens=False)
            return [index for one in found for index in one.ids]

        for drops in (False, True):
            if all(ids_of(cut_into_pieces(text, 1, drop_space=drops)) == ids_of([text]) for text in texts):
                return drops
        return None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """As `Tokenizer.decode`, by the rules of its own decoder."""
        listed = list(ids)
        for index in listed:
            self.token_bytes(index)
        kept = [index for index in listed if index not in self.special_ids] if skip_special else listed
        with reading("ids for this tokenizer", DataError, "Check its tokenizer.json."):
            return self._full.decode(kept, skip_special_tokens=False)

    def token_bytes(self, index: int) -> bytes:
        """The UTF-8 bytes that a token stands for; nothing for a control token or an id without a token."""
        return b"" if self.vocab_size <= index < self._n_ids else super().token_bytes(index)

    @property
    def unknown_id(self) -> int | None:
        """What stands for a character without a token, if there are any: the one control token that a text may have."""
        return self._unknown

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
        """Always an error: a pretrained tokenizer has no tokens for the roles of groundup's chats."""
        raise DataError(
            "this model's chats are laid out by a program of its own, not by tokens for roles.", "Call render."
        )

    def _required(self, *names: str) -> int:
        found = [index for name in names for index in self.special_token_ids[name]]
        if found:
            return found[0]
        what = f"this tokenizer names no token for {names[0]}."
        raise DataError(what, f"Name one in {CONFIG_FILE}: {names[0]}_token.")

    def _find_special(self, values: Mapping[str, Any]) -> dict[str, list[int]]:
        """Ids of the tokens for bos, eos and pad, by any name, id or list of them in any file."""
        files, known = [*self._said.values(), values], set(self._ids.values())
        found = {}
        for name in SPECIAL_TOKENS:
            said = [file.get(key) for file in files for key in (f"{name}_token", f"{name}_token_id")]
            tokens = [one for value in said for one in (value if isinstance(value, list) else [value])]
            tokens = [one.get("content") if isinstance(one, dict) else one for one in tokens]
            ids = [self._ids.get(one) if isinstance(one, str) else one for one in tokens]
            found[name] = [*dict.fromkeys(one for one in ids if _is_id(one) and one in known)]
        return found

    def _find_control(self, spec: dict[str, Any]) -> dict[str, int]:
        """Control tokens, by all that its files say, with their ids."""
        said: list[Any] = [token for token in spec["added_tokens"] if token["special"]]
        for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE):
            for key, value in self._said.get(name, {}).items():
                if key.endswith("_token"):
                    said.append(value)
                elif key.endswith("special_tokens") and isinstance(value, dict | list):
                    said += value.values() if isinstance(value, dict) else value
                elif key == "added_tokens_decoder" and isinstance(value, dict):
                    said += [token for token in value.values() if isinstance(token, dict) and token.get("special")]
        contents = [token.get("content") if isinstance(token, dict) else token for token in said]
        names = {name: self._ids[name] for name in contents if isinstance(name, str) and name in self._ids}
        named = {index for ids in self.special_token_ids.values() for index in ids}
        names |= {name: index for name, index in self._ids.items() if index in named}
        if spec["model"]["type"] == "Unigram":
            names |= {name: self._ids[name] for name in _SENTENCEPIECE_CONTROL if name in self._ids}
        borders = {index for name in ("bos", "eos") for index in self.special_token_ids[name]}
        added = {token["content"] for token in spec["added_tokens"]}
        # What begins or ends a text is never text. Else a single character is, whoever fills rows with it: it has no
        # other token.
        return {
            name: index
            for name, index in names.items()
            if index in borders or (len(name) > 1 and (name in added or _LOOKS_LIKE_CONTROL.fullmatch(name)))
        }


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


def _is_byte_level(spec: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([spec.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")])


def _bytes_of_tokens(spec: dict[str, Any], ids: Mapping[str, int]) -> list[bytes]:
    """The bytes that each token stands for, by its id; an id that nothing has stands for none."""
    is_byte_level = _is_byte_level(spec)
    size = max(ids.values(), default=-1) + 1
    if size > 1 << 24:
        raise ValueError(f"the largest id is {size - 1:,}")
    added = {token["content"] for token in spec["added_tokens"]}
    mark = spec["model"].get("continuing_subword_prefix") or ""
    decoder = spec.get("decoder")
    between = " " if decoder is None or decoder["type"] == "WordPiece" else ""  # words of BERT, or of a list of words
    table = [b""] * size
    for token, index in ids.items():
        byte = _BYTE.fullmatch(token)
        if token in added:
            table[index] = token.encode()
        elif is_byte_level and all(letter in BYTE_OF_LETTER for letter in token):
            table[index] = bytes(BYTE_OF_LETTER[letter] for letter in token)
        elif byte is not None and not is_byte_level:
            table[index] = bytes([int(byte[1], 16)])
        elif mark and token.startswith(mark):
            table[index] = token.removeprefix(mark).encode()
        else:
            table[index] = (between + token.replace(_SPACE, " ")).encode()
    return table


def _unknown_id(spec: dict[str, Any], ids: Mapping[str, int], control: Collection[str]) -> int | None:
    """What stands for characters without a token; None where single bytes have tokens, so that all have some."""
    model = spec["model"]
    letters = LETTERS if _is_byte_level(spec) else [f"<0x{value:02X}>" for value in range(256)]
    is_spelled = _is_byte_level(spec) or bool(model.get("byte_fallback"))
    if model["type"] in ("BPE", "Unigram") and is_spelled and ids.keys() - control >= set(letters):
        return None
    unknown = model["unk_id"] if model["type"] == "Unigram" else ids.get(model.get("unk_token") or "")
    return unknown if type(unknown) is int else None
