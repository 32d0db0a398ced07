"""Log-likelihoods of continuations: whatever is shared and batched, each is what the model alone gives."""

import math
import random
from typing import Any

import pytest
import torch

from groundup.errors import ArtifactError
from groundup.evaluation import likelihood
from groundup.evaluation.likelihood import Likelihood, encode_pairs, log_likelihoods, score_ids
from groundup.model import ModelConfig, Transformer
from groundup.tokenizer import Tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "old", "king", "Lear"]
SHAPES: dict[str, dict[str, Any]] = {
    "rope": {"n_kv_heads": 1},
    "learned positions": {"position": "learned", "norm": "layernorm", "activation": "gelu"},
    "windows": {"attention": ("window", "full"), "window": 24},
    "first tokens seen through windows": {"attention": ("window",), "window": 16, "sink_tokens": 4},
    "strides": {"attention": ("strided",), "stride": 8},
    "alibi and capped scores": {"position": "alibi", "attention_softcap": 5.0, "logit_softcap": 8.0},
    "norms behind": {"position": "sinusoidal", "norm_placement": "post"},
    "experts": {"n_experts": 4, "experts_per_token": 2},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS)] * 3, vocab_size=300)


def model_of(shape: str, tokenizer: Tokenizer) -> Transformer:
    fields: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "d_ff": 48}
    fields |= {"context_length": 96, **SHAPES[shape]}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def encode_pair(tokenizer: Tokenizer, *pair: str) -> tuple[list[int], list[int]]:
    return encode_pairs(tokenizer, [(pair[0], pair[1])])[0]


def pairs_of(seed: int) -> list[tuple[str, str]]:
    rng = random.Random(seed)

    def text(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    shots = text(40)
    pairs = []
    for number in range(20):
        context = (shots + " . " if number % 3 else "") + text(rng.randint(1, 20))
        pairs += [(context, " " + text(rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
    pairs += [("", "alone"), (text(200), " too long"), ("a space at the end  ", "word")] + [("the", " cat")] * 2
    pairs += [("a mat", " and saw" + end) for end in ("", " the", " the king", " the king Lear", " the old", " a")]
    return rng.sample(pairs, len(pairs))


@torch.inference_mode()
def alone(model: Transformer, tokenizer: Tokenizer, context: str, continuation: str) -> Likelihood:
    before, after = encode_pair(tokenizer, context, continuation)
    ids = (before + after)[-(model.config.context_length + 1) :]
    n = min(len(after), len(ids) - 1)
    logprobs = model(torch.tensor([ids[:-1]]))[0, -n:].log_softmax(-1)
    targets = torch.tensor(ids[-n:])
    chosen = logprobs.gather(1, targets[:, None]).double().sum()
    return Likelihood(float(chosen), n, bool((logprobs.argmax(1) == targets).all()))


@pytest.mark.parametrize("shape", SHAPES)
def test_in_any_company_a_continuation_is_as_probable_as_alone(shape: str, tokenizer: Tokenizer) -> None:
    model, pairs = model_of(shape, tokenizer), pairs_of(1)
    found = log_likelihoods(model, tokenizer, pairs)
    assert len(found) == len(pairs)
    for pair, one in zip(pairs, found, strict=True):
        wanted = alone(model, tokenizer, *pair)
        assert one.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert (one.n_tokens, one.is_greedy) == (wanted.n_tokens, wanted.is_greedy)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(value: float, tokenizer: Tokenizer) -> None:
    model = model_of("rope", tokenizer)
    with torch.no_grad():
        next(model.parameters()).fill_(value)
    with pytest.raises(ArtifactError, match="not numbers"):
        log_likelihoods(model, tokenizer, [("", "the cat"), ("", "the old cat")])


def test_the_size_of_a_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    model, pairs = model_of("rope", tokenizer), pairs_of(2)
    whole = log_likelihoods(model, tokenizer, pairs)
    monkeypatch.setattr("groundup.evaluation.likelihood._batch_tokens", lambda model: 1)
    for one, other in zip(whole, log_likelihoods(model, tokenizer, pairs), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.is_greedy == other.is_greedy


def test_white_space_at_the_end_of_a_context_is_read_with_what_follows(tokenizer: Tokenizer) -> None:
    assert encode_pair(tokenizer, "the cat ", "sat") == encode_pair(tokenizer, "the cat", " sat")
    before, after = encode_pair(tokenizer, "the cat", " sat")
    assert before + after == tokenizer.encode("the cat sat")
    assert encode_pair(tokenizer, "", "sat") == ([tokenizer.end_of_text_id], tokenizer.encode("sat"))


def test_what_is_shared_is_computed_once(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    batches: list[list[int]] = []
    score = likelihood._score
    monkeypatch.setattr(
        likelihood,
        "_score",
        lambda model, before, rows: (
            batches.append([len(tree.ids) for row in rows for tree in row]) or score(model, before, rows)
        ),
    )
    model = model_of("rope", tokenizer)
    one, other = list(range(1, 21)), list(range(2, 12))
    score_ids(
        model, [(one, [7, 8, 9]), (one, [7, 8, 1]), (one, [5]), (one, [7, 3, 9, 9]), (other, [1]), (other, [1, 2])]
    )
    assert batches == [[20 + 2 + 2, 10 + 1]]
    batches.clear()
    score_ids(model, [(other, [n, n, n]) for n in range(200)])  # 400 tokens behind one context
    assert [length for lengths in batches for length in lengths] == [10 + 128] * 3 + [10 + 16]
    batches.clear()
    monkeypatch.setattr("groundup.evaluation.likelihood._batch_tokens", lambda model: 4096)
    log_likelihoods(model, tokenizer, [(f"{word} " * 40, " mat") for word in WORDS])
    assert [len(lengths) for lengths in batches] == [len(WORDS)]  # long contexts that share nothing are one batch
    batches.clear()
    log_likelihoods(model, tokenizer, [("the cat sat on a mat and " * 6 + word, " mat") for word in WORDS])
    assert len(batches) == 1
    assert max(batches[0]) < 10


@pytest.mark.parametrize("context", ["the cat", "the cat ", "the\n\n", "", "  ", "the ca", "a mat, naïve 日本"])
@pytest.mark.parametrize("continuation", [" sat", "sat", "\nsat", "t sat", "é", "本", " "])
def test_no_token_is_lost_at_the_border(context: str, continuation: str, tokenizer: Tokenizer) -> None:
    before, after = encode_pair(tokenizer, context, continuation)
    assert before
    assert after
    ids = before + after
    alone = ids[1:] if ids[0] == tokenizer.end_of_text_id else ids
    assert tokenizer.decode(alone) == context + continuation
