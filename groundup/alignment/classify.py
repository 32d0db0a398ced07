"""A classifier: a model's last hidden state of a text to one of some labels, from any labelled CSV, JSON or Parquet.

    p(label | text) = softmax(W h + b)        h: of the text's last real token

The text stands behind `<|endoftext|>`, as documents do in pretraining, and is cut at the end where it is longer than
the context. One text in ten is held out, chosen by a hash of it. What it gets right is shown beside what saying the
most frequent label gets right, with a confusion matrix and the calibration of its probabilities:

    ECE = Σ_bins (n_bin / n) |accuracy − mean confidence|, ten bins (arXiv:1706.04599);  Brier = mean Σ_labels (p − y)²
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from groundup.alignment.heads import (
    HEAD_FOLDER,
    Head,
    at_ends,
    finish_with_head,
    job_with_head,
    load_with_head,
    outputs_of,
)
from groundup.alignment.method import AlignmentMethod, RecordsSettings, in_words, share_with_error, with_error
from groundup.console import Console
from groundup.corpus.document import Reason
from groundup.corpus.reading.refusal import RefusedError
from groundup.corpus.reading.values import check_writable
from groundup.distributed import World, current_world
from groundup.files import value_digest
from groundup.model import ModelConfig, Transformer
from groundup.recipe import Texts, resolve_optimizer, setting
from groundup.report.format import format_lines, format_whole, loss_line, training_facts
from groundup.shards.order import shuffled_epochs
from groundup.stage import Shown, Stage
from groundup.tokenizer import Tokenizer
from groundup.training import Batch, Term, TrainedModel, pass_flops, train

MOST_LABELS = 1000
"""More are numbers or names, and no labels."""
BINS = 10


class ClassifySettings(RecordsSettings):
    """A model and labelled texts to a classifier."""

    data: Texts = setting(
        ..., "labelled texts: files (CSV, JSON lines, JSON, Parquet, also packed) with a text and a label", min_length=1
    )
    text_field: str = setting("text", "the field or column that holds the text", min_length=1)
    label_field: str = setting("label", "the field or column that holds the label", min_length=1)
    epochs: float = setting(3.0, "passes over the texts", gt=0.0, le=1000.0)

    @model_validator(mode="after")
    def _no_next_token(self) -> ClassifySettings:
        if self.z_loss:
            raise ValueError("z_loss: of the next token's loss, which a classifier has not: leave unset")
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
    read, aside = read_data(settings.data, section, functools.partial(_labelled, settings), console)
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for one in read:
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
    text, label = (
        (data.get(settings.text_field), data.get(settings.label_field)) if isinstance(data, Mapping) else (None,) * 2
    )
    if not isinstance(text, str) or not isinstance(label, str | int):
        what = f"no text {settings.text_field!r}, or no text or whole number {settings.label_field!r}"
        raise RefusedError(Reason.NO_TEXT, what)
    if not text.strip() or (isinstance(label, str) and not label.strip()):
        raise RefusedError(Reason.EMPTY, "no text or no label in it")
    for one in (text, str(label)):
        check_writable(one)
    return text, label.strip() if isinstance(label, str) else str(label)


class LabelledRows:
    """Rows of labelled texts, each a pure function of (seed, place): `ids`, `ends` and `labels` (−1: an empty row).

    Attributes:
        cut: texts that were longer than the context.
    """

    def __init__(self, data: Labelled, tokenizer: Tokenizer, context_length: int, seed: int) -> None:
        self.cut, self._pad_id, self._seed = 0, tokenizer.pad_id, seed
        place = {label: number for number, label in enumerate(data.labels)}
        self.train, self.held_out = (
            [(self._encode(tokenizer, text, context_length), place[label]) for text, label in side]
            for side in (data.train, data.held_out)
        )
        digest = value_digest([[ids, label] for ids, label in self.train])
        self.fingerprint = value_digest([tokenizer.fingerprint, context_length, seed, data.labels, digest])

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        places = shuffled_epochs(np.arange(first, last), len(self.train), self._seed)
        return self._lay_out([self.train[place] for place in places], last - first)

    def validation(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        """Held-out texts, until `limit` tokens are passed; the last batch has empty rows."""
        taken = self.held_out
        if limit is not None:
            taken = taken[: int(np.searchsorted(np.cumsum([len(ids) for ids, _ in taken]), limit)) + 1]
        for first in range(0, len(taken), batch_size):
            yield self._lay_out(taken[first : first + batch_size], batch_size)

    def _lay_out(self, chosen: Sequence[tuple[list[int], int]], n_rows: int) -> Batch:
        ids = torch.full((n_rows, max(len(own) for own, _ in chosen)), self._pad_id, dtype=torch.int64)
        ends, labels = torch.zeros(n_rows, dtype=torch.int64), torch.full((n_rows,), -1, dtype=torch.int64)
        for row, (own, label) in enumerate(chosen):
            ids[row, : len(own)] = torch.tensor(own)
            ends[row], labels[row] = len(own) - 1, label
        return {"ids": ids, "ends": ends, "labels": labels}

    def _encode(self, tokenizer: Tokenizer, text: str, most: int) -> list[int]:
        ids = encode_text(tokenizer, text)
        self.cut += len(ids) > most
        return ids[:most]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a classifier reads it."""
    return [tokenizer.end_of_text_id, *tokenizer.encode(text)]


class LabelLoss:
    """The objective: cross-entropy of the label; `accuracy` is shown."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def counts(self, batch: Batch) -> dict[str, float]:
        """Texts."""
        n = int((batch["labels"] >= 0).sum())
        return {"loss": n, "accuracy": n}

    def terms(self, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, Term]:
        """One forward pass."""
        logits = modules["head"](modules["model"](batch["ids"], head=at_ends(batch["ends"])))
        labels = batch["labels"]

        def cross_entropy(smoothing: float) -> Tensor:
            return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing)

        right = ((logits.argmax(-1) == labels) & (labels >= 0)).sum().float()
        return {
            "loss": Term(cross_entropy(self.label_smoothing), cross_entropy(0.0).detach()),
            "accuracy": Term(right, right, weight=0.0),
        }

    def flops(self, config: ModelConfig, shape: Sequence[int]) -> float:
        """One forward and one backward pass."""
        return pass_flops(config, shape)


def train_classifier(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: ClassifySettings,
    *,
    out: str | Path,
    seed: int = 1,
    name: str = "classify",
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Train a classifier; go on from a checkpoint in `out` if there is one. `Classifier.load(out)` is what comes out.

    Args:
        model: trained in place.
        tokenizer: of the model.
        settings: what `[align.classify]` of a recipe says; its `start` loads nothing.
        out: the folder for logs, checkpoints, `model/` and `head/`.
        seed, name, world, console: as for `fine_tune`.

    Raises:
        DataError: no usable texts.
        Interrupted: asked to stop; everything is saved.
    """
    settings = resolve_optimizer(settings)
    console, world, out = console or Console(), world or current_world(), Path(out)
    data = load_labelled(settings, f"align.{name}", console)
    source = LabelledRows(data, tokenizer, model.config.context_length, seed)
    if source.cut:
        length = model.config.context_length
        console.warn(f"{name}: {source.cut} texts are longer than the context of {length} tokens and are cut.")
    job = job_with_head(
        model, len(data.labels), LabelLoss(settings.label_smoothing), source, settings.epochs * len(source.train),
        settings, out=out, seed=seed, name=name, unit="texts",
    )  # fmt: skip
    summary = train(job, world, console)
    probabilities = outputs_of(model, job.modules["head"], [ids for ids, _ in source.held_out]).softmax(-1).numpy()
    truth = np.array([label for _, label in source.held_out])
    majority = Counter(label for _, label in source.train).most_common(1)[0][0]
    summary |= {
        "texts_train": len(source.train), "texts_held_out": len(source.held_out), "texts_cut": source.cut,
        "texts_set_aside": sum(data.set_aside.values()), "labels": data.labels,
        "majority_label": data.labels[majority], "majority_accuracy": float((truth == majority).mean()),
        **classification_figures(probabilities, truth),
    }  # fmt: skip
    finish_with_head(job, tokenizer, {"kind": "classifier", "labels": data.labels}, world)
    return TrainedModel(model, out, summary)


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
    """A finished classifier.

    Attributes:
        model, tokenizer, head: its parts.
        labels: in the order of its outputs.
    """

    model: Transformer
    tokenizer: Tokenizer
    head: Head
    labels: list[str]

    @classmethod
    def load(cls, folder: str | Path) -> Classifier:
        """A stage's, from its folder: `runs/demo/classify`.

        Raises:
            ArtifactError: missing, damaged, or no classifier.
        """
        model, tokenizer, head, values = load_with_head(folder, "classifier")
        return cls(model, tokenizer, head, [str(label) for label in values["labels"]])

    def probabilities(self, texts: Sequence[str]) -> Float[Tensor, "texts labels"]:
        """Of every label."""
        most = self.model.config.context_length
        return outputs_of(self.model, self.head, [encode_text(self.tokenizer, one)[:most] for one in texts]).softmax(-1)

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The most probable label of each."""
        return [self.labels[place] for place in self.probabilities(texts).argmax(-1).tolist()]


class ClassifyMethod(AlignmentMethod):
    """The stage: a classifier."""

    settings = ClassifySettings
    version = 1
    makes = "classifier"
    is_default = False
    figures = ("val_loss", "val_accuracy", "final_loss", "accuracy", "majority_accuracy", "calibration_error", "brier")
    outputs = ("model/[!.]*", f"{HEAD_FOLDER}/[!.]*")
    is_chat = False
    train = train_classifier

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Accuracy beside the majority's, confusion, calibration."""
        accuracy, labels = with_error(summary, "accuracy"), summary.get("labels", [])
        confused = [
            (f"{label}: taken for", ", ".join(f"{labels[at]} {n:,}" for at, n in enumerate(row) if n))
            for label, row in zip(labels[:20], summary.get("confusion", []), strict=False)
        ]
        facts = [
            ("texts", format_whole(summary.get("texts_train"))),
            ("held out", format_whole(summary.get("texts_held_out"))),
            ("set aside", format_whole(summary.get("texts_set_aside"))),
            ("accuracy", accuracy),
            ("always saying the most frequent label", in_words(summary, "majority_accuracy", "{:.1%}")),
            ("expected calibration error", in_words(summary, "calibration_error", "{:.1%}")),
            *confused,
        ]
        lines = format_lines((summary.get("texts_train"), "{} texts"), loss_line(summary))
        return Shown(
            "Classifier", [*facts, *training_facts(summary)], [*lines, *([accuracy] if accuracy else [])],
            curves=("accuracy",),
        )  # fmt: skip


CLASSIFY = ClassifyMethod()
