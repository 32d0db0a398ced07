"""How probable continuations are after their contexts: log-likelihoods, many at a time.

Tokens are cut as the field's harness cuts them (lm-evaluation-harness, `TemplateLM._encode_pair`): white space at a
context's end belongs to the continuation, which is what the two have together beyond the context alone; a context that
is too long loses its beginning. So scores can be compared.

Work that requests share is done once. A context and its continuations are a tree of tokens: a row of a batch holds
whole trees, depth first, and each token attends to its own ancestors only. Keys and values of a beginning that many
contexts share (worked examples) are computed once for all of them. Of the last block and the vocabulary only those
positions are computed that are asked for.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from groundup.errors import ArtifactError
from groundup.generation.cache import KVCache
from groundup.model import OutputLayer, Transformer
from groundup.tokenizer import Tokenizer

_WORTH_SHARING = 32  # tokens; fewer are computed again
_HIDDEN = 1 << 30  # a position that no query reaches
_ROWS = 4  # of a batch at least, where trees are short

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
    return score_ids(model, encode_pairs(tokenizer, pairs))


def score_ids(model: Transformer, requests: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
    """`log_likelihoods` of token ids: (context, continuation), at least one of each.

    Raises:
        ArtifactError: the model's logits are not numbers.
    """
    model.eval()
    found: dict[int, Likelihood] = {}
    n_tokens = _batch_tokens(model)
    for prefix, trees in _families(requests, model.config.context_length, n_tokens // _ROWS):
        before = _read(model, prefix) if prefix else None
        for rows in _batches(trees, n_tokens):
            found |= _score(model, before, rows)
    return [found[place] for place in range(len(requests))]


def _batch_tokens(model: Transformer) -> int:
    """Of a batch, padding included: on a CPU as few as keep it busy, for more are more padding."""
    return 512 if next(model.parameters()).device.type == "cpu" else 4096


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """The ids of each context and of what follows it; at least one of each."""
    ends = [len(context.rstrip()) for context, _ in pairs]
    told = [(context[:end], context + continuation) for (context, continuation), end in zip(pairs, ends, strict=True)]
    texts = [*dict.fromkeys(text for pair in told for text in pair)]
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    end_of_text, found = [tokenizer.end_of_text_id], []
    for before, whole in ((ids[context], ids[text]) for context, text in told):
        n_before = min(len(before), max(0, len(whole) - 1))  # a tokenizer may merge over the border
        found.append((whole[:n_before] or end_of_text, whole[n_before:] or end_of_text))
    return found


@dataclass
class _Tree:
    """A context and its continuations but their last tokens, depth first; what they share stands there once.

    Attributes:
        ids: of the tokens.
        depths: how many tokens stand before each.
        ends: index of the first token behind each one's descendants.
        asked: (number of the pair, indexes whose outputs predict its continuation, continuation).
    """

    ids: list[int]
    depths: list[int]
    ends: list[int]
    asked: list[tuple[int, list[int], list[int]]]

    @classmethod
    def of(cls, context: Sequence[int], continuations: Sequence[tuple[int, list[int]]]) -> _Tree:
        """The tree of a context, and of sorted continuations with the number of their pair."""
        found, path = cls([], [], [], []), list[int]()  # from the root to the token that was put in last
        for place, continuation in continuations:
            told = [*context, *continuation[:-1]]
            shared = _common(told, [found.ids[index] for index in path])
            for index in path[shared:]:
                found.ends[index] = len(found.ids)
            path = [*path[:shared], *range(len(found.ids), len(found.ids) + len(told) - shared)]
            found.depths += range(shared, len(told))
            found.ids += told[shared:]
            found.ends += [0] * (len(told) - shared)
            found.asked.append((place, path[len(context) - 1 :], continuation))
        for index in path:
            found.ends[index] = len(found.ids)
        return found

    @property
    def is_chain(self) -> bool:
        return self.depths[-1] == len(self.ids) - 1


def _trees(context: Sequence[int], continuations: Sequence[tuple[int, list[int]]], room: int) -> Iterator[_Tree]:
    """One; of very many continuations several, for each token of a row is held against all others."""
    left = sorted(continuations, key=lambda one: one[1])
    while left:
        sizes = [*itertools.accumulate(len(ids) - 1 for _, ids in left)]
        n = max(1, bisect.bisect(sizes, max(room, len(context))))
        yield _Tree.of(context, left[:n])
        left = left[n:]


def _families(
    requests: Sequence[tuple[list[int], list[int]]], context_length: int, room: int
) -> Iterator[tuple[list[int], list[_Tree]]]:
    """(what all of some contexts begin with, trees without it)."""
    grouped: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
    for place, (context, continuation) in enumerate(requests):
        kept = (context + continuation)[-(context_length + 1) :]
        n_continuation = min(len(continuation), len(kept) - 1)
        grouped[tuple(kept[:-n_continuation])].append((place, kept[-n_continuation:]))
    families: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for key in grouped:
        families[key[:_WORTH_SHARING] if len(key) > _WORTH_SHARING else ()].append(key)
    for begin in [begin for begin, family in families.items() if begin and len(family) == 1]:
        families[()] += families.pop(begin)  # who shares nothing is batched with the others of that kind
    for begin, family in families.items():
        # Each keeps a token of its own.
        n = min(_common(min(family), max(family)), min(map(len, family)) - 1) if begin else 0
        yield list(family[0][:n]), [tree for key in family for tree in _trees(key[n:], grouped[key], room)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _batches(trees: Sequence[_Tree], n_tokens: int) -> Iterator[list[list[_Tree]]]:
    """Rows of trees, the longest first, few enough tokens at once; short trees fill a row together."""
    left = deque(sorted(trees, key=lambda tree: -len(tree.ids)))
    rows: list[list[_Tree]] = []
    width = 0  # of the batch
    while left:
        row = [left.popleft()]
        room = n_tokens // _ROWS - len(row[0].ids)
        while left and len(left[-1].ids) <= room:
            room -= len(left[-1].ids)
            row.append(left.pop())
        length = sum(len(tree.ids) for tree in row)
        if rows and (len(rows) + 1) * max(width, length) > n_tokens:
            yield rows
            rows, width = [], 0
        rows.append(row)
        width = max(width, length)
    if rows:
        yield rows


@torch.inference_mode()
def _read(model: Transformer, prefix: Sequence[int]) -> KVCache:
    """Keys and values of what contexts begin with."""
    device = next(model.parameters()).device
    cache = KVCache(model.config, 1, len(prefix), model.compute_dtype, device)
    model(torch.tensor([prefix], device=device), cache=cache, head=lambda hidden, output: None)
    return cache


@dataclass
class _Behind:
    """Keys and values of a batch behind those of a beginning, as the model's `KeyValueStore`.

    Attributes:
        before: the beginning's, one row for all.
        where: positions of all keys as each query sees them, (batch, seq, length); `_HIDDEN` if it does not.
    """

    before: KVCache | None
    where: Tensor

    def update(self, layer: int, keys: Tensor, values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return them."""
        if self.before is not None:
            stored, n = self.before.layers[layer], len(keys)
            keys = torch.cat([stored.keys.expand(n, -1, -1, -1), keys], dim=2)
            values = torch.cat([stored.values.expand(n, -1, -1, -1), values], dim=2)
        return keys, values, self.where


@torch.inference_mode()
def _score(model: Transformer, before: KVCache | None, rows: Sequence[Sequence[_Tree]]) -> dict[int, Likelihood]:
    """Every continuation of the trees, all of which follow `before`."""
    device = next(model.parameters()).device
    width = max(sum(len(tree.ids) for tree in row) for row in rows)
    shape = (len(rows), width)
    ids, depths = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    ends = np.tile(np.arange(1, width + 1), (len(rows), 1))  # what stands behind a row's end sees itself
    asked: list[tuple[int, int]] = []  # numbers of the pairs, and of their tokens
    outputs: list[int] = []
    targets: list[int] = []
    for row, trees in enumerate(rows):
        start = 0
        for tree in trees:
            inside = slice(start, start + len(tree.ids))
            ids[row, inside], depths[row, inside] = tree.ids, tree.depths
            ends[row, inside] = np.array(tree.ends) + start
            for place, indexes, continuation in tree.asked:
                asked.append((place, len(continuation)))
                outputs += [row * width + start + index for index in indexes]
                targets += continuation
            start = inside.stop
    # The output behind a context predicts the first token of each of its continuations.
    places, output_of = np.unique(outputs, return_inverse=True)
    row_of, column_of = (torch.from_numpy(part).to(device) for part in np.divmod(places, width))

    def head(hidden: Float[Tensor, "1 n d_model"], output: OutputLayer) -> tuple[Tensor, Tensor]:
        """log p of each target, and whether it is the most probable token."""
        logits, at = output.logits(hidden[0]), torch.from_numpy(output_of).to(device)
        wished = torch.tensor(targets, device=device)
        return logits[at, wished] - logits.logsumexp(dim=1)[at], logits.argmax(dim=1)[at] == wished

    told = torch.from_numpy(ids).to(device)
    if before is None and all(len(row) == 1 and row[0].is_chain for row in rows):
        logprobs, best = model(told, head=head, wanted=(row_of, column_of))
    else:
        n_before, order = 0 if before is None else before.length, np.arange(width)
        is_seen = (order <= order[:, None]) & (order[:, None] < ends[:, None])  # itself, and its ancestors
        where = np.where(is_seen, n_before + depths[:, None], _HIDDEN)
        beginning = np.broadcast_to(np.arange(n_before), (*shape, n_before))
        store = _Behind(before, torch.from_numpy(np.concatenate([beginning, where], axis=2)).to(device))
        positions = torch.from_numpy(n_before + depths).to(device)
        logprobs, best = model(told, positions=positions, cache=store, head=head, wanted=(row_of, column_of))
    if not bool(logprobs.isfinite().all()):  # argmax of NaN is 0, which would be the right choice of many sets
        raise ArtifactError(
            "the model gave logits that are not numbers (NaN or infinite): its weights are damaged, or diverged.",
            "Take an earlier checkpoint, or train again with a lower learning rate.",
        )
    sizes = [n for _, n in asked]
    parts = zip(asked, logprobs.cpu().split(sizes), best.cpu().split(sizes), strict=True)
    return {place: Likelihood(float(own.double().sum()), n, bool(is_best.all())) for (place, n), own, is_best in parts}
