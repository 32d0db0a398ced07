"""A classifier: a model's last hidden state of a text to one of some labels, from any labelled CSV, JSON or Parquet.

    p(label | text) = softmax(W h + b)        h: of the text's last real token

The text stands behind `<|endoftext|>`, as documents do in pretraining, and is cut at the end where it is longer than
the context. One text in ten is held out, chosen by a hash of it. What it gets right is shown beside what saying the
most frequent label gets right, with a confusion matrix and the calibration of its probabilities:

    ECE = Σ_bins (n_bin / n) |accuracy − mean confidence|, ten bins (arXiv:1706.04599);  Brier = mean Σ_labels (p − y)²
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from groundup.alignment.conversations import HELD_OUT_SHARE, count_reasons, read_data, too_little
from groundup.alignment.heads import Head, HeadMethod, at_ends, load_with_head, outputs_of
from groundup.alignment.method import Inputs, RecordRows, RecordsSettings, reported, share, share_with_error
from groundup.alignment.preferences import load_preferences
from groundup.console import Console
from groundup.corpus.document import Reason
from groundup.corpus.reading.refusal import RefusedError
from groundup.corpus.reading.values import check_writable
from groundup.evaluation.safety import LABELS, label_answer
from groundup.files import value_digest
from groundup.model import ModelConfig, Transformer
from groundup.recipe import Texts, setting
from groundup.stage import Shown, Stage
from groundup.tokenizer import Tokenizer
from groundup.training import Batch, Term, TrainingJob, pass_flops

MOST_LABELS = 1000
"""More are numbers or names, and no labels."""
BINS = 10
_HELD_OUT = ("accuracy", "accuracy_n", "majority_accuracy")


class ClassifySettings(RecordsSettings):
    """A model and labelled texts to a classifier."""

    data: Texts = setting(
        ..., "labelled texts: files (CSV, JSON lines, JSON, Parquet, also packed) with a text and a label", min_length=1
    )
    text_field: str = setting("text", "the field or column that holds the text", min_length=1)
    label_field: str = setting("label", "the field or column that holds the label", min_length=1)
    safety: bool = setting(
        False,
        "data are preferences for harmless answers (chosen, rejected): every last answer is a text, and its label is "
        "refusal, harmless or harmful, for groundup safety",
    )
    epochs: float = setting(3.0, "passes over the texts", gt=0.0, le=1000.0)

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> ClassifySettings:
        if self.safety and self.model_fields_set & {"text_field", "label_field"}:
            raise ValueError("safety = true: preferences have no text_field and no label_field: leave them unset")
        return self


@dataclass(frozen=True)
class Labelled:
    """Labelled texts on both sides of the split, the labels that there are, and what could not be used, by reason."""

    train: list[tuple[str, str]]
    held_out: list[tuple[str, str]]
    labels: list[str]
    set_aside: dict[str, int]


def load_labelled(settings: ClassifySettings, section: str, console: Console | None = None) -> Labelled:
    """Read labelled texts.

    Raises:
        DataError: a file is missing, one side of the split is empty, or there are not two labels at least.
    """
    if settings.safety:
        found = load_preferences(settings.data, section, console).judged()
        learned, other = (
            [(text := one.answers[0][-1]["content"], label_answer(text, bool(one.is_good))) for one in side]
            for side in (found.train, found.held_out)
        )
        return Labelled(learned[: settings.limit], other, sorted(LABELS), found.set_aside)
    read, aside = read_data(settings.data, section, functools.partial(_labelled, settings), console)
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for _, one in read:
        (train if xxhash.xxh3_64_intdigest(one[0].encode()) % HELD_OUT_SHARE else held_out).append(one)
    train = train[: settings.limit]
    labels = sorted({label for _, label in (*train, *held_out)})
    if not train or not held_out or not 2 <= len(labels) <= MOST_LABELS:
        what = f"{len(train)} texts to learn from and {len(held_out)} held out, with {len(labels)} labels"
        needs = f'a "{settings.text_field}" and a "{settings.label_field}", of which there are 2 to {MOST_LABELS}'
        raise too_little(settings.data, section, what, needs, aside)
    return Labelled(train, held_out, labels, count_reasons(aside))


def _labelled(settings: ClassifySettings, data: Any) -> tuple[str, str]:
    """A record's text and label; whole numbers, true and false are labels by their names.

    Raises:
        RefusedError: it has none.
    """
    fields = data if isinstance(data, Mapping) else {}
    text, label = fields.get(settings.text_field), fields.get(settings.label_field)
    if not isinstance(text, str) or not isinstance(label, str | int):
        what = f"no text {settings.text_field!r}, or no text or whole number {settings.label_field!r}"
        raise RefusedError(Reason.NO_TEXT, f"{what}; there is: {', '.join(map(repr, fields)):.100}")
    label = str(label).strip()
    if not text.strip() or not label:
        raise RefusedError(Reason.EMPTY, "no text or no label in it")
    for one in (text, label):
        check_writable(one)
    return text, label


class LabelledRows(RecordRows[tuple[list[int], int]]):
    """Rows of labelled texts: `ids`, `ends` and `labels` (−1: an empty row).

    Attributes:
        data: where they are from.
        cut: texts that were longer than the context.
    """

    def __init__(self, data: Labelled, tokenizer: Tokenizer, context_length: int, seed: int) -> None:
        self._pad_id, self.seed, self.data = tokenizer.pad_id, seed, data
        number = {label: place for place, label in enumerate(data.labels)}
        train, held_out = (
            [(encode_text(tokenizer, text), number[label]) for text, label in side]
            for side in (data.train, data.held_out)
        )
        self.cut = sum(len(ids) > context_length for ids, _ in (*train, *held_out))
        self.train, self.held_out = (
            [(ids[:context_length], label) for ids, label in side] for side in (train, held_out)
        )
        digest = value_digest([[ids, label] for ids, label in self.train])
        self.fingerprint = value_digest([tokenizer.fingerprint, context_length, seed, data.labels, digest])

    def length(self, one: tuple[list[int], int]) -> int:
        """Tokens of a text."""
        return len(one[0])

    def lay_out(self, chosen: Sequence[tuple[list[int], int]], n_rows: int | None = None) -> Batch:
        """Texts as a batch."""
        n_rows = n_rows or len(chosen)
        ids = torch.full((n_rows, max(len(own) for own, _ in chosen)), self._pad_id, dtype=torch.int64)
        ends, labels = torch.zeros(n_rows, dtype=torch.int64), torch.full((n_rows,), -1, dtype=torch.int64)
        for row, (own, label) in enumerate(chosen):
            ids[row, : len(own)] = torch.tensor(own)
            ends[row], labels[row] = len(own) - 1, label
        return {"ids": ids, "ends": ends, "labels": labels}


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a classifier reads it."""
    return [tokenizer.end_of_text_id, *tokenizer.encode(text)]


@dataclass(frozen=True)
class LabelLoss:
    """The objective: cross-entropy of the label; `accuracy` is shown."""

    label_smoothing: float = 0.0

    def counts(self, batch: Batch) -> dict[str, float]:
        """Texts."""
        n = int((batch["labels"] >= 0).sum())
        return {"loss": n, "accuracy": n}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One forward pass."""
        logits = modules["head"](modules["model"](batch["ids"], head=at_ends(batch["ends"])))
        labels = batch["labels"]
        smoothed, plain = (
            F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
            for smoothing in (self.label_smoothing, 0.0)
        )
        right = ((logits.argmax(-1) == labels) & (labels >= 0)).sum().float()
        return {"loss": Term(smoothed, plain.detach()), **reported(accuracy=right)}

    def flops(self, config: ModelConfig, lengths: Sequence[int]) -> float:
        """One forward and one backward pass."""
        return pass_flops(config, lengths)


def classification_figures(probabilities: Float[np.ndarray, "texts labels"], truth: np.ndarray) -> dict[str, Any]:
    """Accuracy with its standard error, the confusion matrix (rows: true labels), ECE and the Brier score."""
    n, n_labels = probabilities.shape
    said, confidence = probabilities.argmax(-1), probabilities.max(-1)
    is_right = (said == truth).astype(float)
    confusion = np.bincount(truth * n_labels + said, minlength=n_labels**2).reshape(n_labels, n_labels)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(is_right[bins == one].sum() - confidence[bins == one].sum()) for one in range(BINS)]
    return {
        **share_with_error("accuracy", is_right), "confusion": confusion.tolist(),
        "calibration_error": float(sum(gaps) / n),
        "brier": float(np.square(probabilities - np.eye(n_labels)[truth]).sum(-1).mean()),
    }  # fmt: skip


@dataclass(frozen=True)
class Classifier:
    """A finished classifier."""

    model: Transformer
    tokenizer: Tokenizer
    head: Head
    labels: list[str]  # in the order of its outputs
    # Its "accuracy" on texts that it did not learn, their number "accuracy_n", and what the most frequent label gets
    # right of them, "majority_accuracy"; empty where nobody wrote it down
    held_out: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Classifier:
        """A stage's, from its folder: `runs/demo/classify`.

        Raises:
            ArtifactError: missing, damaged, or no classifier.
        """
        model, tokenizer, head, values = load_with_head(folder, "classifier")
        figures = {name: value for name in _HELD_OUT if isinstance(value := values.get(name), int | float)}
        held_out = figures if len(figures) == len(_HELD_OUT) else {}
        return cls(model, tokenizer, head, [str(label) for label in values["labels"]], held_out)

    def probabilities(self, texts: Sequence[str]) -> Float[Tensor, "texts labels"]:
        """Of every label."""
        most = self.model.config.context_length
        return outputs_of(self.model, self.head, [encode_text(self.tokenizer, one)[:most] for one in texts]).softmax(-1)

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each."""
        return [self.labels[place] for place in self.probabilities(texts).argmax(-1).tolist()]


class ClassifyMethod(HeadMethod):
    """The stage: a classifier."""

    name = "classify"
    settings = ClassifySettings
    makes = "classifier"
    figures = ("val_loss", "val_accuracy", "final_loss", "accuracy", "majority_accuracy", "calibration_error", "brier")
    is_chat = False
    saved = (("labels", "labels"), *((name, name) for name in _HELD_OUT))
    title = "Classifier"
    facts = (
        ("texts", "{texts_train:,}"),
        ("held out", "{texts_held_out:,}"),
        ("set aside", "{texts_set_aside:,}"),
        ("accuracy", share("accuracy")),
        ("always saying the most frequent label", "{majority_accuracy:.1%}"),
        ("expected calibration error", "{calibration_error:.1%}"),
    )
    lines = ("{texts_train:,} texts", "loss {initial_loss:.2f} → {final_loss:.2f}", share("accuracy"))
    curves = ("accuracy",)

    def job(self, inputs: Inputs) -> TrainingJob:  # type: ignore[override]
        """The labelled texts of `settings.data`, and a head with an output for each label."""
        settings, length = inputs.settings, inputs.model.config.context_length
        data = load_labelled(settings, inputs.section, inputs.console)
        source = LabelledRows(data, inputs.tokenizer, length, inputs.seed)
        if source.cut:
            inputs.console.warn(
                f"{inputs.name}: {source.cut} texts are longer than the context of {length} tokens and are cut."
            )
        objective = LabelLoss(settings.label_smoothing)
        n_rows = settings.epochs * len(source.train)
        return self.head_job(inputs, len(data.labels), objective, source, n_rows, unit="texts")

    def measure(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> dict[str, Any]:
        """How held-out texts are classified, beside what the most frequent label gets right."""
        source: Any = job.source
        texts, truth = zip(*source.held_out, strict=True)
        probabilities = outputs_of(job.model, job.modules["head"], texts).softmax(-1).numpy()
        majority = Counter(label for _, label in source.train).most_common(1)[0][0]
        return {
            "texts_train": len(source.train), "texts_held_out": len(texts), "texts_cut": source.cut,
            "texts_set_aside": sum(source.data.set_aside.values()), "labels": source.data.labels,
            "majority_label": source.data.labels[majority],
            "majority_accuracy": float(np.mean(np.array(truth) == majority)),
            **classification_figures(probabilities, np.array(truth)),
        }  # fmt: skip

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """With the confusion matrix."""
        shown, labels = super().shown(stage, summary), summary.get("labels", [])
        confused = [
            (f"{label}: taken for", ", ".join(f"{labels[at]} {n:,}" for at, n in enumerate(row) if n))
            for label, row in zip(labels[:20], summary.get("confusion", []), strict=False)
        ]
        return dataclasses.replace(shown, facts=[*shown.facts, *confused])


CLASSIFY = ClassifyMethod()
train_classifier = CLASSIFY.train
