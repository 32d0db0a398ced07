"""Signatures: equal to the textbook's, and as good an estimate as the theory promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import planted_pairs

import groundup.corpus.dedup.minhash as minhash
from groundup.corpus.dedup.minhash import hash_family, match_probability, signatures
from groundup.corpus.words import words_of
from groundup.reference.minhash import agreement, share_a_band, signature

words = st.text(alphabet="ab ÉжΣ中.", max_size=60)


def textbook(text: str, ngram: int, n_hashes: int) -> list[int]:
    grams, _ = words_of([text]).ngrams(ngram)
    multipliers, increments = hash_family(n_hashes)
    return signature([int(gram) >> 32 for gram in grams], multipliers.tolist(), increments.tolist())


@given(st.lists(words, max_size=6), st.integers(1, 6), st.sampled_from([1, 7, 20]))
def test_equal_to_the_textbook(texts, ngram, n_hashes):
    found = signatures(texts, ngram=ngram, n_hashes=n_hashes)
    assert found.dtype == np.uint32
    assert found.shape == (len(texts), n_hashes)
    assert found.tolist() == [textbook(text, ngram, n_hashes) for text in texts]


@given(st.lists(words, min_size=1, max_size=12))
def test_blocks_make_no_difference(texts):
    """A text may lie in one block, in many, or share one with others."""
    whole = signatures(texts, n_hashes=8)
    block, minhash._BLOCK = minhash._BLOCK, 3
    try:
        assert (signatures(texts, n_hashes=8) == whole).all()
    finally:
        minhash._BLOCK = block


def test_words_or_texts_and_longer_signatures_begin_like_shorter_ones():
    texts = ["one two three four five six", "", "eins"]
    long = signatures(words_of(texts), n_hashes=300)
    assert (signatures(texts, n_hashes=112) == long[:, :112]).all()
    assert len(set(long[0].tolist())) > 290


def test_numbers_of_old_stay():
    """Signatures are stored: other numbers need another HASH_VERSION."""
    found = signatures(["The quick brown fox jumps over the lazy dog"], n_hashes=4)
    assert found.tolist() == [[273211840, 44038462, 1645875726, 1091237103]]


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_agreement_and_bands_are_as_the_formula_says(similarity):
    """3,000 pairs of sets of 200 shingles: mean, spread and share of candidates, each within four standard errors."""
    n_pairs, size, bands, rows = 3000, 200, 14, 8
    rng = np.random.default_rng(7)
    common = round(2 * size * similarity / (1 + similarity))
    union = 2 * size - common
    true = common / union
    shingles = rng.integers(0, 1 << 32, (n_pairs, union), dtype=np.uint32)
    both = np.concatenate([shingles[:, :size], shingles[:, union - size :]], axis=1).reshape(-1)
    found = minhash._least_hashes(both, np.arange(0, len(both), size), bands * rows)
    equal = found[:, 0::2] == found[:, 1::2]  # (n_hashes, n_pairs)
    share = equal.mean(axis=0)
    spread = (true * (1 - true) / (bands * rows)) ** 0.5
    assert abs(share.mean() - true) < 4 * spread / n_pairs**0.5
    assert share.std() == pytest.approx(spread, rel=0.08)
    expected = match_probability(true, bands, rows)
    candidates = equal.reshape(bands, rows, n_pairs).all(axis=1).any(axis=0).mean()
    assert abs(candidates - expected) < 4 * (expected * (1 - expected) / n_pairs) ** 0.5


def test_match_probability_is_the_published_table():
    """FineWeb's 14 bands of 8 (2406.17557, section 3.4) and RefinedWeb's 450 of 20."""
    for similarity, expected in ((0.5, 0.053), (0.6, 0.21), (0.7, 0.56), (0.75, 0.77), (0.8, 0.924), (0.85, 0.988)):
        assert match_probability(similarity, 14, 8) == pytest.approx(expected, abs=0.006)
    assert match_probability(0.75, 450, 20) == pytest.approx(0.76, abs=0.006)


def test_estimates_of_planted_pairs():
    pairs = planted_pairs(300, seed=3, uniform=True)
    one = signatures([pair.original for pair in pairs])
    other = signatures([pair.copy for pair in pairs])
    true = np.array([pair.similarity for pair in pairs])
    error = (one == other).mean(axis=1) - true
    assert abs(error.mean()) < 0.01
    assert error.std() < 1.2 * np.sqrt((true * (1 - true) / 112).mean())
    assert agreement(one[0].tolist(), other[0].tolist()) == pytest.approx((one[0] == other[0]).mean())
    found = [share_a_band(a, b, 14, 8) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    assert np.mean(np.array(found)[true > 0.9]) > 0.98
