"""The architecture chapter prints the textbook forms, the initialization table and the figures as they are."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from groundup.model import ModelConfig, initialization

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "manual" / "05-architecture.md").read_text(encoding="utf-8")
PRINTED = re.findall(r"^<!-- code: (\w+)\.(\w+) -->\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("subject", "name", "printed"), PRINTED, ids=lambda value: value if len(value) < 40 else "")
def test_the_manual_prints_what_the_reference_says(subject: str, name: str, printed: str) -> None:
    form = getattr(importlib.import_module(f"groundup.reference.{subject}"), name)
    assert printed == inspect.getsource(form), f"copy groundup/reference/{subject}.py: {name} into the chapter again"


def test_every_form_of_the_models_parts_is_printed() -> None:
    printed = {(subject, name) for subject, name, _ in PRINTED}
    assert len(printed) == PAGE.count("<!-- code: ") == len(PRINTED)
    for subject in (
        "attention",
        "experts",
        "feedforward",
        "masks",
        "normalization",
        "objective",
        "optimizers",
        "positions",
    ):
        module = importlib.import_module(f"groundup.reference.{subject}")
        forms = [(name, form) for name, form in vars(module).items() if inspect.isfunction(form)]
        own = [name for name, form in forms if form.__module__ == module.__name__ and not name.startswith("_")]
        assert {(subject, name) for name in own} <= printed


def test_textbook_forms_are_short() -> None:
    for _, name, printed in PRINTED:
        if name != "transformer":
            assert printed.count("\n") <= 40, name


def test_the_initialization_table_is_the_codes() -> None:
    table = [line for line in (initialization.__doc__ or "").splitlines() if line.startswith("|")]
    assert len(table) == 9
    assert "\n".join(table) in PAGE


def test_the_initialization_figures_are_the_benchmarks() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "initialization.json").read_text(encoding="utf-8"))
    told = f"{result['layers']} layers of width {result['width']}, rows of {result['length']} random tokens"
    assert told in PAGE
    assert f"means over {result['seeds']} seeds" in PAGE
    for row in result["rows"]:
        assert max(row["forward"]["worst_error"], row["backward"]["worst_error"]) < 0.03
        for parameter in row["parameters"]:
            assert parameter["measured"] == pytest.approx(parameter["table"], rel=0.02)


def test_every_choice_of_a_model_is_told() -> None:
    shape = {"vocab_size", "context_length", "n_layers", "d_model", "dropout"}  # the chapter on sizes has them
    for field in dataclasses.fields(ModelConfig):
        assert field.name in shape or f"`{field.name}`" in PAGE, field.name
    config = (ROOT / "groundup" / "model" / "config.py").read_text(encoding="utf-8")
    choices = re.search(r"^Activation = Literal\[(.*)\]$", config, re.MULTILINE)
    assert choices is not None
    assert all(f"| `{name}` |" in PAGE for name in re.findall(r'"(\w+)"', choices[1]))
