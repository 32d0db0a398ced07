"""A recipe of the whole pipeline in two seconds, one finished run of it, and what may differ between runs."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from groundup.console import Console
from groundup.files import file_digest, own_folder
from groundup.pipeline import build
from groundup.recipe import Recipe, parse_recipe
from groundup.run import Manifest, Run
from groundup.stage import ancestors, graph

SCORES = ("evaluate/before-pretrain", "evaluate/pretrain", "evaluate/sft")
STAGES = ("corpus", "tokenizer", "shards", "pretrain", "sft", *SCORES)
WALL_CLOCK = ("tokens_per_second", "mfu", "peak_memory_bytes", "generation_tokens_per_second", "compiled_reason")
WORDS = tuple(
    "the cat sat on a mat and saw big red dog run home with old king who gave bread to poor child".split()  # noqa: SIM905
)

TOML = """
name = "tiny"
threads = 1

[corpus]
inputs = ["{inputs}"]
languages = []
dedup = "exact"

[tokenizer]
vocab_size = 320

[model]
preset = "ground-nano"
context_length = 64

[pretrain]
tokens = 5_000
batch_size = 8
eval_every = 10
sample_tokens = 4

[align.sft]
examples = 200
epochs = 1.0
eval_every = 100

[evaluate]
tasks = ["bits_per_byte", "groundup:tasks"]
limit = 20
max_tokens = 8
"""


def write_texts(path: Path, n_documents: int = 60) -> Path:
    """Some documents of random sentences, always the same."""
    draw = random.Random(n_documents)
    sentences = [" ".join(draw.choices(WORDS, k=8)).capitalize() + "." for _ in range(3 * n_documents)]
    records = [{"text": " ".join(sentences[3 * i : 3 * i + 3])} for i in range(n_documents)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_recipe(folder: Path, inputs: Path | str | None = None, *, without: str = "") -> Path:
    """`tiny.toml` in a folder, with texts of its own unless others are named; `without` leaves a section out."""
    inputs = inputs or write_texts(folder / "texts.jsonl")
    sections = TOML.format(inputs=inputs).split("\n\n")
    kept = [section for section in sections if not (without and section.startswith(f"[{without}]"))]
    path = folder / "tiny.toml"
    path.write_text("\n\n".join(kept), encoding="utf-8")
    return path


def tiny_recipe(inputs: Path, *overrides: str) -> Recipe:
    """The recipe, with `section.key=value` overrides."""
    return parse_recipe(TOML.format(inputs=inputs), "tiny.toml", overrides)


def build_quietly(recipe: Recipe, root: Path, **options: Any) -> Run:
    """Build without a word."""
    return build(recipe, root, console=Console(quiet=True), **options)


@functools.cache
def finished_run() -> Run:
    """One finished run for all tests that only read it; its recipe's texts lie beside it."""
    folder = Path(tempfile.mkdtemp(prefix="groundup-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_quietly(tiny_recipe(write_texts(folder / "texts.jsonl")), folder / "tiny")


def copy_of_finished(folder: Path) -> Run:
    """A copy to change, times of change included."""
    return Run(shutil.copytree(finished_run().root, folder / "tiny"))


def mark_done(recipe: Recipe, run: Run, summaries: dict[str, dict[str, Any]]) -> None:
    """Manifests of these stages, with their figures, and of all that they stand on, as a build would write them."""
    stages = graph(recipe)
    for name in ancestors(stages, summaries):
        stage, folder = stages[name], run.folder(name)
        for place in (folder.parent, folder):
            if place != run.root:
                own_folder(place)
        sections = stage.method.sections(stage)
        settings = {key: value for one in sections for key, value in one.model_dump(mode="json").items()}
        needs = dict.fromkeys(stage.needs, "f")
        figures = summaries.get(name, {})
        run.finish(Manifest(name, "f", 1.0, figures, settings=settings, needs=needs, identity=stage.identity))


def bits(run: Run) -> dict[str, str]:
    """Digest of everything in a run that recipe and seed decide; wall-clock figures are left out."""
    found = {}
    for path in sorted(run.root.rglob("*")):
        name = str(path.relative_to(run.root))
        if path.name == "stage.json":
            found[name] = json.dumps(_decided(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
        elif path.is_file() and path.name not in ("timings.jsonl", "report.html") and "/." not in f"/{name}":
            found[name] = file_digest(path)
    return found


def times(run: Run) -> dict[str, int]:
    """When each file of a run was written, in nanoseconds; the lock's files left out."""
    files = {str(path.relative_to(run.root)): path for path in run.root.rglob("*") if path.is_file()}
    return {name: path.stat().st_mtime_ns for name, path in files.items() if "/." not in f"/{name}"}


def rewritten(run: Run, before: dict[str, int]) -> set[str]:
    """The stages of which anything was written or removed since."""
    now = times(run)
    changed = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}
    return {stage for stage in STAGES if any(name.startswith(f"{stage}/") for name in changed)}


def _decided(manifest: dict[str, Any]) -> dict[str, Any]:
    summary = {name: value for name, value in manifest["summary"].items() if name not in WALL_CLOCK}
    return {"fingerprint": manifest["fingerprint"], "settings": manifest["settings"], "summary": summary}
