"""Before and after: the same scores of several models, as the rows of the closing table.

Each row says what was measured on held-out data, with n and standard error, and whether the recipe's gate for it
is met. Wall-clock figures are kept apart: they belong to the machine, not to the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundup.console import Console, format_count
from groundup.evaluation.harness import Scores, score_model
from groundup.evaluation.metrics import Estimate
from groundup.model import Transformer
from groundup.recipe import EvaluateSettings, Gates
from groundup.tokenizer import Tokenizer

_SHOWN_ANSWERS = 60


def compare(
    models: Mapping[str, Transformer],
    tokenizer: Tokenizer,
    *,
    settings: EvaluateSettings,
    shards_folder: Path,
    n_tasks: int,
    seed: int,
    console: Console | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score the models on the road and lay their scores side by side.

    Args:
        models: "initial" (untrained), "base" (pretrained) and, where there is one, "assistant" (fine-tuned).
        tokenizer: of all of them.
        settings: which tasks, how many prompts, which gates.
        shards_folder: the run's shards; their validation split is scored.
        n_tasks: conversations that the task generator made for fine-tuning; its held-out ones are asked.
        seed: of the generator.
        console: where progress is shown.

    Returns:
        What `scores.json` holds, and the stage's summary (which alone has wall-clock figures).
    """
    console = console or Console(quiet=True)
    found: dict[str, Scores] = {}
    with console.bar("evaluate", len(models)) as bar:
        for number, (name, model) in enumerate(models.items()):
            bar.update(number, note=f"the {name} model")
            # An untrained model is scored on text only: nothing it could answer.
            tasks = settings.tasks if name != "initial" else ("bits_per_byte",)
            if name == "initial" and "bits_per_byte" not in settings.tasks:
                continue
            found[name] = score_model(
                model,
                tokenizer,
                settings=settings.model_copy(update={"tasks": tasks}),
                shards_folder=shards_folder,
                tasks_seed=seed,
                n_tasks=n_tasks,
            )
        rows = _rows(found, settings.gates)
        bar.finish(" · ".join(_in_words(row) for row in rows))
    last = list(found.values())[-1]
    asked = found.get("assistant", found["base"])
    scores = {
        "rows": rows,
        "answers": [answer.to_dict() for answer in asked.answers[:_SHOWN_ANSWERS]],
        "by_kind": {
            kind: {"before": _value(found["base"].by_kind.get(kind)), "after": _value(after)}
            for kind, after in asked.by_kind.items()
        },
    }
    return scores, {"rows": rows, "generation_tokens_per_second": last.generation_tokens_per_second}


def _rows(found: Mapping[str, Scores], gates: Gates) -> list[dict[str, Any]]:
    rows = []
    initial, base, assistant = found.get("initial"), found["base"], found.get("assistant")
    if initial is not None and initial.bits_per_byte and base.bits_per_byte:
        row = _row("bits_per_byte", "bits per byte", initial.bits_per_byte, base.bits_per_byte, lower_is_better=True)
        least = gates.min_bits_per_byte_drop
        if least is not None:
            fell = initial.bits_per_byte.value - base.bits_per_byte.value
            row["gate"] = {"text": f"falls by at least {least:g}", "passed": fell >= least}
        rows.append(row)
    if assistant is not None and assistant.bits_per_byte and base.bits_per_byte:
        # What learning to answer costs on plain text.
        rows.append(
            _row(
                "bits_per_byte_sft", "bits per byte, by SFT", base.bits_per_byte, assistant.bits_per_byte,
                lower_is_better=True,
            )
        )  # fmt: skip
    asked = assistant or base
    if asked.exact_match is not None:
        before = base.exact_match if assistant is not None else None
        row = _row("exact_match", "exact match", before, asked.exact_match, lower_is_better=False)
        row["gate"] = _exact_match_gate(gates, before, asked.exact_match)
        rows.append(row)
    return rows


def _exact_match_gate(gates: Gates, before: Estimate | None, after: Estimate) -> dict[str, Any] | None:
    texts, passed = [], True
    if gates.max_exact_match_before is not None and before is not None:
        texts.append(f"at most {gates.max_exact_match_before:.0%} before")
        passed = passed and before.value <= gates.max_exact_match_before
    if gates.min_exact_match is not None:
        texts.append(f"at least {gates.min_exact_match:.0%} after")
        passed = passed and after.value >= gates.min_exact_match
    return {"text": ", ".join(texts), "passed": passed} if texts else None


def _row(key: str, label: str, before: Estimate | None, after: Estimate, *, lower_is_better: bool) -> dict[str, Any]:
    return {
        "key": key,
        "label": label,
        "before": _value(before),
        "after": _value(after),
        "n_unit": after.unit,
        "lower_is_better": lower_is_better,
        "gate": None,
    }


def _value(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {"value": estimate.value, "stderr": estimate.stderr, "n": estimate.n}


def _in_words(row: Mapping[str, Any]) -> str:
    before, after = row["before"], row["after"]
    shown = "{:.1%}" if row["key"] == "exact_match" else "{:.3f}"
    start = f"{shown.format(before['value'])} → " if before else ""
    return f"{row['label']} {start}{shown.format(after['value'])} (n {format_count(after['n'])})"
