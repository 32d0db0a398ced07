"""Documents to the contents of a `tokenizer.json`: byte-level BPE, WordPiece, Unigram, or one token per character.

All but the last work on bytes, each spelled as a printable letter (GPT-2's alphabet) that has a token of its
own: any text can be encoded, without an unknown token, and its tokens' bytes joined are the text's. Training depends
on how often each piece of text occurs and on nothing else, so the result is the same bits with any number
of threads and any order of the documents.

The algorithms are in `bpe.py`, `wordpiece.py` and `unigram.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from groundup.console import Console, format_bytes
from groundup.corpus.document import Document
from groundup.errors import DataError, Problem, RecipeError
from groundup.tokenizer.bpe import require_rustbpe, train_bpe, train_rustbpe
from groundup.tokenizer.files import as_json, contents
from groundup.tokenizer.letters import LETTERS
from groundup.tokenizer.sample import COUNTABLE_BYTES, Sample, sample
from groundup.tokenizer.special import REPLACEMENT, control_token, control_tokens
from groundup.tokenizer.split import PATTERNS, default_split, replace_surrogates
from groundup.tokenizer.unigram import train_unigram
from groundup.tokenizer.wordpiece import train_wordpiece

KINDS = ("bpe", "wordpiece", "unigram", "characters")
TRAINERS = ("huggingface", "rustbpe")


def train(
    documents: Iterable[Document | str],
    kind: str,
    vocab_size: int,
    split: str | None,
    spare_tokens: int,
    trainer: str,
    sample_bytes: int | None,
    console: Console | None,
) -> str:
    """Train; see `Tokenizer.train` for the arguments.

    Returns:
        The contents of `tokenizer.json`.

    Raises:
        RecipeError: a setting is unknown, or `vocab_size` has no room for the bytes.
        DataError: there is no text.
    """
    control = control_tokens(spare_tokens)
    _check_settings(kind, vocab_size, split, trainer, len(control))
    if kind == "characters":
        return _one_token_per_character(documents, control)
    if trainer == "rustbpe":
        require_rustbpe()  # before the corpus is read
    chosen = sample(documents, COUNTABLE_BYTES if sample_bytes is None else sample_bytes)
    if not chosen.seen_bytes:
        raise _no_text()
    if console is not None and not chosen.is_whole:
        why = " (what 32-bit counters can hold)" if chosen.most_bytes == COUNTABLE_BYTES else ""
        console.note(
            f"tokenizer: learns from {format_bytes(chosen.kept_bytes)} of {format_bytes(chosen.seen_bytes)} of text, "
            f"every source with its share{why}."
        )
    spec = _train_on(chosen, kind, vocab_size, split or default_split(vocab_size), control, trainer)
    trained_size = len(spec["model"]["vocab"])
    if trained_size < vocab_size and console is not None:
        console.warn(
            f"tokenizer: the text repeats enough for {trained_size:,} tokens, not for the {vocab_size:,} asked for; "
            "the vocabulary is the smaller one."
        )
    return as_json(spec)


def _train_on(
    chosen: Sample, kind: str, vocab_size: int, split: str, control: list[str], trainer: str
) -> dict[str, Any]:
    if kind == "wordpiece":
        return train_wordpiece(chosen, vocab_size, split, control)
    if kind == "unigram":
        return train_unigram(chosen, vocab_size, split, control)
    if trainer == "rustbpe":
        return train_rustbpe(chosen, vocab_size, split, control)
    return train_bpe(chosen, vocab_size, split, control)


def _one_token_per_character(documents: Iterable[Document | str], control: list[str]) -> str:
    """Every character of the texts, sorted by code point; any other is U+FFFD. Nothing is held, so nothing sampled."""
    characters: set[str] = set()
    for document in documents:
        characters.update(replace_surrogates(document if isinstance(document, str) else document.text))
    if not characters:
        raise _no_text()
    characters.add(REPLACEMENT)
    vocabulary = {token: index for index, token in enumerate([*control, *sorted(characters)])}
    engine = Engine(models.WordLevel(vocabulary, unk_token=REPLACEMENT))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens([control_token(name) for name in control])
    return as_json(contents(engine))


def _no_text() -> DataError:
    return DataError("tokenizer: there is no text to learn from.", "Check what the corpus stage kept.")


def _check_settings(kind: str, vocab_size: int, split: str | None, trainer: str, n_control: int) -> None:
    problems = []
    if kind not in KINDS:
        problems.append(
            Problem(f"[tokenizer] kind = {kind!r}", "unknown.", "Use bpe, wordpiece, unigram or characters.")
        )
    # WordPiece spells a byte at the start of a word and one inside it differently.
    n_bytes = {"wordpiece": 2 * len(LETTERS), "characters": 0}.get(kind, len(LETTERS))
    needed = n_control + n_bytes
    if kind != "characters" and vocab_size < needed:
        bytes_twice = " (each at the start of a word and inside one)" if kind == "wordpiece" else ""
        problems.append(
            Problem(
                f"[tokenizer] vocab_size = {vocab_size}",
                f"too small: {n_control} control tokens and {len(LETTERS)} bytes{bytes_twice} need {needed}.",
                f"Set vocab_size = {needed} or more, or keep fewer spare_tokens.",
            )
        )
    if split is not None and split not in PATTERNS:
        problems.append(Problem(f"[tokenizer] split = {split!r}", "unknown.", "Use qwen2, llama3 or gpt2."))
    if trainer not in TRAINERS:
        problems.append(Problem(f"[tokenizer] trainer = {trainer!r}", "unknown.", "Use huggingface or rustbpe."))
    elif trainer == "rustbpe" and kind in KINDS and kind != "bpe":
        problems.append(
            Problem(
                f"[tokenizer] trainer = {trainer!r}",
                f"trains BPE, not {kind}.",
                'Set kind = "bpe", or trainer = "huggingface".',
            )
        )
    if problems:
        raise RecipeError("tokenizer", problems)
