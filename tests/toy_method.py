"""A method from outside the package: a model learns to say one token. Run as a program, it is groundup with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

import groundup as gu
from groundup.cli.main import main
from groundup.interop import save_model
from groundup.interop.start import starting_point
from groundup.recipe import AlignSettings, OptimizerSettings, setting
from groundup.stage import Check, Context, Method, Shown, Stage
from groundup.training import TrainingJob, forget_checkpoints, train
from groundup.training.objective import Batch, NextToken
from groundup.training.pretrain import training_checks


class ToySettings(AlignSettings, OptimizerSettings):
    """A model to one that says one token."""

    token: int = setting(70, "the token to be said", ge=0)
    rows: int = setting(48, "rows to learn it from", ge=1)


class OneToken:
    """Rows of random ids whose targets are all one token."""

    def __init__(self, settings: ToySettings, vocab_size: int) -> None:
        self.token, self.vocab_size = settings.token, vocab_size
        self.fingerprint = f"one token {settings.token} of {vocab_size}"

    def rows(self, first: int, last: int) -> Batch:
        draws = [torch.Generator().manual_seed(place) for place in range(first, last)]
        ids = torch.stack([torch.randint(self.vocab_size, (16,), generator=draw) for draw in draws])
        return {"ids": ids, "targets": torch.full_like(ids, self.token)}

    def validation(self, batch_size: int, limit: int | None) -> Iterator[Batch]:
        yield self.rows(1_000, 1_000 + batch_size)


class Toy(Method):
    """The stage."""

    settings = ToySettings
    makes = "lm"
    trains = True
    figures = ("said",)

    def checks(self, stage: Stage) -> Iterable[Check]:
        return training_checks(stage)

    def quick(self, settings: ToySettings) -> ToySettings:
        return settings.model_copy(update={"rows": 16})

    def work(self, context: Context) -> dict[str, Any]:
        settings: ToySettings = context.stage.settings
        model, tokenizer = starting_point(context.stage, context.run)
        source = OneToken(settings, tokenizer.vocab_size)
        job = TrainingJob(
            name=context.stage.name, modules={"model": model}, objective=NextToken(), source=source, settings=settings,
            n_rows=settings.rows, folder=context.folder, seed=context.recipe.seed, row_length=16,
        )  # fmt: skip
        summary = train(job, context.world, context.console)
        with torch.no_grad():
            chances = model.eval()(source.rows(0, 4)["ids"]).softmax(dim=-1)[..., settings.token]
        save_model(context.folder / "model", model, tokenizer, world=context.world)
        forget_checkpoints(job, context.world)
        return {**summary, "said": float(chances.mean())}

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        said = f"said {summary['said']:.0%}"
        return Shown("Saying one token", facts=[("probability of the token", said)], lines=[said], curves=["grad_norm"])


gu.register("toy", Toy(), "A model learns to say one token.")

if __name__ == "__main__":
    main()
