"""Supervised fine-tuning: a base model learns to answer, and keeps what it knows.

Loss on the assistant's tokens only, the end token included, so that it learns to stop (arXiv:2203.02155, section 3.5,
step 1). Conversations are short, so a row holds several, each for itself (`packing.py`). A share of the rows, `replay`,
is text of pretraining, every token of it a target (arXiv:2203.02155, section 3.5, "PPO-ptx"; arXiv:2403.08763): without
it a small model forgets how to write. The sum of losses is divided by the step's count of targets, whoever's they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from pydantic import model_validator

from groundup.alignment.conversations import Conversations, load_conversations
from groundup.alignment.lora import AdapterSettings
from groundup.alignment.method import AlignmentMethod, Inputs, RecordRows
from groundup.alignment.packing import Text, lay_out, pack
from groundup.distributed import AXES
from groundup.errors import DataError
from groundup.evaluation.sets import fewer
from groundup.files import value_digest
from groundup.interop.start import check_shards
from groundup.model import ModelConfig
from groundup.recipe import ControlSettings, OptimizerSettings, Texts, setting
from groundup.shards import PackedLoader, TokenShards, WindowLoader
from groundup.shards.mixture import Shares, integer_weights
from groundup.shards.order import shuffled_epochs
from groundup.stage import Check, Context, Stage
from groundup.tokenizer import Message, Tokenizer, render
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.training import IGNORED, Batch, NextToken, TrainedModel, TrainingJob, pass_flops
from groundup.training.objective import text_lengths
from groundup.training.pretrain import QUICK_VALIDATION

_WITHOUT_REPLAY = ", or set replay = 0 (the model then forgets much of what it has read)"


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
        0.0, "share of the rows that are text of pretraining, against forgetting (try 0.25)", ge=0.0, lt=1.0
    )

    @model_validator(mode="after")
    def _one_duration(self) -> SFTSettings:
        if self.compute is not None and "epochs" in self.model_fields_set:
            raise ValueError(f'compute = "{self.compute}" says how long to train: leave epochs unset')
        return self


class ConversationRows(RecordRows[Text]):
    """Rows of conversations, with text of pretraining between them.

    Args:
        conversations: both sides of the split.
        tokenizer: of the model.
        context_length: of the model; longer conversations are cut at the end, and counted in `truncated`.
        settings: how to pack, and how much to replay.
        seed: of the order.
        replay_shards: a folder with the text, for `settings.replay`.
        section: of the recipe, in messages.
        verify: compare the digests of the text's shards.

    Attributes:
        is_packed: whether all rows have the context's length, and say where their documents are.
        truncated: conversations that were cut.
        unsupervised: those of them without an answer left, which are dropped.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: nothing supervised is left, or there is no text to replay.
    """

    def __init__(
        self, conversations: Conversations, tokenizer: Tokenizer, context_length: int, settings: SFTSettings,
        seed: int, replay_shards: str | Path | None = None, section: str = "align.sft", *, verify: bool = True,
    ) -> None:  # fmt: skip
        self.truncated = self.unsupervised = 0
        self.refused = []
        self._width, self._pad_id, self.seed = context_length, tokenizer.pad_id, seed
        self._set_aside = sum(conversations.set_aside.values())
        self.train = self._encode(conversations.train, tokenizer)
        self.held_out = self._encode(conversations.held_out, tokenizer)
        self.check_sides(
            f"[{section}]: no answer fits into the model's context.",
            f"Raise [model] context_length = {context_length}, or use shorter conversations.",
        )
        self._packs, self._replay = settings.packing, settings.replay
        self._text: PackedLoader | None = None
        if settings.replay:
            if replay_shards is None:
                raise DataError(
                    f"[{section}] replay = {settings.replay:g}: there are no token shards to replay text from.",
                    f"Name their folder{_WITHOUT_REPLAY}.",
                )
            expected = tokenizer.fingerprint
            shards = TokenShards.open(replay_shards, "train", tokenizer_fingerprint=expected, verify=verify)
            self._text = PackedLoader(WindowLoader(shards, context_length, settings.batch_size, seed))
        self.is_packed = self._packs or self._text is not None
        self._rows = self.into_rows(self.train)
        self._shares = Shares(integer_weights([1 - self._replay, self._replay] if self._replay else [1]), seed)
        digest = xxhash.xxh3_128()
        for part in itertools.chain.from_iterable(self.train):
            digest.update(part.tobytes())
        text = None if self._text is None else self._text.identity()
        self.fingerprint = value_digest(
            [tokenizer.fingerprint, context_length, self._packs, self._replay, text, seed, digest.hexdigest()]
        )

    def rows_of_epochs(self, epochs: float) -> int:
        """Rows in which every conversation is met so often; text comes on top."""
        return math.ceil(epochs * len(self._rows) / (1 - self._replay))

    def rows_of_compute(self, flops: float, config: ModelConfig, at_once: int) -> int:
        """Rows, whole batches of `at_once`, whose forward and backward passes take so many FLOPs, or just more."""
        n_rows, spent = 0, 0.0
        while spent < flops or not n_rows:
            spent += pass_flops(config, text_lengths(self.rows(n_rows, n_rows + at_once)))
            n_rows += at_once
        return n_rows

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        components, numbers = self._shares(np.arange(first, last))
        is_text = components == 1
        rows: list[list[Text]] = [[] for _ in components]
        shuffled = shuffled_epochs(numbers[~is_text], len(self._rows), self.seed)
        for place, row in zip(np.flatnonzero(~is_text), shuffled, strict=True):
            rows[place] = self._rows[row]
        batch = self.lay_out(rows)
        if self._text is not None and is_text.any():
            text = self._text.rows(numbers[is_text])
            parts = (text.ids, text.targets, text.document_ids, text.positions)
            for name, part in zip(("ids", "targets", "documents", "positions"), parts, strict=True):
                batch[name].numpy()[is_text, : part.shape[1]] = part
        return batch

    def length(self, one: Text) -> int:
        """How many targets a text has."""
        return int((one[1] != IGNORED).sum())

    def into_rows(self, records: Sequence[Text]) -> list[list[Text]]:
        """Several in each, or one."""
        if not self._packs:
            return [[text] for text in records]
        return [[records[number] for number in row] for row in pack([len(ids) for ids, _ in records], self._width)]

    def lay_out(self, chosen: Sequence[Sequence[Text]], n_rows: int | None = None) -> Batch:
        """Rows of texts as a batch, with empty rows up to `n_rows`."""
        rows = [*chosen, *[[]] * ((n_rows or 0) - len(chosen))]
        # A text by itself begins its row: what stands behind it is hidden by causal attention alone.
        width = self._width if self.is_packed else max(len(ids) for row in rows for ids, _ in row)
        batch = lay_out(rows, width, self._pad_id)
        return {name: torch.from_numpy(batch[name]) for name in (batch if self.is_packed else ("ids", "targets"))}

    def figures(self, n_rows: int) -> dict[str, float]:
        """What the first `n_rows` rows were made of."""
        figures: dict[str, float] = {
            "conversations_train": len(self.train), "conversations_held_out": len(self.held_out),
            "conversations_truncated": self.truncated, "conversations_set_aside": self._set_aside,
            "supervised_tokens": sum(map(self.length, self.train)), "rows": n_rows,
        }  # fmt: skip
        if self._packs:
            tokens = sum(len(ids) for ids, _ in self.train)
            figures["packing_efficiency"] = tokens / (len(self._rows) * self._width)
        if self._text is not None:
            figures["replay_share"] = self._shares.counts(n_rows)[1] / n_rows
        return figures

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
            if self.length(text):
                texts.append(text)
            else:
                self.unsupervised += 1
        return texts


class SupervisedFineTuning(AlignmentMethod):
    """The stage: a model learns to answer."""

    name = "sft"
    settings = SFTSettings
    version = 9
    makes = "lm"
    figures = ("val_loss", "final_loss")
    title = "Supervised fine-tuning"
    facts: ClassVar[tuple[tuple[str, str], ...]] = (
        ("conversations", "{conversations_train:,}"),
        ("held out", "{conversations_held_out:,}"),
        ("set aside", "{conversations_set_aside:,}"),
        ("supervised tokens", "{supervised_tokens:,}"),
        ("rows filled", "{packing_efficiency:.1%}"),
        ("rows of replayed text", "{replay_share:.1%}"),
    )
    lines = ("{conversations_train:,} dialogues", "loss {initial_loss:.2f} → {final_loss:.2f}")

    def run(self, inputs: Inputs, **given: Any) -> TrainedModel:
        """As every method; an imported model's tokenizer then knows what ends an answer."""
        if isinstance(inputs.tokenizer, PretrainedTokenizer):
            inputs = dataclasses.replace(inputs, tokenizer=inputs.tokenizer.with_chat_end())
        return super().run(inputs, **given)

    def job(  # type: ignore[override]
        self, inputs: Inputs, *, conversations: Conversations | None = None, replay_shards: str | Path | None = None,
        flops: float | None = None, verify: bool = True,
    ) -> TrainingJob:  # fmt: skip
        """Conversations, and text between them.

        Args:
            inputs: of the stage.
            conversations: what to learn (default: what `settings.data` names).
            replay_shards: a folder written by `write_shards` with this tokenizer, for `settings.replay`.
            flops: how many to spend, for a control, instead of so many epochs.
            verify: compare the digests of the shards; else only sizes.

        Raises:
            ArtifactError: shards missing, damaged or of another tokenizer.
            DataError: no usable conversation, or no shards to replay.
        """
        settings, console, name = inputs.settings, inputs.console, inputs.name
        config, length = inputs.model.config, inputs.model.config.context_length
        conversations = conversations or load_conversations(
            settings.data, settings.examples, inputs.seed, inputs.section, console
        )
        source = ConversationRows(
            conversations, inputs.tokenizer, length, settings, inputs.seed, replay_shards, inputs.section,
            verify=verify and inputs.world.is_first,
        )  # fmt: skip
        if source.truncated:
            console.warn(
                f"{name}: {source.truncated} conversations are longer than the context of {length} tokens and were "
                f"cut; {source.unsupervised} had no answer left and were dropped."
            )
        source.warn_of_refused(inputs, "conversations")
        if flops is None:
            n_rows = source.rows_of_epochs(settings.epochs)
        else:
            n_rows = source.rows_of_compute(flops, config, settings.batch_size)
        return inputs.job(
            NextToken(settings.label_smoothing, settings.z_loss), source, n_rows,
            row_length=length if source.is_packed else None, axes=frozenset(AXES),
        )  # fmt: skip

    def measure(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> dict[str, Any]:
        """What the rows were made of."""
        source: Any = job.source
        figures: dict[str, Any] = source.figures(job.plan.rows(job.n_steps - 1)[1])
        return figures

    def given(self, context: Context) -> dict[str, Any]:
        """Text to replay, and for a control how long to train."""
        shards = context.run.folder("shards") if "shards" in context.stage.needs else None
        return {"replay_shards": shards, "flops": context.compute(), "verify": context.recipe.verify}

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The text to replay."""
        return ("shards",) if stage.settings.replay and stage.recipe.reads_text else ()

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Data, model, adapters, optimizer, text to replay."""
        yield from super().checks(stage)
        if replay := stage.settings.replay:
            yield f"[{stage.section}] replay", lambda: check_shards(stage, f"replay = {replay:g}", _WITHOUT_REPLAY)

    def quick(self, settings: SFTSettings) -> SFTSettings:
        """Fewer conversations."""
        most = min(settings.examples, 2000)
        less = {"examples": most, "data": fewer(settings.data, most), **QUICK_VALIDATION}
        epochs = {} if settings.compute is not None else {"epochs": min(settings.epochs, 2.0)}
        return settings.model_copy(update=less | epochs)


SFT = SupervisedFineTuning()
fine_tune = SFT.train
