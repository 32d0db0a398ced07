"""Packed rows: borders of documents, and attention that stays inside them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards_bytes import opened

from groundup.errors import DataError
from groundup.model import ModelConfig, Transformer
from groundup.shards import MixtureLoader, PackedBatch, PackedLoader, TokenShards, WindowLoader

TEXTS = ["".join(chr(97 + (n * k) % 26) for k in range(n * 7 % 61)) for n in range(25)] + ["", "", "x"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return opened(tmp_path_factory.mktemp("shards"), TEXTS)


def parts_of(batch: PackedBatch) -> list[tuple[int, slice]]:
    """Row and places of each document, found one position at a time."""
    parts: list[tuple[int, slice]] = []
    for row, numbers in enumerate(batch.document_ids.tolist()):
        begin = 0
        for place in range(1, len(numbers) + 1):
            if place == len(numbers) or numbers[place] != numbers[begin]:
                parts.append((row, slice(begin, place)))
                begin = place
    return parts


@given(length=st.integers(1, 90), batch_size=st.integers(1, 5), seed=st.integers(0, 9), step=st.integers(0, 50))
def test_the_borders_are_the_documents(shards: TokenShards, length: int, batch_size: int, seed: int, step: int) -> None:
    batch = PackedLoader(WindowLoader(shards, length, batch_size, seed)).batch(step)
    plain = WindowLoader(shards, length, batch_size, seed).batch(step)
    np.testing.assert_array_equal(batch.ids, plain.ids)
    np.testing.assert_array_equal(batch.targets, plain.targets)
    assert batch.document_ids.dtype == batch.positions.dtype == batch.cu_seqlens.dtype == np.int32
    parts = parts_of(batch)
    for row, places in parts:
        # An end-of-text begins a part, and stands nowhere else in it; only the part that begins a row may lack one.
        assert (batch.ids[row, places][1:] != 0).all()
        assert batch.ids[row, places.start] == 0 or places.start == 0
        assert batch.positions[row, places].tolist() == list(range(places.stop - places.start))
    for numbers in batch.document_ids:
        assert numbers[0] == 0
        assert set(np.diff(numbers).tolist()) <= {0, 1}
    begins = [row * batch.ids.shape[1] + places.start for row, places in parts]
    assert batch.cu_seqlens.tolist() == [*begins, batch.ids.size]


def test_every_token_is_a_target_once_and_read_from_its_own_document(shards: TokenShards) -> None:
    """A document's first token is foretold from the end-of-text before it, the rest from the document itself."""
    loader = WindowLoader(shards, 40, 1, seed=2)
    packed = PackedLoader(loader)
    counted: Counter[int] = Counter()
    for step in range(loader.n_windows):
        batch = packed.batch(step)
        counted.update(batch.targets[batch.targets != -100].tolist())
        for row, places in parts_of(batch):
            targets = batch.targets[row, places]
            assert (targets[:-1] != 0).all()  # only the last target of a part may be its end-of-text
    assert counted == Counter(np.concatenate(list(shards.documents())).tolist())


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_the_model_sees_each_document_as_if_it_were_alone(shards: TokenShards, position: str) -> None:
    config = ModelConfig(
        vocab_size=257, context_length=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_model=32, d_ff=64,
        position=position,
    )  # fmt: skip
    model = Transformer(config, seed=1).eval()
    for parameter in model.parameters():  # output projections begin at zero, and would hide everything
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    batch = PackedLoader(WindowLoader(shards, 64, 2, seed=1)).batch(0)
    assert batch.document_ids.max() >= 2
    ids, positions = torch.from_numpy(batch.ids), torch.from_numpy(batch.positions).long()
    documents = torch.from_numpy(batch.document_ids).long()
    with torch.no_grad():
        alone = [(row, places, model(ids[row, places][None])[0]) for row, places in parts_of(batch)]
        mixed = model(ids)
        packed = model(ids, positions=positions, documents=documents)
    for row, places, logits in alone:
        torch.testing.assert_close(packed[row, places], logits, atol=2e-4, rtol=1e-4)
    row, places, logits = next(part for part in alone if part[1].start > 0)
    assert not torch.allclose(mixed[row, places], logits, atol=1e-2)  # without the mask it is another thing


def test_a_mixture_can_be_packed(shards: TokenShards) -> None:
    loader = MixtureLoader([(shards, 1), (shards, 2)], 32, 4, seed=1)
    batch = PackedLoader(loader).batch(7)
    np.testing.assert_array_equal(batch.ids, loader.batch(7).ids)
    rows = PackedLoader(loader).rows(np.array([31, 28]))
    for name in ("ids", "targets", "document_ids", "positions"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(batch, name)[[3, 0]])


def test_shards_without_an_end_of_text_cannot_be_packed(shards: TokenShards) -> None:
    loader = WindowLoader(shards, 32, 4, seed=1)
    loader.end_of_text_id = None
    with pytest.raises(DataError, match="cannot be told apart"):
        PackedLoader(loader)


def test_the_folder_is_named_in_nothing_but_errors(shards: TokenShards, tmp_path: Path) -> None:
    """A state made here fits the same shards elsewhere."""
    elsewhere = opened(tmp_path, TEXTS)
    state = PackedLoader(WindowLoader(shards, 32, 4, seed=1)).state_dict()
    PackedLoader(WindowLoader(elsewhere, 32, 4, seed=1)).load_state_dict(state)
