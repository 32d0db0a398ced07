"""Stages: what a method is, and the graph of named stages that a recipe makes of methods.

A method is one object, in the file of what it does, that says all there is to know of it: its settings, what it needs,
its version, what it reads from outside, how it checks its settings, its quick version, its memory, its work, and what
it shows in the report. A stage is a method under a name, with the settings of a recipe's section. Pipeline, preview,
command line and report walk over stages and know none by name.

    corpus → tokenizer → shards → pretrain → [align.NAME] [quantize.NAME] … → evaluate/MODEL for every language model
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from groundup.console import Console
from groundup.errors import ArtifactError, GroundupError, Problem, RecipeError, RunError
from groundup.files import file_digest, value_digest
from groundup.integrity import FileRecords, record_files
from groundup.recipe import Recipe, Section, StartSettings, resolve
from groundup.recipe.registry import EVALUATE, METHODS, QUANTIZE, TRUNK, load
from groundup.run import RECIPE_FILE, Run
from groundup.untrusted import reading

if TYPE_CHECKING:  # the data rooms and their worker processes start without torch
    from groundup.distributed import World

MODEL_FOLDER, CONFIG_FILE, ADAPTER_FILE = "model", "config.json", "adapter_config.json"
CARD_FILE = "README.md"  # of an exported model
Check = tuple[str, Callable[[], object]]
"""Where in the recipe, and what raises a GroundupError if something is wrong there."""


@dataclass(frozen=True)
class Shown:
    """What a finished stage shows in the report; kept in its manifest."""

    title: str  # its heading
    facts: Sequence[tuple[str, str]] = ()  # labels and values
    lines: Sequence[str] = ()  # the few words under its picture
    curves: Sequence[str] = ()  # values in its metrics.jsonl to plot beside the loss; "reward kl": under each other


class Method:
    """What a stage does; a method subclasses this and gives what differs."""

    settings: ClassVar[type[Section]]  # the class of its section
    version: ClassVar[int] = 1  # of its code; raised when results change
    makes: ClassVar[Literal["", "lm", "scorer", "classifier"]] = ""  # what kind of model; "": none
    starts_from: ClassVar[tuple[str, ...]] = ("lm",)  # what kinds of model it can start from
    trains: ClassVar[bool] = False  # every process takes part in its work
    is_default: ClassVar[bool] = True  # its model may be the one that is meant where none is named
    trainable: ClassVar[bool] = True  # a stage that trains can start from its model
    teaches: ClassVar[bool] = True  # its model answers, whatever it starts from; False: as that model does
    figures: ClassVar[tuple[str, ...]] = ()  # names in its summary that a gate may be on
    # Patterns of entries that outlive a change of the recipe, because the stage checks them piece by piece
    keeps: ClassVar[tuple[str, ...]] = ()
    # Patterns of the files that other stages take from it
    outputs: ClassVar[tuple[str, ...]] = (f"{MODEL_FOLDER}/[!.]*",)

    def needs(self, stage: Stage) -> tuple[str, ...]:
        """The stages it stands on, beside its `start` and `compute`."""
        return ()

    def sections(self, stage: Stage) -> tuple[Section, ...]:
        """What of the recipe decides its result."""
        return (stage.settings,)

    def outside(self, stage: Stage) -> dict[str, str]:
        """Digests of what it reads from outside the run; here, of a model made elsewhere that it starts from.

        Raises:
            GroundupError: something is missing.
        """
        return {} if stage.outside_start is None else {"start": model_digest(stage.outside_start)}

    def checks(self, stage: Stage) -> Iterable[Check]:
        """What can be found wrong with its settings before anything runs."""
        return ()

    def derived(self, stage: Stage) -> Iterable[tuple[str, str, str]]:
        """What its settings leave open and become on this machine: (setting, value, reason)."""
        return ()

    def check_memory(self, stage: Stage) -> None:
        """Refuse what cannot fit into memory, before anything is allocated.

        Raises:
            GroundupError: with the parts and the ways out.
        """

    def is_whole(self, folder: Path) -> bool:
        """Whether what a finished stage left can be read; if not, it is done again."""
        return True

    def records(self, folder: Path) -> FileRecords:
        """Size and digest of the files that other stages take from it."""
        found = sorted(path for pattern in self.outputs for path in folder.glob(pattern) if path.is_file())
        return record_files(folder, [path.relative_to(folder).as_posix() for path in found])

    def quick(self, settings: Any) -> Any:
        """The same settings for a fraction of the time: they show that everything works, not how good it gets."""
        return settings

    def work(self, context: Context) -> dict[str, Any]:
        """Do it, and return its figures: plain JSON values, with "flops" if it trains."""
        raise NotImplementedError

    def shown(self, stage: Stage, summary: Mapping[str, Any]) -> Shown:
        """What the report shows of it."""
        return Shown(stage.name)


@dataclass(frozen=True)
class Stage:
    """A method under a name."""

    name: str  # its folder in the run
    kind: str  # the method's name
    method: Method  # what it does
    settings: Any  # its section, resolved
    recipe: Recipe = field(repr=False)  # the whole recipe, resolved
    subject: str | None = None  # of an evaluation, whose model is scored

    @property
    def section(self) -> str:
        """Where its settings stand in the recipe."""
        return self.recipe.section_of(self.name) if self.name in self.recipe.branches else self.kind

    @property
    def identity(self) -> str:
        """Digest of all that decides its result, beside what it stands on and reads from outside."""
        settings = [section.fingerprint_values() for section in self.method.sections(self)]
        return value_digest([self.kind, self.method.version, self.recipe.seed, self.subject, settings])

    @property
    def start(self) -> str | None:
        """The stage of this recipe that it starts from; None: it is no such stage, or starts from outside."""
        if not isinstance(self.settings, StartSettings):
            return None
        known = self.settings.start in self.recipe.branches or (
            self.settings.start == "pretrain" and self.recipe.has_trunk
        )
        return self.settings.start if known else None

    @property
    def outside_start(self) -> str | None:
        """The model made elsewhere that it starts from, if it does."""
        if isinstance(self.settings, StartSettings):
            return None if self.start is not None else self.settings.start
        return getattr(self.settings, "init", None)

    @property
    def is_control(self) -> bool:
        """It spends another stage's compute, to be compared with."""
        return getattr(self.settings, "compute", None) is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages it stands on."""
        own = (self.start, getattr(self.settings, "compute", None))
        return tuple(dict.fromkeys(name for name in (*own, *self.method.needs(self)) if name is not None))


@dataclass(frozen=True)
class Context:
    """What a stage's work is given."""

    stage: Stage
    run: Run
    world: World
    console: Console

    @property
    def recipe(self) -> Recipe:
        """The whole recipe, resolved."""
        return self.stage.recipe

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return self.run.folder(self.stage.name)

    def compute(self) -> float | None:
        """FLOPs of the stage whose compute this one is to spend; None if it is no control.

        Raises:
            RunError: that stage does not say what it took.
        """
        name = getattr(self.stage.settings, "compute", None)
        if name is None:
            return None
        manifest = self.run.manifest(name)
        assert manifest is not None, "a stage that another one needs is done before it"
        flops = manifest.summary.get("flops")
        if flops is None:
            raise RunError(f"{name}: says nothing of the FLOPs it took, so {self.stage.name} cannot spend as many.")
        return float(flops)


def graph(recipe: Recipe) -> dict[str, Stage]:
    """The recipe's stages by name, every one behind those that it needs.

    Raises:
        RecipeError: a stage needs one that there is not, or that needs it in turn.
    """
    recipe = resolve(recipe)
    names = [name for name in TRUNK if (recipe.has_trunk if name == "pretrain" else recipe.reads_text)]
    stages = {name: Stage(name, name, load(TRUNK[name]), getattr(recipe, name), recipe) for name in names}
    waiting = {
        name: Stage(name, section.method, load(METHODS[section.method]), section, recipe)
        for name, section in recipe.align.items()
    }
    waiting |= {
        name: Stage(name, "quantize", load(QUANTIZE), section, recipe) for name, section in recipe.quantize.items()
    }
    while waiting:
        ready = next((stage for stage in waiting.values() if {*stage.needs} <= stages.keys()), None)
        if ready is None:
            what = "needs {}: no stage of this recipe, or one that needs it in turn."
            open_needs = {
                stage.section: ", ".join(sorted({*stage.needs} - stages.keys())) for stage in waiting.values()
            }
            problems = [Problem(f"[{section}]", what.format(names)) for section, names in open_needs.items()]
            raise RecipeError(recipe.name, problems)
        stages[ready.name] = waiting.pop(ready.name)
    problems = list(_misnamed(stages, recipe))
    if problems:
        raise RecipeError(recipe.name, problems)
    if recipe.evaluate.tasks:
        method = load(EVALUATE)
        for stage in [stage for stage in stages.values() if stage.method.makes == "lm"]:
            for subject in method.subjects(stage, stages):
                name = f"evaluate/{subject}"
                stages[name] = Stage(name, "evaluate", method, recipe.evaluate, recipe, subject)
    return stages


def _misnamed(stages: Mapping[str, Stage], recipe: Recipe) -> Iterator[Problem]:
    """Stages that are named where what they make, or do, does not serve."""
    models = ", ".join(stage.name for stage in language_models(stages)) or "none"
    for stage in stages.values():
        start = None if stage.start is None else stages[stage.start]
        if start is not None and start.method.makes not in stage.method.starts_from:
            what = f"makes no {' or '.join(stage.method.starts_from)}."
            yield Problem(f'[{stage.section}] start = "{start.name}"', what, f"Language models: {models}.")
        elif start is not None and not start.method.trainable:
            what = "its weights have few bits, and no stage can start from such a model."
            yield Problem(f'[{stage.section}] start = "{start.name}"', what, "Start from the model it is made from.")
        compute = getattr(stage.settings, "compute", None)
        if compute is not None and not stages[compute].method.trains:
            yield Problem(f'[{stage.section}] compute = "{compute}"', "trains nothing, so it spends no FLOPs.")
    chosen = recipe.generate.model
    if chosen is not None and stages[chosen].method.makes != "lm":
        yield Problem(f'[generate] model = "{chosen}"', "makes no language model.", f"Those that do: {models}.")


def current_stages(stages: Mapping[str, Stage], run: Run) -> set[str]:
    """The stages that are done as the recipe has them now, and so is all that they stand on.

    Read from the run's folder alone: whether files outside of it have changed, `groundup.pipeline.plan` knows.
    """
    found: dict[str, str] = {}  # fingerprints by name
    for name, stage in stages.items():
        manifest = run.manifest(name)
        if manifest is None or manifest.identity != stage.identity or not stage.method.is_whole(run.folder(name)):
            continue
        if all(need in found and found[need] == manifest.needs.get(need) for need in stage.needs):
            found[name] = manifest.fingerprint
    return set(found)


def stages_done(run: Run) -> list[str]:
    """The names of a run's stages that are done and of its recipe still, in the order in which they were done."""
    try:
        current = current_stages(graph(run.recipe), run)
    except GroundupError:  # of another version
        return run.finished()
    return [name for name in run.finished() if name in current]


def select(stages: Mapping[str, Stage], asked: Iterable[str]) -> list[str]:
    """The names of the stages that are asked for, by their own names or those of their methods.

    Raises:
        RunError: there is none of a name.
    """
    found = []
    for name in asked:
        chosen = [name] if name in stages else [stage.name for stage in stages.values() if stage.kind == name]
        if not chosen:
            raise RunError(f"{name!r} is no stage of this recipe.", f"Its stages: {', '.join(stages)}.")
        found += chosen
    return found


def ancestors(stages: Mapping[str, Stage], names: Iterable[str]) -> set[str]:
    """These stages and all that they stand on."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += stages[name].needs
    return found


def language_models(stages: Mapping[str, Stage]) -> list[Stage]:
    """The stages that make one, in order."""
    return [stage for stage in stages.values() if stage.method.makes == "lm"]


def default_model(recipe: Recipe, *, to_chat: bool) -> tuple[str, str]:
    """The stage whose model is meant where none is named, and why.

    To continue a text: the base model. To chat, serve and export: `[generate] model`, else the last that is no control
    and not quantized.

    Raises:
        RunError: the recipe makes none.
    """
    if not to_chat and recipe.has_trunk:  # whatever its methods are: `recipe` may be an outline
        return "pretrain", "the base model"
    models = language_models(graph(recipe))
    if recipe.generate.model is not None:
        return recipe.generate.model, "[generate] model"
    models = [stage for stage in models if stage.method.is_default] or models
    last = [stage.name for stage in models if not stage.is_control]
    if not last:
        raise RunError(f"{recipe.name}: this recipe makes no language model.", "Name a model's folder instead.")
    return last[-1], "the last model that is no control"


def find_model(path: str | Path, *, stage: str | None = None) -> Path:
    """The folder of a model: that of a run's stage, or a model's folder of anybody's.

    Args:
        path: `runs/demo`, `runs/demo/pretrain`, `runs/demo/pretrain/model`, or a folder with a model in it.
        stage: of a run (default: what chat takes, if it is there, else the last that is).

    Raises:
        ArtifactError: there is none.
    """
    path = Path(path)
    with reading(str(path)):  # a name may be longer than any can be
        base = path / "pretrain" / MODEL_FOLDER
        if stage == "pretrain" and (path / RECIPE_FILE).is_file() and (base / CONFIG_FILE).is_file():
            return base
        models = list(_models_of_run(path))
    if stage is not None and stage not in {folder.parent.name for folder in models}:
        names = ", ".join(folder.parent.name for folder in models)
        fix = f"Its models: {names}." if names else "It is no run: leave the stage out."
        raise ArtifactError(f"{path}: no stage {stage!r} here that makes a model.", fix)
    candidates = [path / stage / MODEL_FOLDER] if stage else [path, path / MODEL_FOLDER, *models]
    for folder in candidates:
        if (folder / CONFIG_FILE).is_file():
            return folder
    if (path / ADAPTER_FILE).is_file():
        raise ArtifactError(
            f"{path}: adapters of PEFT without the model that they belong to.",
            "Put them into it: gu.alignment.load_adapter(folder, model), gu.alignment.merge(model), gu.save_model.",
        )
    there = models_there(path)
    raise ArtifactError(
        f"{path}: no model here" + (f" of stage {stage!r}." if stage else "."),
        f"Its models: {', '.join(there)}." if there else "Name a run (runs/demo) or a model's folder; `groundup runs` "
        "lists the runs.",
    )  # fmt: skip


def is_assistant(model: Path) -> bool:
    """Whether the model in a folder was taught to answer: by its stage of a run, or one that this starts from.

    A model that was made elsewhere is taken for one that was.
    """
    stage = model.resolve().parent
    with contextlib.suppress(GroundupError, KeyError):  # no run, of another version, or a stage that was taken out
        stages = graph(Run(stage.parent).recipe)
        at = stages[stage.name]
        while at.kind not in TRUNK and not at.method.teaches and at.start is not None:
            at = stages[at.start]
        return at.kind not in TRUNK
    return stage.name not in TRUNK


def model_digest(start: str | Path) -> str:
    """What stands for a model made elsewhere in a fingerprint: the digests of its configuration, tokenizer and weights.

    Raises:
        ArtifactError: no model there.
    """
    folder = find_model(start)
    files = [folder / name for name in (CONFIG_FILE, "tokenizer.json") if (folder / name).is_file()]
    return value_digest({path.name: file_digest(path) for path in [*files, *sorted(folder.glob("*.safetensors"))]})


def models_there(path: Path) -> list[str]:
    """The stages of a run whose models are there, that of the default first; empty for what is no run."""
    return [folder.parent.name for folder in _models_of_run(path) if (folder / CONFIG_FILE).is_file()]


def _models_of_run(path: Path) -> Iterator[Path]:
    """Where a run's models are, or would be, that of the default first."""
    if not (path / RECIPE_FILE).is_file():
        return
    try:
        recipe = Run(path).recipe
    except GroundupError:  # of another version: what is there is found all the same
        yield from sorted(path.glob(f"*/{MODEL_FOLDER}"), key=lambda folder: folder.stat().st_mtime, reverse=True)
        return
    models = language_models(graph(recipe))
    if not models:
        return
    first = default_model(recipe, to_chat=True)[0]
    models.reverse()
    models.sort(key=lambda one: (one.name != first, one.is_control or not one.method.is_default))
    for stage in models:
        yield path / stage.name / MODEL_FOLDER
