"""`config.json` of Hugging Face's families: every field is read, known to be harmless, or refused by its name."""

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_models import random_model
from hypothesis import given
from hypothesis import strategies as st
from interop_models import GPT2, LLAMA, NEO, VARIANTS, YARN, some_ids

import groundup as gu
from groundup.errors import ArtifactError, RecipeError
from groundup.interop import export_folder
from groundup.interop.families import FAMILIES, computed, differences, huggingface_config, read_config
from groundup.model import ModelConfig, RopeScaling, preset

transformers = pytest.importorskip("transformers")

MINIMAL = {
    "gpt2": GPT2,
    "gpt_neo": {**NEO, "attention_types": [[["global"], 3]]},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral"), LLAMA),
}


def read(kind: str, **changes: Any) -> ModelConfig:
    """Our configuration of the family's smallest `config.json` with some fields changed; None takes one away."""
    values = {"model_type": kind, **MINIMAL[kind], **changes}
    return read_config({k: v for k, v in values.items() if v is not ...}, Path("config.json"))[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_defaults_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """A file that says only what has no default, and the one that transformers makes of it."""
    full = transformers.AutoConfig.for_model(kind, **MINIMAL[kind]).to_dict()
    assert read(kind) == read_config({**full, "model_type": kind}, Path("config.json"))[0]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("llama", {"model_type": "mamba"}, "model_type = 'mamba': no groundup model"),
    "no family": ("llama", {"model_type": ...}, "model_type = None"),
    "a list for a family": ("llama", {"model_type": ["llama"]}, "model_type = "),
    "a classifier": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures = .*only Llama"),
    "two architectures": ("llama", {"architectures": ["LlamaForCausalLM", "LlamaModel"]}, "architectures = "),
    "code of its own": ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map = .*is not computed"),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = "),
    "an unknown field": ("llama", {"number_of_wheels": 4}, "number_of_wheels = 4: is no field that groundup knows"),
    "an unknown field that is false": ("llama", {"has_wheels": False}, "has_wheels = False: is no field"),
    "a missing field": ("llama", {"hidden_size": ...}, "hidden_size: is missing"),
    "a text": ("llama", {"hidden_size": "32"}, "hidden_size = '32': must be a whole number"),
    "a fraction": ("llama", {"vocab_size": 96.0}, r"vocab_size = 96\.0: must be a whole number"),
    "true": ("llama", {"num_attention_heads": True}, "num_attention_heads = True: must be a whole number"),
    "none of them": ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "n_kv_heads = 3: does not divide"),
    "no epsilon": ("llama", {"rms_norm_eps": 0}, "rms_norm_eps = 0: must be a number above 0"),
    "a flag that is a text": ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
    "another activation": ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu': is not one that groundup computes"),
    "tanh GELU with a gate": ("mistral", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = "),
    "pairs side by side": ("llama", {"rope_interleaved": True}, "rope_interleaved = True"),
    "partly rotated": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: this family rotates"),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = .*'dynamic'.* not one"),
    "longrope": ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "a factor below 1": ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "must be at least 1"),
    "not a number": ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number above 0"),
    "a factor for nothing": ("llama", {"rope_scaling": {"type": "default", "factor": 2.0}}, "factor is no part of"),
    "half of Llama 3.1": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "_freq_factor is missing"),
    "YaRN not cut": ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "truncate = false is not computed"),
    "two scalings": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 3.0}},
        "rope_scaling = .*and rope_parameters disagree",
    ),
    "two bases": ("llama", {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta = 5.0: .*disagree"),
    "not a table": ("llama", {"rope_scaling": [1]}, "rope_scaling = .*must be a table"),
    "sliding Llama": ("llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types = .*has sliding layers"),
    "sliding Llama, by window": ("llama", {"sliding_window": 5}, "sliding_window = 5: is no field"),
    "types in Mistral": ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types = .*is no field"),
    "biases in Mistral": ("mistral", {"attention_bias": True}, "attention_bias = True: is no field"),
    "no biases in Qwen2": ("qwen2", {"attention_bias": False}, "attention_bias = False: is no field"),
    "sliding layers without a window": (
        "qwen2",
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        "layer_types = .*neither use_sliding_window nor",
    ),
    "types of another number": ("qwen3", {"layer_types": ["full_attention"]}, "layer_types = .*must name 3 layers"),
    "linear attention": ("qwen3", {"layer_types": ["linear_attention"] * 3}, "layer_types = "),
    "several axes": ("qwen2", {"use_mrope": True}, "use_mrope = True"),
    "more chosen than there are": ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token = 9"),
    "scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    "looks at an encoder": ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    "a width that Llama's heads do not divide": (
        "llama",
        {"hidden_size": 34, "head_dim": 8},
        "hidden_size = 34: is not a multiple of num_attention_heads = 4",
    ),
    "a width that heads do not divide": ("gpt2", {"n_embd": 33}, "n_embd = 33: is not a multiple of n_head = 4"),
    "a name of another family": ("gpt2", {"hidden_size": 32}, "hidden_size = 32: is no field"),
    "clipped GELU": ("gpt2", {"activation_function": "gelu_10"}, "activation_function = 'gelu_10'"),
    "types that are none": ("gpt_neo", {"attention_types": [["global", 3]]}, "attention_types = "),
    "types of too few layers": ("gpt_neo", {"attention_types": [[["global"], 2]]}, "attention_types = .*3 layers"),
    "types without end": ("gpt_neo", {"attention_types": [[["global"], 10**12]]}, "attention_types = "),
    "other layers": ("gpt_neo", {"attention_layers": ["local"] * 3}, "attention_layers = .*disagree"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_computed_is_refused_by_name(fault: str) -> None:
    kind, changes, message = REFUSED[fault]
    with pytest.raises(ArtifactError, match=message):
        read(kind, **changes)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ArtifactError) as error:
        read("llama", hidden_act="relu", vocab_size=0, wheels=4)
    assert all(name in str(error.value) for name in ("hidden_act", "vocab_size", "wheels"))


def test_what_changes_nothing_is_read_over() -> None:
    changed = read(
        "llama", use_cache=False, torch_dtype="bfloat16", initializer_range=1.0, pretraining_tp=4, bos_token_id=7,
        id2label={"0": "x"}, quantization_config=None, rope_scaling=None, rope_interleaved=False, temperature=0.5,
        original_max_position_embeddings=64, partial_rotary_factor=1.0,
    )  # fmt: skip
    assert changed == read("llama")
    upcast = read("gpt2", reorder_and_upcast_attn=True, n_ctx=64, summary_type="mean", task_specific_params={})
    assert upcast == read("gpt2")


def test_noise_of_training_is_left_out_and_said() -> None:
    values = {"model_type": "gpt2", **GPT2, "resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.2}
    config, _, left_out = read_config(values, Path("config.json"))
    assert config.dropout == 0.0
    assert left_out == ["resid_pdrop = 0.1", "attn_pdrop = 0.2"]


def test_the_words_of_transformers_4_say_the_same() -> None:
    old = read("llama", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert old == read("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    both = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    assert read("llama", rope_theta=5e5, rope_scaling=both) == read(
        "llama", rope_theta=5e5, rope_scaling=both, rope_parameters={**both, "rope_theta": 5e5}
    )


def test_mixtrals_coefficient_has_the_meaning_of_ours() -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.MixtralConfig(**LLAMA, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.05)
    )
    ids = some_ids()
    out = model(ids, labels=ids)
    theirs = out.aux_loss.item() * 0.05
    gu_config = read("mixtral", num_local_experts=4, router_aux_loss_coef=0.05)
    assert gu_config.router_aux_loss_coef == 0.05
    # Every layer's experts are chosen as often as they are probable here: the loss is at its minimum, k.
    assert theirs == pytest.approx(gu_config.experts_per_token * gu_config.router_aux_loss_coef, rel=0.2)


# --- from ours to theirs

CHOICES: dict[str, list[Any]] = {
    "norm": ["rmsnorm", "layernorm"],
    "norm_weight": [True, False],
    "norm_placement": ["pre", "post"],
    "qk_norm": [False, True],
    "position": ["rope", "learned", "sinusoidal", "alibi", "none"],
    "partial_rotary_factor": [1.0, 0.5],
    "rope_scaling": [
        None,
        RopeScaling(kind="linear", factor=2.0),
        RopeScaling(kind="ntk", factor=2.0),
        RopeScaling(kind="yarn", factor=2.0, original_context=16),
        RopeScaling(kind="llama3", factor=4.0, original_context=16),
    ],
    "attention": [("full",), ("window",), ("window", "full"), ("strided",), ("fixed",)],
    "sink_tokens": [0, 2],
    "attention_scale": [None, 1.0, 0.7],
    "attention_softcap": [None, 5.0],
    "logit_softcap": [None, 5.0],
    "activation": ["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"],
    "n_experts": [0, 3],
    "bias": [False, True],
    "qkv_bias": [None, True, False],
    "o_bias": [None, True],
    "ff_bias": [None, False],
    "tied_embeddings": [True, False],
    "vocab_multiple": [1, 64],
    "head_dim": [8, 12],
    "d_model": [32, 34],
}
BASES: dict[str, dict[str, Any]] = {
    "Llama": {"qk_norm": False},
    "Qwen3": {},
    "Mistral": {"qk_norm": False, "attention": ("window",), "window": 5},
    "Mixtral": {"qk_norm": False, "n_experts": 3, "tied_embeddings": False},
    "GPT-2": {"norm": "layernorm", "qk_norm": False, "position": "learned", "activation": "gelu_tanh", "bias": True,
              "n_kv_heads": 4, "attention_scale": None},
    "GPT-Neo": {"norm": "layernorm", "qk_norm": False, "position": "learned", "activation": "gelu_tanh", "bias": True,
                "qkv_bias": False, "n_kv_heads": 4, "attention_scale": 1.0, "attention": ("full", "window")},
}  # fmt: skip


def neighbours() -> list[tuple[str, str, ModelConfig]]:
    """Every family's shape, and all that differ from it in one choice or are one choice beside another family's."""
    found = []
    for name, base in BASES.items():
        for field, values in CHOICES.items():
            for value in values:
                sizes = {"window": 5, "stride": 4, "n_kv_heads": 2, **base, field: value}
                try:
                    config = preset(
                        "ground-nano", vocab_size=96, context_length=32, n_heads=4, d_ff=40,
                        **{"head_dim": 8, "d_model": 32, **sizes},
                    )  # fmt: skip
                except RecipeError:
                    continue
                if config.n_experts and config.d_model % 4:
                    continue  # torch's grouped products, which transformers calls, take no such width
                found.append((name, f"{field}={value}", config))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_model_leaves_if_and_only_if_transformers_computes_it(base: str, tmp_path: Path) -> None:
    """Whatever gets a name is computed the same by transformers; what gets none loads in groundup as it was."""
    ids = some_ids(1, 20)
    names: dict[str | None, int] = {}
    for number, (of, _, config) in enumerate(neighbours()):
        if of != base:
            continue
        model = random_model_of(config, seed=number)
        folder = tmp_path / str(number)
        gu.save_model(folder, model)
        again = gu.load(folder).model
        assert again.config == config
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        names[kind] = names.get(kind, 0) + 1
        with torch.no_grad():
            assert torch.equal(again(ids), model(ids))
            if kind is None:
                with pytest.raises(ArtifactError, match="no architecture that computes this model: "):
                    export_folder(folder, tmp_path / "out")
                continue
            export_folder(folder, tmp_path / f"{number}-out")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}-out", dtype=torch.float32)
            torch.testing.assert_close(theirs.eval()(ids).logits, model(ids), atol=2e-5, rtol=1e-4)
    assert len(names) > 1
    assert names[None] > 3


def random_model_of(config: ModelConfig, seed: int) -> gu.Transformer:
    model = gu.Transformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if name in ("embed_tokens.weight", "lm_head.weight"):
                parameter[config.vocab_size :] = 0
    return model


def test_every_field_of_the_configuration_is_compared_or_known_to_change_nothing() -> None:
    """A new part of ModelConfig must make a difference, or be named among those that make none."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields - computed(preset("ground-nano")).keys() == {
        "bias", "dropout", "initialization", "vocab_multiple", "router_aux_loss_coef",
    }  # fmt: skip


def test_the_message_names_what_transformers_lacks(tmp_path: Path) -> None:
    gu.save_model(tmp_path / "model", random_model("ground-nano", logit_softcap=30.0))
    with pytest.raises(ArtifactError, match=r"computes this model: logit_softcap = 30\.0\.\n"):
        export_folder(tmp_path / "model", tmp_path / "out")
    assert differences(preset("ground-nano"), "llama") == ["qk_norm = True"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_read_as_the_same(variant: str) -> None:
    kind, values = VARIANTS[variant]
    full = transformers.AutoConfig.for_model(kind, **values).to_dict()
    config = read_config(full, Path("config.json"))[0]
    written = huggingface_config(config, kind)
    assert written["model_type"] == kind
    assert read_config(written, Path("config.json"))[0] == config


def test_where_several_families_compute_the_same_the_asked_one_is_taken() -> None:
    plain = preset("llama-nano")
    assert [huggingface_config(plain, name)["model_type"] for name in (None, "llama", "mistral", "gpt2")] == [
        "llama", "llama", "mistral", "llama",
    ]  # fmt: skip
    assert len(list(itertools.chain(*(differences(plain, name) for name in ("llama", "mistral"))))) == 0


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([10**400, 1e308, 5e-324])
    | st.integers(-3, 10**12)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data(), kind=st.sampled_from(sorted(FAMILIES)))
def test_any_value_of_any_field_is_read_or_refused_in_words(data: st.DataObject, kind: str) -> None:
    full = transformers.AutoConfig.for_model(kind, **MINIMAL[kind]).to_dict()
    names = sorted({*full, "rope_scaling", "rope_theta", "layer_types", "partial_rotary_factor"})
    changes = data.draw(st.dictionaries(st.sampled_from(names), ANYTHING, min_size=1, max_size=3))
    with contextlib.suppress(ArtifactError):
        read_config({**full, "model_type": kind, **changes}, Path("config.json"))


@given(changes=st.dictionaries(st.sampled_from([*YARN, "beta_fast", "type"]), ANYTHING))
def test_any_scaling_is_read_or_refused_in_words(changes: dict[str, Any]) -> None:
    with contextlib.suppress(ArtifactError):
        read("llama", rope_parameters={**YARN, **changes})
