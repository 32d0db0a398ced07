"""What the stages share that start from a model and learn from files: checks, memory, and what they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from groundup.alignment.conversations import data_fingerprint
from groundup.alignment.lora import (
    ADAPTER_FOLDER,
    AdapterSettings,
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
from groundup.interop.start import check_chat, check_start, starting_config, starting_point
from groundup.model import ModelConfig, Transformer
from groundup.recipe import AlignSettings, OptimizerName, OptimizerSettings, Section, setting
from groundup.stage import Check, Context, Method, Stage, model_digest
from groundup.tokenizer import Tokenizer
from groundup.training import TrainedModel
from groundup.training.optimizers import Shapes
from groundup.training.pretrain import (
    QUICK_VALIDATION,
    check_training_memory,
    training_checks,
    training_derived,
)


class RecordsSettings(AlignSettings, AdapterSettings, OptimizerSettings):
    """What every stage can be told that learns from records of a file, each of them a row."""

    rates_follow_size: ClassVar[bool] = False

    limit: int | None = setting(None, "most records to learn from (unset: all)", ge=1)
    epochs: float = setting(1.0, "passes over them", gt=0.0, le=1000.0)
    optimizer: OptimizerName = setting("adamw", "adamw, muon, lion or adafactor")
    lr: float = setting(5e-5, "peak learning rate of all but Muon (with adapters, ten times that)", gt=0.0, le=1.0)
    weight_decay: float = setting(0.0, "decoupled weight decay, on matrices only", ge=0.0, le=10.0)


class AlignmentMethod(Method):
    """A stage that starts from a model and learns from files; a method subclasses this and gives what differs.

    Attributes:
        train: what does its work: model, tokenizer, settings, `out`, `seed`, `name`, `world`, `console`.
        row_sequences: texts in a row, each as long as the context at most: two where a row is a pair.
        is_chat: it needs a tokenizer that can lay out conversations.
    """

    trains = True
    train: ClassVar[Callable[..., TrainedModel]]
    row_sequences: ClassVar[int] = 1
    is_chat: ClassVar[bool] = True

    def shapes(self, stage: Stage) -> Shapes:
        """Of all that is trained, by the names that optimizers know; how many outputs a head has, the data say."""
        config, _ = starting_config(stage)
        shapes = adapter_shapes(config, stage.settings.lora)
        if self.makes == "lm":
            return shapes
        return {f"model.{name}": shape for name, shape in shapes.items()} | {"head.weight": (1, config.d_model)}

    def outside(self, stage: Stage) -> dict[str, str]:
        """The data, and a model made elsewhere."""
        start = stage.outside_start
        digests = {} if start is None else {"start": model_digest(start)}
        return {**digests, "data": ",".join(data_fingerprint(stage.settings.data, stage.section))}

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """`[model]` can change a model made elsewhere."""
        return (stage.settings,) if stage.outside_start is None else (stage.recipe.model, stage.settings)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Data, model, adapters, optimizer."""
        yield f"[{stage.section}] start", lambda: check_start(stage)
        if self.is_chat:
            yield f"[{stage.section}]", lambda: check_chat(stage, f"[{stage.section}]")
        yield from training_checks(stage, lambda: self.shapes(stage))
        yield f"[{stage.section}] data", lambda: data_fingerprint(stage.settings.data, stage.section)

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """Micro-batch and memory."""
        config, _ = starting_config(stage)
        length, size = self.row_sequences * config.context_length, self._sized(stage, config)
        yield from training_derived(stage, config, length, None, shapes=self.shapes(stage), sized=size)

    def check_memory(self, stage: Stage) -> None:
        """Refuse what cannot fit."""
        config, _ = starting_config(stage)
        check_training_memory(stage, self.row_sequences * config.context_length, self._sized(stage, config))

    def quick(self, settings: Any) -> Any:
        """Fewer records."""
        less = {"limit": min(settings.limit or 256, 256), "epochs": min(settings.epochs, 1.0), **QUICK_VALIDATION}
        return settings.model_copy(update=less)

    def work(self, context: Context) -> dict[str, Any]:
        """See `train`."""
        stage = context.stage
        model, tokenizer = starting_point(stage, context.run, context.console)
        return type(self).train(
            model, tokenizer, stage.settings, out=context.folder, seed=context.recipe.seed, name=stage.name,
            world=context.world, console=context.console,
        ).summary  # fmt: skip

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


def with_error(summary: Mapping[str, Any], name: str) -> str:
    """A share with its error bar, for people; "" if it was not measured."""
    if summary.get(name) is None:
        return ""
    return f"{summary[name]:.1%} ±{summary[f'{name}_stderr']:.1%} of {summary[f'{name}_n']:,}"


def share_with_error(name: str, values: np.ndarray) -> dict[str, float]:
    """A mean of values between 0 and 1 as figures: itself, its standard error, and of how many."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_stderr": error, f"{name}_n": len(values)}


def in_words(summary: Mapping[str, Any], name: str, form: str) -> str:
    """A figure by its format, for people; "" if it was not measured."""
    return "" if summary.get(name) is None else form.format(summary[name])
