"""Mixtures: exact proportions at every moment, each component without replacement, any batch at any time."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from shards_bytes import opened

from groundup.errors import ArtifactError, DataError
from groundup.shards import MixtureLoader, PackedLoader, TokenShards, WindowLoader
from groundup.shards.mixture import WEIGHT_SUM, Shares, integer_weights

weights_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> list[TokenShards]:
    folder = tmp_path_factory.mktemp("components")
    return [opened(folder / letter, [letter * (40 + n) for n in range(size)]) for letter, size in (("a", 9), ("b", 4))]


@given(weights=weights_lists, seed=st.integers(0, 99))
def test_every_prefix_has_the_shares(weights: list[float], seed: int) -> None:
    shares = integer_weights(weights)
    n = 500
    components, numbers = Shares(shares, seed)(np.arange(n))
    depth = max(1, (len(weights) - 1).bit_length())
    seen: Counter[int] = Counter()
    for place, (component, number) in enumerate(zip(components.tolist(), numbers.tolist(), strict=True)):
        assert number == seen[component]  # each component's rows are 0, 1, 2, …
        seen[component] += 1
        for other, share in enumerate(shares):
            assert abs(seen[other] - (place + 1) * share / WEIGHT_SUM) <= depth
    assert Shares(shares, seed).counts(n) == [seen[component] for component in range(len(weights))]


@given(weights=weights_lists, seed=st.integers(0, 99), periods=st.integers(1, 1000))
def test_a_whole_period_has_the_weights_exactly(weights: list[float], seed: int, periods: int) -> None:
    shares = integer_weights(weights)
    assert Shares(shares, seed).counts(periods * WEIGHT_SUM) == [periods * share for share in shares]


@given(weights=weights_lists, seed=st.integers(0, 99), place=st.integers(0, 10**12))
def test_far_out_it_is_the_same_function(weights: list[float], seed: int, place: int) -> None:
    shares = Shares(integer_weights(weights), seed)
    component, number = (values[0] for values in shares(np.array([place])))
    before, after = shares.counts(place), shares.counts(place + 1)
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(k == component) for k in range(len(weights))]
    assert number == before[component]


@given(weights=weights_lists, scale=st.floats(0.001, 1000))
def test_weights_are_shares(weights: list[float], scale: float) -> None:
    whole = integer_weights(weights)
    assert sum(whole) == WEIGHT_SUM
    assert all(
        abs(share - weight / sum(weights) * WEIGHT_SUM) < 1 for share, weight in zip(whole, weights, strict=True)
    )
    again = integer_weights([weight * scale for weight in weights])
    assert all(abs(one - other) <= 1 for one, other in zip(whole, again, strict=True))


def test_each_component_goes_through_epochs_without_replacement(components: list[TokenShards]) -> None:
    loader = MixtureLoader([(components[0], 3), (components[1], 1)], 16, 8, seed=5)
    singles, shares = loader.loaders, Shares(loader.weights, 5)
    rows: list[list[bytes]] = [[], []]
    for step in range(40):
        batch = loader.batch(step)
        for component, ids, targets in zip(
            shares(np.arange(8 * step, 8 * step + 8))[0], batch.ids, batch.targets, strict=True
        ):
            rows[component].append(ids.tobytes() + targets.tobytes())
    assert [len(found) for found in rows] == [240, 80]
    for single, found in zip(singles, rows, strict=True):
        alone = single.rows(np.arange(len(found)))
        assert found == [
            ids.tobytes() + targets.tobytes() for ids, targets in zip(alone.ids, alone.targets, strict=True)
        ]
        counted: Counter[int] = Counter()
        for epoch in range(len(found) // single.n_windows):
            places = np.arange(epoch * single.n_windows, (epoch + 1) * single.n_windows)
            counted[int((single.rows(places).targets != -100).sum())] += 1
        assert counted == {single.tokens_per_epoch: len(found) // single.n_windows}  # every token a target, once
    assert loader.epochs(40) == [240 / singles[0].n_windows, 80 / singles[1].n_windows]


def test_components_of_one_size_are_shuffled_differently(tmp_path: Path) -> None:
    one, two = (opened(tmp_path / letter, [letter * 3000]) for letter in "ab")
    loader = MixtureLoader([(one, 1), (two, 1)], 16, 8, seed=5)
    orders = [single._windows_at(np.arange(50))[0].tolist() for single in loader.loaders]
    assert orders[0] != orders[1]


@given(
    step=st.integers(0, 10**6),
    batch_size=st.integers(1, 12),
    world=st.integers(1, 4),
    packed=st.booleans(),
    mixed=st.booleans(),
    stop=st.integers(0, 5),
)
def test_any_world_size_and_any_place_to_go_on_from_give_the_same_rows(
    components: list[TokenShards], step: int, batch_size: int, world: int, packed: bool, mixed: bool, stop: int
) -> None:
    def fresh() -> WindowLoader | MixtureLoader | PackedLoader:
        parts = [(components[0], 0.7), (components[1], 0.3)]
        rows = MixtureLoader(parts, 16, batch_size, 5) if mixed else WindowLoader(components[0], 16, batch_size, 5)
        return PackedLoader(rows) if packed else rows

    loader = fresh()
    loader.step = step
    for _ in zip(range(stop), loader, strict=False):
        pass
    resumed = fresh()
    resumed.load_state_dict(loader.state_dict())
    whole = next(iter(resumed))
    assert resumed.step == loader.step + 1
    borders = [rank * batch_size // world for rank in range(world + 1)]
    for rank in range(world):
        rows = slice(borders[rank], borders[rank + 1])
        share = fresh().batch(loader.step, rows)  # a process of its own, which never saw another batch
        for name, values in vars(whole).items():
            np.testing.assert_array_equal(vars(share)[name], values[rows])


def test_a_state_that_does_not_fit_is_refused(components: list[TokenShards], tmp_path: Path) -> None:
    one, two = components
    state = MixtureLoader([(one, 1), (two, 1)], 16, 8, 1).state_dict()
    assert all(isinstance(value, int | str) for value in state.values())
    assert len(state) <= 6
    MixtureLoader([(one, 10), (two, 10)], 16, 8, 1).load_state_dict(state)  # the same shares
    other = opened(tmp_path, ["another text " * 9])
    for parts in ([(two, 1), (one, 1)], [(one, 1), (two, 1.01)], [(one, 1), (other, 1)], [(one, 1)]):
        with pytest.raises(ArtifactError, match="components was"):
            MixtureLoader(parts, 16, 8, 1).load_state_dict(state)
    with pytest.raises(ArtifactError, match="seed was 1, is 2"):
        MixtureLoader([(one, 1), (two, 1)], 16, 8, 2).load_state_dict(state)
    with pytest.raises(ArtifactError, match="shards was None"):
        WindowLoader(one, 16, 8, 1).load_state_dict(state)


def test_mixtures_that_make_no_sense_are_refused(components: list[TokenShards], tmp_path: Path) -> None:
    one, two = components
    with pytest.raises(DataError, match="no shards"):
        MixtureLoader([], 16, 8, 1)
    for weight in (0.0, -1.0, float("nan"), float("inf"), 1e-9):
        with pytest.raises(DataError, match="mixture weight"):
            MixtureLoader([(one, 1.0), (two, weight)], 16, 8, 1)
    stranger = opened(tmp_path / "stranger", ["text " * 50], fingerprint="0" * 32)
    with pytest.raises(ArtifactError, match=r"stranger: made with another tokenizer"):
        MixtureLoader([(one, 1), (stranger, 1)], 16, 8, 1)
    short = opened(tmp_path / "short", ["text"])
    with pytest.raises(DataError, match="short: 5 tokens, fewer than a row of 16"):
        MixtureLoader([(one, 1), (short, 1)], 16, 8, 1)


@given(weights=weights_lists, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_seeds_begin_at_other_places(weights: list[float], seeds: tuple[int, int]) -> None:
    assume(seeds[0] != seeds[1] and len(weights) > 3)
    one, two = (Shares(integer_weights(weights), seed)(np.arange(400))[0].tolist() for seed in seeds)
    assert one != two
