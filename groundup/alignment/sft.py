"""Supervised fine-tuning: a base model learns to answer.

Loss on the assistant's tokens only, the end token included, so that it learns to stop
(arXiv:2203.02155, section 3.5, step 1). Rows are padded on the right; the sum of losses is divided by the step's
count of supervised tokens, whatever the rows' lengths.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from groundup.alignment.conversations import Conversations, data_fingerprint, load_conversations
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError
from groundup.files import value_digest
from groundup.interop import save_model
from groundup.interop.start import starting_config, starting_point
from groundup.model import Transformer
from groundup.recipe import AlignSettings, OptimizerSettings, Section, Texts, resolve_optimizer, setting
from groundup.report.format import format_lines, format_whole, loss_line, training_facts
from groundup.stage import Check, Context, Method, Shown, Stage, model_digest
from groundup.tokenizer import Message, Tokenizer, render
from groundup.training import IGNORED, TrainedModel, TrainingJob, batched_rows, forget_checkpoints, pad_rows, train
from groundup.training.batches import Row
from groundup.training.job import Rows
from groundup.training.pretrain import QUICK_VALIDATION, training_checks, training_derived


class SFTSettings(AlignSettings, OptimizerSettings):
    """Base model and conversations to an assistant."""

    data: Texts = setting(
        ("groundup:tasks",), 'conversations: JSONL files with a "messages" list, or groundup:tasks', min_length=1
    )
    examples: int = setting(10_000, "conversations that groundup:tasks generates", ge=100, le=10_000_000)
    epochs: float = setting(3.0, "passes over the conversations", gt=0.0, le=1000.0)


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
    name: str = "sft",
    start: str = "fresh",
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Fine-tune a model on conversations; go on from a checkpoint in `out` if there is one.

    Args:
        model: trained in place.
        tokenizer: of the model.
        settings: what `[align.sft]` of a recipe says; its `start` loads nothing.
        out: the folder for logs, checkpoints and the model.
        conversations: what to learn (default: what `settings.data` names).
        seed: of the generated tasks, the order and dropout.
        name: of the stage, in messages.
        start: what stands for the weights it begins with, so that a checkpoint of others is not resumed.
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        DataError: no usable conversation.
        Interrupted: asked to stop; everything is saved.
    """
    settings = resolve_optimizer(settings or SFTSettings())
    console, world = console or Console(), world or current_world()
    out = Path(out)
    conversations = conversations or load_conversations(settings, seed, console)
    source = ConversationBatches(conversations, tokenizer, model.config.context_length, settings.batch_size, seed)
    if source.truncated:
        console.warn(
            f"{name}: {source.truncated} conversations are longer than the context of {model.config.context_length} "
            f"tokens and were cut; {source.unsupervised} had no answer left and were dropped."
        )
    job = TrainingJob(
        name=name,
        model=model,
        source=source,
        settings=settings,
        n_rows=math.ceil(settings.epochs * source.n_train),
        folder=out,
        seed=seed,
        start=start,
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


class SupervisedFineTuning(Method):
    """The stage: a model learns to answer."""

    settings = SFTSettings
    version = 4
    makes = "lm"
    trains = True
    figures = ("val_loss", "final_loss")

    def outside(self, stage: Stage) -> dict[str, str]:
        """The conversations, and a model made elsewhere."""
        start = stage.outside_start
        digests = {} if start is None else {"start": model_digest(start)}
        return {**digests, "data": ",".join(data_fingerprint(stage.settings))}

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """`[model]` can change a model made elsewhere."""
        return (stage.settings,) if stage.outside_start is None else (stage.recipe.model, stage.settings)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Data, model, optimizer."""
        yield f"[{stage.section}] start", lambda: starting_config(stage)
        yield from training_checks(stage)
        yield f"[{stage.section}] data", lambda: data_fingerprint(stage.settings)

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """Micro-batch and memory."""
        config, _ = starting_config(stage)
        yield from training_derived(stage, config, config.context_length, None)

    def quick(self, settings: SFTSettings) -> SFTSettings:
        """Fewer conversations."""
        examples = min(settings.examples, 2000)
        return settings.model_copy(update={"examples": examples, "epochs": 2.0, **QUICK_VALIDATION})

    def work(self, context: Context) -> dict[str, Any]:
        """See `fine_tune`."""
        stage = context.stage
        model, tokenizer = starting_point(stage, context.run, context.console)
        return fine_tune(
            model, tokenizer, stage.settings, out=context.folder, seed=context.recipe.seed, name=stage.name,
            world=context.world, console=context.console,
        ).summary  # fmt: skip

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Conversations and loss."""
        counts = [
            ("conversations", format_whole(summary.get("conversations_train"))),
            ("held out", format_whole(summary.get("conversations_held_out"))),
            ("supervised tokens", format_whole(summary.get("supervised_tokens"))),
        ]
        lines = format_lines((summary.get("conversations_train"), "{} dialogues"), loss_line(summary))
        return Shown("Supervised fine-tuning", [*counts, *training_facts(summary)], lines)


SFT = SupervisedFineTuning()
