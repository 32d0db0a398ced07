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
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import model_validator
from torch import Tensor, nn

from groundup.alignment.heads import (
    HEAD_FOLDER,
    Head,
    at_ends,
    finish_with_head,
    job_with_head,
    load_with_head,
    outputs_of,
)
from groundup.alignment.losses import bradley_terry_loss
from groundup.alignment.method import AlignmentMethod, RecordsSettings, in_words, share_with_error, with_error
from groundup.alignment.preferences import (
    Encoded,
    PreferenceRows,
    Preferences,
    load_preferences,
)
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.model import ModelConfig, Transformer
from groundup.recipe import Texts, resolve_optimizer, setting
from groundup.report.format import format_lines, format_whole, loss_line, training_facts
from groundup.stage import Shown, Stage
from groundup.tokenizer import Message, Tokenizer, render
from groundup.training import Batch, Term, TrainedModel, TrainingJob, pass_flops, train

NORMALIZED_OVER = 2048
"""Answers whose scores the finished model's are shifted and scaled by."""


class RewardSettings(RecordsSettings):
    """A model and preferences to a reward model."""

    data: Texts = setting(
        ("groundup:tasks",),
        "preferences: files (JSON lines, JSON, Parquet, CSV, also packed) of pairs or rankings, or groundup:tasks",
        min_length=1,
    )
    examples: int = setting(6_000, "pairs that groundup:tasks generates", ge=100, le=10_000_000)
    margin: float = setting(0.0, "by how much the better answer's score should be higher", ge=0.0)
    centering: float = setting(0.0, "weight of (s_i + s_j)², which keeps scores around 0 (0.01 is usual)", ge=0.0)

    @model_validator(mode="after")
    def _nothing_of_tokens(self) -> RewardSettings:
        wrong = [name for name in ("label_smoothing", "z_loss") if getattr(self, name)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: of the next token's loss, which a reward model has not: leave unset")
        return self


class PairwiseRanking:
    """The objective: Bradley-Terry over all pairs of a prompt; `accuracy`, `best` and `worst` (scores) are shown."""

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings

    def counts(self, batch: Batch) -> dict[str, float]:
        """Prompts."""
        n = int((batch["ends"] >= 0).any(-1).sum())
        return dict.fromkeys(("loss", "accuracy", "best", "worst"), n)

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One forward pass over all answers together."""
        is_there = batch["ends"] >= 0
        scores = score_batch(modules, batch)  # (rows, answers)
        better, worse = _all_pairs(scores.shape[1], scores.device)
        counts = is_there[:, better] & is_there[:, worse]  # (rows, pairs)
        each = bradley_terry_loss(
            scores[:, better], scores[:, worse], margin=self.settings.margin, centering=self.settings.centering
        )
        weights = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        loss = (each * weights).sum()
        with torch.no_grad():
            ahead = ((scores[:, better] > scores[:, worse]) * weights).sum()
            last = scores.gather(1, (is_there.sum(-1, keepdim=True) - 1).clamp(min=0))[:, 0]
            is_real = is_there.any(-1)
            best, worst = (values.where(is_real, 0.0).sum() for values in (scores[:, 0], last))
        shown = {name: Term(value, value, weight=0.0) for name, value in
                 (("accuracy", ahead), ("best", best), ("worst", worst))}  # fmt: skip
        return {"loss": Term(loss, loss.detach()), **shown}

    def flops(self, config: ModelConfig, shape: Sequence[int]) -> float:
        """A forward and a backward pass over each answer; the head's are nothing beside them."""
        return pass_flops(config, (math.prod(shape[:-1]), shape[-1]))


def score_batch(modules: Mapping[str, nn.Module], batch: Batch) -> Float[Tensor, "rows answers"]:
    """Scores of a batch's answers, not normalized; 0 where there is none."""
    is_there: Bool[Tensor, "rows answers"] = batch["ends"] >= 0
    taken = is_there.clone()
    taken[0, 0] |= ~is_there.any()  # every process makes a pass
    hidden = modules["model"](batch["ids"][taken], head=at_ends(batch["ends"][taken].clamp(min=0)))
    found = modules["head"](hidden)[:, 0]
    return torch.zeros(taken.shape, device=found.device).index_put(taken.nonzero(as_tuple=True), found) * is_there


def _all_pairs(n_answers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = torch.tensor([*itertools.combinations(range(n_answers), 2)], device=device)
    return pairs[:, 0], pairs[:, 1]


def train_reward(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: RewardSettings,
    *,
    out: str | Path,
    preferences: Preferences | None = None,
    seed: int = 1,
    name: str = "reward",
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Train a reward model; go on from a checkpoint in `out` if there is one. `Scorer.load(out)` is what comes out.

    Args:
        model: trained in place.
        tokenizer: of the model.
        settings: what `[align.reward]` of a recipe says; its `start` loads nothing.
        out: the folder for logs, checkpoints, `model/` and `head/`.
        preferences: what to learn (default: what `settings.data` names).
        seed, name, world, console: as for `fine_tune`.

    Raises:
        DataError: no usable preference.
        Interrupted: asked to stop; everything is saved.
    """
    settings = resolve_optimizer(settings)
    console, world, out = console or Console(), world or current_world(), Path(out)
    section = f"align.{name}"
    preferences = preferences or load_preferences(
        settings.data, section, console, n_tasks=settings.examples, seed=seed, limit=settings.limit
    )
    source = PreferenceRows(
        preferences.ranked(), tokenizer, model.config.context_length, seed, section, for_scores=True
    )
    if source.left_out or source.shortened:
        console.warn(
            f"{name}: {source.left_out} preferences are longer than the context of {model.config.context_length} "
            f"tokens and are left out; {source.shortened} lost their oldest turns."
        )
    job = job_with_head(
        model, 1, PairwiseRanking(settings), source, settings.epochs * len(source.train), settings,
        out=out, seed=seed, name=name, unit="prompts", row_sequences=source.most_answers,
    )  # fmt: skip
    summary = train(job, world, console)
    scored = source.train[: max(2, NORMALIZED_OVER // source.most_answers)]
    learned = torch.tensor(list(itertools.chain.from_iterable(_scores(job, scored, world))))
    mean, std = float(learned.mean()), max(float(learned.std()), 1e-6)
    held_out = [[(score - mean) / std for score in one] for one in _scores(job, source.held_out, world)]
    summary |= source.figures() | {"preferences_set_aside": sum(preferences.set_aside.values())}
    summary |= {"score_mean": mean, "score_std": std, **ranking_figures(held_out, source.held_out)}
    finish_with_head(job, tokenizer, {"kind": "scorer", "mean": mean, "std": std}, world)
    return TrainedModel(model, out, summary)


def _scores(job: TrainingJob, chosen: Sequence[Encoded], world: World) -> list[list[float]]:
    """The scores of all answers, not normalized; every process makes all passes."""
    texts = [ids.tolist() for one in chosen for ids, _ in one.texts]
    found = iter(outputs_of(job.model, job.modules["head"], texts)[:, 0].tolist())
    return [[next(found) for _ in one.texts] for one in chosen]


def ranking_figures(scores: Sequence[Sequence[float]], chosen: Sequence[Encoded]) -> dict[str, float]:
    """How often the better answer has the higher score, and how much scores follow length.

    The standard error is over prompts: pairs of one prompt are not independent.

    Args:
        scores: of every prompt's answers.
        chosen: the answers in tokens, the best first.
    """
    lengths = [[len(ids) for ids, _ in one.texts] for one in chosen]
    right, longer_is_better, longer_scores_higher = [], [], []
    for own, long in zip(scores, lengths, strict=True):
        pairs = [*itertools.combinations(range(len(own)), 2)]
        right.append(np.mean([float(own[i] > own[j]) + 0.5 * float(own[i] == own[j]) for i, j in pairs]))
        unequal = [(i, j) for i, j in pairs if long[i] != long[j]]
        longer_is_better += [long[i] > long[j] for i, j in unequal]
        longer_scores_higher += [(long[i] > long[j]) == (own[i] > own[j]) for i, j in unequal]
    figures = share_with_error("pair_accuracy", np.array(right))
    both = np.array([[*itertools.chain.from_iterable(part)] for part in (scores, lengths)])
    if both.std(axis=1).min() > 0:
        figures["length_correlation"] = float(np.corrcoef(both)[0, 1])
    if longer_is_better:
        figures["longer_preferred"] = float(np.mean(longer_is_better))
        figures["longer_scored_higher"] = float(np.mean(longer_scores_higher))
    return figures


@dataclass(frozen=True)
class Scorer:
    """A finished reward model.

    Attributes:
        model, tokenizer, head: its parts.
        mean, std: of the scores of the answers that it learned from.
    """

    model: Transformer
    tokenizer: Tokenizer
    head: Head
    mean: float
    std: float

    @classmethod
    def load(cls, folder: str | Path) -> Scorer:
        """A stage's, from its folder: `runs/demo/reward`.

        Raises:
            ArtifactError: missing, damaged, or no reward model.
        """
        model, tokenizer, head, values = load_with_head(folder, "scorer")
        return cls(model, tokenizer, head, float(values["mean"]), float(values["std"]))

    def scores(self, talks: Sequence[Sequence[Message]]) -> Float[Tensor, " talks"]:
        """Normalized scores of conversations, each of which ends with the answer that is scored."""
        texts = [render(self.tokenizer, talk) for talk in talks]
        return self.scores_of_ids([text.ids[: text.n_answered] for text in texts])

    def scores_of_ids(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, " texts"]:
        """The same of texts in tokens, prompt and answer, read at the last one: the end token, where there is one."""
        found = outputs_of(self.model, self.head, texts)[:, 0]
        return (found - self.mean) / self.std


class RewardMethod(AlignmentMethod):
    """The stage: a reward model."""

    settings = RewardSettings
    version = 1
    makes = "scorer"
    is_default = False
    figures = ("val_loss", "val_accuracy", "final_loss", "pair_accuracy", "length_correlation")
    outputs = ("model/[!.]*", f"{HEAD_FOLDER}/[!.]*")
    row_sequences = 2
    train = train_reward

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Accuracy, and what of it is length."""
        accuracy = with_error(summary, "pair_accuracy")
        facts = [
            ("preferences", format_whole(summary.get("preferences_train"))),
            ("held out", format_whole(summary.get("preferences_held_out"))),
            ("set aside", format_whole(summary.get("preferences_set_aside"))),
            ("scores the better answer higher", accuracy),
            ("correlation of score and length", in_words(summary, "length_correlation", "{:+.2f}")),
            ("the longer answer is the better one", in_words(summary, "longer_preferred", "{:.1%} of pairs")),
            ("the longer answer has the higher score", in_words(summary, "longer_scored_higher", "{:.1%} of pairs")),
        ]
        lines = format_lines((summary.get("preferences_train"), "{} preferences"), loss_line(summary))
        return Shown(
            "Reward model", [*facts, *training_facts(summary)], [*lines, *([accuracy] if accuracy else [])],
            curves=("accuracy", "best", "worst"),
        )  # fmt: skip


REWARD = RewardMethod()
