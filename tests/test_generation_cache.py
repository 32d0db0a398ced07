"""The key/value cache against the law that it changes nothing."""

import pytest
import torch
from generation_models import NANO, random_model, random_prompts

from groundup.generation import KVCache

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def positions(*starts: int, length: int) -> torch.Tensor:
    return torch.tensor(starts)[:, None] + torch.arange(length)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("chunk", [1, 3, 7, 24])
@torch.inference_mode()
def test_cached_logits_equal_uncached_ones_at_every_position(name, chunk):
    model = random_model(name)
    ids = torch.tensor(random_prompts([24, 24], model.config.vocab_size))
    whole = model(ids)
    cache = KVCache(model.config, batch=2, length=24)
    for start in range(0, 24, chunk):
        part = ids[:, start : start + chunk]
        logits = model(part, positions=positions(start, start, length=part.shape[1]), cache=cache)
        torch.testing.assert_close(logits, whole[:, start : start + chunk], **EXACT)


@pytest.mark.parametrize("name", NANO)
@torch.inference_mode()
def test_rows_of_different_lengths_do_not_disturb_each_other(name):
    model = random_model(name)
    prompts = random_prompts([5, 11, 2], model.config.vocab_size)
    following = torch.tensor(random_prompts([4, 4, 4], model.config.vocab_size, seed=1))
    cache = KVCache(model.config, batch=3, length=15)
    padded = torch.tensor([prompt + [0] * (11 - len(prompt)) for prompt in prompts])
    model(padded, cache=cache)
    for step in range(4):
        where = torch.tensor([[len(prompt) + step] for prompt in prompts])
        logits = model(following[:, step : step + 1], positions=where, cache=cache)
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt + following[row, : step + 1].tolist()]))
            torch.testing.assert_close(logits[row, -1], alone[0, -1], **EXACT)


@torch.inference_mode()
def test_kept_rows_go_on_as_if_the_others_had_never_been_there():
    model = random_model()
    ids = torch.tensor(random_prompts([9, 9, 9], model.config.vocab_size))
    cache = KVCache(model.config, batch=3, length=9)
    model(ids[:, :8], cache=cache)
    cache.keep(torch.tensor([2, 0]))
    logits = model(ids[[2, 0], 8:], positions=positions(8, 8, length=1), cache=cache)
    torch.testing.assert_close(logits[:, -1], model(ids[[2, 0]])[:, -1], **EXACT)


@torch.inference_mode()
def test_an_overwritten_row_forgets_what_stood_there():
    model = random_model()
    ids = torch.tensor(random_prompts([9, 9], model.config.vocab_size))
    other = torch.tensor(random_prompts([6], model.config.vocab_size, seed=5))
    cache, short = KVCache(model.config, batch=2, length=10), KVCache(model.config, batch=1, length=5)
    model(ids, cache=cache)
    model(other[:, :5], cache=short)
    cache.overwrite(torch.tensor([1]), short)
    next_ids = torch.tensor([[3], [int(other[0, 5])]])
    logits = model(next_ids, positions=torch.tensor([[9], [5]]), cache=cache)
    torch.testing.assert_close(logits[0, -1], model(torch.cat([ids[:1], next_ids[:1]], dim=1))[0, -1], **EXACT)
    torch.testing.assert_close(logits[1, -1], model(other)[0, -1], **EXACT)
