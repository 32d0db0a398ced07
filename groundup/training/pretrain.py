"""Pretraining: next-token prediction on token shards, from a fresh model to a base model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.errors import DataError
from groundup.generation import generate
from groundup.interop import save_model
from groundup.model import ModelConfig, Transformer
from groundup.model.initialization import expected_initial_loss
from groundup.recipe import PretrainSettings
from groundup.shards import TokenShards
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.training.batches import ShardBatches
from groundup.training.job import TrainingJob
from groundup.training.loop import forget_checkpoints, train
from groundup.training.precision import choose_precision
from groundup.training.start import start_digest

COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. (arXiv:2203.15556)."""


@dataclass(frozen=True)
class TrainedModel:
    """What a training stage gives.

    Attributes:
        model: the trained model.
        folder: where its logs and its checkpoint folder `model/` are.
        summary: the stage's figures.
    """

    model: Transformer
    folder: Path
    summary: dict[str, Any]


def pretrain(
    model: Transformer,
    shards: str | Path,
    settings: PretrainSettings | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 1,
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
        world: the processes to train on (default: those of `torchrun`, or this one).
        console: where progress is shown.

    Raises:
        ArtifactError: shards missing, damaged or of another tokenizer.
        DataError: too little text.
        GroundupError: what it takes at least is more memory than there is; nothing was allocated for it.
        Interrupted: asked to stop; everything is saved.
    """
    says_precision = console is None  # whoever brings a console has said it in a line of their own
    settings, console, world = settings or PretrainSettings(), console or Console(), world or current_world()
    if says_precision and world.is_first:
        dtype, reason = choose_precision(settings.precision, world.device.type)
        console.note(f"pretrain: {str(dtype).removeprefix('torch.')} ({reason})")
    shards = Path(shards)
    out = Path(out) if out is not None else shards.parent / "pretrain"
    if tokenizer is None and (shards.parent / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(shards.parent / "tokenizer")
    job = pretraining_job(model, shards, settings, out, tokenizer, seed, console)
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
) -> TrainingJob:
    """What `pretrain` gives to the training loop."""
    expected = tokenizer.fingerprint if tokenizer is not None else None
    train_shards = TokenShards.open(shards, "train", tokenizer_fingerprint=expected)
    validation = TokenShards.open(shards, "validation", tokenizer_fingerprint=expected)
    if train_shards.vocab_size > model.config.vocab_size:
        raise DataError(
            f"{shards}: written with {train_shards.vocab_size} tokens, but the model knows {model.config.vocab_size}.",
            f"Build the model with vocab_size={train_shards.vocab_size}.",
        )
    length = sequence_length(model.config, settings)
    source = ShardBatches(train_shards, validation, length, settings.batch_size, seed)
    if source.loader.note:
        console.warn(f"pretrain: {source.loader.note}.")
    return TrainingJob(
        name="pretrain",
        model=model,
        source=source,
        settings=settings,
        n_rows=count_rows(model, settings),
        folder=out,
        seed=seed,
        row_length=length,
        start=start_digest(settings.init) if settings.init is not None else "fresh",
        expected_initial_loss=expected_initial_loss(model.config) if settings.init is None else None,
        bytes_per_token=validation.n_bytes / max(1, validation.n_tokens - validation.n_documents),
        train_bytes_per_token=train_shards.n_bytes / max(1, train_shards.n_tokens - train_shards.n_documents),
        samples=settings.samples if tokenizer is not None and settings.sample_tokens else (),
        continue_text=_continuation(tokenizer, settings.sample_tokens, seed) if tokenizer is not None else None,
    )


def sequence_length(config: ModelConfig, settings: PretrainSettings) -> int:
    """Tokens in a training row: the recipe's, or the model's context.

    Raises:
        DataError: longer than the model can see.
    """
    context = config.context_length
    if settings.sequence_length is not None and settings.sequence_length > context:
        raise DataError(
            f"[pretrain] sequence_length = {settings.sequence_length}: longer than the model's context of {context}.",
            f"Lower it, or set [model] context_length = {settings.sequence_length}.",
        )
    return settings.sequence_length or context


def count_tokens(n_parameters: int, settings: PretrainSettings) -> tuple[int, str]:
    """Tokens to train on, and the reason."""
    if settings.tokens == "compute-optimal":
        per_parameter = COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER
        return per_parameter * n_parameters, f"{per_parameter} for each of {n_parameters:,} parameters"
    return settings.tokens, "as the recipe says"


def count_rows(model: Transformer, settings: PretrainSettings) -> int:
    """Rows that hold at least the asked number of tokens."""
    tokens, _ = count_tokens(model.n_parameters, settings)
    return math.ceil(tokens / sequence_length(model.config, settings))


def _continuation(tokenizer: Tokenizer, max_tokens: int, seed: int) -> Callable[[Transformer, str], str]:
    def continue_text(model: Transformer, prompt: str) -> str:
        return generate(model, tokenizer, prompt, max_tokens=max_tokens, temperature=0.8, top_p=0.95, seed=seed).text

    return continue_text
