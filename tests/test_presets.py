"""Presets and the ladder: published sizes to the unit, published configurations field by field, one number for all."""

import dataclasses
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lengths import examples

from groundup.alignment import SFTSettings
from groundup.errors import RecipeError
from groundup.model import (
    ModelConfig,
    RopeScaling,
    Transformer,
    activation_bytes,
    cost,
    count_parameters,
    ladder_config,
    preset,
    preset_names,
)
from groundup.model.ladder import (
    DEPTHS,
    LARGEST,
    SMALLEST,
    parse_size,
    shape_choices,
    shape_of_depth,
    shape_of_size,
    training_choices,
)
from groundup.preview import check_recipe, derived_values, smoke_profile
from groundup.recipe import (
    ModelSettings,
    PretrainSettings,
    Recipe,
    RopeScalingSettings,
    derivations,
    parse_recipe,
    recipe_toml,
    resolve,
)

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "llama-160m": 162_417_408,
    "llama-2-7b": 6_738_415_616,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "smollm2-135m": 134_515_008,
}
"""Parameters as their authors' weights have them (a tied matrix once)."""

LADDER = [name for name in preset_names() if name.startswith("ground-") and name != "ground-nano"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_builds_without_memory_and_has_the_published_size(name):
    model = Transformer(preset(name), device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.n_parameters == PUBLISHED.get(name, count_parameters(preset(name)))


def test_every_preset_of_others_has_a_published_size():
    own = {name for name in preset_names() if name.startswith("ground-") or name.endswith("-nano")}
    assert set(preset_names()) - own == set(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("gpt2", transformers.GPT2Config, {}),
        ("gpt-neo-1.3b", transformers.GPTNeoConfig, {}),
        ("llama-2-7b", transformers.LlamaConfig, {}),
        ("mistral-7b", transformers.MistralConfig, {"num_key_value_heads": 8}),
        ("mixtral-8x7b", transformers.MixtralConfig, {}),
    ],
)
def test_shapes_are_the_defaults_of_transformers(name, kind, values):
    """These configuration classes have the published model as their default."""
    theirs, ours = kind(**values), preset(name)
    assert (theirs.vocab_size, theirs.hidden_size) == (ours.vocab_size, ours.d_model)
    layers = getattr(theirs, "num_hidden_layers", None) or theirs.num_layers
    assert (layers, theirs.num_attention_heads) == (ours.n_layers, ours.n_heads)
    assert getattr(theirs, "num_key_value_heads", ours.n_heads) == ours.n_kv_heads
    assert (
        getattr(theirs, "intermediate_size", None) or getattr(theirs, "n_inner", None) or 4 * ours.d_model
    ) == ours.d_ff
    if name == "gpt-neo-1.3b":
        assert theirs.window_size == ours.window
        assert ["local" if ours.pattern(i) == "window" else "global" for i in range(24)] == theirs.attention_layers
    if name == "mixtral-8x7b":
        assert (theirs.num_local_experts, theirs.num_experts_per_tok) == (ours.n_experts, ours.experts_per_token)
    if name == "mistral-7b":
        assert theirs.sliding_window == ours.window


@pytest.mark.parametrize("name", LADDER)
def test_each_rung_in_the_file_is_what_the_ladder_makes(name):
    assert preset(name) == ladder_config(size=name.removeprefix("ground-"))


def test_the_demo_keeps_its_shape():
    config = preset("ground-1m")
    assert (config.n_layers, config.d_model, config.n_heads, config.head_dim, config.d_ff) == (4, 128, 4, 32, 384)
    assert (config.vocab_size, config.context_length) == (2048, 256)
    by_depth = ladder_config(depth=4)
    assert by_depth == config
    rates = {choice.name: choice.value for choice in training_choices(config)}
    assert (rates["pretrain.lr"], rates["pretrain.muon_lr"]) == (PretrainSettings().lr, PretrainSettings().muon_lr)


@settings(max_examples=examples(25))
@given(st.one_of(st.sampled_from(DEPTHS), st.integers(SMALLEST, LARGEST).map(lambda size: (size,))))
def test_every_rung_is_exactly_qwen3_shaped(number):
    shape = shape_of_depth(number) if isinstance(number, int) else shape_of_size(*number)
    config = ModelConfig(**shape)
    assert config.n_heads * config.head_dim == config.d_model
    assert config.d_model % 256 == 0 or config.d_model < 256
    assert config.n_heads % config.n_kv_heads == 0
    same = ("norm", "qk_norm", "position", "activation", "bias", "tied_embeddings", "rope_theta", "attention")
    assert [getattr(config, name) for name in same] == [getattr(preset("ground-1m"), name) for name in same]


@settings(max_examples=examples(25))
@given(st.integers(7_000_000, 3_000_000_000))
def test_a_size_is_met_and_its_widths_are_multiples_of_256(size):
    config = ModelConfig(**shape_of_size(size))
    assert count_parameters(config) == pytest.approx(size, rel=0.3)
    assert config.d_model % 256 == 0


def test_more_depth_never_makes_a_smaller_model():
    sizes = [count_parameters(ladder_config(depth=depth)) for depth in DEPTHS]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("text", "size"), [("10m", 10_000_000), ("1.5B", 1_500_000_000), ("300k", 300_000), ("2_000_000", 2_000_000)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "m", "10x", "1e6", "-1m", "100k", "11b", "nan", "1 0m"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="is no number of parameters"):
        parse_size(text)


def test_training_follows_the_published_laws():
    config = ladder_config(size="1b")
    found = {choice.name: choice for choice in training_choices(config, tokens=100_000_000_000, optimizer="adamw")}
    # Step Law by hand: 0.58 · (10¹¹)^0.571 = 1,109,700 tokens, 542 rows of 2048: 512.
    assert found["pretrain.batch_size"].value == 512
    # 1.79 · 906,077,696^-0.713 · (10¹¹)^0.307 = 1.79 · 4.111e-7 · 2388.8
    assert found["pretrain.lr"].value == pytest.approx(1.8e-3, rel=0.03)
    assert "pretrain.muon_lr" not in found
    assert "pretrain.tokens" not in found
    assert training_choices(config)[0].value == "compute-optimal"


def test_every_derived_value_has_a_reason():
    config = ladder_config(size="30m")
    for choice in [*shape_choices(config, "size 30m"), *training_choices(config)]:
        assert len(choice.reason) > 5, choice


def test_a_recipe_of_one_number():
    recipe = parse_recipe('[model]\nsize = "10m"\n[align.sft]\n', "my.toml")
    whole = resolve(recipe)
    assert whole.tokenizer.vocab_size == 8192
    assert whole.pretrain.tokens == "compute-optimal"
    rates = (whole.pretrain.batch_size, whole.pretrain.lr, whole.align["sft"].lr)
    assert rates == (64, 0.0021, 0.0021)
    assert whole.model.config(8192) == preset("ground-10m")
    # The recipe itself says what was written.
    assert (recipe.tokenizer.vocab_size, recipe.pretrain.lr) == (2048, PretrainSettings().lr)
    derived = {name: (value, reason) for name, value, reason in derived_values(recipe)}
    assert {item.setting for item in derivations(recipe)} <= set(derived)
    assert derived["model.d_model"][0] == "256"
    assert "arXiv" in derived["pretrain.batch_size"][1]


def test_what_follows_is_not_written_down_and_follows_again():
    recipe = parse_recipe('[model]\nsize = "10m"\n', "my.toml")
    text = recipe_toml(recipe)
    assert tomllib.loads(text) == {"name": "mine", "model": {"size": "10m"}}
    assert parse_recipe(text, "my.toml") == recipe
    larger = parse_recipe(text, "my.toml", ['model.size="100m"'])
    assert resolve(larger).pretrain.lr == 0.0012
    every = recipe_toml(recipe, all_settings=True, comments=True)
    assert resolve(parse_recipe(every, "my.toml", ['model.size="100m"'])).pretrain.lr == 0.0012
    assert "# lr = 0.0021" in every
    assert tomllib.loads(every) == tomllib.loads(text)


def test_explicit_values_win():
    asked = ["model.depth=8", "model.n_kv_heads=2", "tokenizer.vocab_size=1000", "pretrain.lr=1e-3"]
    recipe = parse_recipe("", "my.toml", [*asked, "pretrain.tokens=1_000_000"])
    whole = resolve(recipe)
    assert (whole.pretrain.lr, whole.pretrain.tokens, whole.tokenizer.vocab_size) == (1e-3, 1_000_000, 1000)
    assert whole.pretrain.batch_size == 8  # 0.58 · (10⁶)^0.571 = 1,547 tokens: the least batch
    config = recipe.model.config(1000)
    assert (config.n_kv_heads, config.n_layers, config.d_model) == (2, 8, 256)
    assert {item.setting for item in derivations(recipe)} == {"pretrain.batch_size", "pretrain.muon_lr"}


def test_without_one_number_nothing_is_derived():
    recipe = parse_recipe('[model]\npreset = "ground-10m"\n', "my.toml")
    assert resolve(recipe).pretrain == PretrainSettings()
    assert derivations(recipe) == []


def test_a_smoke_run_of_one_number_is_read_back_as_it_is():
    smoke = smoke_profile(parse_recipe('[model]\nsize = "3m"\n[align.sft]\n', "my.toml"))
    assert smoke.pretrain.tokens == 160_000
    again = parse_recipe(recipe_toml(smoke), "my.toml")
    assert again == smoke
    assert resolve(again) == resolve(smoke)
    # Rates follow from the size as in the whole run.
    assert "pretrain.lr" in {item.setting for item in derivations(smoke)}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('size = "10m"\ndepth = 8', "size and depth are both given"),
        ('size = "10m"\npreset = "gpt2"', "preset and size are both given"),
        ('size = "tall"', "is no number of parameters"),
        ("depth = 1", "greater than or equal to 2"),
        ('attention = "windw"', "attention"),
        ('rope_scaling = { kind = "linear" }', "factor"),
    ],
)
def test_models_that_cannot_be_meant_are_refused(text, what):
    with pytest.raises(RecipeError, match=what):
        parse_recipe(f"[model]\n{text}\n", "my.toml")


def test_a_size_off_the_ladder_is_told_by_the_check():
    with pytest.raises(RecipeError, match="200k to 10b"):
        check_recipe(parse_recipe('[model]\nsize = "90b"\n', "my.toml"), "my.toml")


def test_every_field_of_a_model_can_be_set_in_a_recipe():
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - {"vocab_size"}
    assert set(ModelSettings.model_fields) == fields | {"preset", "size", "depth"}
    assert set(RopeScalingSettings.model_fields) == {field.name for field in dataclasses.fields(RopeScaling)}
    for section, config in ((ModelSettings, ModelConfig), (RopeScalingSettings, RopeScaling)):
        hints = get_type_hints(config)
        for name, field in section.model_fields.items():
            told = get_args(hints.get(name))
            if told and all(isinstance(choice, str) for choice in told):
                asked = next(
                    (get_args(one) for one in get_args(field.annotation) if get_args(one)), get_args(field.annotation)
                )
                assert set(told) == set(asked), name


def test_a_recipe_can_ask_for_every_part():
    recipe = parse_recipe(
        '[model]\npreset = "ground-nano"\nattention = ["window", "full"]\nwindow = 16\nn_experts = 4\n'
        'rope_scaling = { kind = "yarn", factor = 4.0, original_context = 64 }\nlogit_softcap = 30.0\n',
        "my.toml",
    )
    config = recipe.model.config(512)
    assert config.rope_scaling == RopeScaling(kind="yarn", factor=4.0, original_context=64)
    assert (config.attention, config.window, config.n_experts) == (("window", "full"), 16, 4)
    assert parse_recipe(recipe_toml(recipe), "my.toml") == recipe


def test_neither_a_recipe_nor_the_data_rooms_load_torch():
    """Worker processes of the corpus and of the shards begin in a fifth of the time."""
    import subprocess
    import sys

    # A recipe with [align.NAME] loads its methods, whose settings are in the files of what they do.
    code = (
        "import sys, groundup.corpus, groundup.shards, groundup.tokenizer.stage\n"
        "from groundup.recipe import read_recipe\nread_recipe('web')\n"
        "sys.exit(bool({'torch', 'matplotlib'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0


def test_recipes_made_in_python_follow_too():
    recipe = resolve(Recipe(model=ModelSettings(depth=8), align={"sft": SFTSettings(optimizer="adamw")}))
    assert recipe.pretrain.lr == 0.0021
    assert (recipe.align["sft"].method, recipe.align["sft"].lr) == ("sft", 3e-3)
    with pytest.raises(ValueError, match="'mine' is no method"):
        Recipe(align={"mine": SFTSettings()})


def test_the_manual_shows_the_ladder_as_it_is():
    text = (Path(__file__).parents[1] / "manual/07-sizes-and-costs.md").read_text(encoding="utf-8")
    for name in LADDER:
        config = preset(name)
        found = {choice.name: choice.value for choice in training_choices(config)}
        size = count_parameters(config)
        row = (
            f"| `{name}` | {config.n_layers} × {config.d_model:,} | {config.n_heads} / {config.n_kv_heads} × "
            f"{config.head_dim} | {config.vocab_size:,} | {config.context_length:,} | {size:,} | "
            f"{20 * size / 1e9:.3g} G | {found['pretrain.batch_size']} | {found['pretrain.lr']:g} |"
        )
        assert row in text


def test_the_manual_shows_costs_as_they_are():
    text = (Path(__file__).parents[1] / "manual/07-sizes-and-costs.md").read_text(encoding="utf-8")
    for name in ("ground-100m", "gpt2", "llama-3.2-1b", "llama-3.1-8b"):
        config = preset(name)
        length = min(config.context_length, 2048)
        sizes = [
            cost.weight_bytes(config),
            cost.optimizer_bytes(config),
            cost.optimizer_bytes(config, "adamw"),
            sum(activation_bytes(config, 1, length, "bfloat16").values()),
        ]
        cells = " | ".join(f"{size / 2**30:.3g}" for size in sizes)
        flops = cost.forward_flops(config, length) / length / 1e9
        row = f"| `{name}` | {length:,} | {flops:.3g} | {cells} | {cost.kv_cache_bytes(config, 1) / 1024:.0f} |"
        assert row in text
    assert f"{cost.forward_flops(preset('gpt2'), 1024):,}".replace(",", "{,}") in text


def test_the_manuals_example_runs():
    text = (Path(__file__).parents[1] / "manual/07-sizes-and-costs.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, float] = {}
    exec(code, names)
    assert names["gibibytes"] > 1
