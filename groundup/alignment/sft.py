"""Supervised fine-tuning: a base model learns to answer.

Loss on the assistant's tokens only, the end token included, so that it learns to stop
(arXiv:2203.02155, section 3.5, step 1). Rows are padded on the right; the sum of losses is divided by the step's
count of supervised tokens, whatever the rows' lengths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from groundup.alignment.conversations import Conversations, load_conversations
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError
from groundup.files import value_digest
from groundup.interop import save_model
from groundup.interop.start import start_digest
from groundup.model import Transformer
from groundup.recipe import SFTSettings
from groundup.tokenizer import Message, Tokenizer, render
from groundup.training import IGNORED, TrainedModel, TrainingJob, batched_rows, forget_checkpoints, pad_rows, train
from groundup.training.batches import Row
from groundup.training.job import Rows


class ConversationBatches:
    """The loop's batches from conversations.

    Args:
        conversations: both sides of the split.
        tokenizer: of the model.
        context_length: longer conversations are cut at the end, and counted in `truncated`.
        batch_size: conversations in a batch, over all processes.
        seed: of the order.

    Raises:
        DataError: nothing supervised is left.
    """

    def __init__(
        self, conversations: Conversations, tokenizer: Tokenizer, context_length: int, batch_size: int, seed: int
    ) -> None:
        self.truncated = 0
        self.unsupervised = 0
        self._train = self._encode(conversations.train, tokenizer, context_length)
        self._held_out = self._encode(conversations.held_out, tokenizer, context_length)
        if not self._train or not self._held_out:
            raise DataError(
                "[sft]: no answer fits into the model's context.",
                f"Raise [model] context_length = {context_length}, or use shorter conversations.",
            )
        self._pad_id, self._seed = tokenizer.pad_id, seed
        self.supervised_tokens = sum(int((targets != IGNORED).sum()) for _, targets in self._train)
        self.fingerprint = value_digest(
            [tokenizer.fingerprint, context_length, batch_size, seed, [ids.tolist() for ids, _ in self._train]]
        )

    @property
    def n_train(self) -> int:
        """Conversations to learn from."""
        return len(self._train)

    @property
    def n_held_out(self) -> int:
        """Conversations held out."""
        return len(self._held_out)

    def rows(self, first: int, last: int) -> Rows:
        """Rows `first` … `last` − 1 of the endless order."""
        chosen = [self._train[self._at(index)] for index in range(first, last)]
        return pad_rows(chosen, len(chosen), self._pad_id)

    def validation(self, batch_size: int, limit_tokens: int | None) -> Iterator[Rows]:
        """Held-out batches, until `limit_tokens` supervised tokens are passed."""
        rows, seen = [], 0
        for row in self._held_out:
            rows.append(row)
            seen += int((row[1] != IGNORED).sum())
            if limit_tokens is not None and seen >= limit_tokens:
                break
        yield from batched_rows(rows, batch_size)

    def _at(self, index: int) -> int:
        """Which conversation stands at `index` of the endless shuffled order."""
        epoch, place = divmod(index, len(self._train))
        return int(_epoch_order(self._seed, epoch, len(self._train))[place])

    def _encode(self, conversations: Sequence[list[Message]], tokenizer: Tokenizer, context_length: int) -> list[Row]:
        rows = []
        for messages in conversations:
            rendered = render(tokenizer, messages)
            ids = np.array(rendered.ids, dtype=np.int64)
            mask = np.array(rendered.loss_mask, dtype=bool)
            self.truncated += len(ids) - 1 > context_length
            targets = np.where(mask, ids, IGNORED)[1:][:context_length]
            if (targets == IGNORED).all():
                self.unsupervised += 1
            else:
                rows.append((ids[:-1][:context_length], targets))
        return rows


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def fine_tune(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: SFTSettings | None = None,
    *,
    out: str | Path,
    conversations: Conversations | None = None,
    seed: int = 1,
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Fine-tune a model on conversations; go on from a checkpoint in `out` if there is one.

    Args:
        model: trained in place.
        tokenizer: of the model.
        settings: what `[sft]` of a recipe says; `init` there says where the model came from, and loads nothing.
        out: the folder for logs, checkpoints and the model.
        conversations: what to learn (default: what `settings.data` names).
        seed: of the generated tasks, the order and dropout.
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        DataError: no usable conversation.
        Interrupted: asked to stop; everything is saved.
    """
    settings, console, world = settings or SFTSettings(), console or Console(), world or current_world()
    out = Path(out)
    conversations = conversations or load_conversations(settings, seed, console)
    source = ConversationBatches(conversations, tokenizer, model.config.context_length, settings.batch_size, seed)
    if source.truncated:
        console.warn(
            f"sft: {source.truncated} conversations are longer than the context of {model.config.context_length} "
            f"tokens and were cut; {source.unsupervised} had no answer left and were dropped."
        )
    job = TrainingJob(
        name="sft",
        model=model,
        source=source,
        settings=settings,
        n_rows=math.ceil(settings.epochs * source.n_train),
        folder=out,
        seed=seed,
        start=start_digest(settings.init) if settings.init is not None else "fresh",
    )
    summary = train(job, world, console)
    summary.update(
        conversations_train=source.n_train,
        conversations_held_out=source.n_held_out,
        conversations_truncated=source.truncated,
        supervised_tokens=source.supervised_tokens,
    )
    save_model(out / "model", model, tokenizer, world=world)
    forget_checkpoints(job, world)
    return TrainedModel(model, out, summary)
