"""Speculative decoding has the target's law: the same tokens where it is greedy, the same distribution elsewhere."""

import random

import pytest
import torch
from generation_models import chi_square, random_model, random_prompts, small_tokenizer
from lengths import IS_LONG

from groundup.errors import DataError
from groundup.generation import Engine, Request, SamplingParams, speculative
from groundup.generation.cache import KVCache
from groundup.generation.request import Text
from groundup.generation.slots import Lease
from groundup.generation.speculative import Draft, Drafter, NGramDrafter, Speculation, verify
from groundup.generation.step import ModelStep, Row

VOCAB, LENGTH = 5, 3


class Eager(speculative.Speculation):
    """Guesses whether it pays or not."""

    def _n_guesses(self, text, n_texts):
        return 1 + (len(text.ids) + text.seed) % speculative.MOST_GUESSES


@pytest.fixture(autouse=True)
def _always_guess(monkeypatch):
    monkeypatch.setattr("groundup.generation.speculative.Speculation", Eager)


def engine_with(draft, model, **options):
    if draft == "model":
        draft = random_model(
            "ground-nano", seed=9, vocab_size=model.config.vocab_size, context_length=model.config.context_length
        )
    if draft == "itself":
        draft = model
    return Engine(model, draft=draft, **options)


DRAFTS = ["ngrams", "model", "itself", 1]


@pytest.mark.parametrize(
    "layout", [{}, {"pages": True, "chunk": 5}, {"is_native": False}], ids=["slots", "pages", "eager"]
)
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_texts_are_those_of_plain_decoding_token_for_token(draft, layout):
    shape = {"attention": ("full", "window"), "window": 6} if layout else {}
    model = random_model("llama-nano", std=0.1, vocab_size=12, context_length=48, **shape)
    prompts = random_prompts([1, 9, 30, 4], model.config.vocab_size)
    penalized = SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, frequency_penalty=0.4)
    for params in (SamplingParams(temperature=0, max_tokens=30), penalized):
        plain = Engine(model, slots=3, **layout).run([Request(prompt, params) for prompt in prompts])
        engine = engine_with(draft, model, slots=3, **layout)
        found = engine.run([Request(prompt, params) for prompt in prompts])
        assert [text[0].ids for text in found] == [text[0].ids for text in plain]
        assert engine.n_used == 0
        assert engine.stats.drafted_tokens > 0
        if draft == "itself":
            assert engine.stats.accepted_tokens == engine.stats.drafted_tokens


def test_copied_guesses_draw_the_very_sample_of_plain_decoding():
    model, params = random_model(std=0.03), SamplingParams(max_tokens=40, top_k=3, temperature=0.7)
    requests = [[Request([1, 2, 3] * 4, params, seed=seed) for seed in range(4)] for _ in range(2)]
    plain, drafted = (
        Engine(model, draft=draft).run(part) for draft, part in zip([None, "ngrams"], requests, strict=True)
    )
    assert plain == drafted


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize("draft", ["model", 1, "ngrams"])
def test_sampled_texts_have_the_targets_distribution(draft, params):
    """Counts of all texts of three tokens against their exact probabilities, from the model's own logits."""
    model = random_model("llama-nano", std=0.25, vocab_size=VOCAB, context_length=8)
    prompt, n = [2, 1, 2, 1], 110_000 if IS_LONG else 1_500  # n-grams find it again
    sampling = SamplingParams(max_tokens=LENGTH, **params)
    exact = torch.zeros(VOCAB**LENGTH, dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
    with torch.inference_mode():
        logits = model(torch.cat([torch.tensor([prompt]).expand(len(grid), -1), grid], dim=1))
    laws = [speculative.warp(logits[:, len(prompt) - 1 + i], sampling).double().exp() for i in range(LENGTH)]
    exact = torch.stack([law.gather(1, grid[:, i : i + 1])[:, 0] for i, law in enumerate(laws)]).prod(dim=0)
    engine = engine_with(draft, model, slots=64)
    results = engine.run([Request(prompt, sampling, seed=seed) for seed in range(n)])
    codes = torch.tensor([result[0].ids for result in results]) @ torch.tensor([VOCAB**2, VOCAB, 1])
    assert abs(chi_square(codes.bincount(minlength=VOCAB**LENGTH), n * exact)) < 4
    assert 0 < engine.stats.accepted_tokens < engine.stats.drafted_tokens


@pytest.mark.parametrize("seed", range(3))
def test_a_token_that_is_kept_or_replaced_has_the_targets_law(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 110_000 if IS_LONG else 4_000
    p, q = (torch.randn(2, VOCAB, generator=generator).mul(1.5).log_softmax(-1) for _ in range(2))
    p[0, seed] = -torch.inf  # a guess that cannot be right
    p = p.log_softmax(-1)
    uniform = torch.rand(n, 5, generator=generator, dtype=torch.float64)
    guesses = torch.multinomial(q[0].exp(), n, replacement=True, generator=generator)
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    for guess, row in zip(guesses.tolist(), uniform, strict=True):
        counts[verify(p, [guess], q[:1].exp(), row[:1], row[1:2], row[2:3])[0]] += 1
    assert counts[seed] == 0
    assert chi_square(counts, n * p[0].double().exp()) < 4


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_stop_text_ends_a_run_of_guesses_and_is_not_streamed(draft):
    tokenizer = small_tokenizer()
    model = random_model("llama-nano", std=0.1, vocab_size=tokenizer.vocab_size, context_length=128)
    prompt, params = tokenizer.encode("the cat and the cat and"), SamplingParams(temperature=0, max_tokens=60)
    whole = Engine(model, tokenizer).run([Request(prompt, params)])[0][0].text
    for size in (1, 3, 7):
        stop = whole[20 : 20 + size]
        stopped = Request(prompt, SamplingParams(temperature=0, max_tokens=60, stop=(stop,)))
        engine = engine_with(draft, model, tokenizer=tokenizer)
        pieces = "".join(chunk.text for chunk in engine.stream(stopped))
        assert pieces == stopped.results[0].text == whole[: whole.find(stop)]
        assert (stopped.results[0].finish_reason, engine.n_used) == ("stop", 0)


def test_what_followed_before_is_proposed():
    text = Text(Request([1, 2, 3, 4, 5, 9, 2, 3]), 0, (), None, 20)
    text.lease = Lease(0, 0, [], [])
    drafter = NGramDrafter()
    assert drafter.propose([text], [3]) == [Draft([4, 5, 9])]
    text.ids = [*text.ids, 7]
    assert drafter.propose([text], [3]) == [Draft([])]
    text.ids = [*text.ids, 2, 3]
    assert drafter.propose([text], [2]) == [Draft([7, 2])]  # the newest place


@pytest.mark.parametrize(
    ("filters", "n_layers"),
    [({}, None), ({"temperature": 0}, 1), ({"temperature": 0.7}, 1), ({"top_p": 0.7}, None),
     ({"min_p": 0.2, "top_k": 9}, None)],
    ids=str,
)  # fmt: skip
def test_guesses_of_one_call_are_drawn_from_the_laws_it_tells(filters, n_layers):
    """Of two texts with more and fewer guesses; each law is what plain steps and the sampler give, each token its."""
    model, params = random_model("llama-nano", std=0.3, vocab_size=37, context_length=32), SamplingParams(**filters)
    rows, most = [Row(1, [3, 1, 4], 0), Row(0, [5], 0)], [5, 2]
    n, n_other = 4_000 if IS_LONG else 200, 0
    uniform = torch.rand(n, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counts = torch.zeros(2, 37, dtype=torch.float64)
    step, plain = (ModelStep(model, KVCache(model.config, 2, 32)) for _ in range(2))
    for numbers in uniform:
        tokens, laws = step.guess(rows, most, [params, params], numbers, n_layers)
        assert list(map(len, tokens)) == most
        for text, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
            read = Row(row.slot, [*row.ids, *ids[:-1]], 0, len(ids))
            exact = speculative.warp(plain([read], n_layers), params).exp()
            if laws is None:
                assert ids == exact.argmax(dim=-1).tolist()
                continue
            torch.testing.assert_close(laws[text, : len(ids)], exact, atol=1e-4, rtol=1e-3)
            counts[text, ids[0]] += 1
    assert n_other <= n // 100  # the border of a filter is found nearly
    if filters.get("temperature") != 0:
        for text in range(2):
            assert abs(chi_square(counts[text], n * laws[text, 0].double())) < 4
    again = ModelStep(model, step._cache)  # what the guesses have stored is what reading them stores
    for row, ids in zip(rows, tokens, strict=True):
        length = len(row.ids) + len(ids) - 1
        found = again([Row(row.slot, [ids[-1]], length)], n_layers)
        wanted = plain([Row(row.slot, [*row.ids, *ids], 0)], n_layers)
        torch.testing.assert_close(found, wanted)


COSTS = {  # in plain steps: of a guess, and of its check
    "free": (0.0, 0.05), "a twentieth": (0.05, 0.1), "a batch": (0.1, 0.5), "as dear as the model": (1.0, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_guesses_are_made_where_they_pay_and_lose_less_than_a_twentieth_elsewhere(monkeypatch, share, cost):
    """256 tokens, on a clock that other programs disturb in one step of ten; a share of the guesses is right."""
    monkeypatch.undo()
    guess, check = COSTS[cost]
    now, generator = [0.0], random.Random(1)

    class Costly(Drafter):
        def propose(self, texts, most):
            now[0] += guess * most[0]
            return [Draft([0] * most[0])]

    speculation, disturbed, n_written = Speculation(Costly(), lambda: now[0]), 0.0, 0
    text = Text(Request([1]), 0, (), None, 20)
    while n_written < 256:
        n = len(speculation.propose([text], [255 - n_written])[0].ids)
        n_kept = next((place for place in range(n) if generator.random() >= share), n)
        late = 4.0 if generator.random() < 0.1 else 0.0
        now[0] += 1 + check * n + late
        disturbed += late
        if n:
            speculation.learn(text, n, n_kept)
        speculation.end()
        n_written += 1 + n_kept
    steps_a_token = (now[0] - disturbed) / n_written
    assert steps_a_token < 1.05
    best = max(sum(share**i for i in range(n + 1)) / (1 + n * (guess + check)) for n in range(9))
    assert best < 1.2 or steps_a_token < 1.25 / best


@pytest.mark.parametrize(("draft", "message"), [(0, "is no draft"), (99, "is no draft"), ("other", "is no draft")])
def test_what_is_no_draft_is_refused(draft, message):
    with pytest.raises(DataError, match=message):
        Engine(random_model(), draft=draft)
    with pytest.raises(DataError, match="the same tokenizer"):
        Engine(random_model(), draft=random_model(vocab_size=99))
