"""Objective, optimizers, schedule, precision, logs: each against an independent form or a law."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from groundup.errors import ArtifactError
from groundup.model import Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training import (
    IGNORED,
    choose_precision,
    cross_entropy_sum,
    head_loss,
    objective,
)
from groundup.training.batches import pad_rows
from groundup.training.metrics import MetricLog, read_log
from groundup.training.muon import Muon, orthogonalize
from groundup.training.optimizers import Optimizers, clip_gradients
from groundup.training.precision import native_bfloat16
from groundup.training.schedule import learning_rate_share


def plain_loss(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORED, reduction="sum")


@given(
    rows=st.integers(1, 40), vocab=st.integers(2, 50), ignored=st.floats(0, 0.9), seed=st.integers(0, 9),
    padding=st.integers(0, 5), softcap=st.sampled_from([None, 2.0, 30.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]), z_loss=st.sampled_from([0.0, 1e-2]),
)  # fmt: skip
def test_sliced_loss_is_the_full_loss_in_value_and_gradient(
    rows, vocab, ignored, seed, padding, softcap, label_smoothing, z_loss
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    weight = torch.randn(vocab + padding, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORED
    with pytest.MonkeyPatch.context() as patch:  # several slices of several pieces, the last ones short
        patch.setattr(objective, "SLICE_BYTES", 4 * 7 * vocab)
        patch.setattr(objective, "PIECE_LOGITS", 3 * vocab)
        patch.setattr(objective, "VALID_STEP", 4)
        ours = cross_entropy_sum(
            hidden, weight, targets, vocab, softcap, label_smoothing=label_smoothing, z_loss=z_loss
        )  # fmt: skip
        (ours.objective * 0.5).backward()
    mine = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = hidden @ weight[:vocab].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = F.cross_entropy(
        logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    ) + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()  # fmt: skip
    (plain * 0.5).backward()
    torch.testing.assert_close(ours.objective, plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mine, (hidden.grad, weight.grad), atol=1e-5, rtol=1e-4)
    nats = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(ours.nats, nats, atol=1e-4, rtol=1e-5)
    assert not ours.nats.requires_grad


def test_however_many_targets_there_are_products_have_few_shapes(monkeypatch):
    seen, apply = set(), objective._LinearCrossEntropy.apply

    def noted(rows, *more):
        seen.add(len(rows))
        return apply(rows, *more)

    monkeypatch.setattr(objective._LinearCrossEntropy, "apply", noted)
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(20, 8)
    for n_valid in range(1, 400, 7):
        targets = torch.full((1024,), IGNORED)
        targets[torch.randperm(1024)[:n_valid]] = 3
        cross_entropy_sum(hidden, weight, targets)
    assert seen == {128, 256, 384, 512}


def test_a_loss_over_no_rows_is_nothing():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, torch.empty(0, dtype=torch.int64))
    loss.objective.backward()
    assert loss.objective.item() == loss.nats.item() == 0
    assert hidden.grad.shape == (0, 8)
    assert not weight.grad.any()


@given(n_rows=st.integers(0, 1 << 16), row_bytes=st.integers(1, 1 << 28))
def test_slices_are_as_few_and_as_equal_as_memory_and_matrix_units_allow(n_rows, row_bytes):
    rows = objective.slice_rows(n_rows, row_bytes)
    assert 1 <= rows <= max(1, n_rows)
    assert rows == 1 or rows * row_bytes <= objective.SLICE_BYTES
    most = max(1, objective.SLICE_BYTES // row_bytes)
    assert math.ceil(n_rows / rows) <= math.ceil(n_rows / most) + 1
    assert rows % objective.SLICE_ROWS == 0 or rows in (most, max(1, n_rows))


def test_loss_without_gradient_is_the_same_number():
    hidden, weight, targets = torch.randn(9, 8), torch.randn(20, 8), torch.arange(9)
    with torch.no_grad():
        ours = cross_entropy_sum(hidden, weight, targets)
    expected = pytest.approx(plain_loss(hidden, weight, targets).item(), rel=1e-5)
    assert ours.objective.item() == expected
    assert ours.nats.item() == expected


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_gradients_are_the_whole_batch_s_on_uneven_rows(micro):
    config = preset("ground-nano")
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (3, 17, 9, 30):
        ids = torch.randint(0, config.vocab_size, (length + 1,), generator=generator).numpy()
        rows.append({"ids": ids[:-1], "targets": ids[1:]})
    ids, targets = pad_rows(rows, 4).values()
    count = int((targets != IGNORED).sum())
    assert count == 59

    def gradients(size):
        model = Transformer(config)
        for first in range(0, 4, size):
            part = slice(first, first + size)
            (model(ids[part], head=head_loss(targets[part])).objective / count).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole, accumulated = gradients(4), gradients(micro)
    model = Transformer(config)
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(accumulated[name], whole[name], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(whole[name], parameter.grad, atol=1e-6, rtol=1e-4)


@given(rows=st.integers(2, 24), cols=st.integers(2, 24), seed=st.integers(0, 20))
def test_orthogonalize_moves_singular_values_near_one_and_keeps_directions(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, cols, generator=generator)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = s / s[0] > 0.05  # a direction that is nearly absent needs more than five steps
    result = orthogonalize(matrix[None])[0]
    moved = torch.diagonal(u.T @ result @ vt.T)
    assert ((moved[kept] > 0.5) & (moved[kept] < 1.3)).all()


def test_muon_is_torch_s_muon():
    torch.manual_seed(0)
    start = [torch.randn(16, 8), torch.randn(8, 16), torch.randn(16, 8)]
    ours = [torch.nn.Parameter(value.clone()) for value in start]
    theirs = [torch.nn.Parameter(value.clone()) for value in start]
    mine = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16)
    other = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, ns_steps=5)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b, begin in zip(ours, theirs, start, strict=True):
        moved = (a - begin).norm()
        assert (a - b).norm() < 0.05 * moved  # bfloat16 rounds the two orders of operations differently


@pytest.mark.parametrize("name", ["ground-nano", "gpt2-nano", "llama-nano"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_optimized_exactly_once(name, optimizer):
    model = Transformer(preset(name))
    optimizers = Optimizers(model, OptimizerSettings(optimizer=optimizer), torch.float32)
    updated = [id(parameter) for parameter in optimizers.parameters()]
    assert sorted(updated) == sorted(id(parameter) for parameter in model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1.0)
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_decay_falls_on_matrices_only():
    model = Transformer(preset("gpt2-nano"))
    settings = OptimizerSettings(optimizer="adamw", weight_decay=0.5, lr=0.1)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    Optimizers(model, settings, torch.float32).step(1.0)
    for parameter in model.parameters():
        expected = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))


@given(limit=st.floats(0.01, 10), seed=st.integers(0, 20))
def test_clipping_is_torch_s(limit, seed):
    generator = torch.Generator().manual_seed(seed)
    ours = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (7,))]
    for parameter in ours:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    theirs = [torch.nn.Parameter(torch.zeros(p.shape)) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.clone()
    norm = clip_gradients(ours, limit)
    expected = torch.nn.utils.clip_grad_norm_(theirs, limit)
    assert norm == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@given(
    schedule=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    n_steps=st.integers(1, 500),
    warmup=st.floats(0, 0.3),
    decay=st.floats(0, 0.7),
    final=st.floats(0, 0.5),
)
def test_schedule_rises_then_never_rises_again(schedule, n_steps, warmup, decay, final):
    settings = OptimizerSettings(schedule=schedule, warmup_share=warmup, decay_share=decay, final_lr_share=final)
    shares = [learning_rate_share(settings, step, n_steps) for step in range(n_steps)]
    later = [learning_rate_share(settings, n_steps + more, n_steps) for more in (0, 1, n_steps, 10**6)]
    assert later == [shares[-1]] * 4
    top = round(warmup * n_steps)
    assert all(0 < share <= 1 + 1e-12 for share in shares)
    assert shares[:top] == sorted(shares[:top])
    assert shares[top:] == sorted(shares[top:], reverse=True)
    assert max(shares) == pytest.approx(1.0)


def test_schedule_ends_where_it_says():
    wsd = OptimizerSettings(schedule="wsd", warmup_share=0.1, decay_share=0.5)
    assert [round(learning_rate_share(wsd, step, 10), 2) for step in range(10)] == [
        1,
        1,
        1,
        1,
        1,
        1,
        0.8,
        0.6,
        0.4,
        0.2,
    ]
    cosine = OptimizerSettings(schedule="cosine", warmup_share=0.0, final_lr_share=0.1)
    assert learning_rate_share(cosine, 1000, 1001) == pytest.approx(0.1, abs=1e-3)


def test_precision_is_what_the_machine_does(monkeypatch):
    from groundup.training import precision

    monkeypatch.setattr(precision, "cpu_features", lambda: "avx2 avx512_bf16")
    native_bfloat16.cache_clear()
    assert choose_precision("auto") == (torch.bfloat16, "AVX512-BF16")
    assert choose_precision("float32")[0] == torch.float32
    monkeypatch.setattr(precision, "cpu_features", lambda: "avx2")
    native_bfloat16.cache_clear()
    assert choose_precision("auto")[0] == torch.float32
    dtype, reason = choose_precision("bfloat16")
    assert dtype == torch.bfloat16
    assert "slow" in reason
    native_bfloat16.cache_clear()


def test_log_takes_back_what_comes_after_the_checkpoint(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add("metrics", {"step": step, "loss": 1.0 / step})
        log.add("metrics", {"step": step, "val_loss": 2.0})
        log.add("samples", {"step": step, "text": "x"})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 4, "lo')  # killed in the middle of a line
    MetricLog(tmp_path, 2).close()
    kept = read_log(tmp_path / "metrics.jsonl")
    # The validation pass that follows step 2 is done again; its training line stays.
    assert [(line["step"], "loss" in line) for line in kept] == [(1, True), (1, False), (2, True)]
    assert [line["step"] for line in read_log(tmp_path / "samples.jsonl")] == [1]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("damage", [b"{", b"5", b'{"loss": 1}', b'{"step": "1"}', b"\xff", b"[" * 10**5])
def test_a_damaged_line_within_a_log_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b"\n")
    assert read_log(path) == [{"step": 1}]  # the last one: a kill may have cut it
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl, line 2: damaged"):
        read_log(path)


def test_padding_changes_nothing():
    config = preset("ground-nano")
    model = Transformer(config)
    row = {"ids": torch.arange(1, 8).numpy(), "targets": torch.arange(2, 9).numpy()}
    long = {"ids": torch.arange(20).numpy(), "targets": torch.arange(1, 21).numpy()}
    ids, targets = pad_rows([row], 1).values()
    alone = model(ids, head=head_loss(targets)).nats
    ids, targets = pad_rows([row, long], 3).values()
    padded = model(ids[:1], head=head_loss(targets[:1])).nats
    assert padded.item() == pytest.approx(alone.item(), rel=1e-5)
    assert model(ids[2:], head=head_loss(targets[2:])).nats.item() == 0.0
