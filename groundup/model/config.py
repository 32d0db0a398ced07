"""What a Transformer is made of: `ModelConfig`, and the presets that fill it.

A preset is an entry of `presets.toml`; nothing in the code knows a preset by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

from groundup.errors import Problem, RecipeError

Norm = Literal["rmsnorm", "layernorm"]
Position = Literal["rope", "learned"]
Activation = Literal["swiglu", "gelu"]
Initialization = Literal["scaled", "gpt2"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "position": get_args(Position),
    "activation": get_args(Activation),
    "initialization": get_args(Initialization),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only Transformer, described part by part.

    Attributes:
        vocab_size: number of tokens (V).
        context_length: tokens the model can see at once.
        n_layers: number of blocks.
        n_heads: query heads.
        n_kv_heads: key/value heads; fewer than `n_heads` is grouped-query attention (arXiv:2305.13245).
        head_dim: width of one head.
        d_model: width of the residual stream.
        d_ff: width of the feed-forward layer.
        norm: normalization before every sub-layer and at the end.
        norm_eps: added to the variance.
        qk_norm: normalize queries and keys per head (arXiv:2010.04245), as Qwen3 does.
        position: rotary (arXiv:2104.09864, half-split as in Llama) or learned absolute embeddings (GPT-2).
        rope_base: base of the rotary frequencies.
        activation: SwiGLU (arXiv:2002.05202) or GELU in its tanh form (GPT-2).
        bias: linear layers and LayerNorms have a bias.
        tied_embeddings: the output layer is the embedding matrix.
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
    norm_eps: float = 1e-6
    qk_norm: bool = True
    position: Position = "rope"
    rope_base: float = 10_000.0
    activation: Activation = "swiglu"
    bias: bool = False
    tied_embeddings: bool = True
    dropout: float = 0.0
    initialization: Initialization = "scaled"

    def __post_init__(self) -> None:
        counts = ["vocab_size", "context_length", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_model", "d_ff"]
        problems = [
            Problem(f"[model] {name} = {getattr(self, name)}", "must be at least 1.")
            for name in counts
            if getattr(self, name) < 1
        ]
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                what = f"is not one of {', '.join(choices)}."
                problems.append(Problem(f"[model] {name} = {getattr(self, name)!r}", what))
        if not problems and self.n_heads % self.n_kv_heads:
            problems.append(
                Problem(
                    f"[model] n_kv_heads = {self.n_kv_heads}",
                    f"does not divide n_heads = {self.n_heads}.",
                    "Choose a divisor; each key/value head serves the same number of query heads.",
                )
            )
        if self.position == "rope" and self.head_dim % 2:
            problems.append(
                Problem(f"[model] head_dim = {self.head_dim}", "is odd.", "RoPE rotates pairs: choose an even number.")
            )
        if problems:
            raise RecipeError("model", problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in a checkpoint."""
        return dataclasses.asdict(self)


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files(__package__).joinpath("presets.toml").read_text("utf-8"))


def preset_names() -> list[str]:
    """The presets' names, small to large within a family."""
    return list(_presets())


def preset(name: str, **overrides: Any) -> ModelConfig:
    """A preset's configuration, with some fields replaced.

    Widths that follow from others are derived again when only one side is overridden: `head_dim`
    from `d_model / n_heads`, `n_kv_heads` from `n_heads`, `d_ff` in proportion to `d_model`.

    Raises:
        RecipeError: no such preset or field, or values that do not fit together.
    """
    presets = _presets()
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Presets: {', '.join(presets)}."
        raise RecipeError("model", [Problem(f"[model] preset = {name!r}", "no such preset.", fix)])
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = [key for key in overrides if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        raise RecipeError(
            "model",
            [
                Problem(f"[model] {key}", "no such field.", f"Did you mean {near[0]!r}?" if near else None)
                for key in unknown
            ],
        )
    base = {key: value for key, value in presets[name].items() if key in fields}
    changed = {key for key, value in overrides.items() if base.get(key) != value}
    if "n_heads" in changed and "n_kv_heads" not in overrides:
        same = base["n_heads"] == base["n_kv_heads"]
        base["n_kv_heads"] = overrides["n_heads"] if same else min(base["n_kv_heads"], overrides["n_heads"])
    if changed & {"n_heads", "d_model"} and "head_dim" not in overrides:
        width, heads = overrides.get("d_model", base["d_model"]), overrides.get("n_heads", base["n_heads"])
        if width % heads:
            raise RecipeError(
                "model",
                [
                    Problem(
                        f"[model] d_model = {width}",
                        f"is not a multiple of n_heads = {heads}.",
                        "Change one, or set head_dim.",
                    )
                ],
            )
        base["head_dim"] = width // heads
    if "d_model" in changed and "d_ff" not in overrides:
        base["d_ff"] = max(1, round(base["d_ff"] * overrides["d_model"] / base["d_model"]))
    return ModelConfig(**{**base, **overrides})
