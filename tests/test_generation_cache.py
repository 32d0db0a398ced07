"""The key/value cache against the law that it changes nothing."""

import pytest
import torch
from generation_models import NANO, random_model, random_prompts

from groundup.generation.cache import KVCache, Rows
from groundup.generation.graphs import fixed_rows, one_token

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


def cached_logits(model, cache, ids, slots, starts, chunk):
    """Logits of rows that are written chunk by chunk into slots, beginning at different steps."""
    pieces = [[] for _ in slots]
    n_done = [0] * len(slots)
    step = 0
    while any(done < len(row) for done, row in zip(n_done, ids, strict=True)):
        rows = [r for r, row in enumerate(ids) if step >= starts[r] and n_done[r] < len(row)]
        step += 1
        if not rows:
            continue
        parts = [ids[r][n_done[r] : n_done[r] + 1 + (chunk + r) % chunk] for r in rows]
        counts = [len(part) for part in parts]
        view = Rows(cache, [slots[r] for r in rows], [n_done[r] for r in rows], counts)
        padded = torch.tensor([part + [0] * (max(counts) - len(part)) for part in parts])
        logits = model(padded, positions=view.positions, cache=view)
        for place, r in enumerate(rows):
            pieces[r].append(logits[place, : counts[place]])
            n_done[r] += counts[place]
    return [torch.cat(part) for part in pieces]


KINDS = {"slots": {}, "pages": {"block_size": 4}, "rings": {"chunk": 5}, "scattered pages": {"block_size": 3}}


WINDOWS = {"attention": ("window", "full"), "window": 6}
SHAPES = [("gpt2-nano", {}), ("llama-nano", WINDOWS), ("ground-nano", {**WINDOWS, "sink_tokens": 2})]


@pytest.mark.parametrize(("name", "overrides"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_slots_pages_and_rings_change_nothing(name, overrides, kind):
    model = random_model(name, **overrides)
    ids = random_prompts([24, 17, 9], model.config.vocab_size)
    cache = KVCache(model.config, batch=4, length=24, **KINDS[kind])
    if kind == "scattered pages":
        cache.table[:] = torch.randperm(cache.n_blocks, generator=torch.Generator().manual_seed(1)).view(4, -1)
    for layer in cache.layers:  # what an earlier text left
        layer.keys.fill_(1e4), layer.values.fill_(1e4)
    found = cached_logits(model, cache, ids, slots=[2, 0, 3], starts=[0, 3, 4], chunk=5)
    for row, logits in zip(ids, found, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row]))[0], **EXACT)


def test_a_ring_takes_the_memory_of_its_window():
    model = random_model(**WINDOWS)
    whole, rings = (KVCache(model.config, 2, 1000, chunk=chunk) for chunk in (None, 8))
    assert rings.n_bytes < 0.6 * whole.n_bytes  # half the layers have a window


@torch.inference_mode()
def test_eight_bits_change_little_and_take_half():
    model = random_model()
    ids = random_prompts([24], model.config.vocab_size)
    cache = KVCache(model.config, 1, 24, dtype=torch.bfloat16, is_int8=True)
    bfloat16 = KVCache(model.config, 1, 24, dtype=torch.bfloat16)
    assert cache.n_bytes < 0.65 * bfloat16.n_bytes  # a head of 16 features and its scale
    found = cached_logits(model, cache, ids, [0], [0], 3)[0].log_softmax(-1)
    exact = model(torch.tensor(ids))[0].log_softmax(-1)
    assert (exact.exp() * (exact - found)).sum(-1).max() < 1e-3


@torch.inference_mode()
def test_a_copied_beginning_goes_on_as_its_source():
    model = random_model()
    ids = random_prompts([9], model.config.vocab_size)[0]
    cache = KVCache(model.config, 3, 12)
    cached_logits(model, cache, [ids[:8]], [0], [0], 4)
    cache.copy(0, 2, 6)
    view = Rows(cache, [2], [6], [3])
    logits = model(torch.tensor([ids[6:]]), positions=view.positions, cache=view)
    torch.testing.assert_close(logits[0], model(torch.tensor([ids]))[0, 6:], **EXACT)


@pytest.mark.parametrize(("name", "overrides"), SHAPES)
@pytest.mark.parametrize("kind", ["slots", "pages", "rings"])
@torch.inference_mode()
def test_calls_of_fixed_shape_give_the_same_logits(name, overrides, kind):
    """What CUDA graphs capture, without a GPU: rows that are repeated, and entries that are visible beyond a text."""
    model = random_model(name, **overrides)
    ids = random_prompts([20, 12], model.config.vocab_size)
    cache = KVCache(model.config, batch=3, length=24, **KINDS[kind])
    cached_logits(model, cache, [row[:8] for row in ids], [2, 0], [0, 0], 4)
    rows = fixed_rows(cache, batch=4, length=24)
    rows.blocks.copy_(cache.table[[2, 0, 0, 0], : rows.blocks.shape[1]])
    for place in range(8, 12):
        rows.positions.fill_(place)
        logits = one_token(model, torch.tensor([[ids[0][place]], *[[ids[1][place]]] * 3]), rows)
        for row in range(2):
            torch.testing.assert_close(logits[row], model(torch.tensor([ids[row][: place + 1]]))[0, -1], **EXACT)
