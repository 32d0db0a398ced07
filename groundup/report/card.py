"""The model card of an exported model, in the Hub's form, from the figures of its run; and Ollama's Modelfile.

In: a run and a stage of it. Out: Markdown. Nothing in it is made up: what was not measured is listed as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from groundup.console import format_bytes, format_count
from groundup.files import read_json, write_signed
from groundup.report.record import RunRecord, StageRecord, read_record
from groundup.run import RECIPE_FILE, Run
from groundup.stage import CARD_FILE, MODEL_FOLDER, is_assistant

MODELFILE = "Modelfile"
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


def write_card(model: Path, folder: Path) -> Path | None:
    """Write the card of a run's model into the folder that it is exported to; None: it is no run's."""
    found = run_of(model)
    if found is not None:
        write_signed(folder / CARD_FILE, model_card(*found, folder.name), "<!-- {} -->")
    return None if found is None else folder / CARD_FILE


def write_modelfile(model: Path, gguf: Path) -> Path:
    """Write Ollama's Modelfile beside a GGUF file, which carries its template: `ollama create NAME -f Modelfile`."""
    run, _ = run_of(model) or (None, "")
    lines = [f"FROM ./{gguf.name}", f"PARAMETER temperature {run.recipe.generate.temperature if run else 0.7:g}"]
    lines += [] if is_assistant(model) else ['TEMPLATE "{{ .Prompt }}"']
    write_signed(gguf.with_name(MODELFILE), "\n".join(lines), "# {}")
    return gguf.with_name(MODELFILE)


def model_card(run: Run, stage: str, folder: str) -> str:
    """The card of a stage's model.

    Args:
        run: its run.
        stage: its stage.
        folder: under which name it is loaded in the example.
    """
    record = read_record(run)
    config = read_json(run.folder(stage) / MODEL_FOLDER / "config.json")
    statistics, scores, path = record.filter_statistics, _scores(record, stage), _path(record, stage)
    steps = statistics.get("steps", [])
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
        licences=_licences(record, ["corpus", *path]),
        steps=steps,
        dropped=[(step["step"], step["in"] - step["out"]) for step in steps if step["in"] > step["out"]],
        stages=[_training(record.stages[name]) for name in path],
        recipe=record.recipe_text,
        scores=scores,
        is_assistant=is_assistant(run.folder(stage) / MODEL_FOLDER),
        contaminated=[
            (name, one["n_contaminated"], one["n"])
            for name, one in record.benchmarks.get(stage, {}).items()
            if one.get("n_contaminated")
        ],
        unmeasured=[words for key, words in _MEASURABLE.items() if key not in {score["key"] for score in scores}],
    )


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


def _path(record: RunRecord, stage: str) -> list[str]:
    """The stages that trained something, from the first to this one."""
    path: list[str] = []
    at: str | None = stage
    while at is not None and at in record.stages and at not in path:
        path.insert(0, at)
        at = next((name for name in record.stages[at].needs if record.summary(name).get("flops")), None)
    return path


def _licences(record: RunRecord, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """What stages read, in their order, and its licence if it is known."""
    return [
        (name, source, next((told for known, told in _LICENCES.items() if source.startswith(known)), ""))
        for name in names
        if name in record.stages and (manifest := record.stages[name].manifest)
        for key in ("inputs", "data", "prompts")
        for source in manifest.settings.get(key) or ()
    ]


def _training(stage: StageRecord) -> dict[str, str]:
    """How a stage was trained."""
    told = {key: format_count(stage.summary[key]) if key in stage.summary else "–" for key in ("tokens", "steps")}
    told["flops"] = f"{stage.summary['flops']:.2g}" if "flops" in stage.summary else "–"
    return {"name": stage.name, **told, "minutes": "–" if stage.seconds is None else f"{stage.seconds / 60:.1f}"}
