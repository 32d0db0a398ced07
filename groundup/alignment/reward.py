"""A reward model: one number for an answer, learned from what people prefer (arXiv:2203.02155, section 3.5, step 2).

A head reads the score s(x, y) off the hidden state of the answer's end token. Of k answers to one prompt, ranked, every
pair is compared, and all pairs of a prompt are one element of the batch, so that a prompt is not learned k − 1 times:

    L = mean over prompts of  1 / C(k, 2) Σ_{i better than j} −log σ(s_i − s_j) + centering · (s_i + s_j)²

Only differences are learned, so the scores that come out are shifted and scaled to mean 0 and standard deviation 1 over
the answers that it learned from. Longer answers are often preferred, and a reward model learns that first: the report
says how much of it follows the length.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from groundup.alignment.heads import HeadMethod, at_ends, load_with_head, outputs_of
from groundup.alignment.losses import bradley_terry_loss
from groundup.alignment.method import Inputs, reported, share, share_with_error
from groundup.alignment.preferences import FACTS, Encoded, PreferenceRows, Preferences, PreferenceSettings
from groundup.model import ModelConfig
from groundup.recipe import setting
from groundup.tokenizer import Message, render
from groundup.training import Batch, Term, TrainingJob, pass_flops

NORMALIZED_OVER = 2048
"""Answers whose scores the finished model's are shifted and scaled by."""


class RewardSettings(PreferenceSettings):
    """A model and preferences to a reward model."""

    without = ("label_smoothing", "z_loss")

    margin: float = setting(0.0, "by how much the better answer's score should be higher", ge=0.0)
    centering: float = setting(0.0, "weight of (s_i + s_j)², which keeps scores around 0 (0.01 is usual)", ge=0.0)


@dataclass(frozen=True)
class PairwiseRanking:
    """The objective: Bradley-Terry over all pairs of a prompt; `accuracy`, `best` and `worst` (scores) are shown."""

    settings: RewardSettings

    def counts(self, batch: Batch) -> dict[str, float]:
        """Prompts."""
        n = int((batch["ends"] >= 0).any(-1).sum())
        return dict.fromkeys(("loss", "accuracy", "best", "worst"), n)

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One forward pass over all answers together."""
        is_there = batch["ends"] >= 0
        scores = score_batch(modules, batch)  # (rows, answers)
        better, worse = torch.combinations(torch.arange(scores.shape[1], device=scores.device)).T
        counts = is_there[:, better] & is_there[:, worse]  # (rows, pairs)
        weights = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        margin, centering = self.settings.margin, self.settings.centering
        each = bradley_terry_loss(scores[:, better], scores[:, worse], margin=margin, centering=centering)
        loss = (each * weights).sum()
        ahead = ((scores[:, better] > scores[:, worse]) * weights).sum()
        last = scores.gather(1, (is_there.sum(-1, keepdim=True) - 1).clamp(min=0))[:, 0]
        best, worst = (values.where(is_there.any(-1), 0.0).sum() for values in (scores[:, 0], last))
        return {"loss": Term(loss, loss.detach()), **reported(accuracy=ahead, best=best, worst=worst)}

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        """A forward and a backward pass over each answer; the head's are nothing beside them."""
        return pass_flops(config, lengths)


def score_batch(modules: Mapping[str, nn.Module], batch: Batch) -> Float[Tensor, "rows answers"]:
    """Scores of a batch's answers, not normalized; 0 where there is none."""
    is_there: Bool[Tensor, "rows answers"] = batch["ends"] >= 0
    taken = is_there.clone()
    taken[0, 0] |= ~is_there.any()  # every process makes a pass
    hidden = modules["model"](batch["ids"][taken], head=at_ends(batch["ends"][taken].clamp(min=0)))
    found = modules["head"](hidden)[:, 0]
    return torch.zeros(taken.shape, device=found.device).index_put(taken.nonzero(as_tuple=True), found) * is_there


def ranking_figures(scores: Sequence[Sequence[float]], chosen: Sequence[Encoded]) -> dict[str, float]:
    """How often the better answer has the higher score, and how much scores follow length.

    The standard error is over prompts: pairs of one prompt are not independent.

    Args:
        scores: of every prompt's answers.
        chosen: the answers in tokens, the best first.
    """
    lengths = [[len(ids) for ids, _ in one.texts] for one in chosen]
    right, longer = [], []
    for one in zip(scores, lengths, strict=True):
        pairs = [*itertools.combinations(zip(*one, strict=True), 2)]  # of (score, length), the better answer's first
        right.append(np.mean([(better > worse) + 0.5 * (better == worse) for (better, _), (worse, _) in pairs]))
        longer += [(m > n, (m > n) == (better > worse)) for (better, m), (worse, n) in pairs if m != n]
    figures = share_with_error("pair_accuracy", np.array(right))
    both = np.array([[*itertools.chain.from_iterable(part)] for part in (scores, lengths)])
    if both.std(axis=1).min() > 0:
        figures["length_correlation"] = float(np.corrcoef(both)[0, 1])
    if longer:
        figures["longer_preferred"], figures["longer_scored_higher"] = np.mean(longer, axis=0).tolist()
    return figures


class Scorer(nn.Module):
    """A finished reward model.

    Args:
        folder: the stage's: `runs/demo/reward`.

    Attributes:
        model, tokenizer, head: its parts.
        mean, std: of the scores of the answers that it learned from.

    Raises:
        ArtifactError: missing, damaged, or no reward model.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.model, self.tokenizer, self.head, values = load_with_head(folder, "scorer")
        self.mean, self.std = float(values["mean"]), float(values["std"])

    @classmethod
    def load(cls, folder: str | Path) -> Scorer:
        """A stage's, from its folder."""
        return cls(folder)

    def forward(self, ids: Int[Tensor, "rows seq"], lengths: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Normalized scores of padded texts, each read at its last token."""
        return (self.head(self.model(ids, head=at_ends(lengths - 1)))[:, 0] - self.mean) / self.std

    def scores(self, talks: Sequence[Sequence[Message]]) -> Float[Tensor, " talks"]:
        """Normalized scores of conversations, each of which ends with the answer that is scored."""
        texts = [render(self.tokenizer, talk) for talk in talks]
        return self.scores_of_ids([text.ids[: text.n_answered] for text in texts])

    def scores_of_ids(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, " texts"]:
        """The same of texts in tokens, prompt and answer, read at the last one: the end token, where there is one."""
        return (outputs_of(self.model, self.head, texts)[:, 0] - self.mean) / self.std


class RewardMethod(HeadMethod):
    """The stage: a reward model."""

    name = "reward"
    settings = RewardSettings
    version = 3
    makes = "scorer"
    figures = ("val_loss", "val_accuracy", "final_loss", "pair_accuracy", "length_correlation")
    row_sequences = 2
    saved = (("mean", "score_mean"), ("std", "score_std"))
    title = "Reward model"
    facts = (
        *FACTS,
        ("scores the better answer higher", share("pair_accuracy")),
        ("correlation of score and length", "{length_correlation:+.2f}"),
        ("the longer answer is the better one", "{longer_preferred:.1%} of pairs"),
        ("the longer answer has the higher score", "{longer_scored_higher:.1%} of pairs"),
    )
    lines = ("{preferences_train:,} preferences", "loss {initial_loss:.2f} → {final_loss:.2f}", share("pair_accuracy"))
    curves = ("accuracy", "best", "worst")

    def job(self, inputs: Inputs, *, preferences: Preferences | None = None) -> TrainingJob:  # type: ignore[override]
        """Pairs and rankings (default: what `settings.data` names), and a head that scores them."""
        source = PreferenceRows.of_stage(inputs, preferences, Preferences.ranked, for_scores=True)
        objective, n_rows = PairwiseRanking(inputs.settings), inputs.settings.epochs * len(source.train)
        return self.head_job(inputs, 1, objective, source, n_rows, unit="prompts", row_sequences=source.most_answers)

    def measure(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> dict[str, Any]:
        """What scores are normalized by, and how they rank held-out answers."""
        source: Any = job.source

        def scores(chosen: Sequence[Encoded]) -> list[list[float]]:
            texts = [ids.tolist() for one in chosen for ids, _ in one.texts]
            found = iter(outputs_of(job.model, job.modules["head"], texts)[:, 0].tolist())
            return [[next(found) for _ in one.texts] for one in chosen]

        scored = source.train[: max(2, NORMALIZED_OVER // source.most_answers)]
        learned = torch.tensor(list(itertools.chain.from_iterable(scores(scored))))
        mean, std = float(learned.mean()), max(float(learned.std()), 1e-6)
        held_out = [[(score - mean) / std for score in one] for one in scores(source.held_out)]
        ranked = ranking_figures(held_out, source.held_out)
        return {**source.figures(), "score_mean": mean, "score_std": std, **ranked}


REWARD = RewardMethod()
train_reward = REWARD.train
