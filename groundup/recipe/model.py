"""The section that says what the model is: a preset or one number, and what to change in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from groundup.recipe.sections import Section, setting

if TYPE_CHECKING:
    from groundup.model import ModelConfig

DEFAULT_PRESET = "ground-1m"
_CHOOSES = ("preset", "size", "depth")


class RopeScalingSettings(Section):
    """How rotary frequencies are changed for contexts longer than those of training."""

    kind: Literal["linear", "ntk", "yarn", "llama3"] = setting(
        ...,
        "linear: positions are divided by the factor; ntk: rope_theta is raised; "
        "yarn, llama3: low frequencies are divided",
    )
    factor: float = setting(
        ..., "how many times longer the context becomes: new length / trained length", ge=1.0, le=1024.0
    )
    original_context: int | None = setting(
        None, "context length that the model was trained with; yarn and llama3 need it", ge=1
    )
    beta_fast: float = setting(32.0, "yarn: frequencies with more turns than this in original_context are kept", gt=0.0)
    beta_slow: float = setting(
        1.0, "yarn: frequencies with fewer turns than this in original_context are divided", gt=0.0
    )
    low_frequency_factor: float = setting(1.0, "llama3: wavelengths above original_context / this are divided", gt=0.0)
    high_frequency_factor: float = setting(4.0, "llama3: wavelengths below original_context / this are kept", gt=0.0)
    attention_factor: float | None = setting(
        None, "yarn: queries and keys are multiplied by this (unset: 0.1 · ln(factor) + 1)", gt=0.0
    )


class ModelSettings(Section):
    """The Transformer: a preset or one number to start from, and what to change in it (unset: as in the preset)."""

    preset: str | None = setting(
        None, f"a shape to start from; `groundup model list` names them (unset: {DEFAULT_PRESET}, or that of init)"
    )
    size: str | None = setting(
        None,
        'instead of a preset: number of parameters, such as "10m"; shape, vocabulary, batch, learning rates and tokens '
        "are derived from it where they are unset",
    )
    depth: int | None = setting(
        None, "instead of a size: number of blocks, from which the rest of the model is derived", ge=2, le=64
    )
    context_length: int | None = setting(None, "tokens the model can see at once", ge=8, le=1 << 20)
    n_layers: int | None = setting(None, "number of blocks", ge=1, le=512)
    n_heads: int | None = setting(None, "query heads", ge=1, le=512)
    n_kv_heads: int | None = setting(None, "key/value heads (a divisor of n_heads)", ge=1, le=512)
    head_dim: int | None = setting(None, "width of one head", ge=2, le=1024)
    d_model: int | None = setting(None, "width of the residual stream", ge=2, le=1 << 16)
    d_ff: int | None = setting(
        None, "width of the feed-forward layer (of each expert, where there are experts)", ge=2, le=1 << 18
    )
    norm: Literal["rmsnorm", "layernorm"] | None = setting(None, "normalization: rmsnorm or layernorm")
    norm_placement: Literal["pre", "post"] | None = setting(
        None, "pre: before every sub-layer; post: after every residual sum, as in the original Transformer"
    )
    norm_weight: bool | None = setting(None, "norms have a learned weight")
    norm_eps: float | None = setting(None, "added to the variance in norms, against division by zero", gt=0.0, le=0.1)
    qk_norm: bool | None = setting(
        None, "normalize queries and keys per head by RMSNorm; steadier at high learning rates"
    )
    position: Literal["rope", "learned", "sinusoidal", "alibi", "none"] | None = setting(
        None, "position encoding: rope, learned, sinusoidal, alibi or none"
    )
    rope_theta: float | None = setting(
        None, "base of the rotary frequencies; larger for longer contexts", gt=1.0, le=1e9
    )
    partial_rotary_factor: float | None = setting(
        None, "share of each head's features that RoPE rotates (1: all)", gt=0.0, le=1.0
    )
    rope_scaling: RopeScalingSettings | None = None
    attention: tuple[Literal["full", "window", "strided", "fixed"], ...] | None = setting(
        None,
        'attention patterns, repeated over the layers, such as ["window", "full"]: full, window, strided, fixed',
        min_length=1,
    )
    window: int | None = setting(
        None, "window layers: tokens that each position attends to, itself included", ge=1, le=1 << 20
    )
    stride: int | None = setting(None, "strided and fixed layers: length of a row or block in tokens", ge=1, le=1 << 20)
    summary: int | None = setting(
        None, "fixed layers: last positions of each block that all later positions attend to", ge=1
    )
    sink_tokens: int | None = setting(
        None, "window layers: first tokens of the text that every position attends to", ge=0
    )
    attention_scale: float | None = setting(
        None, "attention scores are q · k times this (unset: 1 / sqrt(head_dim))", gt=0.0, le=16.0
    )
    attention_softcap: float | None = setting(
        None, "attention scores are capped at ± this by tanh (unset: no cap)", gt=0.0
    )
    logit_softcap: float | None = setting(None, "logits are capped at ± this by tanh (unset: no cap)", gt=0.0)
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] | None = setting(
        None, "activation of the feed-forward layer: swiglu, geglu, gelu, gelu_tanh (GPT-2's) or relu2"
    )
    n_experts: int | None = setting(
        None, "experts per block: feed-forward layers that a router chooses from (0: no experts)", ge=0
    )
    experts_per_token: int | None = setting(None, "experts that compute each token", ge=1)
    router_aux_loss_coef: float | None = setting(
        None, "coefficient of the experts' load-balancing loss, as in Mixtral's config", ge=0.0
    )
    bias: bool | None = setting(None, "linear layers and LayerNorms have a bias")
    qkv_bias: bool | None = setting(None, "queries, keys and values have a bias (unset: as bias says)")
    o_bias: bool | None = setting(None, "attention's output has a bias (unset: as bias says)")
    ff_bias: bool | None = setting(None, "the feed-forward layer has a bias (unset: as bias says)")
    norm_bias: bool | None = setting(None, "LayerNorms have a bias (unset: as bias says)")
    tied_embeddings: bool | None = setting(None, "input and output embeddings share one matrix")
    vocab_multiple: int | None = setting(
        None,
        "embedding rows are padded to a multiple of this, for speed; 64 suits GPUs",
        ge=1,
        le=4096,
    )
    dropout: float | None = setting(
        None,
        "dropout on embeddings and sub-layer outputs in training; 0 for a single pass over the data",
        ge=0.0,
        lt=1.0,
    )
    initialization: Literal["scaled", "gpt2"] | None = setting(
        None, "initial weights: scaled (1/sqrt(fan-in), output projections 0) or gpt2 (N(0, 0.02))"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_pattern_is_a_list_of_one(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("attention"), str):
            return {**values, "attention": [values["attention"]]}
        return values

    @model_validator(mode="after")
    def _one_starting_point(self) -> ModelSettings:
        given = [name for name in _CHOOSES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: each is a whole shape, keep one")
        if self.size is not None and not re.fullmatch(r"\d[\d_]*(\.\d+)?\s*[kmbKMB]?", self.size.strip()):
            raise ValueError(f'size {self.size!r} is no number of parameters: write it as "10m" or "1.5b"')
        return self

    @property
    def follows_from_one_number(self) -> bool:
        """The shape comes from `size` or `depth`."""
        return self.size is not None or self.depth is not None

    def overrides(self) -> dict[str, Any]:
        """What the user set beside the shape to start from, as `ModelConfig` has it."""
        values = self.model_dump(exclude_none=True)
        return {name: value for name, value in values.items() if name not in _CHOOSES}

    def config(self, vocab_size: int) -> ModelConfig:
        """The model that is asked for, with a vocabulary of this size.

        Raises:
            RecipeError: no such preset or size, or values that do not fit together.
        """
        # Loads torch, which a recipe that is only read does not need.
        from groundup.model import ladder_config, preset

        if self.follows_from_one_number:
            return ladder_config(size=self.size, depth=self.depth, vocab_size=vocab_size, **self.overrides())
        return preset(self.preset or DEFAULT_PRESET, vocab_size=vocab_size, **self.overrides())
