"""What the stages share that start from a model and learn from files: checks, memory, and what they leave."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from groundup.alignment.lora import (
    ADAPTER_FOLDER,
    LoraSettings,
    adapter_shapes,
    add_adapters,
    memory_settings,
    merge,
    save_adapter,
    thaw,
)
from groundup.distributed import World
from groundup.interop import save_model
from groundup.interop.start import check_chat, check_start, starting_config
from groundup.model import ModelConfig, Transformer
from groundup.recipe import OptimizerSettings, Section
from groundup.stage import Check, Method, Stage, model_digest
from groundup.tokenizer import Tokenizer
from groundup.training.optimizers import Shapes
from groundup.training.pretrain import check_training_memory, training_checks, training_derived


class AlignmentMethod(Method):
    """A stage that starts from a model and learns from files; a method subclasses this and gives what differs.

    Attributes:
        row_sequences: texts in a row, each as long as the context at most: two where a row is a pair.
    """

    trains = True
    row_sequences: ClassVar[int] = 1

    def data_digest(self, stage: Stage) -> str:
        """What stands for its files.

        Raises:
            DataError: one is missing.
        """
        raise NotImplementedError

    def shapes(self, stage: Stage) -> Shapes:
        """Of all that is trained, by the names that optimizers know."""
        return adapter_shapes(starting_config(stage)[0], stage.settings.lora)

    def outside(self, stage: Stage) -> dict[str, str]:
        """The data, and a model made elsewhere."""
        start = stage.outside_start
        digests = {} if start is None else {"start": model_digest(start)}
        return {**digests, "data": self.data_digest(stage)}

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """`[model]` can change a model made elsewhere."""
        return (stage.settings,) if stage.outside_start is None else (stage.recipe.model, stage.settings)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Data, model, adapters, optimizer."""
        yield f"[{stage.section}] start", lambda: check_start(stage)
        yield f"[{stage.section}]", lambda: check_chat(stage, f"[{stage.section}]")
        yield from training_checks(stage, lambda: self.shapes(stage))
        yield f"[{stage.section}] data", lambda: self.data_digest(stage)

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """Micro-batch and memory."""
        config, _ = starting_config(stage)
        length, size = self.row_sequences * config.context_length, self._sized(stage, config)
        yield from training_derived(stage, config, length, None, shapes=self.shapes(stage), sized=size)

    def check_memory(self, stage: Stage) -> None:
        """Refuse what cannot fit."""
        config, _ = starting_config(stage)
        check_training_memory(stage, self.row_sequences * config.context_length, self._sized(stage, config))

    def _sized(self, stage: Stage, config: ModelConfig) -> OptimizerSettings:
        # Where there is a head, too, patterns of groups are of longer names, and are left out.
        has_head = self.makes != "lm"
        return sized(stage.settings.model_copy(update={"groups": ()}) if has_head else stage.settings, config)


def sized(settings: OptimizerSettings, config: ModelConfig) -> OptimizerSettings:
    """Settings by which the memory of a stage is estimated: beside adapters, matrices have no gradients."""
    lora: LoraSettings | None = getattr(settings, "lora", None)
    return memory_settings(settings, lora, is_tied=config.tied_embeddings)


def begin(model: Transformer, lora: LoraSettings | None, seed: int) -> None:
    """Put adapters beside the model's matrices, if the settings ask for some."""
    if lora is not None:
        add_adapters(model, lora, seed)


def finish(
    out: Path, model: Transformer, tokenizer: Tokenizer, lora: LoraSettings | None, base: str, world: World
) -> None:
    """Write what was trained: `adapter/`, if it is one, and always `model/`, with the adapters merged into it."""
    if lora is not None:
        save_adapter(out / ADAPTER_FOLDER, model, lora, base, world=world)
        merge(model)
    thaw(model)
    save_model(out / "model", model, tokenizer, world=world)
