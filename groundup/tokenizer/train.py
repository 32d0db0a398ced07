"""Documents to the contents of a `tokenizer.json`: byte-level BPE, WordPiece, Unigram, or one token per character.

All but the last work on bytes, each spelled as a printable letter (GPT-2's alphabet) that has a token of its own: any
text can be encoded, without an unknown token, and its tokens' bytes joined are the text's. Training depends on how
often each piece of text occurs and on nothing else: the same bits with any number of threads and any order of the
documents.

- BPE (Sennrich et al. 2016, arXiv:1508.07909, over bytes as in GPT-2): text is cut by a regex, then the most frequent
  pair of neighbours becomes a token, again and again, ties going to the smaller ids. By Hugging Face `tokenizers`, or
  by rustbpe, which is two to three times as fast: of two equally frequent pairs it may merge another first, and it goes
  on to pairs that occur once, so tokens differ here and there, the compression does not (benchmarks/tokenization.py).
- WordPiece (Schuster and Nakajima 2012; BERT): the same over letters of which those inside a word carry the mark `##`.
  Encoding takes the longest token that fits, from left to right, so merges are not kept. Words are spelled in byte
  letters, with and without the mark, and `#` is always a word by itself, so that `##` can only be a mark.
- Unigram (Kudo 2018, arXiv:1804.10959): of all frequent substrings those are dropped, round by round, whose loss costs
  the likelihood of the text least; a text is cut where the product of its tokens' probabilities is largest.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from groundup.console import Console, format_bytes
from groundup.corpus import read
from groundup.corpus.document import Document
from groundup.errors import DataError, GroundupError, Problem, RecipeError
from groundup.tokenizer.files import as_json, contents
from groundup.tokenizer.letters import LETTERS, spelled
from groundup.tokenizer.sample import COUNTABLE_BYTES, RARE_WORD_BYTES, Sample, sample
from groundup.tokenizer.special import PAD, REPLACEMENT, control_token, control_tokens
from groundup.tokenizer.split import (
    LONGEST_WORD,
    PATTERNS,
    default_split,
    pre_tokenizer,
    replace_surrogates,
    word_pre_tokenizer,
)

MARK = "##"
"""Before every token of a WordPiece that continues a word."""

MIN_FREQUENCY = 2
"""A merge seen once would only store the text."""

_N_CHECKED = 32
_DECIMALS = 4
_PENALTY_STEP = 1e-4


def train(
    documents: Iterable[Document | str] | str | Path,
    kind: str,
    vocab_size: int,
    split: str | None,
    own: Sequence[str],
    spare_tokens: int,
    trainer: str,
    sample_bytes: int | None,
    console: Console | None,
) -> str:
    """The contents of `tokenizer.json`; see `Tokenizer.train`, whose `control_tokens` are `own`."""
    control = control_tokens(spare_tokens, own)
    _check_settings(kind, vocab_size, split, trainer, own, control)
    if isinstance(documents, str | Path):
        documents = read(documents)
    if kind == "characters":
        return _one_token_per_character(documents, control)
    chosen = sample(documents, COUNTABLE_BYTES if sample_bytes is None else sample_bytes)
    if not chosen.seen_bytes:
        raise _no_text()
    if console is not None and not chosen.is_whole:
        why = " (what 32-bit counters can hold)" if chosen.most_bytes == COUNTABLE_BYTES else ""
        console.note(
            f"tokenizer: learns from {format_bytes(chosen.kept_bytes)} of {format_bytes(chosen.seen_bytes)} of text, "
            f"every source with its share{why}."
        )
    train_kind = _train_rustbpe if trainer == "rustbpe" else _TRAINERS[kind]
    spec = train_kind(chosen, vocab_size, split or default_split(vocab_size), control)
    if chosen.left_out_bytes and console is not None:
        console.note(
            f"tokenizer: {format_bytes(chosen.left_out_bytes)} of words of more than 24 characters are left out; it "
            f"learned from {format_bytes(RARE_WORD_BYTES)} of such words."
        )
    trained_size = len(spec["model"]["vocab"])
    if trained_size < vocab_size and console is not None:
        console.warn(
            f"tokenizer: the text repeats enough for {trained_size:,} tokens, not for the {vocab_size:,} asked for; "
            "the vocabulary is the smaller one."
        )
    return as_json(spec)


def _engine(model: models.Model, split: str) -> Engine:
    engine = Engine(model)
    engine.pre_tokenizer, engine.decoder = pre_tokenizer(split), decoders.ByteLevel()
    return engine


def _train_bpe(chosen: Sample, vocab_size: int, split: str, control: list[str]) -> dict[str, Any]:
    engine = _engine(models.BPE(), split)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[control_token(name) for name in control],
        initial_alphabet=LETTERS,
        show_progress=False,
    )
    engine.train_from_iterator(chosen.pieces(), trainer)
    return contents(engine)


def _train_rustbpe(chosen: Sample, vocab_size: int, split: str, control: list[str]) -> dict[str, Any]:
    """As rustbpe gives ranks, not merges, these are found again, which also proves that it is a BPE.

    Raises:
        GroundupError: what rustbpe gave is no BPE, or does not encode as it does itself.
    """
    import rustbpe

    pieces = chosen.pieces()
    shown = [*itertools.islice(pieces, _N_CHECKED)]
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(
        itertools.chain(shown, pieces), vocab_size=vocab_size - len(control), pattern=PATTERNS[split]
    )
    ranks = {bytes(token): rank for token, rank in trained.get_mergeable_ranks()}
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))) or set(map(len, tokens[: len(LETTERS)])) != {1}:
        raise _no_bpe("its ranks have holes")
    # The bytes in the order of the other trainer, which is that of their letters.
    names = [*control, *LETTERS, *(spelled(token) for token in tokens[len(LETTERS) :])]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(tokens, ranks)]
    engine = _engine(models.BPE(vocab=vocabulary, merges=merges), split)
    to_rank = {vocabulary[spelled(token)]: rank for token, rank in ranks.items()}
    for piece in shown:
        if [to_rank[index] for index in engine.encode(piece).ids] != list(trained.encode(piece)):
            raise _no_bpe("it encodes otherwise than its merges say")
    engine.add_special_tokens([control_token(name) for name in control])
    return contents(engine)


def merges_of(tokens: list[bytes], ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that made each token behind the bytes: what the ranks below its own make of it.

    Args:
        tokens: by rank, the 256 bytes first.
        ranks: of the tokens.

    Raises:
        GroundupError: a token is not made of two that rank before it.
    """
    merges = []
    for rank in range(len(LETTERS), len(tokens)):
        token = tokens[rank]
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(found)
            if best >= rank:
                break
            place = found.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) != 2:
            raise _no_bpe(f"token {rank} is not made of two earlier ones")
        merges.append((parts[0], parts[1]))
    return merges


def _no_bpe(why: str) -> GroundupError:
    return GroundupError(
        f'[tokenizer] trainer = "rustbpe": what it gave is not a byte-level BPE ({why}).',
        'Set trainer = "huggingface".',
    )


def _train_wordpiece(chosen: Sample, vocab_size: int, split: str, control: list[str]) -> dict[str, Any]:
    # The format demands an unknown token. Nothing is unknown, so any name of the vocabulary will do.
    # The search for the longest token takes the square of a word's length, so words are cut. A character: four bytes.
    engine = Engine(models.WordPiece(unk_token=PAD, max_input_chars_per_word=4 * LONGEST_WORD))
    engine.pre_tokenizer = word_pre_tokenizer(split)
    engine.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{MARK}"), ""), decoders.ByteLevel()])
    # Given as special, letters get their ids in this order (found in the text, they would get them in an order that
    # changes from process to process), and those that the text does not have get one too.
    spelled = [*LETTERS, *(MARK + letter for letter in LETTERS)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[control_token(name) for name in [*control, *spelled]],
        continuing_subword_prefix=MARK,
        show_progress=False,
    )
    engine.train_from_iterator(chosen.pieces(), trainer)
    spec = contents(engine)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in control]
    return spec


def _train_unigram(chosen: Sample, vocab_size: int, split: str, control: list[str]) -> dict[str, Any]:
    engine = _engine(models.Unigram(), split)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=[control_token(name) for name in control],
        initial_alphabet=LETTERS,
        show_progress=False,
    )
    engine.train_from_iterator(chosen.pieces_of_words(), trainer)
    spec = contents(engine)
    tokens = [(token, float(score)) for token, score in spec["model"]["vocab"] if token not in control]
    spec["model"]["vocab"] = [[name, 0.0] for name in control] + _settled(tokens)
    return spec


def _settled(tokens: list[tuple[str, float]]) -> list[list[Any]]:
    """The tokens in an order and with scores that do not depend on the order in which floats were summed.

    That order changes from process to process; the tokens come out the same, and their log-probabilities differ in the
    last digits. Kept to four decimals, they make training repeatable and change next to no cut.
    """
    least = min(score for _, score in tokens)
    # Letters that the text does not need come last, a step apart, in no order: one score for all of them.
    needless = least + (len(LETTERS) + 1) * _PENALTY_STEP
    rounded = [
        [token, round(least if len(token) == 1 and score < needless else score, _DECIMALS)] for token, score in tokens
    ]
    return sorted(rounded, key=lambda item: (-item[1], item[0]))


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


_TRAINERS: dict[str, Callable[[Sample, int, str, list[str]], dict[str, Any]]] = {
    "bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram
}  # fmt: skip
KINDS = (*_TRAINERS, "characters")


def _check_settings(
    kind: str, vocab_size: int, split: str | None, trainer: str, own: Sequence[str], control: list[str]
) -> None:
    problems = []

    def refuse(what: str, why: str, fix: str) -> None:
        problems.append(Problem(f"[tokenizer] {what}", why, fix))

    for what, value, known in (
        ("kind", kind, KINDS), ("split", split, (None, *PATTERNS)), ("trainer", trainer, ("huggingface", "rustbpe"))
    ):  # fmt: skip
        if value not in known:
            refuse(f"{what} = {value!r}", "unknown.", f"Use {', '.join(filter(None, known))}.")
    # WordPiece spells a byte at the start of a word and one inside it differently.
    n_bytes = {"wordpiece": 2 * len(LETTERS), "characters": 0}.get(kind, len(LETTERS))
    needed = len(control) + n_bytes
    if kind != "characters" and vocab_size < needed:
        bytes_twice = " (each at the start of a word and inside one)" if kind == "wordpiece" else ""
        why = f"too small: {len(control)} control tokens and {len(LETTERS)} bytes{bytes_twice} need {needed}."
        refuse(f"vocab_size = {vocab_size}", why, f"Set vocab_size = {needed} or more, or keep fewer spare_tokens.")
    if trainer == "rustbpe" and kind in KINDS and kind != "bpe":
        refuse('trainer = "rustbpe"', f"trains BPE, not {kind}.", 'Set kind = "bpe", or trainer = "huggingface".')
    elif trainer == "rustbpe" and importlib.util.find_spec("rustbpe") is None:
        install = "pip install 'groundup[fast]', or set trainer = \"huggingface\"."
        refuse('trainer = "rustbpe"', "the package rustbpe is not installed.", install)
    for name in own:
        why = "stands there twice, or is one that every tokenizer has." if control.count(name) > 1 else ""
        # A split that leaves the name whole lets a token be learned that is spelled like it.
        if replace_surrogates(name) != name or any(
            len(pre_tokenizer(cut).pre_tokenize_str(name)) < 2 for cut in PATTERNS
        ):
            why = "is a word that text can contain, which would become the control token."
        if why:
            refuse(f"control_tokens: {name!r:.60}", why, 'Use another name, such as "<name>".')
    if problems:
        raise RecipeError("tokenizer", problems)
