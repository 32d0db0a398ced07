"""The engine against a plain loop that runs the whole text through the model for every token."""

import asyncio
import random
from dataclasses import replace

import pytest
import torch
from generation_models import NANO, chi_square, random_model, random_prompts
from lengths import IS_LONG

from groundup.errors import DataError, GroundupError
from groundup.generation import Engine, EngineBusy, Request, SamplingParams, generate_batch
from groundup.generation.quantize import Quantization, quantize
from groundup.generation.sampling import request_seed, uniforms
from groundup.reference import sampling as reference

GREEDY = SamplingParams(temperature=0, max_tokens=10)


@torch.inference_mode()
def plain_loop(model, prompt, params, *, seed=None, slides=False):
    """The textbook: no cache, no batch; ends at the context's end, or goes on from its last half."""
    ids, context = list(prompt), model.config.context_length
    new = []
    while len(new) < params.max_tokens and len(ids) <= context:
        logits = model(torch.tensor([ids]))[0, -1].tolist()
        if params.temperature == 0:
            token = max(range(len(logits)), key=logits.__getitem__)
        else:
            probabilities = reference.softmax(logits, params.temperature)
            token = reference.draw(probabilities, uniforms([request_seed(seed or 0)], [len(new)]).item())
        new.append(token)
        ids.append(token)
        if slides and len(ids) > context:
            ids = ids[-(context // 2) - 1 :]
    return new


@pytest.mark.parametrize("name", NANO)
def test_a_batch_of_uneven_prompts_writes_what_the_plain_loop_writes(name):
    model = random_model(name)
    prompts = random_prompts([1, 7, 20, 3], model.config.vocab_size)
    results = generate_batch(model, None, prompts, GREEDY)
    assert [result.ids for result in results] == [plain_loop(model, prompt, GREEDY) for prompt in prompts]
    assert {result.finish_reason for result in results} == {"length"}


def test_a_row_draws_the_same_in_any_batch():
    model, params = random_model(), SamplingParams(temperature=1.3, max_tokens=12)
    prompts, seeds = random_prompts([4, 9, 4, 15], model.config.vocab_size), [5, 6, 7, 8]
    together = generate_batch(model, None, prompts, params, seeds=seeds)
    backwards = generate_batch(model, None, prompts[::-1], params, seeds=seeds[::-1])[::-1]
    alone = [generate_batch(model, None, [p], params, seeds=[seed])[0] for p, seed in zip(prompts, seeds, strict=True)]
    plain = [plain_loop(model, p, params, seed=seed) for p, seed in zip(prompts, seeds, strict=True)]
    assert [r.ids for r in together] == [r.ids for r in backwards] == [r.ids for r in alone] == plain


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    model, prompt = random_model(std=0.05), [[1, 2, 3]]

    def written(seed):
        return generate_batch(model, None, prompt, SamplingParams(max_tokens=20, seed=seed))[0].ids

    assert written(3) == written(3)
    assert len({tuple(written(seed)) for seed in (3, 4, None, None)}) == 4


def test_first_tokens_of_many_seeds_have_the_models_distribution():
    model, prompt, n = random_model(vocab_size=40), [3, 1, 2], 4000
    requests = [Request(prompt, SamplingParams(max_tokens=1), seed=seed) for seed in range(n)]
    results = Engine(model, slots=64, length=8).run(requests)
    counts = torch.tensor([result[0].ids[0] for result in results]).bincount(minlength=40)
    exact = model(torch.tensor([prompt]))[0, -1].double().softmax(dim=-1)
    assert chi_square(counts, n * exact) < 4


@pytest.mark.parametrize("slides", [False, True])
@pytest.mark.parametrize("name", NANO)
def test_at_the_contexts_end_a_row_stops_or_slides(name, slides):
    model = random_model(name, context_length=16)
    prompts, params = random_prompts([3, 15, 9], model.config.vocab_size), SamplingParams(temperature=0, max_tokens=40)
    results = generate_batch(model, None, prompts, params, slides=slides)
    assert [result.ids for result in results] == [plain_loop(model, p, params, slides=slides) for p in prompts]
    # The last token is written from a full context, so it stands one place beyond it.
    assert [result.n_tokens for result in results] == ([40, 40, 40] if slides else [14, 2, 8])
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize(("length", "max_tokens", "read"), [(15, 9, 15), (16, 3, 13), (40, 3, 13), (40, 99, 8)])
def test_of_a_prompt_as_long_as_the_context_the_end_is_read(length, max_tokens, read):
    model, params = random_model(context_length=16), SamplingParams(temperature=0, max_tokens=max_tokens)
    prompt = random_prompts([length], model.config.vocab_size)[0]
    assert generate_batch(model, None, [prompt], params)[0].ids == plain_loop(model, prompt[-read:], params)


def test_a_stop_token_ends_its_row_only_and_is_not_written():
    model = random_model()
    prompts = random_prompts([5, 5, 5], model.config.vocab_size)
    free = [result.ids for result in generate_batch(model, None, prompts, GREEDY)]
    stop = free[1][4]
    params = replace(GREEDY, stop_ids=(stop,))
    for ids, result in zip(free, generate_batch(model, None, prompts, params), strict=True):
        assert result.ids == (ids[: ids.index(stop)] if stop in ids else ids)
        assert result.finish_reason == ("stop" if stop in ids else "length")


def test_no_prompts_no_results():
    assert generate_batch(random_model(), None, [], GREEDY) == []


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([3, 512], "id 512"), ([-1], "id -1")])
def test_a_prompt_the_model_cannot_read_is_refused(prompt, message):
    with pytest.raises(DataError, match=message):
        generate_batch(random_model(), None, [[1], prompt], GREEDY)


def test_a_diverged_model_is_an_error_in_words():
    model = random_model()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(GroundupError, match="damaged, or diverged"):
        generate_batch(model, None, [[1, 2]], GREEDY)


def test_a_model_left_in_training_mode_does_not_drop_out():
    noisy = random_model(dropout=0.9).train()
    assert generate_batch(noisy, None, [[1, 2, 3]], GREEDY)[0].ids == plain_loop(random_model(), [1, 2, 3], GREEDY)


def test_bfloat16_is_carried_through_the_cache():
    model = random_model()
    model.compute_dtype = torch.bfloat16
    prompts = random_prompts([6, 3], model.config.vocab_size)
    results = generate_batch(model, None, prompts, GREEDY, slides=True)
    assert [result.n_tokens for result in results] == [10, 10]
    assert results[0].ids[0] == model(torch.tensor(prompts[:1]))[0, -1].argmax().item()


LAYOUTS = {
    "few slots": {"slots": 2},
    "pages": {"slots": 3, "pages": True},
    "few pages": {"slots": 4, "pages": True, "cache_tokens": 96},
    "small chunks": {"slots": 4, "chunk": 3},
    "eager": {"slots": 4, "is_native": False},
}
WINDOWS = {"attention": ("window", "full"), "window": 6, "sink_tokens": 1}


@pytest.mark.parametrize("overrides", [{}, WINDOWS, {"position": "alibi"}], ids=["full", "windows", "alibi"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_a_token(layout, overrides):
    model = random_model("llama-nano", context_length=48, **overrides)
    shared = random_prompts([34], model.config.vocab_size)[0]
    prompts = [shared, [*shared[:33], 5], *random_prompts([1, 7, 20], model.config.vocab_size), shared]
    engine = Engine(model, **LAYOUTS[layout])
    results = engine.run([Request(prompt, GREEDY) for prompt in prompts])
    assert [result[0].ids for result in results] == [plain_loop(model, prompt, GREEDY) for prompt in prompts]
    assert (engine.n_used, engine.n_running, engine.n_waiting) == (0, 0, 0)


@pytest.mark.parametrize("pages", [False, True])
def test_a_prompt_that_begins_as_an_earlier_one_is_read_from_there_on(pages):
    model = random_model()
    text, other = random_prompts([40, 40], model.config.vocab_size)
    engine = Engine(model, slots=2, pages=pages)

    def read(prompt, **keywords):
        before = engine.stats.prompt_tokens
        result = engine.run([Request(prompt, GREEDY, **keywords)])[0][0]
        assert result.ids == plain_loop(model, prompt, GREEDY)
        return engine.stats.prompt_tokens - before

    assert [read(text), read(text), read(text[:35] + other[:5])] == [40, 40 - 32, 40 - 32]
    assert read(text, client="somebody else") == 40  # how long it takes would tell what others have asked
    assert read(other) == 40
    answer = plain_loop(model, other, GREEDY)
    assert read([*other, *answer, 7]) == 51 - 48  # the next turn of a conversation
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1.1)
    engine.refresh()
    assert read(text) == 40


def test_several_texts_of_one_prompt_share_it_and_differ():
    model, params = random_model(std=0.05), SamplingParams(max_tokens=6, n=3, seed=4, logprobs=2)
    prompt = random_prompts([40], model.config.vocab_size)[0]
    engine = Engine(model)
    results = engine.run([Request(prompt, params)])[0]
    assert len({tuple(result.ids) for result in results}) == 3
    assert results[0].ids == generate_batch(model, None, [prompt], SamplingParams(max_tokens=6, seed=4))[0].ids
    assert engine.stats.prompt_tokens == 40 + 2 * 8
    best = Engine(model).run([Request(prompt, SamplingParams(max_tokens=6, n=1, best_of=3, seed=4, logprobs=0))])[0]
    means = {tuple(result.ids): sum(one.logprob for one in result.logprobs) for result in results}
    assert [tuple(result.ids) for result in best] == [max(means, key=means.get)]


def test_of_the_best_a_text_that_ends_at_once_has_no_advantage():
    model = random_model(std=0.05, vocab_size=40)
    params = {"max_tokens": 4, "seed": 1, "logprobs": 0, "stop_ids": (*range(20),)}
    request = Request([1, 2, 3], SamplingParams(n=60, **params))
    written = Engine(model).run([request])[0]
    assert {len(one.ids) for one in written} >= {0, 1, 2}
    sums = [[one.logprob for one in text.logprobs] + [text.end_logprob] * (text.end_id is not None) for text in written]
    means = sorted((sum(parts) / len(parts) for parts in sums), reverse=True)
    best = Engine(model).run([Request([1, 2, 3], SamplingParams(n=2, best_of=60, **params))])[0]
    assert [one.score for one in best] == pytest.approx(means[:2])


@torch.inference_mode()
def test_log_probabilities_are_the_models():
    model, prompt = random_model(std=0.05), random_prompts([9], 512)[0]
    params = SamplingParams(temperature=0.5, top_k=5, max_tokens=5, logprobs=3, seed=1)
    result = Engine(model, chunk=4).run([Request(prompt, params, prompt_logprobs=1)])[0][0]
    exact = model(torch.tensor([[*prompt, *result.ids]]))[0].log_softmax(-1)
    found = [*result.prompt_logprobs, *result.logprobs]
    assert [one.token for one in found] == [*prompt[1:], *result.ids]
    for place, one in enumerate(found):
        assert one.logprob == pytest.approx(exact[place, one.token].item(), abs=1e-4)
        values, ids = exact[place].topk(len(one.top))
        assert [token for token, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert {len(one.top) for one in result.logprobs} == {3}
    scored = Engine(model).run([Request(prompt, SamplingParams(max_tokens=0), prompt_logprobs=0)])[0][0]
    assert (scored.ids, scored.finish_reason) == ([], "length")
    assert [one.logprob for one in scored.prompt_logprobs] == pytest.approx(
        [one.logprob for one in result.prompt_logprobs], abs=1e-4
    )


def test_requests_join_leave_and_are_cancelled_and_nothing_stays_in_use():
    model, choice = random_model(std=0.05, context_length=64), random.Random(3)
    for pages in (False, True):
        engine = Engine(model, slots=5, pages=pages, chunk=16)
        alive, finished = [], []
        for _ in range((IS_LONG and 1000) or 150):
            if choice.random() < 0.5:
                params = SamplingParams(
                    max_tokens=choice.randint(1, 12), seed=choice.randint(0, 99), n=choice.randint(1, 2)
                )
                request = Request(random_prompts([choice.randint(1, 40)], 512, choice.randint(0, 5))[0], params)
                engine.submit(request)
                alive.append(request)
            if alive and choice.random() < 0.15:
                engine.cancel(alive.pop(choice.randrange(len(alive))))
            engine.step()
            finished += [request for request in alive if request.is_finished]
            alive = [request for request in alive if not request.is_finished]
        while engine.step():
            pass
        finished += alive
        assert (engine.n_used, engine.n_running, engine.n_waiting) == (0, 0, 0)
        assert all(request.is_finished for request in finished)
        for request in finished[:: (IS_LONG and 1) or 9]:
            alone = Engine(model).run([Request(request.ids, request.params)])[0]
            assert [text.ids for text in request.results] == [text.ids for text in alone]


def test_a_cancelled_request_frees_its_slot_at_once_and_keeps_what_it_wrote():
    model = random_model()
    engine = Engine(model, slots=1)
    request = Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=50))
    chunks = engine.stream(request)
    written = [token for _ in range(4) for token in next(chunks).ids]
    assert engine.n_used == 1
    engine.cancel(request)
    assert engine.n_used == 0
    assert (request.results[0].ids, request.results[0].finish_reason) == (written, "cancelled")
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]


def test_a_client_with_many_requests_does_not_keep_another_waiting():
    engine = Engine(random_model(), slots=2)
    many = [Request([1, n], SamplingParams(max_tokens=4), client="many") for n in range(6)]
    few = Request([9], SamplingParams(max_tokens=4), client="few")
    for request in [*many, few]:
        engine.submit(request)
    while not few.is_finished:
        engine.step()
    assert sum(request.is_finished for request in many) <= 1


def test_too_many_requests_are_refused():
    engine = Engine(random_model(), slots=1, most_waiting=2)
    for _ in range(2):
        engine.submit(Request([1]))
    with pytest.raises(EngineBusy, match="2 requests are waiting"):
        engine.submit(Request([1]))


def test_in_an_event_loop_many_are_served_and_one_that_goes_is_forgotten():
    model, params = random_model(), SamplingParams(temperature=0, max_tokens=12)
    prompts = random_prompts([3, 9, 5, 7], model.config.vocab_size)

    async def read(engine, prompt, most=99):
        ids = []
        async for chunk in engine.astream(Request(prompt, params)):
            ids += chunk.ids
            if len(ids) >= most:
                break
        return ids

    async def everybody():
        with Engine(model, slots=2) as engine:
            found = await asyncio.gather(*(read(engine, prompt) for prompt in prompts), read(engine, prompts[0], 3))
            whole = (await engine.agenerate(Request(prompts[1], params)))[0].ids
            from_another_thread = await asyncio.to_thread(engine.run, [Request(prompts[2], params)])
            return found, whole, from_another_thread[0][0].ids

    found, whole, other = asyncio.run(everybody())
    expected = [plain_loop(model, prompt, params) for prompt in prompts]
    assert found == [*expected, expected[0][:3]]
    assert (whole, other) == (expected[1], expected[2])


def test_a_thread_that_is_stopped_drains_or_cancels():
    params = SamplingParams(temperature=0, max_tokens=20)
    for drain, reason in ((True, "length"), (False, "cancelled")):
        engine = Engine(random_model(), slots=1).start()
        requests = [Request([1, n], params) for n in range(3)]
        for request in requests:
            engine.submit(request)
        engine.stop(drain=drain)
        assert {request.results[0].finish_reason for request in requests} <= {"length", reason}
        assert requests[-1].results[0].finish_reason == reason


def test_a_row_that_draws_too_long_a_prompt_or_stop_texts_without_a_tokenizer_is_refused():
    engine = Engine(random_model(), length=8)
    with pytest.raises(DataError, match="a prompt has 9 tokens: there is room for 8"):
        engine.submit(Request(range(9)))
    with pytest.raises(DataError, match="need a tokenizer"):
        engine.submit(Request([1], SamplingParams(stop=("x",))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_writes_the_same_in_c_and_by_its_forward_pass(bits, dtype):
    model = quantize(random_model("llama-nano", std=0.1), Quantization(bits))
    prompts = random_prompts([3, 9], model.config.vocab_size)
    logprobs = []
    for is_native in (True, False):
        engine = Engine(model, dtype=dtype, is_native=is_native)
        requests = [Request(prompt, SamplingParams(max_tokens=0), prompt_logprobs=0) for prompt in prompts]
        logprobs.append([one.logprob for texts in engine.run(requests) for one in texts[0].prompt_logprobs])
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4 if dtype == torch.float32 else 0.2)
    ids = torch.tensor([prompts[1]])
    exact = model(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
    assert logprobs[0][-len(exact) :] == pytest.approx(exact, abs=1e-4 if dtype == torch.float32 else 0.2)
