"""WordPiece over bytes: a word's first token, and its other tokens marked `##` (Schuster and Nakajima 2012; BERT).

Trained as Hugging Face's WordPieceTrainer does: BPE over letters of which those inside a word carry the mark.
Encoding takes the longest token that fits, from left to right, so merges are not needed and not kept.

Two departures from BERT let any text be encoded without an unknown token. Words are spelled in byte letters,
all of which have a token, with and without the mark. And `#` is always a word by itself, so that the mark at the
start of a token can only be a mark. Words are cut behind 24 characters (the search for the longest token
takes the square of a word's length).
"""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, decoders, models, trainers
from tokenizers import Tokenizer as Engine

from groundup.tokenizer.bpe import MIN_FREQUENCY
from groundup.tokenizer.files import contents
from groundup.tokenizer.letters import LETTERS
from groundup.tokenizer.sample import Sample
from groundup.tokenizer.special import PAD, control_token
from groundup.tokenizer.split import LONGEST_WORD, word_pre_tokenizer

MARK = "##"
"""Before every token that continues a word."""

_LONGEST_WORD_LETTERS = 4 * LONGEST_WORD  # a character has up to four bytes


def train_wordpiece(chosen: Sample, vocab_size: int, split: str, control: list[str]) -> dict[str, Any]:
    """Train a WordPiece; the contents of `tokenizer.json`."""
    # The format demands an unknown token. Nothing is unknown, so any name of the vocabulary will do.
    engine = Engine(models.WordPiece(unk_token=PAD, max_input_chars_per_word=_LONGEST_WORD_LETTERS))
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
