"""Hugging Face's families: what each calls the parts of a model, and where its files keep the weights.

A family is data and two functions: `read` makes our configuration of its `config.json`, `write` the reverse. Nothing
else says what a family can express: a model has a family's name if what `write` wrote, read again, computes the same
(`huggingface_config`). So a new part of `ModelConfig` can never be exported silently as something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.errors import ArtifactError, RecipeError
from groundup.interop.fields import Fields
from groundup.interop.gpt_configs import read_gpt2, read_gpt_neo, write_gpt2, write_gpt_neo
from groundup.interop.layouts import ModuleMapping, ModuleMappings
from groundup.interop.llama_configs import LlamaLike, read_llama_like, write_llama_like
from groundup.interop.rope import resolved_rope
from groundup.model import ModelConfig


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: its name in a `config.json`.
        architecture: the class of transformers.
        read: fields to the arguments of `ModelConfig`.
        write: a configuration to fields, as well as it can.
        layout: where the weights stand.
        base: the class without an output layer.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    layout: ModuleMappings
    base: str


OURS: ModuleMappings = {}
"""The layout of models that no family computes: our names, `model.` before them; that is Llama's layout too."""

_GPT: dict[str, ModuleMapping] = {
    "embed_tokens": ModuleMapping("transformer.wte"),
    "embed_positions": ModuleMapping("transformer.wpe"),
    "norm": ModuleMapping("transformer.ln_f"),
    "layers.*.input_layernorm": ModuleMapping("transformer.h.*.ln_1"),
    "layers.*.post_attention_layernorm": ModuleMapping("transformer.h.*.ln_2"),
}
_GPT2: ModuleMappings = _GPT | {
    "layers.*.self_attn.q_proj": ModuleMapping("transformer.h.*.attn.c_attn", transposed=True, slot=0, slots=3),
    "layers.*.self_attn.k_proj": ModuleMapping("transformer.h.*.attn.c_attn", transposed=True, slot=1, slots=3),
    "layers.*.self_attn.v_proj": ModuleMapping("transformer.h.*.attn.c_attn", transposed=True, slot=2, slots=3),
    "layers.*.self_attn.o_proj": ModuleMapping("transformer.h.*.attn.c_proj", transposed=True),
    "layers.*.mlp.up_proj": ModuleMapping("transformer.h.*.mlp.c_fc", transposed=True),
    "layers.*.mlp.down_proj": ModuleMapping("transformer.h.*.mlp.c_proj", transposed=True),
}
_GPT_NEO: ModuleMappings = _GPT | {
    "layers.*.self_attn.q_proj": ModuleMapping("transformer.h.*.attn.attention.q_proj"),
    "layers.*.self_attn.k_proj": ModuleMapping("transformer.h.*.attn.attention.k_proj"),
    "layers.*.self_attn.v_proj": ModuleMapping("transformer.h.*.attn.attention.v_proj"),
    "layers.*.self_attn.o_proj": ModuleMapping("transformer.h.*.attn.attention.out_proj"),
    "layers.*.mlp.up_proj": ModuleMapping("transformer.h.*.mlp.c_fc"),
    "layers.*.mlp.down_proj": ModuleMapping("transformer.h.*.mlp.c_proj"),
}
_MIXTRAL_LAYOUT: ModuleMappings = {
    "layers.*.mlp.router": ModuleMapping("model.layers.*.block_sparse_moe.gate"),
    "layers.*.mlp.gate_proj": ModuleMapping("model.layers.*.block_sparse_moe.experts.#.w1"),
    "layers.*.mlp.down_proj": ModuleMapping("model.layers.*.block_sparse_moe.experts.#.w2"),
    "layers.*.mlp.up_proj": ModuleMapping("model.layers.*.block_sparse_moe.experts.#.w3"),
}
_LLAMA = LlamaLike(
    fields={"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False}, is_divided=True
)
_MISTRAL = LlamaLike(fields={"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096})
_QWEN = {
    "max_position_embeddings": 32_768, "num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_QWEN2 = LlamaLike(fields=_QWEN, qkv_bias=True)
_QWEN3 = LlamaLike(fields={**_QWEN, "head_dim": 128, "attention_bias": False}, qk_norm=True)
_MIXTRAL = LlamaLike(
    fields={
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": None, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
    }
)  # fmt: skip


def _llama_like(model_type: str, stem: str, family: LlamaLike, layout: ModuleMappings) -> Family:
    return Family(
        model_type,
        f"{stem}ForCausalLM",
        lambda fields: read_llama_like(fields, family),
        lambda config: write_llama_like(config, family),
        layout,
        f"{stem}Model",
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _llama_like("llama", "Llama", _LLAMA, OURS),
        _llama_like("mistral", "Mistral", _MISTRAL, OURS),
        _llama_like("qwen2", "Qwen2", _QWEN2, OURS),
        _llama_like("qwen3", "Qwen3", _QWEN3, OURS),
        _llama_like("mixtral", "Mixtral", _MIXTRAL, _MIXTRAL_LAYOUT),
        Family("gpt2", "GPT2LMHeadModel", read_gpt2, write_gpt2, _GPT2, "GPT2Model"),
        Family("gpt_neo", "GPTNeoForCausalLM", read_gpt_neo, write_gpt_neo, _GPT_NEO, "GPTNeoModel"),
    )
}
"""By model type; where several compute the same, the first gives a model its name."""


def read_config(values: dict[str, Any], path: Path) -> tuple[ModelConfig, Family, list[str]]:
    """Our configuration from a family's `config.json`.

    Args:
        values: of the file.
        path: of the file, for messages.

    Returns:
        The configuration, its family, and the training noise (dropout) that it leaves out.

    Raises:
        ArtifactError: of no family that is read, or a field has a value that is not computed here; all are named.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ArtifactError(
            f"{path}: model_type = {kind!r:.60}: no groundup model, and of no family that is read.",
            f"Read are {', '.join(FAMILIES)}.",
        )
    family = FAMILIES[kind]
    fields = Fields(values, path)
    named = values.get("architectures")
    if named is not None and named not in ([family.architecture], [family.base]):
        fields.refuse("architectures", f"only {family.architecture} is read of this family.")
    arguments = family.read(fields)
    fields.finish()
    try:
        return ModelConfig(**arguments), family, fields.left_out()
    except RecipeError as error:
        raise ArtifactError(f"{path}: {'; '.join(map(str, error.problems)).replace('[model] ', '')}") from error


def huggingface_config(config: ModelConfig, prefer: str | None = None) -> dict[str, Any]:
    """What transformers needs to know, or an empty dictionary where it has no such architecture.

    Where several model types compute the same, the preferred one is taken.
    """
    names = sorted(FAMILIES, key=lambda name: name != prefer)
    found = next((name for name in names if not differences(config, name)), None)
    if found is None:
        return {}
    family = FAMILIES[found]
    return {"architectures": [family.architecture], "model_type": found, **family.write(config)}


def differences(config: ModelConfig, model_type: str) -> list[str]:
    """The parts of a model that a family cannot express, as `field = value`; none: it is of that family."""
    family = FAMILIES[model_type]
    written = family.write(config)
    try:
        again, _, _ = read_config({"model_type": model_type, **written}, Path("config.json"))
    except ArtifactError as error:
        return [error.message.removeprefix("config.json: this model cannot be read: ")]
    ours, theirs = computed(config), computed(again)
    return [f"{name} = {value!r}" for name, value in ours.items() if theirs[name] != value]


def computed(config: ModelConfig) -> dict[str, Any]:
    """The parts of a configuration that change the function that the model computes."""
    values = config.to_dict()
    for name in ("bias", "dropout", "initialization", "vocab_multiple", "router_aux_loss_coef"):
        del values[name]
    for part in ("qkv", "o", "ff"):
        values[f"{part}_bias"] = config.has_bias(part)
    values["norm_bias"] = config.norm == "layernorm" and config.has_bias("norm")
    patterns = [config.pattern(layer) for layer in range(config.n_layers)]
    values["attention"] = patterns
    for name, users in (
        ("window", {"window"}),
        ("sink_tokens", {"window"}),
        ("stride", {"strided", "fixed"}),
        ("summary", {"fixed"}),
    ):
        if not users & set(patterns):
            values[name] = None
    if config.position == "rope":
        values["rope_theta"], values["rope_scaling"] = resolved_rope(config)
        values["partial_rotary_factor"] = config.rotated
    else:
        values["rope_theta"] = values["rope_scaling"] = values["partial_rotary_factor"] = None
    if config.attention_scale is None:
        values["attention_scale"] = config.head_dim**-0.5
    if not config.n_experts:
        values["experts_per_token"] = None
    return values
