"""Decoding against a plain loop that runs the whole text through the model for every token."""

import pytest
import torch
from generation_models import NANO, chi_square, random_model, random_prompts

from groundup.errors import DataError, GroundupError
from groundup.generation import SamplingParams, decode, generate_ids, uniforms
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
            token = reference.draw(probabilities, uniforms([seed], [len(new)]).item())
        new.append(token)
        ids.append(token)
        if slides and len(ids) > context:
            ids = ids[-(context // 2) - 1 :]
    return new


@pytest.mark.parametrize("name", NANO)
def test_a_batch_of_uneven_prompts_writes_what_the_plain_loop_writes(name):
    model = random_model(name)
    prompts = random_prompts([1, 7, 20, 3], model.config.vocab_size)
    results = generate_ids(model, prompts, GREEDY)
    assert [result.ids for result in results] == [plain_loop(model, prompt, GREEDY) for prompt in prompts]
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=9.0, max_tokens=40, seed=1)])
def test_an_id_that_stands_for_no_token_is_never_drawn(params):
    model = random_model()
    drawn = {3, 77, 300}
    never = set(range(model.config.vocab_size)) - drawn
    results = generate_ids(model, random_prompts([1, 7], model.config.vocab_size), params, never=never)
    assert all(set(result.ids) <= drawn and len(result.ids) == params.max_tokens for result in results)


def test_a_row_draws_the_same_in_any_batch():
    model, params = random_model(), SamplingParams(temperature=1.3, max_tokens=12)
    prompts, seeds = random_prompts([4, 9, 4, 15], model.config.vocab_size), [5, 6, 7, 8]
    together = generate_ids(model, prompts, params, seeds=seeds)
    backwards = generate_ids(model, prompts[::-1], params, seeds=seeds[::-1])[::-1]
    alone = [generate_ids(model, [p], params, seeds=[seed])[0] for p, seed in zip(prompts, seeds, strict=True)]
    plain = [plain_loop(model, p, params, seed=seed) for p, seed in zip(prompts, seeds, strict=True)]
    assert [r.ids for r in together] == [r.ids for r in backwards] == [r.ids for r in alone] == plain


def test_a_row_draws_the_same_after_others_have_left_the_batch():
    model, params = random_model(), SamplingParams(temperature=1.3, max_tokens=12)
    prompts, seeds = random_prompts([4, 9, 4, 15], model.config.vocab_size), [5, 6, 7, 8]
    heard = []

    def on_token(row, token):
        heard.append(row)
        return row < 3 and heard.count(row) == row + 2

    results = generate_ids(model, prompts, params, on_token=on_token, seeds=seeds)
    assert [result.n_tokens for result in results] == [2, 3, 4, 12]
    for result, prompt, seed in zip(results, prompts, seeds, strict=True):
        assert result.ids == plain_loop(model, prompt, params, seed=seed)[: result.n_tokens]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    model, prompt = random_model(std=0.05), [[1, 2, 3]]

    def written(seed):
        return generate_ids(model, prompt, SamplingParams(max_tokens=20, seed=seed))[0].ids

    assert written(3) == written(3)
    assert len({tuple(written(seed)) for seed in (3, 4, None, None)}) == 4


def test_first_tokens_of_many_seeds_have_the_models_distribution():
    model, prompt, n = random_model(vocab_size=40), [3, 1, 2], 4000
    results = generate_ids(model, [prompt] * n, SamplingParams(max_tokens=1), seeds=range(n))
    counts = torch.tensor([result.ids[0] for result in results]).bincount(minlength=40)
    exact = model(torch.tensor([prompt]))[0, -1].double().softmax(dim=-1)
    assert chi_square(counts, n * exact) < 4


@pytest.mark.parametrize("slides", [False, True])
@pytest.mark.parametrize("name", NANO)
def test_at_the_contexts_end_a_row_stops_or_slides(name, slides):
    model = random_model(name, context_length=16)
    prompts, params = random_prompts([3, 15, 9], model.config.vocab_size), SamplingParams(temperature=0, max_tokens=40)
    results = generate_ids(model, prompts, params, slides=slides)
    assert [result.ids for result in results] == [plain_loop(model, p, params, slides=slides) for p in prompts]
    # The last token is written from a full context, so it stands one place beyond it.
    assert [result.n_tokens for result in results] == ([40, 40, 40] if slides else [14, 2, 8])
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize(("length", "max_tokens", "read"), [(15, 9, 15), (16, 3, 13), (40, 3, 13), (40, 99, 8)])
def test_of_a_prompt_as_long_as_the_context_the_end_is_read(length, max_tokens, read):
    model, params = random_model(context_length=16), SamplingParams(temperature=0, max_tokens=max_tokens)
    prompt = random_prompts([length], model.config.vocab_size)[0]
    assert generate_ids(model, [prompt], params)[0].ids == plain_loop(model, prompt[-read:], params)


def test_a_stop_token_ends_its_row_only_and_is_not_written():
    model = random_model()
    prompts = random_prompts([5, 5, 5], model.config.vocab_size)
    free = [result.ids for result in generate_ids(model, prompts, GREEDY)]
    stop = free[1][4]
    for ids, result in zip(free, generate_ids(model, prompts, GREEDY, stop_ids={stop}), strict=True):
        assert result.ids == (ids[: ids.index(stop)] if stop in ids else ids)
        assert result.finish_reason == ("stop" if stop in ids else "length")


def test_whoever_listens_hears_every_token_and_can_stop_a_row():
    model = random_model()
    prompts = random_prompts([5, 2, 8], model.config.vocab_size)
    free = [result.ids for result in generate_ids(model, prompts, GREEDY)]
    heard = [[], [], []]

    def on_token(row, token):
        heard[row].append(token)
        return row == 1 and len(heard[1]) == 3

    results = generate_ids(model, prompts, GREEDY, on_token=on_token)
    assert [result.ids for result in results] == heard == [free[0], free[1][:3], free[2]]
    assert [result.finish_reason for result in results] == ["length", "stop", "length"]


def test_finished_rows_are_no_longer_computed():
    model, batches = random_model(), []
    model.register_forward_pre_hook(lambda module, args: batches.append(tuple(args[0].shape)))
    prompts = random_prompts([4, 6, 5], model.config.vocab_size)
    generate_ids(model, prompts, SamplingParams(temperature=0, max_tokens=5), on_token=lambda row, token: row == 2)
    assert batches == [(3, 6), (2, 1), (2, 1), (2, 1), (2, 1)]


def test_steps_come_one_at_a_time_and_stop_when_nobody_asks():
    model, calls = random_model(), []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    steps = decode(model, [[1, 2]], SamplingParams(temperature=0, max_tokens=50))
    assert [next(steps)[0].n_tokens for _ in range(3)] == [1, 2, 3]
    steps.close()
    assert len(calls) == 3


def test_no_prompts_no_results():
    assert generate_ids(random_model(), [], GREEDY) == []


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([3, 512], "id 512"), ([-1], "id -1")])
def test_a_prompt_the_model_cannot_read_is_refused(prompt, message):
    with pytest.raises(DataError, match=message):
        generate_ids(random_model(), [[1], prompt], GREEDY)


def test_a_diverged_model_is_an_error_in_words():
    model = random_model()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(GroundupError, match="damaged, or diverged"):
        generate_ids(model, [[1, 2]], GREEDY)


def test_a_model_left_in_training_mode_does_not_drop_out():
    noisy = random_model(dropout=0.9).train()
    assert generate_ids(noisy, [[1, 2, 3]], GREEDY)[0].ids == plain_loop(random_model(), [1, 2, 3], GREEDY)


def test_bfloat16_is_carried_through_the_cache():
    model = random_model()
    model.compute_dtype = torch.bfloat16
    prompts = random_prompts([6, 3], model.config.vocab_size)
    results = generate_ids(model, prompts, GREEDY, slides=True)
    assert [result.n_tokens for result in results] == [10, 10]
    assert results[0].ids[0] == model(torch.tensor(prompts[:1]))[0, -1].argmax().item()
