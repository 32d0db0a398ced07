"""What a Transformer is made of: `ModelConfig`. `presets.py` and `ladder.py` fill it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from groundup.errors import Problem, RecipeError

Norm = Literal["rmsnorm", "layernorm"]
NormPlacement = Literal["pre", "post"]
Position = Literal["rope", "learned", "sinusoidal", "alibi", "none"]
Pattern = Literal["full", "window", "strided", "fixed"]
Activation = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"]
Initialization = Literal["scaled", "gpt2"]
RopeScalingKind = Literal["linear", "ntk", "yarn", "llama3"]

GATED: tuple[Activation, ...] = ("swiglu", "geglu")
"""Activations of a feed-forward layer with three matrices instead of two."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "norm_placement": get_args(NormPlacement),
    "position": get_args(Position),
    "activation": get_args(Activation),
    "initialization": get_args(Initialization),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed, so that a model reads more than it was trained on."""

    # "linear": every angle divided by `factor` (position interpolation, arXiv:2306.15595); "ntk": the base raised so
    # that the slowest frequency is divided by it and the fastest stays (arXiv:2309.00071, section 3.1); "yarn": slow
    # frequencies divided, fast ones kept, a ramp between (the same, section 3.2); "llama3": the same by wavelengths
    # (Llama 3.1)
    kind: RopeScalingKind
    factor: float  # how many times longer the context becomes
    original_context: int | None = None  # tokens of context that the model was trained on (yarn, llama3)
    beta_fast: float = 32.0  # yarn: frequencies that turn more often than this within the original context stay
    beta_slow: float = 1.0  # yarn: those that turn less often than this are divided
    low_frequency_factor: float = 1.0  # llama3: wavelengths over `original_context` / this are divided
    high_frequency_factor: float = 4.0  # llama3: wavelengths under `original_context` / this stay
    attention_factor: float | None = None  # yarn: what queries and keys are multiplied by; None: 0.1 · ln(factor) + 1

    def problems(self) -> Iterator[Problem]:
        """What is wrong with it."""
        name = "[model] rope_scaling"
        if self.kind not in get_args(RopeScalingKind):
            yield _unknown("rope_scaling.kind", self.kind, get_args(RopeScalingKind))
        if not self.factor >= 1:
            yield Problem(f"{name}.factor = {self.factor}", "must be at least 1.")
        if self.kind in ("yarn", "llama3") and (self.original_context or 0) < 1:
            fix = "Give the context length that the model was trained with."
            yield Problem(f"{name}.original_context", f"is missing; {self.kind} needs it.", fix)
        if self.kind == "llama3" and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            what = f"must be above low_frequency_factor = {self.low_frequency_factor}, and both above 0."
            yield Problem(f"{name}.high_frequency_factor = {self.high_frequency_factor}", what)
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            what = f"must be above beta_slow = {self.beta_slow}, and both above 0."
            yield Problem(f"{name}.beta_fast = {self.beta_fast}", what)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer, described part by part.

    Attributes:
        vocab_size: number of tokens (V).
        context_length: tokens the model can see at once.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key/value heads; fewer than `n_heads` is grouped-query attention (arXiv:2305.13245), one is
            multi-query attention (arXiv:1911.02150).
        head_dim: width of one head.
        d_model: width of the residual stream.
        d_ff: width of the feed-forward layer; of each expert's, where there are experts.
        norm: RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450).
        norm_placement: before every sub-layer and at the end ("pre"), or behind every sum ("post": the original,
            arXiv:1706.03762, without one at the end).
        norm_weight: norms have a weight.
        norm_eps: added to the variance.
        qk_norm: normalize queries and keys per head by RMSNorm (arXiv:2010.04245), as Qwen3 does.
        position: rotary ("rope", arXiv:2104.09864, half-split as in Llama), learned absolute (GPT-2), sinusoidal
            (arXiv:1706.03762, section 3.5), linear biases ("alibi", arXiv:2108.12409), or none (arXiv:2305.19466).
        rope_theta: base of the rotary frequencies.
        rope_scaling: see `RopeScaling`; None: as trained.
        partial_rotary_factor: share of each head's features that is rotated, from the first on (1: all).
        attention: patterns of the layers in turn: ("window", "full") makes layers 0, 2, … local and 1, 3, … global.
            "full": every earlier token; "window": the last `window`; "strided" and "fixed": those of Sparse
            Transformers (arXiv:1904.10509, section 4.3) with `stride`.
        window: tokens that a position of a "window" layer sees, itself included.
        stride: length of a row ("strided") or block ("fixed").
        summary: "fixed": columns at each block's end that all later positions see.
        sink_tokens: first tokens that "window" layers see from everywhere (arXiv:2309.17453).
        attention_scale: factor of the products of queries and keys; None: 1 / sqrt(head_dim).
        attention_softcap: caps those products at ± this by tanh; None: no cap (Gemma 2, arXiv:2408.00118).
        logit_softcap: caps the model's logits in the same way.
        activation: SwiGLU or GeGLU (arXiv:2002.05202: three matrices), GELU exactly or in GPT-2's tanh form
            (arXiv:1606.08415), or squared ReLU (arXiv:2109.08668).
        n_experts: feed-forward layers in each block, of which a router chooses; 0: one, without a router.
        experts_per_token: how many of them compute a token.
        router_aux_loss_coef: coefficient of the load-balancing loss (`model/experts.py`), as Mixtral has it.
        bias: linear layers and LayerNorms have a bias.
        qkv_bias: queries, keys and values have a bias; None: as `bias` says.
        o_bias: attention's output has a bias; None: as `bias` says.
        ff_bias: the feed-forward layer has a bias; None: as `bias` says.
        norm_bias: LayerNorms have a bias; None: as `bias` says.
        tied_embeddings: the output layer is the embedding matrix.
        vocab_multiple: rows of the embedding are padded to a multiple of this, for speed; the padding never shows in
            logits or files.
        dropout: dropout on embeddings and on what each sub-layer adds, while training.
        initialization: see `model/initialization.py`.
    """

    vocab_size: int
    context_length: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    norm: Norm = "rmsnorm"
    norm_placement: NormPlacement = "pre"
    norm_weight: bool = True
    norm_eps: float = 1e-6
    qk_norm: bool = True
    position: Position = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    attention: tuple[Pattern, ...] = ("full",)
    window: int | None = None
    stride: int | None = None
    summary: int = 1
    sink_tokens: int = 0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: Activation = "swiglu"
    n_experts: int = 0
    experts_per_token: int = 2
    router_aux_loss_coef: float = 0.005
    bias: bool = False
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    ff_bias: bool | None = None
    norm_bias: bool | None = None
    tied_embeddings: bool = True
    vocab_multiple: int = 1
    dropout: float = 0.0
    initialization: Initialization = "scaled"

    def __post_init__(self) -> None:
        problems = [*self._out_of_range(), *self._unfitting()]
        if problems:
            raise RecipeError("model", problems)

    def _out_of_range(self) -> Iterator[Problem]:
        """Values that could fit no model."""
        counts = (
            "vocab_size", "context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff",
            "vocab_multiple", "summary",
        )  # fmt: skip
        for name in counts:
            if getattr(self, name) < 1:
                yield Problem(f"[model] {name} = {getattr(self, name)}", "must be at least 1.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                yield _unknown(name, getattr(self, name), choices)
        for pattern in self.attention:
            if pattern not in get_args(Pattern):
                yield _unknown("attention", pattern, get_args(Pattern))
        if not self.attention:
            yield Problem("[model] attention = []", "names no pattern.", 'For the usual one: ["full"].')
        for name in ("attention_softcap", "logit_softcap", "attention_scale", "rope_theta", "norm_eps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield Problem(f"[model] {name} = {value}", "must be above 0.")
        for name in ("n_experts", "sink_tokens", "router_aux_loss_coef", "dropout"):
            if not getattr(self, name) >= 0:
                yield Problem(f"[model] {name} = {getattr(self, name)}", "must be at least 0.")
        if self.rope_scaling is not None:
            yield from self.rope_scaling.problems()

    def _unfitting(self) -> Iterator[Problem]:
        """Values that do not fit together."""
        if self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads:
            fix = "Choose a divisor; each key/value head serves the same number of query heads."
            yield Problem(f"[model] n_kv_heads = {self.n_kv_heads}", f"does not divide n_heads = {self.n_heads}.", fix)
        if self.position == "rope" and self.head_dim % 2:
            fix = "RoPE rotates pairs: choose an even number."
            yield Problem(f"[model] head_dim = {self.head_dim}", "is odd.", fix)
        elif self.position == "rope" and (self.rotated < 2 or not self.partial_rotary_factor <= 1):
            yield Problem(
                f"[model] partial_rotary_factor = {self.partial_rotary_factor:g}",
                f"rotates {self.rotated} of {self.head_dim} features.",
                "Choose a share of at most 1 that leaves at least one pair.",
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            yield Problem(f"[model] d_model = {self.d_model}", "is odd; sines and cosines come in pairs.")
        for pattern, name in (("window", "window"), ("strided", "stride"), ("fixed", "stride")):
            if pattern in self.attention and (getattr(self, name) or 0) < 1:
                yield Problem(
                    f"[model] {name} = {getattr(self, name)}",
                    f'is needed by attention = "{pattern}".',
                    f"Give a number of tokens, such as {name} = {max(1, self.context_length // 4)}.",
                )
        if "fixed" in self.attention and self.stride and self.summary > self.stride:
            yield Problem(f"[model] summary = {self.summary}", f"is over stride = {self.stride}.")
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            what = f"must be from 1 to n_experts = {self.n_experts}."
            yield Problem(f"[model] experts_per_token = {self.experts_per_token}", what)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotated(self) -> int:
        """Features of each head that RoPE rotates; an even number."""
        return int(self.head_dim * self.partial_rotary_factor) // 2 * 2 if self.position == "rope" else 0

    @property
    def is_gated(self) -> bool:
        """The feed-forward layer has a gate: three matrices instead of two."""
        return self.activation in GATED

    def pattern(self, layer: int) -> Pattern:
        """What the attention of a layer sees."""
        return self.attention[layer % len(self.attention)]

    def has_bias(self, part: Literal["qkv", "o", "ff", "norm"]) -> bool:
        """Whether the linear layers of a part (or its norms) have a bias."""
        own: bool | None = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint."""
        return {**dataclasses.asdict(self), "attention": list(self.attention)}


def _unknown(name: str, value: object, choices: tuple[str, ...]) -> Problem:
    near = difflib.get_close_matches(str(value), choices, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else None
    return Problem(f"[model] {name} = {value!r}", f"is not one of {', '.join(choices)}.", fix)
