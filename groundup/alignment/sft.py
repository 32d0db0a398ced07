"""Supervised fine-tuning: a base model learns to answer, and keeps what it knows.

Loss on the assistant's tokens only, the end token included, so that it learns to stop (arXiv:2203.02155, section 3.5,
step 1). Conversations are short, so a row holds several, each for itself (`packing.py`). A share of the rows, `replay`,
is text of pretraining, every token of it a target (arXiv:2203.02155, section 3.5, "PPO-ptx"; arXiv:2403.08763): without
it a small model forgets how to write. The sum of losses is divided by the step's count of targets, whoever's they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from pydantic import model_validator

from groundup.alignment.conversations import Conversations, load_conversations
from groundup.alignment.lora import AdapterSettings
from groundup.alignment.method import AlignmentMethod, begin, finish, sized
from groundup.alignment.packing import Text, lay_out, pack
from groundup.console import Console
from groundup.distributed import AXES, World, current_world
from groundup.errors import DataError, GroundupError
from groundup.evaluation.during import scores_during
from groundup.evaluation.sets import fewer
from groundup.files import value_digest
from groundup.interop.start import shards_fit, starting_point
from groundup.model import Transformer
from groundup.recipe import ControlSettings, OptimizerSettings, Texts, resolve_optimizer, setting
from groundup.report.format import format_lines, format_whole, loss_line, training_facts
from groundup.shards import PackedLoader, TokenShards, WindowLoader
from groundup.shards.mixture import Shares, integer_weights
from groundup.shards.order import shuffled_epochs
from groundup.stage import Check, Context, Shown, Stage
from groundup.tokenizer import Message, Tokenizer, render
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.training import IGNORED, Batch, NextToken, TrainedModel, TrainingJob, forget_checkpoints, train
from groundup.training.objective import pass_flops
from groundup.training.pretrain import QUICK_VALIDATION


class SFTSettings(ControlSettings, AdapterSettings, OptimizerSettings):
    """Base model and conversations to an assistant."""

    data: Texts = setting(
        ("groundup:tasks",),
        'conversations: files (JSON lines, JSON, Parquet, also packed) of records with a "messages" list, or '
        "groundup:tasks, groundup:talk, groundup:sums:500, …",
        min_length=1,
    )
    examples: int = setting(10_000, "conversations that groundup:tasks generates", ge=100, le=10_000_000)
    epochs: float = setting(3.0, "passes over the conversations", gt=0.0, le=1000.0)
    packing: bool = setting(
        True, "a row holds several whole conversations (false: one, padded; the same loss in more time)"
    )
    replay: float = setting(
        0.0,
        "share of the rows that are text of pretraining, against forgetting (try 0.25)",
        ge=0.0,
        lt=1.0,
    )

    @model_validator(mode="after")
    def _one_length(self) -> SFTSettings:
        if self.compute is not None and ("epochs" in self.model_fields_set or not self.packing):
            raise ValueError(
                f'compute = "{self.compute}" says how long to train: leave epochs unset, and packing on (the FLOPs of '
                "rows of several lengths are not known beforehand)"
            )
        return self


def fine_tune(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: SFTSettings | None = None,
    *,
    out: str | Path,
    conversations: Conversations | None = None,
    replay_shards: str | Path | None = None,
    seed: int = 1,
    flops: float | None = None,
    name: str = "sft",
    verify: bool = True,
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
        replay_shards: a folder written by `write_shards` with this tokenizer, for `settings.replay`.
        seed: of the generated tasks, the order and dropout.
        flops: how many to spend, for a control, instead of so many epochs.
        name: of the stage, in messages.
        verify: compare the digests of the shards to replay; else only sizes.
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: no usable conversation, or no shards to replay.
        Interrupted: asked to stop; everything is saved.
    """
    settings = resolve_optimizer(settings or SFTSettings())
    console, world = console or Console(), world or current_world()
    out, length = Path(out), model.config.context_length
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer = tokenizer.with_chat_end()
    section = f"align.{name}"
    conversations = conversations or load_conversations(settings.data, settings.examples, seed, section, console)
    verify = verify and world.is_first
    source = ConversationRows(conversations, tokenizer, length, settings, seed, replay_shards, section, verify=verify)
    if source.truncated:
        console.warn(
            f"{name}: {source.truncated} conversations are longer than the context of {length} tokens and were cut; "
            f"{source.unsupervised} had no answer left and were dropped."
        )
    if source.refused:
        console.warn(
            f"{name}: {len(source.refused)} conversations cannot be laid out and were dropped. The first: "
            f"{source.refused[0]}"
        )
    begin(model, settings.lora, seed)
    row_flops = pass_flops(model.config, (1, length))
    job = TrainingJob(
        name=name,
        modules={"model": model},
        objective=NextToken(settings.label_smoothing, settings.z_loss),
        source=source,
        settings=settings,
        n_rows=source.rows_of_epochs(settings.epochs) if flops is None else math.ceil(flops / row_flops),
        folder=out,
        seed=seed,
        row_length=length if source.is_packed else None,
        axes=frozenset(AXES),
        sized=sized(settings, model.config),
        score=scores_during(settings.evaluate, tokenizer),
    )
    summary = train(job, world, console)
    summary |= source.figures(job.plan.rows(job.n_steps - 1)[1])
    summary["conversations_set_aside"] = sum(conversations.set_aside.values())
    finish(out, model, tokenizer, settings.lora, settings.start, world)
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
        replay_shards: the text, for `settings.replay`.
        section: of the recipe, in messages.
        verify: compare the digests of the text's shards.

    Attributes:
        is_packed: whether all rows have the context's length, and say where their documents are.
        truncated: conversations that were cut.
        unsupervised: those of them without an answer left, which are dropped.
        refused: why the chat template of an imported model does not take some, which are dropped, too.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: nothing supervised is left, or there is no text to replay.
    """

    def __init__(
        self, conversations: Conversations, tokenizer: Tokenizer, context_length: int, settings: SFTSettings,
        seed: int, replay_shards: str | Path | None = None, section: str = "align.sft", *, verify: bool = True,
    ) -> None:  # fmt: skip
        check_replay(settings, replay_shards is not None, section)
        self.truncated = self.unsupervised = 0
        self.refused: list[GroundupError] = []
        self._width, self._pad_id, self._seed = context_length, tokenizer.pad_id, seed
        self._train = self._encode(conversations.train, tokenizer)
        self._held_out = self._encode(conversations.held_out, tokenizer)
        if not self._train or not self._held_out:
            if self.refused:
                raise self.refused[0]
            raise DataError(
                f"[{section}]: no answer fits into the model's context.",
                f"Raise [model] context_length = {context_length}, or use shorter conversations.",
            )
        self._packs, self._replay = settings.packing, settings.replay
        self._text: PackedLoader | None = None
        if settings.replay and replay_shards is not None:
            expected = tokenizer.fingerprint
            shards = TokenShards.open(replay_shards, "train", tokenizer_fingerprint=expected, verify=verify)
            self._text = PackedLoader(WindowLoader(shards, context_length, settings.batch_size, seed))
        self.is_packed = self._packs or self._text is not None
        self._rows = self._into_rows(self._train)
        self._shares = Shares(integer_weights([1 - self._replay, self._replay] if self._replay else [1]), seed)
        digest = xxhash.xxh3_128()
        for part in itertools.chain.from_iterable(self._train):
            digest.update(part.tobytes())
        text = None if self._text is None else self._text.identity()
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
        shuffled = shuffled_epochs(numbers[~is_text], len(self._rows), self._seed)
        for place, row in zip(np.flatnonzero(~is_text), shuffled, strict=True):
            rows[place] = self._rows[row]
        batch = self._lay_out(rows)
        if self._text is not None and is_text.any():
            text = self._text.rows(numbers[is_text])
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
        if self._text is not None:
            figures["replay_share"] = self._shares.counts(n_rows)[1] / n_rows
        return figures

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
            try:
                rendered = render(tokenizer, messages)
            except DataError as error:
                self.refused.append(error)
                continue
            ids = np.array(rendered.ids, dtype=np.int64)
            mask = np.array(rendered.loss_mask, dtype=bool)
            self.truncated += len(ids) - 1 > self._width
            text = ids[:-1][: self._width], np.where(mask, ids, IGNORED)[1:][: self._width]
            if supervised(text):
                texts.append(text)
            else:
                self.unsupervised += 1
        return texts


def check_replay(settings: SFTSettings, has_shards: bool, section: str) -> None:
    """Hold that there is text to replay if some is to be.

    Raises:
        DataError: there is none.
    """
    if settings.replay and not has_shards:
        raise DataError(
            f"[{section}] replay = {settings.replay:g}: there are no token shards to replay text from.",
            "Give the recipe a [corpus], or set replay = 0 (the model then forgets much of what it has read).",
        )


def _check_shards(stage: Stage) -> None:
    """Hold that there is text to replay, in the tokens of the model that is to.

    Raises:
        DataError: there is none.
    """
    check_replay(stage.settings, stage.recipe.reads_text, stage.section)
    if stage.settings.replay and not shards_fit(stage):
        raise DataError(
            f"[{stage.section}] replay: this recipe's shards have another tokenizer than the model in "
            f"{stage.settings.start}.",
            "Set replay = 0, or fine-tune that model in a recipe of its own.",
        )


def supervised(text: Text) -> int:
    """How many targets a text has."""
    return int((text[1] != IGNORED).sum())


class SupervisedFineTuning(AlignmentMethod):
    """The stage: a model learns to answer."""

    settings = SFTSettings
    version = 8
    makes = "lm"
    figures = ("val_loss", "final_loss")

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The text to replay."""
        return ("shards",) if stage.settings.replay and stage.recipe.reads_text else ()

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Data, model, adapters, optimizer, text to replay."""
        yield from super().checks(stage)
        yield f"[{stage.section}] replay", lambda: _check_shards(stage)

    def quick(self, settings: SFTSettings) -> SFTSettings:
        """Fewer conversations."""
        most = min(settings.examples, 2000)
        less = {"examples": most, "data": fewer(settings.data, most), **QUICK_VALIDATION}
        epochs = {} if settings.compute is not None else {"epochs": min(settings.epochs, 2.0)}
        return settings.model_copy(update=less | epochs)

    def work(self, context: Context) -> dict[str, Any]:
        """See `fine_tune`."""
        stage = context.stage
        model, tokenizer = starting_point(stage, context.run, context.console)
        shards = context.run.folder("shards") if "shards" in stage.needs else None
        return fine_tune(
            model, tokenizer, stage.settings, out=context.folder, replay_shards=shards, seed=context.recipe.seed,
            flops=context.compute(), name=stage.name, verify=context.recipe.verify, world=context.world,
            console=context.console,
        ).summary  # fmt: skip

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Conversations and loss."""
        counts = [
            ("conversations", format_whole(summary.get("conversations_train"))),
            ("held out", format_whole(summary.get("conversations_held_out"))),
            ("set aside", format_whole(summary.get("conversations_set_aside"))),
            ("supervised tokens", format_whole(summary.get("supervised_tokens"))),
            ("rows filled", _percent(summary.get("packing_efficiency"))),
            ("rows of replayed text", _percent(summary.get("replay_share"))),
        ]
        lines = format_lines((summary.get("conversations_train"), "{} dialogues"), loss_line(summary))
        return Shown("Supervised fine-tuning", [*counts, *training_facts(summary)], lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


SFT = SupervisedFineTuning()
