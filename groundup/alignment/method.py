"""What every method shares that starts from a model: what it is given, its training, its checks, what it leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from torch import Tensor, nn

from groundup.alignment.conversations import data_fingerprint
from groundup.alignment.lora import AdapterSettings, adapter_shapes, add_adapters, merge, save_adapter, thaw
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError, GroundupError
from groundup.evaluation.during import scores_during
from groundup.interop import save_model
from groundup.interop.start import check_chat, check_start, starting_config, starting_point
from groundup.model import ModelConfig, Transformer
from groundup.recipe import AlignSettings, GroupSettings, OptimizerName, OptimizerSettings, Section, setting
from groundup.recipe.resolve import resolve_optimizer
from groundup.report.format import training_facts
from groundup.shards.order import shuffled_epochs
from groundup.stage import Check, Context, Method, Shown, Stage
from groundup.tokenizer import Tokenizer
from groundup.training import Batch, Objective, Source, Term, TrainedModel, TrainingJob, forget_checkpoints, train
from groundup.training.job import OnPolicySource
from groundup.training.optimizers import Shapes
from groundup.training.pretrain import QUICK_VALIDATION, check_training_memory, training_checks, training_derived

Item = TypeVar("Item")


class RecordsSettings(AlignSettings, AdapterSettings, OptimizerSettings):
    """What every stage can be told that learns from records of a file, each of them a row."""

    rates_follow_size: ClassVar[bool] = False
    without: ClassVar[tuple[str, ...]] = ("z_loss",)  # of the next token's loss

    limit: int | None = setting(None, "most records to learn from (unset: all)", ge=1)
    epochs: float = setting(1.0, "passes over them", gt=0.0, le=1000.0)
    optimizer: OptimizerName = setting("adamw", "adamw, muon, lion or adafactor")
    lr: float = setting(5e-5, "peak learning rate of all but Muon (with adapters, ten times that)", gt=0.0, le=1.0)
    weight_decay: float = setting(0.0, "decoupled weight decay, on matrices only", ge=0.0, le=10.0)


@dataclass(frozen=True)
class Inputs:
    """What a method is given: the arguments of `AlignmentMethod.train`, with what was left out filled in."""

    model: Transformer
    tokenizer: Tokenizer
    settings: Any
    out: Path
    seed: int
    name: str
    start: str
    world: World
    console: Console

    @property
    def section(self) -> str:
        """Of the recipe, in messages."""
        return f"align.{self.name}"

    def job(
        self, objective: Objective, source: Source | OnPolicySource, n_rows: float,
        *, beside: Mapping[str, nn.Module] | None = None, **more: Any,
    ) -> TrainingJob:  # fmt: skip
        """A job that trains the model and the modules beside it; `more` as of `TrainingJob`."""
        return TrainingJob(
            name=self.name, modules={"model": self.model, **(beside or {})}, objective=objective, source=source,
            settings=self.settings, n_rows=math.ceil(n_rows), folder=self.out, seed=self.seed, start=self.start,
            sized=sized(self.settings, self.model.config, is_alone=not beside),
            score=scores_during(self.settings.evaluate, self.tokenizer), **more,
        )  # fmt: skip


class AlignmentMethod(Method):
    """A method that starts from a model; a subclass gives its `settings`, its `job`, and what differs."""

    trains = True
    name: ClassVar[str] = ""  # of the stage where none is given
    row_sequences: ClassVar[int] = 1  # texts in a row, each as long as the context at most: two where a row is a pair
    is_chat: ClassVar[bool] = True  # it needs a tokenizer that can lay out conversations
    reads: ClassVar[str] = "data"  # the setting that names its files
    # What the report shows; facts and lines are templates of the summary's figures
    title: ClassVar[str] = ""
    facts: ClassVar[tuple[tuple[str, str], ...]] = ()
    lines: ClassVar[tuple[str, ...]] = ()
    curves: ClassVar[tuple[str, ...]] = ()

    # What a method gives

    def job(self, inputs: Inputs, **given: Any) -> TrainingJob:
        """What is trained, on what, towards what; `given` is what else `train` was given."""
        raise NotImplementedError

    def measure(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> dict[str, Any]:
        """Figures of the finished model; every process makes the same passes."""
        return {}

    def save(self, inputs: Inputs, job: TrainingJob, summary: dict[str, Any]) -> None:
        """Write `adapter/`, if one was trained, and always `model/`, with it merged; every process must call it."""
        lora, model, world = inputs.settings.lora, job.model, inputs.world
        if lora is not None:
            save_adapter(job.folder / "adapter", model, lora, inputs.settings.start, world=world)
            merge(model)
        thaw(model)
        save_model(job.folder / "model", model, inputs.tokenizer, world=world)

    def trained_config(self, stage: Stage) -> ModelConfig:
        """The shape of the model that is trained."""
        return starting_config(stage)[0]

    def beside(self, stage: Stage, config: ModelConfig) -> dict[str, Shapes]:
        """Shapes of what is trained beside the model, by module and parameter."""
        return {}

    def given(self, context: Context) -> dict[str, Any]:
        """What `train` is given as a stage of a recipe, beside what every method is."""
        return {}

    # What all have in common

    def train(
        self, model: Transformer, tokenizer: Tokenizer, settings: Any = None, *, out: str | Path, seed: int = 1,
        name: str = "", start: str = "fresh", world: World | None = None, console: Console | None = None, **given: Any,
    ) -> TrainedModel:  # fmt: skip
        """Train a model; go on from a checkpoint in `out` if there is one.

        Args:
            model: trained in place; as it is now it is the reference, where the method has one.
            tokenizer: of the model.
            settings: what `[align.NAME]` of a recipe says; its `start` loads nothing.
            out: the folder for logs, checkpoints and what comes out.
            seed: of the order, of dropout, of answers.
            name: of the stage, in messages.
            start: what stands for the weights it begins with: a checkpoint of another start is not gone on from.
            world: the processes to train on (default: those of `torchrun`, or this one).
            console: where progress is shown.
            given: what else the method's `job` takes, or its `run`.

        Raises:
            DataError: nothing to learn from.
            GroundupError: as `groundup.training.train`.
            Interrupted: asked to stop; everything is saved.
        """
        settings = resolve_optimizer(settings or self.settings())  # type: ignore[type-var]
        inputs = Inputs(
            model, tokenizer, settings, Path(out), seed, name or self.name, start, world or current_world(),
            console or Console(),
        )  # fmt: skip
        return self.run(inputs, **given)

    def run(self, inputs: Inputs, **given: Any) -> TrainedModel:
        """Prepare, train, measure, save."""
        if inputs.settings.lora is not None:
            add_adapters(inputs.model, inputs.settings.lora, inputs.seed)
        job = self.job(inputs, **given)
        summary = train(job, inputs.world, inputs.console)
        summary |= self.measure(inputs, job, summary)
        self.save(inputs, job, summary)
        forget_checkpoints(job, inputs.world)
        return TrainedModel(job.model, inputs.out, summary)

    def starting_point(self, context: Context) -> tuple[Transformer, Tokenizer]:
        """The model of a stage, and its tokenizer."""
        return starting_point(context.stage, context.run, context.console)

    def work(self, context: Context) -> dict[str, Any]:
        """See `train`."""
        stage = context.stage
        return self.train(
            *self.starting_point(context), stage.settings, out=context.folder, seed=context.recipe.seed,
            name=stage.name, world=context.world, console=context.console, **self.given(context),
        ).summary  # fmt: skip

    def shapes(self, stage: Stage) -> Shapes:
        """Of all that is trained, by the names that optimizers know."""
        config = self.trained_config(stage)
        own, beside = adapter_shapes(config, stage.settings.lora), self.beside(stage, config)
        if not beside:
            return own
        parts = {"model": own, **beside}
        return {f"{module}.{name}": shape for module, part in parts.items() for name, shape in part.items()}

    def outside(self, stage: Stage) -> dict[str, str]:
        """The data, and a model made elsewhere."""
        data = getattr(stage.settings, self.reads)
        read = {self.reads: ",".join(data_fingerprint(data, stage.section))} if data else {}
        return super().outside(stage) | read

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """`[model]` can change a model made elsewhere."""
        return (stage.settings,) if stage.outside_start is None else (stage.recipe.model, stage.settings)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Data, model, adapters, optimizer."""
        yield f"[{stage.section}] start", lambda: check_start(stage)
        if self.is_chat:
            yield f"[{stage.section}]", lambda: check_chat(stage, f"[{stage.section}]")
        yield from training_checks(stage, lambda: self.shapes(stage))
        data = getattr(stage.settings, self.reads)
        yield f"[{stage.section}] {self.reads}", lambda: data_fingerprint(data, stage.section)

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """Micro-batch and memory."""
        config, length, size = self._row(stage)
        yield from training_derived(stage, config, length, None, shapes=self.shapes(stage), sized=size)

    def check_memory(self, stage: Stage) -> None:
        """Refuse what cannot fit."""
        check_training_memory(stage, *self._row(stage))

    def quick(self, settings: Any) -> Any:
        """Fewer records."""
        less = {"limit": min(settings.limit or 256, 256), "epochs": min(settings.epochs, 1.0), **QUICK_VALIDATION}
        return settings.model_copy(update=less)

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """`facts` and `lines`, filled."""
        facts = [(label, in_words(summary, form)) for label, form in self.facts]
        lines = [words for form in self.lines if (words := in_words(summary, form))]
        return Shown(self.title, [*facts, *training_facts(summary)], lines, self.curves)

    def _row(self, stage: Stage) -> tuple[ModelConfig, int, OptimizerSettings]:
        """The model, the tokens of a row, and the settings by which memory is estimated."""
        config = self.trained_config(stage)
        size = sized(stage.settings, config, is_alone=not self.beside(stage, config))
        return config, self.row_sequences * config.context_length, size


def sized(settings: Any, config: ModelConfig, *, is_alone: bool = True) -> OptimizerSettings:
    """Settings by which memory is estimated: with adapters, matrices have neither gradients nor optimizer state.

    Args:
        settings: of the stage.
        config: of its model.
        is_alone: nothing else is trained; else patterns of groups are of longer names, and are left out.
    """
    matrices = ["layers.*.self_attn.*", "layers.*.mlp.*", "embed_*", *["lm_head*"] * (not config.tied_embeddings)]
    if settings.lora is not None:
        groups = tuple(GroupSettings(match=one, frozen=True) for one in matrices)
    else:
        groups = settings.groups if is_alone else ()
    return settings if groups == settings.groups else settings.model_copy(update={"groups": groups})


def in_words(summary: Mapping[str, Any], form: str) -> str:
    """A template of figures, filled: "loss {final_loss:.2f}"; "" if one of them was not measured."""
    try:
        return form.format(**summary)
    except (KeyError, TypeError, ValueError):
        return ""


def share(name: str) -> str:
    """The template of a figure of `share_with_error`."""
    return f"{{{name}:.1%}} ±{{{name}_stderr:.1%}} of {{{name}_n:,}}"


def reported(**sums: Tensor) -> dict[str, Term]:
    """Sums that are shown, and not minimized."""
    return {name: Term(value.detach(), value.detach(), weight=0.0) for name, value in sums.items()}


def share_with_error(name: str, values: np.ndarray) -> dict[str, float]:
    """A mean as figures: itself, its standard error, and of how many."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_stderr": error, f"{name}_n": len(values)}


class RecordRows(Generic[Item]):
    """Rows of encoded records, each a pure function of (seed, place)."""

    train: list[Item]
    held_out: list[Item]
    refused: list[GroundupError]  # why the chat template of an imported model does not take some, which are dropped
    seed: int  # of the order

    def check_sides(self, problem: str, fix: str) -> None:
        """Refuse data of which nothing is left, for a reason of its own if there is one."""
        if not self.train or not self.held_out:
            raise self.refused[0] if self.refused else DataError(problem, fix)

    def warn_of_refused(self, inputs: Inputs, what: str) -> None:
        """Say how many were dropped, and why."""
        if self.refused:
            inputs.console.warn(
                f"{inputs.name}: {len(self.refused)} {what} cannot be laid out and were dropped. The first: "
                f"{self.refused[0]}"
            )

    def lay_out(self, chosen: Sequence[Any], n_rows: int | None = None) -> Batch:
        """Records, or what `into_rows` makes of them, as a batch, with empty rows up to `n_rows`."""
        raise NotImplementedError

    def into_rows(self, records: Sequence[Item]) -> Sequence[Any]:
        """What stands in each row."""
        return records

    def length(self, one: Item) -> int:
        """Tokens of a record."""
        raise NotImplementedError

    def rows(self, first: int, last: int) -> Batch:
        """Rows `first` … `last` − 1 of the endless order."""
        places = shuffled_epochs(np.arange(first, last), len(self.train), self.seed)
        return self.lay_out([self.train[place] for place in places])

    def validation(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        """Held-out records, until `limit` tokens are passed; the last batch has empty rows."""
        taken = self.held_out
        if limit is not None:
            taken = taken[: int(np.searchsorted(np.cumsum([self.length(one) for one in taken]), limit)) + 1]
        rows = self.into_rows(taken)
        for first in range(0, len(rows), batch_size):
            yield self.lay_out(rows[first : first + batch_size], batch_size)
