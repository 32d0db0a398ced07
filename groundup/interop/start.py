"""The model that a stage starts from: another stage's, one made elsewhere (`start`, `[pretrain] init`), or a fresh one.

In: a run, a model's folder of groundup's or of a Hugging Face family; what `[model]` of the recipe changes in it; the
run's tokenizer. Out: the model, with rows for tokens that it did not know. Weights are never cut or reordered: what
does not fit is refused by name.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from pathlib import Path
from typing import Any

from groundup.console import Console
from groundup.errors import ArtifactError, DataError, Problem, RecipeError
from groundup.generation.quantize import Quantization, quantization_of
from groundup.interop.folder import load_model
from groundup.interop.stored import open_stored
from groundup.model import ModelConfig, Transformer, extend_vocabulary, reshaped
from groundup.model.cost import parameter_shapes
from groundup.recipe import DEFAULT_PRESET, ModelSettings, StartSettings
from groundup.run import Run
from groundup.stage import ADAPTER_FILE, MODEL_FOLDER, Stage, find_model, graph
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.tokenizer.pretrained import PretrainedTokenizer
from groundup.tokenizer.stage import check_vocabulary, given_tokenizer


def starting_point(stage: Stage, run: Run, console: Console | None = None) -> tuple[Transformer, Tokenizer]:
    """The model that a stage starts from, and its tokenizer.

    It is that of another stage of the run, or one made elsewhere, or fresh: with the recipe's shape and seed, and the
    vocabulary of the run.
    """
    recipe = stage.recipe
    if stage.start is not None:
        model, tokenizer = load_model(run.folder(stage.start) / MODEL_FOLDER, verify=False)  # the pipeline did
        assert tokenizer is not None, "a stage saves its model with its tokenizer"
        return model.requires_grad_(True), tokenizer
    # Pretraining takes the run's, which may be a copy of the given one.
    own = starting_tokenizer(stage) if isinstance(stage.settings, StartSettings) else None
    own = own or load_tokenizer(run.folder("tokenizer"))
    if stage.outside_start is not None:
        return start_model(stage.outside_start, _changes(stage), own, console), own
    return Transformer(recipe.model.config(own.vocab_size), seed=recipe.seed), own


def starting_tokenizer(stage: Stage) -> Tokenizer | None:
    """The tokenizer of the model that a stage starts from; None where the run trains it.

    Raises:
        ArtifactError: there is none where it should be.
    """
    if stage.start is not None:
        return starting_tokenizer(graph(stage.recipe)[stage.start])
    _check_start(stage)
    return given_tokenizer(stage.recipe.tokenizer.use if _is_of_trunk(stage) else None, stage.outside_start)


def starting_config(stage: Stage) -> tuple[ModelConfig, str]:
    """The shape of the model that a stage starts from, and where it comes from; no weight is read.

    Raises:
        ArtifactError: no model where the recipe says.
        RecipeError: settings of `[model]` that do not fit together, or the weights.
    """
    recipe, model = stage.recipe, stage.recipe.model
    if stage.start is not None:
        return starting_config(graph(recipe)[stage.start])
    if stage.outside_start is not None:
        _check_start(stage)
        return start_config(stage.outside_start, _changes(stage)), f"start {stage.outside_start}"
    chosen = {"size": model.size, "depth": model.depth, "preset": model.preset or DEFAULT_PRESET}
    name = next(name for name, value in chosen.items() if value is not None)
    return model.config(recipe.tokenizer.vocab_size), f"{name} {chosen[name]}"


def check_start(stage: Stage) -> None:
    """Check that there is a model where a stage starts, that `[model]` fits it, and that it has a tokenizer."""
    starting_config(stage)
    if stage.outside_start is not None:
        starting_tokenizer(stage)


def check_shards(stage: Stage, setting: str, instead: str = "") -> None:
    """Check that there are shards of the tokens of the model that a stage starts from.

    Args:
        stage: one that needs them.
        setting: why it does, in messages.
        instead: another way out: ", or set …".

    Raises:
        DataError: there are none.
    """
    recipe, where = stage.recipe, f"[{stage.section}] {setting}"
    if not recipe.reads_text:
        what = "there are no token shards: this recipe reads no text."
        raise DataError(f"{where}: {what}", f"Give the recipe a [corpus] like the model's{instead}.")
    own, theirs = starting_tokenizer(stage), given_tokenizer(recipe.tokenizer.use, recipe.init)
    if own is not None and (theirs is None or theirs.fingerprint != own.fingerprint):
        what = f"this recipe's shards have another tokenizer than the model in {stage.settings.start}."
        raise DataError(f"{where}: {what}", f"Start from that model in a recipe of its own{instead}.")


def check_chat(stage: Stage, where: str) -> None:
    """Check that the tokenizer of the model that a stage starts from can lay out a chat."""
    with contextlib.suppress(ArtifactError):  # other checks say that it is not there
        tokenizer = starting_tokenizer(stage)
        if isinstance(tokenizer, PretrainedTokenizer) and not tokenizer.chat_templates:
            raise DataError(
                f"{where}: the model to start from has no chat template.",
                "Put a chat_template.jinja into its folder, or leave this out: it can be scored on text.",
            )


def _is_of_trunk(stage: Stage) -> bool:
    """Whether `[tokenizer]` and `[model]` are about the model that a stage starts from, and not about another one."""
    return not (stage.recipe.has_trunk and isinstance(stage.settings, StartSettings))


def _changes(stage: Stage) -> ModelSettings:
    """What `[model]` changes in the model made elsewhere that a stage starts from."""
    return stage.recipe.model if _is_of_trunk(stage) else ModelSettings()


def _check_start(stage: Stage) -> None:
    """Hold that there is a model where a stage starts from; `start` may have been meant for the name of a stage."""
    settings = stage.settings
    if not isinstance(settings, StartSettings):
        return
    try:
        find_model(settings.start)
    except ArtifactError as error:
        if os.path.isfile(os.path.join(settings.start, ADAPTER_FILE)):  # False also for what can be no name of a file
            raise
        known = [name for name in stage.recipe.branches if name != stage.name]
        known += ["pretrain"] if stage.recipe.has_trunk else []
        near = difflib.get_close_matches(settings.start, known, n=1)
        raise ArtifactError(
            f"[{stage.section}] start = {json.dumps(settings.start)}: no stage of this recipe, and no model there.",
            f"Did you mean {near[0]!r}?" if near else f"Name a run, a model's folder, or a stage: {', '.join(known)}.",
        ) from error  # fmt: skip


def start_config(init: str | Path, settings: ModelSettings | None = None) -> ModelConfig:
    """The configuration that a stage with this `init` begins with; no weight is read.

    Args:
        init: a run or a model's folder.
        settings: what `[model]` of the recipe changes: anything that leaves every weight its shape, such as the
            context length, dropout, windows or the scaling of RoPE.

    Raises:
        ArtifactError: no model there, or a damaged one.
        RecipeError: a setting that the weights do not fit, by name.
    """
    stored = open_stored(find_model(init))
    _check_floats(stored.quantization, init)
    return _changed(stored.config, init, settings or ModelSettings())


def start_model(
    init: str | Path,
    settings: ModelSettings | None = None,
    tokenizer: Tokenizer | None = None,
    console: Console | None = None,
) -> Transformer:
    """The model that a stage with this `init` begins with.

    Args:
        init, settings: as for `start_config`.
        tokenizer: of the run, where it is not the model's own: it may have more entries, but must begin with the same.
        console: where the number of new tokens is reported.

    Raises:
        DataError: the tokenizer's ids stand for other tokens than the model's; and as `start_config`.
    """
    console = console or Console(quiet=True)
    loaded, own = load_model(find_model(init))
    _check_floats(quantization_of(loaded), init)
    config = _changed(loaded.config, init, settings or ModelSettings())
    model = Transformer(config, device="meta")
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.requires_grad_(True)
    if tokenizer is not None:
        _fit_vocabulary(model, own, tokenizer, init, console)
    return model


def _check_floats(quantization: Quantization | None, init: str | Path) -> None:
    if quantization is not None:
        raise ArtifactError(
            f"{init}: its weights have {quantization.bits} bits, and no stage can start from such a model.",
            "Name the model that it was made from.",
        )


def _changed(config: ModelConfig, init: str | Path, settings: ModelSettings) -> ModelConfig:
    problems = [
        Problem(f"[model] {name} = {value!r}", f"a whole shape, but the model in {init} has one.", "Leave it unset.")
        for name in ("preset", "size", "depth")
        if (value := getattr(settings, name)) is not None
    ]
    base, overrides, shapes = config.to_dict(), settings.overrides(), parameter_shapes(config)

    def fits(changes: dict[str, Any]) -> bool:
        return parameter_shapes(reshaped(base, changes)) == shapes

    for name, value in overrides.items():
        with contextlib.suppress(RecipeError):  # it is wrong by itself, which the whole may mend; if not, it says so
            if not fits({name: value}):
                what = f"does not fit the weights in {init}, which have {base[name]!r}."
                fix = "Leave it unset, or start from a fresh model."
                problems.append(Problem(f"[model] {name} = {value!r}", what, fix))
    if not problems and not fits(overrides):
        names = ", ".join(name for name, value in overrides.items() if base[name] != value)
        problems.append(Problem(f"[model] {names}", f"together do not fit the weights in {init}."))
    if problems:
        raise RecipeError("model", problems)
    return reshaped(base, overrides)


def _fit_vocabulary(
    model: Transformer, own: Tokenizer | None, tokenizer: Tokenizer, init: str | Path, console: Console
) -> None:
    known = model.config.vocab_size
    if own is not None:
        check_vocabulary(own, tokenizer, init)
    elif tokenizer.vocab_size > known:
        raise DataError(
            f"[tokenizer]: {tokenizer.vocab_size:,} tokens, but the model in {init} knows {known:,} and has no "
            "tokenizer beside it that would tell which.",
            "Put its tokenizer.json into that folder.",
        )
    else:
        console.warn(f"{init}: has no tokenizer, so its ids cannot be compared with this run's.")
    if tokenizer.vocab_size > known:
        extend_vocabulary(model, tokenizer.vocab_size)
        console.note(
            f"{init}: {tokenizer.vocab_size - known:,} tokens are new to the model; their rows begin as the mean."
        )
