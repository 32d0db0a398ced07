"""Bits per byte against exact laws and a plain loop over every token."""

import math

import numpy as np
import pytest
import torch
from generation_models import TEXT, random_model, small_tokenizer
from tiny_run import finished_run

from groundup.corpus import stream_documents
from groundup.errors import DataError
from groundup.evaluation import bits_per_byte
from groundup.evaluation.metrics import ratio_estimate, share
from groundup.interop import load_model
from groundup.model import Transformer, preset
from groundup.shards import TokenShards

TEXTS = [TEXT, "The cat.", TEXT * 3, "<|endoftext|> and <|user|> are only text here", "🙂"]


def model_for(tokenizer, **overrides):
    return random_model("llama-nano", vocab_size=tokenizer.vocab_size, **overrides)


@torch.inference_mode()
def plain_bits(model, tokenizer, text):
    """Bits of each token of one document, windows of one context one after the other."""
    ids, bits = tokenizer.encode(text), []
    before = [tokenizer.end_of_text_id, *ids]
    for place, token in enumerate(ids):
        begin = place - place % model.config.context_length
        logits = model(torch.tensor([before[begin : place + 1]]))[0, -1]
        bits.append(-logits.double().log_softmax(dim=-1)[token].item() / math.log(2))
    return bits


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_a_uniform_model_needs_log2_v_bits_a_token(kind):
    tokenizer = small_tokenizer(kind)
    texts = [TEXT, TEXT * 2, "the cat sat."]
    # Its untied output layer starts at zero.
    model = Transformer(preset("llama-nano", vocab_size=tokenizer.vocab_size))
    n_tokens, n_bytes = sum(len(tokenizer.encode(text)) for text in texts), len("".join(texts).encode())
    found = bits_per_byte(model, texts, tokenizer)
    assert found.value == pytest.approx(math.log2(tokenizer.vocab_size) / (n_bytes / n_tokens), rel=1e-6)
    assert (found.n, found.unit) == (n_bytes, "bytes")


def test_every_text_token_is_scored_exactly_once_each_document_afresh():
    tokenizer = small_tokenizer()
    model = model_for(tokenizer, context_length=16)
    bits = [sum(plain_bits(model, tokenizer, text)) for text in TEXTS]
    found = bits_per_byte(model, TEXTS, tokenizer)
    assert found.n == sum(len(text.encode()) for text in TEXTS)
    assert found.value == pytest.approx(sum(bits) / found.n, rel=1e-5)
    reordered = bits_per_byte(model, TEXTS[::-1], tokenizer)
    assert reordered.value == pytest.approx(found.value, rel=1e-6)


def test_the_first_token_is_predicted_from_endoftext():
    tokenizer = small_tokenizer()
    model = model_for(tokenizer)
    (first,) = tokenizer.encode("c")
    logits = model(torch.tensor([[tokenizer.end_of_text_id]]))[0, -1].double()
    found = bits_per_byte(model, ["c"], tokenizer)
    assert found.value == pytest.approx(-logits.log_softmax(dim=-1)[first].item() / math.log(2), rel=1e-5)
    assert found.n == 1


def test_two_tokenizers_are_compared_by_the_same_bytes():
    found = [
        bits_per_byte(model_for(tokenizer), [TEXT], tokenizer)
        for tokenizer in (small_tokenizer(), small_tokenizer("characters"))
    ]
    assert found[0].n == found[1].n == len(TEXT.encode())


def test_texts_may_come_one_after_the_other():
    tokenizer = small_tokenizer()
    model = model_for(tokenizer)
    assert bits_per_byte(model, (text for text in TEXTS), tokenizer) == bits_per_byte(model, TEXTS, tokenizer)


def test_a_document_of_a_run_is_scored_as_the_shards_have_it():
    run = finished_run()
    shards = TokenShards.open(run.folder("shards"), "validation")
    texts = [document.text for document in stream_documents(run.folder("corpus"), "validation")]
    model, tokenizer = load_model(run.folder("pretrain") / "model")
    assert bits_per_byte(model, texts, tokenizer).n == shards.n_bytes


def test_characters_without_a_token_count_neither_as_bits_nor_as_bytes():
    tokenizer = small_tokenizer("characters")
    model = model_for(tokenizer)
    found = bits_per_byte(model, ["a cat§"], tokenizer)
    known = plain_bits(model, tokenizer, "a cat§")[:-1]
    assert found.n == 5
    assert found.value == pytest.approx(sum(known) / 5, rel=1e-5)


@pytest.mark.parametrize("unit", ["documents", "windows", "tokens"])
def test_the_standard_error_is_over_the_largest_units_that_are_many(unit):
    tokenizer = small_tokenizer()
    model = model_for(tokenizer, context_length=16)
    texts = {"documents": [TEXT[: 9 * n] for n in range(1, 25)], "windows": [TEXT * 3], "tokens": [TEXT[:60]]}[unit]
    bits, n_bytes = [], []
    for text in texts:
        of_tokens = plain_bits(model, tokenizer, text)
        sizes = [len(tokenizer.token_bytes(token)) for token in tokenizer.encode(text)]
        step = {"documents": len(sizes), "windows": 16, "tokens": 1}[unit]
        bits += [sum(of_tokens[start : start + step]) for start in range(0, len(sizes), step)]
        n_bytes += [sum(sizes[start : start + step]) for start in range(0, len(sizes), step)]
    assert len(bits) >= 20
    expected = ratio_estimate(np.array(bits), np.array(n_bytes))
    found = bits_per_byte(model, texts, tokenizer)
    assert found.stderr == pytest.approx(expected.stderr, rel=1e-3)
    assert found.stderr > 0


def test_the_ratios_standard_error_is_the_spread_of_repeated_measurements():
    random = np.random.default_rng(0)
    estimates = []
    for _ in range(2000):
        n_bytes = random.integers(50, 400, size=60)
        estimates.append(ratio_estimate(n_bytes * random.normal(2.0, 0.5, size=60), n_bytes))
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.stderr for estimate in estimates]) == pytest.approx(spread, rel=0.05)
    assert np.mean([estimate.value for estimate in estimates]) == pytest.approx(2.0, abs=4 * spread / 2000**0.5)


def test_the_ratios_standard_error_is_the_means_where_units_are_alike_and_the_bootstraps_elsewhere():
    random = np.random.default_rng(1)
    bits = random.normal(300, 40, size=25)
    alike = ratio_estimate(bits, np.full(25, 100))
    assert alike.value == pytest.approx(bits.mean() / 100)
    assert alike.stderr == pytest.approx(bits.std(ddof=1) / math.sqrt(25) / 100)
    n_bytes = random.integers(50, 400, size=500)
    bits = n_bytes * random.normal(2.0, 0.5, size=500)
    drawn = random.integers(0, 500, size=(4000, 500))
    bootstrap = np.std(bits[drawn].sum(axis=1) / n_bytes[drawn].sum(axis=1))
    assert ratio_estimate(bits, n_bytes).stderr == pytest.approx(bootstrap, rel=0.05)


def test_a_shares_standard_error_is_half_of_wilsons_interval():
    for n_right, n in [(0, 450), (1, 3), (405, 450), (450, 450)]:
        found = share([True] * n_right + [False] * (n - n_right))
        assert (found.value, found.n) == (n_right / n, n)
        # The interval's ends solve |n_right/n − p| = sqrt(p (1 − p) / n).
        ends = np.roots([1 + 1 / n, -2 * found.value - 1 / n, found.value**2])
        assert found.stderr == pytest.approx((ends.max() - ends.min()) / 2, rel=1e-6)
        assert found.stderr > 0


def test_no_text_is_an_error():
    tokenizer = small_tokenizer()
    for texts in (["", ""], []):
        with pytest.raises(DataError, match="no bytes to score"):
            bits_per_byte(model_for(tokenizer), texts, tokenizer)
