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
        ..., "linear: positions divided by the factor; ntk: the base raised; yarn, llama3: slow frequencies divided"
    )
    factor: float = setting(..., "how many times longer the context becomes", ge=1.0, le=1024.0)
    original_context: int | None = setting(None, "yarn, llama3: tokens of context in training", ge=1)
    beta_fast: float = setting(32.0, "yarn: frequencies that turn more often within the original context stay", gt=0.0)
    beta_slow: float = setting(1.0, "yarn: those that turn less often are divided", gt=0.0)
    low_frequency_factor: float = setting(1.0, "llama3: wavelengths over original_context / this are divided", gt=0.0)
    high_frequency_factor: float = setting(4.0, "llama3: wavelengths under original_context / this stay", gt=0.0)
    attention_factor: float | None = setting(
        None, "yarn: factor of queries and keys (unset: 0.1 · ln(factor) + 1)", gt=0.0
    )


class ModelSettings(Section):
    """The Transformer: a preset or one number to start from, and what to change in it (unset: as it is there)."""

    preset: str | None = setting(
        None, f"a shape to start from; `groundup model list` names them (unset: {DEFAULT_PRESET}, or that of init)"
    )
    size: str | None = setting(
        None,
        'instead of a preset: parameters in all, such as "10m"; shape, vocabulary, batch, learning rates and tokens '
        "follow where they are unset",
    )
    depth: int | None = setting(
        None, "instead of a size: the number of blocks, from which the same follows", ge=2, le=64
    )
    context_length: int | None = setting(None, "tokens the model can see at once", ge=8, le=1 << 20)
    n_layers: int | None = setting(None, "number of blocks", ge=1, le=512)
    n_heads: int | None = setting(None, "query heads", ge=1, le=512)
    n_kv_heads: int | None = setting(None, "key/value heads (a divisor of n_heads)", ge=1, le=512)
    head_dim: int | None = setting(None, "width of one head", ge=2, le=1024)
    d_model: int | None = setting(None, "width of the residual stream", ge=2, le=1 << 16)
    d_ff: int | None = setting(None, "width of the feed-forward layer, of each expert's", ge=2, le=1 << 18)
    norm: Literal["rmsnorm", "layernorm"] | None = setting(None, "normalization: rmsnorm or layernorm")
    norm_placement: Literal["pre", "post"] | None = setting(
        None, "before every sub-layer (pre), or behind every sum as in the original Transformer (post)"
    )
    norm_weight: bool | None = setting(None, "norms have a weight")
    norm_eps: float | None = setting(None, "added to the variance", gt=0.0, le=0.1)
    qk_norm: bool | None = setting(None, "queries and keys are normalized per head")
    position: Literal["rope", "learned", "sinusoidal", "alibi", "none"] | None = setting(
        None, "how positions are told: rope, learned, sinusoidal, alibi or none"
    )
    rope_base: float | None = setting(None, "base of the rotary frequencies", gt=1.0, le=1e9)
    rope_share: float | None = setting(None, "share of each head's features that is rotated", gt=0.0, le=1.0)
    rope_scaling: RopeScalingSettings | None = None
    attention: tuple[Literal["full", "window", "strided", "fixed"], ...] | None = setting(
        None, 'patterns of the layers in turn, such as ["window", "full"]: full, window, strided, fixed', min_length=1
    )
    window: int | None = setting(None, "tokens that a window layer sees, itself included", ge=1, le=1 << 20)
    stride: int | None = setting(None, "strided, fixed: length of a row or block", ge=1, le=1 << 20)
    summary: int | None = setting(None, "fixed: columns at each block's end that all later positions see", ge=1)
    sink_tokens: int | None = setting(None, "first tokens that window layers see from everywhere", ge=0)
    attention_scale: float | None = setting(None, "factor of q · k (unset: 1 / sqrt(head_dim))", gt=0.0, le=16.0)
    attention_softcap: float | None = setting(None, "caps q · k at ± this by tanh", gt=0.0)
    logit_softcap: float | None = setting(None, "caps the logits at ± this by tanh", gt=0.0)
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] | None = setting(
        None, "of the feed-forward layer: swiglu, geglu, gelu, gelu_tanh (GPT-2's) or relu2"
    )
    n_experts: int | None = setting(None, "feed-forward layers in a block that a router chooses from (0: one)", ge=0)
    experts_per_token: int | None = setting(None, "how many of them compute a token", ge=1)
    router_loss: float | None = setting(None, "coefficient of the load-balancing loss", ge=0.0)
    bias: bool | None = setting(None, "linear layers and LayerNorms have a bias; the next four say otherwise")
    qkv_bias: bool | None = setting(None, "queries, keys and values have a bias")
    o_bias: bool | None = setting(None, "attention's output has a bias")
    ff_bias: bool | None = setting(None, "the feed-forward layer has a bias")
    norm_bias: bool | None = setting(None, "LayerNorms have a bias")
    tied_embeddings: bool | None = setting(None, "input and output embeddings share one matrix")
    vocab_multiple: int | None = setting(
        None,
        "the embedding is filled up to a multiple of so many rows, for speed; nobody else sees them",
        ge=1,
        le=4096,
    )
    dropout: float | None = setting(None, "dropout on the residual stream while training", ge=0.0, lt=1.0)
    initialization: Literal["scaled", "gpt2"] | None = setting(
        None, "scaled: 1/sqrt(fan-in), zero output projections; gpt2: N(0, 0.02)"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_pattern_is_a_list_of_one(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("attention"), str):
            return {**values, "attention": [values["attention"]]}
        return values

    @model_validator(mode="after")
    def _one_start(self) -> ModelSettings:
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
