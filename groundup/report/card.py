"""The model card of an exported model, in the Hub's form, from the figures of its run; and Ollama's Modelfile.

In: a run and a stage of it. Out: Markdown. Nothing in it is made up: what was not measured is listed as that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from groundup.console import format_bytes, format_count
from groundup.files import read_json
from groundup.report.record import RunRecord, read_record
from groundup.run import RECIPE_FILE, Run
from groundup.stage import MODEL_FOLDER

CARD = "README.md"
_LICENCES = {
    "groundup:classics": "CC0-1.0 (texts in the public domain in the United States)",
    "groundup:shakespeare": "public domain",
    "groundup:": "Apache-2.0, made by groundup's generators",
}
_MEASURABLE = {
    "bits_per_byte": "how well it predicts text",
    "exact_match": "right answers",
    "refusal_rate": "needless refusals",
    "harm_declined_share": "harmful requests declined",
}


def run_of(model: Path) -> tuple[Run, str] | None:
    """The run and the stage that a model's folder belongs to; None: it is no run's."""
    stage = model.parent if model.name == MODEL_FOLDER else model
    return (Run(stage.parent), stage.name) if (stage.parent / RECIPE_FILE).is_file() else None


def model_card(run: Run, stage: str, folder: str) -> str:
    """The card of a stage's model.

    Args:
        run: its run.
        stage: its stage.
        folder: under which name it is loaded in the example.
    """
    record = read_record(run)
    config = read_json(run.folder(stage) / MODEL_FOLDER / "config.json")
    statistics = record.filter_statistics
    steps = statistics.get("steps", [])
    scores = _scores(record, stage)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("groundup.report", ""), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"bytes": format_bytes, "count": format_count}
    manifest = record.stages[stage].manifest
    made_on = manifest.environment if manifest else {}
    return environment.get_template("card.md.j2").render(
        name=f"{record.name} ({stage})",
        about=record.about[:1].upper() + record.about[1:] + "." if record.about else "",
        folder=folder,
        parameters=record.summary(stage).get("parameters", 0) or record.summary("pretrain").get("parameters", 0),
        context_length=config.get("context_length") or config.get("max_position_embeddings") or 0,
        version=made_on.get("groundup", ""),
        machine=", ".join(str(made_on[key]) for key in ("cpu", "platform") if key in made_on),
        languages=sorted(statistics.get("languages", {})),
        sources=list(statistics.get("by_source", {})),
        licences=_licences(record, stage),
        steps=steps,
        dropped=[(step["step"], step["in"] - step["out"]) for step in steps if step["in"] > step["out"]],
        stages=_stages(record, stage),
        recipe=record.recipe_text,
        scores=scores,
        is_aligned=stage != record.base,
        contaminated=[
            (name, one["n_contaminated"], one["n"])
            for name, one in record.benchmarks.get(stage, {}).items()
            if one.get("n_contaminated")
        ],
        unmeasured=[
            words for key, words in _MEASURABLE.items() if key not in {score["key"] for score in scores}
        ],
    )  # fmt: skip


def _scores(record: RunRecord, stage: str) -> list[dict[str, Any]]:
    """Its row of the closing table, then of each benchmark beside it the figure that is the usual one."""
    found = {
        row["key"]: {"label": row["label"].removesuffix(f", {stage}"), **row["after"]}
        for row in record.scores.get("rows") or []
        if row.get("model") == stage and isinstance(row.get("after"), dict)
    }
    for name, card in record.benchmarks.get(stage, {}).items():
        figure, estimate = next(iter(card["figures"].items()))
        told = {"label": f"{name}, {figure.replace('_', ' ')}", **estimate}
        found.setdefault(f"{name}.{figure}", told)
    return [{"key": key, "data": key.rpartition(".")[0], **score} for key, score in found.items()]


def _licences(record: RunRecord, stage: str) -> list[tuple[str, str, str]]:
    """What the stages up to this one read, in their order, and its licence if it is known."""
    manifests = [one.manifest for name in ("corpus", *_path(record, stage)) if (one := record.stages.get(name))]
    return [
        (manifest.stage, source, next((told for known, told in _LICENCES.items() if source.startswith(known)), ""))
        for manifest in manifests
        if manifest
        for key in ("inputs", "data", "prompts")
        for source in manifest.settings.get(key) or ()
    ]


def _path(record: RunRecord, stage: str) -> list[str]:
    """The stages that trained something, from the first to this one."""
    path: list[str] = []
    at: str | None = stage
    while at is not None and at in record.stages and at not in path:
        path.append(at)
        at = next((name for name in record.stages[at].needs if record.stages[name].summary.get("flops")), None)
    return path[::-1]


def _stages(record: RunRecord, stage: str) -> list[dict[str, str]]:
    """How each of them was trained."""
    found = []
    for name in _path(record, stage):
        summary, seconds = record.summary(name), record.stages[name].seconds
        counts = {key: format_count(summary[key]) if key in summary else "–" for key in ("tokens", "steps")}
        flops = f"{summary['flops']:.2g}" if "flops" in summary else "–"
        minutes = "–" if seconds is None else f"{seconds / 60:.1f}"
        found.append({"name": name, **counts, "flops": flops, "minutes": minutes})
    return found


def modelfile(gguf: str, *, can_chat: bool, temperature: float) -> str:
    """Ollama's Modelfile of a GGUF file beside it: `ollama create NAME -f Modelfile`; the file carries its template."""
    lines = [f"FROM ./{gguf}", f"PARAMETER temperature {temperature:g}"]
    return "\n".join(lines + ([] if can_chat else ['TEMPLATE "{{ .Prompt }}"'])) + "\n"
