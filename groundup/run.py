"""A run: one folder that holds a recipe and one folder per stage.

`runs/<name>/recipe.toml`, then `corpus/`, `tokenizer/`, ... A stage is done when its `stage.json`
manifest is there and its fingerprint (its settings, its inputs' fingerprints, its code version) still
matches; then it is skipped. The manifest is written last, so a stage killed anywhere is simply not done.
A lock keeps two processes from writing one run; it falls with its process, so none goes stale.

The folder may be one that holds other things too: nothing in it is replaced or removed but a stage's folder that
carries our mark, and a recipe and a report that are as groundup wrote them. The lock, and what is not whole yet, are
in `.groundup/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from groundup.errors import ArtifactError, GroundupError, RunError
from groundup.files import (
    check_ours,
    check_signed,
    clear_folder,
    is_ours,
    own_folder,
    read_json,
    remove_partials,
    value_digest,
    write_error,
    write_json,
    write_signed,
)
from groundup.integrity import FileRecords, check_files
from groundup.recipe import Recipe, read_recipe, recipe_toml
from groundup.untrusted import read_bytes, reading

MANIFEST = "stage.json"
STARTED = "started.json"
RECIPE_FILE = "recipe.toml"
REPORT_FILE = "report.html"
OWN_FOLDER = ".groundup"
LOCK_FILE = f"{OWN_FOLDER}/lock"
HOLDER_FILE = f"{OWN_FOLDER}/holder.json"
_AGAIN = "Make it again with --from {}."


State = Literal["done", "changed", "begun", "missing"]


@dataclass(frozen=True)
class Manifest:
    """What `stage.json` says of a finished stage."""

    stage: str  # the stage's name
    fingerprint: str  # digest of settings, inputs' fingerprints and code version
    seconds: float  # wall-clock seconds of the work since it was last started
    summary: dict[str, Any]  # the stage's figures, plain JSON values, for the console, the report and `status`
    environment: dict[str, Any] = field(default_factory=dict)  # versions, threads and machine
    settings: Mapping[str, Any] = field(default_factory=dict)  # the settings that made it
    shown: Mapping[str, Any] = field(default_factory=dict)  # what the report shows of it: title, facts, lines, curves
    needs: Mapping[str, str] = field(default_factory=dict)  # the fingerprints of the stages it stands on, by name
    identity: str = ""  # digest of settings, seed and code version alone
    files: FileRecords = field(default_factory=dict)  # size and digest of the files that other stages take from it
    outside: Mapping[str, str] = field(default_factory=dict)  # digests of what it read from outside the run

    @classmethod
    def read(cls, folder: Path, stage: str) -> Manifest | None:
        """The manifest in a stage's folder, or None if it is not done.

        Raises:
            ArtifactError: it is damaged, or was changed by hand.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        fix = _AGAIN.format(stage)
        with reading(str(path), fix=fix):
            values = json.loads(read_bytes(path))
            if not isinstance(values, dict) or values.pop("digest", value_digest(values)) != value_digest(values):
                raise ArtifactError(f"{path}: damaged, or changed by hand.", fix)
            return TypeAdapter(cls).validate_python(values)

    def write(self, folder: Path) -> None:
        """Mark the stage in `folder` as done."""
        write_json(folder / MANIFEST, {**self.__dict__, "digest": value_digest(self.__dict__)})


def stage_fingerprint(version: int, settings: object, inputs: Mapping[str, str]) -> str:
    """Digest of what a stage's result depends on: code version, settings, inputs' fingerprints."""
    return value_digest({"version": version, "settings": settings, "inputs": dict(inputs)})


class Run:
    """A run's folder.

    Args:
        root: the folder, such as `runs/demo`; need not exist yet.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @classmethod
    def existing(cls, root: str | Path) -> Run:
        """A run that is there already.

        Raises:
            RunError: no run in that folder.
        """
        run = cls(root)
        if not (run.root / RECIPE_FILE).is_file():
            known = [str(other.root) for other in list_runs(run.root.parent if run.root.name else Path("runs"))]
            fix = f"Runs here: {', '.join(known)}." if known else "Make one: groundup build demo."
            raise RunError(f"{root}: no run in this folder (it has no {RECIPE_FILE}).", fix)
        return run

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def recipe(self) -> Recipe:
        """The recipe the run was last built with."""
        return read_recipe(self.root / RECIPE_FILE)

    @property
    def outline(self) -> Recipe:
        """The recipe with its `[align.NAME]` sections as they are written: read in a moment, for those who generate."""
        return read_recipe(self.root / RECIPE_FILE, outline=True)

    def check(self, recipe: Recipe, stages: Iterable[str]) -> None:
        """Hold that a build would replace nothing that is not ours; called before anything is done.

        Raises:
            RunError: something in the folder is somebody else's.
        """
        for name in (OWN_FOLDER, *stages):
            check_ours(self.root / name)
        if not self._keeps(recipe):
            check_signed(self.root / RECIPE_FILE)
        check_signed(self.root / REPORT_FILE)

    def create(self, recipe: Recipe) -> None:
        """Make the folder and keep the recipe in it.

        Raises:
            RunError: another recipe is there that somebody has written or changed by hand.
        """
        if not self._keeps(recipe):
            self.write(RECIPE_FILE, recipe_toml(recipe), "# {}")

    def write(self, name: str, text: str, comment: str) -> None:
        """Write a file into the folder, in the place of nothing but what groundup wrote; see `write_signed`."""
        own_folder(self.root / OWN_FOLDER)
        write_signed(self.root / name, text, comment, through=self.root / OWN_FOLDER)

    def _keeps(self, recipe: Recipe) -> bool:
        """Whether the recipe in the folder is this one, however it is written."""
        try:
            return recipe_toml(self.recipe) == recipe_toml(recipe)
        except (GroundupError, OSError):
            return False

    def folder(self, stage: str) -> Path:
        """Where a stage's artifact is, or will be."""
        return self.root / stage

    def manifest(self, stage: str) -> Manifest | None:
        """The stage's manifest, or None if it is not done or its manifest is damaged."""
        with contextlib.suppress(ArtifactError):
            return Manifest.read(self.folder(stage), stage)
        return None

    def check_files(self, stage: str, *, digests: bool = True) -> None:
        """Hold that a finished stage's files are what they were when it was done; see `groundup.integrity`.

        Raises:
            ArtifactError: one is missing, damaged or changed.
        """
        manifest = Manifest.read(self.folder(stage), stage)
        if manifest is not None:
            check_files(self.folder(stage), manifest.files, _AGAIN.format(stage), digests=digests)

    def finished(self) -> list[str]:
        """The names of the stages that are done, in the order in which they were."""
        found = [path for pattern in ("*", "*/*") for path in self.root.glob(f"{pattern}/{MANIFEST}")]
        ordered = sorted(found, key=lambda path: path.stat().st_mtime_ns)
        return [path.parent.relative_to(self.root).as_posix() for path in ordered]

    def state(self, stage: str, fingerprint: str) -> State:
        """Where the stage stands: done; changed (its settings, inputs or code are others now); begun; missing.

        Raises:
            ArtifactError: its manifest is damaged.
        """
        manifest = Manifest.read(self.folder(stage), stage)
        if manifest is not None:
            return "done" if manifest.fingerprint == fingerprint else "changed"
        begun = _read_or_none(self.folder(stage) / STARTED) == {"fingerprint": fingerprint}
        return "begun" if begun else "missing"

    def begin(self, stage: str, fingerprint: str, keeps: Sequence[str] = ()) -> Path:
        """Make a stage's folder ready: what another fingerprint left is removed, an interrupted start is kept.

        Args:
            stage: its name.
            fingerprint: what it will be finished with.
            keeps: patterns of what the stage itself checks piece by piece, and which stays.

        Returns:
            The folder. Until `finish`, the stage counts as not done.

        Raises:
            RunError: the folder is not ours.
        """
        folder = self.folder(stage)
        started = folder / STARTED
        same = started.is_file() and _read_or_none(started) == {"fingerprint": fingerprint}
        if not same:
            self.forget(stage, keeps)
        if folder.parent != self.root:
            own_folder(folder.parent)
        own_folder(folder)
        (folder / MANIFEST).unlink(missing_ok=True)
        remove_partials(folder)
        if not same:
            write_json(started, {"fingerprint": fingerprint})
        return folder

    def finish(self, manifest: Manifest) -> None:
        """Mark a stage as done."""
        manifest.write(self.folder(manifest.stage))
        self.clear(manifest.stage)

    def clear(self, stage: str) -> None:
        """Take away a finished stage's mark of having begun, which a kill right behind its manifest leaves there."""
        if is_ours(self.folder(stage)):
            (self.folder(stage) / STARTED).unlink(missing_ok=True)

    def forget(self, stage: str, keeps: Sequence[str] = ()) -> None:
        """Remove a stage's artifact, all but the entries `keeps`, so that it is made again.

        Raises:
            RunError: the folder is not ours.
        """
        folder = self.folder(stage)
        check_ours(folder)
        try:
            if is_ours(folder):
                # First: what a kill leaves of the folder is then neither done nor gone on with.
                (folder / MANIFEST).unlink(missing_ok=True)
                (folder / STARTED).unlink(missing_ok=True)
                clear_folder(folder, keeps)
        except OSError as error:
            raise write_error(folder, error) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process.

        The operating system frees the lock when its process ends, however it ends: no lock can go stale.

        Raises:
            RunError: another process holds it, or the folder for the lock is not ours.
        """
        holder = self.root / HOLDER_FILE
        lock = FileLock(self.root / LOCK_FILE)
        own_folder(self.root / OWN_FOLDER)
        try:
            # Not at once: `is_worked_on` of another process holds the lock for an instant.
            lock.acquire(timeout=0.5)
        except Timeout as error:
            who = {"pid": "?", "host": "?"}
            with contextlib.suppress(TypeError, ValueError):  # damaged
                who |= _read_or_none(holder) or {}
            raise RunError(
                f"{self.root}: process {who['pid']} on {who['host']} is working on this run.",
                "Wait for it, or choose another folder with --out.",
            ) from error
        except OSError as error:
            raise write_error(self.root, error) from error
        try:
            remove_partials(self.root / OWN_FOLDER)
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def is_worked_on(self) -> bool:
        """Whether a process holds the run now."""
        if not (self.root / LOCK_FILE).exists():
            return False
        lock = FileLock(self.root / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:
            return False  # not ours to write: then it is not ours to lock either
        lock.release()
        return False


def list_runs(parent: str | Path = "runs") -> list[Run]:
    """The runs in a folder, newest first."""
    parent = Path(parent)
    if not parent.is_dir():
        return []
    found = [Run(folder) for folder in parent.iterdir() if (folder / RECIPE_FILE).is_file()]
    return sorted(found, key=lambda run: (run.root / RECIPE_FILE).stat().st_mtime, reverse=True)


def _read_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except (ArtifactError, OSError):
        return None
