"""Attention: patterns against brute force, ALiBi against its paper and Bloom, every fast path against the textbook."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_parts import distance, normal, random_model, tiny, tokens
from pairwise import pairwise
from torch import Tensor

from groundup.model.attention import KEPT_UP_TO, PRODUCTS_UP_TO, attend_to_cache, causal_attention
from groundup.model.documents import plan_documents
from groundup.model.flex import plan_attention
from groundup.model.masks import AttentionRule, alibi_slopes, attention_bias
from groundup.reference import masks
from groundup.reference.attention import causal_attention as textbook
from groundup.reference.attention import sparse_attention

RULES = {
    "full": AttentionRule(),
    "window": AttentionRule(pattern="window", window=4),
    "window-of-one": AttentionRule(pattern="window", window=1),
    "window-with-sinks": AttentionRule(pattern="window", window=3, sink_tokens=2),
    "strided": AttentionRule(pattern="strided", stride=4),
    "fixed": AttentionRule(pattern="fixed", stride=5, summary=2),
    "alibi": AttentionRule(alibi_heads=6),
    "alibi-and-window": AttentionRule(pattern="window", window=6, alibi_heads=6),
}
SEQ, HEADS, KV_HEADS, WIDTH = 17, 6, 2, 16


def seen_by(rule: AttentionRule, i: int) -> set[int]:
    """The textbook's answer for a rule."""
    if rule.pattern == "window":
        return masks.window(i, rule.window, rule.sink_tokens)
    if rule.pattern == "strided":
        return masks.strided(i, rule.stride)
    return masks.fixed(i, rule.stride, rule.summary) if rule.pattern == "fixed" else masks.full(i)


def rules() -> st.SearchStrategy[AttentionRule]:
    count = st.integers(1, 9)
    return st.one_of(
        st.builds(AttentionRule),
        st.builds(AttentionRule, pattern=st.just("window"), window=count, sink_tokens=st.integers(0, 4)),
        st.builds(AttentionRule, pattern=st.just("strided"), stride=count),
        count.flatmap(
            lambda n: st.builds(AttentionRule, pattern=st.just("fixed"), stride=st.just(n), summary=st.integers(1, n))
        ),
    )


@given(rules(), st.integers(1, 40))
def test_patterns_are_brute_force_masks(rule: AttentionRule, length: int) -> None:
    positions = torch.arange(length)
    found = rule.visible(positions[:, None], positions)
    for i in range(length):
        assert set(found[i].nonzero().flatten().tolist()) == seen_by(rule, i)
        assert i in seen_by(rule, i)  # no row of scores is empty
    assert rule.is_causal_only(length) <= bool((found == torch.ones_like(found).tril()).all())


@given(rules(), st.integers(1, 30))
def test_causal_only_is_recognized(rule: AttentionRule, length: int) -> None:
    """A pattern of texts that it does not reach must take the fast path without a bias."""
    if rule.pattern == "full" or (rule.pattern == "window" and rule.window >= length):
        assert rule.is_causal_only(length)
    if rule.pattern in ("strided", "fixed"):
        assert rule.is_causal_only(length) == (rule.stride >= length)


def test_patterns_by_hand() -> None:
    """Figure 3 of Sparse Transformers has rows of 4; these are the rows of its masks for positions 0 … 9."""
    assert [sorted(masks.window(i, 3)) for i in (0, 1, 5)] == [[0], [0, 1], [3, 4, 5]]
    assert sorted(masks.window(7, 2, sinks=3)) == [0, 1, 2, 6, 7]
    assert sorted(masks.strided(9, 4)) == [1, 5, 6, 7, 8, 9]
    assert sorted(masks.fixed(9, 4, 1)) == [3, 7, 8, 9]
    assert sorted(masks.fixed(9, 4, 2)) == [2, 3, 6, 7, 8, 9]


def test_slopes_are_those_of_the_paper() -> None:
    """arXiv:2108.12409, section 3: 8 heads have 1/2¹ … 1/2⁸; 16 heads 1/2^0.5, 1/2¹, … 1/2⁸."""
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2 ** (-n / 2) for n in range(1, 17)]))


@given(st.integers(1, 64))
def test_slopes_are_blooms_and_the_textbooks(n_heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    blooms = build_alibi_tensor(torch.ones(1, 9, dtype=torch.int64), n_heads, torch.float32).view(n_heads, 9)
    ours = attention_bias(AttentionRule(alibi_heads=n_heads), torch.tensor([8]), torch.arange(9), torch.float32)[:, 0]
    # Bloom's biases begin at 0 and rise, ours end at 0: softmax does not see the difference.
    torch.testing.assert_close(ours, blooms - blooms[:, -1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alibi_slopes(n_heads).double(), torch.tensor(masks.alibi_slopes(n_heads)).double())


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of two rows that take gradients."""
    shapes = ((2, HEADS, SEQ, WIDTH), (2, KV_HEADS, SEQ, WIDTH), (2, KV_HEADS, SEQ, WIDTH))
    return tuple(normal(*shape, seed=n, dtype=dtype).requires_grad_() for n, shape in enumerate(shapes))  # type: ignore[return-value]


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 12, [0] * 9 + [1] + [2] * 7])
POSITIONS = torch.tensor([[*range(5), *range(12)], [*range(9), 0, *range(7)]])


CASES = list(itertools.product(RULES, (None, 2.0), (False, True)))


def expected_output(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, softcap: float | None, packed: bool
) -> Tensor:
    """By the textbook; packed documents one by one."""
    out = torch.zeros_like(q)
    slopes = masks.alibi_slopes(HEADS) if rule.alibi_heads else None
    for row in range(len(q)):
        for document in DOCUMENTS[row].unique() if packed else [None]:
            here = slice(None) if document is None else DOCUMENTS[row] == document
            parts = (q[row, :, here], k[row, :, here], v[row, :, here])
            seen = [seen_by(rule, i) for i in range(parts[0].shape[1])]
            out[row, :, here] = sparse_attention(*parts, seen, scale=0.3, softcap=softcap, slopes=slopes)
    return out


@pytest.mark.parametrize(("name", "softcap", "packed"), CASES)
@pytest.mark.parametrize("path", ["bias", "cache"])
def test_every_path_is_the_textbooks(name: str, softcap: float | None, packed: bool, path: str) -> None:
    """The fused kernel or plain products with a bias, and attention to a cache, forward and backward."""
    rule, (q, k, v) = RULES[name], inputs()
    where, documents = (POSITIONS, DOCUMENTS) if packed else (torch.arange(SEQ).expand(2, -1), None)
    bias = attention_bias(rule, where, where, torch.float32, None if documents is None else (documents, documents))
    if path == "cache":
        out = attend_to_cache(q, k, v, bias, 0.3, softcap)
    else:
        out = causal_attention(q, k, v, 0.3, bias, softcap)
    exact = inputs(torch.float64)
    expected = expected_output(*exact, rule, softcap, packed)
    assert distance(out, expected) < 1e-5
    (out * normal(*out.shape, seed=9).float()).sum().backward()
    (expected * normal(*out.shape, seed=9)).sum().backward()
    for part, exact_part in zip((q, k, v), exact, strict=True):
        assert distance(part.grad, exact_part.grad) < 1e-5


@pytest.mark.parametrize(("name", "softcap", "packed"), pairwise(tuple(RULES), (None, 2.0), (False, True)))
@torch.no_grad()
def test_flex_attention_step_by_step_is_the_textbooks(name: str, softcap: float | None, packed: bool) -> None:
    """Forward only: torch has no backward pass of FlexAttention for CPUs."""
    rule, (q, k, v) = RULES[name], (part.detach() for part in inputs())
    where, documents = (POSITIONS, DOCUMENTS) if packed else (None, None)
    plan = plan_attention(rule, SEQ, q.device, softcap=softcap, positions=where, documents=documents, compiled=False)
    out = causal_attention(q, k, v, 0.3, plan)
    assert distance(out, expected_output(*inputs(torch.float64), rule, softcap, packed)) < 1e-5


@pytest.mark.parametrize("name", RULES)
def test_plain_products_in_bfloat16_are_near_the_textbook(name: str) -> None:
    """What a CPU trains with: its error is that of the numbers, three decimal digits."""
    q, k, v = inputs(torch.bfloat16)
    where = torch.arange(SEQ)
    bias = None if name == "full" else attention_bias(RULES[name], where, where, torch.bfloat16)
    out = causal_attention(q, k, v, 0.3, bias)
    expected = expected_output(q.double(), k.double(), v.double(), RULES[name], None, False)
    assert out.dtype == torch.bfloat16
    assert distance(out, expected) < 0.01


def packed_rows(lengths: list[list[int]], dtype: torch.dtype, head_dim: int = 4) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values of two query heads to a key head, as projections lay them out, and the documents.

    Every row is filled up by one more document.
    """
    seq = max(map(sum, lengths)) + 1
    ends = [torch.tensor([*row, seq - sum(row)]) for row in lengths]
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in ends])
    parts = [normal(len(lengths), seq, heads, head_dim, seed=heads, dtype=dtype) for heads in (4, 2, 2)]
    return [part.transpose(1, 2).requires_grad_() for part in parts], documents


def alone(parts: list[Tensor], documents: Tensor, rule: AttentionRule) -> Tensor:
    """Each document by itself, in plain tensors."""
    q, k, v = (part.repeat_interleave(4 // part.shape[1], dim=1) for part in parts)
    out = torch.zeros_like(q)
    for row, numbers in enumerate(documents):
        for document in numbers.unique():
            here = numbers == document
            where = torch.arange(int(here.sum()))
            scores = q[row, :, here] @ k[row, :, here].mT * 0.3
            hidden = ~rule.visible(where[:, None], where)
            out[row, :, here] = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v[row, :, here]
    return out


def check_documents(lengths: list[list[int]], rule: AttentionRule, dtype: torch.dtype, most: float) -> None:
    parts, documents = packed_rows(lengths, dtype)
    exact = [part.detach().double().requires_grad_() for part in parts]
    out, expected = (
        causal_attention(*parts, 0.3, plan_documents(documents, rule, 4, dtype)),
        alone(exact, documents, rule),
    )
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    assert distance(out, expected) < most
    upstream = normal(*out.shape, seed=9)
    (out * upstream.to(dtype)).sum().backward()
    (expected * upstream).sum().backward()
    for part, exact_part in zip(parts, exact, strict=True):
        assert distance(part.grad, exact_part.grad) < most


@given(
    lengths=st.lists(st.lists(st.integers(1, 90), max_size=9), min_size=1, max_size=4),
    name=st.sampled_from([name for name in RULES if "alibi" not in name]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_documents_of_any_lengths_are_as_alone(lengths: list[list[int]], name: str, dtype: torch.dtype) -> None:
    """Forward and backward: nothing comes from other documents, or from what they are padded with."""
    check_documents(lengths, RULES[name], dtype, 1e-5)


@pytest.mark.parametrize("length", [KEPT_UP_TO, KEPT_UP_TO + 1, PRODUCTS_UP_TO - 3, PRODUCTS_UP_TO + 70])
@pytest.mark.parametrize("name", ["full", "window-with-sinks"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_long_documents_are_as_alone(length: int, name: str, dtype: torch.dtype, most: float) -> None:
    """In blocks of queries; of the longest the weights are computed again."""
    check_documents([[length, 9, 40], [3, length]], RULES[name], dtype, most)


@given(st.lists(st.lists(st.integers(1, 200), max_size=40), min_size=1, max_size=8))
def test_documents_are_computed_in_few_shapes(lengths: list[list[int]]) -> None:
    """Every token has a slot of its own; whatever the lengths, a width is near, and numbers are powers of two."""
    _, documents = packed_rows(lengths, torch.float32)
    plan = plan_documents(documents, AttentionRule(), 4, torch.float32)
    slots = sum(n * width for n, width, _ in plan.batches)
    assert torch.equal(torch.cat([plan.slot, plan.empty]).sort().values, torch.arange(slots))
    assert torch.equal(plan.token[plan.slot], torch.arange(documents.numel() * 4))
    for n, width, _ in plan.batches:
        assert (n // 4).bit_count() == 1
        assert width in (16, 32) or width % 64 == 0
    assert slots <= 4 * (2 * documents.numel() + 16 * sum(len(row) + 1 for row in lengths))


def test_full_attention_is_plain_causal_attention() -> None:
    q, k, v = (part[0].detach() for part in inputs(torch.float64))
    seen = [masks.full(i) for i in range(SEQ)]
    torch.testing.assert_close(sparse_attention(q, k, v, seen, scale=WIDTH**-0.5), textbook(q, k, v))
    fast = causal_attention(q[None], k[None], v[None], WIDTH**-0.5)[0]
    torch.testing.assert_close(fast, textbook(q, k, v))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention is compiled where it is used: on a GPU")
@pytest.mark.parametrize(("name", "softcap", "packed"), CASES)
def test_compiled_flex_attention_on_a_gpu_is_the_textbooks(name: str, softcap: float | None, packed: bool) -> None:
    rule, (q, k, v) = RULES[name], (part.detach().cuda().requires_grad_() for part in inputs())
    where, documents = (POSITIONS.cuda(), DOCUMENTS.cuda()) if packed else (None, None)
    plan = plan_attention(rule, SEQ, q.device, softcap=softcap, positions=where, documents=documents)
    exact = inputs(torch.float64)
    expected = expected_output(*exact, rule, softcap, packed)
    out = causal_attention(q, k, v, 0.3, plan)
    assert distance(out.cpu(), expected) < 1e-2  # TF32 products
    (out * normal(*out.shape, seed=9).float().cuda()).sum().backward()
    (expected * normal(*expected.shape, seed=9)).sum().backward()
    assert all(distance(a.grad.cpu(), b.grad) < 1e-2 for a, b in zip((q, k, v), exact, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "fields",
    [
        {"attention": ("window", "full"), "window": 9, "sink_tokens": 2},
        {"attention": ("strided", "fixed"), "stride": 6, "attention_softcap": 3.0},
        {"position": "alibi"},
    ],
    ids=["window", "sparse", "alibi"],
)
@torch.no_grad()
def test_a_model_on_a_gpu_is_the_model_on_a_cpu(fields: dict[str, object]) -> None:
    config = tiny(context_length=200, head_dim=16, **fields)
    model, ids = random_model(config), tokens(config, 2, 150)
    cuts = torch.tensor([[70, 80], [1, 149]])
    documents = torch.stack([torch.arange(2).repeat_interleave(row) for row in cuts])
    positions = torch.stack([torch.cat([torch.arange(int(length)) for length in row]) for row in cuts])
    whole, packed = model(ids), model(ids, positions=positions, documents=documents)
    model.cuda()
    assert distance(model(ids.cuda()).cpu(), whole) < 1e-2
    found = model(ids.cuda(), positions=positions.cuda(), documents=documents.cuda())
    assert distance(found.cpu(), packed) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["window-with-sinks", *(pytest.param(name, marks=pytest.mark.long) for name in ("full", "alibi"))]
)
def test_compiled_flex_attention_is_the_textbooks(name: str) -> None:
    """As compiled for a CPU, which torch can do for the forward pass."""
    q, k, v = (part.detach() for part in inputs())
    plan = plan_attention(RULES[name], SEQ, q.device, softcap=2.0)
    with torch.no_grad():
        out = causal_attention(q, k, v, 0.3, plan)
    exact = (part.detach() for part in inputs(torch.float64))
    assert distance(out, expected_output(*exact, RULES[name], 2.0, False)) < 1e-5


@pytest.mark.parametrize(("window", "length", "differs"), [(4, 4, False), (4, 5, True), (9, 5, False)])
@torch.inference_mode()
def test_a_window_changes_nothing_until_a_text_is_longer(window: int, length: int, differs: bool) -> None:
    full, local = tiny(), tiny(attention=("window",), window=window)
    ids = tokens(full, 2, length)
    gap = (random_model(full)(ids) - random_model(local)(ids)).abs().max()
    assert (gap > 1e-3) if differs else (gap < 1e-4)


@torch.inference_mode()
def test_layers_take_their_patterns_in_turn() -> None:
    """What a token reaches grows by window − 1 with every local layer, and is everything with one global layer."""
    ids = tokens(tiny(), 1, 24)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 61

    def reach(**fields: object) -> int:
        model = random_model(tiny(n_layers=3, window=4, **fields))
        moved = (model(ids) - model(changed)).abs().amax(dim=-1)[0] > 1e-6
        return int(moved.nonzero().max())

    assert reach(attention=("window",)) == 3 * 3
    assert reach(attention=("window", "full")) == 23
    assert reach(attention=("window",), sink_tokens=1) == 23


def test_heads_that_share_keys_are_heads_with_equal_keys() -> None:
    """Grouped-query attention is multi-head attention whose key and value projections repeat (arXiv:2305.13245)."""
    grouped = random_model(tiny(n_kv_heads=2))
    whole = random_model(tiny(n_kv_heads=4))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            source = grouped.get_parameter(name)
            if name.split(".")[-2] in ("k_proj", "v_proj"):
                heads = source.view(2, 8, -1).repeat_interleave(2, dim=0)
                parameter.copy_(heads.reshape(parameter.shape))
            else:
                parameter.copy_(source)
    ids = tokens(grouped.config, 2, 11)
    assert distance(whole(ids), grouped(ids)) < 1e-5


@given(st.floats(0.5, 30), st.integers(0, 99))
def test_caps_bound_scores_and_leave_small_ones(cap: float, seed: int) -> None:
    from groundup.model.attention import capped

    scores = normal(50, seed=seed) * 20
    assert (capped(scores, cap).abs() <= cap).all()
    assert (capped(scores, cap).sign() == scores.sign()).all()
    torch.testing.assert_close(capped(scores * 1e-4 * cap, cap), scores * 1e-4 * cap, rtol=1e-4, atol=0)
