"""Unigram over bytes: tokens with probabilities, a text cut where the product is largest (Kudo 2018, arXiv:1804.10959).

Trained by Hugging Face `tokenizers`: of all frequent substrings those are dropped, round by round, whose loss costs the
likelihood of the text least. Its sums of floating-point numbers run in an order that changes from process to
process; the tokens come out the same, their log-probabilities differ in the last digits. They are therefore kept to
four decimals, which changes next to no cut and makes training repeatable.
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, trainers

from groundup.tokenizer.files import contents
from groundup.tokenizer.letters import LETTERS
from groundup.tokenizer.sample import Sample
from groundup.tokenizer.special import control_token
from groundup.tokenizer.split import pre_tokenizer

_DECIMALS = 4
_PENALTY_STEP = 1e-4


def train_unigram(chosen: Sample, vocab_size: int, split: str, control: list[str]) -> dict[str, Any]:
    """Train a Unigram; the contents of `tokenizer.json`."""
    engine = Engine(models.Unigram())
    engine.pre_tokenizer = pre_tokenizer(split)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size,
        special_tokens=[control_token(name) for name in control],
        initial_alphabet=LETTERS,
        show_progress=False,
    )
    engine.train_from_iterator(chosen.pieces(), trainer)
    spec = contents(engine)
    tokens = [(token, float(score)) for token, score in spec["model"]["vocab"] if token not in control]
    spec["model"]["vocab"] = [[name, 0.0] for name in control] + _settled(tokens)
    return spec


def _settled(tokens: list[tuple[str, float]]) -> list[list[Any]]:
    """The tokens in an order and with scores that do not depend on the order in which floats were summed."""
    least = min(score for _, score in tokens)
    # Letters that the text does not need come last, a step apart, in no order: one score for all of them.
    needless = least + (len(LETTERS) + 1) * _PENALTY_STEP
    rounded = [
        [token, round(least if len(token) == 1 and score < needless else score, _DECIMALS)] for token, score in tokens
    ]
    return sorted(rounded, key=lambda item: (-item[1], item[0]))
