"""How probable continuations are after their contexts: log-likelihoods, many at a time.

Tokens are cut as the field's harness cuts them (lm-evaluation-harness, `TemplateLM._encode_pair`): white space at a
context's end belongs to the continuation, which is what the two have together beyond the context alone; a context that
is too long loses its beginning. So scores can be compared.

Work that requests share is done once: the beginning that all contexts of a batch have in common (worked examples), and
a context before its several continuations. Both stand in a store of keys and values, from which later rows read.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from groundup.model import OutputLayer, Transformer
from groundup.tokenizer import Tokenizer

_WORTH_SHARING = 32  # tokens; fewer are computed again
_HIDDEN = 1 << 30  # a position that no query reaches

Pair = tuple[str, str]


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        logprob: log p(continuation | context), in nats, summed over its tokens.
        n_tokens: of the continuation.
        is_greedy: each token of it is the most probable one.
    """

    logprob: float
    n_tokens: int
    is_greedy: bool


def log_likelihoods(model: Transformer, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[Likelihood]:
    """log p(continuation | context) of each pair, in their order.

    Args:
        model: put into evaluation mode.
        tokenizer: of the model.
        pairs: (context, continuation); without a context the continuation follows `<|endoftext|>`.
    """
    return score_ids(model, [encode_pair(tokenizer, *pair) for pair in pairs])


def score_ids(model: Transformer, requests: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
    """`log_likelihoods` of token ids: (context, continuation), at least one of each."""
    model.eval()
    found: dict[int, Likelihood] = {}
    for prefix, groups in _batches(requests, model.config.context_length, _batch_tokens(model)):
        found |= _score(model, prefix, groups)
    return [found[place] for place in range(len(requests))]


def _batch_tokens(model: Transformer) -> int:
    """Of a batch, padding included: on a CPU as few as keep it busy, for more are more padding."""
    return 512 if next(model.parameters()).device.type == "cpu" else 4096


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows it; at least one of each."""
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    if not context:
        return [tokenizer.end_of_text_id], tokenizer.encode(continuation) or [tokenizer.end_of_text_id]
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    n_before = min(len(before), len(whole) - 1)  # a tokenizer may merge over the border
    return whole[:n_before] or [tokenizer.end_of_text_id], whole[n_before:]


@dataclass(frozen=True)
class _Group:
    """A context, and its continuations by the number of their pair; the longest first."""

    context: list[int]
    continuations: list[tuple[int, list[int]]]

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuations[0][1]) - 1


def _batches(
    requests: Sequence[tuple[list[int], list[int]]], context_length: int, n_tokens: int
) -> Iterator[tuple[list[int], list[_Group]]]:
    """(what all contexts begin with, groups without it), longest first, few enough tokens at once."""
    grouped: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
    for place, (context, continuation) in enumerate(requests):
        kept = (context + continuation)[-(context_length + 1) :]
        n_continuation = min(len(continuation), len(kept) - 1)
        grouped[tuple(kept[:-n_continuation])].append((place, kept[-n_continuation:]))
    families: dict[tuple[int, ...], list[_Group]] = defaultdict(list)
    for key, items in grouped.items():
        group = _Group(list(key), sorted(items, key=lambda item: -len(item[1])))
        families[key[:_WORTH_SHARING] if len(key) > _WORTH_SHARING else ()].append(group)
    for begin in [begin for begin, family in families.items() if begin and len(family) == 1]:
        families[()] += families.pop(begin)  # who shares nothing is batched with the others of that kind
    for family in families.values():
        common = _common([group.context for group in family]) if len(family) > 1 else 0
        prefix = family[0].context[:common] if common >= _WORTH_SHARING else []
        rest = [_Group(group.context[len(prefix) :], group.continuations) for group in family]
        rest.sort(key=lambda group: -group.length)
        while rest:
            n = max(1, n_tokens // rest[0].length)
            yield prefix, rest[:n]
            rest = rest[n:]


def _common(contexts: Sequence[list[int]]) -> int:
    """With how many tokens all begin; each keeps one of its own."""
    first, last = min(contexts), max(contexts)
    n = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return min(n, min(map(len, contexts)) - 1)


@dataclass
class _Store:
    """Keys and values of one call, behind those of an earlier one.

    Attributes:
        where: positions of this call's tokens, (batch, seq); `_HIDDEN` beyond a row's end.
        before: the earlier call's store, and which of its rows each row follows.
        layers: keys and values by layer, (batch, kv_heads, length, head_dim).
    """

    where: Tensor
    before: tuple[_Store, Tensor] | None = None
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Of all that rows can see."""
        if self.before is None:
            return self.where
        store, rows = self.before
        return torch.cat([store.positions[rows], self.where], dim=1)

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store them, and return them behind what stands before; see `KeyValueStore`."""
        if self.before is not None:
            store, rows = self.before
            old_keys, old_values = store.layers[layer]
            keys, values = torch.cat([old_keys[rows], keys], dim=2), torch.cat([old_values[rows], values], dim=2)
        self.layers[layer] = keys, values
        return keys, values, self.positions

    def hiding(self, ends: Tensor) -> _Store:
        """The same, of which rows see only what stands before their ends, (batch, 1)."""
        found = _Store(self.where, layers=self.layers)
        found.positions = torch.where(self.positions < ends, self.positions, _HIDDEN)
        return found


@torch.inference_mode()
def _score(model: Transformer, prefix: list[int], groups: Sequence[_Group]) -> dict[int, Likelihood]:
    """Every continuation of some contexts, all of which follow `prefix`."""
    device = next(model.parameters()).device
    before = None
    if prefix:
        store = _Store(torch.arange(len(prefix), device=device)[None])
        model(torch.tensor([prefix], device=device), cache=store, head=lambda hidden, output: hidden)
        before = store, torch.zeros(len(groups), dtype=torch.int64, device=device)
    # Each context with its longest continuation, then the others behind the contexts' keys and values.
    first = [(group.context, *group.continuations[0]) for group in groups]
    others = [(row, place, ids) for row, group in enumerate(groups) for place, ids in group.continuations[1:]]
    if not others and not prefix:
        return _pass(model, first, [0] * len(groups), None)[0]
    found, contexts = _pass(model, first, [len(prefix)] * len(groups), before, is_stored=True)
    # The last token of a context is computed once more: its output predicts the first of a continuation. So it is
    # hidden there, with the continuation that was stored with it.
    starts = [len(prefix) + len(group.context) - 1 for group in groups]
    assert contexts is not None
    hidden = contexts.hiding(torch.tensor(starts, device=device)[:, None])
    others.sort(key=lambda other: -len(other[2]))
    while others:
        n = max(1, _batch_tokens(model) // len(others[0][2]))
        part, others = others[:n], others[n:]
        rows = torch.tensor([row for row, _, _ in part], device=device)
        told = [([groups[row].context[-1]], place, ids) for row, place, ids in part]
        found |= _pass(model, told, [starts[row] for row, _, _ in part], (hidden, rows), is_stored=True)[0]
    return found


def _pass(
    model: Transformer,
    rows: Sequence[tuple[list[int], int, list[int]]],
    starts: Sequence[int],
    before: tuple[_Store, Tensor] | None,
    *,
    is_stored: bool = False,
) -> tuple[dict[int, Likelihood], _Store | None]:
    """Score one continuation a row: (context, number of the pair, continuation), the first token at its start."""
    device = next(model.parameters()).device
    width = max(len(context) + len(ids) - 1 for context, _, ids in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    where = torch.full((len(rows), width), _HIDDEN)
    at_row: list[int] = []
    at_column: list[int] = []
    targets: list[int] = []
    for row, (context, _, continuation) in enumerate(rows):
        told = context + continuation[:-1]
        ids[row, : len(told)] = torch.tensor(told)
        where[row, : len(told)] = torch.arange(starts[row], starts[row] + len(told))
        at_row += [row] * len(continuation)
        at_column += range(len(context) - 1, len(told))
        targets += continuation
    head = functools.partial(
        _token_scores,
        at=(torch.tensor(at_row, device=device), torch.tensor(at_column, device=device)),
        targets=torch.tensor(targets, device=device),
    )
    store = _Store(where.to(device), before) if is_stored else None
    # What follows a row's end is computed as if it stood at the last position of the row, and seen by nobody.
    last = torch.tensor(starts)[:, None] + torch.tensor([[len(context) + len(ids) - 2] for context, _, ids in rows])
    at = None if store is None else torch.minimum(where, last).to(device)
    logprobs, best = model(ids.to(device), positions=at, cache=store, head=head)
    sizes = [len(continuation) for _, _, continuation in rows]
    parts = zip(rows, logprobs.cpu().split(sizes), best.cpu().split(sizes), strict=True)
    return {
        place: Likelihood(float(part.double().sum()), len(part), bool(is_best.all()))
        for (_, place, _), part, is_best in parts
    }, store


def _token_scores(
    hidden: Float[Tensor, "batch seq d_model"],
    output: OutputLayer,
    at: tuple[Tensor, Tensor],
    targets: Int[Tensor, " targets"],
) -> tuple[Float[Tensor, " targets"], Tensor]:
    """log p of each target, and whether it is the most probable token; logits of these places only."""
    logits = output.logits(hidden[at])
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return chosen - logits.logsumexp(dim=1), logits.argmax(dim=1) == targets
