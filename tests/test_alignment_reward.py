"""Reward models and classifiers: what is minimized, what is measured, and the laws that every training has."""

from __future__ import annotations

import itertools
import json
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
from alignment_runs import COLOURS, data, model, records, run, tokenizer
from pydantic import ValidationError
from test_alignment_dpo import ENVIRONMENT, WORKER, steps

from groundup.alignment.classify import (
    Classifier,
    ClassifySettings,
    Labelled,
    LabelledRows,
    classification_figures,
    load_labelled,
)
from groundup.alignment.distill import DistillSettings
from groundup.alignment.heads import Head, outputs_of
from groundup.alignment.online_dpo import OnlineDPOSettings
from groundup.alignment.ppo import PPOSettings, ppo
from groundup.alignment.preferences import Encoded, PreferenceRows, load_preferences
from groundup.alignment.reward import PairwiseRanking, RewardSettings, Scorer, ranking_figures, score_batch
from groundup.errors import ArtifactError, DataError
from groundup.interop import load_model
from groundup.tokenizer import Tokenizer, render
from groundup.training.process import limited_threads

RANKED = [
    {"prompt": f"Say {n}", "ranking": ["a " * (n % 3 + 1), "b", "c " * (n % 2 + 1), "d"][: 2 + n % 3]}
    for n in range(40)
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PreferenceRows:
    preferences = load_preferences([data(tmp_path_factory.mktemp("rows"), RANKED)], "align.reward")
    return PreferenceRows(preferences, tokenizer(), 64, seed=1, for_scores=True)


def test_all_pairs_of_a_prompt_weigh_as_one(rows: PreferenceRows) -> None:
    """Rankings of two, three and four, against −log σ of every pair, written out; empty rows do not count."""
    modules = {"model": model(), "head": Head(model().config.d_model, seed=3)}
    chosen = rows.train[:7]
    assert {len(one.texts) for one in chosen} == {2, 3, 4}
    batch = rows.lay_out(chosen, 9)
    assert batch["ids"].shape[:2] == (9, 4)
    wanted, right = 0.0, 0.0
    for one in chosen:
        scores = []
        for ids, _ in one.texts:
            assert ids[-1] == tokenizer().end_id
            with torch.no_grad():
                hidden = modules["model"](torch.from_numpy(ids)[None], head=lambda hidden, output: hidden)[0, -1]
                scores.append(float(modules["head"](hidden)))
        pairs = [*itertools.combinations(scores, 2)]
        wanted += sum(math.log1p(math.exp(-(i - j))) for i, j in pairs) / len(pairs)
        right += sum(i > j for i, j in pairs) / len(pairs)
    objective = PairwiseRanking(RewardSettings(data="x"))
    terms, counts = objective.terms(modules, batch), objective.counts(batch)
    assert set(counts.values()) == {7}
    assert counts.keys() == terms.keys()
    assert float(terms["loss"].reported) == pytest.approx(wanted, abs=1e-4)
    assert float(terms["accuracy"].reported) == pytest.approx(right, abs=1e-4)
    with torch.no_grad():
        modules["head"].weight.zero_()
    assert float(objective.terms(modules, batch)["loss"].reported) == pytest.approx(7 * math.log(2), abs=1e-5)
    empty = rows.lay_out(chosen[:1], 3)
    assert float(objective.terms(modules, {name: part[1:] for name, part in empty.items()})["loss"].reported) == 0.0


def test_scores_do_not_depend_on_padding(rows: PreferenceRows) -> None:
    modules = {"model": model().eval(), "head": Head(model().config.d_model, seed=3)}
    with torch.no_grad():
        alone = [score_batch(modules, rows.lay_out([one]))[0] for one in rows.train[:5]]
        together = score_batch(modules, rows.lay_out(rows.train[:5], 6))
    for row, scores in enumerate(alone):
        torch.testing.assert_close(together[row, : len(scores)], scores, atol=1e-5, rtol=1e-4)
    texts = [ids.tolist() for one in rows.train[:5] for ids, _ in one.texts]
    found = outputs_of(modules["model"], modules["head"], texts)[:, 0]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_a_head_begins_as_the_literature_says() -> None:
    head = Head(4095, 50, seed=1)
    assert float(head.weight.detach().std()) == pytest.approx(1 / 64, rel=0.02)
    assert (head.bias == 0).all()
    assert torch.equal(head.weight, Head(4095, 50, seed=1).weight)
    assert not torch.equal(head.weight, Head(4095, 50, seed=2).weight)


def test_a_reward_model_learns_and_says_what_it_learned(tmp_path: Path) -> None:
    before = run("reward", tmp_path / "before", epochs=0.1, lr=1e-6).summary
    assert 0.2 < before["pair_accuracy"] < 0.8
    trained = run("reward", tmp_path / "after", epochs=3.0)
    summary = trained.summary
    assert summary["pair_accuracy"] > 0.9
    assert summary["pair_accuracy_n"] == summary["preferences_held_out"]
    assert summary["longer_preferred"] == 1.0  # a polite answer is always longer
    assert summary["length_correlation"] > 0.3
    scorer = Scorer.load(tmp_path / "after" / "out")
    talks = [
        [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": one[side]}]
        for one in records()
        for side in ("chosen", "rejected")
    ]
    scores = scorer.scores(talks)  # type: ignore[arg-type]
    assert abs(float(scores.mean())) < 0.2
    assert float(scores.std()) == pytest.approx(1, abs=0.2)
    polite = scores.view(-1, 2)
    assert float((polite[:, 0] > polite[:, 1]).float().mean()) > 0.9
    ids = [render(tokenizer(), talk).ids for talk in talks[:3]]  # type: ignore[arg-type]
    torch.testing.assert_close(scorer.scores_of_ids(ids), scores[:3], atol=1e-5, rtol=1e-4)
    with pytest.raises(ArtifactError, match="is a scorer, not a classifier"):
        Classifier.load(tmp_path / "after" / "out")
    loaded, _ = load_model(tmp_path / "after" / "out" / "model")
    assert loaded.lm_head is not None
    stranger, settings = Tokenizer.train(["Other words."], vocab_size=300), PPOSettings(reward="rm", examples=100)
    with pytest.raises(DataError, match=r"\[align\.ppo\] reward = 'rm': the reward model has another tokenizer"):
        ppo(model(context_length=256), stranger, settings, reward=scorer, out=tmp_path / "ppo")


def test_figures_of_rankings() -> None:
    text = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    long = np.zeros(9, dtype=np.int64), np.zeros(9, dtype=np.int64)
    chosen = [Encoded([long, text]), Encoded([text, long]), Encoded([long, text, text])]
    found = ranking_figures([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0, 1.0]], chosen)
    assert found["pair_accuracy"] == pytest.approx((1 + 0 + 2.5 / 3) / 3)
    assert found["pair_accuracy_stderr"] == pytest.approx(np.std([1, 0, 2.5 / 3], ddof=1) / math.sqrt(3))
    assert found["longer_preferred"] == pytest.approx(3 / 4)
    assert found["longer_scored_higher"] == 1.0
    assert found["length_correlation"] > 0.5


# Classifier


def labelled(path: Path, rows: list[Any], **settings: Any) -> Labelled:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return load_labelled(ClassifySettings(data=str(path), **settings), "align.classify")


def test_labelled_texts_from_csv_and_json(tmp_path: Path) -> None:
    lines = [
        "Label,Text",
        *(f'{"spam" if n % 2 else "ham"},"text, number {n}"' for n in range(60)),
        "ham",
        ",x",
        "spam, ",
    ]
    found = labelled(tmp_path / "a.csv", lines, text_field="Text", label_field="Label")
    assert found.labels == ["ham", "spam"]
    assert len(found.train) + len(found.held_out) == 60
    assert found.set_aside == {"no text field": 1, "empty": 2}
    assert all(label == ("spam" if int(text.split()[-1]) % 2 else "ham") for text, label in found.train)
    records = [json.dumps({"text": f"number {n}", "label": n % 3}) for n in range(60)]
    again = labelled(tmp_path / "a.jsonl", [*records, '{"text": "x", "label": 1', '{"text": "x", "label": [1]}'])
    assert again.labels == ["0", "1", "2"]
    assert again.set_aside == {"invalid JSON": 1, "no text field": 1}
    assert len(labelled(tmp_path / "b.jsonl", records, limit=7).train) == 7
    with pytest.raises(DataError, match="with 1 labels"):
        labelled(tmp_path / "c.jsonl", [json.dumps({"text": f"a {n}", "label": "x"}) for n in range(50)])
    with pytest.raises(DataError, match=r"with 0 labels(.|\n)*there is: 'Label', 'Text'"):
        labelled(tmp_path / "d.csv", lines)


def test_a_classifier_reads_the_last_real_token(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "word " * (n % 7 + 1) + str(n), "label": str(n % 2)}) for n in range(40)]
    source = LabelledRows(labelled(tmp_path / "a.jsonl", rows), tokenizer(), 24, seed=1)
    assert source.cut
    batch = source.rows(0, 8)
    for row in range(8):
        end = int(batch["ends"][row])
        assert batch["ids"][row, 0] == tokenizer().end_of_text_id
        assert (batch["ids"][row, end + 1 :] == tokenizer().pad_id).all()
        assert batch["ids"][row, end] != tokenizer().pad_id
    assert batch["ids"].shape[1] <= 24


def test_a_classifier_learns_beside_the_majority(tmp_path: Path) -> None:
    trained = run("classify", tmp_path, epochs=6.0)
    summary = trained.summary
    assert summary["labels"] == sorted(COLOURS)
    assert summary["accuracy"] > 0.9 > summary["majority_accuracy"]
    assert np.sum(summary["confusion"]) == summary["texts_held_out"] == summary["accuracy_n"]
    classifier = Classifier.load(tmp_path / "out")
    texts = [f"{one['prompt']} {one['chosen']}" for one in records()]
    said = classifier.classify(texts)
    assert np.mean([colour in text for colour, text in zip(said, texts, strict=True)]) > 0.9
    torch.testing.assert_close(classifier.probabilities(texts).sum(-1), torch.ones(len(texts)))


def test_figures_of_classifications() -> None:
    """Four texts: right and sure, right, wrong and sure, wrong."""
    probabilities = np.array([[0.95, 0.05], [0.65, 0.35], [0.05, 0.95], [0.55, 0.45]])
    found = classification_figures(probabilities, np.array([0, 0, 0, 1]))
    assert found["accuracy"] == 0.5
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert found["confusion"] == [[2, 1], [1, 0]]
    assert found["calibration_error"] == pytest.approx((abs(1 - 1.9) + abs(1 - 0.65) + abs(0 - 0.55)) / 4)
    brier = [2 * 0.05**2, 2 * 0.35**2, 2 * 0.95**2, 2 * 0.55**2]
    assert found["brier"] == pytest.approx(sum(brier) / 4)


# Laws of training


@pytest.mark.parametrize("kind", ["reward", "classify"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, kind: str, lora: dict[str, int] | None) -> None:
    options: dict[str, Any] = {"checkpoint_seconds": 0.0, "lora": lora, "epochs": 1.0}
    with limited_threads(1):
        whole = run(kind, tmp_path / "whole", **options)
    at = random.Random(os.urandom(8)).randrange(2, 10)
    arguments = [sys.executable, str(WORKER), kind, str(tmp_path / "parts"), "kill", str(at), json.dumps(options)]
    done = subprocess.run(arguments, env=ENVIRONMENT, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, at
    with limited_threads(1):
        again = run(kind, tmp_path / "parts", **options)
    assert (tmp_path / "parts/out/metrics.jsonl").read_bytes() == (tmp_path / "whole/out/metrics.jsonl").read_bytes()
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), (name, at)
    heads = [(tmp_path / name / "out/head/head.safetensors").read_bytes() for name in ("whole", "parts")]
    assert heads[0] == heads[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reward", "classify"])
def test_two_processes_do_what_one_does(tmp_path: Path, kind: str) -> None:
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        arguments = [sys.executable, *launch, str(WORKER), kind, str(tmp_path / name), '{"epochs": 0.5}']
        subprocess.run(arguments, env=ENVIRONMENT, timeout=200, check=True, capture_output=True)
    for one, other in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (RewardSettings, {"z_loss": 1e-4, "label_smoothing": 0.1}, "label_smoothing, z_loss: would do nothing"),
        (ClassifySettings, {"data": "x", "z_loss": 1e-4}, "z_loss: would do nothing"),
        (ClassifySettings, {"data": "x", "safety": True, "text_field": "said"}, "no text_field"),
        (OnlineDPOSettings, {"label_smoothing": 0.1}, "label_smoothing: would do nothing"),
        (PPOSettings, {"eval_tokens": 9, "keep_best": True}, "eval_tokens, keep_best: would do nothing"),
        (DistillSettings, {"z_loss": 1e-4}, "label_smoothing and z_loss are of answers"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(kind: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        kind(**settings)
    assert ClassifySettings(data="x", label_smoothing=0.1)
    assert DistillSettings(level="sequence", prompts="x", z_loss=1e-4)
