"""Texts to the contents of a `tokenizer.json`: byte-level BPE, or one token per character.

BPE (Sennrich et al. 2016, over bytes as in GPT-2) is trained by Hugging Face `tokenizers`: text is cut by
a regex, then the most frequent pair of neighbours becomes a token, again and again, ties going to the
smaller ids. Merges depend on counts alone, so the result is the same bits with any number of threads.
The regexes and their spelling are those of the Hub's tokenizers, so that other programs know them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from groundup.console import Console
from groundup.errors import DataError, Problem, RecipeError
from groundup.tokenizer.special import REPLACEMENT, control_tokens

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_MIN_FREQUENCY = 2  # a merge seen once would only store the text
_N_BYTES = 256

_SURROGATE = re.compile("[\ud800-\udfff]")
_LETTER = "[A-Za-z\u0430-\u044f\u3041-\u3096\u4e00-\u9fa5\uac00-\ud7a3]"
_SAFE_CUT = re.compile(f"(?<={_LETTER})[ \n](?={_LETTER})")
_PIECE_CHARACTERS = 1 << 16


def pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging.

    Args:
        split: "qwen2" (digits one by one), "llama3" (digits by threes) or "gpt2" (runs of digits).
    """
    if split == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pattern = Regex({"qwen2": _QWEN2, "llama3": _LLAMA3}[split])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])


def train_bpe(texts: Iterable[str], vocab_size: int, split: str, spare_tokens: int, console: Console | None) -> str:
    """Train a byte-level BPE; every byte has a token, so any text can be encoded.

    Args:
        texts: what to learn from.
        vocab_size: tokens in all. A text with too few repeated pairs gives fewer; the console says so.
        split: see `pre_tokenizer`.
        spare_tokens: control tokens kept for later.
        console: where that is said.

    Returns:
        The contents of `tokenizer.json`.

    Raises:
        RecipeError: `vocab_size` has no room for all bytes and control tokens, or the split is unknown.
        DataError: there is no text.
    """
    control = control_tokens(spare_tokens)
    _check_settings(vocab_size, split, len(control))
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizer(split)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[_control(name) for name in control],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(_pieces_of(texts), trainer)
    trained_size = engine.get_vocab_size()
    if trained_size < vocab_size and console is not None:
        console.warn(
            f"tokenizer: the text has repeated pairs for {trained_size:,} tokens, not for the {vocab_size:,} asked "
            "for; the vocabulary is the smaller one."
        )
    return _as_json(engine)


def build_characters(texts: Iterable[str], spare_tokens: int) -> str:
    """One token per character of the texts, sorted by code point; any other character is U+FFFD.

    Returns:
        The contents of `tokenizer.json`.

    Raises:
        DataError: there is no text.
    """
    characters = {REPLACEMENT}
    for piece in _pieces_of(texts):
        characters.update(piece)
    control = control_tokens(spare_tokens)
    vocabulary = {token: index for index, token in enumerate([*control, *sorted(characters)])}
    engine = Engine(models.WordLevel(vocabulary, unk_token=REPLACEMENT))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens([_control(name) for name in control])
    return _as_json(engine)


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which has no UTF-8 form (Python allows it in a str)."""
    return text if text.isascii() else _SURROGATE.sub(REPLACEMENT, text)


def cut_into_pieces(text: str) -> Iterator[str]:
    """Cut a long text where every split regex cuts it too: before a space or line end between two letters.

    Encoding the pieces is encoding the text, in a fraction of the memory (which the engine spends per
    character of its input), and on all cores.
    """
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        cut = _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def _check_settings(vocab_size: int, split: str, n_control: int) -> None:
    problems = []
    needed = n_control + _N_BYTES
    if vocab_size < needed:
        problems.append(
            Problem(
                f"[tokenizer] vocab_size = {vocab_size}",
                f"too small: {n_control} control tokens and {_N_BYTES} bytes need {needed}.",
                f"Set vocab_size = {needed} or more, or keep fewer spare_tokens.",
            )
        )
    if split not in ("qwen2", "llama3", "gpt2"):
        problems.append(Problem(f"[tokenizer] split = {split!r}", "unknown.", "Use qwen2, llama3 or gpt2."))
    if problems:
        raise RecipeError("tokenizer", problems)


def _pieces_of(texts: Iterable[str]) -> Iterator[str]:
    any_text = False
    for text in texts:
        any_text = any_text or bool(text)
        yield from cut_into_pieces(replace_surrogates(text))
    if not any_text:
        raise DataError("tokenizer: there is no text to learn from.", "Check what the corpus stage kept.")


def _control(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _as_json(engine: Engine) -> str:
    return json.dumps(json.loads(engine.to_str()), ensure_ascii=False, indent=2) + "\n"
