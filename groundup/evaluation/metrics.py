"""Scores with n and standard error: bits per byte of held-out text, shares, means, F1 of words.

Bits per byte is −Σ log₂ p(token) / Σ bytes over the text's tokens: it does not depend on the tokenizer, so models
with different ones can be compared. Control tokens count neither as bits nor as bytes.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.errors import DataError
from groundup.model import OutputLayer, Transformer
from groundup.tokenizer import Tokenizer

_ROWS = 16  # windows scored at once
FEWEST_UNITS = 20  # of text, for a standard error over them


@dataclass(frozen=True)
class Estimate:
    """A figure measured on a sample."""

    value: float  # the figure
    stderr: float  # its standard error
    n: int  # size of the sample
    unit: str  # of what


def bits_per_byte(model: Transformer, texts: Iterable[str], tokenizer: Tokenizer) -> Estimate:
    """How many bits the model needs for a byte of text.

    Every document starts afresh after `<|endoftext|>` and is scored in windows of the model's context, one after
    the other, each text token exactly once.

    The standard error is that of a ratio estimate over documents; with fewer than 20 of them over windows, with
    fewer than 20 of those over tokens, which takes neighbours for independent and so is rather too small.

    Args:
        model: put into evaluation mode.
        texts: documents, usually those of the validation split.
        tokenizer: of the model.

    Returns:
        In bits per byte; n counts the UTF-8 bytes of the text that was scored.

    Raises:
        DataError: no text.
    """
    return ratio_estimate(*bits_and_bytes(model, texts, tokenizer))


def bits_and_bytes(model: Transformer, texts: Iterable[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of each unit of a text, for `ratio_estimate`; two models of one tokenizer have the same units.

    Arguments and errors as `bits_per_byte`.
    """
    return text_units(score_windows(model, texts, tokenizer))


def text_units(windows: Iterable[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Bits and bytes of documents, or where these are few, of windows or tokens, from what `score_windows` gives."""
    document_of: list[int] = []
    of_windows: list[tuple[float, float]] = []  # (bits, bytes) of each
    of_tokens: list[np.ndarray] = []  # (2, tokens) of each of the first windows
    for document, amounts in windows:
        document_of.append(document)
        of_windows.append((float(amounts[0].sum()), float(amounts[1].sum())))
        if len(of_windows) < FEWEST_UNITS:
            of_tokens.append(amounts)
    if len(of_windows) < FEWEST_UNITS:
        tokens = np.concatenate([np.empty((2, 0)), *of_tokens], axis=1)
        return tokens[0], tokens[1]
    bits, n_bytes = np.array(of_windows).T
    if document_of[-1] + 1 < FEWEST_UNITS:
        return bits, n_bytes
    return np.bincount(document_of, bits), np.bincount(document_of, n_bytes)


def score_windows(
    model: Transformer, texts: Iterable[str], tokenizer: Tokenizer
) -> Iterator[tuple[int, Float[np.ndarray, "2 tokens"]]]:
    """Bits and bytes of each token that counts, window by window, each with the number of its document."""
    is_scored = np.ones(max(model.config.vocab_size, tokenizer.vocab_size), dtype=bool)
    is_scored[list(tokenizer.special_ids)] = False
    if tokenizer.unknown_id is not None:
        is_scored[tokenizer.unknown_id] = False  # stands for characters of any size
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    windows = _windows(texts, tokenizer, model.config.context_length)
    while group := list(itertools.islice(windows, _ROWS)):
        nats = token_nats(model, [ids for _, ids, _ in group], [targets for _, _, targets in group])
        for (document, _, targets), row in zip(group, nats, strict=True):
            scored = is_scored[targets]
            yield document, np.stack([row[scored].astype(np.float64) / math.log(2), sizes[targets[scored]]])


def ratio_estimate(bits: np.ndarray, n_bytes: np.ndarray) -> Estimate:
    """Σ bits / Σ bytes over units of text, with the standard error of that ratio.

    Cochran, Sampling Techniques, eq. 2.39, for a sample from an endless population.

    Raises:
        DataError: no bytes.
    """
    if not n_bytes.sum():
        raise DataError("the text has no bytes to score.", "Add text, or raise [corpus] validation_share.")
    bits, n_bytes, size = bits.astype(np.float64), n_bytes.astype(np.float64), len(bits)
    value = float(bits.sum() / n_bytes.sum())
    variance = float(((bits - value * n_bytes) ** 2).sum()) * size / max(1, size - 1)
    return Estimate(value, math.sqrt(variance) / float(n_bytes.sum()), int(n_bytes.sum()), "bytes")


@torch.inference_mode()
def token_nats(model: Transformer, ids: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """−log p of every target, row by row, in nats; rows of any lengths."""
    model.eval()
    device = next(model.parameters()).device
    padded, wanted = (
        torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).to(device)
        for rows in (ids, targets)
    )
    nats = model(padded, head=partial(_row_by_row, targets=wanted)).cpu().numpy()
    return [row[: len(row_ids)] for row, row_ids in zip(nats, ids, strict=True)]


def share(outcomes: Sequence[bool]) -> Estimate:
    """A share of yes among n outcomes.

    Its standard error is half the width of the Wilson interval at z = 1 (Wilson 1927): within a hair of the
    binomial sqrt(p (1 − p) / n), but not 0 when all outcomes agree.
    """
    n = len(outcomes)
    value = sum(outcomes) / n
    low, high = wilson(value, n, z=1.0)
    return Estimate(value, (high - low) / 2, n, "prompts")


def wilson(value: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of n outcomes (Wilson 1927); z = 1.96: of 95 %."""
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean(values: Iterable[float], unit: str) -> Estimate:
    """A mean, with its standard error."""
    array = np.fromiter(values, dtype=np.float64)
    stderr = float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return Estimate(float(array.mean()), stderr, len(array), unit)


def f1(answer: str, target: str) -> float:
    """F1 of words without articles, punctuation and case (SQuAD, Rajpurkar et al. 2016)."""
    said, wanted = (_words(text) for text in (answer, target))
    n_common = sum((Counter(said) & Counter(wanted)).values())
    if not said or not wanted:
        return float(said == wanted)
    return 2 * n_common / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _row_by_row(
    hidden: Float[Tensor, "batch seq d_model"], output: OutputLayer, targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """−log p of the targets, one row's logits at a time."""
    rows = [
        torch.nn.functional.cross_entropy(output.logits(part), wanted, reduction="none")
        for part, wanted in zip(hidden, targets, strict=True)
    ]
    return torch.stack(rows)


def _windows(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Windows of every document as (document, ids, targets); the first token follows `<|endoftext|>`."""
    for number, text in enumerate(texts):
        targets = np.array(tokenizer.encode(text), dtype=np.int64)
        inputs = np.concatenate([[tokenizer.end_of_text_id], targets[:-1]]).astype(np.int64)
        for start in range(0, len(targets), length):
            yield number, inputs[start : start + length], targets[start : start + length]
