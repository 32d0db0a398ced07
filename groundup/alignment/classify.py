"""A classifier: a model's last hidden state of a text to one of some labels, from any labelled CSV, JSON or Parquet.

    p(label | text) = softmax(W h + b)        h: of the text's last real token

The text stands behind `<|endoftext|>`, as documents do in pretraining, and is cut at the end where it is longer than
the context. One text in ten is held out, chosen by a hash of it. What it gets right is shown beside what saying the
most frequent label gets right, with a confusion matrix and the calibration of its probabilities:

    ECE = Σ_bins (n_bin / n) |accuracy − mean confidence|, ten bins (arXiv:1706.04599);  Brier = mean Σ_labels (p − y)²
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from groundup.alignment.conversations import HELD_OUT_SHARE, read_records
from groundup.alignment.dpo import share_with_error, with_error
from groundup.alignment.heads import HEAD_FOLDER, Head, at_ends, load_with_head, outputs_of, save_head
from groundup.alignment.lora import AdapterSettings, adapter_shapes, freeze
from groundup.alignment.method import AlignmentMethod, begin, finish, sized
from groundup.alignment.preferences import preference_digests
from groundup.console import Console
from groundup.corpus.document import Reason, SetAside
from groundup.corpus.reading.jsonl import RefusedError
from groundup.corpus.reading.sources import find_sources
from groundup.corpus.reading.values import check_writable
from groundup.distributed import World, current_world
from groundup.errors import DataError
from groundup.files import value_digest
from groundup.interop.start import check_start, starting_config, starting_point
from groundup.model import ModelConfig, Transformer
from groundup.recipe import AlignSettings, OptimizerName, OptimizerSettings, Texts, resolve_optimizer, setting
from groundup.report.format import format_lines, format_whole, loss_line, training_facts
from groundup.shards import Permutation
from groundup.stage import Check, Context, Shown, Stage
from groundup.tokenizer import Tokenizer
from groundup.training import Batch, Term, TrainedModel, TrainingJob, forget_checkpoints, pass_flops, train
from groundup.training.pretrain import QUICK_VALIDATION, training_checks

MOST_LABELS = 1000
"""More are numbers or names, and no labels."""
BINS = 10


class ClassifySettings(AlignSettings, AdapterSettings, OptimizerSettings):
    """A model and labelled texts to a classifier."""

    rates_follow_size: ClassVar[bool] = False

    data: Texts = setting(
        ..., "labelled texts: files (CSV, JSON lines, JSON, Parquet, also packed) with a text and a label", min_length=1
    )
    text_field: str = setting("text", "the field or column that holds the text", min_length=1)
    label_field: str = setting("label", "the field or column that holds the label", min_length=1)
    limit: int | None = setting(None, "most texts to learn from (unset: all)", ge=2)
    epochs: float = setting(3.0, "passes over them", gt=0.0, le=1000.0)
    optimizer: OptimizerName = setting("adamw", "adamw, muon, lion or adafactor")
    lr: float = setting(1e-4, "peak learning rate of all but Muon (with adapters, ten times that)", gt=0.0, le=1.0)
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only", ge=0.0, le=10.0)

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
    found = find_sources(list(settings.data), setting=f"[{section}] data")
    aside: list[SetAside] = []
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for source, value in read_records(found, aside.append):
        try:
            text, label = _labelled(value.data, settings)
        except RefusedError as refused:
            aside.append(refused.of(source, value))
            continue
        side = train if xxhash.xxh3_64_intdigest(text.encode()) % HELD_OUT_SHARE else held_out
        side.append((text, label))
    train = train[: settings.limit]
    counts = Counter(str(item.reason) for item in aside)
    if console is not None and aside:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
        console.warn(f"[{section}] data: {len(aside):,} records were set aside ({listed}). The first: {aside[0]}")
    labels = sorted({label for _, label in (*train, *held_out)})
    if not train or not held_out or not 2 <= len(labels) <= MOST_LABELS:
        first = f" The first that was set aside: {aside[0]}" if aside else ""
        raise DataError(
            f"[{section}] data = {list(settings.data)}: {len(train)} texts to learn from and {len(held_out)} held out, "
            f"with {len(labels)} labels.",
            f'Each record needs a "{settings.text_field}" and a "{settings.label_field}", of which there are 2 to '
            f"{MOST_LABELS}; a few dozen records are the least.{first}",
        )
    return Labelled(train, held_out, labels, dict(counts))


def _labelled(data: Any, settings: ClassifySettings) -> tuple[str, str]:
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
        epochs, places = np.divmod(np.arange(first, last), len(self.train))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = Permutation(len(self.train), (self._seed, int(epoch)))(places[here])
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
        seed: of the head, the order, the adapters and dropout.
        name: of the stage, in messages.
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

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
    begin(model, settings.lora, seed)
    if model.lm_head is not None:
        freeze(model.lm_head)  # it has no gradient
    head = Head(model.config.d_model, len(data.labels), seed)
    job = TrainingJob(
        name=name,
        modules={"model": model, "head": head},
        objective=LabelLoss(settings.label_smoothing),
        source=source,
        settings=settings,
        n_rows=math.ceil(settings.epochs * len(source.train)),
        folder=out,
        seed=seed,
        sized=sized(settings.model_copy(update={"groups": ()}), model.config),
    )
    summary = train(job, world, console)
    probabilities = outputs_of(model, head, [ids for ids, _ in source.held_out]).softmax(-1).numpy()
    truth = np.array([label for _, label in source.held_out])
    majority = Counter(label for _, label in source.train).most_common(1)[0][0]
    summary |= {
        "texts_train": len(source.train), "texts_held_out": len(source.held_out), "texts_cut": source.cut,
        "texts_set_aside": sum(data.set_aside.values()), "labels": data.labels,
        "majority_label": data.labels[majority], "majority_accuracy": float((truth == majority).mean()),
        **classification_figures(probabilities, truth),
    }  # fmt: skip
    finish(out, model, tokenizer, settings.lora, settings.start, world)
    save_head(out / HEAD_FOLDER, head, {"kind": "classifier", "labels": data.labels}, world)
    forget_checkpoints(job, world)
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

    def data_digest(self, stage: Stage) -> str:
        """The texts."""
        return preference_digests(stage.settings.data, stage.section)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Data, model, adapters, optimizer; no chat."""
        yield f"[{stage.section}] start", lambda: check_start(stage)
        yield from training_checks(stage, lambda: self.shapes(stage))
        yield f"[{stage.section}] data", lambda: self.data_digest(stage)

    def shapes(self, stage: Stage) -> dict[str, tuple[int, ...]]:
        """Model and head; how many labels there are, the data say."""
        config, _ = starting_config(stage)
        trained = adapter_shapes(config, stage.settings.lora)
        return {f"model.{name}": shape for name, shape in trained.items()} | {
            "head.weight": (2, config.d_model), "head.bias": (2,)
        }  # fmt: skip

    def quick(self, settings: ClassifySettings) -> ClassifySettings:
        """Fewer texts."""
        less = {"limit": min(settings.limit or 512, 512), "epochs": min(settings.epochs, 1.0), **QUICK_VALIDATION}
        return settings.model_copy(update=less)

    def work(self, context: Context) -> dict[str, Any]:
        """See `train_classifier`."""
        stage = context.stage
        model, tokenizer = starting_point(stage, context.run, context.console)
        return train_classifier(
            model, tokenizer, stage.settings, out=context.folder, seed=context.recipe.seed, name=stage.name,
            world=context.world, console=context.console,
        ).summary  # fmt: skip

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
            ("always saying the most frequent label", _percent(summary, "majority_accuracy")),
            ("expected calibration error", _percent(summary, "calibration_error")),
            *confused,
        ]
        lines = format_lines((summary.get("texts_train"), "{} texts"), loss_line(summary))
        return Shown(
            "Classifier", [*facts, *training_facts(summary)], [*lines, *([accuracy] if accuracy else [])],
            curves=("accuracy",),
        )  # fmt: skip


def _percent(summary: Mapping[str, Any], name: str) -> str:
    return "" if summary.get(name) is None else f"{summary[name]:.1%}"


CLASSIFY = ClassifyMethod()
