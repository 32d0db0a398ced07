"""Supervised fine-tuning: the rows that the loop is given, packed or padded, with replayed text or none."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alignment_runs import run
from hypothesis import given
from hypothesis import strategies as st
from model_parts import random_model, tiny
from shards_bytes import document
from torch import Tensor

from groundup.alignment import ConversationRows, Conversations, SFTSettings, fine_tune, load_conversations
from groundup.console import Console
from groundup.errors import ArtifactError, DataError
from groundup.model import Transformer, preset
from groundup.recipe import ShardsSettings, parse_recipe
from groundup.shards import PackedLoader, TokenShards, WindowLoader, write_shards
from groundup.stage import Stage, graph
from groundup.tokenizer import Tokenizer, render
from groundup.training import IGNORED
from groundup.training.metrics import read_log
from groundup.training.objective import text_lengths
from groundup.training.process import limited_threads

WORKER = Path(__file__).with_name("alignment_runs.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{WORKER.parent}:{WORKER.parents[1]}"}
CONTEXT, SEED = 96, 3
TEXTS = [f"{number} times the cat sat on the mat, and then it left." * (number % 4 + 1) for number in range(40)]
Talk = tuple[int, ...]


@functools.cache
def talks() -> Conversations:
    return load_conversations(["groundup:tasks"], 150, 1, "align.sft")


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*TEXTS, *(one["content"] for talk in talks().train for one in talk)], vocab_size=400)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    documents = [*map(document, TEXTS), document("held out", "validation")]
    write_shards(documents, tokenizer(), folder, ShardsSettings())
    return folder


def source(
    shards: Path | None = None, conversations: Conversations | None = None, **settings: object
) -> ConversationRows:
    chosen = SFTSettings(batch_size=4, **settings)
    return ConversationRows(conversations or talks(), tokenizer(), CONTEXT, chosen, SEED, shards)


def encoded(conversations: list) -> Counter[Talk]:
    return Counter(tuple(render(tokenizer(), messages).ids[:-1]) for messages in conversations)


def read_back(batch: dict[str, Tensor]) -> tuple[Counter[Talk], list[int]]:
    """The conversations of a batch, and its rows that are text; padding is left out."""
    found: Counter[Talk] = Counter()
    text = []
    for row, ids in enumerate(batch["ids"].tolist()):
        if ids[0] not in (tokenizer().role_id("user"), tokenizer().pad_id):
            text.append(row)
            continue
        is_padded = "documents" not in batch
        documents = [-(i == tokenizer().pad_id) for i in ids] if is_padded else batch["documents"][row].tolist()
        for number in range(max(documents) + 1):
            found[tuple(token for token, of in zip(ids, documents, strict=True) if of == number)] += 1
    return found, text


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("replay", [0.0, 0.3])
def test_epochs_count_conversations_and_replay_counts_rows(shards: Path, packing: bool, replay: float) -> None:
    rows = source(shards, packing=packing, replay=replay)
    n_rows = rows.rows_of_epochs(2)
    found, text = read_back(rows.rows(0, n_rows))
    once = encoded(talks().train)
    assert len(text) == pytest.approx(replay * n_rows, abs=1)
    assert sum(found.values()) == pytest.approx(2 * sum(once.values()), rel=0.05 if replay else 0)
    assert set(found) == set(once)
    if not replay:  # the FLOPs are those of the conversations, however they lie in rows
        lengths = [len(talk) for talk, n in found.items() for _ in range(n)]
        assert sorted(text_lengths(rows.rows(0, n_rows))) == sorted(lengths)
    assert all(abs(found[talk] - 2 * n) <= n for talk, n in once.items())
    figures = rows.figures(n_rows)
    assert figures.get("replay_share", 0) == pytest.approx(len(text) / n_rows)
    if packing and not replay:
        batch = rows.rows(0, n_rows)
        padding = float((batch["ids"] == tokenizer().pad_id).float().mean())
        assert figures["packing_efficiency"] == pytest.approx(1 - padding)
        assert padding < 0.1


def test_replayed_rows_are_the_shards_own_with_their_borders(shards: Path) -> None:
    rows = source(shards, replay=0.5)
    batch = rows.rows(0, 12)
    _, text = read_back(batch)
    loader = PackedLoader(WindowLoader(TokenShards.open(shards, "train"), CONTEXT, 4, SEED))
    expected = loader.rows(np.arange(len(text)))
    assert len(text) == 6
    names = {"ids": "ids", "targets": "targets", "documents": "document_ids", "positions": "positions"}
    for name, theirs in names.items():
        np.testing.assert_array_equal(batch[name][text].numpy(), getattr(expected, theirs))
    assert expected.document_ids.max() > 0


def test_text_shorter_than_the_context_is_padded(tmp_path: Path) -> None:
    write_shards([document("A short text."), document("x", "validation")], tokenizer(), tmp_path, ShardsSettings())
    batch = source(tmp_path, replay=0.5).rows(0, 4)
    _, (row, _) = read_back(batch)
    length = TokenShards.open(tmp_path, "train").n_tokens
    assert (batch["targets"][row, :length] != IGNORED).all()
    assert (batch["targets"][row, length:] == IGNORED).all()
    assert (batch["documents"][row, :length] >= 0).all()
    assert (batch["documents"][row, length:] == -1).all()


@given(cuts=st.lists(st.integers(0, 40), min_size=2, max_size=4), seed=st.integers(0, 3))
def test_a_row_is_a_function_of_its_place(shards: Path, cuts: list[int], seed: int) -> None:
    rows = whole(shards)
    cuts = sorted(cuts)
    batch = rows.rows(cuts[0], cuts[-1])
    parts = [rows.rows(first, last) for first, last in itertools.pairwise(cuts)]
    for name, values in batch.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values)


@functools.cache
def whole(shards: Path) -> ConversationRows:
    return source(shards, replay=0.3)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_validation_asks_every_held_out_conversation_once(packing: bool, batch_size: int) -> None:
    rows = source(packing=packing)
    batches = list(rows.validation(batch_size, None))
    assert {len(batch["ids"]) for batch in batches} == {batch_size}
    found: Counter[Talk] = Counter()
    for batch in batches:
        found.update(read_back(batch)[0])
    assert found == encoded(talks().held_out)
    supervised = sum(sum(render(tokenizer(), talk).loss_mask) for talk in talks().held_out)
    assert sum(int((batch["targets"] != IGNORED).sum()) for batch in batches) == supervised
    few = list(rows.validation(batch_size, 10))
    assert 10 <= sum(int((batch["targets"] != IGNORED).sum()) for batch in few) < 30


def test_what_is_learned_is_what_the_assistant_says_and_its_end() -> None:
    batch = source().rows(0, 8)
    told = Counter(batch["targets"][batch["targets"] != IGNORED].tolist())
    assert told[tokenizer().end_id] == sum(read_back(batch)[0].values())  # one answer in each, none never ends
    assert tokenizer().role_id("user") not in told
    assert tokenizer().pad_id not in told


def test_long_conversations_are_cut_and_counted() -> None:
    long = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "cat " * 200}]
    lost = [{"role": "user", "content": "cat " * 200}, {"role": "assistant", "content": "Yes"}]
    rows = source(conversations=Conversations([*talks().train, long, lost], talks().held_out, {}))
    assert (rows.truncated, rows.unsupervised) == (2, 1)
    assert rows.figures(1)["conversations_train"] == len(talks().train) + 1
    with pytest.raises(DataError, match="no answer fits"):
        source(conversations=Conversations([lost], talks().held_out, {}))


def test_replay_needs_shards_of_this_tokenizer(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(DataError, match=r"replay = 0.25: there are no token shards(.|\n)*set replay = 0"):
        source(None, replay=0.25)
    other = Tokenizer.train(["another text"], vocab_size=300)
    write_shards([document("some text"), document("x", "validation")], other, tmp_path, ShardsSettings())
    with pytest.raises(ArtifactError, match="another tokenizer"):
        source(tmp_path, replay=0.25)


def test_a_stage_that_replays_needs_the_shards() -> None:
    def stage(text: str) -> Stage:
        return graph(parse_recipe(text, "r.toml"))["sft"]

    assert "shards" not in stage("[align.sft]").needs
    assert "shards" in stage("[align.sft]\nreplay = 0.2").needs
    assert "shards" in stage('[corpus]\n[align.sft]\nstart = "elsewhere"\nreplay = 0.2').needs
    without = stage('[align.sft]\nstart = "elsewhere"\nreplay = 0.2')
    with pytest.raises(DataError, match=r"\[align.sft\] replay = 0.2: there are no token shards"):
        dict(without.method.checks(without))["[align.sft] replay"]()


def test_all_that_decides_the_rows_is_in_the_fingerprint(shards: Path, tmp_path: Path) -> None:
    write_shards([document("other " * 99), document("x", "validation")], tokenizer(), tmp_path, ShardsSettings())
    fewer = Conversations(talks().train[1:], talks().held_out, {})
    found = [
        source(), source(packing=False), source(shards, replay=0.2), source(shards, replay=0.3),
        source(tmp_path, replay=0.3), source(conversations=fewer),
    ]  # fmt: skip
    assert len({one.fingerprint for one in found}) == len(found)
    assert source(shards, replay=0.3).fingerprint == found[3].fingerprint


def small_model() -> Transformer:
    return Transformer(preset("ground-nano", vocab_size=tokenizer().vocab_size, context_length=CONTEXT))


def test_the_loop_learns_packed_conversations_and_replayed_text(tmp_path: Path, shards: Path) -> None:
    settings = SFTSettings(batch_size=4, replay=0.4, epochs=6, compile=False)
    tuned = fine_tune(
        small_model(), tokenizer(), settings, out=tmp_path, conversations=talks(), replay_shards=shards, seed=SEED,
        console=Console(quiet=True),
    )  # fmt: skip
    summary = tuned.summary
    assert summary["rows"] == 4 * summary["steps"]
    assert summary["replay_share"] == pytest.approx(0.4, abs=0.05)
    assert summary["val_loss"] < 0.7 * summary["initial_loss"]
    assert summary["tokens"] > 6 * summary["supervised_tokens"]  # those of the text too
    text = torch.from_numpy(TokenShards.open(shards, "train").window(0, CONTEXT + 1))[None]
    fresh, taught = (F.cross_entropy(one(text[:, :-1])[0], text[0, 1:]) for one in (small_model(), tuned.model))
    assert taught < 0.7 * fresh


@pytest.mark.parametrize("packing", [True, False])
def test_validation_loss_is_the_same_packed_and_padded(tmp_path: Path, packing: bool) -> None:
    settings = SFTSettings(batch_size=2, packing=packing, epochs=1e-9, lr=1e-9, muon_lr=1e-9, precision="float32")
    model = random_model(tiny(vocab_size=tokenizer().vocab_size, context_length=CONTEXT))
    before = copy.deepcopy(model)
    tuned = fine_tune(
        model, tokenizer(), settings, out=tmp_path, conversations=talks(), seed=SEED, console=Console(quiet=True)
    )
    nats, count = 0.0, 0
    for messages in talks().held_out:
        rendered = render(tokenizer(), messages)
        ids, learned = torch.tensor(rendered.ids), torch.tensor(rendered.loss_mask[1:])
        with torch.no_grad():
            logits = before(ids[None, :-1])[0]
        nats += float(F.cross_entropy(logits[learned], ids[1:][learned], reduction="sum"))
        count += int(learned.sum())
    assert tuned.summary["val_loss"] == pytest.approx(nats / count, rel=1e-5)


def kept_answers(folder: Path) -> list[bytes]:
    """What rejection sampling learns from; of fine-tuning on a file, nothing. (Names depend on where the data are.)"""
    return [path.read_bytes() for path in (folder / "out").glob("answers-*.jsonl")]


@pytest.mark.parametrize("kind", ["sft", "rejection"])
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    options = '{"checkpoint_seconds": 0.0}'
    with limited_threads(1):
        whole = run(kind, tmp_path / "whole", checkpoint_seconds=0.0)
    n_steps = whole.summary["steps"]
    assert n_steps >= 3
    at = random.Random(os.urandom(8)).randrange(1, n_steps + 1)
    arguments = [sys.executable, str(WORKER), kind, str(tmp_path / "parts"), "kill", str(at), options]
    done = subprocess.run(arguments, env=ENVIRONMENT, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, at
    with limited_threads(1):
        again = run(kind, tmp_path / "parts", checkpoint_seconds=0.0)
    assert (tmp_path / "parts/out/metrics.jsonl").read_bytes() == (tmp_path / "whole/out/metrics.jsonl").read_bytes()
    assert kept_answers(tmp_path / "parts") == kept_answers(tmp_path / "whole")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), (name, at)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rejection"])
def test_two_processes_do_what_one_does(tmp_path: Path, kind: str) -> None:
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        arguments = [sys.executable, *launch, str(WORKER), kind, str(tmp_path / name)]
        subprocess.run(arguments, env=ENVIRONMENT, timeout=200, check=True, capture_output=True)
    assert kept_answers(tmp_path / "one") == kept_answers(tmp_path / "two")
    assert len(kept_answers(tmp_path / "one")) == (kind == "rejection")
    logs = [read_log(tmp_path / name / "out" / "metrics.jsonl") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) >= 3
    for one, two in zip(*logs, strict=True):
        losses = [{name: value for name, value in line.items() if "loss" in name} for line in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
