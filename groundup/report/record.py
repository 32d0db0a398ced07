"""What a run's folder says: manifests, logs, samples, scores and the corpus's filter statistics.

In: a `Run`. Out: a `RunRecord` of plain values. A run that is unfinished, or whose files are damaged, still
gives a record: what cannot be read is left out and named in `warnings`, and so are scores of an earlier model.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from groundup.errors import ArtifactError, GroundupError
from groundup.files import read_json
from groundup.report.format import is_number, mapping, mappings
from groundup.run import MANIFEST, RECIPE_FILE, Manifest, Run
from groundup.stage import current_stages, default_model, graph, language_models


@dataclass(frozen=True)
class Curve:
    """What a training stage logged, in steps' order."""

    train: list[dict[str, Any]]  # lines of every step (`step`, `loss`, `lr`, ...)
    validation: list[dict[str, Any]]  # lines of the validation passes (`step`, `val_loss`, ...)
    timings: list[dict[str, Any]]  # lines of `step`, `seconds`, `tokens_per_second`
    samples: list[dict[str, Any]]  # lines of `step`, `prompt`, `text`
    lines: list[dict[str, Any]] = field(default_factory=list)  # all lines of metrics.jsonl
    rollouts: list[dict[str, Any]] = field(default_factory=list)  # lines of `step`, `prompt`, `answer`, `reward`


@dataclass(frozen=True)
class StageRecord:
    """One stage: how far it is, its manifest if it is done, and what it starts from and stands on."""

    name: str
    state: Literal["done", "changed", "unfinished", "to come"]
    manifest: Manifest | None
    needs: tuple[str, ...] = ()  # the stage it starts from, or those that it needs
    # Stages of [align.NAME] that it needs too: a reward model, one whose compute it spends
    beside: tuple[str, ...] = ()
    is_control: bool = False
    shown: Mapping[str, Any] = field(default_factory=dict)  # what it says of itself, once done
    summary: dict[str, Any] = field(default_factory=dict)  # its figures
    seconds: float | None = None  # wall-clock time of its work

    @property
    def title(self) -> str:
        """Its heading."""
        return str(self.shown.get("title", self.name))


@dataclass(frozen=True)
class RunRecord:
    """All that the page shows, as read."""

    name: str
    path: str  # of the run, quoted for a shell
    about: str
    seed: int | None  # None: the recipe cannot be read
    base: str  # the first stage that makes a language model
    end: str  # the stage whose model is used
    recipe_text: str
    stages: dict[str, StageRecord]
    curves: dict[str, Curve]
    scores: dict[str, Any]
    filter_statistics: dict[str, Any]
    benchmarks: dict[str, dict[str, Any]]  # by model and benchmark
    attention: dict[str, dict[str, Any]]  # by model: of one text, as it was scored
    warnings: list[str] = field(default_factory=list)

    def state(self, stage: str) -> str:
        """How far a stage is; "" if there is none of that name."""
        return self.stages[stage].state if stage in self.stages else ""

    def summary(self, stage: str) -> dict[str, Any]:
        """A stage's figures; empty if the stage is not done or not of this recipe."""
        return self.stages[stage].summary if stage in self.stages else {}


def read_record(run: Run) -> RunRecord:
    """Read everything the page needs from a run's folder.

    Raises:
        RunError: the folder has no recipe, so it is no run.
    """
    Run.existing(run.root)
    warnings: list[str] = []
    about, seed, base, end = "", None, "", ""
    stages = {name: StageRecord(name, "to come", None) for name in run.finished()}
    changed: Set[str] = set()
    try:
        recipe = run.recipe
        about, seed, stages_now = recipe.about, recipe.seed, graph(recipe)
        models = [stage.name for stage in language_models(stages_now)]
        if models:
            base, end = models[0], default_model(recipe, to_chat=True)[0]
        changed = stages_now.keys() - current_stages(stages_now, run)
        stages = {
            name: StageRecord(
                name, "to come", None, (stage.start,) if stage.start else stage.needs,
                tuple(need for need in stage.needs if need in recipe.branches and need != stage.start),
                stage.is_control,
            )
            for name, stage in stages_now.items()
        }  # fmt: skip
    except GroundupError as error:
        warnings.append(f"The recipe cannot be read: {error}")
    stages = {name: _read_stage(run, stage, name in changed, warnings) for name, stage in stages.items()}
    evaluations, corpus = run.folder("evaluate"), run.folder("corpus")
    done = {name for name, stage in stages.items() if stage.state == "done"}
    if old := [name for name, stage in stages.items() if stage.state == "changed" and name.startswith("evaluate/")]:
        warnings.append(f"Not shown, since they are of an earlier model or recipe: the scores in {', '.join(old)}.")
    scored = [name for name in stages if f"evaluate/{name}" in done]
    attention = {name: _read_mapping(evaluations / name / "attention.json", warnings) for name in scored}
    benchmarks = {
        name: _benchmarks(
            [*([evaluations / name] if name in scored else []), run.folder(name) / "benchmarks"], warnings
        )
        for name in stages
    }
    return RunRecord(
        name=run.name,
        path=shlex.quote(run.root.as_posix()),
        about=about,
        seed=seed,
        base=base,
        end=end,
        recipe_text=(run.root / RECIPE_FILE).read_text(encoding="utf-8", errors="replace"),
        stages=stages,
        curves={name: curve for name in stages if (curve := _read_curve(run.folder(name), warnings))},
        scores=_scores(_read_mapping(evaluations / "scores.json", warnings), done),
        filter_statistics=_read_mapping(corpus / "filter_statistics.json", warnings),
        benchmarks={name: found for name, found in benchmarks.items() if found},
        attention={name: found for name, found in attention.items() if found},
        warnings=warnings,
    )


def _scores(table: Mapping[str, Any], done: Set[str]) -> dict[str, Any]:
    """The table of scores without what evaluations measured that are not done as the recipe and its models are now."""
    is_answered = f"evaluate/{table.get('model')}" in done
    return {
        **table,
        "rows": [row for row in mappings(table.get("rows")) if f"evaluate/{row.get('model')}" in done],
        "gates": [
            gate
            for gate in mappings(table.get("gates"))
            if not isinstance(by := gate.get("measured_by"), list) or {*map(str, by)} <= done
        ],
        **({} if is_answered else {"by_kind": {}, "answers": []}),
    }


def _benchmarks(folders: Iterable[Path], warnings: list[str]) -> dict[str, Any]:
    """What a model was asked from files, by its recipe and beside it; a generated set has a colon in its name."""
    found = {}
    for folder in folders:
        for name, card in mapping(_read_mapping(folder / "scores.json", warnings).get("tasks")).items():
            figures = [mapping(one) for one in mapping(mapping(card).get("figures")).values()]
            is_whole = figures and all(is_number(one.get(key)) for one in figures for key in ("value", "stderr", "n"))
            if is_whole and ":" not in name and name != "bits_per_byte":
                found[name] = card
    return found


def _read_stage(run: Run, stage: StageRecord, is_changed: bool, warnings: list[str]) -> StageRecord:
    manifest, folder = run.manifest(stage.name), run.folder(stage.name)
    mappings = () if manifest is None else (manifest.summary, manifest.environment, manifest.shown)
    if manifest is not None and all(isinstance(value, dict) for value in mappings):
        told: dict[str, Any] = {"shown": manifest.shown, "summary": manifest.summary, "seconds": manifest.seconds}
        return replace(stage, state="changed" if is_changed else "done", manifest=manifest, **told)
    if (folder / MANIFEST).is_file():
        warnings.append(f"{stage.name}/{MANIFEST} is damaged.")
    return replace(stage, state="unfinished" if folder.is_dir() else "to come")


def _read_curve(folder: Path, warnings: list[str]) -> Curve | None:
    def lines(name: str, *numbers: str) -> list[dict[str, Any]]:
        found = _lines(folder / f"{name}.jsonl", warnings)
        return [line for line in found if all(is_number(line.get(number)) for number in numbers)]

    metrics = lines("metrics", "step")
    if not metrics:
        return None
    return Curve(
        train=[line for line in metrics if is_number(line.get("loss"))],
        validation=[line for line in metrics if is_number(line.get("val_loss"))],
        timings=lines("timings", "tokens_per_second", "seconds"),
        samples=[line for line in lines("samples", "step") if isinstance(line.get("text"), str)],
        lines=metrics,
        rollouts=[
            line
            for line in lines("rollouts", "step")
            if is_number(line.get("reward")) and {"prompt", "answer"} <= line.keys()
        ],
    )


def _read_mapping(path: Path, warnings: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except ArtifactError:
        value = None
    if not isinstance(value, dict):
        warnings.append(f"{path.parent.name}/{path.name} is damaged.")
        return {}
    return value


def _lines(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """The objects of a log; the one line that a kill may have cut short is passed over."""
    lines: list[dict[str, Any]] = []
    n_damaged = 0
    for raw in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            n_damaged += 1
        else:
            lines += [value] if isinstance(value, dict) else []
    if n_damaged > 1:
        warnings.append(f"{path.parent.name}/{path.name}: {n_damaged} lines are damaged and not shown.")
    return lines
