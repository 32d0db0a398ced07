"""From logits to a token, token by token in Python numbers: softmax, top-k, top-p, min-p, typical and the draw.

Tokens of equal probability are treated alike: filters keep all that tie with the last one they need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Probabilities proportional to e^(logit / temperature)."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def top_k(probabilities: Sequence[float], k: int) -> list[float]:
    """Only the k most probable tokens, renormalized."""
    return _at_least(probabilities, sorted(probabilities, reverse=True)[min(k, len(probabilities)) - 1])


def top_p(probabilities: Sequence[float], p: float) -> list[float]:
    """Only the fewest most probable tokens that hold the mass p (the nucleus, arXiv:1904.09751), renormalized."""
    held = 0.0
    for probability in sorted(probabilities, reverse=True):
        held += probability
        if held >= p:
            break
    return _at_least(probabilities, probability)


def min_p(probabilities: Sequence[float], share: float) -> list[float]:
    """Only tokens at least `share` times as probable as the most probable one (arXiv:2407.01082), renormalized."""
    return _at_least(probabilities, share * max(probabilities))


def typical(probabilities: Sequence[float], mass: float) -> list[float]:
    """Only tokens whose surprise is nearest the entropy, as many as hold the mass (arXiv:2202.00666), renormalized."""
    possible = [probability for probability in probabilities if probability > 0]
    entropy = -math.fsum(probability * math.log(probability) for probability in possible)
    distances = [abs(math.log(probability) + entropy) if probability > 0 else math.inf for probability in probabilities]
    held, border = 0.0, 0.0
    for distance, probability in sorted(zip(distances, probabilities, strict=True)):
        if held < mass:
            held, border = held + probability, distance
    kept = [p if d <= border * (1 + 1e-9) else 0.0 for d, p in zip(distances, probabilities, strict=True)]
    total = math.fsum(kept)
    return [probability / total for probability in kept]


def draw(probabilities: Sequence[float], uniform: float) -> int:
    """The first token at which the running sum of the probabilities passes `uniform`, a number of [0, 1)."""
    passed = 0.0
    for token, probability in enumerate(probabilities):
        passed += probability
        if passed > uniform:
            return token
    return max(token for token, probability in enumerate(probabilities) if probability > 0)


def _at_least(probabilities: Sequence[float], border: float) -> list[float]:
    kept = [probability if probability >= border else 0.0 for probability in probabilities]
    total = math.fsum(kept)
    return [probability / total for probability in kept]
