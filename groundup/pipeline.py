"""The pipeline: a recipe's stages in order, each done once and skipped while it still stands.

A stage's fingerprint is made of its settings, the fingerprints of the stages that it needs, the digests of what it
reads from outside and its method's version: a change of one section redoes its stage and what stands on it, nothing
else. Started by `torchrun`, all processes run the pipeline together; the first alone does what is not training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from groundup import evaluation
from groundup.console import Console
from groundup.distributed import World, current_world
from groundup.environment import describe_environment
from groundup.errors import GateError, GroundupError
from groundup.preview import check_recipe
from groundup.recipe import Recipe, changed_settings
from groundup.run import MANIFEST, RECIPE_FILE, REPORT_FILE, Manifest, Run, State, stage_fingerprint
from groundup.stage import Context, Stage, ancestors, graph, select
from groundup.training.process import limited_threads


@dataclass(frozen=True)
class StagePlan:
    """Whether a stage is to be done, and why."""

    stage: Stage
    fingerprint: str
    state: State  # done; changed (settings, inputs or code are not what they were); begun (interrupted); missing
    forced: bool = False  # asked for, whatever its state
    problem: str | None = None  # why what it reads from outside cannot be read, if it cannot
    outside: Mapping[str, str] = dataclasses.field(default_factory=dict)  # digests of that

    @property
    def is_due(self) -> bool:
        """It is to be done."""
        return self.forced or self.state != "done"


def plan(
    recipe: Recipe,
    run: Run,
    *,
    only: Iterable[str] | None = None,
    start_from: str | None = None,
    force: bool = False,
    strict: bool = True,
) -> list[StagePlan]:
    """Each stage's fingerprint and state, in order; the other arguments are those of `build`.

    Args:
        strict: raise if an input that the recipe names is missing; else its stage says so.

    Raises:
        ArtifactError: a finished stage's manifest is damaged.
        DataError: an input file that the recipe names is missing.
        RunError: no such stage.
    """
    stages = graph(recipe)
    asked = select(stages, stages if only is None else only)
    again = set(asked) if force else set()
    if start_from is not None:
        begin = set(select(stages, [start_from]))
        again |= {name for name in stages if ancestors(stages, [name]) & begin}
    plans: dict[str, StagePlan] = {}
    wanted = ancestors(stages, asked)
    for name, stage in stages.items():
        if name in wanted:
            method = stage.method
            inputs = {need: plans[need].fingerprint for need in stage.needs}
            problem, outside = None, {}
            try:
                outside = method.outside(stage)
            except GroundupError as error:
                if strict:
                    raise
                problem = error.message
                inputs["problem"] = problem
            fingerprint = stage_fingerprint(method.version, stage.identity, inputs | outside)
            try:
                state = run.state(name, fingerprint)
            except GroundupError as error:  # its manifest is damaged
                if strict and name not in again:
                    raise
                state, problem = "changed", problem or error.message
            if state == "done" and not method.is_whole(run.folder(name)):
                state = "changed"
            plans[name] = StagePlan(stage, fingerprint, state, name in again, problem, outside)
    return list(plans.values())


def build(
    recipe: Recipe,
    root: str | Path,
    *,
    only: Iterable[str] | None = None,
    start_from: str | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Run:
    """Run the pipeline: do every stage that is not done, and write the report.

    Args:
        recipe: what to build, as it was read.
        root: the run's folder.
        only: stages, or methods, to do, with what they need (default: all).
        start_from: do this stage and all that stand on it again.
        force: do every stage again; with `only`, those alone.
        console: where progress is shown.

    Raises:
        ArtifactError: what a stage is to take from one done before is missing, damaged or changed; nothing was done.
        GateError: all is done, but a figure is short of the recipe's gate.
        RunError: no such stage, or another process works on the run.
        GroundupError: what a stage raises.
    """
    world = current_world()
    console = console if console is not None and world.is_first else Console(quiet=not world.is_first)
    console.rich.quiet = not world.is_first  # of several processes, one warns
    run = Run(root)
    only = [only] if isinstance(only, str) else None if only is None else list(only)
    if world.is_first:
        for names in (only or [], [] if start_from is None else [start_from]):
            select(graph(recipe), names)
        check_recipe(recipe, recipe.name)
        run.check(recipe, [part for name in graph(recipe) for part in (name.partition("/")[0], name)])
    with limited_threads(recipe.threads), run.lock() if world.is_first else contextlib.nullcontext():
        plans = plan(recipe, run, only=only, start_from=start_from, force=force)
        for item in plans:
            if item.is_due:  # before anything of it is made
                item.stage.method.check_memory(item.stage)
        console.name_width = max(len(item.stage.name) for item in plans)
        if world.is_first:
            due = {item.stage.name: item.stage for item in plans if item.is_due}
            for need in {need: None for stage in due.values() for need in stage.needs if need not in due}:
                run.check_files(need, digests=recipe.verify)
            _say_what_changed(run, recipe, console)
            run.create(recipe)
            # All at once: if this is interrupted, the same command without --force does what is left.
            for item in plans:
                if item.forced:
                    run.forget(item.stage.name)
        world.wait()
        for item in plans:
            if world.any(world.is_first and item.is_due):
                _do(item, Context(item.stage, run, world, console))
            else:
                if world.is_first:
                    run.clear(item.stage.name)
                console.stage_line(item.stage.name, "up to date")
        if world.is_first:
            gates = evaluation.write_comparison(recipe, run)["gates"]
            _write_report_if_old(run)
            _check_gates(run, gates, {item.stage.name for item in plans})
    return run


def _check_gates(run: Run, gates: Iterable[Mapping[str, Any]], names: Set[str]) -> None:
    """Raise for the gates that the figures of these stages miss."""
    missed = [gate["text"] for gate in gates if gate["passed"] is False and {*gate["measured_by"]} <= names]
    if missed:
        raise GateError(
            f"{run.root}: everything is built, but a gate of the recipe is missed: {'; '.join(missed)}.",
            "Train longer (--set pretrain.tokens=…), or change [[evaluate.gates]].",
        )


def _do(item: StagePlan, context: Context) -> None:
    stage, method = item.stage, item.stage.method
    if context.world.is_first:
        context.run.begin(stage.name, item.fingerprint, method.keeps)
    context.world.wait()
    start = time.perf_counter()
    summary = method.work(context) if method.trains or context.world.is_first else {}
    if context.world.is_first:
        context.run.finish(
            Manifest(
                stage=stage.name,
                fingerprint=item.fingerprint,
                seconds=time.perf_counter() - start,
                summary=summary,
                environment={**describe_environment(), **_devices(context.world)},
                settings={
                    name: value
                    for section in method.sections(stage)
                    for name, value in section.model_dump(mode="json").items()
                },
                shown=dataclasses.asdict(method.shown(stage, summary)),
                identity=stage.identity,
                needs={name: found.fingerprint for name in stage.needs if (found := context.run.manifest(name))},
                files=method.records(context.folder),
                outside=item.outside,
            )
        )
    context.world.wait()


def _devices(world: World) -> dict[str, Any]:
    """What it was computed on: threads, and of accelerators their name and number."""
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "processes": world.size}
    return {**found, "device": torch.cuda.get_device_name(world.device)} if world.device.type == "cuda" else found


def _say_what_changed(run: Run, recipe: Recipe, console: Console) -> None:
    with contextlib.suppress(GroundupError, OSError):
        changes = changed_settings(run.recipe, recipe)
        if changes:
            more = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
            console.note("The recipe has changed since the last build: " + "; ".join(changes[:6]) + more)


def _write_report_if_old(run: Run) -> None:
    """Write the page unless it is younger than all it shows."""
    page = run.root / REPORT_FILE
    made = [path for pattern in ("*", "*/*") for path in run.root.glob(f"{pattern}/{MANIFEST}")]
    newest = max(path.stat().st_mtime_ns for path in (run.root / RECIPE_FILE, *made))
    if not page.exists() or page.stat().st_mtime_ns <= newest:
        # Imported here: charts take long to import, and most commands draw none.
        from groundup.report.page import write_report

        write_report(run)
