"""The Python face: what the package's docstring promises, typed and complete."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch

import groundup as gu
from groundup.errors import ArtifactError


def docstring_example() -> str:
    """The code in the package's docstring."""
    assert gu.__doc__
    return "\n".join(line[4:] for line in gu.__doc__.splitlines() if line.startswith("    "))


def test_the_docstrings_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    tiny_run.write_texts(texts / "stories.jsonl")
    example = docstring_example()
    for large, small in {
        '"texts/*.jsonl.gz"': '"texts/*.jsonl"',
        "32_768": "320",
        "llama-160m": "llama-nano",
        "tokens=2e9": "tokens=3e3, eval_every=100",
        "max_tokens=64": "max_tokens=8, seed=1",  # or now and then it ends at once
    }.items():
        assert large in example
        example = example.replace(large, small)
    monkeypatch.chdir(tmp_path)
    # The example takes it that shards are there.
    gu.build(tiny_run.tiny_recipe(texts / "stories.jsonl"), "runs/mine", only=["shards"])
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(example, names)
    assert capsys.readouterr().out.strip()
    assert names["run"].summary["tokens"] >= 2000
    assert (tmp_path / "runs" / "mine" / "pretrain" / "model" / "model.safetensors").is_file()
    loaded = gu.load("runs/mine/pretrain")
    for mine, read in zip(names["run"].model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(mine, read)


def test_the_docstrings_model_is_as_large_as_its_name_says() -> None:
    config = gu.preset("llama-160m", vocab_size=32_768)
    model = gu.Transformer(config, device="meta")
    assert model.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.n_parameters == pytest.approx(160e6, rel=0.1)


def test_every_name_is_there_and_listed() -> None:
    assert gu.__all__ == sorted(set(gu.__all__))
    for name in gu.__all__:
        assert getattr(gu, name) is not None
        assert name in dir(gu)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gu.nothing
    scope: dict[str, Any] = {}
    exec("from groundup import *", scope)
    assert set(gu.__all__) <= scope.keys()


def test_names_are_those_of_the_rooms() -> None:
    assert gu.corpus is importlib.import_module("groundup.corpus")
    assert gu.build is importlib.import_module("groundup.pipeline").build
    assert gu.Tokenizer is importlib.import_module("groundup.tokenizer").Tokenizer


def test_the_package_is_typed() -> None:
    assert resources.files("groundup").joinpath("py.typed").is_file()
    # What type checkers read is what is there when the program runs.
    assert gu.__file__
    tree = ast.parse(Path(gu.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} == set(gu.__all__)
    for node in imports:
        for alias in node.names:
            there = importlib.import_module(node.module or "")
            assert getattr(there, alias.name, None) is getattr(gu, alias.name)


def test_build_and_load_do_what_the_commands_do(tmp_path: Path) -> None:
    recipe = gu.read_recipe(tiny_run.write_recipe(tmp_path), ["pretrain.tokens=1000", "align.sft.examples=100"])
    run = gu.build(recipe, tmp_path / "run", console=gu.Console(quiet=True))
    assert isinstance(run, gu.Run)
    assert run.recipe == recipe
    base, assistant = gu.load(run.root, stage="pretrain"), gu.load(run.root)
    assert (base.folder, assistant.folder) == (run.root / "pretrain" / "model", run.root / "sft" / "model")
    assert assistant.tokenizer is not None
    reply = gu.chat_reply(
        assistant.model,
        assistant.tokenizer,
        [{"role": "user", "content": "Hello"}],
        gu.SamplingParams(max_tokens=4, seed=1),
    )
    assert reply.n_tokens <= 4
    assert [item.name for item in gu.list_runs(tmp_path)] == ["run"]
    page = gu.write_report(run)
    assert page == run.root / "report.html"
    scores = json.loads((run.root / "evaluate" / "scores.json").read_text())
    texts = [document.text for document in gu.corpus.stream_documents(run.root / "corpus", "validation")]
    base.model.compute_dtype = torch.float32
    measured = gu.bits_per_byte(base.model, texts, assistant.tokenizer)
    assert measured.value == pytest.approx(scores["rows"][0]["after"]["value"], rel=0.02)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100), "100 bytes instead of"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json: 2 bytes instead of"),
        (lambda folder: (folder / "config.json").unlink(), "no model here"),
    ],
)
def test_a_damaged_model_is_named(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    run = tiny_run.copy_of_finished(tmp_path)
    damage(run.root / "sft" / "model")
    with pytest.raises(ArtifactError, match=words) as raised:
        gu.load(run.root / "sft")
    assert str(run.root / "sft") in str(raised.value)
