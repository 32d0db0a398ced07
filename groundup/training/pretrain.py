"""Pretraining: next-token prediction on token shards, from a fresh model to a base model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.console import Console
from groundup.distributed import AXES, World, current_world
from groundup.errors import DataError
from groundup.evaluation.during import check_during, scores_during
from groundup.generation import generate
from groundup.interop import save_model
from groundup.interop.start import starting_config, starting_point
from groundup.model import ModelConfig, Transformer, count_parameters, training_flops_per_token
from groundup.model.cost import parameter_shapes
from groundup.model.initialization import expected_initial_loss
from groundup.model.ladder import shape_choices
from groundup.recipe import OptimizerSettings, PretrainSettings, Section, resolve_optimizer
from groundup.report.format import format_lines, loss_line, training_facts
from groundup.shards import TokenShards
from groundup.stage import Check, Context, Method, Shown, Stage, model_digest
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.training.batches import ShardBatches
from groundup.training.job import TrainingJob
from groundup.training.loop import forget_checkpoints, train
from groundup.training.objective import NextToken
from groundup.training.optimizers import Shapes, check_optimizer, describe_groups, group_parameters
from groundup.training.planning.memory import Workload, device_memory
from groundup.training.precision import check_precision, choose_precision
from groundup.training.schedule import count_tokens, sequence_length
from groundup.training.validation import PASSES, validation_interval


@dataclass(frozen=True)
class TrainedModel:
    """What a training stage gives."""

    model: Transformer  # the trained model
    folder: Path  # where its logs and its checkpoint folder `model/` are
    summary: dict[str, Any]  # the stage's figures


def pretrain(
    model: Transformer,
    shards: str | Path,
    settings: PretrainSettings | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 1,
    verify: bool = True,
    world: World | None = None,
    console: Console | None = None,
) -> TrainedModel:
    """Train a model on token shards; go on from a checkpoint in `out` if there is one.

    Args:
        model: trained in place.
        shards: a folder written by `groundup.shards.write_shards`.
        settings: what `[pretrain]` of a recipe says; `init` there says where the model came from, and loads nothing
            (`start_model` does).
        out: the folder for logs, checkpoints and the model (default: `pretrain/` beside the shards).
        tokenizer: the shards' tokenizer, for samples and to be kept with the model (default: `tokenizer/`
            beside the shards, where there is one).
        seed: of the data order and dropout.
        verify: compare the shards' digests, unless that was done since they were last touched; else only sizes.
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: too little text.
        GroundupError: what it takes at least is more memory than there is; nothing was allocated for it.
        Interrupted: asked to stop; everything is saved.
    """
    says_precision = console is None  # whoever brings a console has said it in a line of their own
    settings = resolve_optimizer(settings or PretrainSettings())
    console, world = console or Console(), world or current_world()
    if says_precision and world.is_first:
        dtype, reason = choose_precision(settings.precision, world.device.type)
        console.note(f"pretrain: {str(dtype).removeprefix('torch.')} ({reason})")
    shards = Path(shards)
    out = Path(out) if out is not None else shards.parent / "pretrain"
    if tokenizer is None and (shards.parent / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(shards.parent / "tokenizer")
    job = pretraining_job(model, shards, settings, out, tokenizer, seed, console, verify=verify and world.is_first)
    summary = train(job, world, console)
    save_model(out / "model", model, tokenizer, world=world)
    forget_checkpoints(job, world)
    return TrainedModel(model, out, summary)


def pretraining_job(
    model: Transformer,
    shards: Path,
    settings: PretrainSettings,
    out: Path,
    tokenizer: Tokenizer | None,
    seed: int,
    console: Console,
    *,
    verify: bool = True,
) -> TrainingJob:
    """What `pretrain` gives to the training loop."""
    expected = tokenizer.fingerprint if tokenizer is not None else None
    train_shards = TokenShards.open(shards, "train", tokenizer_fingerprint=expected, verify=verify)
    validation = TokenShards.open(shards, "validation", tokenizer_fingerprint=expected, verify=verify)
    if train_shards.vocab_size > model.config.vocab_size:
        raise DataError(
            f"{shards}: written with {train_shards.vocab_size} tokens, but the model knows {model.config.vocab_size}.",
            f"Build the model with vocab_size={train_shards.vocab_size}.",
        )
    length = sequence_length(model.config, settings)
    made_by = train_shards.tokenizer_fingerprint
    mixture = [
        (TokenShards.open(part.shards, "train", tokenizer_fingerprint=made_by, verify=verify), part.weight)
        for part in settings.mixture
    ]
    source = ShardBatches(
        train_shards, validation, length, settings.batch_size, seed,
        mixture=mixture, document_mask=settings.document_mask,
    )  # fmt: skip
    if source.note:
        console.warn(f"pretrain: {source.note}.")
    return TrainingJob(
        name="pretrain",
        modules={"model": model},
        objective=NextToken(settings.label_smoothing, settings.z_loss),
        source=source,
        settings=settings,
        n_rows=math.ceil(count_tokens(model.n_parameters, settings)[0] / length),
        folder=out,
        seed=seed,
        axes=frozenset(AXES),
        row_length=length,
        start=model_digest(settings.init) if settings.init is not None else "fresh",
        expected_initial_loss=expected_initial_loss(model.config) if settings.init is None else None,
        bytes_per_token=_bytes_per_token([(validation, 1.0)]),
        train_bytes_per_token=_bytes_per_token([(train_shards, 1.0), *mixture]),
        samples=settings.samples if tokenizer is not None and settings.sample_tokens else (),
        continue_text=_continuation(tokenizer, settings.sample_tokens, seed) if tokenizer is not None else None,
        score=scores_during(settings.evaluate, tokenizer),
    )


def _bytes_per_token(parts: Sequence[tuple[TokenShards, float]]) -> float:
    """Of text, without the tokens that end documents; the mean over shards by their weights."""
    ratios = ((shards.n_bytes / max(1, shards.n_tokens - shards.n_documents), weight) for shards, weight in parts)
    return sum(ratio * weight for ratio, weight in ratios) / sum(weight for _, weight in parts)


def mixture_digests(settings: PretrainSettings) -> dict[str, str]:
    """What stands for the other shards of the mixture in the stage's fingerprint.

    Raises:
        ArtifactError: one of them is missing or damaged.
    """
    return {
        f"mixture {number}": TokenShards.open(part.shards, "train", verify=False).fingerprint
        for number, part in enumerate(settings.mixture)
    }


def _continuation(tokenizer: Tokenizer, max_tokens: int, seed: int) -> Callable[[Transformer, str], str]:
    def continue_text(model: Transformer, prompt: str) -> str:
        return generate(model, tokenizer, prompt, max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=seed).text

    return continue_text


class Pretrain(Method):
    """The stage: shards to a base model."""

    settings = PretrainSettings
    version = 4
    makes = "lm"
    trains = True
    figures = ("val_loss", "val_bits_per_byte", "final_loss")

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """Tokens, and who made them."""
        return ("tokenizer", "shards")

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """The model's shape counts too."""
        return (stage.recipe.model, stage.settings)

    def outside(self, stage: Stage) -> dict[str, str]:
        """The model that it goes on with, and other shards."""
        digests = {} if stage.settings.init is None else {"init": model_digest(stage.settings.init)}
        return digests | mixture_digests(stage.settings)

    def checks(self, stage: Stage) -> Iterable[Check]:
        """Shape, optimizer, precision."""
        yield "[model]" if stage.settings.init is None else "init", lambda: starting_config(stage)
        yield "[pretrain]", lambda: sequence_length(starting_config(stage)[0], stage.settings)
        yield "[pretrain] mixture", lambda: mixture_digests(stage.settings)
        yield from training_checks(stage)

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """Shape, steps, micro-batch, memory."""
        recipe, settings, (config, whence) = stage.recipe, stage.settings, starting_config(stage)
        sized = recipe.model.follows_from_one_number
        reasons = {choice.name: choice.reason for choice in shape_choices(config, whence)} if sized else {}
        # A character tokenizer's vocabulary is as large as its text's alphabet: known when the text is read.
        about = "about " if recipe.tokenizer.kind == "characters" else ""
        tokens, why = count_tokens(count_parameters(config), settings)
        length = sequence_length(config, settings)
        rows = -(-tokens // length)
        yield from (
            (f"model.{name}", str(getattr(config, name)), reasons.get(f"model.{name}", whence))
            for name in ("context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff")
            if getattr(recipe.model, name) is None
        )
        yield "model parameters", f"{about}{count_parameters(config):,}", f"vocabulary of {about}{config.vocab_size:,}"
        yield "pretrain.tokens", f"{about if isinstance(settings.tokens, str) else ''}{tokens:,}", why
        if settings.sequence_length is None:
            yield "pretrain.sequence_length", f"{length:,}", "the model's context"
        yield from training_derived(stage, config, length, rows)
        flops = training_flops_per_token(config, length) * tokens
        yield "training FLOPs", f"{flops:.2e}", "6 a matmul parameter and token; attention"

    def check_memory(self, stage: Stage) -> None:
        """Refuse what cannot fit."""
        config, _ = starting_config(stage)
        check_training_memory(stage, config, sequence_length(config, stage.settings))

    def quick(self, settings: PretrainSettings) -> PretrainSettings:
        """A few seconds of training."""
        tokens = min(settings.tokens, 160_000) if isinstance(settings.tokens, int) else 160_000
        quick = {"tokens": tokens, "sample_tokens": 16, **QUICK_VALIDATION}
        return settings.model_copy(update=quick)

    def work(self, context: Context) -> dict[str, Any]:
        """See `pretrain`."""
        model, tokenizer = starting_point(context.stage, context.run, context.console)
        return pretrain(
            model, context.run.folder("shards"), context.recipe.pretrain, out=context.folder, tokenizer=tokenizer,
            seed=context.recipe.seed, verify=context.recipe.verify, world=context.world, console=context.console,
        ).summary  # fmt: skip

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Its size, tokens and loss."""
        config, _ = starting_config(stage)
        shape = f"{config.n_layers} layers × {config.d_model} wide, context {config.context_length}"
        parts = (summary.get("parameters"), "{} weights"), (summary.get("tokens"), "{} tokens"), loss_line(summary)
        return Shown("Pretraining", [("model", shape), *training_facts(summary)], format_lines(*parts))


QUICK_VALIDATION = {"eval_every": 20, "eval_tokens": 5_000}
"""Of a quick version of a stage that trains."""


def training_checks(stage: Stage, shapes: Callable[[], Shapes] | None = None) -> Iterable[Check]:
    """What can be wrong with the optimizer's settings of any stage that trains.

    `shapes` are of what is trained (default: all parameters of the model that it starts from).
    """
    settings: OptimizerSettings = stage.settings
    world, where = current_world(), f"[{stage.section}]"
    trained = shapes or (lambda: parameter_shapes(starting_config(stage)[0]))
    yield where, lambda: check_precision(settings.precision, world.device.type, stage.section)
    yield where, lambda: check_optimizer(settings, stage.section, world.size)
    yield where, lambda: group_parameters(trained(), settings, stage.section)
    if settings.evaluate is not None:
        check = functools.partial(check_during, settings.evaluate, stage.method.makes)
        yield f"[{stage.section}.evaluate]", check


def check_training_memory(
    stage: Stage, config: ModelConfig, length: int, sized: OptimizerSettings | None = None
) -> None:
    """Refuse a stage whose model cannot fit into memory with rows of so many tokens, by its settings or these.

    Raises:
        GroundupError: with the parts and the ways out.
    """
    world, settings = current_world(), sized or stage.settings
    Workload(config, settings, length, device_memory(world), world.size, stage.section).refuse_what_cannot_fit()


def training_derived(
    stage: Stage, config: ModelConfig, length: int, n_rows: int | None,
    *, shapes: Shapes | None = None, sized: OptimizerSettings | None = None,
) -> Iterable[tuple[str, str, str]]:  # fmt: skip
    """What every stage that trains derives.

    Args:
        stage: the stage.
        config: its model.
        length: tokens in a row.
        n_rows: that it trains on; None: known when its data are read.
        shapes: of what is trained (default: all of the model).
        sized: settings by which memory is estimated (default: the stage's).
    """
    settings, where, world = stage.settings, stage.section, current_world()
    precision, evidence = choose_precision(settings.precision, world.device.type)
    yield f"{where}.precision", str(precision).removeprefix("torch."), evidence
    yield from describe_groups(shapes or parameter_shapes(config), settings, where)
    work = Workload(config, sized or settings, length, device_memory(world), world.size)
    micro, why = work.micro_batch()
    if settings.micro_batch_size is None:
        yield f"{where}.micro_batch_size", f"{micro:,}", why
    if n_rows is not None:
        steps = -(-n_rows // settings.batch_size)
        yield f"{where}.steps", f"{steps:,}", f"{settings.batch_size} rows × {length} tokens a step"
        if settings.eval_every is None:
            yield f"{where}.eval_every", f"{validation_interval(settings, steps):,}", f"{PASSES} over the run"
    memory = f"{work.memory(micro).total / 2**20:,.0f} MiB"
    yield f"{where} memory", memory, f"about, at its fullest, {micro} rows at a time; groundup plan shows the parts"


PRETRAIN = Pretrain()
