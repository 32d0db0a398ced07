"""Several texts in one row of a fixed width, none cut and none dropped, and what each position has to know of its text.

Best-fit decreasing (arXiv:2404.10830, section 3): texts are taken from the longest to the shortest, and each goes into
the row with the least space left that still holds it. The spaces of all open rows are the bits of one integer, so that
the tightest fit is its lowest bit from the text's length on: one step per text, whatever their number.

In a row each text has a number (`documents`) and positions that begin at 0: attention sees no other text, so that
packed rows give the loss and the gradients of one row for each text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from groundup.training import IGNORED

COLUMNS = 8
"""Of which widths of padded batches are a multiple: oneDNN keeps compiled products of every shape that it met."""

Text = tuple[np.ndarray, np.ndarray]
"""Token ids and targets, each (length,) int64; a target is the token after its id, or `IGNORED`."""


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which texts stand in which row; the same lengths give the same rows.

    Args:
        lengths: tokens of each text, at most `width`.
        width: tokens of a row.

    Returns:
        The texts' numbers, row by row, each once.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(width + 1)]  # by the space that is left
    spaces = 0  # bit s: a row with s tokens left is open
    for text in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[text])
        assert length <= width
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row = width, len(rows)
            rows.append([])
        rows[row].append(text)
        open_rows[space - length].append(row)
        spaces |= 1 << (space - length)
    return rows


def by_length(lengths: Sequence[int], most_tokens: int = 8192) -> Iterator[np.ndarray]:
    """Texts in batches of so many tokens with their padding, the longest ones first: the numbers of each batch's."""
    sizes = np.asarray(lengths, dtype=np.int64)
    order, first = np.argsort(-sizes, kind="stable"), 0
    while first < len(order):
        n = max(1, most_tokens // max(1, int(sizes[order[first]])))
        yield order[first : first + n]
        first += n


def lay_out(rows: Sequence[Sequence[Text]], width: int, pad_id: int) -> dict[str, np.ndarray]:
    """Rows of texts, padded on the right.

    Args:
        rows: the texts of each row, in order; at most `width` tokens together. A row may be empty.
        width: tokens of a row.
        pad_id: of the padding, which has no targets.

    Returns:
        `ids`, `targets`, `documents` (a text's number in its row; −1: padding) and `positions` (a token's place in
        its text), (rows, width) int64 each.
    """
    shape = (len(rows), width)
    ids, targets = np.full(shape, pad_id, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    documents, positions = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    for row, texts in enumerate(rows):
        ends = np.cumsum([len(own) for own, _ in texts], dtype=np.int64)
        for (own_ids, own_targets), end in zip(texts, ends, strict=True):
            ids[row, end - len(own_ids) : end] = own_ids
            targets[row, end - len(own_ids) : end] = own_targets
        begins, lengths = np.append(0, ends), np.diff(ends, prepend=0, append=width)
        documents[row] = np.repeat([*range(len(texts)), -1], lengths)
        positions[row] = np.arange(width) - np.repeat(begins, lengths)
    return {"ids": ids, "targets": targets, "documents": documents, "positions": positions}
