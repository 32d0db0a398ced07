"""Documents to a tokenizer: trained on them, or one that is there already (`[tokenizer] use`, or a model's own).

In: the corpus stage's documents. Out: `tokenizer.json` and the files that transformers read beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from groundup.corpus import stream_documents
from groundup.errors import ArtifactError, DataError
from groundup.recipe import TokenizerSettings
from groundup.report.format import format_lines
from groundup.stage import Check, Context, Method, Shown, Stage, find_model
from groundup.tokenizer.files import TOKENIZER_FILE, TOKENIZER_FILES
from groundup.tokenizer.pretrained import load_tokenizer, tokenizer_beside
from groundup.tokenizer.tokenizer import Tokenizer


class TokenizerStage(Method):
    """Documents to `tokenizer.json`."""

    settings = TokenizerSettings
    version = 2
    outputs = TOKENIZER_FILES

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The documents."""
        return ("corpus",)

    def outside(self, stage: Stage) -> dict[str, str]:
        """The tokenizer that is given."""
        given = given_tokenizer(stage.settings.use, stage.recipe.init)
        return {} if given is None else {"tokenizer": given.fingerprint}

    def checks(self, stage: Stage) -> Iterable[Check]:
        """A tokenizer that is given fits the model to start from."""
        use, init = stage.settings.use, stage.recipe.init

        def fits() -> None:
            given = given_tokenizer(use, init)
            if given is not None and init is not None and use is not None:
                check_vocabulary(start_tokenizer(init), given, init)

        yield "[tokenizer]", fits

    def work(self, context: Context) -> dict[str, Any]:
        """Train it, or take the given one, and measure it on the validation text."""
        settings, documents = context.recipe.tokenizer, context.run.folder("corpus")
        with context.console.bar("tokenizer") as bar:
            trained = given_tokenizer(settings.use, context.recipe.init) or Tokenizer.train(
                stream_documents(documents, "train"),
                kind=settings.kind,
                vocab_size=settings.vocab_size,
                split=settings.split,
                control_tokens=settings.control_tokens,
                spare_tokens=settings.spare_tokens,
                trainer=settings.trainer,
                sample_bytes=int(settings.sample_mib * 2**20),
                console=context.console,
            )
            trained.save(context.folder)
            n_bytes, n_tokens = 0, 0
            for document in stream_documents(documents, "validation"):
                n_bytes += len(document.text.encode())
                n_tokens += len(trained.encode(document.text))
            ratio = n_bytes / max(1, n_tokens)
            bar.finish(f"{trained.vocab_size:,} entries · {ratio:.2f} bytes/token")
        return {
            "kind": trained.kind,
            "vocab_size": trained.vocab_size,
            "bytes_per_token": ratio,
            "longest": trained.longest_tokens(20),
        }

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """Its size and compression."""
        lines = format_lines(
            (summary.get("vocab_size"), lambda value: f"{value:,} entries"),
            (summary.get("bytes_per_token"), lambda value: f"{value:.2f} bytes/token"),
        )
        return Shown("Tokenizer", lines=lines)


TOKENIZER = TokenizerStage()


def given_tokenizer(use: str | None, init: str | None) -> Tokenizer | None:
    """The tokenizer that a run is not to train: what `[tokenizer] use` names, else that of `init`, else None."""
    if use is None:
        return None if init is None else start_tokenizer(init)
    in_run = Path(use) / "tokenizer" / TOKENIZER_FILE
    return load_tokenizer(in_run if in_run.is_file() else use)


def start_tokenizer(init: str | Path) -> Tokenizer:
    """The tokenizer beside a model; ArtifactError: no model there, or none with a tokenizer."""
    folder = find_model(init)
    found = tokenizer_beside(folder)
    if found is None:
        raise ArtifactError(
            f"{folder}: no tokenizer beside the model, so its ids cannot be understood.",
            'Name the one it was trained with: [tokenizer] use = "…".',
        )
    return found


def check_vocabulary(own: Tokenizer, tokenizer: Tokenizer, init: str | Path) -> None:
    """Check that every id of a model's own tokenizer stands for the same token in another."""
    if own.fingerprint == tokenizer.fingerprint:
        return
    theirs, ours = own.vocab(), tokenizer.vocab()
    differing = [index for index, token in theirs.items() if ours.get(index) != token]
    if not differing:
        return
    shown = ", ".join(
        f"{i} ({theirs[i]!r} there, {ours[i]!r} here)" if i in ours else f"{i} (missing here)" for i in differing[:5]
    )
    more = f" and {len(differing) - 5:,} more" if len(differing) > 5 else ""
    raise DataError(
        f"[tokenizer]: its ids are not those that the model in {init} was trained with: {shown}{more}.",
        "Leave [tokenizer] use unset to take the model's own, or use one that begins with the same entries.",
    )
