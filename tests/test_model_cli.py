"""`groundup model`: what the presets are, what a model is made of and costs, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import CommandLine, groundup  # noqa: F401
from tiny_run import finished_run

from groundup.interop import load_model
from groundup.model import activation_bytes, count_parameters, preset, preset_names
from groundup.model.cost import kv_cache_bytes, training_flops


def test_list_has_every_preset_with_its_size(groundup: CommandLine) -> None:  # noqa: F811
    listed = groundup("model", "list", "--json").json
    assert {row["name"]: row["parameters"] for row in listed} == {
        name: count_parameters(preset(name)) for name in preset_names()
    }
    shown = groundup("model", "list").out
    assert all(name in shown for name in preset_names())
    assert "46,702,792,704" in shown


def test_describe_a_preset(groundup: CommandLine) -> None:  # noqa: F811
    ended = groundup("model", "describe", "gpt2")
    assert ended.code == 0
    assert "124,439,808 parameters" in ended.out
    assert "50,257 × 768" in ended.out
    assert "GELU (tanh form), 3,072 wide" in ended.out
    assert f"{training_flops(preset('gpt2'), 1024) // 3:,}" in ended.out
    assert "follows from" not in ended.out


def test_describe_in_json_is_what_the_library_counts(groundup: CommandLine) -> None:  # noqa: F811
    told = groundup("model", "describe", "qwen3-0.6b", "--json", "--batch", "3", "--length", "100").json
    config = preset("qwen3-0.6b")
    assert told["config"] == config.to_dict()
    assert sum(row["parameters"] for row in told["shapes"]) == told["parameters"]["all"] == count_parameters(config)
    assert told["flops"]["forward"] + told["flops"]["backward"] == 3 * training_flops(config, 100)
    assert told["bytes"]["activations, float32"] == sum(activation_bytes(config, 3, 100).values())
    assert told["bytes"]["key/value cache, bfloat16"] == kv_cache_bytes(config, 100, 3)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_described(groundup: CommandLine, name: str) -> None:  # noqa: F811
    ended = groundup("model", "describe", name, "--length", "64")
    assert f"{count_parameters(preset(name)):,} parameters" in ended.out


@pytest.mark.parametrize(("model", "same"), [("10m", "ground-10m"), ("depth=4", "ground-1m"), ("1b", "ground-1b")])
def test_describe_one_number_says_why(groundup: CommandLine, model: str, same: str) -> None:  # noqa: F811
    told = groundup("model", "describe", model, "--json").json
    assert told["config"] == preset(same).to_dict()
    derived = {row["setting"]: row for row in told["derived"]}
    assert {"model.d_model", "model.n_heads", "pretrain.lr", "pretrain.batch_size", "pretrain.tokens"} <= derived.keys()
    assert all(row["reason"] for row in told["derived"])
    assert "Step Law" in groundup("model", "describe", model).out


def test_describe_a_run_and_its_model_folder(groundup: CommandLine) -> None:  # noqa: F811
    run = finished_run()
    config = load_model(run.folder("sft") / "model")[0].config
    for place in (run.root, run.folder("pretrain"), run.folder("sft") / "model"):
        assert groundup("model", "describe", place, "--json").json["config"] == config.to_dict()


def test_fields_can_be_changed(groundup: CommandLine) -> None:  # noqa: F811
    changes = ("vocab_size=1000", 'attention=["window","full"]', "window=8", "model.d_model=64", "vocab_multiple=64")
    arguments = [part for change in changes for part in ("--set", change)]
    config = groundup("model", "describe", "ground-nano", "--json", *arguments).json["config"]
    assert (config["vocab_size"], config["attention"], config["window"]) == (1000, ["window", "full"], 8)
    assert (config["d_model"], config["head_dim"], config["d_ff"]) == (64, 32, 192)
    derived = groundup("model", "describe", "10m", "--json", "--set", "d_ff=1024").json["derived"]
    assert "model.d_ff" not in {row["setting"] for row in derived}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gtp2",), "Did you mean 'gpt2'?"),
        (("90b",), "from 200k to 10b"),
        (("depth=1",), "2 to 64 blocks"),
        (("gpt2", "--set", "n_layer=3"), "Did you mean 'n_layers'?"),
        (("gpt2", "--set", "bias=perhaps"), "boolean"),
        (("gpt2", "--set", "n_kv_heads=5"), "does not divide n_heads = 12"),
        (("gpt2", "--set", "vocab_size=many"), "is no number of tokens"),
        (("gpt2", "--set", "size=10m"), "groundup model describe 10m"),
        (("gpt2", "--set", "tied"), "field=value"),
    ],
)
def test_what_cannot_be_described_is_told(
    groundup: CommandLine,  # noqa: F811
    arguments: tuple[str, ...],
    said: str,
) -> None:
    ended = groundup("model", "describe", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert ended.out == ""


def test_a_folder_without_a_model_is_told(groundup: CommandLine, tmp_path: Path) -> None:  # noqa: F811
    ended = groundup("model", "describe", tmp_path)
    assert ended.code == 1
    assert "no model here" in ended.err
