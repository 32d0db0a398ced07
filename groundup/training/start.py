"""Starting from a model that is there already, instead of a fresh one: `init = "<folder>"` of a training stage.

In: a run, a model's folder of groundup's or of a Hugging Face family; what `[model]` of the recipe changes in it; the
run's tokenizer. Out: the model, with rows for tokens that it did not know. Weights are never cut or reordered: what
does not fit is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from groundup.console import Console
from groundup.errors import ArtifactError, DataError, Problem, RecipeError
from groundup.files import file_digest, value_digest
from groundup.interop import find_model, load_model
from groundup.interop.folder import CONFIG_FILE, tokenizer_beside
from groundup.interop.stored import open_stored
from groundup.model import ModelConfig, Transformer, extend_vocabulary, reshaped
from groundup.model.cost import parameter_shapes
from groundup.recipe import ModelSettings
from groundup.tokenizer import Tokenizer, load_tokenizer
from groundup.tokenizer.files import TOKENIZER_FILE

_DECIDES = (CONFIG_FILE, TOKENIZER_FILE)
_SHOWN_IDS = 5


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
    return _changed(open_stored(find_model(init)).config, init, settings or ModelSettings())


def start_model(
    init: str | Path,
    settings: ModelSettings | None = None,
    tokenizer: Tokenizer | None = None,
    console: Console | None = None,
) -> Transformer:
    """The model that a stage with this `init` begins with.

    Args:
        init: a run or a model's folder.
        settings: as for `start_config`.
        tokenizer: of the run, where it is not the model's own: it may have more entries, but must begin with the same.
        console: where it is said how many tokens are new.

    Raises:
        ArtifactError: no model there, or a damaged one.
        DataError: the tokenizer's ids stand for other tokens than the model's.
        RecipeError: a setting that the weights do not fit, by name.
    """
    console = console or Console(quiet=True)
    loaded, own = load_model(find_model(init))
    config = _changed(loaded.config, init, settings or ModelSettings())
    model = Transformer(config, device="meta")
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.requires_grad_(True)
    if tokenizer is not None:
        _fit_vocabulary(model, own, tokenizer, init, console)
    return model


def start_tokenizer(init: str | Path) -> Tokenizer:
    """The tokenizer beside a model.

    Raises:
        ArtifactError: no model there, or none with a tokenizer.
    """
    folder = find_model(init)
    found = tokenizer_beside(open_stored(folder))
    if found is None:
        raise ArtifactError(
            f"{folder}: no tokenizer beside the model, so its ids cannot be understood.",
            'Name the one it was trained with: [tokenizer] use = "…".',
        )
    return found


def given_tokenizer(use: str | None, init: str | None) -> Tokenizer | None:
    """The tokenizer that a run is not to train: the one that `[tokenizer] use` names, else that of `init`, else None.

    Raises:
        ArtifactError: there is none where it should be.
    """
    if use is None and init is not None:
        return start_tokenizer(init)
    if use is None:
        return None
    in_run = Path(use) / "tokenizer" / TOKENIZER_FILE
    return load_tokenizer(in_run if in_run.is_file() else use)


def start_digest(init: str | Path) -> str:
    """What stands for the model in a fingerprint: the digests of its configuration, tokenizer and weights.

    Raises:
        ArtifactError: no model there.
    """
    folder = find_model(init)
    files = [folder / name for name in _DECIDES if (folder / name).is_file()] + sorted(folder.glob("*.safetensors"))
    return value_digest({path.name: file_digest(path) for path in files})


def check_vocabulary(own: Tokenizer, tokenizer: Tokenizer, init: str | Path) -> None:
    """Hold that every id of a model's own tokenizer stands for the same in another.

    Raises:
        DataError: with the first ids that do not.
    """
    if own.fingerprint == tokenizer.fingerprint:
        return
    theirs, ours = _tokens(own), _tokens(tokenizer)
    differing = [index for index, token in enumerate(theirs) if index >= len(ours) or ours[index] != token]
    if not differing:
        return
    shown = ", ".join(
        f"{index} ({theirs[index]!r} there, {ours[index]!r} here)" if index < len(ours) else f"{index} (missing here)"
        for index in differing[:_SHOWN_IDS]
    )
    more = f" and {len(differing) - _SHOWN_IDS:,} more" if len(differing) > _SHOWN_IDS else ""
    raise DataError(
        f"[tokenizer]: its ids are not those that the model in {init} was trained with: {shown}{more}.",
        "Leave [tokenizer] use unset to take the model's own, or use one that begins with the same entries.",
    )


def _changed(config: ModelConfig, init: str | Path, settings: ModelSettings) -> ModelConfig:
    problems = [
        Problem(f"[model] {name} = {value!r}", f"a whole shape, but init = {str(init)!r} has one.", "Leave it unset.")
        for name in ("preset", "size", "depth")
        if (value := getattr(settings, name)) is not None
    ]
    base, overrides = config.to_dict(), settings.overrides()
    shapes = parameter_shapes(config)
    for name, value in overrides.items():
        if base[name] == value:
            continue
        try:
            fits = parameter_shapes(reshaped(base, {name: value})) == shapes
        except RecipeError:
            fits = True  # not by itself, which the whole may mend; if not, it says so below
        if not fits:
            what = f"does not fit the weights in {init}, which have {base[name]!r}."
            problems.append(
                Problem(f"[model] {name} = {value!r}", what, "Leave it unset, or start from a fresh model.")
            )
    if problems:
        raise RecipeError("model", problems)
    changed = reshaped(base, overrides)
    if parameter_shapes(changed) != shapes:
        names = ", ".join(name for name, value in overrides.items() if base[name] != value)
        raise RecipeError("model", [Problem(f"[model] {names}", f"together do not fit the weights in {init}.")])
    return changed


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
        console.warn(f"{init}: has no tokenizer, so whether its ids are those of this run's cannot be seen.")
    if tokenizer.vocab_size > known:
        extend_vocabulary(model, tokenizer.vocab_size)
        console.note(
            f"{init}: {tokenizer.vocab_size - known:,} tokens are new to the model; their rows begin as the mean."
        )


def _tokens(tokenizer: Tokenizer) -> list[str | bytes]:
    """What each id stands for: a control token's name, or bytes."""
    control = tokenizer.special_ids
    return [
        tokenizer.decode([index], skip_special=False) if index in control else tokenizer.token_bytes(index)
        for index in range(tokenizer.vocab_size)
    ]
