"""The loader's laws: a true shuffle, every token a target once an epoch, any batch at any time."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from shards_bytes import opened

from groundup.errors import ArtifactError, DataError
from groundup.shards import Batch, Permutation, TokenShards, WindowLoader, validation_windows

GOLDEN_ORDER = [4, 9, 6, 7, 0, 8, 1, 3, 2, 5]
GOLDEN_BATCHES = {(32, 6, 3): "95ba0875f09c8fc9", (100, 4, 1): "1cadc964dd1521e1", (64, 64, 7): "e843926e20247642"}
TEXTS = ["".join(chr(97 + (n * k) % 26) for k in range(n * 7 % 301)) for n in range(1, 25)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return opened(tmp_path_factory.mktemp("shards"), TEXTS)


class NumberedShards(TokenShards):
    """A stream in which every token is its own place, so that tests can see which is which."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.end_of_text_id = -1
        self.fingerprint = f"numbers to {n_tokens}"

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        assert (starts >= 0).all()
        assert (starts + length <= self.n_tokens).all()
        return starts[:, None] + np.arange(length)


def check_rows(batch: Batch, n: int) -> None:
    """On a numbered stream: each target follows its input, the first token follows the last."""
    seen = batch.targets != -100
    assert (batch.targets[seen] == (batch.ids[seen] + 1) % n).all()
    assert (np.diff(batch.ids, axis=1) % n == 1 % n).all()
    assert batch.ids.dtype == batch.targets.dtype == np.int64


# --- the order


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6))
def test_the_order_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    images = Permutation(n, (seed, epoch))(np.arange(n))
    np.testing.assert_array_equal(np.sort(images), np.arange(n))


@given(n=st.integers(10**9, 2**62), seed=st.integers(0, 100), data=st.data())
def test_a_huge_order_is_one_to_one_and_in_range(n: int, seed: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    images = Permutation(n, (seed,))(indices)
    assert len(set(images.tolist())) == len(indices)
    assert images.min() >= 0
    assert images.max() < n


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 20])
def test_every_index_goes_everywhere_equally_often(n: int) -> None:
    """Chi-square over keys: each of n² (index, place) counts is near its mean."""
    n_keys = 2000
    counts = np.zeros((n, n))
    for key in range(n_keys):
        counts[np.arange(n), Permutation(n, (key, 0))(np.arange(n))] += 1
    expected = n_keys / n
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_neighbours_are_torn_apart_and_epochs_differ() -> None:
    n = 10_000
    one, two = (Permutation(n, (1, epoch))(np.arange(n)) for epoch in (0, 1))
    for order in (one, two):
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).sum() < 20
    assert (one == two).sum() < 10


def test_the_order_is_the_same_for_ever() -> None:
    """A checkpoint of an older groundup goes on in the same order: these numbers must never change."""
    assert Permutation(10, (1, 0))(np.arange(10)).tolist() == GOLDEN_ORDER


@pytest.mark.parametrize("shape", GOLDEN_BATCHES)
def test_the_batches_are_the_same_for_ever(shards: TokenShards, shape: tuple[int, int, int]) -> None:
    """60 steps over many epochs, as the first release gave them."""
    loader = WindowLoader(shards, *shape)
    digest = xxhash.xxh3_64()
    for step in range(60):
        batch = loader.batch(step)
        digest.update(batch.ids.tobytes())
        digest.update(batch.targets.tobytes())
    assert digest.hexdigest() == GOLDEN_BATCHES[shape]


@given(steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=4), batch_size=st.integers(1, 700))
def test_a_batch_does_not_depend_on_the_ones_asked_for_before(
    shards: TokenShards, steps: list[int], batch_size: int
) -> None:
    loader = WindowLoader(shards, 8, batch_size, seed=1)
    for step in [*steps, *steps[::-1]]:
        fresh = WindowLoader(shards, 8, batch_size, seed=1).batch(step)
        again = loader.batch(step)
        np.testing.assert_array_equal(again.ids, fresh.ids)
        np.testing.assert_array_equal(again.targets, fresh.targets)


# --- training batches


@given(n=st.integers(2, 400), length=st.integers(1, 60), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_token_is_a_target_exactly_once_an_epoch(n: int, length: int, batch_size: int, seed: int) -> None:
    loader = WindowLoader(NumberedShards(n), length, batch_size, seed)
    assert loader.tokens_per_epoch == n
    rows_of_two_epochs = 2 * loader.n_windows
    seen: list[Counter[int]] = [Counter(), Counter()]
    for step in range(math.ceil(rows_of_two_epochs / batch_size)):
        batch = loader.batch(step)
        assert batch.ids.shape == batch.targets.shape == (batch_size, min(length, n))
        check_rows(batch, n)
        for row in range(batch_size):
            place = step * batch_size + row
            if place < rows_of_two_epochs:
                seen[place // loader.n_windows].update(batch.targets[row][batch.targets[row] != -100].tolist())
    assert seen[0] == seen[1] == Counter(range(n))


def test_the_order_of_rows_does_not_depend_on_the_batch_size(shards: TokenShards) -> None:
    by_one = WindowLoader(shards, 32, 1, seed=3)
    by_six = WindowLoader(shards, 32, 6, seed=3)
    rows = np.concatenate([by_one.batch(step).ids for step in range(60)])
    np.testing.assert_array_equal(rows, np.concatenate([by_six.batch(step).ids for step in range(10)]))


def test_each_epoch_has_an_order_of_its_own() -> None:
    loader = WindowLoader(NumberedShards(320), 16, 20, seed=1)
    epochs = [loader.batch(step).ids[:, 0].tolist() for step in range(3)]
    cuts = [{start % 16 for start in epoch} for epoch in epochs]
    assert all(len(cut) == 1 for cut in cuts)
    assert len(set.union(*cuts)) > 1  # each epoch cuts the text at other places
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"sequence_length": 32}, "sequence_length was 64, is 32"),
        ({"batch_size": 6}, "batch_size"),
        ({"seed": 2}, "seed"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(shards: TokenShards, other: dict[str, int], named: str) -> None:
    state = WindowLoader(shards, 64, 5, 1).state_dict()
    loader = WindowLoader(shards, **{"sequence_length": 64, "batch_size": 5, "seed": 1, **other})
    with pytest.raises(ArtifactError, match=f"{named}.*twice and others never"):
        loader.load_state_dict(state)
    assert loader.step == 0


def test_a_state_of_another_text_is_refused(shards: TokenShards, tmp_path: Path) -> None:
    other = opened(tmp_path, [*TEXTS, "one more"])
    with pytest.raises(ArtifactError, match="shards was"):
        WindowLoader(other, 64, 5, 1).load_state_dict(WindowLoader(shards, 64, 5, 1).state_dict())


@pytest.mark.parametrize("n", [2, 3, 63])
def test_a_text_shorter_than_a_row_makes_shorter_rows_and_says_so(n: int) -> None:
    loader = WindowLoader(NumberedShards(n), 64, 4, seed=1)
    assert (loader.sequence_length, loader.n_windows) == (n, 1)
    assert loader.note is not None
    assert f"has {n} tokens" in loader.note
    for step in range(3):
        batch = loader.batch(step)
        check_rows(batch, n)
        assert np.sort(batch.targets).tolist() == [list(range(n))] * 4
    assert WindowLoader(NumberedShards(64), 64, 4, seed=1).note is None


def test_a_text_of_one_token_is_refused(tmp_path: Path) -> None:
    shards = opened(tmp_path, [""])
    with pytest.raises(DataError, match="two are the least"):
        WindowLoader(shards, 8, 1, 1)


# --- validation


@given(n=st.integers(1, 500), length=st.integers(1, 70), limit=st.none() | st.integers(0, 600))
def test_validation_scores_each_token_once_in_order(n: int, length: int, limit: int | None) -> None:
    batches = list(validation_windows(NumberedShards(n), length, limit))
    for batch in batches:
        check_rows(batch, n)
        assert batch.ids.shape[0] == 1
        assert batch.ids.shape[1] <= length
    targets = [target for batch in batches for target in batch.targets.ravel().tolist() if target != -100]
    assert targets == list(range(n if limit is None else min(n, limit)))
    assert len({batch.ids.shape for batch in batches}) <= 1
