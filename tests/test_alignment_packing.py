"""Packing: every text whole and once, in few rows; and a model that cannot tell packed rows from rows of one text."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_parts import random_model, tiny
from torch import Tensor

from groundup.alignment.packing import by_length, lay_out, pack
from groundup.training import IGNORED, head_loss

sizes = st.integers(1, 40).flatmap(
    lambda width: st.tuples(st.just(width), st.lists(st.integers(1, width), max_size=50))
)


def text(number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A text whose ids nobody else has, every third of them no target."""
    ids = 1000 * (number + 1) + np.arange(length)
    return ids, np.where(np.arange(length) % 3 == 0, IGNORED, ids + 1)


@given(sizes)
def test_every_text_stands_whole_in_one_place(size: tuple[int, list[int]]) -> None:
    width, lengths = size
    rows = pack(lengths, width)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    texts = [text(number, length) for number, length in enumerate(lengths)]
    batch = lay_out([[texts[number] for number in row] for row in rows], width, pad_id=7)
    for row, numbers in enumerate(rows):
        place = 0
        for document, number in enumerate(numbers):
            here = slice(place, place + lengths[number])
            np.testing.assert_array_equal(batch["ids"][row, here], texts[number][0])
            np.testing.assert_array_equal(batch["targets"][row, here], texts[number][1])
            assert (batch["documents"][row, here] == document).all()
            assert batch["positions"][row, here].tolist() == list(range(lengths[number]))
            place = here.stop
        assert (batch["ids"][row, place:] == 7).all()
        assert (batch["targets"][row, place:] == IGNORED).all()
        assert (batch["documents"][row, place:] == -1).all()


@given(sizes)
def test_no_two_rows_would_fit_into_one(size: tuple[int, list[int]]) -> None:
    """What best-fit decreasing promises: a row is opened only for a text that fits nowhere else."""
    width, lengths = size
    filled = sorted(sum(lengths[number] for number in row) for row in pack(lengths, width))
    assert len(filled) < 2 or filled[0] + filled[1] > width


def test_best_fit_decreasing_by_hand() -> None:
    #               0  1  2  3  4  5
    assert pack([4, 7, 3, 6, 2, 1], 10) == [[1, 2], [3, 0], [4, 5]]
    assert pack([2, 4, 8, 3], 10) == [[2, 0], [1, 3]]  # the 2 goes where it leaves nothing, not where there is more
    assert pack([], 10) == []


@pytest.mark.parametrize("position", ["rope", "learned", "alibi"])
def test_packed_rows_give_the_loss_and_gradients_of_unpacked_ones(position: str) -> None:
    model = random_model(tiny(position=position))
    draw = np.random.default_rng(0)
    texts = []
    for length in (30, 17, 16, 9, 5, 2, 1):
        ids = draw.integers(0, model.config.vocab_size, length + 1)
        texts.append((ids[:-1], np.where(draw.random(length) < 0.4, IGNORED, ids[1:])))
    rows = [[texts[number] for number in row] for row in pack([len(ids) for ids, _ in texts], 48)]
    assert len(rows) == 2
    packed = gradients(model, lay_out(rows, 48, 0))
    unpacked = gradients(model, without_borders(lay_out([[one] for one in texts], 30, 0)))
    for name, expected in unpacked.items():
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name)
    mixed = gradients(model, without_borders(lay_out(rows, 48, 0)))
    assert abs(mixed["loss"] - unpacked["loss"]) > 1e-2  # without borders it is another thing


def without_borders(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in ("ids", "targets")}


def gradients(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The summed loss, and the gradient of each parameter."""
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    model.zero_grad()
    head = head_loss(tensors.pop("targets"))
    loss = model(tensors.pop("ids"), head=head, **tensors)
    loss.objective.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"loss": loss.nats, **found}


def test_batches_by_length_hold_every_text_once() -> None:
    lengths = [3, 50, 7, 7, 20, 1, 49]
    batches = [batch.tolist() for batch in by_length(lengths, 60)]
    assert batches == [[1], [6], [4, 2, 3], [0, 5]]
    assert [*by_length([], 60)] == []
