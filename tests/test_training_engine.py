"""Averages, ramps, recomputed activations, float16's scale, checkpoints beside training, boards, the collector."""

import gc
import itertools
import json
import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training_loop import QUIET, interrupted_at, make_job, weights

from groundup.distributed import current_world
from groundup.errors import ArtifactError, GroundupError, Interrupted
from groundup.interop import load_model
from groundup.model import Transformer, preset
from groundup.recipe import OptimizerSettings
from groundup.training import forget_checkpoints, train
from groundup.training.compilation import set_checkpointing
from groundup.training.loop import Prefetcher, collections_between_steps
from groundup.training.metrics import read_log
from groundup.training.objective import head_loss
from groundup.training.optimizers import WeightAverage
from groundup.training.precision import FIRST_SCALE, GROWTH_STEPS, LossScaler
from groundup.training.schedule import BatchPlan, learning_rate_share


@given(
    batch_size=st.integers(1, 64), n_rows=st.integers(1, 2000), parts=st.integers(1, 8), share=st.floats(0.01, 1.0),
    has_ramp=st.booleans(),
)  # fmt: skip
def test_every_row_is_seen_once_and_batches_only_grow(batch_size, n_rows, parts, share, has_ramp):
    batch_size *= parts
    plan = BatchPlan(batch_size, n_rows, batch_size // parts if has_ramp else None, share)
    places = [plan.rows(step) for step in range(plan.n_steps)]
    assert places[0][0] == 0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(places))
    sizes = [last - first for first, last in places]
    assert sizes == sorted(sizes)
    assert all(size % (batch_size // parts) == 0 and size <= batch_size for size in sizes)
    assert n_rows <= places[-1][1] < n_rows + batch_size


def test_a_ramp_begins_small_and_ends_whole():
    plan = BatchPlan(32, 1000, 4, 0.5)
    sizes = [plan.rows(step)[1] - plan.rows(step)[0] for step in range(plan.n_steps)]
    assert (sizes[0], sizes[-1]) == (4, 32)
    assert plan.rows(plan.n_steps - 1)[1] >= 1000
    first_whole = plan.rows(sizes.index(32))[0]
    assert first_whole == pytest.approx(500, abs=32)


def test_a_ramped_run_is_resumed_to_the_same_bits(tmp_path):
    options = {"n_steps": 12, "batch_warmup_from": 1, "batch_warmup_share": 0.5}
    whole = make_job(tmp_path / "whole", **options)
    train(whole, current_world(), QUIET)
    with pytest.raises(Interrupted):
        train(interrupted_at(5, make_job(tmp_path / "parts", **options)), current_world(), QUIET)
    parts = make_job(tmp_path / "parts", **options)
    train(parts, current_world(), QUIET)
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(parts).items())


def test_the_linear_schedule_is_a_line():
    settings = OptimizerSettings(schedule="linear", warmup_share=0.0, final_lr_share=0.2)
    shares = [learning_rate_share(settings, step, 8) for step in range(8)]
    assert shares == pytest.approx([0.2 + 0.8 * (8 - step) / 8 for step in range(8)])


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("over", [{}, {"dropout": 0.3}, {"n_experts": 4}, {"attention": ("window",), "window": 4}])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_activations_change_no_bit(kind, over, packed):
    config = preset("ground-nano", **over)
    ids = torch.arange(60).view(2, 30) % config.vocab_size
    borders = {"documents": ids % 30 // 7, "positions": ids % 30 % 7} if packed else {}
    found = []
    for one in ("none", kind):
        model = Transformer(config).train()
        for place, parameter in enumerate(model.parameters()):
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(place))
        set_checkpointing(model, one)
        torch.manual_seed(3)
        loss = model(ids, head=head_loss(ids), **borders).objective
        balance = model.balance_loss()
        (loss if balance is None else loss + balance).backward()
        found.append((loss.item(), [parameter.grad for parameter in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def kept_bytes(kind: str) -> int:
    """What the backward pass is kept for, of a forward pass in training."""
    model = Transformer(preset("ground-nano", d_model=64, d_ff=256, n_layers=4)).train()
    set_checkpointing(model, kind)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    ids = torch.zeros((4, 64), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, head=lambda hidden, output: hidden.sum())
    return sum(kept.values())


def test_whoever_recomputes_keeps_less():
    none, full = kept_bytes("none"), kept_bytes("full")
    assert full < 0.25 * none


def test_the_average_is_the_formula_and_the_model_gets_it_back():
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    own = model.weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight.detach(), own)
    average.make_permanent()
    torch.testing.assert_close(model.weight.detach(), expected)


def test_an_average_of_another_model_is_refused():
    state = WeightAverage(torch.nn.Linear(3, 2), 0.9).state_dict()
    with pytest.raises(ArtifactError, match="another model"):
        WeightAverage(torch.nn.Linear(3, 2, bias=False), 0.9).load_state_dict(state)


@pytest.mark.parametrize(
    "options", [{"ema": 0.9}, {"precision": "float16"}, {"checkpoint_beside": True}, {"keep_best": True}]
)
def test_interrupted_and_resumed_is_bit_identical_with(tmp_path, options):
    whole = make_job(tmp_path / "whole", **options)
    train(whole, current_world(), QUIET)
    with pytest.raises(Interrupted):
        train(interrupted_at(6, make_job(tmp_path / "parts", **options)), current_world(), QUIET)
    parts = make_job(tmp_path / "parts", **options)
    train(parts, current_world(), QUIET)
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(parts).items())
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "parts" / "metrics.jsonl").read_bytes()


def test_as_many_checkpoints_stay_as_asked_for_and_the_best_model(tmp_path):
    job = make_job(tmp_path / "run", keep_checkpoints=3, keep_best=True)
    train(job, current_world(), QUIET)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert names == ["step-00000010", "step-00000011", "step-00000012"]
    forget_checkpoints(job, current_world())
    watched = {
        line["step"]: line["val_loss"] for line in read_log(tmp_path / "run" / "metrics.jsonl") if "val_loss" in line
    }
    best = json.loads((tmp_path / "run" / "best" / "state.json").read_text())
    assert best["val_loss"] == min(loss for step, loss in watched.items() if step)


def test_a_checkpoint_that_cannot_be_written_beside_training_is_an_error(tmp_path, monkeypatch):
    from groundup.training import checkpoint

    def full(*arguments):
        raise GroundupError("no space left")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(GroundupError, match="no space left"):
        train(make_job(tmp_path / "run", checkpoint_beside=True), current_world(), QUIET)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-????????"))


def test_the_scale_of_float16_falls_and_rises():
    scaler = LossScaler()
    assert not scaler.judge(math.inf)
    assert scaler.scale == FIRST_SCALE / 2
    assert all(scaler.judge(1.0) for _ in range(GROWTH_STEPS))
    assert scaler.scale == FIRST_SCALE
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), FIRST_SCALE)
    scaler.unscale([parameter])
    assert parameter.grad.tolist() == [1.0, 1.0]
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict()


def test_batches_are_made_ahead_in_another_thread_and_are_those_asked_for():
    threads = []

    def make(place):
        threads.append(threading.current_thread() is threading.main_thread())
        return place * 10

    with Prefetcher(make) as batches:
        assert batches.take(0, 1) == 0
        assert batches.take(1, 2) == 10
        assert batches.take(7, None) == 70  # went elsewhere than it was said
    assert threads[:2] == [True, False]


def test_a_batch_that_cannot_be_made_is_an_error_of_its_step():
    def make(place):
        if place == 1:
            raise GroundupError("no such row")
        return place

    with Prefetcher(make) as batches:
        assert batches.take(0, 1) == 0
        with pytest.raises(GroundupError, match="no such row"):
            batches.take(1, 2)


def test_the_collector_rests_within_steps_only():
    assert gc.isenabled()
    with collections_between_steps():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_figures_go_to_tensorboard_if_asked_for(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(make_job(tmp_path / "run", track=["tensorboard"]), current_world(), QUIET)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx(
        [line["loss"] for line in read_log(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    )


def test_a_board_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(GroundupError, match=r"track = 'trackio': not installed.\n.*pip install trackio"):
        train(make_job(tmp_path / "run", track=["trackio"]), current_world(), QUIET)


def test_a_checkpoint_and_the_best_model_can_be_loaded_as_models(tmp_path):
    job = make_job(tmp_path / "run", keep_best=True)
    train(job, current_world(), QUIET)
    ids = torch.arange(10)[None]
    loaded = load_model(tmp_path / "run" / "checkpoints" / "step-00000012")[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), job.model.eval()(ids))
    load_model(tmp_path / "run" / "best")
