"""What goes wrong while an engine runs touches the request it belongs to, and no other."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
import torch
from generation_models import random_model, random_prompts, small_tokenizer
from lengths import IS_LONG

from groundup.errors import DataError, GroundupError
from groundup.generation import Constraint, Engine, Request, SamplingParams, step
from groundup.generation.native import library
from groundup.generation.step import Row

LAYOUTS = [{}, {"pages": True}]


def greedy(max_tokens=8, **options):
    return SamplingParams(temperature=0, max_tokens=max_tokens, **options)


def alone(model, prompt, params, **options):
    return Engine(model, **options).run([Request(prompt, params)])[0][0].ids


def unused(engine):
    return (engine.n_used, engine.n_running, engine.n_waiting) == (0, 0, 0)


@pytest.mark.parametrize("is_started", [False, True])
def test_a_listener_that_fails_ends_its_own_request_only(is_started):
    model = random_model()
    engine = Engine(model, slots=2)
    bad, good = Request([1, 2], greedy(20)), Request([3, 4], greedy(20))

    def fail(chunk):
        raise ValueError("the listener is broken")

    engine.submit(bad, fail)
    if is_started:
        engine.start()
    assert engine.run([good])[0][0].ids == alone(model, [3, 4], greedy(20))
    with pytest.raises(ValueError, match="the listener is broken"):
        engine._wait(bad)
    assert bad.results[0].finish_reason == "cancelled"
    engine.stop()
    assert unused(engine)


@pytest.mark.parametrize("is_started", [False, True])
@pytest.mark.parametrize("method", ["run", "stop", "step", "refresh", "stream"])
def test_a_listener_that_would_wait_for_itself_is_told_so(method, is_started):
    engine = Engine(random_model(), slots=2)
    calls = {
        "run": lambda: engine.run([Request([3], greedy(2))]),
        "stream": lambda: list(engine.stream(Request([3], greedy(2)))),
    }
    request = Request([1, 2], greedy(20))
    engine.submit(request, lambda chunk: calls.get(method, getattr(engine, method))())
    if is_started:
        engine.start()
    with pytest.raises(GroundupError, match=rf"{method}\(\) was called by a listener"):
        engine._wait(request)
    engine.stop()
    assert unused(engine)


@pytest.mark.parametrize("is_started", [False, True])
def test_a_request_that_can_draw_no_token_ends_alone(is_started):
    tokenizer = small_tokenizer()
    model = random_model(vocab_size=tokenizer.vocab_size)
    engine = Engine(model, tokenizer, slots=3)
    params = greedy(min_tokens=8, constraint=Constraint.choices(["yes"]))  # it would have to end, and may not
    impossible, good = Request([1, 2], params), Request([3, 4], greedy(20))
    for request in (impossible, good):
        engine.submit(request)
    if is_started:
        engine.start()
    engine._wait(good)
    with pytest.raises(GroundupError, match="no token may be drawn"):
        engine._wait(impossible)
    engine.stop()
    assert good.results[0].ids == alone(model, [3, 4], greedy(20))
    assert unused(engine)


def test_a_fault_in_the_engines_thread_is_told_to_those_who_wait(monkeypatch):
    engine = Engine(random_model(), slots=1)
    step = engine._model_step
    monkeypatch.setattr(engine, "_model_step", lambda rows: 1 / 0)
    with engine:
        with pytest.raises(ZeroDivisionError):
            engine.run([Request([1, 2], greedy())])
        monkeypatch.setattr(engine, "_model_step", step)
        assert len(engine.run([Request([1, 2], greedy())])[0][0].ids) == 8
    assert unused(engine)


def test_weights_that_become_no_numbers_end_all_and_the_engine_goes_on():
    model = random_model()
    engine = Engine(model, slots=2)
    stream = engine.stream(Request([1, 2], greedy(20)))
    next(stream)
    kept = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(GroundupError, match="damaged, or diverged"):
        list(stream)
    with torch.no_grad():
        model.norm.weight.copy_(kept)
    assert engine.run([Request([1, 2], greedy())])[0][0].ids == alone(model, [1, 2], greedy())
    assert unused(engine)


@pytest.mark.parametrize("place", ["_logits", "_take", "_record", "_draw"])
def test_an_interrupted_step_leaves_an_engine_that_goes_on(place, monkeypatch):
    model = random_model()
    engine = Engine(model, slots=1)
    whole, n_left = getattr(engine, place), 3

    def interrupted(*arguments):
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(engine, place, interrupted)
    requests = [Request([1, 2 + number], greedy()) for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        [list(engine.stream(request)) for request in requests]
    assert unused(engine)
    assert engine.run([Request([1, 2], greedy())])[0][0].ids == alone(model, [1, 2], greedy())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["slots", "pages"])
def test_cancelled_from_many_threads_and_from_listeners_nothing_stays_in_use(layout):
    model = random_model(std=0.05, context_length=64)
    shared = random_prompts([20], model.config.vocab_size)[0]
    expected = alone(model, shared, greedy(6))
    wrong = []

    def client(engine, number):
        choice = torch.Generator().manual_seed(number)
        for turn in range((IS_LONG and 60) or 12):
            kind = int(torch.randint(4, (1,), generator=choice))
            request = Request(shared, greedy(6, n=1 + turn % 2), client=str(number % 2))
            if kind == 0:  # from the listener
                engine.submit(request, lambda chunk, request=request: engine.cancel(request))
            elif kind == 1:  # at once
                engine.submit(request)
                engine.cancel(request)
            elif kind == 2:  # a stream that is closed
                stream = engine.stream(request)
                next(stream)
                stream.close()
            elif engine.run([request])[0][0].ids != expected:
                wrong.append(number)

    for is_started in (False, True):
        engine = Engine(model, slots=3, chunk=16, **layout)
        if is_started:
            engine.start()
        threads = [threading.Thread(target=client, args=(engine, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.stop(drain=True)
        while engine.step():
            pass
        assert not wrong
        assert unused(engine)


def test_what_is_cancelled_during_anothers_last_step_is_free_after_it():
    engine = Engine(random_model(), slots=2)
    other = Request([5, 6], greedy(50))
    engine.submit(other)

    def cancel_other(chunk):
        if chunk is None:
            canceller = threading.Thread(target=engine.cancel, args=(other,))
            canceller.start()
            canceller.join()

    request = Request([1, 2], greedy(3))
    engine.submit(request, cancel_other)
    while not request.is_finished:
        engine.step()
    assert unused(engine)
    assert other.results[0].finish_reason == "cancelled"


def test_an_event_loop_that_closes_leaves_nothing_behind():
    model = random_model()

    async def leave(engine):
        stream = engine.astream(Request([1, 2], greedy(200)))
        await anext(stream)
        asyncio.get_running_loop().stop()
        await asyncio.sleep(60)

    with Engine(model, slots=1) as engine:
        loop = asyncio.new_event_loop()
        task = loop.create_task(leave(engine))
        loop.run_forever()
        task._log_destroy_pending = False
        loop.close()
        assert engine.run([Request([3], greedy())])[0][0].ids == alone(model, [3], greedy())
    assert unused(engine)


def test_a_stream_ends_when_the_engine_is_stopped_and_none_begins_without_it():
    engine = Engine(random_model(context_length=8192), slots=1).start()
    stream = engine.stream(Request([1, 2], greedy(8000)))
    next(stream)
    engine.stop()
    assert [chunk.finish_reason for chunk in stream][-1] == "cancelled"

    async def read():
        return [chunk async for chunk in engine.astream(Request([1], greedy()))]

    with pytest.raises(GroundupError, match="start"):
        asyncio.run(asyncio.wait_for(read(), 5))
    assert unused(engine)


def test_two_threads_and_two_engines_disturb_nobody():
    model = random_model(std=0.1)
    prompts = random_prompts([3, 30, 9, 17], model.config.vocab_size)
    # A draft that draws its guesses promises the same text only at temperature 0.
    params = [SamplingParams(max_tokens=12, seed=3), SamplingParams(temperature=0, max_tokens=12)]
    expected = [[alone(model, prompt, one) for prompt in prompts] for one in params]
    engines, found = [Engine(model, slots=2), Engine(model, slots=2, draft=1)], {}

    def run(number):
        requests = [Request(prompt, params[number % 2]) for prompt in prompts]
        found[number] = [texts[0].ids for texts in engines[number % 2].run(requests)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[2] == expected[0]
    assert found[1] == found[3] == expected[1]


@pytest.mark.parametrize("draft", [None, "ngrams", 1])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["slots", "pages"])
def test_a_text_that_slides_leaves_others_prefixes_alone(layout, draft):
    model = random_model("llama-nano", context_length=32, vocab_size=40)
    shared = random_prompts([20], 40)[0]
    engine = Engine(model, slots=4, draft=draft, **layout)
    requests = [Request(shared, greedy(50), slides=True), *(Request(shared, greedy(11)) for _ in range(2))]
    long = alone(model, shared, greedy(11))
    slid = Engine(model).run([Request(shared, greedy(50), slides=True)])[0][0].ids
    for request in requests[:2]:
        engine.submit(request)
    while not requests[1].is_finished:
        engine.step()
    while engine.stats.new_tokens < 11 + 25:
        engine.step()
    engine.run([Request([n], greedy(3)) for n in range(3)])  # over all other slots
    assert engine.run(requests[2:])[0][0].ids == requests[1].results[0].ids == long
    engine._wait(requests[0])
    assert requests[0].results[0].ids == slid
    assert alone(model, shared, greedy(11)) == engine.run([Request(shared, greedy(11))])[0][0].ids
    assert unused(engine)


@pytest.mark.parametrize("draft", [None, 1])
def test_a_ring_that_was_overwritten_is_no_prefix(draft):
    model = random_model("llama-nano", attention=("window", "full"), window=6, context_length=128)
    prompt = random_prompts([18], model.config.vocab_size)[0]
    engine = Engine(model, slots=3, chunk=16, draft=draft)
    first = Request(prompt, greedy(90))
    engine.submit(first)
    for n_tokens in (1, 3, 7, 30):  # the ring has 22 places
        while len(first._texts) < 1 or len(first._texts[0].result.ids) < n_tokens:
            engine.step()
        assert engine.run([Request(prompt, greedy())])[0][0].ids == alone(model, prompt, greedy(), chunk=64)
    engine._wait(first)
    assert first.results[0].ids == alone(model, prompt, greedy(90), chunk=64)
    assert engine.run([Request(prompt, greedy())])[0][0].ids == alone(model, prompt, greedy(), chunk=64)


@pytest.mark.parametrize("layout", [*LAYOUTS, {"draft": "ngrams"}, {"draft": 1}], ids=str)
def test_weights_that_change_while_texts_are_written(layout):
    model = random_model(std=0.1)
    prompt = random_prompts([40], model.config.vocab_size)[0]
    engine = Engine(model, slots=2, **layout)
    request = Request(prompt, greedy(12))
    engine.submit(request)
    while len(request._texts[0].result.ids) < 5:
        engine.step()
    before = list(request._texts[0].result.ids)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1.3)
        model.blocks[0].self_attn.q_proj.weight.mul_(1.5)
    engine.refresh()
    engine._wait(request)
    ids = request.results[0].ids
    assert ids == [*before, *alone(model, [*prompt, *before], greedy(12 - len(before)))]
    assert engine.run([Request([*prompt, 7], greedy())])[0][0].ids == alone(model, [*prompt, 7], greedy())
    assert unused(engine)


def test_a_request_longer_than_all_pages_is_refused_instead_of_waiting_forever():
    engine = Engine(random_model(), slots=2, pages=True, cache_tokens=32)
    assert engine.length == 32
    with pytest.raises(DataError, match="there is room for 32"):
        engine.submit(Request(range(40)))
    assert len(engine.run([Request(range(20), greedy(50))])[0][0].ids) == 13


@pytest.mark.parametrize("options", [{"slots": 0}, {"chunk": 0}, {"length": -1}, {"cache_tokens": 64}], ids=str)
def test_an_engine_that_cannot_be_is_refused(options):
    with pytest.raises(DataError, match=next(iter(options))):
        Engine(random_model(), **options)


def test_a_request_is_used_once():
    engine, request = Engine(random_model()), Request([1, 2], greedy())
    engine.run([request])
    for requests in ([request], [Request([1]), request], [(again := Request([1])), again]):
        with pytest.raises(DataError, match="used once"):
            engine.run(requests)
    assert unused(engine)


@pytest.mark.parametrize("length", [15, 16])
@pytest.mark.parametrize("max_tokens", [0, 1, 2, 9])
@pytest.mark.parametrize("layout", [*LAYOUTS, {"draft": "ngrams"}, {"draft": 1}], ids=str)
def test_prompts_that_fill_the_context(length, max_tokens, layout):
    model = random_model(context_length=16)
    prompt = random_prompts([length], 512)[0]
    whole = alone(random_model(context_length=64), prompt, greedy(max_tokens))
    for slides in (False, True):
        result = Engine(model, **layout).run([Request(prompt, greedy(max_tokens), slides=slides)])[0][0]
        n = max_tokens if slides else min(max_tokens, 17 - length)
        assert (result.n_tokens, result.finish_reason) == (n, "length")
        assert result.ids[: 17 - length] == whole[: min(n, 17 - length)]


def test_more_texts_than_slots_and_a_first_token_that_ends_all():
    model = random_model(std=0.05)
    prompt = random_prompts([40], 512)[0]
    params = SamplingParams(max_tokens=5, n=5, seed=1)
    engine = Engine(model, slots=2)
    many = [text.ids for text in engine.run([Request(prompt, params)])[0]]
    assert many == [text.ids for text in Engine(model, slots=8, pages=True).run([Request(prompt, params)])[0]]
    stop = alone(model, prompt, greedy(1))[0]
    results = engine.run([Request(prompt, greedy(5, n=3, best_of=4, stop_ids=(stop,)))])[0]
    assert [(text.ids, text.finish_reason) for text in results] == [([], "stop")] * 3
    assert unused(engine)


def test_eight_bits_in_the_cache_are_the_same_alone_in_a_batch_and_behind_a_prefix():
    model = random_model(std=0.1)
    prompts = [*random_prompts([5, 33, 20], 512), random_prompts([33], 512, 4)[0]]
    for layout in LAYOUTS:
        engine = Engine(model, slots=3, is_int8_cache=True, **layout)
        together = [texts[0].ids for texts in engine.run([Request(prompt, greedy()) for prompt in prompts])]
        assert together == [alone(model, prompt, greedy(), is_int8_cache=True, **layout) for prompt in prompts]
        assert engine.run([Request(prompts[1], greedy())])[0][0].ids == together[1]


def test_a_constraint_that_is_complete_at_the_last_token_and_one_that_is_not():
    tokenizer = small_tokenizer()
    model = random_model(vocab_size=tokenizer.vocab_size)
    engine = Engine(model, tokenizer)
    constraint = Constraint.choices(["yes"])
    free = engine.run([Request([1], greedy(20, constraint=constraint))])[0][0]
    assert (free.text, free.finish_reason) == ("yes", "stop")
    exact = engine.run([Request([1], greedy(free.n_tokens, constraint=constraint))])[0][0]
    assert (exact.text, exact.finish_reason) == ("yes", "stop")
    short = engine.run([Request([1], greedy(1, constraint=Constraint.choices(["yes, of course"])))])[0][0]
    assert short.finish_reason == "length"


def test_guesses_report_the_log_probabilities_of_plain_decoding():
    model = random_model(std=0.05, vocab_size=12)
    params = SamplingParams(max_tokens=30, temperature=0.5, seed=1, logprobs=3)
    prompt = [1, 2, 3] * 4
    plain, drafted = (Engine(model, draft=draft).run([Request(prompt, params)])[0][0] for draft in (None, "ngrams"))
    assert plain.ids == drafted.ids
    assert [one.token for one in drafted.logprobs] == drafted.ids
    assert [one.logprob for one in plain.logprobs] == pytest.approx([one.logprob for one in drafted.logprobs], abs=1e-4)


def test_seeds_are_the_requests_own():
    """Unlike servers that seed torch's one generator: nothing draws from it, and what others do changes nothing."""
    model, params = random_model(std=0.05), SamplingParams(max_tokens=10, seed=5)
    state = torch.random.get_rng_state()
    first = alone(model, [1, 2, 3], params)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert alone(model, [1, 2, 3], params, draft=1, chunk=2) is not None
    assert alone(model, [1, 2, 3], params, chunk=2) == first


@torch.inference_mode()
def test_in_bfloat16_a_batch_differs_only_where_two_tokens_are_nearly_equal():
    model = random_model(std=0.1)
    model.compute_dtype = torch.bfloat16
    prompts = random_prompts([3, 40, 17, 9], 512)
    requests = [Request(prompt, greedy(20)) for prompt in prompts]
    for prompt, (text,) in zip(prompts, Engine(model, chunk=7).run(requests), strict=True):
        ids = alone(model, prompt, greedy(20))
        place = next((n for n in range(20) if ids[n] != text.ids[n]), None)
        if place is not None:
            first, second = model(torch.tensor([[*prompt, *ids[:place]]]))[0, -1].float().topk(2).values
            assert first - second < 0.1


def test_the_trial_is_made_once_and_remembered(monkeypatch, tmp_path):
    library()  # compiled already
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, trials = random_model(vocab_size=77), []

    def trials_of_a_process(spread):
        trials.clear()
        monkeypatch.setattr(step, "_MEASURED", {})
        monkeypatch.setattr(step, "fastest", lambda ways: (dict.fromkeys(ways, trials.append(1) or 0.5), spread))
        for _ in range(2):
            Engine(model)
        return len(trials)

    once = trials_of_a_process(spread=3.0)  # disturbed: of no use to the next
    assert once > 0
    assert [trials_of_a_process(spread=1.0) for _ in range(3)] == [once, 0, 0]


def test_a_step_of_more_tokens_than_were_timed_takes_as_much_longer_as_the_last_of_them():
    step = Engine(random_model())._model_step
    seconds = [step._estimate("eager", n) for n in (1000, 2000, 3000)]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])


def test_the_way_that_is_faster_is_taken_padding_included(monkeypatch):
    """The forward pass computes padding, the step in C does not."""
    step = Engine(random_model(), slots=2, length=64)._model_step
    taken = []
    monkeypatch.setattr(step, "_native", lambda *arguments: taken.append("native"))
    monkeypatch.setattr("groundup.generation.step._eager_step", lambda *arguments: taken.append("eager"))
    step._timings = {"native": [1.0, 2, 3, 5, 9, 16, 32], "eager": [8.5, 8.5, 8.5, 8.5, 8.5, 9, 11]}
    for counts in ([1], [8], [9], [16, 1], [16, 16], [32, 32]):
        step([Row(slot, [0] * n, 0) for slot, n in enumerate(counts)])
    assert taken == ["native", "native", "eager", "eager", "eager", "eager"]
    step._timings = {"native": [1.0, 2, 3, 5, 9, 16, 32], "eager": [2.0 * n for n in (1, 2, 3, 5, 9, 16, 32)]}
    step([Row(0, [0] * 32, 0), Row(1, [0], 0)])
    assert taken[-1] == "native"


def test_a_finished_row_is_computed_no_more(monkeypatch):
    model = random_model()
    engine = Engine(model, slots=2)
    sizes, step = [], engine._model_step

    def count(rows):
        sizes.append(sum(len(row.ids) for row in rows))
        return step(rows)

    monkeypatch.setattr(engine, "_model_step", count)
    engine.run([Request([1], greedy(3)), Request([2], greedy(9))])
    assert sum(sizes) == (1 + 2) + (1 + 8)  # a prompt's token, and all but the last that is drawn


@pytest.mark.long
@pytest.mark.parametrize("layout", [{}, {"pages": True, "draft": "ngrams"}], ids=str)
def test_a_thousand_requests_leave_no_memory_behind(layout):
    model = random_model(std=0.05)
    with Engine(model, slots=8, **layout) as engine:

        def some(n):
            for start in range(0, n, 50):
                requests = [
                    Request(random_prompts([40], 512, seed)[0], SamplingParams(max_tokens=8, seed=seed, top_p=0.9))
                    for seed in range(start, start + 50)
                ]
                engine.run(requests)

        some(300)
        before = resident_bytes()
        some(1000)
        assert resident_bytes() - before < 8 << 20


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
