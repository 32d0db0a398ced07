"""What a run does about trouble: skip, roll back, stop; and that it does the same when it was killed in between."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training_loop import QUIET, interrupted_at, make_job, weights

from groundup.distributed import current_world
from groundup.errors import ArtifactError, GroundupError, Interrupted
from groundup.training import TrainingJob, train
from groundup.training.metrics import read_log
from groundup.training.spikes import FEWEST, MOST_ROLLBACKS, MOST_SKIPPED_IN_A_ROW, WINDOW, SpikeDetector


def calm(guard: SpikeDetector, n: int = FEWEST) -> SpikeDetector:
    for number in range(n):
        assert guard.judge(3.0 + 0.1 * math.sin(number), 1.0) is None
    return guard


@pytest.mark.parametrize("action", ["skip", "rollback", "stop"])
@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf), (9.0, 1.0)]
)
def test_trouble_is_met_as_the_recipe_says(action, loss, norm):
    trouble = calm(SpikeDetector(action, 6.0)).judge(loss, norm)
    assert trouble is not None
    assert trouble.action == action
    assert ("not finite" in trouble.what) == (not (math.isfinite(loss) and math.isfinite(norm)))


def test_whoever_ignores_leaps_is_still_stopped_by_what_is_not_finite():
    guard = calm(SpikeDetector("ignore", 6.0))
    assert guard.judge(9.0, 1.0).action == "ignore"
    assert guard.judge(math.nan, 1.0).action == "stop"


def test_a_leap_needs_a_past_and_a_threshold():
    assert SpikeDetector("stop", 6.0).judge(1e6, 1.0) is None
    assert calm(SpikeDetector("stop", 0.0)).judge(1e6, 1.0) is None
    assert calm(SpikeDetector("stop", 6.0)).judge(3.2, 1.0) is None
    assert calm(SpikeDetector("stop", 6.0)).judge(2.0, 1.0) is None  # a fall is no trouble


def test_a_leap_does_not_enter_the_window_that_judges_the_next():
    guard = calm(SpikeDetector("skip", 6.0))
    assert all(guard.judge(20.0, 1.0).action == "skip" for _ in range(MOST_SKIPPED_IN_A_ROW))
    assert guard.judge(20.0, 1.0).action == "stop"
    again = calm(SpikeDetector("skip", 6.0))
    for _ in range(3 * MOST_SKIPPED_IN_A_ROW):  # not in a row
        assert again.judge(20.0, 1.0).action == "skip"
        assert again.judge(3.0, 1.0) is None
    assert again.skipped == 3 * MOST_SKIPPED_IN_A_ROW


@given(losses=st.lists(st.floats(0.1, 50.0), max_size=3 * WINDOW), cut=st.integers(0, 3 * WINDOW))
def test_a_guard_that_was_saved_judges_as_one_that_was_not(losses, cut):
    whole, first = SpikeDetector("skip", 3.0), SpikeDetector("skip", 3.0)
    verdicts = [whole.judge(loss, 1.0) for loss in losses]
    begun = [first.judge(loss, 1.0) for loss in losses[:cut]]
    second = SpikeDetector("skip", 3.0)
    second.load_state_dict(first.state_dict())
    assert begun + [second.judge(loss, 1.0) for loss in losses[cut:]] == verdicts
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("state", [{}, {"losses": 3}, {"losses": [1.0], "skipped": "x", "rollbacks": 0, "in_a_row": 0}])
def test_a_damaged_state_is_refused(state):
    with pytest.raises(ArtifactError, match="loss-spike state is damaged"):
        SpikeDetector("skip", 3.0).load_state_dict(state)


def poisoned(job: TrainingJob, *at: int) -> TrainingJob:
    """The job, whose model gives numbers that are none in some of its training passes."""
    passes = itertools.count()

    def poison(module, arguments, hidden):
        if module.training and next(passes) in at:
            return hidden * float("nan")
        return hidden

    job.model.layers[1].register_forward_hook(poison)
    return job


def losses_of(folder) -> list[float | None]:
    return [line["loss"] for line in read_log(folder / "metrics.jsonl") if "loss" in line]


def test_a_skipped_step_leaves_the_weights_as_they_were(tmp_path):
    job = poisoned(make_job(tmp_path / "a", n_steps=1, on_spike="skip"), 0)
    before = weights(job)
    summary = train(job, current_world(), QUIET)
    assert summary["skipped_steps"] == 1
    assert all(torch.equal(before[name], value) for name, value in weights(job).items())


def test_a_run_that_skips_goes_on_and_ends(tmp_path):
    summary = train(poisoned(make_job(tmp_path / "a", on_spike="skip"), 4), current_world(), QUIET)
    losses = losses_of(tmp_path / "a")
    assert len(losses) == 12
    assert losses[4] is None or math.isnan(losses[4])
    assert summary["steps"] == 12
    assert math.isfinite(summary["final_loss"])


def test_a_rollback_goes_back_and_around_the_batch(tmp_path):
    job = make_job(tmp_path / "a", on_spike="rollback", checkpoint_seconds=1e9)  # checkpoints at 5 and 10 only
    summary = train(poisoned(job, 7), current_world(), QUIET)  # step 8 of 12
    assert summary["rollbacks"] == 1
    lines = [line for line in read_log(tmp_path / "a" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    calm_run = make_job(tmp_path / "b", checkpoint_seconds=1e9)
    train(calm_run, current_world(), QUIET)
    straight = losses_of(tmp_path / "b")
    ours = [line["loss"] for line in lines]
    assert ours[:5] == straight[:5]
    assert ours[5] != straight[5]  # batches 5, 6 and 7 were passed over
    assert ours[5] == pytest.approx(straight[5], abs=1.0)


def test_a_rollback_before_any_checkpoint_stops(tmp_path):
    job = poisoned(make_job(tmp_path / "a", on_spike="rollback", checkpoint_seconds=1e9), 2)
    with pytest.raises(GroundupError, match="before the first checkpoint"):
        train(job, current_world(), QUIET)


def test_a_model_that_is_broken_for_good_is_given_up(tmp_path):
    job = make_job(tmp_path / "a", on_spike="rollback", checkpoint_seconds=0.0)
    with pytest.raises(GroundupError, match=f"rolled back {MOST_ROLLBACKS} times"):
        train(poisoned(job, *range(6, 100)), current_world(), QUIET)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_killed_after_trouble_the_run_ends_with_the_same_bits(tmp_path, action):
    options = {"on_spike": action, "checkpoint_seconds": 1e9}
    whole = poisoned(make_job(tmp_path / "whole", **options), 7)
    train(whole, current_world(), QUIET)
    parts = interrupted_at(9, poisoned(make_job(tmp_path / "parts", **options), 7))
    with pytest.raises(Interrupted):
        train(parts, current_world(), QUIET)
    again = make_job(tmp_path / "parts", **options)
    train(again, current_world(), QUIET)
    expected = weights(whole)
    assert all(torch.equal(expected[name], value) for name, value in weights(again).items())
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
