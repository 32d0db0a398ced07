"""Supervised fine-tuning: a base model learns to answer, and keeps what it knows.

Loss on the assistant's tokens only, the end token included, so that it learns to stop (arXiv:2203.02155, section 3.5,
step 1). Conversations are short, so a row holds several, each for itself (`packing.py`). A share of the rows, `replay`,
is text of pretraining, every token of it a target (arXiv:2203.02155, section 3.5, "PPO-ptx"; arXiv:2403.08763): without
it a small model forgets how to write. The sum of losses is divided by the step's count of targets, whoever's they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from groundup.alignment.conversations import Conversations, load_conversations
from groundup.alignment.packing import Text, lay_out, pack
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError
from groundup.files import value_digest
from groundup.interop import save_model
from groundup.model import Transformer
from groundup.recipe import SFTSettings
from groundup.shards import PackedLoader, Permutation, TokenShards, WindowLoader
from groundup.shards.mixture import Shares, integer_weights
from groundup.tokenizer import Message, Tokenizer, render
from groundup.training import IGNORED, TrainedModel, TrainingJob, forget_checkpoints, train
from groundup.training.start import start_digest

Batch = dict[str, Tensor]


def fine_tune(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: SFTSettings | None = None,
    *,
    out: str | Path,
    conversations: Conversations | None = None,
    replay_shards: str | Path | None = None,
    seed: int = 1,
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Fine-tune a model on conversations; go on from a checkpoint in `out` if there is one.

    Args:
        model: trained in place.
        tokenizer: of the model.
        settings: what the recipe's section says; `init` there says where the model came from, and loads nothing.
        out: the folder for logs, checkpoints and the model.
        conversations: what to learn (default: what `settings.data` names).
        replay_shards: a folder written by `write_shards` with this tokenizer, for `settings.replay`.
        seed: of the generated tasks, the order and dropout.
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: no usable conversation, or text to replay without shards.
        Interrupted: asked to stop; everything is saved.
    """
    settings, console, world = settings or SFTSettings(), console or Console(), world or current_world()
    out, length = Path(out), model.config.context_length
    replayed = open_replay(settings, replay_shards, tokenizer, length, seed)
    conversations = conversations or load_conversations(settings, seed, console)
    source = ConversationRows(conversations, tokenizer, length, settings, seed, replayed)
    if source.truncated:
        console.warn(
            f"sft: {source.truncated} conversations are longer than the context of {length} tokens and were cut; "
            f"{source.unsupervised} had no answer left and were dropped."
        )
    job = TrainingJob(
        name="sft",
        model=model,
        source=source,
        settings=settings,
        n_rows=source.rows_of_epochs(settings.epochs),
        folder=out,
        seed=seed,
        row_length=length if source.is_packed else None,
        start=start_digest(settings.init) if settings.init is not None else "fresh",
    )
    summary = train(job, world, console)
    summary |= source.figures(job.plan.rows(job.n_steps - 1)[1])
    save_model(out / "model", model, tokenizer, world=world)
    forget_checkpoints(job, world)
    return TrainedModel(model, out, summary)


class ConversationRows:
    """Rows of conversations, with text of pretraining between them; each a pure function of (seed, place).

    Args:
        conversations: both sides of the split.
        tokenizer: of the model.
        context_length: of the model; longer conversations are cut at the end, and counted in `truncated`.
        settings: how to pack, and how much to replay.
        seed: of the order.
        replayed: rows of text, for `settings.replay`.

    Attributes:
        is_packed: whether all rows have the context's length, and say where their documents are.
        truncated: conversations that were cut.
        unsupervised: those of them without an answer left, which are dropped.

    Raises:
        DataError: nothing supervised is left.
    """

    def __init__(
        self, conversations: Conversations, tokenizer: Tokenizer, context_length: int, settings: SFTSettings,
        seed: int, replayed: PackedLoader | None = None,
    ) -> None:  # fmt: skip
        self.truncated = self.unsupervised = 0
        self._width, self._pad_id, self._seed = context_length, tokenizer.pad_id, seed
        self._train = self._encode(conversations.train, tokenizer)
        self._held_out = self._encode(conversations.held_out, tokenizer)
        if not self._train or not self._held_out:
            raise DataError(
                "[sft]: no answer fits into the model's context.",
                f"Raise [model] context_length = {context_length}, or use shorter conversations.",
            )
        self._packs, self._replayed, self._replay = settings.packing, replayed, settings.replay
        self.is_packed = self._packs or replayed is not None
        self._rows = self._into_rows(self._train)
        self._shares = Shares([1] if replayed is None else integer_weights([1 - self._replay, self._replay]), seed)
        digest = xxhash.xxh3_128()
        for text in self._train:
            for part in text:
                digest.update(part.tobytes())
        text = None if replayed is None else replayed.identity()
        self.fingerprint = value_digest(
            [tokenizer.fingerprint, context_length, self._packs, self._replay, text, seed, digest.hexdigest()]
        )

    def rows_of_epochs(self, epochs: float) -> int:
        """Rows in which every conversation is met so often; text comes on top."""
        return math.ceil(epochs * len(self._rows) / (1 - self._replay))

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        components, numbers = self._shares(np.arange(first, last))
        is_text = components == 1
        rows: list[list[Text]] = [[] for _ in components]
        for place, row in zip(np.flatnonzero(~is_text), self._shuffled(numbers[~is_text]), strict=True):
            rows[place] = self._rows[row]
        batch = self._lay_out(rows)
        if self._replayed is not None and is_text.any():
            text = self._replayed.rows(numbers[is_text])
            parts = (text.ids, text.targets, text.document_ids, text.positions)
            for name, part in zip(("ids", "targets", "documents", "positions"), parts, strict=True):
                batch[name][is_text, : part.shape[1]] = part
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def validation(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        """Held-out conversations, until `limit` supervised tokens are passed; the last batch has empty rows."""
        taken = len(self._held_out)
        if limit is not None:
            seen = np.cumsum([supervised(text) for text in self._held_out])
            taken = min(taken, int(np.searchsorted(seen, limit)) + 1)
        rows = self._into_rows(self._held_out[:taken])
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            batch = self._lay_out([*part, *[[]] * (batch_size - len(part))])
            yield {name: torch.from_numpy(values) for name, values in batch.items()}

    def figures(self, n_rows: int) -> dict[str, float]:
        """What the first `n_rows` rows were made of."""
        figures: dict[str, float] = {
            "conversations_train": len(self._train),
            "conversations_held_out": len(self._held_out),
            "conversations_truncated": self.truncated,
            "supervised_tokens": sum(supervised(text) for text in self._train),
            "rows": n_rows,
        }
        if self._packs:
            tokens = sum(len(ids) for ids, _ in self._train)
            figures["packing_efficiency"] = tokens / (len(self._rows) * self._width)
        if self._replayed is not None:
            figures["replay_share"] = self._shares.counts(n_rows)[1] / n_rows
        return figures

    def _shuffled(self, numbers: np.ndarray) -> np.ndarray:
        """Which rows of conversations stand at these places of their own endless order, another one in each epoch."""
        epochs, rows = np.divmod(numbers, len(self._rows))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = Permutation(len(self._rows), (self._seed, int(epoch)))(rows[here])
        return rows

    def _into_rows(self, texts: Sequence[Text]) -> list[list[Text]]:
        if not self._packs:
            return [[text] for text in texts]
        return [[texts[number] for number in row] for row in pack([len(ids) for ids, _ in texts], self._width)]

    def _lay_out(self, rows: Sequence[Sequence[Text]]) -> dict[str, np.ndarray]:
        if self.is_packed:
            return lay_out(rows, self._width, self._pad_id)
        # One text begins every row: what stands behind it is hidden by causal attention alone.
        batch = lay_out(rows, max(len(ids) for row in rows for ids, _ in row), self._pad_id)
        return {name: batch[name] for name in ("ids", "targets")}

    def _encode(self, conversations: Sequence[list[Message]], tokenizer: Tokenizer) -> list[Text]:
        texts = []
        for messages in conversations:
            rendered = render(tokenizer, messages)
            ids = np.array(rendered.ids, dtype=np.int64)
            mask = np.array(rendered.loss_mask, dtype=bool)
            self.truncated += len(ids) - 1 > self._width
            text = ids[:-1][: self._width], np.where(mask, ids, IGNORED)[1:][: self._width]
            if supervised(text):
                texts.append(text)
            else:
                self.unsupervised += 1
        return texts


def open_replay(
    settings: SFTSettings, shards: str | Path | None, tokenizer: Tokenizer, context_length: int, seed: int
) -> PackedLoader | None:
    """The rows of text that `settings.replay` asks for; None if it asks for none.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: no shards are given, or too little text.
    """
    if not settings.replay:
        return None
    if shards is None:
        raise DataError(
            f"[sft] replay = {settings.replay:g}: there are no token shards to replay text from.",
            "Give the recipe a [corpus], or set replay = 0 (the model then forgets much of its text).",
        )
    train_shards = TokenShards.open(shards, "train", tokenizer_fingerprint=tokenizer.fingerprint)
    return PackedLoader(WindowLoader(train_shards, context_length, settings.batch_size, seed))


def supervised(text: Text) -> int:
    """How many targets a text has."""
    return int((text[1] != IGNORED).sum())
