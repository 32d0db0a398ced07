"""What generated text is like: how various and repetitive, how near to a reference, how much of it learned by heart.

    distinct-n = different n-grams / n-grams, of all texts together                             (arXiv:1510.03055)
    repetition-n = 1 − different n-grams / n-grams of a text, the mean over texts               (arXiv:1908.04319)
    ROUGE-N, ROUGE-L = F1 of common n-grams, of the longest common subsequence                  (aclanthology W04-1013)
    memorized = texts whose next k tokens follow greedily from the k before them                (arXiv:2202.07646)

N-grams are of words between white space; those of ROUGE are of lower-case letters and digits, English without stems.
"""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from groundup.errors import DataError, GroundupError
from groundup.evaluation.metrics import Estimate, mean, share
from groundup.generation import SamplingParams, generate_batch
from groundup.model import Transformer
from groundup.tokenizer import Tokenizer

ROUGE = ("rouge1", "rouge2", "rougeL")
_REPEATED = 4  # words in a row


def variety(texts: Sequence[str]) -> dict[str, Estimate]:
    """Distinct-1, distinct-2 and repetition-4 of texts; those that no text is long enough for are left out."""
    found = {f"distinct_{n}": distinct(texts, n) for n in (1, 2)}
    repeated = [1 - len({*grams}) / len(grams) for text in texts if (grams := _ngrams(text, _REPEATED))]
    found[f"repetition_{_REPEATED}"] = mean(repeated, "texts") if repeated else None
    return {name: figure for name, figure in found.items() if figure is not None}


def distinct(texts: Sequence[str], n: int) -> Estimate | None:
    """Distinct-n of all texts together, with the standard error of the jackknife over texts; None: no n-gram.

    A bootstrap would not do: texts that it draws twice have nothing new in them. The figure falls with the amount of
    text, so only equal amounts can be compared.
    """
    counts = [Counter(grams) for text in texts if (grams := _ngrams(text, n))]
    if not counts:
        return None
    in_texts = Counter(gram for one in counts for gram in one)
    sizes = np.array([one.total() for one in counts])
    own = np.array([sum(in_texts[gram] == 1 for gram in one) for one in counts])  # in no other text
    stderr = 0.0
    if len(counts) > 1:
        without = (len(in_texts) - own) / (sizes.sum() - sizes)
        stderr = math.sqrt((len(counts) - 1) * float(np.var(without)))
    return Estimate(len(in_texts) / int(sizes.sum()), stderr, len(counts), "texts")


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [*zip(*(words[start:] for start in range(n)), strict=False)]


def rouge(answer: str, target: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, by Google's rouge-score. Raises GroundupError: it is not installed."""
    found = rouge_scorer().score(target, answer)
    return {name: float(score.fmeasure) for name, score in found.items()}


@functools.cache
def rouge_scorer() -> Any:
    """Google's rouge-score. Raises GroundupError: it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise GroundupError("ROUGE needs rouge-score.", "pip install 'groundup[rouge]'") from None
    return RougeScorer([*ROUGE])


def memorization(
    model: Transformer, tokenizer: Tokenizer, texts: Iterable[str], *, k: int = 50, limit: int = 500
) -> dict[str, Estimate]:
    """What a model continues word for word.

    Of each text that is long enough a passage of 2 k tokens is drawn; the model is given its first half.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        texts: documents that it was trained on; for comparison, others that it was not.
        k: tokens that are given, and as many that are to follow.
        limit: most texts, drawn evenly, the same every time.

    Returns:
        "memorized": the share of continuations that are equal, token by token; "common_prefix": how many of the k
        are equal before the first that is not, a share.

    Raises:
        DataError: no text has 2 k tokens, or the model's context is shorter.
    """
    if 2 * k > model.config.context_length:
        raise DataError(
            f"memorization: 2 × {k} tokens, and a context of {model.config.context_length}.",
            f"Give fewer: --tokens {model.config.context_length // 2}",
        )
    draw, n_seen = random.Random(1), 0
    passages: list[list[int]] = []
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) < 2 * k:
            continue
        n_seen += 1
        at = len(passages) if len(passages) < limit else draw.randrange(n_seen)  # reservoir sampling
        if at < limit:
            start = draw.randrange(len(ids) - 2 * k + 1)
            passages[at : at + 1] = [ids[start : start + 2 * k]]
    if not passages:
        raise DataError(f"memorization: no text has 2 × {k} tokens.", "Give fewer: --tokens …")
    params = SamplingParams(temperature=0.0, max_tokens=k)
    written = generate_batch(model, tokenizer, [ids[:k] for ids in passages], params)
    prefixes = [_common_prefix(one.ids, ids[k:]) for one, ids in zip(written, passages, strict=True)]
    return {
        "memorized": replace(share([length == k for length in prefixes]), unit="passages"),
        "common_prefix": mean([length / k for length in prefixes], "passages"),
    }


def _common_prefix(said: Sequence[int], wanted: Sequence[int]) -> int:
    return next((at for at, (one, other) in enumerate(zip(said, wanted, strict=False)) if one != other), len(said))
