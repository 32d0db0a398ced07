"""`[quantize.NAME]` and `groundup quantize`: from a recipe's lines to a model in fewer bits and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import CommandLine, groundup  # noqa: F401
from tiny_run import copy_of_finished, finished_run

import groundup as gu
from groundup.alignment.quantization import in_words, quantize_and_measure
from groundup.errors import GroundupError, RecipeError
from groundup.generation.quantize import Quantization, quantization_of
from groundup.interop.gguf import export_gguf
from groundup.pipeline import build
from groundup.preview import check_recipe, smoke_profile
from groundup.recipe import QuantizeSettings, Recipe, parse_recipe, recipe_toml
from groundup.run import Run
from groundup.stage import default_model, graph

BOTH = """
[align.sft]

[quantize.int8]
start = "sft"
activations = "int8"

[quantize.int4]
bits = 4
group_size = 64
calibration = 16
"""


def read(text: str) -> Recipe:
    return parse_recipe(text, "my.toml")


def test_the_section_makes_stages_that_are_scored_and_never_the_default() -> None:
    recipe = read(BOTH)
    stages = graph(recipe)
    assert stages["int8"].needs == ("sft", "corpus")
    assert stages["int4"].needs == ("pretrain", "corpus", "shards")
    assert stages["evaluate/int4"].needs == ("int4", "corpus")
    assert [stages[name].section for name in ("int8", "int4")] == ["quantize.int8", "quantize.int4"]
    assert default_model(recipe, to_chat=True)[0] == "sft"
    assert default_model(read(BOTH + '[generate]\nmodel = "int8"\n'), to_chat=True)[0] == "int8"
    assert read(recipe_toml(recipe)) == recipe
    assert smoke_profile(recipe).quantize["int4"].calibration == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quantize.it]\nbits = 5", "[quantize.it] bits = 5"),
        ("[quantize.it]\nbit = 4", "Did you mean 'bits'?"),
        ("[quantize.it]\nbits = 4\ngroup_size = 40", "must be a multiple of 32"),
        ('[quantize.it]\nbits = 4\nactivations = "int8"', "needs bits = 8"),
        ("[quantize]\nbits = 4", "[quantize] bits"),
        ("[quantize.pretrain]", "[quantize.pretrain]: the name is taken"),
        ("[align.sft]\n[quantize.SFT]", "[quantize.SFT]: the name is taken"),
        ('[quantize.a]\nstart = "b"\n[quantize.b]\nstart = "a"', "[quantize.a] needs itself"),
        ('[quantize.a]\n[align.sft]\nstart = "a"', "weights have few bits, and no stage can start"),
        ('[quantize.a]\n[quantize.b]\nstart = "a"', "weights have few bits, and no stage can start"),
        ('[quantize.a]\n[align.sft]\ncompute = "a"', "trains nothing"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        graph(read(text))
    assert message in str(raised.value)


def test_gptq_without_a_text_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = finished_run().root / "pretrain" / "model"
    recipe = read(f'[quantize.it]\nstart = "{model}"\nbits = 4\nmethod = "gptq"\n')
    with pytest.raises(GroundupError, match="reads no text"):
        check_recipe(recipe, "my.toml")
    run = build(read(f'[quantize.it]\nstart = "{model}"\nbits = 4\n'), tmp_path / "run", console=None)
    manifest = run.manifest("it")
    assert manifest is not None
    assert manifest.summary["method"] == "rtn"
    assert "bits_per_byte_change" not in manifest.summary
    assert gu.load(run.root).folder == run.root / "it" / "model"


def test_a_run_with_quantized_models(tmp_path: Path) -> None:
    run = copy_of_finished(tmp_path)
    written = recipe_toml(run.recipe) + (
        "\n[quantize.int8]\n\n[quantize.int4]\nbits = 4\ncalibration = 8\n"
        '[[evaluate.gates]]\nmetric = "bits_per_byte_change"\nmodel = "int8"\nmax = 0.001\n'
    )
    build(parse_recipe(written, "tiny", default_name=run.recipe.name), run.root)
    for name, bits, method, most in (("int8", 8, "rtn", 0.001), ("int4", 4, "gptq", 0.005)):  # chapter 9 states them
        manifest = run.manifest(name)
        assert manifest is not None
        figures = manifest.summary
        assert (figures["method"], figures["bytes_after"] < figures["bytes_before"]) == (method, True)
        assert figures["bits_per_byte_change_stderr"] > 0
        assert abs(figures["bits_per_byte_change"]) < most
        scores = json.loads((run.folder(f"evaluate/{name}") / "scores.json").read_text())["tasks"]
        assert scores["bits_per_byte"]["figures"]["bits_per_byte"]["value"] == pytest.approx(
            figures["bits_per_byte_after"], rel=0.05
        )
        loaded = gu.load(run.root, stage=name)
        assert quantization_of(loaded.model) == Quantization(bits)  # type: ignore[arg-type]
        page = (run.root / "report.html").read_text()
        assert f"{bits} bits a weight" in page
        assert "tokens/s" in page
        told = export_gguf(loaded.model, loaded.tokenizer, tmp_path / f"{name}.gguf")
        assert told["dtype"] == {8: "q8_0", 4: "q4_0"}[bits]
    # All is done: nothing is quantized again.
    made = (run.folder("int4") / "model" / "model.safetensors").stat().st_mtime_ns
    build(Run(run.root).recipe, run.root)
    assert (run.folder("int4") / "model" / "model.safetensors").stat().st_mtime_ns == made


def test_the_command(groundup: CommandLine, tmp_path: Path) -> None:  # noqa: F811
    root = finished_run().root
    done = groundup("quantize", root, tmp_path / "int4", "--bits", "4", "--calibration", "8", "--model", "pretrain")
    assert done.code == 0, done.err
    assert "rounding: GPTQ" in done.out
    assert "times smaller" in done.out
    assert " ± " in done.out
    assert "tokens/s" in done.out
    assert groundup("generate", tmp_path / "int4", "Once", "--max-tokens", "4").code == 0
    text = tmp_path / "mine.txt"
    text.write_text("Once upon a time there was a fox. " * 200)
    asked = ("quantize", root / "pretrain" / "model", tmp_path / "int8", "--activations", "int8", "--text", text)
    figures = json.loads(groundup(*asked, "--json").out)
    assert (figures["method"], figures["folder"]) == ("rtn", str(tmp_path / "int8"))
    assert figures["bits_per_byte_change_stderr"] >= 0
    assert quantization_of(gu.load(tmp_path / "int8").model) == Quantization(8, activations="int8")
    again = groundup(*asked)
    assert (again.code, "--force" in again.err) == (1, True)
    assert groundup(*asked, "--force").code == 0
    assert "quantized already" in groundup("quantize", tmp_path / "int8", tmp_path / "x").err
    wrong = groundup("quantize", root, tmp_path / "x", "--bits", "3")
    assert (wrong.code, "bits" in wrong.err) == (2, True)
    assert not (tmp_path / "x").exists()


def test_what_is_slower_is_said_to_be() -> None:
    figures = {"bytes_before": 4, "bytes_after": 1, "method": "rtn", "tokens_per_second_before": 9.0}
    assert "slower on this machine" in str(in_words({**figures, "tokens_per_second_after": 8.0}))
    assert "slower" not in str(in_words({**figures, "tokens_per_second_after": 10.0}))


def test_gptq_without_windows_is_refused(tmp_path: Path) -> None:
    loaded = gu.load(finished_run().root, stage="pretrain")
    with pytest.raises(GroundupError, match="text to calibrate"):
        quantize_and_measure(loaded.model, None, QuantizeSettings(bits=4, method="gptq"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
