"""DPO and its kin: what is minimized, that it learns, resumes to the bit, and does not depend on the layout."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alignment_runs import QUIET, data, model, run, tokenizer
from pydantic import ValidationError
from safetensors.torch import load_file

from groundup.alignment import losses
from groundup.alignment.dpo import DPOSettings, PreferenceLoss, answer_logprobs, train_dpo
from groundup.alignment.preferences import PreferenceRows, load_preferences
from groundup.distributed import current_world
from groundup.interop import load_model
from groundup.training import IGNORED
from groundup.training.metrics import read_log
from groundup.training.process import limited_threads

WORKER = Path(__file__).with_name("alignment_runs.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
}


def steps(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_log(folder / "out" / "metrics.jsonl") if "lr" in line]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PreferenceRows:
    preferences = load_preferences([data(tmp_path_factory.mktemp("rows"))], "align.dpo")
    return PreferenceRows(preferences.pairs(), tokenizer(), 64, seed=1)


# What is minimized


def test_terms_are_the_losses_of_every_pair(rows: PreferenceRows) -> None:
    """Against log-probabilities of one answer at a time, without padding."""
    policy, reference = model(), model()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    chosen = rows.held_out[:3]
    found = [answer_logprobs(one, rows, chosen, current_world()) for one in (policy, reference)]

    def alone(one: torch.nn.Module, ids: np.ndarray, targets: np.ndarray) -> float:
        with torch.no_grad():
            logprobs = one(torch.from_numpy(ids)[None])[0].log_softmax(-1)
        return sum(float(logprobs[place, target]) for place, target in enumerate(targets) if target != IGNORED)

    for row, preference in enumerate(chosen):
        for side, text in enumerate(preference.texts):
            for one, values in zip((policy, reference), found, strict=True):
                assert values[row, side] == pytest.approx(alone(one, *text), abs=1e-4)
    rows.held_out[:3] = [type(one)(one.texts, None, values) for one, values in zip(chosen, found[1], strict=True)]
    batch = rows.lay_out(rows.held_out[:3], 5)  # two rows are empty
    ratios = torch.from_numpy(found[0] - found[1])
    lengths = torch.tensor([[(targets != IGNORED).sum() for _, targets in one.texts] for one in chosen])
    wanted = {
        "dpo": losses.dpo_loss(*ratios.T, beta=0.1),
        "ipo": losses.ipo_loss(*(ratios / lengths).T, beta=0.1),
        "hinge": losses.hinge_loss(*ratios.T, beta=0.1),
        "simpo": losses.simpo_loss(*(torch.from_numpy(found[0]) / lengths).T, beta=0.1, gamma=0.5),
        "orpo": 0.1 * losses.orpo_loss(*(torch.from_numpy(found[0]) / lengths).T),
        "robust": losses.robust_dpo_loss(*ratios.T, beta=0.1, label_smoothing=0.2),
    }
    for name, each in wanted.items():
        smoothing = {"label_smoothing": 0.2} if name == "robust" else {}
        objective = PreferenceLoss(DPOSettings(data="x", loss=name, **smoothing))
        counts, terms = objective.counts(batch), objective.terms({"model": policy}, batch)
        assert counts["loss"] == counts["accuracy"] == 3
        assert counts.keys() == terms.keys()
        torch.testing.assert_close(terms["loss"].total, each.sum(), atol=1e-4, rtol=1e-5)
        assert ("nll" in terms) == (name == "orpo")
        if name == "orpo":
            assert float(terms["nll"].reported) == pytest.approx(-found[0][:, 0].sum(), abs=1e-3)
            assert counts["nll"] == lengths[:, 0].sum()
        if name == "dpo":
            assert float(terms["chosen"].reported) == pytest.approx(float(ratios[:, 0].sum()), abs=1e-4)
            assert float(terms["margin"].total) == pytest.approx(
                0.1 * float((ratios[:, 0] - ratios[:, 1]).sum()), abs=1e-4
            )


def test_at_first_the_loss_is_ln_2_and_the_gradient_is_not_zero(tmp_path: Path) -> None:
    for kind, wanted in (("dpo", math.log(2)), ("dpo-lora", math.log(2)), ("kto", 0.5)):
        run(kind, tmp_path / kind, epochs=0.1, lora={"rank": 4} if kind == "dpo-lora" else None)
        first = steps(tmp_path / kind)[0]
        assert first["loss"] == pytest.approx(wanted, abs=1e-5)
        assert first["grad_norm"] > 1e-3
        if kind != "kto":
            assert first["chosen"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dpo", {}), ("dpo", {"loss": "ipo"}), ("dpo", {"loss": "hinge"}), ("dpo", {"loss": "simpo", "beta": 2.0}),
        ("dpo", {"loss": "orpo"}), ("dpo", {"loss": "robust", "label_smoothing": 0.1}), ("dpo", {"nll_weight": 1.0}),
        ("dpo-lora", {}), ("dpo", {"lora": {"rank": 4, "base_bits": 8}, "lr": 1e-2}), ("kto", {}),
    ],
)  # fmt: skip
def test_it_learns_what_is_preferred(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    trained = run(kind, tmp_path, **more)
    summary = trained.summary
    if kind == "kto":
        assert summary["val_accuracy"] > 0.9
    else:
        assert summary["preference_accuracy"] > 0.9
        assert 0 <= summary["preference_accuracy_stderr"] < 0.2
        assert summary["preference_accuracy_n"] == summary["preferences_held_out"]
    loaded, _ = load_model(tmp_path / "out" / "model")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), trained.model.eval()(ids), atol=1e-5, rtol=1e-5)
    has_adapter = bool({**more}.get("lora")) or kind == "dpo-lora"
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists() == has_adapter
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_flops_count_the_reference(tmp_path: Path) -> None:
    """Three parts of training and one of the reference for every answer, in one epoch."""
    with_reference, without = (
        run("dpo", tmp_path / loss, loss=loss, epochs=1.0).summary["flops"] for loss in ("dpo", "simpo")
    )
    assert 1.2 < with_reference / without < 1.4


# Laws of training


@pytest.mark.parametrize("kind", ["dpo", "dpo-lora"])
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    with limited_threads(1):
        whole = run(kind, tmp_path / "whole", checkpoint_seconds=0.0)
    at = random.Random(os.urandom(8)).randrange(2, 20)
    options = '{"checkpoint_seconds": 0.0}'
    arguments = [sys.executable, str(WORKER), kind, str(tmp_path / "parts"), "kill", str(at), options]
    done = subprocess.run(arguments, env=ENVIRONMENT, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, at
    checkpoints = sorted((tmp_path / "parts" / "out" / "checkpoints").glob("step-*"))
    if kind == "dpo-lora" and checkpoints:  # of adapters alone
        names = load_file(checkpoints[-1] / "weights.safetensors")
        assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    with limited_threads(1):
        again = run(kind, tmp_path / "parts", checkpoint_seconds=0.0)
    assert (tmp_path / "parts/out/metrics.jsonl").read_bytes() == (tmp_path / "whole/out/metrics.jsonl").read_bytes()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), (name, at)


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    for name, micro in (("whole", 8), ("parts", 2)):
        run("dpo", tmp_path / name, micro_batch_size=micro, nll_weight=0.5, epochs=0.5)
    for one, other in zip(steps(tmp_path / "whole"), steps(tmp_path / "parts"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "dpo-lora"])
def test_two_processes_do_what_one_does(tmp_path: Path, kind: str) -> None:
    options = '{"epochs": 0.5, "lora": null}' if kind == "dpo" else '{"epochs": 0.5, "lora": {"rank": 4}}'
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        arguments = [sys.executable, *launch, str(WORKER), kind, str(tmp_path / name), options]
        subprocess.run(arguments, env=ENVIRONMENT, timeout=200, check=True, capture_output=True)
    for one, other in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=2e-4)
    weights = [load_file(tmp_path / name / "out" / "model" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=2e-3, rtol=1e-2)


def test_real_pairs(tmp_path: Path, shared_data: Path) -> None:
    """Of people: instructions, ranked trees, long conversations that lose turns."""
    for name in ("instruct/oasst_sample/oasst_ranked_pairs.jsonl", "preference/hh_harmless/pairs.jsonl.gz"):
        path = shared_data / name
        found = load_preferences([str(path)], "align.dpo", limit=8)
        few = type(found)(found.train, found.held_out[:4], found.set_aside)
        made, settings = model(context_length=1024), DPOSettings(data=str(path), batch_size=4, precision="float32")
        out = tmp_path / path.stem
        summary = train_dpo(
            made, tokenizer(), settings, out=out, preferences=few, world=current_world(), console=QUIET
        ).summary
        assert math.isfinite(summary["final_loss"])
        assert summary["preferences_train"] + summary["preferences_held_out"] + summary["preferences_left_out"] == 12
        assert summary["preferences_left_out"] < 8


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gamma": 1.0}, "gamma: not of"),
        ({"loss": "robust"}, "needs label_smoothing"),
        ({"loss": "ipo", "label_smoothing": 0.1, "desirable_weight": 2.0}, "label_smoothing, desirable_weight"),
        ({"loss": "kto", "nll_weight": 0.5}, "nll_weight: not of loss"),
        ({"z_loss": 1e-4}, "z_loss"),
        ({"beta": 0.0}, "greater than 0"),
        ({"loss": "dpp"}, "dpp"),
        ({"lora": {"ranks": 3}}, "ranks"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DPOSettings(data="x", **settings)
